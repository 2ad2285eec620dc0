"""Every operation through the doors for Elixir callers, against the embedded store and against a store node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from erlang_interop_tests.beam import BeamError, BeamNode, Beams, wait_until
from erlang_interop_tests.gater_process import GaterProcess, gater_process
from erlang_interop_tests.standin import StandInCluster, standin_cluster
from gater.api.schema import NewEvent, Snapshot
from gater.erl.terms import Atom, Term

STORE = Atom("reg_gh")
OK = Atom("ok")
ERROR = Atom("error")
FORWARD = Atom("forward")
BACKWARD = Atom("backward")
ANY = Atom("any")

Ask = Callable[..., Coroutine[Any, Any, Term]]


@dataclass
class Gate:
    """A gateway, an Elixir node that uses it, and the store node behind it if there is one."""

    gater: GaterProcess
    elixir: BeamNode
    cluster: StandInCluster | None

    async def call_function(self, op: str, *arguments: Term) -> Term:
        """Door (a): the function of `ExESDBGater.API`."""
        return await self.elixir.eval(
            ":erpc.call(node, ExESDBGater.API, op, arguments)",
            node=self.gater.atom,
            op=Atom(op),
            arguments=list(arguments),
        )

    async def call_server(self, op: str, *arguments: Term) -> Term:
        """Door (b): the request itself, to the GenServer of that name."""
        return await self.elixir.eval(
            "GenServer.call({ExESDBGater.API, node}, request)",
            node=self.gater.atom,
            request=(Atom(op), *arguments),
        )

    async def cast_server(self, op: str, *arguments: Term) -> Term:
        """A cast through door (b)."""
        return await self.elixir.eval(
            "GenServer.cast({ExESDBGater.API, node}, request)", node=self.gater.atom, request=(Atom(op), *arguments)
        )


@pytest.fixture(params=["embedded", "store node"])
async def gate(request: pytest.FixtureRequest, beam: Beams, tmp_path: Path) -> AsyncIterator[Gate]:
    elixir = await beam.start("elixir")
    options: dict[str, Any] = {"cookie": elixir.cookie, "epmd_port": await beam.epmd_port()}
    if request.param == "embedded":
        async with gater_process(embedded=tmp_path / "data", stores=[STORE.name], **options) as gater:
            yield Gate(gater, elixir, None)
        return
    async with (
        standin_cluster(beam, 1, stores=[STORE.name]) as cluster,
        gater_process(connect=cluster.names, **options) as gater,
    ):
        yield Gate(gater, elixir, cluster)


@pytest.fixture(params=["function", "server"])
def ask(request: pytest.FixtureRequest, gate: Gate) -> Ask:
    return gate.call_function if request.param == "function" else gate.call_server


def event(number: int, data: Term = None) -> Term:
    return NewEvent(f"counted:v{number}", data, {b"n": number}).to_term()


def fields(events: list[Any], name: str) -> list[Term]:
    return [each[Atom(name)] for each in events]


async def test_an_elixir_node_sees_the_gateway_as_a_hidden_node(gate: Gate) -> None:
    answer = await gate.elixir.eval(
        "{Node.ping(node), node in Node.list(:hidden), node in Node.list()}", node=gate.gater.atom
    )
    assert answer == (Atom("pong"), True, False)


async def test_events_are_appended_and_read_back(gate: Gate, ask: Ask) -> None:
    data = {Atom("text"): "grüße".encode(), b"list": [1, 2.5, (True, None)], 7: [Atom("a")]}
    assert await ask("append_events", STORE, b"order-1", [event(1, data)]) == (OK, 0)
    assert await ask("append_events", STORE, b"order-1", 0, [event(2), event(3)]) == (OK, 2)
    assert await ask("append_events", STORE, b"order-1", ANY, [event(4)]) == (OK, 3)
    assert await ask("append_events", STORE, b"order-1", Atom("stream_exists"), [event(5)]) == (OK, 4)
    assert await ask("append_events", STORE, b"order-2", -1, [event(1)]) == (OK, 0)
    assert await ask("get_version", STORE, b"order-1") == (OK, 4)

    ok, events = await ask("get_events", STORE, b"order-1", 0, 100, FORWARD)
    assert ok is OK
    assert fields(events, "event_number") == [0, 1, 2, 3, 4]
    assert fields(events, "event_stream_id") == [b"order-1"] * 5
    assert events[0][Atom("data")] == data
    assert fields(events, "metadata") == [{b"n": n} for n in (1, 2, 3, 4, 5)]
    _, events = await ask("get_events", STORE, b"order-1", 3, 2, BACKWARD)
    assert fields(events, "event_number") == [3, 2]
    assert await ask("get_events", STORE, b"order-1", 100, 10, FORWARD) == (OK, [])
    _, streams = await ask("get_streams", STORE)
    assert sorted(streams) == [b"order-1", b"order-2"]


async def test_lazy_reads_answer_lists_of_events(gate: Gate, ask: Ask) -> None:
    await ask("append_events", STORE, b"s", [event(n) for n in range(5)])
    ok, events = await ask("stream_forward", STORE, b"s", 1, 3)
    assert (ok, fields(events, "event_number")) == (OK, [1, 2, 3])
    ok, events = await ask("stream_backward", STORE, b"s", 3, 10)
    assert (ok, fields(events, "event_number")) == (OK, [3, 2, 1, 0])


async def test_wrong_versions_are_refused_with_the_current_one(ask: Ask) -> None:
    await ask("append_events", STORE, b"s", [event(1)])
    wrong = Atom("wrong_expected_version")
    assert await ask("append_events", STORE, b"s", 5, [event(2)]) == (ERROR, (wrong, 0))
    assert await ask("append_events", STORE, b"s", -1, [event(2)]) == (ERROR, (wrong, 0))
    assert await ask("append_events", STORE, b"s", -5, [event(2)]) == (ERROR, (wrong, 0))
    assert await ask("append_events", STORE, b"none", Atom("stream_exists"), [event(2)]) == (ERROR, (wrong, -1))


async def test_what_would_crash_a_worker_is_refused_with_a_reason_for_people(ask: Ask) -> None:
    for arguments in (
        (STORE, b"s", Atom("no_stream"), [event(1)]),
        (STORE, b"s", [{Atom("hello"): 1}]),
        (STORE, list(b"charlist"), [event(1)]),
    ):
        error, (kind, text) = await ask("append_events", *arguments)
        assert (error, kind) == (ERROR, Atom("invalid_request"))
        assert b"append_events" in text
    unknown = Atom("no_such_store")
    assert await ask("append_events", unknown, b"s", [event(1)]) == (ERROR, (Atom("store_not_found"), unknown))
    assert await ask("get_streams", unknown) == (ERROR, (Atom("store_not_found"), unknown))
    assert await ask("get_version", unknown, b"s") == (OK, -1)
    assert await ask("get_events", STORE, b"s", 0, 0, FORWARD) == (ERROR, Atom("invalid_count"))


async def test_stores_are_listed(gate: Gate, ask: Ask) -> None:
    ok, stores = await ask("list_stores")
    assert ok is OK
    assert [each[Atom("store")][Atom("store_id")] for each in stores] == [STORE]


async def test_the_four_checks_answer(ask: Ask) -> None:
    for check in (
        "verify_cluster_consistency",
        "quick_health_check",
        "verify_membership_consensus",
        "check_raft_log_consistency",
    ):
        ok, found = await ask(check, STORE)
        assert ok is OK, (check, found)
        assert isinstance(found, dict)


async def test_snapshots_are_recorded_read_listed_and_deleted(gate: Gate, ask: Ask) -> None:
    record = Snapshot("agg-1", 2, "Order", {b"total": 12}).to_term()
    tell = gate.cast_server if ask == gate.call_server else gate.call_function
    assert await tell("record_snapshot", STORE, b"agg-1", b"order-1", 2, record) is OK
    await tell("record_snapshot", STORE, b"agg-1", b"order-1", 10, {Atom("plain"): Atom("map")})
    path = [Atom("snapshots"), b"agg-1", b"order-1"]

    async def versions(*filters: Term) -> list[bytes]:
        ok, found = await ask("list_snapshots", STORE, *filters)
        assert ok is OK
        return sorted(key[-1] for key in found)

    await wait_until(lambda: _is(versions(b"agg-1", b"order-1"), [b"0000000002", b"0000000010"]), 5)
    assert await versions(ANY, ANY) == [b"0000000002", b"0000000010"]
    assert await versions(b"agg-1", ANY) == [b"0000000002", b"0000000010"]
    assert await ask("read_snapshot", STORE, b"agg-1", b"order-1", 2) == (OK, record)
    error, reason = await ask("read_snapshot", STORE, b"agg-1", b"order-1", 3)
    assert (error, reason[2][Atom("node_path")]) == (ERROR, [*path, b"0000000003"])
    await tell("delete_snapshot", STORE, b"agg-1", b"order-1", 2)
    await wait_until(lambda: _is(versions(b"agg-1", b"order-1"), [b"0000000010"]), 5)


async def _is(coroutine: Coroutine[Any, Any, Any], expected: Any) -> bool:
    return bool(await coroutine == expected)


async def test_subscriptions_are_saved_listed_acknowledged_and_removed(gate: Gate, ask: Ask) -> None:
    tell = gate.cast_server if ask == gate.call_server else gate.call_function

    async def saved() -> dict[bytes, Term]:
        _, found = await ask("get_subscriptions", STORE)
        entries = [value for _, value in found.items()]
        found = {each[Atom("subscription_name")]: each[Atom("start_from")] for each in entries}
        # Every store has this one; ExESDB itself saves it some seconds after the start, when it has seen a leader.
        assert found.pop(b"all-events", 0) == 0
        return found

    await tell("save_subscription", STORE, Atom("by_stream"), b"$order-1", b"projector", 0, None)
    await tell("save_subscription", STORE, Atom("by_event_type"), b"paid:v1", b"payments", 0, None)
    await wait_until(lambda: _is(saved(), {b"projector": 0, b"payments": 0}), 5)
    event_ref = {Atom("event_stream_id"): b"order-1", Atom("event_number"): 2}
    await tell("ack_event", STORE, b"projector", None, event_ref)
    await wait_until(lambda: _is(saved(), {b"projector": 3, b"payments": 0}), 5)
    await tell("remove_subscription", STORE, Atom("by_stream"), b"$order-1", b"projector")
    await wait_until(lambda: _is(saved(), {b"payments": 0}), 5)


async def test_the_functions_have_the_default_arguments_of_the_original(gate: Gate) -> None:
    ask = gate.call_function
    await ask("append_events", STORE, b"s", [event(1), event(2)])
    _, events = await ask("get_events", STORE, b"s", 0, 10)
    assert fields(events, "event_number") == [0, 1]
    assert await ask("list_snapshots", STORE) == (OK, {})
    assert await ask("list_snapshots", STORE, ANY) == (OK, {})
    assert await ask("save_subscription", STORE, Atom("by_stream"), b"$s") is OK
    assert await ask("save_subscription", STORE, Atom("by_stream"), b"$s", b"mine") is OK
    assert await ask("save_subscription", STORE, Atom("by_stream"), b"$s", b"mine", 1) is OK
    assert await ask("remove_subscription", STORE, Atom("by_stream"), b"$s") is OK


async def test_unknown_functions_and_requests_are_answered_as_errors(gate: Gate) -> None:
    with pytest.raises(BeamError) as caught:
        await gate.call_function("frobnicate", STORE)
    assert caught.value.reason[:2] == (Atom("exception"), Atom("undef"))
    error, (kind, _) = await gate.call_server("frobnicate", STORE)
    assert (error, kind) == (ERROR, Atom("unknown_request"))


async def test_a_20_mb_event_goes_and_comes_back(gate: Gate, ask: Ask) -> None:
    size = 20 * 1024 * 1024
    answer = await gate.elixir.eval(
        """
        event = %{event | data: :binary.copy(<<7>>, size)}
        send = fn op, args ->
          if door == :function,
            do: :erpc.call(node, ExESDBGater.API, op, args),
            else: GenServer.call({ExESDBGater.API, node}, List.to_tuple([op | args]), 30_000)
        end
        {:ok, 0} = send.(:append_events, [store, "big", [event]])
        {:ok, [read]} = send.(:get_events, [store, "big", 0, 1, :forward])
        read.data == event.data
        """,
        event=event(1),
        size=size,
        store=STORE,
        node=gate.gater.atom,
        door=Atom("function" if ask == gate.call_function else "server"),
        timeout_s=60,
    )
    assert answer is True


async def test_a_thousand_concurrent_callers_get_their_own_answers(gate: Gate) -> None:
    answer = await gate.elixir.eval(
        """
        1..1000
        |> Enum.map(fn n ->
          Task.async(fn ->
            stream = "stream-#{n}"
            call = fn request -> GenServer.call({ExESDBGater.API, node}, request, 30_000) end
            {:ok, 0} = call.({:append_events, store, stream, -1, [%{event | data: n}]})
            {:ok, [%{data: ^n, event_stream_id: ^stream}]} = call.({:get_events, store, stream, 0, 10, :forward})
            n
          end)
        end)
        |> Task.await_many(60_000)
        |> Enum.sum()
        """,
        event=event(1),
        store=STORE,
        node=gate.gater.atom,
        timeout_s=90,
    )
    assert answer == 500_500


async def test_what_dies_during_a_call_is_made_up_for(beam: Beams) -> None:
    elixir = await beam.start("elixir")
    async with (
        standin_cluster(beam, 1, stores=[STORE.name]) as cluster,
        gater_process(cookie=elixir.cookie, epmd_port=await beam.epmd_port(), connect=cluster.names) as gater,
    ):
        gate = Gate(gater, elixir, cluster)
        assert await gate.call_server("append_events", STORE, b"s", [event(1)]) == (OK, 0)
        await cluster.set("die_in_next_append", Atom("before"))
        assert await gate.call_server("append_events", STORE, b"s", [event(2)]) == (OK, 1)
        await cluster.set("die_in_next_append", Atom("after"))
        assert await gate.call_server("append_events", STORE, b"s", [event(3)]) == (OK, 2)
        # A read is asked of another worker.
        await cluster.set("crash_next", True)
        assert await gate.call_server("get_version", STORE, b"s") == (OK, 2)


async def test_a_worker_that_hangs_gives_an_error_in_time(beam: Beams) -> None:
    elixir = await beam.start("elixir")
    async with (
        standin_cluster(beam, 1, stores=[STORE.name], workers=1) as cluster,
        gater_process(cookie=elixir.cookie, epmd_port=await beam.epmd_port(), connect=cluster.names) as gater,
    ):
        gate = Gate(gater, elixir, cluster)
        assert await gate.call_server("get_version", STORE, b"s") == (OK, -1)
        await cluster.set("hang_next", 20_000)
        async with asyncio.timeout(6):
            error, (kind, _) = await gate.call_server("get_version", STORE, b"s")
        assert (error, kind) == (ERROR, Atom("call_timeout"))
