"""The inputs that are kept: `corpus/TARGET.hex` has one input per line, in hexadecimal; `#` begins a comment.

They are what is left of long runs after inputs that reach nothing new were dropped, and every input that ever broke
something. `tests/test_fuzz_corpus.py` runs all of them. `seeds` makes the first ones, from the captures of real nodes
in tests/captures and from the grammar.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, get_args

from fuzz import mutate
from fuzz.targets import CHALLENGE, COOKIE, LOCAL, PEER, TARGETS, block
from gater.cluster.gossip import GossipCodec
from gater.erl import etf
from gater.erl.dist_header import HeaderWriter
from gater.erl.epmd_protocol import (
    Alive2Request,
    EpmdServer,
    NamesRequest,
    NodeEntry,
    PortPlease2Request,
    Reply,
    Request,
)
from gater.erl.handshake import AcceptStatus, Handshake, LocalIdentity, PeerNamed, Role, Send, StatusReceived
from gater.erl.terms import Atom, Pid

ROOT: Final = Path(__file__).resolve().parent
CAPTURES: Final = ROOT.parent / "tests" / "captures"

MAX_KEPT_BYTES: Final = 4096
"""The longest input that is kept; longer ones say nothing that a shorter one could not."""

MAX_CAPTURED: Final = 400
"""Terms taken from the captures."""


def kept(target: str) -> list[bytes]:
    """The kept inputs of a target."""
    path = ROOT / "corpus" / f"{target}.hex"
    if not path.exists():
        return []
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [bytes.fromhex(line) for line in lines if line]


def keep(target: str, inputs: Iterable[bytes], comment: str) -> int:
    """Add inputs to the kept ones, with a comment above them; how many were new."""
    known = set(kept(target))
    new = sorted(
        {data for data in inputs if data not in known and len(data) <= MAX_KEPT_BYTES}, key=lambda d: (len(d), d)
    )
    if new:
        path = ROOT / "corpus" / f"{target}.hex"
        with path.open("a") as file:
            file.write(f"# {comment}\n")
            file.writelines(f"{data.hex()}\n" for data in new)
    return len(new)


def unpack(target: str, directory: Path) -> None:
    """Write the kept inputs and the seeds of a target into a directory, one file each, as libFuzzer wants them."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in (*kept(target), *seeds(target)):
        (directory / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def seeds(target: str) -> list[bytes]:
    """Valid inputs to begin with."""
    random = Random(f"seeds of {target}")
    terms = captured_terms()
    make: Callable[[], list[bytes]] = {
        "etf_alone": lambda: [*terms, *(b"\x83" + mutate.term(random) for _ in range(100))],
        "etf_inside": lambda: [term[1:] for term in terms if term[1] != 80] + [mutate.term(random) for _ in range(100)],
        "control": lambda: [mutate.control(b"", random) for _ in range(100)] + [term[1:] for term in terms],
        "dist_header": lambda: [
            *_fragmented(terms, random),
            *(b"".join(block(mutate.header_frame(random)) for _ in range(4)) for _ in range(100)),
        ],
        "handshake": _handshakes,
        "epmd": lambda: [*_epmd(), *(b"".join(block(mutate.epmd_event(random)) for _ in range(8)) for _ in range(50))],
        "frames": lambda: [block(b"\0\0\0\3abc") + block(b"\0\0") + block(b"\0\0\0\0\0\0"), block(b"\0\1\0\1")],
        "gossip": _gossip,
    }[target]
    return [data for data in make() if len(data) <= MAX_KEPT_BYTES]


def _json(name: str) -> dict[str, Any]:
    data = (CAPTURES / name).read_bytes()
    return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)  # type: ignore[no-any-return]


@cache
def captured_terms() -> tuple[bytes, ...]:
    """Terms with their version byte: OTP's vectors and what trackers and PubSub servers said."""
    found = {bytes.fromhex(each["plain"]) for each in _json("etf.json.gz")["vectors"]}
    found |= {bytes.fromhex(each["compressed"]) for each in _json("etf.json.gz")["vectors"] if each["compressed"]}
    for name in ("swarm_tracker_a.json", "swarm_tracker_b.json", "phoenix_pubsub_a.json", "phoenix_pubsub_b.json"):
        found |= {bytes.fromhex(each["etf"]) for each in _json(name)["messages"]}
    short = sorted(data for data in found if 1 < len(data) <= 1024)
    return tuple(Random("captures").sample(short, min(MAX_CAPTURED, len(short))))


