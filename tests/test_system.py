"""The gateway as a whole: starting, the order of things, restarts of its parts, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    STORE,
    Held,
    caller_node,
    connected,
    event,
    function_door,
    gateway,
    open_cluster,
    server_door,
)
from node_kit import COOKIE, free_port, unique_name, wait_until

from gater import system as system_module
from gater.api import schema
from gater.api.server import API_MODULE
from gater.cluster import monitor
from gater.cluster.gossip import Gossip, GossipOptions
from gater.cluster.strategy import DnsPoll, StaticList
from gater.erl.errors import NodeError
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom
from gater.errors import SettingsError, StoreError
from gater.pubsub.messages import MONITOR_SERVER
from gater.settings import Settings
from gater.system import System

OK = schema.OK


def settings(**given: object) -> Settings:
    chosen: dict[str, object] = {
        "name": unique_name("gater"),
        "cookie": COOKIE,
        "gossip": False,
        "http_port": free_port(),
    }
    return Settings(**(chosen | given))  # type: ignore[arg-type]


async def test_a_gateway_says_what_it_runs_and_is_a_hidden_node(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data") as system, caller_node(system.settings.epmd_port) as caller:
        applications = await erpc_call(caller, system.node.name, "application", "which_applications")
        names = [str(each[0]) for each in applications]
        assert "gater" in names
        assert "swarm" in names
        # What ExESDB would take for one of its own.
        assert "ex_esdb" not in names
        assert await erpc_call(caller, system.node.name, "erlang", "whereis", [Atom(API_MODULE)])


async def test_store_nodes_are_found_by_dns(tmp_path: Path) -> None:
    async with open_cluster(tmp_path) as cluster:
        basename, _, host = cluster.names[0].partition("@")
        assert host == "127.0.0.1"
        # A name that is an address is its own A record; no server is asked.
        chosen = {"dns_query": host, "dns_node_basename": basename, "dns_polling_interval_ms": 100}
        async with gateway(epmd_port=cluster.epmd_port, **chosen) as system:
            await connected(system, cluster)


def test_nodes_are_found_as_the_settings_say() -> None:
    given = Settings(
        name="gater@127.0.0.1",
        connect=("a@127.0.0.1", "b@127.0.0.1"),
        dns_query="stores.local",
        dns_node_basename="store",
        dns_polling_interval_ms=200,
        gossip_port=4000,
        gossip_bind="127.0.0.2",
        gossip_multicast_addr="239.0.0.1",
        gossip_multicast_if="127.0.0.3",
        gossip_multicast_ttl=7,
        gossip_secret="secret",
    )
    listed, dns, gossip = system_module._strategies(given)
    assert isinstance(listed, StaticList)
    assert listed._peers == ("a@127.0.0.1", "b@127.0.0.1")
    assert isinstance(dns, DnsPoll)
    assert (dns._query, dns._node_basename, dns._interval_s) == ("stores.local", "store", 0.2)
    assert isinstance(gossip, Gossip)
    assert gossip._options == GossipOptions(4000, "127.0.0.2", "239.0.0.1", False, "127.0.0.3", 7, "secret")
    (only,) = system_module._strategies(Settings(name="gater@127.0.0.1"))
    assert isinstance(only, Gossip)
    assert only._options == GossipOptions(secret="dev_cluster_secret")
    assert system_module._strategies(Settings(name="gater@127.0.0.1", gossip=False)) == []


async def test_requests_are_taken_as_soon_as_start_has_returned(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data") as system, caller_node(system.settings.epmd_port) as caller:
        for ask in (server_door(caller, system), function_door(caller, system)):
            assert await ask("get_version", STORE, b"s") == (OK, -1)


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    for version in range(3):
        async with gateway(embedded=tmp_path / "data") as system, caller_node(system.settings.epmd_port) as caller:
            ask = server_door(caller, system)
            assert await ask("append_events", STORE, b"s", [event(version).to_term()]) == (OK, version)


async def test_the_api_server_is_started_again_when_it_has_crashed(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data") as system, caller_node(system.settings.epmd_port) as caller:
        ask = server_door(caller, system)
        for _ in range(3):
            server = system.node.whereis(API_MODULE)
            assert server is not None
            server.exit(Atom("crashed"))
            await wait_until(lambda: system.node.whereis(API_MODULE), "the next API server")
            assert await ask("get_version", STORE, b"s") == (OK, -1)


async def test_a_request_whose_server_crashes_is_answered_all_the_same(tmp_path: Path) -> None:
    async with (
        open_cluster(tmp_path) as cluster,
        gateway(cluster) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        held = Held()
        cluster.always(held, "get_streams")
        by_function = asyncio.create_task(function_door(caller, system)("get_streams", STORE))
        await held.arrived()
        server = system.node.whereis(API_MODULE)
        assert server is not None
        server.exit(Atom("crashed"))
        held.release()
        assert await by_function == (OK, [])
        assert system.service.under_way == 0


async def test_a_stopping_gateway_answers_what_is_under_way(tmp_path: Path) -> None:
    async with open_cluster(tmp_path) as cluster, caller_node(cluster.epmd_port) as caller:
        async with gateway(cluster, drain_timeout_ms=5_000) as system:
            await connected(system, cluster)
            held = Held()
            cluster.always(held, "get_streams")
            waiting = asyncio.create_task(server_door(caller, system)("get_streams", STORE))
            await held.arrived()
            asyncio.get_running_loop().call_later(0.05, held.release)
        assert await waiting == (OK, [])


async def test_other_gateways_learn_at_once_that_one_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "REFRESH_S", 1_000.0)
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(open_cluster(tmp_path))
        caller = await stack.enter_async_context(caller_node(cluster.epmd_port))
        two = await stack.enter_async_context(gateway(cluster))
        life = AsyncExitStack()
        connect = (*cluster.names, two.settings.name)
        one = await life.enter_async_context(gateway(cluster, connect=connect, drain_timeout_ms=20_000))
        name, peers = one.node.name, one.pubsub[MONITOR_SERVER]
        await connected(one, cluster)
        await wait_until(lambda: two.node.name in {pid.node for pid in peers.peers}, "PubSub")
        assert two.monitor.node_state(name) == "up"
        held = Held()
        cluster.always(held, "get_streams")
        waiting = asyncio.create_task(server_door(caller, one)("get_streams", STORE))
        await held.arrived()
        stopping = asyncio.create_task(life.aclose())
        await wait_until(lambda: two.monitor.node_state(name) == "draining", "the other one to know")
        assert not waiting.done()
        held.release()
        assert await waiting == (OK, [])
        await stopping
        await wait_until(lambda: two.monitor.node_state(name) == "down", "the end")


async def test_a_gateway_that_is_stopped_frees_its_name_and_its_store(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data") as first:
        name, port = first.settings.name, first.settings.epmd_port
    async with gateway(embedded=tmp_path / "data", name=name, epmd_port=port) as second:
        assert second.settings.name == name


async def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    async with gateway() as running:
        taken = running.settings
        system = System(settings(name=taken.name, epmd_port=taken.epmd_port, embedded=tmp_path / "data"))
        with pytest.raises(NodeError, match="name"):
            await system.start()
        # The directory can be used by another one.
        async with gateway(embedded=tmp_path / "data"):
            pass


async def test_a_store_directory_in_use_is_refused(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data"):
        with pytest.raises(StoreError, match="in use"):
            System(settings(embedded=tmp_path / "data"))


async def test_a_gateway_without_a_cookie_does_not_start() -> None:
    with pytest.raises(SettingsError, match="cookie"):
        System(settings(cookie=""))


async def test_a_gateway_reconnects_to_a_node_that_was_named(tmp_path: Path) -> None:
    async with (
        open_cluster(tmp_path, 2) as cluster,
        gateway(cluster) as system,
    ):
        await connected(system, cluster)
        for name in cluster.names:
            system.node.disconnect(name)
        assert system.node.nodes() == []
        await connected(system, cluster)


async def test_two_gateways_serve_one_cluster(tmp_path: Path) -> None:
    async with (
        open_cluster(tmp_path, 2, khepri=True) as cluster,
        gateway(cluster) as one,
        gateway(cluster) as two,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(one, cluster)
        await connected(two, cluster)
        asks = [server_door(caller, one), server_door(caller, two)]
        events = [[event(number).to_term()] for number in range(20)]
        replies = await asyncio.gather(
            *(asks[number % 2]("append_events", STORE, b"s", events[number]) for number in range(20))
        )
        assert sorted(version for _, version in replies) == list(range(20))


async def test_stores_of_nodes_without_khepri_are_watched_too(tmp_path: Path) -> None:
    other = Atom("other_store")
    async with (
        open_cluster(tmp_path, 2, stores=(STORE, other)) as cluster,
        gateway(cluster) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        await wait_until(lambda: len(system.monitor.stores()) == 2, "both stores")
        assert {each.store for each in system.monitor.stores()} == {STORE, other}
        assert all(each.has_quorum and each.members == () for each in system.monitor.stores())
        for name in cluster.names:
            assert set(system.monitor.node(Atom(name)).stores) == {STORE, other}
        ask = server_door(caller, system)
        assert await ask("append_events", STORE, b"s", [event(0).to_term()]) == (OK, 0)
        # A store whose workers have gone is not held any more.
        cluster.restart_workers = False
        first = cluster.nodes[0]
        for worker in [each for each in first.workers if each.store is other]:
            worker.process.exit(Atom("shutdown"))
        await wait_until(lambda: system.monitor.node(first.node.name).stores == (STORE,), "the store to be gone")


async def test_the_state_of_a_gateway_shows_its_gossip() -> None:
    port = free_port()
    async with gateway(
        gossip=True, gossip_port=port, gossip_multicast_addr="127.255.255.255", gossip_multicast_if="127.0.0.1"
    ) as system:

        def seen(what: str) -> Any:
            status: Any = system.service.cluster_status()
            return status[Atom("gossip")][Atom(what)]

        await wait_until(lambda: seen("heartbeats"), "its own packet")
        assert seen("open") is True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"noise", ("127.0.0.1", port))
        await wait_until(lambda: seen("ignored") == {Atom("malformed"): 1}, "the packet to be counted")
    async with gateway() as silent:
        status: Any = silent.service.cluster_status()
        assert status[Atom("gossip")] is None
