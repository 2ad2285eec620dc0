"""One peer: bytes in, frames out, ticks, and what must be undone when it goes.

"Protocol between Connected Nodes" of the distribution protocol chapter: after the handshake every message is a four-
byte length and a body; an empty body is a tick. `FrameReader` cuts the stream (no I/O), `PeerProtocol` is the asyncio
shell that first feeds the handshake and then the reader, `Connection` is what the node knows of a peer: it exists
from the first attempt to send on, so that a send to an unconnected node waits here until the handshake is done.

States of a `Connection`: *connecting* (what is sent waits: its final form depends on what the peer can do), *up*,
*down* (every monitor, link, call and spawn that depended on it has been told `noconnection`).

All frames of one loop turn leave in one write: sending only collects, the node flushes at the end of the turn. A
message above `FRAGMENT_BYTES` goes out in fragments, between which others pass (`_Large` says which). When more than
`BUSY_BYTES` wait for a peer, the processes that send to it are not run until that has gone down again, as in a BEAM.
The rest of a large message holds only the process that has sent it: others' messages pass.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from gater.erl import control, etf
from gater.erl.dist_header import FRAGMENT_BYTES, HeaderReader, HeaderWriter, OutgoingMessage
from gater.erl.errors import ErlError, HandshakeError, LimitExceeded, RemoteProtocolError
from gater.erl.handshake import (
    HANDSHAKE_TIMEOUT_S,
    Completed,
    DistributionFlag,
    Effect,
    Handshake,
    PeerNamed,
    Send,
    StatusReceived,
)
from gater.erl.process import described
from gater.erl.terms import Atom, EncodedTerm, Pid, Reference, Term

if TYPE_CHECKING:
    from gater.erl.node import Node
    from gater.erl.process import Process
    from gater.erl.signals import Monitor, SpawnCall

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
"""The longest distribution message accepted. A BEAM splits what is larger than 64 kB when fragments are on and has no
limit otherwise; this one holds a 128 MB binary with room and ends a stream whose length prefix is garbage."""

MAX_QUEUED_BYTES: Final = 512 * 1024 * 1024
"""What may wait to be written to one peer, connected or not. A peer for which more waits is disconnected."""

BUSY_BYTES: Final = 1024 * 1024
"""What may wait for a peer before those who send to it have to wait too (the BEAM's `+zdbbl`, and its default)."""

WRITE_AHEAD_BYTES: Final = 256 * 1024
"""How much of large messages is handed to the transport at a time: what a small message may have to wait for."""

JOIN_BYTES: Final = 64 * 1024
"""Frames are copied into one buffer up to this size; larger batches are handed to the transport as they are."""

MAX_READY_BYTES: Final = FRAGMENT_BYTES // 2
"""The largest payload that is sent as it is, whatever it is sent to, and is not looked at for fragments."""

EXIT_PAYLOAD: Final = int(DistributionFlag.EXIT_PAYLOAD)
SEND_SENDER: Final = int(DistributionFlag.SEND_SENDER)
FRAGMENTS: Final = int(DistributionFlag.FRAGMENTS)
DIST_HDR_ATOM_CACHE: Final = int(DistributionFlag.DIST_HDR_ATOM_CACHE)
"""Flags are tested as plain integers: the operators of `IntFlag` make an object each time."""

READ_AT_ONCE_BYTES: Final = 1024 * 1024
"""What is read from one peer before others have their turn: uvloop alone would read up to 8 MB, for some 10 ms."""

SMALL_PIECE_BYTES: Final = 4096
"""Pieces of a frame below this size are gathered in one buffer. A peer that sends single bytes would else make us keep
forty times as much."""

PASS_THROUGH: Final = 112
VERSION: Final = 131
_LENGTH: Final = struct.Struct(">I")
_pack_length: Final = _LENGTH.pack
_FRAME_START: Final = bytes((PASS_THROUGH, VERSION))
_PAYLOAD_START: Final = bytes((VERSION,))
_HEADER_WITHOUT_ATOMS: Final = bytes((VERSION, 68, 0))
"""Control messages without payload go without the atom cache: looking up two atoms costs more than sending them."""
_SEND_SENDER_START: Final = _HEADER_WITHOUT_ATOMS + bytes((104, 3, 97, control.OP_SEND_SENDER))
_TICK: Final = b"\0\0\0\0"

log = structlog.get_logger(__name__)


class FrameReader:
    """Cuts a byte stream into frames. Memory grows with what has arrived, never with what a prefix announces.

    A frame that comes in pieces is copied once, when its last piece is there.
    """

    __slots__ = ("_held", "_max_bytes", "_need", "_pieces")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes | bytearray | memoryview] = []
        """The beginning of a frame, its length included."""
        self._held = 0
        self._need = 4

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that `data` completes, in order; `b""` is a tick.

        Raises LimitExceeded (`MAX_FRAME_BYTES`); the frames before the one that is too long are lost with it.
        """
        frames: list[bytes] = []
        position = 0
        held = self._held
        if held:
            if held + len(data) < self._need:
                self._hold(data)
                self._held = held + len(data)
                return frames
            pieces = self._pieces
            self._pieces = []
            self._held = 0
            if held < 4:
                data = b"".join((*pieces, data))
            else:
                position = self._need - held
                pieces[0] = memoryview(pieces[0])[4:]
                pieces.append(memoryview(data)[:position])
                frames.append(b"".join(pieces))
        size = len(data)
        need = 4
        while size - position >= 4:
            (length,) = _LENGTH.unpack_from(data, position)
            if length > self._max_bytes:
                raise LimitExceeded("MAX_FRAME_BYTES", self._max_bytes, length)
            end = position + 4 + length
            if end > size:
                need = 4 + length
                break
            frames.append(data[position + 4 : end])
            position = end
        if position < size:
            self._pieces.append(data[position:] if position else data)
            self._held = size - position
            self._need = need
        return frames

    def _hold(self, data: bytes) -> None:
        """Keep one more piece; small ones are kept together, for each object weighs more than a byte."""
        pieces = self._pieces
        last = pieces[-1]
        if len(data) >= SMALL_PIECE_BYTES:
            pieces.append(data)
        elif type(last) is bytearray and len(last) < SMALL_PIECE_BYTES:
            last += data
        else:
            pieces.append(bytearray(data))


class _Large:
    """A message of which fragments are still to be written, and what must not overtake it.

    Signals from one process to another arrive in the order they were sent. Another sender's signals may pass, and so
    may replies to other calls (messages to other aliases). The client process is no process but all code outside of
    processes: its signals keep their order for each receiver only. Exits and 'DOWN's name processes by pid or by name,
    so they pass nothing.
    """

    __slots__ = ("followers", "frames", "opcode", "sender", "size", "to")

    def __init__(self, message: tuple[Term, ...], frames: Iterator[list[bytes | memoryview]], size: int) -> None:
        self.frames = frames
        self.size = size
        self.followers: list[Callable[[], None]] = []
        self.opcode, self.sender, self.to = _ends(message)

    def must_stay_ahead_of(self, message: tuple[Term, ...], client: Pid) -> bool:
        opcode, sender, to = _ends(message)
        if opcode in _PASSES_NOTHING:
            return True
        if sender != self.sender:
            return False
        if opcode == control.OP_ALIAS_SEND == self.opcode or sender == client:
            return bool(to == self.to)
        return True


_PASSES_NOTHING: Final = frozenset(
    {
        control.OP_SEND,
        control.OP_EXIT,
        control.OP_EXIT2,
        control.OP_PAYLOAD_EXIT,
        control.OP_PAYLOAD_EXIT2,
        control.OP_MONITOR_P_EXIT,
        control.OP_PAYLOAD_MONITOR_P_EXIT,
    }
)
_NUMBERED: Final = frozenset(
    {control.OP_SPAWN_REQUEST, control.OP_SPAWN_REPLY, control.OP_UNLINK_ID, control.OP_UNLINK_ID_ACK}
)


def _write_pieces(transport: asyncio.Transport, pieces: list[bytes | memoryview]) -> None:
    """Write them without joining them first. `write` makes the transport say `pause_writing` when it has too much;
    `writelines` alone does not in the first releases of Python 3.12 and 3.13, and then `resume_writing` never comes."""
    *first, last = pieces
    transport.writelines(first)
    transport.write(last)


def _ends(message: tuple[Term, ...]) -> tuple[int, Term, Term]:
    """Opcode, sender and receiver of a control message."""
    opcode = message[0]
    if opcode in _NUMBERED:
        return opcode, message[2], None
    return opcode, message[1], message[3] if opcode == control.OP_REG_SEND else message[2]


class Connection:
    """What this node knows of one peer, from the first attempt to reach it until it is gone."""

    __slots__ = (
        "_control_start",
        "_drained",
        "_held",
        "_large",
        "_large_bytes",
        "_node",
        "_op_send",
        "_out",
        "_out_bytes",
        "_paused",
        "_sent_since_tick",
        "_sequence_id",
        "_waiting",
        "_writer",
        "atoms",
        "attempt",
        "busy",
        "creation",
        "flags",
        "inbound",
        "links",
        "monitors",
        "on_settled",
        "peer",
        "peer_flags",
        "protocol",
        "queued",
        "reader",
        "silent_ticks",
        "spawns",
        "state",
        "unlinking",
        "watched",
    )

    def __init__(self, node: Node, peer: Atom) -> None:
        self._node = node
        self.peer = peer
        self.state = "connecting"
        self.creation = 0
        self.flags = 0
        """What both sides can do (`DistributionFlag`s); known once the connection is up."""
        self.peer_flags = 0
        """What the peer can do, whether or not this node can."""
        self.protocol: PeerProtocol | None = None
        """The stream that carries the connection or, while connecting, the one that we have opened."""
        self.inbound: PeerProtocol | None = None
        """While connecting: a stream opened by the peer whose handshake has been let through."""
        self.attempt: asyncio.Task[None] | None = None
        self.on_settled: list[Callable[[ErlError | None], None]] = []
        """Called once the attempt has ended, with the error if it failed."""
        self.atoms = etf.AtomTable()
        self.monitors: dict[Reference, Monitor] = {}
        """Our monitors on processes there."""
        self.watched: dict[Reference, Process] = {}
        """Their monitors on processes here."""
        self.links: dict[Pid, set[Process]] = {}
        """Processes there that processes here are linked with."""
        self.unlinking: set[tuple[Process, Pid]] = set()
        """Links undone here that the other side has not acknowledged (`UNLINK_ID`)."""
        self.spawns: dict[Reference, SpawnCall] = {}
        """Our spawn requests that have not been answered."""
        self.reader: HeaderReader | None = None
        """How the peer's frames are read; None if distribution headers were not agreed on."""
        self.busy = False
        """More than `BUSY_BYTES` wait for this peer."""
        self.queued = False
        self.silent_ticks = 0
        self._op_send = control.OP_SEND_SENDER
        self._control_start = _FRAME_START
        self._sent_since_tick = False
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._waiting: list[Callable[[], None]] = []
        """While connecting: what has been sent, as what to do once the peer's flags are known."""
        self._writer: HeaderWriter | None = None
        self._large: deque[_Large] = deque()
        self._large_bytes = 0
        self._sequence_id = 0
        self._paused = False
        self._drained: list[asyncio.Future[None]] = []
        self._held: set[Process] = set()

    def __repr__(self) -> str:
        return f"<Connection {self.peer} {self.state}>"

    # Out

    def send(self, sender: Pid, to: Pid, message: Term) -> None:
        """Send a message to a process there. One that is encoded already and refers to no atoms of elsewhere is put
        together from pieces that are at hand: that is what goes to many processes."""
        if (
            type(message) is EncodedTerm
            and self._writer is not None
            and not message.atoms
            and not self._large
            and self._op_send == control.OP_SEND_SENDER
            and len(payload := message.data) <= MAX_READY_BYTES
        ):
            ends = (_SEND_SENDER_START, etf.identity_bytes(sender), etf.identity_bytes(to), payload)
            self._enqueue(ends, sum(map(len, ends)))
        elif self._op_send == control.OP_SEND_SENDER:
            self.send_message((control.OP_SEND_SENDER, sender, to), message)
        else:
            self.send_message((control.OP_SEND, control.UNUSED, to), message)

    def send_control(self, message: tuple[Term, ...], needs: int = 0) -> None:
        """Send a control message without payload; dropped if the peer lacks the flag that it `needs`."""
        if self.state == "up":
            if needs and not self.flags & needs:
                return
            if self._large and (ahead := self._ahead_of(message)) is not None:
                ahead.followers.append(lambda: self.send_control(message))
            else:
                pieces: list[bytes] = [self._control_start]
                etf.encode_into(pieces, message)
                self._enqueue(pieces, sum(map(len, pieces)))
        elif self.state == "connecting":
            self._wait_with(lambda: self.send_control(message, needs), 0)

    def send_message(self, message: tuple[Term, ...], payload: Term, needs: int = 0) -> None:
        """Send a control message and its payload term; dropped if the peer lacks the flag that it `needs`.

        EncodeError if the payload is no term; nothing is sent then.
        """
        if self.state == "up":
            if needs and not self.flags & needs:
                return
            if self._large and (ahead := self._ahead_of(message)) is not None:
                kept = EncodedTerm(etf.encode_term(payload))
                ahead.followers.append(lambda: self.send_message(message, kept))
                ahead.size += len(kept.data)
                self._large_bytes += len(kept.data)
            elif self._writer is not None:
                made = self._writer.message(message, payload)
                if made.size > FRAGMENT_BYTES and self.flags & FRAGMENTS:
                    self._begin_large(message, made)
                else:
                    self._enqueue(made.frame(), made.size)
            else:
                pieces: list[bytes] = [_FRAME_START]
                etf.encode_into(pieces, message)
                pieces.append(_PAYLOAD_START)
                etf.encode_into(pieces, payload)
                self._enqueue(pieces, sum(map(len, pieces)))
        elif self.state == "connecting":
            kept = EncodedTerm(etf.encode_term(payload))
            self._wait_with(lambda: self.send_message(message, kept, needs), len(kept.data))

    def _ahead_of(self, message: tuple[Term, ...]) -> _Large | None:
        """The last of the large messages under way that `message` must not overtake."""
        client = self._node.client.pid
        for large in reversed(self._large):
            if large.must_stay_ahead_of(message, client):
                return large
        return None

    def _begin_large(self, message: tuple[Term, ...], made: OutgoingMessage) -> None:
        self._sequence_id += 1
        frames = made.fragments(self._sequence_id)
        # The first one carries the header, which must leave before that of any later message.
        first = next(frames)
        self._enqueue(first, sum(map(len, first)))
        self._large.append(_Large(message, frames, made.size))
        self._large_bytes += made.size
        if self._large_bytes > BUSY_BYTES:
            self.busy = True

    def send_reason(self, opcode: int, plain_opcode: int, ends: tuple[Term, ...], reason: Term) -> None:
        """Send an exit reason: as the payload of `opcode` if the peer knows that (`EXIT_PAYLOAD`), else within
        `plain_opcode`."""
        if self.state == "connecting":
            kept = EncodedTerm(etf.encode_term(reason))
            self._wait_with(lambda: self.send_reason(opcode, plain_opcode, ends, kept), len(kept.data))
        elif self.flags & EXIT_PAYLOAD:
            self.send_message((opcode, *ends), reason)
        else:
            self.send_control((plain_opcode, *ends, reason))

    def when_up(self, then: Callable[[], None]) -> None:
        """Do `then` now or, while connecting, in its turn among what waits to be sent; never if the attempt fails."""
        if self.state == "up":
            then()
        elif self.state == "connecting":
            self._wait_with(then, 0)

    def _wait_with(self, then: Callable[[], None], size: int) -> None:
        self._waiting.append(then)
        self._out_bytes += size + _WAITING_BYTES
        if self._out_bytes > MAX_QUEUED_BYTES:
            self._node.peers.connection_lost(self, f"MAX_QUEUED_BYTES allows {MAX_QUEUED_BYTES} while connecting")
        elif self._out_bytes > BUSY_BYTES:
            self.busy = True

    def _enqueue(self, pieces: Sequence[bytes | memoryview], size: int) -> None:
        out = self._out
        out.append(_pack_length(size))
        out += pieces
        self._out_bytes += size + 4
        if self._out_bytes > BUSY_BYTES:
            self.busy = True
        if not self.queued:
            self.queued = True
            self._node.flush_later(self)

    def flush(self) -> None:
        """Write what this loop turn has collected. Called by the node at the end of a turn."""
        self.queued = False
        protocol = self.protocol
        if protocol is None or protocol.transport is None:
            return
        transport = protocol.transport
        if self._out:
            self._write_out(transport)
        if self._large and not self._paused:
            self._write_large(transport)
        if self._paused or self._large or self.busy:
            self._look_at_backlog()

    def _write_out(self, transport: asyncio.Transport) -> None:
        if self._out_bytes <= JOIN_BYTES:
            transport.write(b"".join(self._out))
        else:
            _write_pieces(transport, self._out)
        self._out = []
        self._out_bytes = 0
        self._sent_since_tick = True

    def _write_large(self, transport: asyncio.Transport) -> None:
        """Write fragments of the large messages, in turn, as long as the transport takes them."""
        while self._large and not self._paused:
            large = self._large[0]
            fragment = next(large.frames, None)
            if fragment is not None:
                size = sum(map(len, fragment))
                _write_pieces(transport, [_pack_length(size), *fragment])
                self._large.rotate(-1)
                self._sent_since_tick = True
                continue
            self._large.popleft()
            self._large_bytes -= large.size
            for then in large.followers:
                then()
            if self._out:
                # The beginning of a large one among them comes before the rest of it.
                self._write_out(transport)

    def _look_at_backlog(self) -> None:
        """Whether those who send to this peer have to wait, or need not any more."""
        in_front = self._in_front()
        waits = in_front + self._large_bytes
        self.busy = waits > BUSY_BYTES
        if waits > MAX_QUEUED_BYTES:
            self.abort(f"peer does not read: MAX_QUEUED_BYTES allows {MAX_QUEUED_BYTES} to wait for it")
        elif not self.busy:
            self._release()
        elif self._held and in_front <= BUSY_BYTES:
            for process in [process for process in self._held if not self._has_large(process)]:
                self._held.remove(process)
                process.release()

    @property
    def backlog(self) -> int:
        """The bytes that wait for this peer."""
        return self._in_front() + self._large_bytes

    def _in_front(self) -> int:
        """The bytes that a message sent now cannot pass."""
        protocol = self.protocol
        if protocol is None or protocol.transport is None:
            return self._out_bytes
        return self._out_bytes + protocol.transport.get_write_buffer_size()

    def _has_large(self, process: Process) -> bool:
        """Whether a large message of this process is under way."""
        return any(large.sender == process.pid for large in self._large)

    def _release(self) -> None:
        self.busy = False
        drained, self._drained = self._drained, []
        for waiter in drained:
            if not waiter.done():
                waiter.set_result(None)
        held, self._held = self._held, set()
        for process in held:
            process.release()

    def hold(self, process: Process) -> None:
        """`process` has sent to this busy peer: it is not run until the peer has caught up with what it cannot pass."""
        if process not in self._held and (self._in_front() > BUSY_BYTES or self._has_large(process)):
            self._held.add(process)
            process.hold()

    async def drain(self) -> None:
        """Return when no more than `BUSY_BYTES` wait for this peer, or when it is gone."""
        while self.busy:
            waiter: asyncio.Future[None] = self._node.loop.create_future()
            self._drained.append(waiter)
            await waiter

    def pause(self) -> None:
        """The transport has enough for now."""
        self._paused = True

    def resume(self) -> None:
        """The transport takes more."""
        self._paused = False
        self.flush()

    def take_over(self, protocol: PeerProtocol, done: Completed) -> None:
        """The handshake is done: this stream now carries the connection, and what waited is sent."""
        self.protocol = protocol
        self.inbound = None
        self.flags = done.flags
        self.peer_flags = done.peer_flags
        self.creation = done.creation
        self.state = "up"
        if not self.flags & SEND_SENDER:
            self._op_send = control.OP_SEND
        if self.flags & DIST_HDR_ATOM_CACHE:
            self.reader = HeaderReader(self.atoms)
            self._writer = HeaderWriter()
            self._control_start = _HEADER_WITHOUT_ATOMS
        if protocol.transport is not None:
            protocol.transport.set_write_buffer_limits(WRITE_AHEAD_BYTES)
        self._out_bytes = 0
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()
        self._look_at_backlog()

    def drop_output(self) -> None:
        """The connection is down: what has not been written never will be."""
        self._out.clear()
        self._waiting.clear()
        self._large.clear()
        self._out_bytes = self._large_bytes = 0
        self._release()

    def drop_link(self, process: Process, other: Pid) -> None:
        """`process` is no longer linked with `other`, which lives there."""
        linked = self.links.get(other)
        if linked is not None:
            linked.discard(process)
            if not linked:
                del self.links[other]

    def tick(self, allowed_silence: int) -> None:
        """A quarter of the tick time has passed: say something if nothing was said; give up on a silent peer."""
        protocol = self.protocol
        if self.state != "up" or protocol is None or protocol.transport is None:
            return
        if protocol.received:
            protocol.received = False
            self.silent_ticks = 0
        else:
            self.silent_ticks += 1
            if self.silent_ticks > allowed_silence:
                self.abort("net tick timeout")
                return
        if self._sent_since_tick:
            self._sent_since_tick = False
        elif not self._out:
            protocol.transport.write(_TICK)

    def abort(self, why: str) -> None:
        """End the connection at once; what is queued is lost."""
        protocol = self.protocol
        self._node.peers.connection_lost(self, why)
        if protocol is not None:
            protocol.fail(why)


