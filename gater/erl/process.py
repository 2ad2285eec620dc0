"""Processes: mailboxes, links, monitors and exit signals.

Follows "Processes" and "Signals" of the Erlang reference manual. A `Process` is the identity and the bookkeeping; what
it does with its messages is its `Receiver`. There are three: a plain callback, a coroutine with selective receive
(`Mailbox`), and a GenServer (`gen_server.py`).

One message is handled at a time. A receiver answers with None when it is done, or with an awaitable when it is not;
then the following messages wait in the mailbox until that has finished. Nothing here makes a task for a message that
needs none: `Node` runs ready processes straight from the loop turn that received their bytes.

States of a process: *running* (in `node.processes`), *exiting* (`terminate` runs, no more messages), *dead*.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import structlog

from gater.erl.errors import ErlangError, ErlangExit, ErlangThrow, shown
from gater.erl.terms import Atom, Pid, Reference, Term

if TYPE_CHECKING:
    from gater.erl.node import Node
    from gater.erl.signals import Monitor

MAX_MAILBOX_MESSAGES: Final = 1_000_000
"""A process that lets more messages than this wait is ended with `mailbox_limit`.

A BEAM would run out of memory instead.
"""

MAX_STACK_FRAMES: Final = 16
"""Frames of a Python traceback sent to an Erlang caller; enough to find the place, small enough for every log."""

NORMAL: Final = Atom("normal")
KILL: Final = Atom("kill")
KILLED: Final = Atom("killed")
NOPROC: Final = Atom("noproc")
NOCONNECTION: Final = Atom("noconnection")
SHUTDOWN: Final = Atom("shutdown")
EXIT: Final = Atom("EXIT")
DOWN: Final = Atom("DOWN")
PROCESS: Final = Atom("process")
TIMEOUT: Final = Atom("timeout")
SPAWN_REPLY: Final = Atom("spawn_reply")
_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")
MAILBOX_LIMIT: Final = Atom("mailbox_limit")
_PYTHON_ERROR: Final = Atom("python_error")
_NOCATCH: Final = Atom("nocatch")
_FILE: Final = Atom("file")
_LINE: Final = Atom("line")

log = structlog.get_logger(__name__)


AliasMode: TypeAlias = Literal["explicit_unalias", "demonitor", "reply_demonitor"]


class Stop(Exception):
    """Raised by a process to end itself with `reason` (an exit reason; `normal` is no failure)."""

    def __init__(self, reason: Term = NORMAL) -> None:
        self.reason = reason
        super().__init__(f"stop: {shown(reason)}")


class Receiver(Protocol):
    """What a process does with its messages."""

    def receive(self, message: Term, /) -> Awaitable[None] | None:
        """Handle one message; an awaitable holds the following ones back until it is done."""

    def terminate(self, reason: Term, /) -> None:
        """The process is exiting with `reason`; called once, whoever ended it."""


def stacktrace(error: BaseException) -> list[Term]:
    """A Python traceback as an Erlang one, innermost frame first: `[{Module, Function, 0, [{file, F}, {line, L}]}]`."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_STACK_FRAMES:]
    return [
        (
            Atom("python"),
            Atom(frame.name[:200]),
            0,
            [(_FILE, list(frame.filename.encode())), (_LINE, frame.lineno or 0)],
        )
        for frame in reversed(frames)
    ]


def error_term(error: BaseException) -> Term:
    """The reason of a Python exception: what was raised as an `ErlangException`, else `{python_error, Type, Text}`."""
    if isinstance(error, ErlangError | ErlangExit | ErlangThrow):
        return error.reason
    return (_PYTHON_ERROR, type(error).__name__.encode(), str(error).encode("utf-8", "replace"))


def exit_reason(error: BaseException) -> Term:
    """The exit reason of a process whose code raised `error`, in the shapes of the emulator.

    `Stop` and `ErlangExit` give their reason; `ErlangThrow` gives `{{nocatch, Term}, Stack}`; any other error
    `{Reason, Stack}`.
    """
    if isinstance(error, Stop | ErlangExit):
        return error.reason
    if isinstance(error, ErlangThrow):
        return ((_NOCATCH, error.reason), stacktrace(error))
    if isinstance(error, asyncio.CancelledError):
        return SHUTDOWN
    return (error_term(error), stacktrace(error))


