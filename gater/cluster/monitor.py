"""What the cluster looks like: which nodes are there, which run ExESDB, which stores they hold and who leads them.

`ClusterState` is the state machine, without clock, sockets or event loop: connections, answers and failures go in with
their time, questions and changes come out. `ClusterMonitor` is the shell that asks by `erpc`. As the original
(`ExESDBGater.ClusterMonitor`), a node is an ExESDB node if `application:which_applications/0` lists `ex_esdb`. Stores:
`khepri:get_store_ids/0`, and what others tell by `holds`: where a node offers no Khepri, its gateway workers say so.
For each store every node is asked for its own view: `ra_leaderboard:lookup_leader/1` and `khepri_cluster:members/2`,
both answered from the node's memory.

States of a node: `connecting` (wanted, never connected) -> `up` <-> `suspect` (connected, does not answer) -> `down`;
`draining` is a node that is connected but has stopped ExESDB or gater, or said that it will. What messages others get
about changes is not decided here: whoever wants to know calls `watch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import structlog

from gater.cluster.connector import PeerStatus
from gater.cluster.introductions import GATER
from gater.erl.errors import ErlangException
from gater.erl.node import Node
from gater.erl.rpc import ERPC, PendingRpc
from gater.erl.terms import Atom, Term

EX_ESDB: Final = Atom("ex_esdb")

REFRESH_S: Final = 3.0
"""How often an ExESDB node is asked for its applications, stores, leaders and members: a node that hangs or a leader
that has changed is noticed within this time plus `ASK_TIMEOUT_S`."""

GATEWAY_REFRESH_S: Final = 2.0
"""The same for a gateway: one that hangs is suspect after 5 s, and what it was doing is taken over."""

RECHECK_S: Final = 1.0
"""How often a suspect node, and a store whose nodes disagree or whose leader is gone, are asked again: recovery should
not wait."""

HEALTH_INTERVAL_S: Final = 30.0
"""How often other nodes are asked, unless told otherwise. As `health_check_interval` of the original."""

ASK_TIMEOUT_S: Final = 3.0
"""A node that needs longer for an answer it has in memory is suspect."""

DOUBT_TIMEOUT_S: Final = 1.0
"""The same for a node that has just failed to answer something else in time: two silences in a row are enough."""

REMEMBER_DOWN_S: Final = 300.0
"""How long a node that is down and that nobody wants is shown."""

MAX_STORES_PER_NODE: Final = 100
"""Stores asked about on one node; each costs two questions every `REFRESH_S`."""

MAX_STORES: Final = 1_000
"""Stores of the whole cluster that are watched; further ones are not looked at."""

SETTLING_S: Final = 60.0
"""A node that has just connected is asked every `REFRESH_S` for so long: nodes find each other before applications
have started."""

MINORITY_AFTER_S: Final = 2.0
"""A majority must be missing for so long before it is called missing: connections come and answers arrive one after the
other, and a store that is just being met is no store in trouble."""

DIFFER_FOR_S: Final = 2.0
"""Nodes must contradict each other for so long before it is a problem: every election does it for a moment, and a node
that was frozen names its old leader until it hears of the new one."""

MAX_MEMBERS: Final = 100
"""Members of one store. Raft groups have three to nine."""

_SMOOTHING: Final = 0.125
"""Weight of the latest answer time in the smoothed one, as TCP's round-trip estimate (RFC 6298)."""

NodeState: TypeAlias = Literal["connecting", "up", "suspect", "down", "draining"]
QuestionKind: TypeAlias = Literal["alive", "applications", "stores", "leader", "members"]
Problem: TypeAlias = Literal["minority", "leaders_differ", "members_differ"]

