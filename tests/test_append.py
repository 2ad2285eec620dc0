"""The decisions of one append, against a model of the store that does everything a real one can do to them.

The model: a store whose puts are decided one after the other (Raft), with the conditions of the guarded append;
nodes whose copies lag; evaluations of the guarded expression that advance one operation at a time and may be frozen,
killed or carried out long after their append has been answered; commands that time out and land later, or land twice;
replies that get lost; several gateways that know different things. Every schedule is decided by a seed, which a
failing test names. `GATER_TESTS_APPEND_SCHEDULES` asks for more of them than the few hundred of every run.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count as counting
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gater.api import schema
from gater.api.append import Append, AskVersion, Done, Resolve, Step, Write
from gater.erl.terms import Atom, Term

SCHEDULES: Final = int(os.environ.get("GATER_TESTS_APPEND_SCHEDULES", "400"))
NODES: Final = 3
GATEWAYS: Final = 3
STREAMS: Final = 2
APPENDS: Final = 14
STEPS: Final = 1_500
TIMEOUT_S: Final = 4.5


class Record(NamedTuple):
    """An event as it is stored; `made` tells one evaluation's record of an event from another's (`created`)."""

    id: str
    made: int


# The guarded expressions (guarded.QUICK and guarded.SOURCE), one operation at a time


@dataclass
class Put:
    stream: int
    number: int
    record: Record
    timed: bool = True
    """Whether it is not even tried when time is up."""


@dataclass
class Fence:
    pass


@dataclass
class Get:
    stream: int
    number: int


@dataclass
class Count:
    stream: int


Operation = Put | Fence | Get | Count
Evaluation = Generator[Operation, Any, tuple[Any, ...]]


def guarded_expression(stream: int, first: int, ids: list[str], again: bool, made: Iterator[int]) -> Evaluation:
    """Both: the quick one for a first attempt to write one event, and the whole one otherwise and when that stops."""
    if again or len(ids) > 1:
        return (yield from whole_expression(stream, first, ids, again, made, []))
    record = Record(ids[0], next(made))
    put = yield Put(stream, first, record, timed=False)
    if put == "refused":
        return (yield from whole_expression(stream, first, ids, again, made, [record]))
    return ("written", first) if put == "ok" else ("failed",)


def whole_expression(
    stream: int, first: int, ids: list[str], again: bool, made: Iterator[int], mine: list[Record]
) -> Evaluation:
    number = first
    for id_ in ids:
        record = Record(id_, next(made))
        put = yield Put(stream, number, record, timed=number > first)
        if put == "refused":
            if not (yield Fence()):
                return ("failed",)
            stored = yield Get(stream, number)
            if stored != record and stored not in mine and not (again and stored is not None and stored.id == id_):
                count = yield Count(stream)
                return ("ahead" if stored is None else "refused", number, count)
        elif put == "late":
            return ("late", number)
        elif put != "ok":
            return ("failed",)
        number += 1
    return ("written", number - 1)


class Store:
    """What Raft has decided: the streams, in one order that all nodes follow."""

    def __init__(self) -> None:
        self.log: list[Put] = []
        self.streams: list[list[Record]] = [[] for _ in range(STREAMS)]

    def put(self, put: Put) -> str:
        """Only where nothing is, and only while the stream has exactly as many events."""
        stream = self.streams[put.stream]
        if len(stream) != put.number:
            return "refused"
        stream.append(put.record)
        self.log.append(put)
        return "ok"

    def seen(self, stream: int, applied: int) -> list[Record]:
        """The stream on a node that has applied so much of the log."""
        return [put.record for put in self.log[:applied] if put.stream == stream]


@dataclass
class Node:
    applied: int = 0
    frozen: bool = False


@dataclass(eq=False)
class Process:
    """An evaluation on a node; `call` waits for it, or has given up."""

    node: Node
    evaluation: Evaluation
    operation: Operation
    call: Call


@dataclass(eq=False)
class Call:
    """One append of a gateway's caller."""

    gateway: Gateway
    stream: int
    ids: list[str]
    expected: Any
    plan: Append | None = None
    waits_for: Process | None = None
    sleeping: Write | AskVersion | None = None
    reply: Any = None
    time_is_up: bool = False


@dataclass(eq=False)
class Gateway:
    known: dict[int, int] = field(default_factory=dict)
    queues: list[deque[Call]] = field(default_factory=lambda: [deque() for _ in range(STREAMS)])


