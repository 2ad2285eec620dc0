"""Terms as Python values: identity, equality by `=:=`, and maps whose keys a `dict` cannot tell apart."""

from __future__ import annotations

import copy
import enum
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest

from gater.erl.errors import LimitExceeded
from gater.erl.terms import (
    MAX_DEPTH,
    Atom,
    BitString,
    EncodedTerm,
    Export,
    Fun,
    ImproperList,
    Pid,
    Port,
    Reference,
    Term,
    TermMap,
    atom,
    atom_name,
    exact_equal,
    exact_key,
)

NODE = Atom("a@b")


class Colour(enum.IntEnum):
    RED = 3


DISTINCT: list[Term] = [
    1,
    1.0,
    True,
    Atom("1"),
    b"1",
    0,
    0.0,
    -0.0,
    False,
    None,
    Atom("none"),
    b"true",
    b"",
    [],
    (),
    {},
    [[]],
    [()],
    ([],),
    (1,),
    (1.0,),
    (True,),
    [1],
    [1.0],
    [True],
    [1, [2]],
    [[1], 2],
    [[1, 2]],
    (1, (2,)),
    {1: 2},
    {1.0: 2},
    {1: 2.0},
    {True: 2},
    {b"a": {b"b": 1}},
    {b"a": {b"b": 1.0}},
    TermMap([(1, 1), (1.0, 1)]),
    TermMap([([1], 1)]),
    TermMap([({}, 1)]),
    {n: n for n in range(50)},
    {n: n for n in range(49)} | {49: 50},
    ImproperList([1], 2),
    ImproperList([1, 2], 3),
    Pid(NODE, 1, 2, 3),
    Pid(NODE, 1, 2, 4),
    Reference(NODE, 1, (1, 2, 3)),
    Reference(NODE, 1, (1, 2)),
    (NODE, 1, 2, 3),
    Port(NODE, 1, 2),
    Export(NODE, NODE, 1),
    BitString(b"\x80", 1),
    BitString(b"\x80", 2),
    Fun(112, b"x", NODE, 1),
    EncodedTerm(b"a\x01"),
    2**70,
    -(2**70),
    255,
    -1,
    256,
]


def test_an_atom_is_one_object_per_name() -> None:
    assert Atom("ok") is Atom("ok")
    assert Atom("ok") != "ok"
    assert copy.deepcopy(Atom("ok")) is copy.copy(Atom("ok")) is pickle.loads(pickle.dumps(Atom("ok"))) is Atom("ok")


def test_an_atom_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        Atom("ok").name = "error"


def test_true_false_and_nil_have_no_second_object() -> None:
    assert (atom("true"), atom("false"), atom("nil"), atom("ok")) == (True, False, None, Atom("ok"))
    assert [atom_name(term) for term in (True, False, None, Atom("ok"), 1)] == ["true", "false", "nil", "ok", None]
    with pytest.raises(ValueError, match="Python's None"):
        Atom("nil")


def test_a_name_no_beam_accepts_makes_no_atom() -> None:
    assert Atom("é" * 255).etf[:3] == b"v\x01\xfe"
    with pytest.raises(ValueError, match="255 characters"):
        Atom("x" * 256)
    with pytest.raises(ValueError, match="surrogate"):
        Atom("\ud800")


def test_an_atom_nobody_holds_is_forgotten() -> None:
    gone = weakref.ref(Atom("forgotten soon"))
    gc.collect()
    assert gone() is None


def test_pids_and_references_are_values_but_not_tuples() -> None:
    pid, reference = Pid(NODE, 1, 2, 3), Reference(NODE, 4, (5, 6, 7))
    assert pid == Pid(NODE, 1, 2, 3) == pickle.loads(pickle.dumps(pid)) == copy.deepcopy(pid)
    assert reference == Reference(NODE, 4, (5, 6, 7)) == pickle.loads(pickle.dumps(reference))
    assert len({pid, Pid(NODE, 1, 2, 3), reference, Reference(NODE, 4, (5, 6, 7))}) == 2
    assert pid != (NODE, 1, 2, 3)
    assert pid != reference
    assert reference != Reference(Atom("c@d"), 4, (5, 6, 7))
    assert (str(pid), str(reference)) == ("#PID<a@b.1.2>", "#Ref<a@b.7.6.5>")
    match pid:
        case Pid(node, number, serial, creation):
            assert (node, number, serial, creation) == (NODE, 1, 2, 3)


