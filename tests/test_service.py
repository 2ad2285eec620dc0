"""Requests when things go wrong: workers that die, hang, lag or are missing, limits, draining, and what is left over.

The gateway is a whole one (`System`), asked through its doors; its store nodes are the fakes of `gateway_kit`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    STORE,
    Ask,
    Cluster,
    GuardedStep,
    Held,
    Step,
    StoreNode,
    Worker,
    answering,
    bare_refusal,
    caller_node,
    connected,
    crash_after,
    crash_before,
    event,
    function_door,
    gateway,
    hang,
    killed_after,
    killed_before,
    never,
    open_cluster,
    server_door,
    signal_counts,
    tell_server,
)
from node_kit import wait_until

from gater.api import discovery, fences, schema, worker_calls
from gater.api.server import API_MODULE
from gater.erl import Node
from gater.erl.errors import CallTimeout, ErlangThrow
from gater.erl.gen_server import Caller, call
from gater.erl.terms import Atom, Term
from gater.system import System

OK = schema.OK
ERROR = schema.ERROR
ANY = schema.ANY
NOBODY = Atom("no_such_store")


class House:
    """A cluster of store nodes, a gateway, and a node that calls it through the GenServer."""

    def __init__(self, cluster: Cluster, system: System, caller: Node) -> None:
        self.cluster = cluster
        self.system = system
        self.caller = caller
        self.ask: Ask = server_door(caller, system)

    async def append(self, stream: bytes, *numbers: int, expected: Term = ANY) -> Term:
        events = [event(number).to_term() for number in numbers]
        return await self.ask("append_events", STORE, stream, expected, events)

    async def version(self, stream: bytes) -> Term:
        return await self.ask("get_version", STORE, stream)

    async def stored(self, stream: bytes) -> list[int]:
        """The `n` of every event of the stream, as the store itself has them."""
        ok, events = await self.cluster.ask(("get_events", STORE, stream, 0, 1000, schema.FORWARD))
        assert ok is OK
        return [each[schema.METADATA][b"n"] for each in events]


@asynccontextmanager
async def open_house(
    directory: Path, nodes: int = 1, *, workers: int = 2, khepri: bool = False, **settings: Any
) -> AsyncIterator[House]:
    async with (
        open_cluster(directory, nodes, workers=workers, khepri=khepri) as cluster,
        gateway(cluster, **settings) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        yield House(cluster, system, caller)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as built:
        yield built


def kind_of(reply: Term) -> str:
    """The name of an error reason."""
    error, reason = reply
    assert error is ERROR, reply
    return str(reason[0] if type(reason) is tuple else reason)


# Workers that die


async def test_a_read_whose_worker_dies_is_asked_of_another_one(house: House) -> None:
    await house.append(b"s", 0)
    house.cluster.next(crash_before, "get_events")
    ok, events = await house.ask("get_events", STORE, b"s", 0, 10, schema.FORWARD)
    assert (ok, len(events)) == (OK, 1)
    first, second = house.cluster.asked("get_events")
    assert first is not second


async def test_a_node_that_is_no_member_of_the_store_gets_no_requests(tmp_path: Path) -> None:
    async with open_house(tmp_path, 3, workers=1) as house:
        first, second, outsider = (each.node for each in house.cluster.nodes)
        members: list[Term] = [(STORE, first.name), (STORE, second.name)]
        for node in (first, second, outsider):
            node.exports.add("khepri_cluster", "members", lambda store, options: (OK, members))
        router = house.system.service.router
        await wait_until(lambda: set(router.nodes(STORE)) == {first.name, second.name}, "the outsider left out")
        for number in range(20):
            assert await house.version(b"stream-%d" % number) == (OK, -1)
        assert outsider.name not in {worker.node.name for worker in house.cluster.asked("get_version")}


async def test_a_node_that_says_nothing_about_the_members_is_not_taken_for_one(tmp_path: Path) -> None:
    async with open_house(tmp_path, 3, workers=1) as house:
        first, second, _ = (each.node for each in house.cluster.nodes)
        members: list[Term] = [(STORE, first.name), (STORE, second.name)]
        for node in (first, second):
            node.exports.add("khepri_cluster", "members", lambda store, options: (OK, members))
        router = house.system.service.router
        await wait_until(lambda: set(router.nodes(STORE)) == {first.name, second.name}, "the members alone")


async def test_a_read_is_given_up_when_every_worker_dies_of_it(house: House) -> None:
    house.cluster.always(crash_before, "get_streams")
    assert kind_of(await house.ask("get_streams", STORE)) in ("worker_died", "no_worker_available")
    assert len(house.cluster.asked("get_streams")) <= 10
    assert await house.version(b"s") == (OK, -1)


async def test_an_append_whose_outcome_nobody_is_left_to_tell_is_answered_so(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=1_000) as house:
        held = Held()
        house.cluster.next(held, "append_events")
        appending = asyncio.create_task(house.append(b"s", 0))
        await held.arrived()
        house.cluster.restart_workers = False
        for worker in house.cluster.workers:
            worker.process.exit(Atom("crashed"))
        assert kind_of(await appending) == "unknown_outcome"
        assert await house.stored(b"s") == []


@pytest.mark.parametrize("step", [crash_before, crash_after], ids=["before storing", "after storing"])
@pytest.mark.parametrize("expected", [ANY, -1], ids=["any version", "expected version"])
async def test_an_append_whose_worker_dies_is_never_answered_falsely(house: House, step: Step, expected: Term) -> None:
    house.cluster.next(step, "append_events")
    reply = await house.append(b"s", 0, expected=expected)
    stored = await house.stored(b"s")
    if reply == (OK, 0):
        assert stored == [0]
    else:
        assert kind_of(reply) == "unknown_outcome"
        assert stored in ([], [0])


async def test_an_append_to_a_worker_that_is_gone_already_goes_to_another_one(house: House) -> None:
    # The registry lags: it lists pids whose processes have ended.
    gone = house.cluster.nodes[0].start_worker()
    entries = [gone.entry, *house.cluster.entries()]
    house.cluster.registry = lambda: entries
    gone.process.exit(Atom("shutdown"))
    for number in range(10):
        assert await house.append(b"s", number) == (OK, number)
    assert await house.stored(b"s") == list(range(10))


async def test_a_worker_that_dies_comes_back_and_is_used_again(house: House) -> None:
    old = set(house.cluster.workers)
    for worker in old:
        worker.process.exit(Atom("crashed"))
    await wait_until(lambda: len(house.cluster.workers) == 2 and not old & set(house.cluster.workers), "new workers")
    assert await house.append(b"s", 0) == (OK, 0)


async def test_a_store_whose_workers_are_all_gone_has_no_worker_available(house: House) -> None:
    house.cluster.restart_workers = False
    for worker in house.cluster.workers:
        worker.process.exit(Atom("crashed"))
    no_worker = (ERROR, schema.no_worker_available(STORE))

    async def refused() -> bool:
        return await house.append(b"s", 0) == no_worker

    await wait_until(refused, "no worker")
    assert await house.ask("get_streams", STORE) == no_worker
    assert await house.stored(b"s") == []


async def test_requests_under_way_when_a_node_goes_down_are_answered(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2) as house:
        held = Held()
        house.cluster.always(held, "append_events")
        appending = [asyncio.create_task(house.append(b"s-%d" % n, n)) for n in range(20)]
        await held.arrived(20)
        lost = house.cluster.nodes.pop()
        on_lost = sum(worker.home is lost for worker, _, _ in held.calls)
        held.calls = [kept for kept in held.calls if kept[0].home is not lost]
        # What is tried again is not held.
        house.cluster.always(lambda worker, request, caller: worker.carry_out(request, caller), "append_events")
        await lost.stop()
        held.release()
        replies = await asyncio.gather(*appending)
        answered = [reply for reply in replies if reply == (OK, 0)]
        unknown = [reply for reply in replies if reply != (OK, 0)]
        assert {kind_of(reply) for reply in unknown} <= {"unknown_outcome"}
        assert len(unknown) <= on_lost
        assert len(answered) >= 20 - on_lost


# Workers that are slow, wrong or late


async def test_a_read_that_nobody_answers_times_out(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=60) as house:
        house.cluster.always(hang, "get_streams")
        assert await house.ask("get_streams", STORE) == (ERROR, schema.call_timeout(60))
        assert await house.version(b"s") == (OK, -1)


async def test_a_worker_that_hangs_is_left_out_on_a_node_that_works(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=300) as house:
        hung = house.cluster.workers[0]

        def hangs_alone(worker: Worker, request: Term, caller: Caller) -> Term:
            return hang(worker, request, caller) if worker is hung else worker.carry_out(request, caller)

        house.cluster.always(hangs_alone, "get_version")
        replies = [await house.version(b"s-%d" % number) for number in range(40)]
        failed = [reply for reply in replies if reply[0] is ERROR]
        assert {kind_of(reply) for reply in failed} == {"call_timeout"}
        # MAX_FAILURES, and a probe now and then; half of them without the breaker.
        assert len(failed) < 10


async def test_a_worker_that_hangs_gets_no_appends_on_a_node_that_works(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=300) as house:
        hung = house.cluster.workers[0]

        def hangs_alone(worker: Worker, request: Term, caller: Caller) -> Term:
            return hang(worker, request, caller) if worker is hung else worker.carry_out(request, caller)

        house.cluster.always(hangs_alone, "append_events", "get_version")
        replies = [await house.append(b"s-%d" % number, number, expected=-1) for number in range(40)]
        failed = [reply for reply in replies if reply[0] is ERROR]
        assert {kind_of(reply) for reply in failed} <= {"call_timeout", "unknown_outcome"}
        assert len(failed) < 10
        assert [worker.load for worker in house.system.service.router] == [0, 0]


async def test_appends_under_way_count_as_load_of_their_worker(house: House) -> None:
    held = Held()
    house.cluster.always(held, "append_events")
    appending = [asyncio.create_task(house.append(b"s-%d" % number, number)) for number in range(10)]
    await held.arrived(10)
    loads = [worker.load for worker in house.system.service.router]
    assert sum(loads) == 10
    assert max(loads) < 10, "the less loaded of two"
    held.release()
    assert await asyncio.gather(*appending) == [(OK, 0)] * 10
    assert not any(worker.load for worker in house.system.service.router)


async def test_without_a_majority_no_cast_that_writes_is_sent(house: House) -> None:
    ask = function_door(house.caller, house.system)
    details = {Atom("problem"): Atom("minority")}
    house.system.service.quorum = lambda store: details
    refused = (ERROR, schema.no_quorum(details))
    assert await ask("record_snapshot", STORE, b"agg", b"s", 0, {}) == refused
    assert await ask("delete_snapshot", STORE, b"agg", b"s", 0) == refused
    assert await ask("save_subscription", STORE, schema.BY_STREAM, b"$all", b"p") == refused
    assert await house.version(b"s") == (OK, -1)
    assert house.cluster.casts == []


async def test_appends_keep_their_order_while_the_store_is_being_found(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, 2, khepri=True) as cluster:
        quick, slow = asyncio.Event(), asyncio.Event()
        for member, opened in zip(cluster.nodes, (quick, slow), strict=True):

            async def registered(member: StoreNode = member, opened: asyncio.Event = opened) -> Term:
                await opened.wait()
                return [worker.entry for worker in member.workers]

            del member.node.exports._functions[Atom("Elixir.Swarm"), Atom("registered"), 0]
            member.node.exports.add("Elixir.Swarm", "registered", registered)
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            house = House(cluster, system, caller)
            await wait_until(lambda: len(system.node.nodes()) >= 2, "the connections")
            first = asyncio.create_task(house.append(b"s", 1))
            await wait_until(lambda: system.service.under_way == 1, "the first append")
            quick.set()
            await wait_until(lambda: STORE in system.service.router.stores, "a worker")
            second = asyncio.create_task(house.append(b"s", 2))
            await wait_until(lambda: system.service.under_way == 2, "the second append")
            slow.set()
            assert [await first, await second] == [(OK, 0), (OK, 1)]
            assert not system.service._unsettled


async def test_a_worker_appends_only_when_its_node_has_what_others_wrote(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2) as house:
        assert await house.append(b"s", 1) == (OK, 0)
        (worker,) = house.cluster.asked("append_events")
        other = next(each.node.name for each in house.cluster.nodes if each is not worker.home)
        # Another gateway has appended on the other node.
        house.system.service.appended_elsewhere(STORE, b"s", 1, other)
        assert await house.cluster.ask(("append_events", STORE, b"s", 0, [event(2).to_term()])) == (OK, 1)
        house.cluster.requests.clear()
        assert await house.append(b"s", 3, expected=1) == (OK, 2)
        ops = [str(request[0]) for _, request in house.cluster.requests]
        assert ops[-1] == "append_events"
        assert "get_version" in ops[:-1]


async def test_a_version_is_asked_for_again_where_a_node_without_fences_lags_behind_what_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(tmp_path, nodes=2) as house:
        service, cluster = house.system.service, house.cluster
        writer = cluster.nodes[0].node.name
        assert await house.version(b"s") == (OK, -1)
        # Another gateway has appended; what it wrote has not come to the node that is asked.
        service.appended_elsewhere(STORE, b"s", 0, writer)
        cluster.requests.clear()
        reading = asyncio.create_task(house.version(b"s"))
        await wait_until(lambda: len(cluster.asked("get_version")) > 1, "a second look")
        assert not reading.done()
        await cluster.ask(("append_events", STORE, b"s", -1, [event(0).to_term()]))
        assert await reading == (OK, 0)
        # The store may have lost it: then it is asked for a while only.
        monkeypatch.setattr(fences, "TOLD_S", 0.05)
        service.appended_elsewhere(STORE, b"s", 7, writer)
        assert await house.version(b"s") == (OK, 0)


async def test_a_version_of_before_is_better_than_none_when_time_is_up(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=200) as house:
        assert await house.version(b"s") == (OK, -1)
        house.system.service.appended_elsewhere(STORE, b"s", 0, house.cluster.nodes[0].node.name)
        assert await house.version(b"s") == (OK, -1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node is asked as well after a tenth of a second."""
    monkeypatch.setattr(worker_calls, "ATTEMPT_SHARE", 0.0)
    monkeypatch.setattr(worker_calls, "MIN_ATTEMPT_S", 0.1)


