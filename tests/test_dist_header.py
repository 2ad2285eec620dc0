"""The distribution header: what one side writes the other reads, whatever is interleaved, replaced or cut."""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gater.erl.dist_header import CACHE_SIZE, HeaderReader, HeaderWriter, Message, OutgoingMessage
from gater.erl.errors import DecodeError, EncodeError, LimitExceeded, RemoteProtocolError
from gater.erl.etf import AtomTable, decode_spine, decode_term, encode_term, to_plain
from gater.erl.terms import Atom, EncodedTerm, Pid, Term, atom

CONTROL = (22, Pid(Atom("gate@host"), 1, 2, 3), Pid(Atom("caller@host"), 4, 5, 6))


def frame_of(pieces: list[bytes]) -> bytes:
    return b"".join(pieces)


def terms_of(message: Message | None) -> list[Term]:
    """All terms of a message; its bytes must end with the last one."""
    assert message is not None
    found, pos = [], message.pos
    while pos < len(message.data):
        start = pos
        term, pos = decode_term(message.data, pos, AtomTable(), message.atoms)
        assert decode_term(to_plain(message.data, start, message.atoms), 0, AtomTable())[0] == term
        found.append(term)
    assert pos == len(message.data)
    return found


def atoms_named(prefix: str, numbers: range) -> tuple[Atom, ...]:
    return tuple(Atom(f"{prefix}{number}") for number in numbers)


@pytest.fixture
def reader() -> HeaderReader:
    return HeaderReader(AtomTable())


# Bytes of the document and of a BEAM


def test_a_header_without_atoms_is_three_bytes(reader: HeaderReader) -> None:
    assert frame_of(HeaderWriter().message((1, b"x")).frame()) == b"\x83D\0" + encode_term((1, b"x"))
    assert terms_of(reader.receive(b"\x83D\0a\x01")) == [1]


def test_new_and_known_atoms_are_read_as_the_document_says(reader: HeaderReader) -> None:
    first = reader.receive(b"\x83D\x03" + b"\x98\x08" + b"\x05\x01a" + b"\x07\x02bc" + b"\x05\0" + b"h\x03R\0R\1R\2")
    assert terms_of(first) == [(Atom("a"), Atom("bc"), Atom(""))]
    # The third atom replaced the first one: both stand at place 5 of segment 0.
    second = reader.receive(b"\x83D\x02" + b"\x10\0" + b"\x05\x07" + b"h\x02R\0R\1")
    assert terms_of(second) == [(Atom(""), Atom("bc"))]


def test_long_atoms_have_lengths_of_two_bytes(reader: HeaderReader) -> None:
    text = ("é" * 200).encode()
    data = b"\x83D\x01" + b"\x18" + b"\0" + len(text).to_bytes(2, "big") + text + b"R\0"
    assert terms_of(reader.receive(data)) == [Atom("é" * 200)]
    assert terms_of(reader.receive(b"\x83D\x02\x80\x01\0\x01\0\x02okR\1")) == [Atom("ok")]


def test_true_false_and_nil_can_stand_in_the_cache(reader: HeaderReader) -> None:
    data = b"\x83D\x03\x88\x08\0\x04true\1\x05false\2\x03nilh\x03R\0R\1R\2"
    assert terms_of(reader.receive(data)) == [(True, False, None)]


# One side writes, the other reads


