"""Erlang terms as Python values.

| Erlang                       | Python                                                                 |
|------------------------------|------------------------------------------------------------------------|
| atom                         | `Atom`, interned: two atoms of one name are one object                  |
| `true`, `false`, `nil`       | `True`, `False`, `None`                                                 |
| integer, float               | `int`, `float`                                                          |
| binary                       | `bytes`; a `str` is sent as its UTF-8 binary                             |
| bitstring (not whole bytes)  | `BitString`                                                             |
| list, improper list          | `list`, `ImproperList`                                                  |
| tuple                        | `tuple`                                                                 |
| map                          | `dict` where Python keeps its keys apart, else `TermMap`                 |
| pid, reference, port         | `Pid`, `Reference`, `Port`                                              |
| fun, `fun M:F/A`             | `Fun` (opaque, can be sent back), `Export`                               |

Values are immutable and hashable where Erlang's are useful as keys. This module knows nothing of bytes on the wire
(`etf.py` does) and nothing of nodes and processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from types import NoneType
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

from gater.erl.errors import LimitExceeded

Term: TypeAlias = Any
"""Any Python value of the table above."""

MAX_ATOM_CHARACTERS: Final = 255
"""The longest atom a BEAM accepts (`MAX_ATOM_CHARACTERS` in `erl_term.h`)."""

MAX_DEPTH: Final = 16_384
"""How deep containers may be nested. No program nests a thousand deep on purpose; this leaves room for a term that is a
linked list of tuples, and keeps C code that recurses (`hash`, freeing) well inside an 8 MiB stack."""

_PYTHON_SINGLETONS: Final = {"true": True, "false": False, "nil": None}
_interned: WeakValueDictionary[str, Atom] = WeakValueDictionary()
_intern_lock: Final = threading.Lock()


class Atom:
    """An Erlang atom. `Atom("ok") is Atom("ok")`; it is not equal to the string `"ok"`.

    The intern table is weak: an atom that nobody holds is forgotten, so a peer cannot fill our memory with names.
    `true`, `false` and `nil` have Python values of their own; asking for them here is a `ValueError`, because
    a second object of the same meaning would compare unequal to the first (`atom()` gives whichever is right).
    """

    __slots__ = ("__weakref__", "etf", "name")
    name: str
    etf: bytes
    """The atom in the external term format, made once: `SMALL_ATOM_UTF8_EXT` or, above 255 bytes, `ATOM_UTF8_EXT`."""

    def __new__(cls, name: str) -> Atom:
        found = _interned.get(name)
        if found is not None:
            return found
        if name in _PYTHON_SINGLETONS:
            raise ValueError(f"the atom '{name}' is Python's {_PYTHON_SINGLETONS[name]!r}")
        if len(name) > MAX_ATOM_CHARACTERS:
            raise ValueError(f"an atom has at most {MAX_ATOM_CHARACTERS} characters, this one has {len(name)}")
        encoded = atom_etf(name)
        with _intern_lock:
            found = _interned.get(name)
            if found is None:
                found = object.__new__(cls)
                object.__setattr__(found, "name", name)
                object.__setattr__(found, "etf", encoded)
                _interned[name] = found
            return found

    def __setattr__(self, attribute: str, value: object) -> None:
        raise AttributeError("an Atom is immutable")

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Atom({self.name!r})"

    def __reduce__(self) -> tuple[type[Atom], tuple[str]]:
        return (Atom, (self.name,))

    def __copy__(self) -> Atom:
        return self

    def __deepcopy__(self, memo: object) -> Atom:
        return self


def atom_etf(name: str) -> bytes:
    """The atom called `name` in the external term format; ValueError if it is not Unicode text (a lone surrogate)."""
    text = name.encode()
    if len(text) < 256:
        return b"w%c%b" % (len(text), text)
    return b"v%c%c%b" % (len(text) >> 8, len(text) & 255, text)


def atom(name: str) -> Atom | bool | None:
    """The term of the atom called `name`: an `Atom`, or Python's `True`, `False`, `None` for `true`, `false`, `nil`."""
    if name in _PYTHON_SINGLETONS:
        return _PYTHON_SINGLETONS[name]
    return Atom(name)


def atom_name(term: Term) -> str | None:
    """The name of an atom term (`true`, `false` and `nil` included), or None if `term` is not an atom."""
    if type(term) is Atom:
        return term.name
    if term is None:
        return "nil"
    if term is True:
        return "true"
    if term is False:
        return "false"
    return None


