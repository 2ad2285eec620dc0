# The writers of chaos.py: Elixir processes that append through gateways, as programs that use ExESDB do, and keep a
# record of every append and of what they were answered.

defmodule Chaos.Writers do
  @moduledoc """
  `start(options)` starts writers, `stop/0` ends them after the call each is in, `save(path)` writes their records and forgets them:
  `{stream, expected, ids, answer, at_us, elapsed_us, who}`, `answer` being what came, or `{:exit, reason}`. Reads are
  recorded as `{:read, stream, known, told_by, told_at_us, answer, at_us, elapsed_us, who}`, `known` being the highest version
  that this writer had been told before, and by whom (-1 and nil: none).
  """

  @store :reg_gh
  # Longer than any gateway may take, so that a late answer is seen and counted.
  @patience_ms 8_000
  @hot_streams 10

  def start(options) do
    stop_flag = :atomics.new(1, [])
    :persistent_term.put(__MODULE__, Map.put(Map.new(options), :stop_flag, stop_flag))
    keeper = spawn(fn -> keep(Map.new(options)) end)
    Process.register(keeper, __MODULE__)
    :ok
  end

  @doc "Waits until all writers have ended; how many appends there were."
  def stop do
    :atomics.put(options().stop_flag, 1, 1)
    ask(:await)
  end

  def save(path), do: ask({:save, path})

  @doc "Appends answered so far."
  def count, do: :ets.info(:chaos_records, :size)

  defp ask(question) do
    ref = Process.monitor(__MODULE__)
    send(__MODULE__, {question, self(), ref})

    receive do
      {^ref, answer} -> answer
      {:DOWN, ^ref, _, _, reason} -> exit(reason)
    end
  end

  defp keep(options) do
    :ets.new(:chaos_records, [:named_table, :public, :duplicate_bag, write_concurrency: true])
    tasks = for n <- 1..options.writers, do: Task.async(fn -> write(%{n: n, target: n, next: 0, versions: %{}}) end)
    answer_questions(tasks)
  end

  defp answer_questions(tasks) do
    receive do
      {:await, from, ref} ->
        Task.await_many(tasks, :infinity)
        send(from, {ref, :ets.info(:chaos_records, :size)})
        answer_questions([])

      {{:save, path}, from, ref} ->
        records = for {record} <- :ets.tab2list(:chaos_records), do: record
        File.write!(path, :erlang.term_to_binary(records))
        # The end: there may be others who start anew.
        :ets.delete(:chaos_records)
        Process.unregister(__MODULE__)
        send(from, {ref, :ok})
    end
  end

  defp options, do: :persistent_term.get(__MODULE__)

  ## One writer

  defp write(state) do
    if :atomics.get(options().stop_flag, 1) == 0 do
      state |> append(stream()) |> write()
    end
  end

  defp stream do
    count = if :rand.uniform() < 0.2, do: @hot_streams, else: options().streams
    "#{options().prefix}#{:rand.uniform(count) - 1}"
  end

  defp append(state, stream) do
    Process.sleep(div(options().pause_ms, 2) + :rand.uniform(options().pause_ms))
    {expected, state} = expected(state, stream)
    count = Enum.random([1, 1, 1, 1, 1, 1, 2, 4])
    ids = for k <- 1..count, do: "#{state.n}-#{state.next}-#{k}"
    events = for id <- ids, do: event(id)

    request =
      if expected == nil,
        do: {:append_events, @store, stream, events},
        else: {:append_events, @store, stream, expected, events}

    {answer, at, elapsed, who} = call(state, request)
    :ets.insert(:chaos_records, {{stream, expected, ids, answer, at, elapsed, who}})
    state = %{state | next: state.next + 1}

    case answer do
      {:ok, version} -> told(state, stream, version, who)
      {:error, {:wrong_expected_version, version}} -> told(state, stream, version, who)
      {:error, {:partially_appended, _, _}} -> state
      _ -> elsewhere(state)
    end
  end

  defp told(state, stream, version, who) do
    {known, _, _} = known(state, stream)
    if version < known, do: state, else: put_in(state.versions[stream], {version, who, System.system_time(:microsecond)})
  end

  defp known(state, stream), do: Map.get(state.versions, stream, {-1, nil, 0})

  # Mostly what a program does: read, decide, append where it has read. Also what is out of date, or too far ahead.
  defp expected(state, stream) do
    luck = :rand.uniform()

    cond do
      luck < 0.15 -> {elem(known(state, stream), 0), state}
      luck < 0.35 -> {Enum.random([nil, :any]), state}
      luck < 0.38 -> {:stream_exists, state}
      true -> ask_version(state, stream, if(luck < 0.40, do: 2, else: 0))
    end
  end

  defp ask_version(state, stream, ahead) do
    {known, told_by, told_at} = known(state, stream)
    {answer, at, elapsed, who} = call(state, {:get_version, @store, stream})
    :ets.insert(:chaos_records, {{:read, stream, known, told_by, told_at, answer, at, elapsed, who}})

    case answer do
      {:ok, version} -> {version + ahead, state}
      _trouble -> {:any, elsewhere(state)}
    end
  end

  # The gateway is gone, is about to go, or cannot say what became of the append: on with another one.
  defp elsewhere(state) do
    Process.sleep(20 + :rand.uniform(30))
    %{state | target: state.target + 1}
  end

  defp event(id) do
    fields = %{event_id: id, event_type: "counted:v1", data: %{id: id}, metadata: %{"by" => "chaos"}}
    types = %{data_content_type: "application/x-erlang-term", metadata_content_type: "application/x-erlang-term"}
    fields |> Map.merge(types) |> Map.put(:__struct__, ExESDB.Schema.NewEvent)
  end

  ## Calls

  defp call(state, request) do
    who = target(state)
    at = System.system_time(:microsecond)
    started = System.monotonic_time(:microsecond)

    answer =
      try do
        send_request(who, request, rem(state.n, 2))
      catch
        :exit, reason -> {:exit, brief(reason)}
        :error, reason -> {:exit, brief(reason)}
      end

    {answer, at, System.monotonic_time(:microsecond) - started, brief(who)}
  end

  defp send_request({:gateway, node}, request, 0),
    do: GenServer.call({ExESDBGater.API, node}, request, @patience_ms)

  defp send_request({:gateway, node}, request, 1) do
    [function | arguments] = Tuple.to_list(request)
    :erpc.call(node, ExESDBGater.API, function, arguments, @patience_ms)
  end

  defp send_request({:worker, pid}, request, _), do: GenServer.call(pid, request, @patience_ms)
  defp send_request(nil, _request, _), do: exit(:nobody)

  defp target(state) do
    case options().targets do
      {:gateways, nodes} -> {:gateway, Enum.at(nodes, rem(state.target, length(nodes)))}
      {:workers, nodes} -> random_worker(nodes)
    end
  end

  # Any worker any store node knows, as the original's gateway chooses.
  defp random_worker(nodes) do
    case :erpc.call(Enum.random(nodes), Swarm, :registered, [], 1_000) do
      [_ | _] = registered ->
        workers = for {{:gateway_worker, @store, _, _}, pid} <- registered, do: pid
        if workers == [], do: nil, else: {:worker, Enum.random(workers)}

      _ ->
        nil
    end
  catch
    _, _ -> nil
  end

  defp brief({reason, {GenServer, :call, _}}), do: brief(reason)
  defp brief({:worker, pid}), do: node(pid)
  defp brief({:gateway, node}), do: node
  defp brief({:erpc, reason}), do: reason
  defp brief({{:nodedown, _} = reason, _}), do: reason
  defp brief(reason) when is_atom(reason), do: reason
  defp brief(reason), do: inspect(reason, limit: 5)
end
