"""`erlang:phash2/1,2`: the hash of a term that is the same on every BEAM, of any release and on any machine.

The algorithm is `make_hash2` of the Erlang runtime (`erts/emulator/beam`), built on Bob Jenkins' mix of three 32-bit
words; its results are checked against those of a BEAM (`tests/captures/phash2.json.gz`). Everything is hashed from the
left with one 32-bit state; only the pairs of a map, which have no order, are hashed each for itself and then joined by
exclusive or.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from gater.erl.errors import DecodeError
from gater.erl.etf import AtomTable, decode_encoded, decode_term
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
    as_plain,
    atom_bytes,
)

_MASK: Final = 0xFFFFFFFF
_WORDS: Final[Callable[[bytes, int], tuple[int, int, int]]] = struct.Struct("<III").unpack_from

# Each kind of term is mixed in with a multiple of the golden ratio of its own (`HCONST_n` in the runtime).
_GOLDEN: Final = 0x9E3779B9
_NIL, _ATOM, _STRING, _PID, _PORT, _REFERENCE = (_GOLDEN * n & _MASK for n in (2, 3, 4, 5, 6, 7))
_TUPLE, _NEGATIVE, _POSITIVE, _FLOAT, _BINARY = (_GOLDEN * n & _MASK for n in (9, 10, 11, 12, 13))
_FUNCTION, _BITS, _MAP, _PAIRS = (_GOLDEN * n & _MASK for n in (14, 15, 16, 19))

_FIRST_NIL: Final = 3468870702
_NIL_VALUE: Final = 2


class _Mark:
    """What stands on the stack among terms: the end of a pair or of a map, or the rest of a list."""

    __slots__ = ("elements", "index", "tail")

    def __init__(self, elements: list[Term], index: int, tail: Term) -> None:
        self.elements = elements
        self.index = index
        self.tail = tail


_NO_TAIL: Final = _Mark([], 0, None)
_END_OF_PAIR: Final = _Mark([], 0, None)
_END_OF_MAP: Final = _Mark([], 0, None)


def phash2(term: Term, range: int = 1 << 27) -> int:
    """`erlang:phash2(Term, Range)`: a number from 0 to `range` - 1 (`range` is at most 2^32).

    Raises TypeError for a Python value that is no term, ValueError for a range that Erlang refuses, and `DecodeError`
    or `LimitExceeded` for a closure in the old format or one that holds what is no term (a map with a key twice, ..).
    """
    if not 0 < range <= 1 << 32:
        raise ValueError(f"phash2 has a range from 1 to 2^32, not {range}")
    return _hash(term) % range


def _hash(root: Term) -> int:
    hash = 0
    pairs = 0
    stack: list[Any] = [root]
    while stack:
        term = stack.pop()
        kind = type(term)
        if kind is Atom:
            value = _atom_hash(term.etf)
            hash = _mix(_ATOM + value, _ATOM, hash) if hash else value
        elif kind is bytes:
            hash = _block(term, (_BINARY + hash) & _MASK) if term else (_BINARY + hash) & _MASK
        elif kind is tuple:
            hash = _mix(_TUPLE + len(term), _TUPLE, hash)
            stack.extend(term[::-1])
        elif kind is int:
            hash = _integer(term, hash)
        elif kind is list:
            if term:
                stack.append(_Mark(term, 0, _NO_TAIL))
            else:
                hash = _mix(_NIL + _NIL_VALUE, _NIL, hash) if hash else _FIRST_NIL
        elif kind is _Mark:
            if term is _END_OF_PAIR:
                pairs ^= hash
                hash = 0
            elif term is _END_OF_MAP:
                hash = _mix(_PAIRS + pairs, _PAIRS, stack.pop())
                pairs = stack.pop()
            else:
                hash = _list(term, hash, stack)
        elif kind is str:
            stack.append(term.encode())
        elif term is None or kind is bool:
            value = _atom_hash(atom_bytes(term))
            hash = _mix(_ATOM + value, _ATOM, hash) if hash else value
        elif kind is float:
            low, high = struct.unpack("<II", struct.pack("<d", term or 0.0))
            hash = _mix(_FLOAT + high, _FLOAT + low, hash)
        elif kind is dict or kind is TermMap:
            hash = _mix(_MAP + len(term), _MAP, hash)
            if term:
                stack += (pairs, hash, _END_OF_MAP)
                hash = pairs = 0
                for key, under_key in term.items() if kind is dict else term.pairs():
                    stack += (_END_OF_PAIR, under_key, key)
        elif kind is ImproperList:
            stack.append(_Mark(term.elements, 0, term.tail))
        elif kind is Pid:
            hash = _mix(_PID + term.id, _PID, hash)
        elif kind is Reference:
            hash = _mix(_REFERENCE + term.ids[0], _REFERENCE, hash)
        elif kind is Port:
            hash = _mix(_PORT + (term.id & _MASK), _PORT + (term.id >> 32), hash)
        elif kind is BitString:
            hash = _block(term.data[:-1], (_BINARY + hash) & _MASK)
            last = term.data[-1] >> (8 - term.bits_in_last_byte)
            hash = _mix(_BITS + term.bits_in_last_byte, _BITS + last, hash)
        elif kind is Export:
            hash = _mix(_GOLDEN + term.arity, _GOLDEN + _atom_hash(atom_bytes(term.module)), hash)
            hash = _mix(_FUNCTION + _atom_hash(atom_bytes(term.function)), _FUNCTION, hash)
        elif kind is Fun:
            hash = _fun(term, hash, stack)
        elif kind is EncodedTerm:
            stack.append(decode_encoded(term))
        else:
            stack.append(as_plain(term))
    return hash


def _mix(a: int, b: int, c: int) -> int:
    """Jenkins' mix of three words; the third one of the result."""
    a = (a - b - c & _MASK) ^ c >> 13
    b = (b - c - a ^ a << 8) & _MASK
    c = (c - a - b & _MASK) ^ b >> 13
    a = (a - b - c & _MASK) ^ c >> 12
    b = (b - c - a ^ a << 16) & _MASK
    c = (c - a - b & _MASK) ^ b >> 5
    a = (a - b - c & _MASK) ^ c >> 3
    b = (b - c - a ^ a << 10) & _MASK
    return (c - a - b & _MASK) ^ b >> 15


