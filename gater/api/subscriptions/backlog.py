"""The streams in which one subscription is behind its feed, and the order in which it catches up. Pure.

A stream in which the subscription is behind has a `Lane`: the next number to read, and events read but not yet
delivered. `first` gives the lane whose next event is the oldest (`created_epoch`), as soon as every lane knows its next
event; so events come in order within a stream, and across streams by the time they were stored. Lanes that cannot move
now (their stream is held, their subscriber is full, their read failed) are `stuck` and nobody waits for them.

Memory: at most so many events and bytes are kept as `Shares` say, plus one event for the lane whose turn it is. A lane
that finds no room keeps only the time of its next event and reads it again when its turn comes. How many events a read
asks for follows from the size of those read before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Final

from gater.api.subscriptions.protocol import Event, SubscriberId

PAGE_EVENTS: Final = 200
"""Events in one read: 2-3 ms of a gateway worker, so that other readers do not wait long behind it."""

FIRST_PAGE_EVENTS: Final = 8
"""Events in the first read of a store, of whose events no size is known."""

PAGE_BYTES: Final = 4 * 1024 * 1024
"""Bytes in one read, as far as the events that were read before tell. One event is always read; a store has no other
way to limit a read, so events suddenly larger than those before them take more, once."""

SHARED_ROOM: Final = 20_000
"""Events that the subscriptions of one store may keep together, each an equal part, beyond what each needs."""

MAX_SHARE: Final = 5_000
"""But not more each: one so far behind reads on in large pages. That costs the store most when it has most to do:
a subscriber of 5,000 events a second may be late by a second before it begins."""

SHARED_BYTES: Final = 256 * 1024 * 1024
"""Bytes of events that the subscriptions of one store may keep together, each an equal part: so many that are read and
not delivered, and so many with each subscriber that does not acknowledge; one event each is always allowed."""

MAX_SHARE_BYTES: Final = 32 * 1024 * 1024
"""But not more each."""

MIN_SHARE_BYTES: Final = 256 * 1024
"""Nor less, however many there are."""

READ_AGAIN_S: Final = (0.05, 5.0)
"""First and longest pause before reading again what was not there (a member of the store may lag) or failed."""

GAP_READS: Final = 8
"""Reads that must all begin behind the number wanted before that number is taken to be missing for good."""


class Shares:
    """What each of the subscriptions of a store may keep, and what is known of the size of the store's events."""

    __slots__ = ("_shared_bytes", "_shared_events", "bytes", "event_bytes", "events")

    def __init__(self, shared_events: int = SHARED_ROOM, shared_bytes: int = SHARED_BYTES) -> None:
        self._shared_events = shared_events
        self._shared_bytes = shared_bytes
        self.event_bytes = 0
        """The largest event of a page, of those read lately; 0: none was read."""
        self.divide(1)

    def divide(self, subscriptions: int) -> None:
        """There are so many subscriptions now."""
        parts = max(1, subscriptions)
        self.events = min(MAX_SHARE, self._shared_events // parts)
        self.bytes = max(MIN_SHARE_BYTES, min(MAX_SHARE_BYTES, self._shared_bytes // parts))

    def saw(self, largest: int) -> None:
        """A page was read with an event of this size, and none larger."""
        self.event_bytes = max(largest, self.event_bytes * 3 // 4)

    def page_events(self, event_bytes: int = 0, most_bytes: int = PAGE_BYTES) -> int:
        """How many events to read at once: of this size (0: of the size of those read lately), at most so many bytes,
        but at least one event."""
        size = event_bytes or self.event_bytes
        return max(1, min(PAGE_EVENTS, min(most_bytes, PAGE_BYTES) // size)) if size else FIRST_PAGE_EVENTS


class Lane:
    """One stream: `read_to` is the next number to read, `buffer` what was read and is wanted, in order."""

    __slots__ = ("buffer", "epoch", "event_bytes", "not_before", "read_to", "reading", "stream", "stuck", "tries")

    def __init__(self, stream: bytes, read_to: int) -> None:
        self.stream = stream
        self.read_to = read_to
        self.buffer: deque[Event] = deque()
        self.epoch: int | None = None
        """When the next event was stored; None: not known."""
        self.event_bytes = 0
        """The largest event of the last page; 0: none was read."""
        self.reading = False
        self.stuck = False
        self.not_before = 0.0
        self.tries = 0

    @property
    def position(self) -> int:
        """The next number to be looked at."""
        return self.buffer[0].number if self.buffer else self.read_to


class Backlog:
    """The lanes of one subscription."""

    def __init__(self, least: int, shares: Shares) -> None:
        """`least`: events to keep, at most, if its share is not larger."""
        self._least = least
        self._shares = shares
        self.buffered = 0
        self.bytes = 0
        """Of the events that are kept."""
        self.lanes: dict[bytes, Lane] = {}
        """By stream; changed here only."""
        self._heads: list[tuple[int, bytes, int]] = []
        """(epoch, stream, number) of next events; entries of lanes that have moved on are passed over."""
        self._unknown: dict[bytes, None] = {}
        """Lanes that are not stuck and do not know their next event."""
        self._waiting: dict[SubscriberId | None, list[bytes]] = {}
        """Stuck lanes by the subscriber they wait for; None: for their stream or their read."""
        self._stuck = 0
        self._full: dict[bytes, None] = {}
        """Lanes with events kept, those that have had them for longest first."""
        self.wake = float("inf")

    def __len__(self) -> int:
        return len(self.lanes)

    def __contains__(self, stream: bytes) -> bool:
        return stream in self.lanes

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.lanes)

    @property
    def is_moving(self) -> bool:
        """Whether any lane is not stuck."""
        return len(self.lanes) > self._stuck

    def position(self, stream: bytes) -> int | None:
        """The next number of a stream, None if the subscription is not behind in it."""
        lane = self.lanes.get(stream)
        return None if lane is None else lane.position

    # Falling behind

    def behind(self, stream: bytes, number: int) -> None:
        """The subscription begins here in this stream, behind its feed."""
        if stream not in self.lanes:
            self.lanes[stream] = Lane(stream, number)
            self._unknown[stream] = None

    def keep(self, event: Event) -> None:
        """The subscription did not take this event: its lane begins here, unless it has one already.

        The event itself is kept if there is room and it is the next one of its lane.
        """
        stream = event.stream
        lane = self.lanes.get(stream)
        if lane is None:
            lane = self.lanes[stream] = Lane(stream, event.number)
            lane.epoch = event.epoch
            heappush(self._heads, (event.epoch, stream, event.number))
        if lane.read_to == event.number and self._room > 0 and not lane.reading:
            self._append(lane, event)
            lane.read_to = event.number + 1
            if len(lane.buffer) == 1:
                self._know(lane)

    def begin_anew(self, stream: bytes) -> None:
        """Forget the stream: its events are not in the store any more."""
        lane = self.lanes.get(stream)
        if lane is not None:
            self._remove(lane)

    # Catching up

    def first(self) -> Event | None:
        """The event whose turn it is; None if there is none, or it is not known yet: then see `reads`."""
        if self._unknown:
            return None
        heads = self._heads
        while heads:
            _, stream, number = heads[0]
            lane = self.lanes.get(stream)
            if lane is not None and not lane.stuck and lane.epoch is not None and lane.position == number:
                if lane.buffer:
                    return lane.buffer[0]
                self._unknown[stream] = None
                return None
            heappop(heads)
        return None

    def take(self, event: Event, end: int) -> None:
        """The event that was `first` was delivered. Its lane is done when it has come to `end`, the feed's number."""
        lane = self.lanes[event.stream]
        lane.buffer.popleft()
        self.buffered -= 1
        self.bytes -= event.size
        lane.epoch = None
        if lane.buffer:
            self._know(lane)
            return
        del self._full[event.stream]
        if lane.read_to >= end:
            self._remove(lane)
        else:
            self._unknown[event.stream] = None

    def reads(self, most: int) -> list[tuple[bytes, int, int]]:
        """What to read next, at most so many reads: (stream, start, count). Each is answered by `page`."""
        wanted: list[tuple[bytes, int, int]] = []
        if not self._unknown:
            return wanted
        unknown = len(self._unknown)
        share = max(1, (self._most - self.buffered) // unknown)
        share_bytes = (self._shares.bytes - self.bytes) // unknown
        for stream in self._unknown:
            if len(wanted) >= most:
                break
            lane = self.lanes[stream]
            if not lane.reading:
                lane.reading = True
                count = min(share, self._shares.page_events(lane.event_bytes, share_bytes))
                # A read may have failed because it was too much.
                wanted.append((stream, lane.read_to, max(1, count >> lane.tries)))
        return wanted

    def page(
        self,
        stream: bytes,
        start: int,
        count: int,
        events: Sequence[Event] | None,
        wanted: list[Event],
        end: int,
        now: float,
    ) -> None:
        """The answer to a read: all events that were read (None: it failed), and those of them that are wanted.

        `end` is the feed's number of the stream: what is behind it will come from the feed.
        """
        lane = self.lanes.get(stream)
        if lane is None or not lane.reading:
            return
        lane.reading = False
        read_to = lane.read_to
        if events:
            lane.event_bytes = max(event.size for event in events)
            self._shares.saw(lane.event_bytes)
        if events is not None and start == read_to:
            numbers = [event.number for event in events if read_to <= event.number < end]
            if numbers and numbers[0] > read_to and lane.tries >= GAP_READS:
                read_to = numbers[0]
            for number in numbers:
                if number != read_to:
                    break
                read_to += 1
        if read_to == lane.read_to:
            if read_to >= end:
                self._remove(lane)
                return
            self.stick(stream, None)
            pause = min(READ_AGAIN_S[0] * 2.0**lane.tries, READ_AGAIN_S[1])
            lane.tries += 1
            lane.not_before = now + pause
            self.wake = min(self.wake, lane.not_before)
            return
        lane.tries = 0
        fitting = [event for event in wanted if lane.read_to <= event.number < read_to]
        if fitting:
            known = fitting[0]
            is_turn = lane.epoch is not None
            lane.epoch = known.epoch
            if len(fitting) > self._room and not is_turn and len(self.lanes) > 1:
                # No room: remember when it was stored and read it again when its turn comes.
                lane.read_to = known.number
            else:
                lane.read_to = read_to
                self._make_room()
                for event in fitting:
                    if event is not known and self.bytes >= self._shares.bytes:
                        lane.read_to = event.number
                        break
                    self._append(lane, event)
            self._know(lane)
        else:
            lane.read_to = read_to
            if read_to >= end:
                self._remove(lane)

    # Lanes that cannot move

    def stick(self, stream: bytes, subscriber: SubscriberId | None) -> None:
        """This lane cannot move now: until `unstick` of that subscriber, or until it is tried again (None)."""
        lane = self.lanes[stream]
        if not lane.stuck:
            lane.stuck = True
            self._stuck += 1
            self._unknown.pop(stream, None)
            self._waiting.setdefault(subscriber, []).append(stream)

    @property
    def stuck_subscribers(self) -> list[SubscriberId]:
        """The subscribers that lanes wait for."""
        return [subscriber for subscriber in self._waiting if subscriber is not None]

    def unstick(self, subscriber: SubscriberId | None, now: float) -> None:
        """What kept these lanes may be over."""
        later = []
        if subscriber is None:
            self.wake = float("inf")
        for stream in self._waiting.pop(subscriber, ()):
            lane = self.lanes.get(stream)
            if lane is None or not lane.stuck:
                continue
            if lane.not_before > now:
                self.wake = min(self.wake, lane.not_before)
                later.append(stream)
                continue
            lane.stuck = False
            self._stuck -= 1
            if lane.buffer or lane.epoch is not None:
                self._know(lane)
            else:
                self._unknown[stream] = None
        if later:
            self._waiting.setdefault(None, []).extend(later)

    def unstick_all(self, now: float) -> None:
        """Subscribers came or went: try every lane."""
        for subscriber in list(self._waiting):
            self.unstick(subscriber, now)

    @property
    def _most(self) -> int:
        """Events to keep."""
        return max(self._least, self._shares.events)

    @property
    def _room(self) -> int:
        """Events that may be kept in addition; 0 if there are too many bytes."""
        return self._most - self.buffered if self.bytes < self._shares.bytes else 0

    def _append(self, lane: Lane, event: Event) -> None:
        lane.buffer.append(event)
        self._full[event.stream] = None
        self.buffered += 1
        self.bytes += event.size

    def _make_room(self) -> None:
        """Room for the lane whose turn it is, if there is none: others are read again when it is theirs."""
        while self._full and self._room <= 0:
            self._empty(self.lanes[next(reversed(self._full))])

    def _empty(self, lane: Lane) -> None:
        """Keep nothing of the lane but where it is."""
        lane.read_to = lane.position
        self._full.pop(lane.stream, None)
        self.buffered -= len(lane.buffer)
        self.bytes -= sum(event.size for event in lane.buffer)
        lane.buffer.clear()

    def _know(self, lane: Lane) -> None:
        """The lane knows its next event."""
        if lane.buffer:
            lane.epoch = lane.buffer[0].epoch
        self._unknown.pop(lane.stream, None)
        if not lane.stuck and lane.epoch is not None:
            heappush(self._heads, (lane.epoch, lane.stream, lane.position))

    def _remove(self, lane: Lane) -> None:
        if lane.stuck:
            self._stuck -= 1
        self._empty(lane)
        del self.lanes[lane.stream]
        self._unknown.pop(lane.stream, None)
