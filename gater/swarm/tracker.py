"""The tracker of a Swarm member, as a pure state machine: an event and the time in, effects out.

Follows `Swarm.Tracker` of Swarm 3.4 (`lib/swarm/tracker/tracker.ex`), its states, its messages and its clocks, and can
stand in one cluster with it. Where the original leaves registries apart, ours come together; how is told below.

Theory of operation
-------------------

::

    cluster_wait --- cluster_join, nobody there ----------------------------> tracking
         |  `------- cluster_join ------> syncing --- sync_recv, sync_ack --> tracking
         `---------- sync from the only node ---> awaiting_sync_ack --------> tracking
    tracking ------- nodeup, anti_entropy ------> syncing                (and back)
    tracking ------- sync ----------------------> awaiting_sync_ack      (and back)

A tracker waits in `cluster_wait` for nodes to connect. It asks one for its registry (`sync`) and is `syncing` until
`sync_recv` brings it; it takes it over and sends back its own (`sync_ack`), for which the other was in
`awaiting_sync_ack`. Two that ask each other compare clocks, then node names, to see who answers. Who cannot be answered
yet is kept in the pending sync requests. Afterwards, in `tracking`, changes are told by events.

*What is different here.* The original believes everybody about everything, and orders what it hears by clocks whose
identities overlap as soon as a node joins late. It can lose a live registration, keep a dead one for ever, see two
registrations as each other's death, or stop in a circle of trackers that wait for each other. Ours rests on one rule:
**a member is right about its own processes.**

- What we show of a member's processes is its registry at our last `sync`, changed by its own events, in the order it
  sent them. So we sync with *every* member when it comes up, and with one in turn at every `anti_entropy`; what its
  registry does not list goes. All names of a node go when it is down. Pids of members that do not say `untrack`
  reliably (the original's) are monitored too.
- What others say about a member's processes is a *rumour*. Registering, joining groups and unregistering work from any
  node, so rumours are acted upon; but they are checked: another tracker of ours tells every change to its processes
  again itself (so we ignore rumours about those, and echo what we hear about ours), and an original is asked for its
  registry when it has not confirmed in `VERIFY_AFTER_S`, also where the rumour came before the registration. Two of
  ours that list an original's processes differently both ask it, and what it has changed without a word is told the
  others as a rumour. A member we have not synced with since it came up cannot unregister our processes: it says
  `untrack` merely because it had lost us.
- Two processes for one name: `claims.py` keeps both and shows the better, the same one everywhere (`_better`). Between
  two of our trackers the order is fixed, so exactly one gives way: its node takes the claim back and tells the process
  to die. Against an original the order is what the original will do: it gives way to a clock that has seen its own, so
  ours wins where it already will, or where the clocks decide nothing and the ring does not own the name to it, and then
  we say `track` again with a clock that has seen both. Nobody gives way to a rumour.
- Waiting is bounded: `SYNC_TIMEOUT_S`, then the next member, then again later. Once joined we answer a `sync` at once
  in any state, take `sync_recv` and `sync_ack` in any state, and hold back nobody's events but those of the member
  whose registry is being merged. Only calls that change something wait, and only until we have joined.
- A large registry is merged, or a node's names dropped, `MERGE_CHUNK` at a time, with `Resume` between.

The transcripts of two original trackers are reproduced message by message. Clocks are kept exactly as the original
does, for its sake: between our own trackers nothing depends on them.

Left to others: starting and moving processes (`placement.py`), terms (`messages.py`), carrying out (`peer.py`).
"""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import reduce
from typing import Final

from gater.erl.errors import LimitExceeded, RemoteProtocolError
from gater.erl.terms import Atom, Pid, Term
from gater.swarm import clock as itc
from gater.swarm import messages
from gater.swarm.claims import Claims
from gater.swarm.clock import Clock
from gater.swarm.events import (
    Answered,
    AskApplications,
    Call,
    Changed,
    Demonitor,
    DemonitorTracker,
    Die,
    Effect,
    Event,
    Failed,
    Kept,
    Monitor,
    MonitorTracker,
    NodeDown,
    NodeUp,
    Note,
    ProcessDown,
    Received,
    Reply,
    Resume,
    Send,
    SetTimer,
    TimerFired,
    TrackerDown,
)
from gater.swarm.messages import (
    AddMeta,
    Change,
    Handoff,
    HandOver,
    Message,
    RemoveMeta,
    ReplicaEvent,
    StartAndTrack,
    Sync,
    SyncAck,
    SyncErr,
    SyncRecv,
    Track,
    Untrack,
    UntrackName,
    UpdateMeta,
    Whereis,
)
from gater.swarm.placement import Placement
from gater.swarm.registry import (
    Entry,
    Meta,
    Registry,
    merged_meta,
    name_key,
    same_meta,
    with_property,
    without_property,
)
from gater.swarm.ring import HashRing, Strategy
from gater.swarm.snapshots import IncomingList

SYNC_NODES_TIMEOUT_S: Final = 5.0
"""How long to wait in `cluster_wait` (Swarm's `sync_nodes_timeout`)."""

ANTI_ENTROPY_INTERVAL_S: Final = 5 * 60.0
"""How often to compare registries with a member (Swarm's `anti_entropy_interval`)."""

RETRY_INTERVAL_S: Final = 1.0
"""How long after a node without Swarm is asked again (Swarm's `@retry_interval`)."""

RETRY_MAX_ATTEMPTS: Final = 10
"""How often (Swarm's `@retry_max_attempts`)."""

SYNC_TIMEOUT_S: Final = 15.0
"""How long to wait for `sync_recv` or `sync_ack`. An original may sit in `cluster_wait` for 5 s and takes some seconds
for a registry of 10^5 names; the original itself waits for ever."""

CROSSING_TIMEOUT_S: Final = 1.0
"""How long to wait for the answer of a member that has asked us too, if it is for that member to begin. An original
that got our request before it sent its own does not know that, and waits for us."""

JOIN_TIMEOUT_S: Final = 5.0
"""How long the first round may take until calls and the requests of originals are answered all the same: originals that
started together can wait for each other for ever, or for us."""

MAX_SYNC_BACKOFF_S: Final = 300.0
"""The longest pause before a member that does not answer is asked again: as often as anti-entropy would."""

VERIFY_AFTER_S: Final = 2.0
"""How long a rumour may stay unconfirmed: longer than an event is on its way, short enough to be repaired unseen."""

SAY_AGAIN_S: Final = (1.0, 80.0)
"""When to tell originals our names again after a connection with one of them came or went: soon, and when whoever is at
its other end must have noticed the loss (`net_ticktime` and a quarter: 75 s)."""

SAY_AGAIN_NAMES: Final = 1_000
"""How many of our names are told again one by one; with more, originals are asked to compare registries instead."""

EARLY_S: Final = 10.0
"""How much earlier than of a registration itself we may hear of a change that somebody else has made to it."""

MAX_HEARD_EARLY: Final = 1_000
"""How many such changes are remembered. All but a few are about processes that have ended: all originals tell."""

