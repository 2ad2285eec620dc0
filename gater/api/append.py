"""One append, from the first try to the answer: the decisions, without I/O.

Two ways to write, decided by what the owner's node offers:

*Guarded* (`guarded.py`): the store itself checks every event's number, so a write for numbers `first..` can be sent
again without harm (`again`): what of it is stored already is recognised by its event ids, what is not is written, and a
number that holds somebody else's event is refused. The number is always chosen here, before the write is sent: a write
that a frozen node carries out late can then only fill the very numbers that were meant for it.

*Worker*: the gateway worker's own append, check-then-put. Sent once; when its outcome is unknown the stream is read
from `first` on and the event ids are looked for.

    begin -> version known or expected -> WRITE
          -> else ASK_VERSION -> WRITE
    WRITE -> written -> {:ok, last}
          -> refused at `first`: a number was expected -> {:error, {:wrong_expected_version, version}}
                                 nothing was expected  -> WRITE at the new number
          -> refused later -> {:error, {:partially_appended, last, counts}}
          -> unknown: guarded -> WRITE again; worker -> RESOLVE
    RESOLVE -> all there -> {:ok, last}; none there and the version unchanged -> WRITE; else refused
    time is up -> {:error, {:unknown_outcome, _}} if a write is or may be under way, else {:error, {:call_timeout, _}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from gater.api import schema
from gater.erl.terms import Atom, Term

MAX_REFUSALS: Final = 100
"""How often an append that expects nothing is tried at a new number, other writers having been faster."""


@dataclass(frozen=True, slots=True)
class AskVersion:
    """Find out the stream's version. `fenced`: on a node that has caught up first."""

    fenced: bool


@dataclass(frozen=True, slots=True)
class Write:
    """Write the events as numbers `first`, `first + 1`, ...; `again`: an earlier try may have stored some of them."""

    first: int
    again: bool


@dataclass(frozen=True, slots=True)
class Resolve:
    """Read the events from number `first` on, as many as were to be written, on a node that has caught up."""

    first: int


@dataclass(frozen=True, slots=True)
class Done:
    """Answer the caller. `version` is the stream's version if it is known now."""

    reply: Term
    version: int | None = None


Step: TypeAlias = AskVersion | Write | Resolve | Done


class Append:
    """The decisions of one append. Every method takes an outcome and gives the next step."""

    def __init__(self, expected: int | Atom | None, event_ids: Sequence[Term], *, known_version: int | None) -> None:
        """`expected` is a number, `:any`, `:stream_exists` or None; `known_version` what this gateway last saw."""
        self._expected = expected
        self._ids = list(event_ids)
        self._known = known_version
        self._first: int | None = None
        self._in_doubt = False
        self._refusals = 0

    @property
    def expects_number(self) -> bool:
        """Whether the caller named the version the stream must have."""
        return type(self._expected) is int

    def begin(self, *, guarded: bool) -> Step:
        """The first step; again after a change of owner if nothing has been written yet."""
        if type(self._expected) is int:
            return self._write(self._expected + 1)
        if self._known is not None and self._known >= 0 and guarded:
            return self._write(self._known + 1)
        return AskVersion(fenced=self._expected is schema.STREAM_EXISTS)

    def saw(self, version: int) -> None:
        """Meanwhile the stream has been seen at this version (another append of this gateway has ended)."""
        self._known = version

    def version(self, version: int) -> Step:
        """The stream is at `version` (-1: it does not exist)."""
        if self._expected is schema.STREAM_EXISTS and version < 0:
            return Done(schema.error(schema.wrong_expected_version(version)), version)
        return self._write(version + 1)

    def _write(self, first: int) -> Step:
        self._first = first
        return Write(first, self._in_doubt)

    def written(self, last: int) -> Step:
        """All events are stored; the last one has this number."""
        return Done(schema.ok(last), last)

    def refused(self, number: int, count: int) -> Step:
        """Number `number` holds an event of somebody else; the stream has `count` events. Nothing later was written."""
        self._in_doubt = False
        if self._first is not None and number > self._first:
            return Done(
                schema.error(schema.partially_appended(number - 1, number - self._first, len(self._ids))), count - 1
            )
        if self.expects_number or (self._expected is schema.STREAM_EXISTS and count == 0):
            return Done(schema.error(schema.wrong_expected_version(count - 1)), count - 1)
        self._refusals += 1
        if self._refusals > MAX_REFUSALS:
            return Done(schema.error(schema.wrong_expected_version(count - 1)), count - 1)
        return self._write(count)

    def refused_anew(self, count: int) -> Step:
        """A worker refused the write at its first number; the stream has `count` events."""
        assert self._first is not None
        return self.refused(self._first, count)

    def not_sent(self) -> Step:
        """The write reached nobody: the same step again, elsewhere."""
        assert self._first is not None
        return Write(self._first, self._in_doubt)

    def unknown(self, *, guarded: bool) -> Step:
        """The write was sent, and nobody knows what became of it."""
        assert self._first is not None
        self._in_doubt = True
        return Write(self._first, True) if guarded else Resolve(self._first)

    def found(self, ids: Sequence[Term], version: int) -> Step:
        """The stream is at `version`; from number `first` on it holds events with these ids."""
        assert self._first is not None
        if list(ids[: len(self._ids)]) == self._ids:
            return Done(schema.ok(self._first + len(self._ids) - 1), version)
        stored = 0
        while stored < len(ids) and stored < len(self._ids) and ids[stored] == self._ids[stored]:
            stored += 1
        if stored:
            last = self._first + stored - 1
            return Done(schema.error(schema.partially_appended(last, stored, len(self._ids))), version)
        if version == self._first - 1:
            self._in_doubt = False
            return Write(self._first, False)
        return self.refused(self._first, version + 1)

    def out_of_time(self, timeout_s: float) -> Done:
        """The caller cannot wait any longer."""
        if self._in_doubt:
            return Done(
                schema.error(
                    schema.unknown_outcome(
                        f"no certainty within {timeout_s:g} s; read the stream and look for the event ids"
                    )
                )
            )
        return Done(schema.error(schema.call_timeout(round(timeout_s * 1000))))

    def sent(self) -> None:
        """A write has been sent: until it is answered its outcome is in doubt."""
        self._in_doubt = True
