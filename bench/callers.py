"""Callers on a BEAM node that measure GenServers: turn and turn about, so that what disturbs one disturbs all.

A `Cell` is one row's work (what is asked, by how many callers), a `Server` whom it is asked of. `measure` runs every
cell against every server in several rounds of short slices, each round beginning with another server.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.machine import ROOT, cpu_s
from erlang_interop_tests.beam import BeamNode
from gater.erl.terms import Atom, Term

ROUNDS: Final = 3
"""Slices a cell's time is cut into."""

WARM_UP_S: Final = 0.3
SLICE_GRACE_S: Final = 90.0
"""What a slice may take beyond its time: a caller waits up to a minute for an answer."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who is called. `pid` is the operating system's process whose CPU time counts."""

    label: str
    target: Term
    pid: int


@dataclass(frozen=True, slots=True)
class Cell:
    """What is called: `request(server, caller)` makes the request of one caller. `expect` as `gater_bench:check/3`."""

    label: str
    callers: int
    request: Callable[[Server, int], Term]
    expect: str = "ok"


@dataclass(slots=True)
class Figures:
    """What was seen of one cell and one server."""

    latencies_ns: list[int] = field(default_factory=list)
    elapsed_ns: int = 0
    server_cpu_s: float | None = 0.0
    rates: list[float] = field(default_factory=list)

    def add(self, latencies_ns: Sequence[int], elapsed_ns: int, server_cpu_s: float | None) -> None:
        """One slice more."""
        self.latencies_ns += latencies_ns
        self.elapsed_ns += elapsed_ns
        self.rates.append(len(latencies_ns) / elapsed_ns * 1e9)
        known = self.server_cpu_s is not None and server_cpu_s is not None
        self.server_cpu_s = self.server_cpu_s + server_cpu_s if known else None  # type: ignore[operator]

    def quantile_ns(self, fraction: float) -> int:
        """The latency that this fraction of the calls stayed below."""
        ordered = sorted(self.latencies_ns)
        return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))]

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.latencies_ns) / self.elapsed_ns * 1e9

    @property
    def spread(self) -> float:
        """By how much the rounds differ: the fastest over the slowest, less one."""
        return max(self.rates) / min(self.rates) - 1

    @property
    def cpu_per_call_ns(self) -> float | None:
        """CPU time of the server's process for one call; None when there was too little of it to count in ticks."""
        if not self.server_cpu_s:
            return None
        return self.server_cpu_s / len(self.latencies_ns) * 1e9


async def load_bench_module(node: BeamNode, name: str = "gater_bench") -> None:
    """Compile a module of this directory into a node."""
    await node.eval(
        "{ok, Module, Binary} = compile:file(binary_to_list(Source), [binary, return_errors]),"
        "{module, _} = code:load_binary(Module, binary_to_list(Source), Binary), ok",
        Source=str(ROOT / "bench" / f"{name}.erl").encode(),
    )


async def measure(
    client: BeamNode, cells: Sequence[Cell], servers: Sequence[Server], seconds: float, rounds: int = ROUNDS
) -> dict[tuple[Cell, Server], Figures]:
    """Call every server with every cell for `seconds` in all, after a warm-up."""
    figures = {(cell, server): Figures() for cell in cells for server in servers}
    for cell in cells:
        for server in servers:
            await client.eval(
                "gater_bench:check(Target, Request, Expect)",
                Target=server.target,
                Request=cell.request(server, 0),
                Expect=Atom(cell.expect),
                timeout_s=SLICE_GRACE_S,
            )
            await _slice(client, cell, server, min(WARM_UP_S, seconds))
    for turn in range(rounds):
        for cell in cells:
            print(f"  round {turn + 1}/{rounds}: {cell.label}, callers: {cell.callers}", file=sys.stderr, flush=True)
            first = turn % len(servers)
            for server in (*servers[first:], *servers[:first]):
                before = cpu_s(server.pid)
                elapsed_ns, latencies_ns = await _slice(client, cell, server, seconds / rounds)
                after = cpu_s(server.pid)
                used = None if before is None or after is None else after - before
                figures[cell, server].add(latencies_ns, elapsed_ns, used)
    return figures


async def _slice(client: BeamNode, cell: Cell, server: Server, seconds: float) -> tuple[int, array[int]]:
    requests = [(1, cell.request(server, caller)) for caller in range(cell.callers)]
    if all(request is requests[0][1] for _, request in requests):
        # Sent to the client node once: 64 copies of a megabyte would leave it with garbage to collect.
        requests = [(cell.callers, requests[0][1])]
    elapsed_ns, encoded = await client.eval(
        "gater_bench:calls(Target, lists:append([lists:duplicate(N, R) || {N, R} <- Requests]), Millis)",
        Target=server.target,
        Requests=requests,
        Millis=max(1, int(seconds * 1000)),
        timeout_s=seconds + SLICE_GRACE_S,
    )
    latencies = array("Q", encoded)
    if sys.byteorder == "little":
        latencies.byteswap()
    return elapsed_ns, latencies