class Pid:
    """A process identifier: the node it lives on, its number there, and which incarnation of the node (`creation`).

    Made for every message that comes in and looked up for most, so it is written by hand: a frozen dataclass takes
    three times as long to make. Do not assign to its fields. `etf` is `etf.py`'s: the bytes, once they have been made.
    """

    __slots__ = ("creation", "etf", "id", "node", "serial")
    __match_args__ = ("node", "id", "serial", "creation")

    def __init__(self, node: Atom, id: int, serial: int, creation: int) -> None:
        self.node = node
        self.id = id
        self.serial = serial
        self.creation = creation
        self.etf: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (
            type(other) is Pid
            and self.id == other.id
            and self.node is other.node
            and self.serial == other.serial
            and self.creation == other.creation
        )

    def __hash__(self) -> int:
        return hash((self.id, self.serial, self.creation, self.node))

    def __reduce__(self) -> tuple[type[Pid], tuple[Atom, int, int, int]]:
        return (Pid, (self.node, self.id, self.serial, self.creation))

    def __repr__(self) -> str:
        return f"Pid(node={self.node!r}, id={self.id}, serial={self.serial}, creation={self.creation})"

    def __str__(self) -> str:
        return f"#PID<{self.node}.{self.id}.{self.serial}>"


class Reference:
    """A reference: unique in the incarnation `creation` of `node`; `ids` are its one to five 32-bit words.

    Written by hand for the same reason as `Pid`. Do not assign to its fields.
    """

    __slots__ = ("creation", "etf", "ids", "node")
    __match_args__ = ("node", "creation", "ids")

    def __init__(self, node: Atom, creation: int, ids: tuple[int, ...]) -> None:
        self.node = node
        self.creation = creation
        self.ids = ids
        self.etf: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (
            type(other) is Reference
            and self.ids == other.ids
            and self.node is other.node
            and self.creation == other.creation
        )

    def __hash__(self) -> int:
        return hash((self.creation, self.ids))

    def __reduce__(self) -> tuple[type[Reference], tuple[Atom, int, tuple[int, ...]]]:
        return (Reference, (self.node, self.creation, self.ids))

    def __repr__(self) -> str:
        return f"Reference(node={self.node!r}, creation={self.creation}, ids={self.ids})"

    def __str__(self) -> str:
        return f"#Ref<{self.node}.{'.'.join(map(str, reversed(self.ids)))}>"


@dataclass(frozen=True, slots=True)
class Port:
    """A port identifier (`id` has up to 64 bits)."""

    node: Atom
    id: int
    creation: int


@dataclass(frozen=True, slots=True)
class Export:
    """`fun Module:Function/Arity`."""

    module: Atom
    function: Atom
    arity: int


@dataclass(frozen=True, slots=True)
class Fun:
    """A closure made on a BEAM: opaque here, but it can be stored and sent back.

    `body` is what stands behind the tag on the wire (references to an atom cache made plain); the other fields are read
    from it for display. `arity` is -1 where the format does not tell it (FUN_EXT).
    """

    tag: int
    body: bytes
    module: Atom | None
    arity: int

    def __repr__(self) -> str:
        return f"Fun({self.module}/{self.arity})"


@dataclass(frozen=True, slots=True)
class BitString:
    """Bits that do not fill whole bytes: `bits_in_last_byte` (1 to 7) of the last byte count, the highest first."""

    data: bytes
    bits_in_last_byte: int


class ImproperList:
    """`[a, b | tail]` with a tail that is not a list. `ImproperList([alias], ref)` is `[alias | Ref]`."""

    __slots__ = ("elements", "tail")

    def __init__(self, elements: Iterable[Term], tail: Term) -> None:
        self.elements: list[Term] = list(elements)
        self.tail: Term = tail
        if not self.elements:
            raise ValueError("an improper list has at least one element before its tail")
        if isinstance(tail, list | ImproperList):
            raise ValueError("the tail of an improper list is not a list")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImproperList):
            return NotImplemented
        return self.elements == other.elements and bool(self.tail == other.tail)

    __hash__ = None  # type: ignore[assignment]  # like the list it is

    def __repr__(self) -> str:
        return f"ImproperList({self.elements!r}, {self.tail!r})"


