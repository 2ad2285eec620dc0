"""Terms that were decoded along their last elements only (`etf.decode_spine`), decoded to the end.

Requests and replies pass through the gateway like that; this is for who wants to look into them.
"""

from __future__ import annotations

from typing import Final

from gater.erl import etf
from gater.erl.terms import EncodedTerm, Term

MAX_ATOMS_KEPT: Final = 10_000
"""Atoms, pids and references that a `Decoder` remembers: what callers call their things, not what they count with."""


def decoded(term: Term, atoms: etf.AtomTable | None = None) -> Term:
    """A term that `etf.decode_spine` gave, with its last element decoded too."""
    if type(term) is EncodedTerm:
        return etf.decode_encoded(term, atoms)
    if type(term) is tuple and term and type(term[-1]) is EncodedTerm:
        return (*term[:-1], decoded(term[-1], atoms))
    return term


class Decoder:
    """`decoded` for many terms that are much alike: atoms are looked up once, and forgotten when there are many."""

    __slots__ = ("_atoms",)

    def __init__(self) -> None:
        self._atoms = etf.AtomTable()

    def __call__(self, term: Term) -> Term:
        if len(self._atoms) > MAX_ATOMS_KEPT:
            self._atoms = etf.AtomTable()
        return decoded(term, self._atoms)
