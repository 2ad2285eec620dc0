"""What is fuzzed: one function per reader of a peer's bytes, and the promises checked on every input.

A target takes any bytes and returns. It lets the documented protocol errors pass, and raises whatever else comes: an
exception that is not documented, a `BrokenPromise`, or (from `checked`) time or memory out of proportion to the input.
"""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from gater.cluster.gossip import GossipCodec, Intake, NotHeartbeat
from gater.erl import control, epmd_protocol, etf
from gater.erl.connection import FrameReader
from gater.erl.dist_header import HeaderReader, HeaderWriter, Message
from gater.erl.errors import DecodeError, HandshakeError, LimitExceeded, RemoteProtocolError, shown
from gater.erl.handshake import OUR_FLAGS, AcceptStatus, Completed, Handshake, LocalIdentity, PeerNamed, StatusReceived
from gater.erl.phash2 import phash2
from gater.erl.terms import Atom, EncodedTerm, Term, exact_equal
from gater.pubsub.messages import parse_appended, parse_broadcast, parse_events
from gater.swarm.messages import entry_from_term, message_from_term, request_from_term

MAX_TERM_BYTES: Final = 64 * 1024
"""What a compressed term may declare here: a smaller value of the named limit, so that memory stays measurable."""

MAX_ELEMENTS: Final = 20_000
MAX_ATOMS: Final = 1_000
MAX_FRAME_BYTES: Final = 64 * 1024

SECONDS: Final = 0.1
SECONDS_PER_BYTE: Final = 100e-6
"""What one input may take. Instrumented code is some five times slower, a target reads its input up to ten times, and
other programs share the machine: quadratic time is far above this at a few kilobytes."""

BYTES: Final = 1024 * 1024
BYTES_PER_BYTE: Final = 400
"""What one input may hold at its peak: seven bytes can become a map of 520 bytes, and a target holds several copies."""

COOKIE: Final = "fuzz"
LOCAL: Final = LocalIdentity("we@127.0.0.1", OUR_FLAGS, 7)
PEER: Final = "peer@127.0.0.1"
CHALLENGE: Final = 0x01020304
SECRET: Final = "secret"
IV: Final = bytes(range(16))
CACHE: Final[list[Term]] = [Atom("ok"), Atom("a@127.0.0.1"), True, None, Atom("ü" * 200)]
"""What `ATOM_CACHE_REF` means in bare terms."""


class BrokenPromise(Exception):
    """Something that must hold did not."""


def promise(held: bool, what: str) -> None:
    if not held:
        raise BrokenPromise(what)


def etf_alone(data: bytes) -> None:
    """A term that stands alone, compressed or not, as gossip and the public `decode` take it."""
    try:
        term = etf.decode(data, atoms=etf.AtomTable(MAX_ATOMS), max_bytes=MAX_TERM_BYTES, max_elements=MAX_ELEMENTS)
    except (DecodeError, LimitExceeded):
        return
    promise(exact_equal(etf.decode(etf.encode(term)), term), "a term that was encoded again is another term")
    promise(exact_equal(etf.decode(etf.encode(term, compressed=6)), term), "a compressed term is another term")
    shown(term)
    try:
        promise(phash2(term) == phash2(etf.decode(etf.encode(term))), "equal terms have two hashes")
    except (DecodeError, LimitExceeded):
        promise(b"u" in data or b"p" in data or data[1:2] == b"P", "a term without closures has no hash")


def etf_inside(data: bytes) -> None:
    """A term inside a distribution message, with an atom cache, by each of the ways it may be read."""
    atoms = etf.AtomTable(MAX_ATOMS)
    try:
        end = etf.skip_term(data, 0, CACHE)
    except (DecodeError, LimitExceeded):
        end = None
    try:
        term, term_end = etf.decode_term(data, 0, atoms, CACHE)
    except LimitExceeded:
        return
    except DecodeError:
        term_end = None
    promise(term_end is None or term_end == end, "decode_term and skip_term disagree about where a term ends")
    if end is not None:
        plain = etf.to_plain(data, 0, CACHE)
        promise(etf.skip_term(plain, 0) == len(plain), "a term made plain is not one whole term")
        if term_end is not None:
            promise(exact_equal(etf.decode_term(plain, 0, atoms)[0], term), "a term made plain is another term")
    for levels in range(4):
        try:
            spine = etf.decode_spine(data, 0, levels, etf.AtomTable(MAX_ATOMS), CACHE)
        except (DecodeError, LimitExceeded):
            continue
        if term_end == len(data):
            promise(exact_equal(_whole(spine), term), f"a spine of {levels} levels is another term")


def _whole(spine: Term) -> Term:
    heads = []
    while type(spine) is tuple and spine:
        heads.append(spine[:-1])
        spine = spine[-1]
    if type(spine) is EncodedTerm:
        spine = etf.decode_encoded(spine)
    for head in reversed(heads):
        spine = (*head, spine)
    return spine


