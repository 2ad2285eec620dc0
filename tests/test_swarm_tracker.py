"""The tracker, one transition at a time: states, waiting, rumours, conflicts, limits."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gater.erl.terms import Atom, Pid
from gater.swarm import clock as itc
from gater.swarm import messages, tracker
from gater.swarm.events import (
    AskApplications,
    Call,
    Changed,
    Demonitor,
    Die,
    Kept,
    Monitor,
    NodeDown,
    NodeUp,
    Note,
    ProcessDown,
    Received,
    Reply,
    Resume,
    Send,
    SetTimer,
    TimerFired,
    TrackerDown,
)
from gater.swarm.messages import (
    AddMeta,
    Handoff,
    RemoveMeta,
    ReplicaEvent,
    Sync,
    SyncAck,
    SyncErr,
    SyncRecv,
    Track,
    Untrack,
    UntrackName,
    UpdateMeta,
    Whereis,
)
from gater.swarm.registry import Entry
from gater.swarm.tracker import State, Tracker, TrackerOptions, ignores

ME, A, B, C = (Atom(f"{name}@h") for name in ("me", "a", "b", "c"))
GROUP = Atom("grp")


def pid(node, number, creation=1):
    return Pid(node, number, 0, creation)


def entry(name, process, meta=None, events=1):
    return (Atom("entry"), name, process, None, meta or {}, (0, events))


class Bench:
    """A tracker on `me@h` and what it has done so far."""

    def __init__(self, **options):
        options.setdefault("random", random.Random(1))
        self.tracker = Tracker(pid(ME, 1), TrackerOptions(**options))
        self.now = 0.0
        self.effects = self.tracker.start(0.0)

    def give(self, event, after=0.0):
        self.now += after
        self.effects = self.tracker.receive(event, self.now)
        return self.effects

    def hear(self, node, message):
        return self.give(Received(node, message))

    def told(self, node, change, events=1):
        return self.hear(node, ReplicaEvent(pid(node, 1), (0, events), change))

    def ask(self, request):
        self.give(Call("me", request))
        return next((effect.value for effect in self.effects if isinstance(effect, Reply)), None)

    def join(self, *originals, gaters=()):
        """Be in `tracking` with these members, all of them heard."""
        for node in originals:
            self.give(NodeUp(node, True))
        for node in gaters:
            self.give(NodeUp(node, True, is_gater=True))
        self.give(TimerFired("cluster_join"), after=5.0)
        self.answer_syncs()
        assert self.tracker.state is State.TRACKING
        return self

    def answer_syncs(self, **registries):
        """Answer every `sync` it sends, until it asks no more."""
        asked = []
        while self.tracker.state is State.SYNCING:
            (node,) = next(m.to for m in self.effects if isinstance(m, Send) and isinstance(m.message, Sync))
            asked.append(node)
            registry = registries.get(node.name.partition("@")[0], [])
            self.hear(node, SyncRecv(pid(node, 1), self.tracker.clock, registry))
        return asked

    def sent(self, kind=object):
        """(receivers, message or change) of everything sent just now."""
        found = []
        for effect in self.effects:
            if isinstance(effect, Send):
                message = effect.message.change if isinstance(effect.message, ReplicaEvent) else effect.message
                if isinstance(message, kind):
                    found.append((effect.to, message))
        return found

    def of(self, kind):
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def names(self):
        return {entry.name: entry.pid for entry in self.tracker.registry}


# Starting.


def test_a_tracker_that_finds_nobody_starts_alone():
    bench = Bench(sync_nodes_timeout_s=2.0)
    assert bench.effects == [SetTimer("cluster_join", 2.0)]
    assert bench.tracker.state is State.CLUSTER_WAIT
    bench.give(TimerFired("cluster_join"))
    assert bench.tracker.state is State.TRACKING
    assert SetTimer("anti_entropy", 300.0) in bench.effects


def test_calls_wait_until_it_has_joined_but_looking_up_does_not():
    bench = Bench()
    assert bench.ask(Track(b"n", pid(ME, 9), {})) is None
    assert bench.ask(Whereis(b"n")) == messages.UNDEFINED
    bench.give(NodeUp(A, True))
    bench.give(TimerFired("cluster_join"))
    assert bench.tracker.state is State.SYNCING
    bench.hear(A, SyncRecv(pid(A, 1), ((0, 1), 0), [entry(b"n", pid(A, 5))]))
    assert bench.of(Reply) == [Reply("me", messages.already_registered(pid(A, 5)))]


def test_calls_beyond_the_limit_are_told_so(monkeypatch):
    monkeypatch.setattr(tracker, "MAX_POSTPONED_CALLS", 1)
    bench = Bench()
    assert bench.ask(Untrack(pid(ME, 9))) is None
    assert bench.ask(Untrack(pid(ME, 9))) == messages.error(messages.OVERLOADED)


def test_every_member_is_asked_for_its_registry_when_joining():
    bench = Bench()
    for node in (A, B, C):
        bench.give(NodeUp(node, True))
    bench.give(TimerFired("cluster_join"))
    asked = bench.answer_syncs(
        a=[entry(b"a", pid(A, 5)), entry(b"b", pid(B, 66))], b=[entry(b"b", pid(B, 5))], c=[entry(b"c", pid(C, 5))]
    )
    assert sorted(map(str, asked)) == ["a@h", "b@h", "c@h"]
    assert bench.names() == {b"a": pid(A, 5), b"b": pid(B, 5), b"c": pid(C, 5)}


def test_what_is_said_about_a_silent_member_is_believed_until_it_speaks():
    bench = Bench()
    bench.give(NodeUp(A, True))
    bench.give(NodeUp(B, True))
    bench.give(TimerFired("cluster_join"))
    silent = bench.sent(Sync)[0][0][0]
    other = B if silent is A else A
    bench.give(TimerFired("wake"), after=15.0)
    bench.hear(other, SyncRecv(pid(other, 1), (1, 0), [entry(b"x", pid(silent, 5)), entry(b"y", pid(silent, 6))]))
    assert bench.names() == {b"x": pid(silent, 5), b"y": pid(silent, 6)}
    bench.give(TimerFired("wake"), after=60.0)
    assert bench.answer_syncs(**{silent.name[0]: [entry(b"x", pid(silent, 5))]}) == [silent]
    assert bench.names() == {b"x": pid(silent, 5)}


# Syncing.


def test_a_sync_from_the_only_node_is_how_a_waiting_tracker_joins():
    bench = Bench()
    bench.hear(A, Sync(pid(A, 1), (1, 0)))
    assert bench.tracker.state is State.AWAITING_SYNC_ACK
    assert bench.sent() == [((pid(A, 1),), SyncRecv(bench.tracker.pid, ((0, 1), 0), []))]
    assert bench.tracker.clock == ((1, 0), 0)
    bench.hear(A, SyncAck(pid(A, 1), ((0, 1), 0), [entry(b"a", pid(A, 5))]))
    assert bench.tracker.state is State.TRACKING
    assert bench.names() == {b"a": pid(A, 5)}


def test_sync_requests_of_originals_wait_until_there_is_something_to_tell():
    bench = Bench()
    bench.give(NodeUp(A, True))
    bench.give(NodeUp(B, True))
    bench.hear(A, Sync(pid(A, 1), (1, 0)))
    assert bench.sent() == []
    bench.give(TimerFired("cluster_join"))
    bench.answer_syncs(b=[entry(b"b", pid(B, 5))])
    ((to, answer),) = bench.sent(SyncRecv)
    assert to == (pid(A, 1),)
    assert [each.name for each in answer.entries] == [b"b"]
    assert bench.tracker.state is State.AWAITING_SYNC_ACK
    bench.hear(A, SyncAck(pid(A, 1), answer.clock, []))
    assert bench.tracker.state is State.TRACKING
    # A part of our identity is theirs now.
    assert itc.join(bench.tracker.clock, (answer.clock[0], 0))[0] == 1
    assert bench.tracker.clock[0] != 1


def test_a_sync_request_is_answered_at_once_after_joining_whatever_else_goes_on():
    bench = Bench().join(A, B)
    bench.give(TimerFired("anti_entropy"), after=300.0)
    assert bench.tracker.state is State.SYNCING
    other = B if bench.sent(Sync)[0][0] == (A,) else A
    bench.hear(other, Sync(pid(other, 1), ((0, 1), 7)))
    assert bench.sent(SyncRecv) == [((pid(other, 1),), SyncRecv(bench.tracker.pid, ((0, 1), 7), []))]
    assert bench.tracker.state is State.SYNCING


@pytest.mark.parametrize(
    ("name", "theirs", "begins"),
    [("a@h", (1, 0), True), ("z@h", (1, 0), False), ("a@h", (1, 5), False), ("z@h", (0, 0), False)],
)
def test_of_two_that_ask_each_other_one_begins(name, theirs, begins):
    bench, other = Bench(), Atom(name)
    bench.give(NodeUp(other, True))
    bench.give(TimerFired("cluster_join"))
    bench.hear(other, Sync(pid(other, 1), theirs))
    assert bool(bench.sent(SyncRecv)) is begins
    assert bench.tracker.state is (State.AWAITING_SYNC_ACK if begins else State.SYNCING)


def test_an_original_that_was_asked_before_it_asked_is_answered_soon():
    """It keeps our request and, as it has asked us, waits for our answer first (seen with Swarm 3.4.0)."""
    bench, other = Bench(), Atom("z@h")
    bench.give(NodeUp(other, True))
    bench.give(TimerFired("cluster_join"))
    bench.hear(other, Sync(pid(other, 1), (1, 0)))
    assert [timer.after_s for timer in bench.of(SetTimer) if timer.timer == "wake"] == [1.0]
    bench.give(TimerFired("wake"), after=1.0)
    ((to, answer),) = bench.sent(SyncRecv)
    assert to == (pid(other, 1),)
    assert bench.tracker.state is State.AWAITING_SYNC_ACK
    bench.hear(other, SyncAck(pid(other, 1), answer.clock, [entry(b"theirs", pid(other, 5))]))
    assert bench.tracker.state is State.TRACKING
    assert bench.tracker.is_synced(other)
    assert bench.names() == {b"theirs": pid(other, 5)}


def test_a_member_that_begins_after_all_is_not_answered_too():
    bench, other = Bench(), Atom("z@h")
    bench.give(NodeUp(other, True))
    bench.give(TimerFired("cluster_join"))
    bench.hear(other, Sync(pid(other, 1), (1, 0)))
    bench.hear(other, SyncRecv(pid(other, 1), ((0, 1), 0), [entry(b"theirs", pid(other, 5))]))
    assert bench.tracker.state is State.TRACKING
    bench.give(TimerFired("wake"), after=1.0)
    assert bench.sent(SyncRecv) == []


def test_who_does_not_answer_is_passed_over_and_asked_again_later():
    bench = Bench()
    bench.give(NodeUp(A, True))
    bench.give(TimerFired("cluster_join"))
    pauses = []
    for _ in range(7):
        assert bench.tracker.state is State.SYNCING
        bench.give(TimerFired("wake"), after=15.0)
        assert bench.tracker.state is State.TRACKING
        assert bench.tracker.joined
        (pause,) = [timer.after_s for timer in bench.of(SetTimer) if timer.timer == "wake"]
        pauses.append(pause)
        bench.give(TimerFired("wake"), after=pause)
    assert pauses == [15.0, 30.0, 60.0, 120.0, 240.0, 300.0, 300.0]


def test_a_late_answer_is_taken_all_the_same():
    bench = Bench()
    bench.give(NodeUp(A, True))
    bench.give(TimerFired("cluster_join"))
    bench.give(TimerFired("wake"), after=15.0)
    bench.hear(A, SyncRecv(pid(A, 1), ((0, 1), 0), [entry(b"a", pid(A, 5))]))
    assert bench.names() == {b"a": pid(A, 5)}
    assert [to for to, _ in bench.sent(SyncAck)] == [(pid(A, 1),)]
    assert bench.tracker.clock == (1, 0)


def test_a_sync_that_is_refused_or_whose_tracker_dies_ends():
    for end in (Received(A, SyncErr(Atom("node_ignored"))), TrackerDown(A), NodeDown(A)):
        bench = Bench()
        bench.give(NodeUp(A, True))
        bench.give(TimerFired("cluster_join"))
        assert bench.tracker.state is State.SYNCING
        bench.give(end)
        assert bench.tracker.state is State.TRACKING


def test_an_ack_that_never_comes_is_not_waited_for_for_ever():
    bench = Bench().join(A)
    bench.hear(A, Sync(pid(A, 1), (1, 0)))
    assert bench.tracker.state is State.AWAITING_SYNC_ACK
    bench.give(TimerFired("wake"), after=15.0)
    assert bench.tracker.state is State.TRACKING


def test_anti_entropy_asks_every_member_in_turn():
    bench = Bench().join(A, B, C)
    asked = []
    for _ in range(6):
        bench.give(TimerFired("anti_entropy"), after=300.0)
        asked += bench.answer_syncs()
    assert sorted(map(str, asked[:3])) == ["a@h", "b@h", "c@h"]
    assert asked[:3] == asked[3:]


def test_anti_entropy_repairs_what_was_missed_in_both_directions():
    bench = Bench().join(A)
    bench.told(A, Track(b"gone", pid(A, 5), {}))
    bench.give(TimerFired("anti_entropy"), after=300.0)
    bench.answer_syncs(a=[entry(b"missed", pid(A, 6)), entry(b"stale", pid(ME, 99))])
    assert bench.names() == {b"missed": pid(A, 6)}
    # An original would keep a name of our process that the process does not have.
    assert bench.sent(Untrack) == [((A,), Untrack(pid(ME, 99)))]


def test_a_bad_entry_does_not_stop_a_merge():
    bench = Bench().join(A)
    bench.give(TimerFired("anti_entropy"), after=300.0)
    bench.answer_syncs(a=[5, entry(b"bad", b"pid"), (Atom("entry"),), entry(b"good", pid(A, 6))])
    assert bench.names() == {b"good": pid(A, 6)}


def test_a_large_registry_is_merged_in_pieces_and_its_member_waits_meanwhile():
    bench = Bench(merge_chunk=10).join(A, B)
    registry = [entry(b"%d" % i, pid(A, 100 + i)) for i in range(25)]
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), registry))
    assert bench.of(Resume) == [Resume()]
    assert len(bench.tracker.registry) == 10
    bench.told(A, Track(b"late", pid(A, 5), {}))
    bench.told(B, Track(b"other", pid(B, 5), {}))
    assert b"late" not in bench.tracker.registry
    assert b"other" in bench.tracker.registry
    steps = 0
    while bench.give(Resume()) and bench.of(Resume):
        steps += 1
    assert steps < 10
    assert len(bench.tracker.registry) == 27


def test_a_member_that_says_too_much_during_a_merge_is_asked_again(monkeypatch):
    monkeypatch.setattr(tracker, "MAX_HELD_MESSAGES", 3)
    bench = Bench(merge_chunk=3).join(A)
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), [entry(b"%d" % i, pid(A, 100 + i)) for i in range(9)]))
    for i in range(5):
        bench.told(A, Untrack(pid(A, 100 + i)))
    for _ in range(20):
        if bench.tracker.state is not State.SYNCING:
            bench.give(Resume())
    assert bench.sent(Sync)[0][0] == (A,)


def test_a_node_that_goes_down_during_a_merge_leaves_nothing_behind():
    bench = Bench(merge_chunk=2).join(A)
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), [entry(b"%d" % i, pid(A, 100 + i)) for i in range(9)]))
    bench.told(A, Track(b"held", pid(A, 5), {}))
    bench.give(NodeDown(A))
    for _ in range(10):
        bench.give(Resume())
    assert bench.names() == {}
    assert bench.tracker.state is State.TRACKING


def test_a_frozen_node_comes_back_by_itself():
    bench = Bench().join(A, B)
    bench.ask(Track(b"mine", pid(ME, 9), {}))
    for node in (A, B):
        bench.give(NodeDown(node), after=100.0)
    assert bench.tracker.nodes == []
    bench.give(NodeUp(A, True))
    assert bench.tracker.state is State.SYNCING
    assert bench.answer_syncs(a=[entry(b"a", pid(A, 5))]) == [A]
    bench.give(NodeUp(B, True))
    assert bench.answer_syncs() == [B]
    assert bench.names() == {b"mine": pid(ME, 9), b"a": pid(A, 5)}


# Nodes.


def test_a_node_without_swarm_is_asked_ten_times_more():
    bench = Bench().join()
    timer = ("ensure_swarm_started_on_remote_node", A)
    for _ in range(10):
        bench.give(NodeUp(A, False))
        assert SetTimer(timer, 1.0) in bench.effects
        assert AskApplications(A) in bench.give(TimerFired(timer), after=1.0)
    assert bench.give(NodeUp(A, False)) == []
    bench.give(NodeUp(A, True))
    assert bench.tracker.nodes == [A]


def test_a_node_that_went_down_is_not_asked_again():
    bench = Bench().join()
    bench.give(NodeUp(A, False))
    bench.give(NodeDown(A))
    assert bench.give(TimerFired(("ensure_swarm_started_on_remote_node", A))) == []


@pytest.mark.parametrize(
    ("name", "blacklist", "whitelist", "ignored"),
    [
        ("a@h", (), (), False),
        ("a@h", ("a@h",), (), True),
        ("a@h", ("^b",), (), False),
        ("a@h", (re.compile("^a"),), (), True),
        ("a@h", (), ("^b",), True),
        ("a@h", ("^a",), ("^a",), False),
    ],
)
def test_black_and_whitelist(name, blacklist, whitelist, ignored):
    assert ignores(name, blacklist, whitelist) is ignored


def test_an_ignored_node_is_no_member_and_is_told_so():
    bench = Bench(node_blacklist=("^a@",)).join()
    remsh = Atom("remsh1@h")
    for node in (A, remsh):
        bench.give(NodeUp(node, True))
        bench.told(node, Track(b"n", pid(node, 5), {}))
        bench.hear(node, Sync(pid(node, 1), (1, 0)))
        assert bench.sent() == [((pid(node, 1),), SyncErr(messages.NODE_IGNORED))]
    assert bench.tracker.nodes == []
    assert bench.names() == {}


def test_a_tracker_that_is_ignored_itself_ignores_everybody():
    bench = Bench(node_blacklist=("^me@",)).join()
    bench.give(NodeUp(A, True))
    assert bench.tracker.nodes == []


def test_a_message_in_the_name_of_another_tracker_is_dropped():
    bench = Bench().join(A, B)
    bench.hear(A, ReplicaEvent(pid(B, 1), (0, 1), Track(b"n", pid(B, 5), {})))
    assert bench.names() == {}
    assert [note.event for note in bench.of(Note)] == ["message of another node's tracker"]


# Registrations.


def test_registering_is_told_to_all_and_seen_at_once():
    bench = Bench().join(A, B)
    assert bench.ask(Track(b"n", pid(ME, 9), {})) == messages.ok(pid(ME, 9))
    assert bench.sent() == [((A, B), Track(b"n", pid(ME, 9), {}))]
    assert Monitor(pid(ME, 9)) in bench.effects
    assert [(each.old, each.new.pid) for each in bench.of(Changed)] == [(None, pid(ME, 9))]
    assert bench.ask(Track(b"n", pid(ME, 9), {})) == messages.ok(pid(ME, 9))
    assert bench.ask(Track(b"n", pid(ME, 8), {})) == messages.already_registered(pid(ME, 9))
    assert bench.ask(Whereis(b"n")) == pid(ME, 9)


def test_a_process_is_monitored_once_for_all_its_names():
    bench = Bench().join(A)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    assert bench.of(Monitor) == [Monitor(pid(A, 5))]
    bench.told(A, Track(b"m", pid(A, 5), {}))
    assert bench.of(Monitor) == []
    bench.give(ProcessDown(pid(A, 5)))
    assert bench.names() == {}
    assert bench.sent() == [((A,), Untrack(pid(A, 5)))]
    assert bench.give(ProcessDown(pid(A, 5))) == []


def test_the_process_of_a_gater_is_its_own_to_watch():
    bench = Bench().join(gaters=[A])
    bench.told(A, Track(b"n", pid(A, 5), {}))
    assert bench.of(Monitor) == []


def test_a_lost_connection_is_no_death_to_be_told_to_others():
    bench = Bench().join(A, B)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.give(ProcessDown(pid(A, 5), connection_lost=True))
    assert bench.names() == {}
    assert bench.sent() == [((A,), Untrack(pid(A, 5)))]


def test_unregistering_one_name_keeps_the_others():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.ask(Track(b"m", pid(ME, 9), {}))
    bench.ask(UntrackName(b"n"))
    assert bench.names() == {b"m": pid(ME, 9)}
    assert [change for _, change in bench.sent()] == [Untrack(pid(ME, 9)), Track(b"m", pid(ME, 9), {})]
    bench.ask(UntrackName(b"nobody"))
    assert bench.sent() == []
    bench.ask(Untrack(pid(ME, 9)))
    assert bench.names() == {}
    assert Demonitor(pid(ME, 9)) in bench.effects


def test_groups_are_joined_and_left():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.ask(AddMeta(GROUP, True, pid(ME, 9)))
    assert bench.sent() == [((A,), UpdateMeta({GROUP: True}, pid(ME, 9)))]
    assert bench.tracker.registry.members(GROUP) == [pid(ME, 9)]
    bench.ask(RemoveMeta(GROUP, pid(ME, 9)))
    assert bench.sent() == [((A,), UpdateMeta({}, pid(ME, 9)))]
    assert bench.tracker.registry.members(GROUP) == []
    bench.ask(AddMeta(GROUP, True, pid(ME, 77)))
    assert bench.sent() == []


def test_names_of_one_process_keep_their_own_properties():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {b"k": 1}))
    bench.ask(Track(b"m", pid(ME, 9), {}))
    bench.ask(AddMeta(GROUP, True, pid(ME, 9)))
    expected = {b"n": {b"k": 1, GROUP: True}, b"m": {GROUP: True}}
    assert {each.name: each.meta for each in bench.tracker.registry} == expected
    assert {change.name: change.meta for _, change in bench.sent(Track)} == expected


def test_a_registry_that_is_full_takes_no_more(monkeypatch):
    monkeypatch.setattr(tracker, "MAX_NAMES", 2)
    bench = Bench().join(A)
    for i in range(4):
        bench.told(A, Track(b"%d" % i, pid(A, 5 + i), {}))
    bench.told(A, Track(b"ours", pid(ME, 8), {}))
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), [entry(b"%d" % i, pid(A, 5 + i)) for i in range(6)]))
    assert bench.ask(Track(b"n", pid(ME, 9), {})) == messages.error(messages.OVERLOADED)
    assert sorted(bench.names()) == [b"0", b"1"]


# Rumours.


def test_a_rumour_is_acted_upon_and_checked():
    bench = Bench().join(A, B)
    bench.told(B, Track(b"n", pid(A, 5), {}))
    assert bench.names() == {b"n": pid(A, 5)}
    bench.give(TimerFired("wake"), after=2.0)
    bench.give(TimerFired("wake"), after=5.0)
    assert bench.answer_syncs() == [A]
    assert bench.names() == {}


def test_a_rumour_that_is_confirmed_needs_no_checking():
    bench = Bench().join(A, B)
    bench.told(B, Track(b"n", pid(A, 5), {}))
    bench.told(B, Track(b"m", pid(A, 6), {}))
    bench.told(B, Untrack(pid(A, 6)), events=2)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.give(ProcessDown(pid(A, 6)))
    bench.give(TimerFired("wake"), after=10.0)
    assert bench.tracker.state is State.TRACKING
    assert bench.names() == {b"n": pid(A, 5)}


def test_a_process_unregistered_by_another_is_asked_about():
    bench = Bench().join(A, B)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.told(B, Untrack(pid(A, 5)), events=2)
    assert bench.names() == {}
    bench.give(TimerFired("wake"), after=2.0)
    bench.give(TimerFired("wake"), after=5.0)
    assert bench.answer_syncs(a=[entry(b"n", pid(A, 5))]) == [A]
    assert bench.names() == {b"n": pid(A, 5)}


def asked_again(bench):
    """Whom it asks within the next seconds."""
    bench.give(TimerFired("wake"), after=2.0)
    first = [to for to, _ in bench.sent(Sync)]
    bench.give(TimerFired("wake"), after=5.0)
    return first + [to for to, _ in bench.sent(Sync)]


def test_a_change_by_another_that_is_heard_before_the_registration_is_checked():
    for change in (Untrack(pid(A, 5)), UpdateMeta({GROUP: True}, pid(A, 5))):
        bench = Bench().join(A, B)
        bench.told(B, change, events=2)
        assert asked_again(bench) == []
        bench.told(A, Track(b"n", pid(A, 5), {}))
        assert asked_again(bench) == [(A,)]


def test_a_change_by_another_that_is_heard_after_the_end_is_forgotten():
    bench = Bench().join(A, B)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.told(A, Untrack(pid(A, 5)), events=2)
    bench.told(B, Untrack(pid(A, 5)), events=2)
    assert asked_again(bench) == []
    bench.give(TimerFired("nothing"), after=10.0)
    bench.told(A, Track(b"n", pid(A, 5), {}), events=3)
    assert asked_again(bench) == []


def test_changes_heard_early_are_remembered_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(tracker, "MAX_HEARD_EARLY", 2)
    bench = Bench().join(A, B)
    for number in (5, 6, 7):
        bench.told(B, Untrack(pid(A, number)))
    bench.told(A, Track(b"n", pid(A, 5), {}))
    assert asked_again(bench) == []
    bench.told(A, Track(b"m", pid(A, 7), {}))
    assert asked_again(bench) == [(A,)]


def test_an_untrack_of_an_original_that_cannot_mean_what_we_know_is_asked_about():
    """It means one name, which we need not have heard of, and says the process."""
    bench = Bench().join(A)
    bench.told(A, Track(b"n", pid(A, 5), {}), events=3)
    bench.told(A, Untrack(pid(A, 5)), events=2)
    assert bench.names() == {}
    bench.give(TimerFired("wake"), after=5.0)
    assert bench.answer_syncs(a=[entry(b"n", pid(A, 5))]) == [A]
    assert bench.names() == {b"n": pid(A, 5)}


def test_what_is_said_while_a_registry_is_on_its_way_is_checked_with_the_next_one():
    bench = Bench().join(A, B)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.told(B, Untrack(pid(A, 5)), events=2)
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), [entry(b"n", pid(A, 5))]))
    assert bench.names() == {b"n": pid(A, 5)}
    bench.give(TimerFired("wake"), after=2.0)
    bench.give(TimerFired("wake"), after=5.0)
    assert bench.answer_syncs(a=[]) == [A]
    assert bench.names() == {}


@pytest.mark.parametrize(
    "theirs", [[], [entry(b"n", pid(A, 5)), entry(b"m", pid(A, 6))], [entry(b"n", pid(A, 5), {GROUP: True})]]
)
def test_an_original_of_which_another_gater_knows_something_else_is_asked(theirs):
    bench = Bench().join(A, gaters=[B])
    bench.give(TimerFired("wake"), after=5.0)
    bench.answer_syncs()
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.hear(B, Sync(pid(B, 1), (0, 1)))
    bench.hear(B, SyncAck(pid(B, 1), (0, 1), [entry(b"n", pid(A, 5))]))
    assert asked_again(bench) == []
    bench.hear(B, Sync(pid(B, 1), (0, 1)))
    bench.hear(B, SyncAck(pid(B, 1), (0, 1), theirs))
    assert bench.names() == {b"n": pid(A, 5)}
    assert bench.sent(Sync) == [((A,), Sync(bench.tracker.pid, bench.tracker.clock))]


@pytest.mark.parametrize(("gaters", "limit", "asked"), [([B], 1, [A]), ([B], 0, []), ([], 1, [])])
def test_an_original_is_asked_once_more_after_joining_beside_another_gater(monkeypatch, gaters, limit, asked):
    """The other one may have been changing something there, which neither tells us: we were no member yet."""
    monkeypatch.setattr(tracker, "SAY_AGAIN_NAMES", limit)
    bench = Bench()
    for node in gaters:
        bench.give(NodeUp(node, True, is_gater=True))
    bench.give(NodeUp(A, True))
    bench.give(TimerFired("cluster_join"), after=5.0)
    bench.answer_syncs(a=[entry(b"n", pid(A, 5))])
    bench.give(TimerFired("wake"), after=5.0)
    assert bench.answer_syncs(a=[entry(b"n", pid(A, 5))]) == asked
    bench.give(TimerFired("wake"), after=60.0)
    assert bench.answer_syncs() == []


@pytest.mark.parametrize(
    ("listed", "news"),
    [
        ([], Untrack(pid(A, 5))),
        ([entry(b"n", pid(A, 5)), entry(b"m", pid(A, 6))], Track(b"m", pid(A, 6), {})),
        ([entry(b"n", pid(A, 5))], None),
    ],
)
def test_what_an_original_has_changed_without_a_word_is_told_to_other_gaters(listed, news):
    bench = Bench().join(A, gaters=[B])
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.hear(A, Sync(pid(A, 1), (0, 1)))
    bench.hear(A, SyncAck(pid(A, 1), (0, 1), listed))
    assert bench.sent((Track, Untrack)) == ([] if news is None else [((B,), news)])


def test_rumours_about_a_gaters_processes_are_ignored():
    bench = Bench().join(A, gaters=[B])
    bench.told(A, Track(b"n", pid(B, 5), {}))
    assert bench.names() == {}
    bench.told(B, Track(b"n", pid(B, 5), {}))
    bench.told(A, Untrack(pid(B, 5)), events=9)
    assert bench.names() == {b"n": pid(B, 5)}


def test_what_others_do_to_our_processes_is_done_and_said_again():
    bench = Bench().join(A, gaters=[B])
    bench.told(A, Track(b"n", pid(ME, 9), {}))
    assert bench.names() == {b"n": pid(ME, 9)}
    assert bench.sent() == [((A, B), Track(b"n", pid(ME, 9), {}))]
    bench.told(B, UpdateMeta({GROUP: True}, pid(ME, 9)), events=2)
    assert bench.sent() == [((A, B), Track(b"n", pid(ME, 9), {GROUP: True}))]
    bench.told(B, Untrack(pid(ME, 9)), events=3)
    assert bench.names() == {}
    assert bench.sent() == [((A, B), Untrack(pid(ME, 9)))]


def test_who_knows_too_little_to_unregister_our_process_is_told_the_truth():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.ask(AddMeta(GROUP, True, pid(ME, 9)))
    bench.told(A, Untrack(pid(ME, 9)), events=1)
    assert bench.names() == {b"n": pid(ME, 9)}
    assert bench.sent() == [((A,), Track(b"n", pid(ME, 9), {GROUP: True}))]


def test_a_member_that_had_lost_us_cannot_unregister_our_processes():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.give(NodeDown(A))
    bench.told(A, Untrack(pid(ME, 9)), events=50)
    assert bench.names() == {b"n": pid(ME, 9)}


def test_a_name_of_ours_cannot_be_given_to_another_of_our_processes_from_outside():
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(A, Track(b"n", pid(ME, 8), {}))
    assert bench.names() == {b"n": pid(ME, 9)}
    assert [change for _, change in bench.sent()] == [Untrack(pid(ME, 8)), Track(b"n", pid(ME, 9), {})]


def test_processes_of_nodes_without_swarm_can_be_registered_by_members():
    bench = Bench().join(A)
    bench.give(NodeUp(C, False))
    bench.told(A, Track(b"n", pid(C, 5), {}))
    assert bench.names() == {b"n": pid(C, 5)}
    assert Monitor(pid(C, 5)) in bench.effects
    bench.told(A, Track(b"m", pid(B, 5), {}))
    assert b"m" not in bench.tracker.registry
    bench.give(NodeDown(C))
    assert bench.names() == {}


def test_changes_that_did_not_know_of_each_other_both_count():
    bench = Bench().join(A)
    bench.told(A, Track(b"n", pid(A, 5), {}), events=1)
    bench.ask(AddMeta(b"here", 1, pid(A, 5)))
    bench.hear(A, ReplicaEvent(pid(A, 1), (0, (1, 0, 9)), UpdateMeta({b"there": 2}, pid(A, 5))))
    assert bench.tracker.registry.get(b"n").meta == {b"here": 1, b"there": 2}


# Conflicts.


def test_of_two_gaters_the_one_with_the_lesser_name_keeps_a_name():
    bench = Bench().join(gaters=[A])
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(A, Track(b"n", pid(A, 5), {}))
    assert bench.names() == {b"n": pid(A, 5)}
    assert bench.of(Die) == [Die(pid(ME, 9))]
    assert bench.sent() == [((A,), Untrack(pid(ME, 9)))]
    assert bench.tracker.contested == []


def test_the_one_that_keeps_the_name_says_nothing_and_the_other_waits_behind():
    z = Atom("z@h")
    bench = Bench().join(gaters=[z])
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(z, Track(b"n", pid(z, 5), {}))
    assert bench.names() == {b"n": pid(ME, 9)}
    assert bench.sent() == []
    assert bench.of(Kept) == [Kept(b"n", pid(ME, 9))]
    assert [each.pid for each in bench.tracker.contested] == [pid(z, 5)]
    bench.give(ProcessDown(pid(ME, 9)))
    assert bench.names() == {b"n": pid(z, 5)}


@pytest.mark.parametrize(("events", "ours"), [(0, True), (1, True), (2, False)])
def test_against_an_original_the_clock_decides_as_it_does_there(events, ours):
    bench = Bench().join(A)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(A, Track(b"n", pid(A, 5), {}), events=events)
    assert bench.names() == {b"n": pid(ME, 9) if ours else pid(A, 5)}
    assert bench.sent() == [((A,), Track(b"n", pid(ME, 9), {}) if ours else Untrack(pid(ME, 9)))]


def test_where_clocks_say_nothing_the_ring_decides_and_the_winner_is_said_louder():
    for name in (b"%d" % i for i in range(20)):
        bench = Bench()
        bench.hear(A, Sync(pid(A, 1), (1, 0)))
        bench.hear(A, SyncAck(pid(A, 1), ((0, 1), 0), []))
        bench.ask(Track(name, pid(ME, 9), {}))
        theirs = ReplicaEvent(pid(A, 1), (0, (0, 0, 1)), Track(name, pid(A, 5), {}))
        bench.hear(A, theirs)
        owner = bench.tracker.strategy.key_to_node(name)
        assert bench.names() == {name: pid(A, 5) if owner is A else pid(ME, 9)}
        if owner is ME:
            (said,) = [each.message for each in bench.of(Send)]
            assert said.change == Track(name, pid(ME, 9), {})
            assert itc.compare(said.clock, theirs.clock) == "gt"


def test_nobody_gives_way_to_a_rumour():
    bench = Bench().join(A, B)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(B, Track(b"n", pid(A, 5), {}), events=9)
    assert bench.names() == {b"n": pid(ME, 9)}
    assert bench.of(Die) == []
    bench.told(A, Track(b"n", pid(A, 5), {}), events=9)
    assert bench.names() == {b"n": pid(A, 5)}


def test_when_the_rival_of_our_process_is_gone_originals_hear_the_name_again():
    bench = Bench().join(A, B)
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.give(ProcessDown(pid(A, 5)))
    assert ((A, B), Track(b"n", pid(ME, 9), {})) in bench.sent()


def test_who_learns_later_that_our_rival_is_gone_hears_the_name_once_more():
    """As long as an original has the other process under the name it ignores ours (seen with Swarm 3.4.0)."""
    for still_there in (True, False):
        bench = Bench().join(A, gaters=[B])
        bench.ask(Track(b"n", pid(ME, 9), {}))
        bench.told(A, Track(b"n", pid(A, 5), {}))
        bench.give(ProcessDown(pid(A, 5)))
        assert [timer.after_s for timer in bench.of(SetTimer) if timer.timer == "won"] == [2.0]
        if not still_there:
            bench.give(ProcessDown(pid(ME, 9)))
        bench.give(TimerFired("won"), after=2.0)
        assert bench.sent() == ([((A,), Track(b"n", pid(ME, 9), {}))] if still_there else [])
        bench.give(TimerFired("won"), after=2.0)
        assert bench.sent() == []


def test_a_member_that_turns_out_to_be_a_gater_is_judged_as_one():
    bench = Bench().join()
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.hear(A, SyncRecv(pid(A, 1), (1, 0), [entry(b"n", pid(A, 5))]))
    assert bench.names() == {b"n": pid(ME, 9)}
    bench.give(NodeUp(A, True, is_gater=True))
    assert bench.names() == {b"n": pid(A, 5)}


def test_nobody_gives_way_to_a_node_that_is_down():
    z = Atom("z@h")
    bench = Bench().join(gaters=[A, z])
    bench.ask(Track(b"n", pid(ME, 9), {}))
    bench.told(z, Track(b"n", pid(z, 5), {}), events=9)
    bench.give(NodeDown(z))
    assert bench.names()[b"n"] == pid(ME, 9)
    assert bench.of(Die) == []


def test_a_newer_process_of_the_same_member_takes_the_place_of_the_older():
    bench = Bench().join(A)
    bench.told(A, Track(b"n", pid(A, 5), {}))
    bench.told(A, Track(b"n", pid(A, 6), {}))
    assert bench.names() == {b"n": pid(A, 6)}
    assert bench.tracker.contested == []


# Anything at all.

nodes = st.sampled_from([ME, A, B, C])
pids = st.builds(pid, nodes, st.integers(1, 3))
names = st.sampled_from([b"n", b"m", (Atom("w"), 1), 1, 1.0, "text", [1], {}])
metas = st.sampled_from([{}, {GROUP: True}, {b"k": 1}, {messages.MFA: (Atom("m"), Atom("f"), [])}, {messages.MFA: 5}])
clocks = st.sampled_from([(0, 0), (0, 1), (0, 2), (0, (0, 0, 1)), (0, (0, 1, 0)), (1, 0), ((0, 1), 0), ((0, 0), 3)])
changes = st.one_of(st.builds(Track, names, pids, metas), st.builds(Untrack, pids), st.builds(UpdateMeta, metas, pids))
registries = st.lists(st.builds(Entry, names, pids, metas, clocks), max_size=4)


def said(node):
    sender = st.just(pid(node, 1))
    return st.one_of(
        st.builds(ReplicaEvent, sender, clocks, changes),
        st.builds(Sync, sender, clocks),
        st.builds(SyncRecv, sender, clocks, registries),
        st.builds(SyncAck, sender, clocks, registries),
        st.builds(SyncErr, names),
        st.builds(Handoff, sender, names, metas, names, clocks),
    ).map(lambda message: Received(node, message))


timers = st.sampled_from(["cluster_join", "anti_entropy", "wake", "x", ("retry", 1)])
anything = st.one_of(
    st.sampled_from([A, B, C]).flatmap(said),
    st.builds(NodeUp, nodes, st.booleans(), st.booleans()),
    st.builds(NodeDown, nodes),
    st.builds(ProcessDown, pids, st.booleans()),
    st.builds(TrackerDown, nodes),
    st.builds(TimerFired, timers),
    st.builds(Call, st.none(), st.one_of(changes.filter(lambda c: not isinstance(c, UpdateMeta)),
                                         st.builds(AddMeta, names, names, pids), st.builds(RemoveMeta, names, pids),
                                         st.builds(UntrackName, names), st.builds(Whereis, names))),
    st.just(Resume()),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(anything, max_size=40), st.integers(1, 3))
def test_whatever_comes_in_any_order_is_survived(events, chunk):
    machine = Tracker(pid(ME, 1), TrackerOptions(merge_chunk=chunk))
    machine.start(0.0)
    for i, event in enumerate(events):
        for effect in machine.receive(event, float(i)):
            if isinstance(effect, Send):
                messages.message_to_term(effect.message)
    for i in range(200):
        machine.receive(Resume(), 100.0 + i)
    assert not machine.receive(Resume(), 300.0)
    assert len(machine.registry) <= 8


def test_merging_and_dropping_a_large_registry_never_pauses_for_long():
    count = 20_000
    registry = [entry((Atom("w"), Atom("s"), b"%d" % i), pid(A, 100 + i)) for i in range(count)]
    machine = Tracker(pid(ME, 1))
    machine.start(0.0)
    machine.receive(NodeUp(A, True), 0.0)
    machine.receive(TimerFired("cluster_join"), 5.0)
    for event, left in ((Received(A, SyncRecv(pid(A, 1), (1, 0), registry)), count), (NodeDown(A), 0)):
        pauses, queue = [], [event]
        while queue:
            start = time.process_time()
            effects = machine.receive(queue.pop(), 6.0)
            pauses.append(time.process_time() - start)
            queue += [effect for effect in effects if isinstance(effect, Resume)]
        assert len(machine.registry) == left
        # Garbage collection may fall into one of them; it is not ours to time.
        assert sorted(pauses)[-3] < 0.02
