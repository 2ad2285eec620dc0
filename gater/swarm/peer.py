"""The process registered as `Elixir.Swarm.Tracker`: tells a `Tracker` what happens and does what it decides.

Everything the tracker hears, calls of this node and the loss of connections too, goes through the mailbox of the
process, so that it hears it in the order in which it happened: what one node says is in order, and nothing of a lost
connection comes after its `NodeDown`. Nothing here waits and nothing connects: what should go to a node without a
connection is dropped. Bad messages are logged and dropped.

Left to others: every decision (`tracker.py`), the shapes of messages (`messages.py`), who asks (`swarm.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeAlias

import structlog

from gater.erl import etf
from gater.erl.errors import (
    CallError,
    ConnectionLost,
    EncodeError,
    ErlangException,
    ErlError,
    NoProcess,
)
from gater.erl.exports import run_exported
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, PendingCall, cast
from gater.erl.node import Monitor as NodeMonitor
from gater.erl.process import KILL, NOCONNECTION, described
from gater.erl.rpc import EXCEPTION, SIGNAL, PendingRpc
from gater.erl.terms import Atom, EncodedTerm, Pid, Term
from gater.swarm import messages
from gater.swarm.events import (
    Answered,
    AskApplications,
    AskRegistry,
    BeginHandoff,
    Call,
    CallTracker,
    Changed,
    Demonitor,
    DemonitorTracker,
    Die,
    Effect,
    EndHandoff,
    Event,
    Failed,
    Kept,
    Kill,
    Monitor,
    MonitorTracker,
    NodeDown,
    NodeUp,
    Note,
    ProcessDown,
    Received,
    Reply,
    ResolveConflict,
    Resume,
    Send,
    SetTimer,
    StartProcess,
    TimerFired,
    TrackerDown,
)
from gater.swarm.messages import TRACKER, Message, Request, SyncAck, SyncErr, SyncRecv
from gater.swarm.registry import Entry
from gater.swarm.snapshots import IncomingList, OutgoingList
from gater.swarm.tracker import Tracker, TrackerOptions

ASK_TIMEOUT_S: Final = 5.0
"""How long a node may take to say what runs there."""

ASK_AGAIN_S: Final = (1.0, 30.0)
"""First and longest pause before a node that did not say is asked again; doubled in between."""

START_TIMEOUT_S: Final = 30.0
"""How long a process may take to start on another node. The original waits for ever."""

HANDOFF_TIMEOUT_S: Final = 5.0
"""How long a process may take to give its state (`GenServer.call/2` in the original)."""

REGISTRY_TIMEOUT_S: Final = 5.0
"""How long another node's registry may take to answer about one name."""

SWARM: Final = Atom("swarm")
GATER: Final = Atom("gater")

_APPLICATIONS: Final[tuple[Atom, Atom, list[Term]]] = (Atom("application"), Atom("which_applications"), [])
_REGISTRY: Final = Atom("Elixir.Swarm.Registry")
_GET_BY_NAME: Final = Atom("get_by_name")
_SYNC_RECV: Final = Atom("sync_recv")
_SYNC_ACK: Final = Atom("sync_ack")
_ENTRY: Final = Atom("entry")
_DIE: Final = Atom("die")
_BEGIN_HANDOFF: Final = Atom("begin_handoff")
_END_HANDOFF: Final = Atom("end_handoff")
_RESOLVE_CONFLICT: Final = Atom("resolve_conflict")
_BADARG: Final = Atom("badarg")
_GEN_CAST: Final = Atom("$gen_cast")

OnReply: TypeAlias = Callable[[Term], None]
OnChange: TypeAlias = Callable[[Term, Entry | None, Entry | None], None]
OnKept: TypeAlias = Callable[[Term, Pid], None]

log = structlog.get_logger(__name__)


