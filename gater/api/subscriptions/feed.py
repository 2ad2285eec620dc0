"""The feed of one store: it learns that streams have moved, reads them once, and gives the events to subscriptions.

Theory of operation: *hints wake, reads deliver*. For each stream the feed knows `next`, the number up to which its
subscriptions have been given everything, and, if the stream is *dirty*, `known`, the number up to which it is said to
go. A hint only ever raises `known`. `next` moves only over events in hand, one after the other: from a page that was
read, or from the hint itself if it carries exactly the next event. So hints may be lost, late, doubled, out of order or
false: what is lost is found by the poll (`PollPlan`), what is false is read for in vain and forgotten.

A dirty stream is read while some subscription that wants it can take events at once; the others get a lane in that
stream (`Backlog`) and read for themselves later. A stream that nobody can take now stays dirty and costs nothing.

A subscription starts when the feed has counted the streams that concern it; from then on `next` stands for its position
everywhere but in its lanes.

A store may lose events: it is wiped or made anew, a stream is deleted and created again. Then it has fewer events than
`next` says, or than a subscription came with, or its Raft index has gone back. So says a member that lags behind too:
that is a *doubt*, until a `certain` count ends it. If it is true, the streams (if the index has gone back: all) begin
anew, from 0, and what was saved about them counts no longer (`BeginAnew`). A stream that has got as many events again
before anybody has looked cannot be told from the old one, unless the index tells.

Pure: `receive(inputs, now)` returns the effects; `deadline` says when a `Tick` is due.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from gater.api.subscriptions import protocol as p
from gater.api.subscriptions.backlog import GAP_READS, READ_AGAIN_S, SHARED_BYTES, SHARED_ROOM, Shares
from gater.api.subscriptions.matching import Matcher, SelectorError, compile_selector
from gater.api.subscriptions.poll import ANSWER_S, PollPlan
from gater.api.subscriptions.protocol import (
    Effect,
    Event,
    Input,
    Key,
    Log,
    ReadCounts,
    ReadIndex,
    ReadPage,
    Started,
    SubscriberId,
)
from gater.api.subscriptions.subscription import Subscription

MAX_READS: Final = 16
"""Reads of events under way at once: enough to hide the way to the store, few enough not to crowd out callers."""

MAX_SUBSCRIPTIONS: Final = 20_000
"""Subscriptions of one store in one gateway; each costs a few kilobytes and is asked about every event it may want."""

START_AGAIN_S: Final = 0.5
"""Pause after a count failed that subscriptions need to start."""

MAX_VAIN_READS: Final = 6
"""Reads that find nothing of what a hint promised (1.5 s in all) before the promise is forgotten, and the streams are
counted once more."""


DOUBT_AGAIN_S: Final = 1.0
"""Between the answer to a certain count and the next one, as long as there are doubts."""

CERTAIN_ANSWER_S: Final = 20.0
"""After this time a certain count counts as failed, whoever should have answered it."""

MAX_DOUBTFUL: Final = 1_000
"""Streams that a certain count names; if there are more of them all streams are counted."""

MAX_NAMED: Final = 10
"""Streams that a line of the log names."""

MAX_DIRTY: Final = 1_000_000
"""Streams said to have moved and not yet read. Further hints are dropped; the poll finds what they were about."""


class _Doubt(NamedTuple):
    """What a certain count was asked for."""

    token: int
    streams: tuple[bytes, ...] | None
    ends: dict[bytes, int]
    """What was `next` of the streams."""
    highest: int
    """The highest index that had been seen."""
    ahead: list[tuple[Subscription, dict[bytes, int]]]


class _Read(NamedTuple):
    """A read of events that is under way."""

    stream: bytes
    start: int
    most: int
    readers: list[Subscription] | None
    """The subscriptions that are behind and wait for it; None: the feed itself does."""


class Feed:
    """All subscriptions of one store that this gateway owns."""

    sharers = 1
    """Gateways with a feed of this store, this one included."""

    def __init__(self, now: float, *, shared_room: int = SHARED_ROOM, shared_bytes: int = SHARED_BYTES) -> None:
        self._shares = Shares(shared_room, shared_bytes)
        self._subscriptions: dict[Key, Subscription] = {}
        self._of_stream: dict[bytes, dict[Key, Subscription]] = {}
        self._of_type: dict[bytes, dict[Key, Subscription]] = {}
        self._of_all: dict[Key, Subscription] = {}
        """Subscriptions by what their events must have: stream, else type, else nothing."""
        self._of_subscriber: dict[SubscriberId, dict[Key, Subscription]] = {}
        self._next: dict[bytes, int] = {}
        self._known: dict[bytes, int] = {}
        """Dirty streams; all are in `_next`."""
        self._queue: dict[bytes, None] = {}
        """Dirty streams that are not being read and need not wait."""
        self._idle: dict[bytes, None] = {}
        """Dirty streams that nobody could take when it was their turn."""
        self._paused: list[tuple[float, bytes]] = []
        self._vain: dict[bytes, int] = {}
        self._moves: dict[bytes, int] = {}
        """For each stream the sequence number of its last move, in that order."""
        self._sequence = 0
        self._synced = False
        """Whether `_next` stands for all streams: one that is not in it has no events."""
        self._poll: PollPlan | None = None
        self._index_token = 0
        self._counts_token = 0
        self._counts_streams: tuple[bytes, ...] | None = None
        self._counts_since = 0
        """The last move of the feed before the count under way ..."""
        self._counted_since = 0
        """... and before the count before that: what has moved since then may be ahead of the member that counts."""
        self._doubtful: dict[bytes, None] = {}
        """Streams that are said to have fewer events than `_next`."""
        self._ahead: dict[Key, Subscription] = {}
        """Subscriptions that came with numbers the feed had not come to."""
        self._highest_index = -1
        self._doubts_store = False
        """Whether the index is said to be below `_highest_index`."""
        self._doubt: _Doubt | None = None
        self._doubt_at = now
        """When a certain count may be asked for, or asked for again."""
        self._starting: dict[Key, Subscription] = {}
        self._start_token = 0
        self._start_streams: tuple[bytes, ...] | None = None
        self._start_for: list[Subscription] = []
        self._start_at = now
        """When the count that subscriptions need to start may be asked for, or asked for again."""
        self._reads: dict[int, _Read] = {}
        self._shared_reads: dict[tuple[bytes, int], _Read] = {}
        """Those of subscriptions that are behind, by stream and first number: where many stand at the same place, as
        after another gateway has gone, one read does for all."""
        self._hungry: dict[Key, Subscription] = {}
        self._token = 0
        self._touched: dict[Key, Subscription] = {}
        self._wakes: list[tuple[float, int, Key]] = []
        self._effects: list[Effect] = []
        self._now = now
        self._handlers: dict[type, Callable[[Any], None]] = {
            p.Subscribe: self._subscribe,
            p.SubscriberDown: self._subscriber_down,
            p.SubscriberBusy: self._subscriber_busy,
            p.Ack: self._ack,
            p.Nack: self._nack,
            p.Resume: self._resume,
            p.ReplayParked: self._replay_parked,
            p.Remove: self._remove,
            p.Release: self._release,
            p.Hint: self._hint,
            p.Page: self._page,
            p.Counts: self._counts,
            p.Index: self._index,
            p.Saved: self._saved,
            p.ParkSaved: self._park_saved,
            p.Tick: self._tick,
        }

    # The machine

    def receive(self, inputs: Iterable[Input], now: float) -> list[Effect]:
        """Take inputs that have come by time `now` (which never goes back); what is to be done about them."""
        self._now = now
        for input in inputs:
            self._handlers[type(input)](input)
        self._settle()
        effects = self._effects[:]
        self._effects.clear()
        return effects

    @property
    def deadline(self) -> float:
        """When a `Tick` is due, if nothing else comes before; infinity: never."""
        found = float("inf")
        if self._poll is not None:
            found = self._poll.deadline(self._now)
        if self._starting:
            found = min(found, self._start_at)
        if self._has_doubts:
            found = min(found, self._doubt_at)
        if self._wakes:
            found = min(found, self._wakes[0][0])
        if self._paused:
            found = min(found, self._paused[0][0])
        return found

    def __len__(self) -> int:
        return len(self._subscriptions)

    def __contains__(self, key: Key) -> bool:
        return key in self._subscriptions

    def status(self, key: Key) -> p.Status | None:
        """How a subscription stands; None if there is none of that key."""
        subscription = self._subscriptions.get(key)
        return None if subscription is None else subscription.status

    def replaying(self, key: Key) -> dict[tuple[bytes, int], int]:
        """The parked events of a subscription that are being delivered again, and their sizes."""
        subscription = self._subscriptions.get(key)
        return {} if subscription is None else subscription.delivery.replaying

    def statuses(self) -> Iterator[p.Status]:
        """How all subscriptions stand."""
        return (subscription.status for subscription in self._subscriptions.values())

    # Subscriptions

    def _subscribe(self, input: p.Subscribe) -> None:
        try:
            matcher = compile_selector(input.spec.kind, input.spec.selector)
        except SelectorError as problem:
            self._effects.append(p.Refused(input.key, input.subscriber, str(problem)))
            return
        subscription = self._subscriptions.get(input.key)
        if subscription is None:
            if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
                reason = f"this gateway has MAX_SUBSCRIPTIONS ({MAX_SUBSCRIPTIONS}) subscriptions of the store"
                self._effects.append(p.Refused(input.key, input.subscriber, reason))
                return
            subscription = self._add(input, matcher)
        elif subscription.matcher.identity != matcher.identity:
            reason = "a subscription of this name has another type or selector: choose another name, or remove it first"
            self._effects.append(p.Refused(input.key, input.subscriber, reason))
            return
        if input.subscriber is not None:
            self._of_subscriber.setdefault(input.subscriber, {})[input.key] = subscription
            subscription.up(input.subscriber, self._now)
        if input.resumes:
            subscription.resume(self._now)
        self._touch(subscription)

    def _add(self, input: p.Subscribe, matcher: Matcher) -> Subscription:
        subscription = Subscription(
            input.key, input.spec, matcher, self._end, input.positions, self._effects, self._shares
        )
        subscription.delivery.stopped = input.stopped
        self._subscriptions[input.key] = subscription
        self._shares.divide(len(self._subscriptions))
        self._group(matcher)[input.key] = subscription
        if self._poll is None:
            self._poll = PollPlan(self._now)
        if self._is_covered(matcher) and not subscription.begins_now:
            self._start(subscription, {})
        else:
            self._starting[input.key] = subscription
        return subscription

    def _group(self, matcher: Matcher) -> dict[Key, Subscription]:
        if matcher.stream is not None:
            return self._of_stream.setdefault(matcher.stream, {})
        if matcher.event_type is not None:
            return self._of_type.setdefault(matcher.event_type, {})
        return self._of_all

    def _is_covered(self, matcher: Matcher) -> bool:
        """Whether the feed already stands somewhere in the streams that this selector is about."""
        return self._synced or (matcher.stream is not None and matcher.stream in self._next)

    def _start(self, subscription: Subscription, counts: Mapping[bytes, int]) -> None:
        stream = subscription.matcher.stream
        subscription.scanned = self._sequence
        subscription.start(counts, list(self._next) if stream is None else [stream], self._now)
        if not subscription.must_save_start:
            self._effects.append(Started(subscription.key))
        if subscription.ahead():
            self._ahead[subscription.key] = subscription
        self._touch(subscription)

    def _drop(self, subscription: Subscription) -> None:
        """Forget a subscription, and what the feed knew on its behalf only."""
        key, matcher = subscription.key, subscription.matcher
        del self._subscriptions[key]
        self._shares.divide(len(self._subscriptions))
        for subscriber in subscription.delivery.subscribers:
            self._leave(subscriber, key)
        self._starting.pop(key, None)
        self._ahead.pop(key, None)
        self._touched.pop(key, None)
        self._hungry.pop(key, None)
        group = self._group(matcher)
        del group[key]
        if matcher.stream is not None and not group:
            del self._of_stream[matcher.stream]
            if not self._synced:
                self._forget_stream(matcher.stream)
        elif matcher.stream is None and matcher.event_type is not None and not group:
            del self._of_type[matcher.event_type]
        if self._synced and not self._of_all and not self._of_type:
            self._synced = False
            for stream in [stream for stream in self._next if stream not in self._of_stream]:
                self._forget_stream(stream)
            for stream in self._of_stream:
                self._next.setdefault(stream, 0)
        if not self._subscriptions:
            self._poll = None
            # Nobody waits for the count under way, which may have been for those that have gone.
            self._start_token = 0
            self._start_at = self._now
            self._wakes.clear()
            self._paused.clear()
            self._doubtful.clear()
            self._highest_index = -1
            self._doubts_store = False
            self._doubt = None

    def _forget_stream(self, stream: bytes) -> None:
        self._next.pop(stream, None)
        self._moves.pop(stream, None)
        self._clean(stream)

    def _remove(self, input: p.Remove) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            self._drop(subscription)

    def _release(self, input: p.Release) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            if subscription.spec.persistent and not subscription.starting:
                subscription.save_last(self._new_token, self._now)
            self._drop(subscription)

    def _saved(self, input: p.Saved) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            subscription.checkpoint.written(input.token, input.ok, self._now)
            if subscription.must_save_start and input.ok and not subscription.starting:
                subscription.must_save_start = False
                self._effects.append(Started(input.key))
            if not input.ok:
                self._effects.append(Log("checkpoint_not_saved", {"subscription": str(input.key)}))
            self._touch(subscription)

    # Subscribers

    def _subscriber_down(self, input: p.SubscriberDown) -> None:
        of_subscriber = self._of_subscriber.get(input.subscriber, {})
        for key in list(of_subscriber) if input.key is None else [input.key]:
            subscription = of_subscriber.get(key)
            if subscription is None:
                continue
            self._leave(input.subscriber, key)
            subscription.down(input.subscriber, self._now)
            if subscription.is_over:
                self._drop(subscription)
                self._effects.append(p.Ended(key))
            else:
                self._touch(subscription)

    def _leave(self, subscriber: SubscriberId, key: Key) -> None:
        of_subscriber = self._of_subscriber.get(subscriber)
        if of_subscriber is not None and of_subscriber.pop(key, None) is not None and not of_subscriber:
            del self._of_subscriber[subscriber]

    def _subscriber_busy(self, input: p.SubscriberBusy) -> None:
        for subscription in self._of_subscriber.get(input.subscriber, {}).values():
            subscription.delivery.busy(input.subscriber, input.busy)
            if not input.busy:
                self._touch(subscription)

    def _ack(self, input: p.Ack) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None and subscription.delivery.ack(input.stream, input.number, self._now):
            self._touch(subscription)

    def _nack(self, input: p.Nack) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None and subscription.delivery.nack(
            input.stream, input.number, input.action, input.reason, self._now
        ):
            self._touch(subscription)

    def _resume(self, input: p.Resume) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            subscription.resume(self._now)
            self._touch(subscription)

    def _replay_parked(self, input: p.ReplayParked) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            subscription.delivery.replay(input.events, self._now)
            self._touch(subscription)

    def _park_saved(self, input: p.ParkSaved) -> None:
        subscription = self._subscriptions.get(input.key)
        if subscription is not None:
            subscription.delivery.park_saved(input.stream, input.number, input.ok, self._now)
            self._touch(subscription)

    # Streams

    def _end(self, stream: bytes) -> int:
        return self._next.get(stream, 0)

    def _concerned(self, stream: bytes) -> Iterator[Subscription]:
        """The subscriptions that may want events of this stream."""
        groups = [self._of_stream.get(stream, {}), self._of_all, *self._of_type.values()]
        return chain.from_iterable(group.values() for group in groups)

    def _is_followed(self, stream: bytes) -> bool:
        return self._synced or (stream in self._of_stream and stream in self._next)

    def _hint(self, input: p.Hint) -> None:
        stream = input.stream
        if not self._is_followed(stream):
            return
        for event in input.events:
            if event.number == self._next.get(stream, 0) and event.stream == stream:
                self._give(event)
        self._has(stream, input.version + 1)

    def _has(self, stream: bytes, count: int) -> None:
        """The stream is said to have so many events."""
        if count > self._next.get(stream, 0):
            known = self._known.get(stream)
            if known is None:
                if len(self._known) >= MAX_DIRTY:
                    return
                self._next.setdefault(stream, 0)
                self._known[stream] = count
                self._queue[stream] = None
            elif count > known:
                self._known[stream] = count
        elif stream in self._known and self._known[stream] <= self._next[stream]:
            self._clean(stream)

    def _clean(self, stream: bytes) -> None:
        """Nothing more is known to be there."""
        self._known.pop(stream, None)
        self._queue.pop(stream, None)
        self._idle.pop(stream, None)
        self._vain.pop(stream, None)

    def _give(self, event: Event) -> None:
        """Pass over the stream's next event."""
        stream = event.stream
        self._next[stream] = event.number + 1
        self._sequence += 1
        self._moves.pop(stream, None)
        self._moves[stream] = self._sequence
        touched, now = self._touched, self._now
        groups: list[Mapping[Key, Subscription]] = [self._of_all]
        if stream in self._of_stream:
            groups.append(self._of_stream[stream])
        if type(event.type) is bytes and event.type in self._of_type:
            groups.append(self._of_type[event.type])
        for group in groups:
            for key, subscription in group.items():
                # Without a test it is wanted: stream or type is how the subscription was found.
                if subscription.matcher.test is None or subscription.matcher.wants(event):
                    subscription.event(event, now)
                    touched[key] = subscription

    def _moved_since(self, sequence: int) -> tuple[list[bytes], int]:
        """The streams that have moved after this one of the feed's moves, and the last move."""
        streams = []
        for stream in reversed(self._moves):
            if self._moves[stream] <= sequence:
                break
            streams.append(stream)
        return streams, self._sequence

    # Reads

    def _new_token(self) -> int:
        self._token += 1
        return self._token

    def _read(self, read: _Read) -> None:
        token = self._new_token()
        self._reads[token] = read
        self._effects.append(ReadPage(token, read.stream, read.start, read.most))

    def _read_for(self, reader: Subscription, stream: bytes, start: int, count: int) -> None:
        shared = self._shared_reads.get((stream, start))
        # Not if it is more than was asked for: that may be too much.
        if shared is not None and shared.readers is not None and shared.most <= count:
            shared.readers.append(reader)
            return
        read = _Read(stream, start, count, [reader])
        self._shared_reads[stream, start] = read
        self._read(read)

    def _over(self, token: int) -> _Read | None:
        """The read of this token, which is not under way any more."""
        read = self._reads.pop(token, None)
        if read is not None and self._shared_reads.get((read.stream, read.start)) is read:
            del self._shared_reads[read.stream, read.start]
        return read

    def _page(self, input: p.Page) -> None:
        read = self._over(input.token)
        if read is None:
            return
        if read.readers is None:
            self._live_page(read.stream, input.events)
            return
        for subscription in read.readers:
            if self._subscriptions.get(subscription.key) is subscription:
                subscription.page(read.stream, read.start, read.most, input.events, self._now)
                self._touch(subscription)

    def _live_page(self, stream: bytes, events: Sequence[Event] | None) -> None:
        if stream not in self._known:
            return
        before = self._next[stream]
        tries = self._vain.get(stream, 0)
        if events:
            self._shares.saw(max(event.size for event in events))
        for event in events or ():
            if event.number > self._next[stream] and tries >= GAP_READS:
                self._effects.append(
                    Log("events_missing", {"stream": stream, "from": self._next[stream], "to": event.number - 1})
                )
                self._next[stream] = event.number
            if event.number == self._next[stream]:
                self._give(event)
        if self._next[stream] > before:
            self._vain.pop(stream, None)
            if self._next[stream] >= self._known[stream]:
                self._clean(stream)
            else:
                self._queue[stream] = None
        elif events is not None and not events and tries >= MAX_VAIN_READS:
            self._clean(stream)
            if self._poll is not None:
                self._poll.doubt(self._now)
            if before == 0 and stream not in self._of_stream:
                del self._next[stream]
        else:
            self._vain[stream] = tries + 1
            pause = min(READ_AGAIN_S[0] * 2.0**tries, READ_AGAIN_S[1])
            heappush(self._paused, (self._now + pause, stream))

    def _read_more(self) -> None:
        """Begin reads while there is room: dirty streams and subscriptions that are behind take turns."""
        while len(self._reads) < MAX_READS:
            live = self._read_dirty()
            behind = self._read_behind()
            if not live and not behind:
                return

    def _read_dirty(self) -> bool:
        """Read the next dirty stream that somebody can take."""
        while self._queue:
            stream = next(iter(self._queue))
            del self._queue[stream]
            if any(subscription.accepts(stream) for subscription in self._concerned(stream)):
                start = self._next[stream]
                count = min(self._shares.page_events(), self._known[stream] - start)
                # A read may have failed because it was too much.
                self._read(_Read(stream, start, max(1, count >> self._vain.get(stream, 0)), None))
                return True
            self._idle[stream] = None
        return False

    def _read_behind(self) -> bool:
        while self._hungry:
            key = next(iter(self._hungry))
            subscription = self._hungry.pop(key)
            reads = subscription.take_reads(1)
            if reads:
                self._hungry[key] = subscription
                for stream, start, count in reads:
                    self._read_for(subscription, stream, start, count)
                return True
        return False

    # Counts

    def _ask(self) -> None:
        """Ask the store for its index and counts if that is due."""
        poll, now = self._poll, self._now
        if poll is None:
            return
        poll.sharers = self.sharers
        if poll.index_due(now):
            self._index_token = self._new_token()
            self._effects.append(ReadIndex(self._index_token))
        if poll.counts_due(now):
            self._counts_token = self._new_token()
            self._counts_streams = self._followed
            self._counts_since = self._sequence
            self._effects.append(ReadCounts(self._counts_token, self._counts_streams))
        if self._starting and now >= self._start_at:
            self._start_token = self._new_token()
            self._start_for = list(self._starting.values())
            streams = {subscription.matcher.stream for subscription in self._start_for}
            self._start_streams = None if None in streams else tuple(stream for stream in streams if stream is not None)
            self._start_at = now + ANSWER_S
            self._effects.append(ReadCounts(self._start_token, self._start_streams))
        if self._has_doubts and now >= self._doubt_at:
            self._ask_certain()

    @property
    def _followed(self) -> tuple[bytes, ...] | None:
        """The streams to be counted; None: all."""
        return None if self._of_all or self._of_type else tuple(self._of_stream)

    def _index(self, input: p.Index) -> None:
        if self._poll is not None and input.token == self._index_token:
            self._poll.index(input.value, self._now)
            if input.value is not None:
                self._doubts_store = input.value < self._highest_index
                self._highest_index = max(self._highest_index, input.value)

    def _counts(self, input: p.Counts) -> None:
        if self._poll is None:
            return
        counts = input.counts
        if self._doubt is not None and input.token == self._doubt.token:
            self._certain(self._doubt, input)
        elif input.token == self._counts_token:
            self._counts_token = 0
            self._poll.counts(counts is not None, input.took_s, self._now, input.own_s)
            if counts is not None:
                self._count(self._counts_streams, counts)
                self._counted_since = self._counts_since
        elif input.token == self._start_token:
            self._start_token = 0
            if counts is None:
                self._start_at = self._now + START_AGAIN_S
            else:
                self._poll.charge(input.took_s, self._now, input.own_s)
                self._start_at = self._now
                self._count(self._start_streams, counts)
                self._start_counted(counts)

    def _start_counted(self, counts: Mapping[bytes, int]) -> None:
        for subscription in self._start_for:
            if self._starting.get(subscription.key) is subscription and self._is_covered(subscription.matcher):
                del self._starting[subscription.key]
                self._start(subscription, counts)
        self._start_for = []

    def _count(self, streams: tuple[bytes, ...] | None, counts: Mapping[bytes, int]) -> None:
        """The store has so many events in these streams (None: in all)."""
        if streams is None:
            self._count_all(counts)
            return
        for stream in streams:
            if stream in self._of_stream:
                self._count_stream(stream, counts.get(stream, 0))

    def _count_stream(self, stream: bytes, count: int) -> None:
        if stream in self._next:
            self._has(stream, count)
            if count < self._next[stream]:
                self._has_fewer(stream)
        else:
            self._next[stream] = count

    def _count_all(self, counts: Mapping[bytes, int]) -> None:
        if not self._of_all and not self._of_type:
            for stream in self._of_stream:
                self._count_stream(stream, counts.get(stream, 0))
        elif self._synced:
            following = self._next
            for stream, count in counts.items():
                end = following.get(stream, 0)
                if end < count:
                    self._has(stream, count)
                elif end > count:
                    self._has_fewer(stream)
            if len(counts) < len(following):
                for stream, end in following.items():
                    if end and stream not in counts:
                        self._has_fewer(stream)
        else:
            self._synced = True
            for stream, count in counts.items():
                self._count_stream(stream, count)
            for stream in self._of_stream:
                self._next.setdefault(stream, 0)

    # Doubts

    @property
    def _has_doubts(self) -> bool:
        return bool(self._doubtful or self._ahead or self._doubts_store)

    def _has_fewer(self, stream: bytes) -> None:
        """The stream is said to have fewer events than were seen of it."""
        if self._moves.get(stream, 0) <= self._counted_since:
            self._doubtful[stream] = None
        elif self._poll is not None:
            self._poll.doubt(self._now)

    def _ask_certain(self) -> None:
        ahead = []
        for key, subscription in list(self._ahead.items()):
            if streams_ahead := subscription.ahead():
                ahead.append((subscription, streams_ahead))
            else:
                del self._ahead[key]
        if not self._has_doubts:
            return
        named = dict.fromkeys(chain(self._doubtful, *(streams for _, streams in ahead)))
        streams = self._followed if self._doubts_store or len(named) > MAX_DOUBTFUL else tuple(named)
        ends = dict(self._next) if streams is None else {stream: self._end(stream) for stream in streams}
        self._doubt = _Doubt(self._new_token(), streams, ends, self._highest_index, ahead)
        self._doubt_at = self._now + CERTAIN_ANSWER_S
        self._effects.append(ReadCounts(self._doubt.token, streams, certain=True))

    def _certain(self, doubt: _Doubt, input: p.Counts) -> None:
        """What there is for certain, or was when it was asked for."""
        self._doubt = None
        self._doubt_at = self._now + DOUBT_AGAIN_S
        counts, index = input.counts, input.index
        if counts is None or self._poll is None:
            return
        self._poll.charge(input.took_s, self._now, input.own_s)
        if index is not None and index < doubt.highest:
            self._highest_index = index
            self._ahead.clear()
            self._begin_anew([stream for stream, end in self._next.items() if end], whole=True)
        else:
            lost = [stream for stream, end in doubt.ends.items() if counts.get(stream, 0) < min(end, self._end(stream))]
            if lost:
                self._begin_anew(lost)
            for subscription, came_with in doubt.ahead:
                if self._ahead.pop(subscription.key, None) is subscription:
                    anew = [stream for stream in subscription.ahead() if counts.get(stream, 0) < came_with[stream]]
                    if anew:
                        named = {"subscription": str(subscription.key), "streams": anew[:MAX_NAMED]}
                        self._effects.append(Log("checkpoint_ahead_of_store", named))
                        subscription.begin_anew(anew, self._now)
                        self._touch(subscription)
        self._doubts_store = False
        for stream in list(self._doubtful) if doubt.streams is None else doubt.streams:
            self._doubtful.pop(stream, None)
        for stream, count in counts.items():
            if self._is_followed(stream):
                self._has(stream, count)

    def _begin_anew(self, streams: Collection[bytes], *, whole: bool = False) -> None:
        """The store has lost the events of these streams; `whole`: it is another store."""
        named = list(islice(streams, MAX_NAMED))
        self._effects.append(Log("events_lost_by_store", {"streams": named, "count": len(streams), "whole": whole}))
        gone = set(streams)
        for stream in gone:
            self._clean(stream)
            self._moves.pop(stream, None)
            if stream in self._of_stream:
                self._next[stream] = 0
            else:
                del self._next[stream]
        for token, read in list(self._reads.items()):
            if read.stream in gone:
                # What it answers may be of the old ones.
                self._over(token)
                for subscription in read.readers or ():
                    subscription.reads -= 1
        self._start_token = 0
        self._start_at = self._now
        for subscription in self._subscriptions.values():
            only = subscription.matcher.stream
            concerned = gone if only is None else gone & {only}
            if whole:
                concerned = concerned.union(subscription.streams_come_with)
            if concerned or whole:
                subscription.begin_anew(concerned, self._now)
                self._touch(subscription)

    # Time

    def _tick(self, input: p.Tick) -> None:
        now = self._now
        while self._paused and self._paused[0][0] <= now:
            _, stream = heappop(self._paused)
            if stream in self._known:
                self._queue[stream] = None
        while self._wakes and self._wakes[0][0] <= now:
            at, _, key = heappop(self._wakes)
            subscription = self._subscriptions.get(key)
            if subscription is not None and subscription.wake == at:
                subscription.wake = float("inf")
                self._touch(subscription)

    def _touch(self, subscription: Subscription) -> None:
        self._touched[subscription.key] = subscription

    def _wake_idle(self, stream: bytes | None) -> None:
        """Somebody can take events again, of this stream (None: of any)."""
        if stream is None:
            self._queue.update(self._idle)
            self._idle.clear()
        elif stream in self._idle:
            del self._idle[stream]
            self._queue[stream] = None

    def _settle(self) -> None:
        """Let everything that was touched do what it can, then read and ask on."""
        now = self._now
        for key, subscription in self._touched.items():
            due = subscription.settle(self._new_token, self._moved_since, now)
            if due < subscription.wake:
                subscription.wake = due
                heappush(self._wakes, (due, id(subscription), key))
            if subscription.backlog.lanes:
                self._hungry[key] = subscription
            if self._idle and subscription.could_accept:
                self._wake_idle(subscription.matcher.stream)
        self._touched.clear()
        if self._queue or self._hungry:
            self._read_more()
        self._ask()
