"""Subscriptions of this gateway, as its callers see them: who runs which, and what becomes of their requests.

A transient subscription runs in the gateway that was asked for it and ends with its subscriber. A persistent one runs
in the gateway that has its name in Swarm's registry, `{:gater_subscription, store, name}`; the others pass requests on
to the process registered there. Definition and subscribers stand in the properties of that name, so that when its
gateway goes every other one knows what to take over: all of them try to register the name, one gets it, reads the
checkpoint (`saved.py`) and goes on with the same subscribers.

A gateway that does not answer any more (it is frozen, or cut off and nobody has noticed yet) is disconnected, so that
its subscriptions are taken over as if it had died. When it goes on it finds that it has been away, gives all of its own
up and asks for them again, from their checkpoints. Until Swarm has settled who has a name there may be two owners: what
one of them has sent may come again from the other; neither undoes what the other has saved.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from gater.api import schema
from gater.api.schema import Rejected, Request
from gater.api.service import OnReply, OnTaken, Service
from gater.api.subscriptions import protocol as p
from gater.api.subscriptions.delivery import MAX_REPLAY_BYTES, MAX_REPLAYS
from gater.api.subscriptions.matching import SelectorError, compile_selector
from gater.api.subscriptions.protocol import Action, Hint, Key, Options, Spec, Start, Strategy, encoded_event
from gater.api.subscriptions.saved import (
    ABSORB_S,
    MAX_PARKED_BYTES,
    MAX_PARKED_READ,
    ParkedPlace,
    SavedState,
    Unreadable,
    parked_place,
    parked_term,
)
from gater.api.subscriptions.shell import SAVE_AGAIN_S, StoreFeed
from gater.erl.errors import CallError
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, call, cast, spawn_server
from gater.erl.process import SHUTDOWN, described
from gater.erl.terms import Atom, Pid, Term
from gater.pubsub.adapter import PubSub
from gater.pubsub.messages import (
    APPENDED_TOPIC,
    appended_message,
    parse_appended,
    parse_events,
    store_topic,
    subscription_topic,
)
from gater.settings import DEFAULT_PUB_SUB
from gater.swarm.messages import AddMeta, Track, UntrackName, registered_elsewhere
from gater.swarm.registry import Entry
from gater.swarm.swarm import Swarm

SUBSCRIPTION: Final = Atom("gater_subscription")
"""First element of the names in Swarm, and of what gateways send each other about subscriptions."""

SUBSCRIBE_TIMEOUT_S: Final = 4.5
"""How long a caller waits until its subscription has started, at most; Elixir callers give up after 5 s."""

MAX_REQUESTS: Final = 10_000
"""Requests about subscriptions under way at once, as of the service; further ones are answered `:overloaded`."""

GIVE_AWAY_S: Final = 3.0
"""How long a gateway that stops waits for its last checkpoints to be saved; whoever takes over repeats the rest. And
before that for what it was told to remove."""

TAKE_OVER_S: Final = 600.0
"""How long a gateway tries to take over a subscription: its store may be choosing a new leader, or be without one."""

TRY_AGAIN_S: Final = 0.1
"""Before another attempt: the owner is going, or the store does not answer."""

MAX_SUBSCRIBERS: Final = 1_000
"""Who share one subscription: each is watched, and all stand together in Swarm's registry."""

TOGETHER_S: Final = 2.0
"""Who has had a name for less than this when it turns out that another gateway had it too has read what that one could
save: both have got it a moment ago, or that one has had it before."""

BEAT_S: Final = 0.5
"""How often a gateway looks at the clock to find that it has been away."""

AWAY_S: Final = 2.5
"""For so long it must have been away; others take it for gone after 3 s at the earliest."""

STALE_S: Final = 2.0
"""How long a checkpoint that must be there is looked for: the member of the store that is asked may be behind."""

GATER_API: Final = Atom("gater_api")
"""First element of the names of gateways' API servers."""

_SUBSCRIBER: Final = Atom("subscriber")
_SUBSCRIBERS: Final = Atom("subscribers")
_SUBSCRIPTION_NAME: Final = Atom("subscription_name")
_TYPE: Final = Atom("type")
_SELECTOR: Final = Atom("selector")
_OPTIONS: Final = Atom("options")
_START_FROM: Final = Atom("start_from")
_AUTO_ACK: Final = Atom("auto_ack")
_RESUME: Final = Atom("resume")
_NOW: Final = Atom("now")
_SWARM: Final = Atom("swarm")
_NUMBERS: Final = ("window", "batch_size", "max_retries")

log = structlog.get_logger(__name__)


class _Refused(Exception):
    """What was asked for is answered with this error reason."""

    def __init__(self, reason: Term) -> None:
        super().__init__(reason)
        self.reason = reason


def not_found(name: bytes) -> Term:
    """The reason when there is no such subscription in any gateway."""
    return (Atom("subscription_not_found"), name)


def refused(text: str) -> Term:
    """The reason when a subscription cannot be had like that."""
    return (Atom("subscription_refused"), text.encode())