_TIMEOUT: Final = (ERPC, Atom("timeout"))
_NOCONNECTION: Final = (ERPC, Atom("noconnection"))

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """Something a node is asked; `store` for `leader` and `members`."""

    kind: QuestionKind
    store: Atom | None = None

    @property
    def mfa(self) -> tuple[Atom, Atom, list[Term]]:
        """The function called on the node."""
        match self.kind:
            case "alive":
                return Atom("erlang"), Atom("node"), []
            case "applications":
                return Atom("application"), Atom("which_applications"), []
            case "stores":
                return Atom("khepri"), Atom("get_store_ids"), []
            case "leader":
                return Atom("ra_leaderboard"), Atom("lookup_leader"), [self.store]
            case "members":
                local: dict[Term, Term] = {Atom("favor"): Atom("low_latency")}
                return Atom("khepri_cluster"), Atom("members"), [self.store, local]


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: ask `node`; then call `answered`, `refused` or `unanswered` with the same question."""

    node: Atom
    question: Question

    @property
    def timeout_s(self) -> float:
        """How long to wait for the answer."""
        return DOUBT_TIMEOUT_S if self.question.kind == "alive" else ASK_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """Effect: a node has another state, has said for the first time what it runs, or has become an ExESDB node.

    `before` is None if it was not known before.
    """

    node: Atom
    before: NodeState | None
    after: NodeState
    is_ex_esdb: bool


@dataclass(frozen=True, slots=True)
class StoreChanged:
    """Effect: leader, members, reachable members, problem or outsiders of a store have changed."""

    store: Atom


@dataclass(frozen=True, slots=True)
class MembersSeen:
    """Effect: these nodes are members of a store but not connected; a connector should know them."""

    nodes: tuple[Atom, ...]


Effect: TypeAlias = Ask | NodeChanged | StoreChanged | MembersSeen
Change: TypeAlias = NodeChanged | StoreChanged


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node, as it is now."""

    node: Atom
    state: NodeState
    is_ex_esdb: bool
    """Whether it runs ExESDB, or did when it was last asked."""
    applications: frozenset[Atom]
    """Empty while not known."""
    stores: tuple[Atom, ...]
    answer_s: float | None
    """How long the latest answer took."""
    smoothed_answer_s: float | None
    error: str | None
    """Why it is suspect or down."""
    in_state_s: float


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """One store, as its nodes say it is."""

    store: Atom
    leader: Atom | None
    """Who leads, if the nodes that answered name one and the same."""
    members: tuple[Atom, ...]
    """All members any reachable node knows of; if none is reachable, those known before. Empty: not known yet."""
    reachable: tuple[Atom, ...]
    """The members that are connected and answer."""
    problem: Problem | None
    """Why writes cannot be trusted now: fewer reachable members than a majority, or nodes that contradict each other
    also when asked again."""
    outsiders: tuple[Atom, ...] = ()
    """Nodes that hold the store but are no members of it, as a majority of the members agrees. Nothing that is written
    reaches their copy: ExESDB leaves such a node behind when it is stopped or cut off while it joins."""

    @property
    def has_quorum(self) -> bool:
        """Whether nothing speaks against writing. True for a store whose members are not known yet."""
        return self.problem is None


@dataclass(frozen=True, slots=True)
class ClusterHealth:
    """The ExESDB nodes by how they are: healthy (`up`), degraded (`suspect`, `draining`), unhealthy (not connected)."""

    healthy: tuple[Atom, ...]
    degraded: tuple[Atom, ...]
    unhealthy: tuple[Atom, ...]
    quorum: bool
    """Whether every store has its quorum."""

    @property
    def status(self) -> Literal["healthy", "degraded", "unhealthy"]:
        """The worst that is true of the cluster."""
        if not self.quorum or (self.unhealthy and not self.healthy):
            return "unhealthy"
        return "degraded" if self.degraded or self.unhealthy else "healthy"


class _Node:
    """What the state machine knows of one node."""

    __slots__ = (
        "answer_s",
        "applications",
        "connected",
        "connected_at",
        "due",
        "error",
        "is_ex_esdb",
        "is_gater",
        "pending",
        "said_draining",
        "since",
        "smoothed_s",
        "state",
        "stores_asked",
        "stores_told",
    )

    def __init__(self, state: NodeState, now: float) -> None:
        self.state: NodeState = state
        self.since = now
        self.connected = False
        self.connected_at = now
        self.applications: frozenset[Atom] = frozenset()
        self.is_ex_esdb = False
        self.is_gater = False
        self.said_draining = False
        self.stores_asked: tuple[Atom, ...] = ()
        self.stores_told: tuple[Atom, ...] = ()
        self.pending: set[Question] = set()
        self.due = now
        self.answer_s: float | None = None
        self.smoothed_s: float | None = None
        self.error: str | None = None

    def stores(self) -> list[Atom]:
        return list(dict.fromkeys((*self.stores_asked, *self.stores_told)))[:MAX_STORES_PER_NODE]


