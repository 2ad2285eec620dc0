defmodule ExESDB.StandIn.Raft do
  @moduledoc """
  One member of a store's Raft group: leader election, log replication and read index of the Raft paper, fixed members.

  The log is kept in memory and in a file without fsync: it survives `kill -9`, not a power cut. There are no log
  snapshots and no pre-vote. A command is answered by the caller's local member after *it* has applied the command
  (`reply_from => local` of Khepri); commands are carried out once, however often they are sent on.
  The switch `:replication_lag_ms` delays applying on followers: they acknowledge at once, but read old data.
  """

  use GenServer

  alias ExESDB.StandIn
  alias ExESDB.StandIn.Tree

  @tick_ms 100
  @election_ms 600..1200
  # After a nodedown of the leader nobody needs to wait for the silence that proves its death.
  @fast_election_ms 50..250
  @entries_per_message 500
  @remembered_commands 20_000

  defstruct [:store, :me, :members, :file, :table, :leader, :vote, :deadline, :last_tick] ++
              [role: :follower, term: 0, log: %{}, last: 0, commit: 0, applied: 0, heard: 0, votes: [], seq: 0] ++
              [next: %{}, match: %{}, acked: %{}, probing: %{}, reads: [], waiting: %{}, results: %{}] ++
              [order: :queue.new()]

  def start_link({store, _members, _directory} = arguments),
    do: GenServer.start_link(__MODULE__, arguments, name: store)

  def child_spec({store, _, _} = arguments),
    do: %{id: {__MODULE__, store}, start: {__MODULE__, :start_link, [arguments]}}

  @doc "Carries out a command of `Tree`; its result, or `{:error, :noproc | :timeout}` (then it may still happen)."
  def command(store, command, timeout), do: ask(store, {:command, command}, timeout)

  @doc "Waits until the local member has applied all that was committed when this was called."
  def fence(store, timeout), do: ask(store, :fence, timeout)

  @doc "What the local member knows: `%{leader: node | nil, members: [node], term: .., last_applied: .., ..}` or nil."
  def info(store) do
    case :ets.lookup(:standin_info, store) do
      [{^store, info}] -> info
      [] -> nil
    end
  end

  defp ask(store, request, timeout) do
    case is_atom(store) && Tree.known?(store) && Process.whereis(store) do
      pid when is_pid(pid) ->
        ref = Process.monitor(pid)
        send(pid, {:ask, self(), ref, request})

        receive do
          {^ref, answer} ->
            Process.demonitor(ref, [:flush])
            answer

          {:DOWN, ^ref, _, _, _} ->
            {:error, :noproc}
        after
          timeout ->
            Process.demonitor(ref, [:flush])
            send(pid, {:forget, ref})

            receive do
              {^ref, answer} -> answer
            after
              0 -> {:error, :timeout}
            end
        end

      _ ->
        {:error, :noproc}
    end
  end

  @impl true
  def init({store, members, directory}) do
    Process.flag(:priority, :high)
    :net_kernel.monitor_nodes(true)
    File.mkdir_p!(directory)
    table = Tree.new(store)
    state = %__MODULE__{store: store, me: node(), members: members, table: table, last_tick: now()}
    state = restore(state, Path.join(directory, "#{store}.log"))
    Process.send_after(self(), :tick, @tick_ms)
    first = if members == [node()], do: 0..0, else: @election_ms
    {:ok, publish(postpone_election(state, first)), {:continue, :alone}}
  end

  @impl true
  def handle_continue(:alone, state), do: {:noreply, if(state.members == [state.me], do: elect(state), else: state)}

  @impl true
  def handle_info({:ask, pid, ref, request}, state) do
    state = put_in(state.waiting[ref], %{pid: pid, request: request, accepted: nil, index: nil})
    {:noreply, submit(state, ref)}
  end

  def handle_info({:forget, ref}, state), do: {:noreply, %{state | waiting: Map.delete(state.waiting, ref)}}
  def handle_info({:raft, from, message}, state), do: {:noreply, receive_message(message, from, state)}
  def handle_info({:apply, index}, state), do: {:noreply, apply_up_to(state, index)}

  def handle_info(:tick, state) do
    Process.send_after(self(), :tick, @tick_ms)
    # A process that was frozen has heard nobody, which proves nothing about the leader.
    frozen? = now() - state.last_tick > 4 * @tick_ms
    state = %{state | last_tick: now()}
    state = if frozen?, do: postpone_election(state, @election_ms), else: state

    cond do
      state.role == :leader -> {:noreply, state |> resubmit() |> broadcast()}
      now() >= state.deadline -> {:noreply, elect(state)}
      true -> {:noreply, resubmit(state)}
    end
  end

  def handle_info({:nodedown, node}, %{leader: node} = state),
    do: {:noreply, publish(postpone_election(%{state | leader: nil, heard: 0}, @fast_election_ms))}

  def handle_info(_other, state), do: {:noreply, state}

  ## Requests of local callers

  defp submit(%{role: :leader} = state, ref), do: accept(state, state.me, ref, state.waiting[ref].request)
  defp submit(%{leader: nil} = state, _ref), do: state

  defp submit(state, ref) do
    tell(state, state.leader, {:submit, ref, state.waiting[ref].request})
    state
  end

  defp resubmit(state) do
    Enum.reduce(state.waiting, state, fn {ref, %{accepted: accepted, index: index}}, state ->
      if accepted == state.term or index != nil, do: state, else: submit(state, ref)
    end)
  end

  defp accept(state, from, ref, {:command, command}) do
    state = append(state, [{state.term, ref, command}])
    accepted(state, from, ref) |> broadcast() |> advance_commit()
  end

  defp accept(state, from, ref, :fence) do
    # A new leader knows what is committed once an entry of its own term is.
    if term_at(state, state.commit) == state.term do
      state = %{state | seq: state.seq + 1}
      state = %{state | reads: [{state.seq, from, ref, state.commit} | state.reads]}
      accepted(state, from, ref) |> broadcast() |> confirm_reads()
    else
      state
    end
  end

  defp accepted(%{me: me} = state, me, ref), do: note_accepted(state, ref, state.term)

  defp accepted(state, from, ref) do
    tell(state, from, {:accepted, state.term, ref})
    state
  end

  defp note_accepted(state, ref, term) do
    case state.waiting do
      %{^ref => waiting} -> put_in(state.waiting[ref], %{waiting | accepted: term})
      _ -> state
    end
  end

  defp answer(state, ref, result) do
    case Map.pop(state.waiting, ref) do
      {nil, _} ->
        state

      {%{pid: pid}, waiting} ->
        send(pid, {ref, result})
        %{state | waiting: waiting}
    end
  end

  ## Messages of other members

  defp receive_message({:submit, ref, request}, from, state),
    do: if(state.role == :leader, do: accept(state, from, ref, request), else: state)

  defp receive_message({:accepted, term, ref}, _from, state), do: note_accepted(state, ref, term)

  defp receive_message({:read_index, ref, index}, _from, state) do
    case state.waiting do
      %{^ref => waiting} -> answer_fences(put_in(state.waiting[ref], %{waiting | index: index}))
      _ -> state
    end
  end

  defp receive_message({:vote_request, term, last, last_term}, from, state) do
    cond do
      led_recently?(state) ->
        state

      term < state.term ->
        tell(state, from, {:vote, state.term, false})
        state

      true ->
        state = if term > state.term, do: follow(state, term, nil), else: state
        newer? = {last_term, last} >= {term_at(state, state.last), state.last}
        grant? = state.vote in [nil, from] and newer?
        state = if grant?, do: remember(postpone_election(%{state | vote: from}, @election_ms)), else: state
        tell(state, from, {:vote, state.term, grant?})
        state
    end
  end

  defp receive_message({:vote, term, _}, _from, state) when term > state.term, do: follow(state, term, nil)

  defp receive_message({:vote, term, true}, from, %{role: :candidate, term: term} = state),
    do: count_votes(%{state | votes: Enum.uniq([from | state.votes])})

  defp receive_message({:vote, _, _}, _from, state), do: state

  defp receive_message({:append, term, _, _, _, _, seq}, from, state) when term < state.term do
    tell(state, from, {:appended, state.term, :stale, state.last, seq})
    state
  end

  defp receive_message({:append, term, previous, previous_term, entries, commit, seq}, from, state) do
    state =
      if {term, from, :follower} == {state.term, state.leader, state.role}, do: state, else: follow(state, term, from)

    state = postpone_election(%{state | heard: now()}, @election_ms)

    if previous <= state.last and term_at(state, previous) == previous_term do
      state = take_entries(state, previous, entries)
      match = previous + length(entries)
      tell(state, from, {:appended, term, :ok, match, seq})
      commit_up_to(state, min(commit, match))
    else
      tell(state, from, {:appended, term, :reject, min(state.last, previous - 1), seq})
      state
    end
  end

  defp receive_message({:appended, term, _, _, _}, _from, state) when term > state.term, do: follow(state, term, nil)

  defp receive_message({:appended, term, :ok, match, seq}, from, %{role: :leader, term: term} = state) do
    state = %{state | match: Map.update!(state.match, from, &max(&1, match))}
    state = %{state | next: Map.update!(state.next, from, &max(&1, match + 1))}
    state = %{state | acked: Map.update!(state.acked, from, &max(&1, seq)), probing: Map.delete(state.probing, from)}
    state = state |> advance_commit() |> confirm_reads()
    if state.next[from] <= state.last, do: send_entries(state, from), else: state
  end

  defp receive_message({:appended, term, :reject, hint, _}, from, %{role: :leader, term: term} = state) do
    state = %{state | next: Map.put(state.next, from, hint + 1), probing: Map.put(state.probing, from, true)}
    send_entries(state, from)
  end

  defp receive_message({:appended, _, _, _, _}, _from, state), do: state

  defp led_recently?(%{role: :leader}), do: true
  defp led_recently?(state), do: state.leader != nil and now() - state.heard < Enum.min(@election_ms)

  ## Roles

  defp follow(state, term, leader) do
    vote = if term > state.term, do: nil, else: state.vote
    changed? = term > state.term
    state = %{state | role: :follower, term: term, vote: vote, leader: leader, reads: [], votes: []}
    state = if changed?, do: remember(state), else: state
    state |> postpone_election(@election_ms) |> publish() |> resubmit()
  end

  defp elect(state) do
    state = %{state | role: :candidate, term: state.term + 1, vote: state.me, votes: [state.me], leader: nil}
    state = state |> remember() |> postpone_election(@election_ms) |> publish()

    for peer <- others(state),
        do: tell(state, peer, {:vote_request, state.term, state.last, term_at(state, state.last)})

    count_votes(state)
  end

  defp count_votes(state) do
    if length(state.votes) * 2 > length(state.members) do
      peers = others(state)
      state = %{state | role: :leader, leader: state.me, reads: [], probing: %{}}
      state = %{state | next: Map.new(peers, &{&1, state.last + 1}), match: Map.new(peers, &{&1, 0})}
      state = %{state | acked: Map.new(peers, &{&1, 0})}
      state |> append([{state.term, nil, :nothing}]) |> publish() |> resubmit() |> broadcast() |> advance_commit()
    else
      state
    end
  end

  ## Replication

  defp broadcast(state), do: Enum.reduce(others(state), state, &send_entries(&2, &1))

  defp send_entries(state, peer) do
    first = state.next[peer]
    previous = first - 1
    # While the place where the logs agree is being looked for, the messages stay small.
    until = if is_map_key(state.probing, peer), do: previous, else: min(state.last, previous + @entries_per_message)
    entries = for index <- first..until//1, do: state.log[index]
    tell(state, peer, {:append, state.term, previous, term_at(state, previous), entries, state.commit, state.seq})
    %{state | next: Map.put(state.next, peer, until + 1)}
  end

  defp take_entries(state, _previous, []), do: state

  defp take_entries(state, previous, [{term, _, _} | rest] = entries) do
    index = previous + 1

    if index <= state.last and term_at(state, index) == term,
      do: take_entries(state, index, rest),
      else: append(%{state | last: previous, log: truncate(state.log, index, state.last)}, entries)
  end

  defp truncate(log, first, last), do: Enum.reduce(first..last//1, log, &Map.delete(&2, &1))

  defp append(state, entries) do
    numbered = Enum.with_index(entries, state.last + 1)
    write(state, for({entry, index} <- numbered, do: {:entry, index, entry}))
    log = Enum.reduce(numbered, state.log, fn {entry, index}, log -> Map.put(log, index, entry) end)
    %{state | log: log, last: state.last + length(entries)}
  end

  defp advance_commit(%{role: :leader} = state) do
    matches = Enum.sort([state.last | Map.values(state.match)], :desc)
    index = Enum.at(matches, div(length(state.members), 2))

    if index > state.commit and term_at(state, index) == state.term,
      do: state |> commit_up_to(index) |> broadcast(),
      else: state
  end

  defp advance_commit(state), do: state

  defp confirm_reads(state) do
    seqs = Enum.sort([state.seq | Map.values(state.acked)], :desc)
    confirmed = Enum.at(seqs, div(length(state.members), 2))
    {ready, reads} = Enum.split_with(state.reads, fn {seq, _, _, _} -> seq <= confirmed end)
    state = %{state | reads: reads}

    Enum.reduce(ready, state, fn {_, from, ref, index}, state ->
      if from == state.me do
        receive_message({:read_index, ref, index}, from, state)
      else
        tell(state, from, {:read_index, ref, index})
        state
      end
    end)
  end

  defp commit_up_to(state, index) when index <= state.commit, do: state

  defp commit_up_to(state, index) do
    state = %{state | commit: index}
    lag = StandIn.switch(:replication_lag_ms, 0)

    if lag > 0 and state.role != :leader do
      Process.send_after(self(), {:apply, index}, lag)
      publish(state)
    else
      apply_up_to(state, index)
    end
  end

  defp apply_up_to(state, index) do
    Enum.reduce((state.applied + 1)..index//1, state, &apply_entry(&2, state.log[&1]))
    |> Map.update!(:applied, &max(&1, index))
    |> publish()
    |> answer_fences()
  end

  defp apply_entry(state, {_term, nil, command}) do
    Tree.apply_command(state.table, command)
    state
  end

  defp apply_entry(state, {_term, ref, command}) do
    case state.results do
      %{^ref => result} ->
        answer(state, ref, result)

      _ ->
        result = Tree.apply_command(state.table, command)
        StandIn.applied(state.store, state.role, command, result)
        state |> remember_result(ref, result) |> answer(ref, result)
    end
  end

  defp remember_result(state, ref, result) do
    state = %{state | results: Map.put(state.results, ref, result), order: :queue.in(ref, state.order)}

    if map_size(state.results) > @remembered_commands do
      {{:value, oldest}, order} = :queue.out(state.order)
      %{state | results: Map.delete(state.results, oldest), order: order}
    else
      state
    end
  end

  defp answer_fences(state) do
    ready = for {ref, %{index: index}} <- state.waiting, index != nil and index <= state.applied, do: ref
    Enum.reduce(ready, state, &answer(&2, &1, :ok))
  end

  ## The file

  defp restore(state, path) do
    content = if File.exists?(path), do: File.read!(path), else: ""
    {state, size} = replay(content, state, 0)
    if size < byte_size(content), do: File.write!(path, binary_part(content, 0, size))
    %{state | file: File.open!(path, [:append, :raw])}
  end

  defp replay(<<size::32, record::binary-size(size), rest::binary>>, state, read) do
    state =
      case :erlang.binary_to_term(record) do
        {:vote, term, vote} ->
          %{state | term: term, vote: vote}

        {:entry, index, entry} ->
          log = truncate(state.log, index, state.last)
          %{state | log: Map.put(log, index, entry), last: index}
      end

    replay(rest, state, read + 4 + size)
  end

  defp replay(_incomplete, state, read), do: {state, read}

  defp remember(state) do
    write(state, [{:vote, state.term, state.vote}])
    state
  end

  defp write(state, records) do
    frames = for record <- records, encoded = :erlang.term_to_binary(record), do: [<<byte_size(encoded)::32>>, encoded]
    :ok = :file.write(state.file, frames)
  end

  ## Small things

  defp publish(state) do
    info = %{leader: state.leader, members: state.members, state: state.role, term: state.term}
    indexes = %{last_applied: state.applied, commit_index: state.commit, last_written_index: state.last}
    :ets.insert(:standin_info, {state.store, Map.merge(info, indexes)})
    state
  end

  defp postpone_election(state, range), do: %{state | deadline: now() + Enum.random(range)}
  defp others(state), do: state.members -- [state.me]
  defp term_at(_state, 0), do: 0
  defp term_at(state, index), do: elem(state.log[index], 0)
  defp now, do: System.monotonic_time(:millisecond)

  # Neither waiting for a connection nor for a peer that does not read: both would stop this member too.
  defp tell(state, peer, message),
    do: :erlang.send({state.store, peer}, {:raft, state.me, message}, [:noconnect, :nosuspend])
end
