"""Processes placed by Swarm: started where the ring says, moved, restarted; and what we cannot run, run elsewhere."""

import pytest

from gater.erl.terms import Atom, Pid
from gater.swarm import messages
from gater.swarm.events import (
    Answered,
    AskRegistry,
    BeginHandoff,
    Call,
    CallTracker,
    Die,
    EndHandoff,
    Failed,
    Kill,
    NodeDown,
    NodeUp,
    Received,
    Reply,
    ResolveConflict,
    Send,
    SetTimer,
    StartProcess,
    TimerFired,
)
from gater.swarm.messages import Handoff, HandOver, ReplicaEvent, StartAndTrack, SyncRecv, Track, Untrack, Whereis
from gater.swarm.ring import StaticQuorumRing
from gater.swarm.tracker import Tracker, TrackerOptions

ME, A, B = Atom("me@h"), Atom("a@h"), Atom("b@h")
MFA = (Atom("Elixir.Worker"), Atom("start_link"), [1])
META = {messages.MFA: MFA}
OK, ERROR, UNDEF, NOPROC = Atom("ok"), Atom("error"), Atom("undef"), Atom("noproc")


def pid(node, number):
    return Pid(node, number, 0, 1)


class Bench:
    def __init__(self, *members, **options):
        self.tracker = Tracker(pid(ME, 1), TrackerOptions(**options))
        self.effects = self.tracker.start(0.0)
        for node in members:
            self.give(NodeUp(node, True))
        self.give(TimerFired("cluster_join"), 5.0)
        for node in members:
            self.give(Received(node, SyncRecv(pid(node, 1), (1, 0), [])), 5.0)

    def give(self, event, now=10.0):
        self.effects = self.tracker.receive(event, now)
        return self.effects

    def ask(self, request):
        self.give(Call("caller", request))
        return self.reply()

    def reply(self):
        return next((effect.value for effect in self.effects if isinstance(effect, Reply)), None)

    def the(self, kind):
        (effect,) = [effect for effect in self.effects if isinstance(effect, kind)]
        return effect

    def of(self, kind):
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def sent(self):
        messages_ = [effect.message for effect in self.of(Send)]
        return [message.change if isinstance(message, ReplicaEvent) else message for message in messages_]

    def name_of(self, node, *but):
        """A name that the ring gives to `node`, and then to nobody of `but` first."""
        for i in range(10_000):
            order = list(self.tracker.strategy.preference(b"%d" % i))
            if order[0] is node and (not but or order[1] in but):
                return b"%d" % i
        raise AssertionError

    def start_ours(self, name, number=9):
        self.ask(StartAndTrack(name, META))
        self.give(Answered(self.the(StartProcess).tag, (OK, pid(ME, number))))
        return pid(ME, number)


def test_a_name_of_ours_is_started_by_us_and_registered():
    bench = Bench(A)
    name = bench.name_of(ME)
    assert bench.ask(StartAndTrack(name, META)) is None
    start = bench.the(StartProcess)
    assert (start.node, start.mfa) == (ME, MFA)
    bench.give(Answered(start.tag, (OK, pid(ME, 9))))
    assert bench.reply() == messages.ok(pid(ME, 9))
    assert bench.sent() == [Track(name, pid(ME, 9), META)]
    assert bench.ask(StartAndTrack(name, META)) == messages.already_registered(pid(ME, 9))


def test_what_we_cannot_run_is_started_on_the_next_node_of_the_ring():
    bench = Bench(A, B)
    name = bench.name_of(ME, B)
    bench.ask(StartAndTrack(name, META))
    bench.give(Failed(bench.the(StartProcess).tag, UNDEF))
    start = bench.the(StartProcess)
    assert (start.node, start.mfa) == (B, MFA)
    bench.give(Answered(start.tag, (OK, pid(B, 5))))
    assert bench.reply() == messages.ok(pid(B, 5))
    assert bench.tracker.registry.get(name).pid == pid(B, 5)
    assert bench.sent() == [Track(name, pid(B, 5), META)]


def test_what_nobody_can_run_is_an_error():
    bench = Bench(A)
    bench.ask(StartAndTrack(bench.name_of(ME), META))
    for _ in range(2):
        bench.give(Failed(bench.the(StartProcess).tag, (UNDEF, [])))
    assert bench.reply() == messages.error(UNDEF)


def test_a_process_that_fails_to_start_is_an_error():
    bench = Bench()
    bench.ask(StartAndTrack(b"n", META))
    bench.give(Answered(bench.the(StartProcess).tag, Atom("ignore")))
    assert bench.reply() == messages.error((Atom("invalid_return"), Atom("ignore")))
    bench.ask(StartAndTrack(b"n", META))
    bench.give(Failed(bench.the(StartProcess).tag, Atom("badarith")))
    assert bench.reply() == messages.error(Atom("badarith"))
    assert bench.ask(StartAndTrack(b"n", {})) == messages.error(Atom("badarg"))