class World:
    """One schedule."""

    def __init__(
        self, seed: int, make_plan: Callable[..., Append] = Append, expression: Callable[..., Evaluation] | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.make_plan = make_plan
        self.expression = expression or guarded_expression
        self.store = Store()
        self.nodes = [Node() for _ in range(NODES)]
        self.processes: list[Process] = []
        self.late_commands: list[Put] = []
        self.gateways = [Gateway() for _ in range(GATEWAYS)]
        self.calls: list[Call] = []
        self.made = counting()
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self.submit, 4),
            (self.advance, 60),
            (self.wake, 8),
            (self.replicate, 6),
            (self.land_late, 2),
            (self.give_up, 3),
            (self.freeze_or_thaw, 2),
            (self.kill, 1),
            (self.end_of_time, 1),
        ]
        weighted = [action for action, weight in actions for _ in range(weight)]
        for _ in range(STEPS):
            self.random.choice(weighted)()
            if len(self.calls) == APPENDS and all(call.reply is not None for call in self.calls):
                break
        for call in self.calls:
            if call.reply is None:
                self.finish_by_time(call)
        # Whatever is still around happens after everybody has been answered.
        for node in self.nodes:
            node.frozen = False
        while self.processes or self.late_commands:
            self.random.choice([self.advance, self.land_late])()
        self.check()

    # Callers and gateways

    def submit(self) -> None:
        if len(self.calls) == APPENDS:
            return
        chooser = self.random
        gateway, stream = chooser.choice(self.gateways), chooser.randrange(STREAMS)
        at = len(self.store.streams[stream]) - 1
        expected = chooser.choice(
            [at, at, at - 1, at + chooser.randint(1, 3), schema.ANY, None, None, schema.STREAM_EXISTS]
        )
        ids = [f"{len(self.calls)}.{n}" for n in range(chooser.choice([1, 1, 2, 4]))]
        call = Call(gateway, stream, ids, max(expected, -1) if type(expected) is int else expected)
        self.calls.append(call)
        queue = gateway.queues[stream]
        queue.append(call)
        if len(queue) == 1:
            self.begin(call)

    def begin(self, call: Call) -> None:
        call.plan = self.make_plan(call.expected, call.ids, known_version=call.gateway.known.get(call.stream))
        self.take(call, call.plan.begin(guarded=True))

    def take(self, call: Call, step: Step) -> None:
        assert call.plan is not None
        match step:
            case Done(reply, version):
                self.answer(call, reply, version)
            case Write(_, _, True) | AskVersion():
                call.sleeping = step
            case Write(first, again):
                if self.random.random() < 0.05:
                    call.sleeping = call.plan.not_sent()  # type: ignore[assignment]
                    return
                evaluation = self.expression(call.stream, first, call.ids, again, self.made)
                process = Process(self.random.choice(self.nodes), evaluation, next(evaluation), call)
                call.waits_for = process
                self.processes.append(process)
                call.plan.sent()
            case Resolve():
                raise AssertionError("a guarded append has nothing to resolve")

    def answer(self, call: Call, reply: Any, version: int | None) -> None:
        call.reply = reply
        call.waits_for = call.sleeping = None
        if version is not None:
            call.gateway.known[call.stream] = version
        kind = reply[0].name if reply[0] is schema.OK else reply[1][0].name
        self.seen[kind] += 1
        if kind == "unknown_outcome":
            assert call.time_is_up
        self.check_call(call)
        queue = call.gateway.queues[call.stream]
        was_first = queue[0] is call
        queue.remove(call)
        if was_first and queue:
            self.begin(queue[0])

    def wake(self) -> None:
        sleepers = [call for call in self.calls if call.sleeping is not None]
        if not sleepers:
            return
        call = self.random.choice(sleepers)
        step, call.sleeping = call.sleeping, None
        assert call.plan is not None
        match step:
            case AskVersion(fenced):
                node = self.random.choice(self.nodes)
                if fenced:
                    node.applied = len(self.store.log)
                self.take(call, call.plan.version(len(self.store.seen(call.stream, node.applied)) - 1))
            case Write(first, again):
                self.take(call, Write(first, again))

    def give_up(self) -> None:
        """An attempt takes too long, or its node is lost."""
        waiting = [call for call in self.calls if call.waits_for is not None]
        if waiting:
            self.outcome_unknown(self.random.choice(waiting))

    def outcome_unknown(self, call: Call) -> None:
        assert call.plan is not None
        call.waits_for = None
        self.take(call, call.plan.unknown(guarded=True))

    def end_of_time(self) -> None:
        under_way = [call for call in self.calls if call.reply is None]
        if under_way and self.random.random() < 0.2:
            self.finish_by_time(self.random.choice(under_way))

    def finish_by_time(self, call: Call) -> None:
        call.time_is_up = True
        plan = call.plan or self.make_plan(call.expected, call.ids, known_version=None)
        done = plan.out_of_time(TIMEOUT_S)
        self.answer(call, done.reply, done.version)

    # Store nodes

    def advance(self) -> None:
        """One operation of one evaluation on a node that is awake."""
        awake = [process for process in self.processes if not process.node.frozen]
        if not awake:
            return
        process = self.random.choice(awake)
        call = process.call
        if call.waits_for is not process:
            self.seen["late operation"] += 1
        try:
            process.operation = process.evaluation.send(self.carry_out(process.node, process.operation))
            return
        except StopIteration as stopped:
            outcome = stopped.value
        self.processes.remove(process)
        if call.waits_for is not process or self.random.random() < 0.1:
            self.seen["lost reply"] += 1
            return
        assert call.plan is not None
        self.seen[outcome[0]] += 1
        call.waits_for = None
        match outcome:
            case ("written", last):
                self.take(call, call.plan.written(last))
            case ("refused", number, events):
                self.take(call, call.plan.refused(number, events))
            case ("ahead", number, events):
                self.take(call, call.plan.ahead(number, events))
            case ("late", number):
                self.take(call, call.plan.late(number))
            case _:
                self.outcome_unknown(call)

    def carry_out(self, node: Node, operation: Operation) -> Any:
        luck = self.random.random()
        match operation:
            case Put():
                if operation.timed and self.random.random() < 0.03:
                    return "late"
                if luck < 0.05:
                    self.late_commands.append(operation)
                    return "timeout"
                result = self.store.put(operation)
                if luck < 0.10:
                    return "timeout"
                if luck < 0.15:
                    # Khepri has sent the command again, the leader having changed.
                    result = self.store.put(operation)
                node.applied = len(self.store.log)
                return result
            case Fence():
                if luck < 0.05:
                    return False
                node.applied = len(self.store.log)
                return True
            case Get(stream, number):
                events = self.store.seen(stream, node.applied)
                return events[number] if number < len(events) else None
            case Count(stream):
                return len(self.store.seen(stream, node.applied))

    def replicate(self) -> None:
        node = self.random.choice(self.nodes)
        node.applied = min(len(self.store.log), node.applied + 1)

    def land_late(self) -> None:
        if self.late_commands:
            command = self.late_commands.pop(self.random.randrange(len(self.late_commands)))
            if self.random.random() < 0.7 and self.store.put(command) == "ok":
                self.seen["landed late"] += 1

    def freeze_or_thaw(self) -> None:
        node = self.random.choice(self.nodes)
        node.frozen = not node.frozen

    def kill(self) -> None:
        node = self.random.choice(self.nodes)
        for process in [process for process in self.processes if process.node is node]:
            self.processes.remove(process)
            if isinstance(process.operation, Put) and self.random.random() < 0.5:
                self.late_commands.append(process.operation)
            # The gateway learns it at once, or never and waits in vain.
            if process.call.waits_for is process and self.random.random() < 0.7:
                self.outcome_unknown(process.call)
        node.frozen = False

    # What callers may rely on

    def check(self) -> None:
        for call in self.calls:
            self.check_call(call)
        for stream in self.store.streams:
            ids = [record.id for record in stream]
            assert len(ids) == len(set(ids)), "stored twice"
        last: dict[tuple[int, int], int] = {}
        for call in self.calls:
            if call.reply[0] is schema.OK:
                key = (id(call.gateway), call.stream)
                assert last.get(key, -1) < call.reply[1], "not in the order of the callers"
                last[key] = call.reply[1]

    def check_call(self, call: Call) -> None:
        stored = {record.id: number for number, record in enumerate(self.store.streams[call.stream])}
        places = [stored.get(id_) for id_ in call.ids]
        match call.reply:
            case None:
                pass
            case (schema.OK, last):
                assert places == list(range(last - len(places) + 1, last + 1)), (call, places)
                if type(call.expected) is int:
                    assert places[0] == call.expected + 1
            case (_, (Atom(name="partially_appended"), last, counts)):
                some = counts[Atom("stored")]
                assert 0 < some < counts[Atom("of")] == len(places)
                assert places[:some] == list(range(last - some + 1, last + 1)), (call, places)
                assert not any(place is not None for place in places[some:]), (call, places)
            case (_, (Atom(name="unknown_outcome"), _)):
                known = [place for place in places if place is not None]
                assert places[: len(known)] == known == list(range(known[0], known[0] + len(known)) if known else [])
            case (_, (Atom(name="wrong_expected_version" | "call_timeout"), _)):
                assert places == [None] * len(places), (call, places)
            case _:
                raise AssertionError(f"what is {call.reply!r}?")


