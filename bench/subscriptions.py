"""Subscriptions: how long from an append to the event at a subscriber, and how many events come through.

Appenders and subscribers are processes of one BEAM node; gateway and store node are processes of the system of their
own, all on one machine. An event carries the time at which its append was called; the subscriber compares.
The store node is the stand-in of `erlang_interop_tests`, its emitters are absent.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.callers import load_bench_module
from bench.echo import DEFAULT_SPINNING, start_node
from bench.machine import cpu_s
from bench.report import Table, microseconds
from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.gater_process import GaterProcess, gater_process
from erlang_interop_tests.standin import StandInCluster, standin_cluster
from gater.erl.terms import Atom, Term

STORE: Final = Atom("reg_gh")
API: Final = Atom("Elixir.ExESDBGater.API")
STREAMS: Final = 100
"""Streams that paced appends go to: appends of one stream wait for each other."""

SETTLE_S: Final = 10.0
"""How long events may be on their way after the last append."""

GRACE_MS: Final = 10_000
MANY_STREAMS: Final = 10_000
DIRECT_APPENDS: Final = 5
"""Few enough for what counting may cost at once: more of them in a row are found at the rate it may cost for long."""

DIRECT_S: Final = 60.0
MANY_SUBSCRIBERS: Final = 1_000

AIMED_ECHOES: Final = 5
AIMED_P99_MS: Final = 50
AIMED_DIRECT_MS: Final = 500
AIMED_RATE: Final = 5_000
AIMED_EACH: Final = 10


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What subscribers saw: latencies in nanoseconds, in order, and the time from the first event to the last."""

    latencies_ns: list[int]
    elapsed_ns: int

    def quantile_ns(self, fraction: float) -> int:
        """The latency that this fraction of the events stayed below."""
        return self.latencies_ns[min(len(self.latencies_ns) - 1, int(len(self.latencies_ns) * fraction))]

    @property
    def rate(self) -> float:
        """Events a second."""
        return len(self.latencies_ns) / self.elapsed_ns * 1e9 if self.elapsed_ns else 0.0


class Bench:
    """One gateway and the BEAM node whose processes append and subscribe."""

    def __init__(self, label: str, client: BeamNode, gater: GaterProcess) -> None:
        self.label = label
        self._client = client
        self._gater = gater
        self._names = itertools.count(1)
        self._target = (API, gater.atom)
        self._kept: list[str] = []
        self.failed = 0
        """Appends that were not answered `ok`, since it was set to 0."""

    async def subscribe(
        self, selector: str | None = "$all", *, count: int = 1, acks: bool = True, kept: bool = True, **options: Term
    ) -> list[Term]:
        """`count` subscribers of subscriptions of their own; no selector: each to the stream of its name."""
        name = f"bench{next(self._names)}"
        chosen = {"start_from": Atom("now"), "auto_ack": not acks} | options
        pids: list[Term] = await self._client.eval(
            "gater_bench_subscribers:subscribers(Target, Store, Name, Plan, Options)",
            Target=self._target,
            Store=STORE,
            Name=name.encode(),
            Plan={
                Atom("acks"): acks,
                Atom("count"): count,
                Atom("kept"): kept,
                Atom("selector"): Atom("each") if selector is None else selector.encode(),
            },
            Options={Atom(key): value for key, value in chosen.items()},
            timeout_s=60,
        )
        if kept:
            self._kept += [f"{name}-{number + 1}" for number in range(count)]
        return pids

    async def counts(self, pids: Sequence[Term]) -> list[int]:
        """How many events each subscriber has."""
        found: list[int] = await self._client.eval("gater_bench_subscribers:counts(Pids)", Pids=list(pids))
        return found

    async def arrivals(self, pids: Sequence[Term], count: int, timeout_s: float = SETTLE_S) -> Arrivals:
        """What the subscribers saw, once they have so many events together (or do not get more)."""

        async def there() -> bool:
            return sum(await self.counts(pids)) >= count

        with contextlib.suppress(AssertionError, TimeoutError):
            await wait_until(there, timeout_s=timeout_s)
        encoded = await self._client.eval("gater_bench_subscribers:taken(Pids)", Pids=list(pids), timeout_s=60)
        numbers = array("Q", encoded)
        if sys.byteorder == "little":
            numbers.byteswap()
        times, latencies = numbers[::2], sorted(numbers[1::2])
        if len(latencies) < count:
            raise RuntimeError(f"{self.label}: {count} events were appended, {len(latencies)} delivered")
        return Arrivals(latencies, max(times) - min(times))

    async def one_by_one(self, pid: Term, seconds: float) -> list[int]:
        """One append after the other; how long each took to be answered, in nanoseconds."""
        encoded = await self._client.eval(
            'gater_bench_subscribers:one_by_one(Target, Store, <<"one">>, Pid, Millis)',
            Target=self._target,
            Store=STORE,
            Pid=pid,
            Millis=int(seconds * 1000),
            timeout_s=seconds + 60,
        )
        return _numbers(encoded)

    async def paced(self, rate: int, seconds: float, *, batch: int = 1, streams: Sequence[str] = ()) -> int:
        """`rate` appends a second of `batch` events each; how many events are stored for certain."""
        failed, answered = await self._client.eval(
            "gater_bench_subscribers:paced(Target, Store, Streams, Rate, Batch, Millis, Grace)",
            Target=self._target,
            Store=STORE,
            Streams=[name.encode() for name in streams or [f"paced-{number}" for number in range(STREAMS)]],
            Rate=rate,
            Batch=batch,
            Millis=int(seconds * 1000),
            Grace=GRACE_MS,
            timeout_s=seconds + 60,
        )
        self.failed += failed
        return len(_numbers(answered)) * batch

    async def remove(self, pids: Sequence[Term]) -> None:
        """End subscribers and subscriptions."""
        await self._client.eval(
            "[exit(Pid, kill) || Pid <- Pids],"
            '[gen_server:cast(Target, {remove_subscription, Store, by_stream, <<"$all">>, Name}) || Name <- Names],'
            "ok",
            Pids=list(pids),
            Names=[name.encode() for name in self._kept],
            Target=self._target,
            Store=STORE,
        )
        self._kept.clear()

    def cpu_s(self) -> float:
        """CPU time of the gateway so far."""
        return cpu_s(self._gater.process.pid) or 0.0


