"""Processes that Swarm places: started where the ring says, moved when it changes, started again when a node dies.

The second half of `Swarm.Tracker` of Swarm 3.4: `do_track`, `start_pid_remotely`, `handle_topology_change`,
`handle_handoff`. Such a process is registered with `mfa` in its meta. What the ring gives to us and we cannot run (a
function of an Elixir module) is started on the next node of the ring that can, and answered with that pid.

Where the original waits inside the tracker for a process or another node, every step here is an effect and its answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from gater.erl.terms import Atom, Pid, Term
from gater.swarm import messages
from gater.swarm.clock import Clock, peek
from gater.swarm.events import (
    AskRegistry,
    BeginHandoff,
    CallTracker,
    Die,
    Effect,
    EndHandoff,
    Kill,
    Note,
    ResolveConflict,
    Send,
    SetTimer,
    StartProcess,
)
from gater.swarm.messages import MFA, Handoff, StartAndTrack
from gater.swarm.registry import Entry, Meta, Registry, name_key
from gater.swarm.ring import Strategy

RETRY_INTERVAL_S: Final = 1.0
"""How long to wait before a tracker that cannot start the process is asked again (Swarm's `@retry_interval`)."""

RETRY_MAX_ATTEMPTS: Final = 10
"""How often (Swarm's `@retry_max_attempts`)."""

_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")
_IGNORE: Final = Atom("ignore")
_RESTART: Final = Atom("restart")
_RESUME: Final = Atom("resume")
_BADARG: Final = Atom("badarg")
_INVALID_RETURN: Final = Atom("invalid_return")


class Host(Protocol):
    """What placement needs of the tracker it belongs to."""

    node: Atom
    pid: Pid
    strategy: Strategy
    registry: Registry

    @property
    def clock(self) -> Clock: ...

    def emit(self, effect: Effect) -> None: ...

    def reply(self, caller: Hashable, value: Term) -> None: ...

    def register(self, name: Term, pid: Pid, meta: Meta) -> Term: ...

    def adopt(self, name: Term, pid: Pid, meta: Meta, seen: Clock) -> None: ...

    def take_back(self, entries: list[Entry]) -> None: ...


@dataclass(slots=True)
class _Look:
    caller: Hashable


@dataclass(slots=True)
class _Start:
    """A process being started by us, on the first of `nodes` that can."""

    name: Term
    meta: Meta
    mfa: tuple[Term, Term, Term]
    caller: Hashable
    nodes: Iterator[Term]
    handoff: Handoff | None = None


@dataclass(slots=True)
class _Remote:
    """A process being started by the tracker that owns its name."""

    name: Term
    meta: Meta
    caller: Hashable
    attempts: int


@dataclass(slots=True)
class _Move:
    """A process of ours asked to give up its place to another member."""

    name: Term
    pid: Pid
    to: Atom


class Placement:
    """Starting, moving and looking up of placed processes for one tracker."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._tasks: dict[int, _Look | _Start | _Remote | _Move] = {}
        self._last_tag = 0
        self._starting: dict[Term, list[tuple[Term, Meta, Hashable]]] = {}
        self._moving: set[Pid] = set()

    def whereis(self, name: Term, caller: Hashable) -> None:
        """Answer from the registry; what is not there, from the registry of the node that owns the name."""
        entry = self._host.registry.get(name)
        if entry is not None:
            self._host.reply(caller, entry.pid)
            return
        owner = self._host.strategy.key_to_node(name)
        if owner is None or owner is self._host.node:
            self._host.reply(caller, messages.UNDEFINED)
        else:
            self._host.emit(AskRegistry(self._tag(_Look(caller)), owner, name))

    def start(self, name: Term, meta: Meta, caller: Hashable, attempts: int = 0) -> None:
        """`do_track`: start the process of `meta[mfa]` where the name belongs, and register it."""
        mfa = _mfa(meta)
        if mfa is None:
            self._host.reply(caller, messages.error(_BADARG))
            return
        starting = self._starting.get(name_key(name))
        if starting is not None:
            starting.append((name, meta, caller))
            return
        owner = self._host.strategy.key_to_node(name)
        known = self._host.registry.get(name)
        if owner is None:
            self._host.reply(caller, messages.error(messages.NO_NODE_AVAILABLE))
        elif owner is not self._host.node:
            tag = self._tag(_Remote(name, meta, caller, attempts))
            self._host.emit(CallTracker(tag, owner, StartAndTrack(name, meta)))
        elif known is not None:
            self._host.reply(caller, messages.already_registered(known.pid))
        else:
            self._begin(_Start(name, meta, mfa, caller, self._host.strategy.preference(name)))

    def handoff(self, message: Handoff) -> None:
        """`handle_handoff`: a process of another member goes on here."""
        entry = self._host.registry.get(message.name)
        mfa = _mfa(message.meta)
        if entry is not None and entry.pid.node is self._host.node:
            self._host.emit(ResolveConflict(entry.pid, message.state))
            self._host.adopt(message.name, entry.pid, message.meta, message.clock)
            return
        if entry is not None and entry.pid.node is not message.sender.node:
            return
        if entry is not None:
            # The handoff has overtaken nothing: its node has given the name up, whatever we have heard so far.
            self._host.take_back([entry])
        if mfa is not None and name_key(message.name) not in self._starting:
            order = self._host.strategy.preference(message.name)
            self._begin(_Start(message.name, message.meta, mfa, None, order, message))

    def hand_over(self, name: Term, state: Term) -> None:
        """Give a process of ours to the node that owns its name without us."""
        entry = self._host.registry.get(name)
        if entry is None or MFA not in entry.meta:
            return
        to = next((node for node in self._host.strategy.preference(name) if node is not self._host.node), None)
        if to is not None:
            self._give(entry, to, state)

    def topology_change(self) -> None:
        """`handle_topology_change`: the ring is another; processes of ours that belong elsewhere now are moved."""
        for entry in self._host.registry.with_property(MFA):
            if entry.pid.node is not self._host.node or entry.pid in self._moving:
                continue
            owner = self._host.strategy.key_to_node(entry.name)
            if owner is None:
                self._host.take_back([entry])
                self._host.emit(Die(entry.pid))
            elif owner is not self._host.node:
                self._moving.add(entry.pid)
                self._host.emit(BeginHandoff(self._tag(_Move(entry.name, entry.pid, owner)), entry.pid))

    def lost(self, entry: Entry) -> None:
        """A placed process was on a node that is down: start it again, if its name is ours now."""
        if self._host.registry.get(entry.name) is None and (
            self._host.strategy.key_to_node(entry.name) is self._host.node
        ):
            self.start(entry.name, entry.meta, None)

    def answered(self, tag: int, value: Term) -> None:
        """A step has come to this value."""
        task = self._tasks.pop(tag, None)
        match task:
            case _Look(caller):
                self._host.reply(caller, messages.UNDEFINED if value is None else value)
            case _Start():
                self._started(task, value)
            case _Remote():
                self._remote_answered(task, value)
            case _Move():
                self._moved(task, value)

    def failed(self, tag: int, reason: Term) -> None:
        """A step has come to nothing."""
        task = self._tasks.pop(tag, None)
        match task:
            case _Look(caller):
                self._host.reply(caller, messages.UNDEFINED)
            case _Start() if _is_missing(reason):
                self._next(task)
            case _Start():
                self._end(task, messages.error(reason))
            case _Remote() if _is_missing(reason):
                self._again(task)
            case _Remote():
                self._host.reply(task.caller, messages.error(reason))
            case _Move(name, pid, _):
                self._moving.discard(pid)
                self._host.emit(Note("handoff failed", (("name", name), ("reason", reason))))

    def retry(self, tag: int) -> None:
        """The pause before another attempt is over."""
        task = self._tasks.pop(tag, None)
        if isinstance(task, _Remote):
            self.start(task.name, task.meta, task.caller, task.attempts)

    def _tag(self, task: _Look | _Start | _Remote | _Move) -> int:
        self._last_tag += 1
        self._tasks[self._last_tag] = task
        return self._last_tag

    def _begin(self, task: _Start) -> None:
        self._starting[name_key(task.name)] = []
        self._next(task)

    def _next(self, task: _Start) -> None:
        node = next(task.nodes, None)
        if node is None:
            self._end(task, messages.error(messages.UNDEF))
        else:
            self._host.emit(StartProcess(self._tag(task), node, task.mfa))

    def _started(self, task: _Start, value: Term) -> None:
        match value:
            case (tag, Pid() as pid) if tag is _OK:
                known = self._host.registry.get(task.name)
                if known is not None and known.pid != pid:
                    self._host.emit(Kill(pid))
                    self._end(task, messages.already_registered(known.pid))
                elif task.handoff is not None:
                    self._host.emit(EndHandoff(pid, task.handoff.state))
                    self._host.adopt(task.name, pid, task.meta, task.handoff.clock)
                    self._end(task, messages.ok(pid))
                else:
                    self._end(task, self._host.register(task.name, pid, task.meta))
            case _:
                self._end(task, messages.error((_INVALID_RETURN, value)))

    def _end(self, task: _Start, value: Term) -> None:
        self._host.reply(task.caller, value)
        for name, meta, caller in self._starting.pop(name_key(task.name)):
            self.start(name, meta, caller)

    def _remote_answered(self, task: _Remote, value: Term) -> None:
        reason = value[1] if type(value) is tuple and len(value) == 2 and value[0] is _ERROR else None
        pid = messages.registered_elsewhere(reason)
        if pid is not None:
            # It is registered, and we did not know.
            self._host.reply(task.caller, self._host.register(task.name, pid, task.meta))
        elif _is_missing(reason):
            self._again(task)
        else:
            self._host.reply(task.caller, value)

    def _again(self, task: _Remote) -> None:
        task.attempts += 1
        if task.attempts > RETRY_MAX_ATTEMPTS:
            self._host.reply(task.caller, messages.error(messages.TOO_MANY_ATTEMPTS))
        else:
            self._host.emit(SetTimer(("retry", self._tag(task)), RETRY_INTERVAL_S))

    def _moved(self, task: _Move, value: Term) -> None:
        self._moving.discard(task.pid)
        entry = self._host.registry.get(task.name)
        if value is _IGNORE or entry is None or entry.pid != task.pid:
            return
        match value:
            case (tag, state) if tag is _RESUME:
                self._give(entry, task.to, state)
            case _ if value is _RESTART:
                self._host.take_back([entry])
                self._host.emit(Die(entry.pid))
                self.start(entry.name, entry.meta, None)

    def _give(self, entry: Entry, to: Atom, state: Term) -> None:
        self._host.take_back([entry])
        self._host.emit(Die(entry.pid))
        message = Handoff(self._host.pid, entry.name, entry.meta, state, peek(self._host.clock))
        self._host.emit(Send((to,), message))


def _mfa(meta: Meta) -> tuple[Term, Term, Term] | None:
    mfa = meta.get(MFA)
    return mfa if type(mfa) is tuple and len(mfa) == 3 else None


def _is_missing(reason: Term) -> bool:
    """Is it that the function or the tracker is not there (yet), or the node not any more?"""
    if type(reason) is tuple and reason:
        reason = reason[0]
    if type(reason) is tuple and reason:
        reason = reason[0]
    return reason is messages.UNDEF or reason is messages.NOPROC or reason is messages.NODEDOWN