@settings(max_examples=SCHEDULES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**64 - 1))
def test_what_callers_are_answered_is_true_now_and_later(seed: int) -> None:
    World(seed).run()


def test_the_schedules_contain_everything_that_can_happen() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        world = World(seed)
        world.run()
        seen += world.seen
    answers = ("ok", "wrong_expected_version", "partially_appended", "unknown_outcome", "call_timeout")
    trouble = ("late operation", "landed late", "lost reply", "failed", "ahead", "refused", "late", "written")
    for kind in (*answers, *trouble):
        assert seen[kind] >= 5, seen
    assert seen["ok"] > seen["unknown_outcome"], seen


# That the simulation can fail


class RefusesWhileInDoubt(Append):
    """Takes a stream that is too short for a refusal, although an earlier attempt may be waiting for it to grow."""

    def ahead(self, number: int, count: int) -> Step:
        self._in_doubt = False
        return super().ahead(number, count)


class CountsWhileInDoubt(Append):
    """Says how much of a batch there was time for, although an earlier attempt may store the rest."""

    def late(self, number: int) -> Step:
        self._in_doubt = False
        return super().late(number)


class MovesOnWhileInDoubt(Append):
    """Chooses a new number although an earlier attempt may fill the old one."""

    def unknown(self, *, guarded: bool) -> Step:
        super().unknown(guarded=guarded)
        return AskVersion(fenced=True) if not self.expects_number else Write(self._first or 0, True)


