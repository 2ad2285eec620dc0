"""Time per byte of whatever reads large input, from 1 kB to 50 MB: `python -m fuzz.flat` prints the table of the docs.

Benign shapes and hostile ones (what would be quadratic if nobody had cared). A limit that is crossed is an answer, too:
then the time until it is given is what counts. CPU time of the thread, best of several runs, with the garbage
collector on as it is in a running node.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import zlib
from collections.abc import Callable
from typing import Final, TypeAlias

from gater.erl import etf
from gater.erl.connection import FrameReader
from gater.erl.dist_header import HeaderReader, HeaderWriter
from gater.erl.errors import LimitExceeded
from gater.erl.terms import Atom, EncodedTerm

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
DEEP: Final = 16_000
HASH_STEP: Final = 2**61 - 1
CACHE: Final = [Atom(f"atom{number}") for number in range(255)]

Reader: TypeAlias = Callable[[], object]

MAX_RATIO: Final = 8
"""How much dearer a byte of the largest input may be than one of the cheapest smaller one: caches and collections of
garbage make it two to four times as dear; quadratic time makes it thousands of times."""


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _repeated(head: bytes, piece: bytes, tail: bytes = b"") -> Callable[[int], bytes]:
    """As many times `piece` as fill the size, behind a container's tag."""

    def make(size: int) -> bytes:
        count = max(1, size // len(piece))
        return b"\x83" + head + _u32(count) + piece * count + tail

    return make


def _map_of(key: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        count = max(1, size // (len(key(size)) + 1))
        return b"\x83t" + _u32(count) + b"".join(key(number) + b"j" for number in range(count))

    return make


def _nested(opening: bytes, closing: bytes, containers: int = 1) -> Callable[[int], bytes]:
    """Terms as deep as allowed, side by side in a list."""

    def make(size: int) -> bytes:
        levels = min(DEEP // containers, max(1, size // (len(opening) + len(closing))))
        one = opening * levels + b"j" + closing * levels
        return _repeated(b"l", one, b"j")(size)

    return make


def _compressed(make: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def compress(size: int) -> bytes:
        bare = make(size)[1:]
        return b"\x83P" + _u32(len(bare)) + zlib.compress(bare, 1)

    return compress


def _event(number: int) -> bytes:
    event = {
        Atom("event_id"): b"%032x" % number,
        Atom("event_type"): b"user_registered",
        Atom("version"): number,
        Atom("data"): {b"name": b"x" * 60, b"age": 42, b"tags": [b"a", b"b"]},
        Atom("epoch"): 1_700_000_000_000_000 + number,
    }
    return etf.encode_term(event)


def _events(size: int) -> bytes:
    count = max(1, size // len(_event(1)))
    return b"\x83l" + _u32(count) + b"".join(map(_event, range(count))) + b"j"


def _atoms(size: int) -> bytes:
    count = max(1, size // 8)
    return b"\x83l" + _u32(count) + b"".join(b"w\6%06x" % (number % 200_000) for number in range(count)) + b"j"


TERMS: Final[dict[str, Callable[[int], bytes]]] = {
    "list of events": _events,
    "one binary": lambda size: b"\x83m" + _u32(size) + bytes(size),
    "one integer": lambda size: b"\x83o" + _u32(size) + b"\0" + b"\x7f" * size,
    "list of integers below 256": _repeated(b"l", b"a\7", b"j"),
    "list of larger integers": _repeated(b"l", b"b\0\1\2\3", b"j"),
    "list of small tuples": _repeated(b"l", b"h\2a\1a\2", b"j"),
    "list of 200,000 different atoms": _atoms,
    "map of binaries": _map_of(lambda number: b"m\0\0\0\x08%08x" % number),
    "map of integers": _map_of(lambda number: b"b" + _u32(number & 0x7FFFFFFF)),
    "map of integers of one hash": _map_of(lambda number: etf.encode_term(HASH_STEP * (number + 1))),
    "map of pids of one hash but for the creation": _map_of(lambda number: b"Xw\3a@b" + bytes(8) + _u32(number)),
    "map of floats": _map_of(lambda number: etf.encode_term(number + 0.5)),
    "map of lists": _map_of(lambda number: b"l\0\0\0\1b" + _u32(number & 0x7FFFFFFF) + b"j"),
    "tuples in tuples": _nested(b"h\1", b""),
    "lists in lists": _nested(b"l\0\0\0\1", b"j"),
    "lists as tails of lists": _nested(b"l\0\0\0\1j", b""),
    "maps in values of maps": _nested(b"t\0\0\0\1j", b""),
    "maps in keys of maps": _nested(b"t\0\0\0\1", b"j"),
    "tuples in keys of maps": _nested(b"t\0\0\0\1h\1", b"j", 2),
    "funs": _repeated(b"l", b"p" + _u32(54) + bytes(17) + bytes(4) + bytes(4) + b"w\1ma\1a\1Xw\3a@b" + bytes(12), b"j"),
}
"""Makers of terms of about a size."""


def _read(make: Callable[[int], bytes]) -> Callable[[int], tuple[int, Reader]]:
    def prepare(size: int) -> tuple[int, Reader]:
        data = make(size)
        return len(data), lambda: etf.decode(data)

    return prepare


def _read_compressed(make: Callable[[int], bytes]) -> Callable[[int], tuple[int, Reader]]:
    def prepare(size: int) -> tuple[int, Reader]:
        data = _compressed(make)(size)
        return size, lambda: etf.decode(data)

    return prepare


def _skip(size: int) -> tuple[int, Reader]:
    data = _events(size)
    return len(data), lambda: etf.skip_term(data, 1)


def _make_plain(size: int) -> tuple[int, Reader]:
    data = _repeated(b"l", b"R\7", b"j")(size)
    return len(data), lambda: etf.to_plain(data, 1, CACHE)


def _spine(size: int) -> tuple[int, Reader]:
    data = b"h\2j" + _events(size)[1:]
    return len(data), lambda: etf.decode_spine(data, 0, 2, etf.AtomTable())


def _pass_on(size: int) -> tuple[int, Reader]:
    term = EncodedTerm(_repeated(b"l", b"R\7", b"j")(size)[1:], atoms=tuple(CACHE))
    return len(term.data), lambda: HeaderWriter().message((1, term))


def _fragments(of: int) -> Callable[[int], tuple[int, Reader]]:
    """A message cut into fragments of `of` bytes."""

    def prepare(size: int) -> tuple[int, Reader]:
        count = max(2, size // (of + 18))
        ids = [(1).to_bytes(8, "big") + fragment.to_bytes(8, "big") for fragment in range(count, 0, -1)]
        frames = [b"\x83E" + ids[0] + b"\0" + bytes(of), *(b"\x83F" + each + bytes(of) for each in ids[1:])]

        def read() -> object:
            reader = HeaderReader(etf.AtomTable())
            for frame in frames:
                message = reader.receive(frame)
            return message

        return sum(map(len, frames)), read

    return prepare


def _interleaved(size: int) -> tuple[int, Reader]:
    """Fragments of 1,000 bytes of 1,000 messages in turn."""
    rounds = max(2, size // 1_000_000)
    senders = max(1, min(1_000, size // (1_000 * rounds)))
    frames = []
    for left in range(rounds, 0, -1):
        for sender in range(senders):
            ids = sender.to_bytes(8, "big") + left.to_bytes(8, "big")
            head = b"\x83E" + ids + b"\0" if left == rounds else b"\x83F" + ids
            frames.append(head + bytes(1_000))

    def read() -> object:
        reader = HeaderReader(etf.AtomTable())
        return [reader.receive(frame) for frame in frames]

    return sum(map(len, frames)), read


def _stream(of: int) -> Callable[[int], tuple[int, Reader]]:
    """One frame that arrives in pieces of `of` bytes."""

    def prepare(size: int) -> tuple[int, Reader]:
        size = min(size, of * 1_000_000)
        pieces = [_u32(size), *[bytes(of)] * (size // of), bytes(size % of)]

        def read() -> object:
            reader = FrameReader()
            return [reader.feed(piece) for piece in pieces if piece][-1]

        return size, read

    return prepare


CASES: Final[dict[str, Callable[[int], tuple[int, Reader]]]] = {
    **{name: _read(make) for name, make in TERMS.items()},
    "compressed list of events": _read_compressed(_events),
    "compressed list of empty lists": _read_compressed(_repeated(b"l", b"j", b"j")),
    "skip_term of a list of events": _skip,
    "to_plain of atom cache references": _make_plain,
    "decode_spine of a reply with events": _spine,
    "passing on of atom cache references": _pass_on,
    "message in fragments of 64 kB": _fragments(65_536),
    "message in fragments of 1 kB": _fragments(1_000),
    "message in fragments of 1 byte": _fragments(1),
    "fragments of 1,000 messages in turn": _interleaved,
    "frame that arrives in 64 kB": _stream(65_536),
    "frame that arrives byte by byte": _stream(1),
}
"""Each makes, for a size, how many bytes are read and what reads them."""


def nanoseconds_per_byte(case: str, size: int, *, seconds: float = 0.05) -> tuple[float, str]:
    """The best of as many runs as fit into `seconds` (one at least), and the limit that was crossed, if one was."""
    count, read = CASES[case](size)
    best, spent, crossed = float("inf"), 0.0, ""
    gc.collect()
    while spent < seconds:
        started = time.thread_time()
        try:
            result = read()
        except LimitExceeded as error:
            crossed, result = error.limit, None
        taken = time.thread_time() - started
        del result  # freeing it is no part of the reading
        best, spent = min(best, taken), spent + taken + 1e-4
    return best / count * 1e9, crossed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.flat", description="Time per byte, from 1 kB to 50 MB.")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest input (50,000,000)")
    sizes = [size for size in SIZES if size <= parser.parse_args().largest]
    print("| ns per byte at a size of | " + " | ".join(f"{size // 1000:,} kB" for size in sizes) + " | limit |")
    print("| --- |" + " ---: |" * len(sizes) + " --- |")
    steep = []
    for case in CASES:
        figures, limits = [], dict[str, None]()
        for size in sizes:
            figure, crossed = nanoseconds_per_byte(case, size)
            figures.append(figure)
            if crossed:
                limits[f"`{crossed}`"] = None
        if figures[-1] > MAX_RATIO * max(1.0, min(figures[1:])):
            steep.append(case)
        print(
            f"| {case} | " + " | ".join(f"{figure:.1f}" for figure in figures) + f" | {', '.join(limits)} |", flush=True
        )
    if steep:
        print(f"not flat: {', '.join(steep)}", file=sys.stderr)
    return 1 if steep else 0


if __name__ == "__main__":
    sys.exit(main())
