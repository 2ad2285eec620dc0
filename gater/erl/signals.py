"""Signals out: links, monitors, exit signals and spawn requests of processes here, to processes anywhere.

Follows "Signals" of the Erlang reference manual and the "Link Protocol" of the distribution protocol chapter. What
cannot be set up answers `noproc` (no such process) or `noconnection` (no such node).

A monitor has one owner: its reference is the watcher's, `'DOWN'` comes once, and a `DEMONITOR_P` that crosses it finds
nothing to undo. A link is one fact kept in two places, each of which may end it, and what is said about it crosses: an
exit signal may be under way while we unlink, and a link be made anew before the other side has heard of that. So an
unlink has a number, and counts until that is acknowledged:

| here                                                                 |   | there                   |
|----------------------------------------------------------------------|---|-------------------------|
| `unlink`: `UNLINK_ID` n, and what still comes of the link is ignored | → | the link is removed     |
| that is over, if n is the last number                                | ← | `UNLINK_ID_ACK` n       |
| `link` before that: `LINK`, and n is forgotten                       | → | linked, as n came first |

When a connection ends, whatever went over it is told `noconnection`, in one go (`connection_ended`).

What comes in from peers is the business of `routing.py`; messages are sent by `Node.send`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from gater.erl import control
from gater.erl.connection import Connection
from gater.erl.handshake import DistributionFlag
from gater.erl.process import NOCONNECTION, NOPROC, Process, described
from gater.erl.terms import Atom, Pid, Reference, Term

if TYPE_CHECKING:
    from gater.erl.node import Node

DIST_MONITOR: Final = int(DistributionFlag.DIST_MONITOR)
SPAWN: Final = int(DistributionFlag.SPAWN)
UNLINK_ID: Final = int(DistributionFlag.UNLINK_ID)
_MONITOR: Final = Atom("monitor")
_LINK: Final = Atom("link")
_NOTSUP: Final = Atom("notsup")

log = structlog.get_logger(__name__)


class Monitor:
    """One watch of ours on a process, local or remote. `on_down(monitor, reason)` is called at most once."""

    __slots__ = ("connection", "fired", "object", "on_down", "owner", "process", "reference", "spine_levels", "target")

    def __init__(
        self, reference: Reference, owner: Pid, target: Term, on_down: Callable[[Monitor, Term], None]
    ) -> None:
        self.reference = reference
        self.owner = owner
        self.target = target
        """What is watched: a pid or a registered name (on the node of `connection`, or here)."""
        self.object: Term = target
        """What a 'DOWN' message names: the pid, or `{Name, Node}`."""
        self.on_down = on_down
        self.connection: Connection | None = None
        self.process: Process | None = None
        self.spine_levels: int | None = None
        """How deep the reason is decoded (`etf.decode_spine`), where the peer sends it behind the signal."""
        self.fired = False

    def fire(self, reason: Term) -> None:
        """The process is gone. An error in `on_down` is logged: it is nobody's fault who signalled."""
        if self.fired:
            return
        self.fired = True
        try:
            self.on_down(self, reason)
        except Exception as error:
            log.error("on_down_failed", target=str(self.object), error=described(error))


class Alias:
    """An address for replies: a reference of this node that messages can be sent to."""

    __slots__ = ("once", "receive", "spine_levels")

    def __init__(self, receive: Callable[[Term], None], spine_levels: int | None, once: bool) -> None:
        self.receive = receive
        self.spine_levels = spine_levels
        self.once = once
        """Whether the first message ends it."""


class SpawnCall:
    """A spawn request of ours.

    `on_error(reason)` if it is refused, `on_spawned(pid)` if not. If it is `watched`, `on_down(monitor, reason)` when
    the process has ended. `linked` is the process to be linked with the new one.
    """

    __slots__ = ("linked", "monitor", "on_error", "on_spawned", "watched")

    def __init__(
        self,
        monitor: Monitor,
        on_error: Callable[[Term], None],
        on_spawned: Callable[[Pid], None] | None,
        linked: Process | None,
        watched: bool,
    ) -> None:
        self.monitor = monitor
        self.on_error = on_error
        self.on_spawned = on_spawned
        self.linked = linked
        self.watched = watched


