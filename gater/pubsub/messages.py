"""The wire shapes of Phoenix.PubSub 2.1 (adapter `PG2`), and the servers, topics and messages ExESDB uses it for.

Source: `phoenix_pubsub` 2.1, `pubsub/pg2.ex`; ExESDB 0.11 (`topics.ex`, `emitter_group.erl`, `emitter_worker.ex`);
ExESDBGater 0.8 (`pubsub_system.ex`, `topics.ex`, `cluster_monitor.ex`, `messages/health_messages.ex`);
`tests/captures/phoenix_pubsub_*.json`.

A server `:name` is one worker process per node, registered as `:"Elixir.name.Adapter"` and joined to the `pg` group of
that name in the scope `Phoenix.PubSub`. A broadcast is one `{:forward_to_local, topic, message, dispatcher}` to each
member on another node; the worker there hands the message to the subscribers of the topic on its node.
Signing is in `signatures.py`; processes and groups in `adapter.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

from gater.erl.phash2 import phash2
from gater.erl.terms import Atom, Term

SCOPE: Final = Atom("Elixir.Phoenix.PubSub")
"""The `pg` scope of Phoenix.PubSub, and the module that dispatches a broadcast unless another one is named."""

FORWARD_TO_LOCAL: Final = Atom("forward_to_local")
EVENTS: Final = Atom("events")

SERVERS: Final = tuple(
    f"ex_esdb_{kind}"
    for kind in (
        "events",
        "system",
        "logging",
        "health",
        "metrics",
        "security",
        "audit",
        "alerts",
        "diagnostics",
        "lifecycle",
    )
)
"""The ten servers of `ExESDBGater.PubSubSystem`."""

EVENTS_SERVER: Final = "ex_esdb_events"
HEALTH_SERVER: Final = "ex_esdb_health"
SYSTEM_SERVER: Final = "ex_esdb_system"
MONITOR_SERVER: Final = "ExESDBGater.PubSub"
"""Where `ExESDBGater.ClusterMonitor` broadcasts unless the application names another server. None of the ten: who wants
to hear it starts a server of that name."""

SIGNED_SERVERS: Final = frozenset(SERVERS) - {EVENTS_SERVER, SYSTEM_SERVER}
"""Servers whose messages are wrapped, signed if there is a key. Events go out as they are (`emitter_worker.ex`), and so
does what is told of the cluster's nodes (`cluster_monitor.ex`)."""

MAX_TOPIC_BYTES: Final = 1024
"""Topics are a store, a colon and a name; names are bounded by 255 characters each (`MAX_NAME_CHARACTERS`)."""

STORE_SUB_TOPICS: Final = (
    "health",
    "lifecycle",
    "streams",
    "replicas",
    "events",
    "alerts",
    "performance",
    "subscriptions",
)
CLUSTER_SUB_TOPICS: Final = ("health", "topology", "leader", "discovery", "alerts", "performance")

_STRUCT: Final = Atom("__struct__")
_HEALTH_MESSAGES: Final = "Elixir.ExESDBGater.Messages.HealthMessages"

NodeEvent: TypeAlias = Literal["nodeup", "nodedown"]
Health: TypeAlias = Literal["healthy", "degraded", "unhealthy", "unknown"]

APPENDED_TOPIC: Final = "gater:appended"
"""The topic of gater's own on which gateways tell each other of appends."""

DRAINING_TOPIC: Final = "gater:draining"
"""The topic of gater's own on which a gateway says that it is going to stop."""

_APPENDED: Final = Atom("gater_appended")
_DRAINING: Final = Atom("gater_draining")
_TRANSIENT: Final = b"transient"


class Broadcast(NamedTuple):
    """What a worker is told: give `message` to the local subscribers of `topic`, by way of the module `dispatcher`."""

    topic: bytes
    message: Term
    dispatcher: Term


def forward_to_local(topic: str | bytes, message: Term) -> Term:
    """What is sent to another node's worker, by broadcast and direct broadcast alike."""
    return (FORWARD_TO_LOCAL, _binary(topic), message, SCOPE)


def parse_broadcast(message: Term) -> Broadcast | None:
    """The broadcast in a message to a worker; None if it is something else."""
    match message:
        case (kind, bytes() as topic, inside, dispatcher) if kind is FORWARD_TO_LOCAL and len(topic) <= MAX_TOPIC_BYTES:
            return Broadcast(topic, inside, dispatcher)
    return None


def worker_name(server: str | Atom) -> Atom:
    """The registered name of a server's worker, which is its group as well: `Module.concat(server, Adapter)`."""
    return Atom(f"Elixir.{server}.Adapter")


def store_topic(store: str | Atom, sub_topic: str) -> str:
    """`"store:sub_topic"` (`Topics.store_topic/2`)."""
    return f"{store}:{sub_topic}"


def cluster_topic(sub_topic: str) -> str:
    """`"cluster:sub_topic"` (`Topics.cluster_topic/1`)."""
    return f"cluster:{sub_topic}"


def parse_topic(topic: str | bytes) -> tuple[str, str] | None:
    """`(store or "cluster", sub topic)`; None if it has no colon or is no text."""
    try:
        text = topic.decode() if type(topic) is bytes else str(topic)
    except UnicodeDecodeError:
        return None
    head, colon, rest = text.partition(":")
    return (head, rest) if colon else None


