"""The external term format: terms to bytes and back.

Follows the ERTS user's guide, chapter "External Term Format"; the section names there are the tag names here. Decoding
and encoding are each one loop with a stack of its own, so no depth of nesting recurses in Python or C. Tags are tested
in the order in which they occur in messages of real nodes. Bytes of a remote raise `DecodeError` or `LimitExceeded`,
nothing else; what this side cannot encode raises `EncodeError`.

This module also runs compiled by mypyc (`setup.py`). There a slice of bytes that would end before it starts is a
SystemError, not empty.

How bytes get here (distribution header, atom cache, fragments) is `dist_header.py`'s business.
"""

from __future__ import annotations

import gc
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from math import isfinite
from types import FunctionType
from typing import Final

from gater.erl.errors import DecodeError, EncodeError, LimitExceeded, RemoteProtocolError
from gater.erl.terms import (
    MAX_ATOM_CHARACTERS,
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
    as_plain,
    atom,
    atom_bytes,
    exact_key,
)

__all__ = [
    "COMPILED",
    "MAX_ATOMS_PER_PEER",
    "MAX_DEPTH",
    "MAX_ELEMENTS",
    "MAX_IDENTITIES_KEPT",
    "MAX_KEYS_OF_ONE_HASH",
    "MAX_TERM_BYTES",
    "VERSION",
    "AtomRefs",
    "AtomTable",
    "decode",
    "decode_encoded",
    "decode_spine",
    "decode_term",
    "encode",
    "encode_into",
    "encode_term",
    "fun_creator",
    "plain_bytes",
    "skip_term",
    "to_plain",
]

VERSION: Final = 131
"""The byte before every term that stands alone."""

MAX_TERM_BYTES: Final = 128 * 1024 * 1024
"""The largest encoded term, and the largest declared size of a compressed one (checked before inflating). A reply of
100,000 events of one kilobyte fits; a peer cannot make this node reserve more than it may well have."""

MAX_ELEMENTS: Final = 8_000_000
"""The most terms in one term. One byte on the wire can become an empty list of 64 bytes in memory, so bytes alone do
not bound memory; this does, at half a gigabyte for usual terms and three quarters for the worst."""

_MAP_WEIGHT: Final = 4
"""What a map counts beside its keys and values: one of a single pair takes the memory of seven empty lists."""

MAX_ATOMS_PER_PEER: Final = 262_144
"""The most different atoms one peer may send over the life of a connection. A whole BEAM has room for 1,048,576; a big
release knows 50,000, of which few travel. Bounds the table at some 50 MB."""

MAX_IDENTITIES_KEPT: Final = 1024
"""Pids and references of one peer that are kept decoded. A call names its caller four times and its reference three
times within a moment; 64 callers at once need 128. Bounds what is kept at some 300 kB a peer."""

MAX_KEYS_OF_ONE_HASH: Final = 64
"""Keys of one map that may have the same Python hash. `1`, `1.0` and `true` have, and so have integers and pids chosen
for it: a map of `N` of those would take N * N comparisons to make. Keys that were not chosen do not meet."""

_UNCHECKED_PAIRS: Final = 256
"""Maps up to this size are made without a look at the hashes of their keys: the worst ones cost a millisecond."""

_UNCOUNTED_BYTES: Final = 4 * 1024 * 1024
"""Terms up to this size cannot reach `MAX_ELEMENTS`; larger ones are counted before they are built."""

_UNCOLLECTED_BYTES: Final = 256 * 1024
"""While a larger term is built, Python's garbage collector rests. Nothing built becomes garbage meanwhile, yet it
would be gone through again each time it has grown by a quarter: 10 MB of nested lists took 16 s instead of 2 s."""

_MAX_REFERENCE_WORDS: Final = 5
"""Words in a reference (`DFLAG_V4_NC`, OTP 24)."""

_U16: Final[Callable[[bytes, int], tuple[int]]] = struct.Struct(">H").unpack_from
_U32: Final[Callable[[bytes, int], tuple[int]]] = struct.Struct(">I").unpack_from
_I32: Final[Callable[[bytes, int], tuple[int]]] = struct.Struct(">i").unpack_from
_F64: Final[Callable[[bytes, int], tuple[float]]] = struct.Struct(">d").unpack_from
_NEW_PID: Final[Callable[[bytes, int], tuple[int, int, int]]] = struct.Struct(">III").unpack_from
_OLD_PID: Final[Callable[[bytes, int], tuple[int, int, int]]] = struct.Struct(">IIB").unpack_from
_OLD_PORT: Final[Callable[[bytes, int], tuple[int, int]]] = struct.Struct(">IB").unpack_from
_NEW_PORT: Final[Callable[[bytes, int], tuple[int, int]]] = struct.Struct(">II").unpack_from
_V4_PORT: Final[Callable[[bytes, int], tuple[int, int]]] = struct.Struct(">QI").unpack_from

_pack_tag_u8: Final = struct.Struct(">BB").pack
_pack_tag_u32: Final = struct.Struct(">BI").pack
_pack_integer: Final = struct.Struct(">Bi").pack
_pack_float: Final = struct.Struct(">Bd").pack
_pack_new_pid: Final = struct.Struct(">III").pack
_pack_new_port: Final = struct.Struct(">II").pack
_pack_v4_port: Final = struct.Struct(">QI").pack
_pack_u32: Final = struct.Struct(">I").pack

_CREATION_AND_WORDS: Final = tuple(struct.Struct(f">{1 + words}I") for words in range(_MAX_REFERENCE_WORDS + 1))

_OLD_FLOAT: Final = re.compile(rb"[ ]*[+-]?\d+\.\d+([eE][+-]?\d+)?\x00*")

# What is being gathered when a container is finished.
_ROOT: Final = 0
_TUPLE: Final = 1
_LIST: Final = 2
_TAIL: Final = 3
_MAP: Final = 4

_NO_CACHE: Final[Sequence[Term]] = ()


class AtomTable(dict[bytes, Term]):
    """The atoms one peer has sent so far, and pids and references it has sent lately: their bytes to their terms.

    Looking an unknown one up decodes and adds it; `DecodeError` if it is no atom, `LimitExceeded`
    (`MAX_ATOMS_PER_PEER`) if the peer has sent too many. Pids and references are forgotten once there are
    `MAX_IDENTITIES_KEPT` of them.
    """

    __slots__ = ("_identities", "max_atoms")

    def __init__(self, max_atoms: int = MAX_ATOMS_PER_PEER) -> None:
        super().__init__()
        self.max_atoms = max_atoms
        self._identities: list[bytes] = []

    def __missing__(self, encoded: bytes) -> Term:
        identities = self._identities
        if encoded[0] == 88 or encoded[0] == 90:
            term = _identity(encoded, self)
            if len(identities) >= MAX_IDENTITIES_KEPT:
                for known in identities:
                    del self[known]
                identities.clear()
            identities.append(encoded)
        else:
            if len(self) - len(identities) >= self.max_atoms:
                raise LimitExceeded("MAX_ATOMS_PER_PEER", self.max_atoms)
            term = _atom_of(encoded)
        self[encoded] = term
        return term