def control_messages(data: bytes) -> None:
    """A control message and, behind it, what gater's own readers make of a payload."""
    atoms = etf.AtomTable(MAX_ATOMS)
    try:
        term, _end = etf.decode_term(data, 0, atoms, CACHE)
    except (DecodeError, LimitExceeded):
        return
    try:
        message = control.parse(term)
    except RemoteProtocolError:
        pass
    else:
        promise(type(term) is tuple and term[0] == message.OPCODE, "a control message has another opcode")
    for reader in (message_from_term, request_from_term, entry_from_term):
        with contextlib.suppress(RemoteProtocolError):
            reader(term)
    parse_broadcast(term)
    parse_events(term)
    parse_appended(term)
    if type(term) is list:
        control.parse_spawn_options(term)


def dist_header(data: bytes) -> None:
    """Frames of a connection with distribution headers, each two bytes of length and a body."""
    reader = HeaderReader(
        etf.AtomTable(MAX_ATOMS), max_open_sequences=8, max_message_bytes=16 * 1024, max_open_bytes=32 * 1024
    )
    atoms = etf.AtomTable(MAX_ATOMS)
    leaving, arriving = HeaderWriter(), HeaderReader(etf.AtomTable())
    for frame in blocks(data):
        if not frame:
            continue
        try:
            message = reader.receive(frame)
        except RemoteProtocolError:
            return
        promise(reader.open_sequences <= 8, "more messages are open than allowed")
        promise(0 <= reader.open_bytes <= 32 * 1024, "open messages hold more than allowed")
        promise(bool(reader.open_sequences) or not reader.open_bytes, "bytes are counted that nobody holds")
        if message is None:
            continue
        try:
            _, end = etf.decode_term(message.data, message.pos, atoms, message.atoms)
            if end < len(message.data):
                spine = etf.decode_spine(message.data, end, 2, atoms, message.atoms)
                _pass_on(spine, message, end, leaving, arriving)
        except (DecodeError, LimitExceeded):
            pass


def _pass_on(spine: Term, message: Message, pos: int, writer: HeaderWriter, reader: HeaderReader) -> None:
    """The term from `pos` on must be the same when it was passed on unread. What is none is passed on as it is."""
    term, term_end = etf.decode_term(message.data, pos, etf.AtomTable(MAX_ATOMS), message.atoms)
    passed = reader.receive(b"".join(writer.message((1, Atom("to")), spine).frame()))
    promise(passed is not None, "what is passed on is no whole message")
    assert passed is not None
    _, end = etf.decode_term(passed.data, passed.pos, etf.AtomTable(), passed.atoms)
    again, end = etf.decode_term(passed.data, end, etf.AtomTable(), passed.atoms)
    promise(len(passed.data) - end == len(message.data) - term_end, "other bytes follow what is passed on")
    promise(exact_equal(again, term), "what is passed on is another term")


_STATUSES: Final[tuple[AcceptStatus, ...]] = ("ok", "ok_simultaneous", "nok", "not_allowed", "alive")


def handshake(data: bytes) -> None:
    """One handshake: the first byte chooses role and answers, the second how the stream is cut."""
    if len(data) < 2:
        return
    choice, step = data[0], data[1] or len(data)
    stream = data[2:]
    if choice & 1:
        machine = Handshake("acceptor", LOCAL, challenge=CHALLENGE)
    else:
        machine = Handshake("initiator", LOCAL, challenge=CHALLENGE, cookie=COOKIE, peer_name=PEER)
    machine.start()
    try:
        for pos in range(0, len(stream), step):
            effects = machine.receive(stream[pos : pos + step])
            while effects:
                more = []
                for effect in effects:
                    if type(effect) is PeerNamed:
                        status = _STATUSES[(choice >> 1) % 5]
                        more += machine.accept(status, COOKIE)
                        if status in ("nok", "not_allowed"):
                            return
                    elif type(effect) is StatusReceived and effect.status == "alive":
                        more += machine.confirm_alive(bool(choice & 2))
                        if not choice & 2:
                            return
                    elif type(effect) is Completed:
                        promise(effect.flags & ~int(OUR_FLAGS) == 0, "flags are agreed that we do not have")
                        sent = stream[: pos + step]
                        promise(sent.endswith(machine.leftover), "the leftover is not the end of the stream")
                        return
                effects = more
    except HandshakeError:
        promise(len(machine.farewell) < 100, "a farewell is no packet")
    machine.describe_stall()