class TrackerPeer(GenServer):
    """The tracker's process. Start it with `start_server(node, peer, name=TRACKER)`.

    `on_change(name, old, new)` is told whenever what everybody sees under a name has changed, `on_kept(name, pid)` when
    a process of ours keeps a name that another gater has had registered too.
    """

    # {'$gen_cast', {sync_recv, Pid, Clock, Registry}}: the registry stays encoded until it is merged.
    spine_levels = 2

    def __init__(
        self,
        options: TrackerOptions | None = None,
        on_change: OnChange | None = None,
        on_kept: OnKept = lambda name, pid: None,
    ) -> None:
        self._options = options
        self._on_change = on_change
        self._on_kept = on_kept
        self.tracker: Tracker
        self._asking: dict[Atom, PendingRpc | asyncio.TimerHandle] = {}
        self._asked_in_vain: Counter[Atom] = Counter()
        self._gaters: set[Atom] = set()
        self._lost: Counter[Atom] = Counter()
        """Nodes whose loss the tracker has not heard of yet: nothing is sent to them until it has."""
        self._asked_to_sync: Atom | None = None
        self._monitors: dict[Pid, NodeMonitor] = {}
        self._to_monitor: dict[Pid, None] = {}
        """Processes to be monitored in the next turn of the loop, not in that of the merge: the tables of names and of
        monitors grow at the same numbers, each for some milliseconds at 10^5."""
        self._tracker_monitors: dict[Atom, NodeMonitor] = {}
        self._timers: dict[Hashable, asyncio.TimerHandle] = {}
        self._outboxes: dict[Atom, deque[tuple[Atom | Pid, Message]]] = {}
        self._encoding: dict[Atom, OutgoingList] = {}
        self._pumping = False
        self._callers: set[OnReply] = set()
        self._unwatch: Callable[[], None] | None = None
        self._do: dict[type[Effect], Callable[[Any], None]] = {
            Send: self._send,
            Reply: self._reply,
            Monitor: self._monitor,
            Demonitor: self._demonitor,
            MonitorTracker: self._monitor_tracker,
            DemonitorTracker: self._demonitor_tracker,
            SetTimer: self._set_timer,
            Changed: self._changed,
            Die: lambda effect: self._tell(effect.pid, (SWARM, _DIE)),
            Kept: lambda effect: self._on_kept(effect.name, effect.pid),
            Kill: lambda effect: self.node.exit(effect.pid, KILL, self.pid),
            BeginHandoff: self._begin_handoff,
            EndHandoff: lambda effect: cast(self.node, effect.pid, (SWARM, _END_HANDOFF, effect.state), self.pid),
            ResolveConflict: lambda effect: cast(
                self.node, effect.pid, (SWARM, _RESOLVE_CONFLICT, effect.state), self.pid
            ),
            StartProcess: self._start_process,
            CallTracker: self._call_tracker,
            AskRegistry: self._ask_registry,
            AskApplications: lambda effect: self._ask_applications(effect.node),
            Resume: lambda effect: self.node.soon(self.process.deliver, effect),
            Note: self._note,
        }

    def init(self) -> None:
        self.tracker = Tracker(self.pid, self._options)
        self._unwatch = self.node.monitor_nodes(self._node_changed)
        self._carry_out(self.tracker.start(self._now()))
        for peer in self.node.nodes():
            self._ask_applications(peer)

    def terminate(self, reason: Term) -> None:
        if self._unwatch is not None:
            self._unwatch()
        for asking in self._asking.values():
            asking.cancel()
        self._asking.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._to_monitor.clear()
        for monitor in (*self._monitors.values(), *self._tracker_monitors.values()):
            self.node.demonitor(monitor)
        callers, self._callers = self._callers, set()
        for caller in callers:
            caller(messages.error(messages.NOPROC))

    def get_state(self) -> Term:
        tracker = self.tracker
        return {
            Atom("state"): Atom(str(tracker.state)),
            Atom("nodes"): tracker.nodes,
            Atom("names"): len(tracker.registry),
            Atom("clock"): tracker.clock,
        }

    # What the tracker hears.

    def call(self, request: Request, on_reply: OnReply) -> None:
        """Ask the tracker; `on_reply` gets what it answers, `{error, noproc}` if it ends before."""
        self._callers.add(on_reply)
        self.process.deliver(Call(on_reply, request))

    def handle_call(self, request: Term, caller: Caller) -> Term:
        try:
            asked = messages.request_from_term(_decoded(request))
        except ErlError as error:
            log.warning("swarm_bad_call", node=str(self.node.name), caller=str(caller.pid), reason=str(error))
            return messages.error(_BADARG)
        self._feed(Call(lambda answer: self.reply(caller, answer), asked))
        return NO_REPLY

    def handle_cast(self, message: Term) -> None:
        self._heard(message)

    def handle_info(self, message: Term) -> None:
        if isinstance(message, tuple):
            self._heard(message)
        elif isinstance(message, _EVENTS):
            if type(message) is NodeDown:
                self._lost[message.node] -= 1
                if self._lost[message.node] <= 0:
                    del self._lost[message.node]
            self._feed(message)

    def _heard(self, term: Term) -> None:
        """Another tracker says something."""
        try:
            message = self._message(term)
        except ErlError as error:
            log.warning("swarm_bad_message", node=str(self.node.name), reason=str(error))
            return
        if message is None:
            return
        sender = self._asked_to_sync if isinstance(message, SyncErr) else message.sender.node
        if sender is not None and self._is_connected(sender):
            self._feed(Received(sender, message))

    def _message(self, term: Term) -> Message | None:
        """Raises `ErlError` for what no tracker says."""
        match term:
            case (kind, Pid() as sender, _, EncodedTerm() as registry) if kind is _SYNC_RECV or kind is _SYNC_ACK:
                message = messages.message_from_term((*term[:-1], []))
                assert isinstance(message, SyncRecv | SyncAck)
                connection = self.node.peers.table.get(sender.node)
                atoms = etf.AtomTable() if connection is None else connection.atoms
                entries = IncomingList(registry, atoms, lambda error: self._bad_registry(sender.node, error))
                return type(message)(message.sender, message.clock, entries)
        return messages.message_from_term(_decoded(term))

    def _bad_registry(self, peer: Atom, error: ErlError) -> None:
        # As with any message that cannot be read: who sends it is not understood, the connection begins anew.
        log.warning("swarm_bad_registry", node=str(self.node.name), peer=str(peer), reason=str(error))
        self.node.soon(self.node.disconnect, peer)

    def _node_changed(self, peer: Atom, is_up: bool, reason: str) -> None:
        self._asked_in_vain.pop(peer, None)
        asking = self._asking.pop(peer, None)
        if asking is not None:
            asking.cancel()
        if is_up:
            self._ask_applications(peer)
            return
        self._gaters.discard(peer)
        self._outboxes.pop(peer, None)
        self._encoding.pop(peer, None)
        self._lost[peer] += 1
        self.process.deliver(NodeDown(peer))

    def _feed(self, event: Event) -> None:
        try:
            effects = self.tracker.receive(event, self._now())
        except Exception as error:
            if not isinstance(event, Received | Call):
                raise
            # What somebody says must not end the tracker; what was lost with it comes back with the next sync.
            log.error("swarm_tracker_failed", node=str(self.node.name), error=described(error))
            if isinstance(event, Call):
                self._reply(Reply(event.caller, messages.error(_BADARG)))
            return
        self._carry_out(effects)

    def _now(self) -> float:
        return self.node.loop.time()

    # What it decides.

    def _carry_out(self, effects: list[Effect]) -> None:
        do = self._do
        for effect in effects:
            do[type(effect)](effect)

    def _is_connected(self, peer: Atom) -> bool:
        connection = self.node.peers.table.get(peer)
        return connection is not None and connection.state == "up"

    def _send(self, effect: Send) -> None:
        message = effect.message
        if isinstance(message, SyncRecv | SyncAck):
            for to in effect.to:
                self._send_registry(to, message)
            return
        if isinstance(message, messages.Sync):
            (node,) = effect.to
            self._asked_to_sync = _node_of(node)
        term: Term = messages.message_to_term(message)
        if len(effect.to) > 1:
            term = EncodedTerm(etf.encode_term(term))
        for to in effect.to:
            outbox = self._outboxes.get(_node_of(to))
            if outbox is not None:
                outbox.append((to, message))
            else:
                self._send_now(to, term)

    def _send_now(self, to: Atom | Pid, term: Term) -> None:
        node = _node_of(to)
        if node in self._lost or not self._is_connected(node):
            return
        try:
            self.process.send(to if isinstance(to, Pid) else (TRACKER, to), term)
        except EncodeError as error:
            log.error("swarm_send_failed", node=str(self.node.name), peer=str(node), reason=str(error))

    def _tell(self, pid: Pid, message: Term) -> None:
        if pid.node is self.node.name or self._is_connected(pid.node):
            self.process.send(pid, message)

    # Registries are encoded a slice at a time; what is said after one waits for it.

    def _send_registry(self, to: Atom | Pid, message: SyncRecv | SyncAck) -> None:
        node = _node_of(to)
        if node in self._lost or not self._is_connected(node):
            return
        self._outboxes.setdefault(node, deque()).append((to, message))
        self._pump_later()

    def _pump_later(self) -> None:
        if not self._pumping and self._outboxes:
            self._pumping = True
            self.node.soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if not self.process.alive or not self._outboxes:
            return
        # One after the other, so that the number of members that ask at once does not make slices longer.
        node = next(iter(self._outboxes))
        outbox = self._outboxes[node]
        to, message = outbox[0]
        if not isinstance(message, SyncRecv | SyncAck):
            outbox.popleft()
            self._send_now(to, messages.message_to_term(message))
        elif self._encode(node, to, message):
            outbox.popleft()
        if not outbox:
            del self._outboxes[node]
        self._pump_later()

    def _encode(self, node: Atom, to: Atom | Pid, message: SyncRecv | SyncAck) -> bool:
        encoding = self._encoding.get(node)
        if encoding is None:
            entries = message.entries
            encoding = self._encoding[node] = OutgoingList(len(entries), map(messages.entry_to_term, entries))
        try:
            if not encoding.work():
                return False
        except EncodeError as error:
            log.error("swarm_send_failed", node=str(self.node.name), peer=str(node), reason=str(error))
        else:
            head = messages.message_to_term(type(message)(message.sender, message.clock, ()))
            self._send_now(to, (_GEN_CAST, (*head[1][:-1], encoding.encoded)))
        del self._encoding[node]
        return True

    # Answers, changes, notes.

    def _reply(self, effect: Reply) -> None:
        on_reply = effect.caller
        assert callable(on_reply)
        self._callers.discard(on_reply)
        on_reply(effect.value)

    def _changed(self, effect: Changed) -> None:
        if self._on_change is not None:
            self._on_change(effect.name, effect.old, effect.new)

    def _note(self, effect: Note) -> None:
        fields = {name: str(value)[:200] for name, value in effect.fields}
        peer = fields.pop("node", None)
        if peer is not None:
            fields["peer"] = peer
        log.info("swarm_" + effect.event.replace(" ", "_"), node=str(self.node.name), **fields)

    # Monitors and time.

    def _monitor(self, effect: Monitor) -> None:
        if not self._to_monitor:
            self.node.soon(self._monitor_all)
        self._to_monitor[effect.pid] = None

    def _monitor_all(self) -> None:
        pids, self._to_monitor = self._to_monitor, {}
        for pid in pids:
            self._monitor_now(pid)

    def _monitor_now(self, pid: Pid) -> None:
        if pid.node is not self.node.name and (pid.node in self._lost or not self._is_connected(pid.node)):
            self.process.deliver(ProcessDown(pid, connection_lost=True))
        elif pid not in self._monitors:
            self._monitors[pid] = self.node.monitor(pid, self._process_down, self.pid)

    def _process_down(self, monitor: NodeMonitor, reason: Term) -> None:
        pid = monitor.object
        assert isinstance(pid, Pid)
        if self._monitors.get(pid) is monitor:
            del self._monitors[pid]
        if reason is not NOCONNECTION:
            self.process.deliver(ProcessDown(pid))
        # Otherwise `NodeDown` follows, which drops the names of all processes there, a piece at a time.

    def _demonitor(self, effect: Demonitor) -> None:
        self._to_monitor.pop(effect.pid, None)
        monitor = self._monitors.pop(effect.pid, None)
        if monitor is not None:
            self.node.demonitor(monitor)

    def _monitor_tracker(self, effect: MonitorTracker) -> None:
        peer = effect.node
        if peer in self._lost or not self._is_connected(peer):
            self.process.deliver(TrackerDown(peer))
        elif peer not in self._tracker_monitors:
            self._tracker_monitors[peer] = self.node.monitor(
                (TRACKER, peer), lambda monitor, reason: self._tracker_down(peer), self.pid
            )

    def _tracker_down(self, peer: Atom) -> None:
        self._tracker_monitors.pop(peer, None)
        self.process.deliver(TrackerDown(peer))

    def _demonitor_tracker(self, effect: DemonitorTracker) -> None:
        monitor = self._tracker_monitors.pop(effect.node, None)
        if monitor is not None:
            self.node.demonitor(monitor)

    def _set_timer(self, effect: SetTimer) -> None:
        old = self._timers.get(effect.timer)
        if old is not None:
            old.cancel()
        self._timers[effect.timer] = self.node.loop.call_later(effect.after_s, self._timer_fired, effect.timer)

    def _timer_fired(self, timer: Hashable) -> None:
        del self._timers[timer]
        self.process.deliver(TimerFired(timer))

    # What runs where.

    def _ask_applications(self, peer: Atom) -> None:
        if peer in self._asking or not self._is_connected(peer):
            return
        self._asking[peer] = PendingRpc(
            self.node, peer, _APPLICATIONS, lambda answer, error: self._told_applications(peer, answer, error),
            ASK_TIMEOUT_S,
        )  # fmt: skip

    def _told_applications(self, peer: Atom, answer: Term, error: ErlangException | None) -> None:
        self._asking.pop(peer, None)
        if not self._is_connected(peer):
            return
        if error is None:
            running = names_of(answer)
            if GATER in running:
                self._gaters.add(peer)
            self._asked_in_vain.pop(peer, None)
            self.process.deliver(NodeUp(peer, SWARM in running, GATER in running))
            return
        first_s, longest_s = ASK_AGAIN_S
        pause_s = min(first_s * 2 ** min(self._asked_in_vain[peer], 10), longest_s)
        self._asked_in_vain[peer] += 1
        log.info("swarm_no_answer", node=str(self.node.name), peer=str(peer), reason=repr(error.reason)[:200])
        self._asking[peer] = self.node.loop.call_later(pause_s, self._ask_applications_again, peer)

    def _ask_applications_again(self, peer: Atom) -> None:
        self._asking.pop(peer, None)
        self._ask_applications(peer)

    # Steps of placement.

    def _answer(self, tag: int, value: Term) -> None:
        self.process.deliver(Answered(tag, value))

    def _fail(self, tag: int, reason: Term) -> None:
        self.process.deliver(Failed(tag, reason))

    def _finish(self, tag: int, value: Term, error: BaseException | None) -> None:
        if error is None:
            self._answer(tag, value)
        else:
            self._fail(tag, _reason_of(error))

    def _begin_handoff(self, effect: BeginHandoff) -> None:
        tag = effect.tag
        PendingCall(
            self.node, effect.pid, (SWARM, _BEGIN_HANDOFF), lambda reply, error: self._finish(tag, reply, error),
            timeout_s=HANDOFF_TIMEOUT_S,
        )  # fmt: skip

    def _start_process(self, effect: StartProcess) -> None:
        tag, peer = effect.tag, effect.node
        module, function, arguments = effect.mfa
        if type(module) is not Atom or type(function) is not Atom or type(arguments) is not list:
            self._fail(tag, _BADARG)
        elif peer is self.node.name:
            exported = self.node.exports.find(module, function, len(arguments))
            if exported is None:
                self._fail(tag, messages.UNDEF)
            else:
                run_exported(exported, arguments, lambda value, error: self._finish(tag, value, error))
        elif peer in self._gaters:
            self._rpc(tag, peer, (module, function, arguments), START_TIMEOUT_S)
        else:
            self._rpc(tag, peer, _start_unlinked(module, function, arguments), START_TIMEOUT_S, _evaluated)

    def _ask_registry(self, effect: AskRegistry) -> None:
        mfa = (_REGISTRY, _GET_BY_NAME, [effect.name])
        self._rpc(effect.tag, effect.node, mfa, REGISTRY_TIMEOUT_S, _pid_of_entry)

    def _rpc(
        self,
        tag: int,
        peer: Atom,
        mfa: tuple[Atom, Atom, list[Term]],
        timeout_s: float,
        result: Callable[[Term], Term] = lambda value: value,
    ) -> None:
        if not self._is_connected(peer):
            self._fail(tag, messages.NODEDOWN)
            return

        def done(value: Term, error: ErlangException | None) -> None:
            self._finish(tag, result(value) if error is None else None, error)

        PendingRpc(self.node, peer, mfa, done, timeout_s)

    def _call_tracker(self, effect: CallTracker) -> None:
        tag = effect.tag
        if not self._is_connected(effect.node):
            self._fail(tag, messages.NODEDOWN)
            return
        PendingCall(
            self.node, (TRACKER, effect.node), messages.request_to_term(effect.request),
            lambda reply, error: self._finish(tag, reply, error), timeout_s=START_TIMEOUT_S,
        )  # fmt: skip