def _atom_of(encoded: bytes) -> Term:
    """The atom whose tag, length and name are exactly `encoded`."""
    tag = encoded[0]
    if tag == 100 and encoded[1]:
        raise DecodeError(f"an atom has at most {MAX_ATOM_CHARACTERS} characters, this one has more")
    start, declared = (2, encoded[1]) if tag in (115, 119) else (3, encoded[1] << 8 | encoded[2])
    name_bytes = encoded[start:]
    if len(name_bytes) != declared:
        raise DecodeError(f"an atom of {declared} bytes is cut off after {len(name_bytes)}")
    try:
        name = name_bytes.decode("utf-8" if tag >= 118 else "latin-1")
    except UnicodeDecodeError as error:
        raise DecodeError(f"the name of an atom is not UTF-8: {error.reason}") from None
    if len(name) > MAX_ATOM_CHARACTERS:
        raise DecodeError(f"an atom has at most {MAX_ATOM_CHARACTERS} characters, this one has {len(name)}")
    return atom(name)


def _identity(encoded: bytes, atoms: AtomTable) -> Term:
    """The pid or reference (NEW_PID_EXT, NEWER_REFERENCE_EXT, the node in full) whose bytes are exactly `encoded`.

    If some are missing, they are missing from the name of the node, which raises DecodeError or IndexError.
    """
    if encoded[0] == 88:
        start = len(encoded) - 12
        if start < 3:
            raise IndexError
        node = atoms[encoded[1:start]]
        number, serial, creation = _NEW_PID(encoded, start)
        return Pid(node, number, serial, creation)
    words = _words(encoded, 1)
    start = len(encoded) - 4 - 4 * words
    if start < 5:
        raise IndexError
    node = atoms[encoded[3:start]]
    numbers = _CREATION_AND_WORDS[words].unpack_from(encoded, start)
    return Reference(node, numbers[0], numbers[1:])


def decode(
    data: bytes | bytearray | memoryview,
    *,
    atoms: AtomTable | None = None,
    max_bytes: int = MAX_TERM_BYTES,
    max_elements: int = MAX_ELEMENTS,
) -> Term:
    """The term that `data` holds, from the version byte 131 to the end; compressed terms are inflated.

    `atoms` is the table of the peer that sent it; without one, a fresh table bounds the atoms of this term alone.
    Raises `DecodeError` (also when bytes follow the term) and `LimitExceeded`.
    """
    data = bytes(data)
    if len(data) > max_bytes:
        raise LimitExceeded("MAX_TERM_BYTES", max_bytes, len(data))
    if len(data) < 2:
        raise DecodeError(f"{len(data)} bytes hold no term with its version byte")
    if data[0] != VERSION:
        raise DecodeError(f"a term starts with byte {VERSION}, not {data[0]}")
    start = 1
    if data[1] == 80:
        data, start = _inflate(data, max_bytes), 0
    term, end = decode_term(data, start, AtomTable() if atoms is None else atoms, max_elements=max_elements)
    if end != len(data):
        raise DecodeError(f"{len(data) - end} bytes follow the term")
    return term


def _inflate(data: bytes, max_bytes: int) -> bytes:
    """The bare term in a compressed one (131, 80, size of 4 bytes, zlib stream), never more than it declares."""
    if len(data) < 6:
        raise DecodeError("a compressed term is cut off in its header")
    (size,) = _U32(data, 2)
    if size > max_bytes:
        raise LimitExceeded("MAX_TERM_BYTES", max_bytes, size)
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(memoryview(data)[6:], size + 1)
    except zlib.error as error:
        raise DecodeError(f"a compressed term does not inflate: {error}") from None
    if len(inflated) != size:
        raise DecodeError(
            f"a compressed term declares {size} bytes but holds {'more' if len(inflated) > size else 'less'}"
        )
    if not inflater.eof or inflater.unused_data:
        raise DecodeError("a compressed term does not end with its zlib stream")
    return inflated


def decode_term(
    data: bytes,
    pos: int,
    atoms: AtomTable,
    atom_cache: Sequence[Term] | None = None,
    *,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Term, int]:
    """The term that starts at `pos` (no version byte) and the position after it.

    `atom_cache` are the atoms of this message's distribution header, which ATOM_CACHE_REF (82) points into.
    """
    cache = _NO_CACHE if atom_cache is None else atom_cache
    size = len(data) - pos
    if size > _UNCOUNTED_BYTES:
        skip_term(data, pos, cache, max_elements=max_elements)
    pause = size > _UNCOLLECTED_BYTES and gc.isenabled()
    if pause:
        gc.disable()
    try:
        terms, pos_after = _decode(data, pos, atoms, cache, 1)
        return terms[0], pos_after
    except (IndexError, struct.error):
        skip_term(data, pos, cache, max_elements=max_elements)
        raise DecodeError("a term is cut off") from None
    finally:
        if pause:
            gc.enable()


