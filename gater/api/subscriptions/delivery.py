"""The events of one subscription that are with its subscribers: windows, acknowledgement, redelivery. Pure.

Theory of operation. An event offered to `Delivery` is either taken, when a subscriber has room for it, or refused; what
is taken stays in an `Entry` until it is acknowledged, skipped or parked:

    in flight --ack / skip--> done
              --park, or retried too often--> parking --saved--> done
              --retry, timeout, subscriber gone--> waiting --its time comes and there is room--> in flight

The entries of a stream are in order. While one of them waits, the stream is *held*: nothing new of it is taken, and
the later entries that are with the same subscriber wait behind it, so that each subscriber sees, from the event that
comes again on, everything after it again in order; those it acknowledges in the meantime do not come again. A stream's
*frontier* is its first entry that is not done: the checkpoint never goes beyond it.

A subscriber has room while it holds fewer events than the window and fewer bytes than `Shares` say. The same goes for
what is kept *aside*, waiting or being parked: as long as that is too much nothing new is taken.

A subscriber with `auto_ack` gets no entries: what was sent is done. What holds it back is `busy`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final
from zlib import crc32

from gater.api.subscriptions.backlog import Shares
from gater.api.subscriptions.protocol import (
    RETRY_S,
    Action,
    Deliver,
    DropParked,
    Effect,
    Event,
    Key,
    Options,
    Park,
    Stopped,
    Strategy,
    SubscriberId,
)
from gater.erl.terms import Atom, Term

MAX_TIMEOUT_FACTOR: Final = 8
"""How much longer than the first time an event may stay unacknowledged when it was delivered again and again."""

PARK_AGAIN_S: Final = 1.0
"""Pause before a parked event that could not be saved is saved again."""

MAX_REPLAYS: Final = 10_000
"""Parked events waiting to be replayed; whoever replays more does it in parts."""

MAX_REPLAY_BYTES: Final = 32 * 1024 * 1024
"""And their bytes, but for the last event."""

RETRIED_TOO_OFTEN: Final = Atom("max_retries")
"""Why an event is parked that was retried too often, where nobody gave a reason."""

INFINITY: Final = float("inf")


class State(Enum):
    """Where an entry is on its way."""

    IN_FLIGHT = auto()
    WAITING = auto()
    PARKING = auto()
    DONE = auto()


class Entry:
    """An event on its way: `due` is when it times out, or when it may be delivered or saved again."""

    __slots__ = ("deliveries", "due", "event", "nacks", "reason", "replayed", "state", "subscriber", "timeouts")

    def __init__(self, event: Event, *, replayed: bool = False) -> None:
        self.event = event
        self.replayed = replayed
        self.state = State.WAITING
        self.due = 0.0
        self.subscriber: Subscriber | None = None
        self.deliveries = 0
        self.nacks = 0
        self.timeouts = 0
        self.reason: Term = None


class Subscriber:
    """One of those who share a subscription."""

    __slots__ = ("busy", "bytes", "hash", "id", "in_flight", "outbox")

    def __init__(self, id: SubscriberId) -> None:
        self.id = id
        self.hash = crc32(repr(id).encode())
        self.in_flight = 0
        self.bytes = 0
        """Of the events in flight."""
        self.busy = False
        self.outbox: list[Event] = []


class Delivery:
    """The windows of one subscription. Effects are collected in `effects`; `flush` adds the deliveries to them."""

    def __init__(self, key: Key, options: Options, effects: list[Effect], shares: Shares) -> None:
        self.key = key
        self.options = options
        self.stopped = False
        self.progressed: list[bytes] = []
        """Streams whose frontier has moved since somebody last looked, one for each event that was done."""
        self.wake = INFINITY
        """No entry times out or may be delivered or saved again before this time."""
        self._effects = effects
        self._shares = shares
        self._subscribers: dict[SubscriberId, Subscriber] = {}
        self._rotation: deque[Subscriber] = deque()
        self._streams: dict[bytes, deque[Entry]] = {}
        self._entries: dict[tuple[bytes, int], Entry] = {}
        self._owners: dict[bytes, Subscriber] = {}
        self.held: dict[bytes, int] = {}
        """Streams with entries that wait, and how many; changed here only."""
        self.replays: deque[Entry] = deque()
        """Entries of parked events that wait to be delivered again; changed here only."""
        self._by_stream = options.strategy is Strategy.BY_STREAM
        self._aside = 0
        """Entries that wait or are being parked, those replayed not counted, and their bytes."""
        self._aside_bytes = 0

    # Looking

    @property
    def subscribers(self) -> list[SubscriberId]:
        """Who shares the subscription."""
        return list(self._subscribers)

    @property
    def in_flight(self) -> int:
        """Events that are not done."""
        return len(self._entries)

    @property
    def parking(self) -> int:
        """Events that are being parked."""
        return sum(entry.state is State.PARKING for entry in self._entries.values())

    def frontier(self, stream: bytes) -> int | None:
        """The first number of the stream that is not done, None if all that was taken is."""
        entries = self._streams.get(stream)
        return entries[0].event.number if entries else None

    @property
    def has_room(self) -> bool:
        """Whether any subscriber could take an event."""
        return self._takes_new and any(self._has_room(subscriber) for subscriber in self._rotation)

    def room_of(self, id: SubscriberId) -> bool:
        """Whether this subscriber could take an event; true for one that is gone, whose events go to others."""
        subscriber = self._subscribers.get(id)
        return subscriber is None or self._has_room(subscriber)

    def could_take(self, stream: bytes) -> bool:
        """Whether an event of the stream would be taken now."""
        if not self._takes_new or stream in self.held:
            return False
        if self._by_stream and len(self._rotation) > 1:
            return self._has_room(self._owner(stream))
        return self.has_room

    def owner(self, stream: bytes) -> SubscriberId | None:
        """The subscriber that would get the stream's next event, whether or not it has room (`BY_STREAM` only)."""
        if not self._by_stream or not self._rotation:
            return None
        return self._owner(stream).id

    # Subscribers

    def up(self, id: SubscriberId) -> bool:
        """Somebody joins; False if it is there already."""
        if id in self._subscribers:
            return False
        subscriber = self._subscribers[id] = Subscriber(id)
        self._rotation.append(subscriber)
        return True

    def down(self, id: SubscriberId, now: float) -> bool:
        """Somebody is gone: what it held waits for another one. False if it was not here."""
        subscriber = self._subscribers.pop(id, None)
        if subscriber is None:
            return False
        self._rotation.remove(subscriber)
        for stream in [stream for stream, owner in self._owners.items() if owner is subscriber]:
            del self._owners[stream]
        for entry in list(self._entries.values()):
            if entry.subscriber is subscriber and entry.state is State.IN_FLIGHT:
                self._wait(entry, now)
        return True

    def busy(self, id: SubscriberId, busy: bool) -> None:
        """The way to somebody is full, or free again."""
        subscriber = self._subscribers.get(id)
        if subscriber is not None:
            subscriber.busy = busy

    # Events

    def offer(self, event: Event, now: float) -> bool:
        """Take an event that has not been delivered yet, if somebody has room for it."""
        stream = event.stream
        if not self._takes_new or stream in self.held:
            return False
        subscriber = self._choose(stream)
        if subscriber is None:
            return False
        if self.options.auto_ack:
            subscriber.outbox.append(event)
            self.progressed.append(stream)
            return True
        entry = Entry(event)
        entries = self._streams.get(stream)
        if entries is None:
            self._streams[stream] = deque((entry,))
        else:
            entries.append(entry)
        self._entries[stream, event.number] = entry
        self._send(entry, subscriber, now)
        return True

    @property
    def replaying(self) -> dict[tuple[bytes, int], int]:
        """The parked events that are to be delivered again, or have been and are not dealt with; and their sizes."""
        return {place: entry.event.size for place, entry in self._entries.items() if entry.replayed}

    def replay(self, events: Sequence[Event], now: float) -> None:
        """Deliver parked events again, as soon as there is room: those that are not waiting for that already, until
        there are `MAX_REPLAYS`."""
        for event in events:
            if len(self.replays) >= MAX_REPLAYS:
                return
            # It was read among the parked ones: so it is saved, be that known here or not.
            self.park_saved(event.stream, event.number, True, now)
            if (event.stream, event.number) not in self._entries:
                entry = self._entries[event.stream, event.number] = Entry(event, replayed=True)
                self.replays.append(entry)

    def ack(self, stream: bytes, number: int, now: float) -> bool:
        """An event is dealt with; False if it is not outstanding."""
        entry = self._entries.get((stream, number))
        if entry is None or entry.state is State.PARKING:
            return False
        self._done(entry)
        return True

    def nack(self, stream: bytes, number: int, action: Action, reason: Term, now: float) -> bool:
        """An event is not dealt with; False if it is not outstanding."""
        entry = self._entries.get((stream, number))
        if entry is None or entry.state is not State.IN_FLIGHT:
            return False
        entry.reason = reason
        if action is Action.RETRY:
            entry.nacks += 1
            if entry.nacks > self.options.max_retries:
                entry.reason = RETRIED_TOO_OFTEN if reason is None else reason
                self._park(entry)
            else:
                self._wait(entry, now + min(RETRY_S[0] * 2.0 ** (entry.nacks - 1), RETRY_S[1]))
        elif action is Action.SKIP:
            self._done(entry)
        elif action is Action.PARK:
            self._park(entry)
        else:
            self._wait(entry, now)
            self.stopped = True
            self._effects.append(Stopped(self.key, stream, number, reason))
        return True

    def park_saved(self, stream: bytes, number: int, ok: bool, now: float) -> None:
        """A parked event was saved, or could not be."""
        entry = self._entries.get((stream, number))
        if entry is None or entry.state is not State.PARKING:
            return
        if ok:
            self._fetch_back(entry)
            self._finish(entry)
        else:
            entry.due = now + PARK_AGAIN_S
            self.wake = min(self.wake, entry.due)

    def begin_anew(self, stream: bytes) -> None:
        """The events of this stream are not in the store any more: forget those that are not done."""
        for entry in [entry for entry in self._entries.values() if entry.event.stream == stream]:
            if entry.state is State.PARKING:
                self._fetch_back(entry)
            elif entry.state is State.WAITING and not entry.replayed:
                self._release(entry)
            self._leave_subscriber(entry)
            self._forget(entry)
        self.replays = deque(entry for entry in self.replays if entry.state is not State.DONE)
        self._streams.pop(stream, None)
        self._owners.pop(stream, None)

    # Time

    def pump(self, now: float) -> None:
        """Send again what waits and may, save again what could not be parked, and see what has timed out."""
        if now >= self.wake:
            self._look_at_clock(now)
        if self.stopped:
            return
        if self.held:
            for stream in list(self.held):
                self._resend(stream, now)
        while self.replays:
            entry = self.replays[0]
            if entry.state is State.WAITING:
                if entry.due > now:
                    self.wake = min(self.wake, entry.due)
                    break
                subscriber = self._choose(entry.event.stream)
                if subscriber is None:
                    break
                self._send(entry, subscriber, now)
            self.replays.popleft()

    def flush(self) -> None:
        """Turn what was sent since the last time into messages of at most `batch_size` events."""
        size = self.options.batch_size
        for subscriber in self._rotation:
            outbox = subscriber.outbox
            if not outbox:
                continue
            subscriber.outbox = []
            if len(outbox) <= size:
                self._effects.append(Deliver(self.key, subscriber.id, outbox))
            else:
                self._effects.extend(
                    Deliver(self.key, subscriber.id, outbox[start : start + size])
                    for start in range(0, len(outbox), size)
                )

    def _look_at_clock(self, now: float) -> None:
        self.wake = INFINITY
        for entry in list(self._entries.values()):
            if entry.state is State.IN_FLIGHT and entry.due <= now:
                entry.timeouts += 1
                self._wait(entry, now)
            elif entry.state is State.PARKING and entry.due <= now:
                self._park(entry)
            if now < entry.due < self.wake:
                self.wake = entry.due

    def _resend(self, stream: bytes, now: float) -> None:
        for entry in list(self._streams.get(stream, ())):
            if entry.state is State.WAITING:
                if entry.due > now:
                    self.wake = min(self.wake, entry.due)
                    return
                subscriber = self._choose(stream)
                if subscriber is None:
                    return
                self._release(entry)
                self._send(entry, subscriber, now)

    # Entries

    def _send(self, entry: Entry, subscriber: Subscriber, now: float) -> None:
        if self.options.auto_ack:
            # Only a replayed event has an entry here.
            subscriber.outbox.append(entry.event)
            self._done(entry)
            return
        event = entry.event
        entry.state = State.IN_FLIGHT
        entry.deliveries += 1
        entry.subscriber = subscriber
        due = now + self.options.ack_timeout_s * (min(2**entry.timeouts, MAX_TIMEOUT_FACTOR) if entry.timeouts else 1)
        entry.due = due
        if due < self.wake:
            self.wake = due
        subscriber.in_flight += 1
        subscriber.bytes += event.size
        subscriber.outbox.append(event)
        if self._by_stream and not entry.replayed:
            self._owners[event.stream] = subscriber

    def _wait(self, entry: Entry, due: float) -> None:
        """Let an entry in flight wait, and those behind it that are with the same subscriber."""
        subscriber = entry.subscriber
        self._take_back(entry, due)
        self.wake = min(self.wake, due)
        if entry.replayed:
            self.replays.append(entry)
            return
        behind = False
        for other in self._streams[entry.event.stream]:
            if other is entry:
                behind = True
            elif behind and other.subscriber is subscriber and other.state is State.IN_FLIGHT:
                other.timeouts = max(other.timeouts, entry.timeouts)
                self._take_back(other, 0.0)

    def _take_back(self, entry: Entry, due: float) -> None:
        self._leave_subscriber(entry)
        entry.state = State.WAITING
        entry.due = due
        if not entry.replayed:
            stream = entry.event.stream
            self.held[stream] = self.held.get(stream, 0) + 1
            self._put_aside(entry)

    def _put_aside(self, entry: Entry) -> None:
        self._aside += 1
        self._aside_bytes += entry.event.size

    def _fetch_back(self, entry: Entry) -> None:
        self._aside -= 1
        self._aside_bytes -= entry.event.size

    def _release(self, entry: Entry) -> None:
        self._fetch_back(entry)
        stream = entry.event.stream
        left = self.held[stream] - 1
        if left:
            self.held[stream] = left
        else:
            del self.held[stream]

    def _leave_subscriber(self, entry: Entry) -> None:
        if entry.state is State.IN_FLIGHT and entry.subscriber is not None:
            entry.subscriber.in_flight -= 1
            entry.subscriber.bytes -= entry.event.size
        entry.subscriber = None

    def _park(self, entry: Entry) -> None:
        if entry.replayed:
            # It is among the parked ones still.
            self._leave_subscriber(entry)
            self._forget(entry)
            return
        self._leave_subscriber(entry)
        if entry.state is not State.PARKING:
            self._put_aside(entry)
        entry.state = State.PARKING
        entry.due = INFINITY
        self._effects.append(Park(self.key, entry.event, entry.reason, entry.deliveries))

    def _done(self, entry: Entry) -> None:
        if entry.state is State.WAITING and not entry.replayed:
            self._release(entry)
        self._leave_subscriber(entry)
        if entry.replayed:
            self._effects.append(DropParked(self.key, entry.event.stream, entry.event.number))
        self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        entry.state = State.DONE
        self._forget(entry)
        if entry.replayed:
            return
        stream = entry.event.stream
        entries = self._streams[stream]
        while entries and entries[0].state is State.DONE:
            entries.popleft()
            self.progressed.append(stream)
        if not entries:
            del self._streams[stream]
            self._owners.pop(stream, None)

    def _forget(self, entry: Entry) -> None:
        entry.state = State.DONE
        self._entries.pop((entry.event.stream, entry.event.number), None)

    # Choice

    def _has_room(self, subscriber: Subscriber) -> bool:
        return (
            not subscriber.busy and subscriber.in_flight < self.options.window and subscriber.bytes < self._shares.bytes
        )

    @property
    def _takes_new(self) -> bool:
        return not self.stopped and self._aside < self.options.window and self._aside_bytes < self._shares.bytes

    def _choose(self, stream: bytes) -> Subscriber | None:
        rotation = self._rotation
        if len(rotation) == 1:
            only = rotation[0]
            return only if self._has_room(only) else None
        if not rotation:
            return None
        if self._by_stream:
            owner = self._owner(stream)
            return owner if self._has_room(owner) else None
        for _ in range(len(rotation)):
            candidate = rotation[0]
            rotation.rotate(-1)
            if self._has_room(candidate):
                return candidate
        return None

    def _owner(self, stream: bytes) -> Subscriber:
        """Who has events of the stream, else the one that rendezvous hashing gives it to."""
        owner = self._owners.get(stream)
        if owner is not None:
            return owner
        return max(self._rotation, key=lambda subscriber: crc32(stream, subscriber.hash))