def test_of_two_who_start_one_name_the_second_hears_of_the_first():
    bench = Bench()
    bench.give(Call("first", StartAndTrack(b"n", META)))
    start = bench.the(StartProcess)
    bench.give(Call("second", StartAndTrack(b"n", META)))
    assert bench.effects == []
    bench.give(Answered(start.tag, (OK, pid(ME, 9))))
    assert [(each.caller, each.value) for each in bench.of(Reply)] == [
        ("first", messages.ok(pid(ME, 9))),
        ("second", messages.already_registered(pid(ME, 9))),
    ]


def test_a_process_started_for_a_name_that_is_taken_meanwhile_is_killed():
    bench = Bench()
    bench.ask(StartAndTrack(b"n", META))
    tag = bench.the(StartProcess).tag
    bench.ask(Track(b"n", pid(ME, 8), {}))
    bench.give(Answered(tag, (OK, pid(ME, 9))))
    assert bench.of(Kill) == [Kill(pid(ME, 9))]
    assert bench.reply() == messages.already_registered(pid(ME, 8))


def test_a_name_of_another_node_is_started_by_its_tracker():
    bench = Bench(A)
    name = bench.name_of(A)
    bench.ask(StartAndTrack(name, META))
    call = bench.the(CallTracker)
    assert (call.node, call.request) == (A, StartAndTrack(name, META))
    bench.give(Answered(call.tag, (OK, pid(A, 5))))
    assert bench.reply() == messages.ok(pid(A, 5))


def test_a_name_that_is_registered_there_is_registered_here_too():
    bench = Bench(A)
    name = bench.name_of(A)
    bench.ask(StartAndTrack(name, META))
    bench.give(Answered(bench.the(CallTracker).tag, messages.already_registered(pid(A, 5))))
    assert bench.reply() == messages.ok(pid(A, 5))
    assert bench.tracker.registry.get(name).pid == pid(A, 5)


@pytest.mark.parametrize("answer", [Failed(0, NOPROC), Answered(0, (ERROR, (NOPROC, []))), Answered(0, (ERROR, UNDEF))])
def test_a_tracker_that_cannot_start_it_yet_is_asked_ten_times_more(answer):
    bench = Bench(A)
    bench.ask(StartAndTrack(bench.name_of(A), META))
    for _ in range(10):
        bench.give(type(answer)(bench.the(CallTracker).tag, answer.reason if type(answer) is Failed else answer.value))
        timer = bench.the(SetTimer)
        assert timer.after_s == 1.0
        bench.give(TimerFired(timer.timer))
    bench.give(Failed(bench.the(CallTracker).tag, NOPROC))
    assert bench.reply() == messages.error(messages.TOO_MANY_ATTEMPTS)


def test_another_answer_of_that_tracker_is_passed_on():
    bench = Bench(A)
    name = bench.name_of(A)
    bench.ask(StartAndTrack(name, META))
    bench.give(Answered(bench.the(CallTracker).tag, (ERROR, Atom("busy"))))
    assert bench.reply() == messages.error(Atom("busy"))
    bench.ask(StartAndTrack(name, META))
    bench.give(Failed(bench.the(CallTracker).tag, Atom("timeout")))
    assert bench.reply() == messages.error(Atom("timeout"))


def test_when_the_owner_is_down_meanwhile_the_next_one_is_asked():
    bench = Bench(A)
    bench.ask(StartAndTrack(bench.name_of(A), META))
    tag = bench.the(CallTracker).tag
    bench.give(NodeDown(A))
    bench.give(Failed(tag, ((Atom("nodedown"), A), [])))
    bench.give(TimerFired(bench.the(SetTimer).timer))
    assert bench.the(StartProcess).node is ME


def test_without_a_quorum_nothing_is_started_and_what_runs_is_stopped():
    bench = Bench(A, strategy=lambda: StaticQuorumRing(2))
    name = bench.name_of(ME)
    process = bench.start_ours(name)
    bench.give(NodeDown(A))
    assert bench.of(Die) == [Die(process)]
    assert name not in bench.tracker.registry
    assert bench.ask(StartAndTrack(name, META)) == messages.error(messages.NO_NODE_AVAILABLE)


def moved():
    """A process of ours whose name belongs to a node that has just come."""
    bench = Bench()
    probe = Bench(A)
    name = probe.name_of(A)
    process = bench.start_ours(name)
    bench.give(NodeUp(A, True))
    begin = bench.the(BeginHandoff)
    assert begin.pid == process
    bench.give(NodeUp(B, True))
    assert bench.of(BeginHandoff) == []
    return bench, name, process, begin.tag


def test_a_process_that_belongs_elsewhere_takes_its_state_along():
    bench, name, process, tag = moved()
    bench.give(Answered(tag, (Atom("resume"), b"state")))
    assert bench.of(Die) == [Die(process)]
    untrack, handoff = bench.sent()
    assert untrack == Untrack(process)
    assert (handoff.name, handoff.meta, handoff.state) == (name, META, b"state")
    assert bench.of(Send)[1].to == (A,)
    assert name not in bench.tracker.registry