def described(error: BaseException) -> str:
    """An exception for a log line: type, text and where it was raised; no values of variables, which may be payload."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def is_failure(reason: Term) -> bool:
    """Whether an exit reason is worth a report: anything but `normal`, `shutdown` and `{shutdown, _}`."""
    if reason is NORMAL or reason is SHUTDOWN:
        return False
    return not (type(reason) is tuple and len(reason) == 2 and reason[0] is SHUTDOWN)


class Process:
    """One process of this node. Made by `Node.spawn` and its relatives, never directly."""

    __slots__ = (
        "_busy",
        "_holds",
        "_mailbox",
        "_task",
        "aliases",
        "alive",
        "group_leader",
        "initial_call",
        "kept",
        "links",
        "monitored_by",
        "monitors",
        "names",
        "node",
        "pid",
        "receiver",
        "scheduled",
        "spine_levels",
        "tied",
        "trap_exit",
        "unlinking",
    )

    def __init__(self, node: Node, pid: Pid, receiver: Receiver, group_leader: Pid | None) -> None:
        self.node = node
        self.pid = pid
        self.receiver = receiver
        self.group_leader = group_leader or pid
        self.initial_call: tuple[Atom, Atom, int] | None = None
        self.names: list[Atom] = []
        self.trap_exit = False
        self.spine_levels: int | None = None
        """How deep messages are decoded along their last elements (`etf.decode_spine`); None decodes all of them."""
        self.links: set[Pid] = set()
        self.unlinking: dict[Pid, int] = {}
        """Unlinks that the other side has not acknowledged: pid -> id. Exit signals of these pids are ignored."""
        self.monitors: dict[Reference, Monitor] = {}
        self.monitored_by: dict[Reference, tuple[Pid, Term] | Callable[[Term], None]] = {}
        """Who watches: remote watchers as (pid, the name or pid they watch), local ones as what to call with the
        reason."""
        self.aliases: set[Reference] = set()
        self.tied: set[Reference] = set()
        """Those of the aliases that end with the monitor of the same reference."""
        self.kept: Collection[Term] = ()
        """Messages that the receiver has taken and not handled yet: they are in the queue as well, at its front."""
        self.alive = True
        self.scheduled = False
        self._mailbox: deque[Term] = deque()
        self._busy = False
        self._holds = 0
        self._task: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Process {self.pid}{' ' + str(self.names[0]) if self.names else ''}>"

    # Messages

    def deliver(self, message: Term) -> None:
        """Put a message into the mailbox; it is handled in this loop turn unless an earlier one is still being
        handled."""
        if not self.alive:
            return
        mailbox = self._mailbox
        mailbox.append(message)
        if not self.scheduled and not self._busy and not self._holds:
            self.scheduled = True
            self.node.schedule(self)
        elif len(mailbox) > MAX_MAILBOX_MESSAGES:
            log.error("mailbox_limit", pid=str(self.pid), allowed=MAX_MAILBOX_MESSAGES)
            self.exit(MAILBOX_LIMIT)

    def put_back(self, messages: Iterable[Term]) -> None:
        """Have messages that were taken out of the mailbox handled before those that are in it."""
        self._mailbox.extendleft(reversed(list(messages)))
        self._go_on()

    def run(self, budget: int) -> int:
        """Handle up to `budget` messages; how many were handled. Called by the node only."""
        self.scheduled = False
        mailbox = self._mailbox
        receive = self.receiver.receive
        handled = 0
        while mailbox and not self._busy and not self._holds and self.alive:
            if handled == budget:
                self.scheduled = True
                self.node.schedule(self)
                break
            message = mailbox.popleft()
            handled += 1
            try:
                pending = receive(message)
            except Exception as error:
                self.fail(error)
                break
            if pending is not None:
                self._wait_for(pending)
        return handled

    def _wait_for(self, pending: Awaitable[None]) -> None:
        self._busy = True
        self._task = task = asyncio.ensure_future(pending)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Future[None]) -> None:
        self._task = None
        self._busy = False
        if not self.alive:
            if not task.cancelled():
                task.exception()
            return
        if task.cancelled():
            self.exit(SHUTDOWN)
            return
        error = task.exception()
        if error is not None:
            self.fail(error)
        else:
            self._go_on()

    def hold(self) -> None:
        """Let messages wait until `release`, called as often: the process is not ready for them."""
        self._holds += 1

    def release(self) -> None:
        """Handle the messages that wait since `hold`, and those that come."""
        self._holds -= 1
        self._go_on()

    def _go_on(self) -> None:
        if self._mailbox and self.alive and not (self.scheduled or self._busy or self._holds):
            self.scheduled = True
            self.node.schedule(self)

    def fail(self, error: BaseException) -> None:
        """End this process with the reason of `error`, which its code has raised; logged unless it is a usual end."""
        reason = exit_reason(error)
        if is_failure(reason):
            log.error("process_crashed", pid=str(self.pid), name=self.name, error=described(error))
        self.exit(reason)

    def queue_length(self) -> int:
        """How many messages wait."""
        return len(self.kept) + len(self._mailbox)

    def messages(self) -> list[Term]:
        """The messages that wait, in their order."""
        return [*self.kept, *self._mailbox]

    @property
    def name(self) -> str | None:
        """The registered name, if there is one."""
        return self.names[0].name if self.names else None

    # What a process does to others

    def send(self, to: Term, message: Term) -> None:
        """Send `message` from this process: to a pid, an alias, a registered name or `{Name, Node}`."""
        self.node.send(to, message, self.pid)

    def link(self, other: Pid) -> None:
        """Link with `other`: if one of the two exits, the other gets an exit signal (`noproc` if it is already
        gone)."""
        if other != self.pid and other not in self.links:
            self.links.add(other)
            self.node.signals.link(self, other)

    def unlink(self, other: Pid) -> None:
        """Undo a link. No exit signal of `other` arrives afterwards."""
        if other in self.links:
            self.links.discard(other)
            self.node.signals.unlink(self, other)

    def monitor(self, target: Term, *, alias: AliasMode | None = None) -> Reference:
        """Watch a pid, a local name or `{Name, Node}`.

        `{'DOWN', Ref, process, Target, Reason}` arrives when it is gone. With `alias` the reference is an alias of this
        process as well (option `{alias, Mode}` of `erlang:monitor/3`): until `unalias` (`explicit_unalias`), until
        the monitor ends (`demonitor`), or until that or the first message to it (`reply_demonitor`, which ends the
        monitor with it).
        """
        reference: Reference | None = None
        if alias is not None:
            reference = self._alias_of_monitor(alias)

        def down(monitor: Monitor, reason: Term) -> None:
            self.monitors.pop(monitor.reference, None)
            self._untie(monitor.reference)
            self.deliver((DOWN, monitor.reference, PROCESS, monitor.object, reason))

        monitor = self.node.monitor(target, down, self.pid, reference)
        self.monitors[monitor.reference] = monitor
        return monitor.reference

    def demonitor(self, reference: Reference) -> bool:
        """Stop watching; False if the monitor had fired already or never was."""
        monitor = self.monitors.pop(reference, None)
        self._untie(reference)
        if monitor is None:
            return False
        self.node.demonitor(monitor)
        return True

    def alias(self, *, reply: bool = False) -> Reference:
        """A new alias of this process: what is sent to it arrives here until `unalias`.

        With `reply` only the first message does (option `reply` of `erlang:alias/1`).
        """

        def receive(message: Term) -> None:
            if reply:
                self.aliases.discard(reference)
            self.deliver(message)

        reference = self.node.open_alias(receive, self.spine_levels, once=reply)
        self.aliases.add(reference)
        return reference

    def unalias(self, reference: Reference) -> bool:
        """End an alias of this process; False if it is none (any more)."""
        if reference not in self.aliases:
            return False
        self.aliases.discard(reference)
        self.tied.discard(reference)
        return self.node.close_alias(reference)

    def _alias_of_monitor(self, mode: AliasMode) -> Reference:
        def receive(message: Term) -> None:
            if mode == "reply_demonitor":
                self.demonitor(reference)
            self.deliver(message)

        reference = self.node.open_alias(receive, self.spine_levels)
        self.aliases.add(reference)
        if mode != "explicit_unalias":
            self.tied.add(reference)
        return reference

    def _untie(self, reference: Reference) -> None:
        if reference in self.tied:
            self.unalias(reference)

    def spawn_request(
        self,
        peer: str | Atom,
        module: str | Atom,
        function: str | Atom,
        arguments: Iterable[Term] = (),
        *,
        link: bool = False,
        monitor: bool = False,
    ) -> Reference:
        """`erlang:spawn_request(Node, M, F, Args, Opts)`: start a process on another node, linked or watched from its
        first moment on.

        `{spawn_reply, Ref, ok, Pid}` or `{spawn_reply, Ref, error, Reason}` arrives (`noconnection`, `notsup`, ..).
        With `monitor` the reference is that of a monitor as well: `{'DOWN', Ref, process, Pid, Reason}`.
        """

        def refused(reason: Term) -> None:
            self.monitors.pop(watch.reference, None)
            self.deliver((SPAWN_REPLY, watch.reference, _ERROR, reason))

        def down(fired: Monitor, reason: Term) -> None:
            self.monitors.pop(fired.reference, None)
            self.deliver((DOWN, fired.reference, PROCESS, fired.object, reason))

        watch = self.node.signals.spawn_request(
            Atom(str(peer)),
            (Atom(str(module)), Atom(str(function)), list(arguments)),
            refused,
            down,
            self.pid,
            on_spawned=lambda pid: self.deliver((SPAWN_REPLY, watch.reference, _OK, pid)),
            linked=self if link else None,
            watched=monitor,
        )
        if monitor:
            self.monitors[watch.reference] = watch
        return watch.reference

    def send_after(self, delay_s: float, to: Term, message: Term) -> asyncio.TimerHandle:
        """`erlang:send_after`: send `message` to `to` in `delay_s` seconds; the handle returned can cancel it.

        Nothing is sent when this process has ended by then.
        """

        def due() -> None:
            if self.alive:
                self.send(to, message)

        return self.node.loop.call_later(delay_s, due)

    def register(self, name: str | Atom) -> None:
        """Give this process a name on its node (`NodeError` if it is taken)."""
        self.node.register(name, self)

    # The end

    def exit_signal(self, sender: Pid, reason: Term, *, from_link: bool) -> None:
        """An exit signal has come, from a broken link or by `exit/2`."""
        if not self.alive:
            return
        if from_link:
            if sender in self.unlinking or sender not in self.links:
                return
            self.links.discard(sender)
        elif reason is KILL:
            self.exit(KILLED)
            return
        if self.trap_exit:
            self.deliver((EXIT, sender, reason))
        elif reason is not NORMAL or sender == self.pid:
            self.exit(reason)

    def exit(self, reason: Term) -> None:
        """End this process with `reason` now: names freed, monitors fired, links signalled, its coroutine cancelled.

        An error in the receiver's `terminate` is logged; the reason stays what it is.
        """
        if not self.alive:
            return
        self.alive = False
        self._mailbox.clear()
        task, self._task = self._task, None
        if task is not None and task is not _current_task():
            task.cancel()
        try:
            self.receiver.terminate(reason)
        except Exception as error:
            log.error("terminate_failed", pid=str(self.pid), name=self.name, error=described(error))
        self.node.forget(self, reason)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class CallbackReceiver:
    """A receiver made of one function."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Callable[[Term], Awaitable[None] | None]) -> None:
        self._handle = handle

    def receive(self, message: Term) -> Awaitable[None] | None:
        return self._handle(message)

    def terminate(self, reason: Term) -> None:
        return None


