"""Subscriptions through a running gateway with an embedded store: kinds, replay, acknowledgement, resumption."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    STORE,
    Ask,
    Cluster,
    Held,
    Worker,
    caller_node,
    connected,
    function_door,
    gateway,
    made_anew,
    open_cluster,
    tell_server,
)
from node_kit import COOKIE, wait_until
from structlog.testing import capture_logs
from test_backlog import unread_peer

from gater import Gateway, RequestFailed, StoreNotFound
from gater.api import schema
from gater.api.schema import BY_EVENT_PATTERN, BY_EVENT_PAYLOAD, BY_EVENT_TYPE, BY_STREAM, NewEvent, RecordedEvent
from gater.api.server import API_MODULE
from gater.api.subscriptions.client import EventSubscription, Handler
from gater.api.subscriptions.door import SUBSCRIPTION
from gater.api.subscriptions.protocol import Hint, Input
from gater.api.subscriptions.reads import StoreReads
from gater.api.subscriptions.saved import SavedState
from gater.erl import NodeOptions
from gater.erl.connection import BUSY_BYTES
from gater.erl.gen_server import Caller, cast
from gater.erl.node import Node
from gater.erl.peers import Peers
from gater.erl.process import CallbackReceiver, Process
from gater.erl.terms import Atom, Pid, Term
from gater.pubsub.messages import Broadcast
from gater.store import EmbeddedStores
from gater.system import System

OK = schema.OK
ERROR = schema.ERROR


@dataclass
class Subscriber:
    """A process that keeps the events it gets."""

    process: Process
    events: list[Any] = field(default_factory=list)

    @property
    def pid(self) -> Pid:
        return self.process.pid

    @property
    def seen(self) -> list[tuple[bytes, int]]:
        return [(event[schema.EVENT_STREAM_ID], event[schema.EVENT_NUMBER]) for event in self.events]

    async def has(self, count: int) -> None:
        await wait_until(lambda: len(self.events) >= count, f"{count} events, has {len(self.events)}")

    def die(self) -> None:
        self.process.exit(Atom("killed"))


def subscriber(node: Node) -> Subscriber:
    events: list[Any] = []

    def handle(message: Term) -> None:
        assert message[0] is Atom("events")
        events.extend(message[1])

    return Subscriber(node.spawn_receiver(CallbackReceiver(handle)), events)


@dataclass
class House:
    system: System
    caller: Node
    ask: Ask

    async def append(self, stream: bytes, *types: str, data: Term = None) -> None:
        events = [NewEvent(kind, {} if data is None else data).to_term() for kind in types]
        reply = await self.ask("append_events", STORE, stream, events)
        assert reply[0] is OK

    async def subscribe(self, who: Subscriber, kind: Atom, selector: Term, name: bytes, **options: Any) -> Term:
        given = {Atom(key): value for key, value in options.items()} | {Atom("subscriber"): who.pid}
        return await self.ask("subscribe", STORE, kind, selector, name, given)


@asynccontextmanager
async def open_house(directory: Path, **settings: Any) -> AsyncIterator[House]:
    async with (
        gateway(embedded=directory / "store", **settings) as system,
        caller_node(system.settings.epmd_port) as caller,
    ):
        yield House(system, caller, function_door(caller, system))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at again or saved after a second is so after a tenth."""
    monkeypatch.setattr("gater.api.subscriptions.shell.LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr("gater.api.subscriptions.checkpoints.SAVE_AFTER_S", 0.1)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as opened:
        yield opened


async def test_a_node_that_reads_nothing_is_sent_so_much_ahead_and_no_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.shell.AHEAD_BYTES", 2 * BUSY_BYTES)
    size = 200_000
    lazy = await unread_peer(house.system.node)
    me = subscriber(house.caller)
    for name, pid in (b"lazy", lazy.pid), (b"me", me.pid):
        options = {Atom("subscriber"): pid, Atom("auto_ack"): True}
        assert await house.ask("subscribe", STORE, BY_STREAM, b"$all", name, options) == (OK, name)
    connection = house.system.node.peers.table[lazy.name]
    most = 0
    for number in range(40):
        await house.append(b"s", "large", data=bytes(size))
        await me.has(number + 1)
        most = max(most, connection.backlog)
    assert 2 * BUSY_BYTES < most < 2 * BUSY_BYTES + 2 * size
    lazy.writer.close()


async def test_one_line_of_the_original_gives_what_was_and_what_comes(house: House) -> None:
    await house.append(b"a", "x", "y")
    me = subscriber(house.caller)
    assert await house.ask("save_subscription", STORE, BY_STREAM, b"$a", b"mine", 0, me.pid) is OK
    await me.has(2)
    await house.append(b"b", "z")
    await house.append(b"a", "z")
    await me.has(3)
    assert me.seen == [(b"a", 0), (b"a", 1), (b"a", 2)]
    _, saved = await house.ask("get_subscriptions", STORE)
    assert b"mine" in [each[Atom("subscription_name")] for each in saved.values()]


@pytest.mark.parametrize("name", [b"transient", b"kept"])
@pytest.mark.parametrize(
    ("kind", "selector", "wanted"),
    [
        (BY_STREAM, b"$all", [(b"a", 0), (b"b", 0), (b"a", 1), (b"b", 1)]),
        (BY_STREAM, b"$b", [(b"b", 0), (b"b", 1)]),
        (BY_EVENT_TYPE, b"paid", [(b"a", 0), (b"a", 1)]),
        (BY_EVENT_PATTERN, {Atom("event_type"): b"sent"}, [(b"b", 0), (b"b", 1)]),
        (BY_EVENT_PAYLOAD, {Atom("to"): {b"city": b"Ulm"}}, [(b"b", 0), (b"b", 1)]),
    ],
)
async def test_every_kind_replays_and_goes_on_live(
    house: House, kind: Atom, selector: Term, wanted: list[tuple[bytes, int]], name: bytes
) -> None:
    me = subscriber(house.caller)
    for turn in range(2):
        await house.append(b"a", "paid", data={Atom("to"): {b"city": b"Bonn"}})
        await house.append(b"b", "sent", data={Atom("to"): {b"city": b"Ulm", b"zip": 89073}})
        if turn == 0:
            assert await house.subscribe(me, kind, selector, name, auto_ack=True) == (OK, name)
            await me.has(len(wanted) // 2)
    await me.has(len(wanted))
    # Of what comes live each stream has its order.
    replayed = len(wanted) // 2
    assert (me.seen[:replayed], sorted(me.seen[replayed:])) == (wanted[:replayed], sorted(wanted[replayed:]))


async def test_nothing_is_missed_or_doubled_between_replay_and_live(house: House) -> None:
    for _ in range(20):
        await house.append(b"s", *["e"] * 50)
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p", auto_ack=True, batch_size=10))[0] is OK
    for _ in range(20):
        await house.append(b"s", *["e"] * 5)
    await me.has(1100)
    assert me.seen == [(b"s", number) for number in range(1100)]


async def test_from_now_on_and_from_a_version(house: House) -> None:
    await house.append(b"s", "a", "b", "c")
    now, later = subscriber(house.caller), subscriber(house.caller)
    assert (await house.subscribe(now, BY_STREAM, b"$s", b"now", start_from=Atom("now")))[0] is OK
    assert (await house.subscribe(later, BY_STREAM, b"$s", b"later", start_from=2))[0] is OK
    await house.append(b"s", "d")
    await now.has(1)
    await later.has(2)
    assert now.seen == [(b"s", 3)]
    assert later.seen == [(b"s", 2), (b"s", 3)]


async def test_who_died_comes_back_under_the_same_name_and_goes_on_where_it_stopped(house: House) -> None:
    await house.append(b"s", "a", "b", "c")
    first = subscriber(house.caller)
    assert (await house.subscribe(first, BY_STREAM, b"$s", b"p"))[0] is OK
    await first.has(3)
    for event in first.events[:2]:
        assert await house.ask("ack_event", STORE, b"p", first.pid, event) is OK
    first.die()
    await house.append(b"s", "d")
    second = subscriber(house.caller)
    assert (await house.subscribe(second, BY_STREAM, b"$s", b"p"))[0] is OK
    await second.has(2)
    assert second.seen == [(b"s", 2), (b"s", 3)]


async def test_what_was_acknowledged_with_the_last_breath_does_not_come_again(house: House) -> None:
    await house.append(b"s", "a", "b", "c")
    first = subscriber(house.caller)
    assert (await house.subscribe(first, BY_STREAM, b"$s", b"p"))[0] is OK
    await first.has(3)
    for event in first.events[:2]:
        cast(
            house.caller, (Atom(API_MODULE), house.system.node.name), (Atom("ack_event"), STORE, b"p", first.pid, event)
        )
    first.die()
    second = subscriber(house.caller)
    assert (await house.subscribe(second, BY_STREAM, b"$s", b"p"))[0] is OK
    await second.has(1)
    assert second.seen == [(b"s", 2)]


async def test_what_waits_to_be_saved_is_not_saved_once_the_subscription_is_removed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.shell.ARRIVE_S", 0.5)
    await house.append(b"s", "a", "b")
    first = subscriber(house.caller)
    assert (await house.subscribe(first, BY_STREAM, b"$s", b"p", auto_ack=True))[0] is OK
    await first.has(2)
    feed = house.system.subscriptions.feed(STORE)
    await wait_until(lambda: bool(feed._saves), "a checkpoint that waits")
    assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$s", b"p") is OK
    await wait_until(lambda: b"p" not in feed, "the subscription to be gone")
    await feed.settled()
    second = subscriber(house.caller)
    assert (await house.subscribe(second, BY_STREAM, b"$s", b"p"))[0] is OK
    await second.has(2)
    assert second.seen == [(b"s", 0), (b"s", 1)]


@asynccontextmanager
async def house_of_a_cluster(directory: Path) -> AsyncIterator[tuple[Cluster, House]]:
    """With a persistent subscription `p` that has acknowledged the two events of `s`, and has saved that."""
    async with (
        open_cluster(directory, khepri=True) as cluster,
        gateway(cluster) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        house = House(system, caller, function_door(caller, system))
        me = subscriber(caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a", "b")
        await me.has(2)
        for event in me.events:
            assert await house.ask("ack_event", STORE, b"p", me.pid, event) is OK

        async def saved() -> bool:
            return 2 in [record[Atom("positions")].get(b"s") for record in (await checkpoints(cluster)).values()]

        await wait_until(saved, "the checkpoint")
        yield cluster, house


async def checkpoints(cluster: Cluster) -> Any:
    _, found = await cluster.ask(("list_snapshots", STORE, b"gater.checkpoint", b"p"))
    return found


async def test_what_could_not_be_removed_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.SAVE_AGAIN_S", 0.1)
    async with house_of_a_cluster(tmp_path) as (cluster, house):
        cluster.fence_answer = schema.error(Atom("timeout"))
        before = len(cluster.fenced)
        assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$all", b"p") is OK
        await wait_until(lambda: len(cluster.fenced) > before + 1, "it to have been tried")
        assert await checkpoints(cluster)
        cluster.fence_answer = schema.OK
        await wait_until(lambda: not house.system.subscriptions._owned, "the subscription to be gone")
        assert not await checkpoints(cluster)


async def test_who_subscribes_while_a_subscription_is_removed_begins_anew(tmp_path: Path) -> None:
    async with house_of_a_cluster(tmp_path) as (cluster, house):
        held = Held()
        cluster.next(held, "list_snapshots")
        assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$all", b"p") is OK
        await held.arrived()
        me = subscriber(house.caller)
        subscribing = asyncio.create_task(house.subscribe(me, BY_STREAM, b"$all", b"p"))
        tasks = house.system.subscriptions._tasks
        await wait_until(lambda: subscribing.done() or len(tasks) > 1, "the request to be under way")
        held.release()
        assert await subscribing == (OK, b"p")
        await me.has(2)
        assert me.seen == [(b"s", 0), (b"s", 1)]


async def test_a_gateway_that_stops_has_removed_what_it_was_told_to(tmp_path: Path) -> None:
    async with house_of_a_cluster(tmp_path) as (cluster, house):
        held = Held()
        cluster.next(held, "list_snapshots")
        assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$all", b"p") is OK
        await held.arrived()
        stopping = asyncio.create_task(house.system.subscriptions.stop())
        await wait_until(lambda: house.system.subscriptions._stopping, "the gateway to be stopping")
        held.release()
        await stopping
        assert not await checkpoints(cluster)


async def test_subscriptions_that_begin_together_take_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.subscriptions.shell.AT_ONCE", 2)
    door = house.system.subscriptions
    register, registering, most = door._register, 0, 0

    async def counted(owned: Any, subscriber: Pid) -> bool:
        nonlocal registering, most
        registering += 1
        most = max(most, registering)
        try:
            return await register(owned, subscriber)
        finally:
            registering -= 1

    monkeypatch.setattr(door, "_register", counted)
    names = [b"p%d" % number for number in range(10)]
    replies = await asyncio.gather(
        *(house.subscribe(subscriber(house.caller), BY_STREAM, b"$all", name) for name in names)
    )
    assert replies == [(OK, name) for name in names]
    assert most == 2


async def test_a_persistent_subscription_goes_on_after_a_restart_of_the_gateway(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        await house.append(b"s", "a", "b")
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await me.has(2)
        assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[0]) is OK
    async with open_house(tmp_path) as house:
        await house.append(b"s", "c")
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await me.has(2)
        assert me.seen == [(b"s", 1), (b"s", 2)]
        other = await house.subscribe(me, BY_STREAM, b"$s", b"p")
        assert other[0] is ERROR


@pytest.mark.parametrize(("first", "then"), [(2, 0), (0, 2), (0, Atom("now"))])
async def test_who_comes_back_does_not_choose_anew_where_it_begins(tmp_path: Path, first: int, then: Term) -> None:
    async with open_house(tmp_path) as house:
        await house.append(b"s", "a", "b", "c", "d")
        reply = await house.subscribe(subscriber(house.caller), BY_STREAM, b"$all", b"p", start_from=first)
        assert reply == (OK, b"p")
    async with open_house(tmp_path) as house:
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p", start_from=then))[0] is OK
        await me.has(4 - first)
        assert me.seen == [(b"s", number) for number in range(first, 4)]


async def test_an_embedded_store_that_was_made_anew_is_delivered_from_its_beginning(
    house: House, tmp_path: Path
) -> None:
    service = house.system.service
    assert isinstance(service.embedded, EmbeddedStores)

    async def make_anew() -> None:
        assert isinstance(service.embedded, EmbeddedStores)
        service.embedded = await made_anew(service.embedded, tmp_path / "anew")

    try:
        await check_made_anew(house, make_anew, service.embedded)
    finally:
        await service.embedded.close()


@pytest.mark.parametrize("khepri", [True, False])
async def test_a_store_that_was_made_anew_is_delivered_from_its_beginning(
    tmp_path: Path, khepri: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.poll.BLIND_S", 0.1)
    monkeypatch.setattr("gater.api.subscriptions.reads.CONFIRM_S", 0.1)
    async with (
        open_cluster(tmp_path, nodes=2, khepri=khepri) as cluster,
        gateway(cluster) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        house = House(system, caller, function_door(caller, system))
        await check_made_anew(house, lambda: cluster.make_anew(tmp_path / "anew"), cluster.stores if khepri else None)


async def check_made_anew(
    house: House, make_anew: Callable[[], Awaitable[None]], indexed: EmbeddedStores | None
) -> None:
    """`indexed` tells its index: then streams that have as many events as before are known to be others."""
    me, transient = subscriber(house.caller), subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$all", b"p", auto_ack=True))[0] is OK
    assert (await house.subscribe(transient, BY_STREAM, b"$s", b"transient", auto_ack=True))[0] is OK
    for number in range(4):
        await house.append(b"s", "old")
        await house.append(b"t%d" % number, "old")
    await me.has(8)
    await transient.has(4)
    new = {b"s": 2}
    if indexed is not None:
        new[b"t0"] = 1
        feed = house.system.subscriptions.feed(STORE)._feed
        await wait_until(lambda: feed._highest_index == indexed.committed(STORE), "the index to have been read")
    await make_anew()
    for stream, count in new.items():
        await house.append(stream, *["new"] * count)
    await me.has(8 + sum(new.values()))
    assert sorted(me.seen[8:]) == [(stream, number) for stream in new for number in range(new[stream])]
    await transient.has(6)
    assert transient.seen[4:] == [(b"s", 0), (b"s", 1)]

    async def kept() -> bool:
        _, records = await house.ask("get_subscriptions", STORE)
        _, snapshots = await house.ask("list_snapshots", STORE, b"gater.checkpoint", b"p")
        positions = [record[Atom("positions")] for record in snapshots.values()]
        named = [each[Atom("subscription_name")] for each in records.values()]
        return b"p" in named and bool(positions) and positions[0] == dict.fromkeys(positions[0], 0) | new

    await wait_until(kept, "record and checkpoint to be saved again")


async def test_a_subscription_goes_on_when_the_process_that_stands_for_it_dies(house: House) -> None:
    await house.append(b"s", "a")
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$all", b"p", auto_ack=True))[0] is OK
    await me.has(1)
    name = (SUBSCRIPTION, STORE, b"p")
    owner = house.system.swarm.whereis(name)
    assert owner is not None
    _, status = await house.ask("subscription_status", STORE, b"p")
    assert (status[Atom("pid")], status[Atom("node")]) == (owner, owner.node)
    process = house.system.node.process(owner)
    assert process is not None
    process.exit(Atom("crashed"))
    await house.append(b"s", "b")
    await me.has(2)
    await wait_until(lambda: house.system.swarm.whereis(name) not in (None, owner), "the name to be registered again")
    await house.append(b"s", "c")
    await wait_until(lambda: (b"s", 2) in me.seen, "the event appended after that")
    assert sorted(set(me.seen)) == [(b"s", 0), (b"s", 1), (b"s", 2)]


async def test_the_server_for_events_has_the_name_of_the_setting(tmp_path: Path) -> None:
    async with open_house(tmp_path, pub_sub="my_events", secret_key_base="key") as house:
        heard: list[Term] = []
        for name in ("ex_esdb_health", "my_events"):
            server = house.system.pubsub[name]
            server.subscribe("t", lambda _, message: heard.append(message))
            server.heard(Broadcast(b"t", Atom(name), None))
        # Only what is signed is heard on the others.
        assert heard == [Atom("my_events")]
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        assert house.system.node.whereis("Elixir.my_events.Adapter") is not None
        # The gateways' own topic, and those of the stores' emitters.
        assert house.system.pubsub["my_events"].subscriptions == 1 + 3
        assert house.system.pubsub["ex_esdb_events"].subscriptions == 0


@pytest.mark.parametrize(
    ("kind", "selector", "topic"),
    [
        (BY_STREAM, b"$s", "$p"),
        (BY_EVENT_TYPE, b"x", "*p-x"),
        (BY_EVENT_PATTERN, {Atom("a"): 1}, "evt-pat-p-38DB2BE"),
        (BY_EVENT_PAYLOAD, {Atom("a"): 1}, "evt-pay-p-38DB2BE"),
    ],
)
async def test_the_emitters_of_a_saved_subscription_are_hints(
    house: House, kind: Atom, selector: Term, topic: str
) -> None:
    me = subscriber(house.caller)
    assert (await house.subscribe(me, kind, selector, b"p"))[0] is OK
    feed, server = house.system.subscriptions.feed(STORE), house.system.pubsub["ex_esdb_events"]
    given: list[Input] = []
    feed.give = lambda *inputs: given.extend(inputs)  # type: ignore[method-assign]
    record = {schema.EVENT_STREAM_ID: b"s", schema.EVENT_NUMBER: 3}
    server.local_broadcast(f"{STORE}:{topic}", (Atom("events"), [record]))
    assert [(each.stream, each.version) for each in given if isinstance(each, Hint)] == [(b"s", 3)]
    del feed.give  # type: ignore[attr-defined]
    before = server.subscriptions
    assert await house.ask("remove_subscription", STORE, kind, selector, b"p") is OK
    await wait_until(lambda: server.subscriptions == before - 1, "nobody listens any more")


async def test_a_name_with_another_selector_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert (await house.subscribe(subscriber(house.caller), BY_STREAM, b"$all", b"p"))[0] is OK
    async with open_house(tmp_path) as house:
        error, reason = await house.subscribe(subscriber(house.caller), BY_EVENT_TYPE, b"x", b"p")
        assert (error, reason[0]) == (ERROR, Atom("subscription_refused"))
        assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$all", b"p") is OK

        async def free() -> bool:
            reply = await house.subscribe(subscriber(house.caller), BY_EVENT_TYPE, b"x", b"p")
            return reply[0] is OK

        await wait_until(free, "the name to be free")


async def test_what_only_python_takes_for_the_same_selector_is_another_one(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert (await house.subscribe(subscriber(house.caller), BY_EVENT_PAYLOAD, {b"n": 1}, b"p"))[0] is OK
    async with open_house(tmp_path) as house:
        for value in (True, 1.0):
            reply = await house.subscribe(subscriber(house.caller), BY_EVENT_PAYLOAD, {b"n": value}, b"p")
            assert reply[0] is ERROR
            assert reply[1][0] is Atom("subscription_refused")
        assert (await house.subscribe(subscriber(house.caller), BY_EVENT_PAYLOAD, {b"n": 1}, b"p"))[0] is OK


async def test_parked_events_are_listed_and_replayed(house: House) -> None:
    await house.append(b"s", "a", "b")
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p"))[0] is OK
    await me.has(2)
    assert await house.ask("nack_event", STORE, b"p", me.pid, me.events[0], Atom("park")) is OK
    assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[1]) is OK

    async def parked() -> list[int]:
        _, found = await house.ask("list_parked", STORE, b"p")
        return [each[Atom("event")][schema.EVENT_NUMBER] for each in found]

    async def is_parked() -> bool:
        return await parked() == [0]

    await wait_until(is_parked, "event 0 to be parked")
    assert await house.ask("replay_parked", STORE, b"p") == (OK, 1)
    await me.has(3)
    assert me.seen[2] == (b"s", 0)
    assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[2]) is OK

    async def none_left() -> bool:
        return await parked() == []

    await wait_until(none_left, "no parked events")


async def three_parked(house: House) -> Subscriber:
    """A subscriber of `p` that has put the three events of stream `s` aside."""
    await house.append(b"s", "a", "b", "c")
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p"))[0] is OK
    await me.has(3)
    for event in me.events:
        assert await house.ask("nack_event", STORE, b"p", me.pid, event, Atom("park")) is OK
    return me


async def test_parked_events_are_dropped_one_or_all(house: House) -> None:
    me = await three_parked(house)

    async def parked() -> list[int]:
        _, found = await house.ask("list_parked", STORE, b"p")
        return [each[Atom("event")][schema.EVENT_NUMBER] for each in found]

    async def are_parked() -> bool:
        return await parked() == [0, 1, 2]

    await wait_until(are_parked, "three events to be parked")
    assert await house.ask("drop_parked", STORE, b"p", me.events[1]) == (OK, 1)
    assert await parked() == [0, 2]
    assert await house.ask("drop_parked", STORE, b"p", me.events[1]) == (OK, 0)
    assert await house.ask("drop_parked", STORE, b"p") == (OK, 2)
    assert await parked() == []
    assert await house.ask("replay_parked", STORE, b"p") == (OK, 0)
    error, reason = await house.ask("drop_parked", STORE, b"p", {})
    assert (error, reason[0]) == (ERROR, Atom("invalid_request"))


async def test_a_parked_event_says_why_and_how_often_it_was_delivered(house: House) -> None:
    await house.append(b"s", "a", "b", "c")
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p", max_retries=0))[0] is OK
    await me.has(3)
    actions = [Atom("retry"), (Atom("retry"), b"no luck"), (Atom("park"), {Atom("code"): 7})]
    for event, action in zip(me.events, actions, strict=True):
        assert await house.ask("nack_event", STORE, b"p", me.pid, event, action) is OK

    async def parked() -> bool:
        _, found = await house.ask("list_parked", STORE, b"p")
        return [(each[Atom("reason")], each[Atom("attempts")]) for each in found] == [
            (Atom("max_retries"), 1),
            (b"no luck", 1),
            ({Atom("code"): 7}, 1),
        ]

    await wait_until(parked, "three events to be parked")
    for action in ((Atom("park"), b"x" * 5_000), (Atom("bury"), b"x"), (Atom("park"), b"x", 1)):
        error, (kind, _) = await house.ask("nack_event", STORE, b"p", me.pid, me.events[0], action)
        assert (error, kind) == (ERROR, Atom("invalid_request"))


async def test_what_is_to_be_tried_again_comes_again_and_what_is_skipped_does_not(house: House) -> None:
    await house.append(b"s", "a", "b")
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p"))[0] is OK
    await me.has(2)
    assert await house.ask("nack_event", STORE, b"p", me.pid, me.events[0], Atom("retry")) is OK
    tell_server(house.caller, house.system, "nack_event", STORE, b"p", me.pid, me.events[1], Atom("skip"))
    await me.has(3)
    assert me.seen[2] == (b"s", 0)
    _, status = await house.ask("subscription_status", STORE, b"p")
    assert status[Atom("subscribers")] == 1


async def test_a_subscriber_that_never_acknowledges_holds_up_nobody(house: House) -> None:
    slow, quick = subscriber(house.caller), subscriber(house.caller)
    assert (await house.subscribe(slow, BY_STREAM, b"$all", b"slow", window=10))[0] is OK
    assert (await house.subscribe(quick, BY_STREAM, b"$all", b"quick", auto_ack=True))[0] is OK
    for _ in range(10):
        await house.append(b"s", *["e"] * 20)
    await quick.has(200)
    assert len(slow.events) == 10
    assert quick.seen == [(b"s", number) for number in range(200)]


async def test_a_transient_subscription_ends_with_its_subscriber(house: House) -> None:
    me = subscriber(house.caller)
    assert await house.ask("save_subscription", STORE, BY_STREAM, b"$s", b"transient", 0, me.pid) is OK
    feed = house.system.subscriptions.feed(STORE)
    assert len(feed.keys()) == 1
    me.die()
    await wait_until(lambda: not feed.keys(), "the subscription to end")
    assert not feed._monitors


async def test_a_refused_request_leaves_the_subscriber_where_it_was(house: House) -> None:
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p", auto_ack=True))[0] is OK
    assert (await house.subscribe(me, BY_STREAM, b"$t", b"p", auto_ack=True))[0] is ERROR
    await house.append(b"s", "a")
    await me.has(1)
    me.die()

    async def alone() -> bool:
        _, status = await house.ask("subscription_status", STORE, b"p")
        return bool(status[Atom("subscribers")] == 0)

    await wait_until(alone, "the subscriber to be gone")


async def test_who_was_out_of_reach_goes_on_when_the_connection_is_back(house: House) -> None:
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p", auto_ack=True))[0] is OK
    house.caller.disconnect(house.system.node.name)
    await house.append(b"s", "a", "b")
    await me.has(2)
    assert me.seen == [(b"s", 0), (b"s", 1)]


async def test_requests_about_unknown_subscriptions_say_so(house: House) -> None:
    nowhere = (ERROR, (Atom("subscription_not_found"), b"none"))
    assert await house.ask("subscription_status", STORE, b"none") == nowhere
    assert await house.ask("replay_parked", STORE, b"none") == nowhere
    assert await house.ask("list_parked", STORE, b"none") == (OK, [])
    for options in ({Atom("window"): b"x"}, {Atom("colour"): 1}, {Atom("subscriber"): 1}, 7):
        error, (kind, _) = await house.ask("subscribe", STORE, BY_STREAM, b"$s", b"p", options)
        assert (error, kind) == (ERROR, Atom("invalid_request"))
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$s", b"p", window=0))[0] is ERROR


async def test_nothing_is_kept_of_requests_about_stores_that_nobody_holds(house: House) -> None:
    for number in range(3):
        store = Atom(f"none{number}")
        missing = (ERROR, (Atom("store_not_found"), store))
        assert await house.ask("list_parked", store, b"p") == missing
        assert await house.ask("drop_parked", store, b"p") == missing
        assert await house.ask("remove_subscription", store, BY_STREAM, b"$all", b"p") == missing
    door = house.system.subscriptions
    await wait_until(lambda: not door._tasks, "the requests to be over")
    assert not door._feeds


async def test_requests_about_subscriptions_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.MAX_REQUESTS", 0)
    me, overloaded = subscriber(house.caller), (ERROR, Atom("overloaded"))
    assert await house.subscribe(me, BY_STREAM, b"$s", b"p") == overloaded
    assert await house.ask("save_subscription", STORE, BY_STREAM, b"$s", b"p", 0, me.pid) == overloaded
    assert await house.ask("remove_subscription", STORE, BY_STREAM, b"$s", b"p") == overloaded


async def test_who_share_a_subscription_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.MAX_SUBSCRIBERS", 2)
    three = [subscriber(house.caller) for _ in range(3)]
    replies = [await house.subscribe(each, BY_STREAM, b"$s", b"p") for each in three]
    assert [kind for kind, _ in replies] == [OK, OK, ERROR]
    assert replies[2][1][0] is Atom("subscription_refused")
    assert await house.subscribe(three[0], BY_STREAM, b"$s", b"p") == (OK, b"p")


async def test_more_parked_events_than_may_be_replayed_at_once_are_replayed_in_parts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.MAX_REPLAYS", 2)
    monkeypatch.setattr("gater.api.subscriptions.delivery.MAX_REPLAYS", 2)
    me = await three_parked(house)

    async def parked(count: int) -> bool:
        return len((await house.ask("list_parked", STORE, b"p"))[1]) == count

    await wait_until(lambda: parked(3), "three events to be parked")
    assert await house.ask("replay_parked", STORE, b"p") == (OK, 2)
    await me.has(5)
    for event in me.events[3:]:
        assert await house.ask("ack_event", STORE, b"p", me.pid, event) is OK
    await wait_until(lambda: parked(1), "two of them to be dealt with")
    assert await house.ask("replay_parked", STORE, b"p") == (OK, 1)
    await me.has(6)
    assert me.seen[3:] == [(b"s", 0), (b"s", 1), (b"s", 2)]


@pytest.mark.parametrize("khepri", [None, False, True])
async def test_parked_events_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, khepri: bool | None
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.MAX_PARKED_BYTES", 1)
    async with AsyncExitStack() as stack:
        if khepri is None:
            house = await stack.enter_async_context(open_house(tmp_path))
        else:
            cluster = await stack.enter_async_context(open_cluster(tmp_path, khepri=khepri))
            system = await stack.enter_async_context(gateway(cluster))
            caller = await stack.enter_async_context(caller_node(cluster.epmd_port))
            await connected(system, cluster)
            house = House(system, caller, function_door(caller, system))
        client = await stack.enter_async_context(python_client(house.system))
        me = await three_parked(house)

        async def listed() -> list[int]:
            return [each.event.event_number for each in await client.list_parked(STORE.name, "p")]

        async def all_listed() -> bool:
            return await listed() == [0, 1, 2]

        await wait_until(all_listed, "three events to be parked")
        assert len((await house.ask("list_parked", STORE, b"p"))[1]) == 1
        # Those that are on their way are not taken again.
        assert [await house.ask("replay_parked", STORE, b"p") for _ in range(4)] == [
            (OK, count) for count in (1, 1, 1, 0)
        ]
        await me.has(6)
        assert me.seen[3:] == [(b"s", 0), (b"s", 1), (b"s", 2)]
        assert await house.ask("drop_parked", STORE, b"p") == (OK, 3)
        assert await listed() == []


async def test_a_subscription_may_be_the_first_request_of_a_gateway(tmp_path: Path) -> None:
    async with open_cluster(tmp_path) as cluster:
        cluster.registry_open.clear()
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            house = House(system, caller, function_door(caller, system))
            me = subscriber(caller)
            subscribing = asyncio.create_task(house.subscribe(me, BY_STREAM, b"$all", b"transient"))
            await wait_until(lambda: bool(system.subscriptions._tasks), "the request")
            cluster.registry_open.set()
            assert await subscribing == (OK, b"transient")


async def test_who_was_told_that_it_takes_too_long_gets_nothing_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(reads: StoreReads, streams: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("gater.api.subscriptions.door.SUBSCRIBE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(StoreReads, "counts", never)
    me = subscriber(house.caller)
    for name in (b"transient", b"p"):
        error, (kind, _) = await house.subscribe(me, BY_STREAM, b"$all", name)
        assert (error, kind) == (ERROR, Atom("call_timeout"))
    feed = house.system.subscriptions.feed(STORE)
    assert (feed.keys(), feed.on_started, feed._monitors) == ([], {}, {})


async def test_a_checkpoint_is_looked_for_where_it_must_be_though_no_member_has_been_asked_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster(tmp_path, khepri=True) as cluster:
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            await connected(system, cluster)
            house = House(system, caller, function_door(caller, system))
            assert (await house.subscribe(subscriber(caller), BY_STREAM, b"$s", b"p"))[0] is OK

        reached, certain_snapshots = asyncio.Event(), StoreReads.certain_snapshots

        def reaching(reads: StoreReads, source: bytes, stream: bytes) -> Awaitable[Term]:
            reached.set()
            return certain_snapshots(reads, source, stream)

        def behind(worker: Worker, request: Term, caller: Caller) -> Term:
            """A member that has nothing yet, unless it is told to catch up."""
            return worker.carry_out(request, caller) if cluster.fenced else (OK, {})

        cluster.always(behind, "list_snapshots")
        monkeypatch.setattr(StoreReads, "certain_snapshots", reaching)
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            await connected(system, cluster)
            house = House(system, caller, function_door(caller, system))
            forms = dict(system.service.guarded_forms)
            system.service.guarded_forms.clear()
            cluster.fenced.clear()
            subscribing = asyncio.ensure_future(house.subscribe(subscriber(caller), BY_STREAM, b"$t", b"p"))
            await wait_until(reached.is_set, "the store to be asked")
            system.service.guarded_forms.update(forms)
            error, (reason, _) = await subscribing
            assert (error, reason) == (ERROR, Atom("subscription_refused"))


@pytest.mark.parametrize("fence", [schema.OK, schema.error(Atom("timeout"))])
async def test_nobody_subscribes_under_a_name_without_a_majority(tmp_path: Path, fence: Term) -> None:
    async with (
        open_cluster(tmp_path, khepri=True) as cluster,
        gateway(cluster) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        house = House(system, caller, function_door(caller, system))
        cluster.fence_answer = fence
        system.service.quorum = lambda store: Atom("details")
        me = subscriber(caller)
        no_quorum = schema.error(schema.no_quorum(Atom("details")))
        assert await house.subscribe(me, BY_STREAM, b"$all", b"p") == no_quorum
        # One without a name writes nothing.
        assert await house.subscribe(me, BY_STREAM, b"$all", b"transient") == (OK, b"transient")


# The Python client


@asynccontextmanager
async def python_client(*systems: System) -> AsyncIterator[Gateway]:
    options = NodeOptions(epmd_port=systems[0].settings.epmd_port)
    names = [system.settings.name for system in systems]
    async with Gateway.connect(*names, cookie=COOKIE, options=options) as client:
        yield client


async def test_python_iterates_over_what_was_and_what_comes(house: House) -> None:
    await house.append(b"s", "a", "b")
    async with python_client(house.system) as client, client.subscribe(STORE.name, "$s") as events:
        assert [(await anext(events)).event_number for _ in range(2)] == [0, 1]
        await house.append(b"s", "c")
        assert (await anext(events)).event_type == "c"


async def test_python_saves_and_removes_subscriptions(house: House) -> None:
    await house.append(b"s", "a")
    async with python_client(house.system) as client:
        me = subscriber(house.caller)
        await client.save_subscription(STORE.name, {"to": 1}, type="by_event_payload", name="record")
        await client.save_subscription(STORE.name, "$s", name="mine", start_from=0, subscriber=me.pid)
        await me.has(1)

        async def saved() -> set[str]:
            return {each.subscription_name for each in await client.get_subscriptions(STORE.name)}

        assert {"record", "mine"} <= await saved()
        with pytest.raises(RequestFailed):
            await client.subscription_status(STORE.name, "record")
        assert (await client.subscription_status(STORE.name, "mine"))[Atom("subscribers")] == 1
        await client.remove_subscription(STORE.name, {"to": 1}, type="by_event_payload", name="record")
        await client.remove_subscription(STORE.name, "$s", name="mine")

        async def gone() -> bool:
            return not {"record", "mine"} & await saved()

        await wait_until(gone, "both to be removed")
        with pytest.raises(StoreNotFound):
            await client.remove_subscription("none", "$s", name="mine")
        # The name is free for another selector.
        async with client.subscribe(STORE.name, "$all", name="mine", batch_size=5) as events:
            assert (await anext(events)).event_number == 0


async def test_python_asks_another_gateway_where_one_is_shutting_down(tmp_path: Path) -> None:
    async with (
        open_cluster(tmp_path) as cluster,
        gateway(cluster) as one,
        gateway(cluster) as two,
        python_client(one, two) as client,
    ):
        for system in (one, two):
            await connected(system, cluster)
        await wait_until(lambda: len(client._service.router) == 2, "both gateways")
        for number, draining in enumerate((one, two)):
            draining.service._draining = True
            name = f"p{number}"
            async with client.subscribe(STORE.name, "$s", name=name):
                assert (await client.subscription_status(STORE.name, name))[Atom("subscribers")] == 1
                assert await client.list_parked(STORE.name, name) == []
            await client.remove_subscription(STORE.name, "$s", name=name)
            draining.service._draining = False


async def test_python_goes_on_under_the_same_name(house: House) -> None:
    await house.append(b"s", "a", "b", "c")
    async with python_client(house.system) as client:
        async with client.subscribe(STORE.name, "$s", name="p", auto_ack=False) as events:
            first, second = await anext(events), await anext(events)
            await events.ack(first)
            await events.nack(second, "park", "bad")

            async def parked() -> bool:
                found = await client.list_parked(STORE.name, "p")
                return [(each.event.event_number, each.reason, each.attempts) for each in found] == [(1, b"bad", 1)]

            await wait_until(parked, "event 1 to be parked")
        async with client.subscribe(STORE.name, "$s", name="p") as events:
            assert (await anext(events)).event_number == 2
            assert await client.replay_parked(STORE.name, "p") == 1
            assert (await anext(events)).event_number == 1
            assert (await client.subscription_status(STORE.name, "p"))[Atom("subscribers")] == 1
            assert await client.drop_parked(STORE.name, "p", second) == 1
            assert await client.drop_parked(STORE.name, "p") == 0
        with pytest.raises(RequestFailed, match="another type or selector"):
            await anext(client.subscribe(STORE.name, "$other", name="p"))


@asynccontextmanager
async def running(events: EventSubscription, handler: Handler) -> AsyncIterator[None]:
    task = asyncio.ensure_future(events.run(handler))
    try:
        yield
    finally:
        await events.stop()
        async with asyncio.timeout(10):
            await task


async def test_a_callback_gets_one_event_after_the_other_and_what_it_has_handled_is_acknowledged(house: House) -> None:
    await house.append(b"s", "a", "b")
    handled: list[int] = []
    async with python_client(house.system) as client:
        async with running(
            client.subscribe(STORE.name, "$s", name="p"), lambda event: handled.append(event.event_number)
        ):
            await house.append(b"s", "c")
            await wait_until(lambda: len(handled) == 3, "three events")

        open_calls = 0

        async def handle(event: RecordedEvent) -> None:
            nonlocal open_calls
            open_calls += 1
            assert open_calls == 1
            await asyncio.sleep(0.01)
            open_calls -= 1
            handled.append(event.event_number)

        await house.append(b"s", "d", "e")
        async with running(client.subscribe(STORE.name, "$s", name="p"), handle):
            await wait_until(lambda: len(handled) == 5, "two more")
    assert handled == [0, 1, 2, 3, 4]


async def test_what_a_callback_fails_on_comes_again_until_it_is_parked(house: House) -> None:
    await house.append(b"s", "bad", "good", "unwanted")
    tried: list[int] = []

    async def handle(event: RecordedEvent) -> None:
        tried.append(event.event_number)
        if event.event_type == "bad":
            raise ValueError("no such order")
        if event.event_type == "unwanted":
            await events.nack(event, "park")

    async with python_client(house.system) as client:
        events = client.subscribe(STORE.name, "$s", name="p", window=1, max_retries=2)

        async def parked() -> bool:
            return [each.event.event_number for each in await client.list_parked(STORE.name, "p")] == [0, 2]

        with capture_logs() as lines:
            async with running(events, handle):
                await wait_until(parked, "events 0 and 2 to be parked")
        first, second = await client.list_parked(STORE.name, "p")
    assert b"ValueError: no such order" in first.reason
    assert (first.attempts, second.reason, second.attempts) == (3, None, 1)
    assert tried == [0, 0, 0, 1, 2]
    failures = [line for line in lines if line["event"] == "handler_failed"]
    assert [(line["stream"], line["number"]) for line in failures] == [("s", 0)] * 3
    assert "ValueError: no such order" in failures[0]["error"]


async def test_a_callback_that_was_cancelled_has_handled_nothing(house: House) -> None:
    await house.append(b"s", "a")
    begun = asyncio.Event()

    async def handle(event: RecordedEvent) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with python_client(house.system) as client:
        task = asyncio.ensure_future(client.subscribe(STORE.name, "$s", name="p").run(handle))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with client.subscribe(STORE.name, "$s", name="p") as events:
            assert (await anext(events)).event_number == 0


async def test_without_auto_ack_a_callback_acknowledges_itself(house: House) -> None:
    await house.append(b"s", "a", "b")
    seen: list[int] = []

    async def handle(event: RecordedEvent) -> None:
        seen.append(event.event_number)
        if event.event_number == 0:
            await events.ack(event)

    async with python_client(house.system) as client:
        events = client.subscribe(STORE.name, "$s", name="p", auto_ack=False)
        async with running(events, handle):
            await wait_until(lambda: seen == [0, 1], "both events")
        async with client.subscribe(STORE.name, "$s", name="p") as again:
            assert (await anext(again)).event_number == 1


# Two gateways


@asynccontextmanager
async def two_houses(directory: Path) -> AsyncIterator[tuple[Cluster, House, House]]:
    """The store nodes, and two gateways that know each other: the first is going to end."""
    async with (
        open_cluster(directory, khepri=True) as cluster,
        gateway(cluster) as stays,
        caller_node(cluster.epmd_port) as caller,
        gateway(cluster, connect=(*cluster.names, stays.settings.name)) as goes,
    ):
        await connected(stays, cluster)
        await connected(goes, cluster)
        await wait_until(lambda: goes.node.name in stays.swarm.members_of_cluster, "gateways to meet")
        yield (
            cluster,
            House(goes, caller, function_door(caller, goes)),
            House(stays, caller, function_door(caller, stays)),
        )


@pytest.mark.parametrize("orderly", [True, False])
async def test_another_gateway_takes_over_with_the_subscribers(
    tmp_path: Path, orderly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.ABSORB_S", 0.1)
    async with two_houses(tmp_path) as (_, house, other):
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a", "b")
        await me.has(2)
        for event in me.events:
            assert await other.ask("ack_event", STORE, b"p", me.pid, event) is OK

        async def saved() -> bool:
            _, status = await other.ask("subscription_status", STORE, b"p")
            return status[Atom("node")] is house.system.node.name and status[Atom("unsaved_streams")] == 0

        await wait_until(saved, "the checkpoint")
        if not orderly:
            await house.system.node.stop()
        else:
            await house.system.subscriptions.stop()
        await other.append(b"s", "c")
        await me.has(3)
        assert me.seen == [(b"s", 0), (b"s", 1), (b"s", 2)]

        async def absorbed() -> bool:
            _, snapshots = await other.ask("list_snapshots", STORE, b"gater.checkpoint", b"p")
            positions = [record[Atom("positions")].get(b"s", 0) for record in snapshots.values()]
            return len({path[3][:-2] for path in snapshots}) == 1 and max(positions) == 2

        await wait_until(absorbed, "what the first one saved to be kept by the second alone")


@pytest.mark.parametrize("orderly", [True, False])
async def test_what_a_subscriber_stopped_stays_stopped_in_another_gateway(tmp_path: Path, orderly: bool) -> None:
    async with two_houses(tmp_path) as (_, house, other):
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a", "b")
        await me.has(2)
        assert await house.ask("nack_event", STORE, b"p", me.pid, me.events[0], Atom("stop")) is OK

        async def saved() -> bool:
            _, snapshots = await other.ask("list_snapshots", STORE, b"gater.checkpoint", b"p")
            return max((record[Atom("stops")] for record in snapshots.values()), default=0) % 2 == 1

        await wait_until(saved, "that it is stopped to be saved")
        if orderly:
            await house.system.subscriptions.stop()
        else:
            await house.system.node.stop()

        async def state() -> Term:
            kind, status = await other.ask("subscription_status", STORE, b"p")
            return status[Atom("state")] if kind is OK and status[Atom("subscribers")] == 1 else None

        await wait_until(state, "another gateway to take over")
        assert await state() is Atom("stopped")
        assert (await other.subscribe(me, BY_STREAM, b"$all", b"p", resume=False))[0] is OK
        assert await state() is Atom("stopped")
        assert (await other.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await me.has(4)
        assert me.seen[2:] == [(b"s", 0), (b"s", 1)]
        await wait_until(lambda: _none(saved()), "that it goes on to be saved")


async def _none(found: Awaitable[bool]) -> bool:
    return not await found


async def test_the_subscriptions_of_a_gateway_that_does_not_answer_are_taken_over(tmp_path: Path) -> None:
    async with two_houses(tmp_path) as (_, house, other):
        me = subscriber(other.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a")
        await me.has(1)
        silent = house.system.node.name
        other.system.subscriptions.suspect(silent)
        await wait_until(lambda: (STORE, b"p") in other.system.subscriptions._owned, "the other one to take over")

        async def settled() -> bool:
            owners = [each for each in (house, other) if (STORE, b"p") in each.system.subscriptions._owned]
            statuses = [await each.ask("subscription_status", STORE, b"p") for each in (house, other)]
            return (
                len(owners) == 1
                and all(kind is OK and found[_SUBSCRIBERS] == 1 for kind, found in statuses)
                and {found[Atom("node")] for _, found in statuses} == {owners[0].system.node.name}
            )

        await wait_until(lambda: other.system.node.name in house.system.node.nodes(), "the two to meet again")
        await wait_until(settled, "one of them to have the subscription")
        await house.append(b"s", "b")
        await wait_until(lambda: (b"s", 1) in me.seen, "what is appended after that")
        # A node without subscriptions is left alone.
        other.system.subscriptions.suspect(house.caller.name)
        assert house.caller.name in other.system.node.nodes()


@contextmanager
def cut_off(one: Node, other: Node) -> Iterator[None]:
    """The two lose each other, and find each other no more until this is over."""
    attempt = Peers._attempt

    async def refused(peers: Peers, connection: Any) -> None:
        if {peers._node.name, connection.peer} == {one.name, other.name}:
            peers.connection_lost(connection, "cut off")
        else:
            await attempt(peers, connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peers, "_attempt", refused)
        one.disconnect(other.name)
        yield


async def test_who_keeps_a_name_that_another_gateway_had_too_knows_what_was_acknowledged_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gater.api.subscriptions.door.TOGETHER_S", 0.0)
    # Of two the one with the lesser name keeps it.
    async with two_houses(tmp_path) as (_, loses, keeps):
        me = subscriber(keeps.caller)
        assert (await keeps.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        with cut_off(loses.system.node, keeps.system.node):
            await wait_until(lambda: (STORE, b"p") in loses.system.subscriptions._owned, "it to be taken over")
            await keeps.append(b"s", "a", "b")

            async def has_sent(house: House) -> bool:
                ok, status = await house.ask("subscription_status", STORE, b"p")
                return ok is OK and status[Atom("in_flight")] == 2

            for house in (loses, keeps):
                await wait_until(lambda house=house: has_sent(house), "both to have sent the events")
            for event in me.events[:2]:
                assert await loses.ask("ack_event", STORE, b"p", me.pid, event) is OK

            async def saved() -> bool:
                _, status = await loses.ask("subscription_status", STORE, b"p")
                return (status[Atom("in_flight")], status[Atom("unsaved_streams")]) == (0, 0)

            await wait_until(saved, "the checkpoint")
            seen = sorted(me.seen)

        async def settled() -> bool:
            owners = [each for each in (loses, keeps) if (STORE, b"p") in each.system.subscriptions._owned]
            statuses = [await each.ask("subscription_status", STORE, b"p") for each in (loses, keeps)]
            return len(owners) == 1 and all(
                kind is OK and (status[_SUBSCRIBERS], status[Atom("in_flight")]) == (1, 0) for kind, status in statuses
            )

        await wait_until(settled, "one of them to have the subscription, and nothing to wait for")
        await keeps.append(b"s", "c")
        await me.has(len(seen) + 1)
        assert me.seen[len(seen) :] == [(b"s", 2)]


_SUBSCRIBERS = Atom("subscribers")


async def test_a_gateway_that_was_away_goes_on_from_the_checkpoint(house: House) -> None:
    me = subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
    await house.append(b"s", "a", "b")
    await me.has(2)
    assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[0]) is OK
    door = house.system.subscriptions
    before = door._owned[STORE, b"p"]
    door._look_at_clock(asyncio.get_running_loop().time() - 10)
    await wait_until(lambda: door._owned.get((STORE, b"p"), before) is not before, "the subscription to begin again")
    await me.has(3)
    await house.append(b"s", "c")
    await me.has(4)
    assert me.seen[2:] == [(b"s", 1), (b"s", 2)]


async def test_who_subscribes_while_a_subscription_is_being_given_up_goes_on_from_the_checkpoint(house: House) -> None:
    me, second = subscriber(house.caller), subscriber(house.caller)
    assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
    await house.append(b"s", "a", "b")
    await me.has(2)
    assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[0]) is OK
    door = house.system.subscriptions
    feed = door.feed(STORE)
    async with feed.saved[b"p"]._turns:
        door._look_at_clock(asyncio.get_running_loop().time() - 10)
        await wait_until(lambda: b"p" not in feed, "the subscription to be waiting for its last checkpoint")
        subscribing = asyncio.create_task(house.subscribe(second, BY_STREAM, b"$all", b"p"))
        await wait_until(lambda: subscribing.done() or len(door._tasks) > 1, "the request to be under way")
    assert (await subscribing)[0] is OK
    await wait_until(lambda: len(feed.subscribers(b"p")) == 2, "both to share it")
    await house.append(b"s", "c")
    await wait_until(lambda: len(me.events) + len(second.events) >= 4, "what is not acknowledged, and what came")
    assert sorted(me.seen[2:] + second.seen) == [(b"s", 1), (b"s", 2)]


async def test_a_name_that_is_lost_while_the_checkpoint_is_read_is_not_run_here(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = subscriber(house.caller)
    await house.append(b"s", "a")
    door = house.system.subscriptions
    load, owners = door._load, []

    async def lose_the_first(saved: SavedState, store: Atom) -> dict[bytes, int] | None:
        assert b"p" not in door.feed(STORE)
        owners.append(door._owned[STORE, b"p"])
        if len(owners) == 1:
            door.lost(owners[0])
        return await load(saved, store)

    monkeypatch.setattr(door, "_load", lose_the_first)
    assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
    await me.has(1)
    assert door._owned[STORE, b"p"] is owners[-1] is not owners[0]
    assert me.seen == [(b"s", 0)]


async def test_who_subscribes_when_the_name_is_lost_before_it_has_started_goes_where_the_name_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, may_count = StoreReads.counts, asyncio.Event()

    async def later(reads: StoreReads, streams: Any) -> Any:
        await may_count.wait()
        return await counts(reads, streams)

    monkeypatch.setattr(StoreReads, "counts", later)
    me = subscriber(house.caller)
    await house.append(b"s", "a")
    door = house.system.subscriptions
    subscribing = asyncio.create_task(house.subscribe(me, BY_STREAM, b"$all", b"p"))
    await wait_until(lambda: b"p" in door.feed(STORE), "the subscription to be starting")
    door.lost(door._owned[STORE, b"p"])
    may_count.set()
    assert await subscribing == (OK, b"p")
    await me.has(1)
    await house.append(b"s", "b")
    await me.has(2)
    assert me.seen == [(b"s", 0), (b"s", 1)]


async def test_what_was_under_way_is_acknowledged_through_a_gateway_that_drains(tmp_path: Path) -> None:
    async with two_houses(tmp_path) as (cluster, house, other):
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a", "b")
        await me.has(2)
        draining = schema.error(schema.DRAINING)
        assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[0]) is OK
        await house.system.subscriptions.stop()
        house.system.service._draining = True

        async def in_flight() -> Term:
            ok, status = await other.ask("subscription_status", STORE, b"p")
            return ok is OK and status[Atom("node")] is other.system.node.name and status[Atom("in_flight")]

        await wait_until(in_flight, "the other gateway to have sent it again")
        assert await house.ask("ack_event", STORE, b"p", me.pid, me.events[1]) is OK

        async def done() -> bool:
            return await in_flight() == 0

        await wait_until(done, "the other gateway to have been told")
        assert me.seen == [(b"s", 0), (b"s", 1), (b"s", 1)]
        # New requests are refused all the same, and no store is told of what it would take for a new subscription.
        assert await house.ask("ack_event", STORE, b"nobody's", me.pid, me.events[0]) == draining
        assert await house.ask("save_subscription", STORE, BY_STREAM, b"$s", b"q") == draining
        assert not any(cast[0] is Atom("ack_event") for cast in cluster.casts)


async def test_what_is_acknowledged_between_two_gateways_is_not_told_to_the_store(tmp_path: Path) -> None:
    async with two_houses(tmp_path) as (cluster, house, other):
        me = subscriber(house.caller)
        assert (await house.subscribe(me, BY_STREAM, b"$all", b"p"))[0] is OK
        await house.append(b"s", "a")
        await me.has(1)
        # The store cannot say where the subscription stands.
        cluster.fence_answer = schema.error(Atom("timeout"))
        await house.system.node.stop()
        await wait_until(lambda: other.system.subscriptions._moving, "the subscription to change hands")
        assert await other.ask("ack_event", STORE, b"p", me.pid, me.events[0]) is OK
        assert await other.ask("ack_event", STORE, b"transient", me.pid, me.events[0]) is OK
        # This one is for the store to deal with; it would have had the others before.
        assert await other.ask("ack_event", STORE, b"its own", me.pid, me.events[0]) is OK
        await wait_until(lambda: any(cast[0] is Atom("ack_event") for cast in cluster.casts), "the last one")
        assert [cast[2] for cast in cluster.casts if cast[0] is Atom("ack_event")] == [b"its own"]
        cluster.fence_answer = schema.OK
        await me.has(2)
        assert me.seen == [(b"s", 0), (b"s", 0)]
        await wait_until(lambda: not other.system.subscriptions._moving, "the subscription to have come")
