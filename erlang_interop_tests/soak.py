"""A Python node under load while its connections are cut: is every call answered, and does anything stay behind?

    python -m erlang_interop_tests.soak [--seconds 600] [--seed N] [--report FILE]

50 processes on two BEAM nodes (OTP 25 and 28) call, cast, link, monitor, spawn and die, 10 processes in Python do the
same towards them, and every now and then a connection is cut: by the BEAM, by the Python node, or in the stream.
Every step has the outcomes that Erlang allows it (`ALLOWED`); at the end

* no step had another outcome, and every kind of step has succeeded;
* nothing is left: processes, aliases, monitors, links, spawns, tasks are as many as before, on the BEAM nodes too.
  One exception is OTP's, and two BEAM nodes have it as well: a monitor that is given up while its connection is being
  made is set nonetheless and never taken back. It ends with the connection, so that is cut before the last count;
* memory is flat: the resident size grew by less than `GROWTH` from the second fifth of the time to the last (not looked
  at in runs shorter than `WARM_S`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from erlang_interop_tests.beam import BeamNode, Beams, beams, wait_until
from erlang_interop_tests.python_node import python_node
from gater.erl import Node
from gater.erl.errors import ConnectionLost, ErlangError, ErlangExit, ErlangThrow, ErlError, ProcessDied
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, call, cast, start_server
from gater.erl.process import DOWN, EXIT, NOCONNECTION, SPAWN_REPLY, Mailbox, Stop
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Pid, Term

BEAM_PROCESSES: Final = 50
PYTHON_PROCESSES: Final = 10
CUT_EVERY_S: Final = (0.2, 1.5)
LIFE_S: Final = 10.0
"""A process made for one step ends by itself after this time: the request to end it may have been lost in a cut."""
SETTLE_S: Final = LIFE_S + 10.0
GROWTH: Final = 0.10
"""More than the allocator's noise, less than what 10 minutes of any leak per call amount to."""
MAX_GIVEN_UP: Final = 2 * BEAM_PROCESSES
"""Monitors that BEAM processes give up during one connection's handshake."""
WARM_S: Final = 60.0
"""Shorter runs say nothing about memory: caches still fill up."""
SAMPLE_S: Final = 0.5

ALLOWED: Final[dict[str, tuple[str, str]]] = {
    "call": ("ok", "nodedown"),
    "slow_call": ("ok", "nodedown"),
    "never": ("timeout", "nodedown"),
    "dies": ("oops", "nodedown"),
    "nobody": ("noproc", "nodedown"),
    "link": ("oops", "noconnection"),
    "unlink": ("ok", "noconnection"),
    "monitor": ("killed", "noconnection"),
    "erpc": ("ok", "noconnection"),
    "erpc_throw": ("oops", "noconnection"),
    "erpc_exit": ("oops", "noconnection"),
    "spawn_monitor": ("oops", "noconnection"),
    "spawn": ("oops", "noconnection"),
    "cast": ("ok", "ok"),
    "die": ("ok", "noconnection"),
}
"""Of each step: its outcome, and its outcome when the connection is cut meanwhile."""