_EVENTS: Final = (ProcessDown, TimerFired, Call, NodeDown, NodeUp, TrackerDown, Answered, Failed, Resume)


def names_of(applications: Term) -> set[Atom]:
    """The names in an answer of `application:which_applications/0`, `[{Name, Description, Version}]`."""
    if type(applications) is not list:
        return set()
    return {each[0] for each in applications if type(each) is tuple and each and type(each[0]) is Atom}


def _node_of(to: Atom | Pid) -> Atom:
    return to.node if isinstance(to, Pid) else to


def _decoded(term: Term) -> Term:
    """`term` with what `spine_levels` left encoded."""
    if type(term) is EncodedTerm:
        return etf.decode_encoded(term)
    if type(term) is tuple and term:
        last = _decoded(term[-1])
        return term if last is term[-1] else (*term[:-1], last)
    return term


def _pid_of_entry(value: Term) -> Term:
    match value:
        case (kind, _, Pid() as pid, _, _, _) if kind is _ENTRY:
            return pid
    return None


def _reason_of(error: BaseException) -> Term:
    """The reason in the words of placement: `undef`, `noproc` and `nodedown` mean that another node may be tried."""
    if isinstance(error, NoProcess):
        return messages.NOPROC
    if isinstance(error, ConnectionLost):
        return messages.NODEDOWN
    if isinstance(error, ErlangException):
        match error.reason:
            case (kind, reason, *_) if kind is EXCEPTION or kind is SIGNAL:
                return reason
            case (_, reason) if reason is NOCONNECTION:
                return messages.NODEDOWN
    if isinstance(error, CallError):
        return error.reason
    return (Atom("python_error"), str(error).encode("utf-8", "replace"))


