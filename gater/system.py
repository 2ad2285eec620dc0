"""The running gateway: what is started, in which order, and how it ends.

Start: embedded stores -> service, discovery and exported functions -> node (listens, registers with EPMD) -> Swarm's
tracker, API server and workers, supervised -> connections to the nodes that were named. From the line `NAME is up` on,
requests are taken.
Stop (SIGTERM, SIGINT, `gater stop`, or `init:stop()` by rpc, as releases do it): other gateways are told, names are
taken out of Swarm's registry, new requests are refused with `:draining`, those under way are answered, then everything
is closed in reverse order.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import signal
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, Final

import structlog

from gater.api.cluster_reports import ClusterReports
from gater.api.discovery import Discovery
from gater.api.server import API_MODULE, export_api
from gater.api.service import Service
from gater.api.subscriptions.door import Subscriptions
from gater.api.worker import RegisteredServer, Workers, export_names
from gater.cluster.connector import Connector
from gater.cluster.gossip import Gossip, GossipOptions
from gater.cluster.introductions import GATER, Introductions
from gater.cluster.monitor import Change, ClusterMonitor, StoreChanged
from gater.cluster.strategy import DnsPoll, StaticList, Strategy
from gater.erl import NodeOptions, etf, make_node
from gater.erl.errors import CallTimeout
from gater.erl.gen_server import start_server
from gater.erl.memory import keep_freed_memory
from gater.erl.rpc import erpc_call
from gater.erl.supervisor import ChildSpec, Supervisor
from gater.erl.terms import Atom, Term
from gater.pubsub.adapter import PubSub
from gater.settings import Settings
from gater.store import EmbeddedStores, StoreOptions
from gater.swarm.swarm import Swarm
from gater.swarm.tracker import TrackerOptions

SYNC_NODES_TIMEOUT_S: Final = 1.0
"""How long the tracker waits for nodes to connect before it joins the cluster (Swarm's `sync_nodes_timeout`). Swarm's
own 5 s are there because a tracker of the original syncs only once; ours syncs with every node that comes."""

COMMAND_TIMEOUT_S: Final = 10.0
"""How long a gateway may take to answer a command, and to close everything once it has drained."""

log = structlog.get_logger(__name__)


class System:
    """One gateway, built from its settings. `start`, then `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.told_to_stop = asyncio.Event()
        """Set by a signal or by command; whoever runs the system then calls `stop`."""
        self.node = make_node(
            settings.name,
            cookie=settings.require_cookie(),
            options=NodeOptions(
                listen_hosts=settings.listen,
                listen_port=settings.listen_port,
                epmd_port=settings.epmd_port,
                epmd_listen_hosts=settings.epmd_listen,
                builtin_epmd=settings.epmd_builtin,
                ticktime_s=settings.net_ticktime_s,
                busy_wait_s=settings.busy_wait_us / 1e6,
                max_peers=settings.max_connections,
            ),
        )
        self.stores = _open_stores(settings)
        self.service = Service(
            self.node,
            embedded=self.stores,
            max_requests=settings.max_requests,
            timeout_s=settings.call_timeout_ms / 1000,
            append_mode=settings.append_mode,
        )
        self.swarm = Swarm(self.node, TrackerOptions(sync_nodes_timeout_s=SYNC_NODES_TIMEOUT_S))
        self.workers = Workers(self.service, self.swarm, settings.pool_size)
        self.connector = Connector(self.node, retry_interval_s=settings.connection_retry_interval_ms / 1000)
        self.discovery = Discovery(self.service, self.connector, swarm=self.swarm)
        self.discovery.on_change = self._workers_changed
        self.strategies = _strategies(settings)
        self.pubsub = PubSub(self.node, secret_key_base=settings.secret_key_base, events_server=settings.pub_sub)
        self.subscriptions = Subscriptions(self.service, self.swarm)
        self.monitor = ClusterMonitor(
            self.node, self.connector, health_interval_s=settings.health_check_interval_ms / 1000
        )
        self.strategies.append(Introductions(self.node, self._store_nodes))
        self.service.quorum = self._no_quorum
        self.service.doubt = self.monitor.doubt
        self.monitor.watch(self._monitor_saw)
        self._supervisor = Supervisor(
            [
                ChildSpec("swarm", self.swarm.start),
                ChildSpec("pubsub", self.pubsub.start),
                ChildSpec("api", self._start_api),
                ChildSpec("workers", self.workers.start),
            ]
        )

    async def start(self) -> None:
        """Start everything. Raises `StartupError` or `NodeError`; what had been started is stopped again."""
        if self.stores is not None:
            self.stores.start(asyncio.get_running_loop())
        export_api(self.node.exports, self.service)
        export_names(self.node.exports, self.service, self.swarm)
        for module in ("init", "Elixir.System"):
            self.node.exports.add(module, "stop", self._told_to_stop)
        self.node.add_application(GATER.name, "Gateway to ExESDB", version("gater"))
        try:
            await self.node.start()
            await start_server(self.node, self._supervisor)
        except BaseException:
            await self._close()
            raise
        self.node.busy_wait.answer_is_due = lambda: self.service.under_way > 0
        # Gateways tell each other of appends by Phoenix.PubSub, and hear the stores' emitters.
        self.subscriptions.start(self.pubsub, self.settings.pub_sub)
        self.discovery.start()
        self.connector.start()
        self.reports = ClusterReports(
            self.node,
            self.monitor,
            self.pubsub,
            secret_key_base=self.settings.secret_key_base,
            interval_s=self.settings.health_check_interval_ms / 1000,
            gossip=next((each for each in self.strategies if isinstance(each, Gossip)), None),
        )
        self.reports.start()
        self.service.cluster_status = self.reports.status
        self.monitor.start()
        for strategy in self.strategies:
            await strategy.start(self.connector)
        log.info(
            "gateway_up",
            node=self.settings.name,
            stores=self._store_names(),
            port=self.node.listen_port,
            codec="compiled" if etf.COMPILED else "pure",
        )

    async def _start_api(self) -> RegisteredServer:
        return await self.workers.start_api(API_MODULE)

    def _told_to_stop(self, _status: Term = 0) -> Term:
        """`init:stop/0,1`, `System.stop/0,1`: drain and end. Answers at once."""
        log.info("told_to_stop", node=self.settings.name)
        self.told_to_stop.set()
        return Atom("ok")

    def _workers_changed(self) -> None:
        self.workers.update()
        # A node without Khepri does not say itself which stores it holds.
        for node in self.node.nodes():
            self.monitor.holds(node, self.service.router.stores_on(node))

    def _monitor_saw(self, change: Change) -> None:
        if isinstance(change, StoreChanged):
            status = self.monitor.store(change.store)
            assert status is not None
            self.service.members(change.store, set(status.members).difference(status.outsiders))
        elif "suspect" in (change.before, change.after):
            self.service.suspect(change.node, change.after == "suspect")
            if change.after == "suspect":
                self.subscriptions.suspect(change.node)

    def _no_quorum(self, store: Atom) -> Term | None:
        """The split-brain guard: what `{:error, {:no_quorum, details}}` says, or None while all is well."""
        status = self.monitor.store(store)
        if status is None or status.problem is None:
            return None
        return {
            Atom("problem"): Atom(status.problem),
            Atom("members"): list(status.members),
            Atom("reachable"): list(status.reachable),
        }

    def _store_nodes(self) -> list[Atom]:
        return [status.node for status in self.monitor.nodes() if status.is_ex_esdb and status.state == "up"]

    def _store_names(self) -> list[str]:
        return [str(store) for store in self.stores.store_ids] if self.stores is not None else []

    async def stop(self) -> None:
        """Drain, then close everything."""
        self.node.remove_application(GATER.name)
        self.reports.draining()
        await self.workers.unregister()
        await self.subscriptions.stop()
        limit_s = self.settings.drain_timeout_ms / 1000
        if not await self.service.drain(limit_s):
            log.warning("drain_incomplete", requests=self.service.under_way, after_s=limit_s)
        for strategy in self.strategies:
            await strategy.stop()
        self.reports.stop()
        self.monitor.stop()
        self.connector.stop()
        self.discovery.stop()
        await self._close()
        log.info("gateway_stopped", node=self.settings.name)

    async def _close(self) -> None:
        await self.node.stop()
        if self.stores is not None:
            await self.stores.close()


def _strategies(settings: Settings) -> list[Strategy]:
    strategies: list[Strategy] = []
    if settings.connect:
        strategies.append(StaticList(settings.connect))
    if settings.dns_query:
        interval_s = settings.dns_polling_interval_ms / 1000
        strategies.append(DnsPoll(settings.dns_query, settings.dns_node_basename, interval_s))
    if settings.gossip:
        options = GossipOptions(
            port=settings.gossip_port,
            bind=settings.gossip_bind,
            address=settings.gossip_multicast_addr,
            multicast_if=settings.gossip_multicast_if,
            ttl=settings.gossip_multicast_ttl,
            secret=settings.gossip_secret,
        )
        strategies.append(Gossip(settings.name, options))
    return strategies


def _open_stores(settings: Settings) -> EmbeddedStores | None:
    if settings.embedded is None:
        return None
    options = [StoreOptions(store) for store in settings.stores]
    return EmbeddedStores(settings.embedded, options, node=Atom(settings.name))


def run(settings: Settings) -> int:
    """Run a gateway until SIGTERM or SIGINT; the exit code of the process."""
    keep_freed_memory()
    _spare_full_collections()
    return _event_loop_runner()(_serve(settings))


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    system = System(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, system.told_to_stop.set)
    await system.start()
    print(f"{settings.name} is up", flush=True)
    await system.told_to_stop.wait()
    await system.stop()
    return 0


async def stop_running(settings: Settings) -> None:
    """Tell the gateway called `settings.name` to drain and end, and wait until it has.

    Raises `NodeError` or `NotConnected` if it cannot be reached, `CallTimeout` if it does not end in time.
    """
    name = Atom(settings.name)
    ended = asyncio.Event()
    ours = f"stop_{secrets.token_hex(6)}@{settings.name.partition('@')[2]}"
    options = NodeOptions(listen_hosts=settings.listen, epmd_port=settings.epmd_port, builtin_epmd=False)
    async with make_node(ours, cookie=settings.require_cookie(), options=options) as node:
        await node.connect(name)
        node.monitor_nodes(lambda peer, is_up, _: ended.set() if peer is name and not is_up else None)
        await erpc_call(node, name, "init", "stop", timeout_s=COMMAND_TIMEOUT_S)
        wait_s = settings.drain_timeout_ms / 1000 + COMMAND_TIMEOUT_S
        try:
            async with asyncio.timeout(wait_s):
                await ended.wait()
        except TimeoutError:
            raise CallTimeout(
                Atom("timeout"), f"{name} has been told to stop, but runs still after {wait_s:g} s"
            ) from None


def _spare_full_collections() -> None:
    """Full garbage collections look at every name and store index there is and stop everything meanwhile: a third of a
    second for 100,000 names. Nearly all garbage here is freed by reference counts or young; look at the young often,
    and at few at a time: at 50,000 objects for 10 ms."""
    gc.freeze()
    gc.set_threshold(2_000, 5, 50_000)


def _event_loop_runner() -> Callable[[Coroutine[Any, Any, int]], int]:
    """uvloop where it is installed: its sockets cost half as much. Plain asyncio otherwise."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return lambda main: asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main)
