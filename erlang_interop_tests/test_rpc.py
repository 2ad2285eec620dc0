"""`rpc` and `erpc` between BEAM and Python, compared with what two BEAM nodes give each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import python_node
from gater.erl import Node
from gater.erl.errors import ErlangError, ErlangException, ErlangExit, ErlangThrow
from gater.erl.rpc import erpc_call, erpc_cast, erpc_multicall, rpc_call
from gater.erl.terms import Atom, Term

OOPS = Atom("oops")

CAUGHT = "try {return, %s} catch Class:Reason -> {Class, Reason} end"


def export_failures(node: Node) -> None:
    """`erlang:throw/1`, `exit/1`, `error/1` and `timer:sleep/1`, as a BEAM has them."""

    def raising(kind: type[ErlangException]) -> Callable[[Term], Term]:
        def function(reason: Term) -> Term:
            raise kind(reason)

        return function

    node.exports.add("erlang", "throw", raising(ErlangThrow))
    node.exports.add("erlang", "exit", raising(ErlangExit))
    node.exports.add("erlang", "error", raising(ErlangError))

    @node.exports.export("timer")
    async def sleep(milliseconds: int) -> Term:
        await asyncio.sleep(milliseconds / 1000)
        return Atom("ok")


def without_stack(outcome: Term) -> Term:
    """An outcome whose stack trace, which names other files, is only known to be one."""
    match outcome:
        case (kind, (Atom(name="exception") as tag, reason, [*stack])):
            return kind, (tag, reason, bool(stack))
        case (kind, (Atom(name="badrpc") as tag, (Atom(name="EXIT") as inner, (reason, [*stack])))):
            return kind, (tag, (inner, (reason, bool(stack))))
    return outcome


@pytest.mark.parametrize(
    "expression",
    [
        "erpc:call(N, erlang, throw, [oops])",
        "erpc:call(N, erlang, exit, [oops])",
        "erpc:call(N, erlang, error, [oops])",
        "erpc:call(N, erlang, error, [{oops, 1}])",
        "erpc:call(N, timer, sleep, [2000], 20)",
        "erpc:call(N, erlang, abs, not_a_list)",
        "rpc:call(N, erlang, throw, [oops])",
        "rpc:call(N, erlang, exit, [oops])",
        "rpc:call(N, erlang, error, [oops])",
        "rpc:call(N, erlang, throw, [{'EXIT', oops}])",
        "rpc:call(N, timer, sleep, [2000], 20)",
        "erpc:multicall([N, 'nobody@127.0.0.1'], erlang, throw, [oops])",
        "rpc:multicall([N, 'nobody@127.0.0.1'], erlang, exit, [oops])",
        "erpc:call('nobody@127.0.0.1', erlang, node, [])",
        "rpc:call('nobody@127.0.0.1', erlang, node, [])",
        "gen_server:call({nobody, N}, x)",
        "gen_server:call({rex, 'nobody@127.0.0.1'}, x)",
    ],
)
async def test_a_beam_sees_the_same_failures_as_of_a_beam(beam: Beams, otp: int, expression: str) -> None:
    caller = await beam.start("erlang", otp=otp)
    other = await beam.start("erlang", otp=otp)
    async with python_node(beam) as node:
        export_failures(node)
        source = CAUGHT % expression
        expected = await caller.eval(source, N=other.atom)
        actual = await caller.eval(source, N=node.name)
        assert _renamed(without_stack(actual), node.name, other.atom) == without_stack(expected)


def _renamed(term: Term, name: Atom, to: Atom) -> Term:
    if isinstance(term, tuple | list):
        return type(term)(_renamed(each, name, to) for each in term)
    return to if term is name else term


@pytest.mark.parametrize("call", ["erpc:call(N, nosuch, f, [1, <<2>>])", "rpc:call(N, nosuch, f, [1, <<2>>])"])
async def test_undef_is_the_same_to_the_letter(beam: Beams, otp: int, call: str) -> None:
    caller = await beam.start("erlang", otp=otp)
    other = await beam.start("erlang", otp=otp)
    async with python_node(beam) as node:
        source = CAUGHT % call
        assert await caller.eval(source, N=node.name) == await caller.eval(source, N=other.atom)


async def test_a_beam_calls_python_functions(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        noted: list[Term] = []
        node.exports.add("m", "add", lambda a, b: a + b)
        node.exports.add("m", "note", noted.append)
        export_failures(node)
        assert await erl_node.eval("erpc:call(N, m, add, [1, 2])", N=node.name) == 3
        assert await erl_node.eval("rpc:call(N, m, add, [1, 2])", N=node.name) == 3
        assert await erl_node.eval("erpc:call(N, timer, sleep, [1])", N=node.name) is Atom("ok")
        assert await erl_node.eval("erpc:multicall([N, node()], erlang, node, [])", N=node.name) == [
            (Atom("ok"), node.name),
            (Atom("ok"), erl_node.atom),
        ]
        assert await erl_node.eval("rpc:multicall([N], m, add, [1, 2])", N=node.name) == ([3], [])
        await erl_node.eval("erpc:cast(N, m, note, [1]), rpc:cast(N, m, note, [2]), ok", N=node.name)
        await wait_until(lambda: sorted(noted) == [1, 2])
        await erl_node.eval("spawn(N, m, note, [3]), ok", N=node.name)
        await wait_until(lambda: 3 in noted)
        old = "gen_server:call({rex, N}, {call, m, add, [1, 2], group_leader()})"
        assert await erl_node.eval(old, N=node.name) == 3
        block = "rpc:block_call(N, m, add, [3, 4])"
        assert await erl_node.eval(block, N=node.name) == 7
        key = "K = rpc:async_call(N, m, add, [5, 6]), rpc:yield(K)"
        assert await erl_node.eval(key, N=node.name) == 11
        watched = "{P, R} = spawn_monitor(N, erlang, exit, [oops]), receive {'DOWN', R, _, P, X} -> X end"
        assert await erl_node.eval(watched, N=node.name) is OOPS
        linked = (
            "process_flag(trap_exit, true), P = spawn_link(N, erlang, exit, [oops]), receive {'EXIT', P, X} -> X end"
        )
        assert await erl_node.eval(linked, N=node.name) is OOPS


async def test_python_calls_functions_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        peer = erl_node.atom
        assert await erpc_call(node, peer, "erlang", "node") is peer
        assert await rpc_call(node, peer, "lists", "seq", [1, 3]) == [1, 2, 3]
        with pytest.raises(ErlangThrow) as thrown:
            await erpc_call(node, peer, "erlang", "throw", [OOPS])
        assert thrown.value.reason is OOPS
        with pytest.raises(ErlangExit) as exited:
            await erpc_call(node, peer, "erlang", "exit", [OOPS])
        assert exited.value.reason == (Atom("exception"), OOPS)
        with pytest.raises(ErlangError) as undefined:
            await erpc_call(node, peer, "nosuch", "f", [1])
        frame = (Atom("nosuch"), Atom("f"), [1], [])
        assert undefined.value.reason == (Atom("exception"), Atom("undef"), [frame])
        with pytest.raises(ErlangError) as slow:
            await erpc_call(node, peer, "timer", "sleep", [2000], timeout_s=0.05)
        assert slow.value.reason == (Atom("erpc"), Atom("timeout"))
        badrpc = Atom("badrpc")
        assert await rpc_call(node, peer, "nosuch", "f", []) == (
            badrpc,
            (Atom("EXIT"), (Atom("undef"), [(Atom("nosuch"), Atom("f"), [], [])])),
        )
        assert await rpc_call(node, "nobody@127.0.0.1", "m", "f") == (badrpc, Atom("nodedown"))
        answers = await erpc_multicall(node, [peer, node.name], "erlang", "node")
        assert answers == [(Atom("ok"), peer), (Atom("ok"), node.name)]
        noted = "register(note, spawn(fun() -> receive {get, P} -> P ! ok end end))"
        await erl_node.eval(noted)
        erpc_cast(node, peer, "erlang", "send", [Atom("note"), (Atom("get"), node.client.pid)])
        await wait_until(lambda: _gone(node, peer))


async def _gone(node: Node, peer: Atom) -> bool:
    return await erpc_call(node, peer, "erlang", "whereis", [Atom("note")]) is Atom("undefined")


async def test_calls_under_way_end_when_the_beam_dies(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        pending = asyncio.create_task(erpc_call(node, erl_node.atom, "timer", "sleep", [60_000]))
        await wait_until(lambda: node.nodes())
        await erl_node.kill()
        with pytest.raises(ErlangError) as failed:
            await pending
        assert failed.value.reason == (Atom("erpc"), Atom("noconnection"))


async def test_a_cancelled_call_leaves_no_monitor(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        pending = asyncio.create_task(erpc_call(node, erl_node.atom, "timer", "sleep", [60_000]))
        await wait_until(lambda: any(each.monitors for each in node.peers.table.values()))
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        connection = node.connection(erl_node.atom)
        assert not connection.monitors
        assert not connection.spawns