class Owner(GenServer):
    """The process that stands for a persistent subscription in Swarm's registry."""

    def __init__(self, door: Subscriptions, owned: _Owned) -> None:
        self._door = door
        self._owned = owned

    def handle_call(self, request: Term, caller: Caller) -> Term:
        reply = self.process.node.reply
        checked = _passed_on(request, cast=False)
        if isinstance(checked, Rejected):
            return checked.reply
        self._door.call(checked, lambda answer: reply(caller, answer), passed_on=True)
        return NO_REPLY

    def handle_cast(self, message: Term) -> None:
        checked = _passed_on(message, cast=True)
        if not isinstance(checked, Rejected):
            self._door.cast(checked, _ignore, passed_on=True)

    def handle_info(self, message: Term) -> None:
        # {swarm, die}: two gateways had the name, and the other one keeps it.
        if type(message) is tuple and message and message[0] is _SWARM:
            self._door.lost(self._owned)

    def terminate(self, reason: Term) -> None:
        # Its name is free now: the other gateways are taking over.
        if reason is not SHUTDOWN:
            self._door.lost(self._owned)


def _passed_on(message: Term, *, cast: bool) -> Request | Rejected:
    if type(message) is tuple and len(message) == 2 and message[0] is SUBSCRIPTION:
        return schema.check_request(message[1], cast=cast)
    return Rejected(schema.invalid_request("not a request of a gateway"))


@dataclass(slots=True, eq=False)
class _Owned:
    """A persistent subscription that runs here, or is about to."""

    store: Atom
    name: bytes
    spec: Spec
    options: Term
    ready: asyncio.Future[None]
    server: Owner | None = None
    since: float = float("inf")
    """When it has got its name."""
    told: list[Pid] = field(default_factory=list)
    """The subscribers that the registry knows."""
    listen_no_more: Callable[[], None] = lambda: None
    """Ends listening for the emitters of its record in the store."""

    @property
    def swarm_name(self) -> Term:
        return (SUBSCRIPTION, self.store, self.name)


