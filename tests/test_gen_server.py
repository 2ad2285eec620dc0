"""GenServers, and calls to them: within a node and from another."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import pytest
from node_kit import COOKIE, DEADLINE_S, Collector, Counter, running, two_nodes, unique_name, wait_until

from gater.erl import Node, NodeOptions, rpc_server
from gater.erl.errors import (
    CallTimeout,
    ConnectionLost,
    EncodeError,
    ErlangError,
    ErlangException,
    ErlangExit,
    ErlangThrow,
    NoProcess,
    ProcessDied,
)
from gater.erl.gen_server import (
    GEN_CALL,
    GEN_CAST,
    OK,
    SYSTEM,
    GenServer,
    PendingCall,
    call,
    cast,
    spawn_server,
    start_server,
    stop,
)
from gater.erl.process import NORMAL, SHUTDOWN
from gater.erl.terms import Atom, EncodedTerm, Export, Term

ADD, GET, LATER, NEVER, CRASH, SLOW, ECHO = map(Atom, ("add", "get", "later", "never", "crash", "slow", "echo"))


@pytest.fixture(params=["same node", "two nodes"])
async def places(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Node, Node]]:
    """The caller's node and the server's."""
    async with two_nodes() as (one, two):
        if request.param == "two nodes":
            await one.connect(two.name)
            yield one, two
        else:
            yield one, one


@pytest.fixture
async def server(places: tuple[Node, Node]) -> Counter:
    counter = Counter()
    await start_server(places[1], counter, name="counter")
    return counter


def nothing_left(node: Node) -> bool:
    """Whether no alias and no monitor of a call is open."""
    return not node._aliases and not any(connection.monitors for connection in node.peers.table.values())


async def test_a_call_is_answered_by_pid_and_by_name(places: tuple[Node, Node], server: Counter) -> None:
    caller, home = places
    assert await call(caller, server.pid, (ADD, 2)) == 2
    assert await call(caller, (Atom("counter"), home.name), (ADD, 3)) == 5
    assert await call(caller, ("counter", str(home.name)), GET) == 5
    assert await call(caller, server.pid, SLOW) == 5
    assert nothing_left(caller)
    await wait_until(lambda: not server.process.monitored_by)


async def test_a_cast_and_a_plain_message_reach_their_callbacks(places: tuple[Node, Node], server: Counter) -> None:
    cast(places[0], server.pid, 4)
    places[0].send(server.pid, Atom("info"))
    assert await call(places[0], server.pid, GET) == 4
    assert server.infos == [Atom("info")]


async def test_a_call_can_be_answered_later_and_out_of_order(places: tuple[Node, Node], server: Counter) -> None:
    first, second = (asyncio.create_task(call(places[0], server.pid, LATER)) for _ in range(2))
    await wait_until(lambda: len(server.waiting) == 2)
    server.reply(server.waiting[1], 2)
    server.reply(server.waiting[0], 1)
    assert [await first, await second] == [1, 2]


async def test_calls_while_a_handler_waits_are_answered_in_order(places: tuple[Node, Node], server: Counter) -> None:
    answers = await asyncio.gather(
        *(call(places[0], server.pid, request) for request in (SLOW, (ADD, 1), SLOW, (ADD, 1), SLOW))
    )
    assert answers == [0, 1, 1, 2, 2]


async def test_a_crash_gives_the_reason_and_a_stack(places: tuple[Node, Node], server: Counter) -> None:
    with pytest.raises(ProcessDied) as died:
        await call(places[0], server.pid, CRASH)
    (kind, python_type, text), stack = died.value.reason
    assert (kind, python_type, text) == (Atom("python_error"), b"ValueError", b"crashed on request")
    assert stack[0][1] is Atom("handle_call")
    assert server.ended_with == died.value.reason
    assert nothing_left(places[0])


async def test_an_unknown_server_is_noproc_at_once(places: tuple[Node, Node]) -> None:
    with pytest.raises(NoProcess, match="no process nobody"):
        await call(places[0], (Atom("nobody"), places[1].name), GET, timeout_s=None)
    assert nothing_left(places[0])


async def test_an_unknown_node_is_a_lost_connection() -> None:
    async with running(unique_name()) as (node,):
        with pytest.raises(ConnectionLost) as lost:
            await call(node, (Atom("server"), Atom("nobody@127.0.0.1")), GET)
        assert lost.value.reason == (Atom("nodedown"), Atom("nobody@127.0.0.1"))


async def test_a_broken_connection_ends_the_call() -> None:
    async with two_nodes() as (one, two):
        server = Counter()
        await start_server(two, server)
        pending = asyncio.create_task(call(one, server.pid, LATER, timeout_s=None))
        await wait_until(lambda: server.waiting)
        two.disconnect(one.name)
        with pytest.raises(ConnectionLost):
            await pending
        assert nothing_left(one)


async def test_a_call_times_out_and_its_late_answer_goes_nowhere(places: tuple[Node, Node], server: Counter) -> None:
    with pytest.raises(CallTimeout, match=r"did not answer within 0\.01 s"):
        await call(places[0], server.pid, LATER, timeout_s=0.01)
    assert nothing_left(places[0])
    server.reply(server.waiting[0], "late")
    assert await call(places[0], server.pid, GET) == 0


async def test_a_cancelled_call_leaves_nothing(places: tuple[Node, Node], server: Counter) -> None:
    pending = asyncio.create_task(call(places[0], server.pid, LATER))
    await wait_until(lambda: server.waiting)
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    assert nothing_left(places[0])
    await wait_until(lambda: not server.process.monitored_by)


async def test_a_request_that_is_no_term_leaves_nothing() -> None:
    async with two_nodes() as (one, two):
        server = Counter()
        await start_server(two, server)
        await one.connect(two.name)
        with pytest.raises(EncodeError):
            await call(one, server.pid, object())
        assert nothing_left(one)
        assert await call(one, server.pid, GET) == 0


async def test_many_concurrent_callers_get_their_own_answers(places: tuple[Node, Node], server: Counter) -> None:
    answers = await asyncio.gather(*(call(places[0], server.pid, (ECHO, number)) for number in range(1000)))
    assert answers == list(range(1000))
    assert nothing_left(places[0])


async def test_calls_leave_no_memory_behind() -> None:
    async with two_nodes() as (one, two):
        server = Counter()
        await start_server(two, server)

        async def round_of_calls() -> int:
            await asyncio.gather(*(call(one, server.pid, (ECHO, b"x")) for _ in range(300)))
            await wait_until(lambda: not server.process.monitored_by)
            gc.collect()
            return len(gc.get_objects())

        await round_of_calls()
        before = await round_of_calls()
        for _ in range(3):
            after = await round_of_calls()
        assert after - before < 100
        (connection,) = two.peers.table.values()
        assert not connection.watched


async def test_a_large_answer_can_stay_encoded(places: tuple[Node, Node], server: Counter) -> None:
    answer = await call(places[0], server.pid, (ECHO, (OK, [1, 2, 3])), spine_levels=1)
    if places[0] is places[1]:
        assert answer == (OK, [1, 2, 3])
    else:
        assert answer[0] is OK
        assert isinstance(answer[1], EncodedTerm)


async def test_one_callback_reports_the_end_of_a_pending_call(server: Counter, places: tuple[Node, Node]) -> None:
    ends: list[object] = []
    pending = PendingCall(places[0], server.pid, GET, lambda reply, error: ends.append((reply, error)))
    await wait_until(lambda: ends)
    pending.fail(NoProcess(Atom("noproc")))
    pending.cancel()
    assert ends == [(0, None)]


async def test_an_unexpected_request_stops_a_plain_server() -> None:
    async with running(unique_name()) as (node,):
        server = GenServer()
        spawn_server(node, server)
        with pytest.raises(ProcessDied) as died:
            await call(node, server.pid, GET)
        assert died.value.reason == (Atom("bad_call"), GET)


async def test_a_failing_init_frees_the_name() -> None:
    class Failing(GenServer):
        async def init(self) -> None:
            raise RuntimeError("no")

    async with running(unique_name()) as (node,):
        with pytest.raises(RuntimeError, match="no"):
            await start_server(node, Failing(), name="failing")
        assert node.whereis("failing") is None


async def test_messages_sent_during_a_slow_init_wait_for_it() -> None:
    class Slow(Counter):
        async def init(self) -> None:
            await asyncio.sleep(0.01)
            self.value = 7

    async with running(unique_name()) as (node,):
        starting = asyncio.create_task(start_server(node, Slow(), name="slow"))
        await wait_until(lambda: node.whereis("slow"))
        assert await call(node, "slow", GET) == 7
        await starting


async def test_stop_ends_a_server_with_the_reason_given(places: tuple[Node, Node], server: Counter) -> None:
    await stop(places[0], server.pid, SHUTDOWN)
    assert server.ended_with is SHUTDOWN
    with pytest.raises(NoProcess):
        await stop(places[0], server.pid, NORMAL)


@pytest.mark.filterwarnings("error")
async def test_a_callback_that_is_ended_before_its_first_step_leaves_no_warning() -> None:
    async with two_nodes() as (one, _):
        server = Counter()
        await start_server(one, server)
        server.process.deliver((GEN_CALL, (server.pid, one.make_reference()), SLOW))
        one.turn()
        server.process.exit(SHUTDOWN)
        await asyncio.sleep(0)
        gc.collect()


async def test_an_answer_that_is_no_term_ends_the_server() -> None:
    class Wrong(Counter):
        async def _slow(self) -> Term:
            return object()

    async with two_nodes() as (one, two):
        server = Wrong()
        await start_server(two, server)
        with pytest.raises(ProcessDied):
            await call(one, server.pid, SLOW)


async def asked(node: Node, server: GenServer, request: Term) -> Term:
    """What a process of `node` is answered to a system message."""
    me = Collector(node)
    tag = node.make_reference()
    me.process.send(server.pid, (SYSTEM, (me.process.pid, tag), request))
    answer = await me.next()
    assert answer[0] == tag
    return answer[1]


def failed(callback: str, kind: str, reason: Term) -> Term:
    """How `sys` says that a callback of a server has raised."""
    return (Atom("error"), (Atom("callback_failed"), (Atom("gen_server"), Atom(callback)), (Atom(kind), reason)))


async def test_sys_messages_are_answered(places: tuple[Node, Node], server: Counter) -> None:
    async def sys_request(request: Term) -> Term:
        return await asked(places[0], server, request)

    await call(places[0], server.pid, (ADD, 3))
    assert await sys_request(Atom("get_state")) == 3
    status = await sys_request(Atom("get_status"))
    assert status[:3] == (Atom("status"), server.pid, (Atom("module"), Atom("gen_server")))
    assert status[3][1] is Atom("running")
    assert await sys_request(Atom("suspend")) is OK
    cast(places[0], server.pid, 1)
    pending = asyncio.create_task(call(places[0], server.pid, (ADD, 1)))
    assert (await sys_request(Atom("get_status")))[3][1] is Atom("suspended")
    assert await sys_request(Atom("get_state")) == 3
    assert await sys_request(Atom("resume")) is OK
    assert await pending == 5
    assert (await sys_request(Atom("nonsense")))[0] is Atom("error")
    assert await sys_request((Atom("terminate"), SHUTDOWN)) is OK
    await wait_until(lambda: server.ended_with is SHUTDOWN)


def replace(module: str, function: str, arity: int = 1) -> Term:
    return (Atom("replace_state"), Export(Atom(module), Atom(function), arity))


async def test_a_state_is_replaced_by_functions_of_either_node(places: tuple[Node, Node], server: Counter) -> None:
    caller, home = places

    async def times_ten(value: int) -> Term:
        await asyncio.sleep(0)
        return value * 10

    home.exports.add("here", "times_ten", times_ten)
    caller.exports.add("there", "plus_one", lambda value: value + 1)
    server.value = 4
    assert await asked(caller, server, replace("here", "times_ten")) == 40
    assert await asked(caller, server, replace("there", "plus_one")) == 41
    assert server.value == 41
    assert await asked(caller, server, Atom("suspend")) is OK
    assert await asked(caller, server, replace("there", "plus_one")) == 42
    assert await asked(caller, server, Atom("resume")) is OK
    assert await call(caller, server.pid, GET) == 42


async def test_a_state_stays_when_it_cannot_be_replaced(places: tuple[Node, Node], server: Counter) -> None:
    caller, _ = places

    def raising(kind: type[ErlangException]) -> Callable[[Term], Term]:
        def function(value: Term) -> Term:
            raise kind((Atom("exception"), value))

        return function

    for kind in (ErlangError, ErlangExit, ErlangThrow):
        caller.exports.add("caller", kind.kind, raising(kind))
    caller.exports.add("caller", "text", lambda value: b"text")
    server.value = 4
    callback = "system_replace_state"
    for name in ("error", "exit", "throw"):
        refusal = failed(callback, name, (Atom("exception"), 4))
        assert await asked(caller, server, replace("caller", name)) == refusal
    refusal = failed(callback, "error", (Atom("python_error"), b"TypeError", b"a counter counts"))
    assert await asked(caller, server, replace("caller", "text")) == refusal
    assert await asked(caller, server, replace("caller", "none")) == failed(callback, "error", Atom("undef"))
    wrong = Export(Atom("caller"), Atom("none"), 2)
    badarity = failed(callback, "error", (Atom("badarity"), (wrong, [4])))
    assert await asked(caller, server, (Atom("replace_state"), wrong)) == badarity
    badfun = failed(callback, "error", (Atom("badfun"), 7))
    assert await asked(caller, server, (Atom("replace_state"), 7)) == badfun
    assert server.value == 4


async def test_a_server_that_takes_no_state_has_none_replaced(places: tuple[Node, Node]) -> None:
    class Plain(GenServer):
        def get_state(self) -> Term:
            raise ValueError("not now")

    caller, home = places
    plain = await start_server(home, Plain())
    caller.exports.add("caller", "same", lambda value: value)
    refusal = failed("system_replace_state", "error", Atom("notsup"))
    assert await asked(caller, plain, replace("caller", "same")) == refusal
    reason = (Atom("python_error"), b"ValueError", b"not now")
    assert await asked(caller, plain, Atom("get_state")) == failed("system_get_state", "error", reason)
    status = await asked(caller, plain, Atom("get_status"))
    assert status[3][4][-1] == (Atom("data"), [(list(b"State"), failed("system_get_state", "error", reason))])


async def test_a_state_that_is_no_term_is_told_and_the_server_lives() -> None:
    class Odd(GenServer):
        def get_state(self) -> Term:
            return object()

    async with two_nodes() as (caller, home):
        odd = await start_server(home, Odd())
        error, (kind, callback, (_, reason)) = await asked(caller, odd, Atom("get_state"))
        assert (error, kind) == (Atom("error"), Atom("callback_failed"))
        assert callback == (Atom("gen_server"), Atom("system_get_state"))
        assert reason[:2] == (Atom("python_error"), b"EncodeError")
        assert odd.process.alive


@pytest.mark.parametrize(
    ("version", "is_wrapped"),
    [("4.2", False), ("5.0.2", False), ("5.1", True), ("6.2.2.1", True), ("7.3", True), ("x", False), ("", False)],
)
async def test_a_state_has_the_shape_of_the_release_that_asks(version: str, is_wrapped: bool) -> None:
    async with running(unique_name("home")) as (home,):
        asking = Node(unique_name("old"), cookie=COOKIE, options=home.options)
        rpc_server.install(asking)
        asking.exports.add("application", "get_key", lambda application, key: (OK, [ord(each) for each in version]))
        async with asking:
            counter = await start_server(home, Counter())
            assert await asked(asking, counter, Atom("get_state")) == ((OK, 0) if is_wrapped else 0)
            asking.exports.add("asking", "one", lambda state: 1)
            assert await asked(asking, counter, replace("asking", "one")) == ((OK, 1) if is_wrapped else 1)


async def test_calls_wait_while_a_state_is_replaced_and_its_function_has_a_time_limit(
    places: tuple[Node, Node], server: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.erl.gen_server.REPLACE_STATE_TIMEOUT_S", 0.05)
    caller, _ = places

    async def for_ever(value: int) -> Term:
        await asyncio.Event().wait()

    caller.exports.add("caller", "for_ever", for_ever)
    replacing = asyncio.create_task(asked(caller, server, replace("caller", "for_ever")))
    calls = [asyncio.create_task(call(caller, server.pid, (ADD, 1))) for _ in range(3)]
    refusal = failed("system_replace_state", "error", (Atom("erpc"), Atom("timeout")))
    assert await replacing == refusal
    assert await asyncio.gather(*calls) == [1, 2, 3]


async def test_what_came_while_suspended_is_handled_before_what_came_since() -> None:
    class Noting(Counter):
        def handle_cast(self, message: Term) -> None:
            self.infos.append(message)

    async with running(unique_name()) as (one,):
        server = Noting()
        await start_server(one, server)
        from_me = (one.client.pid, one.make_reference())
        for message in ((SYSTEM, from_me, Atom("suspend")), (GEN_CAST, 1), (GEN_CAST, 2)):
            server.process.deliver(message)
        for message in ((SYSTEM, from_me, Atom("resume")), (GEN_CAST, 3)):
            server.process.deliver(message)
        await wait_until(lambda: len(server.infos) == 3)
        assert server.infos == [1, 2, 3]


async def test_a_timer_of_a_server_is_an_info(server: Counter) -> None:
    server.cast_after(0.001, "tick")
    await wait_until(lambda: server.infos == ["tick"])


async def test_a_busy_process_does_not_hold_up_others() -> None:
    async with two_nodes(NodeOptions()) as (one, two):
        server = Counter()
        await start_server(two, server)
        for _ in range(20_000):
            cast(one, server.pid, 1)
        other = Counter()
        await start_server(two, other)
        assert await call(one, other.pid, GET, timeout_s=DEADLINE_S) == 0
        assert await call(one, server.pid, GET, timeout_s=DEADLINE_S) == 20_000
