"""Interval tree clocks: value by value what Swarm 3.4 computes, and the laws of the paper."""

import gzip
import json
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.errors import LimitExceeded, RemoteProtocolError
from gater.erl.etf import decode, encode
from gater.swarm import clock

CAPTURE = Path(__file__).parent / "captures" / "interval_tree_clock.json.gz"

APPLY = {
    "event": clock.event,
    "event3": lambda one: clock.event(clock.event(clock.event(one))),
    "peek": clock.peek,
    "join": clock.join,
    "fork": clock.fork,
    "compare": clock.compare,
    "leq": clock.leq,
}


def recorded():
    return json.loads(gzip.decompress(CAPTURE.read_bytes()))["ops"]


def test_every_recorded_operation_gives_the_recorded_clock():
    seen = set()
    for operation in recorded():
        inputs = [decode(bytes.fromhex(text)) for text in operation["in"]]
        result = APPLY[operation["op"]](*inputs)
        expected = operation["out"]
        if operation["op"] in ("compare", "leq"):
            assert result == expected, operation
        else:
            outputs = result if operation["op"] == "fork" else (result,)
            assert [encode(output).hex() for output in outputs] == expected, operation
        seen.add(operation["op"])
    assert seen == set(APPLY)


def test_recorded_clocks_are_within_our_limits():
    for operation in recorded():
        for text in operation["in"]:
            term = decode(bytes.fromhex(text))
            assert clock.checked(term) is term


@st.composite
def replicas(draw):
    """The clocks of some replicas after any history of forks, events and messages between them."""
    clocks = [clock.seed()]
    for step in draw(st.lists(st.tuples(st.sampled_from("feeemm"), st.integers(0, 9), st.integers(0, 9)), max_size=40)):
        kind, one, other = step[0], step[1] % len(clocks), step[2] % len(clocks)
        if kind == "f" and len(clocks) < 6:
            clocks[one], new = clock.fork(clocks[one])
            clocks.append(new)
        elif kind == "e":
            clocks[one] = clock.event(clocks[one])
        elif one != other:
            clocks[one] = clock.join(clocks[one], clock.peek(clocks[other]))
    return clocks


@given(replicas())
def test_an_event_is_seen_by_nobody_else(clocks):
    for one in clocks:
        after = clock.event(one)
        assert clock.compare(one, after) == "lt"
        assert all(not clock.leq(after, other) for other in clocks)


@given(replicas())
def test_joining_is_the_least_clock_that_has_seen_both(clocks):
    for one in clocks:
        for other in clocks:
            joined = clock.join(clock.peek(one), clock.peek(other))
            assert clock.leq(one, joined)
            assert clock.leq(other, joined)
            assert joined == clock.join(clock.peek(other), clock.peek(one))
            assert clock.compare(joined, one) == ("eq" if clock.leq(other, one) else "gt")


@given(replicas())
def test_all_replicas_joined_own_the_whole_interval_again(clocks):
    assert reduce(clock.join, clocks)[0] == 1


@given(replicas())
def test_comparing_is_the_same_from_both_sides(clocks):
    opposite = {"lt": "gt", "gt": "lt", "eq": "eq", "concurrent": "concurrent"}
    for one in clocks:
        for other in clocks:
            assert clock.compare(one, other) == opposite[clock.compare(other, one)]


def test_a_peeked_clock_cannot_count():
    for anonymous in ((0, 3), ((0, 0), 3), ((0, (0, 0)), (1, 0, 2))):
        assert clock.is_anonymous(anonymous)
        with pytest.raises(ValueError, match="without identity"):
            clock.event(anonymous)


def test_identities_that_overlap_join_into_one_that_covers_both():
    assert clock.join((1, 2), ((1, 0), 3)) == (1, 3)
    assert clock.join(((1, 0), 0), ((1, 0), 0)) == ((1, 0), 0)


@pytest.mark.parametrize(
    "term",
    [None, 5, (), (1,), (1, 0, 0), (2, 0), (-1, 0), (1, -1), ((1, 0, 0), 0), (1, (1, 2)), (1, ((0, 0, 0), 0, 0)),
     (1.0, 0), (True, 0), ([], 0), (b"", 0)],
)  # fmt: skip
def test_what_is_no_clock_is_refused(term):
    with pytest.raises(RemoteProtocolError):
        clock.checked(term)


def nested(depth):
    events = 0
    for _ in range(depth):
        events = (0, events, 1)
    return (1, events)


def bushy(depth):
    events = 0
    for _ in range(depth):
        events = (0, events, events)
    return (1, events)


@pytest.mark.parametrize(
    ("term", "limit"),
    [
        (nested(clock.MAX_CLOCK_DEPTH + 1), "MAX_CLOCK_DEPTH"),
        (bushy(14), "MAX_CLOCK_NODES"),
        ((1, clock.MAX_EVENT_COUNT + 1), "MAX_EVENT_COUNT"),
    ],
)
def test_a_clock_beyond_a_limit_is_refused(term, limit):
    with pytest.raises(LimitExceeded, match=limit):
        clock.checked(term)


def test_the_deepest_clock_we_accept_can_be_used():
    deep = clock.checked(nested(clock.MAX_CLOCK_DEPTH))
    assert clock.leq(deep, clock.event(clock.join(clock.seed(), clock.peek(deep))))
