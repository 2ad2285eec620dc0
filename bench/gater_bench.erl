%% The BEAM's half of `python -m bench`: the echo server, the callers that measure, and the BEAM's own codec.
%% Loaded compiled into the nodes, so that nothing measured runs interpreted.
-module(gater_bench).
-behaviour(gen_server).

-export([start_echo/0, init/1, handle_call/3, handle_cast/2]).
-export([check/3, calls/3, keep/1, times/2, hold/0, hold_encoded/0]).

-define(CALL_TIMEOUT_MS, 60000).

start_echo() ->
    {ok, _} = gen_server:start({local, echo}, ?MODULE, [], []),
    ok.

init([]) -> {ok, []}.

handle_call(Request, _From, State) -> {reply, Request, State}.

handle_cast(_Message, State) -> {noreply, State}.

%% One call, not measured: `echo` demands the request back, `ok` an answer `{ok, _}`.
check(Target, Request, echo) ->
    Request = gen_server:call(Target, Request, ?CALL_TIMEOUT_MS),
    ok;
check(Target, Request, ok) ->
    {ok, _} = gen_server:call(Target, Request, ?CALL_TIMEOUT_MS),
    ok.

%% One process for each element of Requests calls Target again and again for Millis milliseconds, one call at a time.
%% {Nanoseconds from start to the last answer, <<LatencyInNanoseconds:64, ...>>}.
calls(Target, Requests, Millis) ->
    Callers = [spawn_monitor(fun() -> caller(Target, Request) end) || Request <- Requests],
    Start = erlang:monotonic_time(),
    Until = Start + erlang:convert_time_unit(Millis, millisecond, native),
    [Pid ! {go, Until} || {Pid, _} <- Callers],
    Latencies = [receive {'DOWN', Ref, process, Pid, {measured, Each}} -> Each;
                         {'DOWN', Ref, process, Pid, Failed} -> error(Failed) end || {Pid, Ref} <- Callers],
    Elapsed = nanoseconds(erlang:monotonic_time() - Start),
    {Elapsed, << <<(nanoseconds(L)):64>> || Each <- Latencies, L <- Each >>}.

caller(Target, Request) ->
    receive {go, Until} -> exit({measured, caller(Target, Request, Until, erlang:monotonic_time(), [])}) end.

caller(Target, Request, Until, From, Latencies) ->
    _ = gen_server:call(Target, Request, ?CALL_TIMEOUT_MS),
    case erlang:monotonic_time() of
        Now when Now < Until -> caller(Target, Request, Until, Now, [Now - From | Latencies]);
        Now -> [Now - From | Latencies]
    end.

%% Keeps an encoded term for the functions below.
keep(Encoded) -> persistent_term:put(?MODULE, Encoded).

%% Nanoseconds of each of Rounds decodings, and of each encoding of what was decoded.
times(Decodings, Encodings) ->
    Encoded = persistent_term:get(?MODULE),
    Term = binary_to_term(Encoded),
    {[timed(fun() -> binary_to_term(Encoded) end) || _ <- lists:seq(1, Decodings)],
     [timed(fun() -> term_to_binary(Term) end) || _ <- lists:seq(1, Encodings)]}.

%% Decodes once into a process that stays, then encodes there, for the memory that takes.
hold() ->
    Self = self(),
    Holder = spawn(fun() ->
        Term = binary_to_term(persistent_term:get(?MODULE)),
        Self ! {?MODULE, held},
        receive {encode, From} -> From ! {?MODULE, byte_size(term_to_binary(Term)), element(1, Term)} end
    end),
    register(gater_bench_holder, Holder),
    receive {?MODULE, held} -> ok end.

hold_encoded() ->
    gater_bench_holder ! {encode, self()},
    receive {?MODULE, Size, _} -> Size end.

timed(Work) ->
    Start = erlang:monotonic_time(),
    _ = Work(),
    nanoseconds(erlang:monotonic_time() - Start).

nanoseconds(Native) -> erlang:convert_time_unit(Native, native, nanosecond).