_WORKERS: Final = """
  Note = fun(Step, Outcome) -> ets:update_counter(soak, {Step, Outcome}, 1, {{Step, Outcome}, 0}) end,
  Server = {soak, N},
  Call = fun(To, Request, Timeout, Expected) ->
    try gen_server:call(To, Request, Timeout) of
      Expected -> ok;
      Other -> {wrong, Other}
    catch
      exit:{{nodedown, _}, _} -> nodedown;
      exit:{Why, {gen_server, call, _}} -> Why
    end
  end,
  Remote = fun(F, Args) ->
    try erpc:call(N, soak, F, Args) of Value -> {return, Value}
    catch
      error:{erpc, noconnection} -> noconnection;
      throw:Thrown -> Thrown;
      exit:{exception, Why} -> Why;
      Class:Why -> {Class, Why}
    end
  end,
  Victim = fun(Do) ->
    case Remote(victim, []) of
      {return, P} -> Do(P);
      Failed -> Failed
    end
  end,
  Steps = #{
    call => fun() -> X = {rand:uniform(1000), <<"payload">>}, Call(Server, {echo, X}, 5000, X) end,
    slow_call => fun() -> Call(Server, slow, 5000, slow) end,
    never => fun() -> Call(Server, never, 20, x) end,
    nobody => fun() -> Call({nobody, N}, x, 5000, x) end,
    dies => fun() -> case Victim(fun(P) -> Call(P, oops, 5000, x) end) of noconnection -> nodedown; R -> R end end,
    cast => fun() -> gen_server:cast(Server, 1) end,
    link => fun() -> Victim(fun(P) -> link(P), P ! oops, receive {'EXIT', P, R} -> R after 8000 -> silence end end) end,
    unlink => fun() -> Victim(fun(P) ->
      link(P), unlink(P), P ! oops, receive {'EXIT', P, noconnection} -> noconnection; {'EXIT', P, R} -> {bad, R}
      after 5 -> ok end end) end,
    monitor => fun() -> Victim(fun(P) ->
      M = monitor(process, P), exit(P, kill), receive {'DOWN', M, _, _, R} -> R after 8000 -> silence end end) end,
    erpc => fun() -> case Remote(later, [5]) of {return, 5} -> ok; R -> R end end,
    erpc_throw => fun() -> Remote(throwing, []) end,
    erpc_exit => fun() -> Remote(exiting, []) end,
    spawn_monitor => fun() ->
      {P, M} = spawn_monitor(N, soak, exiting, []),
      receive {'DOWN', M, _, P, R} -> R after 8000 -> silence end end,
    die => fun() -> case Victim(fun(P) -> link(P), Note(die, ok), exit(dying) end) of R -> R end end
  },
  Names = maps:keys(Steps),
  Worker = fun Again() ->
    Name = lists:nth(rand:uniform(length(Names)), Names),
    Note(Name, (maps:get(Name, Steps))()),
    receive stop -> ok after rand:uniform(20) - 1 -> Again() end
  end,
  Start = fun() -> spawn_link(fun() -> process_flag(trap_exit, true), Worker() end) end,
  register(soak, spawn(fun() ->
    ets:new(soak, [public, named_table]), process_flag(trap_exit, true),
    Keep = fun Again(Stopping, Pids) ->
      receive
        {'$gen_call', From, stop} ->
          [P ! stop || P <- Pids], gen_server:reply(From, ok), Again(true, Pids);
        {'$gen_call', From, left} -> gen_server:reply(From, length(Pids)), Again(Stopping, Pids);
        {'$gen_call', From, results} -> gen_server:reply(From, ets:tab2list(soak)), Again(Stopping, Pids);
        {'$gen_call', From, never} -> Again(Stopping, Pids);
        {'$gen_call', From, victim} ->
          gen_server:reply(From, spawn(fun() -> receive {'$gen_call', _, R} -> exit(R); R -> exit(R)
            after Life -> ok end end)),
          Again(Stopping, Pids);
        {'$gen_call', From, {echo, X}} -> gen_server:reply(From, X), Again(Stopping, Pids);
        {'$gen_cast', _} -> Again(Stopping, Pids);
        {'EXIT', P, dying} when not Stopping -> Again(Stopping, [Start() | lists:delete(P, Pids)]);
        {'EXIT', P, Reason} ->
          case lists:member(Reason, [normal, dying]) of true -> ok; false -> Note(worker, {crashed, Reason}) end,
          Again(Stopping, lists:delete(P, Pids));
        _ -> Again(Stopping, Pids)
      end
    end,
    Keep(false, [Start() || _ <- lists:seq(1, Count)])
  end)),
  ok
"""


class Soaked(GenServer):
    """What the BEAM processes call."""

    def __init__(self) -> None:
        self.casts = 0

    def handle_call(self, request: Term, caller: Caller) -> Term:
        match request:
            case (Atom(name="echo"), term):
                return term
            case Atom(name="slow"):
                return self._slow()
            case Atom(name="never"):
                return NO_REPLY
        raise Stop((Atom("unknown"), request))

    async def _slow(self) -> Term:
        await asyncio.sleep(0.001)
        return Atom("slow")

    def handle_cast(self, message: Term) -> None:
        self.casts += message


