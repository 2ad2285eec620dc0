"""The node: who is connected, who lives here, and where every signal goes.

"One way in": bytes -> `PeerProtocol` -> `Node.route` -> `Process.deliver` -> receiver. `route` is a table from the
number of a control message to one function. "One way out": `Connection.send_control` and `send_message`, collected
during a loop turn and written at its end by `turn`.

What follows the reference manual: a send to an unconnected node connects first; a monitor or a link that cannot be made
answers `noproc` or `noconnection`; the pids of an earlier life of this node (another creation) are nobody.
The node is hidden: it never offers DFLAG_PUBLISHED, so that peers keep it out of `nodes()`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import structlog

from gater.erl import control, etf
from gater.erl.connection import MAX_FRAME_BYTES, VERSION, Connection, PeerProtocol
from gater.erl.control import ControlMessage
from gater.erl.epmd import BuiltinEpmd, EpmdPortInUse, EpmdUnavailable, Registration, lookup, register
from gater.erl.errors import ErlError, HandshakeError, NodeError, NotConnected, RemoteProtocolError
from gater.erl.exports import Exports
from gater.erl.handshake import (
    HANDSHAKE_TIMEOUT_S,
    OUR_FLAGS,
    AcceptStatus,
    Completed,
    ConnectionYielded,
    DistributionFlag,
    Handshake,
    LocalIdentity,
    PeerNamed,
    Role,
    node_name_fault,
    pick_simultaneous,
)
from gater.erl.process import (
    NOCONNECTION,
    NOPROC,
    SHUTDOWN,
    Mailbox,
    Process,
    Receiver,
)
from gater.erl.terms import Atom, ImproperList, Pid, Reference, Term

TICKTIME_S: Final = 60.0
"""`net_ticktime`: a peer that has been silent this long (up to a quarter more) is down."""

TICKS_PER_TICKTIME: Final = 4
"""`net_tickintensity`: how many times in a tick time the connections are looked at."""

MAX_PEERS: Final = 1024
"""Connections, made or under way.

A cluster has tens of nodes; terms of a hostile peer must not make us dial thousands.
"""

MAX_HANDSHAKES: Final = 128
"""Inbound streams that have not finished their handshake; further ones are closed at once."""

TURN_MESSAGES: Final = 2_000
"""Messages handled before the loop gets its turn again, so that ticks and timers are never held up."""

PROCESS_MESSAGES: Final = 200
"""Messages one process handles before the next process has its turn."""

CONNECT_TIMEOUT_S: Final = 7.0
"""EPMD look-up and TCP connection to a peer, as `net_setuptime`."""

_PID_NUMBERS: Final = 1 << 28
_REFERENCE_WORD0: Final = 1 << 18
_WORD: Final = 1 << 32

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

log = structlog.get_logger(__name__)


class Monitor:
    """One watch of ours on a process, local or remote. `on_down(monitor, reason)` is called at most once."""

    __slots__ = ("connection", "fired", "object", "on_down", "owner", "process", "reference", "target")

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
        self.fired = False

    def fire(self, reason: Term) -> None:
        """The process is gone."""
        if not self.fired:
            self.fired = True
            self.on_down(self, reason)


class Alias:
    """An address for replies: a reference of this node that messages can be sent to."""

    __slots__ = ("receive", "spine_levels")

    def __init__(self, receive: Callable[[Term], None], spine_levels: int | None = None) -> None:
        self.receive = receive
        self.spine_levels = spine_levels


class SpawnCall:
    """A spawn request of ours.

    `on_error(reason)` if it is refused, `on_down(monitor, reason)` when the process has ended.
    """

    __slots__ = ("monitor", "on_error")

    def __init__(self, monitor: Monitor, on_error: Callable[[Term], None]) -> None:
        self.monitor = monitor
        self.on_error = on_error


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node may be told; every default is what `erl` would do."""

    listen_hosts: tuple[str, ...] = ()
    """Addresses to listen on; none: loopback if the node's host is a loopback address, else all addresses."""
    listen_port: int = 0
    """TCP port to listen on; 0 lets the system choose."""
    epmd_host: str | None = None
    """Where this node registers; None: the loopback address."""
    epmd_port: int = 4369
    builtin_epmd: bool = True
    """Start an EPMD in this process when none listens."""
    epmd_listen_hosts: tuple[str, ...] = ()
    """Addresses the built-in EPMD listens on; none: `epmd_host`."""
    max_peers: int = MAX_PEERS
    ticktime_s: float = TICKTIME_S
    max_frame_bytes: int = MAX_FRAME_BYTES
    cookies: dict[str, str] = field(default_factory=dict)
    """Cookies for single peers, by node name; all others share the node's own."""


