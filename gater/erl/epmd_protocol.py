"""The messages between nodes and EPMD, and an EPMD's state, without I/O.

Follows the ERTS user's guide, "Distribution Protocol", section "EPMD Protocol", and for what that leaves open
`epmd_srv.c` and `erl_epmd.erl`. Requests carry a two-byte length, responses carry none: most are ended by EPMD closing
the connection. Sockets and timers are those of `epmd.py`.

A connection to EPMD carries one request. It is closed after the answer, except for a registration: the name is held for
as long as that connection stays open, and nothing else may be said on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from struct import Struct
from typing import Final, TypeAlias

from gater.erl.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError

EPMD_PORT: Final = 4369
"""Where EPMD listens unless told otherwise."""

DISTRIBUTION_VERSION: Final = 6
"""The only version of the distribution protocol that we speak: lowest and highest of a registration."""

NODE_HIDDEN: Final = 72
"""Node type of hidden nodes (`H`; C nodes and ours)."""
NODE_NORMAL: Final = 77
"""Node type of Erlang nodes (`M`)."""
PROTOCOL_TCP: Final = 0
"""TCP over IPv4 or IPv6."""

MAX_NAME_CHARACTERS: Final = 255
"""The name is the first half of a node name, which is an atom."""
MAX_NAME_BYTES: Final = 4 * MAX_NAME_CHARACTERS
"""The same in UTF-8."""
MAX_EXTRA_BYTES: Final = 1024
"""The field `Extra` is empty in every release; the document allows any."""
MAX_REQUEST_BYTES: Final = 13 + MAX_NAME_BYTES + MAX_EXTRA_BYTES
"""The longest request is a registration. EPMD itself reads into a buffer of this order."""
MAX_NAMES_RESPONSE_BYTES: Final = 1 << 20
"""What a client reads of a list of names: some 20,000 usual ones, far more than one machine runs."""
MAX_NAMES: Final = 512
"""Nodes on one machine. Each takes a connection for its whole life."""
MAX_CONNECTIONS: Final = 768
"""More than MAX_NAMES, so that a machine full of nodes can still ask for ports; little enough for the usual limit of
1,024 open files."""
IDLE_TIMEOUT_S: Final = 10.0
"""How long a connection may take to make its request and to read the answer. EPMD allows 60 s, but a node's own client
gives up after 10 s."""

_ALIVE2_REQ: Final = ord("x")
_PORT_PLEASE2_REQ: Final = ord("z")
_NAMES_REQ: Final = ord("n")
_DUMP_REQ: Final = ord("d")
_KILL_REQ: Final = ord("k")
_STOP_REQ: Final = ord("s")
_ALIVE2_RESP: Final = ord("y")
_ALIVE2_X_RESP: Final = ord("v")
_PORT2_RESP: Final = ord("w")

_ALIVE2_FIELDS: Final = Struct(">BHBBHHH")
_PORT2_FIELDS: Final = Struct(">BBHBBHHH")
_REFUSED_CREATION: Final = 99
_SMALLEST_CREATION: Final = 4
_MAX_UINT32: Final = 0xFFFF_FFFF
_NAMES_LINE: Final = re.compile(r"name (?P<name>.+) at port (?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """What EPMD knows of a node. `name` is the part before `@`; versions are those of the distribution protocol."""

    name: str
    port: int
    node_type: int = NODE_HIDDEN
    protocol: int = PROTOCOL_TCP
    highest_version: int = DISTRIBUTION_VERSION
    lowest_version: int = DISTRIBUTION_VERSION
    extra: bytes = b""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not 0 <= self.port <= 65535:
            raise LocalProtocolError(f"a port is 0 to 65535, not {self.port}")
        if len(self.extra) > MAX_EXTRA_BYTES:
            raise LocalProtocolError(f"MAX_EXTRA_BYTES allows {MAX_EXTRA_BYTES}, there are {len(self.extra)}")


@dataclass(frozen=True, slots=True)
class Alive2Request:
    """`ALIVE2_REQ`: register this node for as long as the connection is open."""

    node: NodeEntry

    def encode(self) -> bytes:
        node = self.node
        name = node.name.encode()
        return _request(
            _ALIVE2_FIELDS.pack(
                _ALIVE2_REQ,
                node.port,
                node.node_type,
                node.protocol,
                node.highest_version,
                node.lowest_version,
                len(name),
            )
            + name
            + len(node.extra).to_bytes(2, "big")
            + node.extra
        )


@dataclass(frozen=True, slots=True)
class PortPlease2Request:
    """`PORT_PLEASE2_REQ`: where does the node with this name (the part before `@`) listen?"""

    name: str

    def __post_init__(self) -> None:
        _check_name(self.name)

    def encode(self) -> bytes:
        return _request(bytes([_PORT_PLEASE2_REQ]) + self.name.encode())


@dataclass(frozen=True, slots=True)
class NamesRequest:
    """`NAMES_REQ`: which nodes are registered?"""

    def encode(self) -> bytes:
        return _request(bytes([_NAMES_REQ]))


@dataclass(frozen=True, slots=True)
class DumpRequest:
    """`DUMP_REQ`: everything EPMD knows, for people."""

    def encode(self) -> bytes:
        return _request(bytes([_DUMP_REQ]))


@dataclass(frozen=True, slots=True)
class KillRequest:
    """`KILL_REQ`: end EPMD."""

    def encode(self) -> bytes:
        return _request(bytes([_KILL_REQ]))


@dataclass(frozen=True, slots=True)
class StopRequest:
    """`STOP_REQ`: forget a node by name."""

    name: str

    def __post_init__(self) -> None:
        _check_name(self.name)

    def encode(self) -> bytes:
        return _request(bytes([_STOP_REQ]) + self.name.encode())


Request: TypeAlias = Alive2Request | PortPlease2Request | NamesRequest | DumpRequest | KillRequest | StopRequest


@dataclass(frozen=True, slots=True)
class Registered:
    """`ALIVE2_RESP` or `ALIVE2_X_RESP`. `creation` is None when EPMD refused, most likely because the name is taken."""

    creation: int | None


@dataclass(frozen=True, slots=True)
class NotRegistered:
    """`PORT2_RESP` for a name that EPMD does not know."""


def name_fault(name: str) -> str | None:
    """Why EPMD cannot hold `name`, as the end of a sentence about it; None if it can."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"is longer than MAX_NAME_CHARACTERS ({MAX_NAME_CHARACTERS})"
    if not name.isprintable() or " " in name or "@" in name:
        return "contains spaces, unprintable characters or '@'"
    return None


