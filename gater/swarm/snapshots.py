"""Whole registries on the wire, in pieces: a registry of 10^5 names is some ten megabytes and a second's work.

`sync_recv` and `sync_ack` carry a registry as one list. What comes in is decoded entry by entry while it is merged,
what goes out is encoded some entries at a time, so that other traffic has its turn in between (`peer.py` says when).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Final

from gater.erl import etf
from gater.erl.errors import ErlError, RemoteProtocolError
from gater.erl.terms import EncodedTerm, Term

SLICE_S: Final = 0.004
"""How long to encode before others have their turn."""

_ENTRIES_BETWEEN_LOOKS: Final = 50
"""Entries encoded before the clock is looked at: half a millisecond."""

_WINDOW_BYTES: Final = 64 * 1024
"""How much of an incoming registry the decoder sees at a time: it checks what is long before it decodes any of it."""

_LIST: Final = 108
_NIL: Final = 106
_LIST_HEAD_BYTES: Final = 5
_END: Final = bytes((_NIL,))


class IncomingList:
    """The elements of an encoded list, each decoded when it is taken.

    `on_bad(error)` is told when the bytes turn out to be no list; the elements end there, after one None.
    Raises `RemoteProtocolError` if they do not even begin as one.
    """

    __slots__ = ("_at", "_atoms", "_cache", "_data", "_left", "_next_window", "_on_bad", "_window")

    def __init__(self, encoded: EncodedTerm, atoms: etf.AtomTable, on_bad: Callable[[ErlError], object]) -> None:
        data, start = encoded.buffer, encoded.start
        self._data = data
        self._cache = encoded.atoms
        self._atoms = atoms
        self._on_bad = on_bad
        self._left = 0
        self._window = b""
        """A part of the data; the next element begins at `_at` in it."""
        self._at = 0
        self._next_window = start + _LIST_HEAD_BYTES
        if data[start] == _NIL and len(data) == start + 1:
            return
        if data[start] != _LIST or len(data) < self._next_window:
            raise RemoteProtocolError(f"expected a list, got a term with tag {data[start]}")
        self._left = int.from_bytes(data[start + 1 : self._next_window], "big")
        if self._left > len(data) - self._next_window:
            raise RemoteProtocolError(f"{self._left} elements do not fit into {len(data) - start} bytes")

    def __len__(self) -> int:
        """How many elements have not been taken."""
        return self._left

    def __iter__(self) -> Iterator[Term]:
        """Take all that are left."""
        while self._left:
            yield self.pop()

    def pop(self) -> Term:
        """Take the next element, the first one first. IndexError if none is left."""
        if not self._left:
            raise IndexError("all elements have been taken")
        try:
            term, self._at = self._decoded()
            if self._left == 1 and self._window[self._at :] + self._data[self._next_window :] != _END:
                raise RemoteProtocolError("the list does not end where it should")
        except ErlError as error:
            self._left = 0
            self._on_bad(error)
            return None
        self._left -= 1
        if not self._left:
            self._data = self._window = b""
        return term

    def _decoded(self) -> tuple[Term, int]:
        size = _WINDOW_BYTES
        while True:
            try:
                return etf.decode_term(self._window, self._at, self._atoms, self._cache)
            except ErlError:
                # Cut off by the end of the window or, if that was all, by the sender.
                if self._next_window >= len(self._data):
                    raise
            begin = self._next_window - len(self._window) + self._at
            self._window = self._data[begin : begin + size]
            self._at = 0
            self._next_window = begin + len(self._window)
            size *= 2


class OutgoingList:
    """A list being encoded: call `work` until it says that all is done, then take `encoded`."""

    def __init__(self, count: int, terms: Iterable[Term]) -> None:
        self._terms: Iterator[Term] = iter(terms)
        self._parts = [bytes((_LIST,)) + count.to_bytes(4, "big") if count else b""]
        self._done = False

    def work(self, slice_s: float = SLICE_S) -> bool:
        """Encode for `slice_s` seconds, or to the end: then True. Raises `EncodeError` for what is no term."""
        until = monotonic() + slice_s
        while not self._done:
            pieces: list[bytes] = []
            for _ in range(_ENTRIES_BETWEEN_LOOKS):
                try:
                    term = next(self._terms)
                except StopIteration:
                    pieces.append(_END)
                    self._done = True
                    break
                etf.encode_into(pieces, term)
            self._parts.append(b"".join(pieces))
            if monotonic() >= until:
                break
        return self._done

    @property
    def encoded(self) -> EncodedTerm:
        """The list, once `work` has said that it is complete."""
        assert self._done, "not encoded yet"
        return EncodedTerm(b"".join(self._parts))
