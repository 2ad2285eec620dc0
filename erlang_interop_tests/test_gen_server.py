"""GenServers in Python called from BEAM nodes, and GenServers there called from Python."""

from __future__ import annotations

import asyncio

import pytest

from erlang_interop_tests.beam import BeamError, BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Server, python_node
from gater.erl.errors import CallTimeout, NoProcess, ProcessDied
from gater.erl.gen_server import GenServer, call, cast, spawn_server, start_server, stop
from gater.erl.supervisor import ChildSpec, Supervisor
from gater.erl.terms import Atom, Term

OOPS = Atom("oops")
COUNT, LATER, ECHO = Atom("count"), Atom("later"), Atom("echo")

BIG_BYTES = 20 * 1024 * 1024
CALLERS = 1_000

BEAM_SERVER = """
  Server = spawn(fun() ->
    Loop = fun Again(State) ->
      receive
        {'$gen_call', From, {echo, Term}} -> gen_server:reply(From, Term), Again(State);
        {'$gen_call', From, count} -> gen_server:reply(From, State), Again(State);
        {'$gen_call', From, {later, Ms}} -> timer:apply_after(Ms, gen_server, reply, [From, late]), Again(State);
        {'$gen_call', _, crash} -> exit(crashed);
        {'$gen_cast', Number} -> Again(State + Number);
        {system, From, {terminate, Reason}} -> gen_server:reply(From, ok), exit(Reason)
      end
    end,
    Loop(0)
  end),
  register(beam_server, Server),
  Server
"""
"""What `gen_server` does, without a module: the OTP 28 of the tests has no compiler."""


