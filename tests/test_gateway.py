"""The Python client: typed values and errors, paged reads, cancellation, and what it connects to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    STORE,
    Cluster,
    Held,
    answering,
    connected,
    crash_before,
    event,
    gateway,
    hang,
    open_cluster,
    signal_counts,
)
from node_kit import COOKIE, free_port, unique_name, wait_until

import gater
from gater import (
    CallTimeout,
    Draining,
    Gateway,
    InvalidRequest,
    NewEvent,
    NoWorkerAvailable,
    Overloaded,
    RequestFailed,
    Snapshot,
    StoreNotFound,
    UnknownOutcome,
    WorkerDied,
    WrongExpectedVersion,
)
from gater.api import gateway as gateway_module
from gater.api import schema
from gater.erl.epmd import register
from gater.erl.errors import EncodeError, HandshakeError, NotConnected
from gater.erl.terms import Atom
from gater.errors import GaterError, SettingsError

NAME = STORE.name


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with open_cluster(tmp_path, 2) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Gateway]:
    async with to_cluster(cluster) as started:
        yield started


def to_nodes(cluster: Cluster, *nodes: str, **options: Any) -> AbstractAsyncContextManager[Gateway]:
    return Gateway.connect(*nodes, **{"cookie": COOKIE, "options": cluster.options, **options})


def to_cluster(cluster: Cluster, **options: Any) -> AbstractAsyncContextManager[Gateway]:
    return to_nodes(cluster, *cluster.names, **options)


def events(*numbers: int) -> list[NewEvent]:
    return [event(number, {b"n": number}) for number in numbers]


# Values


async def test_events_come_back_as_typed_values(client: Gateway) -> None:
    before = datetime.now(UTC)
    given = NewEvent("placed:v1", {"total": 12.5}, {"by": "me"}, event_id="e-1")
    assert await client.append_events(NAME, "s", given) == 0
    (read,) = await client.get_events(NAME, "s")
    assert (read.event_stream_id, read.event_number, read.event_id, read.event_type) == ("s", 0, "e-1", "placed:v1")
    # Text becomes a binary on its way: Erlang knows no other.
    assert (read.data, read.metadata) == ({b"total": 12.5}, {b"by": b"me"})
    assert read.created is not None
    assert before <= read.created <= datetime.now(UTC)


async def test_stores_subscriptions_and_snapshots_come_back_as_typed_values(client: Gateway) -> None:
    (info, *_) = await client.list_stores()
    assert info.store_id is STORE
    assert [each.subscription_name for each in await client.get_subscriptions(NAME)] == ["all-events"]
    record = Snapshot.from_term(Snapshot("agg", 4, "Order", {b"total": 1}).to_term())
    await client.record_snapshot(NAME, "agg", "s", 4, record)
    await client.record_snapshot(NAME, "agg", "s", 5, {b"plain": b"map"})

    async def both() -> bool:
        return len(await client.list_snapshots(NAME, "agg", "s")) == 2

    await wait_until(both, "both snapshots")
    found = await client.list_snapshots(NAME, stream="s")
    assert found == {("agg", "s", 4): record, ("agg", "s", 5): {b"plain": b"map"}}
    assert await client.read_snapshot(NAME, "agg", "s", 4) == record
    assert await client.read_snapshot(NAME, "agg", "s", 9) is None


# Paged reads


async def numbers_of(reading: AsyncIterator[Any]) -> list[int]:
    return [each.event_number async for each in reading]


async def test_iterators_read_whole_streams_page_by_page(
    client: Gateway, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "PAGE_EVENTS", 3)
    await client.append_events(NAME, "s", events(*range(8)))
    assert await numbers_of(client.stream_forward(NAME, "s")) == list(range(8))
    assert await numbers_of(client.stream_forward(NAME, "s", 5)) == [5, 6, 7]
    assert await numbers_of(client.stream_forward(NAME, "s", 1, 4)) == [1, 2, 3, 4]
    assert await numbers_of(client.stream_backward(NAME, "s")) == list(range(7, -1, -1))
    assert await numbers_of(client.stream_backward(NAME, "s", 4)) == [4, 3, 2, 1, 0]
    assert await numbers_of(client.stream_backward(NAME, "s", None, 4)) == [7, 6, 5, 4]
    assert await numbers_of(client.stream_backward(NAME, "s", 12)) == list(range(7, -1, -1))
    assert await numbers_of(client.stream_forward(NAME, "none")) == []
    assert await numbers_of(client.stream_backward(NAME, "none")) == []
    assert await numbers_of(client.stream_forward(NAME, "s", 0, 0)) == []


async def test_an_iterator_asks_for_a_page_when_it_is_needed(
    client: Gateway, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "PAGE_EVENTS", 3)
    await client.append_events(NAME, "s", events(*range(8)))
    async for each in client.stream_forward(NAME, "s"):
        if each.event_number == 3:
            break
    assert len(cluster.asked("get_events")) == 2


async def test_events_appended_while_a_stream_is_read_are_read_too(
    client: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "PAGE_EVENTS", 2)
    await client.append_events(NAME, "s", events(0, 1, 2))
    seen = []
    async for each in client.stream_forward(NAME, "s"):
        seen.append(each.event_number)
        if each.event_number == 0:
            await client.append_events(NAME, "s", events(3))
    assert seen == [0, 1, 2, 3]


# Errors


async def test_a_wrong_version_says_what_was_expected_and_what_there_is(
    client: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A caller that knows more than the node does might have its version of another node.
    monkeypatch.setattr("gater.api.appends.CATCH_UP_S", 0.1)
    await client.append_events(NAME, "s", events(0, 1))
    with pytest.raises(WrongExpectedVersion) as caught:
        await client.append_events(NAME, "s", events(2), expected_version=41)
    assert (caught.value.expected, caught.value.current) == (41, 1)
    with pytest.raises(WrongExpectedVersion) as caught:
        await client.append_events(NAME, "none", events(2), expected_version="stream_exists")
    assert (caught.value.expected, caught.value.current) == ("stream_exists", -1)


async def test_unknown_stores_and_missing_workers_are_two_errors(client: Gateway, cluster: Cluster) -> None:
    with pytest.raises(StoreNotFound) as not_found:
        await client.get_streams("no_such_store")
    assert not_found.value.store == "no_such_store"
    await client.get_streams(NAME)
    cluster.restart_workers = False
    for worker in cluster.workers:
        worker.process.exit(Atom("crashed"))

    async def refused() -> bool:
        try:
            await client.get_streams(NAME)
        except NoWorkerAvailable as error:
            return error.store == NAME
        except WorkerDied:
            return False
        return False

    await wait_until(refused, "no worker")


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda client: client.append_events(NAME, "", events(0)), "empty name"),
        (lambda client: client.append_events(NAME, "s" * 300, events(0)), "300 characters"),
        (lambda client: client.append_events(NAME, "s", events(0), expected_version="no_stream"), "expected version"),
        (lambda client: client.get_events(NAME, "s", 0, 0), "count"),
        (lambda client: client.get_events(NAME, "s", -1, 5), "start"),
        (lambda client: client.record_snapshot(NAME, "agg", "s", -1, {}), "version"),
    ],
    ids=["empty name", "long name", "unknown expectation", "count", "start", "snapshot version"],
)
async def test_a_request_that_no_worker_could_answer_is_refused_before_it_is_sent(
    client: Gateway, cluster: Cluster, ask: Any, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        await ask(client)
    assert cluster.requests == []
    assert cluster.casts == []


async def test_a_value_that_is_no_term_is_refused_and_harms_nothing(client: Gateway) -> None:
    with pytest.raises((InvalidRequest, EncodeError)):
        await client.append_events(NAME, "s", NewEvent("odd:v1", object()))
    assert await client.append_events(NAME, "s", events(0)) == 0


async def test_what_the_store_refuses_for_a_reason_of_its_own_is_a_failed_request(
    client: Gateway, cluster: Cluster
) -> None:
    cluster.always(answering((schema.ERROR, (Atom("disk"), b"full"))), "get_streams")
    with pytest.raises(RequestFailed) as caught:
        await client.get_streams(NAME)
    assert caught.value.reason == (Atom("disk"), b"full")


async def test_time_that_runs_out_is_an_error_of_its_own(cluster: Cluster) -> None:
    async with to_cluster(cluster, timeout_s=0.5) as client:
        cluster.always(hang, "get_streams")
        with pytest.raises(CallTimeout, match="get_streams"):
            await client.get_streams(NAME)
        held = Held()
        cluster.always(held, "append_events")
        with pytest.raises(UnknownOutcome):
            await client.append_events(NAME, "s", events(0))


async def test_every_error_is_a_gater_error_and_has_a_message_for_people() -> None:
    errors = [getattr(gater, name) for name in gater.__all__]
    classes = [each for each in errors if isinstance(each, type) and issubclass(each, Exception)]
    assert WrongExpectedVersion in classes
    assert all(issubclass(each, GaterError) for each in classes)


# Cancelling


@pytest.mark.usefixtures("young_heap")
async def test_a_cancelled_call_leaves_nothing_behind_and_the_next_one_works(client: Gateway, cluster: Cluster) -> None:
    await client.append_events(NAME, "s", events(0))
    before = signal_counts()
    held = Held()
    cluster.always(held, "get_events")
    reading = [asyncio.create_task(client.get_events(NAME, "s")) for _ in range(5)]
    await held.arrived(5)
    for each in reading:
        each.cancel()
    assert all(
        isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*reading, return_exceptions=True)
    )
    held.release()
    await wait_until(lambda: signal_counts() <= before, "no more aliases and monitors than before")
    assert await client.get_version(NAME, "s") == 0


async def test_a_call_within_a_timeout_of_the_caller_ends_with_it(client: Gateway, cluster: Cluster) -> None:
    cluster.always(hang, "get_streams")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.get_streams(NAME)


# What it connects to


async def test_a_client_of_a_gateway_uses_the_gateways_own_process(cluster: Cluster) -> None:
    async with (
        gateway(cluster, max_requests=1) as system,
        to_nodes(cluster, system.settings.name) as client,
    ):
        await connected(system, cluster)
        assert await client.append_events(NAME, "s", events(0)) == 0
        assert client.node.nodes() == [system.node.name]
        held = Held()
        cluster.always(held, "get_streams")
        waiting = asyncio.create_task(client.get_streams(NAME))
        await held.arrived()
        # It is the gateway's limit that is reached.
        with pytest.raises(Overloaded):
            await client.get_version(NAME, "s")
        held.release()
        await waiting
        await system.service.drain(1)
        with pytest.raises(Draining):
            await client.get_version(NAME, "s")


async def test_who_is_connected_to_two_gateways_does_not_notice_that_one_shuts_down(cluster: Cluster) -> None:
    async with gateway(cluster) as one, gateway(cluster) as two:
        for system in (one, two):
            await connected(system, cluster)
        async with to_nodes(cluster, one.settings.name, two.settings.name) as client:
            await wait_until(lambda: len(client._service.router) == 2, "both gateways")
            one.service._draining = True
            for number in range(20):
                assert await client.append_events(NAME, "s", event(number)) == number
                assert await client.get_version(NAME, "s") == number
            two.service._draining = True
            with pytest.raises(Draining):
                await client.get_version(NAME, "s")
            one.service._draining = two.service._draining = False


async def test_a_worker_that_dies_behind_a_gateway_does_not_trouble_its_clients(cluster: Cluster) -> None:
    async with (
        gateway(cluster) as system,
        to_nodes(cluster, system.settings.name) as client,
    ):
        await connected(system, cluster)
        await client.append_events(NAME, "s", events(0))
        cluster.next(crash_before, "get_events")
        assert len(await client.get_events(NAME, "s")) == 1


async def test_one_node_of_those_named_is_enough(cluster: Cluster) -> None:
    nobody = unique_name("nobody")
    async with to_nodes(cluster, nobody, *cluster.names) as client:
        assert await client.get_streams(NAME) == []


async def test_several_clients_live_in_one_process(cluster: Cluster) -> None:
    async with to_cluster(cluster) as one, to_cluster(cluster) as two:
        assert one.node.name is not two.node.name
        assert await one.append_events(NAME, "s", events(0)) == 0
        assert await two.append_events(NAME, "s", events(1), expected_version=0) == 1


async def test_a_node_that_is_not_there_is_not_connected(cluster: Cluster) -> None:
    with pytest.raises(NotConnected, match="not known"):
        async with to_nodes(cluster, unique_name("nobody")):
            pass


async def test_a_wrong_cookie_is_refused(cluster: Cluster) -> None:
    with pytest.raises(HandshakeError, match="cookie"):
        async with to_cluster(cluster, cookie="wrong"):
            pass


async def test_a_node_that_does_not_answer_is_given_up_in_time(cluster: Cluster) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    registration = await register("silent", port, epmd_host="127.0.0.1", epmd_port=cluster.epmd_port)
    with pytest.raises(NotConnected, match=r"within 0\.1 s"):
        async with to_nodes(cluster, "silent@127.0.0.1", connect_timeout_s=0.1):
            pass
    registration.close()
    server.close()


async def test_the_name_of_a_node_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        async with Gateway.connect(cookie=COOKIE):
            pass


async def test_cookie_and_epmd_port_are_taken_from_the_environment(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERL_EPMD_PORT", str(cluster.epmd_port))
    monkeypatch.setenv("RELEASE_COOKIE", COOKIE)
    monkeypatch.delenv("EX_ESDB_COOKIE", raising=False)
    async with Gateway.connect(cluster.names[0]) as client:
        assert await client.get_streams(NAME) == []


async def test_without_any_cookie_the_error_says_where_to_put_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RELEASE_COOKIE", "EX_ESDB_COOKIE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ERL_EPMD_PORT", str(free_port()))
    with pytest.raises(SettingsError, match="EX_ESDB_COOKIE"):
        async with Gateway.connect("a@127.0.0.1"):
            pass