@pytest.mark.usefixtures("impatient")
async def test_a_read_on_a_node_that_hangs_is_answered_by_another(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, call_timeout_ms=10_000) as house:
        house.cluster.next(hang, "get_streams")
        assert await house.ask("get_streams", STORE) == (OK, [])
        first, second = house.cluster.asked("get_streams")
        assert first.home is not second.home


@pytest.mark.usefixtures("impatient")
async def test_a_read_that_takes_long_on_every_node_is_answered_by_the_first_that_is_ready(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, call_timeout_ms=10_000) as house:
        held = Held()
        house.cluster.next(held, "get_streams")
        house.cluster.always(hang, "get_streams")
        reading = asyncio.create_task(house.ask("get_streams", STORE))
        await wait_until(lambda: len(house.cluster.asked("get_streams")) == 2)
        held.release()
        assert await reading == (OK, [])
        # Neither node was asked twice for what it was at already.
        assert len(house.cluster.asked("get_streams")) == 2


async def test_an_append_that_nobody_answers_has_an_unknown_outcome(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=1_000) as house:
        held = Held()
        house.cluster.always(held, "append_events")
        appending = asyncio.create_task(house.append(b"s", 0))
        await held.arrived()
        assert kind_of(await appending) == "unknown_outcome"


async def test_an_append_that_never_got_as_far_as_being_sent_is_no_unknown_outcome(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=60) as house:
        house.cluster.always(hang, "get_version", "append_events")
        reply = await house.append(b"s", 0)
        if house.cluster.asked("append_events"):
            assert kind_of(reply) == "unknown_outcome"
        else:
            assert reply == (ERROR, schema.call_timeout(60))


