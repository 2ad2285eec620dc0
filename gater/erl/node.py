"""The node: its life, its names, its processes, and the turns in which they run.

"One way in": bytes -> `PeerProtocol` -> `Router.route` -> `Process.deliver` -> receiver. "One way out": `Node.send` and
`Signals` -> `Connection`, collected during a loop turn and written at its end by `turn`.

What follows the reference manual: a send to an unconnected node connects first; a monitor or a link that cannot be made
answers `noproc` or `noconnection`; the pids of an earlier life of this node (another creation) are nobody.
The node is hidden: it never offers DFLAG_PUBLISHED, so that peers keep it out of `nodes()`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import structlog

from gater.erl import control
from gater.erl.busy_wait import BusyWait
from gater.erl.connection import MAX_FRAME_BYTES, Connection
from gater.erl.epmd import BuiltinEpmd, EpmdPortInUse, EpmdUnavailable, Registration, register
from gater.erl.errors import NodeError
from gater.erl.exports import Exports
from gater.erl.handshake import HANDSHAKE_TIMEOUT_S, HEADER_FLAGS, OUR_FLAGS, DistributionFlag, node_name_fault
from gater.erl.peers import MAX_PEERS, NodeWatcher, Peers
from gater.erl.process import SHUTDOWN, Mailbox, Process, Receiver, described
from gater.erl.routing import Router
from gater.erl.signals import Alias, Monitor, Signals
from gater.erl.terms import Atom, ImproperList, Pid, Reference, Term

__all__ = ["Monitor", "Node", "NodeOptions", "NodeTls"]

TICKTIME_S: Final = 60.0
"""`net_ticktime`: a peer that has been silent this long (up to a quarter more) is down."""

TURN_S: Final = 0.02
"""How long processes run before the loop gets its turn again, so that ticks, timers and other sockets are not held up.
A coroutine or callback of the user's is never interrupted; this is looked at between them."""

PROCESS_MESSAGES: Final = 64
"""Messages one process handles before the next process has its turn."""

REGISTER_TRIES: Final = 3
"""Attempts to register while EPMD comes and goes: two nodes that start at once may both find none and start one each,
and the one that comes second then finds the other's."""

REGISTER_PAUSE_S: Final = 0.05
"""Between those attempts."""

REGISTER_AGAIN_S: Final = (0.2, 10.0)
"""First and longest pause before registering again after EPMD was lost; doubled in between."""

EPMD_GRACE_S: Final = 3.0
"""After EPMD was lost its port is left free this long for one that is being restarted, which would otherwise find the
port taken, and end. BEAM nodes try again every 2 s; a service manager starts a program anew in less."""

_PID_NUMBERS: Final = 1 << 28
_REFERENCE_WORD0: Final = 1 << 18
_WORD: Final = 1 << 32

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeTls:
    """How a node of `-proto_dist inet_tls` proves who it is, to those who connect (`server`) and when it connects.

    `NodeTls.of_files` makes what a cluster usually wants; other contexts can be given as they are.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def of_files(
        cls, *, certificate: str, key: str, authority: str, check_host: bool = True, ask_clients: bool = True
    ) -> NodeTls:
        """Contexts from PEM files: this node's certificate and key, and the authority that signed those of all nodes.

        `check_host` compares the host part of a node's name with its certificate, `ask_clients` demands a certificate
        of those who connect. `NodeError` if a file cannot be used.
        """
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = check_host
        if ask_clients:
            server.verify_mode = ssl.CERT_REQUIRED
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                context.load_cert_chain(certificate, key)
                context.load_verify_locations(authority)
            except OSError as error:
                raise NodeError(f"TLS: {certificate}, {key} or {authority} cannot be used: {error}") from error
        return cls(server, client)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node may be told; every default is what `erl` would do."""

    listen_hosts: tuple[str, ...] = ()
    """Addresses to listen on; none: loopback if the node's host is a loopback address, else all addresses."""
    listen_port: int = 0
    """TCP port to listen on, on each of them; 0 lets the system choose."""
    epmd_host: str | None = None
    """Where this node registers; None: the loopback address."""
    epmd_port: int = 4369
    builtin_epmd: bool = True
    """Start an EPMD in this process when none listens."""
    epmd_grace_s: float = EPMD_GRACE_S
    """How long to wait for another EPMD before that, when the one that was there is lost."""
    epmd_listen_hosts: tuple[str, ...] = ()
    """Addresses the built-in EPMD listens on; none: `epmd_host`."""
    max_peers: int = MAX_PEERS
    ticktime_s: float = TICKTIME_S
    max_frame_bytes: int = MAX_FRAME_BYTES
    busy_wait_s: float = 0.0
    """How long to look for more input after there was some, before the loop sleeps (`BusyWait`): 0.0002 makes a server
    of small calls a third quicker, for as much processor time each time. 0: not at all."""
    tls: NodeTls | None = None
    """Distribution over TLS (`-proto_dist inet_tls`), with all peers; None: plain TCP."""
    headers: bool = True
    """Offer distribution headers: an atom cache, and fragments between which small messages pass. Without them large
    messages hold up small ones, and a peer that has none gets what is passed on to it (`spine_levels`) rewritten."""
    cookies: dict[str, str] = field(default_factory=dict)
    """Cookies for single peers, by node name; all others share the node's own."""


