# A BEAM node that behaves as an ExESDB 0.11 node towards gateways, faults included. See README.md beside this file.
#
#   STANDIN_STORES=reg_gh elixir --name node0@127.0.0.1 --cookie secret --no-halt standin.exs

defmodule ExESDB.Schema.NewEvent do
  @moduledoc false
  defstruct [
    :event_id,
    :event_type,
    :data_content_type,
    :metadata_content_type,
    :data,
    :metadata,
    __unknown_fields__: []
  ]
end

defmodule ExESDB.Schema.EventRecord do
  @moduledoc false
  defstruct [:event_stream_id, :event_number, :event_id, :event_type, :data_content_type, :metadata_content_type] ++
              [:data, :metadata, :created, :created_epoch, __unknown_fields__: []]
end

defmodule ExESDB.Schema.SnapshotRecord do
  @moduledoc false
  defstruct [:source_uuid, :source_version, :source_type, :data, :metadata, :created_at, :created_epoch]
end

defmodule ExESDB.StandIn do
  @moduledoc "Starting the stand-in, and the switches that make it misbehave. All of it may be called by rpc."

  alias ExESDB.StandIn.PubSub
  alias Swarm.Tracker

  @applications [
    ex_esdb: '0.11.0',
    ex_esdb_gater: '0.8.0',
    phoenix_pubsub: '2.1.3',
    swarm: '3.4.0',
    khepri: '0.17.2',
    ra: '2.16.12'
  ]

  @doc "Starts with the settings of the environment: STANDIN_STORES, STANDIN_MEMBERS, STANDIN_WORKERS, STANDIN_DATA."
  def start_from_environment do
    start(
      stores: words("STANDIN_STORES", "reg_gh"),
      members: words("STANDIN_MEMBERS", Atom.to_string(node())),
      workers: String.to_integer(System.get_env("STANDIN_WORKERS", "2")),
      data: System.get_env("STANDIN_DATA", "standin-data")
    )
  end

  def start(options) do
    starter = self()
    # The tables and the supervisor belong to a process that stays.
    {keeper, monitor} = spawn_monitor(fn -> run(options) && send(starter, :started) && Process.sleep(:infinity) end)

    receive do
      :started -> Process.demonitor(monitor, [:flush]) && :ok
      {:DOWN, ^monitor, :process, ^keeper, reason} -> exit(reason)
    end
  end

  defp run(options) do
    :ets.new(:standin_switches, [:named_table, :public, read_concurrency: true])
    :ets.new(:standin_info, [:named_table, :public, read_concurrency: true])
    :persistent_term.put(__MODULE__, Map.put(Map.new(options), :started, DateTime.utc_now()))
    members = options[:members]

    rafts = for store <- options[:stores], do: {ExESDB.StandIn.Raft, {store, members, options[:data]}}
    workers = for store <- options[:stores], n <- 1..options[:workers]//1, do: {ExESDB.GatewayWorker, {store, n}}

    basis = [{ExESDB.StandIn.Links, members}, Tracker, PubSub.scope_spec(), PubSub]
    children = basis ++ rafts ++ [{DynamicSupervisor, name: ExESDB.StandIn.Writers}] ++ workers

    # Workers crash as often as tests want; a limit would end the stand-in instead.
    limits = [strategy: :one_for_one, max_restarts: 1_000_000, max_seconds: 1]
    {:ok, _} = Supervisor.start_link(children, limits)
    # Last, because others take the answer of `which_applications` for an invitation.
    for {name, version} <- @applications, do: start_application(name, version)
    Tracker.leave_behind({:gater_api, :erlang.phash2(make_ref())})
    spawn(fn -> for store <- options[:stores], do: first_subscription(store) end)
    :ok
  end

  def options, do: :persistent_term.get(__MODULE__)
  def store?(store), do: store in options().stores
  def live_members, do: for(member <- options().members, member == node() or member in Node.list(), do: member)

  @doc "Whether every store of this node has a leader and all its own entries applied: then tests may begin."
  def ready? do
    Enum.all?(options().stores, fn store ->
      info = ExESDB.StandIn.Raft.info(store)
      info != nil and info.leader != nil and info.last_applied > 0 and info.last_applied == info.commit_index
    end)
  end

  ## Switches

  def set(switch, value), do: :ets.insert(:standin_switches, {switch, value}) && :ok
  def unset(switch), do: :ets.delete(:standin_switches, switch) && :ok
  def reset, do: :ets.delete_all_objects(:standin_switches) && :ok

  def switch(switch, default) do
    case :ets.lookup(:standin_switches, switch) do
      [{_, value}] -> value
      [] -> default
    end
  end

  @doc "The value of a switch that works once, and takes it away."
  def take(switch) do
    case :ets.take(:standin_switches, switch) do
      [{_, value}] -> value
      [] -> nil
    end
  end

  @doc "Adds `count` names of the kind that real registries fill up with."
  def add_junk_names(count, store \\ hd(options().stores)) do
    names = for n <- 1..count//1, do: {:streams_reader_worker, store, "junk-#{n}"}
    Tracker.fill(names, Process.whereis(ExESDB.StandIn.Links)) && :ok
  end

  @doc "Refuses connections with these nodes from now on, in both directions, and drops those there are."
  def cut(nodes) do
    for node <- nodes do
      # Of its own, or two that cut each other off would agree on a new cookie.
      Node.set_cookie(node, :"cut off by #{node()}")
      Node.disconnect(node)
    end

    :ok
  end

  @doc "Takes a `cut/1` back."
  def heal(nodes) do
    for node <- nodes, do: Node.set_cookie(node, Node.get_cookie())
    :ok
  end

  ## Where faults happen

  def before_request do
    case switch(:delay_ms, 0) do
      0 -> :ok
      delay -> Process.sleep(delay)
    end

    if take(:crash_next), do: raise("crashed by the test")

    case take(:hang_next),
      do:
        (
          nil -> :ok
          time -> Process.sleep(time)
        )
  end

  def around_append([:streams | _], append) do
    case take(:die_in_next_append) do
      :before -> Process.exit(self(), :kill) && Process.sleep(:infinity)
      :after -> append.() && Process.exit(self(), :kill) && Process.sleep(:infinity)
      nil -> append.()
    end
  end

  def around_append(_path, put), do: put.()

  @doc "Called by each member when it has applied a command."
  def applied(store, :leader, {:put, [:streams | _], event}, :ok),
    do: if(switch(:emitters, false), do: PubSub.emit(store, event))

  def applied(_store, _role, _command, _result), do: :ok

  ## Starting

  defp words(variable, default),
    do: for(word <- String.split(System.get_env(variable, default), [",", " "], trim: true), do: String.to_atom(word))

  defp start_application(name, version) do
    specification = [description: Atom.to_charlist(name), vsn: version, modules: [], registered: []]
    :application.load({:application, name, specification ++ [applications: [:kernel, :stdlib]]})
    :ok = :application.start(name)
  end

  # ExESDB subscribes itself to everything when it starts.
  defp first_subscription(store) do
    record = %{type: :by_stream, selector: "$all", subscription_name: "all-events", start_from: 0, subscriber: nil}
    path = [:subscriptions, ExESDB.GatewayWorker.subscription_key(record)]
    create = {:put, List.replace_at(path, 1, {:if_all, [Enum.at(path, 1), {:if_node_exists, false}]}), record}
    with {:error, :timeout} <- ExESDB.StandIn.Raft.command(store, create, 1_000), do: first_subscription(store)
  end
