"""EPMD over asyncio: the client, and the built-in server for machines where none runs.

The messages and the server's state are those of `epmd_protocol.py`; this is the thin shell that carries them. Works on
asyncio's own loop and on uvloop. When to register again after EPMD was lost, and whether to start the built-in server,
is decided by the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, cast

from gater.erl.epmd_protocol import (
    EPMD_PORT,
    IDLE_TIMEOUT_S,
    MAX_NAMES_RESPONSE_BYTES,
    MAX_REQUEST_BYTES,
    NODE_HIDDEN,
    NODE_NORMAL,
    Alive2Request,
    Close,
    EpmdServer,
    Keep,
    NamesRequest,
    NodeEntry,
    NotRegistered,
    PortPlease2Request,
    Reply,
    ServerEffect,
    parse_alive2_response,
    parse_names_response,
    parse_port2_response,
)
from gater.erl.errors import NodeError, RemoteProtocolError

EPMD_TIMEOUT_S: Final = 5.0
"""How long an exchange with EPMD may take unless the caller says otherwise. EPMD answers from memory, so this only has
to cover a slow network; a node's own client waits 10 s for each step."""

Answer = TypeVar("Answer")


class EpmdUnavailable(NodeError):
    """No EPMD answers there: nothing listens, it is out of reach, or it fell silent."""


class EpmdProtocolError(NodeError):
    """Something listens there, but it does not answer as EPMD does."""


class NameTaken(NodeError):
    """EPMD refused the name: another live node of that machine has it."""


class EpmdPortInUse(NodeError):
    """The built-in EPMD cannot listen: something else holds the port or the address is not this machine's."""


class Registration:
    """A name held at EPMD. It is held until `close()`, or until the connection breaks (EPMD ended or was restarted).

    `creation` is what EPMD made of it: the incarnation of this node, in every pid and reference it makes.
    `closed` is done when the registration is over, whoever ended it.
    """

    def __init__(self, name: str, creation: int, conversation: _Conversation, on_lost: Callable[[], None] | None):
        self.name: Final = name
        self.creation: Final = creation
        self._conversation = conversation
        self._on_lost = on_lost
        self.closed: Final = conversation.closed
        self.closed.add_done_callback(self._ended)

    @property
    def is_held(self) -> bool:
        return not self.closed.done()

    def close(self) -> None:
        """Give the name up. `on_lost` is not called."""
        self._on_lost = None
        self._conversation.close()

    async def wait_closed(self) -> None:
        """Return when the connection to EPMD is closed."""
        await asyncio.shield(self.closed)

    def _ended(self, _: asyncio.Future[None]) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()


async def register(
    name: str,
    port: int,
    *,
    epmd_host: str = "127.0.0.1",
    epmd_port: int = EPMD_PORT,
    hidden: bool = True,
    timeout_s: float = EPMD_TIMEOUT_S,
    on_lost: Callable[[], None] | None = None,
) -> Registration:
    """Register the node `name` (the part before `@`), which listens on `port`, at the EPMD of this machine.

    `on_lost` is called once if EPMD drops the connection later; the caller may then register again. Raises
    EpmdUnavailable, NameTaken, EpmdProtocolError, and LocalProtocolError for a name EPMD cannot hold.
    """
    request = Alive2Request(NodeEntry(name, port, NODE_HIDDEN if hidden else NODE_NORMAL))
    where = _where(epmd_host, epmd_port)

    def parse(data: bytes, ended: bool) -> int | None:
        answer = parse_alive2_response(data)
        if answer is None:
            return None
        if answer.creation is None:
            raise NameTaken(
                f"{where} refused the name {name}: another live node has it; stop that one or choose another name"
            )
        return answer.creation

    conversation = await _connect(epmd_host, epmd_port, MAX_REQUEST_BYTES, timeout_s)
    try:
        creation = await conversation.ask(request.encode(), parse, timeout_s)
    except BaseException:
        conversation.close()
        raise
    return Registration(name, creation, conversation, on_lost)


async def lookup(
    name: str, host: str, *, epmd_port: int = EPMD_PORT, timeout_s: float = EPMD_TIMEOUT_S
) -> NodeEntry | None:
    """Ask the EPMD of `host` about the node `name` (the part before `@`): its port and versions, or None.

    Raises EpmdUnavailable and EpmdProtocolError.
    """

    def parse(data: bytes, ended: bool) -> NodeEntry | NotRegistered | None:
        return parse_port2_response(data)

    answer = await _exchange(host, epmd_port, PortPlease2Request(name).encode(), parse, MAX_REQUEST_BYTES, timeout_s)
    return answer if isinstance(answer, NodeEntry) else None


async def names(host: str, *, epmd_port: int = EPMD_PORT, timeout_s: float = EPMD_TIMEOUT_S) -> dict[str, int]:
    """All nodes registered at the EPMD of `host`: name (the part before `@`) to port.

    Raises EpmdUnavailable and EpmdProtocolError.
    """

    def parse(data: bytes, ended: bool) -> dict[str, int] | None:
        return parse_names_response(data)[1] if ended else None

    return await _exchange(host, epmd_port, NamesRequest().encode(), parse, MAX_NAMES_RESPONSE_BYTES, timeout_s)