class Mailbox:
    """A process that is a coroutine: `async def main(me: Mailbox)` with Erlang's selective `receive`.

    The coroutine's return ends the process normally, an exception ends it with its reason, an exit signal cancels it.
    """

    __slots__ = ("_main", "_messages", "_task", "_waiter", "process")

    def __init__(self, main: Callable[[Mailbox], Coroutine[Any, Any, object]]) -> None:
        self.process: Process
        self._main = main
        self._messages: deque[Term] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[object] | None = None

    @property
    def pid(self) -> Pid:
        """The pid of this process."""
        return self.process.pid

    @property
    def node(self) -> Node:
        """The node this process runs on."""
        return self.process.node

    def start(self, process: Process) -> None:
        """Run the coroutine as `process`; called by the node."""
        self.process = process
        process.kept = self._messages
        self._task = asyncio.ensure_future(self._main(self))
        self._task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[object]) -> None:
        if task.cancelled():
            self.process.exit(SHUTDOWN)
            return
        error = task.exception()
        if error is None:
            self.process.exit(NORMAL)
        elif self.process.alive:
            self.process.fail(error)

    def receive(self, message: Term) -> None:
        self._messages.append(message)
        if len(self._messages) > MAX_MAILBOX_MESSAGES:
            raise Stop(MAILBOX_LIMIT)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def terminate(self, reason: Term) -> None:
        if self._task is not None and not self._task.done() and self._task is not _current_task():
            self._task.cancel()

    async def get(self, match: Callable[[Term], bool] | None = None, timeout_s: float | None = None) -> Term:
        """The first message in arrival order that `match` accepts (any if None); others stay where they are.

        Raises TimeoutError when none has come within `timeout_s` seconds.
        """
        looked_at = 0
        messages = self._messages
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while True:
            if match is None:
                if messages:
                    return messages.popleft()
            else:
                for index, message in enumerate(islice(messages, looked_at, None), looked_at):
                    if match(message):
                        del messages[index]
                        return message
                looked_at = len(messages)
            self._waiter = loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._waiter
            finally:
                self._waiter = None

    def send(self, to: Term, message: Term) -> None:
        """Send `message` from this process."""
        self.process.send(to, message)
