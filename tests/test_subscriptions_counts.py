"""Event counts read by position are those of the decoded answer, whatever bytes come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.api.guarded import CHILD_LIST_LENGTH, STREAMS
from gater.api.subscriptions.counts import read_counts
from gater.erl.errors import DecodeError
from gater.erl.etf import encode_term
from gater.erl.terms import Atom, EncodedTerm, Term, TermMap

counts = st.dictionaries(st.binary(max_size=20), st.integers(0, 2**31 - 1) | st.integers(0, 300), max_size=20)


def answer(found: dict[bytes, int]) -> Term:
    return TermMap([([STREAMS, stream], {CHILD_LIST_LENGTH: count}) for stream, count in found.items()])


@given(counts)
def test_counts_are_read_from_plain_bytes(found: dict[bytes, int]) -> None:
    assert read_counts(EncodedTerm(encode_term(answer(found)))) == found
    assert read_counts(answer(found)) == found


@given(counts)
def test_counts_are_read_from_bytes_that_name_atoms_of_a_header(found: dict[bytes, int]) -> None:
    data = encode_term(answer(found)).replace(STREAMS.etf, b"R\1").replace(CHILD_LIST_LENGTH.etf, b"R\0")
    assert read_counts(EncodedTerm(data, atoms=(CHILD_LIST_LENGTH, STREAMS))) == found


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, 0),
        ({CHILD_LIST_LENGTH: 7, Atom("payload_version"): 3}, 7),
        ({CHILD_LIST_LENGTH: 2**40}, 2**40),
        ({Atom("payload_version"): 3}, 0),
    ],
)
def test_what_looks_otherwise_is_decoded(properties: Any, expected: int) -> None:
    found = TermMap([([STREAMS, b"a"], {CHILD_LIST_LENGTH: 1}), ([STREAMS, b"b"], properties)])
    assert read_counts(EncodedTerm(encode_term(found))) == {b"a": 1, b"b": expected}


@pytest.mark.parametrize("found", [[], b"x", Atom("error"), (1, 2)])
def test_what_is_no_map_is_refused(found: Term) -> None:
    with pytest.raises(ValueError, match="no counts"):
        read_counts(EncodedTerm(encode_term(found)))


@given(st.data())
def test_garbled_bytes_are_read_or_refused(data: st.DataObject) -> None:
    encoded = bytearray(encode_term(answer(data.draw(counts))))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(encoded[: data.draw(st.integers(1, len(encoded)))])
    try:
        read = read_counts(EncodedTerm(cut))
    except (DecodeError, ValueError, LookupError, TypeError):
        return
    assert type(read) is dict