def _decode(data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term], wanted: int) -> tuple[list[Term], int]:
    """`wanted` terms from `pos` on and the position after them; reading past the end is an IndexError or struct.error.

    Containers are gathered one at a time: `elements` of the innermost open one, the others on the stack. A map is
    gathered as the flat list of its keys and values.
    """
    u32 = _U32
    elements: list[Term] = []
    left: Iterator[None] = repeat(None, wanted)
    gathering = _ROOT
    stack: list[tuple[list[Term], Iterator[None], int]] = []
    deep = False
    digests: dict[int, bytes] = {}
    while True:
        for _ in left:
            tag = data[pos]
            if tag == 82:  # ATOM_CACHE_REF
                elements.append(cache[data[pos + 1]])
                pos += 2
            elif tag == 100:  # ATOM_EXT; no atom is longer than the low byte of its length can say
                end = pos + 3 + data[pos + 2]
                elements.append(atoms[data[pos:end]])
                pos = end
            elif tag == 119:  # SMALL_ATOM_UTF8_EXT
                end = pos + 2 + data[pos + 1]
                elements.append(atoms[data[pos:end]])
                pos = end
            elif tag == 109:  # BINARY_EXT
                (count,) = u32(data, pos + 1)
                pos += 5
                end = pos + count
                elements.append(data[pos:end])
                pos = end
            elif tag == 97:  # SMALL_INTEGER_EXT
                elements.append(data[pos + 1])
                pos += 2
            elif tag == 104:  # SMALL_TUPLE_EXT
                count = data[pos + 1]
                pos += 2
                if count:
                    opened = _TUPLE
                    break
                elements.append(())
            elif tag == 106:  # NIL_EXT
                elements.append([])
                pos += 1
            elif tag == 116:  # MAP_EXT
                (count,) = u32(data, pos + 1)
                pos += 5
                if count:
                    count += count
                    opened = _MAP
                    break
                elements.append({})
            elif tag == 108:  # LIST_EXT
                (count,) = u32(data, pos + 1)
                pos += 5
                opened = _LIST
                break
            elif tag == 98:  # INTEGER_EXT
                elements.append(_I32(data, pos + 1)[0])
                pos += 5
            elif tag == 88:  # NEW_PID_EXT
                tag = data[pos + 1]
                if tag == 119 or tag == 100:
                    end = pos + 15 + data[pos + 2] if tag == 119 else pos + 16 + data[pos + 3]
                    elements.append(atoms[data[pos:end]])
                    pos = end
                elif tag == 82:
                    node = cache[data[pos + 2]]
                    node_bytes = node.etf if type(node) is Atom else atom_bytes(node)
                    end = pos + 15
                    elements.append(atoms[b"X%b%b" % (node_bytes, data[pos + 3 : end])])
                    pos = end
                else:
                    term, pos = _pid(data, pos + 1, atoms, cache)
                    elements.append(term)
            elif tag == 90:  # NEWER_REFERENCE_EXT; its words are counted by the low byte of two
                tag = data[pos + 3]
                if tag == 119 or tag == 100:
                    end = (pos + 9 + data[pos + 4] if tag == 119 else pos + 10 + data[pos + 5]) + 4 * data[pos + 2]
                    elements.append(atoms[data[pos:end]])
                    pos = end
                elif tag == 82:
                    node = cache[data[pos + 4]]
                    node_bytes = node.etf if type(node) is Atom else atom_bytes(node)
                    end = pos + 9 + 4 * data[pos + 2]
                    elements.append(atoms[b"Z%b%b%b" % (data[pos + 1 : pos + 3], node_bytes, data[pos + 5 : end])])
                    pos = end
                else:
                    term, pos = _reference(data, pos + 1, atoms, cache)
                    elements.append(term)
            elif tag == 110:  # SMALL_BIG_EXT
                end = pos + 3 + data[pos + 1]
                number = int.from_bytes(data[pos + 3 : end], "little")
                elements.append(-number if data[pos + 2] else number)
                pos = end
            elif tag == 70:  # NEW_FLOAT_EXT
                (value,) = _F64(data, pos + 1)
                if not isfinite(value):
                    raise DecodeError(f"{value} is no Erlang float")
                elements.append(value)
                pos += 9
            elif tag == 107:  # STRING_EXT
                (count,) = _U16(data, pos + 1)
                pos += 3
                end = pos + count
                elements.append(list(data[pos:end]))
                pos = end
            elif tag == 105:  # LARGE_TUPLE_EXT
                (count,) = u32(data, pos + 1)
                pos += 5
                if count:
                    opened = _TUPLE
                    break
                elements.append(())
            else:
                term, pos = _rare(tag, data, pos + 1, atoms, cache)
                elements.append(term)
        else:
            if gathering == _TUPLE:
                done: Term = tuple(elements)
            elif gathering == _MAP:
                done = {}
                if deep:
                    done = _careful_map(elements, digests)
                else:
                    flat = iter(elements)
                    try:
                        if len(elements) > 2 * _UNCHECKED_PAIRS:
                            _check_hashes(elements[::2])
                        for key in flat:
                            done[key] = next(flat)
                    except (TypeError, RecursionError):
                        done = _careful_map(elements, digests)
                    if len(done) + len(done) != len(elements):
                        done = _careful_map(elements, digests)
            elif gathering == _LIST:
                tag = data[pos]
                if tag == 106:
                    pos += 1
                    done = elements
                elif tag == 108:  # a list as the tail of a list goes on with it
                    left = repeat(None, u32(data, pos + 1)[0])
                    pos += 5
                    continue
                else:
                    left = repeat(None, 1)
                    gathering = _TAIL
                    continue
            elif gathering == _TAIL:
                tail = elements.pop()
                if not elements:
                    done = tail
                elif type(tail) is list:
                    elements += tail
                    done = elements
                else:
                    done = ImproperList(elements, tail)
            else:
                if pos > len(data):
                    raise IndexError
                return elements, pos
            elements, left, gathering = stack.pop()
            elements.append(done)
            continue
        stack.append((elements, left, gathering))
        if len(stack) > 100:
            deep = True
            if len(stack) > MAX_DEPTH:
                raise LimitExceeded("MAX_DEPTH", MAX_DEPTH)
        elements = []
        left = repeat(None, count)
        gathering = opened


def _check_hashes(keys: list[Term]) -> None:
    """LimitExceeded if more than `MAX_KEYS_OF_ONE_HASH` of the keys have one hash; TypeError if one has none."""
    hashes = list(map(hash, keys))
    if len(hashes) - len(set(hashes)) >= MAX_KEYS_OF_ONE_HASH:
        ((_, most),) = Counter(hashes).most_common(1)
        if most > MAX_KEYS_OF_ONE_HASH:
            raise LimitExceeded("MAX_KEYS_OF_ONE_HASH", MAX_KEYS_OF_ONE_HASH, most)


def _careful_map(flat: list[Term], digests: dict[int, bytes]) -> Term:
    """The map of these keys and values, when a `dict` cannot (or might not, safely) tell its keys apart.

    `digests` are those of the maps of the same term that stand in keys (see `exact_key`).
    """
    keys = [exact_key(key, digests) for key in flat[::2]]
    if len(keys) > _UNCHECKED_PAIRS:
        _check_hashes(keys)
    pairs = iter(flat)
    careful = TermMap.of_exact(zip(keys, zip(pairs, pairs, strict=True), strict=True))
    if len(careful) * 2 != len(flat):
        raise DecodeError("a map has a key twice")
    if all(type(key) in _SHALLOW for key in careful):
        plain = dict(careful.pairs())
        if len(plain) == len(careful):
            return plain
    return careful


_LEAVES: Final = frozenset({Atom, bytes, str, int, float, bool, type(None)})
_SHALLOW: Final = frozenset({Atom, bytes, int, float, bool, type(None), Pid, Reference, Port, Export, Fun, BitString})


def _atom_at(data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term]) -> tuple[Term, int]:
    """The atom at `pos` and the position after it. DecodeError if something else stands there."""
    tag = data[pos]
    if tag == 82:
        return cache[data[pos + 1]], pos + 2
    if tag in (119, 115):
        end = pos + 2 + data[pos + 1]
    elif tag in (100, 118):
        end = pos + 3 + _U16(data, pos + 1)[0]
    else:
        raise DecodeError(f"an atom is expected at byte {pos}, not tag {tag}")
    return atoms[data[pos:end]], end