end

defmodule ExESDB.StandIn.Links do
  @moduledoc "Keeps the members connected, each from a process of its own, because connecting may take seconds."

  def child_spec(members),
    do: %{id: __MODULE__, type: :supervisor, start: {__MODULE__, :start_link, [members]}}

  def start_link(members),
    do: Supervisor.start_link(children(members), strategy: :one_for_one, name: __MODULE__)

  defp children(members) do
    for member <- members -- [node()],
        do: %{id: member, start: {Task, :start_link, [fn -> keep(member) end]}, restart: :permanent}
  end

  defp keep(member) do
    Node.connect(member)
    Process.sleep(300)
    keep(member)
  end
end

defmodule ExESDB.StreamsHelper do
  @moduledoc false

  def to_event_record(%ExESDB.Schema.NewEvent{} = new_event, stream_id, version, created, created_epoch) do
    %ExESDB.Schema.EventRecord{
      event_stream_id: stream_id,
      event_number: version,
      event_id: new_event.event_id,
      event_type: new_event.event_type,
      data_content_type: new_event.data_content_type,
      metadata_content_type: new_event.metadata_content_type,
      data: new_event.data,
      metadata: new_event.metadata,
      created: created,
      created_epoch: created_epoch
    }
  end

  def pad_version(version, length), do: version |> Integer.to_string() |> String.pad_leading(length, "0")