_LINE: Final = 1
_VAR: Final = Atom("var")
_CALL: Final = Atom("call")
_REMOTE: Final = Atom("remote")
_ATOM: Final = Atom("atom")
_ERLANG: Final = Atom("erlang")


def _variable(name: str) -> Term:
    return (_VAR, _LINE, Atom(name))


def _apply(function: str, *arguments: Term) -> Term:
    return (_CALL, _LINE, (_REMOTE, _LINE, (_ATOM, _LINE, _ERLANG), (_ATOM, _LINE, Atom(function))), list(arguments))


_RESULT: Final = _variable("Result")

_START_FORMS: Final[list[Term]] = [
    # Result = apply(M, F, A)
    (Atom("match"), _LINE, _RESULT, _apply("apply", _variable("M"), _variable("F"), _variable("A"))),
    # case Result of {ok, Pid} when is_pid(Pid) -> unlink(Pid), Result; _ -> Result end
    (
        Atom("case"),
        _LINE,
        _RESULT,
        [
            (
                Atom("clause"),
                _LINE,
                [(Atom("tuple"), _LINE, [(_ATOM, _LINE, Atom("ok")), _variable("Pid")])],
                [[(_CALL, _LINE, (_ATOM, _LINE, Atom("is_pid")), [_variable("Pid")])]],
                [_apply("unlink", _variable("Pid")), _RESULT],
            ),
            (Atom("clause"), _LINE, [_variable("_")], [], [_RESULT]),
        ],
    ),
]
"""A process started by `start_link` must outlive the one that the remote call runs in. Swarm's tracker, which starts
processes itself, is linked with them and ignores their ends."""


def _start_unlinked(module: Atom, function: Atom, arguments: list[Term]) -> tuple[Atom, Atom, list[Term]]:
    """`erl_eval:exprs` of the forms above: apply, and unlink what was started. Bindings are in order, as an orddict."""
    bindings = [(Atom("A"), arguments), (Atom("F"), function), (Atom("M"), module)]
    return Atom("erl_eval"), Atom("exprs"), [_START_FORMS, bindings]


def _evaluated(value: Term) -> Term:
    """The value in `{value, Value, Bindings}` of `erl_eval`."""
    match value:
        case (_, result, _):
            return result
    return value
