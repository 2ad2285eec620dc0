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


@pytest.mark.parametrize(("processors", "wait_s", "there"), [(1, 0.2, False), (2, 0.2, True), (2, 0.0, False)])
def test_it_is_there_where_it_is_wanted_and_a_processor_is_left(
    monkeypatch: pytest.MonkeyPatch, processors: int, wait_s: float, there: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    assert (BusyWait.on_this_machine(Loop(), wait_s) is not None) is there
