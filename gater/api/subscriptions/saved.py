"""What persistent subscriptions keep in their store, for this gateway and the next: checkpoints and parked events.

All of it are snapshots, which every ExESDB store has, under sources of gater's own:

    source "gater.checkpoint", stream NAME, version WRITER * 100 + SHARD (from 0) or RECENT:
        %{type, selector, start, shard, write, positions: %{stream => number of the next event},
          anew: %{stream => how often it began anew}, stops: how often it was stopped and resumed}
    source "gater.parked.NAME", stream (hash of the event's stream), version (number of the event):
        %{event, reason, attempts, write}

A checkpoint is spread over `SHARDS` snapshots by its streams, so that a subscription of very many streams writes little
at a time. What has changed lately stands in one more of them, `RECENT`, so that most saves are a single write. Where a
store offers Khepri that says when a snapshot is stored (`writes.py`). ExESDB itself acknowledges none: there what was
written is read back, `write` tells it from an earlier one.

One snapshot is written at a time. A write that has not been answered in time may arrive all the same, after later ones:
then the checkpoint goes back to it until that snapshot is written again, so that some events come again after a crash.

Two gateways may take a subscription for theirs for a while (one was frozen, or cut off from the other). So that neither
undoes what the other has saved, each has snapshots of its own, by its `WRITER` number. Of all of them the higher number
of a stream counts; where the stream has begun anew (its events were lost by the store), that of the last time. A stream
that is in none of them begins at `start`. Who has had the subscription for `ABSORB_S` takes over what others have
saved, and deletes it (`absorb`).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from itertools import count
from typing import Final, TypeAlias
from zlib import crc32

from gater.api import schema
from gater.api.schema import Rejected, check_request
from gater.api.service import Service
from gater.api.subscriptions.protocol import Event, event_of
from gater.api.subscriptions.reads import StoreReads
from gater.api.subscriptions.writes import Writes
from gater.erl.terms import Atom, Term, exact_key

CHECKPOINTS: Final = "gater.checkpoint"
PARKED: Final = "gater.parked."

ABSORB_S: Final = 60.0
"""How long another gateway may still save what it takes for its own."""

WRITER_VERSIONS: Final = 100
"""Versions of snapshots for each writer: its shards and `RECENT`."""

MAX_WRITERS: Final = 10_000_000
"""Writers that there are numbers for; two gateways with the same one are as likely as that."""

SHARDS: Final = 64
"""Snapshots of one checkpoint: 100,000 streams are 64 snapshots of some 50 kB."""

RECENT: Final = SHARDS
"""The snapshot of the streams that changed lately."""

MAX_RECENT: Final = 500
"""Streams in it, some 15 kB; when there are more they are written to the shards they belong to."""

MAX_PARKED_READ: Final = 1_000
"""Parked events that are read for one request, one by one."""

PARKED_READ_S: Final = 2.0
"""How long that may go on: its caller waits."""

MAX_PARKED_BYTES: Final = 16 * 1024 * 1024
"""And their bytes, but for the last event."""

CONFIRM_S: Final = 3.0
"""How long a snapshot that was cast may take to be there, and deleted ones to be gone, before that counts as failed."""

LOOK_AGAIN_S: Final = 0.05
"""Between two looks whether it is there."""

_MARK_BYTES: Final = 8

_TYPE: Final = Atom("type")
_SELECTOR: Final = Atom("selector")
_START: Final = Atom("start")
_SHARD: Final = Atom("shard")
_WRITE: Final = Atom("write")
_POSITIONS: Final = Atom("positions")
_ANEW: Final = Atom("anew")
_STOPS: Final = Atom("stops")
_EVENT: Final = Atom("event")
_REASON: Final = Atom("reason")
_ATTEMPTS: Final = Atom("attempts")


_Place: TypeAlias = tuple[int, int]
"""How often the stream has begun anew, and the number of the next event: the higher one counts."""


ParkedPlace: TypeAlias = tuple[bytes, int]
"""Where a parked event is: the hash of its stream, and its number."""


class Unreadable(Exception):
    """The store did not say what it has; the argument is its reason."""


class Turns:
    """A lock that calls who is next: taking it needs no task. In the order in which it was asked for."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, on_turn: Callable[[], None]) -> None:
        """`on_turn` is called, perhaps at once, when it is its turn, which lasts until `give_back`."""
        if self._taken:
            self._waiting.append(on_turn)
        else:
            self._taken = True
            on_turn()

    def give_back(self) -> None:
        """The turn is over."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._taken = False

    async def __aenter__(self) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.take(lambda: self.give_back() if mine.cancelled() else mine.set_result(None))
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self.give_back()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.give_back()


class Snapshots:
    """Writing snapshots so that one knows they are there."""

    def __init__(self, service: Service, reads: StoreReads) -> None:
        self._service = service
        self._reads = reads
        self._writes = Writes(service, reads.store)
        self._marks = count(int.from_bytes(os.urandom(_MARK_BYTES - 1)))
        self._closed = False
        self.store = reads.store

    def write(
        self,
        source: str,
        stream: str | bytes,
        version: int,
        record: dict[Term, Term],
        on_done: Callable[[bool], None],
    ) -> None:
        """Write one; `on_done` is called once, perhaps at once, with whether it is certain to be there."""
        record[_WRITE] = next(self._marks).to_bytes(_MARK_BYTES)
        service = self._service
        if service.embedded is not None and service.is_embedded(self.store):
            request = check_request(schema.record_snapshot_cast(self.store, source, stream, version, record), cast=True)
            if isinstance(request, Rejected):
                on_done(False)
            else:
                service.embedded.submit(request, lambda reply: on_done(reply is schema.OK))
        elif not self._writes.put(source.encode(), _bytes(stream), version, record, on_done):
            self._cast(source, stream, version, record, on_done)

    def _cast(
        self, source: str, stream: str | bytes, version: int, record: dict[Term, Term], on_done: Callable[[bool], None]
    ) -> None:
        """Write one as gateways of ExESDB do, and look whether it is there."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CONFIRM_S

        def taken(refused: Rejected | None) -> None:
            if refused is None:
                look()
            else:
                on_done(False)

        def look() -> None:
            if not self._closed:
                self._reads.ask(schema.read_snapshot_request(self.store, source, stream, version), looked)

        def looked(reply: Term) -> None:
            found = reply[1] if reply[0] is schema.OK else None
            if isinstance(found, Mapping) and found.get(_WRITE) == record[_WRITE]:
                on_done(True)
            elif loop.time() >= until:
                on_done(False)
            else:
                loop.call_later(LOOK_AGAIN_S, look)

        self._service.cast(schema.record_snapshot_cast(self.store, source, stream, version, record), taken)

    def close(self) -> None:
        """Wait for no write any more: nobody is told what becomes of it."""
        self._closed = True
        self._writes.close()

    async def all(self, source: str, stream: bytes) -> list[tuple[bytes, bytes, int, Mapping[Term, Term]]]:
        """The snapshots of a stream: source, stream, version, record; all there are, not what some member of the store
        knows by now. Raises `Unreadable`."""
        reply = await self._reads.certain_snapshots(source.encode(), stream)
        if reply[0] is not schema.OK:
            raise Unreadable(reply[1])
        return [
            (path[1], path[2], int(path[3]), record)
            for path, record in reply[1].items()
            if isinstance(record, Mapping) and len(path) == 4
        ]

    async def places(self, source: str) -> list[ParkedPlace]:
        """Stream and version of the snapshots of a source, in order. Raises `Unreadable`."""
        places = await self._reads.snapshot_places(source)
        if places is None:
            raise Unreadable(schema.storage_failed("the store does not say which snapshots it has"))
        return places

    async def read(self, source: str, stream: bytes, version: int) -> Mapping[Term, Term]:
        """One snapshot; empty if there is none any more. Raises `Unreadable`."""
        reply = await self._reads.reply(schema.read_snapshot_request(self.store, source, stream, version))
        if reply[0] is schema.OK:
            return reply[1] if isinstance(reply[1], Mapping) else {}
        if schema.is_not_found(reply[1]):
            return {}
        raise Unreadable(reply[1])

    def delete(self, source: str | bytes, stream: str | bytes, version: int) -> None:
        """Have one deleted; nobody says when."""
        if not self._writes.delete(_bytes(source), _bytes(stream), version, _ignore):
            self._service.cast(schema.delete_snapshot_cast(self.store, _text(source), _text(stream), version), _ignore)


