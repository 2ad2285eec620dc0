"""Keeps the nodes that are wanted connected: who is to be tried, when, and what became of it.

`ReconnectPlan` decides: a state machine without clock, sockets or event loop. A name is wanted for ever (the static
list) or until it was neither heard nor connected for `FORGET_AFTER_S` (gossip, DNS). Each name has at most one attempt
under way; after a failure the next one waits twice as long, with jitter, up to a cap. `Connector` is the thin shell
that feeds the plan and carries out its attempts. How names are found is `strategy.py`'s and `gossip.py`'s business.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, Protocol, TypeAlias

import structlog

from gater.erl.errors import ErlError
from gater.erl.handshake import node_name_fault
from gater.erl.terms import Atom

FIRST_RETRY_S: Final = 0.25
"""The wait after a first failure or a loss. A node that restarts listens again within seconds; a second gateway that
lost the same node at the same moment tries at another one, by the jitter."""

STRANGER_CAP_S: Final = 60.0
"""The longest wait between attempts at a found name that has never been connected, if the retry interval is shorter:
names that anyone on the network can make up must not cost a connection every few seconds each."""

STABLE_AFTER_S: Final = 10.0
"""A connection that lasted this long was a success. One that ends sooner counts as another failure, so that a peer
which accepts and hangs up is tried ever less often too."""

FORGET_AFTER_S: Final = 300.0
"""A found name that was neither heard nor connected for this long is given up. 60 of gossip's longest intervals: the
node is gone, and if it comes back it will be heard."""

MAX_FOUND: Final = 256
"""Names wanted at one time besides the static list, whose own limit is that of its setting. ExESDB clusters have
three to nine nodes; this leaves room for whole fleets of gateways."""

MAX_ATTEMPTS: Final = 32
"""Attempts under way at one time, all names together: each holds a socket and maybe a thread that resolves a name."""

EXPENDABLE_AFTER: Final = 3
"""Failed attempts after which a found name that was never connected makes room for a new one when all places are taken:
made-up names must not keep real ones out for `FORGET_AFTER_S`."""

REPORT_EVERY_S: Final = 60.0
"""Refused names are reported at most this often."""

PeerState: TypeAlias = Literal["connecting", "up", "waiting"]
Verdict: TypeAlias = Literal["new", "known", "ourselves", "invalid", "full"]

log = structlog.get_logger(__name__)


class NodeConnections(Protocol):
    """What the connector needs of `gater.erl.node.Node`."""

    @property
    def name(self) -> Atom:
        """This node's own name."""

    def nodes(self) -> list[Atom]:
        """The connected peers."""

    async def connect(self, peer: str | Atom) -> None:
        """Connect, or raise `ErlError`."""

    def monitor_nodes(self, watcher: Callable[[Atom, bool, str], None]) -> Callable[[], None]:
        """Call `watcher(peer, is_up, reason)` at every change, until the function returned is called."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One wanted node, for status pages and logs."""

    peer: str
    state: PeerState
    sources: tuple[str, ...]
    """Who wants it: `static`, `gossip`, `dns`, .."""
    forever: bool
    attempts: int
    """Failed attempts since the last lasting connection."""
    last_error: str | None
    """Why the last attempt failed or the last connection ended; None if neither ever happened."""
    next_attempt_in_s: float | None
    """None unless `waiting`. 0: as soon as one of `MAX_ATTEMPTS` is free."""


class _Wanted:
    """What the plan knows of one name."""

    __slots__ = ("attempting", "attempts", "due", "error", "forever", "last_wanted", "sources", "up_since", "was_up")

    def __init__(self, now: float) -> None:
        self.sources: set[str] = set()
        self.forever = False
        self.last_wanted = now
        self.attempting = False
        self.attempts = 0
        self.due = now
        self.up_since: float | None = None
        self.was_up = False
        self.error: str | None = None

    @property
    def state(self) -> PeerState:
        if self.up_since is not None:
            return "up"
        return "connecting" if self.attempting else "waiting"

    @property
    def idle(self) -> bool:
        """Whether nothing goes on with it but waiting."""
        return self.up_since is None and not self.attempting


