"""The cluster monitor on a stand-in cluster: leaders, members, nodes that freeze, die and come back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from erlang_interop_tests.beam import Beams, unique_name, wait_until
from erlang_interop_tests.standin import DEFAULT_STORE, StandInCluster, standin_cluster
from gater.cluster import monitor
from gater.cluster.connector import Connector
from gater.cluster.monitor import ClusterMonitor, StoreStatus
from gater.cluster.strategy import StaticList
from gater.erl import make_node
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom

STORE = Atom(DEFAULT_STORE)
WITHIN_S = 20.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask more often than in real life."""
    monkeypatch.setattr(monitor, "REFRESH_S", 0.3)
    monkeypatch.setattr(monitor, "ASK_TIMEOUT_S", 1.0)


@contextlib.asynccontextmanager
async def watching(beam: Beams, peers: list[str]) -> AsyncIterator[tuple[Node, ClusterMonitor]]:
    options = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False)
    async with make_node(unique_name("gater"), cookie=beam.cookie, options=options) as node:
        connector = Connector(node, retry_interval_s=0.5)
        watcher = ClusterMonitor(node, connector)
        connector.start()
        watcher.start()
        await StaticList(peers).start(connector)
        try:
            yield node, watcher
        finally:
            watcher.stop()
            connector.stop()


async def store_becomes(watcher: ClusterMonitor, what: str, condition: Callable[[StoreStatus], object]) -> StoreStatus:
    status = await wait_until(
        lambda: (found := watcher.store(STORE)) is not None and condition(found) and found, WITHIN_S, what=what
    )
    assert isinstance(status, StoreStatus)
    return status


async def test_one_name_is_enough_to_find_the_whole_cluster_and_its_leader(
    beam: Beams, standin_of_three: StandInCluster
) -> None:
    cluster = standin_of_three
    async with watching(beam, cluster.names[:1]) as (_, watcher):
        status = await store_becomes(watcher, "three members", lambda each: len(each.reachable) == 3 and each.leader)
        leader = await cluster.leader()
        assert leader is not None
        assert str(status.leader) == cluster.names[leader]
        assert [str(each) for each in status.members] == sorted(cluster.names)
        assert status.problem is None
        for node in watcher.nodes():
            assert node.state == "up"
            assert node.is_ex_esdb
            assert node.stores == (STORE,)
            assert node.answer_s is not None
            assert node.answer_s < 1.0
        assert watcher.health().status == "healthy"


async def test_a_frozen_node_is_suspect_a_dead_one_down_and_both_come_back(
    beam: Beams, standin_of_three: StandInCluster
) -> None:
    cluster = standin_of_three
    async with watching(beam, cluster.names) as (_, watcher):
        await store_becomes(watcher, "three members", lambda each: len(each.reachable) == 3 and each.leader)
        leader = await cluster.leader()
        assert leader is not None
        frozen, dead = [index for index in range(3) if index != leader]
        frozen_name = Atom(cluster.names[frozen])
        cluster.members[frozen].freeze()
        await wait_until(lambda: watcher.node_state(frozen_name) == "suspect", WITHIN_S, what="suspect")
        assert (await store_becomes(watcher, "two", lambda each: len(each.reachable) == 2)).has_quorum
        await cluster.kill(dead)
        status = await store_becomes(watcher, "minority", lambda each: not each.has_quorum)
        assert status.problem == "minority"
        assert [str(each) for each in status.reachable] == [cluster.names[leader]]
        assert watcher.health().status == "unhealthy"
        cluster.members[frozen].thaw()
        await store_becomes(watcher, "two again", lambda each: each.has_quorum)
        await cluster.restart(dead)
        await store_becomes(watcher, "all again", lambda each: len(each.reachable) == 3 and each.leader)
        assert watcher.health().status == "healthy"


async def test_a_new_leader_is_noticed(beam: Beams, standin_of_three: StandInCluster) -> None:
    cluster = standin_of_three
    async with watching(beam, cluster.names) as (_, watcher):
        first = await store_becomes(watcher, "a leader", lambda each: len(each.reachable) == 3 and each.leader)
        await cluster.kill(cluster.names.index(str(first.leader)))
        second = await store_becomes(watcher, "another", lambda each: each.leader not in (None, first.leader))
        assert second.has_quorum


async def test_a_store_without_khepri_is_nothing_to_worry_about(beam: Beams) -> None:
    async with standin_cluster(beam, khepri=False) as cluster, watching(beam, cluster.names) as (_, watcher):
        peer = Atom(cluster.names[0])
        await wait_until(lambda: any(each.is_ex_esdb for each in watcher.nodes()), WITHIN_S, what="ExESDB seen")
        watcher.holds(peer, [STORE])
        status = await store_becomes(watcher, "known", lambda each: True)
        assert status.has_quorum
        assert watcher.node_state(peer) == "up"
