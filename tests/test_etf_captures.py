"""What OTP 25's `term_to_binary` made of 640 terms decodes to those terms, and comes back the same after encoding."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gater.erl.etf import decode, encode, skip_term, to_plain
from gater.erl.terms import (
    BitString,
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

CAPTURES = Path(__file__).parent / "captures"
VECTORS: list[dict[str, Any]] = json.loads(gzip.decompress((CAPTURES / "etf.json.gz").read_bytes()))["vectors"]


@pytest.fixture(autouse=True)
def _long_decimal_numbers() -> Iterator[None]:
    """The captures write an integer of 16,384 bits in decimal, which Python refuses to read by default."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(before)


def term_of(tree: dict[str, Any]) -> Term:
    """The Python term of a typed tree (see `captures/README.md`)."""
    match tree:
        case {"atom": name}:
            return atom(name)
        case {"int": number}:
            return number
        case {"bigint": digits}:
            return int(digits)
        case {"float": data}:
            return struct.unpack(">d", bytes.fromhex(data))[0]
        case {"binary": data}:
            return bytes.fromhex(data)
        case {"bitstring": data, "bits_in_last_byte": bits}:
            return BitString(bytes.fromhex(data), bits)
        case {"tuple": elements}:
            return tuple(map(term_of, elements))
        case {"improper": elements, "tail": tail}:
            return ImproperList(map(term_of, elements), term_of(tail))
        case {"list": elements}:
            return list(map(term_of, elements))
        case {"map": pairs}:
            return TermMap((term_of(key), term_of(value)) for key, value in pairs)
        case {"pid": pid}:
            return Pid(atom(pid["node"]), pid["id"], pid["serial"], pid["creation"])
        case {"ref": ref}:
            return Reference(atom(ref["node"]), ref["creation"], tuple(ref["ids"]))
        case {"port": port}:
            return Port(atom(port["node"]), port["id"], port["creation"])
        case {"export": [module, function, arity]}:
            return Export(atom(module), atom(function), arity)
    raise AssertionError(f"unknown kind of term: {tree}")


@pytest.mark.parametrize("form", ["plain", "minor1", "compressed"])
def test_terms_of_a_beam_decode_to_their_value_and_survive_encoding(form: str) -> None:
    seen = 0
    for vector in VECTORS:
        if vector[form] is None:
            continue
        data = bytes.fromhex(vector[form])
        decoded = decode(data)
        assert exact_equal(decode(encode(decoded)), decoded)
        assert exact_equal(decode(encode(decoded, compressed=6)), decoded)
        if "fun" in vector["term"]:
            assert isinstance(decoded, Fun)
        else:
            assert exact_equal(decoded, term_of(vector["term"]))
        if form != "compressed":
            assert skip_term(data, 1) == len(data)
            assert to_plain(data, 1, ()) == data[1:]
        seen += 1
    assert seen > 200