class ForgetsItsAttempts(Append):
    """Takes its own events for somebody else's."""

    def _write(self, first: int) -> Step:
        return Write(first, False)

    def unknown(self, *, guarded: bool) -> Step:
        super().unknown(guarded=guarded)
        return Write(self._first or 0, False)


def does_not_know_its_own_record(
    stream: int, first: int, ids: list[str], again: bool, made: Iterator[int]
) -> Evaluation:
    """Takes an event it has put itself, the command having been sent twice, for somebody else's."""
    number = first
    for id_ in ids:
        put = yield Put(stream, number, Record(id_, next(made)))
        if put == "refused":
            yield Fence()
            stored = yield Get(stream, number)
            if not (again and stored is not None and stored.id == id_):
                return ("refused" if stored else "ahead", number, (yield Count(stream)))
        elif put != "ok":
            return ("failed",)
        number += 1
    return ("written", number - 1)


@pytest.mark.parametrize(
    ("plan", "expression"),
    [
        (RefusesWhileInDoubt, guarded_expression),
        (CountsWhileInDoubt, guarded_expression),
        (MovesOnWhileInDoubt, guarded_expression),
        (ForgetsItsAttempts, guarded_expression),
        (Append, does_not_know_its_own_record),
    ],
    ids=lambda each: each.__name__,
)
@pytest.mark.changes_source
def test_the_simulation_finds_what_is_unsafe(plan: Any, expression: Any) -> None:
    for seed in range(2_000):
        try:
            World(seed, plan, expression).run()
        except AssertionError:
            return
    raise AssertionError("nothing was found in 2,000 schedules")


# One decision at a time


def append(expected: Any = None, events: int = 1, known: int | None = None) -> Append:
    return Append(expected, [b"id-%d" % n for n in range(events)], known_version=known)


def sent(plan: Append, *, guarded: bool = True) -> Append:
    """`plan` after its first write has been sent."""
    step = plan.begin(guarded=guarded)
    if isinstance(step, AskVersion):
        step = plan.version(4)
    assert isinstance(step, Write)
    plan.sent()
    return plan


def wrong(version: int) -> Done:
    return Done(schema.error(schema.wrong_expected_version(version)), version)


def kind_of(step: Step) -> str:
    assert isinstance(step, Done)
    reason: Term = step.reply[1]
    return str(reason[0])


def test_an_expected_number_is_written_to_without_asking() -> None:
    assert append(7).begin(guarded=True) == append(7).begin(guarded=False) == Write(8, False)
    assert append(-1).begin(guarded=True) == Write(0, False)


def test_a_version_that_is_remembered_is_good_enough_where_the_store_checks_it() -> None:
    assert append(known=3).begin(guarded=True) == Write(4, False)
    assert append(known=3).begin(guarded=False) == AskVersion(fenced=False)
    assert append().begin(guarded=True) == AskVersion(fenced=False)


