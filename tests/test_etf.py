"""The external term format: every tag, round trips, and bytes that are not a term."""

from __future__ import annotations

import contextlib
import enum
import random
import struct
import threading
import time
import tracemalloc
import zlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gater.erl.errors import DecodeError, EncodeError, LimitExceeded
from gater.erl.etf import (
    MAX_ATOMS_PER_PEER,
    MAX_DEPTH,
    MAX_IDENTITIES_KEPT,
    AtomRefs,
    AtomTable,
    decode,
    decode_encoded,
    decode_spine,
    decode_term,
    encode,
    encode_into,
    encode_term,
    plain_bytes,
    read_map,
    read_maps,
    skip_term,
    to_plain,
)
from gater.erl.terms import (
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
    exact_equal,
)

NODE = Atom("a@b")
NODE_ETF = b"w\x03a@b"


def bits(count: int, *, value: int = 0xA5) -> BitString:
    return BitString(bytes((value >> (8 - count) << (8 - count),)), count)


words = st.integers(0, 0xFFFFFFFF)
atoms_ = st.text(st.characters(exclude_categories=["Cs"]), max_size=255).map(atom)
names = st.sampled_from([Atom("a"), Atom("b@c"), Atom("é"), Atom("日本"), Atom("x" * 255), Atom("日" * 255)])
leaves = st.one_of(
    st.integers(),
    st.integers(-300, 300),
    st.sampled_from([1 << 31, -(1 << 31), (1 << 31) - 1, 1 << 64, 1 << 2039, 1 << 2040, -(1 << 2041), 1 << 9000]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.binary(max_size=40),
    atoms_,
    names,
    st.sampled_from([True, False, None, [], (), {}]),
    st.integers(1, 7).map(lambda count: bits(count)),
    st.builds(Pid, names, words, words, words),
    st.builds(Reference, names, words, st.lists(words, min_size=1, max_size=5).map(tuple)),
    st.builds(Port, names, st.integers(0, (1 << 64) - 1), words),
    st.builds(Export, names, names, st.integers(0, 255)),
)


def containers(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    not_a_list = inner.filter(lambda term: not isinstance(term, list | ImproperList))
    return st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=6).map(tuple),
        st.lists(st.integers(0, 255), max_size=20),
        st.lists(st.tuples(inner, inner), max_size=6).map(TermMap),
        st.builds(ImproperList, st.lists(inner, min_size=1, max_size=4), not_a_list),
    )


terms = st.recursive(leaves, containers, max_leaves=25)


@given(terms)
@settings(max_examples=70, deadline=None)
def test_what_is_encoded_decodes_to_the_same_term(term: Term) -> None:
    data = encode(term)
    assert exact_equal(decode(data), term)
    assert skip_term(data, 1) == len(data)
    assert to_plain(data, 1, None) == data[1:] == encode_term(term)
    assert decode_term(b"xx" + data[1:] + b"yy", 2, AtomTable())[1] == len(data) + 1
    assert exact_equal(decode(memoryview(encode(term, compressed=9))), term)


@given(terms)
@settings(max_examples=70, deadline=None)
def test_a_decoded_term_encodes_to_the_same_bytes(term: Term) -> None:
    data = encode(term)
    assert encode(decode(data)) == data


class Refs(AtomRefs):
    """Refers to the first 200 atoms of a message as a distribution header does."""

    def __init__(self) -> None:
        self.sent: list[Term] = []

    def __missing__(self, item: Atom) -> bytes:
        if len(self.sent) == 200:
            return item.etf
        self[item] = b"R%c" % len(self.sent)
        self.sent.append(item)
        return self[item]


@given(terms)
@settings(max_examples=70, deadline=None)
def test_a_message_with_an_atom_cache_decodes_and_becomes_plain(term: Term) -> None:
    refs = Refs()
    out = bytearray(b"header")
    encode_into(out, term, refs)
    data = bytes(out)
    assert exact_equal(decode_term(data, 6, AtomTable(), refs.sent)[0], term)
    assert skip_term(data, 6, refs.sent) == len(data)
    assert to_plain(data, 6, refs.sent) == encode_term(term)
    if refs.sent:
        for ask in (
            lambda: decode_term(data, 6, AtomTable()),
            lambda: skip_term(data, 6, refs.sent[:-1]),
            lambda: to_plain(data, 6, refs.sent[:-1]),
        ):
            with pytest.raises(DecodeError, match="atom cache reference"):
                ask()


