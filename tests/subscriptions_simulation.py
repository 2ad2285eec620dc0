"""A world for the subscription engine: a store, hints, subscribers and gateways, all of them unreliable.

One schedule is decided by one seed. `Simulation(seed).run()` raises AssertionError when a promise is broken:
every wanted event is delivered at least once and in order within its stream, nothing that was acknowledged comes again
(but after a crash what was acknowledged since the last checkpoint), no checkpoint is ahead of acknowledgement, windows
and buffers hold, and when all faults are over everything is dealt with and the engine comes to rest.

Streams are deleted, and the whole store is made anew: what is stored after that is as new as all of it was at first. A
member that merely lags must not be taken for that.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any

from gater.api import schema
from gater.api.subscriptions import Feed, Matcher, compile_selector
from gater.api.subscriptions import protocol as p
from gater.api.subscriptions.backlog import MAX_SHARE_BYTES, MIN_SHARE_BYTES, PAGE_EVENTS, SHARED_BYTES
from gater.api.subscriptions.protocol import Action, Event, Options, Spec, Start, Strategy, event_of
from gater.api.subscriptions.subscription import MIN_ROOM
from gater.erl.terms import Atom

MAX_STEPS = 200_000
MAX_STEPS_AT_ONE_TIME = 5_000
TOTAL = Atom("total")
BODIES = [b"x" * size for size in (0, 0, 0, 100_000, 3_000_000)]
"""Shared by the events: large ones cost the simulation nothing."""


@dataclass
class Sub:
    """What the world knows of one subscription, whoever serves it."""

    key: str
    spec: Spec
    matcher: Matcher
    subscribers: int
    first: dict[bytes, int] = field(default_factory=dict)
    """The first number it must get in each stream; others from 0 or `start`."""
    started: bool = False
    saved: dict[bytes, int] | None = None
    parked: dict[tuple[bytes, int], Event] = field(default_factory=dict)
    done: set[tuple[bytes, int]] = field(default_factory=set)
    matching: dict[bytes, tuple[int, list[Event]]] = field(default_factory=dict)
    parking: set[tuple[bytes, int]] = field(default_factory=set)
    delivered: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    skipped_by_checkpoint: dict[bytes, int] = field(default_factory=dict)
    last: dict[tuple[Any, bytes], int] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    incarnations: int = 0
    stopped: bool = False
    stops: int = 0
    stop_saved: bool = False
    era: int = 0
    """How often streams began anew: writes that were begun before do not count."""
    lowered: set[bytes] = field(default_factory=set)
    """Streams that began anew since they were saved."""

    def lose(self, stream: bytes) -> None:
        """Nothing has been said about the events of this stream."""
        for places in (self.parked, self.delivered):
            for at in [at for at in places if at[0] == stream]:
                del places[at]
        self.done = {at for at in self.done if at[0] != stream}
        self.parking = {at for at in self.parking if at[0] != stream}
        self.last = {to: number for to, number in self.last.items() if to[1] != stream}
        for of_stream in (self.matching, self.first, self.skipped_by_checkpoint):
            of_stream.pop(stream, None)

    @property
    def lowest(self) -> int:
        return self.spec.start if isinstance(self.spec.start, int) else 0

    def first_of(self, stream: bytes) -> int:
        return self.first.get(stream, self.lowest)


class Simulation:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.shared_room = rng.choice((0, 0, 500))
        self.shared_bytes = rng.choice((0, SHARED_BYTES))
        self.bodies = rng.choice((BODIES[:1], BODIES))
        self.seed = seed
        self.now = 0.0
        self.steps = 0
        self.store: dict[bytes, list[Event]] = {}
        self.epoch = 0
        self.index = 1_000_000
        self.queue: list[tuple[float, int, Any]] = []
        self.serial = 0
        self.life = 0
        self.feed: Feed | None = None
        self.tick_at = float("inf")
        self.calm = False
        self.latency = rng.choice([0.0, 0.002, 0.05])
        self.hint_loss = rng.choice([0.0, 0.3, 1.0])
        self.stale = rng.choice([0.0, 0.2])
        self.read_failure = rng.choice([0.0, 0.1])
        self.save_failure = rng.choice([0.0, 0.2])
        self.nack = rng.choice([0.0, 0.15])
        self.hang = rng.choice([0.0, 0.1])
        self.crashes = rng.choice([0, 0, 1, 3])
        self.deaths = rng.choice([0, 2, 5])
        self.losses = rng.choice([0, 0, 1, 2])
        self.lost: set[bytes] = set()
        streams = rng.choice([1, 3, 8])
        self.subs: dict[str, Sub] = {}
        self.streams = [b"s%d" % number for number in range(streams)]
        self.appends = rng.choice([5, 30, 80])
        for _ in range(rng.choice([0, 0, 10, 40])):
            self.append(hinted=False)
        self.subs = {f"sub{number}": self.make_sub(f"sub{number}") for number in range(rng.choice([1, 1, 2, 4]))}

    # The world

    def make_sub(self, key: str) -> Sub:
        rng = self.random
        kind, selector = rng.choice(
            [
                (schema.BY_STREAM, b"$all"),
                (schema.BY_STREAM, b"$" + rng.choice(self.streams)),
                (schema.BY_EVENT_TYPE, b"a"),
                (schema.BY_EVENT_PATTERN, {schema.EVENT_TYPE: b"b", schema.DATA: {TOTAL: 1}}),
                (schema.BY_EVENT_PAYLOAD, {TOTAL: 0}),
            ]
        )
        strategy = rng.choice(list(Strategy))
        options = Options(
            auto_ack=rng.random() < 0.15,
            window=rng.choice([1, 3, 100]),
            batch_size=rng.choice([1, 1, 10]),
            ack_timeout_s=rng.choice([1.0, 5.0]),
            max_retries=rng.choice([0, 2, 10]),
            strategy=strategy,
        )
        persistent = rng.random() < 0.7
        start: int | Start = rng.choice([0, 0, 3, Start.NOW])
        spec = Spec(kind, selector, start, persistent, options)
        return Sub(key, spec, compile_selector(kind, selector), rng.choice([1, 1, 3]))

    def append(self, *, hinted: bool = True) -> None:
        rng = self.random
        stream = rng.choice(self.streams)
        if self.is_in_doubt(stream):
            # Had it as many events as before, nobody could know that they are others.
            return
        events = self.store.setdefault(stream, [])
        new = []
        for _ in range(rng.choice([1, 1, 1, 5])):
            self.epoch += rng.choice([0, 1, 5])
            record = {
                schema.EVENT_STREAM_ID: stream,
                schema.EVENT_NUMBER: len(events),
                schema.EVENT_TYPE: rng.choice([b"a", b"b"]),
                schema.CREATED_EPOCH: self.epoch,
                schema.DATA: {TOTAL: rng.choice([0, 1]), Atom("more"): rng.choice(self.bodies)},
            }
            events.append(event_of(record))
            new.append(events[-1])
        self.index += 1
        if hinted:
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() >= self.hint_loss:
                    carried = tuple(new) if rng.random() < 0.5 else ()
                    late = rng.choice([0.0, 0.001, 0.5])
                    self.later(late, p.Hint(stream, new[-1].number, carried))
        if rng.random() < 0.05:
            self.later(0.0, p.Hint(rng.choice([stream, b"nowhere"]), 10**6))

    def lose(self, *, whole: bool) -> None:
        """A stream is deleted, or the store is made anew."""
        lost = self.streams if whole else [self.random.choice(self.streams)]
        for stream in lost:
            self.store.pop(stream, None)
        # What is still on its way says nothing about what is stored from now on.
        queue = []
        for at, serial, (life, what) in self.queue:
            match what:
                case p.Hint(stream) if stream in lost:
                    continue
                case p.Page(token):
                    queue.append((at, serial, (life, p.Page(token, None))))
                case p.Counts(token):
                    queue.append((at, serial, (life, p.Counts(token, None, 0.0))))
                case _:
                    queue.append((at, serial, (life, what)))
        heapify(queue)
        self.queue = queue
        self.index += 1
        for sub in self.subs.values():
            for stream in lost:
                sub.lose(stream)
        self.lost.update(lost)
        if whole:
            # No later index of it is as high as one of this.
            self.index //= 1000
            for sub in self.subs.values():
                sub.saved = None
                sub.lowered.clear()

    def lose_again(self, sub: Sub, streams: Iterable[bytes]) -> None:
        """The engine has noticed. What it delivered before that comes again, lest something be missed."""
        for stream in streams:
            assert stream in self.lost or stream == b"nowhere", f"{stream!r} begins anew, and nothing of it was lost"
            sub.lose(stream)

    @property
    def unnoticed(self) -> bool:
        """Whether the store has been made anew and the engine could know it, but does not yet."""
        return self.feed is not None and self.feed._highest_index > self.index

    def is_in_doubt(self, stream: bytes) -> bool:
        """Whether the engine takes a stream for the one that was deleted."""
        count = len(self.store.get(stream, ()))
        if self.feed is None:
            return any((sub.saved or {}).get(stream, 0) > max(count, sub.lowest) for sub in self.subs.values())
        subscriptions = self.feed._subscriptions.values()
        return not self.unnoticed and (
            self.feed._end(stream) > count
            or any(each.floor(stream) > max(count, each._lowest) for each in subscriptions)
        )

    def is_stored(self, event: Event) -> bool:
        """Whether an event is in the store, and not one of that number from before."""
        events = self.store.get(event.stream, [])
        return event.number < len(events) and events[event.number] is event

    def later(self, delay: float, what: Any) -> None:
        self.serial += 1
        heappush(self.queue, (self.now + delay, self.serial, (self.life, what)))

    def soon(self, what: Any) -> None:
        self.later(self.latency * self.random.random(), what)

    def wanted(self, sub: Sub, stream: bytes, start: int = 0) -> Iterator[Event]:
        """The events of the stream, from `start` on, that the subscription must get."""
        seen, found = sub.matching.setdefault(stream, (0, []))
        events = self.store.get(stream, ())
        if seen < len(events):
            found.extend(event for event in events[seen:] if sub.matcher.wants(event))
            sub.matching[stream] = (len(events), found)
        start = max(start, sub.first_of(stream))
        return islice(found, bisect_left(found, start, key=lambda event: event.number), None)

    # Gateways

    def gateway_up(self) -> None:
        self.life += 1
        self.feed = Feed(self.now, shared_room=self.shared_room, shared_bytes=self.shared_bytes)
        self.acks: list[p.Input] = []
        self.tick_at = float("inf")
        for sub in self.subs.values():
            sub.last.clear()
            sub.alive.clear()
            sub.parking.clear()
            sub.stopped = False
            sub.skipped_by_checkpoint = dict(sub.saved or {})
            if not sub.spec.persistent:
                # It ended with its gateway; the next one is another subscription.
                sub.done.clear()
                sub.delivered.clear()
                sub.first.clear()
                sub.started = False
                sub.parked.clear()
            else:
                # What was acknowledged after the last checkpoint comes again, and rightly so.
                saved = sub.saved or {}
                sub.done = {(stream, number) for stream, number in sub.done if number < saved.get(stream, sub.lowest)}
                sub.parked = {at: event for at, event in sub.parked.items() if at in sub.done}
            if sub.saved is None:
                sub.started = False
            for _ in range(sub.subscribers):
                self.join(sub)

    def gateway_crash(self) -> None:
        # What was on its way to the store may still arrive there.
        for _, _, (life, what) in list(self.queue):
            if life == self.life and isinstance(what, tuple) and what[0] == "save" and self.random.random() < 0.5:
                self.store_checkpoint(*what[1:])
        self.feed = None
        self.life += 1

    def join(self, sub: Sub) -> None:
        sub.incarnations += 1
        name = f"{sub.key}/{sub.incarnations}"
        sub.alive.add(name)
        resumes = self.random.random() < 0.7
        if resumes:
            sub.stopped = False
        elif self.feed is not None and sub.key not in self.feed:
            sub.stopped = sub.stop_saved
            self.later(2.0, p.Resume(sub.key))
        if sub.spec.start is Start.NOW and not sub.started:
            # It may begin anywhere until it says where; what counts is what comes after that.
            sub.first = {}
        positions = None if sub.saved is None else dict(sub.saved)
        self.feed_in(p.Subscribe(sub.key, sub.spec, name, positions, sub.stop_saved, resumes))

    def subscriber_dies(self, sub: Sub) -> None:
        if not sub.alive:
            return
        name = self.random.choice(sorted(sub.alive))
        sub.alive.discard(name)
        for key in [key for key in sub.last if key[0] == name]:
            del sub.last[key]
        if not sub.spec.persistent and not sub.alive:
            # A transient subscription is over, and a new one begins where it begins.
            self.feed_in(p.SubscriberDown(name))
            assert self.feed is None or sub.key not in self.feed
            sub.done.clear()
            sub.delivered.clear()
            sub.first.clear()
            sub.parked.clear()
            sub.started = False
        else:
            self.feed_in(p.SubscriberDown(name, self.random.choice([None, sub.key])))
        self.later(self.random.choice([0.0, 0.5, 3.0]), ("join", sub.key))

    # The engine

    def feed_in(self, *inputs: p.Input) -> None:
        if self.feed is None:
            return
        self.sent: list[tuple[Sub, Event]] = []
        gathered = [*self.acks, *inputs]
        self.acks.clear()
        for effect in self.feed.receive(gathered, self.now):
            self.carry_out(effect)
        for sub, event in self.sent:
            # Several subscribers: what goes out at the same time has no order.
            self.check_none_left_out(sub, event)
        deadline = self.feed.deadline
        if deadline < self.tick_at:
            self.tick_at = deadline

    def carry_out(self, effect: p.Effect) -> None:
        rng = self.random
        match effect:
            case p.ReadPage(_, _, _, count):
                assert count >= 1
                self.soon(("read", effect))
            case p.ReadCounts() | p.ReadIndex():
                self.soon(("read", effect))
            case p.Deliver(key, subscriber, events):
                self.delivered(self.subs[str(key)], str(subscriber), events)
            case p.SaveCheckpoint(key, _, positions):
                self.check_checkpoint(self.subs[str(key)], positions)
                self.soon(("save", effect, self.subs[str(key)].era))
            case p.BeginAnew(key, streams):
                self.subs[str(key)].era += 1
                self.subs[str(key)].lowered.update(streams)
                self.lose_again(self.subs[str(key)], streams)
            case p.Log("events_lost_by_store", fields):
                for sub in self.subs.values():
                    self.lose_again(sub, self.streams if fields["whole"] else fields["streams"])
            case p.Park(key, event, _, _):
                if self.is_stored(event):
                    self.subs[str(key)].parking.add((event.stream, event.number))
                self.soon(("park", effect, self.subs[str(key)].era))
            case p.DropParked(key, stream, number):
                del self.subs[str(key)].parked[stream, number]
            case p.Started(key):
                self.started(self.subs[str(key)])
            case p.Stopped(key):
                sub = self.subs[str(key)]
                sub.stopped = True
                sub.stop_saved = sub.spec.persistent
                self.later(rng.choice([0.1, 2.0]), p.Resume(key))
            case p.Resumed(key):
                assert not self.subs[str(key)].stopped
                self.subs[str(key)].stop_saved = False
            case p.Ended(key):
                assert not self.subs[str(key)].spec.persistent
            case p.Refused():
                raise AssertionError(effect)

    def answer(self, effect: p.Effect) -> None:
        """The store's answer to a read, sometimes from a member that lags behind."""
        rng = self.random
        fails = not self.calm and rng.random() < self.read_failure
        lag = rng.randrange(4) if not self.calm and rng.random() < self.stale else 0
        match effect:
            case p.ReadPage(token, stream, start, count):
                events = self.store.get(stream, [])
                events = events[: max(0, len(events) - lag)]
                page = events[start : start + count]
                if lag and len(page) > 2:
                    del page[rng.randrange(len(page))]
                self.soon(p.Page(token, None if fails else page))
            case p.ReadCounts(token, streams, certain):
                if certain:
                    lag = 0
                names = self.store if streams is None else streams
                counts = {name: max(0, len(self.store.get(name, ())) - lag) for name in names}
                self.soon(p.Counts(token, None if fails else counts, 0.01, 0.0, self.index if certain else None))
            case p.ReadIndex(token):
                # The index of a member that lags would be asked for again when it has caught up.
                self.soon(p.Index(token, None if fails else self.index))

    def store_checkpoint(self, effect: p.SaveCheckpoint, era: int) -> None:
        sub = self.subs[str(effect.key)]
        if era != sub.era:
            return
        saved = sub.saved if sub.saved is not None else {}
        saved.update(dict.fromkeys(sub.lowered, 0))
        sub.lowered.clear()
        for stream, number in effect.positions.items():
            saved[stream] = max(number, saved.get(stream, 0))
        sub.saved = saved

    # Promises

    def started(self, sub: Sub) -> None:
        if sub.spec.start is Start.NOW and not sub.started:
            # From here on everything counts; what came before may have been delivered or not.
            sub.first = {stream: len(events) for stream, events in self.store.items()}
        sub.started = True

    def delivered(self, sub: Sub, subscriber: str, events: list[Event]) -> None:
        assert subscriber in sub.alive, f"{subscriber} is gone"
        assert 1 <= len(events) <= sub.spec.options.batch_size
        assert not sub.stopped
        for event in events:
            at = (event.stream, event.number)
            assert sub.matcher.wants(event), f"{sub.key} did not ask for {event}"
            if not self.is_stored(event) or at in sub.parked or self.unnoticed:
                # Replayed: the order of its stream is behind it; or of a stream that is gone, or comes again from 0.
                self.handle(sub, subscriber, event)
                continue
            if sub.spec.persistent:
                below = sub.skipped_by_checkpoint.get(event.stream, 0)
                assert event.number >= below, f"{event} came again though the checkpoint said {below}"
            assert at not in sub.done, f"{event} came again though it was dealt with"
            self.check_order(sub, subscriber, event)
            sub.delivered[at] += 1
            if sub.spec.options.auto_ack:
                sub.done.add(at)
            self.handle(sub, subscriber, event)

    def check_order(self, sub: Sub, subscriber: str, event: Event) -> None:
        stream = event.stream
        if sub.spec.start is Start.NOW and not sub.started:
            return
        self.sent.append((sub, event))
        alone = sub.subscribers == 1 or sub.spec.options.strategy is Strategy.BY_STREAM
        previous = sub.last.get((subscriber, stream))
        sub.last[subscriber, stream] = event.number
        if alone and previous is not None and previous < event.number:
            for between in self.wanted(sub, stream, previous + 1):
                if between.number < event.number:
                    at = (stream, between.number)
                    assert at in sub.done or at in sub.parking, f"{event} after {previous}, without {between}"

    def check_none_left_out(self, sub: Sub, event: Event) -> None:
        for earlier in self.wanted(sub, event.stream):
            at = (event.stream, earlier.number)
            if earlier.number >= event.number:
                break
            below = sub.skipped_by_checkpoint.get(event.stream, 0) if sub.spec.persistent else 0
            assert earlier.number < below or at in sub.done or sub.delivered[at], f"{event} before {earlier}"

    def check_checkpoint(self, sub: Sub, positions: dict[bytes, int]) -> None:
        assert sub.spec.persistent
        for stream, number in positions.items():
            if self.unnoticed or self.is_in_doubt(stream):
                continue
            for event in self.wanted(sub, stream):
                if event.number < number:
                    at = (stream, event.number)
                    below = sub.skipped_by_checkpoint.get(stream, 0)
                    if sub.spec.start is Start.NOW and not sub.started:
                        continue
                    assert at in sub.done or event.number < below, f"checkpoint {number} is ahead of {event}"

    # Subscribers

    def handle(self, sub: Sub, subscriber: str, event: Event) -> None:
        if sub.spec.options.auto_ack:
            return
        rng = self.random
        if self.calm or rng.random() >= self.hang + self.nack:
            action = None
        elif rng.random() < 0.5:
            return
        else:
            action = rng.choice([Action.RETRY, Action.RETRY, Action.SKIP, Action.PARK, Action.STOP])
            if action is Action.STOP:
                sub.stops += 1
                action = Action.RETRY if sub.stops > 3 else action
        delay = rng.choice([0.0, 0.0, 0.01, 0.7])
        self.later(delay, ("handled", sub.key, subscriber, event, action))

    def handled(self, sub: Sub, subscriber: str, event: Event, action: Action | None) -> None:
        if subscriber not in sub.alive or self.feed is None:
            return
        at = (event.stream, event.number)
        entry = self.entries(sub).get(at)
        if action is None or action is Action.SKIP:
            # What waits to be delivered again can be acknowledged, but not skipped.
            counts = ("IN_FLIGHT", "WAITING") if action is None else ("IN_FLIGHT",)
            if entry is not None and entry.state.name in counts and self.is_stored(entry.event):
                sub.done.add(at)
        if action is None:
            # Some are put off, and taken together with what comes next.
            self.acks.append(p.Ack(sub.key, event.stream, event.number))
            if self.random.random() < 0.5:
                self.later(0.0, "acks")
            else:
                self.feed_in()
        else:
            self.feed_in(p.Nack(sub.key, event.stream, event.number, action))

    def entries(self, sub: Sub) -> dict[tuple[bytes, int], Any]:
        """What the engine holds as not done."""
        if self.feed is None or sub.key not in self.feed:
            return {}
        return self.feed._subscriptions[sub.key].delivery._entries

    # The schedule

    def run(self) -> None:
        rng = self.random
        self.gateway_up()
        at = 0.0
        for _ in range(self.appends):
            at += rng.choice([0.0, 0.0, 0.001, 0.02, 0.3])
            self.later_in_world(at, "append")
        for _ in range(self.deaths):
            self.later_in_world(rng.random() * at, "death")
        for _ in range(self.crashes):
            self.later_in_world(rng.random() * at, "crash")
        for _ in range(self.losses):
            self.later_in_world(rng.random() * at, ("lose", rng.random() < 0.5))
        self.later_in_world(at + 1.0, "calm")
        self.loop(at + 1.0)
        self.loop(at + 2_000.0, until_quiet=True)
        self.check_end()

    def later_in_world(self, at: float, what: str) -> None:
        self.serial += 1
        heappush(self.queue, (at, self.serial, (None, what)))

    def loop(self, until: float, *, until_quiet: bool = False) -> None:
        at_one_time = 0
        while True:
            if until_quiet and self.steps % 16 == 0 and self.is_quiet():
                return
            queued = self.queue[0][0] if self.queue else float("inf")
            at = min(queued, self.tick_at if self.feed is not None else float("inf"))
            if at > until:
                assert not until_quiet, f"not quiet after {until} s: {self.unfinished()}"
                self.now = until
                return
            at_one_time = 0 if at > self.now else at_one_time + 1
            assert at_one_time < MAX_STEPS_AT_ONE_TIME, "the engine turns without getting anywhere"
            self.steps += 1
            assert self.steps < MAX_STEPS
            self.now = max(self.now, at)
            if queued <= at:
                _, _, (life, what) = heappop(self.queue)
                if life is None or life == self.life:
                    self.step(what)
            else:
                self.tick_at = float("inf")
                self.feed_in(p.Tick())
            if self.steps % 8 == 0:
                for sub in self.subs.values():
                    self.check_bounds(sub)

    def step(self, what: Any) -> None:
        match what:
            case "append":
                self.append()
            case ("lose", bool(whole)):
                self.lose(whole=whole)
            case "crash":
                # What began anew is saved at once; if it cannot be, nobody after that could know.
                if self.feed is not None and not self.unnoticed and not any(sub.lowered for sub in self.subs.values()):
                    self.gateway_crash()
                    self.later_in_world(self.now + self.random.choice([0.0, 1.0]), "up")
            case "up":
                if self.feed is None:
                    self.gateway_up()
            case "acks":
                self.feed_in()
            case "death":
                self.subscriber_dies(self.subs[self.random.choice(sorted(self.subs))])
            case "calm":
                self.calm = True
            case ("join", str(key)):
                if len(self.subs[key].alive) < self.subs[key].subscribers:
                    self.join(self.subs[key])
            case ("read", effect):
                self.answer(effect)
            case ("save", p.SaveCheckpoint() as effect, int(era)):
                ok = era == self.subs[str(effect.key)].era and (self.calm or self.random.random() >= self.save_failure)
                if ok:
                    self.store_checkpoint(effect, era)
                self.soon(p.Saved(effect.key, effect.token, ok))
            case ("park", p.Park(key, event, _, _), int(era)):
                ok = era == self.subs[str(key)].era and (self.calm or self.random.random() >= self.save_failure)
                if ok and self.is_stored(event):
                    sub = self.subs[str(key)]
                    if str(key) in (self.feed or ()):
                        sub.parked[event.stream, event.number] = event
                        sub.done.add((event.stream, event.number))
                self.soon(p.ParkSaved(key, event.stream, event.number, ok))
            case ("handled", str(key), str(subscriber), Event() as event, action):
                self.handled(self.subs[key], subscriber, event, action)
            case p.Resume(key):
                self.subs[str(key)].stopped = False
                self.feed_in(what)
            case _:
                self.feed_in(what)

    def check_bounds(self, sub: Sub) -> None:
        if self.feed is None or sub.key not in self.feed:
            return
        status = self.feed.status(sub.key)
        assert status is not None
        held: Counter[Any] = Counter()
        held_bytes: Counter[Any] = Counter()
        taken = [entry for entry in self.entries(sub).values() if not entry.replayed]
        for entry in self.entries(sub).values():
            if entry.subscriber is not None:
                held[entry.subscriber.id] += 1
                held_bytes[entry.subscriber.id] += entry.event.size
        assert not held or max(held.values()) <= sub.spec.options.window
        most = MAX_SHARE_BYTES if self.shared_bytes else MIN_SHARE_BYTES
        largest = len(self.bodies[-1]) + 10_000
        assert not held_bytes or max(held_bytes.values()) < most + largest
        # Those that are with subscribers, and those kept aside.
        assert len(taken) <= (sub.subscribers + 1) * sub.spec.options.window
        assert sum(entry.event.size for entry in taken) < (sub.subscribers + 1) * (most + largest)
        backlog = self.feed._subscriptions[sub.key].backlog
        kept = [event for lane in backlog.lanes.values() for event in lane.buffer]
        assert backlog.bytes == sum(event.size for event in kept)
        assert set(backlog._full) == {event.stream for event in kept}
        assert backlog.bytes < most + largest
        assert status.buffered <= max(MIN_ROOM, self.shared_room) + 2 * sub.spec.options.window + PAGE_EVENTS

    def unfinished(self) -> list[str]:
        found = []
        for sub in self.subs.values():
            for stream in self.store:
                for event in self.wanted(sub, stream):
                    below = sub.skipped_by_checkpoint.get(stream, 0) if sub.spec.persistent else 0
                    if (stream, event.number) not in sub.done and event.number >= below:
                        found.append(f"{sub.key} {event}")
        return found

    def is_quiet(self) -> bool:
        if self.feed is None or not self.calm or self.unnoticed:
            return False
        for sub in self.subs.values():
            status = self.feed.status(sub.key)
            if status is None or status.in_flight or status.unsaved_streams or status.state != "live":
                return False
        return not self.unfinished()

    def check_end(self) -> None:
        for sub in self.subs.values():
            for stream, events in self.store.items():
                for event in self.wanted(sub, stream):
                    at = (stream, event.number)
                    below = sub.skipped_by_checkpoint.get(stream, 0) if sub.spec.persistent else 0
                    assert at in sub.done or event.number < below
                    if sub.spec.persistent:
                        assert sub.delivered[at] or at in sub.parked, f"{event} was never delivered to {sub.key}"
                if sub.saved is not None:
                    assert sub.saved.get(stream, 0) <= max(len(events), sub.lowest)
                if sub.spec.persistent:
                    for event in self.wanted(sub, stream):
                        assert event.number < (sub.saved or {}).get(stream, 0), f"{event} is not in the checkpoint"