class Node:
    """An Erlang node in this process: `async with Node("py@127.0.0.1", cookie="secret") as node: ...`.

    Raises `NodeError` for a name or a cookie that no node can have.
    """

    def __init__(self, name: str, *, cookie: str, options: NodeOptions | None = None) -> None:
        problem = node_name_fault(name)
        if problem is not None:
            raise NodeError(f"{name!r} is not a node name: it {problem}")
        self.name = Atom(name)
        self.options = options or NodeOptions()
        for each in (cookie, *self.options.cookies.values()):
            if not each.isascii() or not each:
                raise NodeError("a cookie is one or more ASCII characters")
        self.creation = 0
        self.flags = OUR_FLAGS | HEADER_FLAGS if self.options.headers else OUR_FLAGS
        self.group_leader: Pid | None = None
        self.on_start: list[Callable[[], None]] = []
        self.started_at = 0.0
        self.applications: dict[str, tuple[str, str]] = {}
        """What runs here, for whoever asks `application:which_applications()`: name -> (description, version)."""
        self.exports = Exports()
        """The Python functions that peers may call by Erlang names."""
        self.requests: (
            Callable[[control.SpawnRequest | control.SpawnRequestTT, list[Term], Connection], None] | None
        ) = None
        """Who carries out spawn requests of peers (`rpc_server.py`); without one they are answered `notsup`."""
        self.peers = Peers(self)
        self.signals = Signals(self)
        self.router = Router(self)
        self.busy_wait: BusyWait
        self._cookie = cookie
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[asyncio.Server] = []
        self._epmd: BuiltinEpmd | None = None
        self._registration: Registration | None = None
        self._registering: asyncio.Task[None] | None = None
        self._client: Process | None = None
        self._stopping = False
        self._processes: dict[int, Process] = {}
        self._names: dict[Atom, Process] = {}
        self._aliases: dict[tuple[int, ...], Alias] = {}
        self._next_pid = 0
        self._pid_serial = 0
        self._reference_low = secrets.randbelow(_REFERENCE_WORD0)
        self._reference_high = (secrets.randbits(32), secrets.randbits(32))
        self._ready: deque[Process] = deque()
        self._to_flush: list[Connection] = []
        self._in_turn = False
        self._turn_is_due = False

    def __repr__(self) -> str:
        return f"<Node {self.name}>"

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
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop the node runs on. `NodeError` before `start`."""
        if self._loop is None:
            raise NodeError(f"the node {self.name} has not been started")
        return self._loop

    @property
    def is_running(self) -> bool:
        """Whether processes can be started: from the moment the node is registered until it is told to stop."""
        return self._registration is not None and not self._stopping

    @property
    def uptime_s(self) -> float:
        """Seconds since `start`."""
        return self.loop.time() - self.started_at

    @property
    def client(self) -> Process:
        """The process in whose name code outside of any process calls and sends."""
        if self._client is None:
            raise NodeError(f"the node {self.name} has not been started")
        return self._client

    async def start(self) -> None:
        """Listen, register with EPMD, begin to tick. A node is started once.

        Raises `NodeError` (`NameTaken`, `EpmdUnavailable`, `EpmdProtocolError`, or an address that cannot be listened
        on).
        """
        if self._loop is not None:
            raise NodeError(f"the node {self.name} was started before; make a new one")
        self._loop = asyncio.get_running_loop()
        self.busy_wait = BusyWait(self._loop, self.options.busy_wait_s)
        self.started_at = self._loop.time()
        try:
            await self._listen(self._loop)
            registration = await self._register_with_epmd(self.options.builtin_epmd)
        except BaseException:
            for server in self._servers:
                server.close()
            if self._epmd is not None:
                await self._epmd.close()
            raise
        self.creation = registration.creation
        self._client = self.spawn_receiver(_ClientReceiver(self))
        for hook in self.on_start:
            hook()
        self.peers.start_ticking()

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        hosts: tuple[str | None, ...] = self.options.listen_hosts or _default_listen_hosts(self.host) or (None,)
        port = self.options.listen_port
        tls = self.options.tls
        for host in hosts:
            try:
                server = await loop.create_server(
                    self.peers.accept,
                    host,
                    port,
                    reuse_address=True,
                    ssl=None if tls is None else tls.server,
                    ssl_handshake_timeout=None if tls is None else HANDSHAKE_TIMEOUT_S,
                )
            except OSError as error:
                where = host or "all addresses"
                raise NodeError(f"cannot listen on {where}, port {port}: {error.strerror or error}") from error
            self._servers.append(server)
            port = port or self.listen_port

    @property
    def listen_port(self) -> int:
        """The TCP port this node listens on."""
        if not self._servers:
            raise NodeError(f"the node {self.name} has not been started")
        return int(self._servers[0].sockets[0].getsockname()[1])

    async def _register_with_epmd(self, may_serve: bool) -> Registration:
        """Register, at a built-in EPMD if none listens and `may_serve` allows to start one."""
        short = self.name.name.partition("@")[0]
        host, port = self.epmd_host, self.options.epmd_port
        for tries_left in reversed(range(REGISTER_TRIES)):
            try:
                self._registration = await register(
                    short, self.listen_port, epmd_host=host, epmd_port=port, on_lost=self._epmd_lost
                )
                return self._registration
            except EpmdUnavailable:
                if not tries_left or not may_serve:
                    raise
            epmd = BuiltinEpmd()
            try:
                await epmd.start(self.options.epmd_listen_hosts or (host,), port)
            except EpmdPortInUse:
                await asyncio.sleep(REGISTER_PAUSE_S)
            else:
                self._epmd = epmd
                log.info("builtin_epmd_started", host=host, port=port)
        raise AssertionError("the last try raises or returns")

    def _epmd_lost(self) -> None:
        if not self._stopping:
            log.warning("epmd_lost", node=str(self.name), host=self.epmd_host, port=self.options.epmd_port)
            self._registering = self.loop.create_task(self._register_again())

    async def _register_again(self) -> None:
        """Register until it succeeds. The creation stays what it was, as in a BEAM: pids and references in other
        nodes' hands carry it, and they are as valid as before."""
        pause_s, longest_s = REGISTER_AGAIN_S
        serve_from = self.loop.time() + self.options.epmd_grace_s
        while not self._stopping:
            try:
                await self._register_with_epmd(self.options.builtin_epmd and self.loop.time() >= serve_from)
            except NodeError as error:
                log.warning("epmd_registration_failed", node=str(self.name), error=str(error), again_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)
            else:
                log.info("epmd_registered_again", node=str(self.name))
                return

    async def stop(self) -> None:
        """End every process with `shutdown`, close every connection, leave EPMD."""
        if self._stopping or self._loop is None:
            return
        self._stopping = True
        if self._registering is not None:
            self._registering.cancel()
            await asyncio.wait([self._registering])
        for process in list(self._processes.values()):
            process.exit(SHUTDOWN)
        self.turn()
        for server in self._servers:
            server.close()
        await self.peers.close()
        if self._registration is not None:
            self._registration.close()
        if self._epmd is not None:
            others = sorted(self._epmd.nodes.keys() - {self.name.name.partition("@")[0]})
            if others:
                log.warning("builtin_epmd_ends", node=str(self.name), port=self.options.epmd_port, registered=others)
            await self._epmd.close()

    # Peers

    def nodes(self) -> list[Atom]:
        """The peers this node is connected to."""
        return self.peers.up()

    def is_visible(self, peer: Atom) -> bool:
        """Whether this peer is connected and visible, one that BEAMs list in `nodes/0`."""
        connection = self.peers.table.get(peer)
        return (
            connection is not None
            and connection.state == "up"
            and bool(connection.peer_flags & DistributionFlag.PUBLISHED)
        )

    def connection(self, peer: Atom) -> Connection:
        """The connection to `peer`; if there is none an attempt begins and what is sent meanwhile waits."""
        return self.peers.connection(peer)

    async def connect(self, peer: str | Atom) -> None:
        """Connect to `peer` if it is not connected yet. Raises `NotConnected` or `HandshakeError`."""
        name = Atom(str(peer))
        if name is not self.name:
            await self.peers.connect(name)

    def disconnect(self, peer: str | Atom) -> bool:
        """Close the connection to `peer`; False if there was none."""
        return self.peers.disconnect(Atom(str(peer)))

    def monitor_nodes(self, watcher: NodeWatcher) -> Callable[[], None]:
        """Call `watcher(node, is_up, reason)` at every change; the function returned ends that."""
        return self.peers.watch(watcher)

    def cookie_for(self, peer: str) -> str:
        """The cookie shared with `peer`."""
        return self.options.cookies.get(peer, self._cookie)

    def add_application(self, name: str, description: str, version: str) -> None:
        """From now on this application is running here; the last one added is listed first."""
        self.applications = {name: (description, version), **self.applications}

    def remove_application(self, name: str) -> None:
        """From now on this application is not running here any more."""
        self.applications = {each: told for each, told in self.applications.items() if each != name}

    # Turns of the loop

    def soon(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call something in the next turn of the loop."""
        self.loop.call_soon(call, *arguments)

    def schedule(self, process: Process) -> None:
        """`process` has messages: run it in this turn, or in the next one if none is going on."""
        self._ready.append(process)
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self.turn)

    def flush_later(self, connection: Connection) -> None:
        """`connection` has output: write it at the end of this turn, or in the next one."""
        self._to_flush.append(connection)
        if not self._turn_is_due:
            self._turn_is_due = True
            self.loop.call_soon(self.turn)

    def write_first(self, peer: Atom) -> None:
        """What has been sent to `peer` in this turn is written before what has been sent to others."""
        connection = self.peers.table.get(peer)
        if connection in self._to_flush:
            self._to_flush.remove(connection)
            self._to_flush.insert(0, connection)

    def begin_turn(self) -> None:
        """The caller will call `turn` before it returns to the loop."""
        self._turn_is_due = True

    def turn(self) -> None:
        """Run the processes that have messages, then write what was sent."""
        if self._in_turn:
            return
        self._in_turn = self._turn_is_due = True
        ready = self._ready
        try:
            if ready:
                until = monotonic() + TURN_S
                while ready:
                    ready.popleft().run(PROCESS_MESSAGES)
                    if ready and monotonic() > until:
                        break
            while self._to_flush:
                flushing, self._to_flush = self._to_flush, []
                for connection in flushing:
                    connection.flush()
        finally:
            self._in_turn = False
            self._turn_is_due = bool(ready or self._to_flush)
            if self._turn_is_due:
                self.loop.call_soon(self.turn)

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
                self._pid_serial = (self._pid_serial + 1) % _WORD
            if self._next_pid not in self._processes:
                return Pid(self.name, self._next_pid, self._pid_serial, self.creation)

    def register(self, name: str | Atom, process: Process) -> None:
        """Give a process a registered name. `NodeError` if the name is taken or the process has ended."""
        atom = Atom(str(name))
        if atom in self._names:
            raise NodeError(f"the name {atom} is taken by {self._names[atom].pid}")
        if not process.alive:
            raise NodeError(f"{process.pid} has ended and cannot be registered as {atom}")
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

    def find(self, target: Term) -> Process | None:
        """The live process of this node with this pid or registered name."""
        if type(target) is Pid:
            return self.process(target)
        return self._names.get(target) if type(target) is Atom else None

    # Spawning

    def spawn_receiver(
        self, receiver: Receiver, *, name: str | Atom | None = None, group_leader: Pid | None = None
    ) -> Process:
        """Start a process whose messages go to `receiver`. `NodeError` if the name is taken or the node is not up."""
        if not self.is_running:
            raise NodeError(f"the node {self.name} is not running: no process can be started")
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
        self.signals.process_ended(process, reason)

    # Messages out

    def send(self, to: Term, message: Term, sender: Pid | None = None) -> None:
        """Send `message` to a pid, a local name, `{Name, Node}` or an alias. What cannot be delivered is dropped.

        Raises EncodeError if it goes to another node and is no term. A message within this node is not copied: what is
        sent must not be changed afterwards.
        """
        kind = type(to)
        if kind is Pid:
            if to.node is self.name:
                process = self.process(to)
                if process is not None:
                    process.deliver(message)
                return
            connection = self.peers.connection(to.node)
            connection.send(sender or self.client.pid, to, message)
            if connection.busy:
                self._hold(sender, connection)
        elif kind is Reference:
            if to.node is self.name:
                alias = self.alias(to)
                if alias is not None:
                    self.deliver_to_alias(to, alias, message)
                return
            origin = sender or self.client.pid
            connection = self.peers.connection(to.node)
            connection.send_message((control.OP_ALIAS_SEND, origin, to), message)
            if connection.busy:
                self._hold(sender, connection)
        elif kind is tuple and len(to) == 2:
            name, node = _address(to)
            if node is self.name:
                self.send(name, message)
                return
            origin = sender or self.client.pid
            connection = self.peers.connection(node)
            connection.send_message((control.OP_REG_SEND, origin, control.UNUSED, name), message)
            if connection.busy:
                self._hold(sender, connection)
        elif kind is Atom or kind is str:
            process = self._names.get(to if kind is Atom else Atom(to))
            if process is not None:
                process.deliver(message)
        else:
            raise TypeError(f"cannot send to {to!r}: expected a pid, an alias, a name or {{Name, Node}}")

    def _hold(self, sender: Pid | None, connection: Connection) -> None:
        process = None if sender is None else self.process(sender)
        if process is not None and process is not self._client:
            connection.hold(process)

    async def drain(self, peer: str | Atom, timeout_s: float | None = None) -> None:
        """Wait until `peer` has taken so much of what was sent to it that sending more is reasonable.

        Processes wait by themselves (they are not run meanwhile); this is for code outside of processes. Raises
        `TimeoutError` when `timeout_s` have passed.
        """
        connection = self.peers.table.get(peer if type(peer) is Atom else Atom(str(peer)))
        if connection is not None and connection.busy:
            async with asyncio.timeout(timeout_s):
                await connection.drain()

    def reply(self, caller: tuple[Pid, Term], answer: Term, sender: Pid | None = None) -> None:
        """Answer a `gen_server:call`: `caller` is the From it came with.

        As `gen:reply`: a tag `[alias | Ref]`, or `[[alias | Ref] | _]` of a request of a collection, is answered at
        the alias, any other tag at the pid.
        """
        pid, tag = caller
        inner = tag
        if type(tag) is ImproperList:
            head = tag.elements[0]
            inner = head if type(head) is ImproperList else tag
        elif type(tag) is list and tag:
            inner = tag[0]
        if type(inner) is ImproperList and type(inner.tail) is Reference:
            self.send(inner.tail, (tag, answer), sender)
        else:
            self.send(pid, (tag, answer), sender)

    # Aliases, monitors, links, exit signals

    def open_alias(
        self, receive: Callable[[Term], None], spine_levels: int | None = None, *, once: bool = False
    ) -> Reference:
        """A new alias: messages sent to the reference go to `receive` until `close_alias`, or only the first (`once`).

        `spine_levels` says how deep they are decoded (`etf.decode_spine`); None decodes all of them.
        """
        reference = self.make_reference()
        self._aliases[reference.ids] = Alias(receive, spine_levels, once)
        return reference

    def close_alias(self, reference: Reference) -> bool:
        """End an alias; what is sent to it from now on is dropped. False if it was closed already."""
        return self._aliases.pop(reference.ids, None) is not None

    def alias(self, reference: Reference) -> Alias | None:
        """The open alias that this reference is."""
        alias = self._aliases.get(reference.ids)
        return alias if alias is not None and reference.creation == self.creation else None

    def deliver_to_alias(self, reference: Reference, alias: Alias, message: Term) -> None:
        """Hand a message to whoever holds the alias. Called with an open alias only."""
        if alias.once:
            del self._aliases[reference.ids]
        try:
            alias.receive(message)
        except Exception as error:
            log.error("alias_receiver_failed", node=str(self.name), error=described(error))

    def monitor(
        self,
        target: Term,
        on_down: Callable[[Monitor, Term], None],
        owner: Pid | None = None,
        reference: Reference | None = None,
    ) -> Monitor:
        """Watch a pid, a local name or `{Name, Node}`: `on_down(monitor, reason)` once it is gone, never at once.

        `reference` may be an open alias: then it is the monitor's reference too, as `gen:call` has it.
        """
        if type(target) is tuple:
            target = _address(target)
        elif type(target) is str:
            target = Atom(target)
        return self.signals.monitor(
            target, on_down, owner or self.client.pid, reference if reference is not None else self.make_reference()
        )

    def demonitor(self, monitor: Monitor) -> None:
        """Stop watching; `on_down` is not called any more."""
        self.signals.demonitor(monitor)

    def exit(self, target: Pid, reason: Term, sender: Pid | None = None) -> None:
        """`exit(Pid, Reason)`: send an exit signal."""
        self.signals.exit(target, reason, sender or self.client.pid)

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

        `on_error(reason)` if that fails (`noconnection`, `notsup`, ..), `on_down(monitor, reason)` at its end.
        """
        return self.signals.spawn_request(peer, mfa, on_error, on_down, owner or self.client.pid)

    def spawn_cast(self, peer: Atom, mfa: tuple[Atom, Atom, list[Term]], owner: Pid | None = None) -> None:
        """Spawn `M:F(Args)` on `peer`; no answer, no error."""
        self.signals.spawn_cast(peer, mfa, owner or self.client.pid)

    def abandon_spawn(self, monitor: Monitor) -> None:
        """Nobody waits for a spawn request any more: neither of its callbacks is called from now on."""
        self.signals.abandon_spawn(monitor)


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
            if type(reference) is Reference and reference.node is self._node.name:
                self._node.send(reference, message)

    def terminate(self, reason: Term) -> None:
        return None


def _address(to: tuple[Term, ...]) -> tuple[Term, Atom]:
    """`{Name, Node}` with its parts as atoms, should they be given as text."""
    name, node = to
    if type(node) is not Atom:
        if not isinstance(node, str):
            raise TypeError(f"{node!r} is not the name of a node")
        node = Atom(node)
    return (Atom(name) if isinstance(name, str) else name), node


def _default_listen_hosts(host: str) -> tuple[str, ...]:
    try:
        return (host,) if ipaddress.ip_address(host).is_loopback else ()
    except ValueError:
        return ("127.0.0.1",) if host == "localhost" else ()
