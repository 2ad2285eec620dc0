"""One append, from the first try to the answer: the decisions, without I/O.

Two ways to write, decided by what the owner's node offers:

*Guarded* (`guarded.py`): the store itself puts an event at a number only where nothing is and only while the stream has
exactly as many events. The numbers `first..` are chosen here, before the write is sent, and stay the same while an
attempt is in doubt. So whenever an attempt is carried out - at once, twice, or by a frozen node an hour later - it can
only fill the very numbers that were meant for it, and never after somebody else has filled the first of them. An
attempt whose outcome is unknown is therefore simply followed by another one.

*Worker*: the gateway worker's own append, check-then-put. Sent once; when its outcome is unknown the stream is read
from `first` on and the event ids are looked for. What a frozen worker does later nobody can prevent.

    begin -> version known or expected -> WRITE
          -> else ASK_VERSION -> WRITE
    WRITE -> written -> {:ok, last}
          -> refused at `first`: a number was expected -> {:error, {:wrong_expected_version, version}}
                                 nothing was expected  -> WRITE at the new number
          -> refused later, or time was up -> {:error, {:partially_appended, last, counts}}
          -> the stream does not reach `first` yet: an attempt is in doubt -> WRITE again after a pause, because that
             attempt would be stored if the stream grew; none is -> as refused
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

NO_STREAM: Final = -1
"""The least version there is: that of a stream that does not exist."""

_UNCERTAIN: Final = "no certainty within {:g} s; read the stream and look for the event ids"


@dataclass(frozen=True, slots=True)
class AskVersion:
    """Find out the stream's version. `fenced`: on a node that has caught up first."""

    fenced: bool


@dataclass(frozen=True, slots=True)
class Write:
    """Write the events as numbers `first`, `first + 1`, ...

    `again`: an earlier attempt may have stored some of them. `later`: after a short pause.
    """

    first: int
    again: bool
    later: bool = False


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
        self._under_way = False
        self._in_doubt = False
        self._passed = False
        """Whether the stream was seen beyond `first` while nothing was there."""

    @property
    def in_doubt(self) -> bool:
        """Whether an earlier attempt may have stored some of the events, or may still do so."""
        return self._in_doubt

    @property
    def expects_number(self) -> bool:
        """Whether the caller named the version the stream must have."""
        return type(self._expected) is int

    def begin(self, *, guarded: bool) -> Step:
        """The first step; again after a change of owner if nothing has been written yet."""
        if type(self._expected) is int:
            if self._expected >= NO_STREAM:
                return self._write(self._expected + 1)
            # A version that no stream ever has is refused with the one this stream has.
            return AskVersion(fenced=False)
        if self._known is not None and self._known >= 0 and guarded:
            return self._write(self._known + 1)
        return AskVersion(fenced=self._expected is schema.STREAM_EXISTS)

    def saw(self, version: int) -> None:
        """Meanwhile the stream has been seen at this version (another append of this gateway has ended)."""
        self._known = version

    def version(self, version: int) -> Step:
        """The stream is at `version` (-1: it does not exist)."""
        if self.expects_number or (self._expected is schema.STREAM_EXISTS and version < 0):
            return _wrong_version(version + 1)
        return self._write(version + 1)

    def _write(self, first: int) -> Step:
        self._first = first
        self._passed = False
        return Write(first, self._in_doubt)

    def sent(self) -> None:
        """A write has been sent."""
        self._under_way = True

    def not_sent(self) -> Step:
        """The write reached nobody: the same step again, elsewhere."""
        assert self._first is not None
        self._under_way = False
        return Write(self._first, self._in_doubt)

    def written(self, last: int) -> Step:
        """All events are stored; the last one has this number."""
        return Done(schema.ok(last), last)

    def unknown(self, *, guarded: bool) -> Step:
        """The write was sent, and nobody knows what became of it."""
        assert self._first is not None
        self._under_way = False
        self._in_doubt = True
        return Write(self._first, True) if guarded else Resolve(self._first)

    # Guarded writes

    def refused(self, number: int, count: int) -> Step:
        """Number `number` holds an event of somebody else; the stream has `count` events. Nothing later was written.

        That settles it for every other attempt too: all of them come to this number and cannot pass it.
        """
        assert self._first is not None
        self._under_way = self._in_doubt = False
        if number > self._first:
            return self._partial(number - self._first, count - 1)
        if count <= number:
            return _has_holes(f"the stream has {count} events, but one of number {number}")
        return self._refused_at(count)

    def ahead(self, number: int, count: int) -> Step:
        """Number `number` was out of reach: the stream did not have so many events. It has `count` now.

        An attempt in doubt may still be stored once the stream has grown to `first`: no refusal can be promised then.
        """
        assert self._first is not None
        self._under_way = False
        if number > self._first:
            # The events before it are stored, or were until somebody deleted them.
            self._in_doubt = True
            return Write(self._first, True, later=True)
        if count > self._first:
            if self._passed:
                # It was beyond `first` before the second look, which found nothing there, either.
                self._in_doubt = False
                return _has_holes(f"the stream has {count} events, but none of number {number}")
            self._passed = True
        if count >= self._first:
            return Write(self._first, self._in_doubt)
        if self._in_doubt:
            return Write(self._first, True, later=True)
        return self._refused_at(count)

    def late(self, number: int) -> Step:
        """Time was up before number `number` was tried; what comes before it is stored."""
        assert self._first is not None
        self._under_way = False
        if number > self._first and not self._in_doubt:
            return self._partial(number - self._first, number - 1)
        return Write(self._first, self._in_doubt, later=True)

    def _refused_at(self, count: int) -> Step:
        if self.expects_number or (self._expected is schema.STREAM_EXISTS and count == 0):
            return _wrong_version(count)
        return self._write(count)

    def _partial(self, stored: int, version: int) -> Done:
        assert self._first is not None
        last = self._first + stored - 1
        return Done(schema.error(schema.partially_appended(last, stored, len(self._ids))), version)

    # Writes by workers

    def refused_by_worker(self, count: int) -> Step:
        """A worker wrote nothing, because the stream was not where it should be; it has `count` events now."""
        assert self._first is not None
        self._under_way = False
        if self._in_doubt:
            # Refused perhaps because that other attempt has been stored meanwhile.
            return Resolve(self._first)
        if count == self._first:
            return Write(self._first, False)
        return self._refused_at(count)

    def found(self, ids: Sequence[Term], version: int) -> Step:
        """The stream is at `version`; from number `first` on it holds events with these ids."""
        assert self._first is not None
        stored = 0
        while stored < len(ids) and stored < len(self._ids) and ids[stored] == self._ids[stored]:
            stored += 1
        if stored == len(self._ids):
            return Done(schema.ok(self._first + stored - 1), version)
        if stored:
            return self._partial(stored, version)
        if version == self._first - 1:
            return Write(self._first, False)
        self._in_doubt = False
        return self._refused_at(version + 1)

    # The end

    def out_of_time(self, timeout_s: float) -> Done:
        """The caller cannot wait any longer."""
        if self._under_way or self._in_doubt:
            return Done(schema.error(schema.unknown_outcome(_UNCERTAIN.format(timeout_s))))
        return Done(schema.error(schema.call_timeout(round(timeout_s * 1000))))


def _has_holes(what: str) -> Done:
    return Done(schema.error(schema.storage_failed(f"{what}: some were deleted")))


def _wrong_version(count: int) -> Done:
    return Done(schema.error(schema.wrong_expected_version(count - 1)), count - 1)
