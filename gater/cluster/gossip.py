"""libcluster's gossip: nodes say their names over UDP, and whoever hears one connects to it.

Follows `Cluster.Strategy.Gossip` of libcluster 3.5. A packet is `"heartbeat::" <> term_to_binary(%{node: node})`; with
a secret it is 16 bytes of initialisation vector, then that in AES-256-CBC under the SHA-256 of the secret with PKCS #7
padding. It is sent at once and then at random intervals of up to 5 s.

`GossipCodec` knows the packets, `Intake` decides which names are passed on: anyone on the network may send anything, so
packets and names are bounded in size, number and rate. Both are free of sockets and clock. `Gossip` is the strategy:
one socket, opened again whenever the network comes and goes. Connecting is `connector.py`'s business.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeAlias, get_args

import structlog
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.padding import PKCS7

from gater.cluster.strategy import Wants
from gater.erl import etf
from gater.erl.errors import DecodeError, LimitExceeded
from gater.erl.handshake import node_name_fault
from gater.erl.terms import Atom

DEFAULT_PORT: Final = 45_892
LIBCLUSTER_ADDRESS: Final = "233.252.1.32"
"""The multicast address of libcluster when nothing else is configured."""

EXESDB_ADDRESS: Final = "239.255.0.1"
"""The multicast address of ExESDBGater 0.8."""

DEFAULT_TTL: Final = 1
"""Packets stay on the local network."""

MAX_INTERVAL_S: Final = 5.0
"""The longest time between two heartbeats, as in libcluster."""

MIN_INTERVAL_S: Final = 0.001
"""The shortest one, as in libcluster (`:rand.uniform(5_000)` milliseconds)."""

MAX_PACKET_BYTES: Final = 1_500
"""A node name has at most 255 characters, so a heartbeat with everything around it stays far below; what is longer than
an Ethernet frame is no heartbeat."""

MAX_ATOMS: Final = 16
"""Different atoms in one packet: two are used."""

MAX_PACKETS_PER_S: Final = 500
"""Packets looked at, as a rate and as the largest burst. A hundred nodes send forty a second; further ones are dropped
unread, as the network drops packets too."""

MAX_NEW_NAMES: Final = 32
"""Names never heard before that are passed on at once, after which `NEW_NAMES_PER_S` limits them: a whole cluster is
found at the first hearing, and a flood of made-up names opens no more than this many connections."""

NEW_NAMES_PER_S: Final = 0.5

MAX_NAMES: Final = 256
"""Names remembered as heard before, as many as the connector wants; the one heard the longest ago gives way."""

REPORT_EVERY_S: Final = 60.0
"""Ignored packets are reported at once, and from then on this often for each reason while there are more."""

MAX_REPORTED_SENDERS: Final = 8
"""Addresses named in one report; a faked sender costs nothing, a log line does."""

PACKETS_PER_TURN: Final = 64
"""Packets read before the event loop has its turn again."""

FLOOD_PAUSE_S: Final = 0.1
"""Nothing is read for so long when packets came too fast: then the kernel drops them, which costs us nothing."""

_PRELUDE: Final = b"heartbeat::"
_NODE: Final = Atom("node")
_BLOCK_BYTES: Final = 16
_NAME: Final = re.compile(r"[0-9A-Za-z_-]+@[0-9A-Za-z_.:-]+")
"""A name as `net_kernel` lets a node take it, whose host can be one: letters, digits, and what IP addresses have."""

Reason: TypeAlias = Literal["undecryptable", "unencrypted", "encrypted", "malformed", "flood", "names"]
"""Why a packet was ignored: it does not decrypt to a heartbeat; it is a plain one though there is a secret; it is none
though there is no secret, but could be encrypted; it is nothing of the kind; too many packets; too many new names."""

HINTS: Final[Mapping[Reason, str]] = {
    "undecryptable": "the sender probably uses another secret (EX_ESDB_CLUSTER_SECRET)",
    "unencrypted": "the sender uses no secret, this node does (EX_ESDB_CLUSTER_SECRET)",
    "encrypted": "the sender probably uses a secret, this node does not (EX_ESDB_CLUSTER_SECRET)",
    "malformed": "something else than libcluster's gossip is sent to this port",
    "flood": "more packets than any cluster sends",
    "names": "more new node names than any cluster has",
}

log = structlog.get_logger(__name__)


class NotHeartbeat(Exception):
    """A packet that names no node; `reason` says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class GossipCodec:
    """Heartbeats to packets and back, under one secret or none (None or empty).

    The secret's bytes are its UTF-8, or what stood in the environment where that is not UTF-8.
    """

    def __init__(self, secret: str | None) -> None:
        self._key = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest() if secret else None

    @property
    def encrypts(self) -> bool:
        """Whether there is a secret."""
        return self._key is not None

    def encode(self, node: str, *, iv: bytes | None = None) -> bytes:
        """The packet that names `node`. `iv` (16 bytes) is random unless given."""
        message = _PRELUDE + etf.encode({_NODE: Atom(node)})
        if self._key is None:
            return message
        iv = os.urandom(_BLOCK_BYTES) if iv is None else iv
        padder = PKCS7(8 * _BLOCK_BYTES).padder()
        encryptor = Cipher(AES(self._key), CBC(iv)).encryptor()
        return iv + encryptor.update(padder.update(message) + padder.finalize()) + encryptor.finalize()

    def decode(self, packet: bytes) -> str:
        """The node that `packet` names. Raises `NotHeartbeat`, whatever the bytes."""
        if len(packet) > MAX_PACKET_BYTES:
            raise NotHeartbeat("malformed", f"MAX_PACKET_BYTES allows {MAX_PACKET_BYTES}, got {len(packet)}")
        encrypted = len(packet) >= 2 * _BLOCK_BYTES and len(packet) % _BLOCK_BYTES == 0
        if self._key is None:
            if not packet.startswith(_PRELUDE):
                raise NotHeartbeat("encrypted" if encrypted else "malformed", "the packet is no plain heartbeat")
            return _node_of(packet)
        if encrypted:
            message = _decrypt(self._key, packet)
            if message is not None and message.startswith(_PRELUDE):
                return _node_of(message)
        if packet.startswith(_PRELUDE):
            raise NotHeartbeat("unencrypted", "the packet is a heartbeat without encryption")
        raise NotHeartbeat("undecryptable" if encrypted else "malformed", "the packet does not decrypt to a heartbeat")


