"""High availability with real processes: what is lost (nothing), who takes over, and how long it takes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from erlang_interop_tests.beam import Beams, beams, wait_until
from erlang_interop_tests.chaos import STORE, House, house, run_chaos
from erlang_interop_tests.standin import StandInCluster
from gater.api.router import owner_rank
from gater.api.schema import NewEvent
from gater.erl.terms import Atom, Term

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAOS_S: Final = float(os.environ.get("GATER_TESTS_CHAOS_S", "12"))
PLAIN_S: Final = 7.0
PLAIN_ROUNDS: Final = 5
"""On a busy machine there may be too few appends for a loss in one."""
OK: Final = Atom("ok")
ERROR: Final = Atom("error")
THE_STORE: Final = Atom(STORE)

TAKE_OVER_S: Final = 3.0
"""For appends to a stream whose owner is lost."""
NEXT_GATEWAY_S: Final = 5.0
"""For callers whose gateway is lost."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[House]:
    async with beams() as beam, house(beam) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def home(shared: House) -> House:
    """Three store nodes and two gateways, all well."""
    await shared.cluster.reset()
    for gater in shared.gaters:
        if gater.process.returncode is not None:
            await gater.start()
    for index, node in enumerate(shared.cluster.members):
        if not node.running:
            await shared.cluster.restart(index)
    await shared.ready()
    return shared


def event(number: int) -> Term:
    return NewEvent("counted:v1", {b"n": number}, {}).to_term()


def owner_of(cluster: StandInCluster, stream: bytes) -> int:
    """The member that every gateway appends to this stream on."""
    ranks = [owner_rank(THE_STORE, stream, Atom(name)) for name in cluster.names]
    return ranks.index(max(ranks))


def order_of(cluster: StandInCluster, stream: bytes) -> list[int]:
    """The members in the order in which they append to this stream: the owner, and who takes its place."""
    ranks = [owner_rank(THE_STORE, stream, Atom(name)) for name in cluster.names]
    return sorted(range(len(ranks)), key=ranks.__getitem__, reverse=True)


def stream_of(cluster: StandInCluster, *owners: int) -> bytes:
    """A new stream that one of these members owns."""
    while True:
        stream = b"stream-%08x" % random.getrandbits(32)
        if owner_of(cluster, stream) in owners:
            return stream


async def append(home: House, stream: bytes, number: int, *, gater: int = 0) -> Any:
    return await home.call(gater, "append_events", THE_STORE, stream, [event(number)])


async def numbers(home: House, stream: bytes, *, member: int = 0) -> list[int]:
    """What the store has, in order."""
    found = await home.cluster.events(stream.decode(), STORE, member=member)
    assert [each[Atom("event_number")] for each in found] == list(range(len(found)))
    return [each[Atom("data")][b"n"] for each in found]


async def test_appends_go_on_when_the_node_that_owns_their_stream_is_killed(home: House) -> None:
    owner = random.randrange(3)
    stream = stream_of(home.cluster, owner)
    assert await append(home, stream, 0) == (OK, 0)
    await home.cluster.kill(owner)
    began = time.monotonic()
    for number in range(1, 6):
        assert await append(home, stream, number, gater=number % 2) == (OK, number)
    assert time.monotonic() - began < TAKE_OVER_S
    await home.cluster.restart(owner)
    assert await numbers(home, stream, member=owner) == list(range(6))


async def test_appends_go_on_when_the_node_that_owns_their_stream_is_frozen(home: House) -> None:
    owner = random.randrange(3)
    stream = stream_of(home.cluster, owner)
    assert await append(home, stream, 0) == (OK, 0)
    home.cluster.members[owner].freeze()
    try:
        began = time.monotonic()
        assert await append(home, stream, 1) == (OK, 1)
        took = time.monotonic() - began
        print(f"first append {took:.2f} s after the freeze")
        assert took < TAKE_OVER_S
        for number in range(2, 6):
            assert await append(home, stream, number) == (OK, number)
    finally:
        home.cluster.members[owner].thaw()
    # What the frozen node had been sent is carried out now, and changes nothing.
    await home.cluster.wait_ready()
    assert await append(home, stream, 6) == (OK, 6)
    assert await numbers(home, stream, member=owner) == list(range(7))