@pytest.mark.parametrize("left", range(len(DISTINCT)))
def test_terms_that_erlang_tells_apart_are_told_apart(left: int) -> None:
    for right, term in enumerate(DISTINCT):
        assert exact_equal(DISTINCT[left], term) == (left == right), (DISTINCT[left], term)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t,), lambda t: [b"x", t], lambda t: {b"k": t}])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("grüße", "grüße".encode()),
        (Colour.RED, 3),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
        (TermMap([(1, 2)]), {1: 2}),
        (TermMap([([1], {2: 3}), ({4: 5}, 6)]), TermMap([({4: 5}, 6), ([1], {2: 3})])),
    ],
)
def test_ways_to_write_one_term_are_equal(wrap: Callable[[Term], Term], left: Term, right: Term) -> None:
    assert exact_equal(wrap(left), wrap(right))


def test_a_value_that_is_no_term_has_no_key() -> None:
    for value in (object(), {1, 2}, [object()], {b"k": (1, object())}):
        with pytest.raises(TypeError, match="is no Erlang term"):
            exact_key(value)


def test_a_term_map_finds_what_is_stored_under_the_very_key() -> None:
    mixed = TermMap([(1, "int"), (1.0, "float"), (True, "true"), ([1], "list"), ({2: 3}, "map"), (0.0, 1), (-0.0, 2)])
    assert (mixed[1], mixed[1.0], mixed[True], mixed[[1]], mixed[{2: 3}]) == ("int", "float", "true", "list", "map")
    assert (mixed[0.0], mixed[-0.0], len(mixed)) == (1, 2, 7)
    assert 2 not in mixed
    with pytest.raises(KeyError):
        mixed[0]
    assert list(mixed)[3] == [1]
    assert "TermMap" in repr(mixed)


def test_a_term_map_equals_a_map_of_the_same_pairs() -> None:
    assert TermMap([(1, 2), (1.0, 3)]) == TermMap([(1.0, 3), (1, 2)])
    assert TermMap([(1, 2)]) == {1: 2}
    assert TermMap([(1, 2)]) != {1.0: 2}
    assert TermMap([(1, 2)]) != 5
    assert TermMap([(1, 2), (1, 3)]) == {1: 3}


def nested(depth: int, wrap: Callable[[Term], Term]) -> Term:
    term: Term = b"core"
    for _ in range(depth):
        term = wrap(term)
    return term


WRAPS = [lambda t: (t,), lambda t: [t], lambda t: {b"k": t}, lambda t: TermMap([(b"k", t)]), lambda t: (1, [t])]


@pytest.mark.parametrize("wrap", WRAPS)
def test_terms_ten_thousand_deep_compare_and_serve_as_keys(wrap: Callable[[Term], Term]) -> None:
    one, same, other = nested(10_000, wrap), nested(10_000, wrap), nested(9_999, wrap)
    assert exact_equal(one, same)
    assert not exact_equal(one, other)
    assert TermMap([(one, 1), (other, 2)])[same] == 1


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_term_deeper_than_the_limit_is_refused(wrap: Callable[[Term], Term]) -> None:
    with pytest.raises(LimitExceeded, match="MAX_DEPTH"):
        exact_key(nested(2 * MAX_DEPTH + 2, wrap))


def test_an_improper_list_needs_elements_and_a_tail_that_is_no_list() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ImproperList([], 1)
    with pytest.raises(ValueError, match="not a list"):
        ImproperList([1], [2])
    assert ImproperList([1], 2) == ImproperList([1], 2) != ImproperList([1], 3)


def test_an_encoded_term_may_lie_at_the_end_of_a_longer_buffer() -> None:
    term = EncodedTerm(b"\x83h\x01a\x05", 3)
    assert (term.buffer, term.start) == (b"\x83h\x01a\x05", 3)
    assert term == EncodedTerm(b"a\x05")
    assert hash(term) == hash(EncodedTerm(b"a\x05"))
    assert term.data == b"a\x05"