def test_an_atom_is_sent_in_full_once(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    term = (Atom("a_rather_long_name"), Pid(Atom("node@host"), 1, 2, 3), [Atom("a_rather_long_name")])
    first, second = (frame_of(writer.message(term).frame()) for _ in range(2))
    assert first.count(b"a_rather_long_name") == 1
    assert second.count(b"a_rather_long_name") == second.count(b"node@host") == 0
    assert terms_of(reader.receive(first)) == terms_of(reader.receive(second)) == [term]


def test_a_small_message_makes_no_use_of_the_cache_and_a_long_one_does(reader: HeaderReader) -> None:
    writer = HeaderWriter()
    small: Term = (Atom("$gen_call"), (CONTROL[1], [Atom("alias")]), (Atom("append"), {Atom("key"): Atom("value")}))
    for _ in range(2):
        frame = frame_of(writer.message(CONTROL, small).frame())
        assert frame == b"\x83D\0" + encode_term(CONTROL) + encode_term(small)
    long = [{Atom(f"key {number}"): Atom("value") for number in range(10)}] * 100
    for times in (1, 0):
        frame = frame_of(writer.message(CONTROL, long).frame())
        assert frame.count(b"key 5") == times
        assert terms_of(reader.receive(frame)) == [CONTROL, long]


def test_a_control_message_and_its_payload_share_a_header(reader: HeaderReader) -> None:
    message = HeaderWriter(0).message((2, None, Atom("to")), [Atom("to"), b"x"])
    assert terms_of(reader.receive(frame_of(message.frame()))) == [(2, None, Atom("to")), [Atom("to"), b"x"]]


def test_atoms_beyond_the_255th_of_a_message_are_sent_in_full(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    term = atoms_named("atom_", range(300)) * 2
    for _ in range(2):
        frame = frame_of(writer.message(term).frame())
        assert frame[2] == 255
        assert terms_of(reader.receive(frame)) == [term]


@pytest.mark.parametrize("size", [1, 2, 254, 255])
def test_flags_are_packed_for_odd_and_even_counts(reader: HeaderReader, size: int) -> None:
    writer = HeaderWriter(0)
    for term in (atoms_named("a", range(size)), (*atoms_named("a", range(size - 1)), Atom("é" * 255))):
        assert terms_of(reader.receive(frame_of(writer.message(term).frame()))) == [term]


def test_the_cache_replaces_atoms_when_it_is_full(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    for start in (*range(0, 3 * CACHE_SIZE, 200), 0, 100, CACHE_SIZE - 100, 2 * CACHE_SIZE - 50):
        term = atoms_named("cached_", range(start, start + 250))
        assert terms_of(reader.receive(frame_of(writer.message(term).frame()))) == [term]


def test_a_message_never_uses_one_place_for_two_atoms(reader: HeaderReader) -> None:
    """An atom of the message may stand where the round of replacements arrives while the message is being written."""
    writer = HeaderWriter(0)
    for start in range(0, CACHE_SIZE, 128):
        reader.receive(frame_of(writer.message(atoms_named("old_", range(start, start + 128))).frame()))
    mixed = (*atoms_named("new_", range(100)), *atoms_named("old_", range(100)))
    assert terms_of(reader.receive(frame_of(writer.message(mixed).frame()))) == [mixed]
    again = (*atoms_named("old_", range(50, 150)), *atoms_named("new_", range(100)))
    assert terms_of(reader.receive(frame_of(writer.message(again).frame()))) == [again]


def test_a_message_that_cannot_be_encoded_leaves_the_cache_alone(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    with pytest.raises(EncodeError):
        writer.message((Atom("never_sent"), object()))
    frame = frame_of(writer.message(Atom("never_sent")).frame())
    assert b"never_sent" in frame
    assert terms_of(reader.receive(frame)) == [Atom("never_sent")]


# Fragments


def test_a_large_message_is_cut_and_put_together(reader: HeaderReader) -> None:
    control, payload = (2, None, Atom("to")), [Atom("ok"), bytes(1000), [b"x" * 10] * 50, bytes(range(256))]
    frames = list(HeaderWriter().message(control, payload).fragments(77, 100))
    assert len(frames) > 15
    assert all(len(frame_of(frame)) <= 100 + 18 for frame in frames)
    *before, last = (reader.receive(frame_of(frame)) for frame in frames)
    assert before == [None] * len(before)
    assert terms_of(last) == [control, payload]
    assert (reader.open_sequences, reader.open_bytes) == (0, 0)


def test_a_message_of_one_fragment_is_whole_at_once(reader: HeaderReader) -> None:
    (frame,) = HeaderWriter().message((1, Atom("a")), b"x").fragments(1)
    assert terms_of(reader.receive(frame_of(frame))) == [(1, Atom("a")), b"x"]


def test_the_control_message_is_never_cut(reader: HeaderReader) -> None:
    control = (1, b"c" * 500)
    first, *others = HeaderWriter().message(control, b"p" * 100).fragments(1, 100)
    assert frame_of(first).endswith(encode_term(control))
    assert len(others) == 2


def test_atoms_of_a_first_fragment_are_known_before_its_message_is_complete(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    first, *others = writer.message((1, Atom("early")), bytes(300)).fragments(1, 100)
    small = writer.message((Atom("early"), Atom("late")))
    assert reader.receive(frame_of(first)) is None
    assert terms_of(reader.receive(frame_of(small.frame()))) == [(Atom("early"), Atom("late"))]
    assert [terms_of(m) for m in map(reader.receive, map(frame_of, others)) if m] == [[(1, Atom("early")), bytes(300)]]


class Conversation(RuleBasedStateMachine):
    """A sender with many messages under way and the peer that must read each of them as it was meant."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = HeaderWriter(8)
        self.reader = HeaderReader(AtomTable())
        self.sequence_ids = count(1)
        self.under_way: list[tuple[list[Term], deque[bytes]]] = []

    terms = st.recursive(
        st.one_of(
            st.integers(0, 3000).map(lambda number: Atom(f"atom {number}")),
            st.sampled_from([True, None, Atom("é" * 255), Atom("x" * 255), 5, b"bytes" * 20]),
            st.integers(0, 2900).map(lambda start: atoms_named("atom ", range(start, start + 260))),
        ),
        lambda inner: st.lists(inner, max_size=5),
        max_leaves=12,
    )

    def written(self, control: Term, payload: list[Term]) -> tuple[OutgoingMessage, list[Term]]:
        return self.writer.message(control, *payload), [control, *payload]

    @rule(control=terms, payload=st.lists(terms, max_size=1))
    def send_whole(self, control: Term, payload: list[Term]) -> None:
        message, expected = self.written(control, payload)
        assert terms_of(self.reader.receive(frame_of(message.frame()))) == expected

    @rule(control=terms, payload=terms, size=st.integers(1, 3000))
    def begin(self, control: Term, payload: Term, size: int) -> None:
        message, expected = self.written(control, [payload])
        frames = deque(map(frame_of, message.fragments(next(self.sequence_ids), size)))
        self.under_way.append((expected, frames))
        self.go_on(len(self.under_way) - 1)

    @rule(which=st.integers(0, 1000))
    def go_on(self, which: int) -> None:
        if not self.under_way:
            return
        which %= len(self.under_way)
        expected, frames = self.under_way[which]
        message = self.reader.receive(frames.popleft())
        if frames:
            assert message is None
        else:
            assert terms_of(message) == expected
            del self.under_way[which]

    @rule(control=terms)
    def fail_to_encode(self, control: Term) -> None:
        with pytest.raises(EncodeError):
            self.writer.message(control, object())

    @invariant()
    def nothing_is_held_for_messages_that_are_complete(self) -> None:
        assert self.reader.open_sequences == len(self.under_way)
        assert self.under_way or not self.reader.open_bytes


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


# Passing on


def relayed(message: Message | None, levels: int = 2) -> Term:
    """What a relay knows of the payload of a message."""
    assert message is not None
    _, pos = decode_term(message.data, message.pos, AtomTable(), message.atoms)
    return decode_spine(message.data, pos, levels, AtomTable(), message.atoms)


def last_of(spine: Term) -> EncodedTerm:
    while type(spine) is tuple:
        spine = spine[-1]
    assert type(spine) is EncodedTerm
    return spine


def test_a_term_is_passed_on_as_it_came(reader: HeaderReader) -> None:
    store, gate = HeaderWriter(0), HeaderWriter()
    arriving = HeaderReader(AtomTable())
    reply = (Atom("tag"), (Atom("ok"), [{Atom("kind"): Atom("thing"), Atom("long " * 50): True}] * 3))
    for number in range(3):
        spine = relayed(arriving.receive(frame_of(store.message((number, Atom("worker")), reply).frame())))
        came = last_of(spine).data
        assert b"thing" not in came
        frame = frame_of(gate.message(CONTROL, (Atom("other tag"), spine[1])).frame())
        assert frame.endswith(came)
        assert frame.count(b"thing") == (number == 0)
        assert terms_of(reader.receive(frame)) == [CONTROL, (Atom("other tag"), reply[1])]


def test_a_term_with_255_atoms_is_passed_on_as_it_came(reader: HeaderReader) -> None:
    term = EncodedTerm(
        b"l\0\0\0\xff" + b"".join(b"R%c" % index for index in range(255)) + b"j", atoms=atoms_named("a", range(255))
    )
    frame = frame_of(HeaderWriter().message(CONTROL, (Atom("a7"), term)).frame())
    assert frame.endswith(term.data)
    assert terms_of(reader.receive(frame)) == [CONTROL, (Atom("a7"), list(term.atoms))]


def test_of_two_terms_with_their_own_atoms_the_second_is_rewritten(reader: HeaderReader) -> None:
    one = EncodedTerm(b"h\2R\0R\1", atoms=(Atom("a"), Atom("b")))
    other = EncodedTerm(b"h\2R\1R\0", atoms=(Atom("c"), Atom("a")))
    frame = frame_of(HeaderWriter().message(CONTROL, [one, other, one]).frame())
    a, b, c = Atom("a"), Atom("b"), Atom("c")
    assert terms_of(reader.receive(frame)) == [CONTROL, [(a, b), (a, c), (a, b)]]
    assert frame.count(one.data) == 2


def test_a_term_in_the_middle_of_a_message_is_passed_on_as_it_came(reader: HeaderReader) -> None:
    term = EncodedTerm(b"h\2R\0R\1", atoms=(Atom("a"), Atom("b")))
    frame = frame_of(HeaderWriter().message(CONTROL, [Atom("b"), (Atom("x"), term), Atom("y")]).frame())
    assert term.data in frame
    expected = [Atom("b"), (Atom("x"), (Atom("a"), Atom("b"))), Atom("y")]
    assert terms_of(reader.receive(frame)) == [CONTROL, expected]


def test_the_atoms_of_what_is_passed_on_may_be_named_twice_or_be_true_false_and_nil(reader: HeaderReader) -> None:
    writer = HeaderWriter(0)
    atoms = (Atom("a"), True, Atom("a"), None, False, Atom("é" * 200), None, Atom("a"))
    term = EncodedTerm(b"h\x08" + b"".join(b"R%c" % index for index in range(8)), atoms=atoms)
    for message in ((Atom("a"), term), (Atom("a"), None, Atom("b"), term), (True, term), Atom("a"), term):
        expected = (*message[:-1], atoms) if isinstance(message, tuple) else atoms if message is term else message
        assert terms_of(reader.receive(frame_of(writer.message(message).frame()))) == [expected]


def test_what_cannot_be_passed_on_leaves_the_cache_alone(reader: HeaderReader) -> None:
    writer = HeaderWriter()
    fine = EncodedTerm(b"R\0", atoms=(Atom("a"),))
    with pytest.raises(EncodeError, match="passed on"):
        writer.message(CONTROL, [fine, EncodedTerm(b"R\1", atoms=(Atom("b"),))])
    frame = frame_of(writer.message(CONTROL, fine).frame())
    assert frame.count(b"\x01a") == 1
    assert terms_of(reader.receive(frame)) == [CONTROL, Atom("a")]


class Relay(RuleBasedStateMachine):
    """A relay between three peers: whatever the caches hold, a term arrives as it was sent, and later too."""

    def __init__(self) -> None:
        super().__init__()
        self.writers = [HeaderWriter(0) for _ in range(3)]
        self.arriving = [HeaderReader(AtomTable()) for _ in range(3)]
        self.leaving = [HeaderWriter(0), HeaderWriter(7), HeaderWriter()]
        self.readers = [HeaderReader(AtomTable()) for _ in range(3)]
        self.held: list[tuple[Term, Term]] = []
        self.sequence_ids = count(1)

    peers = st.integers(0, 2)
    sizes = st.one_of(st.none(), st.integers(1, 900))
    named = st.one_of(
        st.integers(0, 2500).map(lambda number: Atom(f"atom {number}")),
        st.sampled_from([True, False, None, Atom("é" * 255), Atom("x" * 255), Atom("")]),
    )

    def passed(self, writer: HeaderWriter, reader: HeaderReader, *terms: Term, size: int | None = None) -> Message:
        """Send one message, whole or in fragments of this size."""
        made = writer.message(*terms)
        frames = [made.frame()] if size is None else list(made.fragments(next(self.sequence_ids), size))
        *before, last = (reader.receive(frame_of(frame)) for frame in frames)
        assert before == [None] * len(before)
        assert last is not None
        return last

    @initialize(start=st.integers(0, 500))
    def fill_the_caches(self, start: int) -> None:
        """So that from now on every new atom replaces one that may be needed."""
        for place in range(start, start + CACHE_SIZE, 250):
            atoms = atoms_named("atom ", range(place, place + 250))
            for writer, reader in zip(self.writers + self.leaving, self.arriving + self.readers, strict=True):
                reader.receive(frame_of(writer.message(atoms).frame()))

    @rule(of=peers, term=Conversation.terms, levels=st.integers(0, 3), size=sizes)
    def arrive(self, of: int, term: Term, levels: int, size: int | None) -> None:
        payload = (Atom("tag"), (Atom("ok"), [term]))
        message = self.passed(self.writers[of], self.arriving[of], (of, Atom("to")), payload, size=size)
        self.held.append((relayed(message, levels), payload))

    @rule(named=st.lists(named, min_size=1, max_size=255))
    def arrive_with_any_list(self, named: list[Term]) -> None:
        data = b"l" + len(named).to_bytes(4, "big") + b"".join(b"R%c" % index for index in range(len(named))) + b"j"
        self.held.append((EncodedTerm(data, atoms=tuple(named)), named))

    @rule(
        to=peers, before=Conversation.terms, which=st.integers(0, 1000), size=st.one_of(st.none(), st.integers(1, 900))
    )
    def pass_on(self, to: int, before: Term, which: int, size: int | None) -> None:
        if not self.held:
            return
        term, expected = self.held[which % len(self.held)]
        message = self.passed(self.leaving[to], self.readers[to], CONTROL, (before, term), size=size)
        assert terms_of(message) == [CONTROL, (before, expected)]

    @rule(to=peers, after=Conversation.terms, which=st.integers(0, 1000), times=st.integers(1, 3))
    def pass_on_again_and_say_more(self, to: int, after: Term, which: int, times: int) -> None:
        if not self.held:
            return
        term, expected = self.held[which % len(self.held)]
        for _ in range(times):
            assert terms_of(self.passed(self.leaving[to], self.readers[to], (1, term))) == [(1, expected)]
        message = self.passed(self.leaving[to], self.readers[to], CONTROL, (term, after, term))
        assert terms_of(message) == [CONTROL, (expected, after, expected)]

    @rule(to=peers, which=st.integers(0, 1000))
    def fail_behind_what_is_passed_on(self, to: int, which: int) -> None:
        if self.held:
            with pytest.raises(EncodeError):
                self.leaving[to].message((1, self.held[which % len(self.held)][0], object()))

    @rule(to=peers, number=st.integers(2, 4), which=st.integers(0, 1000))
    def pass_on_together(self, to: int, number: int, which: int) -> None:
        if not self.held:
            return
        chosen = [self.held[(which + index) % len(self.held)] for index in range(number)]
        message = self.passed(self.leaving[to], self.readers[to], (1, [term for term, _ in chosen]))
        assert terms_of(message) == [(1, [expected for _, expected in chosen])]

    @rule(to=peers, term=Conversation.terms)
    def send_something_else(self, to: int, term: Term) -> None:
        assert terms_of(self.passed(self.leaving[to], self.readers[to], (1, term))) == [(1, term)]

    @rule(which=st.integers(0, 1000))
    def write_down(self, which: int) -> None:
        if self.held:
            term, expected = self.held[which % len(self.held)]
            assert encode_term(term) == encode_term(expected)

    @rule(which=st.integers(0, 1000))
    def let_go(self, which: int) -> None:
        if self.held:
            del self.held[which % len(self.held)]


def test_a_header_is_not_used_again_when_its_atoms_have_been_replaced() -> None:
    writer, reader = HeaderWriter(0), HeaderReader(AtomTable())
    names = (Atom("a"), Atom("b"))
    term = EncodedTerm(b"h\2R\0R\1", atoms=names)
    first, second, third = (frame_of(writer.message((1, term)).frame()) for _ in range(3))
    assert len(first) > len(second)
    assert second == third
    for frame in (first, second, third):
        message = reader.receive(frame)
        assert message is not None
        assert terms_of(message) == [(1, names)]
    for place in range(0, CACHE_SIZE, 250):
        reader.receive(frame_of(writer.message(atoms_named("other ", range(place, place + 250))).frame()))
    message = reader.receive(frame_of(writer.message((1, term)).frame()))
    assert message is not None
    assert terms_of(message) == [(1, names)]


TestRelay = Relay.TestCase
TestRelay.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


# What a peer must not send


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"\x83"], "cut off"),
        ([b"\x83D"], "cut off"),
        ([b"\x83D\x01"], "cut off"),
        ([b"\x83D\x01\x08\x05\x03ab"], "cut off"),
        ([b"\x83D\x01\x18\x05\0\x03ab"], "cut off"),
        ([b"\x83D\x01\x08\x05\x02\xff\xfe"], "not UTF-8"),
        ([b"\x83D\x01\x00\x05R\0"], "place 5 of the atom cache"),
        ([b"p\x83a\x01"], "starts with byte 131, not 112"),
        ([b"\x83a\x01"], "131, 97 begins no"),
        ([b"\x83E" + bytes(14)], "cut off"),
        ([b"\x83E" + bytes(7) + b"\1" + bytes(7) + b"\0\0"], "this one is 0"),
        ([b"\x83F" + bytes(7) + b"\1" + bytes(7) + b"\1"], "has not begun"),
        ([b"\x83E" + bytes(7) + b"\1" + bytes(7) + b"\3\0"] * 2, "begins again"),
        (
            [b"\x83E" + bytes(7) + b"\1" + bytes(7) + b"\3\0", b"\x83F" + bytes(7) + b"\1" + bytes(7) + b"\1"],
            "2 was due",
        ),
        ([b"\x83E" + bytes(7) + b"\1" + bytes(7) + b"\3\0", b"\x83F" + bytes(15)], "cut off"),
    ],
)
def test_frames_against_the_protocol_are_refused(reader: HeaderReader, frames: list[bytes], reason: str) -> None:
    *before, last = frames
    for frame in before:
        assert reader.receive(frame) is None
    with pytest.raises(RemoteProtocolError, match=reason):
        reader.receive(last)


def first_fragment(sequence_id: int, size: int, fragment_id: int = 1 << 60) -> bytes:
    return b"\x83E" + sequence_id.to_bytes(8, "big") + fragment_id.to_bytes(8, "big") + b"\0" + bytes(size)


def test_incomplete_messages_are_bounded_in_number() -> None:
    reader = HeaderReader(AtomTable(), max_open_sequences=3)
    for sequence_id in range(3):
        reader.receive(first_fragment(sequence_id, 0))
    with pytest.raises(LimitExceeded, match="MAX_OPEN_SEQUENCES allows 3"):
        reader.receive(first_fragment(3, 0))


def test_incomplete_messages_are_bounded_in_size() -> None:
    reader = HeaderReader(AtomTable(), max_message_bytes=1000, max_open_bytes=1500)
    reader.receive(first_fragment(1, 600))
    with pytest.raises(LimitExceeded, match="MAX_OPEN_BYTES allows 1500, got 1501"):
        reader.receive(first_fragment(2, 901))
    reader = HeaderReader(AtomTable(), max_message_bytes=1000)
    reader.receive(first_fragment(1, 600))
    with pytest.raises(LimitExceeded, match="MAX_MESSAGE_BYTES allows 1000, got 1001"):
        reader.receive(b"\x83F" + (1).to_bytes(8, "big") + ((1 << 60) - 1).to_bytes(8, "big") + bytes(401))


def test_atoms_of_headers_count_against_the_peer() -> None:
    reader = HeaderReader(AtomTable(2))
    with pytest.raises(LimitExceeded, match="MAX_ATOMS_PER_PEER"):
        reader.receive(frame_of(HeaderWriter(0).message(atoms_named("a", range(3))).frame()))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_garbled_frames_are_read_or_refused(data: st.DataObject) -> None:
    writer, reader = HeaderWriter(0), HeaderReader(AtomTable())
    frames: list[bytes] = []
    for number in range(4):
        message = writer.message((number, atom("ok"), *atoms_named("a", range(number * 3))), bytes(60))
        frames += map(frame_of, message.fragments(number, 30) if number % 2 else [message.frame()])
    with contextlib.suppress(RemoteProtocolError):
        for frame in frames:
            garbled = bytearray(frame)
            for _ in range(data.draw(st.integers(0, 2))):
                garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
            message_read: Any = reader.receive(bytes(garbled[: data.draw(st.integers(1, len(garbled)))]))
            if message_read is not None:
                with contextlib.suppress(DecodeError, LimitExceeded):
                    decode_term(message_read.data, message_read.pos, AtomTable(), message_read.atoms)