def parse_request(content: bytes) -> Request:
    """The request in `content`, which is a whole one without its length.

    Raises RemoteProtocolError for anything EPMD does not understand.
    """
    match content[:1]:
        case b"x":
            return _parse_alive2(content)
        case b"z":
            return PortPlease2Request(_name(content[1:].removesuffix(b"\0")))
        case b"n":
            return NamesRequest()
        case b"d":
            return DumpRequest()
        case b"k":
            return KillRequest()
        case b"s":
            return StopRequest(_name(content[1:].removesuffix(b"\0")))
        case tag:
            raise RemoteProtocolError(f"no EPMD request starts with {tag!r}")


def encode_alive2_response(request: Alive2Request, creation: int | None) -> bytes:
    """The answer to a registration; `creation` None refuses it.

    Nodes of version 6 get 32 bits of creation (`ALIVE2_X_RESP`), older ones 1 to 3.
    """
    extended = request.node.highest_version >= DISTRIBUTION_VERSION
    if creation is None:
        result, value = 1, _REFUSED_CREATION
    else:
        result, value = 0, creation if extended else creation % 3 + 1
    if extended:
        return bytes([_ALIVE2_X_RESP, result]) + value.to_bytes(4, "big")
    return bytes([_ALIVE2_RESP, result]) + value.to_bytes(2, "big")


def encode_port2_response(node: NodeEntry | None) -> bytes:
    """The answer to `PortPlease2Request`; None: no such node."""
    if node is None:
        return bytes([_PORT2_RESP, 1])
    name = node.name.encode()
    fields = _PORT2_FIELDS.pack(
        _PORT2_RESP,
        0,
        node.port,
        node.node_type,
        node.protocol,
        node.highest_version,
        node.lowest_version,
        len(name),
    )
    return fields + name + len(node.extra).to_bytes(2, "big") + node.extra


def parse_alive2_response(data: bytes) -> Registered | None:
    """The answer to a registration, or None while more bytes are needed.

    Raises RemoteProtocolError if this is not an EPMD's answer.
    """
    if not data:
        return None
    if data[0] not in (_ALIVE2_RESP, _ALIVE2_X_RESP):
        raise RemoteProtocolError(f"a registration is answered with 'y' or 'v', {data[:16]!r} came")
    length = 4 if data[0] == _ALIVE2_RESP else 6
    if len(data) > length:
        raise RemoteProtocolError(f"a registration is answered with {length} bytes, {len(data)} came")
    if len(data) < length:
        return None
    return Registered(int.from_bytes(data[2:], "big") if data[1] == 0 else None)