def survives_or_refuses(data: bytes) -> None:
    atoms = AtomTable()
    for work in (
        lambda: decode(data, atoms=atoms),
        lambda: decode_term(data, 1, atoms, [NODE, True]),
        lambda: decode_spine(data, 1, 3, atoms, [NODE]),
        lambda: decode_spine(data, 1, 3, atoms),
        lambda: read_map(data, 1, FIELDS, atoms, [NODE]),
        lambda: read_map(b"t\0\0\0\1" + FIELDS[0].etf + data[1:], 0, FIELDS, atoms, [NODE]),
        lambda: skip_term(data, 1),
        lambda: to_plain(data, 1, [NODE]),
    ):
        with contextlib.suppress(DecodeError, LimitExceeded):
            work()


@given(terms, st.data())
@settings(max_examples=70, deadline=None)
def test_a_truncated_term_is_refused(term: Term, data: st.DataObject) -> None:
    whole = encode(term)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(DecodeError):
        decode(part)
    with pytest.raises(DecodeError):
        skip_term(part, 1)
    survives_or_refuses(part)


@given(terms, st.data())
@settings(max_examples=200, deadline=None)
def test_a_garbled_term_is_decoded_or_refused(term: Term, data: st.DataObject) -> None:
    garbled = bytearray(encode(term))
    for _ in range(data.draw(st.integers(1, 3))):
        garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
    survives_or_refuses(bytes(garbled))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_decoded_or_refused(data: bytes) -> None:
    survives_or_refuses(b"\x83" + data)
    survives_or_refuses(data)


def test_every_tag_with_random_bytes_behind_it_is_decoded_or_refused() -> None:
    source = random.Random(7)
    for tag in range(256):
        for size in (0, 1, 2, 4, 9, 40, 300):
            survives_or_refuses(bytes((131, tag)) + source.randbytes(size))
            survives_or_refuses(bytes((131, tag)) + bytes(size))
            survives_or_refuses(bytes((131, tag, 0, 0, 0, 2)) + NODE_ETF * 2 + bytes(size))


U32 = struct.Struct(">I").pack


