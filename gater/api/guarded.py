"""The guarded append: an append that the store itself makes safe.

ExESDB's workers compare versions and then put, so two of them can overwrite each other's events. Khepri, on which
ExESDB stands, can check and put in one Raft command: "only where nothing is, and only while the stream has C
children". One `erpc` call evaluates the expression below on a store node (`erl_eval:exprs/2`: an ordinary process
there, nothing is installed); it writes one event after the other under these conditions and stops at the first
refusal. Records are made by the node's own `ExESDB.StreamsHelper`, so they equal those of its workers. Raft decides,
therefore it holds against every writer but one that puts without conditions.

There are two expressions. `QUICK` is for the first attempt to write a single event, the usual one, and does nothing
else. `SOURCE` writes any number, finds out what became of earlier attempts and what a refusal means. That makes it far
more expensive to evaluate, even when nothing of it is needed: `erl_eval` looks through the body of a fun whenever it
makes one. Beside the puts of several events that is little.

The result leaves the expression as a thrown term: `erl_eval` would return all bindings, the events among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from gater.erl.errors import CallError
from gater.erl.etf import encode_term
from gater.erl.node import Node
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, EncodedTerm, Term, TermMap

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
                                case Same orelse lists:member(Other, Mine) of
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

A refused put may have been stored all the same: Khepri sends a command again when the leader it was sent to goes down,
and the second one finds the first one's event. Such an event is this very record, to the microsecond, or one of those
that `QUICK` made (`Mine`). With `Again` an earlier attempt may have stored it, at another time; otherwise it is equal.
"""

QUICK: Final = """
Now = 'Elixir.DateTime':utc_now(),
Epoch = 'Elixir.DateTime':to_unix(Now, microsecond),
Record = 'Elixir.ExESDB.StreamsHelper':to_event_record(hd(Events), Stream, Number, Now, Epoch),
case khepri:put(Store, Path, Record, Options) of
    ok when Wanted ->
        throw({written, Number, [Record]});
    ok ->
        throw({written, Number, []});
    {error, {khepri, Reason, _}} when Reason =:= mismatching_node; Reason =:= node_not_found ->
        throw({stopped, [Record]});
    Problem ->
        throw({failed, Number, Problem})
end.
"""
"""Ends by throwing one of

    {written, Number, Records}  the event is stored; its record if it is `Wanted`
    {stopped, [Record]}         the put was refused: `SOURCE` has to say why; that record
    {failed, Number, Problem}   nobody knows whether it has been written
"""

STREAMS: Final = Atom("streams")
CHILD_LIST_LENGTH: Final = Atom("child_list_length")
WRITTEN: Final = Atom("written")
STOPPED: Final = Atom("stopped")
REFUSED: Final = Atom("refused")
AHEAD: Final = Atom("ahead")
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
_IF_ALL: Final = Atom("if_all")
_NOTHING_THERE: Final = (Atom("if_node_exists"), False)
_CHILDREN: Final = Atom("if_child_list_length")
_TIMEOUT: Final = Atom("timeout")


class Forms(NamedTuple):
    """The two expressions, parsed by the node that is to evaluate them."""

    quick: EncodedTerm
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
    for source in (QUICK, SOURCE):
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


def quick_call(
    forms: Forms, store: Atom, stream: bytes, events: Term, number: int, *, records: bool, timeout_ms: int
) -> tuple[Atom, Atom, list[Term]]:
    """The module, function and arguments of a first attempt to write one event. `events` is the list of one NewEvent,
    encoded or not; `records`: whether to answer what was stored."""
    place = (_IF_ALL, [b"%06d" % number, _NOTHING_THERE])
    path = [STREAMS, stream if number == 0 else (_IF_ALL, [stream, (_CHILDREN, number)]), place]
    bindings = [
        (Atom("Events"), events),
        (Atom("Number"), number),
        (Atom("Options"), {_TIMEOUT: timeout_ms}),
        (Atom("Path"), path),
        (Atom("Store"), store),
        (Atom("Stream"), stream),
        (Atom("Wanted"), records),
    ]
    return (ERL_EVAL, EXPRS, [forms.quick, bindings])


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
    records of the first attempt, which has stopped."""
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
