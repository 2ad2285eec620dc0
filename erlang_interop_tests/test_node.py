"""A Python node among BEAM nodes: who sees whom, links, monitors and exit signals both ways."""

from __future__ import annotations

import asyncio

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl.errors import HandshakeError
from gater.erl.process import DOWN, EXIT, KILLED, NOCONNECTION, NOPROC, PROCESS
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Pid, Term

OOPS = Atom("oops")

ECHO = "register(echo, spawn(fun() -> Loop = fun Again() -> receive {P, M} -> P ! M, Again() end end, Loop() end))"
"""Starts a process `echo` that answers `{From, Message}` with the message."""


async def test_ping_and_a_hidden_node(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        assert await erl_node.eval("net_adm:ping(N)", N=node.name) is Atom("pong")
        assert await erl_node.eval("{nodes(), nodes(hidden)}") == ([], [node.name])
        assert node.nodes() == [erl_node.atom]
        assert await erl_node.eval("net_adm:names('127.0.0.1')") == (
            Atom("ok"),
            await erl_node.eval("{ok, L} = net_adm:names('127.0.0.1'), L"),
        )


async def test_elixir_lists_the_node_as_hidden(elixir_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        assert await elixir_node.eval("Node.connect(n)", n=node.name) is True
        assert await elixir_node.eval("{Node.list(), Node.list(:hidden)}") == ([], [node.name])


async def test_a_python_node_connects_and_the_beam_notices(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await erl_node.eval(
            """
            Self = self(),
            register(watcher, spawn(fun() ->
                net_kernel:monitor_nodes(true, [{node_type, hidden}, nodedown_reason]),
                Self ! go,
                Loop = fun Again(Acc) ->
                    receive {get, P} -> P ! lists:reverse(Acc), Again(Acc); M -> Again([M | Acc]) end
                end,
                Loop([])
            end)),
            receive go -> ok end
            """
        )
        await node.connect(erl_node.atom)
        await erl_node.sees_hidden(node.name)
        node.disconnect(erl_node.atom)

        async def seen() -> list[tuple[object, ...]]:
            return await erl_node.eval("watcher ! {get, self()}, receive L -> L end")

        await wait_until(lambda: _has(seen, 2))
        up, down = await seen()
        assert up[:2] == (Atom("nodeup"), node.name)
        assert down[:2] == (Atom("nodedown"), node.name)


async def _has(seen: object, count: int) -> bool:
    return len(await seen()) >= count  # type: ignore[operator]


async def test_names_and_messages_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        inbox = Collector(node, "inbox")
        await erl_node.eval("{inbox, N} ! {from, self()}, ok", N=node.name)
        _, sender = await inbox.next()
        assert isinstance(sender, Pid)
        assert sender.node is erl_node.atom
        await erl_node.eval("Me ! [1, 2.5, <<3>>, four, #{five => 6}]", Me=inbox.process.pid)
        assert await inbox.next() == [1, 2.5, b"\x03", Atom("four"), {Atom("five"): 6}]
        await erl_node.eval(ECHO)
        inbox.process.send((Atom("echo"), erl_node.atom), (inbox.process.pid, {"a": 1}))
        assert await inbox.next() == {b"a": 1}
        pid = await erl_node.eval("whereis(echo)")
        inbox.process.send(pid, (inbox.process.pid, OOPS))
        assert await inbox.next() is OOPS


async def test_an_alias_of_a_python_process_takes_messages_from_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        inbox = Collector(node)
        alias = inbox.process.alias(reply=True)
        await erl_node.eval("A ! 1, A ! 2, P ! 3", A=alias, P=inbox.process.pid)
        assert [await inbox.next(), await inbox.next()] == [1, 3]


# Monitors


async def test_a_beam_monitors_a_python_process(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        down = "receive {'DOWN', R, process, O, Reason} -> {O, Reason} after 5000 -> timeout end"

        async def watch(target: Collector, watched: Term) -> None:
            waiting = asyncio.create_task(erl_node.eval(f"R = monitor(process, P), {down}", P=watched))
            await wait_until(lambda: target.process.monitored_by)
            target.process.exit(OOPS)
            assert await waiting == (watched, OOPS)
            assert await erl_node.eval(f"R = monitor(process, P), {down}", P=watched) == (watched, NOPROC)

        by_pid, by_name = Collector(node), Collector(node, "target")
        await watch(by_pid, by_pid.process.pid)
        await watch(by_name, (Atom("target"), node.name))
        target = Collector(node)
        await erl_node.eval("demonitor(monitor(process, P)), ok", P=target.process.pid)
        await wait_until(lambda: not target.process.monitored_by)


async def test_a_python_process_monitors_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node)
        pid = await erl_node.eval("V = spawn(fun() -> receive R -> exit(R) end end), register(victim, V), V")
        by_pid = me.process.monitor(pid)
        by_name = me.process.monitor((Atom("victim"), erl_node.atom))
        await erpc_call(node, erl_node.atom, "erlang", "send", [pid, OOPS])
        downs = {(await me.next())[1:] for _ in range(2)}
        assert downs == {
            (by_pid, PROCESS, pid, OOPS),
            (by_name, PROCESS, (Atom("victim"), erl_node.atom), OOPS),
        }
        gone = me.process.monitor((Atom("victim"), erl_node.atom))
        assert await me.next() == (DOWN, gone, PROCESS, (Atom("victim"), erl_node.atom), NOPROC)


# Links and exit signals


async def test_links_from_a_beam_carry_exits_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        linked = "spawn(fun() -> process_flag(trap_exit, true), link(P), Me ! linked, receive X -> Me ! X end end)"
        me = Collector(node)
        victim = Collector(node)
        await erl_node.eval(linked, P=victim.process.pid, Me=me.process.pid)
        assert await me.next() is Atom("linked")
        await wait_until(lambda: victim.process.links)
        victim.process.exit((OOPS, [1]))
        assert await me.next() == (EXIT, victim.process.pid, (OOPS, [1]))

        victim = Collector(node)
        await erl_node.eval("spawn(fun() -> link(P), exit(oops) end)", P=victim.process.pid)
        assert await victim.ended() is OOPS

        trapping = Collector(node, trap_exit=True)
        pid = await erl_node.eval("spawn(fun() -> link(P), exit(normal) end)", P=trapping.process.pid)
        assert await trapping.next() == (EXIT, pid, Atom("normal"))


async def test_links_from_python_carry_exits_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node, trap_exit=True)
        pid = await erl_node.eval("spawn(fun() -> receive R -> exit(R) end end)")
        me.process.link(pid)
        me.process.send(pid, OOPS)
        assert await me.next() == (EXIT, pid, OOPS)
        me.process.link(pid)
        assert await me.next() == (EXIT, pid, NOPROC)

        trap = "spawn(fun() -> process_flag(trap_exit, true), receive X -> Me ! {trapped, X} end end)"
        trapping = await erl_node.eval(trap, Me=me.process.pid)
        ending = Collector(node)
        ending.process.link(trapping)
        await wait_until(lambda: _linked(erl_node, trapping, ending.process.pid))
        ending.process.exit(OOPS)
        assert await me.next() == (Atom("trapped"), (EXIT, ending.process.pid, OOPS))


async def _linked(erl_node: BeamNode, pid: Pid, to: Pid) -> bool:
    return to in (await erl_node.eval("process_info(P, links)", P=pid))[1]


async def test_an_unlink_is_acknowledged_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node, trap_exit=True)
        pid = await erl_node.eval("spawn(fun() -> receive R -> exit(R) end end)")
        me.process.link(pid)
        await wait_until(lambda: _linked(erl_node, pid, me.process.pid))
        me.process.unlink(pid)
        await wait_until(lambda: not me.process.unlinking)
        assert not await _linked(erl_node, pid, me.process.pid)
        await erl_node.eval("link(P), unlink(P), ok", P=me.process.pid)
        await wait_until(lambda: not me.process.links)


async def test_exit_signals_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        victim = Collector(node)
        await erl_node.eval("exit(P, kill)", P=victim.process.pid)
        assert await victim.ended() is KILLED
        me = Collector(node)
        pid = await erl_node.eval("spawn(fun() -> receive R -> exit(R) end end)")
        reference = me.process.monitor(pid)
        node.exit(pid, Atom("kill"))
        assert await me.next() == (DOWN, reference, PROCESS, pid, KILLED)


# Connections


async def test_a_killed_beam_is_noconnection(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node, trap_exit=True)
        pid = await erl_node.eval("spawn(fun() -> receive R -> exit(R) end end)")
        me.process.link(pid)
        await wait_until(lambda: _linked(erl_node, pid, me.process.pid))
        await erl_node.kill()
        assert await me.next() == (EXIT, pid, NOCONNECTION)


async def test_a_frozen_beam_is_found_by_ticks(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam, ticktime_s=0.4) as node:
        reasons: list[str] = []
        node.monitor_nodes(lambda peer, is_up, reason: None if is_up else reasons.append(reason))
        await node.connect(erl_node.atom)
        erl_node.freeze()
        await wait_until(lambda: reasons)
        assert reasons == ["net tick timeout"]
        erl_node.thaw()


async def test_a_restarted_beam_does_not_know_old_pids(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        old = await erl_node.eval("spawn(fun() -> receive R -> exit(R) end end)")
        await erl_node.kill()
        await erl_node.start()
        me = Collector(node)
        reference = me.process.monitor(old)
        assert await me.next() == (DOWN, reference, PROCESS, old, NOPROC)


@pytest.mark.parametrize("attempt", range(3))
async def test_simultaneous_connects_keep_one_connection(erl_node: BeamNode, beam: Beams, attempt: int) -> None:
    async with python_node(beam) as node:
        inbox = Collector(node, "inbox")
        await erl_node.eval(ECHO)
        ping = asyncio.create_task(erl_node.eval("net_adm:ping(N)", N=node.name))
        for _ in range(attempt):
            await asyncio.sleep(0)
        inbox.process.send((Atom("echo"), erl_node.atom), (inbox.process.pid, attempt))
        assert await ping is Atom("pong")
        assert await inbox.next() == attempt
        assert node.nodes() == [erl_node.atom]
        assert await erl_node.eval("nodes(hidden)") == [node.name]


async def test_a_beam_with_another_cookie_is_refused_both_ways(beam: Beams, otp: int) -> None:
    stranger = await beam.start("erlang", otp=otp, cookie="another")
    async with python_node(beam) as node:
        assert await stranger.eval("net_adm:ping(N)", N=node.name) is Atom("pang")
        with pytest.raises(HandshakeError):
            await node.connect(stranger.atom)
        assert node.nodes() == []


async def test_a_timer_sends_to_a_process_of_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node)
        echo = "spawn(fun() -> receive {From, X} -> From ! X end end)"
        peer = await erl_node.eval(echo)
        cancelled = me.process.send_after(0.01, peer, (me.process.pid, Atom("too_early")))
        cancelled.cancel()
        me.process.send_after(0.02, peer, (me.process.pid, Atom("due")))
        assert await me.next() is Atom("due")