def _numbers(encoded: bytes) -> list[int]:
    numbers = array("Q", encoded)
    if sys.byteorder == "little":
        numbers.byteswap()
    return sorted(numbers)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


async def run(
    seconds: float,
    beam_echo_ns: float | None,
    compiled: Path | None,
    *,
    streams: int = MANY_STREAMS,
    subscribers: int = MANY_SUBSCRIBERS,
) -> Table:
    """The table; `beam_echo_ns` is the BEAM's own echo round trip of the same run, if it was measured, `compiled` the
    directory of a compiled gater, if there is one."""
    table = Table(
        "Subscriptions",
        ("what", "to", "p50", "p99", "most", "events/s", "gater CPU an event"),
        [
            "Times are from the call of the append to the event at its subscriber, a process of another node than the "
            "gateway's. *Idle*: one append after the other. Subscribers acknowledge every event unless it says "
            "*auto_ack*. Events/s is what came, where it says *offered* no more was appended.",
        ],
    )
    async with contextlib.AsyncExitStack() as stack:
        beams = Beams()
        stack.push_async_callback(beams.close)
        client = await start_node(beams)
        await load_bench_module(client, name="gater_bench_subscribers")
        cluster = await stack.enter_async_context(
            standin_cluster(beams, 1, stores=[STORE.name], arguments=DEFAULT_SPINNING)
        )
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gater-bench-")))
        shared: dict[str, Any] = {"cookie": beams.cookie, "epmd_port": await beams.epmd_port()}
        through = await stack.enter_async_context(gater_process(connect=cluster.names, **shared))
        bench = Bench("store node", client, through)
        await _known(client, through)
        await _latencies(bench, table, seconds, beam_echo_ns)
        await _one_subscriber(bench, table, seconds)
        await _many_subscribers(bench, table, seconds, subscribers)
        await through.stop()
        if compiled is not None:
            quick = await stack.enter_async_context(gater_process(connect=cluster.names, source=compiled, **shared))
            await _known(client, quick)
            bench = Bench("store node, gater compiled", client, quick)
            await _latencies(bench, table, seconds, beam_echo_ns)
            await _one_subscriber(bench, table, seconds)
            await _many_subscribers(bench, table, seconds, subscribers)
            await quick.stop()
        large = await stack.enter_async_context(gater_process(connect=cluster.names, **shared))
        await _known(client, large)
        await _many_streams(Bench("store node", client, large), client, cluster, table, seconds, streams)
        await large.stop()
        embedded = await stack.enter_async_context(gater_process(embedded=data, stores=[STORE.name], **shared))
        own = Bench("embedded store", client, embedded)
        await _latencies(own, table, seconds, beam_echo_ns)
        await _one_subscriber(own, table, seconds)
        await _many_subscribers(own, table, seconds, subscribers)
    return table


async def _known(client: BeamNode, gater: GaterProcess) -> None:
    async def known() -> bool:
        return bool(
            await client.eval(
                "erpc:call(Node, 'Elixir.ExESDBGater.API', gateway_worker_pids_for_store, [Store])",
                Node=gater.atom,
                Store=STORE,
            )
        )

    await wait_until(known)


def _add(table: Table, bench: Bench, what: str, seen: Arrivals, cpu: float) -> None:
    if bench.failed:
        table.notes.append(f"{what}, {bench.label}: {bench.failed} appends got no answer in time: it was too much.")
        bench.failed = 0
    table.add(
        what,
        bench.label,
        microseconds(seen.quantile_ns(0.5)),
        microseconds(seen.quantile_ns(0.99)),
        microseconds(seen.latencies_ns[-1]),
        f"{seen.rate:,.0f}",
        microseconds(cpu / len(seen.latencies_ns) * 1e9),
    )


