%% The BEAM's half of `bench/subscriptions.py`: subscribers that note when their events come, and who appends them.
%% An event's data is #{<<"at">> => T}, T being `os:perf_counter(nanosecond)` when its append was called: one clock for
%% all processes of a machine.
-module(gater_bench_subscribers).

-export([subscribers/5, counts/1, taken/1]).
-export([one_by_one/5, paced/7, append_here/3, fill/3]).

-define(TIMEOUT_MS, 30000).

%% Processes that subscribe as a plan says: `count` of them under the names Name-1, Name-2, ..., or, if it is not `kept`,
%% as transient ones; to `selector`, or if that is `each` to the stream Name-N; `acks`: whether they acknowledge.
subscribers(Target, Store, Name, Plan, Options) ->
    Self = self(),
    Numbers = lists:seq(1, maps:get(count, Plan)),
    Pids = [spawn(fun() -> subscribe(Target, Store, name(Name, N), Plan, Options, Self) end) || N <- Numbers],
    [receive {Pid, subscribed} -> ok after ?TIMEOUT_MS -> error({not_subscribed, Pid}) end || Pid <- Pids],
    Pids.

name(Name, N) -> <<Name/binary, $-, (integer_to_binary(N))/binary>>.

subscribe(Target, Store, Own, #{selector := Selector, kept := Kept, acks := Acks}, Options, Parent) ->
    Chosen = case Selector of each -> <<$$, Own/binary>>; _ -> Selector end,
    Name = case Kept of true -> Own; false -> <<"transient">> end,
    Request = {subscribe, Store, by_stream, Chosen, Name, Options#{subscriber => self()}},
    {ok, _} = gen_server:call(Target, Request, ?TIMEOUT_MS),
    Parent ! {self(), subscribed},
    Ack = case Acks of
              true -> fun(Event) -> gen_server:cast(Target, {ack_event, Store, Name, self(), Event}) end;
              false -> fun(_) -> ok end
          end,
    subscriber(Ack, 0, []).

subscriber(Ack, Count, Seen) ->
    receive
        {events, Events} ->
            Now = os:perf_counter(nanosecond),
            [Ack(Event) || Event <- Events],
            Latencies = [{Now, Now - At} || #{data := #{<<"at">> := At}} <- Events],
            subscriber(Ack, Count + length(Events), Latencies ++ Seen);
        {count, From} ->
            From ! {self(), Count},
            subscriber(Ack, Count, Seen);
        {take, From} ->
            From ! {self(), Seen},
            subscriber(Ack, 0, [])
    end.

%% How many events each has got since the last `taken`.
counts(Pids) ->
    [Pid ! {count, self()} || Pid <- Pids],
    [receive {Pid, Count} -> Count end || Pid <- Pids].

%% <<WhenItCame:64, Latency:64, ...>> of all events, in nanoseconds; they begin anew.
taken(Pids) ->
    [Pid ! {take, self()} || Pid <- Pids],
    << <<When:64, Latency:64>> || Pid <- Pids, {When, Latency} <- receive {Pid, Seen} -> Seen end >>.

event(At) ->
    #{'__struct__' => 'Elixir.ExESDB.Schema.NewEvent', '__unknown_fields__' => [],
      event_id => integer_to_binary(erlang:unique_integer([positive])), event_type => <<"benched:v1">>,
      data_content_type => 1, metadata_content_type => 1,
      data => #{<<"at">> => At, <<"text">> => binary:copy(<<"x">>, 100)}, metadata => #{}}.

%% One append after the other, each after the one before was delivered. <<Answered:64, ...>> in nanoseconds.
one_by_one(Target, Store, Stream, Pid, Millis) ->
    Until = os:perf_counter(millisecond) + Millis,
    one_by_one(Target, Store, Stream, Pid, Until, hd(counts([Pid])), <<>>).

one_by_one(Target, Store, Stream, Pid, Until, Count, Answered) ->
    At = os:perf_counter(nanosecond),
    {ok, _} = gen_server:call(Target, {append_events, Store, Stream, [event(At)]}, ?TIMEOUT_MS),
    Took = os:perf_counter(nanosecond) - At,
    wait([Pid], [Count + 1]),
    case os:perf_counter(millisecond) < Until of
        true -> one_by_one(Target, Store, Stream, Pid, Until, Count + 1, <<Answered/binary, Took:64>>);
        false -> <<Answered/binary, Took:64>>
    end.

wait(Pids, Counts) ->
    case counts(Pids) of
        Reached when Reached >= Counts -> ok;
        _ -> wait(Pids, Counts)
    end.

%% Rate appends a second of Batch events each, for Millis, whether or not the ones before are answered: turn about to
%% Streams. {Appends that were not answered ok, <<Answered:64, ...>>}.
paced(Target, Store, Streams, Rate, Batch, Millis, Grace) ->
    Self = self(),
    Start = os:perf_counter(nanosecond),
    Count = Rate * Millis div 1000,
    Pids = pace(Target, Store, list_to_tuple(Streams), Rate, Batch, Self, Start, Count, 0, []),
    Answers = [receive {Pid, Answer} -> Answer after Grace -> none end || Pid <- Pids],
    {length([none || Answer <- Answers, not is_integer(Answer)]),
     << <<Took:64>> || Took <- Answers, is_integer(Took) >>}.

pace(_, _, _, _, _, _, _, Count, Count, Pids) -> Pids;
pace(Target, Store, Streams, Rate, Batch, Parent, Start, Count, Done, Pids) ->
    case (Start + Done * 1000000000 div Rate) - os:perf_counter(nanosecond) of
        Early when Early > 0 ->
            receive after max(1, Early div 1000000) -> ok end,
            pace(Target, Store, Streams, Rate, Batch, Parent, Start, Count, Done, Pids);
        _ ->
            Stream = element(Done rem tuple_size(Streams) + 1, Streams),
            Pid = spawn(fun() -> Parent ! {self(), append(Target, Store, Stream, Batch)} end),
            pace(Target, Store, Streams, Rate, Batch, Parent, Start, Count, Done + 1, [Pid | Pids])
    end.

append(Target, Store, Stream, Batch) ->
    At = os:perf_counter(nanosecond),
    Events = [event(At) || _ <- lists:seq(1, Batch)],
    try gen_server:call(Target, {append_events, Store, Stream, Events}, ?TIMEOUT_MS) of
        {ok, _} -> os:perf_counter(nanosecond) - At;
        Other -> Other
    catch exit:Reason -> Reason
    end.

%% On a store node: by a worker of this node.
append_here(Worker, Store, Stream) ->
    {ok, _} = gen_server:call(Worker, {append_events, Store, Stream, [event(os:perf_counter(nanosecond))]}, ?TIMEOUT_MS),
    ok.

%% Streams Prefix-1 to Prefix-Count with one event each.
fill(Target, Prefix, Count) ->
    Store = reg_gh,
    [{ok, _} = gen_server:call(Target, {append_events, Store, name(Prefix, N), [event(0)]}, ?TIMEOUT_MS)
     || N <- lists:seq(1, Count)],
    ok.
