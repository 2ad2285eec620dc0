"""Interval tree clocks, as Swarm uses them to say which of two views of a registration is newer.

Follows Almeida, Baquero and Fonte, "Interval Tree Clocks" (2008), in the form of `Swarm.IntervalTreeClock` (Swarm 3.4,
`lib/swarm/tracker/crdt.ex`), whose terms these are: a clock is `(identity, events)`. An identity is `0` (nothing),
`1` (the whole interval) or a pair of identities for its two halves; events are a count, or `(n, left, right)`: `n`
everywhere plus what the halves saw besides. Every value is a plain tuple of integers: a clock read from the wire is
used, and sent, as it is.

Left to others: when a clock advances (`tracker.py`).
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from gater.erl.errors import LimitExceeded, RemoteProtocolError

Identity: TypeAlias = Any
"""`0`, `1` or `(Identity, Identity)`."""
Events: TypeAlias = Any
"""`int` or `(int, Events, Events)`."""
Clock: TypeAlias = tuple[Identity, Events]
"""An identity and the events seen."""

Comparison: TypeAlias = Literal["lt", "gt", "eq", "concurrent"]

MAX_CLOCK_DEPTH: Final = 128
"""How deep a clock from a peer may be nested. Each fork adds a level at most, and a cluster of 2^10 nodes forks into
about ten; 128 leaves room for long churn and keeps our recursion far from Python's own limit."""

MAX_CLOCK_NODES: Final = 4_096
"""How many integers one clock from a peer may hold: a member that is cut and joined a thousand times stays below."""

MAX_EVENT_COUNT: Final = 1 << 64
"""The highest count a clock from a peer may hold. Nobody counts that far; without a bound a count is a way to send us
numbers of a megabyte each."""

_DEEPENING: Final = 100_000
"""Growing a leaf into a node costs this much more than counting further (Swarm's value): trees stay shallow."""


def seed() -> Clock:
    """The clock of a tracker that starts alone: the whole interval, no event."""
    return (1, 0)


def fork(clock: Clock) -> tuple[Clock, Clock]:
    """Two clocks with the same past and half of this identity each: one for us, one for a new replica."""
    identity, events = clock
    left, right = _split(identity)
    return (left, events), (right, events)


def join(first: Clock, second: Clock) -> Clock:
    """One clock that has seen what either has, and owns what either owned."""
    return _sum(first[0], second[0]), _join_events(first[1], second[1])


def peek(clock: Clock) -> Clock:
    """What this clock has seen, without its identity: the form that travels in messages."""
    return (0, clock[1])


def event(clock: Clock) -> Clock:
    """The clock after one more event; strictly greater than before.

    Raises:
        ValueError: the clock has no identity (it was peeked), so it cannot count.
    """
    identity, events = clock
    if is_anonymous(clock):
        raise ValueError("a clock without identity cannot record an event")
    filled = _fill(identity, events)
    if filled != events:
        return identity, filled
    return identity, _grow(identity, events)[1]


def leq(first: Clock, second: Clock) -> bool:
    """Has `second` seen everything `first` has?"""
    return _leq_events(first[1], second[1])


def compare(first: Clock, second: Clock) -> Comparison:
    """How `first` stands to `second`: `lt` and `gt` are strict, `concurrent` means each has seen something alone."""
    if first[1] == second[1]:
        return "eq"
    if _leq_events(first[1], second[1]):
        return "eq" if _leq_events(second[1], first[1]) else "lt"
    return "gt" if _leq_events(second[1], first[1]) else "concurrent"


def is_anonymous(clock: Clock) -> bool:
    """Does this clock own no part of the interval (`0`, or halves that own nothing)?"""
    return _is_empty(clock[0])


def identity_depth(clock: Clock) -> int:
    """How often this identity was divided: 0 for the whole interval."""

    def depth(identity: Identity) -> int:
        return 0 if type(identity) is int else 1 + max(depth(identity[0]), depth(identity[1]))

    return depth(clock[0])


def checked(term: object) -> Clock:
    """`term` if it is a clock within our limits.

    Raises:
        RemoteProtocolError: it is not `{identity, events}`.
        LimitExceeded: it is deeper, larger or counts further than we follow.
    """
    if type(term) is not tuple or len(term) != 2:
        raise RemoteProtocolError("a clock is a pair of an identity and events")
    budget = [MAX_CLOCK_NODES]
    _check(term[0], 2, 0, budget)
    _check(term[1], 3, 0, budget)
    return term


