"""What a node does between inputs: it looks for more for a moment before it sleeps, and does what nobody waits for.

*Looking.* A process that sleeps in the kernel is woken some 50 microseconds after its input has arrived; one that looks
all the time has it at once, as the schedulers of a BEAM do (`+sbwt`). Input rarely comes alone: the request is followed
by the store's answer, the answer by the next request. So after each input the loop goes on for a while without waiting
in between, and for longer while an answer is being waited for; if nothing comes, it sleeps. A process that has always
something to do is not affected. It costs processor time that nobody else wants: whoever has something to do gets the
processor at once (`sched_yield`). With only one processor nothing is looked for.

*What nobody waits for* (`later`) is done once nothing has come for `QUIET_S`, and after `LATER_S` in any case.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

FOR_AN_ANSWER: Final = 3
"""Times as long it is waited while an answer is due: a store that writes takes longer than one that looks something
up."""

QUIET_S: Final = 0.00005
"""How long nothing has come when there is time for what nobody waits for: what belongs together comes faster."""

LATER_S: Final = 0.001
"""How long that may wait when input comes all the time."""

MAX_LATER: Final = 256
"""How much of it may wait."""

AT_ONCE: Final = 32
"""How much of it is done at a time: that takes less than a millisecond, and done together it costs less."""


class BusyWait:
    """Keeps a loop from sleeping for `wait_s` seconds after each `input_came`, `FOR_AN_ANSWER` times as long while
    `answer_is_due()`. With 0 it never does, and there is time in the next turn of the loop."""

    __slots__ = ("_came", "_is_looking", "_later", "_later_since", "_loop", "answer_is_due", "wait_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        self.wait_s = wait_s if len(os.sched_getaffinity(0)) > 1 else 0.0
        self.answer_is_due: Callable[[], bool] = lambda: False
        self._loop = loop
        self._came = 0.0
        self._is_looking = False
        self._later: deque[tuple[Callable[[list[Any]], object], object]] = deque()
        self._later_since = 0.0

    def input_came(self) -> None:
        """There may soon be more."""
        if self.wait_s:
            self._came = monotonic()
            self._begin_to_look()
            if self._later and self._came - self._later_since > LATER_S:
                self.do_later()

    def later(self, take: Callable[[list[Any]], object], item: object) -> None:
        """Call `take` with a list in which `item` is, when there is time: at most `AT_ONCE` that came one after the
        other for the same `take`. It must not raise."""
        later = self._later
        if not later:
            self._later_since = monotonic()
            self._begin_to_look()
        later.append((take, item))
        if len(later) > MAX_LATER:
            self.do_later()

    def do_later(self) -> None:
        """Do all of that now: something follows that it has to come before."""
        left = len(self._later)
        while left > 0:
            left -= self._do_some()

    def _do_some(self) -> int:
        later = self._later
        take, item = later.popleft()
        items = [item]
        while later and later[0][0] == take and len(items) < AT_ONCE:
            items.append(later.popleft()[1])
        take(items)
        return len(items)

    def _begin_to_look(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        waited, wait_s = monotonic() - self._came, self.wait_s
        if self._later:
            self._go_on_looking()
            if not wait_s:
                self.do_later()
            elif waited >= QUIET_S:
                self._do_some()
        elif waited < wait_s or (waited < wait_s * FOR_AN_ANSWER and self.answer_is_due()):
            self._go_on_looking()
        else:
            self._is_looking = False

    def _go_on_looking(self) -> None:
        # Whoever has something to do comes first: without this, other processes of a busy machine wait for us.
        os.sched_yield()
        # The loop takes what input there is before it comes here again, and does not wait for any.
        self._loop.call_soon(self._look)
