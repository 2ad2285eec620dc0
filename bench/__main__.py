"""The command: `python -m bench [--quick] [--only CHAPTER ...] [--seconds S] [--write docs/benchmarks.md]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench import codec, echo, gateway, machine, names, subscriptions
from bench.callers import ROUNDS
from bench.compiled import compiled_copy
from bench.report import Table

CHAPTERS: Final = ("echo", "codec", "gateway", "subscriptions", "names")
CELL_S: Final = 3.0
CODEC_S: Final = 3.0
NAMES_S: Final = 1.0
QUICK_CELL_S: Final = 0.1
QUICK_COUNTS: Final = (10, 1_000)
QUICK_STREAMS: Final = 100
QUICK_SUBSCRIBERS: Final = 20

HEAD: Final = """\
# Benchmarks

Written by `make bench ARGS="--write docs/benchmarks.md"`: everything below is of one run, on one machine, side by side.
Compare within a table, not with figures of other machines or of other runs."""

BUSY_LOAD: Final = 0.3
"""A load average (1 minute) above this, before anything was started here, means that others were at work."""

BUSY: Final = """\
**The machine was busy with other work during this run.** Latencies are higher and calls/s lower than it can do, and the
ratios may be off in either direction: who needs both cores at once suffers more. Repeat it on an idle machine before
you quote it."""

REMARKS: Final = """\
## How far to trust this

- Callers, servers and whatever else the machine does share its cores. The load averages above say how busy it was
  before and after. Competition makes every latency higher, p99 and the rows of 64 callers most of all.
- The servers are measured in turn, in short slices of a few rounds, so that a disturbance hits all of them. *Spread*
  shows what the rounds differ by nevertheless: a difference between two rows that is smaller than their spread is none.
- *Server CPU a call* hardly depends on how busy the machine is, and says what one core of a server can do at best. It
  is counted in ticks of 10 ms: rough where few calls were made.
- One BEAM node makes the calls and shares the cores with the server. With 64 callers the figure is what both manage
  together; a server on a machine of its own does better.
- Memory is that of whole processes as the system sees it, interpreter and virtual machine included."""


async def measure(args: argparse.Namespace) -> AsyncIterator[Table]:
    """The tables of the chapters asked for, each as soon as it is there."""
    beam_echo_ns: float | None = None
    seconds, rounds = (QUICK_CELL_S, 1) if args.quick else (args.seconds, ROUNDS)
    compiled = compiled_copy(args.copy)
    if "echo" in args.only:
        tables, beam_echo_ns = await echo.run(seconds, rounds, compiled)
        for table in tables:
            yield table
    if "codec" in args.only:
        yield await codec.run(QUICK_CELL_S if args.quick else CODEC_S, rounds)
    if "gateway" in args.only:
        yield await gateway.run(seconds, rounds, beam_echo_ns, compiled)
    if "subscriptions" in args.only:
        quick: dict[str, int] = {"streams": QUICK_STREAMS, "subscribers": QUICK_SUBSCRIBERS} if args.quick else {}
        yield await subscriptions.run(seconds, beam_echo_ns, compiled, **quick)
    if "names" in args.only:
        yield await names.run(*((QUICK_CELL_S, QUICK_COUNTS) if args.quick else (NAMES_S, names.COUNTS)))


async def make_page(args: argparse.Namespace) -> str:
    """Measure, print every part of the page as it is made, and return the whole."""
    parts: list[str] = []

    def add(part: str) -> None:
        parts.append(part)
        print(part, flush=True, end="\n\n")

    busy = os.getloadavg()[0] > BUSY_LOAD
    facts = [*machine.description(otp_version()), ("load averages before the run", machine.load())]
    add(HEAD)
    add(Table("Where and with what", ("what", "value"), rows=list(facts)).text())
    if busy:
        add(BUSY)
    async for table in measure(args):
        add(table.text())
    add(f"Load averages after the run: {machine.load()}.")
    add(REMARKS)
    return "\n\n".join(parts) + "\n"


def otp_version() -> str:
    """The installed release of OTP with its emulator, as the measured nodes run it."""
    source = 'io:format("~s, erts ~s", [erlang:system_info(otp_release), erlang:system_info(version)]), halt().'
    return subprocess.run(
        ["erl", "-noshell", "-boot", "no_dot_erlang", "-eval", source], capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure gater side by side with its peers.")
    parser.add_argument("--quick", action="store_true", help="a fraction of a second each: shows that it runs, no more")
    parser.add_argument("--only", nargs="+", choices=CHAPTERS, default=CHAPTERS, help="chapters to run (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=CELL_S, help="time for each row of calls (default: %(default)s)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the page there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gater-bench-") as copy:
        args.copy = Path(copy)
        page = asyncio.run(make_page(args))
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
