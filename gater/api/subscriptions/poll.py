"""When to ask the store whether anything has changed. Pure.

The safety net below all hints (protocols.md, section 6, "What changed?"): the Raft index costs the store a fraction of
a millisecond whatever its size, so it is asked for often; only when it has moved are the event counts of the streams
asked for, which cost milliseconds per thousand streams. What counting costs is paid from a credit that grows at
`BUSY_SHARE` of the time: after quiet times counting follows a change at once, under steady load it is spread out.
Gateways ask the same node, so each takes its part of that share, and the more there are the less often it looks.
Reading the answer costs the gateway itself more than giving it costs the node: that is paid from a credit of its own.
"""

from __future__ import annotations

from collections import deque
from typing import Final

INDEX_S: Final = 0.1
"""Between two looks at the Raft index, of one gateway or two; of more of them each looks less often."""

LOOK_COST_S: Final = 0.0003
"""What a look at the index costs the store's node, whatever its size."""

LOOK_SHARE: Final = 0.006
"""How much of its time the store's node may spend on such looks, of all gateways together: four of them look every 0.2
s each, eight every 0.4 s."""

BUSY_SHARE: Final = 0.014
"""How much of its time the store's node may spend on counting; with the looks that makes 2 %."""

MAX_CREDIT_S: Final = 1.0
"""Credit that can be saved up: forty counts of 10,000 streams in a row, or three of 100,000."""

OWN_SHARE: Final = 0.1
"""How much of its own time a gateway may spend on reading counts."""

MAX_OWN_CREDIT_S: Final = 0.5
"""Credit of that kind that can be saved up: seven counts of 10,000 streams in a row."""

BLIND_S: Final = 5.0
"""Between two counts while the index cannot be read."""

CONFIRM_S: Final = 5.0
"""After the last count that followed a change the streams are counted once more: the member of the store that was
asked may have been behind the one that told the index."""

COSTS_KEPT: Final = 5
"""The quickest of so many counts says what one costs the store: what the others took longer, somebody else has used."""

UNKNOWN_COST_S: Final = 0.1
"""What one is taken to cost, at most, until there have been so many."""

ANSWER_S: Final = 10.0
"""After this time a question counts as failed, whoever should have answered it."""


class PollPlan:
    """Says when to ask. `index_due` and `counts_due` are asked at `deadline`, and after every answer."""

    def __init__(self, now: float) -> None:
        self.sharers = 1
        """Gateways that count the streams of this store, which share what its node may spend."""
        self._index: int | None = None
        self._counted_at: int | None = None
        """The index that was known when the last successful count began."""
        self._counting_at: int | None = None
        self._next_index = now
        self._next_blind = now
        self._credit = MAX_CREDIT_S
        self._own_credit = MAX_OWN_CREDIT_S
        self._own_cost = 0.0
        self._credit_at = now
        self._asked_index: float | None = None
        self._asked_counts: float | None = None
        self._costs: deque[float] = deque(maxlen=COSTS_KEPT)
        self._retry_at = now
        self._must = False
        self._confirm_at = float("inf")

    def index_due(self, now: float) -> bool:
        """Whether to ask for the index now; if so it counts as asked."""
        if self._asked_index is not None and now < self._asked_index + ANSWER_S:
            return False
        if now < self._next_index:
            return False
        self._asked_index = now
        self._next_index = now + max(INDEX_S, self.sharers * LOOK_COST_S / LOOK_SHARE)
        return True

    def index(self, value: int | None, now: float) -> None:
        """The answer: the index, or None."""
        self._asked_index = None
        if value is not None:
            self._index = value
        elif now >= self._next_blind:
            self._next_blind = now + BLIND_S
            self._must = True

    def counts_due(self, now: float) -> bool:
        """Whether to ask for the counts now; if so they count as asked."""
        if self._asked_counts is not None:
            if now < self._asked_counts + ANSWER_S:
                return False
            self._asked_counts = None
            self._must = True
        if not self._wants_counts(now) or now < self._affordable_at(now):
            return False
        self._asked_counts = now
        self._confirm_at = float("inf") if now >= self._confirm_at else now + CONFIRM_S
        self._counting_at = self._index
        self._must = False
        return True

    def counts(self, ok: bool, took_s: float, now: float, own_s: float = 0.0) -> None:
        """The answer came, or it failed: a member that does not answer is not kept busy by that."""
        self._asked_counts = None
        if ok:
            self.charge(took_s, now, own_s)
            self._counted_at = self._counting_at
        else:
            self._must = True
            self._retry_at = now + 1.0

    def charge(self, took_s: float, now: float, own_s: float = 0.0) -> None:
        """Streams were counted, which took the store so long, and reading the answer took `own_s`."""
        self._pay(now)
        self._own_cost = min(own_s, MAX_OWN_CREDIT_S)
        self._own_credit -= own_s
        self._costs.append(took_s)
        self._credit -= self._cost if len(self._costs) == COSTS_KEPT else min(took_s, UNKNOWN_COST_S)

    def doubt(self, now: float) -> None:
        """What was said to be there could not be read: either it is not, or the member that was read from is behind."""
        self._confirm_at = min(self._confirm_at, now + CONFIRM_S)

    @property
    def _cost(self) -> float:
        return min(self._costs) if len(self._costs) == COSTS_KEPT else 0.0

    def _wants_counts(self, now: float) -> bool:
        return self._must or self._index != self._counted_at or now >= self._confirm_at

    def deadline(self, now: float) -> float:
        """When something will be due."""
        index = self._next_index if self._asked_index is None else self._asked_index + ANSWER_S
        if self._asked_counts is not None:
            return min(index, self._asked_counts + ANSWER_S)
        if self._wants_counts(now):
            return min(index, self._affordable_at(now))
        return min(index, max(self._confirm_at, self._affordable_at(now)))

    def _affordable_at(self, now: float) -> float:
        self._pay(now)
        missing = min(self._cost, MAX_CREDIT_S) - self._credit
        own_missing = self._own_cost - self._own_credit
        return max(
            self._retry_at,
            now + missing * self.sharers / BUSY_SHARE if missing > 0 else now,
            now + own_missing / OWN_SHARE if own_missing > 0 else now,
        )

    def _pay(self, now: float) -> None:
        self._own_credit = min(MAX_OWN_CREDIT_S, self._own_credit + (now - self._credit_at) * OWN_SHARE)
        self._credit = min(MAX_CREDIT_S, self._credit + (now - self._credit_at) * BUSY_SHARE / self.sharers)
        self._credit_at = now
