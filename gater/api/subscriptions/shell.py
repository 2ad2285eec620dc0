"""Runs the feed of one store: carries out its effects, keeps its time, watches its subscribers.

A subscriber is a pid of any node, which gets `{:events, [event]}`. Whose subscriptions are run here, and what is saved
of them, is decided in `door.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import structlog

from gater.api.service import Service
from gater.api.subscriptions import protocol as p
from gater.api.subscriptions.feed import Feed
from gater.api.subscriptions.protocol import Event, Input, Key, SubscriberId
from gater.api.subscriptions.reads import StoreReads
from gater.api.subscriptions.saved import SavedState, Snapshots
from gater.erl.connection import MAX_READY_BYTES
from gater.erl.errors import ErlError
from gater.erl.etf import encode_term
from gater.erl.node import Monitor
from gater.erl.process import NOCONNECTION, described
from gater.erl.terms import Atom, EncodedTerm, Pid, Term
from gater.pubsub.messages import events_message

AHEAD_BYTES: Final = 8 * 1024 * 1024
"""What may wait for a peer before its subscribers get nothing new. It is more than makes a peer busy: one event to a
thousand of them is a megabyte at once, and whoever gets nothing new falls behind and has to be read for."""

MISSED_S: Final = 300.0
"""How long a subscriber whose node is out of reach is looked for; after that it has to subscribe again."""

LOOK_AGAIN_S: Final = 1.0
"""Between two attempts to reach that node."""

ARRIVE_S: Final = 0.1
"""How long what was sent with `auto_ack` has to arrive before it is saved as done: when a gateway is killed, what its
peers have not read yet is lost."""

SAVE_AGAIN_S: Final = 1.0
"""Before another attempt to save what a store did not."""

MIN_TICK_S: Final = 0.001
"""A deadline that is due is met in the next turn of the loop but one, so that others have theirs."""

AT_ONCE: Final = 64
"""Subscriptions of one store that are registered, or removed, at the same time: some 20 ms. Thousands may begin or end
together, as when another gateway has gone, and everybody else is not to wait for all of them."""

_BEFORE_ACKS: Final = frozenset({p.Ack, p.Hint, p.Page, p.Counts, p.Index, p.Saved, p.ParkSaved})
"""Inputs that may come before an acknowledgement that has been put off: no event is delivered again because of them."""

log = structlog.get_logger(__name__)


class StoreFeed:
    """The subscriptions of one store that this gateway runs."""

    def __init__(self, service: Service, store: Atom) -> None:
        self.store = store
        self.reads = StoreReads(service, store)
        self.snapshots = Snapshots(service, self.reads)
        self.saved: dict[Key, SavedState] = {}
        """What is saved, of the persistent ones."""
        self.on_started: dict[Key, list[Callable[[str | None], None]]] = {}
        """Whom to tell that a subscription has started (None), or why it was refused."""
        self.sharers: Callable[[], int] = lambda: 1
        """How many gateways there are."""
        self.on_ended: Callable[[Key], None] = lambda key: None
        self.on_subscribers: Callable[[Key], None] = lambda key: None
        self.on_anew: Callable[[Key], None] = lambda key: None
        """Called when the store may have lost what was saved of a persistent subscription."""
        self._node = service.node
        self._loop = asyncio.get_running_loop()
        self._feed = Feed(self._loop.time())
        self._inputs: list[Input] = []
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        self._keeps_time = False
        """Whether the timer is going to be set for the next deadline."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._saves: set[asyncio.Future[None]] = set()
        """Checkpoints that are being saved, or wait for that."""
        self._monitors: dict[Pid, Monitor] = {}
        self._keys_of: dict[SubscriberId, set[Key]] = {}
        self._subscribers_of: dict[Key, dict[SubscriberId, None]] = {}
        self._busy: dict[Atom, set[Pid]] = {}
        self._last_event: Event | None = None
        self._last_message: Term = None
        """What `_last_event` is sent as."""
        self._joining: tuple[Key, SubscriberId] | None = None
        self._specs: dict[Key, p.Spec] = {}
        """Of the persistent ones: what a subscriber joins again that was out of reach."""
        self.beginning = asyncio.Semaphore(AT_ONCE)
        """Held while a subscription is registered."""
        self.ending = asyncio.Semaphore(AT_ONCE)
        """Held while one is removed."""
        self._closed = False
        self._handlers: dict[type, Callable[[Any], None]] = {
            p.ReadPage: self._read_page,
            p.ReadCounts: self._read_counts,
            p.ReadIndex: self._read_index,
            p.Deliver: self._deliver,
            p.SaveCheckpoint: self._save,
            p.BeginAnew: self._begin_anew,
            p.Park: self._park,
            p.DropParked: self._drop_parked,
            p.Started: lambda effect: self._tell(effect.key, None),
            p.Refused: self._refused,
            p.Stopped: self._stopped,
            p.Resumed: lambda effect: self._save_stopped(effect.key, False),
            p.Ended: self._ended,
            p.Log: lambda effect: log.warning(effect.event, store=str(store), **effect.fields),
        }

    def __contains__(self, key: Key) -> bool:
        return key in self._feed

    @property
    def is_empty(self) -> bool:
        """Whether there is no subscription."""
        return not len(self._feed)

    def status(self, key: Key) -> p.Status | None:
        """How a subscription stands."""
        return self._feed.status(key)

    def replaying(self, key: Key) -> dict[tuple[bytes, int], int]:
        """The parked events of a subscription that are being delivered again, and their sizes."""
        return self._feed.replaying(key)

    def keys_of(self, subscriber: SubscriberId) -> list[Key]:
        """The subscriptions of a subscriber."""
        return list(self._keys_of.get(subscriber, ()))

    def keys(self) -> list[Key]:
        """All subscriptions."""
        return [status.key for status in self._feed.statuses()]

    def subscribers(self, key: Key) -> list[SubscriberId]:
        """Who has joined a subscription."""
        return list(self._subscribers_of.get(key, ()))

    # The machine

    def give(self, *inputs: Input) -> None:
        """Hand the feed its inputs, and carry out what comes of it."""
        if type(inputs[0]) not in _BEFORE_ACKS:
            # Acknowledgements are put off (`ApiServer`): they come before what takes an event for not acknowledged.
            self._node.busy_wait.do_later()
        self._inputs.extend(inputs)
        if self._running or self._closed:
            return
        self._running = True
        try:
            while self._inputs:
                together, self._inputs = self._inputs, []
                for effect in self._feed.receive(together, self._loop.time()):
                    self._handlers[type(effect)](effect)
        finally:
            self._running = False
        if not self._keeps_time:
            # Once for all inputs of this turn of the loop, and after what they led to is on its way.
            self._keeps_time = True
            self._loop.call_soon(self._keep_time)

    def _keep_time(self) -> None:
        self._keeps_time = False
        if self._closed:
            return
        due = self._feed.deadline
        if self._timer is not None:
            # A tick that comes too early does nothing; most deadlines are put off before they are reached.
            if due >= self._due:
                return
            self._timer.cancel()
            self._timer = None
        self._due = due
        if due != float("inf"):
            self._timer = self._loop.call_at(max(due, self._loop.time() + MIN_TICK_S), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.give(p.Tick())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("subscription_task_failed", store=str(self.store), error=described(error))

    def close(self) -> None:
        """End everything at once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self.snapshots.close()
        for monitor in self._monitors.values():
            self._node.demonitor(monitor)
        self._monitors.clear()

    # Subscribers

    def subscribe(
        self,
        key: Key,
        spec: p.Spec,
        subscriber: SubscriberId | None,
        positions: Mapping[bytes, int] | None,
        *,
        resumes: bool,
    ) -> None:
        """Start a subscription, or join it; `on_started` says how it went. One that a subscriber stopped stays so
        unless the new one `resumes` it."""
        known = key in self._feed
        if subscriber is not None and subscriber not in self._subscribers_of.get(key, ()):
            self._keys_of.setdefault(subscriber, set()).add(key)
            self._subscribers_of.setdefault(key, {})[subscriber] = None
            self._joining = (key, subscriber)
            if isinstance(subscriber, Pid) and subscriber not in self._monitors:
                self._monitors[subscriber] = self._node.monitor(
                    subscriber, lambda _, reason: self._pid_down(subscriber, reason)
                )
        if key not in self.saved:
            self._specs.pop(key, None)
        else:
            self._specs.setdefault(key, spec)
        saved = self.saved.get(key)
        stopped = saved is not None and saved.stopped
        self.give(p.Subscribe(key, spec, subscriber, positions, stopped, resumes))
        self._joining = None
        status = self._feed.status(key)
        if known and status is not None and status.state != "starting":
            self._tell(key, None)

    def _pid_down(self, subscriber: Pid, reason: Term) -> None:
        kept = [key for key in self._keys_of.get(subscriber, ()) if key in self._specs]
        self.down(subscriber)
        if reason is NOCONNECTION and kept:
            self._spawn(self._look_for(subscriber, kept))

    async def _look_for(self, subscriber: Pid, keys: list[Key]) -> None:
        """A subscriber of persistent subscriptions is out of reach: it joins again when its node is back.

        Its monitor says if it is not alive any more, or gone again.
        """
        until = self._loop.time() + MISSED_S
        while self._loop.time() < until:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                await self._node.connect(subscriber.node)
            except ErlError:
                continue
            for key in keys:
                if key in self._feed and key in self._specs:
                    self.subscribe(key, self._specs[key], subscriber, None, resumes=False)
                    self.on_subscribers(key)
            return

    def down(self, subscriber: SubscriberId, key: Key | None = None) -> None:
        """A subscriber has gone, from one subscription or from all."""
        keys = [key] if key is not None else list(self._keys_of.get(subscriber, ()))
        for each in keys:
            self._forget(each, subscriber)
        self.give(p.SubscriberDown(subscriber, key))
        for each in keys:
            self.on_subscribers(each)

    def _forget(self, key: Key, subscriber: SubscriberId) -> None:
        of_key = self._subscribers_of.get(key)
        if of_key is not None:
            of_key.pop(subscriber, None)
            if not of_key:
                del self._subscribers_of[key]
        keys = self._keys_of.get(subscriber)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._keys_of[subscriber]
                if isinstance(subscriber, Pid) and (monitor := self._monitors.pop(subscriber, None)) is not None:
                    self._node.demonitor(monitor)

    def remove(self, key: Key) -> None:
        """End a subscription, as if it had never been here."""
        self.give(p.Remove(key))
        self._forget_all(key)

    def release(self, key: Key) -> None:
        """Save where a subscription stands and end it here."""
        self.give(p.Release(key))
        self._forget_all(key)

    def _forget_all(self, key: Key) -> None:
        self._specs.pop(key, None)
        for subscriber in self.subscribers(key):
            self._forget(key, subscriber)
        self._tell(key, "the subscription has ended")

    async def settled(self) -> None:
        """Wait for the writes under way."""
        while under_way := {*self._tasks, *self._saves}:
            await asyncio.wait(under_way)

    # Effects

    def _read_page(self, effect: p.ReadPage) -> None:
        self.reads.page(
            effect.stream, effect.start, effect.count, lambda events: self.give(p.Page(effect.token, events))
        )

    def _read_counts(self, effect: p.ReadCounts) -> None:
        async def read() -> None:
            reads = self.reads
            counted = await (reads.certain_counts if effect.certain else reads.counts)(effect.streams)
            if counted is None:
                self.give(p.Counts(effect.token, None, 0.0))
            else:
                self.give(p.Counts(effect.token, *counted))

        self._spawn(read())

    def _read_index(self, effect: p.ReadIndex) -> None:
        self._feed.sharers = self.sharers()

        async def read() -> None:
            self.give(p.Index(effect.token, await self.reads.index()))

        self._spawn(read())

    def _deliver(self, effect: p.Deliver) -> None:
        subscriber, node = effect.subscriber, self._node
        assert isinstance(subscriber, Pid)
        try:
            if subscriber.node is node.name:
                node.send(subscriber, events_message([event.record for event in effect.events]))
                return
            node.send(subscriber, self._message(effect.events))
        except ErlError as error:
            log.warning("events_not_sent", store=str(self.store), pid=str(subscriber), error=described(error))
            return
        connection = node.peers.table.get(subscriber.node)
        if connection is not None and connection.busy and connection.backlog > AHEAD_BYTES:
            self._is_busy(subscriber)

    def _message(self, events: list[Event]) -> Term:
        """What a subscriber on another node gets. An event that goes to many is put together once."""
        event = events[0]
        if len(events) > 1:
            return events_message([each.encoded for each in events])
        if event is not self._last_event:
            encoded = event.encoded
            message = events_message([encoded])
            if not encoded.atoms and len(encoded.data) < MAX_READY_BYTES:
                message = EncodedTerm(encode_term(message))
            self._last_event, self._last_message = event, message
        return self._last_message

    def _is_busy(self, subscriber: Pid) -> None:
        waiting = self._busy.get(subscriber.node)
        if waiting is None:
            self._busy[subscriber.node] = {subscriber}
            self._spawn(self._wait_for(subscriber.node))
        elif subscriber in waiting:
            return
        else:
            waiting.add(subscriber)
        self._inputs.append(p.SubscriberBusy(subscriber, True))

    async def _wait_for(self, node: Atom) -> None:
        await self._node.drain(node)
        for subscriber in self._busy.pop(node, ()):
            self.give(p.SubscriberBusy(subscriber, False))

    def _save(self, effect: p.SaveCheckpoint) -> None:
        # It is the last one where the subscription is being given away, and forgotten before it is written.
        saved = self.saved.get(effect.key)
        spec = self._specs.get(effect.key)
        is_last = effect.key not in self._feed
        if saved is None:
            self.give(p.Saved(effect.key, effect.token, False))
            return
        era = saved.era
        over = self._loop.create_future()
        self._saves.add(over)

        def saved_or_not(ok: bool) -> None:
            end()
            self.give(p.Saved(effect.key, effect.token, ok))

        def end() -> None:
            self._saves.discard(over)
            over.set_result(None)

        def arrived() -> None:
            # It may have been removed or given away meanwhile.
            if self.saved.get(effect.key) is saved and not self._closed:
                saved.begin_save(effect.positions, saved_or_not, era)
            else:
                end()

        if spec is not None and spec.options.auto_ack and not is_last:
            self._loop.call_later(ARRIVE_S, arrived)
        else:
            saved.begin_save(effect.positions, saved_or_not, era)

    def _begin_anew(self, effect: p.BeginAnew) -> None:
        saved = self.saved.get(effect.key)
        if saved is not None:
            saved.begin_anew(effect.streams)
            self.on_anew(effect.key)

    def _park(self, effect: p.Park) -> None:
        event = effect.event
        saved = self.saved.get(effect.key)
        if saved is None:
            # A transient subscription has no place of its own in the store.
            log.warning("event_not_parked", store=str(self.store), stream=event.stream, number=event.number)
            self._inputs.append(p.ParkSaved(effect.key, event.stream, event.number, True))
            return

        async def park(saved: SavedState) -> None:
            era = saved.era
            ok = await saved.park(event, effect.reason, effect.attempts)
            if saved.era != era:
                # It may be an event of this number that is there no more, and another one is being parked.
                ok = False
            self.give(p.ParkSaved(effect.key, event.stream, event.number, ok))

        self._spawn(park(saved))

    def _drop_parked(self, effect: p.DropParked) -> None:
        saved = self.saved.get(effect.key)
        if saved is not None:
            saved.drop_parked(effect.stream, effect.number)

    def _tell(self, key: Key, problem: str | None) -> None:
        for waiting in self.on_started.pop(key, ()):
            waiting(problem)

    def _refused(self, effect: p.Refused) -> None:
        # Who has joined before stays.
        if effect.subscriber is not None and self._joining == (effect.key, effect.subscriber):
            self._forget(effect.key, effect.subscriber)
        self._tell(effect.key, effect.reason)

    def _stopped(self, effect: p.Stopped) -> None:
        log.warning(
            "subscription_stopped",
            store=str(self.store),
            subscription=str(effect.key),
            stream=effect.stream,
            number=effect.number,
        )
        self._save_stopped(effect.key, True)

    def _save_stopped(self, key: Key, stopped: bool) -> None:
        """Whoever takes over is to know."""
        saved = self.saved.get(key)
        if saved is None:
            return
        saved.stopped = stopped

        async def save(saved: SavedState) -> None:
            while not await saved.save({}):
                await asyncio.sleep(SAVE_AGAIN_S)
                if self.saved.get(key) is not saved or saved.stopped is not stopped:
                    return

        self._spawn(save(saved))

    def _ended(self, effect: p.Ended) -> None:
        for subscriber in self.subscribers(effect.key):
            self._forget(effect.key, subscriber)
        self._tell(effect.key, "the subscriber has ended")
        self.on_ended(effect.key)
