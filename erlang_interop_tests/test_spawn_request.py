"""`spawn_request/5` of BEAM nodes with all its options, and the other signals that a real node sends."""

from __future__ import annotations

import asyncio

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl import Node
from gater.erl.errors import ErlangError, ErlangExit, ErlangThrow
from gater.erl.process import DOWN, EXIT, PROCESS
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Pid, Term

OOPS = Atom("oops")
OK = Atom("ok")
SILENCE = Atom("silence")

REPLY = "receive {spawn_reply, R, Result, Pid} -> {Result, Pid} after 300 -> silence end"


def export(node: Node, started: list[str]) -> None:
    @node.exports.export("work")
    async def forever() -> Term:
        started.append("forever")
        await asyncio.get_running_loop().create_future()
        return OK

    @node.exports.export("work")
    def oops() -> Term:
        raise ErlangExit(OOPS)


def idle(node: Node) -> bool:
    """Whether no peer has a link, a monitor or a function here."""
    connections = node.peers.table.values()
    running = [each for each in node.processes() if each.initial_call and each.initial_call[0] is Atom("work")]
    return not running and not any(each.watched or each.links for each in connections)


async def test_a_request_is_answered_with_a_pid(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        started: list[str] = []
        export(node, started)
        result, pid = await erl_node.eval(f"R = spawn_request(N, work, forever, [], []), {REPLY}", N=node.name)
        assert result is OK
        assert type(pid) is Pid
        assert pid.node is node.name
        await erl_node.eval("exit(P, kill)", P=pid)
        await wait_until(lambda: idle(node))
        assert started == ["forever"]


async def test_the_reply_has_the_tag_asked_for(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        export(node, [])
        source = (
            "R = spawn_request(N, work, oops, [], [{reply_tag, {my, tag}}]), receive {{my, tag}, R, ok, P} -> P end"
        )
        assert type(await erl_node.eval(source, N=node.name)) is Pid


async def test_replies_come_as_asked_for(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        export(node, [])
        for option, comes in (("yes", True), ("no", False), ("error_only", False), ("success_only", True)):
            source = f"R = spawn_request(N, work, oops, [], [{{reply, {option}}}]), {REPLY}"
            assert (await erl_node.eval(source, N=node.name) is not SILENCE) is comes, option
        for option, comes in (("yes", True), ("no", False), ("error_only", True), ("success_only", False)):
            source = f"R = spawn_request(N, work, oops, [], [{{reply, {option}}}, {{no_such, option}}]), {REPLY}"
            answer = await erl_node.eval(source, N=node.name)
            assert answer == ((Atom("error"), Atom("badopt")) if comes else SILENCE), option


async def test_a_link_and_a_monitor_come_with_the_process(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        export(node, [])
        source = """
          process_flag(trap_exit, true),
          R = spawn_request(N, work, oops, [], [link, {monitor, [{tag, {'DOWN', tagged}}]}]),
          receive {spawn_reply, R, ok, P} -> ok end,
          receive {'EXIT', P, Exit} -> ok end,
          receive {{'DOWN', tagged}, R, process, P, Down} -> {Exit, Down} end
        """
        assert await erl_node.eval(source, N=node.name) == (OOPS, OOPS)
        await wait_until(lambda: idle(node))


async def test_the_end_of_the_asking_process_ends_a_linked_one(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        started: list[str] = []
        export(node, started)
        source = "spawn(fun() -> spawn_request(N, work, forever, [], [link]), receive after 100 -> exit(bye) end end)"
        await erl_node.eval(source, N=node.name)
        await wait_until(lambda: started)
        await wait_until(lambda: idle(node))


async def test_an_abandoned_request_leaves_neither_link_nor_monitor(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        started: list[str] = []
        export(node, started)
        source = """
          R = spawn_request(N, work, forever, [], [link, monitor]),
          Abandoned = spawn_request_abandon(R),
          receive Any -> {Abandoned, Any} after 300 -> Abandoned end
        """
        assert await erl_node.eval(source, N=node.name) is True
        if started:
            await wait_until(lambda: idle(node))


async def test_a_process_gets_the_group_leader_of_who_asked(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        export(node, [])
        source = "{group_leader(), spawn(N, work, forever, [])}"
        leader, pid = await erl_node.eval(source, N=node.name)
        process = await wait_until(lambda: node.process(pid))
        assert process.group_leader == leader
        other = await erl_node.eval("G = spawn(fun() -> receive stop -> ok end end), group_leader(G, P), G", P=pid)
        await wait_until(lambda: process.group_leader == other)
        asked = "erpc:call(N, erlang, process_info, [P, group_leader])"
        assert await erl_node.eval(asked, N=node.name, P=pid) == (Atom("group_leader"), other)


async def test_functions_sync_and_async_raise_in_all_classes(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:

        @node.exports.export("raises")
        def sync(kind: Term) -> Term:
            errors = {"error": ErlangError(OOPS), "exit": ErlangExit(OOPS), "throw": ErlangThrow(OOPS)}
            raise errors.get(str(kind)) or KeyError("python")

        @node.exports.export("raises", "async")
        async def asynchronous(kind: Term) -> Term:
            await asyncio.sleep(0)
            return sync(kind)

        for function in ("sync", "'async'"):
            caught = "try erpc:call(N, raises, %s, [%s]) catch C:{exception, R} -> {C, R}; C:{exception, R, [_ | _]} -> {C, R}; C:R -> {C, R} end"  # noqa: E501
            for kind in ("error", "exit", "throw"):
                answer = await erl_node.eval(caught % (function, kind), N=node.name)
                assert answer == (Atom(kind), OOPS), function
            answer = await erl_node.eval(caught % (function, "other"), N=node.name)
            assert answer == (Atom("error"), (Atom("python_error"), b"KeyError", b"'python'"))


async def test_exit_reasons_of_any_size_go_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        reason = (OOPS, {Atom("a"): [1, 2.5, b"x" * 100_000]}, [Atom("list")])
        me = Collector(node, trap_exit=True)
        sender = await erl_node.eval("P = spawn(fun() -> exit(To, R) end), P", To=me.process.pid, R=reason)
        assert await me.next() == (EXIT, sender, reason)
        trap = "spawn(fun() -> process_flag(trap_exit, true), receive X -> Me ! X end end)"
        trapping = await erl_node.eval(trap, Me=me.process.pid)
        node.exit(trapping, reason, me.process.pid)
        assert await me.next() == (EXIT, me.process.pid, reason)
        victim = await erl_node.eval("spawn(fun() -> receive _ -> exit(R) end end)", R=reason)
        reference = me.process.monitor(victim)
        me.process.send(victim, OK)
        assert await me.next() == (DOWN, reference, PROCESS, victim, reason)


async def test_alias_modes_meet_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node)
        twice = "A ! 1, A ! 2, P ! done, ok"

        async def sent(alias: Term) -> list[Term]:
            await erl_node.eval(twice, A=alias, P=me.process.pid)
            got = []
            while (message := await me.next()) is not Atom("done"):
                got.append(message)
            return got

        explicit = me.process.alias()
        assert await sent(explicit) == [1, 2]
        assert me.process.unalias(explicit)
        assert await sent(explicit) == []
        assert await sent(me.process.alias(reply=True)) == [1]
        target = (Atom("gater_test_driver"), erl_node.atom)
        assert await sent(me.process.monitor(target, alias="reply_demonitor")) == [1]
        tied = me.process.monitor(target, alias="demonitor")
        assert await sent(tied) == [1, 2]
        me.process.demonitor(tied)
        assert await sent(tied) == []
        kept = me.process.monitor(target, alias="explicit_unalias")
        me.process.demonitor(kept)
        assert await sent(kept) == [1, 2]


async def test_aliases_of_a_beam_take_messages_from_python(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node)
        keeper = """
          spawn(fun() ->
            A = alias([reply]), Me ! A,
            Loop = fun Again() -> receive X -> Me ! {got, X}, Again() end end, Loop()
          end)
        """
        pid = await erl_node.eval(keeper, Me=me.process.pid)
        alias = await me.next()
        me.process.send(alias, 1)
        me.process.send(alias, 2)
        me.process.send(pid, 3)
        assert [await me.next(), await me.next()] == [(Atom("got"), 1), (Atom("got"), 3)]


async def test_messages_sent_with_priority_arrive(beam: Beams) -> None:
    peer = await beam.start("erlang", otp=28)
    async with python_node(beam) as node:
        me = Collector(node, trap_exit=True)
        sent = await peer.eval("erlang:send(P, urgent, [priority]), erlang:send(P, usual, []), ok", P=me.process.pid)
        assert sent is OK
        assert [await me.next(), await me.next()] == [Atom("urgent"), Atom("usual")]
        sender = await peer.eval("S = spawn(fun() -> exit(P, oops, [priority]) end), S", P=me.process.pid)
        assert await me.next() == (EXIT, sender, OOPS)
        alias = me.process.alias()
        await peer.eval("erlang:send(A, {to, alias}, [priority])", A=alias)
        assert await me.next() == (Atom("to"), Atom("alias"))
        assert await erpc_call(node, peer.atom, "erlang", "node") is peer.atom


async def test_python_starts_linked_and_watched_processes_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        me = Collector(node, trap_exit=True)
        ask = me.process.spawn_request
        for options in ({}, {"link": True}, {"monitor": True}, {"link": True, "monitor": True}):
            reference = ask(erl_node.atom, "erlang", "exit", [OOPS], **options)
            kind, answered, result, pid = await me.next()
            assert (kind, answered, result) == (Atom("spawn_reply"), reference, OK)
            assert pid.node is erl_node.atom
            expected = []
            if "link" in options:
                expected.append((Atom("EXIT"), pid, OOPS))
            if "monitor" in options:
                expected.append((Atom("DOWN"), reference, Atom("process"), pid, OOPS))
            seen = [await me.next() for _ in expected]
            assert sorted(seen, key=repr) == sorted(expected, key=repr)
        assert not me.process.links
        assert not me.process.monitors
        connection = node.peers.table[erl_node.atom]
        assert not any((connection.links, connection.monitors, connection.spawns))
        reference = ask(erl_node.atom, "no_such_module", "f", monitor=True)
        assert (await me.next())[:3] == (Atom("spawn_reply"), reference, OK)
        assert (await me.next())[4][0] is Atom("undef")
        reference = ask("nobody@127.0.0.1", "m", "f", link=True, monitor=True)
        assert await me.next() == (Atom("spawn_reply"), reference, Atom("error"), Atom("noconnection"))
        assert not me.process.monitors


async def test_a_linked_process_on_a_beam_ends_with_the_python_process_that_asked(
    erl_node: BeamNode, beam: Beams
) -> None:
    asleep = "[P || P <- processes(), {initial_call, {timer, sleep, 1}} <- [process_info(P, initial_call)]]"

    async def sleeping() -> int:
        return len(await erl_node.eval(asleep))

    async def nobody_sleeps() -> bool:
        return await sleeping() == 0

    async with python_node(beam) as node:
        await node.connect(erl_node.atom)
        for is_told in (True, False):
            me = Collector(node)
            me.process.spawn_request(erl_node.atom, "timer", "sleep", [Atom("infinity")], link=True)
            if is_told:
                assert (await me.next())[2] is OK
                assert await sleeping() == 1
            me.process.exit(OOPS)
            await wait_until(lambda: not node.peers.table[erl_node.atom].spawns)
            await wait_until(nobody_sleeps)


async def test_a_monitor_of_a_spawn_request_can_be_given_up_before_the_answer(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await node.connect(erl_node.atom)
        me = Collector(node)
        reference = me.process.spawn_request(erl_node.atom, "erlang", "exit", [OOPS], monitor=True)
        assert me.process.demonitor(reference)
        assert (await me.next())[:3] == (Atom("spawn_reply"), reference, OK)
        assert await erl_node.eval("erlang:node()") is erl_node.atom
        assert not node.peers.table[erl_node.atom].monitors
        assert me.messages.empty()