def test_only_a_node_that_has_caught_up_can_say_that_a_stream_does_not_exist() -> None:
    plan = append(schema.STREAM_EXISTS)
    assert plan.begin(guarded=True) == AskVersion(fenced=True)
    assert plan.version(-1) == wrong(-1)


def test_what_another_append_has_seen_meanwhile_counts() -> None:
    plan = append(known=3)
    plan.saw(9)
    assert plan.begin(guarded=True) == Write(10, False)


def test_an_append_that_expects_nothing_follows_the_stream() -> None:
    plan = sent(append(known=3))
    for count in range(5, 500):
        assert plan.refused(count - 1, count) == Write(count, False)
        plan.sent()
    assert plan.written(500) == Done(schema.ok(500), 500)


def test_a_number_that_others_have_reached_only_now_is_tried_again() -> None:
    plan = sent(append(7))
    assert plan.ahead(8, 8) == Write(8, False)
    assert plan.ahead(8, 5) == wrong(4)


def test_a_version_that_no_stream_has_is_refused_with_the_one_there_is() -> None:
    for guarded in (True, False):
        plan = append(-2, known=3)
        assert plan.begin(guarded=guarded) == AskVersion(fenced=False)
        assert plan.version(4) == wrong(4)
        assert plan.version(-1) == wrong(-1)


def test_nothing_is_refused_while_an_attempt_could_still_be_stored() -> None:
    plan = sent(append(7))
    assert plan.unknown(guarded=True) == Write(8, True)
    plan.sent()
    assert plan.ahead(8, 5) == Write(8, True, later=True)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "unknown_outcome"
    plan.sent()
    assert plan.refused(8, 9) == wrong(8)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "call_timeout"


def test_a_stream_with_holes_is_not_written_to_for_ever() -> None:
    assert kind_of(sent(append(7)).refused(8, 8)) == "storage_failed"
    assert kind_of(sent(append(known=7)).refused(8, 5)) == "storage_failed"
    # Somebody may have come between the look at the number and the count: the next look tells.
    plan = sent(append(7))
    assert plan.ahead(8, 10) == Write(8, False)
    plan.sent()
    assert kind_of(plan.ahead(8, 10)) == "storage_failed"
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "call_timeout"


def test_what_there_was_no_time_for_is_told_unless_an_attempt_is_in_doubt() -> None:
    assert sent(append(7, events=3)).late(8) == Write(8, False, later=True)
    assert sent(append(7, events=3)).late(9) == Done(schema.error(schema.partially_appended(8, 1, 3)), 8)
    plan = sent(append(7, events=3))
    plan.unknown(guarded=True)
    plan.sent()
    assert plan.late(9) == Write(8, True, later=True)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "unknown_outcome"
    plan = sent(append(7, events=3))
    plan.late(8)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "call_timeout"


def test_the_outcome_is_known_until_something_is_sent() -> None:
    plan = append(7)
    plan.begin(guarded=True)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "call_timeout"
    plan.sent()
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "unknown_outcome"
    assert plan.not_sent() == Write(8, False)
    assert kind_of(plan.out_of_time(TIMEOUT_S)) == "call_timeout"


# Appends of workers


def test_a_worker_whose_answer_is_missing_is_followed_by_a_look_at_the_stream() -> None:
    plan = sent(append(7, events=2), guarded=False)
    assert plan.unknown(guarded=False) == Resolve(8)
    assert plan.found([b"id-0", b"id-1"], 9) == Done(schema.ok(9), 9)
    assert plan.found([], 7) == Write(8, False)
    assert kind_of(plan.found([b"id-0"], 8)) == "partially_appended"
    assert plan.found([b"another"], 8) == wrong(8)


def test_a_worker_that_refuses_after_a_doubtful_attempt_proves_nothing() -> None:
    plan = sent(append(7), guarded=False)
    plan.unknown(guarded=False)
    assert plan.found([], 7) == Write(8, False)
    plan.sent()
    assert plan.refused_by_worker(9) == Resolve(8)
    assert plan.found([b"id-0"], 8) == Done(schema.ok(8), 8)


def test_a_worker_that_lost_a_race_is_asked_again_where_the_version_is_right() -> None:
    assert sent(append(7), guarded=False).refused_by_worker(8) == Write(8, False)
    assert sent(append(7), guarded=False).refused_by_worker(9) == wrong(8)
    assert sent(append(), guarded=False).refused_by_worker(9) == Write(9, False)