class Signals:
    """The links and monitors of the processes of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._unlink_id = 0
        self._ended: deque[tuple[Process, Term]] = deque()
        self._ending = False

    # Monitors

    def monitor(
        self, target: Term, on_down: Callable[[Monitor, Term], None], owner: Pid, reference: Reference
    ) -> Monitor:
        """Watch a pid, a local name or `{Name, Node}`: see `Node.monitor`."""
        monitor = Monitor(reference, owner, target, on_down)
        own = self._node.name
        node = own
        if type(target) is Pid:
            node = target.node
        elif type(target) is tuple:
            monitor.target, node = target
        else:
            monitor.object = (target, own)
        if node is own:
            process = self._node.find(monitor.target)
            if process is None:
                self._node.soon(monitor.fire, NOPROC)
            else:
                monitor.process = process
                process.monitored_by[reference] = monitor.fire
            return monitor
        connection = self._node.connection(node)
        connection.send_control((control.OP_MONITOR_P, owner, monitor.target, reference), DIST_MONITOR)
        monitor.connection = connection
        connection.monitors[reference] = monitor
        return monitor

    def demonitor(self, monitor: Monitor) -> None:
        """Stop watching; `on_down` is not called any more."""
        if monitor.fired:
            return
        monitor.fired = True
        if monitor.process is not None:
            monitor.process.monitored_by.pop(monitor.reference, None)
        connection = monitor.connection
        if connection is not None and connection.monitors.pop(monitor.reference, None) is not None:
            connection.send_control(
                (control.OP_DEMONITOR_P, monitor.owner, monitor.target, monitor.reference), DIST_MONITOR
            )

    # Links

    def link(self, process: Process, other: Pid) -> None:
        """Make the other half of a link of `process`."""
        if other.node is self._node.name:
            target = self._node.process(other)
            if target is None:
                self._node.soon(lambda: process.exit_signal(other, NOPROC, from_link=True))
            else:
                target.links.add(process.pid)
            return
        connection = self._node.connection(other.node)
        connection.links.setdefault(other, set()).add(process)
        self._forget_unlink(connection, process, other)
        connection.send_control((control.OP_LINK, process.pid, other))

    def unlink(self, process: Process, other: Pid) -> None:
        """Undo the other half of a link of `process`."""
        if other.node is self._node.name:
            target = self._node.process(other)
            if target is not None:
                target.links.discard(process.pid)
            return
        connection = self._node.peers.table.get(other.node)
        if connection is None:
            return
        connection.drop_link(process, other)
        self._unlink_id += 1
        unlink_id = self._unlink_id
        process.unlinking[other] = unlink_id
        connection.unlinking.add((process, other))
        connection.when_up(lambda: self._send_unlink(connection, unlink_id, process, other))

    def _send_unlink(self, connection: Connection, unlink_id: int, process: Process, other: Pid) -> None:
        if connection.flags & UNLINK_ID:
            connection.send_control((control.OP_UNLINK_ID, unlink_id, process.pid, other))
        else:
            connection.send_control((control.OP_UNLINK, process.pid, other))
            if process.unlinking.get(other) == unlink_id:
                self._forget_unlink(connection, process, other)

    @staticmethod
    def _forget_unlink(connection: Connection, process: Process, other: Pid) -> None:
        process.unlinking.pop(other, None)
        connection.unlinking.discard((process, other))

    def unlink_acknowledged(self, connection: Connection, process: Process, other: Pid, unlink_id: int) -> None:
        """The other side has seen an unlink. An acknowledgement of an earlier one means nothing."""
        if process.unlinking.get(other) == unlink_id:
            self._forget_unlink(connection, process, other)

    # Exit signals

    def exit(self, target: Pid, reason: Term, sender: Pid) -> None:
        """`exit(Pid, Reason)`."""
        if target.node is self._node.name:
            process = self._node.process(target)
            if process is not None:
                process.exit_signal(sender, reason, from_link=False)
            return
        connection = self._node.connection(target.node)
        connection.send_reason(control.OP_PAYLOAD_EXIT2, control.OP_EXIT2, (sender, target), reason)

    @staticmethod
    def send_exit(connection: Connection, sender: Pid, to: Pid, reason: Term) -> None:
        """Tell `to` that its link with `sender` broke."""
        connection.send_reason(control.OP_PAYLOAD_EXIT, control.OP_EXIT, (sender, to), reason)

    @staticmethod
    def send_down(connection: Connection, watched: Term, watcher: Pid, reference: Reference, reason: Term) -> None:
        """Tell `watcher` that what it monitored as `watched` is gone."""
        ends = (watched, watcher, reference)
        connection.send_reason(control.OP_PAYLOAD_MONITOR_P_EXIT, control.OP_MONITOR_P_EXIT, ends, reason)

    # The end of processes and connections

    def process_ended(self, process: Process, reason: Term) -> None:
        """A process has exited: fire its monitors, break its links.

        One exit may cause the next: they are worked off in order, not one inside the other, so that a chain of links
        of any length needs no stack.
        """
        self._ended.append((process, reason))
        if self._ending:
            return
        self._ending = True
        try:
            while self._ended:
                self._tell(*self._ended.popleft())
        finally:
            self._ending = False

    def _tell(self, process: Process, reason: Term) -> None:
        for monitor in process.monitors.values():
            self.demonitor(monitor)
        process.monitors.clear()
        table = self._node.peers.table
        for other in process.unlinking:
            connection = table.get(other.node)
            if connection is not None:
                connection.unlinking.discard((process, other))
        watchers, process.monitored_by = process.monitored_by, {}
        for reference, watcher in watchers.items():
            if not isinstance(watcher, tuple):
                watcher(reason)
                continue
            pid, watched = watcher
            connection = table.get(pid.node)
            if connection is not None and connection.watched.pop(reference, None) is not None:
                self.send_down(connection, watched, pid, reference, reason)
        links, process.links = process.links, set()
        for other in links:
            if other.node is self._node.name:
                target = self._node.process(other)
                if target is not None:
                    target.exit_signal(process.pid, reason, from_link=True)
                continue
            connection = table.get(other.node)
            if connection is not None:
                connection.drop_link(process, other)
                self.send_exit(connection, process.pid, other, reason)

    def connection_ended(self, connection: Connection) -> None:
        """A connection is down: everyone here who depended on it gets `noconnection`."""
        for process, other in connection.unlinking:
            process.unlinking.pop(other, None)
        connection.unlinking.clear()
        spawns, connection.spawns = connection.spawns, {}
        for call in spawns.values():
            self.spawn_refused(call, NOCONNECTION)
        monitors, connection.monitors = connection.monitors, {}
        for monitor in monitors.values():
            monitor.fire(NOCONNECTION)
        watched, connection.watched = connection.watched, {}
        for reference, process in watched.items():
            process.monitored_by.pop(reference, None)
        links, connection.links = connection.links, {}
        for other, processes in links.items():
            for process in processes:
                process.exit_signal(other, NOCONNECTION, from_link=True)

    # Spawning elsewhere

    def spawn_request(
        self,
        peer: Atom,
        mfa: tuple[Atom, Atom, list[Term]],
        on_error: Callable[[Term], None],
        on_down: Callable[[Monitor, Term], None],
        owner: Pid,
        *,
        on_spawned: Callable[[Pid], None] | None = None,
        linked: Process | None = None,
        watched: bool = True,
    ) -> Monitor:
        """Spawn `M:F(Args)` on `peer`: see `Node.spawn_request` and `Process.spawn_request`."""
        connection = self._node.connection(peer)
        monitor = Monitor(self._node.make_reference(), owner, None, on_down)
        monitor.connection = connection
        call = SpawnCall(monitor, on_error, on_spawned, linked, watched)
        options: list[Term] = [_MONITOR] if watched else []
        if linked is not None:
            options.append(_LINK)
        self._send_spawn(connection, monitor.reference, owner, mfa, options)
        connection.spawns[monitor.reference] = call
        connection.when_up(lambda: self._refuse_if_unable(connection, call))
        return monitor

    def spawn_cast(self, peer: Atom, mfa: tuple[Atom, Atom, list[Term]], owner: Pid) -> None:
        """Spawn `M:F(Args)` on `peer` and want to know nothing more of it: the reply is thrown away when it comes."""
        self._send_spawn(self._node.connection(peer), self._node.make_reference(), owner, mfa, [])

    def _send_spawn(
        self,
        connection: Connection,
        reference: Reference,
        owner: Pid,
        mfa: tuple[Atom, Atom, list[Term]],
        options: list[Term],
    ) -> None:
        module, function, arguments = mfa
        head = (control.OP_SPAWN_REQUEST, reference, owner, owner, (module, function, len(arguments)), options)
        connection.send_message(head, arguments, SPAWN)

    def _refuse_if_unable(self, connection: Connection, call: SpawnCall) -> None:
        if not connection.flags & SPAWN:
            connection.spawns.pop(call.monitor.reference, None)
            self._node.soon(self.spawn_refused, call, _NOTSUP)

    def spawn_answered(self, connection: Connection, reference: Reference, result: Term, flags: int) -> None:
        """The answer to a spawn request: a pid, or why there is none; and whether it is linked with who asked."""
        call = connection.spawns.pop(reference, None)
        if call is None:
            return
        monitor = call.monitor
        if type(result) is not Pid:
            self.spawn_refused(call, result)
            return
        monitor.target = monitor.object = result
        linked = call.linked
        if linked is not None and flags & control.SpawnReplyFlag.LINK:
            if linked.alive:
                linked.links.add(result)
                connection.links.setdefault(result, set()).add(linked)
            else:
                # Who asked has ended meanwhile, and cannot have been told of by its own links.
                self.send_exit(connection, linked.pid, result, NOPROC)
        if call.watched:
            connection.monitors[reference] = monitor
            if monitor.fired:
                monitor.fired = False
                self.demonitor(monitor)
        if call.on_spawned is not None:
            call.on_spawned(result)

    @staticmethod
    def spawn_refused(call: SpawnCall, reason: Term) -> None:
        """A spawn request has failed: say so, unless nobody waits for it any more."""
        if call.monitor.fired:
            return
        call.monitor.fired = True
        try:
            call.on_error(reason)
        except Exception as error:
            log.error("on_error_failed", error=described(error))

    def abandon_spawn(self, monitor: Monitor) -> None:
        """Nobody waits for a spawn request any more: neither of its callbacks is called from now on."""
        if monitor.target is not None:
            self.demonitor(monitor)
        monitor.fired = True
