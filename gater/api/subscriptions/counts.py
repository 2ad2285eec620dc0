"""Event counts out of the answer of `khepri_adv:get_many/3`, without decoding it.

    #{[streams, Stream] => #{child_list_length => Count}, ...}

Decoded by the general rules, a map whose keys are lists takes six times as long as what is wanted of it: 70 ms instead
of 12 for 10,000 streams. So the bytes are read by position as long as they look like this; anything else is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gater.api import schema
from gater.api.decoding import decoded
from gater.api.guarded import CHILD_LIST_LENGTH
from gater.erl.terms import EncodedTerm, Term

_U32: Final[Callable[[bytes, int], tuple[int]]] = struct.Struct(">I").unpack_from
_I32: Final[Callable[[bytes, int], tuple[int]]] = struct.Struct(">i").unpack_from
_LIST_OF_TWO: Final = b"l\0\0\0\2"
_NIL_MAP_OF_ONE: Final = b"jt\0\0\0\1"


class _Unlike(Exception):
    """The bytes do not look as they should."""


def read_counts(found: Term) -> dict[bytes, int]:
    """Events by stream. ValueError or LookupError if `found` is no such map, DecodeError if it is no term."""
    if type(found) is EncodedTerm:
        try:
            return _by_position(found.data, found.atoms)
        except (_Unlike, IndexError, struct.error):
            found = decoded(found)
    if not isinstance(found, Mapping):
        raise ValueError(f"no counts: {schema.show(found)}")
    counts: dict[bytes, int] = {}
    for path, properties in found.items():
        if type(path) not in (list, tuple) or not isinstance(properties, Mapping):
            raise ValueError(f"no count of a stream: {schema.show(path)}, {schema.show(properties)}")
        counts[path[1]] = properties.get(CHILD_LIST_LENGTH, 0)
    return counts


def _by_position(data: bytes, atoms: Sequence[Term]) -> dict[bytes, int]:
    if data[0] != 116:  # MAP_EXT
        raise _Unlike
    counts: dict[bytes, int] = {}
    key = b""
    pos = 5
    for _ in range(_U32(data, 1)[0]):
        if data[pos : pos + 5] != _LIST_OF_TWO:
            raise _Unlike
        pos = _after_atom(data, pos + 5)
        if data[pos] != 109:  # BINARY_EXT
            raise _Unlike
        start = pos + 5
        pos = start + _U32(data, pos + 1)[0]
        stream = data[start:pos]
        if data[pos : pos + 6] != _NIL_MAP_OF_ONE:
            raise _Unlike
        start, pos = pos + 6, _after_atom(data, pos + 6)
        if data[start:pos] != key:
            key = data[start:pos]
            named = atoms[key[1]] if key[0] == 82 else decoded(EncodedTerm(key))
            if named is not CHILD_LIST_LENGTH:
                raise _Unlike
        if data[pos] == 97:  # SMALL_INTEGER_EXT
            counts[stream] = data[pos + 1]
            pos += 2
        elif data[pos] == 98:  # INTEGER_EXT
            counts[stream] = _I32(data, pos + 1)[0]
            pos += 5
        else:
            raise _Unlike
    if pos != len(data):
        raise _Unlike
    return counts


def _after_atom(data: bytes, pos: int) -> int:
    tag = data[pos]
    if tag == 82:  # ATOM_CACHE_REF
        return pos + 2
    if tag == 119:  # SMALL_ATOM_UTF8_EXT
        return pos + 2 + data[pos + 1]
    if tag == 100:  # ATOM_EXT
        return pos + 3 + data[pos + 2]
    raise _Unlike
