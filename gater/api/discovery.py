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

from gater.api.router import Registered, parse_registry
from gater.api.server import API_MODULE
from gater.api.service import Service
from gater.erl.errors import ErlangException
from gater.erl.process import NOCONNECTION
from gater.erl.rpc import PendingRpc
from gater.erl.terms import Atom, Term

REFRESH_S: Final = 5.0
"""How often registries are read again. A worker that died is noticed at once, by its monitor; only new ones wait."""

ASK_TIMEOUT_S: Final = 3.0
"""How long a node may take to say what it runs or knows."""

EX_ESDB: Final = Atom("ex_esdb")
GATER: Final = Atom("gater")
NO_WORKERS: Final = Atom("noproc")

log = structlog.get_logger(__name__)


class Discovery:
    """Keeps a service's router informed.

    `through_gateways`: use the API servers of nodes that run gater, as a client does.
    """

    def __init__(self, service: Service, *, through_gateways: bool = False) -> None:
        self._service = service
        self._node = service.node
        self._through_gateways = through_gateways
        self._kinds: dict[Atom, set[Atom]] = {}
        """Connected nodes and the applications they run, as far as they have answered."""
        self._asking: dict[Atom, PendingRpc] = {}
        self._waiting: list[Callable[[], object]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stop_watching: Callable[[], None] | None = None
        service.registries = self

    def start(self) -> None:
        """Begin to watch the node's connections."""
        self._stop_watching = self._node.monitor_nodes(self._node_changed)
        for peer in self._node.nodes():
            self._ask_applications(peer)
        self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._periodically)

    def stop(self) -> None:
        """Ask nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stop_watching is not None:
            self._stop_watching()
        for asking in self._asking.values():
            asking.cancel()
        self._asking.clear()
        self._settle()

    def refresh(self, on_done: Callable[[], object]) -> None:
        """Ask every node again; `on_done()` when all have answered or failed to."""
        self._waiting.append(on_done)
        for peer in self._node.nodes():
            if peer not in self._asking:
                self._ask_applications(peer)
        if not self._asking:
            asyncio.get_running_loop().call_soon(self._settle)

    def _periodically(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._periodically)
        self.refresh(lambda: None)

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        if is_up:
            self._ask_applications(peer)
            return
        self._kinds.pop(peer, None)
        asking = self._asking.pop(peer, None)
        if asking is not None:
            asking.cancel()
        for worker in self._service.router.node_down(peer):
            self._service.unwatch(worker, NOCONNECTION)
        self._settle_if_done()

    def _ask(self, peer: Atom, module: str, function: str, on_answer: Callable[[Atom, Term], None]) -> None:
        def answered(result: Term, error: ErlangException | None) -> None:
            self._asking.pop(peer, None)
            if error is None:
                on_answer(peer, result)
            else:
                log.info("node_did_not_answer", peer=str(peer), asked=f"{module}:{function}", reason=repr(error.reason))
            self._settle_if_done()

        self._asking[peer] = PendingRpc(self._node, peer, (Atom(module), Atom(function), []), answered, ASK_TIMEOUT_S)

    def _ask_applications(self, peer: Atom) -> None:
        self._ask(peer, "application", "which_applications", self._applications_known)

    def _applications_known(self, peer: Atom, answer: Term) -> None:
        running: set[Atom] = set()
        if type(answer) is list:
            running = {each[0] for each in answer if type(each) is tuple and each and type(each[0]) is Atom}
        self._kinds[peer] = running
        if EX_ESDB in running:
            self._ask(peer, "Elixir.Swarm", "registered", self._registry_known)
        elif GATER in running and self._through_gateways:
            self._service.watch(self._service.router.add((Atom(API_MODULE), peer), peer, None))

    def _registry_known(self, peer: Atom, answer: Term) -> None:
        entries: list[Registered] = parse_registry(answer)
        added, dropped = self._service.router.registered(peer, entries)
        for worker in added:
            self._service.watch(worker)
        for worker in dropped:
            self._service.unwatch(worker, NO_WORKERS)

    def _settle_if_done(self) -> None:
        if not self._asking:
            self._settle()

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for on_done in waiting:
            on_done()
