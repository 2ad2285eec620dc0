"""The table of peers: attempts to connect, who is let in, which of two crossing attempts is kept, ticks, up and down.

One connection per peer. The first use of a peer's name makes its `Connection` and dials; what is sent meanwhile waits
in it. When both sides dial at once the handshake decides whose attempt goes on (`handshake.pick_simultaneous`):

| we are ..            | the peer's stream arrives | we answer          | then                                        |
|----------------------|---------------------------|--------------------|---------------------------------------------|
| not connecting       |                           | `ok`               | it becomes the connection                   |
| connecting, greater  |                           | `nok`              | ours goes on                                |
| connecting, smaller  |                           | `ok_simultaneous`  | it takes over; ours ends, by `nok` or by us |
| connected            |                           | `alive`            | on `true` the old one is dropped for it     |

Whichever stream wins, what waited in the `Connection` goes out on it. Only when no stream is left is the attempt lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from gater.erl.connection import Connection, PeerProtocol
from gater.erl.epmd import lookup
from gater.erl.errors import ErlError, HandshakeError, NotConnected
from gater.erl.handshake import (
    HANDSHAKE_TIMEOUT_S,
    AcceptStatus,
    Completed,
    ConnectionYielded,
    Handshake,
    LocalIdentity,
    PeerNamed,
    Role,
    has_long_name,
    node_name_fault,
    pick_simultaneous,
)
from gater.erl.process import described
from gater.erl.terms import Atom

if TYPE_CHECKING:
    from gater.erl.node import Node

TICKS_PER_TICKTIME: Final = 4
"""`net_tickintensity`: how many times in a tick time the connections are looked at."""

MAX_PEERS: Final = 1024
"""Connections, made or under way, unless `NodeOptions.max_peers` says otherwise.