def _pid(data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term]) -> tuple[Term, int]:
    """The pid whose node stands at `pos` (NEW_PID_EXT) and the position after it."""
    node, pos = _atom_at(data, pos, atoms, cache)
    number, serial, creation = _NEW_PID(data, pos)
    return Pid(node, number, serial, creation), pos + 12


def _reference(data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term]) -> tuple[Term, int]:
    """The reference whose count of words stands at `pos` (NEWER_REFERENCE_EXT) and the position after it."""
    words = _words(data, pos)
    node, pos = _atom_at(data, pos + 2, atoms, cache)
    numbers = _CREATION_AND_WORDS[words].unpack_from(data, pos)
    return Reference(node, numbers[0], numbers[1:]), pos + 4 + 4 * words


def _words(data: bytes, pos: int) -> int:
    (words,) = _U16(data, pos)
    if not 0 < words <= _MAX_REFERENCE_WORDS:
        raise DecodeError(f"a reference has 1 to {_MAX_REFERENCE_WORDS} words, not {words}")
    return words


def _rare(tag: int, data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term]) -> tuple[Term, int]:
    """The term with a tag that seldom comes and that holds no terms but atoms; `pos` is behind the tag."""
    if tag == 114:  # NEW_REFERENCE_EXT
        words = _words(data, pos)
        node, pos = _atom_at(data, pos + 2, atoms, cache)
        return Reference(node, data[pos], struct.unpack_from(f">{words}I", data, pos + 1)), pos + 1 + 4 * words
    if tag == 118 or tag == 115:  # ATOM_UTF8_EXT, SMALL_ATOM_EXT
        return _atom_at(data, pos - 1, atoms, cache)
    if tag == 112 or tag == 117:  # NEW_FUN_EXT, FUN_EXT
        return _fun(tag, data, pos, atoms, cache)
    if tag == 113:  # EXPORT_EXT
        module, pos = _atom_at(data, pos, atoms, cache)
        function, pos = _atom_at(data, pos, atoms, cache)
        if data[pos] != 97:
            raise DecodeError(f"the arity of an export is a small integer, not tag {data[pos]}")
        return Export(module, function, data[pos + 1]), pos + 2
    if tag == 120:  # V4_PORT_EXT
        node, pos = _atom_at(data, pos, atoms, cache)
        number, creation = _V4_PORT(data, pos)
        return Port(node, number, creation), pos + 12
    if tag == 89:  # NEW_PORT_EXT
        node, pos = _atom_at(data, pos, atoms, cache)
        number, creation = _NEW_PORT(data, pos)
        return Port(node, number, creation), pos + 8
    if tag == 77:  # BIT_BINARY_EXT
        (count,) = _U32(data, pos)
        return _bits(data[pos + 5 : pos + 5 + count], count, data[pos + 4]), pos + 5 + count
    if tag == 111:  # LARGE_BIG_EXT
        (count,) = _U32(data, pos)
        end = pos + 5 + count
        number = int.from_bytes(data[pos + 5 : end], "little")
        return -number if data[pos + 4] else number, end
    if tag == 99:  # FLOAT_EXT
        return _old_float(data[pos : pos + 31]), pos + 31
    if tag == 103:  # PID_EXT
        node, pos = _atom_at(data, pos, atoms, cache)
        number, serial, creation = _OLD_PID(data, pos)
        return Pid(node, number, serial, creation), pos + 9
    if tag == 102 or tag == 101:  # PORT_EXT, REFERENCE_EXT
        node, pos = _atom_at(data, pos, atoms, cache)
        number, creation = _OLD_PORT(data, pos)
        return Port(node, number, creation) if tag == 102 else Reference(node, creation, (number,)), pos + 5
    raise DecodeError(_unknown(tag, pos - 1))


def _unknown(tag: int, pos: int) -> str:
    if tag == 121:
        return f"LOCAL_EXT at byte {pos} means something only to the node that made it"
    if tag == 80:
        return f"a compressed term at byte {pos} must follow the version byte"
    return f"no term has the tag {tag} (byte {pos})"


def _old_float(text: bytes) -> float:
    if not _OLD_FLOAT.fullmatch(text) or not isfinite(float(text.rstrip(b"\0"))):
        raise DecodeError("a FLOAT_EXT is not the text of a float")
    return float(text.rstrip(b"\0"))


def _check_bits(count: int, bits_in_last_byte: int) -> None:
    if not count and bits_in_last_byte:
        raise DecodeError("a bitstring without bytes has no bits in its last byte")
    if count and not 1 <= bits_in_last_byte <= 8:
        raise DecodeError(f"a byte has no {bits_in_last_byte} bits")


def _bits(data: bytes, declared: int, bits_in_last_byte: int) -> Term:
    if len(data) != declared:
        raise IndexError
    _check_bits(declared, bits_in_last_byte)
    if bits_in_last_byte == 8 or not data:
        return data
    unused = 8 - bits_in_last_byte
    return BitString(data[:-1] + bytes((data[-1] >> unused << unused,)), bits_in_last_byte)


def _fun(tag: int, data: bytes, pos: int, atoms: AtomTable, cache: Sequence[Term]) -> tuple[Term, int]:
    """A closure. Its body is kept as it came, but for references to the atom cache, which mean nothing elsewhere."""
    end = skip_term(data, pos - 1, cache)
    if tag == 112:
        arity = data[pos + 4]
        module, _ = _atom_at(data, pos + 29, atoms, cache)
    else:
        arity = -1
        _, after_pid = _atom_at(data, pos + 5, atoms, cache)
        module, _ = _atom_at(data, after_pid + _NODE_THEN[data[pos + 4]], atoms, cache)
    body = to_plain(data, pos - 1, cache)[1:] if cache else data[pos:end]
    return Fun(tag, body, module, arity), end


def fun_creator(fun: Fun) -> Pid:
    """The process that made a closure: where its code is sure to be."""
    body, pos = fun.body, 4
    if fun.tag == 112:
        # Module, old index and old uniq stand before it.
        pos = skip_term(body, skip_term(body, skip_term(body, 29)))
    creator, _ = decode_term(body, pos, AtomTable())
    assert type(creator) is Pid
    return creator


def skip_term(
    data: bytes, pos: int, atom_cache: Sequence[Term] | None = None, *, max_elements: int = MAX_ELEMENTS
) -> int:
    """The position after the term at `pos`, which is checked without building it.

    Not checked: that the keys of a map differ, and the depth (this loop and those of a BEAM need none).
    """
    return _walk(data, pos, _NO_CACHE if atom_cache is None else atom_cache, None, max_elements)