async def test_a_reply_that_comes_after_the_timeout_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=500) as house:
        held = Held()
        house.cluster.next(held, "get_streams")
        house.cluster.always(hang, "get_streams")
        assert kind_of(await house.ask("get_streams", STORE)) == "call_timeout"
        await house.append(b"s", 0)
        held.release()
        assert await house.version(b"s") == (OK, 0)


async def test_a_bare_refusal_of_a_racing_worker_gets_the_current_version(house: House) -> None:
    await house.append(b"s", 0, 1)
    house.cluster.next(bare_refusal, "append_events")
    assert await house.append(b"s", 2, expected=1) in (
        (ERROR, schema.wrong_expected_version(1)),
        # A gateway may look, find the stream where it should be, and try again.
        (OK, 2),
    )


async def test_an_append_is_not_taken_for_stored_while_versions_cannot_be_read(tmp_path: Path) -> None:
    async with open_house(tmp_path, call_timeout_ms=150) as house:
        house.cluster.always(bare_refusal, "append_events")
        house.cluster.always(answering((ERROR, Atom("broken"))), "get_version")
        error, _ = await house.append(b"s", 2, expected=1)
        assert error is ERROR
        assert await house.stored(b"s") == []


async def test_an_error_that_the_store_gives_is_passed_on(house: House) -> None:
    house.cluster.always(answering((ERROR, (Atom("disk"), b"full"))), "get_streams")
    assert await house.ask("get_streams", STORE) == (ERROR, (Atom("disk"), b"full"))


