"""Appends under way in a gateway: queues, bounds, nodes that hang or cannot do it, and stores that do not answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import STORE, Held, event, never
from node_kit import wait_until
from test_service import ERROR, OK, House, kind_of, open_house

from gater.api import schema
from gater.api.appends import ATTEMPT_S, MAX_WRITES_PER_NODE
from gater.api.guarded import LATE
from gater.api.router import MAX_FAILURES
from gater.erl.errors import ErlangThrow
from gater.erl.terms import Atom, Term


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[House]:
    """Two store nodes that can evaluate guarded appends."""
    async with open_house(tmp_path, nodes=2, khepri=True) as house:
        yield house


async def submit(house: House, stream: bytes, count: int) -> tuple[list[Term], list[int]]:
    """Hand so many appends to the service at once: where replies will be, and the order they come in."""
    replies: list[Term] = [None] * count
    order: list[int] = []

    def on_reply(index: int, reply: Term) -> None:
        replies[index] = reply
        order.append(index)

    for index in range(count):
        request = (schema.APPEND_EVENTS, STORE, stream, schema.ANY, [event(index).to_term()])
        house.system.service.call(request, lambda reply, index=index: on_reply(index, reply))  # type: ignore[misc]
    return replies, order


async def test_thousands_of_appends_of_one_stream_may_end_at_the_same_moment(guarded: House) -> None:
    first = asyncio.Event()

    async def held(carry_out: Any) -> Term:
        await first.wait()
        return await carry_out()

    guarded.cluster.guarded_steps.append(held)
    replies, order = await submit(guarded, b"s", 5_000)
    await wait_until(lambda: guarded.cluster.guarded, "the first write")
    details: Term = {Atom("problem"): Atom("minority")}
    guarded.system.service.quorum = lambda store: details
    first.set()
    await wait_until(lambda: len(order) == 5_000, "all replies")
    assert replies == [(OK, 0)] + [(ERROR, schema.no_quorum(details))] * 4_999
    assert order == list(range(5_000))
    assert await guarded.stored(b"s") == [0]


async def test_writes_under_way_on_one_node_are_bounded_and_all_are_carried_out(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True) as house:
        streams = [b"stream-%d" % number for number in range(3 * MAX_WRITES_PER_NODE)]
        gate = asyncio.Event()
        at_once = 0

        async def held(carry_out: Any) -> Term:
            nonlocal at_once
            at_once += 1
            await gate.wait()
            return await carry_out()

        house.cluster.guarded_steps.extend([held] * MAX_WRITES_PER_NODE)
        appending = [asyncio.create_task(house.append(stream, 0, expected=-1)) for stream in streams]
        await wait_until(lambda: at_once == MAX_WRITES_PER_NODE, "as many writes as may be")
        await wait_until(lambda: house.system.service.under_way == len(streams), "the others")
        assert len(house.cluster.guarded) == MAX_WRITES_PER_NODE
        gate.set()
        assert await asyncio.gather(*appending) == [(OK, 0)] * len(streams)
        assert len(house.cluster.guarded) == len(streams)


async def test_what_waits_for_a_node_that_hangs_goes_elsewhere_when_it_is_left_out(guarded: House) -> None:
    hanging = guarded.cluster.nodes[0]
    router = guarded.system.service.router
    owned: list[bytes] = []
    number = 0
    while len(owned) < MAX_WRITES_PER_NODE + 40:
        stream = b"stream-%d" % number
        number += 1
        if router.owners(STORE, stream)[0] is hanging.node.name:
            owned.append(stream)
    guarded.cluster.guarded_steps.extend([never] * MAX_WRITES_PER_NODE)
    began = asyncio.get_running_loop().time()
    replies = await asyncio.gather(*(guarded.append(stream, 0, expected=-1) for stream in owned))
    assert replies == [(OK, 0)] * len(owned)
    assert asyncio.get_running_loop().time() - began < 2 * ATTEMPT_S + 1
    # Until it is left out it gets what waits, one for each that has failed.
    assert Counter(guarded.cluster.guarded)[hanging] <= MAX_WRITES_PER_NODE + MAX_FAILURES


async def test_a_store_that_answers_with_errors_is_not_asked_without_pause(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=3, khepri=True, call_timeout_ms=600) as house:

        async def broken(carry_out: Any) -> Term:
            raise ErlangThrow((Atom("failed"), 0, (ERROR, Atom("noproc"))))

        house.cluster.guarded_steps.extend([broken] * 1_000)
        assert kind_of(await house.append(b"s", 0, expected=-1)) == "unknown_outcome"
        # Three nodes, a pause of 100 ms, three nodes, ...
        assert 3 <= len(house.cluster.guarded) <= 3 * 7


async def test_a_stream_that_is_shorter_than_its_caller_thinks_is_not_refused_while_in_doubt(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, khepri=True, call_timeout_ms=3_000) as house:
        steps: list[Any] = []

        async def frozen(carry_out: Any) -> Term:
            steps.append(carry_out)
            return await asyncio.get_running_loop().create_future()

        async def too_short(carry_out: Any) -> Term:
            raise ErlangThrow((Atom("ahead"), 1, 0))

        house.cluster.guarded_steps.extend([frozen, *[too_short] * 1_000])
        appending = asyncio.create_task(house.append(b"s", 7, expected=0))
        await wait_until(lambda: len(house.cluster.guarded) > 3, "several attempts")
        # Another writer comes, and the frozen node wakes up.
        assert await house.cluster.ask(("append_events", STORE, b"s", -1, [event(1).to_term()])) == (OK, 0)
        with pytest.raises(ErlangThrow):
            await steps[0]()
        house.cluster.guarded_steps.clear()
        assert await appending == (OK, 1)
        assert await house.stored(b"s") == [1, 7]


async def test_a_store_that_was_too_short_all_along_refuses_at_once(guarded: House) -> None:
    async def too_short(carry_out: Any) -> Term:
        raise ErlangThrow((Atom("ahead"), 8, 3))

    guarded.cluster.guarded_steps.append(too_short)
    assert await guarded.append(b"s", 7, expected=7) == (ERROR, schema.wrong_expected_version(2))
    assert len(guarded.cluster.guarded) == 1


async def test_a_batch_whose_evaluation_ran_out_of_time_is_gone_on_with(guarded: House) -> None:
    async def two_of_them(carry_out: Any) -> Term:
        await guarded.cluster.append_first(STORE, b"s", 0, [event(number).to_term() for number in (0, 1)])
        raise ErlangThrow((LATE, 2))

    guarded.cluster.guarded_steps.append(two_of_them)
    assert await guarded.append(b"s", 0, 1, 2, 3, 4) == (OK, 4)
    assert await guarded.stored(b"s") == [0, 1, 2, 3, 4]
    assert len(guarded.cluster.guarded) == 2


async def test_how_much_of_a_batch_there_was_time_for_is_told(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True, call_timeout_ms=200) as house:

        async def late(carry_out: Any) -> Term:
            raise ErlangThrow((LATE, 2))

        house.cluster.guarded_steps.extend([late] * 10_000)
        reply = await house.append(b"s", 0, 1, 2, 3, 4, expected=-1)
        assert reply == (ERROR, schema.partially_appended(1, 2, 5))


async def test_no_worker_appends_where_another_node_of_the_store_offers_the_guarded_way(guarded: House) -> None:
    service = guarded.system.service
    plain, able = guarded.cluster.nodes
    service.guarded_forms[plain.node.name] = None
    for number in range(20):
        assert await guarded.append(b"stream-%d" % number, 0) == (OK, 0)
    assert set(guarded.cluster.guarded) == {able}
    assert guarded.cluster.asked("append_events") == []


async def test_a_node_without_one_of_the_functions_appends_by_its_workers(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        exports = house.cluster.nodes[0].node.exports
        exports.add("khepri", "put", lambda *_: None, arities=[4])
        assert await house.append(b"s", 0) == (OK, 0)
        assert len(house.cluster.asked("append_events")) == 1


async def test_appends_by_workers_can_be_chosen(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True, append_mode="worker") as house:
        assert await house.append(b"s", 0, 1) == (OK, 1)
        assert house.cluster.guarded == []
        assert len(house.cluster.asked("append_events")) == 1


async def test_guarded_appends_can_be_demanded(tmp_path: Path) -> None:
    async with open_house(tmp_path, append_mode="guarded") as house:
        assert kind_of(await house.append(b"s", 0)) == "no_worker_available"
        assert house.cluster.asked("append_events") == []


async def test_an_append_that_ran_out_of_time_in_the_queue_was_never_sent(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True, call_timeout_ms=500) as house:

        async def goes_on() -> bool:
            return (await house.append(b"s", 9))[0] is OK

        house.cluster.guarded_steps.append(never)
        replies, _ = await submit(house, b"s", 3)
        await wait_until(lambda: None not in replies, "three answers")
        assert [kind_of(reply) for reply in replies] == ["unknown_outcome", "call_timeout", "call_timeout"]
        assert len(house.cluster.guarded) == 1
        # On a busy machine one more may run out of time.
        await wait_until(goes_on, "the next append")


async def test_a_node_that_is_left_out_gets_one_read_as_a_probe(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2) as house:
        router = house.system.service.router
        slow = house.cluster.nodes[1]
        stream = next(
            stream
            for stream in (b"stream-%d" % number for number in range(100))
            if router.owners(STORE, stream)[0] is slow.node.name
        )
        breaker = router.breaker(slow.node.name)
        for _ in range(MAX_FAILURES):
            breaker.failed(0.0)
        held = Held()
        house.cluster.next(held, "get_version")
        probe = asyncio.create_task(house.ask("get_version", STORE, stream))
        await held.arrived()
        others = await asyncio.gather(*(house.ask("get_version", STORE, stream) for _ in range(5)))
        assert others == [(OK, -1)] * 5
        homes = Counter(worker.home for worker in house.cluster.asked("get_version"))
        assert homes[slow] == 1
        held.release()
        assert await probe == (OK, -1)
        assert breaker.failures == 0


async def test_appends_without_a_node_are_refused_when_too_many_wait_for_registries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(tmp_path, append_mode="guarded") as house:
        assert kind_of(await house.append(b"s", 0)) == "no_worker_available"
        monkeypatch.setattr("gater.api.discovery.MAX_WAITING", 0)
        assert await house.append(b"s", 0) == (ERROR, schema.OVERLOADED)
        assert house.system.service.under_way == 0
