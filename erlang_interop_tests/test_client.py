"""The Python client against a store node: every operation, and what happens when workers or nodes die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import pytest

from erlang_interop_tests.beam import Beams, wait_until
from erlang_interop_tests.standin import StandInCluster, standin_cluster
from gater import (
    CallTimeout,
    Gateway,
    InvalidRequest,
    NewEvent,
    NoWorkerAvailable,
    Snapshot,
    StoreNotFound,
    UnknownOutcome,
    WrongExpectedVersion,
)
from gater.erl import NodeOptions
from gater.erl.errors import HandshakeError, NotConnected
from gater.erl.terms import Atom

STORE: Final = "reg_gh"


@pytest.fixture
async def cluster(beam: Beams) -> AsyncIterator[StandInCluster]:
    async with standin_cluster(beam, 1, stores=[STORE]) as started:
        yield started


@pytest.fixture
async def gateway(beam: Beams, cluster: StandInCluster) -> AsyncIterator[Gateway]:
    options = NodeOptions(epmd_port=await beam.epmd_port())
    async with Gateway.connect(*cluster.names, cookie=cluster.cookie, options=options, timeout_s=2) as connected:
        yield connected


def events(count: int) -> list[NewEvent]:
    return [NewEvent(f"counted:v{n}", {"n": n}) for n in range(count)]


async def test_events_are_appended_and_read(gateway: Gateway) -> None:
    assert await gateway.append_events(STORE, "s", events(3)) == 2
    assert await gateway.append_events(STORE, "s", NewEvent("more:v1", None), expected_version=2) == 3
    assert await gateway.append_events(STORE, "s", NewEvent("more:v2", None), expected_version="stream_exists") == 4
    read = await gateway.get_events(STORE, "s")
    assert [(each.event_number, each.event_type) for each in read][:2] == [(0, "counted:v0"), (1, "counted:v1")]
    assert read[1].data == {b"n": 1}
    assert [each.event_number for each in await gateway.get_events(STORE, "s", 3, 2, "backward")] == [3, 2]
    assert await gateway.get_version(STORE, "s") == 4
    assert await gateway.get_version(STORE, "none") == -1
    assert await gateway.get_streams(STORE) == ["s"]


async def test_iterators_read_page_by_page(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.gateway.PAGE_EVENTS", 4)
    await gateway.append_events(STORE, "s", events(10))
    assert [each.event_number async for each in gateway.stream_forward(STORE, "s")] == list(range(10))
    assert [each.event_number async for each in gateway.stream_forward(STORE, "s", 3, 5)] == [3, 4, 5, 6, 7]
    assert [each.event_number async for each in gateway.stream_backward(STORE, "s")] == list(range(9, -1, -1))
    assert [each.event_number async for each in gateway.stream_backward(STORE, "s", 6, 3)] == [6, 5, 4]


async def test_errors_are_typed(gateway: Gateway) -> None:
    await gateway.append_events(STORE, "s", events(1))
    with pytest.raises(WrongExpectedVersion) as wrong:
        await gateway.append_events(STORE, "s", events(1), expected_version=7)
    assert (wrong.value.expected, wrong.value.current) == (7, 0)
    with pytest.raises(StoreNotFound):
        await gateway.append_events("no_such_store", "s", events(1))
    with pytest.raises(StoreNotFound):
        await gateway.get_streams("no_such_store")
    with pytest.raises(InvalidRequest):
        await gateway.get_events(STORE, "s", 0, 0)
    with pytest.raises(InvalidRequest):
        await gateway.append_events(STORE, "s", events(1), expected_version=Atom("no_stream"))


async def test_snapshots(gateway: Gateway) -> None:
    record = Snapshot("agg-1", 2, "Order", {b"total": 12})
    await gateway.record_snapshot(STORE, "agg-1", "order-1", 2, record)
    await gateway.record_snapshot(STORE, "agg-2", "order-2", 1, {Atom("plain"): 1})

    async def all_there() -> bool:
        return len(await gateway.list_snapshots(STORE)) == 2

    await wait_until(all_there, 5)
    read = await gateway.read_snapshot(STORE, "agg-1", "order-1", 2)
    assert isinstance(read, Snapshot)
    assert (read.source_uuid, read.data, read.created_at) == ("agg-1", {b"total": 12}, record.created_at)
    assert await gateway.read_snapshot(STORE, "agg-1", "order-1", 9) is None
    assert list(await gateway.list_snapshots(STORE, "agg-2")) == [("agg-2", "order-2", 1)]
    await gateway.delete_snapshot(STORE, "agg-1", "order-1", 2)

    async def deleted() -> bool:
        return await gateway.read_snapshot(STORE, "agg-1", "order-1", 2) is None

    await wait_until(deleted, 5)


async def test_stores_subscriptions_and_checks(gateway: Gateway) -> None:
    assert [each.store_id for each in await gateway.list_stores()] == [Atom(STORE)]
    assert await gateway.get_subscriptions(STORE) is not None
    for check in (
        gateway.verify_cluster_consistency,
        gateway.quick_health_check,
        gateway.verify_membership_consensus,
        gateway.check_raft_log_consistency,
    ):
        assert await check(STORE)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_append_whose_process_dies_is_resolved_and_stored_once(
    gateway: Gateway, cluster: StandInCluster, moment: str
) -> None:
    await gateway.append_events(STORE, "s", events(1))
    await cluster.set("die_in_next_append", Atom(moment))
    appended = events(2)
    assert await gateway.append_events(STORE, "s", appended, expected_version=0) == 2
    assert [each.event_id for each in await gateway.get_events(STORE, "s", 1)] == [each.event_id for each in appended]
    assert await gateway.append_events(STORE, "s", events(1)) == 3


async def test_an_append_that_nobody_answers_is_an_unknown_outcome(gateway: Gateway, cluster: StandInCluster) -> None:
    await gateway.append_events(STORE, "s", events(1))
    cluster.members[0].freeze()
    with pytest.raises(UnknownOutcome):
        await gateway.append_events(STORE, "s", events(1))
    cluster.members[0].thaw()


async def test_a_worker_that_dies_during_a_read_is_replaced_by_another(
    gateway: Gateway, cluster: StandInCluster
) -> None:
    await gateway.append_events(STORE, "s", events(1))
    await cluster.set("crash_next", True)
    assert await gateway.get_version(STORE, "s") == 0


async def test_a_node_that_dies_during_a_call_gives_a_clear_error_and_no_hang(
    gateway: Gateway, cluster: StandInCluster
) -> None:
    await gateway.append_events(STORE, "s", events(1))
    await cluster.set("hang_next", 60_000)
    async with asyncio.timeout(2):
        call = asyncio.create_task(gateway.get_version(STORE, "s"))
        await asyncio.sleep(0)
        await cluster.kill(0)
        with pytest.raises((NoWorkerAvailable, CallTimeout)):
            await call


async def test_a_call_can_be_cancelled(gateway: Gateway, cluster: StandInCluster) -> None:
    await gateway.append_events(STORE, "s", events(1))
    await cluster.set("hang_next", 1_000)
    call = asyncio.create_task(gateway.get_version(STORE, "s"))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await gateway.get_version(STORE, "s") == 0


async def test_a_wrong_cookie_and_an_unknown_node_are_clear_errors(beam: Beams, cluster: StandInCluster) -> None:
    options = NodeOptions(epmd_port=await beam.epmd_port())
    with pytest.raises(HandshakeError, match="cookie"):
        async with Gateway.connect(*cluster.names, cookie="wrong", options=options):
            pass
    with pytest.raises(NotConnected, match="not known"):
        async with Gateway.connect("nobody@127.0.0.1", cookie=cluster.cookie, options=options):
            pass