end

defmodule ExESDB.StoreInfo do
  @moduledoc false

  alias ExESDB.StandIn.Tree

  def get_streams!(store) do
    rows = Tree.match(Tree.table(store), [:streams, {:if_node_exists, true}])
    for {{2, [:streams, stream]}, _, _, _, events} <- rows, do: {stream, events}
  end
end

defmodule ExESDB.StandIn.Writer do
  @moduledoc """
  Appends to one stream on one node, one request at a time: compares the version it was given with the local copy, then
  puts event after event without any condition. A writer of another node does the same at the same moment, and one of
  them overwrites the other's events. With the switch `:race` set to false the puts carry Khepri's conditions.
  """

  use GenServer, restart: :temporary

  alias ExESDB.StandIn
  alias ExESDB.StandIn.{Raft, Tree}
  alias ExESDB.StreamsHelper

  @timeout_ms 5_000

  def append(store, stream, expected, events) do
    unless StandIn.store?(store),
      do: exit({:noproc, {GenServer, :call, [{:streams_writers, store}, :start_child, :infinity]}})

    GenServer.call(writer(store, stream), {:append_events, store, stream, expected, events}, :infinity)
  end

  def version(store, stream) do
    pattern = [:streams, stream, {:if_node_exists, true}]
    if Tree.known?(store), do: Tree.count(Tree.table(store), pattern) - 1, else: -1
  end

  def start_link({name, arguments}), do: GenServer.start_link(__MODULE__, arguments, name: name)

  defp writer(store, stream) do
    name = :"streams_writer_worker_#{store}_#{stream}"

    case DynamicSupervisor.start_child(StandIn.Writers, {__MODULE__, {name, {name, store, stream}}}) do
      {:ok, pid} -> pid
      {:error, {:already_started, pid}} -> pid
    end
  end

  @impl true
  def init({name, _store, _stream}) do
    Swarm.register_name(name, self())
    {:ok, nil}
  end

  @impl true
  def handle_call({:append_events, store, stream, expected, events}, _from, state) do
    if version(store, stream) == expected,
      do: {:reply, put_all(store, stream, expected, events), state},
      else: {:reply, {:error, :wrong_expected_version}, state}
  end

  defp put_all(store, stream, current, events) do
    events
    |> Enum.with_index(current + 1)
    |> Enum.reduce_while({:ok, current}, fn {event, version}, _ ->
      now = DateTime.utc_now()
      record = StreamsHelper.to_event_record(event, stream, version, now, DateTime.to_unix(now, :microsecond))
      path = [:streams, stream, StreamsHelper.pad_version(version, 6)]

      case StandIn.around_append(path, fn ->
             Raft.command(store, {:put, conditions(path, version), record}, @timeout_ms)
           end) do
        :ok -> {:cont, {:ok, version}}
        {:error, {:khepri, :mismatching_node, _}} -> {:halt, {:error, :wrong_expected_version}}
        {:error, reason} -> :erlang.error(reason)
      end
    end)
  end

  defp conditions([:streams, stream, name] = path, version) do
    cond do
      StandIn.switch(:race, true) ->
        path

      version == 0 ->
        [:streams, stream, {:if_all, [name, {:if_node_exists, false}]}]

      true ->
        [:streams, {:if_all, [stream, {:if_child_list_length, version}]}, {:if_all, [name, {:if_node_exists, false}]}]
    end
  end