def _decrypt(key: bytes, packet: bytes) -> bytes | None:
    """The message in a packet of whole blocks; None if the padding is wrong, as it mostly is under a wrong key."""
    decryptor = Cipher(AES(key), CBC(packet[:_BLOCK_BYTES])).decryptor()
    padded = decryptor.update(packet[_BLOCK_BYTES:]) + decryptor.finalize()
    unpadder = PKCS7(8 * _BLOCK_BYTES).unpadder()
    try:
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError:
        return None


def _node_of(message: bytes) -> str:
    """The node in `heartbeat::` and a map with the key `node`."""
    try:
        term = etf.decode(
            message[len(_PRELUDE) :], atoms=etf.AtomTable(max_atoms=MAX_ATOMS), max_bytes=MAX_PACKET_BYTES
        )
    except (DecodeError, LimitExceeded) as error:
        raise NotHeartbeat("malformed", str(error)) from None
    node = term.get(_NODE) if isinstance(term, Mapping) else None
    if type(node) is not Atom:
        raise NotHeartbeat("malformed", "the heartbeat is no map with an atom as its node")
    if node_name_fault(node.name) is not None or not _NAME.fullmatch(node.name):
        raise NotHeartbeat("malformed", f"{node.name[:80]!r} is not a node name")
    return node.name


class _Bucket:
    """A rate with a burst: `take` is true at most `burst` times at once and `per_s` times a second."""

    __slots__ = ("_at", "_burst", "_left", "_per_s")

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass(frozen=True, slots=True)
class IgnoredReport:
    """What is to be logged about packets ignored for one reason since the last report."""

    reason: Reason
    packets: int
    senders: tuple[str, ...]
    """Addresses, at most `MAX_REPORTED_SENDERS`."""
    detail: str
    """What was wrong with the latest of them."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What became of one packet: the name to pass on, what to log; both may be None."""

    node: str | None = None
    report: IgnoredReport | None = None
    flooded: bool = False
    """Packets come too fast: read no more for `FLOOD_PAUSE_S`."""