class EncodedTerm:
    """A term that is still (or already) in the external term format, without the leading version byte 131.

    What a relay passes on is kept like this: it is neither decoded nor encoded again. The bytes from `start` to the end
    of `buffer` must be exactly one term. `atoms` is what `ATOM_CACHE_REF n` in it stands for: the atoms listed in the
    distribution header of the message that it came in, at most 255. Without them (`()`) it stands for itself;
    `etf.plain_bytes` makes it so.

    Equal are two of them with the same bytes and the same atoms. Terms that are equal may differ in both.
    """

    __slots__ = ("atoms", "buffer", "plain", "start")

    def __init__(self, buffer: bytes, start: int = 0, atoms: Sequence[Term] = ()) -> None:
        self.buffer = buffer
        self.start = start
        """Where the term begins: for who reads it piece by piece without a copy of it."""
        self.atoms = atoms
        self.plain: bytes | None = None
        """What `etf.plain_bytes` made of it."""

    @property
    def data(self) -> bytes:
        """The bytes of the term."""
        if self.start:
            self.buffer = self.buffer[self.start :]
            self.start = 0
        return self.buffer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedTerm) and self.data == other.data and self.atoms == other.atoms

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"EncodedTerm({len(self.data)} bytes)"


class TermMap(Mapping[Term, Term]):
    """A map whose keys Python cannot keep apart in a `dict` (`1`, `1.0` and `true`) or cannot hash (lists, maps).

    Look-up follows Erlang's `=:=`: the key `1` does not find the value stored under `1.0`. Of two pairs with one key
    the last stays.
    """

    __slots__ = ("_entries",)

    def __init__(self, items: Iterable[tuple[Term, Term]] = ()) -> None:
        self._entries: dict[Term, tuple[Term, Term]] = {exact_key(key): (key, value) for key, value in items}

    @classmethod
    def of_exact(cls, entries: Iterable[tuple[Term, tuple[Term, Term]]]) -> TermMap:
        """The map of pairs whose `exact_key` is known: (exact key, (key, value))."""
        made = cls()
        made._entries.update(entries)
        return made

    def __getitem__(self, key: Term) -> Term:
        return self._entries[exact_key(key)][1]

    def __iter__(self) -> Iterator[Term]:
        return (key for key, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def pairs(self) -> Iterable[tuple[Term, Term]]:
        """The keys with their values, without looking each of them up (`items()` does)."""
        return self._entries.values()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return exact_equal(self, other)

    __hash__ = None  # type: ignore[assignment]  # like the dict it stands for

    def __repr__(self) -> str:
        return f"TermMap({list(self._entries.values())!r})"


def exact_key(term: Term, digests: dict[int, bytes] | None = None) -> Term:
    """A hashable Python value that is equal for two terms exactly when Erlang's `=:=` holds between them.

    `=:=` as OTP 27 has it: `0.0` and `-0.0` differ. The key of a tuple, list or map is flat, so neither hashing nor
    comparing it recurses, however deep the term is. A map stands in it as a BLAKE2b digest of its sorted pairs, which
    keeps the work linear in the size of the term. An `EncodedTerm` is equal to itself only, not to what it stands for.

    `digests` are those of each `TermMap` already seen, by its `id`: who makes the keys of maps that stand in the keys
    of maps passes the same one each time, so that none is read twice. No term it knows may change or be freed
    meanwhile.

    Raises `LimitExceeded` (`MAX_DEPTH`), and `TypeError` for a Python value that is no term.
    """
    kind = type(term)
    if kind in _OWN_KEY:
        return term
    if kind is str:
        return term.encode()
    if kind is bool:
        # Text is free to stand for other things: the key of a `str` is its bytes.
        return "true" if term else "false"
    if kind is float:
        return term.hex()
    if isinstance(term, tuple | list | Mapping | ImproperList):
        return (_canonical(term, digests),)
    return exact_key(as_plain(term), digests)


def exact_equal(left: Term, right: Term) -> bool:
    """Erlang's `=:=`, for terms of any depth up to `MAX_DEPTH`; raises as `exact_key` does."""
    return bool(exact_key(left) == exact_key(right))


def as_plain(term: Term) -> Term:
    """`term` as the plain type it is a subclass of or stands for (an `IntEnum` as `int`, a `bytearray` as `bytes`).

    Raises TypeError for a Python value that is no term.
    """
    if isinstance(term, int):
        return int(term)
    if isinstance(term, float):
        return float(term)
    if isinstance(term, str):
        return str.__str__(term)
    if isinstance(term, tuple):
        return tuple(term)
    if isinstance(term, list):
        return list(term)
    if isinstance(term, bytes | bytearray | memoryview):
        return bytes(term)
    if isinstance(term, Mapping):
        return dict(term)
    raise TypeError(f"{type(term).__name__} is no Erlang term")


class _Pair(tuple[Term, Term]):
    """A key and its value on their way through `_canonical`."""

    __slots__ = ()


_OWN_KEY: Final = frozenset(
    {bytes, Atom, int, NoneType, Pid, Reference, Port, Export, Fun, BitString, EncodedTerm},
)
_BOOLS: Final = {True: atom_etf("true"), False: atom_etf("false")}
_NIL: Final = atom_etf("nil")


def _canonical(root: Term, digests: dict[int, bytes] | None) -> bytes:
    """One byte string for all terms `=:=` to `root`: a prefix code, in which the pairs of a map are sorted."""
    out: list[bytes] = []
    items: Iterator[Term] = iter((root,))
    kind: type = NoneType
    owner = 0
    stack: list[tuple[list[bytes], Iterator[Term], type, int]] = []
    children: Iterable[Term]
    while True:
        for item in items:
            opened = type(item)
            opened_owner = 0
            if opened is Atom:
                out.append(item.etf)
            elif opened is bytes:
                out.append(b"m%d:%b" % (len(item), item))
            elif opened is int:
                digits = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
                out.append(b"i%d:%b" % (len(digits), digits))
            elif opened is bool:
                out.append(_BOOLS[item])
            elif item is None:
                out.append(_NIL)
            elif opened is float:
                out.append(b"F%b;" % item.hex().encode())
            elif opened is str:
                text = item.encode()
                out.append(b"m%d:%b" % (len(text), text))
            elif opened is tuple:
                out.append(b"h%d:" % len(item))
                children = item
                break
            elif opened is list:
                out.append(b"l%d:" % len(item))
                children = item
                break
            elif opened is dict:
                out.append(b"t")
                children = map(_Pair, item.items())
                break
            elif opened is TermMap:
                if digests is not None and id(item) in digests:
                    out.append(digests[id(item)])
                    continue
                out.append(b"t")
                children = map(_Pair, item.pairs())
                opened, opened_owner = dict, id(item)
                break
            elif opened is _Pair:
                children = item
                break
            elif opened is ImproperList:
                out.append(b"I%d:" % len(item.elements))
                children = chain(item.elements, (item.tail,))
                break
            elif opened is Pid:
                out.append(b"P%b%d,%d,%d;" % (atom_bytes(item.node), item.id, item.serial, item.creation))
            elif opened is Reference:
                words = b",".join(b"%d" % word for word in item.ids)
                out.append(b"R%b%d:%b;" % (atom_bytes(item.node), item.creation, words))
            elif opened is Port:
                out.append(b"O%b%d,%d;" % (atom_bytes(item.node), item.id, item.creation))
            elif opened is Export:
                out.append(b"E%b%b%d;" % (atom_bytes(item.module), atom_bytes(item.function), item.arity))
            elif opened is Fun:
                out.append(b"f%d,%d:%b" % (item.tag, len(item.body), item.body))
            elif opened is BitString:
                out.append(b"B%d,%d:%b" % (item.bits_in_last_byte, len(item.data), item.data))
            elif opened is EncodedTerm:
                out.append(b"e%d:%b%d:" % (len(item.data), item.data, len(item.atoms)))
                out += map(atom_bytes, item.atoms)
            else:
                opened, children = NoneType, (as_plain(item),)
                break
        else:
            if not stack:
                return b"".join(out)
            done, finished, finished_owner = out, kind, owner
            out, items, kind, owner = stack.pop()
            if finished is _Pair:
                out.append(b"".join(done))
            elif finished is dict:
                done.sort()
                pairs = b"".join(done)
                if len(pairs) > 32:
                    pairs = blake2b(pairs, digest_size=32).digest()
                out.append(b"%d,%d:%b" % (len(done), len(pairs), pairs))
                if finished_owner and digests is not None:
                    digests[finished_owner] = b"t" + out[-1]
            continue
        if len(stack) > 2 * MAX_DEPTH:  # a map is two levels here, its pairs being one
            raise LimitExceeded("MAX_DEPTH", MAX_DEPTH)
        stack.append((out, items, kind, owner))
        if opened is dict or opened is _Pair:
            out = []
        items, kind, owner = iter(children), opened, opened_owner


def atom_bytes(term: Term) -> bytes:
    """The encoding of any atom term, `true`, `false` and `nil` included. TypeError if it is not an atom."""
    if type(term) is Atom:
        return term.etf
    name = atom_name(term)
    if name is None:
        raise TypeError(f"an atom is needed here, not {type(term).__name__}")
    return atom_etf(name)
