"""What the cluster looks like: the states of nodes and stores as a state machine, and the monitor over real nodes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_kit import free_port

from gater.cluster import monitor
from gater.cluster.connector import Connector
from gater.cluster.introductions import GATER
from gater.cluster.monitor import (
    ASK_TIMEOUT_S,
    DIFFER_FOR_S,
    DOUBT_TIMEOUT_S,
    GATEWAY_REFRESH_S,
    HEALTH_INTERVAL_S,
    MAX_STORES_PER_NODE,
    MINORITY_AFTER_S,
    RECHECK_S,
    REFRESH_S,
    REMEMBER_DOWN_S,
    SETTLING_S,
    Ask,
    Change,
    ClusterMonitor,
    ClusterState,
    Effect,
    MembersSeen,
    NodeChanged,
    NodeStatus,
    Question,
    StoreChanged,
    StoreStatus,
)
from gater.erl import make_node
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom, Term

A, B, C, D, E = (Atom(f"store{number}@127.0.0.1") for number in range(5))
CLIENT = Atom("client@127.0.0.1")
STORE = Atom("reg_gh")
DEADLINE_S = 10.0

APPLICATIONS = Question("applications")
STORES = Question("stores")
LEADER = Question("leader", STORE)
MEMBERS = Question("members", STORE)

RUNNING: Term = [(Atom("ex_esdb"), b"ex_esdb", b"0.11.0"), (Atom("kernel"), b"", b"8.5")]
STOPPED: Term = [(Atom("kernel"), b"", b"8.5")]


class Cluster:
    """Store nodes as they would answer, and the state machine that asks them. Time passes only by `pass_time`."""

    def __init__(self, *nodes: Atom) -> None:
        self.state = ClusterState()
        self.now = 0.0
        self.applications: dict[Atom, Term] = dict.fromkeys(nodes, RUNNING)
        self.leader: dict[Atom, Term] = dict.fromkeys(nodes, (STORE, *nodes[:1]))
        self.members: dict[Atom, Iterable[Atom]] = dict.fromkeys(nodes, nodes)
        self.silent: set[Atom] = set()
        self.effects: list[Effect] = []
        for node in nodes:
            self.do(self.state.connected(node, self.now))

    def do(self, effects: list[Effect]) -> None:
        """Keep effects, and answer the questions among them."""
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Ask):
                self.do(self.answer(effect.node, effect.question))

    def answer(self, node: Atom, question: Question) -> list[Effect]:
        if node in self.silent:
            return self.state.unanswered(node, question, "timeout", self.now)
        answers: dict[Question, Any] = {
            APPLICATIONS: self.applications[node],
            STORES: [STORE],
            LEADER: self.leader.get(node, Atom("undefined")),
            MEMBERS: (Atom("ok"), [(STORE, each) for each in self.members.get(node, ())]),
        }
        return self.state.answered(node, question, answers[question], self.now, self.now)

    def pass_time(self, seconds: float) -> list[Effect]:
        """Let time pass; the effects of it."""
        before, end = len(self.effects), self.now + seconds
        while (at := self.state.next_time()) is not None and at <= end:
            self.now = max(self.now, at)
            self.do(self.state.tick(self.now))
        self.now = end
        return self.effects[before:]

    def lose(self, *nodes: Atom) -> None:
        for node in nodes:
            self.do(self.state.disconnected(node, "gone", self.now))

    @property
    def store(self) -> StoreStatus:
        found = self.state.store(STORE)
        assert found is not None
        return found

    def node(self, name: Atom) -> NodeStatus:
        return next(each for each in self.state.nodes(self.now) if each.node is name)


def changes(effects: list[Effect]) -> list[tuple[Atom, str | None, str, bool]]:
    return [(each.node, each.before, each.after, each.is_ex_esdb) for each in effects if isinstance(each, NodeChanged)]


# Nodes


def test_a_node_that_runs_ex_esdb_is_one_with_its_stores_leader_and_members() -> None:
    cluster = Cluster(A, B, C)
    assert {each.state for each in cluster.state.nodes(0)} == {"up"}
    assert all(each.is_ex_esdb and each.stores == (STORE,) for each in cluster.state.nodes(0))
    assert cluster.store == StoreStatus(STORE, A, (A, B, C), (A, B, C), None)
    assert cluster.store.has_quorum
    assert cluster.state.health().status == "healthy"


def test_a_node_without_ex_esdb_is_asked_for_its_applications_only_and_seldom_once_it_has_settled() -> None:
    cluster = Cluster()
    cluster.applications[CLIENT] = STOPPED
    cluster.do(cluster.state.connected(CLIENT, 0.0))
    assert not cluster.node(CLIENT).is_ex_esdb
    assert cluster.node(CLIENT).applications == {Atom("kernel")}
    settling = [each for each in cluster.pass_time(SETTLING_S) if isinstance(each, Ask)]
    assert len(settling) == SETTLING_S // REFRESH_S
    later = [each for each in cluster.pass_time(10 * HEALTH_INTERVAL_S) if isinstance(each, Ask)]
    assert len(later) <= 11
    assert {each.question for each in settling + later} == {APPLICATIONS}


def test_a_gateway_is_asked_so_often_that_five_seconds_of_silence_are_noticed() -> None:
    cluster = Cluster()
    cluster.applications[CLIENT] = [(GATER, [], []), *STOPPED]
    cluster.do(cluster.state.connected(CLIENT, 0.0))
    cluster.pass_time(SETTLING_S + HEALTH_INTERVAL_S)
    assert GATEWAY_REFRESH_S + ASK_TIMEOUT_S <= 5
    asked = [each for each in cluster.pass_time(10 * GATEWAY_REFRESH_S) if isinstance(each, Ask)]
    assert len(asked) == 10
    cluster.silent.add(CLIENT)
    assert changes(cluster.pass_time(GATEWAY_REFRESH_S)) == [(CLIENT, "up", "suspect", False)]


def test_a_node_that_says_for_the_first_time_what_it_runs_is_told_each_time_it_connects() -> None:
    state = ClusterState()
    for at in (0.0, 100.0):
        state.connected(CLIENT, at)
        assert state.node(CLIENT, at).applications == frozenset()
        told = NodeChanged(CLIENT, "up", "up", False)
        assert state.answered(CLIENT, APPLICATIONS, STOPPED, at, at + 0.1) == [told]
        state.tick(at + 4)
        assert state.answered(CLIENT, APPLICATIONS, STOPPED, at + 4, at + 4.1) == []
        assert state.node(CLIENT, at + 5).applications == {Atom("kernel")}
        state.disconnected(CLIENT, "gone", at + 6)


def test_a_node_whose_ex_esdb_starts_after_we_connected_is_noticed_soon() -> None:
    cluster = Cluster()
    cluster.applications[A] = STOPPED
    cluster.members[A] = [A]
    cluster.leader[A] = (STORE, A)
    cluster.do(cluster.state.connected(A, 0.0))
    cluster.pass_time(10)
    cluster.applications[A] = RUNNING
    effects = cluster.pass_time(REFRESH_S)
    assert changes(effects) == [(A, "up", "up", True)]
    assert cluster.store.leader is A


def test_a_node_that_does_not_answer_is_suspect_until_it_does() -> None:
    cluster = Cluster(A, B, C)
    cluster.silent.add(B)
    assert changes(cluster.pass_time(REFRESH_S)) == [(B, "up", "suspect", True)]
    assert cluster.node(B).error == "timeout"
    assert cluster.store.reachable == (A, C)
    assert cluster.state.health().degraded == (B,)
    cluster.pass_time(20)
    cluster.silent.clear()
    assert changes(cluster.pass_time(RECHECK_S)) == [(B, "suspect", "up", True)]
    assert cluster.node(B).error is None
    assert cluster.store.reachable == (A, B, C)


def test_a_node_that_somebody_waited_for_in_vain_is_asked_at_once_and_suspect_if_it_is_silent() -> None:
    cluster = Cluster(A, B, C)
    (ask,) = cluster.state.doubt(B)
    assert isinstance(ask, Ask)
    assert ask == Ask(B, Question("alive"))
    assert ask.timeout_s == DOUBT_TIMEOUT_S
    assert cluster.state.doubt(B) == []
    assert cluster.state.answered(B, ask.question, B, cluster.now, cluster.now) == []
    assert cluster.state.doubt(B) == [ask]
    told = cluster.state.unanswered(B, ask.question, "alive not answered", cluster.now + DOUBT_TIMEOUT_S)
    assert NodeChanged(B, "up", "suspect", True) in told
    # It is asked on anyway.
    assert cluster.state.doubt(B) == []
    assert cluster.state.doubt(CLIENT) == []


def test_a_question_that_is_still_unanswered_is_not_asked_again() -> None:
    state = ClusterState()
    asked = state.connected(A, 0.0)
    assert [each for each in asked if isinstance(each, Ask)] == [Ask(A, APPLICATIONS)]
    assert [each for each in state.tick(100.0) if isinstance(each, Ask)] == []
    state.unanswered(A, APPLICATIONS, "timeout", 101.0)
    assert [each for each in state.tick(200.0) if isinstance(each, Ask)] == [Ask(A, APPLICATIONS)]


def test_a_late_answer_to_a_lost_connection_is_nobodys() -> None:
    state = ClusterState()
    state.connected(A, 0.0)
    state.disconnected(A, "gone", 1.0)
    assert state.answered(A, APPLICATIONS, RUNNING, 0.0, 2.0) == []
    assert state.unanswered(A, APPLICATIONS, "timeout", 2.0) == []
    assert state.refused(A, APPLICATIONS, 0.0, 2.0) == []
    assert state.state(A) == "down"


def test_a_node_that_stops_ex_esdb_but_stays_connected_is_draining() -> None:
    cluster = Cluster(A, B, C)
    cluster.applications[A] = STOPPED
    assert (A, "up", "draining", True) in changes(cluster.pass_time(REFRESH_S))
    assert cluster.store.reachable == (B, C)
    cluster.applications[A] = RUNNING
    assert (A, "draining", "up", True) in changes(cluster.pass_time(REFRESH_S))


def test_a_gateway_that_does_not_run_gater_any_more_is_draining_until_it_connects_anew() -> None:
    cluster = Cluster(A)
    running: list[Term] = [(Atom("gater"), b"Gateway to ExESDB", b"1.0")]
    cluster.applications[B] = running
    cluster.do(cluster.state.connected(B, cluster.now))
    assert cluster.node(B).state == "up"
    cluster.applications[B] = []
    assert (B, "up", "draining", False) in changes(cluster.pass_time(REFRESH_S))
    cluster.applications[B] = running
    cluster.lose(B)
    cluster.do(cluster.state.connected(B, cluster.now))
    assert cluster.node(B).state == "up"


def test_a_node_that_said_it_drains_stays_so_until_it_connects_anew() -> None:
    cluster = Cluster(A, B, C)
    cluster.do(cluster.state.draining(A, cluster.now))
    cluster.pass_time(10)
    assert cluster.node(A).state == "draining"
    cluster.lose(A)
    assert cluster.node(A).state == "down"
    cluster.do(cluster.state.connected(A, cluster.now))
    assert cluster.node(A).state == "up"


def test_wanted_nodes_are_connecting_then_up_then_down_and_forgotten_when_nobody_wants_them() -> None:
    cluster = Cluster()
    cluster.applications[A], cluster.members[A] = RUNNING, [A]
    cluster.do(cluster.state.wanted([A, B], 0.0))
    assert [cluster.node(each).state for each in (A, B)] == ["connecting", "connecting"]
    cluster.do(cluster.state.connected(A, 0.0))
    cluster.do(cluster.state.wanted([], 1.0))
    assert [each.node for each in cluster.state.nodes(1.0)] == [A]
    cluster.lose(A)
    assert cluster.node(A).error == "gone"
    cluster.do(cluster.state.wanted([], REMEMBER_DOWN_S - 1))
    assert cluster.node(A).state == "down"
    cluster.do(cluster.state.wanted([A], REMEMBER_DOWN_S + 1))
    assert cluster.node(A).state == "down"
    cluster.do(cluster.state.wanted([], REMEMBER_DOWN_S + 1))
    assert cluster.state.nodes(0) == []


def test_answer_times_are_kept_and_smoothed() -> None:
    state = ClusterState()
    state.connected(A, 0.0)
    state.answered(A, APPLICATIONS, STOPPED, 0.0, 0.010)
    state.tick(50.0)
    state.answered(A, APPLICATIONS, STOPPED, 50.0, 50.090)
    (node,) = state.nodes(51.0)
    assert node.answer_s == pytest.approx(0.090)
    assert node.smoothed_answer_s == pytest.approx(0.020)
    assert node.in_state_s == 51.0


def test_a_node_without_khepri_holds_the_stores_it_is_told_to_and_nothing_speaks_against_writing() -> None:
    state = ClusterState()
    state.connected(A, 0.0)
    state.answered(A, APPLICATIONS, RUNNING, 0.0, 0.0)
    state.refused(A, STORES, 0.0, 0.0)
    effects = state.holds(A, [STORE], 0.0)
    assert [each for each in effects if isinstance(each, Ask)] == [Ask(A, LEADER), Ask(A, MEMBERS)]
    state.refused(A, LEADER, 0.0, 0.0)
    state.refused(A, MEMBERS, 0.0, 0.0)
    assert state.state(A) == "up"
    status = state.store(STORE)
    assert status is not None
    assert status.has_quorum
    assert status.members == ()


# Stores


def test_a_new_leader_is_a_change_of_the_store() -> None:
    cluster = Cluster(A, B, C)
    cluster.leader = dict.fromkeys((A, B, C), (STORE, B))
    assert StoreChanged(STORE) in cluster.pass_time(REFRESH_S)
    assert cluster.store.leader is B
    cluster.leader = {each: Atom("undefined") for each in (A, B, C)}
    cluster.pass_time(REFRESH_S)
    assert cluster.store.leader is None
    assert cluster.store.has_quorum


def test_a_store_whose_leader_is_lost_is_asked_for_the_next_one_soon() -> None:
    cluster = Cluster(A, B, C)
    cluster.pass_time(REFRESH_S)
    cluster.lose(A)
    # Nobody has noticed yet.
    cluster.pass_time(RECHECK_S)
    assert cluster.store.leader is A
    cluster.leader = {B: (STORE, C), C: (STORE, C)}
    cluster.pass_time(RECHECK_S)
    assert cluster.store.leader is C
    before = len(cluster.effects)
    cluster.pass_time(10 * REFRESH_S)
    assert len([each for each in cluster.effects[before:] if isinstance(each, Ask) and each.question == LEADER]) <= 22


def test_nothing_changes_while_all_answers_stay_the_same() -> None:
    cluster = Cluster(A, B, C)
    assert {type(each) for each in cluster.pass_time(60)} == {Ask}


@pytest.mark.parametrize(
    ("members", "lost", "problem"),
    [(3, 1, None), (3, 2, "minority"), (5, 2, None), (5, 3, "minority"), (1, 1, "minority"), (2, 1, "minority")],
)
def test_a_store_without_a_majority_of_reachable_members_is_in_the_minority(
    members: int, lost: int, problem: str | None
) -> None:
    nodes = (A, B, C, D, E)[:members]
    cluster = Cluster(*nodes)
    cluster.lose(*nodes[:lost])
    assert cluster.store.problem is None, "not at once: connections come and go one by one"
    cluster.pass_time(MINORITY_AFTER_S)
    assert cluster.store.problem == problem
    assert cluster.store.members == nodes
    assert cluster.state.health().quorum == (problem is None)
    for node in nodes[:lost]:
        cluster.do(cluster.state.connected(node, cluster.now))
    assert cluster.store == StoreStatus(STORE, A, nodes, nodes, None), "recovery is automatic"


def test_frozen_members_do_not_count_as_reachable() -> None:
    cluster = Cluster(A, B, C)
    cluster.silent |= {A, B}
    cluster.pass_time(REFRESH_S + MINORITY_AFTER_S)
    assert cluster.store.problem == "minority"


def test_meeting_a_cluster_node_by_node_is_no_trouble() -> None:
    cluster = Cluster()
    for node in (A, B, C):
        cluster.applications[node], cluster.members[node], cluster.leader[node] = RUNNING, (A, B, C), (STORE, A)
    for node in (A, B, C):
        cluster.now += 0.1
        cluster.do(cluster.state.connected(node, cluster.now))
        assert cluster.store.has_quorum


def test_members_that_are_not_connected_are_told() -> None:
    cluster = Cluster()
    cluster.applications[A], cluster.members[A] = RUNNING, (A, B, C)
    cluster.do(cluster.state.connected(A, 0.0))
    assert MembersSeen((B, C)) in cluster.effects


@pytest.mark.parametrize("what", ["leaders_differ", "members_differ"])
def test_nodes_that_contradict_each_other_are_asked_again_before_it_is_believed(what: str) -> None:
    cluster = Cluster(A, B, C)
    cluster.do([])
    if what == "leaders_differ":
        question, stale, fresh = LEADER, (STORE, B), (STORE, A)
    else:
        question, stale, fresh = (
            MEMBERS,
            (Atom("ok"), [(STORE, A), (STORE, B)]),
            (Atom("ok"), [(STORE, each) for each in (A, B, C)]),
        )
    asked = [each for each in cluster.state.tick(REFRESH_S) if isinstance(each, Ask) and each.question == question]
    assert [each.node for each in asked] == [A, B, C]
    cluster.now = REFRESH_S
    effects = cluster.state.answered(C, question, stale, REFRESH_S - 0.1, REFRESH_S)
    assert cluster.store.problem is None
    assert Ask(C, question) in effects, "asked again at once"
    cluster.state.answered(C, question, fresh, REFRESH_S, REFRESH_S + 0.1)
    assert cluster.store.problem is None
    assert cluster.store.members == (A, B, C)


@pytest.mark.parametrize("what", ["leaders_differ", "members_differ"])
def test_nodes_that_go_on_contradicting_each_other_are_a_problem_until_they_agree(what: str) -> None:
    cluster = Cluster(A, B, C)
    if what == "leaders_differ":
        cluster.leader[C] = (STORE, C)
    else:
        cluster.members[C] = (A, B)
    cluster.pass_time(REFRESH_S)
    assert cluster.store.problem is None, "so may an election look"
    cluster.pass_time(DIFFER_FOR_S + RECHECK_S)
    assert cluster.store.problem == what
    cluster.leader[C] = (STORE, A)
    cluster.members[C] = (A, B, C)
    cluster.pass_time(RECHECK_S)
    assert cluster.store.problem is None


def test_a_member_that_left_is_no_member_any_more_once_all_say_so() -> None:
    cluster = Cluster(A, B, C)
    cluster.members = dict.fromkeys((A, B, C), (A, B))
    cluster.pass_time(REFRESH_S)
    assert cluster.store.members == (A, B)
    assert cluster.store.problem is None


@pytest.mark.parametrize("says", [(A, B), (A, B, C), (C,)], ids=["the others'", "still a member", "alone"])
def test_a_node_that_a_majority_does_not_hold_for_a_member_is_an_outsider(says: tuple[Atom, ...]) -> None:
    """What is left of ExESDB 0.11 when a node is killed while it joins again after a restart."""
    cluster = Cluster(A, B, C)
    cluster.members = {A: (A, B), B: (A, B), C: says}
    cluster.leader[C] = (STORE, C)
    cluster.pass_time(REFRESH_S)
    assert cluster.store == StoreStatus(STORE, A, (A, B), (A, B), None, outsiders=(C,))
    cluster.pass_time(DIFFER_FOR_S + RECHECK_S)
    assert cluster.store.has_quorum, "the others go on"
    cluster.lose(B)
    cluster.pass_time(MINORITY_AFTER_S)
    assert cluster.store == StoreStatus(STORE, A, (A, B), (A,), "minority", outsiders=(C,)), "C counts for nothing"
    cluster.do(cluster.state.connected(B, cluster.now))
    cluster.members = dict.fromkeys((A, B, C), (A, B, C))
    cluster.leader[C] = (STORE, A)
    cluster.pass_time(REFRESH_S)
    assert cluster.store == StoreStatus(STORE, A, (A, B, C), (A, B, C), None)


@pytest.mark.parametrize(
    "members",
    [
        {A: (A,), B: (A, B)},
        {A: (A,), B: (B,)},
        {A: (A,), B: (A, B, C), C: (A, B, C)},
        {A: (A, B), B: (A, B), C: (C, D), D: (C, D)},
        {A: (A, B, C, D, E), B: (A, B, C, D, E), C: (C,)},
    ],
)
def test_nobody_is_an_outsider_without_a_larger_majority_that_agrees(members: dict[Atom, tuple[Atom, ...]]) -> None:
    """A node that was emptied and leads itself does not outvote one that holds the events."""
    cluster = Cluster(*members)
    cluster.members = {**members}
    cluster.pass_time(REFRESH_S)
    cluster.pass_time(DIFFER_FOR_S + RECHECK_S)
    assert cluster.store.outsiders == ()
    assert cluster.store.problem is not None


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Atom("undefined"),
        [],
        {},
        7,
        (Atom("error"), Atom("noproc")),
        (Atom("ok"), []),
        (Atom("ok"), 5),
        (Atom("ok"), [1, 2]),
        (1, 2, 3),
        [(1,), ()],
        b"x",
    ],
)
@pytest.mark.parametrize("question", [APPLICATIONS, STORES, LEADER, MEMBERS], ids=lambda each: each.kind)
def test_strange_answers_are_survived(question: Question, answer: Term) -> None:
    cluster = Cluster(A, B, C)
    asked = cluster.state.tick(REFRESH_S)
    assert Ask(A, question) in asked
    cluster.do(cluster.state.answered(A, question, answer, REFRESH_S, REFRESH_S))
    assert cluster.node(A).state in ("up", "draining")
    cluster.pass_time(30)
    assert cluster.store.problem is None


def test_the_stores_of_a_node_are_bounded() -> None:
    state = ClusterState()
    state.connected(A, 0.0)
    state.answered(A, APPLICATIONS, RUNNING, 0.0, 0.0)
    many: Term = [Atom(f"s{number}") for number in range(10 * MAX_STORES_PER_NODE)]
    effects = state.answered(A, STORES, many, 0.0, 0.0)
    effects += state.holds(A, [Atom(f"t{number}") for number in range(10 * MAX_STORES_PER_NODE)], 0.0)
    assert len([each for each in effects if isinstance(each, Ask)]) == 2 * MAX_STORES_PER_NODE
    assert len(state.nodes(0.0)[0].stores) == MAX_STORES_PER_NODE


def test_the_stores_of_a_cluster_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "MAX_STORES", 5)
    state = ClusterState()
    for number in range(10):
        node = Atom(f"n{number}@h")
        state.connected(node, 0.0)
        state.answered(node, APPLICATIONS, RUNNING, 0.0, 0.0)
        state.answered(node, STORES, [Atom(f"s{number}")], 0.0, 0.0)
    assert len(state._stores) == 5


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["connected", "lost", "silent", "speaks", "stops", "starts", "time", "wanted", "leader", "members"]
        ),
        st.sampled_from([A, B, C]),
        st.floats(0.0, 30.0),
    ),
    max_size=50,
)


@settings(max_examples=100)
@given(EVENTS)
def test_whatever_happens_the_cluster_is_healthy_again_once_all_is_well(events: list[tuple[str, Atom, float]]) -> None:
    cluster = Cluster(A, B, C)
    for event, node, seconds in events:
        match event:
            case "connected":
                cluster.do(cluster.state.connected(node, cluster.now))
            case "lost":
                cluster.lose(node)
            case "silent":
                cluster.silent.add(node)
            case "speaks":
                cluster.silent.discard(node)
            case "stops" | "starts":
                cluster.applications[node] = STOPPED if event == "stops" else RUNNING
            case "time":
                cluster.pass_time(seconds)
            case "wanted":
                cluster.do(cluster.state.wanted([node], cluster.now))
            case "leader":
                cluster.leader[node] = (STORE, node)
            case _:
                cluster.members[node] = (A, node)
        down = [each for each in (A, B, C) if cluster.state.state(each) not in ("up", "suspect", "draining")]
        if cluster.state.store(STORE) is not None:
            assert not set(down) & set(cluster.store.reachable)
    cluster.silent.clear()
    cluster.applications = dict.fromkeys((A, B, C), RUNNING)
    cluster.leader = dict.fromkeys((A, B, C), (STORE, B))
    cluster.members = dict.fromkeys((A, B, C), (A, B, C))
    for node in (A, B, C):
        if cluster.state.state(node) in (None, "down", "connecting"):
            cluster.do(cluster.state.connected(node, cluster.now))
    cluster.pass_time(HEALTH_INTERVAL_S + 2 * REFRESH_S)
    assert cluster.store == StoreStatus(STORE, B, (A, B, C), (A, B, C), None)
    assert cluster.state.health().status == "healthy"


# The monitor over nodes of ours that answer as store nodes do


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


def a_store_node(name: str, options: NodeOptions, members: list[str], *, hangs: bool = False) -> Node:
    node = make_node(name, cookie="c", options=options)
    node.add_application("ex_esdb", "ex_esdb", "0.11.0")

    async def hang(_: Term, __: Term) -> Term:
        await asyncio.Event().wait()

    ok: Term = (Atom("ok"), [(STORE, Atom(each)) for each in members])
    node.exports.add("khepri", "get_store_ids", lambda: [STORE])
    node.exports.add("ra_leaderboard", "lookup_leader", lambda store: (store, Atom(members[0])))
    node.exports.add("khepri_cluster", "members", hang if hangs else lambda store, favor: ok)
    return node


async def test_the_monitor_finds_members_it_was_not_told_of_and_tells_about_every_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitor, "REFRESH_S", 0.05)
    monkeypatch.setattr(monitor, "MINORITY_AFTER_S", 0.2)
    options = NodeOptions(epmd_port=free_port())
    names = ["seen_a@127.0.0.1", "seen_b@127.0.0.1"]
    async with make_node("watcher@127.0.0.1", cookie="c", options=options) as ours:
        connector = Connector(ours, retry_interval_s=0.1, random=random.Random(1))
        watching = ClusterMonitor(ours, connector)
        told: list[Change] = []
        watching.watch(told.append)
        connector.start()
        watching.start()
        async with a_store_node(names[0], options, names):
            connector.want(names[0], "static", forever=True)
            await eventually(lambda: watching.node_state(Atom(names[0])) == "up", "up")
            await eventually(lambda: (found := watching.store(STORE)) and found.problem == "minority", "minority")
            assert watching.health().status == "unhealthy"
            async with a_store_node(names[1], options, names):
                await eventually(lambda: (found := watching.store(STORE)) and found.has_quorum, "quorum")
                store = watching.store(STORE)
                assert store is not None
                assert store.leader is Atom(names[0])
                assert [str(each) for each in store.reachable] == names
                assert [each.state for each in watching.nodes()] == ["up", "up"]
                assert watching.health().status == "healthy"
            await eventually(lambda: watching.node_state(Atom(names[1])) == "down", "down")
        watching.stop()
        connector.stop()
    assert NodeChanged(Atom(names[0]), "connecting", "up", False) in told
    assert NodeChanged(Atom(names[1]), "up", "down", True) in told
    assert StoreChanged(STORE) in told


async def test_a_node_that_hangs_is_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "ASK_TIMEOUT_S", 0.1)
    options = NodeOptions(epmd_port=free_port())
    async with make_node("watcher2@127.0.0.1", cookie="c", options=options) as ours:
        watching = ClusterMonitor(ours)
        async with a_store_node("hangs@127.0.0.1", options, ["hangs@127.0.0.1"], hangs=True):
            await ours.connect("hangs@127.0.0.1")
            watching.start()
            await eventually(lambda: watching.node_state(Atom("hangs@127.0.0.1")) == "suspect", "suspect")
            (node,) = watching.nodes()
            assert node.error is not None
            assert node.error.startswith("members not answered")
            watching.stop()
