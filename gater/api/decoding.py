"""Terms that were decoded along their last elements only (`etf.decode_spine`), decoded to the end.

Requests and replies pass through the gateway like that; this is for who wants to look into them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final

from gater.erl import etf
from gater.erl.terms import EncodedTerm, Term

MAX_ATOMS_KEPT: Final = 10_000
"""Atoms, pids and references that a `Decoder` remembers: what callers call their things, not what they count with."""


MAX_MAPS_KEPT: Final = 256
"""Maps that a `Decoder` remembers, so that those that come again need not be read again: as many events are on their
way to many subscribers at a time."""

MAX_MAP_BYTES: Final = 4096
"""And how large they may be."""


def decoded(term: Term, atoms: etf.AtomTable | None = None) -> Term:
    """A term that `etf.decode_spine` gave, with its last element decoded too."""
    if type(term) is EncodedTerm:
        return etf.decode_encoded(term, atoms)
    if type(term) is tuple and term and type(term[-1]) is EncodedTerm:
        return (*term[:-1], decoded(term[-1], atoms))
    return term


class Decoder:
    """`decoded` for many terms that are much alike: atoms are looked up once, and forgotten when there are many."""

    __slots__ = ("_atoms", "_maps")

    def __init__(self) -> None:
        self._atoms = etf.AtomTable()
        self._maps: OrderedDict[bytes, tuple[Sequence[Term], Collection[Term], dict[Term, Term]]] = OrderedDict()
        """What `with_fields` has read lately: of which atoms and which keys, and what it was."""

    def __call__(self, term: Term) -> Term:
        return decoded(term, self._known())

    def opened(self, term: Term) -> Term:
        """A tuple that is encoded as a whole, decoded but for a container at its end; anything else as it is."""
        if type(term) is not EncodedTerm:
            return term
        return etf.decode_spine(term.buffer, term.start, 1, self._known(), term.atoms)

    def with_fields(self, term: Term, keys: Collection[Term]) -> Term:
        """As calling it, but of a map at the end only the values of these keys (`etf.read_map`). The same map comes
        often: an event that went to many subscribers is acknowledged by each."""
        if type(term) is tuple and term and type(last := term[-1]) is EncodedTerm:
            is_small = len(last.buffer) - last.start <= MAX_MAP_BYTES
            if is_small and (known := self._maps.get(last.data)) is not None:
                atoms, wanted, values = known
                if atoms is last.atoms and wanted is keys:
                    return (*term[:-1], values)
            found, end = etf.read_map(last.buffer, last.start, keys, self._known(), last.atoms)
            if found is not None and end == len(last.buffer):
                if is_small:
                    self._maps[last.data] = (last.atoms, keys, found)
                    if len(self._maps) > MAX_MAPS_KEPT:
                        self._maps.popitem(last=False)
                return (*term[:-1], found)
        return self(term)

    def fields(self, term: EncodedTerm, keys: Collection[Term]) -> dict[Term, Term]:
        """The values of these keys in a map; empty if it is none (`etf.read_map`)."""
        values, _ = etf.read_map(term.buffer, term.start, keys, self._known(), term.atoms)
        return {} if values is None else values

    def maps(self, term: EncodedTerm, keys: Collection[Term]) -> list[tuple[dict[Term, Term], EncodedTerm]] | None:
        """Of each map in a list the values of these keys, and the map as it came (`etf.read_maps`)."""
        return etf.read_maps(term, keys, self._known())

    def _known(self) -> etf.AtomTable:
        if len(self._atoms) > MAX_ATOMS_KEPT:
            self._atoms = etf.AtomTable()
        return self._atoms
