"""The gateway's own workers: processes that other nodes find in Swarm's registry and send requests to.

As ExESDB's (`gateway_worker.ex`), each is registered under `{:gateway_worker, store, node, n}`; an ExESDBGater written
in Elixir picks them like any other. All answer every request through the same `Service`; that there are several for a
store only makes the gateway as likely to be picked as a store node. The API server is registered as `{:gater_api, n}`
(`api.ex` of ExESDBGater).

There are workers for the embedded stores and for each store of the cluster while store nodes that hold it are in sight.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

import structlog

from gater.api import schema
from gater.api.router import GATEWAY_WORKER
from gater.api.server import API_MODULE, ApiServer
from gater.api.service import Service
from gater.erl.errors import ErlangError
from gater.erl.exports import Exports
from gater.erl.gen_server import start_server
from gater.erl.phash2 import phash2
from gater.erl.process import SHUTDOWN
from gater.erl.supervisor import ChildSpec, Supervisor
from gater.erl.terms import Atom, Pid, Term
from gater.swarm.messages import Track, UntrackName
from gater.swarm.registry import NO_META
from gater.swarm.swarm import Swarm

REGISTER_AGAIN_S: Final = 1.0
"""How long after a refused registration it is tried again: an earlier life of this node may still have the name."""

KEEP_S: Final = 5.0
"""How long the workers of a store stay after its last store node has gone: nodes that restart are back by then."""

UNREGISTER_TIMEOUT_S: Final = 1.0
"""How long to wait for names to be free when the gateway stops. Only a tracker that has not joined takes so long."""

MAX_RESTARTS: Final = 1_000
"""Restarts within five seconds after which something is so wrong that the gateway's supervisor has to know: one fault
may end every worker once."""

GATER_API: Final = Atom("gater_api")
_SWARM: Final = Atom("swarm")
_OK: Final = Atom("ok")

log = structlog.get_logger(__name__)


def export_names(exports: Exports, service: Service, swarm: Swarm) -> None:
    """Export the functions of `ExESDBGater.API` (`api.ex`) that find API servers and gateway workers.

    Workers are those of Swarm's registry and those that store nodes without a Swarm of ours have told of.

    A `random_` function raises `no_worker_available` where there is none; the original waits up to half a minute first.
    """

    def pids(*name: Term) -> list[Pid]:
        return [entry.pid for entry in swarm.registry.starting_with(*name)]

    def workers(store: Term = None) -> list[Pid]:
        named = pids(GATEWAY_WORKER) if store is None else pids(GATEWAY_WORKER, store)
        told = (worker.address for worker in service.router.workers(store))
        return list(dict.fromkeys((*named, *(address for address in told if type(address) is Pid))))

    def one_of(found: list[Pid]) -> Pid:
        if not found:
            raise ErlangError(Atom("no_worker_available"))
        return random.choice(found)

    functions: dict[str, Callable[..., Term]] = {
        "gater_api_name": lambda: (GATER_API, phash2(schema.uuid7().encode())),
        "get_gater_api_pids": lambda: pids(GATER_API),
        "random_gater_api": lambda: one_of(pids(GATER_API)),
        "gateway_worker_pids": lambda: workers(),
        "random_gateway_worker": lambda: one_of(workers()),
        "gateway_worker_pids_for_store": lambda store: workers(store),
        "random_gateway_worker_pid_for_store": lambda store: one_of(workers(store)),
    }
    for name, function in functions.items():
        exports.add(API_MODULE, name, function)


class RegisteredServer(ApiServer):
    """A server of gateway worker requests that has a name in Swarm for as long as it lives."""

    def __init__(self, service: Service, swarm: Swarm, name: Term) -> None:
        super().__init__(service)
        self.name = name
        self._swarm = swarm
        self._again: asyncio.TimerHandle | None = None
        self._wanted = True

    def init(self) -> None:
        self._register()

    def _register(self) -> None:
        self._again = None
        self._swarm.ask(Track(self.name, self.pid, NO_META), self._registered)

    def _registered(self, reply: Term) -> None:
        if not self.process.alive or not self._wanted:
            return
        if type(reply) is tuple and reply[0] is _OK:
            log.info("worker_registered", node=str(self.node.name), name=repr(self.name), pid=str(self.pid))
            return
        log.warning("worker_not_registered", node=str(self.node.name), name=repr(self.name), reason=repr(reply))
        self._register_later()

    def _register_later(self) -> None:
        if self._again is None and self._wanted:
            self._again = asyncio.get_running_loop().call_later(REGISTER_AGAIN_S, self._register)

    def handle_info(self, message: Term) -> None:
        # {swarm, die}: somebody else has got the name. This server can go on without, and tries to have it back.
        if type(message) is tuple and message and message[0] is _SWARM:
            self._register_later()

    def unregister(self) -> asyncio.Future[Term]:
        """Give the name up for good; done when it is free."""
        free: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self._wanted = False
        if self._again is not None:
            self._again.cancel()

        def answered(reply: Term) -> None:
            if not free.done():
                free.set_result(reply)

        entry = self._swarm.registry.get(self.name)
        if entry is not None and entry.pid != self.pid:
            answered(_OK)
        else:
            self._swarm.ask(UntrackName(self.name), answered)
        return free

    def terminate(self, reason: Term) -> None:
        self._wanted = False
        if self._again is not None:
            self._again.cancel()


class Workers:
    """The workers of one gateway: `start` (as a child of the gateway's supervisor), `update`, `unregister`."""

    def __init__(self, service: Service, swarm: Swarm, count: int) -> None:
        """`count` workers for each store; 0: none."""
        self._service = service
        self._swarm = swarm
        self._count = count
        self._supervisor: Supervisor | None = None
        self._servers: dict[str, RegisteredServer] = {}
        self._stores: set[Atom] = set()
        self._starting: asyncio.Task[None] | None = None
        self._going: dict[Atom, asyncio.TimerHandle] = {}
        self._stopping = False

    async def start(self) -> Supervisor:
        """Start the workers' supervisor, and workers for the stores known now."""
        self._stores.clear()
        self._supervisor = Supervisor([], max_restarts=MAX_RESTARTS)
        await start_server(self._service.node, self._supervisor)
        self.update()
        return self._supervisor

    async def start_api(self, registered_name: str) -> RegisteredServer:
        """Start the API server, with its local name and its name in Swarm."""
        number = phash2(self._service.node.name)
        server = RegisteredServer(self._service, self._swarm, (GATER_API, number))
        await start_server(self._service.node, server, name=registered_name)
        self._servers["api"] = server
        return server

    def update(self) -> None:
        """Stores may have come or gone: see that each has its workers."""
        if self._stopping or self._supervisor is None or not self._count:
            return
        served = set(self._service.stores)
        for store in served & self._going.keys():
            self._going.pop(store).cancel()
        loop = asyncio.get_running_loop()
        for store in self._stores - served - self._going.keys():
            self._going[store] = loop.call_later(KEEP_S, self._end, store)
        if served - self._stores and (self._starting is None or self._starting.done()):
            self._starting = asyncio.ensure_future(self._start_missing(served))

    async def _start_missing(self, served: set[Atom]) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        for store in sorted(served - self._stores, key=str):
            self._stores.add(store)
            for number in range(1, self._count + 1):
                if self._stopping or not supervisor.process.alive:
                    return
                await supervisor.start_child(self._child(store, number))
        self.update()

    def _child(self, store: Atom, number: int) -> ChildSpec:
        name = (GATEWAY_WORKER, store, self._service.node.name, number)
        child_id = f"{store}/{number}"

        async def start() -> RegisteredServer:
            server = RegisteredServer(self._service, self._swarm, name)
            await start_server(self._service.node, server)
            self._servers[child_id] = server
            return server

        # Ended on purpose it stays away; after a fault there is another one, which takes the name over.
        return ChildSpec(child_id, start, restart="transient")

    def _end(self, store: Atom) -> None:
        """Nobody holds this store any more."""
        del self._going[store]
        self._stores.discard(store)
        for number in range(1, self._count + 1):
            server = self._servers.pop(f"{store}/{number}", None)
            if server is not None:
                server.process.exit(SHUTDOWN)

    async def unregister(self) -> None:
        """Free all names, so that nobody sends anything new; the servers go on answering."""
        self._stopping = True
        for timer in self._going.values():
            timer.cancel()
        if self._starting is not None:
            self._starting.cancel()
        waiting = [server.unregister() for server in self._servers.values() if server.process.alive]
        if waiting:
            await asyncio.wait(waiting, timeout=UNREGISTER_TIMEOUT_S)
