"""`rpc` and `erpc`, served and made, between two Python nodes; the shapes are those of erpc.erl and rpc.erl."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from node_kit import Collector, two_nodes, wait_until

from gater.erl import Node
from gater.erl.errors import CallTimeout, ErlangError, ErlangExit, ErlangThrow, NodeError
from gater.erl.exports import UNDEF, Done
from gater.erl.gen_server import call, cast
from gater.erl.phash2 import phash2
from gater.erl.process import NOCONNECTION
from gater.erl.rpc import (
    BADRPC,
    ERPC,
    EXCEPTION,
    SIGNAL,
    PendingRpc,
    erpc_call,
    erpc_cast,
    erpc_multicall,
    rpc_call,
    rpc_multicall,
)
from gater.erl.rpc_server import REX
from gater.erl.terms import Atom, Pid, Term

OOPS = Atom("oops")
EXIT = Atom("EXIT")


class Functions:
    """What the called node exports as module `m`."""

    def __init__(self, node: Node) -> None:
        self.casts: list[Term] = []
        self.cancelled = asyncio.Event()
        self.opened: list[Done] = []
        exports = node.exports
        exports.add("m", "add", lambda a, b: a + b)
        exports.add("m", "throw", self._raise(ErlangThrow(OOPS)))
        exports.add("m", "exit", self._raise(ErlangExit(OOPS)))
        exports.add("m", "error", self._raise(ErlangError(OOPS)))
        exports.add("m", "crash", self._raise(ValueError("bad")))
        exports.add("m", "returns_exit", lambda: (EXIT, OOPS))
        exports.add("m", "note", self.casts.append)
        exports.add("m", "deferred", lambda done, *arguments: self.opened.append(done), arities=[0], deferred=True)

        @exports.export("m")
        async def slowly(term: Term) -> Term:
            await asyncio.sleep(0.001)
            return term

        @exports.export("m", "forever")
        async def _forever() -> Term:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()

    @staticmethod
    def _raise(error: Exception) -> object:
        def function() -> Term:
            raise error

        return function


@pytest.fixture(params=["same node", "two nodes"])
async def places(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Node, Node]]:
    """The caller's node and the called one."""
    async with two_nodes() as (one, two):
        yield (one, two) if request.param == "two nodes" else (one, one)


@pytest.fixture
def functions(places: tuple[Node, Node]) -> Functions:
    return Functions(places[1])


def nothing_left(node: Node) -> bool:
    return not any(connection.monitors or connection.spawns for connection in node.peers.table.values())


async def test_a_call_returns_what_the_function_returns(places: tuple[Node, Node], functions: Functions) -> None:
    caller, called = places
    assert await erpc_call(caller, called.name, "m", "add", [1, 2]) == 3
    assert await erpc_call(caller, str(called.name), "m", "slowly", [{"a": 1}]) in ({b"a": 1}, {"a": 1})
    assert await rpc_call(caller, called.name, "m", "add", [1, 2]) == 3
    assert nothing_left(caller)
    assert nothing_left(called)


async def test_a_deferred_function_answers_when_it_likes(places: tuple[Node, Node], functions: Functions) -> None:
    pending = asyncio.create_task(erpc_call(places[0], places[1].name, "m", "deferred"))
    await wait_until(lambda: functions.opened)
    functions.opened[0](5, None)
    functions.opened[0](6, None)
    assert await pending == 5


async def test_erpc_raises_in_the_three_classes(places: tuple[Node, Node], functions: Functions) -> None:
    caller, called = places
    with pytest.raises(ErlangThrow) as thrown:
        await erpc_call(caller, called.name, "m", "throw")
    assert thrown.value.reason is OOPS
    with pytest.raises(ErlangExit) as exited:
        await erpc_call(caller, called.name, "m", "exit")
    assert exited.value.reason == (EXCEPTION, OOPS)
    with pytest.raises(ErlangError) as failed:
        await erpc_call(caller, called.name, "m", "error")
    kind, reason, stack = failed.value.reason
    assert (kind, reason) == (EXCEPTION, OOPS)
    assert stack[-1] == (Atom("m"), Atom("error"), 0, [])
    with pytest.raises(ErlangError) as undefined:
        await erpc_call(caller, called.name, "m", "nothing", [1])
    assert undefined.value.reason == (EXCEPTION, UNDEF, [(Atom("m"), Atom("nothing"), [1], [])])


