"""Subscriptions while gateways and store nodes are killed: a short form of `chaos_subscriptions.py`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Final

from erlang_interop_tests.beam import Beams
from erlang_interop_tests.chaos import house
from erlang_interop_tests.chaos_subscriptions import Report, Seen, Stored, Wish, judge, run_chaos

CHAOS_S: Final = float(os.environ.get("GATER_TESTS_CHAOS_S", "12"))
EVENTS: Final = 1_000


async def test_every_subscription_gets_everything_in_order_whoever_dies(beam: Beams, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    async with house(beam, gaters=3) as home:
        report = await run_chaos(home, CHAOS_S, EVENTS, seed=seed, directory=tmp_path, longest_fault_s=1.5)
    assert not report.violations, report.text()
    assert report.events >= EVENTS
    assert report.faults
    assert all(got for _, got, _ in report.delivered.values()), report.text()


def judged(*seen: tuple[str, int], subscribers: int = 1) -> Report:
    """What is found when these events of stream `s`, which has four, are delivered; those of kind 1 are asked for."""
    report = Report(0, 0, [])
    wish = Wish("w", "by_stream", b"$all", lambda event: event.kind == 1, subscribers=subscribers)
    stored = [Stored(b"s", number, b"t", int(number != 1), b"") for number in range(4)]
    rows: list[Seen] = [(b"w", who, b"s", number) for who, number in seen]
    judge(stored, rows, [wish], report)
    return report


def test_the_judge_finds_what_is_missed_out_of_order_or_not_asked_for() -> None:
    assert not judged(("a", 0), ("a", 2), ("a", 0), ("a", 2), ("a", 3)).violations
    assert judged(("a", 0), ("a", 2)).violations == {"missed": 1}
    assert judged(("a", 0), ("a", 3), ("a", 2)).violations == {"out of order": 1}
    assert judged(("a", 0), ("a", 1), ("a", 2), ("a", 3)).violations == {"not asked for": 1}
    assert not judged(("a", 0), ("b", 3), ("a", 2), subscribers=2).violations