class _Report:
    """What one node says of one store, and when it was asked."""

    __slots__ = ("leader", "leader_at", "members", "members_at")

    def __init__(self) -> None:
        self.leader: Atom | None = None
        self.leader_at: float | None = None
        self.members: frozenset[Atom] | None = None
        self.members_at: float | None = None


class _Store:
    """What the state machine knows of one store."""

    __slots__ = ("differ_since", "last_members", "minority_since", "outsiders", "reports", "seen")

    def __init__(self) -> None:
        self.reports: dict[Atom, _Report] = {}
        self.last_members: frozenset[Atom] = frozenset()
        self.outsiders: frozenset[Atom] = frozenset()
        """Until members agree on something else."""
        self.differ_since: float | None = None
        self.minority_since: float | None = None
        self.seen: StoreStatus | None = None


class ClusterState:
    """The cluster as a state machine. Times are seconds of any steady clock; every event returns its effects."""

    def __init__(self, *, health_interval_s: float = HEALTH_INTERVAL_S) -> None:
        self._health_interval_s = health_interval_s
        self._nodes: dict[Atom, _Node] = {}
        self._stores: dict[Atom, _Store] = {}

    # Events

    def wanted(self, names: Iterable[Atom], now: float) -> list[Effect]:
        """All nodes that a connector wants and that are not connected; forgets the others that are down for long."""
        wanted = set(names)
        effects: list[Effect] = []
        for name in wanted - self._nodes.keys():
            self._nodes[name] = _Node("connecting", now)
            effects.append(NodeChanged(name, None, "connecting", False))
        for name in [
            name
            for name, node in self._nodes.items()
            if not node.connected
            and name not in wanted
            and (node.state == "connecting" or now - node.since >= REMEMBER_DOWN_S)
        ]:
            del self._nodes[name]
        return effects

    def connected(self, name: Atom, now: float) -> list[Effect]:
        """A connection to a node stands."""
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = _Node("connecting", now)
        node.connected = True
        node.connected_at = now
        node.applications = frozenset()
        node.is_ex_esdb = False
        node.is_gater = False
        node.said_draining = False
        node.pending.clear()
        node.error = None
        return [*self._enter(name, node, "up", now), *self._ask(name, node, now), *self._look_at_stores(now)]

    def disconnected(self, name: Atom, reason: str, now: float) -> list[Effect]:
        """The connection to a node is lost."""
        node = self._nodes.get(name)
        if node is None or not node.connected:
            return []
        node.connected = False
        node.pending.clear()
        node.error = reason
        for store in self._stores.values():
            if store.reports.pop(name, None) is not None:
                # Those that are left choose a leader now, if it was this one.
                for each in store.reports:
                    self._nodes[each].due = min(self._nodes[each].due, now + RECHECK_S)
        return [*self._enter(name, node, "down", now), *self._look_at_stores(now)]

    def draining(self, name: Atom, now: float) -> list[Effect]:
        """A connected node said that it is going to stop; until it connects anew."""
        node = self._nodes.get(name)
        if node is None or not node.connected:
            return []
        node.said_draining = True
        return [*self._enter(name, node, "draining", now), *self._look_at_stores(now)]

    def doubt(self, name: Atom) -> list[Effect]:
        """Somebody has waited for this node in vain: is it there at all?"""
        node = self._nodes.get(name)
        if node is None or node.state != "up":
            return []
        return self._put(name, node, Question("alive"))

    def holds(self, name: Atom, stores: Iterable[Atom], now: float) -> list[Effect]:
        """Somebody knows which stores a node holds, for instance from the workers it registered."""
        node = self._nodes.get(name)
        if node is None:
            return []
        before = node.stores()
        node.stores_told = tuple(stores)[:MAX_STORES_PER_NODE]
        return self._ask_stores(name, node, [store for store in node.stores() if store not in before])

    def answered(self, name: Atom, question: Question, answer: Term, asked_at: float, now: float) -> list[Effect]:
        """A node answered a question that was asked at `asked_at`."""
        node = self._nodes.get(name)
        if node is None or question not in node.pending:
            return []
        effects = self._alive(name, node, question, asked_at, now)
        match question.kind:
            case "alive":
                pass
            case "applications":
                effects += self._applications(name, node, answer, now)
            case "stores":
                before = node.stores()
                if type(answer) is list:
                    node.stores_asked = tuple(each for each in answer if type(each) is Atom)[:MAX_STORES_PER_NODE]
                effects += self._ask_stores(name, node, [store for store in node.stores() if store not in before])
            case _:
                effects += self._store_answered(name, question, answer, asked_at)
        return [*effects, *self._look_at_stores(now, question.store)]

    def refused(self, name: Atom, question: Question, asked_at: float, now: float) -> list[Effect]:
        """A node answered a question with an exception: it is alive, but has no such function or no such store."""
        node = self._nodes.get(name)
        if node is None or question not in node.pending:
            return []
        effects = self._alive(name, node, question, asked_at, now)
        if question.store is not None:
            self._stores[question.store].reports.pop(name, None)
        return [*effects, *self._look_at_stores(now, question.store)]

    def unanswered(self, name: Atom, question: Question, reason: str, now: float) -> list[Effect]:
        """A node did not answer in time."""
        node = self._nodes.get(name)
        if node is None or question not in node.pending:
            return []
        node.pending.discard(question)
        node.error = reason
        node.due = min(node.due, now + RECHECK_S)
        if node.state != "up":
            return []
        return [*self._enter(name, node, "suspect", now), *self._look_at_stores(now)]

    def tick(self, now: float) -> list[Effect]:
        """The questions that are due, and the problems that have lasted long enough."""
        effects = self._look_at_stores(now)
        for name, node in self._nodes.items():
            if node.connected and node.due <= now:
                effects += self._ask(name, node, now)
        return effects

    def next_time(self) -> float | None:
        """When `tick` should be called if no event comes before; None: not at all."""
        times = [node.due for node in self._nodes.values() if node.connected]
        times += [
            store.minority_since + MINORITY_AFTER_S
            for store in self._stores.values()
            if store.minority_since is not None and store.seen is not None and store.seen.problem != "minority"
        ]
        return min(times, default=None)

    # Views

    def nodes(self, now: float) -> list[NodeStatus]:
        """Every node, sorted by name."""
        return [self.node(name, now) for name in sorted(self._nodes, key=str)]

    def node(self, name: Atom, now: float) -> NodeStatus:
        """One node. KeyError if it is not known."""
        node = self._nodes[name]
        return NodeStatus(
            name,
            node.state,
            node.is_ex_esdb,
            node.applications,
            tuple(node.stores()),
            node.answer_s,
            node.smoothed_s,
            node.error,
            now - node.since,
        )

    def state(self, name: Atom) -> NodeState | None:
        """The state of one node; None if it is not known."""
        node = self._nodes.get(name)
        return node.state if node is not None else None

    def stores(self) -> list[StoreStatus]:
        """Every store, sorted by name."""
        return [store.seen for _, store in sorted(self._stores.items(), key=lambda item: item[0].name) if store.seen]

    def store(self, name: Atom) -> StoreStatus | None:
        """One store; None if no node has said anything about it."""
        store = self._stores.get(name)
        return store.seen if store is not None else None

    def health(self) -> ClusterHealth:
        """The ExESDB nodes by how they are."""
        by_state: dict[NodeState, list[Atom]] = {}
        for name, node in sorted(self._nodes.items(), key=lambda item: item[0].name):
            if node.is_ex_esdb:
                by_state.setdefault(node.state, []).append(name)
        return ClusterHealth(
            tuple(by_state.get("up", ())),
            (*by_state.get("suspect", ()), *by_state.get("draining", ())),
            (*by_state.get("connecting", ()), *by_state.get("down", ())),
            all(store.has_quorum for store in self.stores()),
        )

    # Nodes

    def _enter(self, name: Atom, node: _Node, state: NodeState, now: float, *, anyway: bool = False) -> list[Effect]:
        before = node.state
        if state == before and not anyway:
            return []
        if state != before:
            node.state = state
            node.since = now
        return [NodeChanged(name, before, state, node.is_ex_esdb)]

    def _alive(self, name: Atom, node: _Node, question: Question, asked_at: float, now: float) -> list[Effect]:
        node.pending.discard(question)
        node.answer_s = took_s = now - asked_at
        smoothed_s = took_s if node.smoothed_s is None else node.smoothed_s
        node.smoothed_s = smoothed_s + _SMOOTHING * (took_s - smoothed_s)
        node.error = None
        return self._enter(name, node, "up", now) if node.state == "suspect" else []

    def _applications(self, name: Atom, node: _Node, answer: Term, now: float) -> list[Effect]:
        if type(answer) is not list:
            return []
        is_first = not node.applications
        node.applications = frozenset(
            each[0] for each in answer if type(each) is tuple and each and type(each[0]) is Atom
        )
        became = EX_ESDB in node.applications and not node.is_ex_esdb
        node.is_ex_esdb = node.is_ex_esdb or became
        node.is_gater = node.is_gater or GATER in node.applications
        ran = {EX_ESDB: node.is_ex_esdb, GATER: node.is_gater}
        has_stopped = any(has_run and each not in node.applications for each, has_run in ran.items())
        state: NodeState = "draining" if node.said_draining or has_stopped else "up"
        effects = self._enter(name, node, state, now, anyway=became or is_first)
        if became:
            node.due = now
            effects += self._ask(name, node, now)
        return effects

    def _ask(self, name: Atom, node: _Node, now: float) -> list[Effect]:
        """The questions of one round. One that is still unanswered is not asked twice."""
        unsettled = any(
            (store := self._stores.get(each)) is not None and self._is_unsettled(store) for each in node.stores()
        )
        if node.state == "suspect" or (node.is_ex_esdb and unsettled):
            wait_s = RECHECK_S
        elif node.is_gater:
            wait_s = GATEWAY_REFRESH_S
        else:
            watched = node.is_ex_esdb or now < node.connected_at + SETTLING_S
            wait_s = REFRESH_S if watched else self._health_interval_s
        node.due = now + wait_s
        effects = self._put(name, node, Question("applications"))
        if node.is_ex_esdb:
            effects += self._put(name, node, Question("stores"))
            effects += self._ask_stores(name, node, node.stores())
        return effects

    def _is_unsettled(self, store: _Store) -> bool:
        """Whether its nodes disagree, or name a leader that is not there."""
        leader = None if store.seen is None else store.seen.leader
        return store.differ_since is not None or (leader is not None and self.state(leader) != "up")

    def _ask_stores(self, name: Atom, node: _Node, stores: Iterable[Atom]) -> list[Effect]:
        effects: list[Effect] = []
        if node.connected and node.is_ex_esdb:
            for store in stores:
                if store not in self._stores:
                    if len(self._stores) >= MAX_STORES:
                        continue
                    self._stores[store] = _Store()
                effects += self._put(name, node, Question("leader", store))
                effects += self._put(name, node, Question("members", store))
        return effects

    def _put(self, name: Atom, node: _Node, question: Question) -> list[Effect]:
        if question in node.pending:
            return []
        node.pending.add(question)
        return [Ask(name, question)]

    # Stores

    def _store_answered(self, name: Atom, question: Question, answer: Term, asked_at: float) -> list[Effect]:
        assert question.store is not None
        report = self._stores[question.store].reports.setdefault(name, _Report())
        if question.kind == "leader":
            match answer:
                case (_, Atom() as leader):
                    report.leader = leader
                case _:
                    report.leader = None
            report.leader_at = asked_at
            return []
        report.members = members = _members(answer)
        report.members_at = asked_at
        if members is None:
            return []
        missing = [each for each in members if (node := self._nodes.get(each)) is None or not node.connected]
        return [MembersSeen(tuple(sorted(missing, key=str)))] if missing else []

    def _look_at_stores(self, now: float, only: Atom | None = None) -> list[Effect]:
        effects: list[Effect] = []
        for name, store in self._stores.items() if only is None else [(only, self._stores[only])]:
            status, differs = self._status(name, store, now)
            if not differs:
                store.differ_since = None
            elif store.differ_since is None:
                # A difference may only mean that one was asked before a change and the other after it: ask all again.
                store.differ_since = now
                for each in store.reports:
                    node = self._nodes[each]
                    node.due = min(node.due, now + RECHECK_S)
                    effects += self._ask_stores(each, node, [name])
            if status != store.seen:
                store.seen = status
                effects.append(StoreChanged(name))
        return effects

    def _status(self, name: Atom, store: _Store, now: float) -> tuple[StoreStatus, bool]:
        """The store as it is, and whether the latest reports contradict each other, confirmed or not."""
        reports = {each: report for each, report in store.reports.items() if self.state(each) == "up"}
        agreed = _agreed({each: report.members for each, report in reports.items() if report.members is not None})
        if agreed is not None:
            store.outsiders = frozenset(reports) - agreed
        outsiders = store.outsiders & reports.keys()
        for each in outsiders:
            del reports[each]
        leaders = {report.leader for report in reports.values() if report.leader is not None}
        views = {report.members for report in reports.values() if report.members is not None}
        if views:
            store.last_members = frozenset().union(*views)
        members = store.last_members
        reachable = members & {each for each, report in reports.items() if report.members is not None}
        if not members or len(reachable) > len(members) // 2:
            store.minority_since = None
        elif store.minority_since is None:
            store.minority_since = now
        problem: Problem | None = None
        if store.minority_since is not None and store.minority_since + MINORITY_AFTER_S <= now:
            problem = "minority"
        elif len(leaders) > 1 and _lasts(store.differ_since, (report.leader_at for report in reports.values())):
            problem = "leaders_differ"
        elif len(views) > 1 and _lasts(store.differ_since, (report.members_at for report in reports.values())):
            problem = "members_differ"
        leader = next(iter(leaders)) if len(leaders) == 1 else None
        status = StoreStatus(name, leader, _sorted(members), _sorted(reachable), problem, _sorted(outsiders))
        return status, len(leaders) > 1 or len(views) > 1


