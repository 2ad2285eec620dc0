"""One peer: bytes in, frames out, ticks, and what must be undone when it goes.

"Protocol between Connected Nodes" of the distribution protocol chapter: after the handshake every message is a four-
byte length and a body; an empty body is a tick. `FrameReader` cuts the stream (no I/O), `PeerProtocol` is the asyncio
shell that first feeds the handshake and then the reader, `Connection` is what the node knows of a peer: it exists
from the first attempt to send on, so that a send to an unconnected node queues here until the handshake is done.

States of a `Connection`: *connecting* (no transport yet, output is queued), *up*, *down* (every monitor, link, call and
spawn that depended on it has been told `noconnection`).

All frames of one loop turn leave in one write: `enqueue` only collects, the node flushes at the end of the turn.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from gater.erl import etf
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
from gater.erl.terms import Atom, Pid, Reference, Term

if TYPE_CHECKING:
    from gater.erl.node import Monitor, Node, SpawnCall
    from gater.erl.process import Process

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
"""The longest distribution message accepted. A BEAM splits what is larger than 64 kB when fragments are on and has no
limit otherwise; this one holds a 128 MB binary with room and ends a stream whose length prefix is garbage."""

MAX_QUEUED_BYTES: Final = 512 * 1024 * 1024
"""What may wait to be written to one peer. A peer that does not read is disconnected beyond it."""

JOIN_BYTES: Final = 64 * 1024
"""Frames are copied into one buffer up to this size; larger batches are handed to the transport as they are."""

PASS_THROUGH: Final = 112
VERSION: Final = 131
_LENGTH: Final = struct.Struct(">I")
_FRAME_START: Final = b"\0\0\0\0" + bytes((PASS_THROUGH, VERSION))
_TICK: Final = b"\0\0\0\0"

log = structlog.get_logger(__name__)


class FrameReader:
    """Cuts a byte stream into frames. Memory grows with what has arrived, never with what a prefix announces."""

    __slots__ = ("_chunks", "_have", "_max_bytes", "_need")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = 4

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that `data` completes, in order; `b""` is a tick."""
        if self._have:
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._chunks)
            self._chunks.clear()
        frames: list[bytes] = []
        position = 0
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
        self._have = size - position
        if self._have:
            self._chunks.append(data[position:] if position else data)
        self._need = need
        return frames


class Connection:
    """What this node knows of one peer, from the first attempt to reach it until it is gone."""

    __slots__ = (
        "_node",
        "_out",
        "_out_bytes",
        "_sent_since_tick",
        "atoms",
        "attempt",
        "creation",
        "flags",
        "links",
        "monitors",
        "on_settled",
        "peer",
        "protocol",
        "queued",
        "silent_ticks",
        "spawns",
        "state",
        "watched",
    )

    def __init__(self, node: Node, peer: Atom) -> None:
        self._node = node
        self.peer = peer
        self.state = "connecting"
        self.creation = 0
        self.flags = DistributionFlag(0)
        self.protocol: PeerProtocol | None = None
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
        self.spawns: dict[Reference, SpawnCall] = {}
        """Our spawn requests that have not been answered."""
        self.queued = False
        self.silent_ticks = 0
        self._sent_since_tick = False
        self._out: list[bytes | bytearray] = []
        self._out_bytes = 0

    def __repr__(self) -> str:
        return f"<Connection {self.peer} {self.state}>"

    # Out

    def send_control(self, control: tuple[Term, ...]) -> None:
        """Queue a control message without payload."""
        frame = bytearray(_FRAME_START)
        etf.encode_into(frame, control)
        self._enqueue(frame)

    def send_message(self, control: tuple[Term, ...], message: Term) -> None:
        """Queue a control message and its payload term."""
        frame = bytearray(_FRAME_START)
        etf.encode_into(frame, control)
        frame.append(VERSION)
        etf.encode_into(frame, message)
        self._enqueue(frame)

    def _enqueue(self, frame: bytearray) -> None:
        if self.state == "down":
            return
        size = len(frame)
        _LENGTH.pack_into(frame, 0, size - 4)
        self._out.append(frame)
        self._out_bytes += size
        if not self.queued:
            self.queued = True
            self._node.flush_later(self)

    def flush(self) -> None:
        """Write what this loop turn has collected. Called by the node at the end of a turn."""
        self.queued = False
        protocol = self.protocol
        if protocol is None or protocol.transport is None:
            if self._out_bytes > MAX_QUEUED_BYTES:
                self._node.connection_lost(self, "more was sent than may be queued while connecting")
            return
        out = self._out
        if not out:
            return
        transport = protocol.transport
        if len(out) == 1:
            transport.write(out[0])
        elif self._out_bytes <= JOIN_BYTES:
            transport.write(b"".join(out))
        else:
            transport.writelines(out)
        self._out = []
        self._out_bytes = 0
        self._sent_since_tick = True
        if transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
            self.abort(f"peer does not read: more than {MAX_QUEUED_BYTES} bytes wait for it")

    def take_over(self, protocol: PeerProtocol, flags: DistributionFlag, creation: int) -> None:
        """The handshake is done: this transport now carries the connection."""
        self.protocol = protocol
        self.flags = flags
        self.creation = creation
        self.state = "up"
        if self._out:
            self.flush()

    def tick(self, allowed_silence: int) -> None:
        """A quarter of the tick time has passed: say something if nothing was said; give up on a silent peer."""
        protocol = self.protocol
        if protocol is None or protocol.transport is None:
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
        if self.protocol is not None:
            self.protocol.fail(why)
        else:
            self._node.connection_lost(self, why)


