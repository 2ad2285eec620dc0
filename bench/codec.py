"""Decode and encode one reply of `get_events` with 1,000 events (about 840 kB), side by side with peers.

Each codec runs in a process of its own, so that the memory seen is its own:

    python -m bench.codec CODEC SECONDS < encoded term

prints its `Result` as JSON. `marshal` is the floor: CPython's own C codec building the same number of objects.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import marshal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.echo import start_node
from bench.machine import NOT_INSTALLED, ROOT, forget_peak, peak_rss_kb, rss_kb, version_of
from bench.report import NONE, Table, megabytes, milliseconds, times
from erlang_interop_tests.beam import Beams
from gater.erl import etf
from gater.erl.terms import Atom, Term

EVENTS: Final = 1000
MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 1000


@dataclass(frozen=True, slots=True)
class Codec:
    """One codec: how to get at it, and what it is called here."""

    label: str
    load: Callable[[], tuple[Callable[[bytes], Any], Callable[[Any], bytes] | None]]
    distribution: str | None = None
    """The package to install, for those that are not part of Python or of gater."""

    @property
    def installed(self) -> bool:
        """Whether it can be measured."""
        return self.distribution is None or version_of(self.distribution) != NOT_INSTALLED


@dataclass(frozen=True, slots=True)
class Result:
    """Medians in ms, and by how much the process grew (kB) while it decoded once and encoded what it got."""

    decode_ms: float | None = None
    encode_ms: float | None = None
    growth_kb: float | None = None


def _gater() -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    atoms = etf.AtomTable()
    return (lambda data: etf.decode(data, atoms=atoms)), etf.encode


def _spine() -> tuple[Callable[[bytes], Any], None]:
    atoms = etf.AtomTable()
    return (lambda data: etf.decode_spine(data, 1, 2, atoms)), None


def _erlang_py() -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    module: Any = importlib.import_module("erlang")
    return module.binary_to_term, module.term_to_binary


def _erlpack() -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    module: Any = importlib.import_module("erlpack")
    return module.unpack, module.pack


CODECS: Final[dict[str, Codec]] = {
    "gater": Codec("gater", _gater),
    "spine": Codec("gater, two levels only (relayed)", _spine),
    "erlang_py": Codec("erlang_py", _erlang_py, "erlang_py"),
    "erlpack": Codec("erlpack (C)", _erlpack, "erlpack"),
    "marshal": Codec("marshal (C, not a term format)", lambda: (marshal.loads, marshal.dumps)),
}


def reply(events: int) -> Term:
    """`{ok, [EventRecord, ..]}` in the shape that ExESDB answers (`tests/captures/exesdb_contract.json`)."""
    return (Atom("ok"), [event(number) for number in range(events)])


def event(number: int) -> Term:
    """One event of `reply`."""
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


async def run(seconds: float, rounds: int) -> Table:
    """The table; `seconds` is what each codec may take for each of decoding and encoding, in `rounds` turns."""
    term = reply(EVENTS)
    beam: list[Result] = []
    seen: dict[str, list[Result]] = {name: [] for name, codec in CODECS.items() if codec.installed}
    for turn in range(rounds):
        print(f"  codecs, round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
        result, encoded = await _on_beam(etf.encode(term), seconds / rounds)
        beam.append(result)
        inputs = {"marshal": marshal.dumps(for_marshal(term))}
        for name, results in seen.items():
            results.append(await _in_process(name, inputs.get(name, encoded), seconds / rounds))
    return _table(len(encoded), beam, seen)


def _table(size: int, beam: Sequence[Result], seen: Mapping[str, Sequence[Result]]) -> Table:
    columns = ("codec", "decode", "to gater's", "encode", "to gater's", "memory for both")
    table = Table(
        f"One reply of {EVENTS:,} events, {size:,} bytes",
        columns,
        [
            "Medians, each codec in a process of its own, garbage collection as it is by default. *Memory for both*: "
            "by how much the process's peak grew over what it had with the bytes in hand, when it decoded them once "
            "and encoded what it got (the BEAM has memory in reserve and may show less than it uses)."
        ],
    )
    ours = _middle(seen["gater"])
    for label, results in [("BEAM", beam), *((codec.label, seen.get(name, ())) for name, codec in CODECS.items())]:
        if not results:
            table.add(label, NOT_INSTALLED, *[NONE] * (len(columns) - 2))
            continue
        result = _middle(results)
        table.add(
            label,
            milliseconds(result.decode_ms),
            _ratio(result.decode_ms, ours.decode_ms),
            milliseconds(result.encode_ms),
            _ratio(result.encode_ms, ours.encode_ms),
            megabytes(result.growth_kb),
        )
    return table


def _middle(results: Sequence[Result]) -> Result:
    """Each figure's median over the rounds."""

    def median(name: str) -> Any:
        values = [value for result in results if (value := getattr(result, name)) is not None]
        return statistics.median(values) if values else None

    return Result(median("decode_ms"), median("encode_ms"), median("growth_kb"))


def _ratio(value: float | None, ours: float | None) -> str:
    return NONE if value is None or ours is None else times(value, ours)


async def _in_process(name: str, data: bytes, seconds: float) -> Result:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.codec", name, str(seconds)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    output, _ = await process.communicate(data)
    if process.returncode != 0:
        raise RuntimeError(f"the codec {name} failed (exit code {process.returncode})")
    return Result(**json.loads(output))


async def _on_beam(ours: bytes, seconds: float) -> tuple[Result, bytes]:
    """The BEAM's result, and the bytes that it makes of the term: what every codec is given to decode."""
    beams = Beams()
    try:
        node = await start_node(beams)
        encoded = await node.eval("term_to_binary(binary_to_term(Encoded))", Encoded=ours)
        await node.eval("gater_bench:keep(Encoded)", Encoded=encoded)
        before = rss_kb(node.pid)
        forget_peak(node.pid)
        await node.eval("gater_bench:hold()")
        await node.eval("gater_bench:hold_encoded()")
        peak = peak_rss_kb(node.pid)
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / 0.005)))
        decoding, encoding = await node.eval(
            "gater_bench:times(Decodings, Encodings)", Decodings=rounds, Encodings=rounds, timeout_s=seconds * 10 + 30
        )
    finally:
        await beams.close()
    growth = None if before is None or peak is None else peak - before
    return Result(_median_ms(decoding), _median_ms(encoding), growth), encoded


def _median_ms(nanoseconds: Iterable[int]) -> float:
    return statistics.median(nanoseconds) / 1e6


def _time(work: Callable[[], object], seconds: float) -> float:
    taken: list[int] = []
    end = time.perf_counter() + seconds
    while len(taken) < MIN_ROUNDS or (time.perf_counter() < end and len(taken) < MAX_ROUNDS):
        start = time.perf_counter_ns()
        work()
        taken.append(time.perf_counter_ns() - start)
    return _median_ms(taken)


def measure_here(name: str, data: bytes, seconds: float) -> Result:
    """Measure one codec in this process."""
    decode, encode = CODECS[name].load()
    before = rss_kb()
    forget_peak()
    term = decode(data)
    if encode is not None:
        encode(term)
    peak = peak_rss_kb()
    return Result(
        _time(lambda: decode(data), seconds),
        None if encode is None else _time(lambda: encode(term), seconds),
        None if before is None or peak is None else peak - before,
    )


def main() -> None:
    name, seconds = sys.argv[1:]
    print(json.dumps(asdict(measure_here(name, sys.stdin.buffer.read(), float(seconds)))))


if __name__ == "__main__":
    main()