class _Conversation(asyncio.Protocol):
    """The client's end of a connection to EPMD: one request, one answer of at most `limit` bytes."""

    def __init__(self, where: str, limit: int) -> None:
        self.closed: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        self._where = where
        self._limit = limit
        self._received = bytearray()
        self._changed = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > self._limit:
            self.close()
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        self._changed.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes, parse: Callable[[bytes, bool], Answer | None], timeout_s: float) -> Answer:
        """Send `request` and give what came to `parse(data, ended)` until it answers something."""
        assert self._transport is not None
        self._transport.write(request)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    if len(self._received) > self._limit:
                        raise EpmdProtocolError(
                            f"what listens as {self._where} sent more than the {self._limit} bytes an answer may have"
                        )
                    ended = self.closed.done()
                    answer = parse(bytes(self._received), ended)
                    if answer is not None:
                        return answer
                    if ended:
                        raise EpmdProtocolError(
                            f"{self._where} hung up without a whole answer ({bytes(self._received[:16])!r} came);"
                            " is it an EPMD and on this machine? only nodes of its own machine may register"
                        )
        except TimeoutError:
            raise EpmdUnavailable(f"{self._where} took the request and did not answer in {timeout_s:g} s") from None
        except RemoteProtocolError as error:
            raise EpmdProtocolError(f"what listens as {self._where} is no EPMD: {error}") from error


async def _connect(host: str, port: int, limit: int, timeout_s: float) -> _Conversation:
    where = _where(host, port)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            _, conversation = await loop.create_connection(lambda: _Conversation(where, limit), host, port)
    except TimeoutError:
        raise EpmdUnavailable(f"{where} could not be reached in {timeout_s:g} s") from None
    except OSError as error:
        raise EpmdUnavailable(f"{where} cannot be reached: {error.strerror or error}") from error
    return conversation


async def _exchange(
    host: str,
    port: int,
    request: bytes,
    parse: Callable[[bytes, bool], Answer | None],
    limit: int,
    timeout_s: float,
) -> Answer:
    conversation = await _connect(host, port, limit, timeout_s)
    try:
        return await conversation.ask(request, parse, timeout_s)
    finally:
        conversation.close()


def _where(host: str, port: int) -> str:
    return f"EPMD at {host}:{port}"


class BuiltinEpmd:
    """An EPMD inside this process, for machines where no Erlang is installed. Use `start` and `close` once."""

    def __init__(self) -> None:
        self._listeners: list[asyncio.Server] = []
        self._state: EpmdServer | None = None
        self._connections: set[_ServerConnection] = set()
        self._numbers = itertools.count(1)
        self.port: int = 0
        """Where it listens; known after `start`."""

    @property
    def nodes(self) -> dict[str, NodeEntry]:
        """The registered nodes by name."""
        return self._state.nodes if self._state is not None else {}

    async def start(self, host_addresses: Sequence[str] = ("127.0.0.1",), port: int = EPMD_PORT) -> None:
        """Listen on every one of `host_addresses`; port 0 takes any free one.

        Raises EpmdPortInUse.
        """
        try:
            await self._listen(host_addresses, port)
        except BaseException:
            await self.close()
            raise

    async def _listen(self, host_addresses: Sequence[str], port: int) -> None:
        loop = asyncio.get_running_loop()
        for address in host_addresses:
            try:
                listener = await loop.create_server(
                    self._make_connection, address, self.port or port, start_serving=False
                )
            except OSError as error:
                raise EpmdPortInUse(
                    f"the built-in EPMD cannot listen on {address}:{port}: {error.strerror or error}"
                ) from error
            self._listeners.append(listener)
            self.port = listener.sockets[0].getsockname()[1]
        self._state = EpmdServer(self.port, secrets.randbits(32))
        for listener in self._listeners:
            try:
                await listener.start_serving()
            except OSError as error:
                # Bound, but another program has begun to listen there meanwhile.
                raise EpmdPortInUse(
                    f"the built-in EPMD cannot listen on port {self.port}: {error.strerror or error}"
                ) from error

    async def close(self) -> None:
        """Stop listening and drop all connections, and so all names."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.closed
        for listener in listeners:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EPMD_TIMEOUT_S):
                    await listener.wait_closed()

    def _make_connection(self) -> _ServerConnection:
        assert self._state is not None
        return _ServerConnection(self._state, next(self._numbers), self._connections)


class _ServerConnection(asyncio.Protocol):
    """One connection of the built-in EPMD: hands bytes to the state and carries out what it says."""

    def __init__(self, state: EpmdServer, number: int, connections: set[_ServerConnection]) -> None:
        loop = asyncio.get_running_loop()
        self.closed: Final[asyncio.Future[None]] = loop.create_future()
        self._state = state
        self._number = number
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._connections.add(self)
        self._deadline = asyncio.get_running_loop().call_later(IDLE_TIMEOUT_S, self._timed_out)
        self._apply(self._state.connected(self._number, is_local=_is_local(self._transport)))

    def data_received(self, data: bytes) -> None:
        self._apply(self._state.receive(self._number, data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        self._state.disconnected(self._number)
        self._connections.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _timed_out(self) -> None:
        """Also ends a peer that asked and does not read the answer: a graceful close would wait for it."""
        self._deadline = None
        self._state.timed_out(self._number)
        self.abort()

    def _apply(self, effects: list[ServerEffect]) -> None:
        assert self._transport is not None
        for effect in effects:
            match effect:
                case Reply(data):
                    self._transport.write(data)
                case Keep():
                    self._forget_deadline()
                case Close():
                    self._transport.close()

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _is_local(transport: asyncio.Transport) -> bool:
    """Whether the peer is on this machine: from a loopback address, or from the very address it called."""
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not peer or not own:
        return False
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback) or peer[0] == own[0]