async def test_rpc_wraps_what_went_wrong_in_badrpc(places: tuple[Node, Node], functions: Functions) -> None:
    caller, called = places
    assert await rpc_call(caller, called.name, "m", "throw") is OOPS
    assert await rpc_call(caller, called.name, "m", "exit") == (BADRPC, (EXIT, OOPS))
    assert await rpc_call(caller, called.name, "m", "returns_exit") == (BADRPC, (EXIT, OOPS))
    bad, (exit_tag, (reason, stack)) = await rpc_call(caller, called.name, "m", "error")
    assert (bad, exit_tag, reason) == (BADRPC, EXIT, OOPS)
    assert stack
    assert await rpc_call(caller, called.name, "x", "y", []) == (
        BADRPC,
        (EXIT, (UNDEF, [(Atom("x"), Atom("y"), [], [])])),
    )
    bad, (exit_tag, (reason, stack)) = await rpc_call(caller, called.name, "m", "crash")
    assert reason == (Atom("python_error"), b"ValueError", b"bad")


async def test_a_node_that_is_not_there_is_nodedown(places: tuple[Node, Node]) -> None:
    with pytest.raises(ErlangError) as failed:
        await erpc_call(places[0], "nobody@127.0.0.1", "m", "f")
    assert failed.value.reason == (ERPC, NOCONNECTION)
    assert await rpc_call(places[0], "nobody@127.0.0.1", "m", "f") == (BADRPC, Atom("nodedown"))


async def test_a_timeout_ends_the_call_and_leaves_nothing(places: tuple[Node, Node], functions: Functions) -> None:
    with pytest.raises(ErlangError) as failed:
        await erpc_call(places[0], places[1].name, "m", "forever", timeout_s=0.02)
    assert failed.value.reason == (ERPC, Atom("timeout"))
    assert await rpc_call(places[0], places[1].name, "m", "forever", timeout_s=0.02) == (BADRPC, Atom("timeout"))
    assert nothing_left(places[0])


async def test_a_cancelled_call_leaves_nothing() -> None:
    async with two_nodes() as (one, two):
        functions = Functions(two)
        pending = asyncio.create_task(erpc_call(one, two.name, "m", "deferred"))
        await wait_until(lambda: functions.opened)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        functions.opened[0](1, None)
        await wait_until(lambda: nothing_left(one) and nothing_left(two))


async def test_a_connection_that_breaks_ends_the_call() -> None:
    async with two_nodes() as (one, two):
        functions = Functions(two)
        ends: list[object] = []
        PendingRpc(one, two.name, (Atom("m"), Atom("deferred"), []), lambda *end: ends.append(end), None)
        await wait_until(lambda: functions.opened)
        one.disconnect(two.name)
        ((result, error),) = ends
        assert result is None
        assert isinstance(error, ErlangError)
        assert error.reason == (ERPC, NOCONNECTION)
        functions.opened[0](1, None)


async def test_a_process_killed_while_it_works_is_a_signal() -> None:
    async with two_nodes() as (one, two):
        functions = Functions(two)
        pending = asyncio.create_task(erpc_call(one, two.name, "m", "forever"))
        before = {process.pid for process in two.processes()}
        (worker,) = await wait_until(lambda: [each for each in two.processes() if each.pid not in before])
        two.exit(worker.pid, Atom("kill"))
        with pytest.raises(ErlangExit) as exited:
            await pending
        assert exited.value.reason == (SIGNAL, Atom("killed"))
        async with asyncio.timeout(5):
            await functions.cancelled.wait()


async def test_a_cast_runs_and_leaves_nothing(places: tuple[Node, Node], functions: Functions) -> None:
    erpc_cast(places[0], places[1].name, "m", "note", [1])
    erpc_cast(places[0], places[1].name, "m", "crash")
    erpc_cast(places[0], places[1].name, "m", "nothing")
    erpc_cast(places[0], "nobody@127.0.0.1", "m", "note", [2])
    await wait_until(lambda: functions.casts == [1])
    await wait_until(lambda: nothing_left(places[0]) and nothing_left(places[1]))


async def test_a_multicall_answers_for_each_node_in_order() -> None:
    async with two_nodes() as (one, two):
        for node in (one, two):
            node.exports.add("m", "name", lambda node=node: node.name)
        answers = await erpc_multicall(one, [two.name, "nobody@127.0.0.1", one.name], "m", "name")
        ok, error = Atom("ok"), Atom("error")
        assert answers == [(ok, two.name), (error, (ERPC, NOCONNECTION)), (ok, one.name)]


