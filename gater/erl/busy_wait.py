"""Looking for input for a moment before going to sleep, as the schedulers of a BEAM do (`+sbwt`).

A process that sleeps in the kernel is woken some 50 microseconds after its input has arrived; one that looks all the
time has it at once. Input rarely comes alone: the request is followed by the store's answer, the answer by the next
request. So after each input the loop goes on for a while without waiting in between, and for longer while an answer is
being waited for; if nothing comes, it sleeps. A process that has always something to do is not affected.

It costs processor time that nobody else wants, where there is a processor to spare. With only one the peer could not
run meanwhile: `on_this_machine` gives none then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from time import monotonic
from typing import Final

FOR_AN_ANSWER: Final = 3
"""Times as long it is waited while an answer is due: a store that writes takes longer than one that looks something
up."""


class BusyWait:
    """Keeps a loop from sleeping for `wait_s` seconds after each `input_came`, `FOR_AN_ANSWER` times as long while
    `answer_is_due()`."""

    __slots__ = ("_came", "_is_looking", "_loop", "_wait_s", "answer_is_due")

    def __init__(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        self._loop = loop
        self._wait_s = wait_s
        self._came = 0.0
        self._is_looking = False
        self.answer_is_due: Callable[[], bool] = lambda: False

    @classmethod
    def on_this_machine(cls, loop: asyncio.AbstractEventLoop, wait_s: float) -> BusyWait | None:
        """One where it makes sense: the time is not 0, and this process may use more than one processor."""
        return cls(loop, wait_s) if wait_s > 0 and len(os.sched_getaffinity(0)) > 1 else None

    def input_came(self) -> None:
        """There may soon be more."""
        self._came = monotonic()
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        waited, wait_s = monotonic() - self._came, self._wait_s
        if waited < wait_s or (waited < wait_s * FOR_AN_ANSWER and self.answer_is_due()):
            # The loop takes what input there is before it comes here again, and does not wait for any.
            self._loop.call_soon(self._look)
        else:
            self._is_looking = False
