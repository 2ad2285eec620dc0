"""The gateway's own workers in Swarm's registry, and store nodes' workers found there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from gateway_kit import STORE, gateway
from node_kit import COOKIE, unique_name, wait_until

from gater.api import schema
from gater.api.decoding import decoded
from gater.api.server import API_MODULE
from gater.erl import Node, NodeOptions, make_node
from gater.erl.gen_server import Caller, GenServer, call, start_server
from gater.erl.terms import Atom, Pid, Term
from gater.swarm.swarm import Swarm
from gater.swarm.tracker import TrackerOptions
from gater.system import System

OK = schema.OK
WORKER = Atom("gateway_worker")


class Member:
    """Another member of the Swarm cluster: a program that uses gateways or, with `ex_esdb`, a store node."""

    def __init__(self, epmd_port: int, *applications: str) -> None:
        self.node: Node = make_node(unique_name("member"), cookie=COOKIE, options=NodeOptions(epmd_port=epmd_port))
        for application in applications:
            self.node.add_application(application, "", "0")
        self.swarm = Swarm(self.node, TrackerOptions(sync_nodes_timeout_s=0.02))

    def workers(self, store: Atom = STORE) -> dict[Term, Pid]:
        """The workers of a store that this member knows."""
        return {entry.name: entry.pid for entry in self.swarm.registry.starting_with(WORKER, store)}

    def api_servers(self) -> list[Pid]:
        return [entry.pid for entry in self.swarm.registry.starting_with(Atom("gater_api"))]

    async def ask(self, pid: Pid, *request: Term) -> Term:
        return await call(self.node, pid, request)


@asynccontextmanager
async def member(of: System, *applications: str) -> AsyncIterator[Member]:
    """A member that is connected with a gateway."""
    started = Member(of.settings.epmd_port, *applications)
    async with started.node as node:
        await started.swarm.start()
        await node.connect(of.settings.name)
        yield started


class StoreWorker(GenServer):
    """A gateway worker of a store node; it knows one stream."""

    def handle_call(self, request: Term, caller: Caller) -> Term:
        return (OK, [b"from the store node"]) if request[0] is Atom("get_streams") else (OK, 0)


async def register_worker(member: Member, number: int = 1) -> StoreWorker:
    worker = StoreWorker()
    await start_server(member.node, worker)
    await member.swarm.register((WORKER, STORE, member.node.name, number), worker)
    return worker


def known_to(system: System) -> set[Term]:
    return {worker.address for worker in system.service.router.workers()}


async def get_streams(system: System) -> Term:
    reply: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
    system.service.call(schema.store_request("get_streams", STORE), reply.set_result)
    return decoded(await reply)


# The gateway's workers


async def test_a_gateway_registers_workers_for_its_stores_and_its_api_server(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data", pool_size=3) as system, member(system) as other:
        await wait_until(lambda: len(other.workers()) == 3, "the workers")
        assert set(other.workers()) == {(WORKER, STORE, system.node.name, number) for number in (1, 2, 3)}
        await wait_until(other.api_servers, "the API server")
        api = system.node.whereis(API_MODULE)
        assert api is not None
        assert other.api_servers() == [api.pid]


async def test_every_worker_answers_gateway_worker_requests(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data", pool_size=2) as system, member(system) as other:
        await wait_until(lambda: len(other.workers()) == 2 and other.api_servers(), "the workers")
        for pid in (*other.workers().values(), *other.api_servers()):
            assert await other.ask(pid, Atom("get_streams"), STORE) == (OK, [])
            assert (await other.ask(pid, Atom("nonsense"), STORE))[0] is schema.ERROR


async def test_a_pool_of_none_registers_no_worker(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data", pool_size=0) as system, member(system) as other:
        await wait_until(other.api_servers, "the API server")
        assert other.workers() == {}


async def test_a_worker_that_dies_comes_back_and_its_name_moves(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data", pool_size=2) as system, member(system) as other:
        await wait_until(lambda: len(other.workers()) == 2 and other.api_servers(), "the workers")
        before = other.workers()
        for pid in (*before.values(), *other.api_servers()):
            process = system.node.process(pid)
            assert process is not None
            process.exit(Atom("crashed"))
        await wait_until(
            lambda: set(other.workers()) == set(before) and not set(other.workers().values()) & set(before.values()),
            "the names to move",
        )
        for pid in other.workers().values():
            assert await other.ask(pid, Atom("get_streams"), STORE) == (OK, [])
        await wait_until(lambda: [system.node.whereis(API_MODULE)] != [None] and other.api_servers(), "the API server")


async def test_a_stopping_gateway_gives_its_names_up_before_it_refuses(tmp_path: Path) -> None:
    async with gateway(embedded=tmp_path / "data", pool_size=2) as system, member(system) as other:
        await wait_until(lambda: len(other.workers()) == 2 and other.api_servers(), "the workers")
        (first, *_) = other.workers().values()
        await system.workers.unregister()
        await wait_until(lambda: not other.workers() and not other.api_servers(), "the names to go")
        # Who has looked it up before is still answered.
        assert await other.ask(first, Atom("get_streams"), STORE) == (OK, [])
        assert await system.service.drain(1)
        assert await other.ask(first, Atom("get_streams"), STORE) == schema.error(schema.DRAINING)


async def test_stores_of_the_cluster_have_workers_while_a_store_node_is_in_sight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gater.api.worker.KEEP_S", 0.05)
    async with gateway(pool_size=2, append_mode="worker") as system, member(system) as other:
        async with member(system, "ex_esdb") as store_node:
            await register_worker(store_node)
            await wait_until(lambda: len(other.workers()) == 2, "the gateway's workers")
            for pid in other.workers().values():
                assert pid.node is system.node.name
                assert await other.ask(pid, Atom("get_streams"), STORE) == (OK, [b"from the store node"])
        await wait_until(lambda: not other.workers(), "the gateway's workers to go")


# Workers of store nodes


async def test_workers_of_store_nodes_are_known_as_soon_as_they_register_and_die() -> None:
    async with gateway(append_mode="worker") as system, member(system, "ex_esdb") as store_node:
        await wait_until(lambda: system.swarm.is_synced(store_node.node.name), "the registries to be in step")
        worker = await register_worker(store_node)
        async with asyncio.timeout(2):
            await wait_until(lambda: known_to(system) == {worker.pid}, "the worker")
        assert await get_streams(system) == (OK, [b"from the store node"])
        await store_node.swarm.unregister((WORKER, STORE, store_node.node.name, 1))
        async with asyncio.timeout(2):
            await wait_until(lambda: known_to(system) == set(), "the worker to go")


async def test_a_node_that_becomes_a_store_node_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.discovery.REFRESH_S", 0.05)
    async with gateway(append_mode="worker") as system, member(system) as store_node:
        worker = await register_worker(store_node)
        await wait_until(lambda: len(system.swarm.registry.starting_with(WORKER)) == 1, "the name")
        assert known_to(system) == set()
        store_node.node.add_application("ex_esdb", "", "0")
        await wait_until(lambda: known_to(system) == {worker.pid}, "the worker")


async def test_gateways_know_each_others_workers_and_do_not_use_them(tmp_path: Path) -> None:
    async with (
        gateway(embedded=tmp_path / "data", pool_size=2) as one,
        gateway(epmd_port=one.settings.epmd_port, connect=(one.settings.name,)) as two,
    ):
        await wait_until(lambda: len(two.swarm.registry.starting_with(WORKER, STORE)) == 2, "the names")
        assert await get_streams(two) == schema.error(schema.store_not_found(STORE))
        assert known_to(two) == set()
        # Nor does a store node's list of all workers lead there, or back to the gateway itself.
        async with member(one, "ex_esdb") as store_node:
            worker = await register_worker(store_node)
            await store_node.node.connect(two.settings.name)
            await wait_until(lambda: known_to(two) == {worker.pid}, "the store node's worker")
            await wait_until(lambda: len(store_node.workers()) > 3, "the gateways' workers on the store node")
            for _ in range(10):
                assert await get_streams(two) == (OK, [b"from the store node"])
            assert known_to(two) == {worker.pid}


async def test_a_lost_store_node_takes_its_workers_with_it_and_brings_them_back() -> None:
    async with gateway(append_mode="worker") as system, member(system, "ex_esdb") as store_node:
        worker = await register_worker(store_node)
        await wait_until(lambda: known_to(system) == {worker.pid}, "the worker")
        system.node.disconnect(store_node.node.name)
        await wait_until(lambda: known_to(system) == set(), "the worker to go")
        await wait_until(lambda: not store_node.node.nodes(), "both to have noticed")
        await store_node.node.connect(system.settings.name)
        await wait_until(lambda: known_to(system) == {worker.pid}, "the worker to be back")