def parse_port2_response(data: bytes) -> NodeEntry | NotRegistered | None:
    """The answer to `PortPlease2Request`, or None while more bytes are needed.

    Raises RemoteProtocolError if this is not an EPMD's answer.
    """
    if not data:
        return None
    if data[0] != _PORT2_RESP:
        raise RemoteProtocolError(f"a request for a port is answered with 'w', {data[:16]!r} came")
    if len(data) < 2:
        return None
    if data[1] != 0:
        return NotRegistered()
    start = _PORT2_FIELDS.size
    if len(data) < start:
        return None
    _, _, port, node_type, protocol, highest, lowest, name_length = _PORT2_FIELDS.unpack_from(data)
    if name_length > MAX_NAME_BYTES:
        raise LimitExceeded("MAX_NAME_BYTES", MAX_NAME_BYTES, name_length)
    extra_start = start + name_length + 2
    if len(data) < extra_start:
        return None
    extra_length = int.from_bytes(data[extra_start - 2 : extra_start], "big")
    if extra_length > MAX_EXTRA_BYTES:
        raise LimitExceeded("MAX_EXTRA_BYTES", MAX_EXTRA_BYTES, extra_length)
    if len(data) < extra_start + extra_length:
        return None
    extra = data[extra_start : extra_start + extra_length]
    return NodeEntry(_name(data[start : extra_start - 2]), port, node_type, protocol, highest, lowest, extra)


def parse_names_response(data: bytes) -> tuple[int, dict[str, int]]:
    """The answer to `NamesRequest`, whole (EPMD closes behind it): the port of EPMD, and the ports of the names.

    Raises RemoteProtocolError if this is not an EPMD's answer.
    """
    if len(data) < 4:
        raise RemoteProtocolError(f"a list of names starts with four bytes, {data!r} came")
    names: dict[str, int] = {}
    for line in data[4:].decode("utf-8", "replace").split("\n"):
        if not line:
            continue
        found = _NAMES_LINE.fullmatch(line)
        if found is None or int(found["port"]) > 65535:
            raise RemoteProtocolError(f"a line 'name NAME at port PORT' was expected, {line[:64]!r} came")
        names[found["name"]] = int(found["port"])
    return int.from_bytes(data[:4], "big"), names


@dataclass(frozen=True, slots=True)
class Reply:
    """Write `data` to the connection."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Keep:
    """The connection now holds a name: no time limit any more."""

    node: NodeEntry


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection after what was written. `reason` says why if it was the peer's fault."""

    reason: str | None = None


ServerEffect: TypeAlias = Reply | Keep | Close