class Intake:
    """Decides which names are passed on, and what is said about packets that name none.

    Packets go in with the sender's address and the time (seconds, any steady clock). Nothing it keeps grows with what
    is sent.
    """

    def __init__(self, codec: GossipCodec, own_name: str) -> None:
        self._codec = codec
        self._own_name = own_name
        self._packets = _Bucket(MAX_PACKETS_PER_S, MAX_PACKETS_PER_S)
        self._new_names = _Bucket(MAX_NEW_NAMES, NEW_NAMES_PER_S)
        self._names: dict[str, float] = {}
        self._report_at: dict[Reason, float] = {}
        self._unreported: Counter[Reason] = Counter()
        self._details: dict[Reason, str] = {}
        self._senders: dict[Reason, dict[str, None]] = {reason: {} for reason in get_args(Reason)}
        self.heartbeats = 0
        """Packets that named a node, ourselves included."""
        self.ignored: Counter[Reason] = Counter()
        """Packets that did not, by why."""

    def receive(self, packet: bytes, sender: str, now: float) -> Heard:
        """One packet came from the address `sender`."""
        if not self._packets.take(now):
            return self._ignore("flood", sender, f"MAX_PACKETS_PER_S allows {MAX_PACKETS_PER_S}", now)
        try:
            node = self._codec.decode(packet)
        except NotHeartbeat as problem:
            return self._ignore(problem.reason, sender, str(problem), now)
        self.heartbeats += 1
        if node == self._own_name:
            return Heard()
        if self._names.pop(node, None) is None:
            if not self._new_names.take(now):
                return self._ignore("names", sender, f"NEW_NAMES_PER_S allows {NEW_NAMES_PER_S:g}", now)
            if len(self._names) >= MAX_NAMES:
                del self._names[next(iter(self._names))]
        self._names[node] = now
        return Heard(node)

    def names(self) -> dict[str, float]:
        """The names heard, with the time each was heard last; the latest is the last."""
        return dict(self._names)

    def _ignore(self, reason: Reason, sender: str, detail: str, now: float) -> Heard:
        self.ignored[reason] += 1
        self._unreported[reason] += 1
        self._details[reason] = detail
        senders = self._senders[reason]
        if len(senders) < MAX_REPORTED_SENDERS:
            senders[sender] = None
        report = None if now < self._report_at.get(reason, now) else self._report(reason, now)
        return Heard(report=report, flooded=reason == "flood")

    def reports(self, now: float) -> list[IgnoredReport]:
        """What is to be said by now about packets that came after a report."""
        return [self._report(reason, now) for reason in list(self._unreported) if now >= self._report_at[reason]]

    def _report(self, reason: Reason, now: float) -> IgnoredReport:
        self._report_at[reason] = now + REPORT_EVERY_S
        senders = self._senders[reason]
        report = IgnoredReport(reason, self._unreported.pop(reason), tuple(senders), self._details[reason])
        senders.clear()
        return report


@dataclass(frozen=True, slots=True)
class GossipOptions:
    """Where and how to gossip. Addresses are IPv4. Raises `ValueError` for what is none."""

    port: int = DEFAULT_PORT
    bind: str = "0.0.0.0"
    """`if_addr`: the address to bind. On Linux a socket bound to another address than 0.0.0.0 hears no multicast."""
    address: str = EXESDB_ADDRESS
    """`multicast_addr`: where packets are sent; one outside 224.0.0.0/4 is a broadcast address."""
    broadcast_only: bool = False
    """Do not join `address`, even if it is a multicast address."""
    multicast_if: str | None = None
    """Address of the interface to send multicast from and to join on; None: the system's choice."""
    ttl: int = DEFAULT_TTL
    """Hops a multicast packet may take: 0 stays on this machine, 1 on the local network."""
    secret: str | None = None
    """Encrypts the packets; None or empty: they are plain."""

    def __post_init__(self) -> None:
        for address in (self.bind, self.address, self.multicast_if or self.bind):
            ipaddress.IPv4Address(address)
        if not 0 < self.port < 65_536 or not 0 <= self.ttl < 256:
            raise ValueError(f"a port is 1 to 65535 and a TTL 0 to 255, not {self.port} and {self.ttl}")

    @property
    def multicast(self) -> bool:
        """Whether packets are multicast; otherwise they are broadcast."""
        return not self.broadcast_only and ipaddress.IPv4Address(self.address).is_multicast


@dataclass(frozen=True, slots=True)
class GossipStatus:
    """How the gossip is doing, for status pages."""

    open: bool
    error: str | None
    """Why the network cannot be used now; it is tried again at the next heartbeat."""
    sent: int
    heartbeats: int
    ignored: Mapping[Reason, int]
    names: Mapping[str, float]
    """Seconds since each name was heard last."""


