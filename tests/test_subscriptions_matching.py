"""Selectors: what each kind of subscription wants, with the semantics of Khepri's `if_data_matches`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.api import schema
from gater.api.subscriptions.matching import MAX_PATTERN_DEPTH, SelectorError, compile_selector, pattern_test
from gater.api.subscriptions.protocol import event_of
from gater.erl.terms import Atom, ImproperList, Term, TermMap

A, B, X, Y = Atom("a"), Atom("b"), Atom("x"), Atom("y")


def event(stream: str = "orders-1", type_: str = "placed", **data: Term) -> schema.RecordedEvent:
    return schema.RecordedEvent(stream, 0, "id", type_, {Atom(key): value for key, value in data.items()}, {}, None, 1)


def wants(kind: Atom, selector: Term, recorded: schema.RecordedEvent) -> bool:
    return compile_selector(kind, selector).wants(event_of(recorded.to_term()))


# What ets:match_spec_run answered on OTP 25: pattern, data, whether they match.
@pytest.mark.parametrize(
    ("pattern", "data", "expected"),
    [
        ({A: {B: 1}}, {A: {B: 1, X: 2}, Y: 3}, True),
        ({A: 1}, {A: 1.0}, False),
        ({A: 1.0}, {A: 1}, False),
        ({A: True}, {A: 1}, False),
        ({A: Atom("_")}, {A: 1}, True),
        ({A: Atom("_")}, {B: 1}, False),
        ({A: Atom("$1"), B: Atom("$1")}, {A: 1, B: 2}, False),
        ({A: Atom("$1"), B: Atom("$1")}, {A: 1, B: 1}, True),
        ({A: Atom("$1"), B: Atom("$1")}, {A: 1, B: 1.0}, False),
        ({A: {}}, {A: {X: 1}}, True),
        ({A: {}}, {A: []}, False),
        ({A: [1, Atom("_")]}, {A: [1, 2]}, True),
        ({A: [1]}, {A: [1, 2]}, False),
        ({A: [{X: 1}]}, {A: [{X: 1, Y: 2}]}, True),
        ({A: ({X: 1}, 2)}, {A: ({X: 1, Y: 2}, 2)}, True),
        ({A: ImproperList([Atom("_")], Atom("_"))}, {A: [1, 2, 3]}, True),
        ({A: ImproperList([1], 2)}, {A: ImproperList([1], 2)}, True),
        ({A: ImproperList([1], 2)}, {A: ImproperList([1, 1], 2)}, False),
        ({A: ImproperList([1], 2)}, {A: 1}, False),
        ({A: Atom("$01")}, {A: 1}, False),
        ({A: Atom("$1x")}, {A: 1}, False),
        ({A: Atom("$0")}, {A: 1}, True),
        ({A: Atom("$")}, {A: Atom("$")}, True),
        ({A: Atom("$$")}, {A: 1}, False),
        ({A: Atom("$_")}, {A: 1}, False),
        ({(Atom("_"),): 1}, {(Atom("_"),): 1}, True),
        ({1: 1}, {1: 1, 2: 2}, True),
        ({1: 1}, {1.0: 1}, False),
        ({1: 1}, TermMap([(1.0, 2), (1, 1)]), True),
        ({b"k": "text"}, {b"k": b"text"}, True),
        ({"k": b"text"}, {b"k": "text"}, True),
        ({A: 1.5}, {A: 1.5}, True),
        ({}, {}, True),
        ({}, [], False),
        (b"x", b"x", True),
    ],
)
def test_patterns_match_as_match_specifications_do(pattern: Term, data: Term, expected: bool) -> None:
    assert pattern_test(pattern)(data) is expected


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ({Atom("_"): 1}, "key of a pattern"),
        ({A: {Atom("$1"): 1}}, "key of a pattern"),
        ({A: object()}, "no term"),
    ],
)
def test_patterns_that_are_none_are_refused(pattern: Term, problem: str) -> None:
    with pytest.raises(SelectorError, match=problem):
        pattern_test(pattern)


def test_patterns_have_a_limit_of_depth() -> None:
    pattern: Term = 1
    for _ in range(MAX_PATTERN_DEPTH + 1):
        pattern = {A: pattern}
    with pytest.raises(SelectorError, match="MAX_PATTERN_DEPTH"):
        pattern_test(pattern)


def test_by_stream_wants_one_stream_or_all() -> None:
    assert wants(schema.BY_STREAM, "$all", event("anything"))
    assert wants(schema.BY_STREAM, b"$orders-1", event("orders-1"))
    assert not wants(schema.BY_STREAM, "$orders-1", event("orders-2"))
    # As the original: the stream is what stands behind the first dollar sign.
    assert wants(schema.BY_STREAM, "x$orders$1", event("orders$1"))


def test_by_event_type_wants_a_type_of_any_stream() -> None:
    assert wants(schema.BY_EVENT_TYPE, "placed", event(type_="placed"))
    assert not wants(schema.BY_EVENT_TYPE, "placed", event(type_="placed:v2"))


def test_by_event_pattern_looks_at_the_record() -> None:
    pattern = {schema.EVENT_TYPE: "placed", schema.DATA: {Atom("total"): 12}}
    assert wants(schema.BY_EVENT_PATTERN, pattern, event(total=12, more=1))
    assert not wants(schema.BY_EVENT_PATTERN, pattern, event(total=13))
    assert not wants(schema.BY_EVENT_PATTERN, pattern, event(type_="paid", total=12))
    assert wants(schema.BY_EVENT_PATTERN, {schema.EVENT_STREAM_ID: b"orders-1"}, event())
    assert not wants(schema.BY_EVENT_PATTERN, {schema.EVENT_STREAM_ID: b"orders-2"}, event())


def test_by_event_payload_looks_at_the_data() -> None:
    assert wants(schema.BY_EVENT_PAYLOAD, {Atom("who"): {Atom("id"): 7}}, event(who={Atom("id"): 7, Atom("n"): b"x"}))
    assert not wants(schema.BY_EVENT_PAYLOAD, {Atom("who"): {Atom("id"): 7}}, event(who={Atom("id"): 8}))
    raw = event_of({**event().to_term(), schema.DATA: b"raw"})
    assert compile_selector(schema.BY_EVENT_PAYLOAD, b"raw").wants(raw)


@pytest.mark.parametrize(
    ("kind", "selector"),
    [
        (schema.BY_STREAM, "orders"),
        (schema.BY_STREAM, {}),
        (schema.BY_EVENT_TYPE, 1),
        (schema.BY_EVENT_PATTERN, b"x"),
        (Atom("by_magic"), b"x"),
    ],
)
def test_selectors_that_a_kind_cannot_have_are_refused(kind: Atom, selector: Term) -> None:
    with pytest.raises(SelectorError):
        compile_selector(kind, selector)


def test_a_selector_is_the_same_when_it_is_the_same_term() -> None:
    def identity(kind: Atom, selector: Term) -> Term:
        return compile_selector(kind, selector).identity

    assert identity(schema.BY_STREAM, "$a") == identity(schema.BY_STREAM, b"$a")
    assert identity(schema.BY_EVENT_PATTERN, {A: 1, B: 2}) == identity(schema.BY_EVENT_PATTERN, {B: 2, A: 1})
    assert identity(schema.BY_EVENT_PATTERN, {A: 1}) != identity(schema.BY_EVENT_PATTERN, {A: 1.0})
    assert identity(schema.BY_EVENT_PATTERN, {A: 1}) != identity(schema.BY_EVENT_PAYLOAD, {A: 1})


terms = st.recursive(
    st.one_of(st.integers(-3, 3), st.sampled_from([A, B, b"x", True, None, 0.5])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.sampled_from([A, B, b"x"]), inner)
    ),
    max_leaves=10,
)


@given(terms)
def test_every_term_matches_itself(term: Term) -> None:
    assert pattern_test(term)(term)


@given(st.dictionaries(st.sampled_from([A, B, X, Y]), terms), st.data())
def test_a_map_matches_every_subset_of_its_keys(term: dict[Term, Term], data: st.DataObject) -> None:
    keys = data.draw(st.sets(st.sampled_from(sorted(term, key=str)))) if term else set()
    assert pattern_test({key: term[key] for key in keys})(term)
