"""The stand-in keeps Raft's promise while its members are killed, frozen and cut off.

What gateways promise is tested against the stand-in, so the stand-in must not be the one that loses events: a guarded
put that was answered `ok` is in the store, once, at its number; a refused one is not.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from typing import Final

from erlang_interop_tests.beam import BeamError, BeamFailure, wait_until
from erlang_interop_tests.standin import StandInCluster
from gater.erl.terms import Atom

SECONDS: Final = float(os.environ.get("GATER_TESTS_STANDIN_CHAOS_S", "6"))
ENOUGH: Final = 100
PATIENCE_S: Final = 60.0
"""A busy machine goes on until there was something to see."""
STREAMS: Final = 4
WRITERS_PER_STREAM: Final = 2
PUT_TIMEOUT_MS: Final = 1_500

GUARDED_PUT: Final = """
path =
  if expected == 0,
    do: [:streams, stream, {:if_all, ["000000", {:if_node_exists, false}]}],
    else: [
      :streams,
      {:if_all, [stream, {:if_child_list_length, expected}]},
      {:if_all, [ExESDB.StreamsHelper.pad_version(expected, 6), {:if_node_exists, false}]}
    ]
:khepri.put(:reg_gh, path, token, %{timeout: timeout})
"""
LENGTH: Final = """
case :khepri.fence(:reg_gh, timeout) do
  :ok -> elem(:khepri.count(:reg_gh, [:streams, stream, {:if_node_exists, true}]), 1)
  _ -> nil
end
"""


class Writer:
    """Puts events of its own into a stream, through any member, and remembers what it was answered."""

    def __init__(self, cluster: StandInCluster, stream: bytes, first_token: int) -> None:
        self.stream = stream
        self.acknowledged: dict[int, int] = {}
        self.refused: set[int] = set()
        self._cluster = cluster
        self._tokens = itertools.count(first_token)

    async def run(self, stop: asyncio.Event) -> None:
        expected: int | None = 0
        while not stop.is_set():
            node = random.choice(self._cluster.members)
            try:
                if expected is None:
                    expected = await node.eval(LENGTH, stream=self.stream, timeout=PUT_TIMEOUT_MS, timeout_s=3)
                    continue
                token = next(self._tokens)
                answer = await node.eval(
                    GUARDED_PUT,
                    stream=self.stream,
                    expected=expected,
                    token=token,
                    timeout=PUT_TIMEOUT_MS,
                    timeout_s=3,
                )
            except (BeamError, BeamFailure):
                expected = None
                await asyncio.sleep(0.02)
                continue
            if answer is Atom("ok"):
                self.acknowledged[expected] = token
                expected += 1
            else:
                if answer[1] is not Atom("timeout") and answer[1] is not Atom("noproc"):
                    self.refused.add(token)
                expected = None


async def trouble(cluster: StandInCluster, chooser: random.Random, stop: asyncio.Event) -> None:
    """One fault at a time, each for up to a second and a half, then a pause."""
    while not stop.is_set():
        member = chooser.randrange(len(cluster.members))
        duration = chooser.uniform(0.2, 1.5)
        match chooser.choice(["kill", "freeze", "cut"]):
            case "kill":
                await cluster.kill(member)
                await asyncio.sleep(duration)
                await cluster.restart(member)
            case "freeze":
                cluster.members[member].freeze()
                await asyncio.sleep(duration)
                cluster.members[member].thaw()
            case "cut":
                others = [name for name in cluster.names if name != cluster.names[member]]
                await cluster.cut(member, others)
                await asyncio.sleep(duration)
                await cluster.heal(member, others)
        await asyncio.sleep(chooser.uniform(0.1, 1.0))


async def test_guarded_puts_survive_kills_freezes_and_cuts(standin_of_three: StandInCluster) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    stop = asyncio.Event()
    numbers = range(STREAMS * WRITERS_PER_STREAM)
    writers = [Writer(standin_of_three, f"stream-{n % STREAMS}".encode(), n * 1_000_000) for n in numbers]
    running = [asyncio.create_task(writer.run(stop)) for writer in writers]
    troublemaker = asyncio.create_task(trouble(standin_of_three, random.Random(seed), stop))
    await asyncio.sleep(SECONDS)

    def enough() -> bool:
        refused = any(writer.refused for writer in writers)
        return refused and sum(len(writer.acknowledged) for writer in writers) > ENOUGH

    await wait_until(enough, PATIENCE_S, what=f"{ENOUGH} puts acknowledged, and some refused")
    stop.set()
    await asyncio.gather(*running, troublemaker)
    await standin_of_three.wait_ready()
    for member in range(3):
        for writer in writers:
            stored = await standin_of_three.events(writer.stream.decode(), member=member)
            assert {number: stored[number] for number in writer.acknowledged} == writer.acknowledged
            assert len(set(stored)) == len(stored)
            assert not writer.refused & set(stored)
    acknowledged = sum(len(writer.acknowledged) for writer in writers)
    print(f"{acknowledged} puts acknowledged, {sum(len(writer.refused) for writer in writers)} refused")
