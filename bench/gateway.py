"""Gateway calls: from a BEAM node through gater to a store node, next to the direct call, and to the embedded store.

The store node is the stand-in of `erlang_interop_tests` (an ExESDB's gateway workers in Elixir, one member), not ExESDB
itself: what is of interest is what the way through gater adds.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Final

from bench.callers import Cell, Server, measure
from bench.echo import CALLERS, DEFAULT_SPINNING, start_node
from bench.report import Table, microseconds
from erlang_interop_tests.beam import Beams
from erlang_interop_tests.gater_process import gater_process
from erlang_interop_tests.standin import standin_cluster
from gater.api.schema import NewEvent
from gater.erl.terms import Atom, Term

STORE: Final = "reg_gh"
DIRECT: Final = "store node, direct"
THROUGH: Final = "through gater"
THROUGH_COMPILED: Final = "through gater, compiled"
EMBEDDED: Final = "gater's embedded store"
API: Final = Atom("Elixir.ExESDBGater.API")
READ_STREAM: Final = b"bench-read"
READ_EVENTS: Final = 1_000
APPENDED_AT_ONCE: Final = 100
AIMED_ECHOES: Final = 3
"""Added latency at p50 stays below this many plain BEAM echo round trips."""


def version(server: Server, caller: int) -> Term:
    """The version of a stream."""
    return (Atom("get_version"), Atom(STORE), b"bench-version")


def append(server: Server, caller: int) -> Term:
    """One event more, to a stream of the caller's own."""
    event = NewEvent("benched:v1", {b"number": caller, b"text": b"x" * 100}, event_id=f"event-{caller}")
    return (Atom("append_events"), Atom(STORE), b"bench-append-%d" % caller, [event.to_term()])


def read(server: Server, caller: int) -> Term:
    """A page of events."""
    return (Atom("get_events"), Atom(STORE), READ_STREAM, 0, READ_EVENTS, Atom("forward"))


def _page() -> list[Term]:
    events = (
        NewEvent("benched:v1", {b"number": number, b"text": b"x" * 300}, {b"user": b"somebody"}, event_id=f"e-{number}")
        for number in range(READ_EVENTS)
    )
    return [event.to_term() for event in events]


async def run(seconds: float, rounds: int, beam_echo_ns: float | None, compiled: Path | None) -> Table:
    """The table; `beam_echo_ns` is the BEAM's own echo round trip of the same run, if it was measured, `compiled` the
    directory of a compiled gater, if there is one."""
    async with contextlib.AsyncExitStack() as stack:
        beams = Beams()
        stack.push_async_callback(beams.close)
        client = await start_node(beams)
        cluster = await stack.enter_async_context(standin_cluster(beams, 1, stores=[STORE], arguments=DEFAULT_SPINNING))
        worker = next(iter((await cluster.workers()).values()))
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gater-bench-")))
        shared = {"cookie": beams.cookie, "epmd_port": await beams.epmd_port()}
        through = await stack.enter_async_context(gater_process(connect=cluster.names, **shared))
        embedded = await stack.enter_async_context(gater_process(embedded=data, stores=[STORE], **shared))
        servers = [
            Server(DIRECT, worker, cluster.members[0].pid),
            Server(THROUGH, (API, through.atom), through.process.pid),
            Server(EMBEDDED, (API, embedded.atom), embedded.process.pid),
        ]
        if compiled is not None:
            quick = await stack.enter_async_context(gater_process(connect=cluster.names, source=compiled, **shared))
            servers.insert(2, Server(THROUGH_COMPILED, (API, quick.atom), quick.process.pid))
        for server in servers:
            for caller in range(max(CALLERS)):
                # Streams exist before they are measured, and their versions are those of real streams.
                await client.eval(
                    "{ok, _} = gen_server:call(Target, Request), ok",
                    Target=server.target,
                    Request=append(server, caller),
                )
        page = _page()
        for target in (servers[0].target, servers[-1].target):
            for start in range(0, READ_EVENTS, APPENDED_AT_ONCE):
                await client.eval(
                    "{ok, _} = gen_server:call(Target, Request, 60000), ok",
                    Target=target,
                    Request=(Atom("append_events"), Atom(STORE), READ_STREAM, page[start : start + APPENDED_AT_ONCE]),
                    timeout_s=60,
                )
        cells = [
            Cell(label, callers, request)
            for label, request in (("get_version", version), ("append of one event", append))
            for callers in CALLERS
        ]
        cells.append(Cell(f"get_events of {READ_EVENTS:,}", 1, read))
        figures = await measure(client, cells, servers, seconds, rounds)
    table = Table(
        "Through the gateway",
        ("request, callers", "to", "p50", "p99", "calls/s", "server CPU a call", "spread"),
        [
            "The caller is a BEAM node. *Store node* is the stand-in of the tests, not ExESDB itself, called directly "
            "or through a gater in between (*server CPU* is then gater's own); *compiled* is one after `make compile`. "
            "The embedded store writes to the disk of this machine before it answers an append.",
        ],
    )
    for cell in cells:
        for server in servers:
            seen = figures[cell, server]
            table.add(
                f"{cell.label}, {cell.callers}",
                server.label,
                microseconds(seen.quantile_ns(0.5)),
                microseconds(seen.quantile_ns(0.99)),
                f"{seen.rate:,.0f}",
                microseconds(seen.cpu_per_call_ns),
                f"{seen.spread:.0%}",
            )
    if beam_echo_ns is not None:
        direct, relayed = (figures[cells[0], server].quantile_ns(0.5) for server in servers[:2])
        table.notes.append(
            f"Added by the way through gater to `get_version` with one caller, at p50: "
            f"{microseconds(relayed - direct)}, which is {(relayed - direct) / beam_echo_ns:.1f} echo round trips "
            f"between BEAM nodes of the same run (aim: below {AIMED_ECHOES})."
        )
    return table
