"""Finding the workers: what our own Swarm registry says and, where it cannot know, what store nodes answer when asked.

A node whose applications include `ex_esdb` holds stores. Its gateway workers are registered in Swarm under
`{:gateway_worker, store, node, n}`, so a member of the cluster (a gateway) knows them all, and at once when they come
or go. Until a store node has told us its registry (`Swarm.is_synced`), and in a client, which is no member, it is asked
for `Swarm.registered/0`, which lists the workers of the whole cluster.

Gateways register workers of the same kind for others to use. A gateway never forwards to a gateway: only workers on
store nodes count. A worker on a node that is not connected counts once the node is connected and has said what it is:
such nodes are named to the connector (source `registry`), which tries them as it tries all others.
A client (`Gateway`) also takes nodes that run `gater`: it uses their API server, so that Python programs need one
gateway only.

Nodes are asked when they connect, every `REFRESH_S` while there is something to learn, and when a request finds no
worker.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from gater.api import guarded
from gater.api.router import GATEWAY_WORKER, Registered, parse_registry
from gater.api.server import API_MODULE
from gater.api.service import Service
from gater.cluster.connector import Connector
from gater.erl.errors import ErlangException
from gater.erl.process import NOCONNECTION, NOPROC
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Term
from gater.swarm.peer import names_of
from gater.swarm.registry import Entry
from gater.swarm.swarm import Swarm

REFRESH_S: Final = 5.0
"""How often registries are read again. A worker that died is noticed at once, by its monitor; only new ones wait."""

ASK_TIMEOUT_S: Final = 3.0
"""How long a node may take to say what it runs or knows."""

REFRESH_WAIT_S: Final = 3.0
"""How long a request waits for nodes to be asked again; a node that hangs may take longer, question after question."""

MAX_WAITING: Final = 10_000
"""Requests that wait for that; further ones are answered `{:error, :overloaded}`."""

MAX_NAMED: Final = 64
"""Nodes not connected that are taken of one registry, by chance if it names more. A cluster has tens of nodes."""

SCAN_SHARE: Final = 0.1
"""Of the time, how much may go into reading our own registry while it keeps changing."""

EX_ESDB: Final = Atom("ex_esdb")
GATER: Final = Atom("gater")

log = structlog.get_logger(__name__)


class Discovery:
    """Keeps a service's router informed.

    `connector`: who connects to the nodes that registries name. `swarm`: our membership in the cluster, if we are a
    member. `through_gateways`: use the API servers of nodes that run gater, as a client does.
    """

    def __init__(
        self, service: Service, connector: Connector, *, swarm: Swarm | None = None, through_gateways: bool = False
    ) -> None:
        self._service = service
        self._connector = connector
        self._node = service.node
        self._swarm = swarm
        self._through_gateways = through_gateways
        self.on_change: Callable[[], object] = lambda: None
        """Called after workers have come or gone."""
        self._store_nodes: set[Atom] = set()
        self._told: dict[Atom, list[Registered]] = {}
        """What store nodes have answered that count as sources."""
        self._asked_at: dict[Atom, float] = {}
        self._asking: dict[Atom, asyncio.Task[None]] = {}
        self._waiting: list[Callable[[], object]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._scan: asyncio.Handle | None = None
        self._scan_took_s = 0.0
        self._no_longer: asyncio.TimerHandle | None = None
        self._end_watching: list[Callable[[], None]] = []
        service.registries = self

    def start(self) -> None:
        """Begin to watch the node's connections."""
        self._end_watching.append(self._node.monitor_nodes(self._node_changed))
        if self._swarm is not None:
            self._end_watching.append(self._swarm.watch_starting_with(GATEWAY_WORKER, self._registry_changed))
        self._periodically()

    def stop(self) -> None:
        """Ask nobody any more."""
        for handle in (self._timer, self._scan, self._no_longer):
            if handle is not None:
                handle.cancel()
        for end in self._end_watching:
            end()
        for asking in self._asking.values():
            asking.cancel()

    def refresh(self, on_done: Callable[[], object]) -> bool:
        """Ask every node again; `on_done()` when all have answered or failed to, or after `REFRESH_WAIT_S`.

        False, and nothing is called, if `MAX_WAITING` requests wait for that already.
        """
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(on_done)
        if self._no_longer is None:
            self._no_longer = asyncio.get_running_loop().call_later(REFRESH_WAIT_S, self._settle)
        for peer in self._node.nodes():
            self._ask(peer)
        if not self._asking:
            asyncio.get_running_loop().call_soon(self._settle)
        return True

    def _periodically(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._periodically)
        for peer in self._node.nodes():
            if not self._knows_by_itself(peer):
                self._ask(peer)
            elif self._told.get(peer):
                self._told[peer] = []
                self._take(peer, ())

    def _knows_by_itself(self, peer: Atom) -> bool:
        """Whether our own registry tells all about the workers of this node."""
        return (
            peer in self._store_nodes
            and (peer in self._service.guarded_forms or self._service.append_mode == "worker")
            and self._swarm is not None
            and self._swarm.is_synced(peer)
        )

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        if is_up:
            self._ask(peer)
            return
        self._store_nodes.discard(peer)
        self._told.pop(peer, None)
        self._asked_at.pop(peer, None)
        self._service.guarded_forms.pop(peer, None)
        self._service.fences.may_lag(peer)
        asking = self._asking.get(peer)
        if asking is not None:
            asking.cancel()
        for worker in self._service.router.node_down(peer):
            self._service.unwatch(worker, NOCONNECTION)
        self.on_change()

    # Our own registry

    def _registry_changed(self, name: Term, old: Entry | None, new: Entry | None) -> None:
        if self._scan is None:
            pause_s = self._scan_took_s / SCAN_SHARE
            self._scan = asyncio.get_running_loop().call_later(pause_s, self._read_registry)

    def _read_registry(self) -> None:
        self._scan = None
        if self._swarm is None:
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        entries = self._swarm.registry.starting_with(GATEWAY_WORKER)
        self._take(self._node.name, parse_registry([(entry.name, entry.pid) for entry in entries]))
        self._scan_took_s = loop.time() - began

    # What nodes say

    def _ask(self, peer: Atom) -> None:
        if peer not in self._asking:
            task = asyncio.ensure_future(self._learn(peer))
            self._asking[peer] = task
            task.add_done_callback(lambda ended: self._asked(peer))

    def _asked(self, peer: Atom) -> None:
        self._asking.pop(peer, None)
        if not self._asking:
            self._settle()

    def _settle(self) -> None:
        if self._no_longer is not None:
            self._no_longer.cancel()
            self._no_longer = None
        waiting, self._waiting = self._waiting, []
        for on_done in waiting:
            on_done()
        self.on_change()

    async def _learn(self, peer: Atom) -> None:
        try:
            if peer not in self._store_nodes:
                running = names_of(await self._call(peer, "application", "which_applications"))
                if EX_ESDB in running:
                    self._store_nodes.add(peer)
                    self._take_again()
                elif self._through_gateways:
                    self._take_gateway(peer, is_running=GATER in running)
            if peer in self._store_nodes:
                await self._learn_store_node(peer)
        except ErlangException as error:
            log.info("node_did_not_answer", peer=str(peer), reason=repr(error.reason)[:200])

    def _take_gateway(self, peer: Atom, *, is_running: bool) -> None:
        """A gateway that drains does not say any more that it runs `gater`."""
        api_server: Term = (Atom(API_MODULE), peer)
        if is_running:
            self._service.watch(self._service.router.add(api_server, peer, None))
        else:
            self._service.router.leaving(api_server)

    async def _learn_store_node(self, peer: Atom) -> None:
        service = self._service
        if peer not in service.guarded_forms and service.append_mode != "worker":
            service.guarded_forms[peer] = await guarded.prepare(self._node, peer, ASK_TIMEOUT_S)
        now = asyncio.get_running_loop().time()
        if self._knows_by_itself(peer) and now < self._asked_at.get(peer, float("-inf")) + REFRESH_S:
            return
        self._asked_at[peer] = now
        entries = parse_registry(await self._call(peer, "Elixir.Swarm", "registered"))
        self._told[peer] = entries
        self._take(peer, entries)
        await self._have_connected({entry.pid.node for entry in entries})

    async def _have_connected(self, nodes: set[Atom]) -> None:
        """Registries name workers on nodes that are not connected: once they are they say themselves what they are."""
        missing = [node.name for node in nodes.difference(self._node.nodes(), (self._node.name,))]
        named = random.sample(missing, min(MAX_NAMED, len(missing)))
        for node in named:
            self._connector.want(node, "registry", forever=False)
        await self._connector.tried(named, ASK_TIMEOUT_S)

    def _take_again(self) -> None:
        """A node has turned out to be a store node: its workers count from now on, whoever has told us of them."""
        self._read_registry()
        for source, entries in self._told.items():
            self._take(source, entries)

    def _take(self, source: Atom, entries: Iterable[Registered]) -> None:
        """`source` lists these workers now."""
        usable = [entry for entry in entries if entry.pid.node in self._store_nodes]
        added, dropped = self._service.router.registered(source, usable)
        for worker in added:
            self._service.watch(worker)
        for worker in dropped:
            self._service.unwatch(worker, NOPROC)
        if added or dropped:
            self.on_change()

    async def _call(self, peer: Atom, module: str, function: str) -> Term:
        return await erpc_call(self._node, peer, module, function, timeout_s=ASK_TIMEOUT_S)
