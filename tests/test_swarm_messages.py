"""The terms of the tracker protocol: read back as they are written, and nothing else is read."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.errors import RemoteProtocolError
from gater.erl.etf import decode, encode
from gater.erl.terms import Atom, ImproperList, Pid
from gater.swarm import messages
from gater.swarm.messages import (
    AddMeta,
    Handoff,
    HandOver,
    RemoveMeta,
    ReplicaEvent,
    StartAndTrack,
    Sync,
    SyncAck,
    SyncErr,
    SyncRecv,
    Track,
    Untrack,
    UpdateMeta,
    Whereis,
)
from gater.swarm.registry import Entry

HERE = Atom("a@h")
PID, TRACKER = Pid(HERE, 7, 0, 1), Pid(HERE, 1, 0, 1)
META = {Atom("grp"): True}
CLOCK = (0, (1, 0, 2))
CAST = Atom("$gen_cast")

MESSAGES = [
    ReplicaEvent(TRACKER, CLOCK, Track(b"n", PID, META)),
    ReplicaEvent(TRACKER, CLOCK, Untrack(PID)),
    ReplicaEvent(TRACKER, CLOCK, UpdateMeta({}, PID)),
    Sync(TRACKER, ((0, 1), 3)),
    SyncErr(Atom("node_ignored")),
    Handoff(TRACKER, b"n", {messages.MFA: (Atom("m"), Atom("f"), [])}, b"state", CLOCK),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_from_the_wire(message):
    term = decode(encode(messages.message_to_term(message)))
    if term[0] is CAST:
        term = term[1]
    assert messages.message_from_term(term) == message


@pytest.mark.parametrize("kind", [SyncRecv, SyncAck])
def test_a_registry_comes_back_from_the_wire_entry_by_entry(kind):
    sent = kind(TRACKER, ((0, 1), 3), [Entry(b"n", PID, META, ((1, 0), 5))])
    _, term = decode(encode(messages.message_to_term(sent)))
    received = messages.message_from_term(term)
    assert (type(received), received.sender, received.clock) == (kind, TRACKER, ((0, 1), 3))
    (entry,) = map(messages.entry_from_term, received.entries)
    # The identity of the clock stays at home.
    assert (entry.name, entry.pid, entry.meta, entry.clock) == (b"n", PID, META, (0, 5))
    assert messages.entry_from_term(entry) is entry


@pytest.mark.parametrize(
    ("term", "request_"),
    [
        ((Atom("whereis"), b"n"), Whereis(b"n")),
        ((Atom("track"), b"n", PID, {}), Track(b"n", PID, {})),
        ((Atom("track"), b"n", META), StartAndTrack(b"n", META)),
        ((Atom("untrack"), PID), Untrack(PID)),
        ((Atom("add_meta"), b"k", 1, PID), AddMeta(b"k", 1, PID)),
        ((Atom("remove_meta"), b"k", PID), RemoveMeta(b"k", PID)),
        ((Atom("handoff"), b"n", 5), HandOver(b"n", 5)),
    ],
)
def test_a_request_is_read(term, request_):
    assert messages.request_from_term(term) == request_
    if isinstance(request_, StartAndTrack):
        assert messages.request_to_term(request_) == term


def test_the_casts_of_a_conflict_are_known_and_mean_nothing():
    assert messages.message_from_term((Atom("track"), b"n", PID, {})) is None
    assert messages.message_from_term((Atom("untrack"), PID)) is None


@pytest.mark.parametrize(
    "term",
    [
        None,
        (),
        (Atom("sync"),),
        (Atom("sync"), TRACKER, 5),
        (Atom("sync"), b"pid", (1, 0)),
        (Atom("sync_recv"), TRACKER, (1, 0), ImproperList([1], 2)),
        (Atom("event"), TRACKER, CLOCK, (Atom("rename"), PID)),
        (Atom("event"), TRACKER, CLOCK, (Atom("track"), b"n", PID, [])),
        (Atom("handoff"), TRACKER, b"n"),
        (b"sync", TRACKER, (1, 0)),
    ],
)
def test_what_no_tracker_says_is_refused(term):
    with pytest.raises(RemoteProtocolError):
        messages.message_from_term(term)


@pytest.mark.parametrize("term", [None, (), (Atom("track"),), (Atom("untrack"), b"pid"), (Atom("forget"), PID)])
def test_what_nobody_asks_a_tracker_is_refused(term):
    with pytest.raises(RemoteProtocolError):
        messages.request_from_term(term)


def deep(levels):
    term = []
    for _ in range(levels):
        term = [term]
    return term


def test_a_refusal_of_a_deep_term_is_short():
    with pytest.raises(RemoteProtocolError) as refused:
        messages.message_from_term((Atom("sync"), deep(10_000), (1, 0)))
    assert len(str(refused.value)) < 400


terms = st.recursive(
    st.one_of(
        st.integers(-1, 3),
        st.booleans(),
        st.sampled_from(
            [Atom("track"), Atom("event"), Atom("entry"), PID, TRACKER, b"x", None, 1.5, (1, 0), CLOCK, {}]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(inner, max_size=6).map(tuple)),
    max_leaves=12,
)
tags = st.sampled_from([Atom(name) for name in ("event", "sync", "sync_recv", "sync_ack", "sync_err", "handoff")])


@given(st.one_of(terms, st.tuples(tags, terms), st.tuples(tags, terms, terms), st.tuples(tags, terms, terms, terms)))
def test_any_term_is_read_or_refused(term):
    for read in (messages.message_from_term, messages.request_from_term, messages.entry_from_term):
        with contextlib.suppress(RemoteProtocolError):
            read(term)