class SavedState:
    """Checkpoint and parked events of one persistent subscription."""

    def __init__(
        self, snapshots: Snapshots, name: bytes, kind: Atom, selector: Term, start: int = 0, *, writer: Atom
    ) -> None:
        """`writer` is the node of the gateway that saves."""
        self._snapshots = snapshots
        self._first_version = (1 + crc32(writer.name.encode()) % (MAX_WRITERS - 1)) * WRITER_VERSIONS
        self.name = name
        self.kind = kind
        self.selector = selector
        self.start = start
        """The first number wanted of a stream without a position: as given here, or as it was saved (`load`)."""
        self.has_others = False
        """Whether other gateways have saved something that is still there."""
        self._stops = 0
        self.era = 0
        """How often streams have begun anew here: what was to be saved before is not saved any more."""
        self._removed = False
        self._anew: dict[bytes, int] = {}
        self._shards: dict[int, dict[bytes, _Place]] = {}
        self._recent: dict[bytes, _Place] = {}
        self._turns = Turns()

    def problem(self) -> Rejected | None:
        """Why a store could not keep the state of a subscription of this name."""
        source, stream = self._parked_source, _hash(b"")
        checked = check_request(schema.record_snapshot_cast(self._snapshots.store, source, stream, 0, {}), cast=True)
        return checked if isinstance(checked, Rejected) else None

    async def load(self) -> dict[bytes, int] | None:
        """The positions that were saved, None if there are none. Raises `Unreadable`; ValueError if the subscription of
        this name has another type or selector."""
        found = await self._found()
        if not found:
            return None
        places: dict[bytes, _Place] = {}
        self._shards.clear()
        self._recent = {}
        for version, record in found:
            start = record.get(_START)
            if type(start) is int and start >= 0:
                self.start = start
            of_shard = _places(record)
            shard = version - self._first_version
            if shard == RECENT:
                self._recent = of_shard
            elif 0 <= shard < SHARDS:
                self._shards[shard] = of_shard
            else:
                self.has_others = True
            self._stops = max(self._stops, record.get(_STOPS, 0))
            _raise(places, of_shard)
        self._anew = {stream: anew for stream, (anew, _) in places.items() if anew}
        return {stream: number for stream, (_, number) in places.items()}

    async def _found(self) -> list[tuple[int, Mapping[Term, Term]]]:
        """Version and record of what is saved of the checkpoint, for certain. Raises as `load` does."""
        found = await self._snapshots.all(CHECKPOINTS, self.name)
        for _, _, _, record in found:
            same = exact_key(record.get(_SELECTOR)) == exact_key(self.selector)
            if record.get(_TYPE) is not self.kind or not same:
                raise ValueError(
                    "a subscription of this name has another type or selector: choose another name, or remove it first"
                )
        return [(version, record) for _, _, version, record in found]

    @property
    def stopped(self) -> bool:
        """Whether a subscriber stopped the subscription; saved with the next positions, be there any or not."""
        return self._stops % 2 == 1

    @stopped.setter
    def stopped(self, stopped: bool) -> None:
        self._stops += stopped is not self.stopped

    async def absorb(self) -> bool:
        """Save what other gateways have saved, and delete theirs; whether that is done. Raises `Unreadable`."""
        async with self._turns:
            if self._removed:
                return True
            others = [
                (version, record)
                for _, _, version, record in await self._snapshots.all(CHECKPOINTS, self.name)
                if not 0 <= version - self._first_version < WRITER_VERSIONS
            ]
            touched = set()
            for _, record in others:
                for stream, place in _places(record).items():
                    shard = _shard(stream)
                    _raise(self._shards.setdefault(shard, {}), {stream: place})
                    touched.add(shard)
                self._stops = max(self._stops, record.get(_STOPS, 0))
            if not await _outcome(lambda on_done: self._write_all((RECENT, *touched), on_done)):
                return False
            for version, _ in others:
                self._snapshots.delete(CHECKPOINTS, self.name, version)
            self.has_others = False
            return True

    def begin_anew(self, streams: Collection[bytes]) -> None:
        """What was saved for these streams counts no longer, as soon as something is saved."""
        self.era += 1
        for stream in streams:
            self._anew[stream] = self._anew.get(stream, 0) + 1
            self._recent[stream] = (self._anew[stream], 0)

    async def save(self, positions: Mapping[bytes, int], era: int | None = None) -> bool:
        """As `begin_save`, to be awaited."""
        return await _outcome(lambda on_done: self.begin_save(positions, on_done, era))

    def begin_save(
        self, positions: Mapping[bytes, int], on_done: Callable[[bool], None], era: int | None = None
    ) -> None:
        """Save these positions with those saved before; `on_done` is called once, perhaps at once, with whether they
        are certain to be there. With an `era`: not if streams have begun anew since."""
        self._turns.take(lambda: self._save(positions, on_done, era))

    def _save(self, positions: Mapping[bytes, int], on_done: Callable[[bool], None], era: int | None) -> None:
        def written(ok: bool) -> None:
            self._turns.give_back()
            on_done(ok)

        if self._removed or (era is not None and era != self.era):
            written(False)
            return
        _raise(self._recent, {stream: (self._anew.get(stream, 0), at) for stream, at in positions.items()})
        if len(self._recent) <= MAX_RECENT:
            self._write(RECENT, written)
            return
        moving = dict(self._recent)
        for stream, place in moving.items():
            _raise(self._shards.setdefault(_shard(stream), {}), {stream: place})

        def moved(ok: bool) -> None:
            if ok:
                # What is left in the store of the recent ones says nothing that is not in the shards.
                self._recent = {stream: place for stream, place in self._recent.items() if moving.get(stream) != place}
            written(ok)

        self._write_all({_shard(stream) for stream in moving}, moved)

    async def flushed(self) -> None:
        """Return when the writes that have been asked for are over."""
        await asyncio.sleep(0)
        async with self._turns:
            return

    def _write_all(self, shards: Collection[int], on_done: Callable[[bool], None]) -> None:
        """Write these; `on_done` is called once, with whether all of them are certain to be there."""
        left, all_ok = len(shards), True

        def written(ok: bool) -> None:
            nonlocal left, all_ok
            left -= 1
            all_ok = all_ok and ok
            if not left:
                on_done(all_ok)

        for shard in shards:
            self._write(shard, written)

    def _write(self, shard: int, on_done: Callable[[bool], None]) -> None:
        places = self._recent if shard == RECENT else self._shards[shard]
        record: dict[Term, Term] = {
            _TYPE: self.kind,
            _SELECTOR: self.selector,
            _START: self.start,
            _SHARD: shard,
            _POSITIONS: {stream: number for stream, (_, number) in places.items()},
            _ANEW: {stream: anew for stream, (anew, _) in places.items() if anew},
            _STOPS: self._stops,
        }
        self._snapshots.write(CHECKPOINTS, self.name, self._first_version + shard, record, on_done)

    @property
    def _parked_source(self) -> str:
        return PARKED + self.name.decode()

    async def park(self, event: Event, reason: Term, attempts: int) -> bool:
        """Keep this event among the parked ones."""
        record: dict[Term, Term] = {_EVENT: event.record, _REASON: reason, _ATTEMPTS: attempts}
        source, stream = self._parked_source, _hash(event.stream)
        return await _outcome(lambda on_done: self._snapshots.write(source, stream, event.number, record, on_done))

    def drop_parked(self, stream: bytes, number: int) -> None:
        """Forget a parked event."""
        self._snapshots.delete(self._parked_source, _hash(stream), number)

    async def drop(self, places: Collection[ParkedPlace]) -> bool:
        """Forget these parked events; whether they are certain to be gone. Raises `Unreadable`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CONFIRM_S
        while True:
            left = set(places) & set(await self.parked_places())
            if not left or loop.time() >= until:
                return not left
            for stream, number in left:
                self._snapshots.delete(self._parked_source, stream, number)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def parked_places(self) -> list[ParkedPlace]:
        """Where the parked events are, in order. Raises `Unreadable`."""
        return await self._snapshots.places(self._parked_source)

    async def parked(self, places: Sequence[ParkedPlace], most: int, most_bytes: int) -> list[tuple[Event, Term, int]]:
        """The parked events of the first of these places, with reason and attempts: at most so many and so many bytes
        (but for the last event), and what can be read in time. Raises `Unreadable`."""
        found: list[tuple[Event, Term, int]] = []
        read_bytes = 0
        loop = asyncio.get_running_loop()
        until = loop.time() + PARKED_READ_S
        for stream, number in places:
            if len(found) >= most or read_bytes >= most_bytes or (found and loop.time() >= until):
                break
            record = await self._snapshots.read(self._parked_source, stream, number)
            try:
                event = event_of(record.get(_EVENT))
            except schema.SchemaError:
                continue
            found.append((event, record.get(_REASON), int(record.get(_ATTEMPTS, 0))))
            read_bytes += event.size
        return found

    async def remove(self) -> bool:
        """Have everything deleted, and save nothing any more; whether nothing is left of the checkpoint. Raises as
        `load` does."""
        async with self._turns:
            loop = asyncio.get_running_loop()
            until = loop.time() + CONFIRM_S
            found = await self._found()
            self._removed = True
            if found:
                # Before the checkpoint: while there is one, who could not remove everything tries again.
                for stream, version in await self.parked_places():
                    self._snapshots.delete(self._parked_source, stream, version)
            while found and loop.time() < until:
                for version, _ in found:
                    self._snapshots.delete(CHECKPOINTS, self.name, version)
                await asyncio.sleep(LOOK_AGAIN_S)
                found = await self._found()
            return not found


def _places(record: Mapping[Term, Term]) -> dict[bytes, _Place]:
    anew = record.get(_ANEW, {})
    return {
        stream: (anew.get(stream, 0), number)
        for stream, number in record.get(_POSITIONS, {}).items()
        if type(stream) is bytes and type(number) is int
    }


def _raise(places: dict[bytes, _Place], to: Mapping[bytes, _Place]) -> None:
    """Have each stream at the higher place."""
    for stream, place in to.items():
        places[stream] = max(place, places.get(stream, place))


def parked_place(stream: bytes, number: int) -> ParkedPlace:
    """Where this event is if it is parked."""
    return (_hash(stream).encode(), number)


def parked_term(event: Event, reason: Term, attempts: int) -> Term:
    """How a parked event is shown: `%{event, reason, attempts}`."""
    return {_EVENT: event.record, _REASON: reason, _ATTEMPTS: attempts}


def _shard(stream: bytes) -> int:
    return crc32(stream) % SHARDS


def _hash(stream: bytes) -> str:
    return sha256(stream).hexdigest()[:24]


async def _outcome(begin: Callable[[Callable[[bool], None]], None]) -> bool:
    """What `begin` calls back with."""
    answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    begin(lambda ok: None if answered.done() else answered.set_result(ok))
    return await answered


def _bytes(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _ignore(_: object) -> None:
    return None