A cluster has tens of nodes; terms of a hostile peer must not make us dial thousands.
"""

MAX_HANDSHAKES: Final = 128
"""Inbound streams that have not finished their handshake; further ones are closed at once."""

CONNECT_TIMEOUT_S: Final = 7.0
"""EPMD look-up and TCP connection to a peer, as `net_setuptime`."""

CLOSE_TIMEOUT_S: Final = 2.0
"""How long a stopping node waits for its streams to be written and closed before it cuts them."""

NodeWatcher: TypeAlias = Callable[[Atom, bool, str], None]

log = structlog.get_logger(__name__)


class Peers:
    """The connections of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.table: dict[Atom, Connection] = {}
        """The connections that are up or being made, by peer."""
        self._streams: set[PeerProtocol] = set()
        self._inbound: set[PeerProtocol] = set()
        """Streams opened by peers that have not finished their handshake."""
        self._replacing: set[PeerProtocol] = set()
        """Those among them that the peer wants instead of the connection that is up."""
        self._watchers: list[NodeWatcher] = []
        self._ticker: asyncio.TimerHandle | None = None
        self._stopping = False
        self._all_closed: asyncio.Event | None = None

    # Use

    def up(self) -> list[Atom]:
        """The peers this node is connected to."""
        return [connection.peer for connection in self.table.values() if connection.state == "up"]

    def connection(self, peer: Atom) -> Connection:
        """The connection to `peer`; if there is none an attempt begins and what is sent meanwhile waits."""
        connection = self.table.get(peer)
        if connection is None:
            connection = Connection(self._node, peer)
            refusal = None
            if self._stopping:
                refusal = "this node is stopping"
            elif len(self.table) >= self._node.options.max_peers:
                refusal = f"max_peers allows {self._node.options.max_peers}"
            self.table[peer] = connection
            if refusal is not None:
                self._node.soon(self.connection_lost, connection, refusal)
            else:
                connection.attempt = self._node.loop.create_task(self._attempt(connection))
        return connection

    async def connect(self, peer: Atom) -> None:
        """Return once `peer` is connected. Raises `NotConnected` or `HandshakeError`."""
        connection = self.connection(peer)
        if connection.state == "up":
            return
        settled: asyncio.Future[None] = self._node.loop.create_future()

        def settle(error: ErlError | None) -> None:
            if settled.done():
                return
            if error is None:
                settled.set_result(None)
            else:
                settled.set_exception(error)

        connection.on_settled.append(settle)
        try:
            await settled
        finally:
            if settle in connection.on_settled:
                connection.on_settled.remove(settle)

    def disconnect(self, peer: Atom, why: str = "disconnected by this node") -> bool:
        """Close the connection to `peer`; False if there was none."""
        connection = self.table.get(peer)
        if connection is None:
            return False
        connection.flush()
        protocol = connection.protocol
        self.connection_lost(connection, why)
        if protocol is not None:
            protocol.close(why)
        return True

    def watch(self, watcher: NodeWatcher) -> Callable[[], None]:
        """Call `watcher(node, is_up, reason)` at every change; the function returned ends that."""
        self._watchers.append(watcher)

        def end() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return end

    # Start, ticks, stop

    def start_ticking(self) -> None:
        """Look at every connection four times in a tick time, from now on."""
        interval_s = self._node.options.ticktime_s / TICKS_PER_TICKTIME
        self._ticker = self._node.loop.call_later(interval_s, self._tick)

    def _tick(self) -> None:
        self.start_ticking()
        for connection in list(self.table.values()):
            connection.tick(TICKS_PER_TICKTIME)

    async def close(self) -> None:
        """Write what has been sent, close every stream and wait until they are closed."""
        self._stopping = True
        if self._ticker is not None:
            self._ticker.cancel()
        why = "this node is stopping"
        for connection in list(self.table.values()):
            if not self.disconnect(connection.peer, why):
                self.connection_lost(connection, why)
        for stream in list(self._streams):
            stream.close(why)
        if self._streams:
            self._all_closed = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._all_closed.wait()
        for stream in list(self._streams):
            stream.fail(why)

    # Handshakes

    def accept(self) -> PeerProtocol:
        """The protocol of a stream that a peer has opened."""
        return PeerProtocol(self._node, self._handshake("acceptor"), None)

    def _handshake(self, role: Role, peer: str | None = None) -> Handshake:
        node = self._node
        identity = LocalIdentity(node.name.name, node.flags, node.creation)
        cookie = None if peer is None else node.cookie_for(peer)
        return Handshake(
            role,
            identity,
            challenge=secrets.randbits(32),
            cookie=cookie,
            peer_name=peer,
            length_bytes=2 if node.options.tls is None else 4,
        )

    async def _attempt(self, connection: Connection) -> None:
        peer = connection.peer.name
        error: ErlError
        try:
            problem = node_name_fault(peer)
            if problem is not None:
                raise NotConnected(f"{peer!r} is not a node name: it {problem}")
            name, _, host = peer.partition("@")
            port = self._node.options.epmd_port
            tls = self._node.options.tls
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                found = await lookup(name, host, epmd_port=port)
                if found is None:
                    raise NotConnected(f"{peer} is not known to the EPMD on {host}:{port}")
                await self._node.loop.create_connection(
                    lambda: PeerProtocol(self._node, self._handshake("initiator", peer), connection),
                    host,
                    found.port,
                    ssl=None if tls is None else tls.client,
                    server_hostname=None if tls is None else host,
                )
            return
        except TimeoutError:
            error = NotConnected(f"no connection to {peer} within {CONNECT_TIMEOUT_S:g} s")
        except OSError as failure:
            error = NotConnected(f"cannot connect to {peer}: {failure.strerror or failure}")
        except ErlError as failure:
            error = failure
        except Exception as failure:
            log.error("attempt_failed", node=str(self._node.name), peer=peer, error=described(failure))
            error = NotConnected(f"cannot connect to {peer}: {failure!r}")
        finally:
            connection.attempt = None
        if isinstance(error, NotConnected):
            error = NotConnected(f"{error}{_kinds_of_names(self._node.name.name, peer)}")
        self._lost_unless_awaited(connection, str(error), error)

    def stream_opened(self, stream: PeerProtocol) -> None:
        """A stream is up and begins its handshake."""
        self._streams.add(stream)
        connection = stream.connection
        if connection is not None:
            if connection.state == "connecting":
                connection.protocol = stream
            else:
                stream.fail("overtaken by a connection from the peer")
        elif self._stopping:
            stream.fail("this node is stopping")
        elif len(self._inbound) >= MAX_HANDSHAKES:
            stream.fail(f"MAX_HANDSHAKES allows {MAX_HANDSHAKES} streams without a finished handshake")
        else:
            self._inbound.add(stream)

    def judge(self, stream: PeerProtocol, peer: PeerNamed) -> tuple[AcceptStatus, str, HandshakeError | None]:
        """What a stream is answered once the peer has said its name: status, cookie, and why it is refused."""
        own = self._node.name.name
        cookie = self._node.cookie_for(peer.name)
        if peer.name == own:
            return "not_allowed", cookie, HandshakeError(f"the peer uses this node's own name, {own}")
        connection = self.table.get(Atom(peer.name))
        if connection is None:
            return "ok", cookie, None
        if connection.state == "up":
            self._replacing.add(stream)
            return "alive", cookie, None
        dialling = connection.attempt is not None or connection.protocol is not None
        if dialling and pick_simultaneous(own, peer.name) == own:
            return "nok", cookie, ConnectionYielded(f"we were connecting to {peer.name} too, and our attempt goes on")
        connection.inbound = stream
        return "ok_simultaneous" if dialling else "ok", cookie, None

    def wants_replacement(self, stream: PeerProtocol) -> bool:
        """The peer believes that it is still connected to us: whether it should drop that connection for this one."""
        return stream.connection is not None and stream.connection.state == "connecting"

    def handshake_completed(self, stream: PeerProtocol, done: Completed) -> Connection | None:
        """The peer is who it says: its connection is up. None if another stream won the race meanwhile."""
        self._inbound.discard(stream)
        replaces = stream in self._replacing
        self._replacing.discard(stream)
        peer = Atom(done.peer_name)
        connection = self.table.get(peer)
        if stream.connection is not None and stream.connection is not connection:
            return None
        if connection is not None and connection.state == "up":
            if not replaces:
                return None
            connection.abort("replaced by a new connection of the same peer")
            connection = self.table.get(peer)
        if connection is None:
            allowed = self._node.options.max_peers
            if len(self.table) >= allowed:
                reason = f"max_peers allows {allowed}"
                log.warning("peer_refused", node=str(self._node.name), peer=done.peer_name, reason=reason)
                return None
            connection = Connection(self._node, peer)
            self.table[peer] = connection
        ours, attempt = connection.protocol, connection.attempt
        connection.take_over(stream, done)
        if ours is not None and ours is not stream:
            ours.fail("overtaken by a connection from the peer")
        if attempt is not None and stream is not ours:
            attempt.cancel()
        log.info("node_up", node=str(self._node.name), peer=done.peer_name)
        self._settle(connection, None)
        self._tell_watchers(peer, True, "")
        return connection

    def stream_ended(self, stream: PeerProtocol, why: str, error: HandshakeError | None) -> None:
        """A stream is closed, whatever state it was in."""
        self._streams.discard(stream)
        if not self._streams and self._all_closed is not None:
            self._all_closed.set()
        self._inbound.discard(stream)
        self._replacing.discard(stream)
        connection = stream.connection
        if error is not None and not isinstance(error, ConnectionYielded) and not self._stopping:
            log.warning(
                "handshake_failed",
                node=str(self._node.name),
                peer=stream.peer_name,
                address=str(stream.peer_address),
                reason=str(error),
            )
        if connection is None:
            connection = self._awaiting(stream)
            if connection is not None:
                connection.inbound = None
                if connection.attempt is None and connection.protocol is None:
                    self.connection_lost(connection, why, error)
            return
        if connection.protocol is not stream:
            return
        if connection.state == "up":
            self.connection_lost(connection, why)
            return
        connection.protocol = None
        if isinstance(error, ConnectionYielded) and connection.inbound is None:
            # The peer's own attempt goes on and will arrive here.
            self._node.loop.call_later(HANDSHAKE_TIMEOUT_S, self._give_up, connection)
            return
        self._lost_unless_awaited(connection, why, error)

    def _awaiting(self, stream: PeerProtocol) -> Connection | None:
        if stream.peer_name is None:
            return None
        connection = self.table.get(Atom(stream.peer_name))
        return connection if connection is not None and connection.inbound is stream else None

    def _lost_unless_awaited(self, connection: Connection, why: str, error: ErlError | None) -> None:
        """Our own attempt has failed: that is the end unless the peer's stream is on its way."""
        if connection.state == "connecting" and connection.inbound is None:
            self.connection_lost(connection, why, error)

    def _give_up(self, connection: Connection) -> None:
        if connection.state == "connecting" and connection.protocol is None and connection.inbound is None:
            self.connection_lost(connection, "the peer wanted to connect to us instead, but never came")

    # Up and down

    def connection_lost(self, connection: Connection, why: str, error: ErlError | None = None) -> None:
        """The peer is gone: tell everyone here who depended on it."""
        if connection.state == "down":
            return
        was_up = connection.state == "up"
        connection.state = "down"
        connection.protocol = None
        connection.drop_output()
        if connection.attempt is not None and connection.attempt is not asyncio.current_task():
            connection.attempt.cancel()
        if self.table.get(connection.peer) is connection:
            del self.table[connection.peer]
        event = "node_down" if was_up else "connect_failed"
        log.info(event, node=str(self._node.name), peer=str(connection.peer), reason=str(error or why))
        self._settle(connection, error or NotConnected(why))
        self._node.signals.connection_ended(connection)
        if was_up:
            self._tell_watchers(connection.peer, False, why)

    @staticmethod
    def _settle(connection: Connection, error: ErlError | None) -> None:
        waiting, connection.on_settled = connection.on_settled, []
        for settle in waiting:
            settle(error)

    def _tell_watchers(self, peer: Atom, is_up: bool, why: str) -> None:
        for watcher in list(self._watchers):
            try:
                watcher(peer, is_up, why)
            except Exception as error:
                log.error("node_watcher_failed", peer=str(peer), error=described(error))


def _kinds_of_names(own: str, peer: str) -> str:
    """What to add to a failed attempt when the names are of different kinds (`-name` and `-sname`)."""
    if has_long_name(own) == has_long_name(peer):
        return ""
    kinds = ("long", "short") if has_long_name(own) else ("short", "long")
    return (
        f"; note that {own} is a {kinds[0]} name and {peer} a {kinds[1]} one (long names, of erl -name, have a dot in"
        " their host; short ones, of -sname, have none): Erlang nodes connect only with nodes of their own kind"
    )