def _check(term: object, arity: int, depth: int, budget: list[int]) -> None:
    budget[0] -= 1
    if budget[0] < 0:
        raise LimitExceeded("MAX_CLOCK_NODES", MAX_CLOCK_NODES)
    if type(term) is int:
        if term < 0 or (arity == 2 and term > 1):
            raise RemoteProtocolError("a clock holds a number that no clock holds")
        if term > MAX_EVENT_COUNT:
            raise LimitExceeded("MAX_EVENT_COUNT", MAX_EVENT_COUNT)
        return
    if type(term) is not tuple or len(term) != arity:
        raise RemoteProtocolError("a clock is built of pairs, triples and integers")
    if depth == MAX_CLOCK_DEPTH:
        raise LimitExceeded("MAX_CLOCK_DEPTH", MAX_CLOCK_DEPTH)
    if arity == 3 and type(term[0]) is not int:
        raise RemoteProtocolError("the first element of an event node is a count")
    for part in term:
        _check(part, arity, depth + 1, budget)


def _is_empty(identity: Identity) -> bool:
    if type(identity) is int:
        return identity == 0
    return _is_empty(identity[0]) and _is_empty(identity[1])


def _sum(first: Identity, second: Identity) -> Identity:
    if first == 0:
        return second
    if second == 0:
        return first
    if first == 1 or second == 1:
        # Swarm has no clause for identities that overlap; joining its clocks must not stop us.
        return 1
    left, right = _sum(first[0], second[0]), _sum(first[1], second[1])
    if left == right and type(left) is int:
        return left
    return left, right


def _split(identity: Identity) -> tuple[Identity, Identity]:
    if type(identity) is int:
        return ((1, 0), (0, 1)) if identity else (0, 0)
    left, right = identity
    if left == 0:
        first, second = _split(right)
        return (0, first), (0, second)
    if right == 0:
        first, second = _split(left)
        return (first, 0), (second, 0)
    return (left, 0), (0, right)


def _leq_events(first: Events, second: Events) -> bool:
    if type(first) is int:
        return bool(first <= (second if type(second) is int else second[0]))
    n1, left1, right1 = first
    if type(second) is int:
        return bool(n1 <= second) and _leq_events(_lift(n1, left1), second) and _leq_events(_lift(n1, right1), second)
    n2, left2, right2 = second
    return (
        bool(n1 <= n2)
        and _leq_events(_lift(n1, left1), _lift(n2, left2))
        and _leq_events(_lift(n1, right1), _lift(n2, right2))
    )


def _join_events(first: Events, second: Events) -> Events:
    if type(first) is int:
        if type(second) is int:
            return first if first >= second else second
        first = (first, 0, 0)
    elif type(second) is int:
        second = (second, 0, 0)
    if first[0] > second[0]:
        first, second = second, first
    n, left, right = first
    above = second[0] - n
    return _normal(n, _join_events(left, _lift(above, second[1])), _join_events(right, _lift(above, second[2])))


def _normal(n: int, left: Events, right: Events) -> Events:
    if left == right and type(left) is int:
        return n + left
    low = min(_base(left), _base(right))
    return n + low, _lift(-low, left), _lift(-low, right)


def _fill(identity: Identity, events: Events) -> Events:
    if identity == 0 or type(events) is int:
        return events
    if identity == 1:
        return _height(events)
    left_identity, right_identity = identity
    n, left, right = events
    if left_identity == 1:
        right = _fill(right_identity, right)
        return _normal(n, max(_height(left), _base(right)), right)
    if right_identity == 1:
        left = _fill(left_identity, left)
        return _normal(n, left, max(_height(right), _base(left)))
    return _normal(n, _fill(left_identity, left), _fill(right_identity, right))


def _grow(identity: Identity, events: Events) -> tuple[int, Events]:
    """The cheapest way to count one more inside `identity`: its cost, and the events then."""
    if type(events) is int:
        if identity == 1:
            return 0, events + 1
        cost, grown = _grow(identity, (events, 0, 0))
        return cost + _DEEPENING, grown
    left_identity, right_identity = identity
    n, left, right = events
    if _is_empty(left_identity):
        cost, grown = _grow(right_identity, right)
        return cost + 1, (n, left, grown)
    if _is_empty(right_identity):
        cost, grown = _grow(left_identity, left)
        return cost + 1, (n, grown, right)
    left_cost, left_grown = _grow(left_identity, left)
    right_cost, right_grown = _grow(right_identity, right)
    if left_cost < right_cost:
        return left_cost + 1, (n, left_grown, right)
    return right_cost + 1, (n, left, right_grown)


def _height(events: Events) -> int:
    if type(events) is int:
        return events
    return int(events[0]) + max(_height(events[1]), _height(events[2]))


def _base(events: Events) -> int:
    return events if type(events) is int else int(events[0])


def _lift(by: int, events: Events) -> Events:
    if by == 0:
        return events
    if type(events) is int:
        return events + by
    return events[0] + by, events[1], events[2]
