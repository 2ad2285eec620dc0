"""Signals in: one distribution message of a peer to what it does here.

`Router.route` is a table from the number of a control message to one function. What every call to a server consists of
(messages, monitor, demonitor) is read by position, payloads only once there is somebody to read them. All others are
parsed into the classes of `control.py`, which checks their fields.

A peer speaks for its own processes only: a monitor, a link or a spawn request in the name of a third node's process is
a protocol error, as answering it would make us dial that node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gater.erl import control, etf
from gater.erl.connection import PASS_THROUGH, VERSION, Connection
from gater.erl.control import ControlMessage
from gater.erl.errors import LimitExceeded, RemoteProtocolError
from gater.erl.process import NOPROC
from gater.erl.terms import Atom, Pid, Reference, Term

if TYPE_CHECKING:
    from gater.erl.node import Node

MAX_MONITORS_PER_PEER: Final = 1_000_000
"""Monitors, links and unanswered spawns of one peer's processes on processes here, each. A BEAM has a million processes
at most by default (`+P`); far below that something over there has gone wrong."""

ExitMessage: TypeAlias = (
    control.Exit
    | control.ExitTT
    | control.PayloadExit
    | control.PayloadExitTT
    | control.Exit2
    | control.Exit2TT
    | control.PayloadExit2
    | control.PayloadExit2TT
)

_NOTSUP: Final = Atom("notsup")


class Payload:
    """The part of a message behind its control tuple, not decoded yet."""

    __slots__ = ("_atoms", "_cache", "_data", "_position")

    def __init__(self, atoms: etf.AtomTable, data: bytes, position: int, cache: Sequence[Term] | None) -> None:
        self._atoms = atoms
        self._data = data
        self._position = position
        self._cache = cache

    def read(self, spine_levels: int | None) -> Term:
        """The term, decoded as deep as asked for (`etf.decode_spine`), or whole."""
        data, position, cache = self._data, self._position, self._cache
        if cache is None:
            if position >= len(data) or data[position] != VERSION:
                raise RemoteProtocolError("the control message announces a payload, but none follows")
            position += 1
        if spine_levels is not None:
            return etf.decode_spine(data, position, spine_levels, self._atoms, cache)
        term, end = etf.decode_term(data, position, self._atoms, cache)
        if end != len(data):
            raise RemoteProtocolError(f"{len(data) - end} bytes follow the payload")
        return term


class Router:
    """Carries out what peers of one node send."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._signals = node.signals
        self._messages: dict[int, Callable[[Connection, tuple[Term, ...], Payload], None]] = {
            control.OP_SEND: self._on_send,
            control.OP_SEND_TT: self._on_send,
            control.OP_SEND_SENDER: self._on_send,
            control.OP_SEND_SENDER_TT: self._on_send,
            control.OP_REG_SEND: self._on_reg_send,
            control.OP_REG_SEND_TT: self._on_reg_send,
            control.OP_ALIAS_SEND: self._on_alias_send,
            control.OP_ALIAS_SEND_TT: self._on_alias_send,
            control.OP_MONITOR_P: self._on_monitor,
            control.OP_DEMONITOR_P: self._on_demonitor,
            control.OP_PAYLOAD_MONITOR_P_EXIT: self._on_payload_monitor_exit,
        }
        self._parsed: dict[type[ControlMessage], Callable[[Connection, Any, Term], None]] = {
            control.MonitorPExit: self._on_monitor_exit,
            control.Link: self._on_link,
            control.Unlink: self._on_unlink,
            control.UnlinkId: self._on_unlink_id,
            control.UnlinkIdAck: self._on_unlink_ack,
            control.Exit: self._on_exit,
            control.ExitTT: self._on_exit,
            control.PayloadExit: self._on_exit,
            control.PayloadExitTT: self._on_exit,
            control.Exit2: self._on_exit2,
            control.Exit2TT: self._on_exit2,
            control.PayloadExit2: self._on_exit2,
            control.PayloadExit2TT: self._on_exit2,
            control.GroupLeader: self._on_group_leader,
            control.SpawnRequest: self._on_spawn_request,
            control.SpawnRequestTT: self._on_spawn_request,
            control.SpawnReply: self._on_spawn_reply,
            control.SpawnReplyTT: self._on_spawn_reply,
            control.AltActSigSend: self._on_altact,
            control.NodeLink: lambda connection, message, payload: None,
        }

    def route(self, connection: Connection, frame: bytes) -> None:
        """Carry out one distribution message. Raises `RemoteProtocolError` for what the protocol does not allow."""
        reader = connection.reader
        cache: Sequence[Term] | None = None
        if reader is not None:
            whole = reader.receive(frame)
            if whole is None:
                return
            frame, position, cache = whole.data, whole.pos, whole.atoms
        elif len(frame) < 3 or frame[0] != PASS_THROUGH or frame[1] != VERSION:
            raise RemoteProtocolError(f"a distribution message begins with 112, 131; this one with {list(frame[:2])}")
        else:
            position = 2
        term, position = etf.decode_term(frame, position, connection.atoms, cache)
        if type(term) is not tuple or not term or type(term[0]) is not int:
            raise RemoteProtocolError("a control message is a tuple that begins with a number")
        payload = Payload(connection.atoms, frame, position, cache)
        handler = self._messages.get(term[0])
        if handler is not None:
            handler(connection, term, payload)
            return
        message = control.parse(term)
        self._parsed[type(message)](connection, message, payload.read(None) if message.has_payload else None)

    # Messages

    def _on_send(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) < 3 or type(term[2]) is not Pid:
            raise RemoteProtocolError("SEND and SEND_SENDER name a pid as their receiver")
        process = self._node.process(term[2])
        if process is not None:
            process.deliver(payload.read(process.spine_levels))

    def _on_reg_send(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) < 4:
            raise RemoteProtocolError("REG_SEND has four elements")
        process = self._node.find(term[3])
        if process is not None:
            process.deliver(payload.read(process.spine_levels))

    def _on_alias_send(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) < 3 or type(term[2]) is not Reference:
            raise RemoteProtocolError("ALIAS_SEND names a reference as its receiver")
        alias = self._node.alias(term[2])
        if alias is not None:
            self._node.deliver_to_alias(term[2], alias, payload.read(alias.spine_levels))

    def _on_altact(self, connection: Connection, message: control.AltActSigSend, payload: Term) -> None:
        if not message.flags & control.AltActFlag.EXIT:
            to = message.to
            if not isinstance(to, Pid | Reference) or to.node is self._node.name:
                self._node.send(to, payload)
            return
        process = self._node.find(message.to)
        if process is not None:
            process.exit_signal(message.sender_pid, payload, from_link=False)

    # Monitors

    def _on_monitor(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) != 4 or type(term[1]) is not Pid or type(term[3]) is not Reference:
            control.parse(term)
        _, watcher, target, reference = term
        _check_origin(connection, watcher)
        process = self._node.find(target)
        if process is None:
            self._signals.send_down(connection, target, watcher, reference, NOPROC)
            return
        watched = connection.watched
        _check_count(watched)
        if reference.node is not connection.peer or reference in watched:
            raise RemoteProtocolError("MONITOR_P: the reference is not a new one of the peer")
        process.monitored_by[reference] = (watcher, target)
        watched[reference] = process

    def _on_demonitor(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) != 4 or type(term[3]) is not Reference:
            control.parse(term)
        process = connection.watched.pop(term[3], None)
        if process is not None:
            process.monitored_by.pop(term[3], None)

    def _on_monitor_exit(self, connection: Connection, message: control.MonitorPExit, _: Term) -> None:
        monitor = connection.monitors.pop(message.ref, None)
        if monitor is not None:
            monitor.fire(message.reason)

    def _on_payload_monitor_exit(self, connection: Connection, term: tuple[Term, ...], payload: Payload) -> None:
        if len(term) != 4 or type(term[3]) is not Reference:
            control.parse(term)
        monitor = connection.monitors.pop(term[3], None)
        reason = payload.read(None if monitor is None else monitor.spine_levels)
        if monitor is not None:
            monitor.fire(reason)

    # Links

    def _on_link(self, connection: Connection, message: control.Link, _: Term) -> None:
        _check_origin(connection, message.from_pid)
        process = self._node.process(message.to_pid)
        if process is None:
            self._signals.send_exit(connection, message.to_pid, message.from_pid, NOPROC)
            return
        if message.from_pid in process.unlinking:
            # It crossed our UNLINK_ID, which undoes it over there.
            return
        _check_count(connection.links)
        process.links.add(message.from_pid)
        connection.links.setdefault(message.from_pid, set()).add(process)

    def _unlinked(self, connection: Connection, to_pid: Pid, from_pid: Pid) -> None:
        process = self._node.process(to_pid)
        if process is not None:
            process.links.discard(from_pid)
            connection.drop_link(process, from_pid)

    def _on_unlink(self, connection: Connection, message: control.Unlink, _: Term) -> None:
        _check_origin(connection, message.from_pid)
        self._unlinked(connection, message.to_pid, message.from_pid)

    def _on_unlink_id(self, connection: Connection, message: control.UnlinkId, _: Term) -> None:
        _check_origin(connection, message.from_pid)
        self._unlinked(connection, message.to_pid, message.from_pid)
        connection.send_control((control.OP_UNLINK_ID_ACK, message.id, message.to_pid, message.from_pid))

    def _on_unlink_ack(self, connection: Connection, message: control.UnlinkIdAck, _: Term) -> None:
        process = self._node.process(message.to_pid)
        if process is not None:
            self._signals.unlink_acknowledged(connection, process, message.from_pid, message.id)

    # Exit signals

    def _on_exit(self, connection: Connection, message: ExitMessage, payload: Term) -> None:
        process = self._node.process(message.to_pid)
        if process is not None:
            connection.drop_link(process, message.from_pid)
            process.exit_signal(message.from_pid, _reason(message, payload), from_link=True)

    def _on_exit2(self, connection: Connection, message: ExitMessage, payload: Term) -> None:
        process = self._node.process(message.to_pid)
        if process is not None:
            process.exit_signal(message.from_pid, _reason(message, payload), from_link=False)

    # The rest

    def _on_group_leader(self, connection: Connection, message: control.GroupLeader, _: Term) -> None:
        process = self._node.process(message.to_pid)
        if process is not None:
            process.group_leader = message.from_pid

    def _on_spawn_request(
        self, connection: Connection, message: control.SpawnRequest | control.SpawnRequestTT, payload: Term
    ) -> None:
        _check_origin(connection, message.from_pid)
        if type(payload) is not list:
            raise RemoteProtocolError("the arguments of SPAWN_REQUEST are a list")
        if self._node.requests is None:
            connection.send_control((control.OP_SPAWN_REPLY, message.req_id, message.from_pid, 0, _NOTSUP))
        else:
            self._node.requests(message, payload, connection)

    def _on_spawn_reply(
        self, connection: Connection, message: control.SpawnReply | control.SpawnReplyTT, _: Term
    ) -> None:
        self._signals.spawn_answered(connection, message.req_id, message.result, message.flags)


def _check_origin(connection: Connection, pid: Pid) -> None:
    if pid.node is not connection.peer:
        raise RemoteProtocolError(f"{connection.peer} speaks for a process of {pid.node}")


def _check_count(held: dict[Any, Any]) -> None:
    if len(held) >= MAX_MONITORS_PER_PEER:
        raise LimitExceeded("MAX_MONITORS_PER_PEER", MAX_MONITORS_PER_PEER)


def _reason(message: ControlMessage, payload: Term) -> Term:
    """The exit reason of a message that carries it in itself or, under `EXIT_PAYLOAD`, behind itself."""
    return payload if message.has_payload else getattr(message, "reason")  # noqa: B009