class ReconnectPlan:
    """Whom to connect to and when. Events go in with their time (seconds, any steady clock); `attempts` is the effect.

    `up` and `down` are the truth about connections; `attempt_ended` only ends an attempt. Names nobody wants may be
    reported too and are ignored.
    """

    def __init__(self, own_name: str, *, retry_interval_s: float, random: Random) -> None:
        self._own_name = own_name
        self._retry_interval_s = retry_interval_s
        self._random = random
        self._wanted: dict[str, _Wanted] = {}
        self._found = 0
        self._attempting = 0

    def want(self, peer: str, source: str, now: float, *, forever: bool, is_up: bool = False) -> Verdict:
        """`source` names `peer` (again). `is_up`: whether it is connected already, for names not known yet."""
        wanted = self._wanted.get(peer)
        if wanted is None:
            if peer == self._own_name:
                return "ourselves"
            if node_name_fault(peer) is not None:
                return "invalid"
            if not forever and self._found >= MAX_FOUND and not self._make_room():
                return "full"
            wanted = self._wanted[peer] = _Wanted(now)
            self._found += not forever
            wanted.forever = forever
            wanted.sources.add(source)
            if is_up:
                self.up(peer, now)
            return "new"
        wanted.last_wanted = now
        wanted.sources.add(source)
        if forever and not wanted.forever:
            wanted.forever = True
            self._found -= 1
        return "known"

    def up(self, peer: str, now: float) -> None:
        """A connection to `peer` stands, whoever opened it."""
        wanted = self._wanted.get(peer)
        if wanted is not None and wanted.up_since is None:
            wanted.up_since = now
            wanted.was_up = True

    def down(self, peer: str, reason: str, now: float) -> None:
        """The connection to `peer` has ended."""
        wanted = self._wanted.get(peer)
        if wanted is None or wanted.up_since is None:
            return
        if now - wanted.up_since >= STABLE_AFTER_S:
            wanted.attempts = 0
        wanted.up_since = None
        wanted.last_wanted = now
        wanted.error = reason
        if not wanted.attempting:
            self._wait(wanted, now)

    def attempt_ended(self, peer: str, error: str | None, now: float) -> None:
        """The attempt that `attempts` asked for is over; `error` is why it failed."""
        wanted = self._wanted.get(peer)
        if wanted is None or not wanted.attempting:
            return
        wanted.attempting = False
        self._attempting -= 1
        if error is not None:
            wanted.error = error
        if wanted.up_since is None:
            self._wait(wanted, now)

    def attempts(self, now: float) -> list[str]:
        """The names to connect to now. Each is under way until its `attempt_ended`."""
        self._forget_unheard(now)
        free = MAX_ATTEMPTS - self._attempting
        if free <= 0:
            return []
        due = sorted((wanted.due, peer) for peer, wanted in self._wanted.items() if wanted.idle and wanted.due <= now)
        chosen = [peer for _, peer in due[:free]]
        for peer in chosen:
            self._wanted[peer].attempting = True
        self._attempting += len(chosen)
        return chosen

    def next_time(self) -> float | None:
        """When `attempts` should be asked again if no event comes before; None: not at all."""
        times = [wanted.last_wanted + FORGET_AFTER_S for wanted in self._wanted.values() if self._forgettable(wanted)]
        if self._attempting < MAX_ATTEMPTS:
            times += [wanted.due for wanted in self._wanted.values() if wanted.idle]
        return min(times, default=None)

    def status(self, now: float) -> list[PeerStatus]:
        """Every wanted name, sorted."""
        return [
            PeerStatus(
                peer,
                wanted.state,
                tuple(sorted(wanted.sources)),
                wanted.forever,
                wanted.attempts,
                wanted.error,
                max(0.0, wanted.due - now) if wanted.idle else None,
            )
            for peer, wanted in sorted(self._wanted.items())
        ]

    def _wait(self, wanted: _Wanted, now: float) -> None:
        stranger = not wanted.forever and not wanted.was_up
        cap = max(self._retry_interval_s, STRANGER_CAP_S) if stranger else self._retry_interval_s
        wait = min(cap, FIRST_RETRY_S * 2.0 ** min(wanted.attempts, 32))
        wanted.attempts += 1
        wanted.due = now + wait * (0.5 + 0.5 * self._random.random())

    @staticmethod
    def _forgettable(wanted: _Wanted) -> bool:
        return wanted.idle and not wanted.forever

    def _forget(self, peer: str) -> None:
        del self._wanted[peer]
        self._found -= 1

    def _forget_unheard(self, now: float) -> None:
        for peer in [
            peer
            for peer, wanted in self._wanted.items()
            if self._forgettable(wanted) and wanted.last_wanted + FORGET_AFTER_S <= now
        ]:
            self._forget(peer)

    def _make_room(self) -> bool:
        expendable = [
            (wanted.attempts, peer)
            for peer, wanted in self._wanted.items()
            if self._forgettable(wanted) and not wanted.was_up and wanted.attempts >= EXPENDABLE_AFTER
        ]
        if not expendable:
            return False
        self._forget(max(expendable)[1])
        return True


