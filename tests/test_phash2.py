"""`phash2` gives what a BEAM gives."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gater.erl.etf import decode, encode_term
from gater.erl.phash2 import phash2
from gater.erl.terms import Atom, EncodedTerm, TermMap

VECTORS = json.loads(
    gzip.decompress((Path(__file__).parent / "captures" / "phash2.json.gz").read_bytes()),
)["vectors"]


def test_every_recorded_term_hashes_as_on_a_beam() -> None:
    assert len(VECTORS) > 2000
    for vector in VECTORS:
        term = decode(bytes.fromhex(vector["etf"]))
        hashes = phash2(term), phash2(term, 1 << 32), phash2(term, 1000)
        assert hashes == (vector["phash2"], vector["phash2_32"], vector["phash2_1000"]), vector["etf"][:200]


def test_text_hashes_as_its_binary_and_an_encoded_term_as_what_it_stands_for() -> None:
    assert phash2("grüße") == phash2("grüße".encode())
    term = (Atom("ok"), [1, {b"k": 2.5}])
    assert phash2(EncodedTerm(encode_term(term))) == phash2(term)
    assert phash2(TermMap([(1, 2)])) == phash2({1: 2})


def test_a_term_nested_ten_thousand_deep_has_a_hash() -> None:
    chain: object = ()
    lists: object = []
    maps: object = {}
    for _ in range(10_000):
        chain, lists, maps = (chain,), [lists], {b"k": maps}
    assert len({phash2(chain), phash2(lists), phash2(maps)}) == 3


@pytest.mark.parametrize("range_", [0, -1, (1 << 32) + 1])
def test_a_range_that_erlang_refuses_is_refused(range_: int) -> None:
    with pytest.raises(ValueError, match="range"):
        phash2(b"key", range_)


def test_a_value_that_is_no_term_has_no_hash() -> None:
    with pytest.raises(TypeError, match="object is no Erlang term"):
        phash2(object())
