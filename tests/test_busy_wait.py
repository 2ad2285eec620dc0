"""The busy wait: the loop goes round for a moment after each input, and only where there is a processor to spare."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from gater.erl import busy_wait
from gater.erl.busy_wait import BusyWait


class Loop(asyncio.AbstractEventLoop):
    """What was to be called in the next turn."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []

    def call_soon(self, callback, *args, context=None):  # type: ignore[no-untyped-def]
        self.soon.append(callback)

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()


def test_it_goes_round_until_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(busy_wait, "monotonic", lambda: clock[0])
    loop = Loop()
    wait = BusyWait(loop, 0.2)
    assert loop.soon == []
    wait.input_came()
    for clock[0] in (10.0, 10.1, 10.19):
        loop.turn()
        assert len(loop.soon) == 1
    wait.input_came()
    assert len(loop.soon) == 1, "it goes round once a turn, however much comes"
    clock[0] = 10.38
    loop.turn()
    assert len(loop.soon) == 1
    clock[0] = 10.4
    loop.turn()
    assert loop.soon == [], "the loop may sleep"
    wait.input_came()
    assert len(loop.soon) == 1


def test_it_goes_round_for_longer_while_an_answer_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, due = [10.0], [True]
    monkeypatch.setattr(busy_wait, "monotonic", lambda: clock[0])
    loop = Loop()
    wait = BusyWait(loop, 0.2)
    wait.answer_is_due = lambda: due[0]
    wait.input_came()
    for clock[0] in (10.1, 10.3, 10.59):
        loop.turn()
        assert len(loop.soon) == 1
    due[0] = False
    loop.turn()
    assert loop.soon == [], "it has come"
    due[0] = True
    wait.input_came()
    clock[0] += 0.61
    loop.turn()
    assert loop.soon == [], "it takes too long"


@pytest.mark.parametrize(("processors", "wait_s", "looks"), [(1, 0.2, False), (2, 0.2, True), (2, 0.0, False)])
def test_it_goes_round_where_that_is_wanted_and_a_processor_is_left(
    monkeypatch: pytest.MonkeyPatch, processors: int, wait_s: float, looks: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    loop = Loop()
    BusyWait(loop, wait_s).input_came()
    assert bool(loop.soon) is looks


def test_what_nobody_waits_for_is_done_when_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(busy_wait, "monotonic", lambda: clock[0])
    loop, done = Loop(), []
    wait = BusyWait(loop, 0.2)
    wait.input_came()
    for number in range(busy_wait.AT_ONCE + 1):
        wait.later(done.append, number)
    loop.turn()
    assert done == []
    clock[0] += busy_wait.QUIET_S * 1.1
    loop.turn()
    assert done == [[*range(busy_wait.AT_ONCE)]], "so many at a time: there may be input again"
    wait.input_came()
    loop.turn()
    assert len(done) == 1
    clock[0] += busy_wait.QUIET_S * 1.1
    loop.turn()
    assert done[1:] == [[busy_wait.AT_ONCE]]


def test_what_is_for_the_same_taker_is_done_together_and_in_its_order() -> None:
    loop, done = Loop(), []
    wait = BusyWait(loop, 0.0)
    for taker, number in ("a", 1), ("a", 2), ("b", 3), ("a", 4):
        wait.later({"a": done.append, "b": done.extend}[taker], number)
    wait.do_later()
    assert done == [[1, 2], 3, [4]]


def test_what_nobody_waits_for_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(busy_wait, "monotonic", lambda: clock[0])
    loop, done = Loop(), []
    wait = BusyWait(loop, 0.2)
    wait.later(done.extend, "late")
    while not done:
        assert clock[0] < 10.0 + 2 * busy_wait.LATER_S
        clock[0] += busy_wait.QUIET_S / 2
        wait.input_came()
        loop.turn()
    for number in range(busy_wait.MAX_LATER + 1):
        wait.later(done.extend, number)
    assert done == ["late", *range(busy_wait.MAX_LATER + 1)]
    wait.later(done.extend, "before")
    wait.do_later()
    assert done[-1] == "before"


def test_without_busy_waiting_it_is_done_in_the_next_turn() -> None:
    loop, done = Loop(), []
    wait = BusyWait(loop, 0.0)
    wait.later(done.extend, 1)
    wait.later(done.extend, 2)
    assert done == []
    loop.turn()
    assert done == [1, 2]
    loop.turn()
    assert loop.soon == []