# Guarded appends: the store checks, so what is in doubt is sent again


async def test_appends_are_guarded_where_the_store_node_can_evaluate_them(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=3, khepri=True) as house:
        assert await house.append(b"s", 0, 1) == (OK, 1)
        assert await house.append(b"s", 2, expected=1) == (OK, 2)
        assert await house.append(b"s", 3, expected=schema.STREAM_EXISTS) == (OK, 3)
        assert await house.append(b"s", 4, expected=0) == (ERROR, schema.wrong_expected_version(3))
        assert await house.stored(b"s") == [0, 1, 2, 3]
        assert house.cluster.asked("append_events") == []


@pytest.mark.parametrize("step", [killed_before, killed_after], ids=lambda step: step.__name__)
async def test_a_guarded_append_that_was_killed_is_stored_once(tmp_path: Path, step: GuardedStep) -> None:
    async with open_house(tmp_path, nodes=2, khepri=True) as house:
        house.cluster.guarded_steps.append(step)
        assert await house.append(b"s", 0, 1) == (OK, 1)
        assert await house.stored(b"s") == [0, 1]
        first, second = house.cluster.guarded
        assert first is not second


async def test_a_guarded_append_on_a_node_that_hangs_is_carried_out_on_another(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, khepri=True) as house:
        house.cluster.guarded_steps.append(never)
        assert await house.append(b"s", 0, expected=-1) == (OK, 0)
        assert await house.stored(b"s") == [0]