def to_plain(data: bytes, pos: int, atom_cache: Sequence[Term] | None) -> bytes:
    """The bytes of the term at `pos` with every reference to the message's atom cache replaced by the atom itself."""
    chunks: list[bytes] = []
    _walk(data, pos, _NO_CACHE if atom_cache is None else atom_cache, chunks, MAX_ELEMENTS)
    return b"".join(chunks)


def _walk(
    data: bytes,
    pos: int,
    cache: Sequence[Term],
    plain: list[bytes] | None,
    budget: int,
    todo: int = 1,
    open_funs: int = 0,
) -> int:
    """Go through `todo` terms at `pos` to their end; if `plain` is given, gather the pieces of their plain form there.

    Containers add their count to `todo` and are otherwise nothing, so depth costs nothing.
    """
    size = len(data)
    allowed = budget
    start, terms = pos, todo
    copied = pos
    cached = len(cache)
    encoded_cache = [] if plain is None else [atom_bytes(term) for term in cache]
    try:
        while todo:
            todo -= 1
            tag = data[pos]
            if tag == 82:  # ATOM_CACHE_REF
                if plain is None:
                    if data[pos + 1] >= cached:
                        _walk_atom(data, pos, cache, None, pos)
                    pos += 2
                else:
                    plain.append(data[copied:pos])
                    plain.append(encoded_cache[data[pos + 1]])
                    pos += 2
                    copied = pos
            elif tag == 100:  # ATOM_EXT
                if data[pos + 1]:
                    raise DecodeError(f"an atom has at most {MAX_ATOM_CHARACTERS} characters, this one has more")
                pos += 3 + data[pos + 2]
            elif tag == 109:  # BINARY_EXT
                pos += 5 + _U32(data, pos + 1)[0]
            elif tag == 97:  # SMALL_INTEGER_EXT
                pos += 2
            elif tag == 119:  # SMALL_ATOM_UTF8_EXT
                end = pos + 2 + data[pos + 1]
                if not data[pos + 2 : end].isascii():
                    _atom_of(data[pos:end])
                pos = end
            elif tag == 106:  # NIL_EXT
                pos += 1
            elif tag == 104 or tag == 116 or tag == 108 or tag == 105:
                if tag == 104:  # SMALL_TUPLE_EXT
                    count = data[pos + 1]
                    pos += 2
                else:
                    (count,) = _U32(data, pos + 1)
                    pos += 5
                    if tag == 116:  # MAP_EXT
                        count += count
                        budget -= _MAP_WEIGHT
                    elif tag == 108:  # LIST_EXT
                        count += 1
                todo += count
                budget -= count
                if todo > size - pos:
                    raise DecodeError(f"at byte {pos} {todo} terms are to come, but only {size - pos} bytes")
                if budget < 0:
                    raise LimitExceeded("MAX_ELEMENTS", allowed)
            elif tag == 98:  # INTEGER_EXT
                pos += 5
            elif tag == 110:  # SMALL_BIG_EXT
                pos += 3 + data[pos + 1]
            elif tag == 70:  # NEW_FLOAT_EXT
                if data[pos + 2] >= 0xF0 and data[pos + 1] & 0x7F == 0x7F:
                    raise DecodeError(f"the float at byte {pos} is infinite or not a number")
                pos += 9
            elif tag == 107:  # STRING_EXT
                (count,) = _U16(data, pos + 1)
                pos += 3 + count
                budget -= count
                if budget < 0:
                    raise LimitExceeded("MAX_ELEMENTS", allowed)
            elif tag in _NODE_THEN:
                pos, copied = _walk_atom(data, pos + 1, cache, plain, copied)
                pos += _NODE_THEN[tag]
            elif tag == 90 or tag == 114:  # NEWER_REFERENCE_EXT, NEW_REFERENCE_EXT
                (words,) = _U16(data, pos + 1)
                if not 0 < words <= _MAX_REFERENCE_WORDS:
                    raise DecodeError(f"a reference has 1 to {_MAX_REFERENCE_WORDS} words, not {words}")
                pos, copied = _walk_atom(data, pos + 3, cache, plain, copied)
                pos += 4 * words + (4 if tag == 90 else 1)
            elif tag == 118 or tag == 115:  # ATOM_UTF8_EXT, SMALL_ATOM_EXT
                pos, copied = _walk_atom(data, pos, cache, plain, copied)
            elif tag == 77:  # BIT_BINARY_EXT
                (count,) = _U32(data, pos + 1)
                _check_bits(count, data[pos + 5])
                pos += 6 + count
            elif tag == 111:  # LARGE_BIG_EXT
                pos += 6 + _U32(data, pos + 1)[0]
            elif tag == 113:  # EXPORT_EXT
                pos, copied = _walk_atom(data, pos + 1, cache, plain, copied)
                pos, copied = _walk_atom(data, pos, cache, plain, copied)
                if data[pos] != 97:
                    raise DecodeError(f"the arity of an export is a small integer, not tag {data[pos]}")
                pos += 2
            elif tag == 99:  # FLOAT_EXT
                _old_float(data[pos + 1 : pos + 32])
                pos += 32
            elif tag == 117:  # FUN_EXT: count of free variables, pid, module, index, uniq, free variables
                todo += 2 + _U32(data, pos + 1)[0]
                pos, copied = _walk_pid(data, pos + 5, cache, plain, copied)
                pos, copied = _walk_atom(data, pos, cache, plain, copied)
                if todo > size - pos:
                    raise DecodeError(f"at byte {pos} {todo} terms are to come, but only {size - pos} bytes")
            elif tag == 112:  # NEW_FUN_EXT
                if open_funs >= _MAX_NESTED_FUNS:
                    raise LimitExceeded("MAX_NESTED_FUNS", _MAX_NESTED_FUNS)
                declared_end = pos + 1 + _U32(data, pos + 1)[0]
                (free,) = _U32(data, pos + 26)
                if free > size - pos:
                    raise DecodeError(f"at byte {pos} {free} free variables are to come, but only {size - pos} bytes")
                if plain is not None:
                    plain.append(data[copied : pos + 1])
                    plain.append(b"")
                    size_at = len(plain) - 1
                    plain.append(data[pos + 5 : pos + 30])
                pos = _walk_fun(data, pos + 30, cache, plain, budget, free, open_funs + 1)
                if pos != declared_end:
                    raise DecodeError(f"a fun declares its end at byte {declared_end}, but ends at {pos}")
                if plain is not None:
                    plain[size_at] = _pack_u32(4 + sum(map(len, plain[size_at + 1 :])))
                    copied = pos
            else:
                raise DecodeError(_unknown(tag, pos))
    except (IndexError, struct.error):
        if plain is not None:
            _walk(data, start, cache, None, allowed, terms, open_funs)  # says what is wrong
        raise DecodeError(f"a term is cut off: it goes on after byte {size}") from None
    if pos > size:
        raise DecodeError(f"a term is cut off: it ends at byte {pos} of {size}")
    if plain is not None:
        plain.append(data[copied:pos])
    return pos


