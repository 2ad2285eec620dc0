# Subscribers and writers of chaos_subscriptions.py: Elixir processes on a node of their own, as programs that use ExESDB.

defmodule Chaos.Subscribers do
  @moduledoc """
  `start(specs, gateways)` subscribes a process for each spec and notes every event that comes; `counts/0` says how many
  different ones each subscription has, `save(path)` writes all of them in the order they came.

  A subscriber of a kept subscription subscribes once and then only receives: gateways hand it on among themselves. One of
  a transient subscription monitors the gateway it runs in and subscribes again, elsewhere, from where it stood.
  """

  @store :reg_gh
  @api ExESDBGater.API
  @again_ms 100

  def start(specs, gateways) do
    starter = self()

    keeper =
      spawn(fn ->
        :ets.new(:chaos_seen, [:named_table, :public, :ordered_set, write_concurrency: true])
        :ets.new(:chaos_distinct, [:named_table, :public, :set, write_concurrency: true])
        send(starter, :ready)
        Process.sleep(:infinity)
      end)

    Process.register(keeper, __MODULE__)
    receive do: (:ready -> :ok)
    for spec <- specs, do: spawn(fn -> run(spec, gateways) end)
    :ok
  end

  @doc "How many different events each subscription has."
  def counts do
    :ets.foldl(fn {{name, _, _}}, found -> Map.update(found, name, 1, &(&1 + 1)) end, %{}, :chaos_distinct)
  end

  @doc "`{subscription, subscriber, stream, number}` of every event, in the order of arrival."
  def save(path) do
    rows = for {_, name, who, stream, number} <- :ets.tab2list(:chaos_seen), do: {name, who, stream, number}
    File.write!(path, :erlang.term_to_binary(rows))
  end

  defp run(%{name: "transient"} = spec, gateways), do: follow(spec, gateways, spec.options[:start_from] || 0)

  defp run(spec, gateways) do
    subscribe(spec, gateways, spec.options)
    collect(spec, fn -> Enum.random(gateways) end, 0, nil)
  end

  defp follow(spec, gateways, next) do
    gateway = subscribe(spec, gateways, Map.put(spec.options, :start_from, next))
    monitor = Process.monitor({@api, gateway})
    follow(spec, gateways, collect(spec, fn -> gateway end, next, monitor))
  end

  # The gateway that has answered.
  defp subscribe(spec, gateways, options) do
    gateway = Enum.random(gateways)
    request = {:subscribe, @store, spec.type, spec.selector, spec.name, Map.put(options, :subscriber, self())}

    try do
      GenServer.call({@api, gateway}, request)
    catch
      :exit, _ -> :exit
    end
    |> case do
      {:ok, _} -> gateway
      _ -> Process.sleep(@again_ms) && subscribe(spec, gateways, options)
    end
  end

  defp collect(spec, gateway, next, monitor) do
    receive do
      {:events, events} ->
        for event <- events, do: note(spec, event)
        if spec.pause_ms > 0, do: Process.sleep(:rand.uniform(spec.pause_ms))
        for event <- events, not Map.get(spec.options, :auto_ack, false), do: answer(spec, gateway.(), event)
        collect(spec, gateway, List.last(events).event_number + 1, monitor)

      {:DOWN, ^monitor, _, _, _} ->
        next
    end
  end

  defp note(spec, event) do
    row = {System.unique_integer([:monotonic]), spec.label, self(), event.event_stream_id, event.event_number}
    :ets.insert(:chaos_seen, row)
    :ets.insert(:chaos_distinct, {{spec.label, event.event_stream_id, event.event_number}})
  end

  defp answer(spec, gateway, event) do
    request =
      if :rand.uniform() < spec.retries,
        do: {:nack_event, @store, spec.name, self(), event, :retry},
        else: {:ack_event, @store, spec.name, self(), event}

    GenServer.cast({@api, gateway}, request)
  end
end

defmodule Chaos.EventWriters do
  @moduledoc """
  `start(options)` starts writers, each with streams of its own: some append through gateways, some on store nodes
  themselves, where no gateway hears of it. `stop/0` ends them. Nobody's answer counts: what the store has is the truth.
  """

  @store :reg_gh
  @api ExESDBGater.API
  @types ~w(paid sent lost)
  @cities ~w(Ulm Bonn Kiel)

  def start(options) do
    :persistent_term.put(__MODULE__, :atomics.new(1, []))
    tasks = for {who, streams} <- options.writers, do: spawn_monitor(fn -> write(who, streams, options) end)
    :persistent_term.put({__MODULE__, :tasks}, tasks)
    :ok
  end

  def stop do
    :atomics.put(:persistent_term.get(__MODULE__), 1, 1)
    for {pid, _} <- :persistent_term.get({__MODULE__, :tasks}), do: await(Process.monitor(pid))
    :ok
  end

  defp await(monitor) do
    receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)
  end

  defp write(who, streams, options) do
    if :atomics.get(:persistent_term.get(__MODULE__), 1) == 0 do
      append(who, Enum.random(streams), for(_ <- 1..:rand.uniform(options.batch), do: event()), options)
      Process.sleep(:rand.uniform(options.pause_ms))
      write(who, streams, options)
    end
  end

  defp event do
    %{
      __struct__: ExESDB.Schema.NewEvent,
      __unknown_fields__: [],
      event_id: Base.encode16(:crypto.strong_rand_bytes(8)),
      event_type: Enum.random(@types),
      data_content_type: 1,
      metadata_content_type: 1,
      data: %{"kind" => :rand.uniform(3), "to" => %{"city" => Enum.random(@cities), "zip" => 89073}},
      metadata: %{}
    }
  end

  defp append(:gateways, stream, events, options) do
    GenServer.call({@api, Enum.random(options.gateways)}, {:append_events, @store, stream, events}, 8_000)
  catch
    :exit, _ -> :exit
  end

  defp append(:stores, stream, events, options) do
    node = Enum.random(options.stores)
    :erpc.call(node, :khepri, :fence, [@store, 1_000], 2_000)
    :erpc.call(node, __MODULE__, :put_all, [stream, events], 3_000)
  catch
    _, _ -> :failed
  end

  @doc "On a store node: puts one event after the other where nothing is."
  def put_all(stream, events) do
    {:ok, found} = :khepri_adv.get_many(@store, [:streams, stream], %{props_to_return: [:child_list_length]})
    first = found |> Map.values() |> Enum.map(& &1.child_list_length) |> Enum.sum()

    events
    |> Enum.with_index(first)
    |> Enum.all?(fn {event, number} ->
      now = DateTime.utc_now()
      helper = ExESDB.StreamsHelper
      record = helper.to_event_record(event, stream, number, now, DateTime.to_unix(now, :microsecond))
      name = {:if_all, [helper.pad_version(number, 6), {:if_node_exists, false}]}
      parent = if number == 0, do: stream, else: {:if_all, [stream, {:if_child_list_length, number}]}
      :khepri.put(@store, [:streams, parent, name], record, %{timeout: 1_000}) == :ok
    end)
  end
end
