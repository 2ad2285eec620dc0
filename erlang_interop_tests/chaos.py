"""Nothing lost: writers append through two gateways while store nodes and gateways are killed, frozen and cut off.

    python -m erlang_interop_tests.chaos [--seconds 300] [--seed N] [--workers] [--report FILE]

Elixir processes on a node of their own (chaos_writers.exs) append to streams of a stand-in cluster of three, whose race
is on, and keep what they were answered. Afterwards everything is read back from every member and compared:

* an append answered `{:ok, v}` is in its stream, its last event at version v, each event exactly once;
* one answered as failed is absent, one answered as partly appended is there as far as was said;
* one without an answer (its gateway was killed) or of unknown outcome is there as a whole, in part, or not at all;
* versions have no gap, nothing is in a stream that nobody appended, and all members agree;
* no answer, of an append or of a read, came later than a caller with the usual 5 s would have waited, plus 200 ms.

With `--workers` the writers append by random workers of the store nodes, as ExESDB's own clients do. That must lose
events, or this test could not find a loss.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from erlang_interop_tests.beam import BeamNode, Beams, beams, free_port, wait_until
from erlang_interop_tests.gater_process import GaterProcess
from erlang_interop_tests.standin import StandInCluster
from gater.erl import etf
from gater.erl.terms import Atom, Term

STORE: Final = "reg_gh"
DEADLINE_MS: Final = 5_000
"""What `GenServer.call` waits unless told otherwise."""
GRACE_MS: Final = 200
MEMBERS: Final = 3
SETTLE_S: Final = 2.0
"""From the last fault to the verdict: what was frozen finishes what it had begun."""
MAX_BEHIND_TOLD: Final = 20
"""Reads behind what their reader knew that the report tells one by one."""

_SOURCE: Final = Path(__file__).resolve().parent / "chaos_writers.exs"
_READ_ALL: Final = """
:ok = ExESDB.StandIn.Raft.fence(:reg_gh, 10_000)
table = ExESDB.StandIn.Tree.table(:reg_gh)
for row <- ExESDB.StandIn.Tree.match(table, [:streams, {:if_node_exists, true}, {:if_node_exists, true}]),
    [:streams, stream, number] = ExESDB.StandIn.Tree.path(row),
    String.starts_with?(stream, prefix) do
  event = ExESDB.StandIn.Tree.data(row)
  {stream, String.to_integer(number), event.event_number, event.event_id}
