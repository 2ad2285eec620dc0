"""The distribution handshake, version 6, both sides, without I/O.

Follows the ERTS user's guide, "Distribution Protocol", section "Distribution Handshake", and what `dist_util.erl` of
OTP 25 to 28 does. Sockets, timers, random numbers and the question which connections exist already are the owner's;
after the handshake the stream belongs to `connection.py`.

Theory of operation. Every packet has its length in front, in two bytes (four over TLS). A is the initiator (it opened
the socket), B the acceptor; the owner of a machine carries out the effects it returns.

| A waits for    | A sends            |   | B waits for      | B sends            | then B's owner              |
|----------------|--------------------|---|------------------|--------------------|-----------------------------|
|                | name `N`           | → | `NAME`           |                    | sees `PeerNamed`, `accept`s |
| `STATUS`       |                    | ← | `OWNER`          | status `s`         |                             |
| `OWNER`        | `strue`/`sfalse`   | → | `ALIVE_ANSWER`   |                    | (only after status `alive`) |
| `CHALLENGE`    |                    | ← |                  | challenge `N`      |                             |
|                | reply `r` + digest | → | `REPLY`          |                    |                             |
| `ACK`          |                    | ← |                  | ack `a` + digest   | sees `Completed`            |
| `DONE`         |                    |   | `DONE`           |                    |                             |

A status `ok` or `ok_simultaneous` leads A to `CHALLENGE`, `alive` to `OWNER` (its owner says by `confirm_alive` whether
the connection B still remembers is dead), `nok` and `not_allowed` end the handshake. A digest is
`md5(cookie ++ challenge in decimal)`: each side proves that it knows the cookie by answering the other's challenge, so
B learns first and A last. Every error leaves the machine in `FAILED`; `farewell` then holds what is still owed to the
peer before the socket is closed.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import md5
from struct import Struct
from typing import Final, Literal, TypeAlias

from gater.erl.errors import AuthenticationError, HandshakeError, LocalProtocolError
from gater.erl.terms import MAX_ATOM_CHARACTERS


class DistributionFlag(enum.IntFlag):
    """What a node can do ("Distribution Flags" of the protocol document; named as in `dist.hrl`, without `DFLAG_`)."""

    PUBLISHED = 0x1
    """The node is visible: it takes part in `global` and in `nodes()`. gater never sets it."""
    ATOM_CACHE = 0x2
    """Obsolete atom cache."""
    EXTENDED_REFERENCES = 0x4
    """References of three 32-bit words. Mandatory."""
    DIST_MONITOR = 0x8
    """`MONITOR_P`, `DEMONITOR_P` and `MONITOR_P_EXIT`."""
    FUN_TAGS = 0x10
    """Funs have their own tag. Mandatory."""
    DIST_MONITOR_NAME = 0x20
    """Processes can be monitored by registered name."""
    HIDDEN_ATOM_CACHE = 0x40
    """Obsolete atom cache between hidden nodes."""
    NEW_FUN_TAGS = 0x80
    """`NEW_FUN_EXT`. Mandatory."""
    EXTENDED_PIDS_PORTS = 0x100
    """Pids and ports with more than 18 bits of number. Mandatory."""
    EXPORT_PTR_TAG = 0x200
    """`EXPORT_EXT`. Mandatory."""
    BIT_BINARIES = 0x400
    """`BIT_BINARY_EXT`. Mandatory."""
    NEW_FLOATS = 0x800
    """`NEW_FLOAT_EXT`. Mandatory."""
    UNICODE_IO = 0x1000
    """The I/O protocol carries Unicode."""
    DIST_HDR_ATOM_CACHE = 0x2000
    """Distribution headers with an atom cache."""
    SMALL_ATOM_TAGS = 0x4000
    """`SMALL_ATOM_EXT`."""
    UTF8_ATOMS = 0x10000
    """Atoms in UTF-8. Mandatory."""
    MAP_TAG = 0x20000
    """`MAP_EXT`. Mandatory."""
    BIG_CREATION = 0x40000
    """Creations of 32 bits. Mandatory."""
    SEND_SENDER = 0x80000
    """`SEND_SENDER` in place of `SEND`."""
    BIG_SEQTRACE_LABELS = 0x100000
    """Any term may be the label of a sequential trace."""
    EXIT_PAYLOAD = 0x400000
    """Exit reasons travel as payload (`PAYLOAD_EXIT` and its kin), not in the control message."""
    FRAGMENTS = 0x800000
    """Large messages come in fragments."""
    HANDSHAKE_23 = 0x1000000
    """The handshake of this module. Mandatory."""
    UNLINK_ID = 0x2000000
    """`UNLINK_ID` and `UNLINK_ID_ACK`. Mandatory since OTP 26."""
    MANDATORY_25_DIGEST = 0x4000000
    """Stands for every flag that OTP 25 made mandatory; later releases may send it instead of them."""
    SPAWN = 1 << 32
    """`SPAWN_REQUEST` and `SPAWN_REPLY`."""
    NAME_ME = 1 << 33
    """The peer has only a host name and asks to be given a node name."""
    V4_NC = 1 << 34
    """Pids, ports and references of the larger ("V4") format. Mandatory since OTP 26."""
    ALIAS = 1 << 35
    """Process aliases, `ALIAS_SEND`."""
    ALTACT_SIG = 1 << 37
    """`ALTACT_SIG_SEND`, since OTP 28; without it such a node falls back to `ALIAS_SEND`."""


MANDATORY_25_FLAGS: Final = (
    DistributionFlag.EXTENDED_REFERENCES
    | DistributionFlag.FUN_TAGS
    | DistributionFlag.EXTENDED_PIDS_PORTS
    | DistributionFlag.NEW_FUN_TAGS
    | DistributionFlag.EXPORT_PTR_TAG
    | DistributionFlag.BIT_BINARIES
    | DistributionFlag.NEW_FLOATS
    | DistributionFlag.UTF8_ATOMS
    | DistributionFlag.MAP_TAG
    | DistributionFlag.BIG_CREATION
    | DistributionFlag.HANDSHAKE_23
)
"""What `MANDATORY_25_DIGEST` stands for (`MANDATORY_DFLAGS_25` in `dist.hrl`)."""

MANDATORY_FLAGS: Final = MANDATORY_25_FLAGS | DistributionFlag.UNLINK_ID | DistributionFlag.V4_NC
"""What a peer must be capable of: what OTP 26 and later demand, all of which OTP 25 offers."""

OUR_FLAGS: Final = (
    MANDATORY_FLAGS
    | DistributionFlag.MANDATORY_25_DIGEST
    | DistributionFlag.DIST_MONITOR
    | DistributionFlag.DIST_MONITOR_NAME
    | DistributionFlag.UNICODE_IO
    | DistributionFlag.SMALL_ATOM_TAGS
    | DistributionFlag.SEND_SENDER
    | DistributionFlag.BIG_SEQTRACE_LABELS
    | DistributionFlag.EXIT_PAYLOAD
    | DistributionFlag.SPAWN
    | DistributionFlag.ALIAS
)
"""What gater offers. Never `PUBLISHED` (the node is hidden) nor `NAME_ME` (it has a name)."""

HEADER_FLAGS: Final = DistributionFlag.DIST_HDR_ATOM_CACHE | DistributionFlag.FRAGMENTS
"""Offered in addition by a node that speaks distribution headers (`dist_header.py`)."""

MAX_NODE_NAME_CHARACTERS: Final = MAX_ATOM_CHARACTERS
"""A node name is an atom."""

MAX_HANDSHAKE_PACKET_BYTES: Final = 2048
"""The longest packet accepted. The longest one of the protocol is a challenge with a name of 255 characters: 21 fixed
bytes and at most 1020 of name; the rest is room for additions, which the document says to ignore. Anything that is
not an Erlang node crosses it with its first two bytes ("GE" of an HTTP request announces 18245)."""

HANDSHAKE_TIMEOUT_S: Final = 7.0
"""How long an owner should wait for the whole handshake: the default of `net_setuptime` in kernel."""

Role: TypeAlias = Literal["initiator", "acceptor"]
AcceptStatus: TypeAlias = Literal["ok", "ok_simultaneous", "nok", "not_allowed", "alive"]

_DIGEST_BYTES: Final = 16
_NAME_FIELDS: Final = Struct(">QIH")
_CHALLENGE_FIELDS: Final = Struct(">QIIH")
_MAX_UINT32: Final = 0xFFFF_FFFF


class ConnectionYielded(HandshakeError):
    """The peer answered `nok`: it is connecting to us at this moment and its attempt, not ours, is to be kept."""


@dataclass(frozen=True, slots=True)
class LocalIdentity:
    """Who this node says it is: its full name, its flags and its incarnation (`creation`, 32 bits)."""

    name: str
    flags: DistributionFlag
    creation: int

    def __post_init__(self) -> None:
        reason = node_name_fault(self.name)
        if reason is not None:
            raise LocalProtocolError(f"our own node name {self.name!r} {reason}")
        if not 0 <= self.creation <= _MAX_UINT32:
            raise LocalProtocolError(f"a creation has 32 bits, ours is {self.creation}")


@dataclass(frozen=True, slots=True)
class Send:
    """Write `data` to the stream."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PeerNamed:
    """Acceptor: the peer says who it is. The machine waits until the owner calls `accept`.

    `flags` are `DistributionFlag`s as a plain number: the enumeration would remember every combination a peer makes up.
    """

    name: str
    flags: int
    creation: int


