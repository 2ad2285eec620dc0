"""Nothing missed: subscriptions of all kinds while events are appended and gateways and store nodes are killed.

    python -m erlang_interop_tests.chaos_subscriptions [--seconds 150] [--events 50000] [--seed N] [--report FILE]

Twenty subscriptions, eighteen of Elixir processes on a node of their own (chaos_subscriptions.exs) and two of this
program, follow fifty streams. Half of the streams are appended to through three gateways, the other half on the store
nodes themselves; emitters are absent at first and present in the second half. Meanwhile gateways and store nodes are
killed, frozen and cut off, one at a time (`chaos.Trouble`). Afterwards the store says what there is:

* every subscription has got every event its selector is about, and no other;
* in order: what a subscriber gets of a stream is either the next event that is about it, or one that it has had before.

Subscribers subscribe once; that others run their subscription after the death of a gateway is none of their business.
Those of transient subscriptions, which end with their gateway, monitor it and subscribe again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from erlang_interop_tests.beam import BeamNode, beams
from erlang_interop_tests.chaos import STORE, Fault, House, Trouble, house
from gater import Gateway
from gater.api import schema
from gater.erl import NodeOptions, etf
from gater.erl.terms import Atom, Term

STREAMS: Final = 50
SECONDS: Final = 150.0
EVENTS: Final = 50_000
STALLED_S: Final = 45.0
"""After the last fault: so long without a single event means that nothing comes any more. Acknowledgements that were
lost take up to eight times their timeout."""

WRITERS: Final = 10
ACK_TIMEOUT_MS: Final = 3_000
"""Acknowledgements are lost with the gateway they are sent to; those events come again after this time."""

_SOURCE: Final = Path(__file__).resolve().parent / "chaos_subscriptions.exs"
_READ_ALL: Final = """
:ok = ExESDB.StandIn.Raft.fence(:reg_gh, 10_000)
table = ExESDB.StandIn.Tree.table(:reg_gh)
for row <- ExESDB.StandIn.Tree.match(table, [:streams, {:if_node_exists, true}, {:if_node_exists, true}]),
    event = ExESDB.StandIn.Tree.data(row),
    String.starts_with?(event.event_stream_id, prefix) do
  %{"kind" => kind, "to" => %{"city" => city}} = event.data
  {event.event_stream_id, event.event_number, event.event_type, kind, city}