_ANSWERS: Final[tuple[tuple[int, AcceptStatus], ...]] = ((0, "ok"), (1, "ok_simultaneous"), (4, "alive"))
"""The statuses that let a handshake go on, with their place among those that the target chooses from."""


def _said_by_peer(role: Role, status: AcceptStatus) -> list[bytes]:
    """What the peer of a right handshake says, packet by packet; we have `role`, the acceptor answers `status`."""
    peer = LocalIdentity(PEER, LOCAL.flags, 3)
    if role == "acceptor":
        ours = Handshake("acceptor", LOCAL, challenge=CHALLENGE)
        theirs = Handshake("initiator", peer, challenge=9, cookie=COOKIE, peer_name=LOCAL.name)
    else:
        ours = Handshake("initiator", LOCAL, challenge=CHALLENGE, cookie=COOKIE, peer_name=PEER)
        theirs = Handshake("acceptor", peer, challenge=9)
    said = []
    todo = [(machine, effect) for machine in (ours, theirs) for effect in machine.start()]
    while todo:
        machine, effect = todo.pop(0)
        other = ours if machine is theirs else theirs
        match effect:
            case Send(data):
                if machine is theirs:
                    said.append(data)
                todo += [(other, each) for each in other.receive(data)]
            case PeerNamed():
                todo += [(machine, each) for each in machine.accept(status, COOKIE)]
            case StatusReceived("alive"):
                todo += [(machine, each) for each in machine.confirm_alive(True)]
    return said


@cache
def handshake_packets() -> tuple[bytes, ...]:
    """Every packet of a right handshake, without its length."""
    found: dict[bytes, None] = {}
    for role in get_args(Role):
        for _, status in _ANSWERS:
            found.update((packet[2:], None) for packet in _said_by_peer(role, status))
    found.update(dict.fromkeys((b"snok", b"snot_allowed", b"snamed:\x00\x01a\x00\x00\x00\x01", b"n\x00\x05abc")))
    return tuple(found)


def _handshakes() -> list[bytes]:
    """Right handshakes, as we hear them in both roles, cut in several ways."""
    made = []
    for number, status in _ANSWERS:
        for role in get_args(Role):
            choice = 1 | number << 1 if role == "acceptor" else 2
            stream = b"".join(_said_by_peer(role, status))
            made += [bytes((choice, step)) + stream + b"\0\0\0\0" for step in (0, 1, 7)]
    made.append(bytes((1 | 4 << 1, 0)) + _said_by_peer("acceptor", "ok")[0] + block(b"sfalse"))
    made.append(bytes((1 | 4 << 1, 0)) + _said_by_peer("acceptor", "ok")[0] + bytes(3000))
    return made


def _fragmented(terms: Iterable[bytes], random: Random) -> list[bytes]:
    """Messages of one writer, whole and in fragments that are interleaved."""
    messages = [etf.decode(data) for data in terms if len(data) < 300 and data[1] != 80]
    made = []
    for _ in range(40):
        writer = HeaderWriter(random.choice((0, 10)))
        rows: list[list[bytes]] = []
        for sequence in range(random.randrange(1, 5)):
            message = writer.message((2, Atom(""), Pid(Atom("a@b"), 1, 0, 1)), random.choice(messages))
            frames = message.fragments(sequence, random.choice((10, 40, 400))) if sequence else [message.frame()]
            rows.append([b"".join(pieces) for pieces in frames])
        # The first frames have the headers and keep their order.
        stream = [row.pop(0) for row in rows]
        while rows := [row for row in rows if row]:
            stream.append(random.choice(rows).pop(0))
        made.append(b"".join(map(block, stream)))
    return made


def _gossip() -> list[bytes]:
    """Packets, and rows of packets."""
    packets = [bytes.fromhex(each["packet"]) for each in _json("gossip.json")["packets"]]
    names = [GossipCodec(None).encode(f"node{number}@127.0.0.1") for number in range(40)]
    return [*packets, b"".join(map(block, packets)), b"".join(map(block, names)), b"".join(map(block, names[:3] * 2))]


def _epmd() -> list[bytes]:
    """Requests and the answers to them."""
    node = NodeEntry("node", 12345)
    requests: tuple[Request, ...] = (Alive2Request(node), PortPlease2Request("node"), NamesRequest())
    server = EpmdServer(4369, 10)
    made = [request.encode()[2:] for request in requests]
    for connection, request in enumerate(requests):
        server.connected(connection, is_local=True)
        effects = server.receive(connection, request.encode())
        made += [effect.data for effect in effects if type(effect) is Reply]
    return made


assert set(TARGETS) == set(mutate.MUTATORS)