def epmd(data: bytes) -> None:
    """The parsers of EPMD's answers, and a server to which blocks are said: connection, act, then bytes."""
    for parse in (epmd_protocol.parse_alive2_response, epmd_protocol.parse_port2_response):
        try:
            for end in {len(data), len(data) // 2}:
                parse(data[:end])
        except RemoteProtocolError:
            pass
    try:
        _, names = epmd_protocol.parse_names_response(data)
        promise(all(0 <= port <= 65535 for port in names.values()), "a port that is none")
    except RemoteProtocolError:
        pass
    try:
        request = epmd_protocol.parse_request(data)
        again = epmd_protocol.parse_request(request.encode()[2:])
        promise(again == request, "a request that was encoded again is another request")
    except RemoteProtocolError:
        pass
    server = epmd_protocol.EpmdServer(4369, 0xFFFFFFFE)
    open_connections: set[int] = set()
    for block in islice(blocks(data), 64):
        if len(block) < 2:
            continue
        connection, act = block[0] & 7, block[1] & 7
        if connection not in open_connections:
            effects = server.connected(connection, is_local=act < 6)
            open_connections.add(connection)
        elif act == 1:
            server.disconnected(connection)
            open_connections.discard(connection)
            effects = []
        elif act == 2:
            effects = server.timed_out(connection)
        else:
            effects = server.receive(connection, block[2:])
        if any(type(effect) is epmd_protocol.Close for effect in effects):
            open_connections.discard(connection)
        promise(server.connection_count == len(open_connections), "connections are miscounted")
        promise(len(server.nodes) <= len(open_connections), "a name is held by no connection")


def frames(data: bytes) -> None:
    """A stream of frames, cut into blocks: how it is cut changes nothing."""
    pieces = list(blocks(data))
    stream = b"".join(pieces)
    whole, cut = FrameReader(MAX_FRAME_BYTES), FrameReader(MAX_FRAME_BYTES)
    try:
        expected = whole.feed(stream)
    except LimitExceeded:
        try:
            for piece in pieces:
                cut.feed(piece)
        except LimitExceeded:
            return
        raise BrokenPromise("a frame that is too long is too long only in one piece") from None
    promise([frame for piece in pieces for frame in cut.feed(piece)] == expected, "frames depend on how they are cut")


def gossip(data: bytes) -> None:
    """A gossip packet, plain, as it is under a secret, and as the plain text of an encrypted one."""
    plain, secret = GossipCodec(None), GossipCodec(SECRET)
    intake = Intake(plain, "we@127.0.0.1")
    packets = [(plain, data), (secret, data), (secret, encrypted(data))]
    for codec, packet in packets:
        try:
            name = codec.decode(packet)
        except NotHeartbeat:
            continue
        promise(codec.decode(codec.encode(name, iv=IV)) == name, "a name is told as another one")
    for now, block in enumerate(islice(blocks(data), 64)):
        intake.receive(block, "127.0.0.1", now / 100)
    promise(len(intake.names()) <= 64, "names are made up")


def encrypted(message: bytes) -> bytes:
    """`message` as libcluster sends it under `SECRET`."""
    from hashlib import sha256

    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC

    padding = 16 - len(message) % 16
    encryptor = Cipher(AES(sha256(SECRET.encode()).digest()), CBC(IV)).encryptor()
    return IV + encryptor.update(message + bytes((padding,)) * padding) + encryptor.finalize()


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "etf_alone": etf_alone,
    "etf_inside": etf_inside,
    "control": control_messages,
    "dist_header": dist_header,
    "handshake": handshake,
    "epmd": epmd,
    "frames": frames,
    "gossip": gossip,
}


def blocks(data: bytes) -> Iterator[bytes]:
    """The blocks of an input that is several: two bytes of length before each; the last may be cut off."""
    pos = 0
    while pos + 2 <= len(data):
        size = data[pos] << 8 | data[pos + 1]
        yield data[pos + 2 : pos + 2 + size]
        pos += 2 + size


def block(data: bytes) -> bytes:
    """One block."""
    return len(data).to_bytes(2, "big") + data


def weight(data: bytes) -> int:
    """How much an input may cost, in bytes: a compressed term as much as it may hold."""
    compressed = any(data[pos : pos + 2] == b"\x83P" for pos in (0, data.find(b"\x83P")) if pos >= 0)
    return len(data) + (MAX_TERM_BYTES if compressed else 0)


def checked(target: Callable[[bytes], None], data: bytes, *, memory: bool) -> None:
    """Run `target` and raise `BrokenPromise` if it took more time (or, with `memory`, held more) than is in proportion.

    Time is that of this thread, and must be too long three times in a row.
    """
    allowed_s = SECONDS + SECONDS_PER_BYTE * weight(data)
    if memory:
        _measured(target, data)
        return
    for _ in range(3):
        started = time.thread_time()
        target(data)
        taken_s = time.thread_time() - started
        if taken_s <= allowed_s:
            return
    raise BrokenPromise(f"{len(data)} bytes took {taken_s:.2f} s, {allowed_s:.2f} s are allowed")


def _measured(target: Callable[[bytes], None], data: bytes) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        target(data)
        held = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    allowed = BYTES + BYTES_PER_BYTE * weight(data)
    if held > allowed:
        raise BrokenPromise(f"{len(data)} bytes took {held} bytes of memory, {allowed} are allowed")