class Subscriptions:
    """All subscriptions of a gateway. `start` once its node is up."""

    def __init__(self, service: Service, swarm: Swarm | None = None) -> None:
        self._service = service
        self._swarm = swarm
        self._feeds: dict[Atom, StoreFeed] = {}
        self._owned: dict[tuple[Atom, bytes], _Owned] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pubsub: PubSub | None = None
        self._events_server = DEFAULT_PUB_SUB
        self._unsubscribe: list[Callable[[], None]] = []
        self._stopping = False
        self._end_watch: Callable[[], None] = lambda: None
        self._beat: asyncio.TimerHandle | None = None
        self._moving: Counter[tuple[Atom, bytes]] = Counter()
        """Subscriptions that are changing hands, and how many are at it."""
        self._removing: dict[tuple[Atom, bytes], asyncio.Task[None]] = {}
        """Subscriptions that are being removed."""

    def start(self, pubsub: PubSub | None = None, events_server: str = DEFAULT_PUB_SUB) -> None:
        """Take requests. `pubsub` brings hints, and tells other gateways of appends, by the server for events."""
        self._pubsub = pubsub
        self._events_server = events_server
        if pubsub is not None:
            self._unsubscribe.append(pubsub[events_server].subscribe(APPENDED_TOPIC, self._heard))
        self._service.subscriptions = self
        if self._swarm is not None:
            self._unsubscribe.append(self._swarm.watch_kept(self._name_kept))
            self._end_watch = self._swarm.watch_starting_with(SUBSCRIPTION, self._name_changed)
        self._look_at_clock(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Save where everything stands and give it away."""
        self._stopping = True
        self._end_watch()
        if self._beat is not None:
            self._beat.cancel()
        for end in self._unsubscribe:
            end()
        if self._removing:
            await asyncio.wait(set(self._removing.values()), timeout=GIVE_AWAY_S)
        await asyncio.gather(*(self._give_away(owned) for owned in list(self._owned.values())))
        for task in set(self._tasks):
            task.cancel()
        for feed in self._feeds.values():
            feed.close()

    def feed(self, store: Atom) -> StoreFeed:
        """The feed of a store."""
        feed = self._feeds.get(store)
        if feed is None:
            feed = self._feeds[store] = StoreFeed(self._service, store)
            feed.sharers = lambda: 1 + len(self._other_gateways())
            feed.on_subscribers = lambda key: self._subscribers_changed(store, key)
            feed.on_anew = lambda key: self._store_lost(store, key)
            if self._pubsub is not None:
                server = self._pubsub[self._events_server]
                self._unsubscribe.append(
                    server.subscribe(store_topic(store, "$all"), lambda _, message: self._heard_events(store, message))
                )
        return feed

    # Hints

    def follows(self, store: Atom) -> bool:
        """Whether the records of what is appended are of use here."""
        feed = self._feeds.get(store)
        return feed is not None and not feed.is_empty

    def appended(
        self, store: Atom, stream: bytes, version: int, node: Atom, stored: Sequence[tuple[Term, bytes]] = ()
    ) -> None:
        """An append on `node` that went through this gateway: a hint for us and for the others, who are told before its
        caller is answered: whoever asks them then reads what was written here."""
        if self._pubsub is not None:
            server = self._pubsub[self._events_server]
            for node_told in [peer.node for peer in server.peers]:
                # Store nodes are members of the server too and have no use for this.
                if self._service.guarded_forms.get(node_told) is None:
                    server.direct_broadcast(node_told, APPENDED_TOPIC, appended_message(store, stream, version, node))
                    self._service.node.write_first(node_told)
        self._hint(store, stream, version, stored)

    def _other_gateways(self) -> set[Atom]:
        """The nodes with an API server."""
        if self._swarm is None:
            return set()
        found = {entry.pid.node for entry in self._swarm.registry.starting_with(GATER_API)}
        return found & set(self._service.node.nodes())

    def _heard(self, _: bytes, message: Term) -> None:
        appended = parse_appended(message)
        if appended is not None:
            self._service.appended_elsewhere(*appended)
            self._hint(appended.store, appended.stream, appended.version)

    def _heard_events(self, store: Atom, message: Term) -> None:
        for record in parse_events(message) or ():
            stream, number = record.get(schema.EVENT_STREAM_ID), record.get(schema.EVENT_NUMBER)
            if type(stream) is bytes and type(number) is int and number >= 0:
                self._hint(store, stream, number)

    def _hint(self, store: Atom, stream: bytes, version: int, stored: Sequence[tuple[Term, bytes]] = ()) -> None:
        feed = self._feeds.get(store)
        if feed is not None and not feed.is_empty:
            first = version + 1 - len(stored)
            events = [encoded_event(stream, first + at, kind, record) for at, (kind, record) in enumerate(stored)]
            feed.give(Hint(stream, version, events))

    # Requests

    def call(self, request: Request, on_reply: OnReply, *, passed_on: bool = False) -> None:
        """Carry out a call about subscriptions; `on_reply` is called once."""
        if len(self._tasks) >= MAX_REQUESTS:
            on_reply(schema.error(schema.OVERLOADED))
            return
        self._spawn(self._answer(self._reply(request, passed_on), on_reply))

    @staticmethod
    async def _answer(work: Coroutine[Any, Any, Term], on_reply: OnReply) -> None:
        reply = schema.error(schema.DRAINING)
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
                reply = await work
        except _Refused as problem:
            reply = schema.error(problem.reason)
        except Unreadable as problem:
            reply = schema.error(problem.args[0])
        except TimeoutError:
            reply = schema.error(schema.call_timeout(round(SUBSCRIBE_TIMEOUT_S * 1000)))
        except Exception as problem:
            reply = schema.error(schema.worker_died((Atom("error"), described(problem).encode())))
            raise
        finally:
            on_reply(reply)

    async def _reply(self, request: Request, passed_on: bool) -> Term:
        assert request.store is not None
        term = request.term
        if request.op == "subscribe":
            _, store, kind, selector, name, options = term
            return await self._subscribe(store, kind, selector, name, options, passed_on)
        store, name = term[1], term[2]
        if request.op in ("list_parked", "drop_parked"):
            # Any gateway can: what is parked is in the store.
            await self._must_know(store)
        if request.op == "list_parked":
            return await self._list_parked(store, name, *term[3:])
        if request.op == "drop_parked":
            return await self._drop_parked(store, name, *term[3:])
        owned = self._owned.get((store, name))
        if owned is None:
            return await self._pass_on(request, passed_on)
        await _outcome(owned.ready)
        feed = self.feed(store)
        if request.op == "replay_parked":
            return await self._replay_parked(feed, name)
        status = feed.status(name)
        if status is None:
            raise _Refused(not_found(name))
        assert owned.server is not None
        return schema.ok(_status_term(status, owned.server.pid))

    async def _must_know(self, store: Atom) -> None:
        """Have the registries asked again for a store that is not known; nothing is kept for one that nobody holds."""
        service = self._service
        if service.is_embedded(store) or service.router.is_known(store):
            return
        if not await service.refreshed():
            raise _Refused(schema.OVERLOADED)
        if not service.router.is_known(store):
            raise _Refused(schema.store_not_found(store))

    async def _list_parked(self, store: Atom, name: bytes, after: Mapping[Term, Term] | None = None) -> Term:
        saved = self._state(store, name)
        places = await saved.parked_places()
        if after is not None:
            places = places[bisect_right(places, _place_of(after)) :]
        found = await saved.parked(places, MAX_PARKED_READ, MAX_PARKED_BYTES)
        return schema.ok([parked_term(*each) for each in found])

    async def _replay_parked(self, feed: StoreFeed, name: bytes) -> Term:
        """Have the first of those replayed that are not already; how many."""
        saved = feed.saved[name]
        places = await saved.parked_places()
        replaying = feed.replaying(name)
        waiting = {parked_place(*place) for place in replaying}
        places = [place for place in places if place not in waiting]
        room, room_bytes = MAX_REPLAYS - len(replaying), MAX_REPLAY_BYTES - sum(replaying.values())
        if places and (room <= 0 or room_bytes <= 0):
            raise _Refused(schema.OVERLOADED)
        found = await saved.parked(places, min(room, MAX_PARKED_READ), min(room_bytes, MAX_PARKED_BYTES))
        feed.give(p.ReplayParked(name, [event for event, _, _ in found]))
        return schema.ok(len(found))

    async def _drop_parked(self, store: Atom, name: bytes, event: Mapping[Term, Term] | None = None) -> Term:
        # The owner keeps nothing of it.
        saved = self._state(store, name)
        found = await saved.parked_places()
        if event is not None:
            place = _place_of(event)
            found = [each for each in found if each == place]
        if not await saved.drop(found):
            raise _Refused(schema.storage_failed("the parked events are still there"))
        return schema.ok(len(found))

    def cast(self, request: Request, on_taken: OnTaken, *, passed_on: bool = False) -> bool:
        """Carry out a cast; False if it is not about a subscription of any gateway: then it is the store's."""
        term = request.term
        if request.op == "save_subscription":
            if type(term[6]) is not Pid:
                return False
            if len(self._tasks) >= MAX_REQUESTS:
                on_taken(Rejected(schema.OVERLOADED))
                return True
            options = {_START_FROM: term[5], _SUBSCRIBER: term[6], _AUTO_ACK: True}
            work = self._subscribe(term[1], term[2], term[3], term[4], options, False)
            self._spawn(
                self._answer(work, lambda reply: on_taken(None if reply[0] is schema.OK else Rejected(reply[1])))
            )
            return True
        if request.op == "remove_subscription":
            if len(self._tasks) >= MAX_REQUESTS:
                on_taken(Rejected(schema.OVERLOADED))
                return True
            key = term[1], term[4]
            task = self._removing[key] = self._spawn(self._remove(request, passed_on, self._removing.get(key)))
            task.add_done_callback(lambda _: self._removed(key, task))
            return passed_on
        if request.op == "ack_event":
            if self._each_of(request, passed_on, lambda key, event: p.Ack(key, *event), on_taken):
                return True
            if term[2] == schema.TRANSIENT:
                # It has ended. A store would save a subscription of this name.
                on_taken(None)
                return True
            return False
        if request.op == "nack_event":
            asked, reason = schema.nack_of(term[5])
            action = Action(str(asked))
            if not self._each_of(request, passed_on, lambda key, event: p.Nack(key, *event, action, reason), on_taken):
                on_taken(Rejected(not_found(term[2])))
            return True
        return False

    def acknowledge(self, requests: Sequence[Request | Rejected]) -> list[int]:
        """Carry out `ack_event` requests, those about a feed together; the places of those that are about none."""
        left: list[int] = []
        acks: dict[StoreFeed, list[p.Input]] = {}
        for index, request in enumerate(requests):
            if isinstance(request, Request) and request.op == "ack_event":
                _, store, name, subscriber, event = request.term
                feed, keys = self._run_here(store, name, subscriber)
                if feed is not None and keys:
                    stream, number = event[schema.EVENT_STREAM_ID], event[schema.EVENT_NUMBER]
                    acks.setdefault(feed, []).extend(p.Ack(key, stream, number) for key in keys)
                    continue
            left.append(index)
        for feed, inputs in acks.items():
            feed.give(*inputs)
        return left

    def _run_here(self, store: Atom, name: bytes, subscriber: Pid) -> tuple[StoreFeed | None, list[Key]]:
        """The subscriptions that are meant, as far as they are run here."""
        feed = self._feeds.get(store)
        if feed is None:
            return None, []
        if name == schema.TRANSIENT:
            return feed, [key for key in feed.keys_of(subscriber) if type(key) is tuple]
        return feed, [name] if name in feed else []

    def _each_of(
        self,
        request: Request,
        passed_on: bool,
        make: Callable[[Key, tuple[bytes, int]], p.Input],
        on_taken: OnTaken,
    ) -> bool:
        """Give the subscriptions an ack or nack is about what `make` makes of it; False if there are none."""
        _, store, name, subscriber, event = request.term[:5]
        about = (event[schema.EVENT_STREAM_ID], event[schema.EVENT_NUMBER])
        feed, keys = self._run_here(store, name, subscriber)
        if feed is not None and keys:
            for key in keys:
                feed.give(make(key, about))
            on_taken(None)
            return True
        owner = None if passed_on else self._elsewhere(store, name)
        if owner is not None:
            cast(self._service.node, owner, (SUBSCRIPTION, request.term))
        elif (store, name) not in self._owned and (store, name) not in self._moving:
            return False
        # Between two gateways nobody can take it: the event will come again. A store, told of it, would save a
        # subscription of the name for that one stream.
        on_taken(None)
        return True

    # Subscribing

    async def _subscribe(
        self, store: Atom, kind: Atom, selector: Term, name: bytes, options: Mapping[Term, Term], passed_on: bool
    ) -> Term:
        subscriber = options.get(_SUBSCRIBER)
        if type(subscriber) is not Pid:
            raise _Refused(schema.invalid_request("subscribe: the options must name a subscriber, a pid"))
        spec = _spec(kind, selector, options, persistent=name != schema.TRANSIENT)
        try:
            matcher = compile_selector(kind, selector)
        except SelectorError as problem:
            raise _Refused(refused(str(problem))) from None
        if self._stopping:
            raise _Refused(schema.DRAINING)
        await self._must_know(store)
        if name == schema.TRANSIENT:
            await self._join(store, (subscriber, *matcher.identity), spec, subscriber, None, options)
        else:
            await self._subscribe_persistent(store, name, spec, options, subscriber, passed_on)
        return schema.ok(name)

    async def _join(
        self,
        store: Atom,
        key: Key,
        spec: Spec,
        subscriber: Pid,
        positions: Mapping[bytes, int] | None,
        options: Mapping[Term, Term],
    ) -> None:
        feed = self.feed(store)
        joined = feed.subscribers(key)
        if len(joined) >= MAX_SUBSCRIBERS and subscriber not in joined:
            raise _Refused(refused(f"MAX_SUBSCRIBERS ({MAX_SUBSCRIBERS}) share this subscription already"))
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell(problem: str | None) -> None:
            if not started.done():
                if problem is None:
                    started.set_result(None)
                else:
                    started.set_exception(_Refused(refused(problem)))

        feed.on_started.setdefault(key, []).append(tell)
        feed.subscribe(key, spec, subscriber, positions, resumes=options.get(_RESUME, True) is True)
        try:
            await started
        except asyncio.CancelledError:
            # Who has given up is not told any more, and is to get nothing of what it was told had failed.
            waiting = feed.on_started.get(key, [])
            if tell in waiting:
                waiting.remove(tell)
            if not waiting:
                feed.on_started.pop(key, None)
                feed.down(subscriber, key)
            raise
        feed.on_subscribers(key)

    async def _subscribe_persistent(
        self,
        store: Atom,
        name: bytes,
        spec: Spec,
        options: Mapping[Term, Term],
        subscriber: Pid,
        passed_on: bool,
        *,
        taken_over: bool = False,
    ) -> None:
        while True:
            removing = self._removing.get((store, name))
            if removing is not None:
                # It begins anew, when nothing is left of it.
                await asyncio.wait({removing})
                continue
            owned = self._owned.get((store, name))
            if owned is not None:
                await _outcome(owned.ready)
                if self._owned.get((store, name)) is owned:
                    await self._join(store, name, spec, subscriber, None, options)
                    return
                continue
            owner = self._elsewhere(store, name)
            if owner is not None:
                if passed_on or taken_over:
                    raise _Refused(not_found(name))
                if await self._subscribe_elsewhere(owner, store, name, spec, options):
                    return
            elif await self._own(store, name, spec, options, subscriber, taken_over=taken_over):
                return
            await asyncio.sleep(TRY_AGAIN_S)

    async def _subscribe_elsewhere(
        self, owner: Pid, store: Atom, name: bytes, spec: Spec, options: Mapping[Term, Term]
    ) -> bool:
        term = (Atom("subscribe"), store, spec.kind, spec.selector, name, options)
        try:
            reply = await call(self._service.node, owner, (SUBSCRIPTION, term), timeout_s=SUBSCRIBE_TIMEOUT_S)
        except CallError:
            return False
        if reply[0] is schema.OK:
            return True
        if reply[1] == not_found(name):
            return False
        raise _Refused(reply[1])

    async def _own(
        self,
        store: Atom,
        name: bytes,
        spec: Spec,
        options: Mapping[Term, Term],
        subscriber: Pid,
        *,
        taken_over: bool,
    ) -> bool:
        """Get the name and start the subscription; False if another gateway has got it."""
        loop = asyncio.get_running_loop()
        feed = self.feed(store)
        first = spec.start if isinstance(spec.start, int) else 0
        writer = self._service.node.name
        saved = SavedState(feed.snapshots, name, spec.kind, spec.selector, first, writer=writer)
        problem = saved.problem()
        if problem is not None:
            raise _Refused(problem.reason)
        kept = {key: value for key, value in options.items() if key not in (_SUBSCRIBER, _RESUME)}
        owned = _Owned(store, name, spec, kept, loop.create_future())
        self._owned[store, name] = owned
        try:
            async with feed.beginning:
                registered = await self._register(owned, subscriber)
            if not registered:
                self._forget(owned)
                return False
            positions = await self._load(saved, store)
            until = loop.time() + STALE_S
            while taken_over and positions is None and loop.time() < until:
                # Where no member of the store can say that it has everything, it may come yet.
                await asyncio.sleep(TRY_AGAIN_S)
                positions = await self._load(saved, store)
            if positions is None:
                self._save_record(owned, first)
                if spec.start is not Start.NOW and not await saved.save({}):
                    refusal = self._service.write_refusal(store)
                    raise _Refused(refusal or schema.storage_failed("the store did not save the subscription"))
            else:
                # It goes on where it was to begin, whatever who comes back says.
                spec = replace(spec, start=saved.start)
            if self._owned.get((store, name)) is not owned:
                # Another gateway has got the name meanwhile.
                return False
            feed.saved[name] = saved
            self._listen(owned)
            await self._join(store, name, spec, subscriber, positions, options)
        except ValueError as problem_found:
            self._unregister(owned)
            self._forget(owned)
            raise _Refused(refused(str(problem_found))) from None
        except BaseException as problem_found:
            if isinstance(problem_found, _Refused) and self._owned.get((store, name)) is not owned:
                # Another gateway has got the name before it had started (`lost`).
                return False
            feed.remove(name)
            self._unregister(owned)
            self._forget(owned)
            raise
        if not owned.ready.done():
            owned.ready.set_result(None)
        if saved.has_others:
            # Not all at once: who takes over one subscription often takes over many.
            loop.call_later(ABSORB_S * random.uniform(1, 2), lambda: self._spawn(self._absorb(owned, saved)))
        log.info("subscription_owned", store=str(store), subscription=name.decode(), taken_over=taken_over)
        return True

    async def _load(self, saved: SavedState, store: Atom) -> dict[bytes, int] | None:
        """As `SavedState.load`; where the store cannot say, for want of a majority, that is the reason."""
        try:
            return await saved.load()
        except Unreadable:
            refusal = self._service.write_refusal(store)
            if refusal is None:
                raise
            raise _Refused(refusal) from None

    async def _absorb(self, owned: _Owned, saved: SavedState) -> None:
        while self._owned.get((owned.store, owned.name)) is owned and not self._stopping:
            with suppress(Unreadable):
                if await saved.absorb():
                    return
            await asyncio.sleep(SAVE_AGAIN_S)

    def _store_lost(self, store: Atom, key: Key) -> None:
        """The store has lost events: it may have lost what is saved of this subscription too."""
        owned = self._owned.get((store, key)) if type(key) is bytes else None
        if owned is not None:
            self._spawn(self._save_again(owned))

    async def _save_again(self, owned: _Owned) -> None:
        feed, store = self.feed(owned.store), owned.store
        until = asyncio.get_running_loop().time() + TAKE_OVER_S
        while self._owned.get((store, owned.name)) is owned and asyncio.get_running_loop().time() < until:
            saved = feed.saved.get(owned.name)
            listed = await feed.reads.reply(schema.store_request("get_subscriptions", store))
            if saved is not None and listed[0] is schema.OK and await saved.save({}):
                names = {_name_in(record) for record in listed[1].values()}
                if owned.name not in names:
                    self._save_record(owned, saved.start)
                return
            await asyncio.sleep(SAVE_AGAIN_S)

    def _save_record(self, owned: _Owned, first: int) -> None:
        """Have the store keep the subscription as it keeps its own."""
        record = schema.Subscription(owned.spec.kind, owned.spec.selector, owned.name.decode(), first)
        self._service.cast(schema.save_subscription_cast(owned.store, record), _ignore)

    def _listen(self, owned: _Owned) -> None:
        """The store's emitters, where there are any, broadcast the events of a saved subscription on a topic of its
        own: hints."""
        if self._pubsub is not None:
            with suppress(ValueError):  # such a topic cannot be
                owned.listen_no_more = self._pubsub[self._events_server].subscribe(
                    subscription_topic(owned.store, owned.spec.kind, owned.spec.selector, owned.name),
                    lambda _, message: self._heard_events(owned.store, message),
                )

    async def _register(self, owned: _Owned, subscriber: Pid) -> bool:
        server = owned.server = Owner(self, owned)
        spawn_server(self._service.node, server)
        if self._swarm is None:
            return True
        answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        owned.told = [subscriber]
        meta = {SUBSCRIPTION: self._properties(owned)}
        self._swarm.ask(
            Track(owned.swarm_name, server.pid, meta),
            lambda reply: None if answered.done() else answered.set_result(reply),
        )
        reply = await answered
        if reply[0] is schema.OK:
            owned.since = asyncio.get_running_loop().time()
            return True
        other = registered_elsewhere(reply[1])
        if other is None:
            log.warning("subscription_not_registered", subscription=str(owned.name), reason=repr(reply))
        return False

    def _properties(self, owned: _Owned) -> Term:
        return {
            _TYPE: owned.spec.kind,
            _SELECTOR: owned.spec.selector,
            _OPTIONS: owned.options,
            _SUBSCRIBERS: list(owned.told),
        }

    def _subscribers_changed(self, store: Atom, key: Key) -> None:
        owned = self._owned.get((store, key)) if type(key) is bytes else None
        if owned is None or owned.server is None or self._swarm is None or self._stopping:
            return
        now = [each for each in self.feed(store).subscribers(key) if isinstance(each, Pid)]
        if now != owned.told:
            owned.told = now
            self._swarm.ask(AddMeta(SUBSCRIPTION, self._properties(owned), owned.server.pid), _ignore)

    def _unregister(self, owned: _Owned, *, to_others: bool = False) -> None:
        """Free the name. Who looks at its properties finds nobody to take it over for, unless it goes `to_others`."""
        if self._swarm is not None and self._has_name(owned):
            if not (to_others or self._stopping):
                self._nobody_takes_over(owned)
            self._swarm.ask(UntrackName(owned.swarm_name), _ignore)

    def _has_name(self, owned: _Owned) -> bool:
        server = owned.server
        return (
            self._swarm is not None
            and server is not None
            and server.process.alive
            and self._swarm.whereis(owned.swarm_name) == server.pid
        )

    def _nobody_takes_over(self, owned: _Owned) -> None:
        """Nor will they when this gateway goes: it has no subscribers any more."""
        if owned.told and self._swarm is not None and owned.server is not None and self._has_name(owned):
            owned.told = []
            self._swarm.ask(AddMeta(SUBSCRIPTION, self._properties(owned), owned.server.pid), _ignore)

    def _forget(self, owned: _Owned) -> None:
        owned.listen_no_more()
        if self._owned.get((owned.store, owned.name)) is owned:
            del self._owned[owned.store, owned.name]
            self.feed(owned.store).saved.pop(owned.name, None)
        if not owned.ready.done():
            owned.ready.set_result(None)
        if owned.server is not None and owned.server.process.alive:
            owned.server.process.exit(SHUTDOWN)

    # Changing hands

    def _elsewhere(self, store: Atom, name: bytes) -> Pid | None:
        """The process of a subscription that runs in another gateway."""
        pid = None if self._swarm is None else self._swarm.whereis((SUBSCRIPTION, store, name))
        return pid if pid is not None and pid.node is not self._service.node.name else None

    def _name_changed(self, name: Term, old: Entry | None, new: Entry | None) -> None:
        if new is not None or old is None or self._stopping or old.pid.node is self._service.node.name:
            return
        properties = old.meta.get(SUBSCRIPTION)
        if type(name) is tuple and len(name) == 3 and isinstance(properties, Mapping):
            for subscriber in properties.get(_SUBSCRIBERS, ()):
                self._moving[name[1], name[2]] += 1
                self._spawn(self._take_over(name[1], name[2], properties, subscriber))

    async def _take_over(self, store: Atom, name: bytes, properties: Mapping[Term, Term], subscriber: Pid) -> None:
        try:
            options = properties[_OPTIONS]
            spec = _spec(properties[_TYPE], properties[_SELECTOR], options, persistent=True)
            await self._keep_trying(store, name, spec, options, subscriber, taken_over=True)
        finally:
            self._moved(store, name)

    def _moved(self, store: Atom, name: bytes) -> None:
        self._moving[store, name] -= 1
        if not self._moving[store, name]:
            del self._moving[store, name]

    async def _keep_trying(
        self,
        store: Atom,
        name: bytes,
        spec: Spec,
        options: Mapping[Term, Term],
        subscriber: Pid,
        *,
        taken_over: bool,
    ) -> None:
        """Subscribe for somebody who has subscribed already, here or wherever the subscription runs now."""
        with_subscriber = {**options, _SUBSCRIBER: subscriber, _RESUME: False}
        until = asyncio.get_running_loop().time() + TAKE_OVER_S
        while not self._stopping and asyncio.get_running_loop().time() < until:
            reason: Term
            try:
                await self._subscribe_persistent(
                    store, name, spec, with_subscriber, subscriber, False, taken_over=taken_over
                )
                return
            except _Refused as problem:
                reason = problem.reason
                if reason == not_found(name):
                    return  # another gateway has it
                if type(reason) is not tuple or reason[0] not in (schema.STORAGE_FAILED, schema.NO_QUORUM):
                    log.warning("take_over_refused", subscription=name.decode(), reason=repr(reason))
                    return
            except Unreadable as problem:
                reason = problem.args[0]
            log.warning("take_over_delayed", subscription=name.decode(), reason=repr(reason)[:200])
            await asyncio.sleep(TRY_AGAIN_S)
        if not self._stopping:
            log.error("take_over_given_up", subscription=name.decode(), pid=str(subscriber))

    def suspect(self, node: Atom) -> None:
        """A node does not answer: if it is a gateway with subscriptions it counts as gone."""
        if self._swarm is None or self._stopping:
            return
        if any(entry.pid.node is node for entry in self._swarm.registry.starting_with(SUBSCRIPTION)):
            log.warning("silent_gateway_disconnected", peer=str(node))
            self._service.node.disconnect(node)

    def _look_at_clock(self, last: float) -> None:
        if self._stopping:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - last >= AWAY_S and self._owned:
            log.warning("gateway_was_away", seconds=round(now - last, 1), subscriptions=len(self._owned))
            for owned in list(self._owned.values()):
                if owned.ready.done():
                    self._moving[owned.store, owned.name] += 1
                    self._spawn(self._own_again(owned))
        self._beat = loop.call_later(BEAT_S, self._look_at_clock, now)

    def _name_kept(self, name: Term, pid: Pid) -> None:
        if self._stopping or type(name) is not tuple or len(name) != 3 or name[0] is not SUBSCRIPTION:
            return
        owned = self._owned.get((name[1], name[2]))
        if owned is None or owned.server is None or owned.server.pid != pid or not owned.ready.done():
            return
        if asyncio.get_running_loop().time() - owned.since >= TOGETHER_S:
            log.warning("subscription_had_two_owners", store=str(owned.store), subscription=owned.name.decode())
            self._moving[owned.store, owned.name] += 1
            self._spawn(self._own_again(owned))

    async def _own_again(self, owned: _Owned) -> None:
        """Another gateway may have taken it over, and be ahead of what is known here."""
        try:
            feed = self.feed(owned.store)
            subscribers = [each for each in feed.subscribers(owned.name) if isinstance(each, Pid)]
            await self._give_away(owned)
            await self._keep_trying_all(owned, subscribers)
        finally:
            self._moved(owned.store, owned.name)

    def lost(self, owned: _Owned) -> None:
        """Another gateway has the name now: our subscribers go there."""
        if self._owned.get((owned.store, owned.name)) is not owned:
            return
        feed = self.feed(owned.store)
        subscribers = [each for each in feed.subscribers(owned.name) if isinstance(each, Pid)]
        saved = feed.saved.get(owned.name)
        feed.release(owned.name)
        self._forget(owned)
        self._moving[owned.store, owned.name] += 1
        self._spawn(self._move(owned, saved, subscribers))

    async def _move(self, owned: _Owned, saved: SavedState | None, subscribers: Sequence[Pid]) -> None:
        try:
            await _flushed(saved)
            await self._keep_trying_all(owned, subscribers)
        finally:
            self._moved(owned.store, owned.name)

    async def _keep_trying_all(self, owned: _Owned, subscribers: Sequence[Pid]) -> None:
        await asyncio.gather(
            *(
                self._keep_trying(owned.store, owned.name, owned.spec, owned.options, subscriber, taken_over=False)
                for subscriber in subscribers
            )
        )

    async def _give_away(self, owned: _Owned) -> None:
        feed = self.feed(owned.store)
        saved = feed.saved.get(owned.name)
        if owned.ready.done():
            # Who asks for it waits until it is forgotten: joined now it would begin anew.
            owned.ready = asyncio.get_running_loop().create_future()
        feed.release(owned.name)
        await _flushed(saved)
        self._unregister(owned, to_others=True)
        self._forget(owned)

    async def _remove(self, request: Request, passed_on: bool, before: asyncio.Task[None] | None) -> None:
        """`before`: an earlier removal of the same name that is not over."""
        if before is not None:
            await asyncio.wait({before})
        _, store, kind, selector, name = request.term
        try:
            identity = compile_selector(kind, selector).identity
        except SelectorError:
            return
        feed = self._feeds.get(store)
        if name == schema.TRANSIENT:
            for key in [] if feed is None else feed.keys():
                if feed is not None and type(key) is tuple and key[1:] == identity:
                    feed.remove(key)
            return
        while (owned := self._owned.get((store, name))) is not None and not owned.ready.done():
            await _outcome(owned.ready)
        if owned is None:
            owner = None if passed_on else self._elsewhere(store, name)
            if owner is not None:
                cast(self._service.node, owner, (SUBSCRIPTION, request.term))
                return
            try:
                await self._must_know(store)
            except _Refused:
                return
            saved = self._state(store, name, kind, selector)
        else:
            if compile_selector(owned.spec.kind, owned.spec.selector).identity != identity:
                return
            saved = self.feed(store).saved.get(name) or self._state(store, name, kind, selector)
            async with self.feed(store).ending:
                self.feed(store).remove(name)
                self._nobody_takes_over(owned)
        await self._remove_saved(store, saved)
        if owned is not None:
            # Not before: who subscribes in another gateway is to find nothing of it.
            self._unregister(owned)
            self._forget(owned)

    async def _remove_saved(self, store: Atom, saved: SavedState) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + TAKE_OVER_S
        while True:
            reason: Term = None
            try:
                async with self.feed(store).ending:
                    if await saved.remove():
                        return
            except ValueError:
                return  # what is saved belongs to another selector
            except Unreadable as problem:
                reason = problem.args[0]
            if loop.time() >= until:
                log.error("checkpoint_not_removed", subscription=saved.name.decode(), reason=repr(reason)[:200])
                return
            await asyncio.sleep(SAVE_AGAIN_S)

    def _removed(self, key: tuple[Atom, bytes], task: asyncio.Task[None]) -> None:
        if self._removing.get(key) is task:
            del self._removing[key]

    async def _pass_on(self, request: Request, passed_on: bool) -> Term:
        name = request.term[2]
        owner = None if passed_on else self._elsewhere(request.term[1], name)
        if owner is None:
            raise _Refused(not_found(name))
        try:
            reply: Term = await call(
                self._service.node, owner, (SUBSCRIPTION, request.term), timeout_s=SUBSCRIBE_TIMEOUT_S
            )
        except CallError as error:
            raise _Refused(schema.worker_died(error.reason)) from None
        return reply

    def _state(self, store: Atom, name: bytes, kind: Atom = schema.ANY, selector: Term = None) -> SavedState:
        return SavedState(self.feed(store).snapshots, name, kind, selector, writer=self._service.node.name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("subscriptions_failed", error=described(error))


async def _flushed(saved: SavedState | None) -> None:
    """Wait for the last checkpoint, but not for ever: who takes over repeats what is not in it."""
    if saved is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GIVE_AWAY_S):
                await saved.flushed()


async def _outcome(ready: asyncio.Future[None]) -> None:
    """Wait for a future that others wait for too: giving up must not end it."""
    await asyncio.shield(ready)


def _place_of(event: Mapping[Term, Term]) -> ParkedPlace:
    return parked_place(event[schema.EVENT_STREAM_ID], event[schema.EVENT_NUMBER])


def _name_in(record: Term) -> Term:
    return record.get(_SUBSCRIPTION_NAME) if isinstance(record, Mapping) else None


def _spec(kind: Atom, selector: Term, options: Mapping[Term, Term], *, persistent: bool) -> Spec:
    start = options.get(_START_FROM, 0)
    given = {name: options[Atom(name)] for name in _NUMBERS if Atom(name) in options}
    timeout_ms = options.get(Atom("ack_timeout_ms"))
    if timeout_ms is not None:
        given["ack_timeout_s"] = timeout_ms / 1000
    strategy = options.get(Atom("strategy"))
    try:
        if strategy is not None:
            given["strategy"] = Strategy(str(strategy))
        made = Options(auto_ack=options.get(_AUTO_ACK, False) is True, **given)
    except ValueError as problem:
        raise _Refused(schema.invalid_request(f"subscribe: {problem}")) from None
    return Spec(kind, selector, Start.NOW if start is _NOW else start, persistent, made)


def _status_term(status: p.Status, owner: Pid) -> Term:
    return {
        Atom("name"): status.key,
        _TYPE: status.kind,
        _SELECTOR: status.selector,
        Atom("state"): Atom(status.state),
        Atom("node"): owner.node,
        Atom("pid"): owner,
        _SUBSCRIBERS: status.subscribers,
        Atom("in_flight"): status.in_flight,
        Atom("buffered"): status.buffered,
        Atom("streams_behind"): status.streams_behind,
        Atom("parking"): status.parking,
        Atom("unsaved_streams"): status.unsaved_streams,
    }


def _ignore(_: object) -> None:
    return None
