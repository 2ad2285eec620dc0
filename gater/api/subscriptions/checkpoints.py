"""When a subscription's checkpoint is written, and what is in it. Pure.

A checkpoint is, for each stream, the number of the next event not dealt with: everything below it was acknowledged,
skipped, parked or not wanted. `Checkpoint` only remembers in which streams that number has moved; the numbers are asked
for when they are written, so they can never be ahead of acknowledgement.

One write is under way at a time. The next begins after `SAVE_EVENTS` acknowledgements or `SAVE_AFTER_S` after the first
one that is not in it; a failed one is repeated. So after a crash so many come again, and those that were acknowledged
during one write: when it is done the next begins at once if so many have gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

SAVE_EVENTS: Final = 100
"""Acknowledged events that may be delivered again after a crash."""

SAVE_AFTER_S: Final = 1.0
"""How far a checkpoint may be behind in time; also the pause after a write that failed."""

MAX_STREAMS_PER_SAVE: Final = 1_000
"""Streams in one write: some 30 kB, a few milliseconds of the store."""


class Checkpoint:
    """Which streams moved since they were last saved."""

    __slots__ = ("_acks", "_due", "_moved", "_not_before", "_token", "_writing")

    def __init__(self) -> None:
        self._moved: dict[bytes, None] = {}
        self._writing: list[bytes] = []
        self._token: int | None = None
        self._acks = 0
        self._due = float("inf")
        self._not_before = float("-inf")

    @property
    def unsaved(self) -> int:
        """Streams whose saved number is behind."""
        return len(self._moved) + len(self._writing)

    @property
    def deadline(self) -> float:
        """When `begin` will have something to do (infinity: not before something else happens)."""
        return float("inf") if self._token is not None else max(self._due, self._not_before)

    def moved(self, stream: bytes, now: float, events: int = 1) -> None:
        """The stream's number went up, by so many events."""
        if not self._moved:
            self._due = min(self._due, now + SAVE_AFTER_S)
        self._moved[stream] = None
        self._acks += events
        if self._acks >= SAVE_EVENTS:
            self._due = min(self._due, now)

    def moved_all(self, streams: Iterable[bytes], now: float) -> None:
        """These streams have numbers to be saved, soon."""
        self._moved.update(dict.fromkeys(streams))
        if self._moved:
            self._due = now

    def due(self, now: float) -> None:
        """Write now, even if there is nothing in it."""
        self._due = now

    def begin(
        self, token: int, position: Callable[[bytes], int], now: float, most: int = MAX_STREAMS_PER_SAVE
    ) -> dict[bytes, int] | None:
        """The positions to write now under `token`, at most so many, if a write is due."""
        return None if now < self.deadline else self._take(token, position, now, most)

    def last(self, token: int, position: Callable[[bytes], int], now: float) -> dict[bytes, int] | None:
        """Everything not known to be saved, due or not: for the last write before the subscription is given away."""
        self._moved.update(dict.fromkeys(self._writing))
        return self._take(token, position, now, len(self._moved)) if self._moved else None

    def written(self, token: int, ok: bool, now: float) -> None:
        """The write of `token` ended."""
        if token != self._token:
            return
        self._token = None
        if not ok:
            self._moved.update(dict.fromkeys(self._writing))
            self._due = self._not_before = now + SAVE_AFTER_S
        self._writing = []

    def _take(self, token: int, position: Callable[[bytes], int], now: float, most: int) -> dict[bytes, int]:
        self._token = token
        self._writing = list(islice(self._moved, most))
        for stream in self._writing:
            del self._moved[stream]
        self._acks = 0
        self._due = now if self._moved else float("inf")
        return {stream: position(stream) for stream in self._writing}