end
"""

OK: Final = Atom("ok")
ERROR: Final = Atom("error")
EXIT: Final = Atom("exit")
READ: Final = Atom("read")
REFUSALS: Final = {
    *("wrong_expected_version", "call_timeout", "no_quorum", "overloaded", "draining", "no_worker_available"),
    *("store_not_found", "storage_failed"),
}
"""Answers that say: nothing of this append is stored, now or later."""


class Fault(NamedTuple):
    """What was done to whom, and when (seconds since the epoch)."""

    kind: str
    whom: str
    began: float
    ended: float


class Attempt(NamedTuple):
    """One append and its answer, as a writer recorded it."""

    stream: bytes
    expected: Term
    ids: list[bytes]
    answer: Any
    at_us: int
    elapsed_us: int
    who: Term

    @property
    def outcome(self) -> str:
        """`ok`, the kind of error, or `no answer`."""
        match self.answer:
            case (kind, _) if kind is OK:
                return "ok"
            case (kind, (Atom() as reason, *_)) if kind is ERROR:
                return reason.name
            case (kind, Atom() as reason) if kind is ERROR:
                return reason.name
            case (kind, _) if kind is EXIT:
                return "no answer"
        return repr(self.answer)[:60]


class Read(NamedTuple):
    """One `get_version` and its answer, as a writer recorded it."""

    stream: bytes
    known: int
    """The version of which this writer knew already ..."""
    told_by: Term
    """... by whose answer, ..."""
    told_at_us: int
    """... and since when."""
    answer: Any
    at_us: int
    elapsed_us: int
    who: Term

    @property
    def is_behind(self) -> bool:
        """Whether the answer is older than what its reader knew."""
        return bool(self.answer[0] is OK and self.answer[1] < self.known)


@dataclass
class Verdict:
    """What was found. `violations` by kind; a few of each in words."""

    seconds: float
    seed: int
    faults: list[Fault]
    outcomes: Counter[str]
    events: int
    streams: int
    latencies_ms: list[float]
    exits: Counter[str]
    attempts: list[Attempt]
    reads: list[Read] = field(default_factory=list)
    violations: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0

    @property
    def losses(self) -> int:
        """Appends that were answered `{:ok, _}` and are not where they should be."""
        return self.violations["lost"]

    def add(self, kind: str, example: str) -> None:
        self.violations[kind] += 1
        if self.violations[kind] <= 5:
            self.examples.append(f"{kind}: {example}")

    def percentile(self, share: float) -> float:
        return self.latencies_ms[min(len(self.latencies_ms) - 1, int(len(self.latencies_ms) * share))]

    def _line(self, kind: str) -> str:
        times = [(fault.began, fault.ended) for fault in self.faults if fault.kind == kind]
        during = [each for each in self.attempts if any(begin <= each.at_us / 1e6 < end for begin, end in times)]
        ok = sorted(each.elapsed_us / 1000 for each in during if each.outcome == "ok")
        unknown = sum(each.outcome == "unknown_outcome" for each in during)
        shares = [f"{ok[int(len(ok) * share)]:.1f}" if ok else "-" for share in (0.5, 0.99)]
        return f"| {kind} | {len(times)} | {len(ok)} | {shares[0]} | {shares[1]} | {unknown} |"

    def _lines_of_reads(self) -> Iterator[str]:
        answered = [each for each in self.reads if each.answer[0] is OK]
        took = sorted(each.elapsed_us / 1000 for each in answered)
        shares = f"p50 {took[len(took) // 2]:.1f} ms, max {took[-1]:.0f} ms" if took else "-"
        behind = [each for each in answered if each.is_behind]
        own = sum(each.told_by is each.who for each in behind)
        yield (
            f"Reads of a version: {len(self.reads)}, answered `{{:ok, _}}` {len(answered)} ({shares}), behind what "
            f"their reader knew {len(behind)}: {own} from the very gateway, {len(behind) - own} from another."
        )
        yield from (f"- {self._told_of(each)}" for each in behind[:MAX_BEHIND_TOLD])

    def _told_of(self, read: Read) -> str:
        until = read.at_us + read.elapsed_us
        lately = {
            f"{fault.kind} {fault.whom}"
            for fault in self.faults
            if fault.began * 1e6 < until and read.at_us < (fault.ended + SETTLE_S) * 1e6
        }
        since_ms = (read.at_us - read.told_at_us) / 1000
        return (
            f"{read.stream.decode()}: {read.who} answered {read.answer[1]} in {read.elapsed_us / 1000:.0f} ms; "
            f"{read.told_by} had said {read.known} {since_ms:.0f} ms before "
            f"(lately: {', '.join(sorted(lately)) or 'nothing'})"
        )

    def report(self) -> str:
        """As markdown."""
        lines = [
            f"# Chaos: {self.seconds:.0f} s, seed {self.seed}",
            "",
            f"{sum(self.outcomes.values())} appends, {self.events} events stored in {self.streams} streams.",
            "",
            "| answer | appends |",
            "|---|---|",
            *(f"| {kind} | {count} |" for kind, count in self.outcomes.most_common()),
            "",
            "| during | times | appends `ok` | p50 ms | p99 ms | unknown outcome |",
            "|---|---|---|---|---|---|",
            *(self._line(kind) for kind in sorted({fault.kind for fault in self.faults})),
            "",
        ]
        if self.latencies_ms:
            shares = ", ".join(f"p{100 * share:g} {self.percentile(share):.1f}" for share in (0.5, 0.9, 0.99, 0.999))
            lines.append(f"Appends answered `{{:ok, _}}`, milliseconds: {shares}, max {self.latencies_ms[-1]:.0f}.")
        lines.append(f"Slowest answer of any kind: {self.slowest_ms:.0f} ms.")
        lines.extend(self._lines_of_reads())
        if self.exits:
            lines.append("Calls without an answer: " + ", ".join(f"{kind} {n}" for kind, n in self.exits.items()) + ".")
        lines += ["", f"**Violations: {sum(self.violations.values())}** {dict(self.violations) or ''}".rstrip()]
        return "\n".join([*lines, *(f"- {example}" for example in self.examples), ""])


def judge(members: Sequence[list[Any]], verdict: Verdict) -> None:
    """Compare what writers were answered with what every member has stored."""
    streams: dict[bytes, dict[int, bytes]] = defaultdict(dict)
    places: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)
    for stream, place, number, event_id in members[0]:
        if place != number:
            verdict.add("misplaced", f"{stream!r} has event {number} at {place}")
        streams[stream][place] = event_id
        places[event_id].append((stream, place))
    for index, rows in enumerate(members[1:], 1):
        if sorted(rows) != sorted(members[0]):
            verdict.add("members differ", f"member {index} has {len(rows)} events, member 0 {len(members[0])}")
    for stream, events in streams.items():
        if sorted(events) != list(range(len(events))):
            verdict.add("gap", f"{stream!r}: {len(events)} events, the last one is {max(events)}")
    verdict.events = len(members[0])
    verdict.streams = len(streams)
    known: set[bytes] = set()
    for attempt in verdict.attempts:
        known.update(attempt.ids)
        verdict.outcomes[attempt.outcome] += 1
        _judge_time(attempt, verdict)
        _judge_attempt(attempt, [places.get(event_id, []) for event_id in attempt.ids], verdict)
    for read in verdict.reads:
        _judge_time_of_read(read, verdict)
    for event_id in places.keys() - known:
        verdict.add("from nobody", f"{event_id!r} at {places[event_id]}")
    verdict.latencies_ms.sort()


def _judge_time(attempt: Attempt, verdict: Verdict) -> None:
    elapsed_ms = attempt.elapsed_us / 1000
    if attempt.answer[0] is EXIT:
        reason = str(attempt.answer[1]) if type(attempt.answer[1]) is not bytes else attempt.answer[1].decode()
        verdict.exits[reason] += 1
        if reason == "timeout":
            verdict.add("late", f"no answer in {elapsed_ms:.0f} ms from {attempt.who}")
        return
    verdict.slowest_ms = max(verdict.slowest_ms, elapsed_ms)
    if elapsed_ms > DEADLINE_MS + GRACE_MS:
        verdict.add("late", f"{attempt.outcome} after {elapsed_ms:.0f} ms from {attempt.who}")
    if attempt.outcome == "ok":
        verdict.latencies_ms.append(elapsed_ms)


def _judge_time_of_read(read: Read, verdict: Verdict) -> None:
    elapsed_ms = read.elapsed_us / 1000
    if elapsed_ms > DEADLINE_MS + GRACE_MS:
        verdict.add("late read", f"{str(read.answer)[:80]} after {elapsed_ms:.0f} ms from {read.who}")
    elif read.answer[0] is not EXIT:
        verdict.slowest_ms = max(verdict.slowest_ms, elapsed_ms)


def _judge_attempt(attempt: Attempt, found: list[list[tuple[bytes, int]]], verdict: Verdict) -> None:
    if any(len(places) > 1 for places in found):
        verdict.add("twice", f"{attempt} is at {found}")
        return
    stored = [places[0] if places else None for places in found]

    def run(first: int, length: int) -> list[tuple[bytes, int]]:
        return [(attempt.stream, number) for number in range(first, first + length)]

    match attempt.answer:
        case (kind, int(last)) if kind is OK:
            expected = run(last - len(stored) + 1, len(stored))
            if stored != expected:
                verdict.add("lost", f"{attempt} is at {stored}")
            elif type(attempt.expected) is int and expected[0][1] != attempt.expected + 1:
                verdict.add("wrong version", f"{attempt}")
        case (kind, (Atom(name="partially_appended"), last, counts)) if kind is ERROR:
            some = counts[Atom("stored")]
            if stored != [*run(last - some + 1, some), *[None] * (len(stored) - some)]:
                verdict.add("wrongly partial", f"{attempt} is at {stored}")
        case (kind, _) if kind is ERROR and attempt.outcome in REFUSALS:
            if any(stored):
                verdict.add("failed but stored", f"{attempt} is at {stored}")
        case (kind, _) if kind is EXIT or attempt.outcome in ("unknown_outcome", "worker_died"):
            some = len([place for place in stored if place is not None])
            first = stored[0][1] if stored and stored[0] is not None else 0
            if stored != [*run(first, some), *[None] * (len(stored) - some)]:
                verdict.add("torn", f"{attempt} is at {stored}")
        case _:
            verdict.add("strange answer", f"{attempt}")


class House:
    """A stand-in cluster, gateways connected to it, and an Elixir node for callers."""

    def __init__(self, beam: Beams, cluster: StandInCluster, gaters: list[GaterProcess], callers: BeamNode) -> None:
        self.beam = beam
        self.cluster = cluster
        self.gaters = gaters
        self.callers = callers

    async def call(self, gater: int, *request: Term, timeout_s: float = 20.0) -> Any:
        """The reply of a gateway's GenServer."""
        return await self.callers.eval(
            "GenServer.call({ExESDBGater.API, node}, request, 15_000)",
            node=self.gaters[gater].atom,
            request=(Atom(str(request[0])), *request[1:]),
            timeout_s=timeout_s,
        )

    async def ready(self, nodes: int | None = None) -> None:
        """Wait until every gateway that runs appends on so many store nodes (all members), and knows the others."""
        wanted = len(self.cluster.members) if nodes is None else nodes
        running = [gater for gater in self.gaters if gater.process.returncode is None]
        everybody = {gater.atom for gater in running}
        for gater in running:

            async def knows(gater: GaterProcess = gater) -> bool:
                workers, connected = await self.callers.eval(
                    """
                    {:erpc.call(node, ExESDBGater.API, :gateway_worker_pids, []),
                     :erpc.call(node, :erlang, :nodes, [:connected])}
                    """,
                    node=gater.atom,
                )
                stores = {pid.node for pid in workers} - everybody
                return len(stores) >= wanted and everybody <= {gater.atom, *connected}

            await wait_until(knows, 45, what=f"{gater.name} knowing {wanted} store nodes and the other gateways")


