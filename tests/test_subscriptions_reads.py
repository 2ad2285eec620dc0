"""What a feed asks of the members of a store: which one it believes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import STORE, Held
from node_kit import wait_until
from test_service import House, open_house

from gater.api import schema
from gater.api.subscriptions.reads import StoreReads
from gater.erl.terms import Atom, Term

LAST_APPLIED = Atom("last_applied")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, nodes=3, khepri=True) as opened:
        service = opened.system.service
        await wait_until(lambda: len(service.guarded_forms) == 3, "three members that offer Khepri")
        yield opened


class Members:
    """What the members say: index and events of stream `s`, by position; None: it raises."""

    def __init__(self, house: House, said: list[tuple[int, int] | None]) -> None:
        self.said = said
        self.counted: list[int] = []
        for index, each in enumerate(house.cluster.nodes):
            exports = each.node.exports
            del exports._functions[Atom("ra"), Atom("key_metrics"), 1]
            exports.add("ra", "key_metrics", lambda server, i=index: {LAST_APPLIED: self._of(i)[0]})
            del exports._functions[Atom("timer"), Atom("tc"), 3]
            exports.add("timer", "tc", lambda *asked, i=index: (24_000, self._count(i)), arities=[3])

    def _of(self, index: int) -> tuple[int, int]:
        said = self.said[index]
        if said is None:
            raise RuntimeError("no")
        return said

    def _count(self, index: int) -> Term:
        self.counted.append(index)
        return (Atom("ok"), {(Atom("streams"), b"s"): {Atom("child_list_length"): self._of(index)[1]}})


async def test_the_member_that_is_furthest_is_believed(house: House) -> None:
    members = Members(house, [(10, 1), (17, 4), (12, 2)])
    reads = StoreReads(house.system.service, STORE)
    # In turn; one whose index stands still says nothing new.
    assert max([await reads.index() for _ in range(3)], key=lambda value: value or 0) == 17
    assert await reads.index() == 17
    assert (await reads.counts(None))[:2] == ({b"s": 4}, 0.024)
    members.said[1] = None
    seen: list[Any] = [await reads.index() for _ in range(3)]
    assert seen[-1] == 12
    assert (await reads.counts(None))[:2] == ({b"s": 2}, 0.024)


async def test_many_counts_are_read_beside_the_loop(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {(Atom("streams"), b"stream-%d" % number): {Atom("child_list_length"): number} for number in range(6_000)}
    members = Members(house, [(1, 0)] * 3)
    monkeypatch.setattr(members, "_count", lambda index: (Atom("ok"), many))
    reads = StoreReads(house.system.service, STORE)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(others())
    read = reads._khepri_counts
    counted = await reads.counts(None)
    beside.cancel()
    assert counted is not None
    assert counted.counts == {b"stream-%d" % number: number for number in range(6_000)}
    assert counted.own_s > 0
    assert turns > 1
    monkeypatch.setattr(members, "_count", lambda index: (Atom("ok"), [b"x" * 100_000]))
    with pytest.raises(ValueError, match="no counts"):
        await read(house.cluster.nodes[0].node.name, None, 5.0)


async def test_a_store_that_was_made_anew_is_seen_to_have_changed(house: House) -> None:
    members = Members(house, [(100, 9)] * 3)
    reads = StoreReads(house.system.service, STORE)
    assert [await reads.index() for _ in range(3)] == [100] * 3
    members.said = [(3, 1)] * 3
    assert [await reads.index() for _ in range(3)][-1] == 3


async def test_a_member_that_is_gone_says_nothing_any_more(house: House) -> None:
    members = Members(house, [(10, 1), (100, 9), (12, 2)])
    reads = StoreReads(house.system.service, STORE)
    assert [await reads.index() for _ in range(3)][-1] == 100
    node = house.cluster.nodes[1].node
    await node.stop()
    await wait_until(lambda: node.name not in house.system.node.nodes(), "the member to be gone")
    members.said[0] = (11, 1)
    assert [await reads.index() for _ in range(2)][-1] == 12


async def test_where_nobody_tells_an_index_there_is_none(house: House) -> None:
    Members(house, [None] * 3)
    assert await StoreReads(house.system.service, STORE).index() is None


async def test_what_is_certain_is_the_most_that_any_member_has_when_all_have_caught_up(house: House) -> None:
    members = Members(house, [(10, 1), (17, 4), (12, 2)])
    reads, cluster = StoreReads(house.system.service, STORE), house.cluster
    counted = await reads.certain_counts([b"s"])
    assert counted is not None
    assert (counted.counts, counted.applied) == ({b"s": 4}, 17)
    assert {member.node.name for member in cluster.nodes} == set(cluster.fenced)
    members.counted.clear()
    cluster.fence_answer = (Atom("error"), Atom("timeout"))
    assert await reads.certain_counts([b"s"]) is None
    assert members.counted == []
    cluster.fence_answer = Atom("ok")
    members.said[2] = None
    assert await reads.certain_counts([b"s"]) is None
    members.said[2] = (12, 2)
    house.system.service.quorum = lambda store: Atom("minority")
    assert await reads.certain_counts([b"s"]) is None
    house.system.service.quorum = lambda store: None
    node = cluster.nodes[1].node
    await node.stop()
    await wait_until(lambda: node.name not in house.system.node.nodes(), "the member to be gone")
    # It was there a moment ago, and may have what the others lack.
    assert await reads.certain_counts([b"s"]) is None


async def test_who_want_to_know_snapshots_for_certain_together_wait_for_one_fence_and_take_turns(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.reads.CERTAIN_AT_ONCE", 2)
    reads, cluster, held = StoreReads(house.system.service, STORE), house.cluster, Held()
    cluster.always(held, "list_snapshots")
    cluster.fenced.clear()
    replies = asyncio.gather(*(reads.certain_snapshots(b"source", b"stream") for _ in range(10)))
    for _ in range(5):
        await held.arrived(2)
        assert len(held.calls) == 2
        held.release()
    assert await replies == [(schema.OK, {})] * 10
    assert len(cluster.fenced) <= 2


async def test_a_member_whose_workers_hang_says_for_certain_which_snapshots_there_are(house: House) -> None:
    """As they do for seconds where ExESDB's one process that reads a stream's snapshots is on a frozen node."""
    reads, cluster, snapshots = StoreReads(house.system.service, STORE), house.cluster, {(b"stream", 3): {b"a": 1}}
    for node in cluster.nodes:
        del node.node.exports._functions[Atom("khepri"), Atom("get_many"), 2]
        node.node.exports.add("khepri", "get_many", lambda store, path: (schema.OK, snapshots), arities=[2])
    cluster.always(Held(), "list_snapshots")
    assert await reads.certain_snapshots(b"source", b"stream") == (schema.OK, snapshots)