@pytest.mark.parametrize(
    ("data", "term"),
    [
        (b"a\xff", 255),
        (b"b\xff\xff\xff\xff", -1),
        (b"c1.50000000000000000000e+00\0\0\0\0\0", 1.5),
        (b"c-2.0e-3".ljust(32, b"\0"), -0.002),
        (b"F?\xf8\0\0\0\0\0\0", 1.5),
        (b"n\x01\x01\x05", -5),
        (b"n\x00\x00", 0),
        (b"o\0\0\0\x01\0\x05", 5),
        (b"d\0\x02\xe9a", Atom("éa")),
        (b"s\x02\xe9a", Atom("éa")),
        (b"v\0\x03\xc3\xa9a", Atom("éa")),
        (b"w\x03\xc3\xa9a", Atom("éa")),
        (b"d\0\0", Atom("")),
        (b"d\0\x04true", True),
        (b"s\x05false", False),
        (b"v\0\x03nil", None),
        (b"f" + NODE_ETF + U32(7) + b"\x02", Port(NODE, 7, 2)),
        (b"Y" + NODE_ETF + U32(7) + U32(9), Port(NODE, 7, 9)),
        (b"x" + NODE_ETF + b"\x01" + bytes(7) + U32(9), Port(NODE, 1 << 56, 9)),
        (b"g" + NODE_ETF + U32(7) + U32(8) + b"\x02", Pid(NODE, 7, 8, 2)),
        (b"X" + NODE_ETF + U32(7) + U32(8) + U32(9), Pid(NODE, 7, 8, 9)),
        (b"Xd\0\x03a@b" + U32(7) + U32(8) + U32(9), Pid(NODE, 7, 8, 9)),
        (b"e" + NODE_ETF + U32(7) + b"\x02", Reference(NODE, 2, (7,))),
        (b"r\0\x02" + NODE_ETF + b"\x02" + U32(7) + U32(8), Reference(NODE, 2, (7, 8))),
        (b"Z\0\x02" + NODE_ETF + U32(2) + U32(7) + U32(8), Reference(NODE, 2, (7, 8))),
        (b"h\x02a\x01a\x02", (1, 2)),
        (b"h\0", ()),
        (b"i\0\0\0\0", ()),
        (b"i\0\0\0\x02a\x01a\x02", (1, 2)),
        (b"t\0\0\0\x01a\x01a\x02", {1: 2}),
        (b"j", []),
        (b"k\0\x02\x01\x02", [1, 2]),
        (b"l\0\0\0\x01a\x01j", [1]),
        (b"l\0\0\0\x01a\x01l\0\0\0\x01a\x02k\0\x02\x03\x04", [1, 2, 3, 4]),
        (b"l\0\0\0\x01a\x01l\0\0\0\x01a\x02a\x03", ImproperList([1, 2], 3)),
        (b"l\0\0\0\0j", []),
        (b"l\0\0\0\0a\x01", 1),
        (b"m\0\0\0\x02ab", b"ab"),
        (b"M\0\0\0\x02\x03a\xff", BitString(b"a\xe0", 3)),
        (b"M\0\0\0\x02\x08ab", b"ab"),
        (b"M\0\0\0\0\0", b""),
        (b"q" + NODE_ETF + NODE_ETF + b"a\x02", Export(NODE, NODE, 2)),
    ],
)
def test_every_tag_of_the_format_is_read(data: bytes, term: Term) -> None:
    decoded = decode(b"\x83" + data)
    assert type(decoded) is type(term)
    assert exact_equal(decoded, term)
    assert skip_term(data, 0) == len(data)
    for size in range(len(data)):
        with pytest.raises(DecodeError):
            skip_term(data[:size], 0)
        with pytest.raises(DecodeError):
            decode_term(data[:size], 0, AtomTable())


PID_ETF = b"X" + NODE_ETF + U32(7) + U32(8) + U32(9)


def new_fun(*free: bytes) -> bytes:
    body = (
        b"\x02" + bytes(16) + U32(3) + U32(len(free)) + NODE_ETF + b"a\x03" + b"b\0\0\x01\0" + PID_ETF + b"".join(free)
    )
    return b"p" + U32(len(body) + 4) + body


def test_a_closure_is_kept_and_sent_back_as_it_came() -> None:
    data = new_fun(b"m\0\0\0\x02ab", b"w\x02ok")
    fun = decode(b"\x83" + data)
    assert fun == Fun(112, data[1:], NODE, 2)
    assert encode_term([fun]) == b"l\0\0\0\x01" + data + b"j"


def test_a_closure_of_the_old_format_is_kept_as_it_came() -> None:
    data = b"u" + U32(1) + PID_ETF + NODE_ETF + b"a\x03a\x04w\x02ok"
    assert decode(b"\x83" + data) == Fun(117, data[1:], NODE, -1)
    assert encode_term(decode(b"\x83" + data)) == data
    assert skip_term(data, 0) == len(data)


def test_a_closure_in_a_message_with_an_atom_cache_can_be_sent_elsewhere() -> None:
    cached = new_fun(new_fun(b"R\x01"), b"R\x01").replace(NODE_ETF, b"R\0")
    inner = new_fun(b"R\x01").replace(NODE_ETF, b"R\0")
    fixed = cached.replace(new_fun(b"R\x01"), inner)
    # The lengths of the pieces changed with the atoms in them: put the true ones in.
    inner = b"p" + U32(len(inner) - 1) + inner[5:]
    body = fixed[5:].split(b"p", 1)[0]
    fixed = b"p" + U32(4 + len(body) + len(inner) + 2) + body + inner + b"R\x01"
    plain_inner = new_fun(b"w\x02ok")
    assert to_plain(fixed, 0, [NODE, Atom("ok")]) == new_fun(plain_inner, b"w\x02ok")
    fun = decode_term(fixed, 0, AtomTable(), [NODE, Atom("ok")])[0]
    assert encode_term(fun) == new_fun(plain_inner, b"w\x02ok")