async def test_rex_answers_what_older_nodes_send(places: tuple[Node, Node], functions: Functions) -> None:
    caller, called = places
    rex = (REX, called.name)
    leader = caller.client.pid
    request = (Atom("call"), Atom("m"), Atom("add"), [1, 2], leader)
    assert await call(caller, rex, request) == 3
    undefined = (Atom("call"), Atom("m"), Atom("nothing"), [], leader)
    assert await call(caller, rex, undefined) == (BADRPC, (EXIT, (UNDEF, [(Atom("m"), Atom("nothing"), [], [])])))
    me = Collector(caller)
    me.process.send(rex, (me.process.pid, request))
    assert await me.next() == (REX, 3)
    me.process.send(rex, (me.process.pid, Atom("features_request")))
    assert await me.next() == (Atom("features_reply"), called.name, [ERPC])
    cast(caller, rex, (Atom("cast"), Atom("m"), Atom("note"), [1], leader))
    await wait_until(lambda: functions.casts == [1])
    inbox = Collector(called, "inbox")
    for name, answer in (("inbox", called.name), ("nobody", (Atom("nonexisting_name"), Atom("nobody")))):
        me.process.send(rex, (me.process.pid, (Atom("sbcast"), Atom(name), b"to all")))
        assert await me.next() == (REX, called.name, answer)
    assert await inbox.next() == b"to all"
    with pytest.raises(CallTimeout):
        await call(caller, rex, Atom("nonsense"), timeout_s=0.01)