def _walk_fun(
    data: bytes,
    pos: int,
    cache: Sequence[Term],
    plain: list[bytes] | None,
    budget: int,
    free: int,
    open_funs: int,
) -> int:
    """The end of a NEW_FUN_EXT from its module on: module, old index, old uniq, creator and `free` variables."""
    start = pos
    pos, copied = _walk_atom(data, pos, cache, plain, pos)
    for _ in range(2):
        tag = data[pos]
        if tag == 97:
            pos += 2
        elif tag == 98:
            pos += 5
        else:
            raise DecodeError(f"the old index and uniq of a fun are small integers, not tag {tag} (byte {pos})")
    pos, copied = _walk_pid(data, pos, cache, plain, copied)
    if pos > len(data):
        raise DecodeError(f"the fun at byte {start} is cut off")
    if plain is not None:
        plain.append(data[copied:pos])
    return _walk(data, pos, cache, plain, budget, free, open_funs)


def _walk_pid(data: bytes, pos: int, cache: Sequence[Term], plain: list[bytes] | None, copied: int) -> tuple[int, int]:
    """`_walk_atom` for a pid."""
    tag = data[pos]
    if tag != 88 and tag != 103:
        raise DecodeError(f"the creator of a fun is a pid, not tag {tag} (byte {pos})")
    pos, copied = _walk_atom(data, pos + 1, cache, plain, copied)
    return pos + _NODE_THEN[tag], copied


def _walk_atom(data: bytes, pos: int, cache: Sequence[Term], plain: list[bytes] | None, copied: int) -> tuple[int, int]:
    """The positions after the atom at `pos` and up to which `plain` is complete, in that order."""
    tag = data[pos]
    if tag == 82:
        index = data[pos + 1]
        if index >= len(cache):
            raise DecodeError(f"an atom cache reference {index} in a message of {len(cache)} atoms")
        if plain is not None:
            plain.append(data[copied:pos])
            plain.append(atom_bytes(cache[index]))
            copied = pos + 2
        return pos + 2, copied
    if tag == 119 or tag == 115:
        end = pos + 2 + data[pos + 1]
    elif tag == 100 or tag == 118:
        end = pos + 3 + _U16(data, pos + 1)[0]
    else:
        raise DecodeError(f"an atom is expected at byte {pos}, not tag {tag}")
    if (tag >= 118 and not (tag == 119 and data[pos + 2 : end].isascii())) or (tag == 100 and data[pos + 1]):
        _atom_of(data[pos:end])
    return end, copied


_NODE_THEN: Final = {88: 12, 103: 9, 120: 12, 89: 8, 102: 5, 101: 5}
"""Tags of pids, ports and the oldest references: a node and then this many bytes."""

_MAX_NESTED_FUNS: Final = 50
"""How deep closures may hold closures. Each is walked by a call of its own, for its size has to be checked."""


def decode_spine(
    data: bytes, pos: int, levels: int, atoms: AtomTable, atom_cache: Sequence[Term] | None = None
) -> Term:
    """The term from `pos` to the end of `data`, decoded only where a relay looks: along its first elements.

    Of a tuple, all elements but the last are decoded whole and the last with one level less; at level 0 a container
    becomes an `EncodedTerm` of the rest of the buffer with the message's atoms, anything else is decoded.
    `{Ref, {ok, [Event, ..]}}` with two levels gives `(ref, (ok, EncodedTerm))` at the cost of the reference.

    That the rest is one whole term is not checked: `skip_term` does. Raises `DecodeError` and `LimitExceeded`.
    """
    heads: list[list[Term]] = []
    cache = _NO_CACHE if atom_cache is None else atom_cache
    counted = len(data) - pos > _UNCOUNTED_BYTES
    try:
        tag = data[pos]
        while levels > 0 and (tag == 104 or tag == 105):
            if tag == 104:
                count = data[pos + 1]
                after = pos + 2
            else:
                (count,) = _U32(data, pos + 1)
                after = pos + 5
            if not count:
                break
            if counted:
                if count > MAX_ELEMENTS:
                    raise LimitExceeded("MAX_ELEMENTS", MAX_ELEMENTS, count)
                _walk(data, after, cache, None, MAX_ELEMENTS, count - 1)
            head, pos = _decode(data, after, atoms, cache, count - 1)
            heads.append(head)
            levels -= 1
            tag = data[pos]
        if tag in _LAZY:
            end = len(data)
            term: Term = EncodedTerm(data, pos, cache)
        else:
            (term,), end = _decode(data, pos, atoms, cache, 1)
        if end != len(data):
            raise DecodeError(f"{len(data) - end} bytes follow the term")
    except (IndexError, struct.error):
        raise DecodeError(f"a term is cut off: it goes on after byte {len(data)}") from None
    while heads:
        head = heads.pop()
        head.append(term)
        term = tuple(head)
    return term


_LAZY: Final = frozenset({104, 105, 107, 108, 112, 116, 117})
"""Tags of containers, strings and funs: what `decode_spine` leaves encoded."""


def read_map(
    data: bytes, pos: int, keys: Collection[Term], atoms: AtomTable, atom_cache: Sequence[Term] | None = None
) -> tuple[dict[Term, Term] | None, int]:
    """Of the map at `pos` the values of those `keys`, which are atoms, that it has, and the position after it; None
    instead of them if there is no map.

    Everything else in it is passed over and checked no further than `skip_term` does: a quarter of the time of decoding
    it. Raises `DecodeError` and `LimitExceeded`.
    """
    cache = _NO_CACHE if atom_cache is None else atom_cache
    u32 = _U32
    found: dict[Term, Term] = {}
    start = pos
    try:
        if data[pos] != 116:
            return None, pos
        (left,) = u32(data, pos + 1)
        pos += 5
        missing = len(keys)
        while left:
            if not missing:
                pos = _walk(data, pos, cache, None, MAX_ELEMENTS, left + left)
                break
            left -= 1
            tag = data[pos]
            if tag == 82:
                key = cache[data[pos + 1]]
                pos += 2
            elif tag == 100 or tag == 119:
                end = pos + 3 + data[pos + 2] if tag == 100 else pos + 2 + data[pos + 1]
                key = atoms[data[pos:end]]
                pos = end
            else:
                pos = _walk(data, pos, cache, None, MAX_ELEMENTS, 2)
                continue
            tag = data[pos]
            if key in keys:
                if tag in _LAZY:
                    _walk(data, pos, cache, None, MAX_ELEMENTS)
                values, pos = _decode(data, pos, atoms, cache, 1)
                found[key] = values[0]
                missing -= 1
            elif tag == 109:
                pos += 5 + u32(data, pos + 1)[0]
            elif tag == 97:
                pos += 2
            elif tag == 110:
                pos += 3 + data[pos + 1]
            elif tag == 106:
                pos += 1
            elif tag == 82 and data[pos + 1] < len(cache):
                pos += 2
            else:
                pos = _walk(data, pos, cache, None, MAX_ELEMENTS)
    except (IndexError, struct.error):
        skip_term(data, start, cache)  # says what is wrong
        raise DecodeError("a term is cut off") from None
    if pos > len(data):
        raise DecodeError(f"a term is cut off: it ends at byte {pos} of {len(data)}")
    return found, pos