end
"""
_COUNT: Final = """
table = ExESDB.StandIn.Tree.table(:reg_gh)
ExESDB.StandIn.Tree.count(table, [:streams, {:if_node_exists, true}, {:if_node_exists, true}])
"""


class Stored(NamedTuple):
    """What there is to be known of an event."""

    stream: bytes
    number: int
    type: bytes
    kind: int
    city: bytes


@dataclass(frozen=True)
class Wish:
    """One subscription: how it is asked for, and which events it is to get."""

    label: str
    type: str
    selector: Term
    wanted: Callable[[Stored], bool]
    options: Mapping[str, Term] = field(default_factory=dict)
    subscribers: int = 1
    pause_ms: int = 0
    retries: float = 0.0
    kept: bool = True
    in_python: bool = False

    @property
    def name(self) -> bytes:
        return self.label.encode() if self.kept else schema.TRANSIENT

    def terms(self) -> list[Term]:
        """For `Chaos.Subscribers.start`, one for each subscriber."""
        options = {"ack_timeout_ms": ACK_TIMEOUT_MS, **self.options}
        spec: Term = {
            Atom("label"): self.label.encode(),
            Atom("name"): self.name,
            Atom("type"): Atom(self.type),
            Atom("selector"): self.selector,
            Atom("options"): {Atom(key): value for key, value in options.items()},
            Atom("pause_ms"): self.pause_ms,
            Atom("retries"): self.retries,
        }
        return [spec] * self.subscribers


def wishes(streams: Sequence[bytes]) -> list[Wish]:
    """The twenty subscriptions. The first half of the streams is appended to through gateways."""

    def everything(_: Stored) -> bool:
        return True

    def stream(label: str, name: bytes, **more: Any) -> Wish:
        return Wish(label, "by_stream", b"$" + name, lambda event: event.stream == name, **more)

    def of_type(label: str, name: bytes, **more: Any) -> Wish:
        return Wish(label, "by_event_type", name, lambda event: event.type == name, **more)

    def pattern(label: str, kind: int, **more: Any) -> Wish:
        selector: Term = {schema.EVENT_TYPE: b"paid", schema.DATA: {b"kind": kind}}
        return Wish(
            label, "by_event_pattern", selector, lambda event: event.type == b"paid" and event.kind == kind, **more
        )

    def payload(label: str, city: bytes, **more: Any) -> Wish:
        return Wish(label, "by_event_payload", {b"to": {b"city": city}}, lambda event: event.city == city, **more)

    ours, theirs = streams[: len(streams) // 2], streams[len(streams) // 2 :]
    return [
        Wish("all", "by_stream", b"$all", everything),
        Wish("all again", "by_stream", b"$all", everything, {"batch_size": 20}),
        Wish("all, sent is enough", "by_stream", b"$all", everything, {"auto_ack": True}),
        Wish("all, shared", "by_stream", b"$all", everything, subscribers=3),
        Wish("all, shared by stream", "by_stream", b"$all", everything, {"strategy": Atom("by_stream")}, subscribers=3),
        Wish("all, in Python", "by_stream", b"$all", everything, in_python=True),
        stream("a stream", ours[0]),
        stream("a stream, slow", ours[1], options={"window": 5}, pause_ms=20, retries=0.05),
        stream("a stream of the store node", theirs[0]),
        stream("a stream of the store node, slow", theirs[1], options={"window": 5}, pause_ms=20, retries=0.05),
        stream("a stream, transient", ours[2], kept=False),
        stream("a stream of the store node, transient", theirs[2], options={"auto_ack": True}, kept=False),
        of_type("paid", b"paid"),
        of_type("sent, tried again", b"sent", retries=0.02, options={"max_retries": 50}),
        of_type("lost, in Python", b"lost", in_python=True),
        pattern("pattern", 1),
        pattern("pattern, in batches", 2, options={"batch_size": 10, "window": 50}),
        payload("payload", b"Ulm"),
        payload("payload, shared", b"Bonn", subscribers=2),
        payload("payload, slow", b"Kiel", pause_ms=2),
    ]


@dataclass
class Report:
    """What was found. `violations` by kind; a few of each in words."""

    seconds: float
    seed: int
    faults: list[Fault]
    events: int = 0
    delivered: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By subscription: events it is about, events it has got, deliveries."""
    arrived_after_s: float = 0.0
    violations: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str) -> None:
        self.violations[kind] += 1
        if self.violations[kind] <= 5:
            self.examples.append(f"{kind}: {example}")

    def text(self) -> str:
        """As markdown."""
        faults = Counter(fault.kind for fault in self.faults)
        lines = [
            f"# Subscriptions in chaos: {self.seconds:.0f} s, seed {self.seed}",
            "",
            f"{self.events} events; faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items())),
            "",
            "| subscription | events about it | got | deliveries |",
            "|---|---|---|---|",
            *(f"| {label} | {about} | {got} | {all_} |" for label, (about, got, all_) in self.delivered.items()),
            "",
            f"Everything had arrived {self.arrived_after_s:.1f} s after the last fault.",
            "",
            f"**Violations: {sum(self.violations.values())}** {dict(self.violations) or ''}".rstrip(),
        ]
        return "\n".join([*lines, *(f"- {example}" for example in self.examples), ""])


Seen = tuple[bytes, Term, bytes, int]
"""Subscription, subscriber, stream and number of one delivery."""


