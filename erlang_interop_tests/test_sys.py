"""`sys` of real nodes on a GenServer in Python: state, status, suspend, resume, replace, terminate; what cannot be."""

from __future__ import annotations

import asyncio

import pytest

from erlang_interop_tests.beam import BeamError, BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, Server, python_node
from gater.erl.gen_server import cast, start_server
from gater.erl.terms import Atom

OK = Atom("ok")


async def test_state_and_status_are_visible(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        bindings = {"S": (Atom("counter"), node.name)}
        # OTP 25 asks for the state as such, OTP 28 for {ok, State}.
        assert await erl_node.eval("gen_server:cast(S, 7), sys:get_state(S)", **bindings) == 7
        node.disconnect(erl_node.atom)
        await node.connect(erl_node.atom)
        assert await erl_node.eval("sys:get_state(S)", **bindings) == 7
        status = await erl_node.eval("sys:get_status(S)", **bindings)
        kind, pid, module, (dictionary, state, parent, debug, misc) = status
        assert (kind, pid, module) == (Atom("status"), server.pid, (Atom("module"), Atom("gen_server")))
        assert (dictionary, state, debug) == ([], Atom("running"), [])
        assert parent == server.pid
        # What appmon, observer and release tools pick out of it.
        picked = """
          {status, _, _, [_, SysState, _, _, Misc]} = sys:get_status(S),
          [{header, _}, {data, Data}, {data, [{"State", State}]}] = Misc,
          {SysState, [Name || {Name, _} <- Data], State}
        """
        names = [list(name) for name in (b"Status", b"Parent", b"Logged events")]
        assert await erl_node.eval(picked, **bindings) == (Atom("running"), names, 7)
        assert misc[0][0] is Atom("header")


async def test_a_suspended_server_answers_when_it_is_resumed(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Server(), name="counter")
        bindings = {"S": (Atom("counter"), node.name)}
        assert await erl_node.eval("sys:suspend(S)", **bindings) is OK
        timed_out = "try gen_server:call(S, count, 50) catch exit:{timeout, _} -> timeout end"
        assert await erl_node.eval(timed_out, **bindings) is Atom("timeout")
        assert await erl_node.eval("gen_server:cast(S, 2), sys:get_state(S)", **bindings) == 0
        suspended = "{status, _, _, [_, State | _]} = sys:get_status(S), State"
        assert await erl_node.eval(suspended, **bindings) is Atom("suspended")
        pending = asyncio.create_task(erl_node.eval("gen_server:call(S, count)", **bindings))
        assert await erl_node.eval("sys:resume(S)", **bindings) is OK
        assert await pending == 2


async def test_terminate_ends_it_with_the_reason_given(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Server(), name="counter")
        ended = """
          R = monitor(process, S), ok = sys:suspend(S), ok = sys:terminate(S, shutdown),
          receive {'DOWN', R, _, _, Reason} -> Reason end
        """
        assert await erl_node.eval(ended, S=(Atom("counter"), node.name)) is Atom("shutdown")
        await wait_until(lambda: node.whereis("counter") is None)


async def test_the_state_is_replaced_by_closures_of_the_asking_node(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        bindings = {"S": (Atom("counter"), node.name)}
        assert await erl_node.eval("sys:replace_state(S, fun(X) -> X + 1 end)", **bindings) == 1
        assert await erl_node.eval("By = 41, sys:replace_state(S, fun(X) -> X + By end)", **bindings) == 42
        assert server.count == 42
        assert await erl_node.eval("sys:suspend(S), sys:replace_state(S, fun erlang:abs/1)", **bindings) == 42
        assert await erl_node.eval("sys:replace_state(S, fun(X) -> {X, self(), node()} end, 5000)", **bindings)
        count, pid, home = server.count
        assert (count, pid.node, home) == (42, erl_node.atom, erl_node.atom)


async def test_what_the_closure_raises_is_told_as_of_a_server_in_erlang(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        for raised, expected in (
            ("error(oops)", (Atom("error"), Atom("oops"))),
            ("exit(oops)", (Atom("exit"), Atom("oops"))),
            ("throw({exception, oops})", (Atom("throw"), (Atom("exception"), Atom("oops")))),
        ):
            with pytest.raises(BeamError) as failed:
                await erl_node.eval(f"sys:replace_state(S, fun(_) -> {raised} end)", S=(Atom("counter"), node.name))
            callback = (Atom("gen_server"), Atom("system_replace_state"))
            assert failed.value.reason == (Atom("callback_failed"), callback, expected)
        assert server.count == 0


async def test_a_node_lost_while_its_closure_runs_leaves_the_state(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        inbox = Collector(node, "inbox")
        slow = "spawn(fun() -> sys:replace_state(S, fun(X) -> {inbox, N} ! running, receive go -> X end end) end), ok"
        assert await erl_node.eval(slow, S=(Atom("counter"), node.name), N=node.name) is OK
        assert await inbox.next() is Atom("running")
        cast(node, server.pid, 3)
        assert server.count == 0
        node.disconnect(erl_node.atom)
        await wait_until(lambda: server.count == 3)


async def test_elixir_replaces_a_state(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        source = ":sys.replace_state(s, fn x -> x + by end)"
        assert await elixir_node.eval(source, s=(Atom("counter"), node.name), by=5) == 5
        assert await elixir_node.eval(":sys.replace_state(s, &Integer.to_string/1)", s=server.pid) == b"5"
        assert server.count == b"5"


async def test_what_sys_asks_besides_is_refused_and_the_server_lives(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Server(), name="counter")
        bindings = {"S": (Atom("counter"), node.name)}
        for request in ("sys:trace(S, true)", "sys:statistics(S, get)", "sys:change_code(S, m, 1, [])"):
            with pytest.raises(BeamError):
                await erl_node.eval(f"case {request} of {{error, R}} -> error(R); Other -> Other end", **bindings)
        assert await erl_node.eval("sys:get_state(S)", **bindings) == 0
