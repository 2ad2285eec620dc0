"""What the monitor sees, told to everybody who listens by Phoenix.PubSub, in the messages of the original.

* topic `cluster:topology`: `{:cluster_state_changed, map}` whenever a node has come or gone (`cluster_monitor.ex` of
  ExESDBGater 0.8; not signed, as there);
* topic `cluster:health`, server `ex_esdb_health`: `{:node_health_updated, %NodeHealth{}}` of the ExESDB nodes and
  `{:cluster_health_updated, %ClusterHealth{}}` when they change and every health check interval, signed if there is a
  key (`messages/health_messages.ex`).

* topic `gater:draining`, of gater's own: `{:gater_draining, node}` of a gateway that is going to stop, for the monitors
  of the others.

A node counts if it is visible, as in the original, or runs ExESDB or gater; other hidden nodes are shells and clients
that come for a moment. It is told of once it has said what it runs, or has not answered the question.

A signature holds for the bytes that `term_to_binary` gives on the node that checks it, and those differ between
releases and, since OTP 26, between nodes. So each node is asked for them first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from gater.api.schema import datetime_to_term
from gater.cluster.gossip import Gossip, GossipStatus
from gater.cluster.introductions import GATER
from gater.cluster.monitor import (
    EX_ESDB,
    Change,
    ClusterHealth,
    ClusterMonitor,
    NodeChanged,
    NodeState,
    NodeStatus,
    StoreStatus,
)
from gater.erl.errors import ErlangException
from gater.erl.node import Node
from gater.erl.rpc import PendingRpc
from gater.erl.terms import Atom, Term
from gater.pubsub.adapter import PubSub
from gater.pubsub.messages import (
    DRAINING_TOPIC,
    HEALTH_SERVER,
    MONITOR_SERVER,
    SYSTEM_SERVER,
    Health,
    NodeEvent,
    cluster_health_updated,
    cluster_state_changed,
    cluster_topic,
    draining_message,
    node_health_updated,
    parse_draining,
)
from gater.pubsub.signatures import MessageRefused, sign, sign_as_written

ASK_TIMEOUT_S: Final = 3.0
"""How long a node may take to write a message of a kilobyte for us; after that it gets none."""

MAX_ASKED: Final = 1_000
"""Signatures under way at once. One that would be more is left out: the next report says the same again."""

_HEALTH_OF: Final[dict[NodeState, Health]] = {
    "up": "healthy",
    "suspect": "degraded",
    "draining": "degraded",
    "down": "unhealthy",
    "connecting": "unknown",
}


class ClusterReports:
    """Broadcasts until `stop`; call `start` before the monitor's."""

    def __init__(
        self,
        node: Node,
        monitor: ClusterMonitor,
        pubsub: PubSub,
        *,
        secret_key_base: str,
        interval_s: float,
        gossip: Gossip | None = None,
    ) -> None:
        self._node = node
        self._gossip = gossip
        self._monitor = monitor
        self._pubsub = pubsub
        self._secret = secret_key_base
        self._interval_s = interval_s
        self._told: dict[Atom, bool] = {}
        """The nodes that were told to be up, and whether they run ExESDB."""
        self._health: ClusterHealth | None = None
        self._asking: set[PendingRpc] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._end_watch: Callable[[], None] = lambda: None
        self._end_hearing: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to watch."""
        self._end_watch = self._monitor.watch(self._changed)
        self._end_hearing = self._pubsub[MONITOR_SERVER].subscribe(DRAINING_TOPIC, self._heard_draining)
        self._plan()

    def stop(self) -> None:
        """Tell nothing any more."""
        self._end_watch()
        self._end_hearing()
        if self._timer is not None:
            self._timer.cancel()
        for pending in self._asking:
            pending.cancel()
        self._asking.clear()

    def draining(self) -> None:
        """Tell the other gateways that this one is going to stop."""
        self._pubsub[MONITOR_SERVER].broadcast(DRAINING_TOPIC, draining_message(self._node.name))

    def status(self) -> dict[Term, Term]:
        """What is seen, for `sys:get_state/1`: `%{nodes: %{node => map}, stores: %{store => map}, gossip: map}`."""
        return {
            Atom("nodes"): {each.node: _node_term(each) for each in self._monitor.nodes()},
            Atom("stores"): {each.store: _store_term(each) for each in self._monitor.stores()},
            Atom("gossip"): None if self._gossip is None else _gossip_term(self._gossip.status()),
        }

    def _heard_draining(self, _: bytes, message: Term) -> None:
        node = parse_draining(message)
        if node is not None:
            self._monitor.draining(node)

    # What is told

    def _changed(self, change: Change) -> None:
        if type(change) is NodeChanged:
            status = self._monitor.node(change.node)
            self._tell_topology(status)
            if status.is_ex_esdb:
                self._tell_node(status)
        if self._monitor.health() != self._health:
            self._tell_cluster()

    def _tell_topology(self, status: NodeStatus) -> None:
        node = status.node
        if status.state in ("down", "connecting"):
            if (was_ex_esdb := self._told.pop(node, None)) is not None:
                self._broadcast_topology("nodedown", node, was_ex_esdb)
            return
        known = status.applications or status.state == "suspect"
        counts = self._node.is_visible(node) or status.applications & {EX_ESDB, GATER}
        if known and counts and self._told.get(node) is not status.is_ex_esdb:
            self._told[node] = status.is_ex_esdb
            self._broadcast_topology("nodeup", node, status.is_ex_esdb)

    def _broadcast_topology(self, event: NodeEvent, node: Atom, is_ex_esdb: bool) -> None:
        message = cluster_state_changed(
            event,
            node,
            is_ex_esdb=is_ex_esdb,
            connected=sorted(self._told, key=str),
            timestamp=datetime_to_term(datetime.now(UTC)),
        )
        for server in (MONITOR_SERVER, SYSTEM_SERVER):
            self._pubsub[server].broadcast(cluster_topic("topology"), message)

    def _tell_node(self, status: NodeStatus) -> None:
        connected = status.state not in ("down", "connecting")
        checks = {
            "connection": connected,
            "response": connected and status.state != "suspect",
            "ex_esdb": connected and EX_ESDB in status.applications,
        }
        self._broadcast_health(node_health_updated(status.node, _HEALTH_OF[status.state], checks, _now()))

    def _tell_cluster(self) -> None:
        self._health = health = self._monitor.health()
        self._broadcast_health(
            cluster_health_updated(
                health.status,
                len(health.healthy),
                health.degraded,
                health.unhealthy,
                quorum=health.quorum,
                timestamp=_now(),
            )
        )

    def _plan(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._tell_all)

    def _tell_all(self) -> None:
        """For those who began to listen meanwhile."""
        for status in self._monitor.nodes():
            if status.is_ex_esdb:
                self._tell_node(status)
        self._tell_cluster()
        self._plan()

    # How it is sent

    def _broadcast_health(self, message: Term) -> None:
        server = self._pubsub[HEALTH_SERVER]
        topic = cluster_topic("health")
        if not self._secret:
            server.broadcast(topic, sign(message, ""))
            return
        server.local_broadcast(topic, sign(message, self._secret))
        for node in {pid.node for pid in server.peers}:
            if len(self._asking) < MAX_ASKED:
                self._send_signed(node, topic, message)

    def _send_signed(self, node: Atom, topic: str, message: Term) -> None:
        def done(written: Term, error: ErlangException | None) -> None:
            self._asking.discard(pending)
            if error is None and type(written) is bytes:
                try:
                    signed = sign_as_written(message, written, self._secret)
                except MessageRefused:
                    return
                self._pubsub[HEALTH_SERVER].direct_broadcast(node, topic, signed)

        mfa: tuple[Atom, Atom, list[Term]] = (Atom("erlang"), Atom("term_to_binary"), [message])
        pending = PendingRpc(self._node, node, mfa, done, ASK_TIMEOUT_S)
        self._asking.add(pending)


def _node_term(status: NodeStatus) -> Term:
    return {
        Atom("state"): Atom(status.state),
        Atom("is_ex_esdb"): status.is_ex_esdb,
        Atom("stores"): list(status.stores),
        Atom("answer_ms"): None if status.smoothed_answer_s is None else status.smoothed_answer_s * 1000,
        Atom("error"): None if status.error is None else status.error.encode(),
    }


def _store_term(status: StoreStatus) -> Term:
    return {
        Atom("leader"): status.leader,
        Atom("members"): list(status.members),
        Atom("reachable"): list(status.reachable),
        Atom("outsiders"): list(status.outsiders),
        Atom("problem"): None if status.problem is None else Atom(status.problem),
    }


def _gossip_term(status: GossipStatus) -> Term:
    return {
        Atom("open"): status.open,
        Atom("error"): None if status.error is None else status.error.encode(),
        Atom("sent"): status.sent,
        Atom("heartbeats"): status.heartbeats,
        Atom("ignored"): {Atom(reason): packets for reason, packets in status.ignored.items()},
        Atom("names"): {name.encode(): round(age_s * 1000) for name, age_s in status.names.items()},
    }


def _now() -> Term:
    return datetime_to_term(datetime.now(UTC), milliseconds=True)