def judge(stored: Iterable[Stored], seen: Iterable[Seen], wanted: Sequence[Wish], report: Report) -> None:
    """Compare what was delivered, in the order it was, with what there is."""
    events = sorted(stored)
    report.events = len(events)
    deliveries: dict[bytes, list[Seen]] = defaultdict(list)
    for each in seen:
        deliveries[each[0]].append(each)
    for wish in wanted:
        mine = deliveries[wish.label.encode()]
        about: dict[bytes, list[int]] = defaultdict(list)
        for event in events:
            if wish.wanted(event):
                about[event.stream].append(event.number)
        expected = {(stream, number) for stream, numbers in about.items() for number in numbers}
        got = {(stream, number) for _, _, stream, number in mine}
        report.delivered[wish.label] = (len(expected), len(got), len(mine))
        for missing in sorted(expected - got):
            report.add("missed", f"{wish.label}: {missing}")
        for wrong in sorted(got - expected):
            report.add("not asked for", f"{wish.label}: {wrong}")
        _judge_order(wish, mine, about, report)


def _judge_order(wish: Wish, mine: Iterable[Seen], about: Mapping[bytes, list[int]], report: Report) -> None:
    place = {(stream, number): index for stream, numbers in about.items() for index, number in enumerate(numbers)}
    reached: dict[tuple[Term, bytes], int] = {}
    """The furthest place in a stream, of each of several subscribers, which need not get every event."""
    for _, who, stream, number in mine:
        key = (who if wish.subscribers > 1 else None, stream)
        now, before = place.get((stream, number), -1), reached.get(key, -1)
        if now > before:
            if wish.subscribers == 1 and now != before + 1:
                report.add("out of order", f"{wish.label}: {stream!r} came to {number} from {before}")
            reached[key] = now