async def test_a_guarded_append_on_the_only_node_which_hangs_has_an_unknown_outcome(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True, call_timeout_ms=500) as house:
        house.cluster.guarded_steps.append(never)
        assert kind_of(await house.append(b"s", 0)) == "unknown_outcome"


async def test_a_batch_that_another_writer_cut_says_how_much_of_it_is_stored(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True) as house:

        async def cut(carry_out: Any) -> Term:
            # The first event is written, then somebody else's, then this batch goes on.
            await house.cluster.ask(("append_events", STORE, b"s", -1, [event(0).to_term()]))
            await house.cluster.ask(("append_events", STORE, b"s", 0, [event(99).to_term()]))
            raise ErlangThrow((Atom("refused"), 1, 2))

        house.cluster.guarded_steps.append(cut)
        reply = await house.append(b"s", 0, 1, 2, expected=-1)
        assert reply == (ERROR, schema.partially_appended(0, 1, 3))


async def test_an_append_that_expects_nothing_goes_on_behind_a_faster_writer(tmp_path: Path) -> None:
    async with open_house(tmp_path, khepri=True) as house:
        assert await house.append(b"s", 0) == (OK, 0)
        # The gateway remembers version 0; another writer has meanwhile come.
        await house.cluster.ask(("append_events", STORE, b"s", 0, [event(99).to_term()]))
        assert await house.append(b"s", 1) == (OK, 2)
        assert await house.stored(b"s") == [0, 99, 1]


