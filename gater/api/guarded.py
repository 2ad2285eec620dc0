"""The guarded append: an append that the store itself makes safe.

ExESDB's workers compare versions and then put, so two of them can overwrite each other's events. Khepri, on which
ExESDB stands, can check and put in one Raft command: "only where nothing is, and only while the stream has C
children". One `erpc` call evaluates the expression below on a store node (`erl_eval:exprs/2`: an ordinary process
there, nothing is installed); it writes one event after the other under these conditions and stops at the first
refusal. Records are made by the node's own `ExESDB.StreamsHelper`, so they equal those of its workers. Raft decides,
therefore it holds against every writer but one that puts without conditions.

The result leaves the expression as a thrown term: `erl_eval` would return all bindings, the events among them.
"""

from __future__ import annotations

from typing import Final

from gater.erl.etf import encode_term
from gater.erl.node import Node
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, EncodedTerm, Term

SOURCE: Final = """
Name = fun(Number) -> iolist_to_binary(io_lib:format("~6..0b", [Number])) end,
Path = fun(0) ->
               [streams, Stream, {if_all, [Name(0), {if_node_exists, false}]}];
          (Number) ->
               [streams, {if_all, [Stream, {if_child_list_length, Number}]},
                {if_all, [Name(Number), {if_node_exists, false}]}]
       end,
Put = fun(Number, Event) ->
              Now = 'Elixir.DateTime':utc_now(),
              Epoch = 'Elixir.DateTime':to_unix(Now, microsecond),
              Record = 'Elixir.ExESDB.StreamsHelper':to_event_record(Event, Stream, Number, Now, Epoch),
              khepri:put(Store, Path(Number), Record, #{timeout => TimeoutMs})
      end,
IsStored = fun(Number, Event) ->
                   case khepri:get(Store, [streams, Stream, Name(Number)]) of
                       {ok, #{event_id := Id}} -> Id =:= maps:get(event_id, Event);
                       _ -> false
                   end
           end,
CatchUp = fun(Number) ->
                  case khepri:fence(Store, TimeoutMs) of
                      ok -> ok;
                      Problem -> throw({failed, Number, Problem})
                  end
          end,
Refused = fun(Number) ->
                  case khepri:count(Store, [streams, Stream, {if_node_exists, true}]) of
                      {ok, Count} -> throw({refused, Number, Count});
                      _ -> throw({refused, Number, 0})
                  end
          end,
Write = fun Write(Number, []) ->
                throw({written, Number - 1});
            Write(Number, [Event | Events]) ->
                case Put(Number, Event) of
                    ok ->
                        Write(Number + 1, Events);
                    {error, {khepri, mismatching_node, _}} ->
                        CatchUp(Number),
                        case Again andalso IsStored(Number, Event) of
                            true -> Write(Number + 1, Events);
                            false -> Refused(Number)
                        end;
                    {error, {khepri, node_not_found, _}} ->
                        CatchUp(Number),
                        Refused(Number);
                    Problem ->
                        throw({failed, Number, Problem})
                end
        end,
Write(First, Events).
"""

WRITTEN: Final = Atom("written")
REFUSED: Final = Atom("refused")
FAILED: Final = Atom("failed")
_MODULES: Final = ("khepri", "Elixir.ExESDB.StreamsHelper")

ERL_EVAL: Final = Atom("erl_eval")
EXPRS: Final = Atom("exprs")


async def prepare(node: Node, peer: Atom, timeout_s: float) -> EncodedTerm | None:
    """The parsed expression for `peer`, which parses it itself; None if that node cannot evaluate it.

    Raises `ErlangException` when the node does not answer.
    """
    for module in _MODULES:
        loaded = await erpc_call(node, peer, "code", "ensure_loaded", [Atom(module)], timeout_s=timeout_s)
        if loaded != (Atom("module"), Atom(module)):
            return None
    scanned = await erpc_call(node, peer, "erl_scan", "string", [list(SOURCE.encode())], timeout_s=timeout_s)
    parsed = await erpc_call(node, peer, "erl_parse", "parse_exprs", [scanned[1]], timeout_s=timeout_s)
    return EncodedTerm(encode_term(parsed[1]))


def call(
    forms: EncodedTerm, store: Atom, stream: bytes, events: Term, first: int, *, again: bool, timeout_ms: int
) -> tuple[Atom, Atom, list[Term]]:
    """The module, function and arguments of one guarded append. `events` are the NewEvents, encoded or not."""
    bindings = [
        (Atom("Again"), again),
        (Atom("Events"), events),
        (Atom("First"), first),
        (Atom("Store"), store),
        (Atom("Stream"), stream),
        (Atom("TimeoutMs"), timeout_ms),
    ]
    return (ERL_EVAL, EXPRS, [forms, bindings])