def read_maps(
    term: EncodedTerm, keys: Collection[Term], atoms: AtomTable
) -> list[tuple[dict[Term, Term], EncodedTerm]] | None:
    """Of each map in a list what `read_map` reads, and the map as it came; None if the term is no list of maps.

    Raises `DecodeError` (also when bytes follow the term) and `LimitExceeded`.
    """
    data, pos, cache = term.buffer, term.start, term.atoms
    found: list[tuple[dict[Term, Term], EncodedTerm]] = []
    try:
        if data[pos] == 108:
            (count,) = _U32(data, pos + 1)
            pos += 5
            for _ in range(count):
                values, end = read_map(data, pos, keys, atoms, cache)
                if values is None:
                    return None
                found.append((values, EncodedTerm(data[pos:end], 0, cache)))
                pos = end
        if data[pos] != 106:
            return None
    except (IndexError, struct.error):
        raise DecodeError(f"a term is cut off: it goes on after byte {len(data)}") from None
    if pos + 1 != len(data):
        raise DecodeError(f"{len(data) - pos - 1} bytes follow the term")
    return found


def decode_encoded(term: EncodedTerm, atoms: AtomTable | None = None) -> Term:
    """What an `EncodedTerm` stands for. Raises `DecodeError` (also when bytes follow the term) and `LimitExceeded`."""
    buffer = term.buffer
    decoded, end = decode_term(buffer, term.start, AtomTable() if atoms is None else atoms, term.atoms)
    if end != len(buffer):
        raise DecodeError(f"{len(buffer) - end} bytes follow the term")
    return decoded


def plain_bytes(term: EncodedTerm) -> bytes:
    """The bytes of an `EncodedTerm` as they are where its atoms are not at hand: each of them in full.

    They are made once. Raises EncodeError if the term, which nobody has read so far, is none.
    """
    if not term.atoms:
        return term.data
    if term.plain is None:
        pieces: list[bytes] = []
        try:
            end = _walk(term.data, 0, term.atoms, pieces, MAX_ELEMENTS)
        except RemoteProtocolError as error:
            raise EncodeError(f"what is to be passed on cannot be read: {error}") from error
        if end != len(term.data):
            raise EncodeError(f"{len(term.data) - end} bytes follow the term that is to be passed on")
        term.plain = b"".join(pieces)
    return term.plain


def encode(term: Term, *, compressed: int = 0) -> bytes:
    """`term` with the version byte; `compressed` is a zlib level (0: not), used only where it makes the term smaller.

    Raises EncodeError for what has no Erlang term.
    """
    pieces = [b"\x83"]
    _encode(pieces, term)
    if not compressed:
        return b"".join(pieces)
    bare = b"".join(pieces[1:])
    deflated = zlib.compress(bare, compressed)
    if len(deflated) + 5 >= len(bare):
        return b"\x83" + bare
    return b"\x83P" + _pack_u32(len(bare)) + deflated


def encode_term(term: Term) -> bytes:
    """`term` without the version byte. Raises EncodeError."""
    pieces: list[bytes] = []
    _encode(pieces, term)
    return b"".join(pieces)


class AtomRefs(dict[Atom, bytes]):
    """How the atoms of one message are written: `dist_header.py` gives references to its cache."""

    __slots__ = ()

    def passed_on(self, term: EncodedTerm) -> bytes:
        """How a term that refers to the atoms of the header it came with is written."""
        return plain_bytes(term)


def encode_into(
    out: list[bytes] | bytearray, term: Term, atom_refs: AtomRefs | None = None, full_pieces: int = 0
) -> None:
    """Append `term` (no version byte) to `out`; large binaries are appended to a list as they are, not copied.

    `atom_refs` says how atoms are written; without it, and in the first `full_pieces` pieces of `out`, they stand in
    full. On EncodeError `out` holds a part of the term.
    """
    if isinstance(out, list):
        _encode(out, term, atom_refs, full_pieces)
    else:
        pieces: list[bytes] = []
        _encode(pieces, term, atom_refs)
        out += b"".join(pieces)


# Most counts are small: their bytes are made once.
_TUPLE_HEADS: Final = tuple(bytes((104, count)) for count in range(256))
_MAP_HEADS: Final = tuple(_pack_tag_u32(116, count) for count in range(256))
_LIST_HEADS: Final = tuple(_pack_tag_u32(108, count) for count in range(256))
_BINARY_HEADS: Final = tuple(_pack_tag_u32(109, count) for count in range(256))
_SMALL_INTEGERS: Final = tuple(bytes((97, value)) for value in range(256))
_TRUE: Final = atom_bytes(True)
_FALSE: Final = atom_bytes(False)
_NIL_ATOM: Final = atom_bytes(None)
_END_OF_LIST: Final[tuple[Term, ...]] = ([],)