def test_a_process_may_stay_or_be_started_anew():
    bench, name, process, tag = moved()
    bench.give(Answered(tag, Atom("ignore")))
    assert bench.tracker.registry.get(name).pid == process

    bench, name, process, tag = moved()
    bench.give(Failed(tag, Atom("timeout")))
    assert bench.tracker.registry.get(name).pid == process

    bench, name, process, tag = moved()
    bench.give(Answered(tag, Atom("restart")))
    assert bench.of(Die) == [Die(process)]
    assert bench.the(CallTracker).request == StartAndTrack(name, META)


def test_a_process_that_is_gone_is_not_moved():
    bench, _, process, tag = moved()
    bench.ask(Untrack(process))
    assert bench.give(Answered(tag, (Atom("resume"), b"state"))) == []


def test_a_process_handed_to_us_goes_on_here_or_where_it_can():
    bench = Bench(A)
    bench.give(Received(A, Handoff(pid(A, 1), b"n", META, b"state", (0, 3))))
    starts = [bench.the(StartProcess)]
    bench.give(Failed(starts[0].tag, UNDEF))
    starts.append(bench.the(StartProcess))
    assert {start.node for start in starts} == {ME, A}
    process = pid(starts[1].node, 5)
    bench.give(Answered(starts[1].tag, (OK, process)))
    assert bench.of(EndHandoff) == [EndHandoff(process, b"state")]
    assert bench.tracker.registry.get(b"n").pid == process
    assert bench.sent() == [Track(b"n", process, META)]


def test_a_handoff_that_overtakes_the_untrack_is_no_obstacle():
    bench = Bench(A)
    bench.give(Received(A, ReplicaEvent(pid(A, 1), (0, 1), Track(b"n", pid(A, 5), META))))
    bench.give(Received(A, Handoff(pid(A, 1), b"n", META, b"state", (0, 3))))
    assert b"n" not in bench.tracker.registry
    assert bench.of(StartProcess)


def test_a_handoff_of_a_name_that_runs_here_is_its_to_resolve():
    bench = Bench(A, B)
    process = bench.start_ours(bench.name_of(ME))
    name = bench.tracker.registry.by_pid(process)[0].name
    bench.give(Received(A, Handoff(pid(A, 1), name, META, b"state", (0, 3))))
    assert bench.of(ResolveConflict) == [ResolveConflict(process, b"state")]
    assert bench.sent() == [Track(name, process, META)]
    # And of one that runs with a third member, that member's.
    bench.give(Received(B, ReplicaEvent(pid(B, 1), (0, 1), Track(b"b", pid(B, 5), META))))
    assert bench.give(Received(A, Handoff(pid(A, 1), b"b", META, b"state", (0, 3)))) == []


def test_a_process_of_ours_is_handed_over_on_request():
    bench = Bench(A)
    name = bench.name_of(ME)
    process = bench.start_ours(name)
    assert bench.ask(HandOver(name, b"state")) == Atom("finished")
    assert bench.of(Die) == [Die(process)]
    assert bench.sent()[1].state == b"state"
    assert bench.ask(HandOver(b"nobody", b"")) == Atom("finished")
    assert bench.sent() == []


def test_a_process_of_a_dead_node_is_started_again_by_the_owner_of_its_name():
    bench = Bench(A, B)
    started = []
    for i in range(20):
        bench.give(Received(A, ReplicaEvent(pid(A, 1), (0, 1), Track(b"%d" % i, pid(A, 100 + i), META))))
    bench.give(NodeDown(A))
    started = bench.of(StartProcess)
    ours = [i for i in range(20) if bench.tracker.strategy.key_to_node(b"%d" % i) is ME]
    assert len(started) == len(ours) > 0
    assert {start.node for start in started} == {ME}
    assert len(bench.tracker.registry) == 0


def test_looking_up_a_name_that_is_not_known_asks_the_node_that_owns_it():
    bench = Bench(A)
    ours, theirs = bench.name_of(ME), bench.name_of(A)
    assert bench.ask(Whereis(ours)) == messages.UNDEFINED
    for answer, value in ((pid(A, 5), pid(A, 5)), (None, messages.UNDEFINED)):
        assert bench.ask(Whereis(theirs)) is None
        ask = bench.the(AskRegistry)
        assert (ask.node, ask.name) == (A, theirs)
        bench.give(Answered(ask.tag, answer))
        assert bench.reply() == value
    bench.ask(Whereis(theirs))
    bench.give(Failed(bench.the(AskRegistry).tag, Atom("nodedown")))
    assert bench.reply() == messages.UNDEFINED


def test_an_answer_to_nothing_is_ignored():
    bench = Bench()
    assert bench.give(Answered(99, OK)) == []
    assert bench.give(Failed(99, UNDEF)) == []
    assert bench.give(TimerFired(("retry", 99))) == []