end

defmodule ExESDB.GatewayWorker do
  @moduledoc "A gateway worker: answers and crashes as the one of ExESDB 0.11 does (tests/captures/exesdb_contract.json)."

  use GenServer

  alias ExESDB.StandIn
  alias ExESDB.StandIn.{Raft, Tree, Writer}
  alias ExESDB.StreamsHelper
  alias Swarm.Tracker

  @timeout_ms 5_000

  def child_spec({store, n}),
    do: %{id: {__MODULE__, store, n}, start: {GenServer, :start_link, [__MODULE__, store]}, restart: :permanent}

  def subscription_key(%{type: type, selector: selector, subscription_name: name}),
    do: {type, selector, name} |> :erlang.phash2() |> Integer.to_string()

  @impl true
  def init(store) do
    Process.flag(:trap_exit, true)
    :yes = register(store)
    {:ok, store}
  end

  defp register(store),
    do:
      with(
        :no <- Swarm.register_name({:gateway_worker, store, node(), :rand.uniform(10_000)}, self()),
        do: register(store)
      )

  @impl true
  def handle_call(request, _from, state) do
    StandIn.before_request()
    {:reply, answer(request), state}
  end

  @impl true
  def handle_cast(request, state) do
    StandIn.before_request()
    perform(request)
    {:noreply, state}
  end

  @impl true
  def handle_info(_message, state), do: {:noreply, state}

  ## Calls

  defp answer({:stream_forward, store, stream, start, count}), do: events(store, stream, start, count, :forward)
  defp answer({:stream_backward, store, stream, start, count}), do: events(store, stream, start, count, :backward)

  defp answer({:get_events, store, stream, start, count, direction}) do
    with {:ok, events} <- events(store, stream, start, count, direction), do: {:ok, Enum.to_list(events)}
  end

  defp answer({:get_streams, store}) do
    need_store(store)
    Tracker.leave_behind({:streams_reader_worker, store, "general_info"})
    {:ok, for({stream, _} <- ExESDB.StoreInfo.get_streams!(store), do: stream)}
  end

  defp answer({:get_subscriptions, store}) do
    need_store(store)
    {:ok, data_by_path(store, [:subscriptions, {:if_has_data, true}])}
  end

  defp answer({:get_version, store, stream}), do: {:ok, Writer.version(store, stream)}

  defp answer({:append_events, store, stream, events}),
    do: Writer.append(store, stream, Writer.version(store, stream), events)

  defp answer({:append_events, store, stream, expected, events}) do
    current = Writer.version(store, stream)

    if version_matches?(current, expected),
      do: Writer.append(store, stream, current, events),
      else: {:error, {:wrong_expected_version, current}}
  end

  defp answer({:read_snapshot, store, source, stream, version}) do
    need_store(store)
    Tracker.leave_behind({:snaps_reader, store, source, stream})
    with {:ok, row} <- Tree.get(Tree.table(store), snapshot_path(source, stream, version)), do: {:ok, Tree.data(row)}
  end

  defp answer({:list_snapshots, store, source, stream}) do
    need_store(store)
    Tracker.leave_behind({:snaps_reader, store, source, stream})
    {:ok, data_by_path(store, [:snapshots, any(source), any(stream), {:if_node_exists, true}])}
  end

  defp answer({:verify_cluster_consistency, store}) do
    with {:ok, members, leader} <- members(store) do
      views = for node <- nodes(members), do: view(node, store)
      raft = %{leader: {store, leader}, members: members, quorum_size: div(length(members), 2) + 1, status: :healthy}
      report(store, members, leader, raft, views)
    end
  end

  defp answer({:quick_health_check, store}) do
    case Raft.info(store) do
      nil -> {:error, :noproc}
      _ -> with {:ok, members, _} <- members(store), do: healthy(store, members)
    end
  end

  defp answer({:verify_membership_consensus, store}) do
    with {:ok, members, _leader} <- members(store) do
      case for({node, status, _} <- Enum.map(nodes(members), &view(&1, store)), status != :ok, do: node) do
        [] -> {:ok, %{status: :consensus, nodes_checked: length(members), consistent_view: members}}
        failed -> {:ok, %{status: :partial_check, nodes_checked: length(members), failed_nodes: failed}}
      end
    end
  end

  # The function this relies on does not exist in the Ra that ExESDB uses: the original always answers so.
  defp answer({:check_raft_log_consistency, store}) do
    with {:ok, members, _leader} <- members(store) do
      logs = for {_, node} = member <- members, do: {node, :error, :rpc.call(node, :ra, :log_overview, [member], 5_000)}
      consistency = %{status: :partial_failure, failed_nodes: nodes(members), successful_count: 0}
      {:ok, %{store_id: store, raft_logs: logs, consistency: consistency}}
    end
  end

  defp answer({:list_stores}) do
    %{members: members, stores: stores, data: data, started: started} = StandIn.options()
    type = if length(members) == 1, do: :single, else: :cluster

    {:ok,
     for node <- StandIn.live_members(), store <- stores do
       description = %{store_id: store, store_description: "stand-in store", tags: ["stand-in"], data_dir: data}
       settings = %{db_type: type, auto_start: true, environment: nil, priority: :normal, pub_sub: nil, timeout: 10_000}
       idle = %{reader_idle_ms: nil, writer_idle_ms: nil, status: :active, version: 1, created_at: started}
       %{node: node, store: description |> Map.merge(settings) |> Map.merge(idle)}
     end}
  end

  ## Casts

  defp perform({:save_subscription, store, type, selector, name, start_from, subscriber}),
    do: save_subscription(store, type, selector, name, start_from, subscriber)

  defp perform({:remove_subscription, store, type, selector, name}) do
    key = subscription_key(%{type: type, selector: selector, subscription_name: name})
    if StandIn.store?(store), do: Raft.command(store, {:delete, [:subscriptions, key]}, @timeout_ms)
  end

  defp perform({:ack_event, store, name, subscriber, event}) do
    %{event_stream_id: stream, event_number: number} = event
    save_subscription(store, :by_stream, "$#{stream}", name, number + 1, subscriber)
  end

  defp perform({:record_snapshot, store, source, stream, version, record}) do
    need_store(store)
    Tracker.leave_behind({:snapshots_writer, store, source, stream})

    in_another_process(fn ->
      Raft.command(store, {:put, snapshot_path(source, stream, version), record}, @timeout_ms)
    end)
  end

  defp perform({:delete_snapshot, store, source, stream, version}) do
    need_store(store)
    Tracker.leave_behind({:snapshots_writer, store, source, stream})
    in_another_process(fn -> Raft.command(store, {:delete, snapshot_path(source, stream, version)}, @timeout_ms) end)
  end

  ## Reading

  # Everything up to the list of versions happens at once, each event is read when the stream is walked through:
  # by the worker for `get_events`, by whoever gets the closures for the others.
  defp events(store, stream, start, count, direction) do
    need_store(store)

    cond do
      stream in [nil, ""] ->
        {:error, {:exception, %ArgumentError{message: "Invalid child_spec parameters: :stream_id_required"}}}

      not is_integer(start) ->
        {:error, {:invalid_start_version, start}}

      start < 0 ->
        {:error, :invalid_start_version}

      not is_integer(count) ->
        {:error, {:invalid_count, count}}

      count < 1 ->
        {:error, :invalid_count}

      true ->
        {:ok, lazy_events(store, stream, start, count, direction)}
    end
  end

  defp lazy_events(store, stream, start, count, direction) do
    Tracker.leave_behind({:streams_reader_worker, store, stream})
    last = Writer.version(store, stream)

    wanted =
      case direction do
        :forward -> start..min(start + count - 1, last)//1
        :backward -> min(start, last)..max(start - count + 1, 0)//-1
      end

    Enum.to_list(wanted) |> Stream.map(&event(store, stream, &1)) |> Stream.reject(&is_nil/1)
  end

  defp event(store, stream, version) do
    case Tree.get(Tree.table(store), [:streams, stream, StreamsHelper.pad_version(version, 6)]) do
      {:ok, row} -> Tree.data(row)
      {:error, _} -> nil
    end
  end

  defp data_by_path(store, pattern),
    do: Map.new(Tree.match(Tree.table(store), pattern), &{Tree.path(&1), Tree.data(&1)})

  defp snapshot_path(source, stream, version)
       when is_binary(source) and is_binary(stream) and is_integer(version) and version >= 0,
       do: [:snapshots, source, stream, StreamsHelper.pad_version(version, 10)]

  defp any(:any), do: {:if_node_exists, true}
  defp any(name), do: name

  ## Writing

  defp save_subscription(store, type, selector, name, start_from, subscriber) do
    record = %{type: type, selector: selector, subscription_name: name, start_from: start_from, subscriber: subscriber}
    path = [:subscriptions, subscription_key(record)]
    # A cast to a server that does not exist is lost without a sound.
    if StandIn.store?(store), do: Raft.command(store, {:put, path, record}, @timeout_ms)
  end

  # Snapshots are written by processes of their own: a request that crashes them leaves the gateway worker alone. The
  # worker waits for them here, so that what was cast before a read is seen by it.
  defp in_another_process(write) do
    {_, monitor} = spawn_monitor(write)
    receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)
  end

  defp version_matches?(_current, :any), do: true
  defp version_matches?(current, :stream_exists), do: current >= 0
  defp version_matches?(current, expected) when is_integer(expected), do: current == expected

  defp need_store(store),
    do: StandIn.store?(store) || exit({:noproc, {GenServer, :call, [{:store, store}, :request, 5_000]}})

  ## Checks

  defp members(store) do
    case Raft.info(store) do
      nil -> {:error, {:members_failed, :noproc}}
      %{members: members, leader: leader} -> {:ok, for(member <- members, do: {store, member}), leader}
    end
  end

  defp nodes(members), do: for({_, node} <- members, do: node)

  defp view(node, store) do
    case :rpc.call(node, :khepri_cluster, :members, [store], 5_000) do
      {:ok, members} -> {node, :ok, members}
      {:error, reason} -> {node, :error, reason}
      {:badrpc, reason} -> {node, :rpc_error, reason}
    end
  end

  defp healthy(store, members),
    do: {:ok, %{status: :healthy, store_id: store, member_count: length(members), members: members}}

  defp report(store, _members, nil, _raft, _views), do: {:error, {:unexpected_leader_response, store && :undefined}}

  defp report(store, members, leader, raft, views) do
    silent = Enum.filter(views, fn {_, status, _} -> status != :ok end)
    issues = if silent == [], do: [], else: [{:communication_failures, silent}]
    status = if issues == [], do: :consistent, else: :inconsistent
    advice = for {_, failed} <- issues, do: "Investigate connectivity issues with nodes: #{inspect(nodes_of(failed))}"
    checks = %{raft_status: raft, cross_node_verification: views, potential_issues: issues, recommendations: advice}
    summary = %{store_id: store, timestamp: DateTime.utc_now(), status: status, nodes_checked: length(members)}
    {:ok, summary |> Map.merge(checks) |> Map.merge(%{leader: leader, members: members})}
  end

  defp nodes_of(views), do: for({node, _, _} <- views, do: node)
end

# Run as a script it loads the rest and starts; compiled by the tests (standin.py) it only defines modules.
if System.get_env("STANDIN_STORES") do
  for file <- ["tree.exs", "raft.exs", "swarm.exs", "pubsub.exs"], do: Code.require_file(file, __DIR__)
  if System.get_env("STANDIN_KHEPRI", "1") != "0", do: Code.require_file("khepri.exs", __DIR__)
  ExESDB.StandIn.start_from_environment()
end
