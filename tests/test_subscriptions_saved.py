"""Checkpoints in the store: two gateways that take a subscription for theirs do not undo what the other has saved."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_kit import DEADLINE_S

from gater.api import schema
from gater.api.subscriptions import saved as saved_module
from gater.api.subscriptions.saved import SavedState, Turns
from gater.erl.terms import Atom

STREAMS = [b"s%d" % number for number in range(6)]


class Snapshots:
    """Snapshots of a store whose writes take a while, and fail at times, whether they are done or not."""

    store = Atom("s")

    def __init__(self, rng: random.Random) -> None:
        self.random = rng
        self.kept: dict[int, Mapping[Any, Any]] = {}
        self.fails = 0.2
        self.writes: list[asyncio.Future[None]] = []

    def write(
        self, source: str, stream: bytes, version: int, record: dict[Any, Any], on_done: Callable[[bool], None]
    ) -> None:
        async def write() -> None:
            await self.pause()
            done = self.random.random() >= self.fails
            if done or self.random.random() < 0.5:
                self.kept[version] = record
            await self.pause()
            on_done(done)

        self.writes.append(asyncio.ensure_future(write()))

    async def all(self, source: str, stream: bytes) -> list[tuple[bytes, bytes, int, Any]]:
        await self.pause()
        return [(source.encode(), stream, version, record) for version, record in self.kept.items()]

    def delete(self, source: str, stream: bytes, version: int) -> None:
        self.kept.pop(version, None)

    async def places(self, source: str) -> list[tuple[bytes, int]]:
        await self.pause()
        return []

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)


def state(snapshots: Snapshots, writer: str) -> SavedState:
    made: Any = snapshots
    return SavedState(made, b"p", schema.BY_STREAM, b"$all", writer=Atom(writer))


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_of_two_writers_the_higher_number_counts(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_module, "MAX_RECENT", 2)
        asyncio.run(two_writers(random.Random(seed)))


async def two_writers(rng: random.Random) -> None:
    snapshots = Snapshots(rng)
    saved: dict[bytes, int] = {}

    async def work(writer: SavedState) -> None:
        positions = await writer.load() or {}
        for _ in range(rng.randrange(8)):
            for stream in rng.sample(STREAMS, rng.randrange(1, 4)):
                positions[stream] = positions.get(stream, 0) + rng.randrange(3)
            part = {
                stream: positions[stream] for stream in rng.sample(sorted(positions), rng.randrange(len(positions)))
            }
            if await writer.save(part):
                for stream, number in part.items():
                    saved[stream] = max(number, saved.get(stream, 0))

    async def check(reader: SavedState) -> None:
        found = await reader.load() or {}
        assert {stream: found.get(stream, 0) for stream in saved if found.get(stream, 0) < saved[stream]} == {}

    for _ in range(3):
        await asyncio.gather(*(work(state(snapshots, writer)) for writer in ("one", "two")))
        await check(state(snapshots, "three"))
    snapshots.fails = 0
    last = state(snapshots, "two")
    await last.load()
    assert await last.absorb()
    await check(state(snapshots, "three"))
    assert not last.has_others
    assert len({version // 100 for version in snapshots.kept}) == 1


async def test_the_last_stop_or_resumption_counts() -> None:
    snapshots = Snapshots(random.Random(0))
    snapshots.fails = 0
    one, two = state(snapshots, "one"), state(snapshots, "two")
    one.stopped = True
    assert await one.save({})
    assert await two.load() == {}
    assert two.stopped
    two.stopped = False
    assert await two.save({b"s": 1})
    assert await one.save({b"s": 2})
    three = state(snapshots, "three")
    assert await three.load() == {b"s": 2}
    assert not three.stopped


async def test_what_is_to_be_saved_while_all_is_removed_is_not_saved() -> None:
    snapshots = Snapshots(random.Random(0))
    snapshots.fails = 0
    one, two = state(snapshots, "one"), state(snapshots, "two")
    assert await one.save({b"s": 1})
    assert await two.save({b"s": 2})
    two.has_others = True
    assert await asyncio.gather(two.remove(), two.save({b"s": 3}), two.absorb()) == [True, False, True]
    assert snapshots.kept == {}


async def test_turns_are_taken_in_order_and_those_nobody_waits_for_are_left_out() -> None:
    turns, order = Turns(), list[str]()

    async def take(name: str) -> None:
        async with turns:
            order.append(name)
            await asyncio.sleep(0)

    turns.take(lambda: order.append("first"))
    left_out = asyncio.ensure_future(take("left out"))
    await asyncio.sleep(0)
    turns.take(lambda: order.append("second"))
    cancelled, third = asyncio.ensure_future(take("cancelled")), asyncio.ensure_future(take("third"))
    await asyncio.sleep(0)
    turns.take(lambda: order.append("fourth"))
    left_out.cancel()
    await asyncio.wait([left_out])
    turns.give_back()
    assert order == ["first", "second"]
    turns.give_back()
    # It has its turn and does not know yet.
    cancelled.cancel()
    await asyncio.wait_for(third, DEADLINE_S)
    assert cancelled.cancelled()
    assert order == ["first", "second", "third", "fourth"]
    turns.give_back()
    await take("last")
    assert order[-1] == "last"
