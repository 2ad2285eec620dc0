defmodule Swarm.Tracker do
  @moduledoc """
  The registry of names, replicated with the messages of Swarm 3.4's tracker: `sync`, `sync_recv`, `sync_ack` and events
  `track`, `untrack`, `update_meta`. Other members of a Swarm cluster, a gateway in Python among them, can join it.

  It has no phases: it answers a `sync` at any time and starts one with each member that comes up. It resolves no
  conflicts: who came first stays. It starts no processes (`{:track, name, %{mfa: ..}}`) and hands none over.
  """

  use GenServer

  alias ExESDB.StandIn

  # Rows: {name, pid, monitor, meta, clock}, the fields of Swarm's entries.
  @table :swarm_registry

  def start_link(_), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)
  def track(name, pid, meta \\ %{}), do: GenServer.call(__MODULE__, {:track, name, pid, meta})
  def untrack(pid), do: GenServer.call(__MODULE__, {:untrack, pid})
  def add_meta(key, value, pid), do: GenServer.call(__MODULE__, {:add_meta, key, value, pid})
  def remove_meta(key, pid), do: GenServer.call(__MODULE__, {:remove_meta, key, pid})

  @doc "Registers many names at once on all stand-in members, without an event for each."
  def fill(names, pid), do: GenServer.multi_call(StandIn.live_members(), __MODULE__, {:fill, names, pid})

  @doc "Registers a name of the kind that real ExESDB leaves behind for each stream or snapshot it ever touched."
  def leave_behind(name), do: if(lookup(name) == nil, do: track(name, Process.whereis(ExESDB.StandIn.Links)))

  def rows, do: :ets.tab2list(@table)
  def lookup(name), do: List.first(:ets.lookup(@table, name))

  @impl true
  def init(nil) do
    :ets.new(@table, [:named_table, :protected, read_concurrency: true])
    :net_kernel.monitor_nodes(true, node_type: :all)
    for node <- Node.list([:visible, :hidden]), do: send(self(), {:nodeup, node, []})
    {:ok, %{clock: {1, 0}, peers: MapSet.new()}}
  end

  @impl true
  def handle_call({:track, name, pid, meta}, _from, state) do
    case lookup(name) do
      nil ->
        state = tick(state)
        insert({name, pid, Process.monitor(pid), meta, peek(state)})
        publish(state, {:track, name, pid, meta})
        {:reply, {:ok, pid}, state}

      {_, there, _, _, _} ->
        {:reply, {:error, {:already_registered, there}}, state}
    end
  end

  def handle_call({:untrack, pid}, _from, state), do: {:reply, :ok, remove(state, pid)}

  def handle_call({:add_meta, key, value, pid}, _from, state),
    do: {:reply, :ok, change_meta(state, pid, &Map.put(&1, key, value))}

  def handle_call({:remove_meta, key, pid}, _from, state),
    do: {:reply, :ok, change_meta(state, pid, &Map.delete(&1, key))}

  def handle_call({:whereis, name}, _from, state) do
    found = lookup(name)
    {:reply, if(found, do: elem(found, 1), else: :undefined), state}
  end

  def handle_call({:fill, names, pid}, _from, state) do
    :ets.insert(@table, for(name <- names, do: {name, pid, make_ref(), %{}, peek(state)}))
    {:reply, :ok, state}
  end

  @impl true
  def handle_cast({:sync, from, _clock}, state) do
    {ours, theirs} = fork(state.clock)
    GenServer.cast(from, {:sync_recv, self(), theirs, entries()})
    {:noreply, add_peer(%{state | clock: ours}, node(from))}
  end

  def handle_cast({:sync_recv, from, clock, entries}, state) do
    GenServer.cast(from, {:sync_ack, self(), clock, entries()})
    merge(entries)
    {:noreply, %{state | clock: clock}}
  end

  def handle_cast({:sync_ack, _from, _clock, entries}, state) do
    merge(entries)
    {:noreply, state}
  end

  def handle_cast(_other, state), do: {:noreply, state}

  @impl true
  def handle_info({:event, _from, clock, {:track, name, pid, meta}}, state) do
    merge([{:entry, name, pid, nil, meta, clock}])
    {:noreply, state}
  end

  def handle_info({:event, _from, _clock, {:untrack, pid}}, state) do
    delete(:ets.match_object(@table, {:_, pid, :_, :_, :_}))
    {:noreply, state}
  end

  def handle_info({:event, _from, clock, {:update_meta, meta, pid}}, state) do
    for {name, ^pid, monitor, _, _} <- rows(), do: insert({name, pid, monitor, meta, clock})
    {:noreply, state}
  end

  def handle_info({:nodeup, node, _}, state) do
    tracker = self()
    ask = fn -> send(tracker, {:applications, node, :rpc.call(node, :application, :which_applications, [])}) end
    # The original asks inside the tracker and waits as long as it takes.
    if StandIn.switch(:tracker_waits, false), do: ask.(), else: spawn(ask)

    if node in StandIn.options().members do
      GenServer.cast({__MODULE__, node}, {:sync, self(), state.clock})
      {:noreply, add_peer(state, node)}
    else
      {:noreply, state}
    end
  end

  def handle_info({:applications, node, answer}, state) do
    swarm? = is_list(answer) and List.keymember?(answer, :swarm, 0)
    {:noreply, if(swarm?, do: add_peer(state, node), else: state)}
  end

  def handle_info({:nodedown, node, _}, state) do
    gone = for {_, pid, _, _, _} = row <- rows(), node(pid) == node, do: row
    unless StandIn.switch(:keep_dead_names, false), do: delete(gone)
    {:noreply, %{state | peers: MapSet.delete(state.peers, node)}}
  end

  def handle_info({:DOWN, _, :process, pid, :noconnection}, state) do
    unless StandIn.switch(:keep_dead_names, false), do: delete(:ets.match_object(@table, {:_, pid, :_, :_, :_}))
    {:noreply, state}
  end

  def handle_info({:DOWN, _, :process, pid, _}, state), do: {:noreply, remove(state, pid)}
  def handle_info(_other, state), do: {:noreply, state}

  defp add_peer(state, node), do: %{state | peers: MapSet.put(state.peers, node)}

  defp remove(state, pid) do
    case :ets.match_object(@table, {:_, pid, :_, :_, :_}) do
      [] ->
        state

      rows ->
        delete(rows)
        state = tick(state)
        publish(state, {:untrack, pid})
        state
    end
  end

  defp change_meta(state, pid, change) do
    state = tick(state)

    for {name, ^pid, monitor, meta, _} <- rows() do
      insert({name, pid, monitor, change.(meta), peek(state)})
      publish(state, {:update_meta, change.(meta), pid})
    end

    state
  end

  defp merge(entries) do
    for {:entry, name, pid, _, meta, clock} <- entries,
        lookup(name) == nil,
        do: insert({name, pid, Process.monitor(pid), meta, clock})
  end

  defp insert(row), do: :ets.insert(@table, row)

  defp delete(rows) do
    for {name, _, monitor, _, _} <- rows, do: Process.demonitor(monitor, [:flush]) && :ets.delete(@table, name)
  end

  defp entries, do: for({name, pid, monitor, meta, clock} <- rows(), do: {:entry, name, pid, monitor, meta, clock})

  defp publish(state, event) do
    message = {:event, self(), peek(state), event}
    for node <- state.peers, do: :erlang.send({__MODULE__, node}, message, [:noconnect, :nosuspend])
  end

  ## Interval tree clocks: as much as an honest sender needs

  defp peek(%{clock: {_, events}}), do: {0, events}
  defp tick(%{clock: {id, events}} = state), do: %{state | clock: {id, event(id, events)}}

  defp fork({id, events}) do
    {left, right} = split(id)
    {{left, events}, {right, events}}
  end

  defp split(0), do: {0, 0}
  defp split(1), do: {{1, 0}, {0, 1}}
  defp split({0, id}), do: split(id) |> then(fn {left, right} -> {{0, left}, {0, right}} end)
  defp split({id, 0}), do: split(id) |> then(fn {left, right} -> {{left, 0}, {right, 0}} end)
  defp split({left, right}), do: {{left, 0}, {0, right}}

  defp event(1, events), do: highest(events) + 1
  defp event(id, n) when is_integer(n), do: event(id, {n, 0, 0})
  defp event({0, id}, {n, left, right}), do: {n, left, event(id, right)}
  defp event({id, _}, {n, left, right}), do: {n, event(id, left), right}

  defp highest(n) when is_integer(n), do: n
  defp highest({n, left, right}), do: n + max(highest(left), highest(right))
end

defmodule Swarm do
  @moduledoc "What callers on the node, and others by rpc, ask of Swarm."

  alias Swarm.Tracker

  def registered, do: for({name, pid, _, _, _} <- Tracker.rows(), do: {name, pid})
  def members(group), do: for({_, pid, _, meta, _} <- Tracker.rows(), is_map_key(meta, group), uniq: true, do: pid)
  def join(group, pid), do: Tracker.add_meta(group, true, pid)
  def leave(group, pid), do: Tracker.remove_meta(group, pid)
  def register_name(name, pid), do: if(match?({:ok, _}, Tracker.track(name, pid)), do: :yes, else: :no)

  def whereis_name(name) do
    case Tracker.lookup(name) do
      {_, pid, _, _, _} -> pid
      nil -> :undefined
    end
  end

  def unregister_name(name) do
    case whereis_name(name) do
      :undefined -> :ok
      pid -> Tracker.untrack(pid)
    end
  end
end

defmodule Swarm.Registry do
  @moduledoc false

  def get_by_name(name) do
    case Swarm.Tracker.lookup(name) do
      nil -> :undefined
      row -> :erlang.insert_element(1, row, :entry)
    end
  end
end
