"""GenServer echo: BEAM to BEAM and BEAM to gater, the same callers for both, over loopback distribution."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from bench.callers import Cell, Figures, Server, load_bench_module, measure
from bench.compiled import COMPILED
from bench.machine import NOT_INSTALLED, ROOT, peak_rss_kb, rss_kb
from bench.report import NONE, Table, megabytes, microseconds, times
from erlang_interop_tests.beam import BeamNode, Beams, unique_name
from gater.erl.terms import Atom

SIZES: Final = (("10 B", 10), ("10 KB", 10_000), ("1 MB", 1_000_000))
CALLERS: Final = (1, 64)
LOOPS: Final = ("uvloop", "asyncio")
BEAM: Final = "BEAM"
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0

DEFAULT_SPINNING: Final = ("+sbwt", "medium", "+sbwtdcpu", "short", "+sbwtdio", "short")
"""What OTP 25 does unless told otherwise; the nodes of the tests are told not to spin."""


async def start_node(beams: Beams) -> BeamNode:
    """A BEAM node as people start them, with `gater_bench` loaded."""
    node = await beams.start(arguments=DEFAULT_SPINNING)
    await load_bench_module(node)
    return node


@contextlib.asynccontextmanager
async def python_server(beams: Beams, label: str, loop: str, source: Path = ROOT) -> AsyncIterator[Server]:
    """The echo server on gater's node, in a process of its own, run from the directory `source`."""
    name = unique_name(loop)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.echo_server", name, beams.cookie, str(await beams.epmd_port()), loop),
        stdout=asyncio.subprocess.PIPE,
        cwd=source,
        env={"PATH": os.environ.get("PATH", os.defpath)},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        if line.decode().strip() != f"{name} is up":
            raise RuntimeError(f"the echo server on {loop} did not start: it said {line!r}")
        yield Server(label, (Atom("echo"), Atom(name)), process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


def echo_cells() -> list[Cell]:
    """Every size with every number of callers."""
    cells = []
    for label, size in SIZES:
        payload = bytes(size)
        cells += [Cell(label, callers, lambda server, caller, p=payload: p, expect="echo") for callers in CALLERS]  # type: ignore[misc]
    return cells


async def run(seconds: float, rounds: int, compiled: Path | None) -> tuple[list[Table], float]:
    """The tables, and the round trip of 10 B between BEAM nodes with one caller (p50, ns).

    `compiled` is the directory of a compiled gater, if there is one.
    """
    loops = [loop for loop in LOOPS if loop == "asyncio" or importlib.util.find_spec(loop) is not None]
    async with contextlib.AsyncExitStack() as stack:
        beams = Beams()
        stack.push_async_callback(beams.close)
        client, server = await start_node(beams), await start_node(beams)
        await server.eval("gater_bench:start_echo()")
        servers = [Server(BEAM, (Atom("echo"), server.atom), server.pid)]
        servers += [await stack.enter_async_context(python_server(beams, f"gater, {loop}", loop)) for loop in loops]
        if compiled is not None:
            servers.append(await stack.enter_async_context(python_server(beams, COMPILED, loops[0], compiled)))
        before = {each: rss_kb(each.pid) for each in servers}
        cells = echo_cells()
        figures = await measure(client, cells, servers, seconds, rounds)
        memory = _memory_table(servers, before)
    missing = [f"gater, {loop}" for loop in LOOPS if loop not in loops]
    return [_table(cells, servers, missing, figures), memory], figures[cells[0], servers[0]].quantile_ns(0.5)


def _table(
    cells: Sequence[Cell],
    servers: Sequence[Server],
    missing: Sequence[str],
    figures: dict[tuple[Cell, Server], Figures],
) -> Table:
    table = Table(
        "GenServer echo",
        ("payload, callers", "server", "p50", "p99", "calls/s", "p50 to BEAM's", "server CPU a call", "spread"),
        [
            "The callers are processes of one BEAM node; each calls `gen_server:call({echo, Node}, Payload)` again and "
            "again. The server is another BEAM node or a Python process with `gater.erl`, which looks for input for "
            "200 µs before it sleeps, as a gateway does; *compiled* (`make compile`) is on uvloop. "
            "*Spread* is by how much the calls/s of the rounds differ: fastest over slowest.",
        ],
    )
    for cell in cells:
        label = f"{cell.label}, {cell.callers}"
        beam_p50 = figures[cell, servers[0]].quantile_ns(0.5)
        for server in servers:
            seen = figures[cell, server]
            p50 = seen.quantile_ns(0.5)
            table.add(
                label,
                server.label,
                microseconds(p50),
                microseconds(seen.quantile_ns(0.99)),
                f"{seen.rate:,.0f}",
                times(p50, beam_p50),
                microseconds(seen.cpu_per_call_ns),
                f"{seen.spread:.0%}",
            )
        for name in missing:
            table.add(label, name, NOT_INSTALLED, *[NONE] * 5)
    return table


def _memory_table(servers: Sequence[Server], before: dict[Server, int | None]) -> Table:
    table = Table(
        "Memory of the echo servers",
        ("server", "before", "peak"),
        ["Resident memory of the server's process before the first call, and the most it had during the echo run."],
    )
    for server in servers:
        table.add(server.label, megabytes(before[server]), megabytes(peak_rss_kb(server.pid)))
    return table
