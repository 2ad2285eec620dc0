"""Decode and encode one reply of `get_events` with 1,000 events (about 840 kB), side by side with peers.

    python bench/codec.py [events]

`marshal` is the floor: CPython's own C codec building the same number of objects. `erlang` (erlang_py) and `erlpack`
are measured if they are installed.
"""

from __future__ import annotations

import importlib
import marshal
import sys
import time
from collections.abc import Callable
from typing import Any

from gater.erl.etf import AtomTable, decode, decode_spine, decode_term, encode, encode_into, skip_term, to_plain
from gater.erl.terms import Atom, Term


def reply(events: int) -> Term:
    """`{ok, [EventRecord, ..]}` in the shape that ExESDB answers (`tests/captures/exesdb_contract.json`)."""
    return (Atom("ok"), [event(number) for number in range(events)])


class OldAtoms(dict[Atom, bytes]):
    """Atoms as OTP 25 writes them, which all peers read."""

    def __missing__(self, atom: Atom) -> bytes:
        text = atom.name.encode()
        encoded = self[atom] = b"d%c%c%b" % (len(text) >> 8, len(text) & 255, text)
        return encoded


class CachedAtoms(dict[Atom, bytes]):
    """Atoms as they are in a message with a distribution header."""

    def __init__(self) -> None:
        self.listed: list[Term] = []

    def __missing__(self, atom: Atom) -> bytes:
        self[atom] = b"R%c" % len(self.listed)
        self.listed.append(atom)
        return self[atom]


def encoded(term: Term, atoms: dict[Atom, bytes]) -> bytes:
    pieces = [b"\x83"]
    encode_into(pieces, term, atoms)
    return b"".join(pieces)


def event(number: int) -> Term:
    a = Atom
    return {
        a("__struct__"): a("Elixir.ExESDB.Schema.EventRecord"),
        a("__unknown_fields__"): [],
        a("created"): {
            a("__struct__"): a("Elixir.DateTime"),
            a("calendar"): a("Elixir.Calendar.ISO"),
            a("day"): 23,
            a("hour"): 3,
            a("microsecond"): (499_207 + number, 6),
            a("minute"): 6,
            a("month"): 11,
            a("second"): 34,
            a("std_offset"): 0,
            a("time_zone"): b"Etc/UTC",
            a("utc_offset"): 0,
            a("year"): 2026,
            a("zone_abbr"): b"UTC",
        },
        a("created_epoch"): 1_795_403_194_499_207 + number,
        a("data"): {b"lines": [{b"sku": b"%06d" % number, b"text": b"x" * 140}], b"note": b"y" * 40, b"total": 12.5},
        a("data_content_type"): 1,
        a("event_id"): b"0198a000-0000-7000-8000-%012d" % number,
        a("event_number"): number,
        a("event_stream_id"): b"order-1",
        a("event_type"): b"placed:v1",
        a("metadata"): {b"correlation": b"c-%d" % number},
        a("metadata_content_type"): 1,
    }


def for_marshal(term: Term) -> Any:
    """The same tree with `str` for atoms, which `marshal` knows."""
    if isinstance(term, Atom):
        return sys.intern(term.name)
    if isinstance(term, dict):
        return {for_marshal(key): for_marshal(value) for key, value in term.items()}
    if isinstance(term, list | tuple):
        return type(term)(map(for_marshal, term))
    return term


def best_ms(work: Callable[[], object], rounds: int = 15) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def show(name: str, decoding: float | None, encoding: float | None) -> None:
    columns = ("-" if value is None else f"{value:.2f} ms" for value in (decoding, encoding))
    print(f"{name:34}" + "".join(f"{column:>14}" for column in columns))


def main() -> None:
    term = reply(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    data = encode(term)
    old = encoded(term, OldAtoms())
    cached_atoms = CachedAtoms()
    cached = encoded(term, cached_atoms)
    atoms = AtomTable()
    print(f"{len(data):,} bytes".ljust(34) + f"{'decode':>14}{'encode':>14}")
    show("gater", best_ms(lambda: decode(data, atoms=atoms)), best_ms(lambda: encode(term)))
    show("gater, with an atom cache", best_ms(lambda: decode_term(cached, 1, atoms, cached_atoms.listed)), None)
    show("gater decode_spine (1 level)", best_ms(lambda: decode_spine(data, 1, 1, atoms)), None)
    show("gater skip_term", best_ms(lambda: skip_term(data, 1)), None)
    show("gater to_plain", best_ms(lambda: to_plain(cached, 1, cached_atoms.listed)), None)
    plain = for_marshal(term)
    marshalled = marshal.dumps(plain)
    show("marshal", best_ms(lambda: marshal.loads(marshalled)), best_ms(lambda: marshal.dumps(plain)))
    for module, loads, dumps in (("erlang", "binary_to_term", "term_to_binary"), ("erlpack", "unpack", "pack")):
        try:
            peer = importlib.import_module(module)
        except ImportError:
            show(f"{module} (not installed)", None, None)
            continue
        peer_loads, peer_dumps = getattr(peer, loads), getattr(peer, dumps)
        theirs = peer_loads(old)
        show(module, best_ms(lambda: peer_loads(old), 3), best_ms(lambda: peer_dumps(theirs), 3))  # noqa: B023


if __name__ == "__main__":
    main()