def test_a_closure_that_lies_about_its_size_is_refused() -> None:
    data = new_fun(b"a\x01")
    for size in (0, 4, len(data) - 2, len(data), 1 << 31):
        with pytest.raises(DecodeError, match="a fun declares its end"):
            decode(b"\x83p" + U32(size) + data[5:])


def test_closures_in_closures_are_bounded() -> None:
    data = new_fun()
    for _ in range(60):
        data = new_fun(data)
    with pytest.raises(LimitExceeded, match="MAX_NESTED_FUNS"):
        decode(b"\x83" + data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no term"),
        (b"\x83", "no term"),
        (b"\x82a\x01", "starts with byte 131"),
        (b"\x83a\x01a", "1 bytes follow"),
        (b"\x83y1234", "LOCAL_EXT"),
        (b"\x83R\0", "atom cache reference"),
        (b"\x83h\x01P\0\0\0\x01", "must follow the version byte"),
        (b"\x83\xff", "no term has the tag 255"),
        (b"\x83h\x01\x00", "no term has the tag 0"),
        (b"\x83F\x7f\xf0\0\0\0\0\0\0", "inf is no Erlang float"),
        (b"\x83F\x7f\xf8\0\0\0\0\0\0", "nan is no Erlang float"),
        (b"\x83cnan" + bytes(28), "FLOAT_EXT"),
        (b"\x83c1_0.5" + bytes(26), "FLOAT_EXT"),
        (b"\x83c1.0e999" + bytes(24), "FLOAT_EXT"),
        (b"\x83w\x02\xff\xfe", "not UTF-8"),
        (b"\x83w\x03\xed\xa0\x80", "not UTF-8"),
        (b"\x83d\x01\0" + b"a" * 256, "255 characters"),
        (b"\x83v\x01\0" + b"a" * 256, "255 characters"),
        (b"\x83w\x05ab", "cut off"),
        (b"\x83X" + b"a\x01" + bytes(12), "an atom is expected"),
        (b"\x83Z\0\0" + NODE_ETF + bytes(20), "1 to 5 words, not 0"),
        (b"\x83Z\0\x06" + NODE_ETF + bytes(28), "1 to 5 words, not 6"),
        (b"\x83q" + NODE_ETF + NODE_ETF + b"b\0\0\0\x01", "arity"),
        (b"\x83M\0\0\0\x01\x09a", "9 bits"),
        (b"\x83M\0\0\0\x01\0a", "0 bits"),
        (b"\x83M\0\0\0\0\x05", "without bytes"),
        (b"\x83t\0\0\0\x02a\x01a\x02a\x01a\x03", "a key twice"),
        (b"\x83t\0\0\0\x02ja\x02ja\x03", "a key twice"),
        (b"\x83t\0\0\0\x02t\0\0\0\0a\x02t\0\0\0\0a\x03", "a key twice"),
        (b"\x83t\0\0\0\x02a\x01a\x02b\0\0\0\x01a\x03", "a key twice"),
        (b"\x83P\0\0\0\x02" + zlib.compress(b"a\x01a"), "holds more"),
        (b"\x83P\0\0\0\x04" + zlib.compress(b"a\x01a"), "holds less"),
        (b"\x83P\0\0\0\x02" + zlib.compress(b"a\x01") + b"x", "end with its zlib stream"),
        (b"\x83P\0\0\0\x02" + zlib.compress(b"a\x01")[:-2], "end with its zlib stream"),
        (b"\x83P\0\0\0\x02junk", "does not inflate"),
        (b"\x83P\0\0", "cut off in its header"),
    ],
)
def test_what_is_no_term_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data)


def test_keys_that_python_confuses_stay_apart() -> None:
    for keys in ([1, 1.0, True], [0, 0.0, -0.0, False], [(1,), (1.0,), (True,)], [[], {}, ()], [b"a", [b"a"]]):
        term = TermMap((key, number) for number, key in enumerate(keys))
        decoded = decode(encode(term))
        assert isinstance(decoded, TermMap)
        assert [decoded[key] for key in keys] == list(range(len(keys)))
    assert type(decode(encode(TermMap([(1, 1), (2.0, 2)])))) is dict


# Deep and large terms


def nested(depth: int, wrap: Callable[[Term], Term]) -> Term:
    term: Term = b"core"
    for _ in range(depth):
        term = wrap(term)
    return term