async def test_functions_that_run_for_peers_are_limited(
    places: tuple[Node, Node], functions: Functions, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, called = places
    if caller is called:
        pytest.skip("the own node is not limited")
    monkeypatch.setattr("gater.erl.rpc_server.MAX_CALLS", 1)
    begun, released = asyncio.Event(), asyncio.Event()

    async def until_released() -> Term:
        begun.set()
        return await released.wait()

    called.exports.add("m", "until_released", until_released)
    running = asyncio.create_task(erpc_call(caller, called.name, "m", "until_released"))
    await begun.wait()
    with pytest.raises(ErlangError) as refused:
        await erpc_call(caller, called.name, "m", "add", [1, 2])
    assert refused.value.reason == (ERPC, Atom("system_limit"))
    request = (Atom("call"), Atom("m"), Atom("add"), [1, 2], caller.client.pid)
    assert await call(caller, (REX, called.name), request) == (BADRPC, (EXIT, Atom("system_limit")))
    released.set()
    assert await running is True
    assert await call(caller, (REX, called.name), request) == 3


async def test_a_request_with_arguments_that_are_no_list_is_badarg(places: tuple[Node, Node]) -> None:
    caller, called = places
    if caller is called:
        pytest.skip("a request is sent to another node")
    reference = caller.make_reference()
    seen: list[Term] = []
    caller.spawn_request(
        called.name,
        (ERPC, Atom("execute_call"), [reference, Atom("m"), Atom("f"), Atom("none")]),
        on_error=seen.append,
        on_down=lambda monitor, reason: seen.append(reason),
    )
    await wait_until(lambda: seen)
    assert seen[0][:3] == (reference, Atom("error"), Atom("badarg"))
    assert called.name in caller.nodes()


async def test_a_spawn_can_be_linked(places: tuple[Node, Node], functions: Functions) -> None:
    if places[0] is places[1]:
        pytest.skip("spawning on the own node is a coroutine's business")
    caller, called = places
    downs: list[Term] = []
    caller.spawn_request(
        called.name,
        (Atom("m"), Atom("exit"), []),
        on_error=downs.append,
        on_down=lambda monitor, reason: downs.append((type(monitor.object) is Pid, reason)),
    )
    await wait_until(lambda: downs)
    assert downs == [(True, OOPS)]


async def test_kernel_functions_answer(places: tuple[Node, Node]) -> None:
    caller, called = places

    async def ask(module: str, function: str, *arguments: Term) -> Term:
        return await erpc_call(caller, called.name, module, function, arguments)

    assert await ask("erlang", "node") is called.name
    assert await ask("erlang", "whereis", REX) in [process.pid for process in called.processes()]
    assert [name for name, _, _ in await ask("application", "which_applications")] == [Atom("stdlib"), Atom("kernel")]
    assert await ask("application", "get_key", Atom("kernel"), Atom("vsn")) == (Atom("ok"), list(b"8.5"))
    assert await ask("application", "get_key", Atom("nothing"), Atom("vsn")) is Atom("undefined")
    missing = Pid(called.name, 999_999, 0, called.creation)
    assert await ask("erlang", "is_process_alive", missing) is False
    assert await ask("erlang", "phash2", (1, Atom("a")), 1000) == phash2((1, Atom("a")), 1000)
    assert await ask("erlang", "function_exported", Atom("erlang"), Atom("node"), 1) is True
    assert await ask("code", "ensure_loaded", Atom("erlang")) == (Atom("module"), Atom("erlang"))
    assert await ask("code", "ensure_loaded", Atom("nothing")) == (Atom("error"), Atom("nofile"))
    assert await ask("code", "which", Atom("nothing")) is Atom("non_existing")
    assert await ask("global", "whereis_name", Atom("any")) is Atom("undefined")
    assert await ask("net_adm", "ping", caller.name) is Atom("pong")
    assert await ask("net_adm", "ping", Atom("nobody@127.0.0.1")) is Atom("pang")
    assert len(await ask("erlang", "timestamp")) == 3
    info = dict(await ask("erlang", "process_info", called.client.pid))
    assert info[Atom("message_queue_len")] == 0
    target = Collector(called, "target")
    assert await ask("erlang", "send", Atom("target"), 1) == 1
    assert await target.next() == 1
    await ask("erlang", "exit", target.process.pid, OOPS)
    assert await target.ended() is OOPS
    for module, function, arguments in (
        ("erlang", "system_info", [Atom("nonsense")]),
        ("erlang", "phash2", [1, 0]),
        ("erlang", "send", [1, 2]),
        ("erlang", "exit", [1, 2]),
        ("net_kernel", "connect_node", [1]),
        ("rpc", "multicall", [1, 2, 3]),
    ):
        with pytest.raises(ErlangError) as failed:
            await ask(module, function, *arguments)
        assert failed.value.reason[1] is Atom("badarg")
    with pytest.raises(ErlangError) as undefined:
        await erpc_call(caller, called.name, "erpc", "execute_call", [[1], Atom("f"), []])
    assert undefined.value.reason[1] is UNDEF


async def test_calls_can_go_on_from_the_called_node(places: tuple[Node, Node], functions: Functions) -> None:
    caller, called = places
    names = [called.name, Atom("nobody@127.0.0.1")]
    add = (Atom("m"), Atom("add"), [1, 2])
    expected = ([3], [Atom("nobody@127.0.0.1")])
    assert await rpc_multicall(caller, names, "m", "add", [1, 2]) == expected
    assert await erpc_call(caller, called.name, "rpc", "multicall", [names, *add]) == expected
    assert await erpc_call(caller, called.name, "rpc", "multicall", [names, *add, 1000]) == expected
    assert await erpc_call(caller, called.name, "rpc", "multicall", list(add)) == ([3], [])
    assert await erpc_call(caller, called.name, "rpc", "call", [called.name, *add]) == 3
    assert await erpc_call(caller, called.name, "erpc", "call", [called.name, *add, 1000]) == 3


async def test_kernel_processes_let_nobody_wait(places: tuple[Node, Node]) -> None:
    caller, called = places
    net_kernel = (Atom("net_kernel"), called.name)
    assert await call(caller, net_kernel, (Atom("is_auth"), caller.name)) is Atom("yes")
    assert await call(caller, net_kernel, Atom("get_net_ticktime")) == 60
    names = (Atom("global_name_server"), called.name)
    lock = (Atom("set_lock"), (Atom("id"), caller.client.pid))
    assert await call(caller, names, lock) is True
    assert await call(caller, names, Atom("get_known")) == []
    assert await call(caller, names, Atom("get_protocol_version")) == 8
    assert await call(caller, names, (Atom("register"), Atom("n"), caller.client.pid, OOPS)) is Atom("no")
    for server in (net_kernel, names):
        assert await call(caller, server, Atom("nonsense")) == (Atom("error"), Atom("bad_request"))
        cast(caller, server, Atom("nonsense"))
        caller.send(server, Atom("nonsense"))
        assert await call(caller, server, Atom("nonsense")) == (Atom("error"), Atom("bad_request"))


async def test_a_function_is_exported_once_per_arity() -> None:
    async with two_nodes() as (one, _):
        one.exports.add("m", "f", lambda a, b=None: (a, b))
        assert one.exports.functions(Atom("m")) == [(Atom("f"), 1), (Atom("f"), 2)]
        with pytest.raises(NodeError, match="exported already"):
            one.exports.add("m", "f", lambda a: a)
        one.exports.add("m", "f", lambda a, b, c: a)
        assert one.exports.has_module(Atom("m"))
        assert not one.exports.has_module(Atom("n"))