def _lasts(since: float | None, times: Iterable[float | None]) -> bool:
    return since is not None and all(at is None or at >= since + DIFFER_FOR_S for at in times)


def _agreed(views: Mapping[Atom, frozenset[Atom]]) -> frozenset[Atom] | None:
    """The members of the store, by what each node says they are; None without agreement.

    That takes a majority of members who name exactly the same members, and more of them than there are other nodes: a
    single node that was emptied and leads itself must not outvote one that holds the events.
    """
    for members in set(views.values()):
        agree = sum(views.get(each) == members for each in members)
        if agree > len(members) // 2 and agree > len(views.keys() - members):
            return members
    return None


def _sorted(nodes: Iterable[Atom]) -> tuple[Atom, ...]:
    return tuple(sorted(nodes, key=str))


def _members(answer: Term) -> frozenset[Atom] | None:
    """The nodes in `{ok, [{Store, Node}]}`; None for anything else."""
    match answer:
        case (Atom(name="ok"), list() as servers) if servers and len(servers) <= MAX_MEMBERS:
            nodes = [each[1] for each in servers if type(each) is tuple and len(each) == 2]
            return frozenset(each for each in nodes if type(each) is Atom)
    return None


class WantedNodes(Protocol):
    """What the monitor needs of `gater.cluster.connector.Connector`."""

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        """Name a node."""

    def status(self) -> list[PeerStatus]:
        """Every wanted node."""


