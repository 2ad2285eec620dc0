"""Mutations that keep an input well-formed enough to get past the first check.

Random bytes rarely are a term twice in a row. Here terms are made from the grammar of the external term format, with
counts and lengths at their edges, and spliced into places where a term stands; streams that are a row of packets are
cut at the packets. Everything is drawn from the `Random` given, so an input can be made again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random
from typing import Final, TypeAlias

from fuzz.targets import block, blocks
from gater.erl import etf
from gater.erl.errors import ProtocolError

Mutator: TypeAlias = Callable[[bytes, Random], bytes]

_COUNTS: Final = (0, 1, 2, 3, 255, 256, 65_535, 65_536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_ATOMS: Final = (b"ok", b"error", b"true", b"false", b"nil", b"a@127.0.0.1", b"$gen_call", b"$gen_cast", b"alias")
_HASH_STEP: Final = 2**61 - 1


def term(random: Random, depth: int = 4) -> bytes:
    """The bytes of a term, mostly a valid one."""
    kinds = _LEAVES if depth <= 0 else _ALL
    return random.choice(kinds)(random, depth - 1)


def _u32(random: Random, likely: int) -> bytes:
    count = likely if random.random() < 0.97 else random.choice(_COUNTS)
    return count.to_bytes(4, "big")


def _atom(random: Random, depth: int) -> bytes:
    kind = random.randrange(6)
    name = random.choice(_ATOMS) if random.random() < 0.8 else random.randbytes(random.randrange(4))
    if kind == 0:
        return b"R%c" % random.choice((0, 1, 2, 3, 4, 4, 5, 255))
    if kind == 1:
        return b"d" + len(name).to_bytes(2, "big") + name
    if kind == 2:
        return b"s%c" % len(name) + name
    if kind == 3:
        name = "ü".encode() * random.choice((1, 127, 128, 255, 256))
        return b"v" + len(name).to_bytes(2, "big") + name
    return b"w%c" % len(name) + name


def _integer(random: Random, depth: int) -> bytes:
    kind = random.randrange(5)
    if kind == 0:
        return b"b" + random.choice((b"\x80\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\1\0"))
    if kind == 1:
        size = random.choice((0, 1, 4, 8, 9, 255))
        return b"n%c%c" % (size, random.choice((0, 1, 2))) + random.randbytes(size)
    if kind == 2:
        size = random.choice((0, 1, 256, 2000))
        return b"o" + _u32(random, size) + bytes((random.randrange(2),)) + random.randbytes(size)
    if kind == 3:
        return etf.encode_term(random.randrange(-5, 50) * _HASH_STEP)
    return b"a%c" % random.randrange(256)


def _float(random: Random, depth: int) -> bytes:
    if random.random() < 0.2:
        return b"c" + random.choice((b"1.5", b"-0.0", b"1e5", b"1.0e999", b"nan")).ljust(31, b"\0")
    return b"F" + random.choice(
        (b"\x3f\xf0" + bytes(6), bytes(8), b"\x80" + bytes(7), b"\x7f\xf0" + bytes(6), b"\xff" * 8)
    )


def _binary(random: Random, depth: int) -> bytes:
    size = random.choice((0, 1, 5, 64, 300))
    if random.random() < 0.3:
        return b"M" + _u32(random, size) + bytes((random.choice((0, 1, 7, 8, 9)),)) + random.randbytes(size)
    return b"m" + _u32(random, size) + random.randbytes(size)


def _string(random: Random, depth: int) -> bytes:
    size = random.choice((0, 1, 5, 300))
    return b"k" + size.to_bytes(2, "big") + random.randbytes(size)


def _pid(random: Random, depth: int) -> bytes:
    if random.random() < 0.2:
        return b"g" + _atom(random, 0) + random.randbytes(9)
    return b"X" + _atom(random, 0) + bytes(11) + bytes((random.randrange(4),))


def _reference(random: Random, depth: int) -> bytes:
    kind = random.randrange(3)
    if kind == 0:
        return b"e" + _atom(random, 0) + random.randbytes(5)
    words = random.choice((1, 2, 3, 3, 5, 6, 0))
    tag, creation = (b"r", 1) if kind == 1 else (b"Z", 4)
    return tag + words.to_bytes(2, "big") + _atom(random, 0) + random.randbytes(creation + 4 * words)


def _port(random: Random, depth: int) -> bytes:
    tag, size = random.choice(((b"f", 5), (b"Y", 8), (b"x", 12)))
    return tag + _atom(random, 0) + random.randbytes(size)


def _export(random: Random, depth: int) -> bytes:
    return b"q" + _atom(random, 0) + _atom(random, 0) + random.choice((b"a\2", b"a\2", _integer(random, 0)))


def _fun(random: Random, depth: int) -> bytes:
    free = b"".join(term(random, depth) for _ in range(random.randrange(3)))
    count = random.randrange(3)
    if random.random() < 0.2:
        creator = _pid(random, 0) if random.random() < 0.8 else term(random, depth)
        return b"u" + _u32(random, count) + creator + _atom(random, 0) + b"a\1" + b"b\0\0\1\0" + free
    small = b"a\1" if random.random() < 0.9 else term(random, 0)
    body = b"\1" + random.randbytes(16) + bytes(4) + _u32(random, count) + _atom(random, 0) + small + b"b\0\0\1\0"
    body += _pid(random, 0) + free
    return b"p" + _u32(random, len(body) + 4) + body


def _tuple(random: Random, depth: int) -> bytes:
    elements = [term(random, depth) for _ in range(random.randrange(5))]
    if random.random() < 0.2:
        return b"i" + _u32(random, len(elements)) + b"".join(elements)
    return b"h%c" % len(elements) + b"".join(elements)


def _list(random: Random, depth: int) -> bytes:
    elements = [term(random, depth) for _ in range(random.randrange(5))]
    tail = b"j" if random.random() < 0.7 else term(random, depth)
    return b"l" + _u32(random, len(elements)) + b"".join(elements) + tail


def _map(random: Random, depth: int) -> bytes:
    pairs = [term(random, depth) + term(random, depth) for _ in range(random.randrange(4))]
    return b"t" + _u32(random, len(pairs)) + b"".join(pairs)


def _nested(random: Random, depth: int) -> bytes:
    """Much of one thing in itself."""
    levels = random.choice((2, 50, 101, 200, 600))
    opening, closing = random.choice(
        (
            (b"h\1", b""),
            (b"h\2j", b""),
            (b"l\0\0\0\1", b"j"),
            (b"l\0\0\0\0", b""),
            (b"t\0\0\0\1", b"j"),
            (b"t\0\0\0\1j", b""),
            (b"t\0\0\0\1h\1", b"j"),
            (b"u\0\0\0\0", b"w\1ma\1a\1"),
        )
    )
    return opening * levels + term(random, 0) + closing * levels


def _many(random: Random, depth: int) -> bytes:
    """One thing many times."""
    count = random.choice((10, 100, 300, 600))
    kind = random.randrange(4)
    if kind == 0:
        return b"l" + count.to_bytes(4, "big") + term(random, 0) * count + b"j"
    if kind == 1:
        keys = (etf.encode_term(number * random.choice((1, _HASH_STEP))) for number in range(count))
        return b"t" + count.to_bytes(4, "big") + b"".join(key + b"j" for key in keys)
    if kind == 2:
        return b"t" + count.to_bytes(4, "big") + b"".join(etf.encode_term(float(n)) + b"j" for n in range(count))
    return b"l" + count.to_bytes(4, "big") + b"".join(b"w\2%02x" % (n & 255) for n in range(count)) + b"j"


_LEAVES: Final = (_atom, _atom, _integer, _float, _binary, _string, _pid, _reference, _port, _export, lambda r, d: b"j")
_ALL: Final = (*_LEAVES, _tuple, _tuple, _list, _list, _map, _map, _fun, _nested, _many)


def mutate_term(data: bytes, random: Random) -> bytes:
    """`data` with a term in it replaced, copied, wrapped or dropped."""
    if not data:
        return term(random)
    for _ in range(8):
        start = random.randrange(len(data))
        try:
            end = etf.skip_term(data, start, [True] * 6)
        except ProtocolError:
            continue
        break
    else:
        start = end = random.randrange(len(data) + 1)
    found = data[start:end]
    match random.randrange(7):
        case 0 | 1:
            new = term(random)
        case 2:
            new = found + found
        case 3:
            new = random.choice((b"h\1", b"h\2j", b"t\0\0\0\1j", b"t\0\0\0\1" + found, b"l\0\0\0\1j")) + found
        case 4:
            new = b"l\0\0\0\1" + found + b"j"
        case 5:
            new = b""
        case _:
            new = found[:1] + random.randbytes(4) + found[5:]
    return data[:start] + new + data[end:]


def alone(data: bytes, random: Random) -> bytes:
    """A term with its version byte, at times compressed."""
    bare = data[1:]
    if data[1:2] == b"P":
        try:
            bare = zlib.decompressobj().decompress(data[6:], 1 << 16)
        except zlib.error:
            bare = b""
    bare = mutate_term(bare, random)
    if random.random() < 0.1:
        size = len(bare) if random.random() < 0.8 else random.choice(_COUNTS)
        return b"\x83P" + size.to_bytes(4, "big") + zlib.compress(bare)
    return b"\x83" + bare


_CONTROL: Final = (
    b"h\3a\1%p%p", b"h\3a\2w\0%p", b"h\4a\3%p%p%t", b"h\3a\4%p%p", b"h\1a\5", b"h\4a\6%pw\0%a", b"h\3a\7%p%p",
    b"h\4a\x08%p%p%t", b"h\4a\x13%p%p%r", b"h\4a\x14%p%p%r", b"h\5a\x15%p%p%r%t", b"h\3a\x16%p%p", b"h\3a\x18%p%p",
    b"h\3a\x1a%p%p", b"h\4a\x1c%p%p%r", b"h\6a\x1d%r%p%ph\3%a%aa\2%l", b"h\5a\x1f%r%pa\1%p", b"h\3a\x21%p%r",
    b"h\4a\x23a\1%p%p", b"h\4a\x24a\1%p%p", b"h\4a\x25a\1%p%r", b"h\5a\x25a\2%p%a%t", b"h\4%a%ph\2a\0%t%t",
    b"h\3%a%p%t",
)  # fmt: skip


def control(data: bytes, random: Random) -> bytes:
    """A control message, made anew or with a term in it changed."""
    if data and random.random() < 0.7:
        return mutate_term(data, random)
    made = b""
    rest = random.choice(_CONTROL)
    kinds = {112: _pid, 114: _reference, 97: _atom, 116: lambda r, d: term(r), 108: _list}
    while b"%" in rest:
        head, _, rest = rest.partition(b"%")
        made += head + kinds[rest[0]](random, 1)
        rest = rest[1:]
    return made + rest


def header_frame(random: Random) -> bytes:
    """A frame with a distribution header."""
    count = random.choice((0, 1, 2, 3, 3, 255))
    long_atoms = random.randrange(2)
    entries, halves = b"", []
    for _ in range(count):
        is_new = random.random() < 0.6
        halves.append(random.randrange(2) | (8 if is_new else 0))
        entries += bytes((random.randrange(4),))
        if is_new:
            name = random.choice(_ATOMS)
            entries += len(name).to_bytes(1 + long_atoms, "big") + name
    halves.append(long_atoms)
    if len(halves) & 1:
        halves.append(0)
    flags = bytes(low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True)) if count else b""
    listed = bytes((count,)) + flags + entries
    kind = random.randrange(4)
    sequence = random.randrange(3).to_bytes(8, "big")
    fragment = random.choice((0, 1, 2, 3, 2**64 - 1)).to_bytes(8, "big")
    if kind <= 1:
        return b"\x83D" + listed + control(b"", random) + (term(random) if kind else b"")
    if kind == 2:
        return b"\x83E" + sequence + fragment + listed + term(random)
    return b"\x83F" + sequence + fragment + term(random)


def rows(change: Mutator, make: Callable[[Random], bytes], prefix: int = 0) -> Mutator:
    """A mutator of inputs that are blocks behind `prefix` bytes, `change` being that of one block."""

    def mutate(data: bytes, random: Random) -> bytes:
        head, parts = data[:prefix].ljust(prefix, b"\0"), list(blocks(data[prefix:]))
        if prefix and random.random() < 0.2:
            head = random.randbytes(prefix)
        match random.randrange(6):
            case 0 if parts:
                del parts[random.randrange(len(parts))]
            case 1 if parts:
                parts.insert(random.randrange(len(parts) + 1), random.choice(parts))
            case 2 if len(parts) > 1:
                random.shuffle(parts)
            case 3 | 4 if parts:
                at = random.randrange(len(parts))
                parts[at] = change(parts[at], random)
            case _:
                parts.insert(random.randrange(len(parts) + 1), make(random))
        return head + b"".join(block(part[:65_535]) for part in parts)

    return mutate


def some_bytes(data: bytes, random: Random) -> bytes:
    """`data` with a byte or a run of bytes changed, copied or dropped."""
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice((1, 1, 2, 4, 16, 300)))
    match random.randrange(4):
        case 0:
            return data[:start] + random.randbytes(end - start) + data[end:]
        case 1:
            return data[:end] + data[start:end] + data[end:]
        case 2:
            return data[:start] + data[end:]
        case _:
            return data[:start] + bytes((random.choice((0, 1, 127, 128, 255)),)) + data[start + 1 :]


_NAMES: Final = (b"a", b"node", b"x" * 255, b"y" * 256, "ü".encode() * 255, b"a b", b"")


def epmd_event(random: Random) -> bytes:
    """What one connection does to an EPMD: connection and act, then bytes."""
    name = random.choice(_NAMES)
    extra = random.choice((b"", b"", b"e" * 1024, b"e" * 1025))
    alive = (
        b"x" + random.randbytes(2) + b"M\0\0\6\0" + random.choice((b"\5", b"\6")) + len(name).to_bytes(2, "big") + name
    )
    request = random.choice((alive + len(extra).to_bytes(2, "big") + extra, b"z" + name, b"n", b"d", b"k", b"s" + name))
    head = bytes((random.randrange(8), random.choice((0, 0, 0, 1, 2, 6))))
    return head + random.choice((block(request), block(request), block(request)[:3], block(request) + b"\0"))


def packet(random: Random) -> bytes:
    """A packet of a handshake, its proofs right."""
    from fuzz.corpus import handshake_packets

    return random.choice(handshake_packets())


MUTATORS: Final[dict[str, Mutator]] = {
    "etf_alone": alone,
    "etf_inside": mutate_term,
    "control": control,
    "dist_header": rows(
        lambda data, random: mutate_term(data, random) if random.random() < 0.7 else some_bytes(data, random),
        header_frame,
    ),
    "handshake": rows(some_bytes, packet, prefix=2),
    "epmd": rows(some_bytes, epmd_event),
    "frames": rows(some_bytes, lambda random: random.choice((b"\0\0\0\3abc", b"\0\0\0\0", b"\0\0", b"\0\1\0\1", b"x"))),
    "gossip": lambda data, random: b"heartbeat::" + alone(data[11:], random),
}