class EpmdServer:
    """The state of an EPMD: connections, and the names that some of them hold.

    The owner numbers its connections (`connection`, any int not in use) and carries out the effects returned.

    | event          | connection asks         | effects                             | connection then |
    |----------------|-------------------------|-------------------------------------|-----------------|
    | `receive`      | `ALIVE2_REQ`            | `Reply`, `Keep`                     | holds the name  |
    | `receive`      | the same, name taken    | `Reply`, `Close`                    |                 |
    | `receive`      | `PORT_PLEASE2`, `NAMES` | `Reply`, `Close`                    |                 |
    | `receive`      | `DUMP`, `KILL`, `STOP`  | `Reply` and/or `Close`              |                 |
    | `receive`      | again, holding a name   | `Close`                             | name is dropped |
    | `timed_out`    | nothing in time         | `Close`                             |                 |
    | `disconnected` |                         |                                     | name is dropped |

    Only connections from this machine may register, and dump. `KILL` is answered `NO` and `STOP` not at all: a
    node's own EPMD lives as long as the node.

    :param port: where it listens, told to those who ask for names.
    :param first_creation: random 32 bits; every registration gets the next one, so that an incarnation of a node is
        told from the one before even across a restart of this EPMD.
    """

    def __init__(self, port: int, first_creation: int) -> None:
        self._port = port
        self._creation = first_creation
        self._buffers: dict[int, bytearray] = {}
        self._local: set[int] = set()
        self._nodes: dict[str, NodeEntry] = {}
        self._holders: dict[int, str] = {}

    @property
    def nodes(self) -> dict[str, NodeEntry]:
        """The registered nodes by name (a copy)."""
        return dict(self._nodes)

    @property
    def connection_count(self) -> int:
        return len(self._buffers)

    def connected(self, connection: int, *, is_local: bool) -> list[ServerEffect]:
        """A connection was opened, from this machine or from another."""
        if len(self._buffers) >= MAX_CONNECTIONS:
            return [Close(f"MAX_CONNECTIONS ({MAX_CONNECTIONS}) are open")]
        self._buffers[connection] = bytearray()
        if is_local:
            self._local.add(connection)
        return []

    def disconnected(self, connection: int) -> None:
        """A connection was closed, by either side."""
        self._buffers.pop(connection, None)
        self._local.discard(connection)
        name = self._holders.pop(connection, None)
        if name is not None:
            del self._nodes[name]

    def timed_out(self, connection: int) -> list[ServerEffect]:
        """IDLE_TIMEOUT_S have passed since the connection was opened."""
        if connection in self._holders:
            return []
        return self._close(connection, "no request came in IDLE_TIMEOUT_S")

    def receive(self, connection: int, data: bytes) -> list[ServerEffect]:
        """Bytes of a connection, cut anywhere. What comes on a closed connection is ignored."""
        buffer = self._buffers.get(connection)
        if buffer is None:
            return []
        if connection in self._holders:
            return self._close(connection, "bytes came on a connection that holds a name")
        buffer += data
        if len(buffer) < 2:
            return []
        length = int.from_bytes(buffer[:2], "big")
        if not 0 < length <= MAX_REQUEST_BYTES:
            return self._close(connection, f"MAX_REQUEST_BYTES allows 1 to {MAX_REQUEST_BYTES}, got {length}")
        if len(buffer) < 2 + length:
            return []
        if len(buffer) > 2 + length:
            return self._close(connection, "bytes came behind the request")
        content = bytes(buffer[2:])
        buffer.clear()
        try:
            request = parse_request(content)
        except RemoteProtocolError as error:
            return self._close(connection, str(error))
        return self._answer(connection, request)

    def _answer(self, connection: int, request: Request) -> list[ServerEffect]:
        is_local = connection in self._local
        match request:
            case Alive2Request():
                if not is_local:
                    return self._close(connection, "a registration came from another machine")
                return self._register(connection, request)
            case PortPlease2Request(name):
                reply = encode_port2_response(self._nodes.get(name))
            case NamesRequest():
                reply = self._listing("name {} at port {}\n")
            case DumpRequest():
                if not is_local:
                    return self._close(connection, "a dump was asked for from another machine")
                reply = self._listing("active name     <{}> at port {}, fd = {}\n")
            case KillRequest():
                reply = b"NO"
            case StopRequest():
                return self._close(connection, "the built-in EPMD does not stop nodes")
        return [Reply(reply), *self._close(connection, None)]

    def _register(self, connection: int, request: Alive2Request) -> list[ServerEffect]:
        node = request.node
        if node.name in self._nodes:
            fault = f"the name {node.name} is taken"
        elif len(self._nodes) >= MAX_NAMES:
            fault = f"MAX_NAMES ({MAX_NAMES}) are registered"
        else:
            self._creation = max(_SMALLEST_CREATION, (self._creation + 1) & _MAX_UINT32)
            self._nodes[node.name] = node
            self._holders[connection] = node.name
            return [Reply(encode_alive2_response(request, self._creation)), Keep(node)]
        return [Reply(encode_alive2_response(request, None)), *self._close(connection, fault)]

    def _listing(self, line: str) -> bytes:
        lines = (
            line.format(self._nodes[name].name, self._nodes[name].port, connection)
            for connection, name in self._holders.items()
        )
        return self._port.to_bytes(4, "big") + "".join(lines).encode()

    def _close(self, connection: int, reason: str | None) -> list[ServerEffect]:
        self.disconnected(connection)
        return [Close(reason)]


def _check_name(name: str) -> None:
    fault = name_fault(name)
    if fault is not None:
        raise LocalProtocolError(f"the name {name!r} {fault}")


def _request(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def _parse_alive2(content: bytes) -> Alive2Request:
    start = _ALIVE2_FIELDS.size
    if len(content) < start + 2:
        raise RemoteProtocolError(f"ALIVE2_REQ has at least {start + 2} bytes, {len(content)} came")
    _, port, node_type, protocol, highest, lowest, name_length = _ALIVE2_FIELDS.unpack_from(content)
    extra_start = start + name_length + 2
    if len(content) < extra_start:
        raise RemoteProtocolError("ALIVE2_REQ ends inside its name")
    extra_length = int.from_bytes(content[extra_start - 2 : extra_start], "big")
    if len(content) < extra_start + extra_length:
        raise RemoteProtocolError("ALIVE2_REQ ends inside its field Extra")
    if extra_length > MAX_EXTRA_BYTES:
        raise LimitExceeded("MAX_EXTRA_BYTES", MAX_EXTRA_BYTES, extra_length)
    extra = content[extra_start : extra_start + extra_length]
    name = _name(content[start : extra_start - 2])
    return Alive2Request(NodeEntry(name, port, node_type, protocol, highest, lowest, extra))


def _name(encoded: bytes) -> str:
    try:
        name = encoded.decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"a name in UTF-8 was expected, {encoded[:32]!r} came") from None
    fault = name_fault(name)
    if fault is not None:
        raise RemoteProtocolError(f"the name {name[:32]!r} {fault}")
    return name