class Connector:
    """Keeps a node connected to the peers that strategies want.

    `retry_interval_s` is the longest wait between attempts at a peer of the static list or one that was connected
    before. `want` may be called before `start` and after `stop`; attempts are made in between.
    """

    def __init__(self, node: NodeConnections, *, retry_interval_s: float, random: Random | None = None) -> None:
        self._node = node
        self._log = log.bind(node=str(node.name))
        self._plan = ReconnectPlan(str(node.name), retry_interval_s=retry_interval_s, random=random or Random())
        self._running = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stop_watching: Callable[[], None] | None = None
        self._logged: dict[str, str] = {}
        self._report_again_at = 0.0
        self.refused: Counter[Verdict] = Counter()
        """Names that were not taken, by why: `invalid` or `full` (`MAX_FOUND`)."""

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        """`source` (`static`, `gossip`, `dns`, `introduction`, `registry`, `members`) names a node that is to be
        connected; call it each time it is heard.

        `forever`: never give it up; otherwise it is forgotten `FORGET_AFTER_S` after it was last heard or connected.
        False if the name is not taken: it is our own, is none, or too many are wanted already.
        """
        now = asyncio.get_running_loop().time()
        is_up = any(each.name == peer for each in self._node.nodes())
        verdict = self._plan.want(peer, source, now, forever=forever, is_up=is_up)
        if verdict == "new":
            self._log.info("node_wanted", peer=peer, source=source)
            self._advance()
        elif verdict in ("invalid", "full"):
            self.refused[verdict] += 1
            self._report_refused(peer, source, verdict, now)
        return verdict in ("new", "known")

    def start(self) -> None:
        """Begin to watch the node's connections and to connect."""
        now = asyncio.get_running_loop().time()
        self._running = True
        self._stop_watching = self._node.monitor_nodes(self._node_changed)
        for peer in self._node.nodes():
            self._plan.up(peer.name, now)
        self._advance()

    def stop(self) -> None:
        """Try nobody any more; connections stay as they are."""
        self._running = False
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in self._tasks.values():
            task.cancel()

    async def tried(self, peers: Iterable[str], timeout_s: float) -> None:
        """Wait until no attempt at one of these is under way, at most so long. Attempts go on if it takes longer."""
        attempts = [self._tasks[peer] for peer in peers if peer in self._tasks]
        if attempts:
            await asyncio.wait(attempts, timeout=timeout_s)

    def status(self) -> list[PeerStatus]:
        """Every wanted node, sorted by name."""
        return self._plan.status(asyncio.get_running_loop().time())

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if is_up:
            self._logged.pop(peer.name, None)
            self._plan.up(peer.name, now)
        else:
            self._plan.down(peer.name, reason, now)
        self._advance()

    def _advance(self) -> None:
        if not self._running:
            return
        loop = asyncio.get_running_loop()
        for peer in self._plan.attempts(loop.time()):
            task = loop.create_task(self._attempt(peer), name=f"connect to {peer}")
            self._tasks[peer] = task
        if self._timer is not None:
            self._timer.cancel()
        at = self._plan.next_time()
        self._timer = None if at is None else loop.call_at(at, self._advance)

    async def _attempt(self, peer: str) -> None:
        error: str | None = "the attempt was given up"
        try:
            await self._node.connect(peer)
            error = None
        except (ErlError, OSError) as failure:
            error = str(failure)
        finally:
            if error is not None and self._running:
                self._log_failure(peer, error)
            del self._tasks[peer]
            self._plan.attempt_ended(peer, error, asyncio.get_running_loop().time())
            self._advance()

    def _log_failure(self, peer: str, error: str) -> None:
        """Each reason once: a node that is away for a day is one line, not one every few seconds."""
        if self._logged.get(peer) != error:
            if len(self._logged) >= 2 * MAX_FOUND:
                self._logged.clear()
            self._logged[peer] = error
            self._log.warning("node_unreachable", peer=peer, reason=error)

    def _report_refused(self, peer: str, source: str, verdict: Verdict, now: float) -> None:
        if now >= self._report_again_at:
            self._report_again_at = now + REPORT_EVERY_S
            self._log.warning(
                "node_names_refused", last=peer[:300], source=source, why=verdict, refused=dict(self.refused)
            )