def subscription_topic(store: str | Atom, kind: Atom, selector: Term, name: str | bytes) -> bytes:
    """The topic to which ExESDB's emitters broadcast the events of a saved subscription without a subscriber.

    Source: `ExESDB.Topics.sub_topic/3` and `emitter_group:topic/2`. ValueError for a kind that is none, or a selector
    that kind cannot have.
    """
    prefix = f"{store}:".encode()
    name = _binary(name)
    selector = _binary(selector) if type(selector) is str else selector
    match kind.name:
        case "by_stream" if type(selector) is bytes:
            if name == b"all-events" and selector == b"$all":
                return prefix + b"$all"
            return prefix + (selector if name == _TRANSIENT else b"$" + name)
        case "by_event_type" if type(selector) is bytes:
            return prefix + (selector if name == _TRANSIENT else b"*" + name + b"-" + selector)
        case "by_event_pattern":
            return prefix + b"evt-pat-" + name + b"-" + _selector_hash(selector)
        case "by_event_payload":
            return prefix + b"evt-pay-" + name + b"-" + _selector_hash(selector)
    raise ValueError(f"no subscription has the kind {kind} and such a selector")


def events_message(events: list[Term]) -> Term:
    """`{:events, events}`: what a subscriber gets."""
    return (EVENTS, events)


def parse_events(message: Term) -> list[Mapping[Term, Term]] | None:
    """The event records of `{:events, [record]}`; None if it is something else."""
    match message:
        case (kind, list(events)) if kind is EVENTS and all(isinstance(event, Mapping) for event in events):
            return events
    return None


class Appended(NamedTuple):
    """One gateway tells the others: this stream of this store has come to this version, on this node."""

    store: Atom
    stream: bytes
    version: int
    node: Atom


def appended_message(store: Atom, stream: str | bytes, version: int, node: Atom) -> Term:
    """`{:gater_appended, store, stream, version, node}`, version being the number of the stream's last event, node the
    one that has carried out the append. For the topic `APPENDED_TOPIC`."""
    return (_APPENDED, store, _binary(stream), version, node)


def parse_appended(message: Term) -> Appended | None:
    """The notice in a message on `APPENDED_TOPIC`; None if it is something else."""
    match message:
        case (kind, Atom() as store, bytes() as stream, version, Atom() as node) if (
            kind is _APPENDED and type(version) is int and version >= 0
        ):
            return Appended(store, stream, version, node)
    return None


def draining_message(node: Atom) -> Term:
    """`{:gater_draining, node}`: this gateway is going to stop. For the topic `DRAINING_TOPIC`."""
    return (_DRAINING, node)


def parse_draining(message: Term) -> Atom | None:
    """The gateway in a message on `DRAINING_TOPIC`; None if it is something else."""
    match message:
        case (kind, Atom() as node) if kind is _DRAINING:
            return node
    return None


def cluster_state_changed(
    event: NodeEvent, node: Atom, *, is_ex_esdb: bool, connected: Iterable[Atom], timestamp: Term
) -> Term:
    """`{:cluster_state_changed, map}` of `ExESDBGater.ClusterMonitor`, for the topic `cluster:topology`.

    `connected` are the nodes that are connected now; `timestamp` is a `%DateTime{}`.
    """
    nodes: list[Term] = list(connected)
    state: dict[Term, Term] = {
        Atom("connected_nodes"): nodes,
        Atom("event"): Atom(event),
        Atom("is_ex_esdb"): is_ex_esdb,
        Atom("node"): node,
        Atom("timestamp"): timestamp,
        Atom("total_nodes"): len(nodes),
    }
    return (Atom("cluster_state_changed"), state)


def node_health_updated(node: Atom, status: Health, checks: Mapping[str, bool], timestamp: Term) -> Term:
    """`{:node_health_updated, %NodeHealth{}}` (`health_messages.ex`); `checks` say what passed.

    Load, memory and disk are `nil`: they are not known from outside.
    """
    results: dict[Term, Term] = {Atom(check): Atom("pass" if passed else "fail") for check, passed in checks.items()}
    payload: dict[Term, Term] = {
        _STRUCT: Atom(f"{_HEALTH_MESSAGES}.NodeHealth"),
        Atom("checks"): results,
        Atom("disk_usage"): None,
        Atom("load_avg"): None,
        Atom("memory_usage"): None,
        Atom("node"): node,
        Atom("status"): Atom(status),
        Atom("timestamp"): timestamp,
    }
    return (Atom("node_health_updated"), payload)


def cluster_health_updated(
    status: Health,
    healthy_nodes: int,
    degraded_nodes: Iterable[Atom],
    unhealthy_nodes: Iterable[Atom],
    *,
    quorum: bool,
    timestamp: Term,
) -> Term:
    """`{:cluster_health_updated, %ClusterHealth{}}` (`health_messages.ex`)."""
    degraded: list[Term] = list(degraded_nodes)
    unhealthy: list[Term] = list(unhealthy_nodes)
    payload: dict[Term, Term] = {
        _STRUCT: Atom(f"{_HEALTH_MESSAGES}.ClusterHealth"),
        Atom("degraded_nodes"): degraded,
        Atom("healthy_nodes"): healthy_nodes,
        Atom("quorum_status"): Atom("available" if quorum else "lost"),
        Atom("status"): Atom(status),
        Atom("timestamp"): timestamp,
        Atom("total_nodes"): healthy_nodes + len(degraded) + len(unhealthy),
        Atom("unhealthy_nodes"): unhealthy,
    }
    return (Atom("cluster_health_updated"), payload)


def _selector_hash(selector: Term) -> bytes:
    return b"%X" % phash2(selector)


def _binary(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