def _block(data: bytes, initial: int) -> int:
    """The hash of a block of bytes: twelve at a time, then the rest with the length above them."""
    a = b = _GOLDEN
    c = initial
    size = len(data)
    whole = size - size % 12
    for pos in range(0, whole, 12):
        x, y, z = _WORDS(data, pos)
        a += x
        b += y
        c += z
        a = (a - b - c & _MASK) ^ (c & _MASK) >> 13
        b = (b - c - a ^ a << 8) & _MASK
        c = (c - a - b & _MASK) ^ b >> 13
        a = (a - b - c & _MASK) ^ c >> 12
        b = (b - c - a ^ a << 16) & _MASK
        c = (c - a - b & _MASK) ^ b >> 5
        a = (a - b - c & _MASK) ^ c >> 3
        b = (b - c - a ^ a << 10) & _MASK
        c = (c - a - b & _MASK) ^ b >> 15
    # The lowest byte of the third word is the length's.
    rest = data[whole:]
    x, y, z = _WORDS(rest[:8].ljust(8, b"\0") + b"\0" + rest[8:].ljust(3, b"\0"), 0)
    return _mix(a + x & _MASK, b + y & _MASK, c + z + size & _MASK)


def _integer(number: int, hash: int) -> int:
    if -0x8000000 <= number < 0x8000000:
        if number < 0:
            hash = _mix(_GOLDEN - number, _GOLDEN, hash)
        return _mix(_GOLDEN + number & _MASK, _GOLDEN, hash)
    constant = _NEGATIVE if number < 0 else _POSITIVE
    magnitude = abs(number)
    digits = magnitude.to_bytes((magnitude.bit_length() + 63) // 64 * 8, "little")
    for low, high in struct.iter_unpack("<II", digits):
        hash = _mix(constant + low & _MASK, constant + high & _MASK, hash)
    return hash


def _list(rest: _Mark, hash: int, stack: list[Any]) -> int:
    """Hash the bytes a list goes on with, four at a time; what follows them is left on the stack."""
    elements, index = rest.elements, rest.index
    count = word = 0
    size = len(elements)
    while index < size:
        element = elements[index]
        if not isinstance(element, int) or isinstance(element, bool) or not 0 <= element <= 255:
            break
        word = word << 8 | element
        count += 1
        index += 1
        if count == 4:
            hash = _mix(_STRING + word, _STRING, hash)
            count = word = 0
    if count:
        hash = _mix(_STRING + word, _STRING, hash)
    if index < size:
        rest.index = index + 1
        stack += (rest, elements[index])
    else:
        stack.append([] if rest.tail is _NO_TAIL else rest.tail)
    return hash


@lru_cache(maxsize=4096)
def _atom_hash(encoded: bytes) -> int:
    """The hash an atom has in the atom table of a BEAM (PJW), where the characters up to 255 count as one byte."""
    name = encoded[3 if encoded[0] == 118 else 2 :].decode()
    hash = 0
    for char in name:
        for byte in (ord(char),) if char <= "\xff" else char.encode():
            hash = (hash << 4) + byte
            high = hash & 0xF0000000
            if high:
                hash ^= high >> 24 ^ high
    return hash


def _fun(fun: Fun, hash: int, stack: list[Any]) -> int:
    """A closure: module, index, old uniq and the values it closes over. DecodeError for one of the old format."""
    if fun.tag != 112:
        raise DecodeError("a fun in the old format (FUN_EXT) has no hash")
    index, free = struct.unpack_from(">II", fun.body, 21)
    atoms = AtomTable()
    pos = 29
    fields = []
    while pos < len(fun.body):
        field, pos = decode_term(fun.body, pos, atoms)
        fields.append(field)
    module, _old_index, old_uniq, _creator = fields[:4]
    hash = _mix(_GOLDEN + free, _GOLDEN + _atom_hash(atom_bytes(module)), hash)
    hash = _mix(_GOLDEN + index & _MASK, _GOLDEN + old_uniq & _MASK, hash)
    stack.extend(fields[:3:-1])
    return hash
