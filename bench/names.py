"""Look-ups in the Swarm registry at growing numbers of names.

    python -m bench.names COUNT SECONDS

measures one size in a process of its own and prints its `Result` as JSON. Most names are like those of an ExESDB's
stream workers; four of them are the gateway workers of one store.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from bench.machine import ROOT, rss_kb
from bench.report import NONE, Table
from gater.erl.terms import Atom, Pid, Term
from gater.swarm.registry import NO_META, Entry, Registry

COUNTS: Final = (10, 1_000, 100_000, 1_000_000)
WORKERS: Final = 4
BATCH: Final = 100
"""Random names that are looked up in one go: made just before, as if they came from the wire, and used once only, so
that where they lie in the registry is in none of the processor's caches."""

MIN_WEIGHED: Final = 100_000
"""Fewer names are lost in the noise of the process's memory."""

NODE: Final = Atom("node0@127.0.0.1")
STORE: Final = Atom("reg_gh")
WORKER: Final = Atom("gateway_worker")
READER: Final = Atom("streams_reader_worker")
CLOCK: Final = (0, 1)


@dataclass(frozen=True, slots=True)
class Result:
    """Nanoseconds for one look-up: of a gateway worker, of any name, of all workers of a store; bytes for each name."""

    worker_ns: float
    any_name_ns: float
    workers_ns: float
    bytes_per_name: float | None


def name(number: int) -> Term:
    """One of the names; the gateway workers are the first four."""
    return (WORKER, STORE, NODE, number) if number < WORKERS else (READER, STORE, b"stream-%08d" % number)


def full_registry(count: int) -> Registry:
    """A registry of `count` names, each with a process of its own."""
    registry = Registry()
    for number in range(count):
        registry.put(Entry(name(number), Pid(NODE, number, 0, 1), NO_META, CLOCK))
    return registry


def _per_call_ns(look_up: Callable[[Term], object], wanted: Callable[[], Sequence[Term]], seconds: float) -> float:
    """The median, over batches of `wanted()`, of the time for one look-up; the loop around it included."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        batch = wanted()
        start = time.perf_counter_ns()
        for each in batch:
            look_up(each)
        taken.append((time.perf_counter_ns() - start) / len(batch))
    return statistics.median(taken)


def measure_here(count: int, seconds: float) -> Result:
    """Measure one size in this process."""
    gc.collect()
    before = rss_kb()
    registry = full_registry(count)
    gc.collect()
    after = rss_kb()
    weighed = before is not None and after is not None and count >= MIN_WEIGHED
    chooser = random.Random(count)

    def any_names() -> list[Term]:
        return [name(chooser.randrange(count)) for _ in range(BATCH)]

    workers = [name(number) for number in range(WORKERS)] * (BATCH // WORKERS)
    assert len(registry.starting_with(WORKER, STORE)) == WORKERS
    return Result(
        _per_call_ns(registry.get, lambda: workers, seconds),
        _per_call_ns(registry.get, any_names, seconds),
        _per_call_ns(lambda store: registry.starting_with(WORKER, store), lambda: [STORE] * BATCH, seconds),
        (after - before) * 1024 / count if weighed else None,  # type: ignore[operator]
    )


async def run(seconds: float, counts: Sequence[int] = COUNTS) -> Table:
    """The table, one row a size."""
    table = Table(
        "Swarm registry",
        ("names", "a worker by name", "any name", "workers of a store", "memory a name"),
        [
            "Within a process, without any call: what a gateway does to find a worker. Names looked up are equal to "
            "those in the registry, not the same objects. *Any name* takes random names from all of the registry, each "
            "made just before, so that a large registry is cold; *a worker by name* and *workers "
            "of a store* ask for the same few each time, as a gateway does. *Memory a name*: growth of the process "
            "with name, pid, entry and every index."
        ],
    )
    for count in counts:
        print(f"  {count:,} names", file=sys.stderr, flush=True)
        result = await _in_process(count, seconds)
        weight = NONE if result.bytes_per_name is None else f"{result.bytes_per_name:.0f} B"
        look_ups = (result.worker_ns, result.any_name_ns, result.workers_ns)
        table.add(f"{count:,}", *(f"{ns / 1e3:.2f} µs" for ns in look_ups), weight)
    return table


async def _in_process(count: int, seconds: float) -> Result:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.names", str(count), str(seconds)), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"measuring {count} names failed (exit code {process.returncode})")
    return Result(**json.loads(output))


def main() -> None:
    count, seconds = sys.argv[1:]
    print(json.dumps(asdict(measure_here(int(count), float(seconds)))))


if __name__ == "__main__":
    main()
