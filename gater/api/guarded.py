"""The guarded append: an append that the store itself makes safe.

ExESDB's workers compare versions and then put, so two of them can overwrite each other's events. Khepri, on which
ExESDB stands, can check and put in one Raft command: "only where nothing is, and only while the stream has C
children". One `erpc` call evaluates an expression on a store node (`erl_eval:exprs/2`: an ordinary process
there, nothing is installed); it writes one event after the other under these conditions and stops at the first
refusal. Records are made by the node's own `ExESDB.StreamsHelper`, so they equal those of its workers. Raft decides,
therefore it holds against every writer but one that puts without conditions.

An evaluation that has begun goes on whatever becomes of the gateway that asked for it. So one of several events stops
by itself when its time is up: nobody is answered that his append has failed while its events still arrive.

There are three expressions. `QUICK` and `BATCH` are for the first attempt to write one event, the usual case, and
several. They do nothing else: `erl_eval` walks through every word of an expression, so each line costs microseconds
(and a list comprehension half as much again as a fun).
`SOURCE` writes any number, finds out what became of earlier attempts and what a refusal means. That makes it far more
expensive to evaluate, even when nothing of it is needed.

The result leaves the expression as a thrown term: `erl_eval` would return all bindings, the events among them.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from gater.erl.errors import CallError
from gater.erl.etf import encode_term
from gater.erl.node import Node
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, EncodedTerm, ImproperList, Term, TermMap, atom_bytes

SOURCE: Final = """
Name = fun(Number) -> iolist_to_binary(string:pad(integer_to_list(Number), 6, leading, $0)) end,
Path = fun(0) ->
               [streams, Stream, {if_all, [Name(0), {if_node_exists, false}]}];
          (Number) ->
               [streams, {if_all, [Stream, {if_child_list_length, Number}]},
                {if_all, [Name(Number), {if_node_exists, false}]}]
       end,
RecordOf = fun(Number, Event) ->
                   Now = 'Elixir.DateTime':utc_now(),
                   Epoch = 'Elixir.DateTime':to_unix(Now, microsecond),
                   'Elixir.ExESDB.StreamsHelper':to_event_record(Event, Stream, Number, Now, Epoch)
           end,
Timeless = fun(Record) -> maps:without([created, created_epoch], Record) end,
Failed = fun(Number, Problem) -> throw({failed, Number, Problem}) end,
Until = erlang:monotonic_time(millisecond) + TimeoutMs,
StoredAt = fun(Number) ->
                   case khepri:fence(Store, TimeoutMs) of
                       ok -> ok;
                       NoFence -> Failed(Number, NoFence)
                   end,
                   case khepri:get(Store, [streams, Stream, Name(Number)]) of
                       {error, {khepri, node_not_found, _}} -> none;
                       {ok, Stored} -> {ok, Stored};
                       Unreadable -> Failed(Number, Unreadable)
                   end
           end,