class Gossip:
    """The gossip strategy: says this node's name and passes the names it hears to the connector."""

    def __init__(self, own_name: str, options: GossipOptions | None = None, *, random: Random | None = None) -> None:
        self._options = options or GossipOptions()
        self._codec = GossipCodec(self._options.secret)
        self._own_name = own_name
        self._random = random or Random()
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._connector: Wants | None = None
        self._error: str | None = None
        self._sent = 0
        self._log = log.bind(node=own_name)
        self.intake = Intake(self._codec, own_name)

    async def start(self, connector: Wants) -> None:
        """Open the socket and begin. A network that is not there is logged and tried again at each heartbeat."""
        self._connector = connector
        if self._options.multicast and self._options.bind not in ("0.0.0.0", self._options.address):
            self._log.warning(
                "gossip_bound_to_one_address",
                bind=self._options.bind,
                hint="such a socket may hear no multicast: unset EX_ESDB_CLUSTER_INTERFACE, and name the interface in "
                "EX_ESDB_GOSSIP_MULTICAST_IF",
            )
        self._heartbeat()

    async def stop(self) -> None:
        """Say nothing and hear nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._close()
        self._connector = None

    def status(self) -> GossipStatus:
        """How it is doing."""
        now = asyncio.get_running_loop().time()
        return GossipStatus(
            self._socket is not None,
            self._error,
            self._sent,
            self.intake.heartbeats,
            dict(self.intake.ignored),
            {name: now - at for name, at in self.intake.names().items()},
        )

    def _heartbeat(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = self._random.uniform(MIN_INTERVAL_S, MAX_INTERVAL_S)
        self._timer = loop.call_later(interval_s, self._heartbeat)
        for report in self.intake.reports(loop.time()):
            self._say(report)
        try:
            if self._socket is None:
                self._socket = open_socket(self._options)
                self._listen()
            elif self._options.multicast:
                join(self._socket, self._options)
        except OSError as error:
            self._close()
            self._failed(error)
            return
        try:
            self._socket.sendto(self._codec.encode(self._own_name), (self._options.address, self._options.port))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._failed(error)
            return
        self._sent += 1
        if self._error is not None:
            self._log.info("gossip_works_again", address=self._options.address, port=self._options.port)
            self._error = None

    def _failed(self, error: OSError) -> None:
        """The network cannot be used, or not for sending. Logged once for each reason."""
        reason = error.strerror or str(error)
        if reason != self._error:
            self._log.warning("gossip_failed", address=self._options.address, port=self._options.port, reason=reason)
        self._error = reason

    def _listen(self) -> None:
        self._pause = None
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(PACKETS_PER_TURN):
            if self._socket is None:
                return
            try:
                packet, sender = self._socket.recvfrom(MAX_PACKET_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._close()
                self._failed(error)
                return
            heard = self.intake.receive(packet, sender[0], loop.time())
            self._act(heard)
            if heard.flooded and self._socket is not None:
                loop.remove_reader(self._socket.fileno())
                self._pause = loop.call_later(FLOOD_PAUSE_S, self._listen)
                return

    def _act(self, heard: Heard) -> None:
        if heard.report is not None:
            self._say(heard.report)
        if heard.node is not None and self._connector is not None:
            self._connector.want(heard.node, "gossip", forever=False)

    def _say(self, report: IgnoredReport) -> None:
        self._log.warning(
            "gossip_packets_ignored",
            why=report.reason,
            packets=report.packets,
            senders=list(report.senders),
            detail=report.detail,
            hint=HINTS[report.reason],
        )


def open_socket(options: GossipOptions) -> socket.socket:
    """A non-blocking UDP socket with libcluster's options, several of which may share the port. Raises `OSError`."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        opened.bind((options.bind, options.port))
        if options.multicast:
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, options.ttl)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            join(opened, options)
    except BaseException:
        opened.close()
        raise
    return opened


def join(opened: socket.socket, options: GossipOptions) -> None:
    """Join the multicast group, if it is not joined already, and send from the same interface. Raises `OSError`.

    Called at each heartbeat: an interface that went away and came back has forgotten who had joined on it, and a socket
    that sends from an interface means the one that there was, not the one that has its address now.
    """
    interface = socket.inet_aton(options.multicast_if or "0.0.0.0")
    if options.multicast_if is not None:
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
    try:
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(options.address) + interface)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