async def test_appends_of_one_stream_keep_the_order_of_their_callers(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=3, khepri=True) as house:
        replies = await asyncio.gather(*(house.append(b"s", number) for number in range(50)))
        assert replies == [(OK, number) for number in range(50)]
        assert await house.stored(b"s") == list(range(50))


# Owners


async def test_requests_about_a_stream_go_to_one_node_whichever_gateway_they_come_through(tmp_path: Path) -> None:
    async with (
        open_house(tmp_path, nodes=3) as house,
        gateway(house.cluster) as other,
    ):
        await connected(other, house.cluster)
        asks = [house.ask, server_door(house.caller, other)]
        for number in range(50):
            stream = b"stream-%d" % number
            before = len(house.cluster.requests)
            for ask in asks:
                await ask("append_events", STORE, stream, [event(0).to_term()])
                await ask("get_events", STORE, stream, 0, 1, schema.FORWARD)
            asked = house.cluster.requests[before:]
            reads_and_writes = [worker.home for worker, request in asked if str(request[0]) != "get_version"]
            assert len(set(reads_and_writes)) == 1
        assert len({worker.home for worker in house.cluster.asked("append_events")}) == 3


async def test_appends_go_on_when_the_owner_of_a_stream_is_lost(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=3, khepri=True) as house:
        # The first node has the EPMD, so it stays: a stream of another one.
        streams = (b"stream-%d" % number for number in range(100))
        for stream in streams:
            assert await house.append(stream, 0) == (OK, 0)
            owner = house.cluster.guarded[-1]
            if owner is not house.cluster.nodes[0]:
                break
        house.cluster.nodes.remove(owner)
        await owner.stop()
        assert await house.append(stream, 1) == (OK, 1)
        assert house.cluster.guarded[-1] is not owner
        assert await house.stored(stream) == [0, 1]


# Nobody there


async def test_a_store_never_seen_is_not_found_and_one_without_workers_is_not_available(tmp_path: Path) -> None:
    async with gateway() as system, caller_node(system.settings.epmd_port) as caller:
        for ask in (server_door(caller, system), function_door(caller, system)):
            assert await ask("get_streams", NOBODY) == (ERROR, schema.store_not_found(NOBODY))
            assert await ask("list_stores") == (ERROR, schema.no_worker_available(Atom("any")))


async def test_a_request_that_comes_before_the_registries_have_answered_waits_for_them(tmp_path: Path) -> None:
    async with open_cluster(tmp_path) as cluster:
        cluster.registry_open.clear()
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            await wait_until(lambda: system.node.nodes(), "the connection")
            ask = server_door(caller, system)
            waiting = [asyncio.create_task(ask("get_version", STORE, b"s-%d" % n)) for n in range(5)]
            tell_server(caller, system, "save_subscription", STORE, schema.BY_STREAM, b"$s", b"early", 0, None)
            await wait_until(lambda: system.service.under_way == 5, "five requests that wait")
            assert not any(each.done() for each in waiting)
            cluster.registry_open.set()
            assert await asyncio.gather(*waiting) == [(OK, -1)] * 5
            await wait_until(lambda: cluster.casts, "the cast")


@pytest.mark.parametrize(
    "request_", [("get_streams", STORE), ("append_events", STORE, b"s", [event(0).to_term()])], ids=["read", "append"]
)
async def test_a_request_that_waits_for_registries_that_never_answer_is_answered_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(discovery, "ASK_TIMEOUT_S", 60.0)
    monkeypatch.setattr(discovery, "REFRESH_WAIT_S", 60.0)
    async with open_cluster(tmp_path) as cluster:
        cluster.registry_open.clear()
        async with gateway(cluster, call_timeout_ms=80) as system, caller_node(cluster.epmd_port) as caller:
            await wait_until(lambda: system.node.nodes(), "the connection")
            reply = await server_door(caller, system)(*request_)
            assert kind_of(reply) in ("call_timeout", "store_not_found", "no_worker_available")
            await wait_until(lambda: system.service.under_way == 0, "no request under way")