RESYNC_SPACING_S: Final = 5.0
"""Rumours make us ask one member at most this often: an answer is its whole registry."""

MERGE_CHUNK: Final = 50
"""How many entries to decode, merge and monitor before other work gets its turn: 1 to 3 ms."""

FORGET_CHUNK: Final = 20
"""How many names of a list are freed in the time in which one is merged: 10^5 at once are a pause of 15 ms."""

MAX_NAMES: Final = 5_000_000
"""The largest registry: 2 GB of ours. Members can name anything, so without a limit they could fill our memory."""

MAX_POSTPONED_CALLS: Final = 10_000
"""Calls that wait for us to join; who comes later is told `overloaded`."""

MAX_HELD_MESSAGES: Final = 100_000
"""What a member may say while its own registry is being merged; beyond, its registry is asked for again instead."""

MAX_SHARED_CLOCKS: Final = 10_000
"""Clocks kept to be shared between entries. Nearly all entries have one of few; beyond, start collecting anew."""

MAX_FORK_DEPTH: Final = 64
"""An identity nested deeper is not divided any further: who asks for a part keeps its own."""

_GLOBAL_BLACKLIST: Final = (re.compile(r"^remsh.*$"), re.compile(r"^.+_upgrader_.+$"), re.compile(r"^.+_maint_.+$"))
_EVERYBODY: Final = re.compile(r"^.+$")

NodePattern = str | re.Pattern[str]


class State(StrEnum):
    """The states of `Swarm.Tracker`."""

    CLUSTER_WAIT = "cluster_wait"
    SYNCING = "syncing"
    AWAITING_SYNC_ACK = "awaiting_sync_ack"
    TRACKING = "tracking"


@dataclass(frozen=True, slots=True)
class TrackerOptions:
    """Swarm's settings of the same names (in seconds); `strategy` makes an empty ring. All members must agree on it."""

    sync_nodes_timeout_s: float = SYNC_NODES_TIMEOUT_S
    anti_entropy_interval_s: float = ANTI_ENTROPY_INTERVAL_S
    sync_timeout_s: float = SYNC_TIMEOUT_S
    node_blacklist: Sequence[NodePattern] = ()
    node_whitelist: Sequence[NodePattern] = ()
    strategy: Callable[[], Strategy] = HashRing
    merge_chunk: int = MERGE_CHUNK
    random: random.Random = field(default_factory=random.Random)


def ignores(name: str, blacklist: Sequence[NodePattern], whitelist: Sequence[NodePattern]) -> bool:
    """Is a node of this name left out? (`HashRing.Utils.ignore_node?/3`: a whitelist beats a blacklist.)"""
    if whitelist:
        return not any(_matches(pattern, name) for pattern in whitelist)
    return any(_matches(pattern, name) for pattern in blacklist)


def _matches(pattern: NodePattern, name: str) -> bool:
    if pattern == name:
        return True
    return re.search(pattern, name) is not None


class _Member:
    """What we know of another tracker."""

    __slots__ = ("doubts", "failures", "gater", "last_sync", "rumours", "sync_due", "synced")

    def __init__(self, gater: bool, now: float) -> None:
        self.gater = gater
        """It is one of ours: it tells every change to its own processes itself."""
        self.synced = False
        """It has told us its registry since it came up."""
        self.sync_due: float | None = now
        self.last_sync = float("-inf")
        self.failures = 0
        self.rumours: dict[tuple[Term, Pid], float] = {}
        """Claims of its processes that it has not confirmed, and since when."""
        self.doubts: dict[Pid, float] = {}
        """Its processes that somebody else has unregistered or changed, and since when."""