def export(node: Node) -> None:
    """The functions that the BEAM processes call."""
    exports = node.exports

    async def living(me: Mailbox) -> None:
        try:
            message = await me.get(timeout_s=LIFE_S)
        except TimeoutError:
            return
        raise Stop(message[2] if type(message) is tuple and len(message) == 3 else message)

    @exports.export("soak")
    def victim() -> Term:
        return node.spawn(living).pid

    @exports.export("soak")
    async def later(milliseconds: int) -> Term:
        await asyncio.sleep(milliseconds / 1000)
        return milliseconds

    @exports.export("soak")
    def throwing() -> Term:
        raise ErlangThrow(Atom("oops"))

    @exports.export("soak")
    def exiting() -> Term:
        raise ErlangExit(Atom("oops"))


@dataclass(slots=True)
class Soak:
    """One run: what is going on, and what was seen."""

    node: Node
    peers: Sequence[BeamNode]
    chance: random.Random
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)
    given_up: int = 0
    """Monitors given up while their connection was being made."""
    ending: bool = False

    # Processes in Python

    async def worker(self, me: Mailbox) -> None:
        """Take steps at random until told to end."""
        me.process.trap_exit = True
        steps: dict[str, Callable[[Mailbox, Atom], Awaitable[str]]] = {
            "call": self._call,
            "never": self._never,
            "dies": self._dies,
            "link": self._link,
            "monitor": self._monitor,
            "erpc": self._erpc,
            "spawn": self._spawn,
            "cast": self._cast,
        }
        names = list(steps)
        while not self.ending:
            name = self.chance.choice(names)
            peer = self.chance.choice(self.peers).atom
            try:
                outcome = await steps[name](me, peer)
            except ConnectionLost:
                outcome = ALLOWED[name][1]
            except ErlError as error:
                outcome = repr(error)
            self.outcomes[name, outcome] += 1
            await asyncio.sleep(self.chance.random() * 0.02)

    async def _call(self, me: Mailbox, peer: Atom) -> str:
        term = (self.chance.random(), b"payload")
        answer = await call(self.node, (Atom("soak"), peer), (Atom("echo"), term))
        return "ok" if answer == term else f"wrong: {answer}"

    async def _never(self, me: Mailbox, peer: Atom) -> str:
        try:
            await call(self.node, (Atom("soak"), peer), Atom("never"), timeout_s=0.02)
        except ConnectionLost:
            raise
        except ErlError as error:
            return str(getattr(error, "reason", error))
        return "answered"

    async def _victim(self, peer: Atom) -> Term:
        return await call(self.node, (Atom("soak"), peer), Atom("victim"))

    async def _dies(self, me: Mailbox, peer: Atom) -> str:
        try:
            await call(self.node, await self._victim(peer), Atom("oops"))
        except ProcessDied as error:
            return str(error.reason)
        return "answered"

    async def _link(self, me: Mailbox, peer: Atom) -> str:
        victim = await self._victim(peer)
        assert type(victim) is Pid
        me.process.link(victim)
        me.send(victim, Atom("oops"))
        message = await me.get(lambda each: each[:2] == (EXIT, victim), timeout_s=8)
        return str(message[2])

    async def _monitor(self, me: Mailbox, peer: Atom) -> str:
        victim = await self._victim(peer)
        assert type(victim) is Pid
        reference = me.process.monitor(victim)
        self.node.exit(victim, Atom("kill"), me.pid)
        message = await me.get(lambda each: each[:2] == (DOWN, reference), timeout_s=8)
        return str(message[4])

    async def _erpc(self, me: Mailbox, peer: Atom) -> str:
        try:
            answer = await erpc_call(self.node, peer, "erlang", "node", timeout_s=5)
        except ErlangError as error:
            return "noconnection" if error.reason == (Atom("erpc"), NOCONNECTION) else repr(error)
        return "ok" if answer is peer else f"wrong: {answer}"

    async def _spawn(self, me: Mailbox, peer: Atom) -> str:
        reference = me.process.spawn_request(peer, "erlang", "exit", [Atom("oops")], link=True, monitor=True)
        _, _, result, told = await me.get(lambda each: each[:2] == (SPAWN_REPLY, reference), timeout_s=8)
        if result is not Atom("ok"):
            return str(told)
        down = await me.get(lambda each: each[:2] == (DOWN, reference), timeout_s=8)
        exited = await me.get(lambda each: each[:2] == (EXIT, told), timeout_s=8)
        reasons = {down[4], exited[2]}
        # A cut may come between the two.
        return "noconnection" if NOCONNECTION in reasons else " and ".join(map(str, reasons))

    async def _cast(self, me: Mailbox, peer: Atom) -> str:
        cast(self.node, (Atom("soak"), peer), 1, me.pid)
        return "ok"

    # Disturbance and measures

    async def cut(self) -> None:
        """Cut connections at random, each in one of three ways."""
        while True:
            await asyncio.sleep(self.chance.uniform(*CUT_EVERY_S))
            peer = self.chance.choice(self.peers)
            way = self.chance.choice(["by the BEAM", "by Python", "in the stream"])
            self.cuts[way] += 1
            if way == "by the BEAM":
                await peer.eval("erlang:disconnect_node(N)", N=self.node.name)
            elif way == "by Python":
                self.node.disconnect(peer.atom)
            else:
                connection = self.node.peers.table.get(peer.atom)
                if connection is not None and connection.protocol is not None and connection.protocol.transport:
                    connection.protocol.transport.abort()

    async def sample(self) -> None:
        """Note the resident size again and again."""
        while True:
            self.sizes.append(resident_bytes())
            await asyncio.sleep(SAMPLE_S)

    def counts(self) -> dict[str, int]:
        """Everything that may be left behind."""
        node = self.node
        connections = list(node.peers.table.values())
        processes = list(node.processes())
        return {
            "connections": len(connections),
            "processes": len(processes),
            "tasks": len(asyncio.all_tasks()),
            "aliases": len(node._aliases),
            "watched": sum(len(each.watched) for each in connections),
            "monitors": sum(len(each.monitors) for each in connections),
            "links": sum(len(each.links) for each in connections),
            "spawns": sum(len(each.spawns) for each in connections),
            "unlinking": sum(len(each.unlinking) for each in connections),
            "linked": sum(len(each.links) for each in processes),
            "monitored_by": sum(len(each.monitored_by) for each in processes),
            "messages": sum(each.queue_length() for each in processes),
        }


