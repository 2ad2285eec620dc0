"""How snapshots of persistent subscriptions are written: by Khepri where a store offers it, otherwise cast and read
back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import STORE, GuardedStep, event, killed_after, killed_before, never
from node_kit import wait_until
from test_service import House, open_house

from gater.api import schema
from gater.api.router import MAX_OPEN_S
from gater.api.subscriptions import protocol as p
from gater.api.subscriptions.protocol import Event
from gater.api.subscriptions.reads import StoreReads
from gater.api.subscriptions.saved import CHECKPOINTS, SavedState, Snapshots
from gater.api.subscriptions.shell import StoreFeed
from gater.api.subscriptions.writes import MAX_WRITES
from gater.erl.terms import Atom, Term

OK = Atom("ok")
WRITE = Atom("write")

Carry = Callable[[], Coroutine[Any, Any, Term]]


@asynccontextmanager
async def khepri_house(directory: Path, nodes: int) -> AsyncIterator[House]:
    async with open_house(directory, nodes=nodes, khepri=True) as house:
        forms = house.system.service.guarded_forms
        await wait_until(lambda: len(forms) == nodes, "members that offer Khepri")
        yield house


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[House]:
    async with khepri_house(tmp_path, 1) as house:
        yield house


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[House]:
    async with khepri_house(tmp_path, 3) as house:
        yield house


def snapshots(house: House) -> Snapshots:
    return Snapshots(house.system.service, StoreReads(house.system.service, STORE))


def state(made: Snapshots, name: bytes = b"p") -> SavedState:
    return SavedState(made, name, schema.BY_STREAM, b"$all", writer=Atom("one"))


def unmarked(request: Term) -> Term:
    """A cast that records a snapshot, without what is different each time."""
    *place, record = request
    return (*place, {key: value for key, value in record.items() if key is not WRITE})


async def stored(house: House, source: str = CHECKPOINTS) -> dict[tuple[Term, ...], Term]:
    """The snapshots of a source, by their paths."""
    ok, found = await house.cluster.ask(("list_snapshots", STORE, source.encode(), schema.ANY))
    assert ok is OK
    return {tuple(path): record for path, record in found.items()}


class Hold:
    """A step that keeps writes until they are let go."""

    def __init__(self, house: House, count: int) -> None:
        self.waiting = 0
        self.let_go = asyncio.Event()
        house.cluster.write_steps.extend([self] * count)

    async def __call__(self, carry_out: Carry) -> Term:
        self.waiting += 1
        await self.let_go.wait()
        return await carry_out()


async def failing(carry_out: Carry) -> Term:
    """What a member answers whose store has no leader."""
    return (Atom("error"), Atom("timeout"))


# What is written


async def test_a_snapshot_is_written_by_one_call_and_is_what_the_cast_would_have_stored(one: House) -> None:
    saved, parked = state(snapshots(one)), Event(b"s", 7, b"e", event(7).to_term())
    assert await saved.save({b"s": 7})
    assert await saved.park(parked, b"why", 3)
    (_, checkpoint), (_, put_aside) = one.cluster.written
    kept = await stored(one) | await stored(one, "gater.parked.p")
    assert len(kept) == 2
    assert [each for _, each in one.cluster.requests if each[0] is Atom("read_snapshot")] == one.cluster.casts == []
    # The same by casts, as long as nobody has said that it offers Khepri.
    one.system.service.guarded_forms.clear()
    again = state(snapshots(one))
    assert await again.save({b"s": 7})
    assert await again.park(parked, b"why", 3)
    assert [unmarked(each) for each in one.cluster.casts] == [unmarked(checkpoint), unmarked(put_aside)]
    assert [each[5][WRITE] for each in one.cluster.casts] != [checkpoint[5][WRITE], put_aside[5][WRITE]]
    assert len(one.cluster.written) == 2
    assert (await stored(one) | await stored(one, "gater.parked.p")).keys() == kept.keys()


async def test_without_khepri_a_snapshot_is_cast_and_read_back(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        saved = state(snapshots(house))
        assert await saved.save({b"s": 7})
        assert len(await stored(house)) == len(house.cluster.casts) == 1
        assert len(house.cluster.asked("read_snapshot")) >= 1
        assert await saved.remove()
        assert not await stored(house)


async def test_what_was_written_is_deleted_by_khepri_too(three: House) -> None:
    saved = state(snapshots(three))
    assert await saved.save({b"s": 7})
    assert await saved.park(Event(b"s", 7, b"e", event(7).to_term()), b"why", 3)
    assert await saved.drop(await saved.parked_places())
    assert not await stored(three, "gater.parked.p")
    assert await saved.remove()
    assert not await stored(three)
    assert three.cluster.casts == []


# Members


async def test_one_subscription_is_written_on_one_member_and_many_on_all(three: House) -> None:
    made = snapshots(three)
    for number in range(100):
        assert await state(made, b"p%d" % (number % 50)).save({b"s": number})
    by_name: dict[bytes, set[Atom]] = {}
    for node, request in three.cluster.written:
        by_name.setdefault(request[3], set()).add(node)
    assert {len(nodes) for nodes in by_name.values()} == {1}
    assert len(set.union(*by_name.values())) == 3


@pytest.mark.parametrize("step", [killed_before, killed_after, failing], ids=lambda step: step.__name__)
async def test_where_one_member_fails_another_is_asked(three: House, step: GuardedStep) -> None:
    three.cluster.write_steps.append(step)
    assert await state(snapshots(three)).save({b"s": 7})
    (first, _), (second, _) = three.cluster.written
    assert first is not second
    assert len(await stored(three)) == 1


async def test_where_one_member_does_not_answer_another_is_asked(three: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.subscriptions.writes.ATTEMPT_S", 0.1)
    three.cluster.write_steps.append(never)
    assert await state(snapshots(three)).save({b"s": 7})
    (first, _), (second, _) = three.cluster.written
    assert first is not second


async def test_a_write_that_fails_everywhere_is_not_certain_and_the_next_one_has_it(three: House) -> None:
    three.cluster.write_steps.extend([failing] * 3)
    saved = state(snapshots(three))
    assert not await saved.save({b"s": 7})
    assert len({node for node, _ in three.cluster.written}) == 3
    assert await saved.save({b"t": 1})
    (record,) = (await stored(three)).values()
    assert record[Atom("positions")] == {b"s": 7, b"t": 1}


async def test_members_that_all_fail_are_not_left_out_for_longer_and_longer(three: House) -> None:
    router, saved = three.system.service.router, state(snapshots(three))
    for _ in range(12):
        three.cluster.write_steps.extend([failing] * 3)
        assert not await saved.save({b"s": 7})
    assert await saved.save({b"s": 7})
    assert all(router.breaker(each.node.name).open_s < MAX_OPEN_S for each in three.cluster.nodes)


async def test_a_write_that_the_only_member_does_not_answer_is_not_certain(
    one: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.writes.WRITE_S", 0.2)
    one.cluster.write_steps.append(never)
    assert not await state(snapshots(one)).save({b"s": 7})
    assert len(one.cluster.written) == 1


async def test_members_that_are_out_of_order_come_last(three: House) -> None:
    router, made = three.system.service.router, snapshots(three)
    owner, second, third = router.owners(STORE, b"p")
    router.suspect(owner, True)
    for _ in range(3):
        router.breaker(second).failed(asyncio.get_running_loop().time() + 3600)
    assert await state(made).save({b"s": 1})
    assert [node for node, _ in three.cluster.written] == [third]
    router.suspect(third, True)
    assert await state(made).save({b"s": 2})
    assert [node for node, _ in three.cluster.written] == [third, owner]


async def test_a_member_that_is_lost_takes_nothing_with_it(three: House) -> None:
    made, first = snapshots(three), three.cluster.nodes[0].node.name
    # The first node has the EPMD, so it stays.
    name = next(
        name
        for name in (b"p%d" % number for number in range(100))
        if three.system.service.router.owners(STORE, name)[0] is not first
    )
    hold, saved = Hold(three, 1), state(made, name)
    saving = asyncio.ensure_future(saved.save({b"s": 7}))
    await wait_until(lambda: hold.waiting == 1, "the write to be under way")
    owner = next(each for each in three.cluster.nodes if each.node.name is three.cluster.written[0][0])
    three.cluster.nodes.remove(owner)
    await owner.stop()
    assert await saving
    assert await saved.save({b"s": 8})
    assert owner.node.name not in {node for node, _ in three.cluster.written[1:]}


# When


async def test_nothing_is_written_without_a_majority(three: House) -> None:
    service, made = three.system.service, snapshots(three)
    service.quorum = lambda store: Atom("details")
    assert not await state(made).save({b"s": 7})
    assert three.cluster.written == []
    service.quorum = lambda store: None
    hold = Hold(three, MAX_WRITES)
    saving = [asyncio.ensure_future(state(made, b"p%d" % number).save({})) for number in range(MAX_WRITES + 1_000)]
    await wait_until(lambda: hold.waiting == MAX_WRITES, "as many writes as there may be")
    # It is lost while others wait for their turn.
    service.quorum = lambda store: Atom("details")
    hold.let_go.set()
    assert (await asyncio.gather(*saving)).count(True) == MAX_WRITES
    assert len(three.cluster.written) == MAX_WRITES


async def test_so_many_writes_are_under_way_the_others_wait_in_order_and_appends_do_not(one: House) -> None:
    made, names = snapshots(one), [b"p%d" % number for number in range(MAX_WRITES + 10)]
    hold = Hold(one, MAX_WRITES)
    saving = [asyncio.ensure_future(state(made, name).save({b"s": 1})) for name in names]
    await wait_until(lambda: hold.waiting == MAX_WRITES, "as many writes as there may be")
    assert await one.append(b"s", 0) == (OK, 0)
    assert len(one.cluster.written) == MAX_WRITES
    hold.let_go.set()
    assert all(await asyncio.gather(*saving))
    assert [request[3] for _, request in one.cluster.written] == names


async def test_writes_of_one_snapshot_do_not_overtake_each_other(three: House) -> None:
    hold, saved = Hold(three, 1), state(snapshots(three))
    saving = [asyncio.ensure_future(saved.save({b"s": number})) for number in range(5)]
    await wait_until(lambda: hold.waiting == 1, "the first write to be under way")
    assert await state(snapshots(three), b"q").save({b"s": 1})
    assert [request[3] for _, request in three.cluster.written] == [b"p", b"q"]
    hold.let_go.set()
    assert all(await asyncio.gather(*saving))
    (record,) = (each for path, each in (await stored(three)).items() if path[2] == b"p")
    assert record[Atom("positions")] == {b"s": 4}


async def test_the_last_checkpoint_is_waited_for_and_nothing_is_begun_once_all_is_over(one: House) -> None:
    feed = StoreFeed(one.system.service, STORE)
    saved = feed.saved[b"p"] = state(feed.snapshots)
    hold = Hold(one, 1)
    feed._save(p.SaveCheckpoint(b"p", 1, {b"s": 7}))
    del feed.saved[b"p"]
    settling, flushing = asyncio.ensure_future(feed.settled()), asyncio.ensure_future(saved.flushed())
    await wait_until(lambda: hold.waiting == 1, "the write to be under way")
    assert not settling.done()
    assert not flushing.done()
    hold.let_go.set()
    await settling
    await flushing
    assert len(await stored(one)) == 1
    hold = Hold(one, MAX_WRITES)
    saving = [asyncio.ensure_future(state(feed.snapshots).save({})) for _ in range(MAX_WRITES + 1)]
    await wait_until(lambda: hold.waiting == MAX_WRITES, "as many writes as there may be")
    feed.close()
    hold.let_go.set()
    assert await state(snapshots(one)).save({b"s": 8})
    assert len(one.cluster.written) == 1 + MAX_WRITES + 1
    assert not any(each.done() for each in saving)
    for each in saving:
        each.cancel()