async def test_elixir_calls_casts_and_sends(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        bindings = {"s": (Atom("counter"), node.name), "pid": server.pid}
        assert await elixir_node.eval("GenServer.call(s, {:echo, %{a: 1}})", **bindings) == {Atom("a"): 1}
        assert await elixir_node.eval("GenServer.call(pid, {:echo, [1, 2.5]})", **bindings) == [1, 2.5]
        assert await elixir_node.eval("GenServer.cast(s, 3); GenServer.call(s, :count)", **bindings) == 3
        await elixir_node.eval("send(s, {:info, 1}); GenServer.call(s, :count)", **bindings)
        assert server.infos == [(Atom("info"), 1)]
        assert await elixir_node.eval(":sys.get_state(s)", **bindings) == 3
        status = await elixir_node.eval(":sys.get_status(s)", **bindings)
        assert status[:3] == (Atom("status"), server.pid, (Atom("module"), Atom("gen_server")))
        await elixir_node.eval(":ok = :sys.suspend(s); :ok = :sys.resume(s)", **bindings)
        await elixir_node.eval("GenServer.stop(s, :shutdown)", **bindings)
        assert node.whereis("counter") is None


async def test_erlang_calls_of_both_releases(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        assert await erl_node.eval("gen_server:call({counter, N}, {echo, {a, <<1>>}})", N=node.name) == (
            Atom("a"),
            b"\x01",
        )
        requests = """
          Requests = lists:foldl(
            fun(I, Acc) -> gen_server:send_request({counter, N}, {echo, I}, I, Acc) end,
            gen_server:reqids_new(), lists:seq(1, 50)),
          Collect = fun Again(Left, Answers) ->
            case gen_server:receive_response(Left, 5000, true) of
              {{reply, Answer}, Label, Rest} -> Again(Rest, [{Answer, Label} | Answers]);
              no_request -> lists:sort(Answers)
            end
          end,
          Collect(Requests, [])
        """
        assert await erl_node.eval(requests, N=node.name) == [(number, number) for number in range(1, 51)]
        await wait_until(lambda: not server.process.monitored_by)


async def test_a_deferred_answer_arrives(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server)
        pending = asyncio.create_task(elixir_node.eval("GenServer.call(p, :later)", p=server.pid))
        await wait_until(lambda: server.waiting)
        server.reply(server.waiting[0], OOPS)
        assert await pending is OOPS


async def test_a_call_that_times_out_exits_with_timeout(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server)
        with pytest.raises(BeamError) as exited:
            await elixir_node.eval("GenServer.call(p, :later, 50)", p=server.pid)
        assert exited.value.kind == "exit"
        assert exited.value.reason[0] is Atom("timeout")
        await wait_until(lambda: server.waiting)
        server.reply(server.waiting[0], OOPS)
        assert await elixir_node.eval("GenServer.call(p, :count)", p=server.pid) == 0
        await wait_until(lambda: not server.process.monitored_by)


async def test_a_crash_is_the_exit_reason_of_the_call(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server)
        with pytest.raises(BeamError) as exited:
            await elixir_node.eval("GenServer.call(p, :nonsense)", p=server.pid)
        (error, stack), _ = exited.value.reason
        assert error == (Atom("python_error"), b"ValueError", b"unknown request nonsense")
        assert stack[0][0] is Atom("python")
        with pytest.raises(BeamError) as gone:
            await elixir_node.eval("GenServer.call(p, :count)", p=server.pid)
        assert gone.value.reason[0] is Atom("noproc")
        with pytest.raises(BeamError) as unknown:
            await elixir_node.eval("GenServer.call({:nobody, n}, :count)", n=node.name)
        assert unknown.value.reason[0] is Atom("noproc")


async def test_a_crashed_server_is_restarted_by_its_supervisor(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:

        async def start() -> GenServer:
            return await start_server(node, Server(), name="counter")

        await start_server(node, Supervisor([ChildSpec("counter", start)]), name="sup")
        bindings = {"s": (Atom("counter"), node.name)}
        await elixir_node.eval("GenServer.cast(s, 5); 5 = GenServer.call(s, :count)", **bindings)
        with pytest.raises(BeamError):
            await elixir_node.eval("GenServer.call(s, :nonsense)", **bindings)
        await wait_until(lambda: node.whereis("counter"))
        assert await elixir_node.eval("GenServer.call(s, :count)", **bindings) == 0
        children = await elixir_node.eval(":supervisor.which_children({:sup, n})", n=node.name)
        assert [(name, kind) for name, _, kind, _ in children] == [(b"counter", Atom("worker"))]


async def test_a_node_that_is_gone_is_nodedown(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server)
        pending = asyncio.create_task(elixir_node.eval("GenServer.call(p, :later)", p=server.pid))
        await wait_until(lambda: server.waiting)
        node.disconnect(elixir_node.atom)
        with pytest.raises(BeamError) as exited:
            await pending
        assert exited.value.reason[0] == (Atom("nodedown"), node.name)


async def test_20_megabytes_there_and_back(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Server(), name="counter")
        same = "B = rand:bytes(Size), gen_server:call({counter, N}, {echo, B}, 20000) =:= B"
        assert await erl_node.eval(same, N=node.name, Size=BIG_BYTES) is True
        await erl_node.eval(BEAM_SERVER)
        body = bytes(range(256)) * (BIG_BYTES // 256)
        assert await call(node, ("beam_server", str(erl_node.name)), (ECHO, body), timeout_s=20) == body


async def test_1000_concurrent_callers_get_their_own_answers(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        callers = """
          Self = self(),
          [spawn(fun() -> Self ! {I, [gen_server:call({counter, N}, {echo, {I, J}}) || J <- lists:seq(1, 5)]} end)
            || I <- lists:seq(1, Count)],
          [receive {I, Answers} -> Answers =:= [{I, J} || J <- lists:seq(1, 5)] end || I <- lists:seq(1, Count)]
        """
        assert set(await erl_node.eval(callers, N=node.name, Count=CALLERS)) == {True}
        await wait_until(lambda: not server.process.monitored_by)
        await erl_node.eval(BEAM_SERVER)
        target = (Atom("beam_server"), erl_node.atom)
        answers = await asyncio.gather(*(call(node, target, (ECHO, number)) for number in range(CALLERS)))
        assert answers == list(range(CALLERS))


async def test_python_calls_a_server_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        pid = await erl_node.eval(BEAM_SERVER)
        name = (Atom("beam_server"), erl_node.atom)
        assert await call(node, pid, (ECHO, {1: [2]})) == {1: [2]}
        cast(node, name, 4)
        assert await call(node, name, COUNT) == 4
        with pytest.raises(CallTimeout):
            await call(node, pid, (LATER, 200), timeout_s=0.05)
        pending = asyncio.create_task(call(node, pid, (LATER, 200)))
        await asyncio.sleep(0.01)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        assert await call(node, pid, (LATER, 10)) is Atom("late")

        async def unwatched() -> bool:
            return await erl_node.eval("process_info(P, monitored_by)", P=pid) == (Atom("monitored_by"), [])

        await wait_until(unwatched)
        with pytest.raises(ProcessDied) as died:
            await call(node, pid, Atom("crash"))
        assert died.value.reason is Atom("crashed")
        with pytest.raises(NoProcess):
            await call(node, name, COUNT)
        assert not node._aliases


async def test_python_stops_a_server_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        pid = await erl_node.eval(BEAM_SERVER)
        await stop(node, pid)
        with pytest.raises(NoProcess):
            await stop(node, (Atom("beam_server"), erl_node.atom))


async def test_a_server_without_callbacks_stops_as_elixirs_does(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        spawn_server(node, GenServer(), name="plain")
        with pytest.raises(BeamError) as exited:
            await elixir_node.eval("GenServer.call({:plain, n}, :what)", n=node.name)
        assert exited.value.reason[0] == (Atom("bad_call"), Atom("what"))


async def test_a_storm_of_casts_ends_the_server_it_overwhelms_and_no_other(
    erl_node: BeamNode, beam: Beams, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Server):
        async def handle_cast(self, message: Term) -> None:  # type: ignore[override]
            await asyncio.Event().wait()

    monkeypatch.setattr("gater.erl.process.MAX_MAILBOX_MESSAGES", 10_000)
    async with python_node(beam) as node:
        for name, server in (("slow", Slow()), ("other", Server())):
            await start_server(node, server, name=name)
        storm = """
          R = monitor(process, {slow, N}),
          Cast = fun Again(0) -> ok; Again(X) -> gen_server:cast({slow, N}, X), Again(X - 1) end,
          spawn(fun() -> Cast(100000) end),
          Call = fun() -> gen_server:call({other, N}, {echo, still_here}) end,
          Wait = fun Again() ->
            still_here = Call(),
            receive {'DOWN', R, _, _, Reason} -> {Reason, Call()} after 0 -> Again() end
          end,
          Wait()
        """
        ended = await erl_node.eval(storm, N=node.name)
        assert ended == (Atom("mailbox_limit"), Atom("still_here"))