_WAITING_BYTES: Final = 256
"""What a waiting send takes beside its payload, roughly."""


class PeerProtocol(asyncio.Protocol):
    """The asyncio shell around one TCP stream: handshake first, then frames."""

    def __init__(self, node: Node, handshake: Handshake, connection: Connection | None) -> None:
        self.transport: asyncio.Transport | None = None
        self.connection = connection
        self.received = False
        self._read_bytes = 0
        self._node = node
        self._handshake: Handshake | None = handshake
        self._reader = FrameReader(node.options.max_frame_bytes)
        self._why = ""
        self._closing = False
        self._error: HandshakeError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.peer_name: str | None = None if connection is None else connection.peer.name
        """Who the peer is, or claims to be until the handshake is done."""
        self.peer_address: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer_address = transport.get_extra_info("peername")
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._stalled)
        self._node.peers.stream_opened(self)
        if self._handshake is not None and not self._closing:
            self._carry_out(self._handshake.start())

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self.received = True
        self._read_bytes += len(data)
        if self._read_bytes > READ_AT_ONCE_BYTES and self.transport is not None:
            self.transport.pause_reading()
            self._node.loop.call_soon(self._read_on)
            self._read_bytes = 0
        if self._handshake is not None:
            data = self._shake(data)
        connection = self.connection
        if not data or connection is None:
            return
        node = self._node
        route = node.router.route
        node.begin_turn()
        try:
            for frame in self._reader.feed(data):
                if frame:
                    route(connection, frame)
                    if connection.state != "up":
                        break
        except RemoteProtocolError as error:
            log.warning("protocol_error", node=str(node.name), peer=str(connection.peer), reason=str(error))
            connection.abort(f"protocol error: {error}")
        except Exception as error:
            log.error("route_failed", node=str(node.name), peer=str(connection.peer), error=described(error))
            connection.abort(f"internal error: {error!r}")
        node.turn()
        node.busy_wait.input_came()

    def _read_on(self) -> None:
        if self.transport is not None and not self._closing:
            self.transport.resume_reading()

    def _shake(self, data: bytes) -> bytes:
        """Feed the handshake; what is left of `data` once it is complete."""
        handshake = self._handshake
        assert handshake is not None
        try:
            self._carry_out(handshake.receive(data))
        except HandshakeError as error:
            self._error = error
            if self.transport is not None:
                self.transport.write(handshake.farewell)
            self.close(str(error))
        if self._closing or self._handshake is not None:
            return b""
        return handshake.leftover

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            handshake = self._handshake
            if self._closing or self.transport is None or handshake is None:
                return
            match effect:
                case Send(data):
                    self.transport.write(data)
                case PeerNamed(name):
                    self.peer_name = name
                    status, cookie, refusal = self._node.peers.judge(self, effect)
                    self._carry_out(handshake.accept(status, cookie))
                    if refusal is not None:
                        self._error = refusal
                        self.close(str(refusal))
                case StatusReceived("alive"):
                    proceed = self._node.peers.wants_replacement(self)
                    self._carry_out(handshake.confirm_alive(proceed))
                    if not proceed:
                        self.close("the connection that the peer asked about is alive")
                case StatusReceived():
                    pass
                case Completed():
                    self._complete(effect)

    def _complete(self, done: Completed) -> None:
        self._stop_timer()
        self._handshake = None
        self.connection = self._node.peers.handshake_completed(self, done)
        if self.connection is None:
            self.fail("the handshake was overtaken by another connection to the same node")

    def _stalled(self) -> None:
        if self._handshake is not None:
            self.fail(f"no handshake within {HANDSHAKE_TIMEOUT_S:g} s: gave up")

    def fail(self, why: str) -> None:
        """Close the stream at once, for this reason."""
        self._why = self._why or why
        self._closing = True
        if self.transport is not None:
            self.transport.abort()

    def close(self, why: str) -> None:
        """Close the stream after what has been written."""
        self._why = self._why or why
        self._closing = True
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.transport = None
        why = self._why or "connection closed by the peer"
        if exc is not None:
            why = f"{why} ({exc})"
        error = None
        if self._handshake is not None:
            error = self._error or HandshakeError(f"{why} {self._handshake.describe_stall()}")
            self._handshake = None
        self._node.peers.stream_ended(self, why, error)

    def pause_writing(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def resume_writing(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