class Node:
    """An Erlang node in this process: `async with Node("py@127.0.0.1", cookie="secret") as node: ...`."""

    def __init__(self, name: str, *, cookie: str, options: NodeOptions | None = None) -> None:
        problem = node_name_fault(name)
        if problem is not None:
            raise NodeError(f"{name!r} is not a node name: it {problem}")
        self.name = Atom(name)
        self.options = options or NodeOptions()
        self.creation = 0
        self.max_frame_bytes = self.options.max_frame_bytes
        self.flags = OUR_FLAGS
        self.group_leader: Pid | None = None
        self.on_start: list[Callable[[], None]] = []
        self.started_at = 0.0
        self._cookie = cookie
        self._loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server | None = None
        self._epmd: BuiltinEpmd | None = None
        self._registration: Registration | None = None
        self._connections: dict[Atom, Connection] = {}
        self._handshakes: set[PeerProtocol] = set()
        self._replacing: set[PeerProtocol] = set()
        self._processes: dict[int, Process] = {}
        self._names: dict[Atom, Process] = {}
        self._aliases: dict[tuple[int, ...], Alias] = {}
        self._next_pid = 0
        self._pid_serial = 0
        self._reference_low = secrets.randbelow(_REFERENCE_WORD0)
        self._reference_high = (secrets.randbits(32), secrets.randbits(32))
        self._unlink_id = 0
        self._ready: deque[Process] = deque()
        self._to_flush: list[Connection] = []
        self._in_turn = False
        self._turn_planned = False
        self._ticker: asyncio.TimerHandle | None = None
        self._node_watchers: list[Callable[[Atom, bool, str], None]] = []
        self._stopping = False
        self._client: Process | None = None
        self.applications: dict[str, tuple[str, str]] = {}
        """What runs here, for whoever asks `application:which_applications()`: name -> (description, version)."""
        self.exports = Exports()
        """The Python functions that peers may call by Erlang names."""
        self.requests: (
            Callable[[control.SpawnRequest | control.SpawnRequestTT, list[Term], Connection], None] | None
        ) = None
        """Who carries out spawn requests of peers (`rpc.py`); without one they are answered `notsup`."""
        self._routes: dict[int, Callable[[Connection, tuple[Term, ...], bytes, int], None]] = {
            control.OP_SEND: self._on_send,
            control.OP_SEND_TT: self._on_send,
            control.OP_SEND_SENDER: self._on_send,
            control.OP_SEND_SENDER_TT: self._on_send,
            control.OP_REG_SEND: self._on_reg_send,
            control.OP_REG_SEND_TT: self._on_reg_send,
            control.OP_ALIAS_SEND: self._on_alias_send,
            control.OP_ALIAS_SEND_TT: self._on_alias_send,
        }
        self._parsed_routes: dict[type[ControlMessage], Callable[[Connection, Any, Term], None]] = {
            control.MonitorP: self._on_monitor,
            control.DemonitorP: self._on_demonitor,
            control.MonitorPExit: self._on_monitor_exit,
            control.PayloadMonitorPExit: self._on_monitor_exit,
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

    # Start and stop

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def host(self) -> str:
        """The part of the node's name after the `@`."""
        return self.name.name.partition("@")[2]

    @property
    def epmd_host(self) -> str:
        """The address of the EPMD this node registers with."""
        return self.options.epmd_host or "127.0.0.1"

    @property
    def uptime_s(self) -> float:
        """Seconds since `start`."""
        return self._loop.time() - self.started_at

    @property
    def client(self) -> Process:
        """The process in whose name code outside of any process calls and sends."""
        assert self._client is not None, "the node has not been started"
        return self._client

    async def start(self) -> None:
        """Listen, register with EPMD, begin to tick.

        Raises `NodeError` (`NameTaken`, `EpmdUnavailable`, `EpmdProtocolError`, or an address that cannot be listened
        on).
        """
        self._loop = asyncio.get_running_loop()
        self.started_at = self._loop.time()
        hosts = self.options.listen_hosts or _default_listen_hosts(self.host)
        try:
            self._server = await self._loop.create_server(
                self._accept, hosts or None, self.options.listen_port, reuse_address=True
            )
        except OSError as error:
            where = ", ".join(hosts) or "all addresses"
            raise NodeError(f"cannot listen on {where}, port {self.options.listen_port}: {error.strerror}") from error
        try:
            await self._register_with_epmd()
        except BaseException:
            self._server.close()
            raise
        self._client = self.spawn_receiver(_ClientReceiver(self))
        for hook in self.on_start:
            hook()
        self._ticker = self._loop.call_later(self.options.ticktime_s / TICKS_PER_TICKTIME, self._tick)

    @property
    def listen_port(self) -> int:
        """The TCP port this node listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def _register_with_epmd(self) -> None:
        short = self.name.name.partition("@")[0]
        host, port = self.epmd_host, self.options.epmd_port
        for may_start in (self.options.builtin_epmd, False):
            try:
                self._registration = await register(
                    short, self.listen_port, epmd_host=host, epmd_port=port, on_lost=self._epmd_lost
                )
            except EpmdUnavailable:
                if not may_start:
                    raise
                epmd = BuiltinEpmd()
                try:
                    await epmd.start(list(self.options.epmd_listen_hosts) or [host], port)
                except EpmdPortInUse:
                    continue
                self._epmd = epmd
                log.info("builtin_epmd_started", host=host, port=port)
            else:
                self.creation = self._registration.creation
                return

    def _epmd_lost(self) -> None:
        if not self._stopping:
            log.warning("epmd_lost", node=str(self.name), host=self.epmd_host, port=self.options.epmd_port)
            self._loop.create_task(self._register_again())

    async def _register_again(self) -> None:
        delay_s = 0.2
        creation = self.creation
        while not self._stopping:
            try:
                await self._register_with_epmd()
            except NodeError as error:
                log.warning("epmd_registration_failed", node=str(self.name), error=str(error), again_in_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 10.0)
            else:
                # Pids and references in other nodes' hands carry the creation this node started with.
                self.creation = creation
                log.info("epmd_registered_again", node=str(self.name))
                return

    async def stop(self) -> None:
        """End every process with `shutdown`, close every connection, leave EPMD."""
        self._stopping = True
        if self._ticker is not None:
            self._ticker.cancel()
        for process in list(self._processes.values()):
            process.exit(SHUTDOWN)
        self.turn()
        if self._server is not None:
            self._server.close()
        for protocol in list(self._handshakes):
            protocol.fail("this node is stopping")
        for connection in list(self._connections.values()):
            if connection.attempt is not None:
                connection.attempt.cancel()
            if connection.protocol is not None:
                connection.protocol.close("this node is stopping")
            self.connection_lost(connection, "this node is stopping")
        if self._registration is not None:
            self._registration.close()
        if self._epmd is not None:
            await self._epmd.close()
        # Transports report their end in later turns of the loop.
        for _ in range(3):
            await asyncio.sleep(0)

    # Connections

    def nodes(self) -> list[Atom]:
        """The peers this node is connected to."""
        return [connection.peer for connection in self._connections.values() if connection.state == "up"]

    def connection(self, peer: Atom) -> Connection:
        """The connection to `peer`; if there is none an attempt begins and what is sent meanwhile is queued."""
        connection = self._connections.get(peer)
        if connection is None:
            connection = Connection(self, peer)
            self._connections[peer] = connection
            if len(self._connections) > self.options.max_peers:
                self._loop.call_soon(self.connection_lost, connection, f"max_peers allows {self.options.max_peers}")
            elif self._stopping:
                self._loop.call_soon(self.connection_lost, connection, "this node is stopping")
            else:
                connection.attempt = self._loop.create_task(self._attempt(connection))
        return connection

    async def connect(self, peer: str | Atom) -> None:
        """Connect to `peer` if it is not connected yet. Raises `NotConnected` or `HandshakeError`."""
        name = Atom(str(peer))
        if name is self.name:
            return
        connection = self.connection(name)
        if connection.state == "up":
            return
        settled: asyncio.Future[None] = self._loop.create_future()

        def settle(error: ErlError | None) -> None:
            if settled.done():
                return
            if error is None:
                settled.set_result(None)
            else:
                settled.set_exception(error)

        connection.on_settled.append(settle)
        await settled

    def disconnect(self, peer: str | Atom) -> bool:
        """Close the connection to `peer`; False if there was none."""
        connection = self._connections.get(Atom(str(peer)))
        if connection is None:
            return False
        protocol = connection.protocol
        connection.flush()
        self.connection_lost(connection, "disconnected by this node")
        if protocol is not None:
            protocol.close("disconnected by this node")
        return True

    def monitor_nodes(self, watcher: Callable[[Atom, bool, str], None]) -> Callable[[], None]:
        """Call `watcher(node, is_up, reason)` at every change; the function returned ends that."""
        self._node_watchers.append(watcher)
        return lambda: self._node_watchers.remove(watcher)

    def _handshake(self, role: Role, peer: str | None = None) -> Handshake:
        identity = LocalIdentity(self.name.name, self.flags, self.creation)
        cookie = None if peer is None else self.cookie_for(peer)
        return Handshake(role, identity, challenge=secrets.randbits(32), cookie=cookie, peer_name=peer)

    def cookie_for(self, peer: str) -> str:
        """The cookie shared with `peer`."""
        return self.options.cookies.get(peer, self._cookie)

    def _accept(self) -> PeerProtocol:
        return PeerProtocol(self, self._handshake("acceptor"), None)

    async def _attempt(self, connection: Connection) -> None:
        peer = connection.peer.name
        problem = node_name_fault(peer)
        if problem is not None:
            self.connection_lost(connection, f"{peer!r} is not a node name: it {problem}")
            return
        name, _, host = peer.partition("@")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                found = await lookup(name, host, epmd_port=self.options.epmd_port)
                if found is None:
                    raise NotConnected(f"{peer} is not known to the EPMD on {host}:{self.options.epmd_port}")
                await self._loop.create_connection(
                    lambda: PeerProtocol(self, self._handshake("initiator", peer), connection),
                    host,
                    found.port,
                )
        except TimeoutError:
            self.connection_lost(connection, f"no connection to {peer} within {CONNECT_TIMEOUT_S:g} s")
        except OSError as error:
            self.connection_lost(connection, f"cannot connect to {peer}: {error}")
        except ErlError as error:
            self.connection_lost(connection, str(error), error)
        finally:
            connection.attempt = None

    def handshake_begun(self, protocol: PeerProtocol) -> None:
        """A stream is up and begins its handshake."""
        connection = protocol.connection
        if connection is not None:
            if connection.state != "connecting":
                protocol.fail("overtaken by a connection from the peer")
                return
            connection.protocol = protocol
        elif len(self._handshakes) >= MAX_HANDSHAKES or self._stopping:
            protocol.fail(f"MAX_HANDSHAKES allows {MAX_HANDSHAKES} streams without a finished handshake")
            return
        self._handshakes.add(protocol)

    def judge_peer(self, protocol: PeerProtocol, peer: PeerNamed) -> tuple[AcceptStatus, str, HandshakeError | None]:
        """What an accepted stream is answered once the peer has said its name.

        Status, cookie, and why it is refused.
        """
        cookie = self.cookie_for(peer.name)
        if peer.name == self.name.name:
            return "not_allowed", cookie, HandshakeError(f"the peer uses this node's own name, {peer.name}")
        connection = self._connections.get(Atom(peer.name))
        if connection is None:
            return "ok", cookie, None
        if connection.state == "up":
            self._replacing.add(protocol)
            return "alive", cookie, None
        if connection.attempt is None and connection.protocol is None:
            return "ok", cookie, None
        if pick_simultaneous(self.name.name, peer.name) == self.name.name:
            return "nok", cookie, ConnectionYielded(f"we were connecting to {peer.name} too, and our attempt goes on")
        return "ok_simultaneous", cookie, None

    def wants_replacement(self, protocol: PeerProtocol) -> bool:
        """The peer believes that it is still connected to us: whether it should drop that connection for this one."""
        return protocol.connection is not None and protocol.connection.state == "connecting"

    def handshake_completed(self, protocol: PeerProtocol, done: Completed) -> Connection | None:
        """The peer is who it says: its connection is up. None if another stream won the race meanwhile."""
        self._handshakes.discard(protocol)
        peer = Atom(done.peer_name)
        connection = self._connections.get(peer)
        if connection is not None and connection.state == "up":
            if protocol not in self._replacing:
                return None
            old = connection.protocol
            self.connection_lost(connection, "replaced by a new connection of the same peer")
            if old is not None:
                old.fail("replaced by a new connection of the same peer")
            connection = None
        self._replacing.discard(protocol)
        if connection is None:
            if len(self._connections) >= self.options.max_peers:
                log.warning(
                    "peer_refused",
                    node=str(self.name),
                    peer=done.peer_name,
                    reason=f"max_peers allows {self.options.max_peers}",
                )
                return None
            connection = Connection(self, peer)
            self._connections[peer] = connection
        elif connection.protocol is not protocol:
            ours = connection.protocol
            connection.protocol = None
            if connection.attempt is not None:
                connection.attempt.cancel()
            if ours is not None:
                ours.fail("overtaken by a connection from the peer")
        connection.take_over(protocol, done.flags, done.creation)
        log.info("node_up", node=str(self.name), peer=done.peer_name)
        self._settle(connection, None)
        for watcher in list(self._node_watchers):
            watcher(peer, True, "")
        return connection

    def stream_ended(self, protocol: PeerProtocol, why: str, error: HandshakeError | None) -> None:
        """A stream is closed, whatever state it was in."""
        self._handshakes.discard(protocol)
        self._replacing.discard(protocol)
        connection = protocol.connection
        if error is not None and not isinstance(error, ConnectionYielded):
            log.warning(
                "handshake_failed",
                node=str(self.name),
                peer=str(connection.peer) if connection is not None else None,
                address=str(protocol.peer_address),
                reason=str(error),
            )
        if connection is None or connection.protocol is not protocol:
            return
        if isinstance(error, ConnectionYielded) and connection.state == "connecting":
            # The peer's own attempt goes on and will arrive here.
            connection.protocol = None
            self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._give_up, connection)
            return
        self.connection_lost(connection, why, error)

    def _give_up(self, connection: Connection) -> None:
        if connection.state == "connecting" and connection.protocol is None:
            self.connection_lost(connection, "the peer wanted to connect to us instead, but never came")

    def _settle(self, connection: Connection, error: ErlError | None) -> None:
        waiting, connection.on_settled = connection.on_settled, []
        for settle in waiting:
            settle(error)

    def connection_lost(self, connection: Connection, why: str, error: ErlError | None = None) -> None:
        """The peer is gone: tell everyone here who depended on it."""
        if connection.state == "down":
            return
        was_up = connection.state == "up"
        connection.state = "down"
        connection.protocol = None
        if self._connections.get(connection.peer) is connection:
            del self._connections[connection.peer]
        log.info(
            "node_down" if was_up else "connect_failed", node=str(self.name), peer=str(connection.peer), reason=why
        )
        self._settle(connection, error or NotConnected(why))
        for call in list(connection.spawns.values()):
            call.on_error(NOCONNECTION)
        connection.spawns.clear()
        for monitor in list(connection.monitors.values()):
            monitor.fire(NOCONNECTION)
        connection.monitors.clear()
        for reference, process in connection.watched.items():
            process.monitored_by.pop(reference, None)
        connection.watched.clear()
        for remote, processes in list(connection.links.items()):
            for process in list(processes):
                process.exit_signal(remote, NOCONNECTION, from_link=True)
        connection.links.clear()
        if was_up:
            for watcher in list(self._node_watchers):
                watcher(connection.peer, False, why)

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(self.options.ticktime_s / TICKS_PER_TICKTIME, self._tick)
        for connection in list(self._connections.values()):
            connection.tick(TICKS_PER_TICKTIME)

    def add_application(self, name: str, description: str, version: str) -> None:
        """From now on this application is running here; the last one added is listed first."""
        self.applications = {name: (description, version), **self.applications}

    # Turns of the loop

    def schedule(self, process: Process) -> None:
        """`process` has messages: run it in this turn, or in the next one if none is going on."""
        self._ready.append(process)
        if not self._in_turn and not self._turn_planned:
            self._turn_planned = True
            self._loop.call_soon(self._planned_turn)

    def flush_later(self, connection: Connection) -> None:
        """`connection` has output: write it at the end of this turn, or in the next one."""
        self._to_flush.append(connection)
        if not self._in_turn and not self._turn_planned:
            self._turn_planned = True
            self._loop.call_soon(self._planned_turn)

    def _planned_turn(self) -> None:
        self._turn_planned = False
        self.turn()

    def turn(self) -> None:
        """Run the processes that have messages, then write what was sent."""
        if self._in_turn:
            return
        ready = self._ready
        if ready:
            self._in_turn = True
            budget = TURN_MESSAGES
            while ready and budget > 0:
                budget -= ready.popleft().run(PROCESS_MESSAGES)
            self._in_turn = False
            if ready and not self._turn_planned:
                self._turn_planned = True
                self._loop.call_soon(self._planned_turn)
        if self._to_flush:
            flushing, self._to_flush = self._to_flush, []
            for connection in flushing:
                connection.flush()

    # Names, pids, references

    def make_reference(self) -> Reference:
        """A new reference, unique in this life of the node."""
        low = self._reference_low + 1
        if low == _REFERENCE_WORD0:
            low = 0
            middle, high = self._reference_high
            middle += 1
            self._reference_high = (middle, high) if middle < _WORD else (0, (high + 1) % _WORD)
        self._reference_low = low
        return Reference(self.name, self.creation, (low, *self._reference_high))

    def _make_pid(self) -> Pid:
        while True:
            self._next_pid += 1
            if self._next_pid == _PID_NUMBERS:
                self._next_pid = 1
                self._pid_serial += 1
            if self._next_pid not in self._processes:
                return Pid(self.name, self._next_pid, self._pid_serial, self.creation)

    def register(self, name: str | Atom, process: Process) -> None:
        """Give a process a registered name. `NodeError` if the name is taken."""
        atom = Atom(str(name))
        if atom in self._names:
            raise NodeError(f"the name {atom} is taken by {self._names[atom].pid}")
        self._names[atom] = process
        process.names.append(atom)

    def unregister(self, name: str | Atom) -> bool:
        """Free a registered name; False if nobody had it."""
        process = self._names.pop(Atom(str(name)), None)
        if process is not None:
            process.names.remove(Atom(str(name)))
        return process is not None

    def whereis(self, name: str | Atom) -> Process | None:
        """The process registered under `name`."""
        return self._names.get(Atom(str(name)))

    def registered(self) -> list[Atom]:
        """All registered names."""
        return list(self._names)

    def processes(self) -> Iterable[Process]:
        """All live processes."""
        return list(self._processes.values())

    def process(self, pid: Pid) -> Process | None:
        """The live process with this pid; None for pids of other nodes or of an earlier life of this one."""
        process = self._processes.get(pid.id)
        return process if process is not None and process.pid == pid else None

    # Spawning

    def spawn_receiver(
        self, receiver: Receiver, *, name: str | Atom | None = None, group_leader: Pid | None = None
    ) -> Process:
        """Start a process whose messages go to `receiver`."""
        process = Process(self, self._make_pid(), receiver, group_leader or self.group_leader)
        if name is not None:
            self.register(name, process)
        self._processes[process.pid.id] = process
        return process

    def spawn(
        self,
        main: Callable[[Mailbox], Coroutine[Any, Any, object]],
        *,
        name: str | Atom | None = None,
        link: Process | None = None,
    ) -> Process:
        """Start a process that runs the coroutine `main(me)`."""
        mailbox = Mailbox(main)
        process = self.spawn_receiver(mailbox, name=name)
        if link is not None:
            process.link(link.pid)
        mailbox.start(process)
        return process

    def forget(self, process: Process, reason: Term) -> None:
        """A process has exited: free what it held and tell who asked. Called by `Process.exit` only."""
        self._processes.pop(process.pid.id, None)
        for name in process.names:
            self._names.pop(name, None)
        for reference in process.aliases:
            self._aliases.pop(reference.ids, None)
        for monitor in process.monitors.values():
            self.demonitor(monitor)
        process.monitors.clear()
        watchers, process.monitored_by = process.monitored_by, {}
        for reference, watcher in watchers.items():
            if isinstance(watcher, tuple):
                self._tell_down(reference, watcher, reason)
            else:
                watcher(reason)
        links, process.links = process.links, set()
        for other in links:
            self._break_link(process, other, reason)

    def _tell_down(self, reference: Reference, watcher: tuple[Pid, Term], reason: Term) -> None:
        pid, watched = watcher
        connection = self._connections.get(pid.node)
        if connection is None:
            return
        connection.watched.pop(reference, None)
        self._send_monitor_exit(connection, watched, pid, reference, reason)

    def _send_monitor_exit(
        self, connection: Connection, watched: Term, watcher: Pid, reference: Reference, reason: Term
    ) -> None:
        if connection.flags & DistributionFlag.EXIT_PAYLOAD:
            connection.send_message((control.OP_PAYLOAD_MONITOR_P_EXIT, watched, watcher, reference), reason)
        else:
            connection.send_control((control.OP_MONITOR_P_EXIT, watched, watcher, reference, reason))

    def _break_link(self, process: Process, other: Pid, reason: Term) -> None:
        if other.node is self.name:
            target = self.process(other)
            if target is not None:
                target.exit_signal(process.pid, reason, from_link=True)
            return
        connection = self._connections.get(other.node)
        if connection is not None:
            self._drop_link(connection, process, other)
            self._send_exit(connection, process.pid, other, reason)

    def _send_exit(self, connection: Connection, sender: Pid, to: Pid, reason: Term) -> None:
        if connection.flags & DistributionFlag.EXIT_PAYLOAD:
            connection.send_message((control.OP_PAYLOAD_EXIT, sender, to), reason)
        else:
            connection.send_control((control.OP_EXIT, sender, to, reason))

    @staticmethod
    def _drop_link(connection: Connection, process: Process, other: Pid) -> None:
        linked = connection.links.get(other)
        if linked is not None:
            linked.discard(process)
            if not linked:
                del connection.links[other]

    # Signals out

    def send(self, to: Term, message: Term, sender: Pid | None = None) -> None:
        """Send `message` to a pid, a local name, `{Name, Node}` or an alias. What cannot be delivered is dropped."""
        kind = type(to)
        if kind is Pid:
            if to.node is self.name:
                process = self._processes.get(to.id)
                if process is not None and process.pid == to:
                    process.deliver(message)
                return
            connection = self._connections.get(to.node) or self.connection(to.node)
            connection.send_message((control.OP_SEND_SENDER, sender or self.client.pid, to), message)
        elif kind is Reference:
            if to.node is self.name:
                alias = self._aliases.get(to.ids)
                if alias is not None and to.creation == self.creation:
                    alias.receive(message)
                return
            connection = self._connections.get(to.node) or self.connection(to.node)
            connection.send_message((control.OP_ALIAS_SEND, sender or self.client.pid, to), message)
        elif kind is Atom:
            process = self._names.get(to)
            if process is not None:
                process.deliver(message)
        elif kind is tuple and len(to) == 2:
            name, node = to
            if node is self.name:
                self.send(name, message)
                return
            connection = self._connections.get(node) or self.connection(node)
            connection.send_message((control.OP_REG_SEND, sender or self.client.pid, control.UNUSED, name), message)
        else:
            raise TypeError(f"cannot send to {to!r}: expected a pid, an alias, a name or {{Name, Node}}")

    def reply(self, caller: tuple[Pid, Term], answer: Term) -> None:
        """Answer a `gen_server:call`: `caller` is the From it came with, `{Pid, Tag}` or `{Pid, [alias | Ref]}`."""
        pid, tag = caller
        if type(tag) is ImproperList and type(tag.tail) is Reference:
            self.send(tag.tail, (tag, answer))
        else:
            self.send(pid, (tag, answer))

    def exit(self, target: Pid, reason: Term, sender: Pid | None = None) -> None:
        """`exit(Pid, Reason)`: send an exit signal."""
        origin = sender or self.client.pid
        if target.node is self.name:
            process = self.process(target)
            if process is not None:
                process.exit_signal(origin, reason, from_link=False)
            return
        connection = self.connection(target.node)
        if connection.flags & DistributionFlag.EXIT_PAYLOAD:
            connection.send_message((control.OP_PAYLOAD_EXIT2, origin, target), reason)
        else:
            connection.send_control((control.OP_EXIT2, origin, target, reason))

    def open_alias(self, receive: Callable[[Term], None], spine_levels: int | None = None) -> Reference:
        """A new alias: messages sent to the reference go to `receive` until `close_alias`."""
        reference = self.make_reference()
        self._aliases[reference.ids] = Alias(receive, spine_levels)
        return reference

    def close_alias(self, reference: Reference) -> bool:
        """End an alias; what is sent to it from now on is dropped. False if it was closed already."""
        return self._aliases.pop(reference.ids, None) is not None

    def monitor(
        self,
        target: Term,
        on_down: Callable[[Monitor, Term], None],
        owner: Pid | None = None,
        reference: Reference | None = None,
    ) -> Monitor:
        """Watch a pid, a local name or `{Name, Node}`.

        `on_down(monitor, reason)` once it is gone, in a later turn at the earliest.
        """
        monitor = Monitor(reference or self.make_reference(), owner or self.client.pid, target, on_down)
        node = self.name
        if type(target) is Pid:
            node = target.node
        elif type(target) is tuple:
            monitor.target, node = target
        else:
            monitor.object = (target, self.name)
        if node is not self.name:
            connection = self.connection(node)
            monitor.connection = connection
            connection.monitors[monitor.reference] = monitor
            connection.send_control((control.OP_MONITOR_P, monitor.owner, monitor.target, monitor.reference))
            return monitor
        process = self.process(monitor.target) if type(monitor.target) is Pid else self._names.get(monitor.target)
        if process is None:
            self._loop.call_soon(monitor.fire, NOPROC)
        else:
            monitor.process = process
            process.monitored_by[monitor.reference] = monitor.fire
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
            connection.send_control((control.OP_DEMONITOR_P, monitor.owner, monitor.target, monitor.reference))

    def send_link(self, process: Process, other: Pid) -> None:
        """Make the other half of a link of `process`; called by `Process.link` only."""
        if other.node is self.name:
            target = self.process(other)
            if target is None:
                self._loop.call_soon(lambda: process.exit_signal(other, NOPROC, from_link=True))
            else:
                target.links.add(process.pid)
            return
        connection = self.connection(other.node)
        connection.links.setdefault(other, set()).add(process)
        connection.send_control((control.OP_LINK, process.pid, other))

    def send_unlink(self, process: Process, other: Pid) -> None:
        """Undo the other half of a link; called by `Process.unlink` only."""
        if other.node is self.name:
            target = self.process(other)
            if target is not None:
                target.links.discard(process.pid)
            return
        connection = self._connections.get(other.node)
        if connection is None:
            return
        self._drop_link(connection, process, other)
        if connection.flags & DistributionFlag.UNLINK_ID:
            self._unlink_id += 1
            process.unlinking[other] = self._unlink_id
            connection.send_control((control.OP_UNLINK_ID, self._unlink_id, process.pid, other))
        else:
            connection.send_control((control.OP_UNLINK, process.pid, other))

    def spawn_request(
        self,
        peer: Atom,
        mfa: tuple[Atom, Atom, list[Term]],
        *,
        on_error: Callable[[Term], None],
        on_down: Callable[[Monitor, Term], None],
        owner: Pid | None = None,
    ) -> Monitor:
        """Spawn `M:F(Args)` on `peer` with a monitor.

        `on_error(reason)` if that fails, `on_down(monitor, reason)` at its end.
        """
        module, function, arguments = mfa
        connection = self.connection(peer)
        monitor = Monitor(self.make_reference(), owner or self.client.pid, None, on_down)
        monitor.connection = connection
        connection.spawns[monitor.reference] = SpawnCall(monitor, on_error)
        connection.send_message(
            (
                control.OP_SPAWN_REQUEST,
                monitor.reference,
                monitor.owner,
                monitor.owner,
                (module, function, len(arguments)),
                [Atom("monitor")],
            ),
            arguments,
        )
        return monitor

    def abandon_spawn(self, monitor: Monitor) -> None:
        """Nobody waits for a spawn request any more: neither of its callbacks is called from now on."""
        if monitor.target is not None:
            self.demonitor(monitor)
        monitor.fired = True

    # Signals in

    def route(self, connection: Connection, frame: bytes) -> None:
        """Carry out one distribution message. Raises `RemoteProtocolError` for what the protocol does not allow."""
        if len(frame) < 3 or frame[0] != 112 or frame[1] != VERSION:
            raise RemoteProtocolError(f"a distribution message begins with 112, 131; this one with {list(frame[:2])}")
        term, position = etf.decode_term(frame, 2, connection.atoms)
        if type(term) is not tuple or not term or type(term[0]) is not int:
            raise RemoteProtocolError("a control message is a tuple that begins with a number")
        handler = self._routes.get(term[0])
        if handler is not None:
            handler(connection, term, frame, position)
            return
        message = control.parse(term)
        payload = self._payload(connection, frame, position, None) if message.has_payload else None
        self._parsed_routes[type(message)](connection, message, payload)

    def _payload(self, connection: Connection, frame: bytes, position: int, spine_levels: int | None) -> Term:
        if position >= len(frame) or frame[position] != VERSION:
            raise RemoteProtocolError("the control message announces a payload, but none follows")
        if spine_levels is not None:
            return etf.decode_spine(frame, position + 1, spine_levels, connection.atoms)
        term, end = etf.decode_term(frame, position + 1, connection.atoms)
        if end != len(frame):
            raise RemoteProtocolError(f"{len(frame) - end} bytes follow the payload")
        return term

    def _on_send(self, connection: Connection, term: tuple[Term, ...], frame: bytes, position: int) -> None:
        if len(term) < 3 or type(term[2]) is not Pid:
            raise RemoteProtocolError("SEND and SEND_SENDER name a pid as their receiver")
        to = term[2]
        process = self._processes.get(to.id)
        if process is not None and process.pid == to:
            process.deliver(self._payload(connection, frame, position, process.spine_levels))

    def _on_reg_send(self, connection: Connection, term: tuple[Term, ...], frame: bytes, position: int) -> None:
        if len(term) < 4:
            raise RemoteProtocolError("REG_SEND has four elements")
        process = self._names.get(term[3])
        if process is not None:
            process.deliver(self._payload(connection, frame, position, process.spine_levels))

    def _on_alias_send(self, connection: Connection, term: tuple[Term, ...], frame: bytes, position: int) -> None:
        if len(term) < 3 or type(term[2]) is not Reference:
            raise RemoteProtocolError("ALIAS_SEND names a reference as its receiver")
        to = term[2]
        alias = self._aliases.get(to.ids)
        if alias is not None and to.creation == self.creation:
            alias.receive(self._payload(connection, frame, position, alias.spine_levels))

    def _find(self, target: Term) -> Process | None:
        return self.process(target) if type(target) is Pid else self._names.get(target)

    def _on_monitor(self, connection: Connection, message: control.MonitorP, _: Term) -> None:
        process = self._find(message.to_proc)
        if process is None:
            self._send_monitor_exit(connection, message.to_proc, message.from_pid, message.ref, NOPROC)
            return
        process.monitored_by[message.ref] = (message.from_pid, message.to_proc)
        connection.watched[message.ref] = process

    def _on_demonitor(self, connection: Connection, message: control.DemonitorP, _: Term) -> None:
        process = connection.watched.pop(message.ref, None)
        if process is not None:
            process.monitored_by.pop(message.ref, None)

    def _on_monitor_exit(
        self, connection: Connection, message: control.MonitorPExit | control.PayloadMonitorPExit, payload: Term
    ) -> None:
        monitor = connection.monitors.pop(message.ref, None)
        if monitor is not None:
            monitor.fire(_reason(message, payload))

    def _on_link(self, connection: Connection, message: control.Link, _: Term) -> None:
        process = self.process(message.to_pid)
        if process is None:
            self._send_exit(connection, message.to_pid, message.from_pid, NOPROC)
            return
        process.links.add(message.from_pid)
        connection.links.setdefault(message.from_pid, set()).add(process)

    def _on_unlink(self, connection: Connection, message: control.Unlink, _: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None:
            process.links.discard(message.from_pid)
            self._drop_link(connection, process, message.from_pid)

    def _on_unlink_id(self, connection: Connection, message: control.UnlinkId, _: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None:
            process.links.discard(message.from_pid)
            self._drop_link(connection, process, message.from_pid)
        connection.send_control((control.OP_UNLINK_ID_ACK, message.id, message.to_pid, message.from_pid))

    def _on_unlink_ack(self, connection: Connection, message: control.UnlinkIdAck, _: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None and process.unlinking.get(message.from_pid) == message.id:
            del process.unlinking[message.from_pid]

    def _on_exit(self, connection: Connection, message: ExitMessage, payload: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None:
            self._drop_link(connection, process, message.from_pid)
            process.exit_signal(message.from_pid, _reason(message, payload), from_link=True)

    def _on_exit2(self, connection: Connection, message: ExitMessage, payload: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None:
            process.exit_signal(message.from_pid, _reason(message, payload), from_link=False)

    def _on_altact(self, connection: Connection, message: control.AltActSigSend, payload: Term) -> None:
        if message.flags & control.AltActFlag.EXIT:
            process = self.process(message.to) if type(message.to) is Pid else None
            if process is not None:
                process.exit_signal(message.sender_pid, payload, from_link=False)
        elif type(message.to) is not Pid or message.to.node is self.name:
            self.send(message.to, payload, message.sender_pid)

    def _on_group_leader(self, connection: Connection, message: control.GroupLeader, _: Term) -> None:
        process = self.process(message.to_pid)
        if process is not None:
            process.group_leader = message.from_pid

    def _on_spawn_request(
        self, connection: Connection, message: control.SpawnRequest | control.SpawnRequestTT, payload: Term
    ) -> None:
        if type(payload) is not list:
            raise RemoteProtocolError("the arguments of SPAWN_REQUEST are a list")
        if self.requests is None:
            connection.send_control((control.OP_SPAWN_REPLY, message.req_id, message.from_pid, 0, Atom("notsup")))
        else:
            self.requests(message, payload, connection)

    def _on_spawn_reply(
        self, connection: Connection, message: control.SpawnReply | control.SpawnReplyTT, _: Term
    ) -> None:
        call = connection.spawns.pop(message.req_id, None)
        if call is None:
            return
        monitor = call.monitor
        if type(message.result) is not Pid:
            if not monitor.fired:
                monitor.fired = True
                call.on_error(message.result)
            return
        monitor.target = monitor.object = message.result
        connection.monitors[monitor.reference] = monitor
        if monitor.fired:
            monitor.fired = False
            self.demonitor(monitor)


class _ClientReceiver:
    """The receiver of the client process.

    Some servers (`net_kernel` among them) send the reply of a call to the caller's pid although its tag is an alias:
    it is handed to the alias. Nobody reads anything else.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def receive(self, message: Term) -> None:
        if type(message) is tuple and len(message) == 2:
            tag = message[0]
            reference = tag.tail if type(tag) is ImproperList else tag
            if type(reference) is Reference:
                self._node.send(reference, message)

    def terminate(self, reason: Term) -> None:
        return None


def _reason(message: ControlMessage, payload: Term) -> Term:
    """The exit reason of a message that carries it in itself or, under `EXIT_PAYLOAD`, behind itself."""
    return payload if message.has_payload else getattr(message, "reason")  # noqa: B009


def _default_listen_hosts(host: str) -> tuple[str, ...]:
    try:
        return (host,) if ipaddress.ip_address(host).is_loopback else ()
    except ValueError:
        return ("127.0.0.1",) if host == "localhost" else ()
