"""Finding the workers: connected nodes are asked what they run and which workers they know.

A node whose applications include `ex_esdb` holds stores: its `Swarm.registered/0` lists the gateway workers of the
whole cluster. A client (`Gateway`) also takes nodes that run `gater`: it uses their API server, so that Python
programs need one gateway only. A gateway never does that: gateways do not forward to gateways.

Asked when a node connects, every `REFRESH_S` seconds, and at once when a request finds no worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from gater.api import guarded
from gater.api.router import parse_registry
from gater.api.server import API_MODULE
from gater.api.service import Service
from gater.erl.errors import ErlangException
from gater.erl.process import NOCONNECTION, NOPROC
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Term

REFRESH_S: Final = 5.0
"""How often registries are read again. A worker that died is noticed at once, by its monitor; only new ones wait."""

ASK_TIMEOUT_S: Final = 3.0
"""How long a node may take to say what it runs or knows."""

EX_ESDB: Final = Atom("ex_esdb")
GATER: Final = Atom("gater")

log = structlog.get_logger(__name__)


class Discovery:
    """Keeps a service's router informed.

    `through_gateways`: use the API servers of nodes that run gater, as a client does.
    """

    def __init__(self, service: Service, *, through_gateways: bool = False) -> None:
        self._service = service
        self._node = service.node
        self._through_gateways = through_gateways
        self._asking: dict[Atom, asyncio.Task[None]] = {}
        self._waiting: list[Callable[[], object]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stop_watching: Callable[[], None] | None = None
        service.registries = self

    def start(self) -> None:
        """Begin to watch the node's connections."""
        self._stop_watching = self._node.monitor_nodes(self._node_changed)
        self._periodically()

    def stop(self) -> None:
        """Ask nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stop_watching is not None:
            self._stop_watching()
        for asking in self._asking.values():
            asking.cancel()

    def refresh(self, on_done: Callable[[], object]) -> None:
        """Ask every node again; `on_done()` when all have answered or failed to."""
        self._waiting.append(on_done)
        for peer in self._node.nodes():
            self._ask(peer)
        if not self._asking:
            asyncio.get_running_loop().call_soon(self._settle)

    def _periodically(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._periodically)
        self.refresh(lambda: None)

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        if is_up:
            self._ask(peer)
            return
        self._service.guarded_forms.pop(peer, None)
        asking = self._asking.get(peer)
        if asking is not None:
            asking.cancel()
        for worker in self._service.router.node_down(peer):
            self._service.unwatch(worker, NOCONNECTION)

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
        waiting, self._waiting = self._waiting, []
        for on_done in waiting:
            on_done()

    async def _learn(self, peer: Atom) -> None:
        try:
            running = _names_of(await self._call(peer, "application", "which_applications"))
            if EX_ESDB in running:
                await self._learn_store_node(peer)
            elif GATER in running and self._through_gateways:
                self._service.watch(self._service.router.add((Atom(API_MODULE), peer), peer, None))
        except ErlangException as error:
            log.info("node_did_not_answer", peer=str(peer), reason=repr(error.reason)[:200])

    async def _learn_store_node(self, peer: Atom) -> None:
        service = self._service
        if peer not in service.guarded_forms and service.append_mode != "worker":
            service.guarded_forms[peer] = await guarded.prepare(self._node, peer, ASK_TIMEOUT_S)
        entries = parse_registry(await self._call(peer, "Elixir.Swarm", "registered"))
        added, dropped = service.router.registered(peer, entries)
        for worker in added:
            service.watch(worker)
        for worker in dropped:
            service.unwatch(worker, NOPROC)

    async def _call(self, peer: Atom, module: str, function: str) -> Term:
        return await erpc_call(self._node, peer, module, function, timeout_s=ASK_TIMEOUT_S)


def _names_of(applications: Term) -> set[Atom]:
    """The names in an answer of `application:which_applications/0`, `[{Name, Description, Version}]`."""
    if type(applications) is not list:
        return set()
    return {each[0] for each in applications if type(each) is tuple and each and type(each[0]) is Atom}