async def _latencies(bench: Bench, table: Table, seconds: float, beam_echo_ns: float | None) -> None:
    pids = await bench.subscribe()
    await bench.one_by_one(pids[0], min(1.0, seconds))
    await bench.arrivals(pids, 1)
    _say(f"{bench.label}: idle")
    before = bench.cpu_s()
    answered = await bench.one_by_one(pids[0], seconds)
    idle = await bench.arrivals(pids, len(answered))
    _add(table, bench, "1 event, idle", idle, bench.cpu_s() - before)
    for rate in (200, 1_000):
        _say(f"{bench.label}: {rate} events/s")
        await bench.paced(rate, min(1.0, seconds))
        await bench.arrivals(pids, 1)
        before = bench.cpu_s()
        count = await bench.paced(rate, seconds)
        _add(table, bench, f"{rate:,} events/s offered", await bench.arrivals(pids, count), bench.cpu_s() - before)
    p50, append = idle.quantile_ns(0.5), answered[len(answered) // 2]
    note = f"{bench.label}, idle: the append itself was answered after {microseconds(append)} at p50"
    if beam_echo_ns is not None:
        note += (
            f"; append and delivery together are {p50 / beam_echo_ns:.1f} echo round trips between BEAM nodes of the "
            f"same run, what comes after the append {max(0.0, p50 - append) / beam_echo_ns:.1f} "
            f"(aim: below {AIMED_ECHOES})"
        )
    table.notes.append(note + ".")
    await bench.remove(pids)


async def _one_subscriber(bench: Bench, table: Table, seconds: float) -> None:
    """Many events to one subscriber."""
    for acks in (True, False):
        pids = await bench.subscribe(acks=acks)
        _say(f"{bench.label}: many events to one subscriber, acks {acks}")
        before = bench.cpu_s()
        count = await bench.paced(AIMED_RATE // 50, seconds, batch=50)
        what = f"1 subscriber, {AIMED_RATE:,}/s offered{'' if acks else ', auto_ack'}"
        _add(table, bench, what, await bench.arrivals(pids, count), bench.cpu_s() - before)
        await bench.remove(pids)
    for acks in (True, False):
        _say(f"{bench.label}: replay, acks {acks}")
        before = bench.cpu_s()
        pids = await bench.subscribe("$all", acks=acks, start_from=0)
        seen = await bench.arrivals(pids, count, timeout_s=60)
        table.add(
            f"1 subscriber, replay{'' if acks else ', auto_ack'}",
            bench.label,
            "-",
            "-",
            "-",
            f"{seen.rate:,.0f}",
            microseconds((bench.cpu_s() - before) / len(seen.latencies_ns) * 1e9),
        )
        await bench.remove(pids)


async def _many_subscribers(bench: Bench, table: Table, seconds: float, subscribers: int) -> None:
    """Few events, each to many subscribers."""
    for acks, kept in ((True, False), (False, False), (True, True)):
        kind = "persistent" if kept else "transient"
        _say(f"{bench.label}: {subscribers} {kind} subscribers of all, acks {acks}")
        pids = await bench.subscribe(count=subscribers, acks=acks, kept=kept)
        before = bench.cpu_s()
        count = await bench.paced(AIMED_EACH, seconds)
        what = f"{subscribers:,} {kind} subscribers of all, {AIMED_EACH}/s each{'' if acks else ', auto_ack'}"
        seen = await bench.arrivals(pids, count * subscribers)
        _add(table, bench, what, seen, bench.cpu_s() - before)
        await bench.remove(pids)


async def _all_there(bench: Bench, pids: Sequence[Term], count: int) -> bool:
    return sum(await bench.counts(pids)) >= count


async def _many_streams(
    bench: Bench, client: BeamNode, cluster: StandInCluster, table: Table, seconds: float, streams: int
) -> None:
    """A store with many streams: appends through the gateway, then by a worker of the store node, of which no gateway
    hears."""
    worker = next(iter((await cluster.workers()).values()))
    _say(f"{bench.label}: filling {streams} streams")
    await client.eval(
        'gater_bench_subscribers:fill(Target, <<"filled">>, Count)', Target=worker, Count=streams, timeout_s=300
    )
    pids = await bench.subscribe()
    _say(f"{bench.label}: 1,000 events/s beside {streams} streams")
    await bench.paced(1_000, min(1.0, seconds))
    await bench.arrivals(pids, 1)
    before = bench.cpu_s()
    count = await bench.paced(1_000, seconds)
    seen = await bench.arrivals(pids, count)
    _add(table, bench, f"1,000 events/s offered, {streams:,} streams", seen, bench.cpu_s() - before)
    _say(f"{bench.label}: appends on the store node")
    before = bench.cpu_s()
    for number in range(DIRECT_APPENDS):
        await client.eval(
            "gater_bench_subscribers:append_here(Worker, Store, Stream)",
            Worker=worker,
            Store=STORE,
            Stream=f"filled-{number + 1}".encode(),
        )
        await wait_until(lambda number=number: _all_there(bench, pids, number + 1), timeout_s=DIRECT_S)
    seen = await bench.arrivals(pids, DIRECT_APPENDS)
    _add(table, bench, f"on the store node, {streams:,} streams", seen, bench.cpu_s() - before)
    await bench.remove(pids)