async def test_while_a_majority_is_frozen_writes_are_refused_and_reads_go_on(home: House) -> None:
    stream = stream_of(home.cluster, 0)
    assert await append(home, stream, 0) == (OK, 0)
    asked = 0

    async def refused() -> bool:
        nonlocal asked
        asked += 1
        kind, reason = await append(home, stream_of(home.cluster, asked % 3), 0)
        assert kind is ERROR, "written without a majority"
        return bool(reason[0] is Atom("no_quorum"))

    for member in (1, 2):
        home.cluster.members[member].freeze()
    try:
        began = time.monotonic()
        await wait_until(refused, 30, what="no_quorum")
        print(f"refused {time.monotonic() - began:.1f} s after the freeze, with answer {asked}")
        assert await home.call(0, "get_version", THE_STORE, stream) == (OK, 0)
    finally:
        for member in (1, 2):
            home.cluster.members[member].thaw()

    async def written() -> bool:
        return bool((await append(home, stream_of(home.cluster, 0), 0))[0] is OK)

    await wait_until(written, 30, what="writes going on")


async def test_a_frozen_node_gets_its_streams_back(home: House) -> None:
    owner = random.randrange(3)
    streams = [stream_of(home.cluster, owner) for _ in range(20)]
    home.cluster.members[owner].freeze()
    try:
        answers = await asyncio.gather(*(append(home, stream, 0) for stream in streams))
        assert answers == [(OK, 0)] * len(streams)
    finally:
        home.cluster.members[owner].thaw()
    for number in range(1, 3):
        answers = await asyncio.gather(*(append(home, stream, number) for stream in streams))
        assert answers == [(OK, number)] * len(streams)
    for stream in streams:
        assert await numbers(home, stream) == [0, 1, 2]


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_callers_of_a_lost_gateway_go_on_with_another_one(home: House, how: str) -> None:
    # One try with each gateway: more than one retry is nil, and no answer.
    source = """
    Enum.find_value(nodes, fn node ->
      try do
        case GenServer.call({ExESDBGater.API, node}, request, 5_000) do
          {:error, :draining} -> nil
          answer -> answer
        end
      catch
        :exit, _ -> nil
      end
    end)
    """
    stop = asyncio.Event()
    slowest_s = 0.0

    async def caller(index: int) -> int:
        nonlocal slowest_s
        nodes = [gater.atom for gater in home.gaters]
        done = 0
        while not stop.is_set():
            request = (Atom("append_events"), THE_STORE, b"caller-%d" % index, [event(done)])
            began = time.monotonic()
            answer = await home.callers.eval(source, nodes=nodes, request=request)
            assert answer[0] is OK, answer
            slowest_s = max(slowest_s, time.monotonic() - began)
            done += 1
        return done

    callers = [asyncio.create_task(caller(index)) for index in range(8)]
    await wait_until(lambda: slowest_s > 0, what="a first answer")
    if how == "killed":
        await home.gaters[0].kill()
    else:
        assert await home.gaters[0].stop() == 0
    await asyncio.sleep(2)
    stop.set()
    assert min(await asyncio.gather(*callers)) > 1
    assert slowest_s < NEXT_GATEWAY_S


async def test_appends_of_one_stream_through_one_gateway_keep_their_order(home: House) -> None:
    owner = random.randrange(3)
    stream = stream_of(home.cluster, owner)
    send_all = """
    from = self()
    refs = for event <- events do
      ref = make_ref()
      send({ExESDBGater.API, node}, {:"$gen_call", {from, ref}, {:append_events, :reg_gh, stream, [event]}})
      ref
    end
    for ref <- refs, do: receive(do: ({^ref, answer} -> answer))
    """
    events = [event(number) for number in range(100)]
    asking = asyncio.create_task(
        home.callers.eval(send_all, node=home.gaters[0].atom, stream=stream, events=events, timeout_s=30)
    )
    # In the midst of it the owner stops, so that the first of those left is tried on several nodes.
    home.cluster.members[owner].freeze()
    await asyncio.sleep(1.5)
    home.cluster.members[owner].thaw()
    answers = await asking
    assert answers == [(OK, number) for number in range(100)]
    assert await numbers(home, stream) == list(range(100))