def resident_bytes() -> int:
    """The resident size of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run has shown."""

    lines: list[str]
    faults: list[str]


async def soak(seconds: float, seed: int, beam: Beams) -> Verdict:
    """Run for `seconds` and look at what is left."""
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(python_node(beam))
        export(node)
        server = Soaked()
        await start_server(node, server, name="soak")
        peers = [await beam.start("erlang", otp=otp) for otp in (25, 28)]
        run = Soak(node, peers, random.Random(seed))
        for peer in peers:
            # From that side, which for its first connection starts processes that stay.
            await peer.eval("net_kernel:connect_node(N)", N=node.name)
        before = run.counts()
        processes = [await peer.eval("length(processes())") for peer in peers]
        for peer in peers:
            await peer.eval(_WORKERS, N=node.name, Count=BEAM_PROCESSES // len(peers), Life=round(LIFE_S * 1000))
        workers = [node.spawn(run.worker) for _ in range(PYTHON_PROCESSES)]
        disturbing = [asyncio.create_task(run.cut()), asyncio.create_task(run.sample())]
        began = time.monotonic()
        await asyncio.sleep(seconds)
        for task in disturbing:
            task.cancel()
        await asyncio.gather(*disturbing, return_exceptions=True)
        run.ending = True
        for peer in peers:
            await peer.eval("gen_server:call(soak, stop)")
        lasted_s = time.monotonic() - began
        await wait_until(
            lambda: not any(each.alive for each in workers), SETTLE_S, what="the end of Python's processes"
        )
        for peer in peers:
            await wait_until(lambda: _none_left(peer), SETTLE_S, what=f"the end of the processes of {peer.name}")  # noqa: B023
            for (step, outcome), count in await peer.eval("gen_server:call(soak, results)"):
                run.outcomes[str(step), str(outcome)] += count
            await node.connect(peer.atom)
        faults = await _left_behind(run, before, processes)
        return _judge(run, faults, lasted_s, server.casts)


async def _none_left(peer: BeamNode) -> bool:
    return bool(await peer.eval("gen_server:call(soak, left) =:= 0"))


async def _left_behind(run: Soak, before: dict[str, int], processes: list[Term]) -> list[str]:
    faults = []

    def settled(*but: str) -> bool:
        gc.collect()
        now = run.counts()
        return all(now[name] == count for name, count in before.items() if name not in but)

    given_up = ("watched", "monitored_by")
    try:
        await wait_until(lambda: settled(*given_up), SETTLE_S, interval_s=0.5)
        run.given_up = run.counts()["watched"]
        if run.given_up > MAX_GIVEN_UP:
            faults.append(f"{run.given_up} monitors of the BEAM nodes were not taken back")
    except AssertionError:
        pass
    for peer in run.peers:
        run.node.disconnect(peer.atom)
        await run.node.connect(peer.atom)
    try:
        await wait_until(settled, SETTLE_S, interval_s=0.5)
    except AssertionError:
        now = run.counts()
        faults.append(
            f"left behind: { ({name: (before[name], now[name]) for name in now if now[name] != before[name]}) }"
        )
    for peer, count in zip(run.peers, processes, strict=True):
        # Its keeper is one more.
        async def as_before(peer: BeamNode = peer, count: Any = count) -> bool:
            return bool(await peer.eval("length(processes()) =< Count", Count=count + 1))

        try:
            await wait_until(as_before, SETTLE_S)
        except AssertionError:
            faults.append(f"{peer.name} has more processes than before")
    return faults


def _judge(run: Soak, faults: list[str], lasted_s: float, casts: int) -> Verdict:
    for (step, outcome), count in sorted(run.outcomes.items()):
        if outcome not in ALLOWED.get(step, ()):
            faults.append(f"{step} ended with {outcome}, {count} times")
    for step, (usual, _) in ALLOWED.items():
        if not run.outcomes[step, usual]:
            faults.append(f"no {step} has ended with {usual}")
    fifth = max(1, len(run.sizes) // 5)
    early, late = (statistics.median(part) for part in (run.sizes[fifth : 2 * fifth] or run.sizes, run.sizes[-fifth:]))
    if lasted_s >= WARM_S and late > early * (1 + GROWTH):
        faults.append(f"memory grew from {early / 2**20:.1f} to {late / 2**20:.1f} MiB")
    total = sum(run.outcomes.values())
    lines = [
        f"{lasted_s:.0f} s, {total} steps ({total / lasted_s:.0f} a second), {sum(run.cuts.values())} cuts: "
        + ", ".join(f"{count} {way}" for way, count in sorted(run.cuts.items())),
        f"resident size {early / 2**20:.1f} MiB in the second fifth, {late / 2**20:.1f} MiB in the last; "
        f"{casts} casts; {run.given_up} monitors given up while connecting",
        *(f"{step:14} {outcome:14} {count}" for (step, outcome), count in sorted(run.outcomes.items())),
        *(f"FAULT: {fault}" for fault in faults),
    ]
    return Verdict(lines, faults)


async def _main(seconds: float, seed: int) -> Verdict:
    print(f"seed {seed}", flush=True)
    async with beams() as beam:
        return await soak(seconds, seed, beam)


def main() -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    verdict = asyncio.run(_main(arguments.seconds, arguments.seed))
    text = "\n".join(verdict.lines)
    print(text)
    if arguments.report is not None:
        arguments.report.write_text(f"seed {arguments.seed}\n{text}\n")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