async def test_a_cast_does_not_wait_for_a_node_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "ASK_TIMEOUT_S", 60.0)
    monkeypatch.setattr(discovery, "REFRESH_WAIT_S", 0.1)
    async with open_cluster(tmp_path) as cluster:
        cluster.registry_open.clear()
        async with gateway(cluster) as system, caller_node(cluster.epmd_port) as caller:
            await wait_until(lambda: system.node.nodes(), "the connection")
            ask = function_door(caller, system)
            assert kind_of(await ask("delete_snapshot", STORE, b"source", b"stream", 1)) == "store_not_found"


# Beside an embedded store


async def test_stores_of_the_cluster_are_listed_with_those_of_the_gateway_itself(tmp_path: Path) -> None:
    other = Atom("of_the_cluster")
    async with (
        open_cluster(tmp_path, stores=(other,)) as cluster,
        gateway(cluster, embedded=tmp_path / "own") as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        ask = server_door(caller, system)
        ok, stores = await ask("list_stores")
        assert ok is OK
        assert sorted(str(each[Atom("store")][Atom("store_id")]) for each in stores) == ["of_the_cluster", "reg_gh"]
        assert await ask("append_events", STORE, b"s", [event(0).to_term()]) == (OK, 0)
        assert await ask("append_events", other, b"s", [event(0).to_term(), event(1).to_term()]) == (OK, 1)
        assert (await ask("get_version", STORE, b"s"), await ask("get_version", other, b"s")) == ((OK, 0), (OK, 1))
        assert {worker.store for worker, _ in cluster.requests} == {other}


async def test_the_gateways_own_stores_are_listed_when_the_cluster_does_not_answer(tmp_path: Path) -> None:
    other = Atom("of_the_cluster")
    async with (
        open_cluster(tmp_path, stores=(other,)) as cluster,
        gateway(cluster, embedded=tmp_path / "own", call_timeout_ms=80) as system,
        caller_node(cluster.epmd_port) as caller,
    ):
        await connected(system, cluster)
        cluster.always(hang, "list_stores")
        ok, stores = await server_door(caller, system)("list_stores")
        assert ok is OK
        assert [each[Atom("store")][Atom("store_id")] for each in stores] == [STORE]


# Limits


async def test_requests_above_the_limit_are_refused_and_those_below_are_not(tmp_path: Path) -> None:
    async with open_house(tmp_path, max_requests=3) as house:
        held = Held()
        house.cluster.always(held, "get_version")
        waiting = [asyncio.create_task(house.version(b"s")) for _ in range(3)]
        await held.arrived(3)
        assert house.system.service.under_way == 3
        assert await house.version(b"s") == (ERROR, schema.OVERLOADED)
        held.release()
        assert await asyncio.gather(*waiting) == [(OK, -1)] * 3
        more = asyncio.create_task(house.version(b"s"))
        await held.arrived(1)
        held.release()
        assert await more == (OK, -1)


async def test_a_request_that_is_refused_counts_as_none(tmp_path: Path) -> None:
    async with open_house(tmp_path, max_requests=1) as house:
        for _ in range(3):
            assert kind_of(await house.ask("get_events", STORE, b"s", 0, 0, schema.FORWARD)) == "invalid_count"
        assert await house.version(b"s") == (OK, -1)
        assert house.system.service.under_way == 0


# Casts


async def test_casts_are_passed_on_to_a_worker_as_they_came(house: House) -> None:
    arguments = (STORE, b"agg", b"s", 1, {b"total": 1})
    tell_server(house.caller, house.system, "record_snapshot", *arguments)
    await wait_until(lambda: house.cluster.casts, "the cast")
    assert house.cluster.casts == [(Atom("record_snapshot"), *arguments)]


async def test_casts_that_would_crash_a_worker_are_not_passed_on(house: House) -> None:
    before = list(house.cluster.workers)
    tell_server(house.caller, house.system, "record_snapshot", STORE, list(b"charlist"), b"s", 1, {})
    tell_server(house.caller, house.system, "record_snapshot", STORE, b"agg", b"s", -1, {})
    tell_server(house.caller, house.system, "record_snapshot", NOBODY, b"agg", b"s", 1, {})
    tell_server(house.caller, house.system, "get_streams", STORE)
    tell_server(house.caller, house.system, "record_snapshot", STORE, b"agg", b"s", 1, {})
    await wait_until(lambda: house.cluster.casts, "the last cast")
    assert [each[2:5] for each in house.cluster.casts] == [(b"agg", b"s", 1)]
    assert house.cluster.workers == before


# Draining


async def test_a_draining_gateway_finishes_what_is_under_way_and_takes_nothing_new(tmp_path: Path) -> None:
    async with open_house(tmp_path, drain_timeout_ms=5_000) as house:
        held = Held()
        house.cluster.next(held, "get_version")
        under_way = asyncio.create_task(house.version(b"s"))
        await held.arrived()
        draining = asyncio.create_task(house.system.service.drain(5))

        async def refused() -> bool:
            return await house.ask("get_streams", STORE) == (ERROR, schema.DRAINING)

        await wait_until(refused, "a refusal")
        save = function_door(house.caller, house.system)
        assert await save("save_subscription", STORE, schema.BY_STREAM, b"$s") == (ERROR, schema.DRAINING)
        assert not draining.done()
        held.release()
        assert await under_way == (OK, -1)
        assert await draining is True


async def test_draining_ends_when_its_time_is_up(house: House) -> None:
    house.cluster.next(hang, "get_version")
    under_way = asyncio.create_task(house.version(b"s"))
    await wait_until(lambda: house.cluster.requests, "the request")
    assert await house.system.service.drain(0.02) is False
    under_way.cancel()


# What is left over


async def nothing(house: House) -> None:
    """No request."""


async def many_answers(house: House) -> None:
    await asyncio.gather(*(house.append(b"s-%d" % n, 0) for n in range(50)))
    await asyncio.gather(*(house.version(b"s-%d" % n) for n in range(50)))


async def deaths(house: House) -> None:
    for _ in range(5):
        house.cluster.next(crash_before, "get_version")
        await house.version(b"s")


async def timeouts(house: House) -> None:
    house.cluster.always(hang, "get_streams")
    await asyncio.gather(*(house.ask("get_streams", STORE) for _ in range(5)))


async def refusals(house: House) -> None:
    await house.append(b"", 0)
    await house.ask("get_streams", NOBODY)


async def callers_that_give_up(house: House) -> None:
    held = Held()
    house.cluster.always(held, "get_version")
    asked = [asyncio.create_task(house.version(b"s")) for _ in range(5)]
    await held.arrived(5)
    for each in asked:
        each.cancel()
    with pytest.raises(CallTimeout):
        await call(
            house.caller, (API_MODULE, house.system.settings.name), (Atom("get_version"), STORE, b"s"), timeout_s=0.01
        )
    held.release()


@pytest.mark.parametrize(
    "use", [nothing, many_answers, deaths, timeouts, refusals, callers_that_give_up], ids=lambda use: use.__name__
)
@pytest.mark.usefixtures("young_heap")
async def test_no_request_alias_or_monitor_is_left_over(tmp_path: Path, use: Callable[[House], Any]) -> None:
    async with open_house(tmp_path, call_timeout_ms=200) as house:
        await house.version(b"s")
        # The tracker watches the gateway's own workers and API server, once it has taken up their names.
        registry, settings = house.system.swarm.registry, house.system.settings
        await wait_until(lambda: len(registry.on_node(house.system.node.name)) > settings.pool_size, "its own names")

        async def used() -> None:
            await use(house)
            await wait_until(lambda: house.system.service.under_way == 0, "no request under way")
            # The workers that died have been replaced and are watched as those before them.
            await connected(house.system, house.cluster)

        # What is watched from now on for good is so after the first time.
        await used()
        before = signal_counts()
        await used()
        await wait_until(lambda: signal_counts() <= before, "no more aliases and monitors than before")


@pytest.mark.usefixtures("young_heap")
async def test_after_a_gateway_has_stopped_it_watches_nobody(tmp_path: Path) -> None:
    async with open_cluster(tmp_path) as cluster:
        before = signal_counts()
        async with gateway(cluster) as system:
            await connected(system, cluster)
        await wait_until(lambda: not any(worker.process.monitored_by for worker in cluster.workers), "the end of it")
        await wait_until(lambda: signal_counts() <= before, "no more aliases and monitors than before")