@pytest.mark.parametrize("by", ["SIGTERM", "command"])
async def test_a_gateway_that_is_told_to_end_answers_what_it_has_begun(home: House, by: str) -> None:
    leader = await home.cluster.leader(STORE)
    assert leader is not None
    stream = stream_of(home.cluster, *({0, 1, 2} - {leader}))
    assert await append(home, stream, 0) == (OK, 0)
    # An append takes that long on a follower, a read on any node.
    await home.cluster.set("replication_lag_ms", 600)
    await home.cluster.set("delay_ms", 2_000)
    appending = asyncio.create_task(append(home, stream, 1))
    reading = asyncio.create_task(home.call(0, "get_streams", THE_STORE))
    ending = home.gaters[0]

    async def under_way() -> bool:
        state: Any = await home.callers.eval(":sys.get_state({ExESDBGater.API, node})", node=ending.atom)
        return bool(state[Atom("under_way")] >= 2)

    await wait_until(under_way, what="both requests being under way")
    if by == "command":
        # What `bin/RELEASE stop` does.
        assert await home.callers.eval(":erpc.call(node, System, :stop, [])", node=ending.atom) is OK
        stopping = asyncio.create_task(ending.process.wait())
    else:
        stopping = asyncio.create_task(ending.stop())

    async def refused() -> bool:
        # Answered at once in any case: it is no valid request.
        answer = await home.call(0, "get_events", THE_STORE, stream, 0, 0, Atom("forward"))
        return bool(answer == (ERROR, Atom("draining")))

    await wait_until(refused, what="new requests being refused")
    assert not reading.done()
    assert await append(home, stream, 2, gater=1) in [(OK, 1), (OK, 2)]
    assert (await appending)[0] is OK
    assert (await reading)[0] is OK, reading.result()
    assert await stopping == 0
    await home.cluster.reset()
    assert await append(home, stream, 3, gater=1) == (OK, 3)
    assert sorted(await numbers(home, stream)) == [0, 1, 2, 3]


async def test_nothing_is_lost(home: House, tmp_path: Path) -> None:
    verdict = await run_chaos(
        home, CHAOS_S, seed=random.randrange(1 << 32), directory=tmp_path, longest_fault_s=2.5, pause_ms=200
    )
    print(verdict.report())
    assert not verdict.violations, verdict.report()
    assert verdict.outcomes["ok"] > 100
    assert len({fault.kind for fault in verdict.faults}) > 2


async def test_appends_by_random_workers_lose_events(tmp_path: Path) -> None:
    async with beams() as beam, house(beam, gaters=0) as home:
        for seed in range(PLAIN_ROUNDS):
            verdict = await run_chaos(
                home, PLAIN_S, seed=seed, directory=tmp_path, by_workers=True, longest_fault_s=1.5
            )
            print(verdict.report())
            if verdict.losses > 0:
                return
    pytest.fail("a test that finds no loss here finds none anywhere")


async def test_what_was_written_is_read_though_the_next_owner_lags(home: House) -> None:
    leader = await home.cluster.leader(STORE)
    assert leader is not None
    owner, successor = {0, 1, 2} - {leader}

    streams = (b"stream-%08x" % random.getrandbits(32) for _ in range(1_000))
    stream = next(each for each in streams if order_of(home.cluster, each) == [owner, successor, leader])
    assert await home.call(0, "get_version", THE_STORE, stream) == (OK, -1)
    await home.cluster.set("replication_lag_ms", 600, member=successor)
    assert await append(home, stream, 0) == (OK, 0)
    await home.cluster.kill(owner)
    assert await home.call(0, "get_version", THE_STORE, stream) == (OK, 0)
    # A member that comes back has to catch up before it is read from, whoever has written meanwhile.
    assert await append(home, stream, 1, gater=1) == (OK, 1)
    await home.cluster.restart(owner)
    await home.cluster.set("replication_lag_ms", 600, member=owner)
    await home.ready()
    assert await home.call(0, "get_version", THE_STORE, stream) == (OK, 1)
    await home.cluster.reset()


async def test_what_was_written_through_another_gateway_is_read_though_the_owner_lags(home: House) -> None:
    leader = await home.cluster.leader(STORE)
    assert leader is not None
    owner = min({0, 1, 2} - {leader})
    stream = stream_of(home.cluster, owner)
    assert await home.call(1, "get_version", THE_STORE, stream) == (OK, -1)
    # Only one of the gateways does without the owner, and nobody tells the other one but the first.
    await home.cluster.set("replication_lag_ms", 600, member=owner)
    await home.cluster.cut(owner, [home.gaters[0].name])
    try:
        for number in range(3):
            assert await append(home, stream, number) == (OK, number)
            assert await home.call(1, "get_version", THE_STORE, stream) == (OK, number)
    finally:
        await home.cluster.heal(owner, [home.gaters[0].name])
        await home.cluster.reset()