@dataclass(frozen=True, slots=True)
class StatusReceived:
    """Initiator: the peer's answer to our name.

    `ok` and `ok_simultaneous` need nothing. On `alive` (the peer still has a connection with us) the machine waits
    until the owner calls `confirm_alive`.
    """

    status: str


@dataclass(frozen=True, slots=True)
class Completed:
    """Both sides know the cookie. `flags` is what both can do, `peer_flags` all that the peer offered (plain numbers).

    After an `accept("alive", ..)` the owner now drops the old connection to that node before it uses this one.
    """

    peer_name: str
    flags: int
    peer_flags: int
    creation: int


Effect: TypeAlias = Send | PeerNamed | StatusReceived | Completed


class State(enum.Enum):
    """What the machine waits for (the table on top of the module)."""

    CREATED = "start()"
    NAME = "the peer's name"
    STATUS = "the peer's status"
    OWNER = "a decision of the owner"
    ALIVE_ANSWER = "the answer to status 'alive'"
    CHALLENGE = "the peer's challenge"
    REPLY = "the reply to our challenge"
    ACK = "the acknowledgement of our reply"
    DONE = "nothing, the handshake is done"
    FAILED = "nothing, the handshake has failed"


def node_name_fault(name: str) -> str | None:
    """Why `name` cannot be the full name of a node, as the end of a sentence about it; None if it can."""
    if len(name) > MAX_NODE_NAME_CHARACTERS:
        return f"is longer than MAX_NODE_NAME_CHARACTERS ({MAX_NODE_NAME_CHARACTERS})"
    alive, at, host = name.partition("@")
    if not at or not alive or not host or "@" in host:
        return "is not of the form name@host"
    if not name.isprintable() or " " in name:
        return "contains spaces or unprintable characters"
    try:
        name.encode("latin-1")
    except UnicodeEncodeError:
        return "contains characters outside Latin-1, which Erlang nodes cannot send in a handshake"
    return None


