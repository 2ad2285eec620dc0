"""Process groups between Python nodes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
from node_kit import Collector, two_nodes, wait_until

from gater.erl import Node, pg
from gater.erl.errors import ErlangError
from gater.erl.gen_server import call, start_server
from gater.erl.process import NORMAL
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Pid, Term

GROUP = (Atom("group"), 1)
MONITOR = Atom("monitor")


@pytest.fixture
async def scopes() -> AsyncIterator[tuple[pg.Scope, pg.Scope]]:
    async with two_nodes() as (one, two):
        yield await scope(one), await scope(two)


async def scope(node: Node) -> pg.Scope:
    started = pg.Scope("things")
    await start_server(node, started, name="things")
    return started


async def meet(one: pg.Scope, two: pg.Scope) -> None:
    await one.node.connect(two.node.name)
    await wait_until(lambda: one.peers() == [two.pid] and two.peers() == [one.pid])


async def test_members_are_known_everywhere_whenever_they_joined(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    early, late = Collector(one.node).process.pid, Collector(two.node).process.pid
    one.join(GROUP, early)
    await meet(one, two)
    two.join(GROUP, [late, late])
    await wait_until(lambda: len(one.members(GROUP)) == 3 and len(two.members(GROUP)) == 3)
    assert one.members(GROUP) == [early, late, late]
    assert two.local_members(GROUP) == [late, late]
    assert one.groups() == two.groups() == [GROUP]
    assert two.leave(GROUP, late)
    assert two.leave(GROUP, late)
    assert not two.leave(GROUP, late)
    await wait_until(lambda: one.members(GROUP) == [early])


async def test_a_member_that_ends_leaves_all_groups(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    await meet(one, two)
    member = Collector(two.node).process
    for group in (GROUP, [GROUP], GROUP):
        two.join(group, member.pid)
    await wait_until(lambda: len(one.members(GROUP)) == 2 and one.members([GROUP]))
    member.exit(NORMAL)
    await wait_until(lambda: not one.groups() and not two.groups())


async def test_the_members_of_a_node_end_with_its_connection_and_come_back(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    await meet(one, two)
    member = Collector(two.node).process.pid
    two.join(GROUP, member)
    await wait_until(lambda: one.members(GROUP))
    one.node.disconnect(two.node.name)
    await wait_until(lambda: not one.members(GROUP) and not one.peers() and not two.peers())
    assert two.members(GROUP) == [member]
    await meet(one, two)
    await wait_until(lambda: one.members(GROUP) == [member])


async def test_a_scope_that_starts_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pg, "DISCOVER_AGAIN_S", (0.02, 0.05))
    async with two_nodes() as (one, two):
        first = await scope(one)
        await one.connect(two.name)
        second = await scope(two)
        await wait_until(lambda: first.peers() == [second.pid] and second.peers() == [first.pid])
        second.process.exit(NORMAL)
        await wait_until(lambda: not first.peers())
        third = await scope(two)
        await wait_until(lambda: first.peers() == [third.pid])
        await wait_until(lambda: not first._searching)


async def test_watchers_are_told_who_joined_and_left(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    await meet(one, two)
    member = Collector(two.node).process.pid
    told: list[tuple[Term, list[Pid], list[Pid]]] = []
    end = one.watch(lambda *change: told.append(change), GROUP)
    two.join(Atom("other"), member)
    two.join(GROUP, member)
    two.leave(GROUP, member)
    await wait_until(lambda: len(told) == 2)
    assert told == [(GROUP, [member], []), (GROUP, [], [member])]
    end()
    end()
    two.join(GROUP, member)
    await wait_until(lambda: one.members(GROUP))
    assert len(told) == 2


async def test_processes_can_monitor_groups(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, _ = scopes
    member = Collector(one.node).process.pid
    watcher = one.node.client.pid
    reference, members = await call(one.node, one.pid, (MONITOR, GROUP))
    assert members == []
    everything, groups = await call(one.node, one.pid, MONITOR)
    assert groups == {}
    assert set(one._monitors) == {reference, everything}
    assert {pid for pid, _ in one._monitors.values()} == {watcher}
    one.join(GROUP, member)
    assert await call(one.node, one.pid, (Atom("demonitor"), reference)) is Atom("ok")
    assert await call(one.node, one.pid, (Atom("demonitor"), reference)) is False


async def test_the_functions_of_pg_answer_by_rpc(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    member = Collector(two.node).process.pid
    name = Atom("things")

    async def remote(function: str, *arguments: Term) -> Term:
        return await erpc_call(one.node, two.node.name, "pg", function, arguments)

    assert await remote("join", name, GROUP, member) is Atom("ok")
    assert await remote("get_members", name, GROUP) == [member]
    assert await remote("get_local_members", name, GROUP) == [member]
    assert await remote("which_groups", name) == [GROUP]
    assert await remote("leave", name, GROUP, [member]) is Atom("ok")
    assert await remote("leave", name, GROUP, [member]) is Atom("not_joined")
    with pytest.raises(ErlangError) as refused:
        await remote("which_groups")
    assert refused.value.reason[1] is Atom("badarg")


async def test_processes_of_other_nodes_do_not_join_here(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    with pytest.raises(ValueError, match="only processes of this node"):
        one.join(GROUP, Collector(two.node).process.pid)


async def test_what_is_no_message_of_the_protocol_changes_nothing(scopes: tuple[pg.Scope, pg.Scope]) -> None:
    one, two = scopes
    stranger = Collector(two.node)
    for message in (
        (pg.JOIN, stranger.process.pid, GROUP, [stranger.process.pid]),
        (pg.LEAVE, stranger.process.pid, [1], [GROUP]),
        (pg.DISCOVER, 1),
        Atom("nonsense"),
        (pg.JOIN,),
    ):
        stranger.process.send(one.pid, message)
    stranger.process.send(one.pid, (Atom("$gen_cast"), (pg.SYNC, stranger.process.pid, [1, (GROUP, 2)])))
    await wait_until(lambda: stranger.process.pid in one.peers())
    assert one.members(GROUP) == []
    assert one.process.alive


def test_taking_many_from_many_takes_no_longer_than_reading_them() -> None:
    node = Atom("a@b")
    pids = [Pid(node, number, 0, 1) for number in range(30_000)]
    started = time.thread_time()
    assert pg._less(pids + pids, list(reversed(pids))) == pids
    assert pg._less(pids, pids) == []
    assert pg._less(pids[:3], pids[1:2]) == [pids[0], pids[2]]
    assert time.thread_time() - started < 2