class PythonSubscribers:
    """The subscriptions of this program, by a client that is connected to the gateways."""

    def __init__(self, client: Gateway, wanted: Iterable[Wish]) -> None:
        self.seen: list[Seen] = []
        self._tasks = [asyncio.create_task(self._follow(client, wish)) for wish in wanted]

    async def _follow(self, client: Gateway, wish: Wish) -> None:
        selector = wish.selector.decode() if isinstance(wish.selector, bytes) else wish.selector
        ack_timeout_s = ACK_TIMEOUT_MS / 1000
        async for event in client.subscribe(
            STORE, selector, type=wish.type, name=wish.label, ack_timeout_s=ack_timeout_s
        ):
            self.seen.append((wish.label.encode(), None, str(event.event_stream_id).encode(), event.event_number))

    def check(self) -> None:
        """Raise what has ended one of them."""
        for task in self._tasks:
            if task.done():
                task.result()

    def counts(self) -> dict[bytes, int]:
        """How many different events each has got."""
        distinct = {(label, stream, number) for label, _, stream, number in self.seen}
        return dict(Counter(label for label, _, _ in distinct))

    async def stop(self) -> None:
        """End them."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class _Switches:
    """Keeps the emitters of all members on or off, also of those that come back from the dead."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.emitters = False
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for member in range(len(self._house.cluster.members)):
                # A member that is dead or frozen just now is asked again.
                with suppress(Exception):
                    async with asyncio.timeout(1):
                        await self._house.cluster.set("emitters", self.emitters, member=member)

    async def stop(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def run_chaos(
    house: House,
    seconds: float,
    events: int,
    *,
    seed: int,
    directory: Path,
    longest_fault_s: float = 4.0,
    pause_ms: int = 60,
    batch: int = 10,
) -> Report:
    """Let everybody at work for at least so long and until there are so many events, then judge."""
    prefix = b"seen-%d-" % seed
    streams = [prefix + b"%d" % number for number in range(STREAMS)]
    wanted = wishes(streams)
    gateways: list[Term] = [gater.atom for gater in house.gaters]
    async with AsyncExitStack() as stack:
        subscribers = await house.beam.start("elixir", hidden=True)
        stack.push_async_callback(subscribers.close)
        for node in (subscribers, house.callers, *house.cluster.members):
            await _load(node)
        specs = [term for wish in wanted if not wish.in_python for term in wish.terms()]
        await subscribers.eval("Chaos.Subscribers.start(specs, gateways)", specs=specs, gateways=gateways)
        options = NodeOptions(epmd_port=await house.beam.epmd_port())
        names = [gater.name for gater in house.gaters]
        client = await stack.enter_async_context(Gateway.connect(*names, cookie=house.beam.cookie, options=options))
        in_python = PythonSubscribers(client, [wish for wish in wanted if wish.in_python])
        stack.push_async_callback(in_python.stop)
        switches = _Switches(house)
        stack.push_async_callback(switches.stop)
        await house.callers.eval(
            "Chaos.EventWriters.start(options)",
            options={
                Atom("writers"): _writers(streams),
                Atom("gateways"): gateways,
                Atom("stores"): [Atom(name) for name in house.cluster.names],
                Atom("pause_ms"): pause_ms,
                Atom("batch"): batch,
            },
        )
        trouble = _LoadingTrouble(house, random.Random(seed), longest_s=longest_fault_s)
        stop, began = asyncio.Event(), time.monotonic()
        troubling = asyncio.create_task(trouble.run(stop))
        while True:
            await asyncio.sleep(0.5)
            if troubling.done():
                troubling.result()
            in_python.check()
            share = min((time.monotonic() - began) / seconds, await _stored_count(house) / events)
            switches.emitters = share > 0.5
            if share >= 1:
                break
        stop.set()
        await troubling
        await house.callers.eval("Chaos.EventWriters.stop()", timeout_s=60)
        await house.cluster.wait_ready(30)
        report = Report(time.monotonic() - began, seed, trouble.faults)
        member = house.cluster.members[0]
        stored = [Stored(*row) for row in await member.eval(_READ_ALL, prefix=prefix, timeout_s=120)]
        report.arrived_after_s = await _all_arrived(subscribers, in_python, stored, wanted)
        path = directory / "seen"
        await subscribers.eval("Chaos.Subscribers.save(path)", path=str(path).encode(), timeout_s=120)
        judge(stored, [*etf.decode(path.read_bytes()), *in_python.seen], wanted, report)
    return report


class _LoadingTrouble(Trouble):
    """`Trouble`, after which a member that was started again has the writers' function too."""

    async def cause(self, kind: str) -> str:
        whom = await super().cause(kind)
        if kind == "kill":
            await _load(self.house.cluster.members[self.house.cluster.names.index(whom)])
        return whom


async def _load(node: BeamNode) -> None:
    await node.eval(
        "Code.put_compiler_option(:ignore_module_conflict, true); Code.require_file(path); :ok",
        path=str(_SOURCE).encode(),
        timeout_s=60,
    )


def _writers(streams: Sequence[bytes]) -> list[Term]:
    """`{who, streams}` of each writer: each stream has one."""
    half = len(streams) // 2
    found: list[Term] = []
    for who, some in ((Atom("gateways"), streams[:half]), (Atom("stores"), streams[half:])):
        count = WRITERS // 2
        found += [(who, list(some[number::count])) for number in range(count)]
    return found


async def _stored_count(house: House) -> int:
    """How many events a member has that answers; 0 if none does."""
    for member in house.cluster.members:
        with suppress(Exception):
            async with asyncio.timeout(1):
                return int(await member.eval(_COUNT))
    return 0


async def _all_arrived(
    subscribers: BeamNode, in_python: PythonSubscribers, stored: Sequence[Stored], wanted: Sequence[Wish]
) -> float:
    """Wait until every subscription has as many events as it should, or nothing comes any more; how long that took."""
    expected = {wish.label.encode(): sum(map(wish.wanted, stored)) for wish in wanted}
    began = last = time.monotonic()
    before = 0
    while time.monotonic() - last < STALLED_S:
        counts = await subscribers.eval("Chaos.Subscribers.counts()", timeout_s=60) | in_python.counts()
        in_python.check()
        if all(counts.get(label, 0) >= count for label, count in expected.items()):
            break
        if (now := sum(counts.values())) != before:
            before, last = now, time.monotonic()
        await asyncio.sleep(0.2)
    return time.monotonic() - began


async def _main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="gater-chaos-") as directory:
        async with beams() as beam, house(beam, gaters=3) as started:
            report = await run_chaos(
                started, options.seconds, options.events, seed=options.seed, directory=Path(directory)
            )
    text = report.text()
    print(text)
    if options.report is not None:
        options.report.write_text(text)
    return int(bool(report.violations))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m erlang_interop_tests.chaos_subscriptions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at least; until there are so many events")
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--report", type=Path, help="write the report to this file too")
    return asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