def has_long_name(name: str) -> bool:
    """Whether a node's name is one of `-name`: with a host that has a dot, or is an IPv6 address."""
    host = name.partition("@")[2]
    return "." in host or ":" in host


def pick_simultaneous(our_name: str, peer_name: str) -> str:
    """Whose attempt is kept when two nodes connect to each other at once: the name of the node that opened it.

    The greater name wins (`accept_pending` in `net_kernel.erl`). An acceptor whose owner is connecting to the same
    peer answers `nok` if this is our own name, and otherwise gives up its own attempt and answers `ok_simultaneous`.
    """
    return max(our_name, peer_name)


def digest(cookie: str, challenge: int) -> bytes:
    """The proof of knowing `cookie`: the MD5 of the cookie followed by `challenge` in decimal.

    Raises LocalProtocolError for a cookie that no Erlang node could have.
    """
    try:
        secret = cookie.encode("latin-1")
    except UnicodeEncodeError:
        raise LocalProtocolError("a cookie has Latin-1 characters only") from None
    return md5(secret + b"%d" % challenge, usedforsecurity=False).digest()


def flag_names(flags: int) -> str:
    """The names of `flags` for people, for example `UTF8_ATOMS, V4_NC`."""
    return ", ".join(flag.name or hex(flag) for flag in DistributionFlag if flag & flags) or "none"