async def test_appends_by_workers_follow_a_change_of_owner_though_followers_lag() -> None:
    async with beams() as beam, house(beam, khepri=False) as home:
        owner, successor, other = 0, 1, 2
        streams = (b"stream-%08x" % random.getrandbits(32) for _ in range(1_000))
        stream = next(each for each in streams if order_of(home.cluster, each) == [owner, successor, other])
        await home.cluster.set("replication_lag_ms", 500, member=successor)

        async def appended(numbers: range) -> None:
            for number in numbers:
                request = ("append_events", THE_STORE, stream, number - 1, [event(number)])
                assert await home.call(number % 2, *request) == (OK, number)
                # Whichever gateway is asked next, it reads what was written; without `khepri:fence/2` perhaps not at
                # once while the two disagree about who is back.
                reader = (number + 1) % 2

                async def read(reader: int = reader, number: int = number) -> bool:
                    return bool(await home.call(reader, "get_version", THE_STORE, stream) == (OK, number))

                if number < 6:
                    assert await read()
                else:
                    await wait_until(read, 5, what=f"version {number} by gateway {reader}")

        await appended(range(3))
        await home.cluster.kill(owner)
        request: Term = (Atom("get_version"), THE_STORE, stream)

        async def there() -> bool:
            return bool(await home.cluster.call(request, member=other) == (OK, 2))

        await wait_until(there, 30, what="what was written on a node that is left")
        await appended(range(3, 6))
        await home.cluster.restart(owner)
        await home.ready()
        await appended(range(6, 9))
        for member in range(3):
            assert await numbers(home, stream, member=member) == list(range(9))


class Split:
    """A cluster of five cut in two: members 0 and 1 with gateway 0, members 2, 3 and 4 with gateway 1."""

    minority: Final = (0, 1)
    majority: Final = (2, 3, 4)

    def __init__(self, home: House) -> None:
        self.home = home

    def _cuts(self) -> list[tuple[int, list[str]]]:
        cluster, gaters = self.home.cluster, self.home.gaters
        far_side = [cluster.names[member] for member in self.majority]
        return [
            *((member, [*far_side, gaters[1].name]) for member in self.minority),
            *((member, [*(cluster.names[m] for m in self.minority), gaters[0].name]) for member in self.majority),
        ]

    async def cut(self) -> None:
        await asyncio.gather(*(self.home.cluster.cut(member, others) for member, others in self._cuts()))

    async def heal(self) -> None:
        await asyncio.gather(*(self.home.cluster.heal(member, others) for member, others in self._cuts()))


@pytest_asyncio.fixture(loop_scope="module")
async def five() -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        beam: Beams = await stack.enter_async_context(beams())
        yield await stack.enter_async_context(house(beam, members=5))


async def test_a_gateway_on_the_minority_side_of_a_split_refuses_writes(five: House) -> None:
    stream = b"split"
    assert await append(five, stream, 0) == (OK, 0)
    split = Split(five)
    await split.cut()
    asked = 0

    async def refused() -> bool:
        nonlocal asked
        asked += 1
        kind, reason = await append(five, b"other-%d" % asked, 0, gater=0)
        assert kind is ERROR, "written without a majority"
        return bool(reason[0] is Atom("no_quorum"))

    await wait_until(refused, 30, what="no_quorum")

    # The other side goes on, and here what is known can be read.
    async def written() -> bool:
        return bool((await append(five, stream, 1, gater=1))[0] is OK)

    await wait_until(written, 15, what="writes on the majority's side")
    version = (await five.call(1, "get_version", THE_STORE, stream))[1]
    ok, events = await five.call(0, "get_events", THE_STORE, stream, 0, 100, Atom("forward"))
    assert ok is OK
    assert len(events) >= 1
    error, (kind, details) = await append(five, b"yet another", 0, gater=0)
    assert (error, kind) == (ERROR, Atom("no_quorum"))
    assert isinstance(details, dict)
    marked: Any = await five.callers.eval(":sys.get_state({ExESDBGater.API, node})", node=five.gaters[0].atom)
    assert marked[Atom("no_quorum")] == {THE_STORE: details}

    await split.heal()
    await five.ready()

    async def both_write() -> bool:
        answers = [await append(five, stream, 2, gater=gater) for gater in (0, 1)]
        return all(answer[0] is OK for answer in answers)

    await wait_until(both_write, 30, what="both gateways writing")
    versions = [await five.call(gater, "get_version", THE_STORE, stream) for gater in (0, 1)]
    assert versions[0] == versions[1]
    assert versions[0][1] > version
    stored = [await numbers(five, stream, member=member) for member in range(5)]
    assert all(each == stored[0] for each in stored)
    # What was refused or left in doubt without a majority is not there, or is there once.
    for number in range(1, asked + 1):
        assert await numbers(five, b"other-%d" % number) in ([], [0])
