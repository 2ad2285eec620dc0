"""Phoenix.PubSub: captured broadcasts, topics of the original, and the servers of a node on a scripted `pg` scope."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from node_kit import free_port, wait_until
from structlog.testing import capture_logs

from gater.api import schema
from gater.erl.errors import NodeError
from gater.erl.etf import decode
from gater.erl.gen_server import cast
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom, Pid, Term
from gater.pubsub.adapter import MAX_SUBSCRIPTIONS, PubSub, PubSubServer
from gater.pubsub.messages import (
    MAX_TOPIC_BYTES,
    MONITOR_SERVER,
    SCOPE,
    SERVERS,
    SIGNED_SERVERS,
    appended_message,
    events_message,
    forward_to_local,
    parse_appended,
    parse_broadcast,
    parse_events,
    parse_topic,
    store_topic,
    subscription_topic,
    worker_name,
)
from gater.pubsub.signatures import sign

CAPTURES = Path(__file__).parent / "captures"


def captured(which: str, process: str, direction: str) -> list[Term]:
    capture: dict[str, Any] = json.loads((CAPTURES / f"phoenix_pubsub_{which}.json").read_text())
    return [
        decode(bytes.fromhex(each["etf"]))
        for each in capture["messages"]
        if each["process"] == process and each["dir"] == direction
    ]


def test_captured_broadcasts_are_taken_apart_and_built_again() -> None:
    received = captured("a", "PG2Worker", "recv")
    handed_on = captured("a", "PG2Worker", "send")
    assert len(received) == 2
    for message, inside in zip(received, handed_on, strict=True):
        broadcast = parse_broadcast(message)
        assert broadcast is not None
        assert broadcast.topic == b"reg_gh:$orders-1"
        assert broadcast.dispatcher is SCOPE
        assert broadcast.message == inside
        assert forward_to_local("reg_gh:$orders-1", inside) == message


def test_a_captured_event_is_found_in_its_broadcast() -> None:
    events = parse_events(captured("a", "PG2Worker", "send")[0])
    assert events is not None
    assert [event[schema.EVENT_STREAM_ID] for event in events] == [b"orders-1"]
    assert parse_events(events_message(list(events))) == events


def test_the_worker_joins_the_group_the_captured_one_joined() -> None:
    joined = [message[2] for message in captured("a", "pg scope Elixir.Phoenix.PubSub", "recv") if len(message) == 3]
    assert ("join_local", worker_name("ex_esdb_events")) in [(str(request[0]), request[1]) for request in joined[:1]]


@pytest.mark.parametrize(
    "message",
    [
        (Atom("forward_to_local"), b"t", 1),
        (Atom("forward_to_local"), Atom("t"), 1, SCOPE),
        (Atom("forward_to_local"), b"t" * (MAX_TOPIC_BYTES + 1), 1, SCOPE),
        (Atom("broadcast"), b"t", 1, SCOPE),
        [],
        Atom("forward_to_local"),
    ],
)
def test_other_messages_are_no_broadcasts(message: Term) -> None:
    assert parse_broadcast(message) is None


@pytest.mark.parametrize("message", [(Atom("events"), [1]), (Atom("events"), {}), (Atom("event"), []), [], 1])
def test_other_messages_carry_no_events(message: Term) -> None:
    assert parse_events(message) is None


def test_there_are_ten_servers() -> None:
    assert len(set(SERVERS)) == 10
    assert worker_name("ex_esdb_events") is Atom("Elixir.ex_esdb_events.Adapter")


@pytest.mark.parametrize(
    ("kind", "selector", "name", "topic"),
    [
        (schema.BY_STREAM, "$all", "all-events", b"s:$all"),
        (schema.BY_STREAM, b"$all", b"mine", b"s:$mine"),
        (schema.BY_STREAM, "$orders-1", "transient", b"s:$orders-1"),
        (schema.BY_STREAM, "$orders-1", "mine", b"s:$mine"),
        (schema.BY_EVENT_TYPE, "placed", "transient", b"s:placed"),
        (schema.BY_EVENT_TYPE, "placed", "mine", b"s:*mine-placed"),
        # erlang:phash2(#{a => 1}) is 16#38DB2BE on every release.
        (schema.BY_EVENT_PATTERN, {Atom("a"): 1}, "mine", b"s:evt-pat-mine-38DB2BE"),
        (schema.BY_EVENT_PAYLOAD, {Atom("a"): 1}, "mine", b"s:evt-pay-mine-38DB2BE"),
    ],
)
def test_subscription_topics_are_the_emitters_topics(
    kind: Atom, selector: Term, name: str | bytes, topic: bytes
) -> None:
    assert subscription_topic("s", kind, selector, name) == topic


def test_a_selector_that_the_kind_cannot_have_has_no_topic() -> None:
    with pytest.raises(ValueError, match="by_stream"):
        subscription_topic("s", schema.BY_STREAM, {}, "n")


def test_topics_have_a_store_or_the_cluster_before_the_colon() -> None:
    assert parse_topic(store_topic("reckon", "health")) == ("reckon", "health")
    assert parse_topic(b"cluster:topology") == ("cluster", "topology")
    assert parse_topic(b"no colon") is None
    assert parse_topic(b"\xff:x") is None


def test_gateways_tell_each_other_of_appends() -> None:
    told = parse_appended(appended_message(Atom("s"), "orders-1", 7, Atom("a@h")))
    assert told == (Atom("s"), b"orders-1", 7, Atom("a@h"))
    assert parse_appended((Atom("gater_appended"), Atom("s"), b"orders-1", -1, Atom("a@h"))) is None
    assert parse_appended((Atom("gater_appended"), Atom("s"), b"orders-1", True, Atom("a@h"))) is None


class ScriptedGroups:
    """A `pg` scope whose members the test decides."""

    def __init__(self) -> None:
        self.joined: dict[Term, list[Pid]] = {}

    def join(self, group: Term, pid: Pid) -> None:
        self.joined.setdefault(group, []).append(pid)

    def leave(self, group: Term, pid: Pid) -> None:
        self.joined[group].remove(pid)

    def members(self, group: Term) -> Iterable[Pid]:
        return self.joined.get(group, [])


@pytest.fixture
async def two_nodes() -> AsyncIterator[tuple[Node, Node]]:
    options = NodeOptions(epmd_port=free_port())
    async with (
        Node("pubsub_a@127.0.0.1", cookie="c", options=options) as left,
        Node("pubsub_b@127.0.0.1", cookie="c", options=options) as right,
    ):
        await left.connect("pubsub_b@127.0.0.1")
        yield left, right


async def test_a_broadcast_reaches_the_subscribers_of_both_nodes(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    groups = ScriptedGroups()
    here, there = PubSubServer(left, groups, "ex_esdb_events"), PubSubServer(right, groups, "ex_esdb_events")
    await here.start()
    await there.start()
    heard: list[tuple[str, bytes, Term]] = []
    arrived = asyncio.Event()
    here.subscribe("s:$all", lambda topic, message: heard.append(("here", topic, message)))

    def there_too(topic: bytes, message: Term) -> None:
        heard.append(("there", topic, message))
        arrived.set()

    there.subscribe(b"s:$all", there_too)
    there.subscribe(b"other", lambda topic, message: heard.append(("other", topic, message)))

    here.broadcast("s:$all", (Atom("events"), []))
    await asyncio.wait_for(arrived.wait(), 5)
    assert heard == [("here", b"s:$all", (Atom("events"), [])), ("there", b"s:$all", (Atom("events"), []))]

    arrived.clear()
    here.direct_broadcast("pubsub_b@127.0.0.1", "s:$all", 1)
    await asyncio.wait_for(arrived.wait(), 5)
    assert heard[2:] == [("there", b"s:$all", 1)]
    here.direct_broadcast(left.name, "s:$all", 2)
    assert heard[3:] == [("here", b"s:$all", 2)]


async def test_a_handler_that_fails_keeps_no_other_from_hearing(two_nodes: tuple[Node, Node]) -> None:
    server = PubSubServer(two_nodes[0], ScriptedGroups(), "ex_esdb_system")
    heard: list[Term] = []

    def fails(topic: bytes, message: Term) -> None:
        raise RuntimeError("no")

    server.subscribe("t", fails)
    unsubscribe = server.subscribe("t", lambda topic, message: heard.append(message))
    server.local_broadcast("t", 1)
    unsubscribe()
    unsubscribe()
    server.local_broadcast("t", 2)
    assert heard == [1]
    assert server.subscriptions == 1


async def test_a_server_comes_and_goes(two_nodes: tuple[Node, Node]) -> None:
    node, groups = two_nodes[0], ScriptedGroups()
    server = PubSubServer(node, groups, "ex_esdb_audit")
    worker = await server.start()
    with pytest.raises(NodeError):
        await PubSubServer(node, groups, "ex_esdb_audit").start()
    cast(node, worker.pid, Atom("what no broadcast is"))
    server.close()
    assert node.whereis("Elixir.ex_esdb_audit.Adapter") is None
    assert not any(groups.joined.values())


@pytest.fixture
async def two_pubsubs(two_nodes: tuple[Node, Node]) -> tuple[PubSub, PubSub]:
    left, right = PubSub(two_nodes[0]), PubSub(two_nodes[1])
    await left.start()
    await right.start()
    for pubsub in (left, right):
        await wait_until(lambda pubsub=pubsub: all(server.peers for server in pubsub), "each server to know the other")  # type: ignore[misc]
    return left, right


async def hears(left: PubSub, right: PubSub, server: str, heard: list[Term]) -> None:
    """What `left` broadcasts arrives at `right`."""
    number = len(heard)

    def arrived() -> bool:
        left[server].broadcast_elsewhere("t", number)
        return number in heard

    await wait_until(arrived, "a broadcast to arrive")


async def test_a_node_has_all_servers_and_they_survive_the_death_of_a_worker(
    two_pubsubs: tuple[PubSub, PubSub], two_nodes: tuple[Node, Node]
) -> None:
    left, right = two_pubsubs
    assert {server.name for server in right} == {*SERVERS, MONITOR_SERVER}
    heard: list[Term] = []
    right["ex_esdb_audit"].subscribe("t", lambda topic, message: heard.append(message))
    await hears(left, right, "ex_esdb_audit", heard)
    worker = two_nodes[1].whereis("Elixir.ex_esdb_audit.Adapter")
    assert worker is not None
    worker.exit(Atom("crashed"))
    await hears(left, right, "ex_esdb_audit", heard)
    assert left["ex_esdb_audit"].peers == [two_nodes[1].whereis("Elixir.ex_esdb_audit.Adapter").pid]  # type: ignore[union-attr]
    assert two_nodes[1].whereis("Elixir.ex_esdb_audit.Adapter") is not worker


async def test_where_there_is_a_key_only_what_is_signed_with_it_is_heard(two_nodes: tuple[Node, Node]) -> None:
    left = PubSub(two_nodes[0], events_server="my_events")
    right = PubSub(two_nodes[1], secret_key_base="key", events_server="my_events")
    await left.start()
    await right.start()
    heard: list[tuple[str, Term]] = []
    signed = sign(Atom("message"), "key")
    good = [(server, signed) for server in sorted(SIGNED_SERVERS)]
    # Events and what is told of nodes are never signed.
    good += [(server, 1) for server in ("my_events", "ex_esdb_system", MONITOR_SERVER)]
    for server, _ in good:
        right[server].subscribe("t", lambda _, message, server=server: heard.append((server, message)))  # type: ignore[misc]
    bad = [sign(Atom("message"), "another key"), sign(Atom("message"), ""), Atom("message"), (*signed[:2], 1)]
    with capture_logs() as logs:
        for server, message in good:
            if server in SIGNED_SERVERS:
                for forged in bad:
                    left[server].direct_broadcast(two_nodes[1].name, "t", forged)
            left[server].direct_broadcast(two_nodes[1].name, "t", message)
        await wait_until(lambda: len(heard) == len(good), "what is signed")
    assert heard == good
    for server in SIGNED_SERVERS:
        assert right[server].refused == {
            "invalid_signature": 2,
            "unsecured_message_rejected": 1,
            "invalid_format": 1,
        }
    assert [log["server"] for log in logs if log["event"] == "pubsub_messages_refused"] == sorted(SIGNED_SERVERS)
    # What this node says itself needs no proof.
    right["ex_esdb_health"].local_broadcast("t", 2)
    assert heard[-1] == ("ex_esdb_health", 2)


async def test_a_scope_that_died_is_replaced_and_the_other_nodes_know_its_members(
    two_pubsubs: tuple[PubSub, PubSub], two_nodes: tuple[Node, Node]
) -> None:
    left, right = two_pubsubs
    heard: list[Term] = []
    right["ex_esdb_events"].subscribe("t", lambda topic, message: heard.append(message))
    scope = two_nodes[1].whereis(SCOPE)
    assert scope is not None
    scope.exit(Atom("crashed"))

    def known() -> bool:
        worker = two_nodes[1].whereis("Elixir.ex_esdb_events.Adapter")
        return worker is not None and left["ex_esdb_events"].peers == [worker.pid]

    await wait_until(known, "the new workers to be known")
    await hears(left, right, "ex_esdb_events", heard)
    await wait_until(lambda: right["ex_esdb_events"].peers, "the new scope to know the other node's members")


async def test_limits_of_topics_and_subscriptions_are_named(two_nodes: tuple[Node, Node]) -> None:
    server = PubSubServer(two_nodes[0], ScriptedGroups(), "ex_esdb_alerts")
    with pytest.raises(ValueError, match="MAX_TOPIC_BYTES"):
        server.subscribe("t" * (MAX_TOPIC_BYTES + 1), lambda topic, message: None)
    server._count = MAX_SUBSCRIPTIONS
    with pytest.raises(ValueError, match="MAX_SUBSCRIPTIONS"):
        server.subscribe("t", lambda topic, message: None)