class ClusterMonitor:
    """Watches the cluster of a node: asks, keeps `ClusterState`, tells watchers about changes."""

    def __init__(
        self, node: Node, connector: WantedNodes | None = None, *, health_interval_s: float = HEALTH_INTERVAL_S
    ) -> None:
        self._node = node
        self._connector = connector
        self._state = ClusterState(health_interval_s=health_interval_s)
        self._asking: set[PendingRpc] = set()
        self._watchers: list[Callable[[Change], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stop_watching: Callable[[], None] | None = None
        self._running = False
        self._log = log.bind(node=str(node.name))

    def start(self) -> None:
        """Begin to watch and to ask."""
        self._running = True
        self._stop_watching = self._node.monitor_nodes(self._node_changed)
        now = self._now()
        for peer in self._node.nodes():
            self._carry_out(self._state.connected(peer, now))
        self._advance()

    def stop(self) -> None:
        """Ask nobody any more."""
        self._running = False
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for pending in self._asking:
            pending.cancel()
        self._asking.clear()

    def watch(self, watcher: Callable[[Change], None]) -> Callable[[], None]:
        """Call `watcher` at every change of a node or store; the function returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def holds(self, peer: Atom, stores: Iterable[Atom]) -> None:
        """Tell which stores a node holds; for nodes that do not answer `khepri:get_store_ids/0`."""
        self._carry_out(self._state.holds(peer, stores, self._now()))

    def doubt(self, peer: Atom) -> None:
        """Tell that a node has not answered in time: it is asked at once, and suspect if it does not answer that."""
        self._carry_out(self._state.doubt(peer))

    def draining(self, peer: Atom) -> None:
        """Tell that a node is going to stop."""
        self._carry_out(self._state.draining(peer, self._now()))

    def nodes(self) -> list[NodeStatus]:
        """Every node that is connected, wanted, or went down a short while ago; sorted by name."""
        self._merge_wanted()
        return self._state.nodes(self._now())

    def node(self, peer: Atom) -> NodeStatus:
        """One node. KeyError if it is not known."""
        return self._state.node(peer, self._now())

    def node_state(self, peer: Atom) -> NodeState | None:
        """The state of one node; None if it is not known."""
        return self._state.state(peer)

    def stores(self) -> list[StoreStatus]:
        """Every store of the connected ExESDB nodes, sorted by name."""
        return self._state.stores()

    def store(self, store: Atom) -> StoreStatus | None:
        """One store; None if no node has said anything about it."""
        return self._state.store(store)

    def health(self) -> ClusterHealth:
        """The ExESDB nodes by how they are."""
        return self._state.health()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        if is_up:
            self._carry_out(self._state.connected(peer, self._now()))
        else:
            self._carry_out(self._state.disconnected(peer, reason, self._now()))
        self._plan()

    def _advance(self) -> None:
        self._merge_wanted()
        self._carry_out(self._state.tick(self._now()))
        self._plan()

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._state.next_time()
        if at is not None and self._running:
            self._timer = asyncio.get_running_loop().call_at(at, self._advance)

    def _merge_wanted(self) -> None:
        if self._connector is not None:
            names = [Atom(each.peer) for each in self._connector.status() if each.state != "up"]
            self._carry_out(self._state.wanted(names, self._now()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Ask():
                    self._ask(effect)
                case MembersSeen():
                    self._name_members(effect.nodes)
                case _:
                    self._changed(effect)

    def _name_members(self, nodes: Iterable[Atom]) -> None:
        if self._connector is not None:
            for each in nodes:
                self._connector.want(each.name, "members", forever=False)

    def _changed(self, change: Change) -> None:
        match change:
            case NodeChanged():
                self._log.info(
                    "node_state",
                    peer=str(change.node),
                    before=change.before,
                    after=change.after,
                    ex_esdb=change.is_ex_esdb,
                )
            case StoreChanged():
                status = self._state.store(change.store)
                assert status is not None
                well = status.problem is None and not status.outsiders
                write = self._log.info if well else self._log.warning
                write(
                    "store_state",
                    store=str(change.store),
                    leader=str(status.leader),
                    members=[str(each) for each in status.members],
                    reachable=[str(each) for each in status.reachable],
                    outsiders=[str(each) for each in status.outsiders],
                    problem=status.problem,
                )
        for watcher in list(self._watchers):
            watcher(change)

    def _ask(self, ask: Ask) -> None:
        if not self._running:
            return
        asked_at = self._now()

        def done(result: Term, error: ErlangException | None) -> None:
            self._asking.discard(pending)
            now = self._now()
            if error is None:
                effects = self._state.answered(ask.node, ask.question, result, asked_at, now)
            elif error.reason == _NOCONNECTION:
                return  # `disconnected` follows, with the reason.
            elif error.reason == _TIMEOUT:
                reason = f"{ask.question.kind} not answered within {ask.timeout_s:g} s"
                effects = self._state.unanswered(ask.node, ask.question, reason, now)
            else:
                effects = self._state.refused(ask.node, ask.question, asked_at, now)
            self._carry_out(effects)
            self._plan()

        pending = PendingRpc(self._node, ask.node, ask.question.mfa, done, ask.timeout_s)
        self._asking.add(pending)