@asynccontextmanager
async def house(beam: Beams, members: int = MEMBERS, gaters: int = 2, *, khepri: bool = True) -> AsyncIterator[House]:
    """A running `House` for a `with` block."""
    cluster = StandInCluster(beam, members, stores=[STORE], khepri=khepri)
    port = await beam.epmd_port()
    callers = await beam.start("elixir", hidden=True)
    processes = [
        GaterProcess(
            cookie=beam.cookie,
            epmd_port=port,
            connect=cluster.names,
            arguments=("--no-gossip", "--log-format", "json"),
            env={"EXESDB_GATER_PORT": str(free_port())},
        )
        for _ in range(gaters)
    ]
    try:
        await cluster.start()
        await asyncio.gather(*(each.start() for each in processes))
        started = House(beam, cluster, processes, callers)
        await started.ready()
        yield started
    finally:
        await asyncio.gather(*(each.close() for each in processes))
        await cluster.close()


class Trouble:
    """One fault after the other, each undone again, until it is told to stop."""

    def __init__(self, house: House, chooser: random.Random, *, longest_s: float) -> None:
        self.house = house
        self.chooser = chooser
        self.longest_s = longest_s
        self.faults: list[Fault] = []
        self._bag: list[str] = []

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if not self._bag:
                # Every kind comes before any comes again.
                self._bag = ["kill", "freeze", "cut"]
                if self.house.gaters:
                    self._bag += ["cut from a gateway", "cut from all", "kill a gateway"]
                self.chooser.shuffle(self._bag)
            kind = self._bag.pop()
            began = time.time()
            whom = await self.cause(kind)
            self.faults.append(Fault(kind, whom, began, time.time()))
            await _sleep(self.chooser.uniform(0.1, 1.0), stop)

    async def cause(self, kind: str) -> str:
        """Cause a fault and undo it; who had it."""
        cluster, gaters = self.house.cluster, self.house.gaters
        member = self.chooser.randrange(len(cluster.members))
        others = [name for name in cluster.names if name != cluster.names[member]]
        gateways = [each.name for each in gaters]
        duration_s = self.chooser.uniform(0.3, self.longest_s)
        match kind:
            case "kill":
                await cluster.kill(member)
                await asyncio.sleep(duration_s)
                await cluster.restart(member)
            case "freeze":
                cluster.members[member].freeze()
                await asyncio.sleep(duration_s)
                cluster.members[member].thaw()
            case "kill a gateway":
                gater = self.chooser.choice(gaters)
                await gater.kill()
                await asyncio.sleep(duration_s)
                await gater.start()
                return gater.name
            case _:
                cut = {
                    "cut": others,
                    "cut from a gateway": self.chooser.sample(gateways, min(1, len(gateways))),
                    "cut from all": [*others, *gateways],
                }[kind]
                await cluster.cut(member, cut)
                await asyncio.sleep(duration_s)
                await cluster.heal(member, cut)
        return cluster.names[member]


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