def _encode(out: list[bytes], root: Term, atom_refs: AtomRefs | None = None, full_pieces: int = 0) -> None:
    """Append the pieces of `root` to `out`.

    `items` goes through the innermost open container, the others wait on the stack; a list ends with an empty list.
    `atom_refs` wait until a container begins that goes beyond `full_pieces`, or a term is passed on that needs them.
    """
    items: Iterator[Term] = iter((root,))
    stack: list[Iterator[Term]] = []
    children: Iterable[Term]
    pack_tag_u32 = _pack_tag_u32
    has_text = False
    waiting = atom_refs if full_pieces else None
    if full_pieces:
        atom_refs = None
    while True:
        for item in items:
            kind = type(item)
            if kind is Atom:
                out.append(item.etf if atom_refs is None else atom_refs[item])
            elif kind is bytes:
                count = len(item)
                out.append(_BINARY_HEADS[count] if count < 256 else pack_tag_u32(109, count))
                out.append(item)
            elif kind is int:
                if 0 <= item <= 255:
                    out.append(_SMALL_INTEGERS[item])
                elif -0x80000000 <= item <= 0x7FFFFFFF:
                    out.append(_pack_integer(98, item))
                else:
                    out.append(_big(item))
            elif kind is Pid or kind is Reference:
                if atom_refs is None:
                    out.append(item.etf or identity_bytes(item))
                else:
                    out.append(_opaque(item, kind, atom_refs))
            elif kind is dict:
                count = len(item)
                out.append(_MAP_HEADS[count] if count < 256 else pack_tag_u32(116, count))
                children = chain.from_iterable(item.items())
                break
            elif kind is tuple:
                count = len(item)
                out.append(_TUPLE_HEADS[count] if count < 256 else pack_tag_u32(105, count))
                children = item
                break
            elif kind is list:
                count = len(item)
                if not count:
                    out.append(b"j")
                    continue
                out.append(_LIST_HEADS[count] if count < 256 else pack_tag_u32(108, count))
                children = chain(item, _END_OF_LIST)
                break
            elif item is None:
                out.append(_NIL_ATOM)
            elif kind is str:
                has_text = True
                text = _utf8(item)
                count = len(text)
                out.append(_BINARY_HEADS[count] if count < 256 else pack_tag_u32(109, count))
                out.append(text)
            elif kind is float:
                if not isfinite(item):
                    raise EncodeError(f"{item} is no Erlang float")
                out.append(_pack_float(70, item))
            elif kind is bool:
                out.append(_TRUE if item else _FALSE)
            elif kind is EncodedTerm:
                if not item.atoms:
                    out.append(item.data)
                    continue
                if waiting is not None:
                    atom_refs = waiting
                    waiting = None
                out.append(plain_bytes(item) if atom_refs is None else atom_refs.passed_on(item))
            elif kind is Port or kind is Export or kind is Fun or kind is BitString:
                out.append(_opaque(item, kind, atom_refs))
            elif kind is ImproperList:
                count = len(item.elements)
                out.append(pack_tag_u32(108, count))
                children = chain(item.elements, (item.tail,))
                break
            elif kind is TermMap:
                count = len(item)
                out.append(pack_tag_u32(116, count))
                children = chain.from_iterable(item.pairs())
                break
            else:
                try:
                    count = 1
                    children = (as_plain(item),)
                except TypeError:
                    raise EncodeError(f"{kind.__name__} is no Erlang term{_where(root, item)}") from None
                break
        else:
            if not stack:
                if has_text:
                    _refuse_keys_that_meet(root)
                return
            items = stack.pop()
            continue
        stack.append(items)
        if len(stack) > MAX_DEPTH:
            raise EncodeError(f"containers nested deeper than MAX_DEPTH ({MAX_DEPTH}), or one that holds itself")
        if waiting is not None and len(out) + count > full_pieces:
            atom_refs = waiting
            waiting = None
        items = iter(children)


def _refuse_keys_that_meet(root: Term) -> None:
    """EncodeError if a map has a key both as `str` and as `bytes`: a peer ends the connection over a double key.

    Only keys that are text are looked at, not text inside a tuple that is a key.
    """
    todo = [root]
    while todo:
        term = todo.pop()
        if isinstance(term, tuple | list):
            todo.extend(element for element in term if type(element) not in _LEAVES)
        elif isinstance(term, dict):
            for key, value in term.items():
                if type(key) is str and key.encode() in term:
                    raise EncodeError(f"a map has the key {key!r} twice, as str and as bytes")
                if type(value) not in _LEAVES:
                    todo.append(value)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"a str that is not Unicode text cannot be a UTF-8 binary: {error.reason}") from None


def _big(number: int) -> bytes:
    magnitude = abs(number)
    count = (magnitude.bit_length() + 7) // 8
    digits = magnitude.to_bytes(count, "little")
    if count < 256:
        return b"n%c%c%b" % (count, number < 0, digits)
    return b"o%b%c%b" % (_pack_u32(count), number < 0, digits)


def identity_bytes(item: Pid | Reference) -> bytes:
    """The bytes of a pid or reference. They are kept, for it is often sent twice. Raises EncodeError."""
    encoded = item.etf
    if encoded is None:
        encoded = item.etf = _opaque(item, type(item), None)
    return encoded


def _opaque(item: Term, kind: type, atom_refs: AtomRefs | None) -> bytes:
    """A pid, reference, port, export, fun or bitstring."""
    try:
        if kind is Pid:
            numbers = _pack_new_pid(item.id, item.serial, item.creation)
            return b"X" + _node(item.node, atom_refs) + numbers
        if kind is Reference:
            words = item.ids
            if not 0 < len(words) <= _MAX_REFERENCE_WORDS:
                raise EncodeError(f"a reference has 1 to {_MAX_REFERENCE_WORDS} words, not {len(words)}")
            numbers = _CREATION_AND_WORDS[len(words)].pack(item.creation, *words)
            return b"Z\x00%c%b%b" % (len(words), _node(item.node, atom_refs), numbers)
        if kind is Port:
            node = _node(item.node, atom_refs)
            if item.id < 1 << 28:
                return b"Y" + node + _pack_new_port(item.id, item.creation)
            return b"x" + node + _pack_v4_port(item.id, item.creation)
        if kind is Export:
            module, function = _node(item.module, atom_refs), _node(item.function, atom_refs)
            return b"q" + module + function + _pack_tag_u8(97, item.arity)
        if kind is Fun:
            return b"%c%b" % (item.tag, item.body)
        return b"M%b%c%b" % (_pack_u32(len(item.data)), item.bits_in_last_byte, item.data)
    except (struct.error, TypeError, AttributeError, OverflowError) as error:
        raise EncodeError(f"{item!r} does not fit its encoding: {error}") from None


def _node(term: Term, atom_refs: AtomRefs | None) -> bytes:
    if atom_refs is not None and type(term) is Atom:
        return atom_refs[term]
    return atom_bytes(term)


def _where(root: Term, bad: Term) -> str:
    """Where in `root` the object `bad` stands, for an error message: ` (at [1].items[0])`; empty if it is the root."""
    if root is bad:
        return ""
    todo: list[tuple[Term, str]] = [(root, "")]
    seen: set[int] = set()
    while todo:
        term, path = todo.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        inner: Iterable[tuple[Term, str]] = ()
        if isinstance(term, tuple | list):
            inner = ((element, f"{path}[{index}]") for index, element in enumerate(term))
        elif isinstance(term, ImproperList):
            inner = ((element, f"{path}.tail") for element in (*term.elements, term.tail))
        elif isinstance(term, Mapping):
            inner = chain.from_iterable(
                ((key, f"{path} key {key!r:.40}"), (value, f"{path}[{key!r:.40}]")) for key, value in term.items()
            )
        for element, at in inner:
            if element is bad:
                return f" (at {at.strip():.200})"
            todo.append((element, at))
    return ""


COMPILED: Final = not isinstance(decode, FunctionType)
"""Whether this module runs compiled."""
