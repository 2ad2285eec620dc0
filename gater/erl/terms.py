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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

Term: TypeAlias = Any
"""Any Python value of the table above."""

MAX_ATOM_CHARACTERS: Final = 255
"""The longest atom a BEAM accepts (`MAX_ATOM_CHARACTERS` in `erl_term.h`)."""

_PYTHON_SINGLETONS: Final = {"true": True, "false": False, "nil": None}
_interned: WeakValueDictionary[str, Atom] = WeakValueDictionary()
_intern_lock: Final = threading.Lock()


class Atom:
    """An Erlang atom. `Atom("ok") is Atom("ok")`; it is not equal to the string `"ok"`.

    The intern table is weak: an atom that nobody holds is forgotten, so a peer cannot fill our memory with names.
    `true`, `false` and `nil` have Python values of their own; asking for them here is a `ValueError`, because
    a second object of the same meaning would compare unequal to the first (`atom()` gives whichever is right).
    """

    __slots__ = ("__weakref__", "name")
    name: str

    def __new__(cls, name: str) -> Atom:
        found = _interned.get(name)
        if found is not None:
            return found
        if name in _PYTHON_SINGLETONS:
            raise ValueError(f"the atom '{name}' is Python's {_PYTHON_SINGLETONS[name]!r}")
        if len(name) > MAX_ATOM_CHARACTERS:
            raise ValueError(f"an atom has at most {MAX_ATOM_CHARACTERS} characters, this one has {len(name)}")
        with _intern_lock:
            found = _interned.get(name)
            if found is None:
                found = object.__new__(cls)
                object.__setattr__(found, "name", name)
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


@dataclass(frozen=True, slots=True)
class Pid:
    """A process identifier: the node it lives on, its number there, and which incarnation of the node (`creation`)."""

    node: Atom
    id: int
    serial: int
    creation: int

    def __str__(self) -> str:
        return f"#PID<{self.node}.{self.id}.{self.serial}>"


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference: unique in the incarnation `creation` of `node`; `ids` are its one to five 32-bit words."""

    node: Atom
    creation: int
    ids: tuple[int, ...]

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

    `body` is what stands behind the tag on the wire, untouched; the other fields are read from it for display.
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

    What a gateway passes on is kept like this: it is neither decoded nor encoded again. `data` must be exactly one
    term and must not refer to an atom cache.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedTerm) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"EncodedTerm({len(self.data)} bytes)"


class TermMap(Mapping[Term, Term]):
    """A map whose keys Python cannot keep apart in a `dict` (`1`, `1.0` and `true`) or cannot hash (lists, maps).

    Look-up follows Erlang's `=:=`: the key `1` does not find the value stored under `1.0`.
    """

    __slots__ = ("_entries",)

    def __init__(self, items: Iterable[tuple[Term, Term]] = ()) -> None:
        self._entries: dict[Term, tuple[Term, Term]] = {exact_key(key): (key, value) for key, value in items}

    def __getitem__(self, key: Term) -> Term:
        return self._entries[exact_key(key)][1]

    def __iter__(self) -> Iterator[Term]:
        return (key for key, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"TermMap({list(self._entries.values())!r})"


def exact_key(term: Term) -> Term:
    """A hashable Python value that is equal for two terms exactly when Erlang's `=:=` holds between them."""
    raise NotImplementedError
