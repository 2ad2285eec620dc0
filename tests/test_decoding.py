"""Terms that are decoded along their last elements only, and what a `Decoder` remembers of them."""

from __future__ import annotations

import pytest

from gater.api import decoding
from gater.api.decoding import Decoder
from gater.erl import etf
from gater.erl.terms import Atom, EncodedTerm, Term

NUMBER, NAME, DATA = Atom("number"), Atom("name"), Atom("data")
KEYS = frozenset((NUMBER, NAME))


def encoded(term: Term) -> EncodedTerm:
    return EncodedTerm(etf.encode_term(term))


def test_of_a_map_only_the_fields_asked_for_are_read() -> None:
    decoder = Decoder()
    event = {NUMBER: 7, NAME: b"n", DATA: {b"x": [1, 2, 3]}}
    for _ in range(2):
        assert decoder.with_fields((Atom("ack"), encoded(event)), KEYS) == (Atom("ack"), {NUMBER: 7, NAME: b"n"})
    assert decoder.with_fields((Atom("ack"), encoded(event)), {DATA}) == (Atom("ack"), {DATA: {b"x": [1, 2, 3]}})
    assert decoder.with_fields((Atom("ack"), encoded([event])), KEYS) == (Atom("ack"), [event])
    assert decoder.with_fields(Atom("ack"), KEYS) is Atom("ack")


def test_of_an_encoded_tuple_the_last_element_stays_encoded() -> None:
    decoder = Decoder()
    assert decoder.opened(encoded((NAME, [1000, 2]))) == (NAME, encoded([1000, 2]))
    assert decoder.opened(encoded((NAME, NUMBER))) == (NAME, NUMBER)
    assert decoder.opened(encoded([NAME])) == encoded([NAME])
    assert decoder.opened((NAME, [])) == (NAME, [])


@pytest.mark.changes_source
def test_a_map_that_comes_again_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, reads = Decoder(), []
    read_map = etf.read_map
    monkeypatch.setattr(decoding.etf, "read_map", lambda *args: reads.append(args) or read_map(*args))
    for number in (1, 2, 1, 1, 2):
        assert decoder.with_fields((encoded({NUMBER: number}),), KEYS) == ({NUMBER: number},)
    assert len(reads) == 2


def test_the_same_bytes_are_another_map_where_they_refer_to_other_atoms() -> None:
    decoder = Decoder()
    # #{ATOM_CACHE_REF 0 => 7}
    record = b"t\0\0\0\1R\0a\7"
    assert decoder.with_fields((EncodedTerm(record, 0, (NUMBER,)),), KEYS) == ({NUMBER: 7},)
    assert decoder.with_fields((EncodedTerm(record, 0, (NAME,)),), KEYS) == ({NAME: 7},)
    assert decoder.with_fields((EncodedTerm(record, 0, (DATA,)),), KEYS) == ({},)


def test_what_is_remembered_is_bounded() -> None:
    decoder = Decoder()
    for number in range(decoding.MAX_MAPS_KEPT + 10):
        decoder.with_fields((encoded({NUMBER: number}),), KEYS)
    decoder.with_fields((encoded({NUMBER: 0, DATA: bytes(decoding.MAX_MAP_BYTES)}),), KEYS)
    assert len(decoder._maps) == decoding.MAX_MAPS_KEPT
    assert max(map(len, decoder._maps)) <= decoding.MAX_MAP_BYTES