@dataclass(slots=True)
class _Merge:
    """A registry that is being taken over, one chunk after the other."""

    node: Atom
    message: SyncRecv | SyncAck
    entries: list[Term] | IncomingList
    """What is left of it, the next one last: taken out one by one, for freeing 10^5 terms at once is a pause too."""
    started: float
    ours: bool
    """It is the answer we are waiting for in `syncing`."""
    compare: bool = False
    """It is a look at third members too that is worth comparing with ours."""
    listed: set[Term] = field(default_factory=set)
    agreed: Counter[Atom] = field(default_factory=Counter)
    """How many names of each original it lists as we do."""
    disputed: dict[Atom, None] = field(default_factory=dict)
    news: ReplicaEvent | None = None
    """Something it has changed without saying so, to be told our other trackers, which then ask it too."""
    stale: dict[Pid, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Purge:
    """The names of a node that is down, or (after a merge) those that the node does not list, being dropped."""

    node: Atom
    pids: list[Pid]
    merged: _Merge | None = None


class Tracker:
    """One tracker. `pid` is the process it runs in, on `pid.node`.

    `start` gives the first effects; then `receive` every event. `registry` may be read at any time.
    """

    def __init__(self, pid: Pid, options: TrackerOptions | None = None) -> None:
        self.pid = pid
        self.node = pid.node
        self.options = options or TrackerOptions()
        self.state = State.CLUSTER_WAIT
        self.strategy = self.options.strategy()
        self.strategy.add_node(self.node)
        self._clock = itc.seed()
        self._shared_clocks: dict[Term, Clock] = {}
        self._members: dict[Atom, _Member] = {}
        self._plain_nodes: set[Atom] = set()
        self._claims = Claims(self._better, lambda name, old, new: self._emit(Changed(name, old, new)))
        self.registry: Registry = self._claims.registry
        self.joined = False
        self._anti_entropy_runs = False
        self._sync_node: Atom | None = None
        self._sync_deadline: float | None = None
        self._crossing: tuple[Sync, float] | None = None
        """What the member we have asked has asked us, and until when it is for it to answer first."""
        self._awaiting: dict[Atom, float] = {}
        self._early: dict[Pid, float] = {}
        self._won: dict[Term, Term] = {}
        """Names of ours that others have claimed too, until a moment ago."""
        self._pending_sync_reqs: dict[Atom, Sync] = {}
        self._postponed: deque[Call] = deque()
        self._retries: dict[Atom, int] = {}
        self._jobs: deque[_Merge | _Purge] = deque()
        self._held: dict[Atom, deque[Message]] = {}
        self._resuming = False
        self._join_deadline: float | None = None
        self._verify_at: float | None = None
        self._wake_at: float | None = None
        self._now = 0.0
        self._effects: list[Effect] = []
        self.placement = Placement(self)
        blacklist, whitelist = (*self.options.node_blacklist, *_GLOBAL_BLACKLIST), self.options.node_whitelist
        if ignores(self.node.name, blacklist, whitelist):
            # Who is left out by its own settings must not disturb the others.
            blacklist, whitelist = (_EVERYBODY,), ()
        self._blacklist: Sequence[NodePattern] = blacklist
        self._whitelist: Sequence[NodePattern] = whitelist

    @property
    def clock(self) -> Clock:
        """Our clock: what new registrations start from."""
        return self._clock

    @property
    def nodes(self) -> list[Atom]:
        """The members but us, in the order they came."""
        return list(self._members)

    def is_synced(self, node: Atom) -> bool:
        """Whether this member has told us its registry since it came up."""
        member = self._members.get(node)
        return member is not None and member.synced

    @property
    def contested(self) -> list[Entry]:
        """Claims that have lost a name and are not yet taken back: empty when the cluster is quiet."""
        return self._claims.contested()

    def start(self, now: float) -> list[Effect]:
        """The effects to begin with."""
        self._now = now
        return [SetTimer("cluster_join", self.options.sync_nodes_timeout_s)]

    def receive(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now` (seconds, never going back); returns what to do, in order."""
        self._now = now
        self._effects = []
        match event:
            case Received(node, message):
                self._received(node, message)
            case Call():
                self._call(event)
            case ProcessDown(pid, connection_lost):
                self._process_down(pid, connection_lost)
            case NodeUp(node, has_swarm, is_gater):
                self._node_up(node, has_swarm, is_gater)
            case NodeDown(node):
                self._node_down(node)
            case TrackerDown(node):
                self._tracker_down(node)
            case Answered(tag, value):
                self.placement.answered(tag, value)
            case Failed(tag, reason):
                self.placement.failed(tag, reason)
            case TimerFired(timer):
                self._timer_fired(timer)
            case Resume():
                self._resuming = False
        if self._jobs and not self._resuming:
            self._work()
        self._settle()
        self._arm()
        if self._jobs and not self._resuming:
            self._resuming = True
            self._emit(Resume())
        return self._effects

    # What comes in.

    def _received(self, node: Atom, message: Message) -> None:
        held = self._held.get(node)
        if held is None:
            self._message(node, message)
        elif len(held) < MAX_HELD_MESSAGES:
            held.append(message)
        else:
            held.clear()
            member = self._members.get(node)
            if member is not None:
                member.sync_due = self._now
            self._note("too much said during a merge", node=node, limit="MAX_HELD_MESSAGES")

    def _message(self, node: Atom, message: Message) -> None:
        if not isinstance(message, SyncErr) and message.sender.node is not node:
            self._note("message of another node's tracker", node=node, sender=message.sender)
            return
        if isinstance(message, Sync) and self._ignores(node):
            self._send((message.sender,), SyncErr(messages.NODE_IGNORED))
            return
        # Its tracker speaks, so Swarm runs there, whether or not it has been asked yet.
        member = self._member(node)
        if member is None:
            return
        try:
            match message:
                case ReplicaEvent(_, clock, change):
                    self._replica_event(node, member, clock, change)
                case Sync():
                    self._sync(node, member, message)
                case SyncRecv() | SyncAck():
                    self._merge_later(node, message)
                case SyncErr(reason):
                    self._note("sync refused", node=node, reason=reason)
                    if node is self._sync_node:
                        self._sync_failed(node)
                case Handoff():
                    self.placement.handoff(message)
        except LimitExceeded as error:
            # Names are looked up before anything is changed, so the message is as good as not said.
            self._note("message beyond a limit", node=node, reason=str(error))

    def _timer_fired(self, timer: Hashable) -> None:
        match timer:
            case "cluster_join":
                if self.state is State.CLUSTER_WAIT:
                    self._note("joining cluster", nodes=self.nodes)
                    self.state = State.TRACKING
            case "anti_entropy":
                self._anti_entropy()
            case "wake":
                self._wake()
            case "say_again" | "say_again_late":
                self._say_again()
            case "won":
                won, self._won = self._won, {}
                entries = (self.registry.get(name) for name in won.values())
                self._tell_originals([each for each in entries if each is not None and each.pid.node is self.node])
            case ("ensure_swarm_started_on_remote_node", Atom() as node):
                if node in self._retries:
                    self._emit(AskApplications(node))
            case ("retry", int() as tag):
                self.placement.retry(tag)

    def _call(self, call: Call) -> None:
        request, caller = call.request, call.caller
        if isinstance(request, Whereis):
            self.placement.whereis(request.name, caller)
            return
        if not self.joined:
            if len(self._postponed) < MAX_POSTPONED_CALLS:
                self._postponed.append(call)
            else:
                self.reply(caller, messages.error(messages.OVERLOADED))
            return
        match request:
            case Track(name, pid, meta):
                self.reply(caller, self.register(name, pid, meta))
            case StartAndTrack(name, meta):
                self.placement.start(name, meta, caller)
            case Untrack(pid):
                entries = self._claims.of_pid(pid)
                if entries:
                    self._doubt(pid)
                    self.take_back(entries)
                self.reply(caller, messages.done())
            case UntrackName(name):
                entry = self.registry.get(name)
                if entry is not None:
                    self.take_back([entry])
                self.reply(caller, messages.done())
            case AddMeta(key, value, pid):
                self._change_meta(pid, lambda meta: with_property(meta, key, value))
                self.reply(caller, messages.done())
            case RemoveMeta(key, pid):
                self._change_meta(pid, lambda meta: without_property(meta, key))
                self.reply(caller, messages.done())
            case HandOver(name, state):
                self.placement.hand_over(name, state)
                self.reply(caller, messages.finished())

    # Nodes.

    def _ignores(self, node: Atom) -> bool:
        return ignores(node.name, self._blacklist, self._whitelist)

    def _member(self, node: Atom) -> _Member | None:
        member = self._members.get(node)
        if member is None and node is not self.node and not self._ignores(node):
            return self._new_member(node, is_gater=False)
        return member

    def _new_member(self, node: Atom, is_gater: bool) -> _Member:
        self._note("nodeup", node=node)
        self._plain_nodes.discard(node)
        self._retries.pop(node, None)
        member = self._members[node] = _Member(is_gater, self._now)
        self.strategy.add_node(node)
        if not is_gater and len(self._members) > 1:
            self._emit(SetTimer("say_again", SAY_AGAIN_S[0]))
        self._contest_again()
        if self.state is not State.CLUSTER_WAIT:
            self.placement.topology_change()
        return member

    def _node_up(self, node: Atom, has_swarm: bool, is_gater: bool) -> None:
        if node is self.node or self._ignores(node):
            return
        member = self._members.get(node)
        if member is None:
            if has_swarm:
                self._new_member(node, is_gater)
            else:
                self._not_yet(node)
        elif is_gater and not member.gater:
            member.gater = True
            self._contest_again()
            pending = self._pending_sync_reqs.pop(node, None)
            if pending is not None:
                self._answer(node, pending.sender, pending.clock)

    def _say_again(self) -> None:
        """An original that has lost us, and nobody else, tells the others that our processes are gone. They believe it
        and we do not hear of it; what they still know they ignore."""
        originals = [node for node in self._members if self._is_original(node)]
        ours = self.registry.on_node(self.node)
        if len(ours) > SAY_AGAIN_NAMES:
            for node in originals:
                self._ask_again(self._members[node])
            return
        self._tell_originals(ours)

    def _not_yet(self, node: Atom) -> None:
        self._plain_nodes.add(node)
        attempts = self._retries.pop(node, 0)
        if attempts < RETRY_MAX_ATTEMPTS:
            self._retries[node] = attempts + 1
            self._emit(SetTimer(("ensure_swarm_started_on_remote_node", node), RETRY_INTERVAL_S))

    def _node_down(self, node: Atom) -> None:
        self._plain_nodes.discard(node)
        self._retries.pop(node, None)
        self._pending_sync_reqs.pop(node, None)
        self._awaiting.pop(node, None)
        self._jobs = deque(job for job in self._jobs if job.node is not node)
        self._held.pop(node, None)
        if self._sync_node is node:
            self._end_sync()
        if self._is_original(node) and len(self._members) > 1:
            self._emit(SetTimer("say_again", SAY_AGAIN_S[0]))
            self._emit(SetTimer("say_again_late", SAY_AGAIN_S[1]))
        if self._members.pop(node, None) is not None:
            self._note("nodedown", node=node)
            self.strategy.remove_node(node)
            self._contest_again()
        self._add_job(_Purge(node, self._claims.pids_on_node(node)))
        self.placement.topology_change()

    def _tracker_down(self, node: Atom) -> None:
        member = self._members.get(node)
        if member is None:
            return
        self._awaiting.pop(node, None)
        if self._sync_node is node:
            self._end_sync()
        # Supervisors start trackers again; what the new one knows has to be seen.
        member.sync_due = self._now + RETRY_INTERVAL_S

    # Syncing.

    def _settle(self) -> None:
        """Be in the state that follows from what is going on, and begin what is due."""
        while self.state is not State.CLUSTER_WAIT:
            if self._sync_node is not None:
                self.state = State.SYNCING
                return
            if self._awaiting:
                self.state = State.AWAITING_SYNC_ACK
                return
            due = self._due()
            if due:
                # Originals that wait for us come last: then there is something to tell them.
                free = [node for node in due if node not in self._pending_sync_reqs]
                self._start_sync(self.options.random.choice(free or due))
                continue
            self.state = State.TRACKING
            if self.joined:
                return
            self._join()

    def _due(self) -> list[Atom]:
        return [
            node
            for node, member in self._members.items()
            if member.sync_due is not None and member.sync_due <= self._now and node not in self._held
        ]

    def _join(self) -> None:
        """The first round is over, or has taken too long: what waited for it can go on."""
        self.joined = True
        self._join_deadline = None
        self._resolve_pending_sync_requests()
        while self._postponed:
            self._call(self._postponed.popleft())

    def _leave_cluster_wait(self) -> None:
        if not self._anti_entropy_runs:
            self._anti_entropy_runs = True
            if not self.joined:
                self._join_deadline = self._now + JOIN_TIMEOUT_S
            self._emit(SetTimer("anti_entropy", self.options.anti_entropy_interval_s))

    def _start_sync(self, node: Atom) -> None:
        pending = self._pending_sync_reqs.pop(node, None)
        if pending is not None and not self._waits_for(node, pending.clock):
            # It has asked us before, and will not answer before it is answered; its acknowledgement tells as much.
            self._answer_crossing(node, pending)
            return
        self._sync_node = node
        self._sync_deadline = self._now + self.options.sync_timeout_s
        self._emit(MonitorTracker(node))
        self._send((node,), Sync(self.pid, self._clock))

    def _end_sync(self) -> None:
        self._sync_node = self._sync_deadline = None
        self._crossing = None

    def _sync_failed(self, node: Atom) -> None:
        self._end_sync()
        self._emit(DemonitorTracker(node))
        member = self._members.get(node)
        if member is not None:
            member.failures += 1
            backoff = self.options.sync_timeout_s * 2 ** min(member.failures - 1, 10)
            member.sync_due = self._now + min(backoff, MAX_SYNC_BACKOFF_S)

    def _anti_entropy(self) -> None:
        self._emit(SetTimer("anti_entropy", self.options.anti_entropy_interval_s))
        quiet = [member for member in self._members.values() if member.sync_due is None]
        if quiet:
            min(quiet, key=lambda member: member.last_sync).sync_due = self._now

    def _sync(self, node: Atom, member: _Member, message: Sync) -> None:
        if self.state is State.CLUSTER_WAIT and self.nodes == [node]:
            self._note("joining cluster by sync request", node=node)
            self.state = State.AWAITING_SYNC_ACK
            mine, theirs = self._fork(message.clock, message.clock)
            self._set_clock(mine)
            self._answer(node, message.sender, theirs)
        elif self._sync_node is node:
            self._crossing_sync(node, message)
        elif self.joined or member.gater:
            self._answer(node, message.sender, message.clock)
        else:
            self._pending_sync_reqs[node] = message

    def _crossing_sync(self, node: Atom, message: Sync) -> None:
        """We asked `node` while it asked us: one of us begins."""
        if self._waits_for(node, message.clock):
            self._crossing = message, self._now + CROSSING_TIMEOUT_S
        else:
            self._end_sync()
            self._answer_crossing(node, message)

    def _waits_for(self, node: Atom, clock: Clock) -> bool:
        """Of two that ask each other: is it for `node` to answer first?"""
        order = itc.compare(self._clock, clock)
        return order == "lt" or (order != "gt" and node.name.encode() > self.node.name.encode())

    def _answer_crossing(self, node: Atom, message: Sync) -> None:
        mine, theirs = self._fork(self._clock, message.clock)
        self._set_clock(mine)
        self._answer(node, message.sender, theirs)

    def _resolve_pending_sync_requests(self) -> None:
        pending, self._pending_sync_reqs = self._pending_sync_reqs, {}
        for node, message in pending.items():
            if node in self._members:
                mine, theirs = self._fork(self._clock, message.clock)
                self._set_clock(mine)
                self._answer(node, message.sender, theirs)

    def _answer(self, node: Atom, tracker: Pid, clock: Clock) -> None:
        self._awaiting[node] = self._now + self.options.sync_timeout_s
        self._emit(MonitorTracker(node))
        self._send((tracker,), SyncRecv(self.pid, clock, self._snapshot(node)))

    def _fork(self, clock: Clock, otherwise: Clock) -> tuple[Clock, Clock]:
        """Our half of a clock, and theirs; nothing is divided for ever: too deep a clock stays ours, theirs theirs."""
        if itc.is_anonymous(clock) or itc.identity_depth(clock) >= MAX_FORK_DEPTH:
            return self._clock, otherwise
        return itc.fork(clock)

    def _snapshot(self, node: Atom) -> list[Entry]:
        """What to tell `node`. The original takes our word for all; ours asks our other trackers themselves."""
        left_out = {each for each, member in self._members.items() if member.gater and each is not node}
        if not left_out or not self._is_gater(node):
            return self.registry.entries()
        return [entry for entry in self.registry if entry.pid.node not in left_out]

    # Merging.

    def _add_job(self, job: _Merge | _Purge) -> None:
        self._jobs.append(job)
        self._held.setdefault(job.node, deque())

    def _merge_later(self, node: Atom, message: SyncRecv | SyncAck) -> None:
        ours = isinstance(message, SyncRecv) and node is self._sync_node
        if ours:
            self._sync_deadline = self._crossing = None
        if isinstance(message, SyncAck) and node in self._awaiting:
            self._awaiting[node] = float("inf")
        # What makes us want its registry again while we merge this one is not settled by it.
        self._members[node].sync_due = None
        entries: list[Term] | IncomingList
        if isinstance(message.entries, IncomingList):
            entries = message.entries
        else:
            entries = list(message.entries)
            entries.reverse()
        member = self._members[node]
        job = _Merge(node, replace(message, entries=()), entries, self._now, ours)
        # Not every word of an original: two of them can disagree for ever.
        job.compare = member.gater or not member.synced
        self._add_job(job)

    def _work(self) -> None:
        budget = self.options.merge_chunk
        while self._jobs and budget > 0:
            job = self._jobs[0]
            if isinstance(job, _Merge):
                while job.entries and budget > 0:
                    self._merge_entry(job, job.entries.pop())
                    budget -= 1
                if not job.entries:
                    budget -= 1
                    # Nearly always the node lists all that we know of it: there is nothing to look for.
                    all_listed = len(job.listed) == self._claims.names_on_node(job.node)
                    stale = [] if all_listed else self._claims.pids_on_node(job.node)
                    self._jobs[0] = _Purge(job.node, stale, merged=job)
            else:
                while job.pids and budget > 0:
                    budget -= max(1, self._purge(job, job.pids.pop()))
                listed = job.merged.listed if job.merged is not None else set()
                while not job.pids and listed and budget > 0:
                    for _ in range(min(FORGET_CHUNK, len(listed))):
                        listed.pop()
                    budget -= 1
                if not job.pids and not listed:
                    budget -= 1
                    self._jobs.popleft()
                    if job.merged is not None:
                        self._merged(job.merged)
                    self._release(job.node)

    def _release(self, node: Atom) -> None:
        if any(job.node is node for job in self._jobs):
            return
        held = self._held.pop(node, deque())
        while held:
            self._message(node, held.popleft())
            if node in self._held:
                self._held[node].extend(held)
                return

    def _purge(self, job: _Purge, pid: Pid) -> int:
        """Drop what is to be dropped of a process; how many names that was about."""
        entries = self._claims.of_pid(pid)
        for entry in entries:
            if job.merged is not None:
                if not self._is_listed(job.merged, entry):
                    self._is_news(job.merged, self._event(entry.clock), Untrack(pid))
                    self._drop(entry.name, pid)
            elif self._drop(entry.name, pid) is not None and messages.MFA in entry.meta:
                self.placement.lost(entry)
        return len(entries)

    def _is_listed(self, job: _Merge, entry: Entry) -> bool:
        """Does the registry we have merged list this entry, or can it be too young for that?"""
        claim = (name_key(entry.name), entry.pid)
        if claim in job.listed:
            job.listed.discard(claim)
            return True
        since = self._members[job.node].rumours.get(claim)
        if since is None or since <= job.started - VERIFY_AFTER_S:
            return False
        self._verify_later()
        return True

    def _merge_entry(self, job: _Merge, term: Term) -> None:
        try:
            entry = messages.entry_from_term(term)
            shown = self.registry.get(entry.name)
        except RemoteProtocolError as error:
            self._note("bad entry in a registry", node=job.node, reason=str(error))
            return
        owner = entry.pid.node
        known = shown if shown is None or shown.pid == entry.pid else self._claims.find(entry.name, entry.pid)
        if owner is job.node:
            if known is None:
                self._is_news(job, entry.clock, Track(entry.name, entry.pid, entry.meta))
            if shown is None and len(self.registry) < MAX_NAMES:
                self._monitor(entry.pid)
                self._claims.put_first(Entry(entry.name, entry.pid, entry.meta, self._joined(entry.clock)))
            else:
                self._listed(job.node, entry, known)
            if known is not None or self._claims.find(entry.name, entry.pid) is not None:
                job.listed.add((name_key(entry.name), entry.pid))
        elif owner is self.node:
            self._listed_elsewhere(job, entry, known)
        elif known is None and (owner in self._plain_nodes or self._unheard(owner)):
            self._rumour(entry.name, entry.pid)
            self._put(entry.name, entry.pid, entry.meta, self._joined(entry.clock))
        elif job.compare and self._is_original(owner):
            if known is not None and same_meta(known.meta, entry.meta):
                job.agreed[owner] += 1
            else:
                job.disputed[owner] = None

    def _is_news(self, job: _Merge, clock: Clock, change: Change) -> None:
        member = self._members[job.node]
        if job.news is None and member.synced and not member.gater:
            job.news = ReplicaEvent(self.pid, itc.peek(clock), change)

    def _unheard(self, owner: Atom) -> bool:
        member = self._members.get(owner)
        return member is not None and not member.gater and not member.synced

    def _settle_disputes(self, job: _Merge) -> None:
        """Ask the originals of whose processes this member knows more or less than we. One of us has missed a change
        that somebody else made, because it had no connection or heard of it before it heard of the process."""
        for node, member in self._members.items():
            if node is job.node or member.gater or not member.synced:
                continue
            if node in job.disputed or job.agreed[node] != self._claims.names_on_node(node):
                self._ask_again(member)

    def _listed(self, node: Atom, entry: Entry, known: Entry | None) -> None:
        """A member lists a process of its own."""
        member = self._members[node]
        if member.rumours:
            member.rumours.pop((name_key(entry.name), entry.pid), None)
        if known is None:
            self._claim(entry.name, entry.pid, entry.meta, self._joined(entry.clock))
            return
        if known.clock[1] != entry.clock[1] or not same_meta(known.meta, entry.meta):
            order = itc.compare(known.clock, entry.clock)
            if member.gater or order in ("lt", "eq"):
                self._update(known, entry.meta, itc.join(known.clock, entry.clock))
            elif order == "gt":
                if not same_meta(known.meta, entry.meta):
                    # It missed what we know, a change made to its process by somebody else; so may others have.
                    self._broadcast(known.clock, Track(known.name, known.pid, known.meta))
            else:
                self._merge_meta(known, entry.meta, entry.clock)
        self._contest(entry.name)

    def _listed_elsewhere(self, job: _Merge, entry: Entry, known: Entry | None) -> None:
        """A member lists a process of ours."""
        if known is None:
            job.stale[entry.pid] = None
        elif not same_meta(known.meta, entry.meta):
            order = itc.compare(known.clock, entry.clock)
            if order == "lt":
                changed = self._update(known, entry.meta, itc.join(known.clock, entry.clock))
                self._broadcast(changed.clock, Track(changed.name, changed.pid, changed.meta))
            elif order == "concurrent":
                self._merge_meta(known, entry.meta, entry.clock)

    def _merge_meta(self, known: Entry, meta: Meta, clock: Clock) -> None:
        """Two changes to one registration that did not know of each other: both count, and everybody hears."""
        both = self._event(itc.join(known.clock, clock))
        changed = self._update(known, merged_meta(known.meta, meta), both)
        self._broadcast(both, Track(changed.name, changed.pid, changed.meta))

    def _merged(self, job: _Merge) -> None:
        node, message = job.node, job.message
        member = self._members[node]
        for pid in [pid for pid, since in member.doubts.items() if since <= job.started - VERIFY_AFTER_S]:
            del member.doubts[pid]
            if not self._claims.has_pid(pid):
                self._emit(Demonitor(pid))
        if member.doubts:
            # What was said while its registry was on its way may not be in it.
            self._verify_later()
        if job.compare:
            self._settle_disputes(job)
        if job.news is not None:
            self._send([each for each in self._members if self._is_gater(each)], job.news)
        first, member.synced = not member.synced, True
        member.failures = 0
        member.last_sync = self._now
        if isinstance(message, SyncRecv):
            self._send((message.sender,), SyncAck(self.pid, message.clock, self._snapshot(node)))
            if job.ours and self._sync_node is node:
                if not itc.is_anonymous(message.clock):
                    self._set_clock(message.clock)
                self._end_sync()
        elif self._awaiting.get(node) == float("inf"):
            del self._awaiting[node]
        if node is not self._sync_node and node not in self._awaiting:
            self._emit(DemonitorTracker(node))
        if not member.gater:
            if (
                first
                and any(map(self._is_gater, self._members))
                and self._claims.names_on_node(node) <= SAY_AGAIN_NAMES
            ):
                member.sync_due = self._now + RESYNC_SPACING_S
            for pid in job.stale:
                self._disown(node, pid)

    def _disown(self, node: Atom, pid: Pid) -> None:
        """An original lists a name of our process that the process does not have: say what it has."""
        entries = self._claims.of_pid(pid)
        clock = self._event(reduce(itc.join, [entry.clock for entry in entries], self._clock))
        changes: list[Change] = [Untrack(pid)]
        changes += [Track(entry.name, entry.pid, entry.meta) for entry in entries]
        for change in changes:
            self._send((node,), ReplicaEvent(self.pid, itc.peek(clock), change))

    # Events of other trackers.

    def _replica_event(self, node: Atom, member: _Member, clock: Clock, change: Change) -> None:
        owner = change.pid.node
        if owner is node:
            self._owner_says(member, clock, change)
        elif owner is self.node:
            self._told_about_ours(member, clock, change)
        elif owner in self._plain_nodes or self._is_original(owner):
            self._rumoured(clock, change)

    def _owner_says(self, member: _Member, clock: Clock, change: Change) -> None:
        match change:
            case Track(name, pid, meta):
                member.rumours.pop((name_key(name), pid), None)
                known = self._claims.find(name, pid)
                if known is None:
                    self._claim(name, pid, meta, self._joined(clock))
                    if not member.gater and self._was_heard_early(pid):
                        self._doubt(pid)
                    return
                self._hear_meta(member, known, meta, clock)
                self._contest(name)
            case Untrack(pid):
                member.doubts.pop(pid, None)
                entries = self._claims.of_pid(pid)
                meant = [entry for entry in entries if itc.leq(entry.clock, clock)]
                if member.gater or len(entries) == 1:
                    self._drop_all(entries)
                else:
                    self._drop_all(meant)
                if entries and not member.gater and (len(entries) > 1 or not meant):
                    # The original means one of the names, perhaps one we do not know, and says all of them.
                    self._ask_again(member)
            case UpdateMeta(meta, pid):
                for entry in self._claims.of_pid(pid):
                    self._hear_meta(member, entry, meta, clock)

    def _hear_meta(self, owner: _Member | None, entry: Entry, meta: Meta, clock: Clock) -> None:
        """New properties for a process of another node. Of those that an original may not have agreed to, ask it."""
        order = itc.compare(entry.clock, clock)
        if owner is None or not owner.gater:
            if order != "lt" and not same_meta(entry.meta, meta):
                self._doubt(entry.pid)
            if order == "gt":
                return
            if order == "concurrent":
                meta = merged_meta(entry.meta, meta)
        self._update(entry, meta, itc.join(entry.clock, clock))

    def _told_about_ours(self, member: _Member, clock: Clock, change: Change) -> None:
        """Somebody changed a registration of our process. We decide, and say so: others believe only us."""
        pid = change.pid
        entries = self._claims.of_pid(pid)
        match change:
            case Track(name, _, meta):
                holder = next((entry for entry in self._claims.of_name(name) if entry.pid.node is self.node), None)
                if holder is None:
                    if len(self.registry) < MAX_NAMES:
                        self._put(name, pid, meta, self._joined(clock))
                        self._echo(pid)
                        self._contest(name)
                elif holder.pid != pid:
                    self._update(holder, holder.meta, self._event(itc.join(holder.clock, clock)))
                    self._broadcast(self._event(clock), Untrack(pid))
                    self._echo(pid)
                    self._echo(holder.pid)
                elif member.gater or not same_meta(holder.meta, meta):
                    if itc.leq(holder.clock, clock):
                        self._update(holder, meta, itc.join(holder.clock, clock))
                    self._echo(pid)
            case Untrack() if entries and member.synced:
                if all(itc.leq(entry.clock, clock) for entry in entries):
                    self.take_back(entries)
                else:
                    self._echo(pid)
            case UpdateMeta(meta, _) if entries:
                for entry in entries:
                    if itc.leq(entry.clock, clock):
                        self._update(entry, meta, itc.join(entry.clock, clock))
                    elif not itc.leq(clock, entry.clock):
                        merged = self._event(itc.join(entry.clock, clock))
                        self._update(entry, merged_meta(entry.meta, meta), merged)
                self._echo(pid)

    def _echo(self, pid: Pid) -> None:
        """Say again, as the owner, what our process is registered as."""
        for entry in self._claims.of_pid(pid):
            self._broadcast(entry.clock, Track(entry.name, entry.pid, entry.meta))

    def _rumoured(self, clock: Clock, change: Change) -> None:
        """Somebody changed a registration of somebody else's process (not of another gater's: that will say so)."""
        owner = self._members.get(change.pid.node)
        match change:
            case Track(name, pid, meta):
                known = self._claims.find(name, pid)
                if known is not None:
                    self._hear_meta(owner, known, meta, clock)
                elif len(self.registry) < MAX_NAMES:
                    self._rumour(name, pid)
                    self._put(name, pid, meta, self._joined(clock))
            case Untrack(pid):
                entries = self._claims.of_pid(pid)
                if entries:
                    self._doubt(pid)
                    self._drop_all([entry for entry in entries if itc.leq(entry.clock, clock)])
                else:
                    self._heard_early(pid)
            case UpdateMeta(meta, pid):
                entries = self._claims.of_pid(pid)
                for entry in entries:
                    self._hear_meta(owner, entry, meta, clock)
                if not entries:
                    self._heard_early(pid)

    # Rumours.

    def _rumour(self, name: Term, pid: Pid) -> None:
        """A claim that is about to be made is not its owner's word, if the owner is another member."""
        member = self._members.get(pid.node)
        if member is not None:
            member.rumours[name_key(name), pid] = self._now
            self._verify_later()

    def _doubt(self, pid: Pid) -> None:
        member = self._members.get(pid.node)
        if member is not None:
            member.doubts[pid] = self._now
            self._verify_later()

    def _heard_early(self, pid: Pid) -> None:
        """Somebody has changed a registration that we have not heard of, or not any more."""
        early = self._early
        early.pop(pid, None)
        early[pid] = self._now
        while len(early) > MAX_HEARD_EARLY:
            del early[next(iter(early))]

    def _was_heard_early(self, pid: Pid) -> bool:
        since = self._early.pop(pid, None) if self._early else None
        return since is not None and since > self._now - EARLY_S

    def _verify_later(self) -> None:
        if self._verify_at is None:
            self._verify_at = self._now + VERIFY_AFTER_S

    def _verify(self) -> None:
        self._verify_at = None
        for member in self._members.values():
            if not member.doubts and not member.rumours:
                continue
            oldest = min((*member.doubts.values(), *member.rumours.values()))
            if oldest <= self._now - VERIFY_AFTER_S:
                self._ask_again(member)
            else:
                self._verify_later()

    def _ask_again(self, member: _Member) -> None:
        if member.sync_due is None:
            member.sync_due = max(self._now, member.last_sync + RESYNC_SPACING_S)

    # Processes and registrations.

    def _process_down(self, pid: Pid, connection_lost: bool) -> None:
        owner = self._members.get(pid.node)
        if owner is not None:
            owner.doubts.pop(pid, None)
        entries = self._claims.of_pid(pid)
        if not entries:
            return
        if connection_lost and any(messages.MFA in entry.meta for entry in entries):
            self._node_down(pid.node)
            return
        clock = self._event(reduce(itc.join, [entry.clock for entry in entries]))
        self._drop_all(entries)
        if connection_lost:
            # The original tells everybody, and who still sees the process unregisters it. The lost node is no harm.
            to = [pid.node]
        elif pid.node is self.node:
            to = self.nodes
        else:
            to = [node for node in self._members if not self._is_gater(node)]
        self._send(to, ReplicaEvent(self.pid, itc.peek(clock), Untrack(pid)))

    def register(self, name: Term, pid: Pid, meta: Meta) -> Term:
        """Register a process; the reply Swarm gives: `{ok, Pid}` or `{error, {already_registered, Pid}}`."""
        known = self.registry.get(name)
        if known is not None:
            return messages.ok(pid) if known.pid == pid else messages.already_registered(known.pid)
        if len(self.registry) >= MAX_NAMES:
            return messages.error(messages.OVERLOADED)
        clock = self._event(self._clock)
        self._rumour(name, pid)
        self._put(name, pid, meta, clock)
        self._broadcast(clock, Track(name, pid, meta))
        return messages.ok(pid)

    def take_back(self, entries: Sequence[Entry]) -> None:
        """End registrations of one process, and say so. The wire ends all of them, so the others are said again."""
        pid = entries[0].pid
        self._drop_all(entries)
        clock = self._event(reduce(itc.join, [entry.clock for entry in entries]))
        self._broadcast(clock, Untrack(pid))
        for entry in self._claims.of_pid(pid):
            kept = self._update(entry, entry.meta, self._event(itc.join(entry.clock, clock)))
            self._broadcast(kept.clock, Track(kept.name, kept.pid, kept.meta))

    def _change_meta(self, pid: Pid, change: Callable[[Meta], Meta]) -> None:
        entries = self._claims.of_pid(pid)
        if not entries:
            return
        clock = self._event(reduce(itc.join, [entry.clock for entry in entries]))
        changed = [self._update(entry, change(entry.meta), clock) for entry in entries]
        if all(same_meta(entry.meta, changed[0].meta) for entry in changed):
            self._broadcast(clock, UpdateMeta(changed[0].meta, pid))
        else:
            # `update_meta` gives all names of a process the same properties.
            for entry in changed:
                self._broadcast(clock, Track(entry.name, pid, entry.meta))

    def adopt(self, name: Term, pid: Pid, meta: Meta, seen: Clock) -> None:
        """Register a process that goes on for another one, which `seen` is the clock of, and tell everybody."""
        clock = self._joined(seen)
        self._rumour(name, pid)
        self._put(name, pid, meta, clock)
        self._broadcast(clock, Track(name, pid, meta))

    def _claim(self, name: Term, pid: Pid, meta: Meta, clock: Clock) -> None:
        """The owner of `pid` says that it has this name: no other process there has it any more."""
        if len(self.registry) >= MAX_NAMES:
            self._note("a name too many", name=name, limit="MAX_NAMES")
            return
        for other in self._claims.of_name(name):
            if other.pid.node is pid.node and other.pid != pid:
                self._drop(name, other.pid)
        self._put(name, pid, meta, clock)
        if not self._claims.peaceful:
            for rival in self._claims.of_name(name)[1:]:
                # An original that gives way tells only whom it knows, which need not be us yet.
                self._doubt(rival.pid)
            self._contest(name)

    def _contest(self, name: Term) -> None:
        """If a process of ours has this name too, one must go, or be said louder."""
        if self._claims.peaceful:
            return
        self._claims.rank(name)
        claims = self._claims.of_name(name)
        if len(claims) < 2:
            return
        ours = next((entry for entry in claims if entry.pid.node is self.node), None)
        if ours is None:
            return
        if ours is not claims[0]:
            self._note("name lost", name=name, to=claims[0].pid)
            self.take_back([ours])
            self._emit(Die(ours.pid))
            return
        if any(self._is_gater(entry.pid.node) and not self._is_rumour(entry) for entry in claims[1:]):
            self._emit(Kept(name, ours.pid))
        rivals = [entry for entry in claims[1:] if self._is_original(entry.pid.node) and not self._is_rumour(entry)]
        if rivals:
            clock = ours.clock
            if not all(itc.leq(rival.clock, clock) for rival in rivals):
                clock = self._event(reduce(itc.join, [itc.peek(rival.clock) for rival in rivals], clock))
            ours = self._update(ours, ours.meta, clock)
            self._broadcast(ours.clock, Track(name, ours.pid, ours.meta))

    def _contest_again(self) -> None:
        """Who is a member, and of which kind, has changed, and `_better` with it."""
        for entry in self._claims.contested():
            self._contest(entry.name)

    def _better(self, one: Entry, other: Entry) -> bool:
        """Which of two claims to a name shows: the same on every member once it has heard the same."""
        if self._is_gone(one.pid.node) != self._is_gone(other.pid.node):
            return self._is_gone(other.pid.node)
        if self._is_rumour(one) != self._is_rumour(other):
            return self._is_rumour(other)
        here, there = one.pid.node, other.pid.node
        if here is there:
            return _age(one.pid) > _age(other.pid)
        if (here in self._plain_nodes) != (there in self._plain_nodes):
            return there in self._plain_nodes
        ours, theirs = self._is_gater(here), self._is_gater(there)
        if ours and theirs:
            return here.name < there.name
        if ours != theirs:
            return self._beats_original(one, other) if ours else not self._beats_original(other, one)
        order = itc.compare(one.clock, other.clock)
        if order in ("lt", "gt"):
            return order == "gt"
        owner = self.strategy.key_to_node(one.name)
        return here is owner or (there is not owner and here.name < there.name)

    def _beats_original(self, ours: Entry, original: Entry) -> bool:
        """Will an original that has `original` give way to `ours`? (`handle_replica_event`, `sync_registry`)"""
        order = itc.compare(original.clock, ours.clock)
        if order == "concurrent":
            return self.strategy.key_to_node(ours.name) is not original.pid.node
        return order != "gt"

    def _is_gone(self, node: Atom) -> bool:
        """Is this node down, and its names only not dropped yet?"""
        return node is not self.node and node not in self._members and node not in self._plain_nodes

    def _is_gater(self, node: Atom) -> bool:
        member = self._members.get(node)
        return node is self.node if member is None else member.gater

    def _is_original(self, node: Atom) -> bool:
        member = self._members.get(node)
        return member is not None and not member.gater

    def _is_rumour(self, entry: Entry) -> bool:
        member = self._members.get(entry.pid.node)
        return member is not None and bool(member.rumours) and (name_key(entry.name), entry.pid) in member.rumours

    def _monitor(self, pid: Pid) -> None:
        """Before the first claim of a process: ours, or of a member that may not tell its end."""
        if (pid.node is self.node or not self._is_gater(pid.node)) and not self._claims.has_pid(pid):
            self._emit(Monitor(pid))

    def _put(self, name: Term, pid: Pid, meta: Meta, clock: Clock) -> Entry:
        self._monitor(pid)
        entry = Entry(name, pid, meta, clock)
        self._claims.put(entry)
        return entry

    def _update(self, entry: Entry, meta: Meta, clock: Clock) -> Entry:
        if same_meta(entry.meta, meta):
            meta = entry.meta
            if entry.clock == clock:
                return entry
        return self._put(entry.name, entry.pid, meta, clock)

    def _drop(self, name: Term, pid: Pid) -> Entry | None:
        entry = self._claims.drop(name, pid)
        if entry is None:
            return None
        member = self._members.get(pid.node)
        if member is not None and member.rumours:
            member.rumours.pop((name_key(name), pid), None)
        if not self._claims.has_pid(pid) and (member is None or pid not in member.doubts):
            self._emit(Demonitor(pid))
        shown = self.registry.get(name)
        if shown is not None and shown.pid.node is self.node:
            # Originals that had the other claim have nothing now, or will have: until then they ignore ours.
            self._tell_originals([shown])
            if not self._won:
                self._emit(SetTimer("won", VERIFY_AFTER_S))
            self._won[name_key(name)] = name
        return entry

    def _tell_originals(self, entries: Iterable[Entry]) -> None:
        originals = [node for node in self._members if self._is_original(node)]
        for entry in entries:
            self._send(
                originals, ReplicaEvent(self.pid, itc.peek(entry.clock), Track(entry.name, entry.pid, entry.meta))
            )

    def _drop_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._drop(entry.name, entry.pid)

    # Clocks.

    def _set_clock(self, clock: Clock) -> None:
        self._clock = clock
        self._shared_clocks.clear()

    def _joined(self, seen: Clock) -> Clock:
        """The clock of an entry that is new to us."""
        clock = self._shared_clocks.get(seen[1])
        if clock is None:
            if len(self._shared_clocks) >= MAX_SHARED_CLOCKS:
                self._shared_clocks.clear()
            clock = self._shared_clocks[seen[1]] = itc.join(self._clock, itc.peek(seen))
        return clock

    def _event(self, clock: Clock) -> Clock:
        return itc.event((self._clock[0], clock[1]) if itc.is_anonymous(clock) else clock)

    # What goes out.

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def emit(self, effect: Effect) -> None:
        """Add an effect to what `receive` returns (for `placement.py`)."""
        self._effects.append(effect)

    def reply(self, caller: Hashable, value: Term) -> None:
        """Answer a caller, if there is one."""
        if caller is not None:
            self._emit(Reply(caller, value))

    def _broadcast(self, clock: Clock, change: Change) -> None:
        self._send(self._members, ReplicaEvent(self.pid, itc.peek(clock), change))

    def _send(self, to: Iterable[Atom | Pid], message: Message) -> None:
        receivers = tuple(to)
        if receivers:
            self._emit(Send(receivers, message))

    def _note(self, event: str, **fields: object) -> None:
        self._emit(Note(event, tuple(fields.items())))

    # Time.

    def _wake(self) -> None:
        self._wake_at = None
        if self._sync_node is not None and self._sync_deadline is not None and self._sync_deadline <= self._now:
            self._note("no answer to sync", node=self._sync_node)
            self._sync_failed(self._sync_node)
        if self._crossing is not None and self._crossing[1] <= self._now:
            message = self._crossing[0]
            self._note("beginning after all", node=message.sender.node)
            self._end_sync()
            self._answer_crossing(message.sender.node, message)
        for node in [node for node, deadline in self._awaiting.items() if deadline <= self._now]:
            self._note("no sync_ack", node=node)
            del self._awaiting[node]
            self._emit(DemonitorTracker(node))
        if self._join_deadline is not None and self._join_deadline <= self._now:
            self._note("joined without all", waiting_for=self._sync_node)
            self._join()
        if self._verify_at is not None and self._verify_at <= self._now:
            self._verify()

    def _arm(self) -> None:
        """Have `wake` fire at the next deadline, or earlier: it does no harm."""
        if self.state is not State.CLUSTER_WAIT:
            self._leave_cluster_wait()
        deadlines = list(self._deadlines())
        if deadlines and (self._wake_at is None or min(deadlines) < self._wake_at):
            self._wake_at = min(deadlines)
            self._emit(SetTimer("wake", max(0.0, self._wake_at - self._now)))

    def _deadlines(self) -> Iterator[float]:
        if self._sync_deadline is not None:
            yield self._sync_deadline
        if self._crossing is not None:
            yield self._crossing[1]
        if self._join_deadline is not None:
            yield self._join_deadline
        if self._verify_at is not None:
            yield self._verify_at
        for deadline in self._awaiting.values():
            if deadline != float("inf"):
                yield deadline
        if self.state is not State.CLUSTER_WAIT:
            for member in self._members.values():
                if member.sync_due is not None and member.sync_due > self._now:
                    yield member.sync_due


def _age(pid: Pid) -> tuple[int, int, int]:
    """Swarm calls the greater of two pids of one node the more recent."""
    return pid.creation, pid.serial, pid.id
