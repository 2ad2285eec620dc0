"""One subscription: what it wants, where it stands, who gets it. Pure; fed by its `Feed`.

Where it stands in a stream is, in this order: the first event that is with a subscriber and not done (`Delivery`), the
next event of its lane (`Backlog`), or else the feed's own number (`end`), but never below its `floor`. So a
subscription that is up to date costs nothing per stream, and one that is behind costs as much as it is behind.

An event from the feed is *accepted* when it can go out at once: no lane is moving, the stream has no lane and is not
held, and a subscriber has room. Otherwise its stream gets a lane. That is all there is to handing over between catching
up and live: a lane that comes to the feed's number is gone, and the next event comes from the feed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from gater.api.subscriptions.backlog import Backlog, Shares
from gater.api.subscriptions.checkpoints import Checkpoint
from gater.api.subscriptions.delivery import Delivery
from gater.api.subscriptions.matching import Matcher
from gater.api.subscriptions.protocol import (
    BeginAnew,
    Effect,
    Event,
    Key,
    Resumed,
    SaveCheckpoint,
    Spec,
    Start,
    Status,
    SubscriberId,
)

READS: Final = 4
"""Reads of one subscription under way at once, so that one that catches up leaves room for the others."""

MIN_ROOM: Final = 50
"""Events kept at least, however small the window is: the store is not asked for each one."""

SCAN_SAVE_S: Final = 30.0
"""How often streams are saved in which nothing was wanted: after a crash so much is read again, to no effect."""


class Subscription:
    """See the module. `end(stream)` gives the feed's next number of a stream, `shares` how much each of the store's
    subscriptions may keep."""

    def __init__(
        self,
        key: Key,
        spec: Spec,
        matcher: Matcher,
        end: Callable[[bytes], int],
        positions: Mapping[bytes, int] | None,
        effects: list[Effect],
        shares: Shares,
    ) -> None:
        self.key = key
        self.spec = spec
        self.matcher = matcher
        self.starting = True
        self.reads = 0
        self.had_subscriber = False
        self.begins_now = positions is None and spec.start is Start.NOW
        self.must_save_start = self.begins_now and spec.persistent
        """Where it began is known to nobody else yet: another gateway would begin later and miss what came between."""
        self.delivery = Delivery(key, spec.options, effects, shares)
        self.backlog = Backlog(max(2 * spec.options.window, MIN_ROOM), shares)
        self.checkpoint = Checkpoint()
        self.scanned = 0
        """How far in the feed's sequence of moves this subscription has saved where it stands."""
        self.scan_due = float("inf")
        self.wake = float("inf")
        """When the feed has promised to call `settle`."""
        self._end = end
        self._effects = effects
        self._lowest = spec.start if isinstance(spec.start, int) else 0
        self._floors: dict[bytes, int] = dict(positions or {})

    # Where it stands

    def floor(self, stream: bytes) -> int:
        """The first number of the stream that was not dealt with when the subscription came here."""
        return self._floors.get(stream, self._lowest)

    def position(self, stream: bytes) -> int:
        """The next number of the stream that is not dealt with."""
        found = self.delivery.frontier(stream)
        if found is None:
            found = self.backlog.position(stream)
            if found is None:
                return max(self._end(stream), self.floor(stream))
        return found

    def start(self, counts: Mapping[bytes, int], streams: Iterable[bytes], now: float) -> None:
        """Begin: `streams` are those of the feed that concern it, `counts` what they hold if it begins now."""
        self.starting = False
        if self.begins_now:
            self._floors = {stream: counts.get(stream, 0) for stream in streams}
        for stream in streams:
            floor = self.floor(stream)
            if floor < self._end(stream):
                self.backlog.behind(stream, floor)
        if self.spec.persistent:
            if self.must_save_start:
                self.checkpoint.moved_all(self._floors, now)
                self.checkpoint.due(now)
            self.scan_due = now + SCAN_SAVE_S

    def ahead(self) -> dict[bytes, int]:
        """The streams in which it came here with a number that the feed has not come to, and that number."""
        lowest, end = self._lowest, self._end
        return {stream: floor for stream, floor in self._floors.items() if floor > max(end(stream), lowest)}

    @property
    def streams_come_with(self) -> Iterable[bytes]:
        """The streams in which it did not begin as its `spec` says."""
        return self._floors.keys()

    def begin_anew(self, streams: Collection[bytes], now: float) -> None:
        """The store has lost the events of these streams, and begins them anew: so does the subscription."""
        for stream in streams:
            self._floors.pop(stream, None)
            self.delivery.begin_anew(stream)
            self.backlog.begin_anew(stream)
            if not self.starting and self._lowest < self._end(stream):
                self.backlog.behind(stream, self._lowest)
        if self.spec.persistent:
            self._effects.append(BeginAnew(self.key, streams))
            if not self.starting:
                self.checkpoint.moved_all(streams, now)
            if not self.must_save_start:
                self.checkpoint.due(now)

    # Events

    @property
    def could_accept(self) -> bool:
        """Whether an event of some stream could go out at once."""
        return not self.starting and not self.backlog.is_moving and self.delivery.has_room

    def accepts(self, stream: bytes) -> bool:
        """Whether an event of this stream could go out at once."""
        return (
            not self.starting
            and not self.backlog.is_moving
            and stream not in self.backlog
            and self.delivery.could_take(stream)
        )

    def event(self, event: Event, now: float) -> None:
        """The feed has come to this event, and the subscription wants it."""
        stream = event.stream
        if self.starting or event.number < self._floors.get(stream, self._lowest):
            return
        backlog = self.backlog
        lanes = backlog.lanes
        if (lanes and (backlog.is_moving or stream in lanes)) or not self.delivery.offer(event, now):
            backlog.keep(event)

    def page(self, stream: bytes, start: int, count: int, events: Sequence[Event] | None, now: float) -> None:
        """The answer to one of `take_reads`."""
        self.reads -= 1
        wants = self.matcher.wants
        wanted = [event for event in events if wants(event)] if events is not None else []
        self.backlog.page(stream, start, count, events, wanted, self._end(stream), now)

    def take_reads(self, most: int) -> list[tuple[bytes, int, int]]:
        """What it needs to read now: (stream, start, count)."""
        delivery = self.delivery
        if self.starting or not self.backlog or delivery.stopped or not delivery.subscribers:
            return []
        found = self.backlog.reads(min(most, READS - self.reads))
        self.reads += len(found)
        return found

    # Subscribers

    def up(self, subscriber: SubscriberId, now: float) -> None:
        """Somebody joins."""
        self.had_subscriber = True
        if self.delivery.up(subscriber):
            self.backlog.unstick_all(now)

    def resume(self, now: float) -> None:
        """Go on delivering, if it was stopped."""
        if self.delivery.stopped:
            self.delivery.stopped = False
            self._effects.append(Resumed(self.key))
            self.backlog.unstick_all(now)

    def down(self, subscriber: SubscriberId, now: float) -> None:
        """Somebody is gone."""
        if self.delivery.down(subscriber, now):
            self.backlog.unstick_all(now)

    @property
    def is_over(self) -> bool:
        """A transient subscription whose subscribers are gone."""
        return not self.spec.persistent and self.had_subscriber and not self.delivery.subscribers

    # Time

    def settle(self, token: Callable[[], int], moved: Callable[[int], tuple[list[bytes], int]], now: float) -> float:
        """Do what can be done now: send, catch up, save. Called after everything that concerns it, and at the latest at
        the time that it returns."""
        delivery, backlog = self.delivery, self.backlog
        progressed = delivery.progressed
        is_moved = bool(progressed)
        if delivery.held or delivery.replays or now >= delivery.wake:
            held = len(delivery.held)
            delivery.pump(now)
            is_moved = bool(progressed) or len(delivery.held) != held
        if now >= backlog.wake or (is_moved and backlog.lanes):
            backlog.unstick(None, now)
        if backlog.lanes:
            for subscriber in backlog.stuck_subscribers:
                if delivery.room_of(subscriber):
                    backlog.unstick(subscriber, now)
            self._catch_up(now)
        # What is sent counts as acknowledged with `auto_ack`: first sent, then saved.
        delivery.flush()
        due = min(delivery.wake, backlog.wake)
        if self.spec.persistent:
            checkpoint = self.checkpoint
            for stream in progressed:
                checkpoint.moved(stream, now)
            if now >= self.scan_due:
                streams, self.scanned = moved(self.scanned)
                checkpoint.moved_all(streams, now)
                self.scan_due = now + SCAN_SAVE_S
            save_at = checkpoint.deadline
            if now >= save_at:
                self.save(token, now)
                save_at = checkpoint.deadline
            due = min(due, save_at, self.scan_due)
        progressed.clear()
        return due

    def _catch_up(self, now: float) -> None:
        delivery, backlog = self.delivery, self.backlog
        while delivery.has_room:
            event = backlog.first()
            if event is None:
                return
            stream = event.stream
            if stream in delivery.held:
                backlog.stick(stream, None)
            elif delivery.offer(event, now):
                backlog.take(event, self._end(stream))
            else:
                backlog.stick(stream, delivery.owner(stream))

    def save(self, token: Callable[[], int], now: float) -> None:
        """Write the checkpoint, if a write is due."""
        number = token()
        if self.must_save_start:
            positions = self.checkpoint.begin(number, self.position, now, len(self._floors))
        else:
            positions = self.checkpoint.begin(number, self.position, now)
        if positions is not None:
            self._effects.append(SaveCheckpoint(self.key, number, positions))

    def save_last(self, token: Callable[[], int], now: float) -> None:
        """Write the checkpoint for the last time."""
        number = token()
        for stream in self.delivery.progressed:
            self.checkpoint.moved(stream, now)
        positions = self.checkpoint.last(number, self.position, now)
        if positions is not None:
            self._effects.append(SaveCheckpoint(self.key, number, positions))

    @property
    def status(self) -> Status:
        """How it stands."""
        if self.starting:
            state = "starting"
        elif self.delivery.stopped:
            state = "stopped"
        else:
            state = "catching_up" if len(self.backlog) else "live"
        return Status(
            self.key,
            self.spec.kind,
            self.spec.selector,
            self.spec.persistent,
            state,
            len(self.delivery.subscribers),
            self.delivery.in_flight,
            self.backlog.buffered,
            len(self.backlog),
            self.delivery.parking,
            self.checkpoint.unsaved,
        )