class PeerProtocol(asyncio.Protocol):
    """The asyncio shell around one TCP stream: handshake first, then frames."""

    def __init__(self, node: Node, handshake: Handshake, connection: Connection | None) -> None:
        self.transport: asyncio.Transport | None = None
        self.connection = connection
        self.received = False
        self._node = node
        self._handshake: Handshake | None = handshake
        self._reader = FrameReader(node.max_frame_bytes)
        self._why = "connection closed by peer"
        self._error: HandshakeError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.peer_address: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer_address = transport.get_extra_info("peername")
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._stalled)
        self._node.handshake_begun(self)
        if self._handshake is not None:
            self._carry_out(self._handshake.start())

    def data_received(self, data: bytes) -> None:
        self.received = True
        if self._handshake is not None:
            data = self._shake(data)
            if not data:
                return
        node = self._node
        connection = self.connection
        assert connection is not None
        try:
            for frame in self._reader.feed(data):
                if frame:
                    node.route(connection, frame)
        except RemoteProtocolError as error:
            self.fail(str(error))
        except Exception as error:
            log.error("route_failed", node=str(node.name), peer=str(connection.peer), error=described(error))
            self.fail(f"internal error: {error!r}")
        node.turn()

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
            return b""
        return b"" if self._handshake is not None else handshake.leftover

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if self.transport is None:
                return
            match effect:
                case Send(data):
                    self.transport.write(data)
                case PeerNamed():
                    assert self._handshake is not None
                    status, cookie, refusal = self._node.judge_peer(self, effect)
                    self._carry_out(self._handshake.accept(status, cookie))
                    if refusal is not None:
                        self._error = refusal
                        self.close(str(refusal))
                case StatusReceived("alive"):
                    assert self._handshake is not None
                    proceed = self._node.wants_replacement(self)
                    self._carry_out(self._handshake.confirm_alive(proceed))
                    if not proceed:
                        self.close("the connection that the peer asked about is alive")
                case StatusReceived():
                    pass
                case Completed():
                    self._complete(effect)

    def _complete(self, done: Completed) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._handshake = None
        self.connection = self._node.handshake_completed(self, done)
        if self.connection is None:
            self.fail("the handshake was overtaken by another connection to the same node")

    def _stalled(self) -> None:
        if self._handshake is not None:
            self.fail(f"no handshake within {HANDSHAKE_TIMEOUT_S:g} s: gave up {self._handshake.describe_stall()}")

    def fail(self, why: str) -> None:
        """Close the stream at once, for this reason."""
        self._why = why
        if self.transport is not None:
            self.transport.abort()

    def close(self, why: str) -> None:
        """Close the stream after what has been written."""
        self._why = why
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.transport = None
        why = self._why if exc is None else f"{self._why} ({exc})"
        error = None
        if self._handshake is not None:
            error = self._error or HandshakeError(f"{why} {self._handshake.describe_stall()}")
            self._handshake = None
        self._node.stream_ended(self, why, error)
