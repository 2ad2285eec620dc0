"""Staying connected: the plan of attempts, the connector over a node, and the strategies that name nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gater.cluster.connector import (
    EXPENDABLE_AFTER,
    FIRST_RETRY_S,
    FORGET_AFTER_S,
    MAX_ATTEMPTS,
    MAX_FOUND,
    STABLE_AFTER_S,
    STRANGER_CAP_S,
    Connector,
    PeerStatus,
    ReconnectPlan,
)
from gater.cluster.strategy import MAX_ADDRESSES, MAX_DNS_INTERVAL_S, DnsPoll, StaticList, resolve_ipv4
from gater.erl.errors import NotConnected
from gater.erl.handshake import MAX_NODE_NAME_CHARACTERS
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom

US = "gater@127.0.0.1"
PEER = "store@127.0.0.1"
RETRY_S = 5.0
DEADLINE_S = 10.0


def a_plan(seed: int = 1) -> ReconnectPlan:
    return ReconnectPlan(US, retry_interval_s=RETRY_S, random=Random(seed))


def the(plan: ReconnectPlan, peer: str = PEER, now: float = 0.0) -> PeerStatus:
    return next(each for each in plan.status(now) if each.peer == peer)


def fail_until(plan: ReconnectPlan, now: float, until: float) -> Iterator[float]:
    """Let every attempt fail at once; the times of the attempts."""
    while (at := plan.next_time()) is not None and at <= until:
        now = max(now, at)
        for peer in plan.attempts(now):
            yield now
            plan.attempt_ended(peer, "refused", now)


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


# The plan


def test_a_wanted_node_is_tried_at_once_and_only_once_at_a_time() -> None:
    plan = a_plan()
    assert plan.want(PEER, "static", 0.0, forever=True) == "new"
    assert plan.next_time() == 0.0
    assert plan.attempts(0.0) == [PEER]
    assert the(plan).state == "connecting"
    assert plan.attempts(1000.0) == []
    assert plan.next_time() is None


def test_failures_are_followed_by_ever_longer_waits_up_to_the_retry_interval() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    times = list(fail_until(plan, 0.0, 300.0))
    waits = [later - earlier for earlier, later in pairwise(times)]
    for number, wait in enumerate(waits):
        longest = min(RETRY_S, FIRST_RETRY_S * 2**number)
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == len(waits), "jitter makes every wait another one"
    status = the(plan, now=times[-1])
    assert status.state == "waiting"
    assert status.last_error == "refused"
    assert status.attempts == len(times)
    assert status.next_attempt_in_s is not None
    assert RETRY_S / 2 <= status.next_attempt_in_s <= RETRY_S


def test_a_found_name_that_never_answered_is_tried_less_often_than_the_retry_interval() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False)
    times = []
    for start in range(0, 1000, 10):
        plan.want(PEER, "gossip", float(start), forever=False)
        times += fail_until(plan, float(start), start + 9.9)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert STRANGER_CAP_S / 2 <= max(waits) <= STRANGER_CAP_S + 10


def test_two_gateways_do_not_try_at_the_same_moments() -> None:
    times = []
    for seed in (1, 2):
        plan = a_plan(seed)
        plan.want(PEER, "static", 0.0, forever=True)
        times.append(list(fail_until(plan, 0.0, 60.0))[1:])
    assert not set(times[0]) & set(times[1])


def test_a_lost_node_is_tried_again_soon() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    plan.attempts(0.0)
    plan.up(PEER, 0.1)
    plan.attempt_ended(PEER, None, 0.1)
    assert the(plan).state == "up"
    assert plan.next_time() is None
    plan.down(PEER, "silent", 100.0)
    status = the(plan, now=100.0)
    assert status.state == "waiting"
    assert status.last_error == "silent"
    assert status.next_attempt_in_s is not None
    assert status.next_attempt_in_s <= FIRST_RETRY_S


def test_a_node_that_accepts_and_hangs_up_is_tried_ever_less_often() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    now, waits = 0.0, []
    for _ in range(8):
        assert plan.attempts(now) == [PEER]
        plan.up(PEER, now)
        plan.attempt_ended(PEER, None, now)
        plan.down(PEER, "closed", now + 0.01)
        at = plan.next_time()
        assert at is not None
        waits.append(at - now)
        now = at
    assert waits[-1] >= RETRY_S / 2


def test_a_lasting_connection_makes_the_waits_short_again() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    *_, now = fail_until(plan, 0.0, 60.0)
    plan.up(PEER, now)
    plan.down(PEER, "closed", now + STABLE_AFTER_S)
    assert the(plan, now=now + STABLE_AFTER_S).next_attempt_in_s <= FIRST_RETRY_S  # type: ignore[operator]


def test_an_attempt_that_ends_after_the_connection_was_lost_again_is_retried() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    plan.attempts(0.0)
    plan.up(PEER, 0.1)
    plan.down(PEER, "closed", 0.2)
    assert plan.attempts(100.0) == [], "the first attempt is still under way"
    plan.attempt_ended(PEER, None, 0.3)
    assert plan.attempts(100.0) == [PEER]


def test_a_node_that_connects_to_us_is_not_tried() -> None:
    plan = a_plan()
    plan.want(PEER, "static", 0.0, forever=True)
    plan.up(PEER, 0.0)
    assert plan.attempts(100.0) == []


def test_a_node_that_is_connected_already_is_not_tried() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False, is_up=True)
    assert the(plan).state == "up"
    assert plan.attempts(100.0) == []


def test_a_found_name_is_forgotten_when_it_is_not_heard_any_more() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False)
    list(fail_until(plan, 0.0, FORGET_AFTER_S + 1))
    assert plan.status(FORGET_AFTER_S + 1) == []
    assert plan.next_time() is None


def test_a_found_name_is_remembered_while_it_is_heard_and_while_it_is_connected() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False)
    plan.want(PEER, "gossip", 200.0, forever=False)
    list(fail_until(plan, 200.0, FORGET_AFTER_S + 100))
    assert the(plan)
    plan.up(PEER, FORGET_AFTER_S + 150)
    assert plan.attempts(10 * FORGET_AFTER_S) == []
    plan.down(PEER, "gone", 10 * FORGET_AFTER_S)
    assert plan.attempts(11 * FORGET_AFTER_S - 1) == [PEER]


def test_a_name_of_the_static_list_is_never_forgotten() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False)
    plan.want(PEER, "static", 0.0, forever=True)
    list(fail_until(plan, 0.0, 3 * FORGET_AFTER_S))
    assert the(plan).forever
    assert the(plan).sources == ("gossip", "static")


def test_our_own_name_is_not_wanted() -> None:
    plan = a_plan()
    assert plan.want(US, "gossip", 0.0, forever=False) == "ourselves"
    assert plan.status(0.0) == []


@pytest.mark.parametrize(
    "name", ["", "x", "@h", "x@", "a@b@c", "a b@h", "a\n@h", "я@h", "x" * MAX_NODE_NAME_CHARACTERS + "@h"]
)
def test_what_is_no_node_name_is_not_wanted(name: str) -> None:
    assert a_plan().want(name, "gossip", 0.0, forever=False) == "invalid"


def test_found_names_are_bounded_and_the_static_list_is_not_kept_out() -> None:
    plan = a_plan()
    for number in range(MAX_FOUND):
        assert plan.want(f"n{number}@h", "gossip", 0.0, forever=False) == "new"
    assert plan.want("more@h", "gossip", 0.0, forever=False) == "full"
    assert plan.want("n0@h", "gossip", 0.0, forever=False) == "known"
    assert plan.want("named@h", "static", 0.0, forever=True) == "new"
    assert len(plan.status(0.0)) == MAX_FOUND + 1


def test_made_up_names_give_way_to_new_ones_but_known_nodes_do_not() -> None:
    plan = a_plan()
    plan.want(PEER, "gossip", 0.0, forever=False, is_up=True)
    for number in range(MAX_FOUND - 1):
        plan.want(f"n{number}@h", "gossip", 0.0, forever=False)
    plan.down(PEER, "gone", 0.0)
    list(fail_until(plan, 0.0, FIRST_RETRY_S * 2 ** (EXPENDABLE_AFTER + 1)))
    assert plan.want("new@h", "gossip", 10.0, forever=False) == "new"
    assert len(plan.status(0.0)) == MAX_FOUND
    assert the(plan)


def test_attempts_under_way_are_bounded_and_the_longest_due_go_first() -> None:
    plan = a_plan()
    for number in range(MAX_ATTEMPTS + 5):
        plan.want(f"n{number:03}@h", "static", number / 1000, forever=True)
    first = plan.attempts(1.0)
    assert first == [f"n{number:03}@h" for number in range(MAX_ATTEMPTS)]
    assert plan.attempts(1.0) == []
    assert plan.next_time() is None
    plan.attempt_ended(first[0], None, 1.0)
    assert plan.attempts(1.0) == [f"n{MAX_ATTEMPTS:03}@h"]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["want", "keep", "up", "down", "ended", "failed", "attempts"]),
        st.sampled_from([PEER, "a@h", "b@h", US, "no name"]),
        st.floats(0.0, 400.0),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(EVENTS)
def test_whatever_happens_no_node_is_tried_twice_at_once_and_a_waiting_one_has_its_turn(
    events: list[tuple[str, str, float]],
) -> None:
    plan, now = a_plan(), 0.0
    under_way: set[str] = set()
    for event, peer, wait in events:
        now += wait
        match event:
            case "want" | "keep":
                plan.want(peer, "gossip", now, forever=event == "keep")
            case "up":
                plan.up(peer, now)
            case "down":
                plan.down(peer, "closed", now)
            case "ended" | "failed":
                plan.attempt_ended(peer, None if event == "ended" else "refused", now)
                under_way.discard(peer)
            case _:
                begun = plan.attempts(now)
                assert not under_way & set(begun)
                assert not set(begun) & {US, "no name"}
                under_way |= set(begun)
        for status in plan.status(now):
            if status.state == "waiting":
                at = plan.next_time()
                assert at is not None
                assert at <= now + (status.next_attempt_in_s or 0.0) + 1e-6
            assert (status.state == "connecting") <= (status.peer in under_way)


# The connector


class ScriptedNode:
    """A node whose attempts fail until `reachable`, and which says how many run at once."""

    def __init__(self) -> None:
        self.name = Atom(US)
        self.reachable = False
        self.calls = 0
        self.at_once = 0
        self.most_at_once = 0
        self.up: set[Atom] = set()
        self.watchers: list[Callable[[Atom, bool, str], None]] = []

    def nodes(self) -> list[Atom]:
        return list(self.up)

    def monitor_nodes(self, watcher: Callable[[Atom, bool, str], None]) -> Callable[[], None]:
        self.watchers.append(watcher)
        return lambda: self.watchers.remove(watcher)

    async def connect(self, peer: str | Atom) -> None:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.001)
        finally:
            self.at_once -= 1
        if not self.reachable:
            raise NotConnected(f"cannot connect to {peer}")
        self.change(Atom(str(peer)), True)

    def change(self, peer: Atom, is_up: bool) -> None:
        (self.up.add if is_up else self.up.discard)(peer)
        for watcher in list(self.watchers):
            watcher(peer, is_up, "test")


async def test_the_connector_tries_until_the_node_is_there_and_again_after_a_loss() -> None:
    node = ScriptedNode()
    connector = Connector(node, retry_interval_s=0.01)
    await StaticList([PEER, US]).start(connector)
    assert node.calls == 0, "nobody is tried before the start"
    with capture_logs() as lines:
        connector.start()
        await eventually(lambda: node.calls >= 3, "three attempts")
    assert [line["reason"] for line in lines if line["event"] == "node_unreachable"] == [f"cannot connect to {PEER}"]
    assert connector.status()[0].last_error == f"cannot connect to {PEER}"
    node.reachable = True
    await eventually(lambda: connector.status()[0].state == "up", "connected")
    calls = node.calls
    node.change(Atom(PEER), False)
    await eventually(lambda: connector.status()[0].state == "up", "connected again")
    assert node.calls == calls + 1
    assert node.most_at_once == 1
    connector.stop()
    assert node.watchers == []


async def test_a_stopped_connector_tries_nobody() -> None:
    node = ScriptedNode()
    connector = Connector(node, retry_interval_s=0.01)
    connector.start()
    connector.want(PEER, "static", forever=True)
    await eventually(lambda: node.calls, "an attempt")
    connector.stop()
    await eventually(lambda: node.at_once == 0 and not connector._tasks, "the attempt is given up")
    calls = node.calls
    connector.want("other@127.0.0.1", "static", forever=True)
    assert connector._timer is None
    assert not connector._tasks
    assert node.calls == calls


async def test_refused_names_are_counted_and_reported_once() -> None:
    node = ScriptedNode()
    connector = Connector(node, retry_interval_s=1)
    with capture_logs() as lines:
        for number in range(MAX_FOUND + 50):
            connector.want(f"n{number}@h", "gossip", forever=False)
        for _ in range(10):
            assert not connector.want("no name", "gossip", forever=False)
    assert connector.refused == {"full": 50, "invalid": 10}
    assert len([line for line in lines if line["event"] == "node_names_refused"]) == 1


async def test_the_connector_keeps_two_real_nodes_connected() -> None:
    options = NodeOptions(epmd_port=_free_port())
    async with Node("kept_a@127.0.0.1", cookie="c", options=options) as ours:
        connector = Connector(ours, retry_interval_s=0.05)
        connector.start()
        connector.want("kept_b@127.0.0.1", "static", forever=True)
        await eventually(lambda: connector.status()[0].attempts >= 1, "a failed attempt")
        for _ in range(2):
            async with Node("kept_b@127.0.0.1", cookie="c", options=options) as theirs:
                await eventually(lambda: connector.status()[0].state == "up", "up")
                await eventually(theirs.nodes, "seen by the other")
            await eventually(lambda: connector.status()[0].state != "up", "down")
        connector.stop()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# DNS


class Wanted:
    """Takes every name."""

    def __init__(self) -> None:
        self.names: list[tuple[str, str, bool]] = []

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        self.names.append((peer, source, forever))
        return True


async def test_dns_names_a_node_for_every_address_again_and_again() -> None:
    answers = [["10.0.0.2", "10.0.0.1", "10.0.0.1"], ["10.0.0.3"]]
    asked = []

    async def resolve(query: str) -> list[str]:
        asked.append(query)
        return answers[min(len(asked), len(answers)) - 1]

    wanted = Wanted()
    poll = DnsPoll("stores.local", "store", 0.001, resolve=resolve)
    await poll.start(wanted)
    await eventually(lambda: len(wanted.names) >= 3, "three names")
    await poll.stop()
    assert asked[0] == "stores.local"
    assert wanted.names[:3] == [(f"store@10.0.0.{last}", "dns", False) for last in (1, 2, 3)]


async def test_a_failing_dns_query_is_logged_once_and_asked_again() -> None:
    calls = 0

    async def resolve(query: str) -> list[str]:
        nonlocal calls
        calls += 1
        if calls < 5:
            raise OSError("no such name")
        return ["10.0.0.1"]

    wanted = Wanted()
    poll = DnsPoll("stores.local", "store", 0.001, resolve=resolve)
    with capture_logs() as lines:
        await poll.start(wanted)
        await eventually(lambda: wanted.names, "an answer")
        await poll.stop()
    assert [line["event"] for line in lines] == ["dns_query_failed", "dns_query_answered_again"]


async def test_a_huge_dns_answer_is_cut() -> None:
    async def resolve(query: str) -> list[str]:
        return [f"10.{number >> 8}.{number & 255}.1" for number in range(5000)]

    wanted = Wanted()
    poll = DnsPoll("stores.local", "store", 60, resolve=resolve)
    await poll.start(wanted)
    await eventually(lambda: wanted.names, "an answer")
    await poll.stop()
    assert len(wanted.names) == MAX_ADDRESSES


async def test_dns_is_asked_of_the_system() -> None:
    assert await resolve_ipv4("127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(OSError, match="cannot be asked of DNS"):
        await resolve_ipv4("x" * 70)


@pytest.mark.parametrize("interval_s", [0, -1, MAX_DNS_INTERVAL_S + 1])
def test_a_dns_interval_that_would_let_names_be_forgotten_is_refused(interval_s: float) -> None:
    with pytest.raises(ValueError, match="DNS is asked"):
        DnsPoll("stores.local", "store", interval_s)
