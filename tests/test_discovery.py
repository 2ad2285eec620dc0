"""How a gateway learns of workers: from whom, when, and from whom not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from gateway_kit import (
    STORE,
    Cluster,
    StoreNode,
    caller_node,
    connected,
    event,
    gateway,
    open_cluster,
    server_door,
)
from node_kit import COOKIE, unique_name, wait_until

from gater import Gateway
from gater.api import schema
from gater.api.subscriptions.client import _gateways
from gater.cluster.connector import Connector
from gater.erl import make_node
from gater.erl.errors import ErlangError
from gater.erl.terms import Atom, Pid, Term
from gater.system import System

NAME = STORE.name
OK = schema.OK


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with open_cluster(tmp_path, 2) as started:
        yield started


def workers_of(system: System) -> set[Term]:
    return {worker.address for worker in system.service.router.workers()}


def pids_of(cluster: Cluster) -> set[Pid]:
    return {worker.pid for worker in cluster.workers}


async def ask_for(system: System, op: str) -> Term:
    async with caller_node(system.settings.epmd_port) as caller:
        return await server_door(caller, system)(op, STORE)


async def test_one_node_tells_of_the_workers_of_all(cluster: Cluster) -> None:
    async with gateway(cluster, connect=(cluster.names[0],)) as system:
        await connected(system, cluster)
        assert workers_of(system) == pids_of(cluster)
        assert (await ask_for(system, "get_streams"))[0] is OK


async def test_a_worker_that_dies_is_forgotten_at_once_and_its_successor_found(cluster: Cluster) -> None:
    async with gateway(cluster) as system:
        await connected(system, cluster)
        died = cluster.workers[0]
        died.process.exit(Atom("crashed"))
        await wait_until(lambda: died not in cluster.workers and len(cluster.workers) == 4, "the successor")
        await wait_until(lambda: workers_of(system) == pids_of(cluster), "the successor to be known")


async def test_a_node_that_goes_down_takes_its_workers_with_it(cluster: Cluster) -> None:
    async with gateway(cluster) as system:
        await connected(system, cluster)
        lost = cluster.nodes.pop()
        await lost.stop()
        await wait_until(lambda: workers_of(system) == pids_of(cluster), "the workers of the node that is left")
        assert (await ask_for(system, "get_streams"))[0] is OK


async def test_a_node_that_comes_back_is_found_again(cluster: Cluster) -> None:
    async with gateway(cluster) as system:
        await connected(system, cluster)
        lost = cluster.nodes.pop()
        await lost.stop()
        again = StoreNode(cluster, lost.name)
        await again.node.start()
        again.start_worker()
        cluster.nodes.append(again)
        await connected(system, cluster)
        assert workers_of(system) == pids_of(cluster)


async def test_names_of_dead_processes_in_a_registry_do_no_harm(cluster: Cluster) -> None:
    gone = cluster.nodes[0].start_worker()
    stale = [gone.entry]
    gone.process.exit(Atom("shutdown"))
    cluster.registry = lambda: [*stale, *cluster.entries()]
    async with gateway(cluster) as system:
        await connected(system, cluster)
        for _ in range(20):
            assert (await ask_for_streams(system))[0] is OK


async def ask_for_streams(system: System) -> Term:
    reply: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
    system.service.call(schema.store_request("get_streams", STORE), reply.set_result)
    return await reply


def nothing_useful() -> Term:
    return Atom("undefined")


def raises() -> Term:
    raise ErlangError(Atom("badarg"))


def huge() -> Term:
    return [((Atom("streams_reader_worker"), STORE, b"stream-%d" % number), None) for number in range(5_000)]


@pytest.mark.parametrize("answer", [nothing_useful, raises, huge], ids=lambda answer: answer.__name__)
async def test_registries_without_workers_give_an_answer_all_the_same(
    cluster: Cluster, answer: Callable[[], Term]
) -> None:
    cluster.registry = answer
    async with gateway(cluster) as system:
        await wait_until(lambda: len(system.node.nodes()) == 2, "the connections")
        assert await ask_for(system, "get_streams") == schema.error(schema.store_not_found(STORE))
        # The next time it is asked the registry is well.
        cluster.registry = None
        assert (await ask_for(system, "get_streams"))[0] is OK


async def test_no_more_requests_wait_for_registries_than_the_limit_allows(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.discovery.MAX_WAITING", 3)
    cluster.registry_open.clear()
    async with gateway(cluster) as system:
        await wait_until(lambda: len(system.node.nodes()) == 2, "the connections")
        service, replies = system.service, list[Term]()
        delete = (Atom("delete_snapshot"), STORE, b"source", b"s", 0)
        for _ in range(5):
            service.cast(delete, lambda refused: replies.append(refused and refused.reply))
        append = (schema.APPEND_EVENTS, STORE, b"s", schema.ANY, [event(0).to_term()])
        service.call(append, replies.append)
        service.call(schema.store_request("get_streams", STORE), replies.append)
        subscribe = (Atom("list_parked"), STORE, b"name")
        service.call(subscribe, replies.append)
        overloaded = schema.error(schema.OVERLOADED)
        await wait_until(lambda: len(replies) == 5, "those that cannot wait")
        assert replies == [overloaded] * 5
        assert (service.under_way, len(service._unsettled)) == (0, 0)
        cluster.registry_open.set()
        await wait_until(lambda: len(replies) == 8, "those that wait")
        assert replies[5:] == [None] * 3


async def test_workers_that_only_one_node_knows_of_are_used(cluster: Cluster) -> None:
    known = cluster.nodes[1].workers[0]
    cluster.registry = lambda: [known.entry]
    async with gateway(cluster, connect=(cluster.names[0],)) as system:
        await wait_until(lambda: workers_of(system) == {known.pid}, "the worker")
        assert (await ask_for(system, "get_streams"))[0] is OK
        # The gateway was told of that node by the other one only.
        assert {str(peer) for peer in system.node.nodes()} >= {cluster.names[1]}


def by_registry(connector: Connector) -> dict[str, int]:
    """The nodes that registries have named, and how many attempts at each have failed."""
    return {each.peer: each.attempts for each in connector.status() if each.sources == ("registry",)}


async def test_nodes_that_registries_name_are_tried_as_the_plan_says(cluster: Cluster) -> None:
    away = unique_name("store")
    worker = cluster.workers[0].pid
    cluster.registry = lambda: [
        *cluster.entries(),
        ((Atom("gateway_worker"), STORE, Atom(away), 1), Pid(Atom(away), worker.id, worker.serial, 1)),
    ]
    async with gateway(cluster) as system:
        await connected(system, cluster)
        await wait_until(lambda: by_registry(system.connector).get(away, 0) > 1, "attempts with growing pauses")
        # It is not left alone for half a minute.
        again = StoreNode(cluster, away)
        await again.node.start()
        again.start_worker()
        cluster.nodes.append(again)
        cluster.registry = None
        await connected(system, cluster)


async def test_no_more_nodes_are_taken_of_a_registry_than_the_limit_allows(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.discovery.MAX_NAMED", 1)
    away = [Atom(unique_name("store")) for _ in range(50)]
    named = [((Atom("gateway_worker"), STORE, node, 1), Pid(node, 1, 0, 1)) for node in away]
    cluster.registry = lambda: [*cluster.entries(), *named]
    async with gateway(cluster) as system:
        await connected(system, cluster)
        assert 1 <= len(by_registry(system.connector)) < 10, "one of each answer"


async def test_a_node_that_runs_nothing_of_interest_is_not_asked_for_workers(cluster: Cluster) -> None:
    plain = make_node(unique_name("plain"), cookie=COOKIE, options=cluster.options)
    asked: list[bool] = []
    plain.exports.add("Elixir.Swarm", "registered", lambda: asked.append(True))
    async with plain, gateway(cluster, connect=(str(plain.name), *cluster.names)) as system:
        await connected(system, cluster)
        assert plain.name in system.node.nodes()
        assert asked == []


# Gateways and gateways


async def test_a_gateway_never_uses_another_gateway(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data") as one:
        port = one.settings.epmd_port
        async with gateway(epmd_port=port, connect=(one.settings.name,)) as two:
            await wait_until(lambda: two.node.nodes(), "the connection")
            assert await ask_for(two, "get_streams") == schema.error(schema.store_not_found(STORE))
            assert workers_of(two) == set()
            assert (await ask_for(one, "get_streams"))[0] is OK


async def test_a_client_uses_the_gateways_it_is_connected_to(tmp_path: Path) -> None:
    async with (
        open_cluster(tmp_path) as cluster,
        gateway(cluster) as one,
        gateway(cluster) as two,
    ):
        for system in (one, two):
            await connected(system, cluster)
        names = (one.settings.name, two.settings.name)
        async with Gateway.connect(*names, cookie=COOKIE, options=cluster.options) as client:
            await wait_until(lambda: len(client.node.nodes()) == 2, "both connections")
            assert await client.append_events(NAME, "s", event(0)) == 0
            await two.node.stop()
            assert await client.append_events(NAME, "s", event(1), expected_version=0) == 1
            assert await client.get_version(NAME, "s") == 1


async def test_a_client_sees_which_of_its_gateways_drain(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.discovery.REFRESH_S", 0.02)
    async with gateway(cluster) as one, gateway(cluster) as two:
        await connected(two, cluster)
        names = (one.settings.name, two.settings.name)
        async with Gateway.connect(*names, cookie=COOKIE, options=cluster.options) as client:
            router = client._service.router
            await wait_until(lambda: len(router) == 2, "both gateways")
            one.node.remove_application("gater")
            await wait_until(lambda: any(worker.leaving for worker in router), "the client to know")
            for _ in range(20):
                chosen = router.choose(STORE, b"s", 0.0)
                assert chosen is not None
                assert chosen.node is two.node.name
            assert [worker.node for worker in _gateways(client._service)] == [two.node.name, one.node.name]


async def test_a_client_of_store_nodes_and_gateways_asks_the_store_nodes(cluster: Cluster) -> None:
    async with gateway(cluster) as system:
        await connected(system, cluster)
        names = (system.settings.name, *cluster.names)
        async with Gateway.connect(*names, cookie=COOKIE, options=cluster.options) as client:
            await wait_until(lambda: len(client.node.nodes()) == 3, "the connections")
            await client.get_streams(NAME)
            await system.service.drain(1)
            # The gateway refuses everything now.
            for _ in range(20):
                await client.get_streams(NAME)


async def test_a_client_comes_back_to_its_gateway(cluster: Cluster) -> None:
    async with AsyncExitStack() as first_life:
        system = await first_life.enter_async_context(gateway(cluster))
        await connected(system, cluster)
        name = system.settings.name
        async with Gateway.connect(name, cookie=COOKIE, options=cluster.options) as client:
            assert await client.get_streams(NAME) == []
            await first_life.aclose()
            await wait_until(lambda: not client.node.nodes(), "the gateway to be gone")
            async with gateway(cluster, name=name) as again:
                await connected(again, cluster)
                await wait_until(client.node.nodes, "the connection")
                assert await client.get_streams(NAME) == []


async def test_a_client_finds_store_nodes_that_it_was_not_told_of(cluster: Cluster) -> None:
    async with Gateway.connect(cluster.names[0], cookie=COOKIE, options=cluster.options) as client:
        await wait_until(lambda: len(client.node.nodes()) == 2, "the node that the registry names")