async def run_chaos(
    house: House,
    seconds: float,
    *,
    seed: int,
    directory: Path,
    by_workers: bool = False,
    writers: int = 64,
    streams: int = 200,
    pause_ms: int = 150,
    longest_fault_s: float = 4.0,
) -> Verdict:
    """Let writers write and trouble happen for so long, then judge."""
    await house.callers.eval("Code.require_file(path); :ok", path=str(_SOURCE).encode(), timeout_s=30)
    targets = (
        (Atom("workers"), [Atom(name) for name in house.cluster.names])
        if by_workers
        else (Atom("gateways"), [gater.atom for gater in house.gaters])
    )
    prefix = b"chaos-%d-" % seed
    options = {
        "writers": writers,
        "streams": streams,
        "prefix": prefix,
        "pause_ms": pause_ms,
        "targets": targets,
    }
    await house.callers.eval("Chaos.Writers.start(options)", options=[(Atom(k), v) for k, v in options.items()])
    trouble = Trouble(house, random.Random(seed), longest_s=longest_fault_s)
    stop = asyncio.Event()
    began = time.monotonic()
    troubling = asyncio.create_task(trouble.run(stop))
    done, _ = await asyncio.wait([troubling], timeout=seconds)
    stop.set()
    await troubling
    elapsed = time.monotonic() - began
    assert not done, "trouble ended by itself"
    await house.callers.eval("Chaos.Writers.stop()", timeout_s=60)
    await house.cluster.wait_ready(30)
    await asyncio.sleep(SETTLE_S)
    path = directory / "attempts"
    await house.callers.eval("Chaos.Writers.save(path)", path=str(path).encode(), timeout_s=60)
    rows = etf.decode(path.read_bytes())
    attempts = [Attempt(*row) for row in rows if row[0] is not READ]
    reads = [Read(*row[1:]) for row in rows if row[0] is READ]
    members = [list(await node.eval(_READ_ALL, prefix=prefix, timeout_s=60)) for node in house.cluster.members]
    verdict = Verdict(elapsed, seed, trouble.faults, Counter(), 0, 0, [], Counter(), attempts, reads)
    judge(members, verdict)
    return verdict


async def _main(options: argparse.Namespace) -> int:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="gater-chaos-") as directory:
        async with beams() as beam, house(beam, gaters=0 if options.workers else 2) as started:
            verdict = await run_chaos(
                started,
                options.seconds,
                seed=options.seed,
                directory=Path(directory),
                by_workers=options.workers,
                writers=options.writers,
                pause_ms=options.pause_ms,
            )
    report = verdict.report()
    print(report)
    if options.report is not None:
        options.report.write_text(report)
    return int(bool(verdict.violations) is not options.workers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m erlang_interop_tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--writers", type=int, default=64)
    parser.add_argument("--pause-ms", type=int, default=150, help="between two appends of a writer, on average")
    parser.add_argument("--workers", action="store_true", help="append by random workers: must lose events")
    parser.add_argument("--report", type=Path, help="write the report to this file too")
    return asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