WRAPS: list[Callable[[Term], Term]] = [
    lambda t: (t,),
    lambda t: [t],
    lambda t: {b"k": t},
    lambda t: TermMap([(t, b"v")]) if isinstance(t, bytes) else (t, 1),
    lambda t: ImproperList([t], 1),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_terms_ten_thousand_deep_are_read_and_written(wrap: Callable[[Term], Term]) -> None:
    term = nested(10_000, wrap)
    data = encode(term)
    assert exact_equal(decode(data), term)
    assert skip_term(data, 1) == len(data)
    assert encode(decode(data)) == data


@pytest.mark.parametrize("head", [b"h\x01", b"l\0\0\0\x01", b"t\0\0\0\x01a\x01", b"l\0\0\0\x01a\x01h\x01"])
def test_a_term_deeper_than_the_limit_is_refused(head: bytes) -> None:
    with pytest.raises(LimitExceeded, match="MAX_DEPTH"):
        decode(b"\x83" + head * (MAX_DEPTH + 1) + b"a\x01")
    with pytest.raises(LimitExceeded, match="MAX_DEPTH"):
        decode(b"\x83" + head * 400_000)


def test_a_list_that_goes_on_in_its_tail_is_not_deep() -> None:
    assert decode(b"\x83" + b"l\0\0\0\x01a\x01" * 100_000 + b"j") == [1] * 100_000


def test_a_term_too_deep_to_send_is_our_mistake() -> None:
    with pytest.raises(EncodeError, match="MAX_DEPTH"):
        encode(nested(MAX_DEPTH + 1, lambda t: (t,)))
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(EncodeError, match="holds itself"):
        encode(circular)


def test_a_map_key_is_read_at_any_depth_even_on_a_small_stack() -> None:
    """Hashing a tuple recurses in C, so a deep key must not be hashed."""
    key = nested(MAX_DEPTH - 10, lambda t: (t,))
    data = encode({1: 2} | {5: TermMap([(key, 1), ((key,), 2)])})
    seen: list[Term] = []

    def work() -> None:
        seen.append(decode(data))

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert seen[0][5][key] == 1


BOMBS = {
    "a list of four billion": b"\x83l\xff\xff\xff\xffa\x01",
    "a tuple of four billion": b"\x83i\xff\xff\xff\xffa\x01",
    "a map of four billion": b"\x83t\xff\xff\xff\xffa\x01a\x01",
    "a binary of four billion": b"\x83m\xff\xff\xff\xffa\x01",
    "bits of four billion": b"\x83M\xff\xff\xff\xff\x01a\x01",
    "an integer of four billion": b"\x83o\xff\xff\xff\xff\0a\x01",
    "a fun of four billion variables": b"\x83u\xff\xff\xff\xff" + PID_ETF,
    "a new fun of four billion variables": b"\x83p\0\0\0\x40\x01" + bytes(20) + b"\xff\xff\xff\xff" + PID_ETF,
    "lists of lists of four billion": b"\x83" + b"l\xff\xff\xff\xff" * 1000,
    "an inflated size of four billion": b"\x83P\xff\xff\xff\xff" + zlib.compress(b"a\x01"),
    "much more than declared": b"\x83P\0\0\0\x02" + zlib.compress(bytes(50_000_000)),
    "ten million empty lists": b"\x83P" + U32(10_000_006) + zlib.compress(b"l" + U32(10_000_000) + b"j" * 10_000_001),
    "three million strings": b"\x83l" + U32(200) + (b"k\xff\xff" + bytes(65535)) * 200 + b"j",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once_and_without_memory(name: str) -> None:
    data = BOMBS[name]
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises((DecodeError, LimitExceeded)):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5
    assert peak < 32_000_000


def test_limits_are_named_in_their_errors() -> None:
    with pytest.raises(LimitExceeded, match="MAX_TERM_BYTES allows 3, got 7"):
        decode(encode(b"x"), max_bytes=3)
    with pytest.raises(LimitExceeded, match="MAX_TERM_BYTES allows 1000, got 2005"):
        decode(encode(bytes(2000), compressed=9), max_bytes=1000)
    with pytest.raises(LimitExceeded, match="MAX_ELEMENTS"):
        decode(encode([[]] * 5_000_000), max_elements=4_000_000)
    table = AtomTable(2)
    assert decode(encode([Atom("a"), Atom("b"), Atom("a")]), atoms=table) == [Atom("a"), Atom("b"), Atom("a")]
    assert decode(encode(Atom("b")), atoms=table) is Atom("b")
    with pytest.raises(LimitExceeded, match="MAX_ATOMS_PER_PEER allows 2"):
        decode(encode(Atom("c")), atoms=table)
    assert AtomTable().max_atoms == MAX_ATOMS_PER_PEER


identities = st.one_of(
    st.builds(Pid, st.just(NODE), words, words, words),
    st.builds(Reference, st.just(NODE), words, st.lists(words, min_size=1, max_size=5).map(tuple)),
)


@given(st.lists(identities, max_size=4), st.booleans())
def test_pids_and_references_are_kept_by_their_bytes(terms: list[Term], old_atoms: bool) -> None:
    data = encode_term([*terms, *terms])
    if old_atoms:
        data = data.replace(NODE_ETF, b"d\0" + NODE_ETF[1:])
    table = AtomTable()
    for _ in range(2):
        decoded, end = decode_term(data, 0, table)
        assert (decoded, end) == (terms * 2, len(data))
        assert all(a is b for a, b in zip(decoded, decoded[len(terms) :], strict=False))
    assert encode_term(decoded) == encode_term(decoded) == encode_term([*terms, *terms])
    for end in range(1, len(data)):
        with pytest.raises(DecodeError):
            decode_term(data[:end], 0, table)


def test_few_pids_and_references_are_kept_and_they_are_not_counted_as_atoms() -> None:
    table = AtomTable(1)
    for number in range(3 * MAX_IDENTITIES_KEPT):
        for term in (Pid(NODE, number, 0, 1), Reference(NODE, 1, (number,))):
            assert decode(encode(term), atoms=table) == term
            assert len(table) <= MAX_IDENTITIES_KEPT + 1
    with pytest.raises(LimitExceeded, match="MAX_ATOMS_PER_PEER"):
        decode(encode(Atom("c")), atoms=table)


@pytest.mark.parametrize("words", [0, 6, 255, 256, 257])
@pytest.mark.parametrize("node", [NODE_ETF, b"d\0" + NODE_ETF[1:], b"v\0" + NODE_ETF[1:]])
def test_a_reference_of_too_few_or_too_many_words_is_refused(words: int, node: bytes) -> None:
    with pytest.raises(DecodeError, match="1 to 5 words"):
        decode_term(b"Z" + words.to_bytes(2) + node + bytes(4 + 4 * words), 0, AtomTable())


@pytest.mark.parametrize(
    "make",
    [
        lambda n: [b"x"] * n,
        lambda n: dict.fromkeys(range(n), b""),
        lambda n: nested(n // 10, lambda t: [t]),
        lambda n: TermMap(([number], 1) for number in range(n)),
        lambda n: [1 << 8 * n],
        lambda n: [Atom(f"a{number}") for number in range(n)],
    ],
)
def test_time_grows_with_the_size_only(make: Callable[[int], Term]) -> None:
    def seconds(term: Term) -> float:
        best = 9.0
        for _ in range(2):
            start = time.process_time()
            decode(encode(term))
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(make(3_000)), seconds(make(24_000))
    assert large < 40 * small + 0.01


# The spine


def test_the_spine_decodes_what_routing_needs_and_leaves_the_rest() -> None:
    reference = Reference(NODE, 1, (1, 2, 3))
    events = [{Atom("data"): b"x" * 100}] * 1000
    data = b"ctrl" + encode_term((reference, (Atom("ok"), events)))
    atoms = AtomTable()
    assert decode_spine(data, 4, 2, atoms) == (reference, (Atom("ok"), EncodedTerm(encode_term(events))))
    assert decode_spine(data, 4, 1, atoms) == (reference, EncodedTerm(encode_term((Atom("ok"), events))))
    assert decode_spine(data, 4, 0, atoms) == EncodedTerm(data[4:])
    assert decode_spine(data, 4, 9, atoms) == decode_spine(data, 4, 2, atoms)


@given(terms, st.integers(0, 4))
@settings(max_examples=70, deadline=None)
def test_a_spine_stands_for_the_whole_term(term: Term, levels: int) -> None:
    data = encode_term(term)
    assert encode_term(decode_spine(data, 0, levels, AtomTable())) == data
    refs = Refs()
    out: list[bytes] = []
    encode_into(out, term, refs)
    spine = decode_spine(b"".join(out), 0, levels, AtomTable(), refs.sent)
    assert encode_term(spine) == data
    while type(spine) is tuple and spine:
        spine, term = spine[-1], term[-1]
    if type(spine) is EncodedTerm:
        assert exact_equal(decode_encoded(spine), term)
        assert plain_bytes(spine) == encode_term(term)


@pytest.mark.parametrize("last", [True, Atom("ok"), 1, -5, 1 << 80, 2.5, b"x", [], Pid(NODE, 1, 2, 3), NODE])
def test_a_spine_that_ends_in_no_container_is_decoded(last: Term) -> None:
    assert decode_spine(encode_term((1, last)), 0, 1, AtomTable()) == (1, last)
    with pytest.raises(DecodeError, match="1 bytes follow"):
        decode_spine(encode_term((1, last)) + b"x", 0, 1, AtomTable())


FIELDS = [Atom("a"), Atom("é"), Atom("b@c"), Atom("missing")]


@st.composite
def maps(draw: st.DrawFn) -> dict[Term, Term]:
    return draw(st.dictionaries(st.one_of(names, st.integers()), st.one_of(leaves, containers(leaves)), max_size=8))


@given(st.data(), st.booleans())
@settings(max_examples=70, deadline=None)
def test_the_wanted_values_of_maps_are_read_and_the_maps_left_as_they_came(data: st.DataObject, cached: bool) -> None:
    records = data.draw(st.lists(maps(), max_size=4))
    refs = Refs() if cached else None
    out = bytearray(b"header")
    encode_into(out, records, refs)
    found = read_maps(EncodedTerm(bytes(out), 6, refs.sent if refs else ()), frozenset(FIELDS), AtomTable())
    assert found is not None
    for record, (values, kept) in zip(records, found, strict=True):
        assert exact_equal(values, {key: value for key, value in record.items() if key in FIELDS})
        assert exact_equal(decode_encoded(kept), record)


@given(terms)
@settings(max_examples=70, deadline=None)
def test_what_is_no_list_of_maps_is_left_to_others(term: Term) -> None:
    is_list_of_maps = type(term) is list and all(isinstance(each, Mapping) for each in term)
    found = read_maps(EncodedTerm(encode_term(term)), frozenset(FIELDS), AtomTable())
    assert (found is not None) is is_list_of_maps


@given(maps(), st.data())
@settings(max_examples=70, deadline=None)
def test_a_truncated_map_is_refused_by_who_reads_some_of_it(record: Any, data: st.DataObject) -> None:
    whole = encode_term(record)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(DecodeError):
        read_map(cut, 0, frozenset(FIELDS), AtomTable())
    with pytest.raises(DecodeError):
        read_maps(EncodedTerm(encode_term([record])[:-2]), frozenset(FIELDS), AtomTable())


def test_a_map_is_read_no_deeper_and_no_larger_than_a_term() -> None:
    key = Atom("a")
    deep = b"t\0\0\0\1" + key.etf + b"h\1" * (MAX_DEPTH + 1) + b"j"
    with pytest.raises(LimitExceeded, match="MAX_DEPTH"):
        read_map(deep, 0, {key}, AtomTable())
    assert read_map(deep, 0, {NODE}, AtomTable()) == ({}, len(deep))
    with pytest.raises(DecodeError, match="atom cache reference 1"):
        read_map(b"t\0\0\0\1R\1j", 0, {key}, AtomTable(), [key])
    with pytest.raises(DecodeError, match="bytes follow"):
        read_maps(EncodedTerm(b"jj"), {key}, AtomTable())


def test_an_encoded_term_is_made_plain_once() -> None:
    term = EncodedTerm(b"h\x02R\0R\1", atoms=(NODE, True))
    assert plain_bytes(term) == encode_term((NODE, True))
    assert plain_bytes(term) is plain_bytes(term)
    plain = EncodedTerm(b"j")
    assert plain_bytes(plain) is plain.data


@pytest.mark.parametrize("data", [b"h\x01R\0x", b"h\x01R\1", b"h\x02R\0", b"\xff"])
def test_what_was_not_read_is_checked_when_it_is_read_or_made_plain(data: bytes) -> None:
    spine = decode_spine(b"h\x01l" + data, 0, 1, AtomTable(), [NODE])[0]
    assert spine == EncodedTerm(b"l" + data, atoms=[NODE])
    for term in (spine, EncodedTerm(data, atoms=[NODE])):
        with pytest.raises(DecodeError):
            decode_encoded(term)
        with pytest.raises(EncodeError, match="passed on"):
            encode_term((1, term))


def test_encoded_terms_with_other_atoms_are_not_equal() -> None:
    one, other = EncodedTerm(b"R\0", atoms=(NODE,)), EncodedTerm(b"R\0", atoms=(Atom("other"),))
    assert one == EncodedTerm(b"R\0", atoms=(NODE,))
    assert one != other
    assert not exact_equal([one], [other])


def test_a_spine_costs_no_more_when_the_rest_is_large() -> None:
    def seconds(events: int) -> float:
        data = encode_term((NODE, (Atom("ok"), [b""] * events)))
        best = 9.0
        for _ in range(5):
            start = time.process_time()
            decode_spine(data, 0, 2, AtomTable())
            best = min(best, time.process_time() - start)
        return best

    assert seconds(200_000) < 0.01


# Encoding


class Colour(enum.IntEnum):
    RED = 3


class Word(str):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "same_as"),
    [
        ("grüße", "grüße".encode()),
        (Word("w"), b"w"),
        (Colour.RED, 3),
        (Point(1, "a"), (1, b"a")),
        (OrderedDict(a=1), {b"a": 1}),
        (bytearray(b"x"), b"x"),
        (memoryview(b"xyz")[1:], b"yz"),
        ([EncodedTerm(b"a\x05"), EncodedTerm(b"h\0")], [5, ()]),
        (tuple(range(300)), tuple(range(300))),
    ],
)
def test_ways_to_write_one_term_encode_alike(value: Term, same_as: Term) -> None:
    assert encode(value) == encode(same_as)
    assert exact_equal(decode(encode(value)), same_as)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "object is no Erlang term$"),
        ((1, [2, object()]), r"object is no Erlang term \(at \[1\]\[1\]\)"),
        ({b"k": {1, 2}}, r"set is no Erlang term \(at \[b'k'\]\)"),
        ({(1, object): 5}, "type is no Erlang term"),
        (ImproperList([1], object()), r"object is no Erlang term \(at \.tail\)"),
        ([{"k": 1, b"k": 2}], "the key 'k' twice, as str and as bytes"),
        ({b"deep": ({"k": 1, b"k": 2},)} | {"text": "text"}, "the key 'k' twice"),
        (float("nan"), "nan is no Erlang float"),
        ([float("-inf")], "-inf is no Erlang float"),
        ("\ud800", "not Unicode text"),
        (Pid(NODE, -1, 0, 0), "does not fit"),
        (Pid("a@b", 1, 0, 0), "does not fit"),  # type: ignore[arg-type]
        (Reference(NODE, 1, ()), "1 to 5 words"),
        (Reference(NODE, 1, (1 << 32,)), "does not fit"),
        (Port(NODE, 1 << 64, 0), "does not fit"),
        (Export(NODE, NODE, 256), "does not fit"),
    ],
)
def test_what_has_no_term_is_refused_with_its_place(value: Term, message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        encode(value)


def test_a_large_binary_is_not_copied_into_the_pieces() -> None:
    payload = bytes(1_000_000)
    pieces: list[bytes] = []
    encode_into(pieces, (Atom("ok"), payload))
    assert any(piece is payload for piece in pieces)


def test_compression_is_used_only_where_it_helps() -> None:
    assert encode(bytes(1000), compressed=6)[:2] == b"\x83P"
    assert encode(5, compressed=6) == b"\x83a\x05"
    assert decode(encode(bytes(1000), compressed=6)) == bytes(1000)
