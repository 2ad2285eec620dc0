"""Process groups shared with BEAM nodes, from a hidden node."""

from __future__ import annotations

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl.gen_server import start_server
from gater.erl.pg import Scope
from gater.erl.process import NORMAL
from gater.erl.terms import Atom, Pid, Term

START = "{ok, _} = pg:start(things), ok"
MEMBER = "P = spawn(fun() -> receive stop -> ok end end), ok = pg:join(things, Group, P), P"


async def test_members_are_shared_with_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        scope = Scope("things")
        await start_server(node, scope, name="things")
        await erl_node.eval(START)
        theirs = await erl_node.eval(MEMBER, Group={"a": [1]})
        ours = Collector(node)
        scope.join({"a": [1]}, ours.process.pid)
        await node.connect(erl_node.atom)
        await wait_until(lambda: set(scope.members({b"a": [1]})) == {theirs, ours.process.pid})

        async def known() -> bool:
            members = await erl_node.eval("pg:get_members(things, Group)", Group={"a": [1]})
            return set(members) == {theirs, ours.process.pid}

        await wait_until(known)
        second = Collector(node)
        scope.join(Atom("g"), [second.process.pid, second.process.pid])
        await wait_until(lambda: _members(erl_node, 2))
        assert scope.leave(Atom("g"), second.process.pid)
        await wait_until(lambda: _members(erl_node, 1))
        second.process.exit(NORMAL)
        await wait_until(lambda: _members(erl_node, 0))
        await erl_node.eval("P ! stop, ok", P=theirs)
        await wait_until(lambda: scope.members({b"a": [1]}) == [ours.process.pid])


async def _members(erl_node: BeamNode, count: int) -> bool:
    return len(await erl_node.eval("pg:get_members(things, g)")) == count


async def test_a_group_monitor_on_a_beam_is_told_of_python_members(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        scope = Scope("things")
        await start_server(node, scope, name="things")
        await erl_node.eval(START)
        told = Collector(node)
        await erl_node.eval(
            """
            Self = self(),
            spawn(fun() ->
              {Ref, []} = pg:monitor(things, g),
              Self ! ready,
              Loop = fun Again() -> receive {Ref, What, g, Pids} -> To ! {What, Pids}, Again() end end,
              Loop()
            end),
            receive ready -> ok end
            """,
            To=told.process.pid,
        )
        await node.connect(erl_node.atom)
        await wait_until(lambda: scope.peers())
        member = Collector(node)
        scope.join(Atom("g"), member.process.pid)
        assert await told.next() == (Atom("join"), [member.process.pid])
        node.disconnect(erl_node.atom)
        await node.connect(erl_node.atom)
        await wait_until(lambda: scope.peers())


async def test_the_members_of_a_beam_that_dies_are_gone(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        scope = Scope("things")
        await start_server(node, scope, name="things")
        await erl_node.eval(START)
        theirs = await erl_node.eval(MEMBER, Group=Atom("g"))
        await node.connect(erl_node.atom)
        await wait_until(lambda: scope.members(Atom("g")) == [theirs])
        assert not erl_node.output()
        await erl_node.kill()
        await wait_until(lambda: not scope.groups())


async def test_a_watcher_in_python_is_told_of_members_on_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        scope = Scope("things")
        await start_server(node, scope, name="things")
        told: list[tuple[Term, list[Pid], list[Pid]]] = []
        scope.watch(lambda group, joined, left: told.append((group, joined, left)), Atom("g"))
        await erl_node.eval(START)
        theirs = await erl_node.eval(MEMBER, Group=Atom("g"))
        await node.connect(erl_node.atom)
        await wait_until(lambda: told == [(Atom("g"), [theirs], [])])
        await erl_node.eval("P ! stop, ok", P=theirs)
        await wait_until(lambda: told[1:] == [(Atom("g"), [], [theirs])])


async def test_a_scope_that_a_beam_starts_later_is_found(
    erl_node: BeamNode, beam: Beams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.erl.pg.DISCOVER_AGAIN_S", (0.05, 0.2))
    async with python_node(beam) as node:
        scope = Scope("things")
        await start_server(node, scope, name="things")
        ours = Collector(node)
        scope.join(Atom("g"), ours.process.pid)
        await node.connect(erl_node.atom)
        # It looks for visible nodes only and so does not see us.
        await erl_node.eval(START)
        theirs = await erl_node.eval(MEMBER, Group=Atom("g"))
        await wait_until(lambda: set(scope.members(Atom("g"))) == {ours.process.pid, theirs})
        await wait_until(lambda: _members(erl_node, 2))