Refuse = fun(Kind, Number) ->
                 Properties = #{props_to_return => [child_list_length]},
                 case khepri_adv:get_many(Store, [streams, Stream], Properties) of
                     {ok, #{[streams, Stream] := #{child_list_length := Count}}} -> throw({Kind, Number, Count});
                     {ok, _} -> throw({Kind, Number, 0});
                     Uncounted -> Failed(Number, Uncounted)
                 end
         end,
Write = fun Write(Number, []) ->
                throw({written, Number - 1});
            Write(Number, [Event | Events]) ->
                Number =:= First orelse erlang:monotonic_time(millisecond) < Until orelse throw({late, Number}),
                Record = RecordOf(Number, Event),
                case khepri:put(Store, Path(Number), Record, #{timeout => TimeoutMs}) of
                    ok ->
                        Write(Number + 1, Events);
                    {error, {khepri, Reason, _}} when Reason =:= mismatching_node; Reason =:= node_not_found ->
                        case StoredAt(Number) of
                            none ->
                                Refuse(ahead, Number);
                            {ok, Record} ->
                                Write(Number + 1, Events);
                            {ok, Other} ->
                                Same = Again andalso is_map(Other) andalso Timeless(Other) =:= Timeless(Record),
                                case Same orelse lists:member(Other, [binary_to_term(Made) || Made <- Mine]) of
                                    true -> Write(Number + 1, Events);
                                    false -> Refuse(refused, Number)
                                end
                        end;
                    Problem ->
                        Failed(Number, Problem)
                end
        end,
Write(First, Events).
"""
"""Ends by throwing one of

    {written, Last}            every event is stored, the last one as this number
    {refused, Number, Count}   this number holds somebody else's event; the stream has Count events
    {ahead, Number, Count}     this number holds nothing, but the stream was too short to put anything there
    {failed, Number, Problem}  nobody knows whether this number has been written
    {late, Number}             every event before this number is stored; it was not tried, for time was up. Never the
                               first one: what became of one of `Mine` would be forgotten

A refused put may have been stored all the same: Khepri sends a command again when the leader it was sent to goes down,
and the second one finds the first one's event. Such an event is this very record, to the microsecond, or the one that
the first attempt has made (`Mine`, as `term_to_binary`). With `Again` an earlier attempt may have stored it, at another
time; otherwise it is equal.
"""

QUICK: Final = """
Now = 'Elixir.DateTime':utc_now(),
Record = 'Elixir.ExESDB.StreamsHelper':to_event_record(
    hd(Events), Stream, Number, Now, 'Elixir.DateTime':to_unix(Now, microsecond)
),
throw({khepri:put(Store, Path, Record, Options), Number, [term_to_binary(Record)]}).
"""

BATCH: Final = """
#{timeout := TimeoutMs} = Options,
Until = erlang:monotonic_time(millisecond) + TimeoutMs,
Records = lists:zipwith(
    fun({Number, Path}, Event) ->
        erlang:monotonic_time(millisecond) < Until orelse throw({late, Number}),
        Now = 'Elixir.DateTime':utc_now(),
        Record = 'Elixir.ExESDB.StreamsHelper':to_event_record(
            Event, Stream, Number, Now, 'Elixir.DateTime':to_unix(Now, microsecond)
        ),
        case khepri:put(Store, Path, Record, Options) of
            ok when Wanted -> term_to_binary(Record);
            ok -> <<>>;
            Problem -> throw({Problem, Number, [term_to_binary(Record)]})
        end
    end,
    Places,
    Events
),
throw({ok, Last, Records}).
"""
"""Both end by throwing one of

    {ok, Last, Records}           every event is stored, the last one as this number; as what, unless that is not
                                  `Wanted`: then empty binaries
    {Problem, Number, [Record]}   the put of this number was refused or has failed, nothing was written after it; what
                                  was to be stored
    {late, Number}                every event before this number is stored, this one was not tried; of `BATCH` only

Records are binaries of `term_to_binary`: whoever passes them on need not decode them. `is_refusal` tells a refusal, of
which `SOURCE` has to say why, from a failure, of which nobody knows whether it has been written.
"""

MAX_INTEGER: Final = 2**31 - 1
"""The largest number that INTEGER_EXT holds."""

SMALL_BYTES: Final = 4096
"""The record of an event up to this size is answered even if nobody wants it: not to do so takes longer."""

STREAMS: Final = Atom("streams")
CHILD_LIST_LENGTH: Final = Atom("child_list_length")
WRITTEN: Final = Atom("written")
REFUSED: Final = Atom("refused")
AHEAD: Final = Atom("ahead")
LATE: Final = Atom("late")
_FUNCTIONS: Final = (
    ("khepri", "put", 4),
    ("khepri", "get", 2),
    ("khepri", "fence", 2),
    ("khepri_adv", "get_many", 3),
    ("Elixir.ExESDB.StreamsHelper", "to_event_record", 5),
)
"""What the expression calls on the node."""

ERL_EVAL: Final = Atom("erl_eval")
EXPRS: Final = Atom("exprs")
_REFUSALS: Final = frozenset((Atom("mismatching_node"), Atom("node_not_found")))
_ERROR: Final = Atom("error")
_KHEPRI: Final = Atom("khepri")

_EVENTS: Final = Atom("Events")
_pack_count: Final = struct.Struct(">I").pack
_pack_integer: Final = struct.Struct(">Bi").pack
_LIST_OF_THREE: Final = b"l\0\0\0\3"
_NUMBER, _LAST, _OPTIONS, _PATH, _PLACES, _STORE, _STREAM, _WANTED = (
    b"h\2" + Atom(name).etf for name in ("Number", "Last", "Options", "Path", "Places", "Store", "Stream", "Wanted")
)
_PATH_START: Final = _LIST_OF_THREE + STREAMS.etf
_IF_ALL_OF_TWO: Final = b"h\2" + Atom("if_all").etf + b"l\0\0\0\2"
_NOTHING_THERE: Final = encode_term((Atom("if_node_exists"), False))
_CHILDREN: Final = b"h\2" + Atom("if_child_list_length").etf
_TIMEOUT_OF: Final = b"t\0\0\0\1" + Atom("timeout").etf


class Forms(NamedTuple):
    """The expressions, parsed by the node that is to evaluate them."""

    quick: EncodedTerm
    batch: EncodedTerm
    whole: EncodedTerm


async def prepare(node: Node, peer: Atom, timeout_s: float) -> Forms | None:
    """The parsed expressions for `peer`, which parses them itself; None if that node cannot evaluate them.

    Raises `ErlangException` when the node does not answer.
    """
    for module in dict.fromkeys(module for module, _, _ in _FUNCTIONS):
        loaded = await erpc_call(node, peer, "code", "ensure_loaded", [Atom(module)], timeout_s=timeout_s)
        if loaded != (Atom("module"), Atom(module)):
            return None
    exported = await asyncio.gather(
        *(
            erpc_call(node, peer, "erlang", "function_exported", [Atom(module), Atom(name), arity], timeout_s=timeout_s)
            for module, name, arity in _FUNCTIONS
        )
    )
    if not all(answer is True for answer in exported):
        return None
    parsed = []
    for source in (QUICK, BATCH, SOURCE):
        scanned = await erpc_call(node, peer, "erl_scan", "string", [list(source.encode())], timeout_s=timeout_s)
        _, forms = await erpc_call(node, peer, "erl_parse", "parse_exprs", [scanned[1]], timeout_s=timeout_s)
        parsed.append(EncodedTerm(encode_term(forms)))
    return Forms(*parsed)


async def version(node: Node, peer: Atom, store: Atom, stream: bytes, timeout_s: float) -> int:
    """At which version `peer` has the stream, -1: it does not exist. As quick for long streams as for short ones.

    Raises `ErlangException` or `CallError` when the node or its store does not answer.
    """
    path: list[Term] = [STREAMS, stream]
    options: dict[Term, Term] = {Atom("props_to_return"): [CHILD_LIST_LENGTH]}
    answer = await erpc_call(node, peer, "khepri_adv", "get_many", [store, path, options], timeout_s=timeout_s)
    match answer:
        case (Atom(name="ok"), dict() | TermMap() as found):
            for properties in found.values():
                if type(properties) is dict and type(count := properties.get(CHILD_LIST_LENGTH)) is int:
                    return count - 1
            return -1
    raise CallError(answer, f"{peer} does not say at which version the stream is: {answer!r}")


def is_refusal(problem: Term) -> bool:
    """Whether Khepri has refused a put because its conditions did not hold."""
    match problem:
        case (error, (khepri, reason, _)) if error is _ERROR and khepri is _KHEPRI:
            return reason in _REFUSALS
    return False


def first_call(
    forms: Forms, store: Atom, stream: bytes, events: Term, first: int, count: int, *, wanted: bool, timeout_ms: int
) -> tuple[Atom, Atom, list[Term]]:
    """The module, function and arguments of a first attempt. `events` is the list of `count` NewEvents, encoded or not;
    `wanted` says whether their records are to be answered.

    The bindings behind the events are the same few terms around two names and a number for each append: they are put
    together as bytes. To Erlang a list whose tail is a list is one list.
    """
    stream_term = b"m%b%b" % (_pack_count(len(stream)), stream)
    options = _TIMEOUT_OF + _integer(timeout_ms)
    names: tuple[bytes, ...]
    around = (_STORE, store.etf, _STREAM, stream_term)
    if count == 1 and (wanted or (type(events) is EncodedTerm and len(events.data) <= SMALL_BYTES)):
        form = forms.quick
        names = (_NUMBER, _integer(first), _OPTIONS, options, _PATH, _path(stream_term, first), *around, b"j")
        rest = b"l\0\0\0\5" + b"".join(names)
    else:
        form = forms.batch
        places = [b"h\2%b%b" % (_integer(each), _path(stream_term, each)) for each in range(first, first + count)]
        listed = b"l%b%bj" % (_pack_count(count), b"".join(places))
        wanted_term = atom_bytes(wanted)
        names = (_LAST, _integer(first + count - 1), _OPTIONS, options, _PLACES, listed, *around, _WANTED, wanted_term)
        rest = b"l\0\0\0\6%bj" % b"".join(names)
    return (ERL_EVAL, EXPRS, [form, ImproperList([(_EVENTS, events)], EncodedTerm(rest))])


def _path(stream: bytes, number: int) -> bytes:
    """Where event `number` goes, and under which conditions:

    [streams, Stream | {if_all, [Stream, {if_child_list_length, number}]}, {if_all, [Name, {if_node_exists, false}]}]
    """
    parent = stream if number == 0 else b"%b%b%b%bj" % (_IF_ALL_OF_TWO, stream, _CHILDREN, _integer(number))
    name = b"%06d" % number
    return b"%b%b%bm%b%b%bjj" % (_PATH_START, parent, _IF_ALL_OF_TWO, _pack_count(len(name)), name, _NOTHING_THERE)


def _integer(number: int) -> bytes:
    if 0 <= number < 256:
        return b"a%c" % number
    return _pack_integer(98, number) if 0 <= number <= MAX_INTEGER else encode_term(number)


def call(
    forms: Forms,
    store: Atom,
    stream: bytes,
    events: Term,
    first: int,
    *,
    again: bool,
    mine: Sequence[Term] = (),
    timeout_ms: int,
) -> tuple[Atom, Atom, list[Term]]:
    """The module, function and arguments of one guarded append. `events` are the NewEvents, encoded or not; `mine` the
    record of the first attempt if that was refused."""
    bindings = [
        (Atom("Again"), again),
        (Atom("Events"), events),
        (Atom("First"), first),
        (Atom("Mine"), list(mine)),
        (Atom("Store"), store),
        (Atom("Stream"), stream),
        (Atom("TimeoutMs"), timeout_ms),
    ]
    return (ERL_EVAL, EXPRS, [forms.whole, bindings])