class Handshake:
    """One handshake of one side.

    Feed it raw stream bytes with `receive`; it answers with effects for the owner to carry out in order. When
    `Completed` has been returned, bytes that came behind the last packet are in `leftover`: they are the first of the
    connection.

    :param role: `initiator` if this side opened the socket.
    :param local: who we are.
    :param challenge: 32 random bits, fresh for every handshake; a predictable challenge lets a recorded handshake be
        played back.
    :param cookie: initiators only: the cookie for `peer_name`. Acceptors learn the name first and give the cookie to
        `accept`.
    :param peer_name: initiators only: the full name of the node called.
    :param length_bytes: how many bytes of length stand before a packet: 2 or, over TLS (`inet_tls_dist.erl`), 4.
    """

    __slots__ = (
        "_buffer",
        "_challenge",
        "_cookie",
        "_length_bytes",
        "_local",
        "_peer_creation",
        "_peer_flags",
        "_peer_name",
        "_role",
        "_state",
        "farewell",
        "leftover",
    )

    def __init__(
        self,
        role: Role,
        local: LocalIdentity,
        *,
        challenge: int,
        cookie: str | None = None,
        peer_name: str | None = None,
        length_bytes: int = 2,
    ) -> None:
        if not 0 <= challenge <= _MAX_UINT32:
            raise LocalProtocolError(f"a challenge has 32 bits, this one is {challenge}")
        if role == "initiator":
            if cookie is None or peer_name is None:
                raise LocalProtocolError("an initiator needs the peer's name and the cookie")
            fault = node_name_fault(peer_name)
            if fault is not None:
                raise LocalProtocolError(f"the node name {peer_name!r} {fault}")
        elif cookie is not None or peer_name is not None:
            raise LocalProtocolError("an acceptor learns the peer's name from the peer and its cookie in accept()")
        self._role: Final = role
        self._local: Final = local
        self._challenge: Final = challenge
        self._cookie = cookie
        self._peer_name = peer_name
        self._peer_flags = 0
        self._peer_creation = 0
        self._length_bytes: Final = length_bytes
        self._state = State.CREATED
        self._buffer = bytearray()
        self.leftover: bytes = b""
        """After `Completed`: what came behind the handshake."""
        self.farewell: bytes = b""
        """After an error: what to write before closing, so that the peer can tell why (often nothing)."""

    @property
    def state(self) -> State:
        return self._state

    @property
    def peer_name(self) -> str | None:
        """The peer's name as far as it is known."""
        return self._peer_name

    def start(self) -> list[Effect]:
        """Begin. An initiator introduces itself; an acceptor waits."""
        self._expect_state(State.CREATED, "start")
        if self._role == "acceptor":
            self._state = State.NAME
            return []
        name = self._local.name.encode("latin-1")
        fields = _NAME_FIELDS.pack(self._local.flags, self._local.creation, len(name))
        self._state = State.STATUS
        return [Send(self._packet(b"N" + fields + name))]

    def receive(self, data: bytes | bytearray | memoryview) -> list[Effect]:
        """Take the next bytes of the stream, cut anywhere.

        Raises HandshakeError (AuthenticationError for a wrong cookie) when the peer breaks the protocol or is refused;
        the handshake is over then, and the socket is to be closed after `farewell`.
        """
        if self._state in (State.CREATED, State.DONE, State.FAILED):
            raise LocalProtocolError(f"received bytes while waiting for {self._state.value}")
        self._buffer += data
        return self._advance()

    def accept(self, status: AcceptStatus, cookie: str | None = None) -> list[Effect]:
        """Acceptor's owner: the answer to `PeerNamed`, and the cookie to demand from that peer.

        | status            | when                                                       | then              |
        |-------------------|------------------------------------------------------------|-------------------|
        | `ok`              | no other connection with this peer                         | challenge is sent |
        | `ok_simultaneous` | we are connecting to it too, and its attempt wins          | challenge is sent |
        | `alive`           | a connection to it is up: the peer is asked about that one | its answer counts |
        | `nok`             | we are connecting to it too, and our attempt wins          | close             |
        | `not_allowed`     | we do not want this peer                                   | close             |

        `pick_simultaneous` decides between `ok_simultaneous` (our own attempt is to be given up) and `nok`. After
        `alive` the peer answers `true` (the old connection is dead: the handshake goes on, and the old one is to be
        dropped at `Completed`) or `false`, which raises HandshakeError.
        """
        self._expect_state(State.OWNER, "accept")
        if self._role != "acceptor":
            raise LocalProtocolError("accept() is for acceptors; an initiator's owner calls confirm_alive()")
        told: list[Effect] = [Send(self._packet(b"s" + status.encode()))]
        if status in ("nok", "not_allowed"):
            self._state = State.FAILED
            return told
        if cookie is None:
            raise LocalProtocolError(f"accept({status!r}) needs the cookie for {self._peer_name}")
        self._cookie = cookie
        if status == "alive":
            self._state = State.ALIVE_ANSWER
        else:
            told.append(self._send_challenge())
        return told + self._advance()

    def confirm_alive(self, proceed: bool) -> list[Effect]:
        """Initiator's owner: the answer to status `alive`.

        True: our old connection is gone, go on with this one. False: it lives, keep it; this socket is to be closed
        after sending.
        """
        self._expect_state(State.OWNER, "confirm_alive")
        if self._role != "initiator":
            raise LocalProtocolError("confirm_alive() is for initiators; an acceptor's owner calls accept()")
        if not proceed:
            self._state = State.FAILED
            return [Send(self._packet(b"sfalse"))]
        self._state = State.CHALLENGE
        return [Send(self._packet(b"strue")), *self._advance()]

    def describe_stall(self) -> str:
        """What to say of a peer that fell silent or hung up: what was being waited for, and the usual cause."""
        if self._state is State.ACK or (self._state is State.CHALLENGE and self._role == "initiator"):
            hint = "; a node that hangs up here usually has another cookie or refuses us"
        elif self._state is State.REPLY:
            hint = "; a node that hangs up here usually refuses our flags or name"
        elif self._state is State.NAME and not self._buffer:
            hint = "; it sent nothing at all: a port scan, or not an Erlang node"
        else:
            hint = ""
        return f"while waiting for {self._state.value}{hint}"

    def _expect_state(self, state: State, method: str) -> None:
        if self._state is not state:
            raise LocalProtocolError(f"{method}() called while waiting for {self._state.value}")

    def _advance(self) -> list[Effect]:
        effects: list[Effect] = []
        while (handler := _HANDLERS.get(self._state)) is not None:
            packet = self._next_packet()
            if packet is None:
                break
            effects += handler(self, packet)
        else:
            if self._state is State.DONE:
                self.leftover = bytes(self._buffer)
                self._buffer.clear()
            elif len(self._buffer) > MAX_HANDSHAKE_PACKET_BYTES:
                raise self._fail(f"{len(self._buffer)} bytes came before our answer; a peer has to wait for it")
        return effects

    def _next_packet(self) -> bytes | None:
        buffer = self._buffer
        start = self._length_bytes
        if len(buffer) < start:
            return None
        length = int.from_bytes(buffer[:start], "big")
        if not 0 < length <= MAX_HANDSHAKE_PACKET_BYTES:
            raise self._fail(
                f"MAX_HANDSHAKE_PACKET_BYTES allows packets of 1 to {MAX_HANDSHAKE_PACKET_BYTES} bytes, {length} were "
                f"announced; the first bytes {bytes(buffer[:8])!r} do not look like an Erlang node"
            )
        if len(buffer) < start + length:
            return None
        packet = bytes(buffer[start : start + length])
        del buffer[: start + length]
        return packet

    def _packet(self, content: bytes) -> bytes:
        return len(content).to_bytes(self._length_bytes, "big") + content

    def _fail(self, message: str, error: type[HandshakeError] = HandshakeError) -> HandshakeError:
        peer = f" with {self._peer_name}" if self._peer_name is not None else ""
        waited_for = self._state.value
        self._state = State.FAILED
        self._buffer.clear()
        return error(f"handshake{peer} failed while waiting for {waited_for}: {message}")

    def _refuse(self, message: str) -> HandshakeError:
        """Fail, and owe the peer the status that says so."""
        self.farewell = self._packet(b"snot_allowed")
        return self._fail(message)

    def _peer_fields(self, packet: bytes, fields: Struct) -> tuple[list[int], str]:
        """The numbers and the name of a packet `N`, which are followed by bytes to be ignored."""
        start = 1 + fields.size
        if len(packet) < start:
            raise self._fail(f"a packet of at least {start} bytes was expected, {packet[:32]!r} came")
        *numbers, name_length = fields.unpack_from(packet, 1)
        if len(packet) < start + name_length:
            raise self._fail(f"the packet announces a name of {name_length} bytes and has {len(packet) - start}")
        return numbers, packet[start : start + name_length].decode("latin-1")

    def _check_flags(self, offered: int) -> str | None:
        if offered & DistributionFlag.MANDATORY_25_DIGEST:
            offered |= int(MANDATORY_25_FLAGS)
        self._peer_flags = offered
        missing = int(MANDATORY_FLAGS) & ~offered
        if missing:
            return f"the peer lacks {flag_names(missing)}; it has to run OTP 25 or later"
        return None

    def _on_name(self, packet: bytes) -> list[Effect]:
        if packet[:1] == b"n":
            raise self._refuse(
                "the peer sent the name message of handshake version 5; version 6 (OTP 23 and later, mandatory since "
                "OTP 25) is expected: upgrade the peer, or let it find us through an EPMD that says version 6"
            )
        if packet[:1] != b"N":
            raise self._fail(f"a name message (N) was expected, {packet[:32]!r} came")
        (offered, creation), name = self._peer_fields(packet, _NAME_FIELDS)
        if offered & DistributionFlag.NAME_ME:
            raise self._refuse(f"the peer at {name[:64]!r} asks for a node name (erl -sname undefined); give it one")
        fault = node_name_fault(name)
        if fault is not None:
            raise self._refuse(f"the peer's name {name[:64]!r} {fault}")
        self._peer_name = name
        self._peer_creation = creation
        fault = self._check_flags(offered)
        if fault is not None:
            raise self._refuse(fault)
        self._state = State.OWNER
        return [PeerNamed(name, self._peer_flags, creation)]

    def _on_status(self, packet: bytes) -> list[Effect]:
        status = self._status(packet)
        if status in ("ok", "ok_simultaneous"):
            self._state = State.CHALLENGE
            return [StatusReceived(status)]
        if status == "alive":
            self._state = State.OWNER
            return [StatusReceived(status)]
        if status == "nok":
            raise self._fail("it is connecting to us at the same time and its attempt is kept", ConnectionYielded)
        if status == "not_allowed":
            raise self._fail(
                "the peer does not allow us (its net_kernel:allow list, or it misses a capability of ours)"
            )
        if status.startswith("named:"):
            raise self._fail("the peer wants to give us a name, which we did not ask for")
        raise self._fail(f"unknown status {status[:32]!r}")

    def _on_alive_answer(self, packet: bytes) -> list[Effect]:
        answer = self._status(packet)
        if answer == "true":
            return [self._send_challenge()]
        if answer == "false":
            raise self._fail("the peer keeps the connection that is already up")
        raise self._fail(f"status true or false was expected, {answer[:32]!r} came")

    def _status(self, packet: bytes) -> str:
        if packet[:1] != b"s":
            raise self._fail(f"a status message (s) was expected, {packet[:32]!r} came")
        return packet[1:].decode("latin-1")

    def _send_challenge(self) -> Send:
        name = self._local.name.encode("latin-1")
        fields = _CHALLENGE_FIELDS.pack(self._local.flags, self._challenge, self._local.creation, len(name))
        self._state = State.REPLY
        return Send(self._packet(b"N" + fields + name))

    def _on_challenge(self, packet: bytes) -> list[Effect]:
        if packet[:1] != b"N":
            version = (
                " (that is handshake version 5; the peer has to run OTP 25 or later)" if packet[:1] == b"n" else ""
            )
            raise self._fail(f"a challenge (N) was expected, {packet[:32]!r} came{version}")
        (offered, challenge, creation), name = self._peer_fields(packet, _CHALLENGE_FIELDS)
        if name != self._peer_name:
            raise self._fail(f"the node that answers calls itself {name[:64]!r}; EPMD or the address is out of date")
        self._peer_creation = creation
        fault = self._check_flags(offered)
        if fault is not None:
            raise self._fail(fault)
        self._state = State.ACK
        return [Send(self._packet(b"r" + self._challenge.to_bytes(4, "big") + self._own_digest(challenge)))]

    def _on_reply(self, packet: bytes) -> list[Effect]:
        if packet[:1] != b"r" or len(packet) != 5 + _DIGEST_BYTES:
            raise self._fail(f"a challenge reply (r) of 21 bytes was expected, {packet[:32]!r} came")
        if not hmac.compare_digest(packet[5:], self._own_digest(self._challenge)):
            raise self._fail("the peer has another cookie than we have for it", AuthenticationError)
        acknowledgement = Send(self._packet(b"a" + self._own_digest(int.from_bytes(packet[1:5], "big"))))
        return [acknowledgement, self._completed()]

    def _on_ack(self, packet: bytes) -> list[Effect]:
        if packet[:1] != b"a" or len(packet) != 1 + _DIGEST_BYTES:
            raise self._fail(f"a challenge acknowledgement (a) of 17 bytes was expected, {packet[:32]!r} came")
        if not hmac.compare_digest(packet[1:], self._own_digest(self._challenge)):
            raise self._fail("the peer has another cookie than we have for it", AuthenticationError)
        return [self._completed()]

    def _own_digest(self, challenge: int) -> bytes:
        assert self._cookie is not None
        return digest(self._cookie, challenge)

    def _completed(self) -> Completed:
        assert self._peer_name is not None
        self._state = State.DONE
        return Completed(
            self._peer_name, int(self._local.flags) & self._peer_flags, self._peer_flags, self._peer_creation
        )


_HANDLERS: Final[dict[State, Callable[[Handshake, bytes], list[Effect]]]] = {
    State.NAME: Handshake._on_name,
    State.STATUS: Handshake._on_status,
    State.ALIVE_ANSWER: Handshake._on_alive_answer,
    State.CHALLENGE: Handshake._on_challenge,
    State.REPLY: Handshake._on_reply,
    State.ACK: Handshake._on_ack,
}
