"""Looking for input for a moment before going to sleep, as the schedulers of a BEAM do (`+sbwt`).

A process that sleeps in the kernel is woken some 50 microseconds after its input has arrived; one that looks all the
time has it at once. Input rarely comes alone: the request is followed by the store's answer, the answer by the next
request. So after each input the loop goes on for a while without waiting in between; if nothing comes, it sleeps. A
process that has always something to do is not affected.

It costs processor time that nobody else wants, where there is a processor to spare. With only one the peer could not
run meanwhile: `on_this_machine` gives none then.
"""

from __future__ import annotations

import asyncio
import os
from time import monotonic


class BusyWait:
    """Keeps a loop from sleeping for `wait_s` seconds after each `input_came`."""

    __slots__ = ("_is_looking", "_loop", "_until", "_wait_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        self._loop = loop
        self._wait_s = wait_s
        self._until = 0.0
        self._is_looking = False

    @classmethod
    def on_this_machine(cls, loop: asyncio.AbstractEventLoop, wait_s: float) -> BusyWait | None:
        """One where it makes sense: the time is not 0, and this process may use more than one processor."""
        return cls(loop, wait_s) if wait_s > 0 and len(os.sched_getaffinity(0)) > 1 else None

    def input_came(self) -> None:
        """There may soon be more."""
        self._until = monotonic() + self._wait_s
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        if monotonic() < self._until:
            # The loop takes what input there is before it comes here again, and does not wait for any.
            self._loop.call_soon(self._look)
        else:
            self._is_looking = False
