"""What goes into the tracker and what comes out: the whole interface between `tracker.py` and whoever runs it.

`Tracker.receive(event, now)` takes one of `Event` and returns a list of `Effect`, to be carried out in that order.
Times are seconds; `now` comes from a monotonic clock. The runner promises:

- What one node says arrives in the order it was said, and after `NodeDown` nothing of the lost connection arrives.
  `NodeDown` of a lost connection comes before anything of the next one with the same node. `NodeUp` may come late.
- `Send` to a node without a connection is dropped: it never connects.
- A monitored process that is dead already, or on a node that is not connected, gives `ProcessDown`.
- `Resume` is given back soon, after other work had its turn.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

from gater.erl.terms import Atom, Pid, Term
from gater.swarm.messages import Message, Request, StartAndTrack
from gater.swarm.registry import Entry

# Events.


@dataclass(frozen=True, slots=True)
class NodeUp:
    """A node is connected; its `application:which_applications/0` lists `swarm` (`has_swarm`), `gater` (`is_gater`)."""

    node: Atom
    has_swarm: bool
    is_gater: bool = False


@dataclass(frozen=True, slots=True)
class NodeDown:
    """The connection to a node is lost."""

    node: Atom


@dataclass(frozen=True, slots=True)
class Received:
    """The tracker of `node` said this."""

    node: Atom
    message: Message


@dataclass(frozen=True, slots=True)
class ProcessDown:
    """A monitored process is dead, or (`connection_lost`) cannot be seen any more."""

    pid: Pid
    connection_lost: bool = False


@dataclass(frozen=True, slots=True)
class TrackerDown:
    """The tracker of a connected node, monitored with `MonitorTracker`, is gone."""

    node: Atom


@dataclass(frozen=True, slots=True)
class Call:
    """Somebody asks; `caller` comes back in `Reply`. None wants no reply."""

    caller: Hashable
    request: Request


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of `StartProcess`, `CallTracker`, `AskRegistry` or `BeginHandoff` with this tag: its value."""

    tag: int
    value: Term


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not come to a value: `undef`, `noproc`, `nodedown`, or any other reason."""

    tag: int
    reason: Term


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time of `SetTimer` has passed."""

    timer: Hashable


@dataclass(frozen=True, slots=True)
class Resume:
    """As an effect: there is more to do, but not all at once. As an event: go on."""


Event: TypeAlias = (
    NodeUp
    | NodeDown
    | Received
    | ProcessDown
    | TrackerDown
    | Call
    | Answered
    | Failed
    | TimerFired
    | Resume
)  # fmt: skip

# Effects.


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to trackers: to each node's by its name, or to one by its pid."""

    to: tuple[Atom | Pid, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a caller with this term."""

    caller: Hashable
    value: Term


@dataclass(frozen=True, slots=True)
class Monitor:
    """Say `ProcessDown` when this process is gone. Asked once for a process, whatever the number of its names."""

    pid: Pid


@dataclass(frozen=True, slots=True)
class Demonitor:
    """Its end is of no more interest (or never was: ignore what is not monitored)."""

    pid: Pid


@dataclass(frozen=True, slots=True)
class MonitorTracker:
    """Say `TrackerDown` when the tracker of this node is gone."""

    node: Atom


@dataclass(frozen=True, slots=True)
class DemonitorTracker:
    """The end of that tracker is of no more interest."""

    node: Atom


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Say `TimerFired` after this time; the same timer set again starts anew."""

    timer: Hashable
    after_s: float


@dataclass(frozen=True, slots=True)
class Changed:
    """What everybody sees under a name has changed: for those who watch."""

    name: Term
    old: Entry | None
    new: Entry | None


@dataclass(frozen=True, slots=True)
class Die:
    """`{swarm, die}` to a process that has lost its name."""

    pid: Pid


@dataclass(frozen=True, slots=True)
class Kept:
    """A process of ours keeps its name, which another one of our trackers has had registered too."""

    name: Term
    pid: Pid


@dataclass(frozen=True, slots=True)
class Kill:
    """`exit(Pid, kill)`: a process that was started for a name which somebody else has got meanwhile."""

    pid: Pid


@dataclass(frozen=True, slots=True)
class BeginHandoff:
    """Call `{swarm, begin_handoff}` of a process that should move: `ignore`, `restart` or `{resume, State}`."""

    tag: int
    pid: Pid


@dataclass(frozen=True, slots=True)
class EndHandoff:
    """Cast `{swarm, end_handoff, State}` to the process that goes on."""

    pid: Pid
    state: Term


@dataclass(frozen=True, slots=True)
class ResolveConflict:
    """Cast `{swarm, resolve_conflict, State}` to the process that goes on, with the state of the one that ended."""

    pid: Pid
    state: Term


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Run `apply(Module, Function, Args)` on a node (ours: only what is exported); the value is what it returns."""

    tag: int
    node: Atom
    mfa: tuple[Term, Term, Term]


@dataclass(frozen=True, slots=True)
class CallTracker:
    """`gen_statem:call` of the tracker of another node; the value is its reply."""

    tag: int
    node: Atom
    request: StartAndTrack


@dataclass(frozen=True, slots=True)
class AskRegistry:
    """`rpc` of `Swarm.Registry.get_by_name(Name)` on a node; the value is the pid of the entry, or None."""

    tag: int
    node: Atom
    name: Term


@dataclass(frozen=True, slots=True)
class AskApplications:
    """Ask a connected node for its applications again; answered by `NodeUp`."""

    node: Atom


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth a line in the log: event name, then fields."""

    event: str
    fields: tuple[tuple[str, object], ...] = ()


Effect: TypeAlias = (
    Send
    | Reply
    | Monitor
    | Demonitor
    | MonitorTracker
    | DemonitorTracker
    | SetTimer
    | Changed
    | Die
    | Kept
    | Kill
    | BeginHandoff
    | EndHandoff
    | ResolveConflict
    | StartProcess
    | CallTracker
    | AskRegistry
    | AskApplications
    | Resume
    | Note
)
