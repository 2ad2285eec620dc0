"""The doors to a gateway: every operation by function, by GenServer and by the Python client, with the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import (
    STORE,
    Ask,
    Cluster,
    answering,
    caller_node,
    client_door,
    connected,
    event,
    function_door,
    gateway,
    open_cluster,
    server_door,
    tell_server,
)
from node_kit import COOKIE, wait_until

from gater import Gateway
from gater.api import schema
from gater.api.schema import Snapshot
from gater.api.server import API_MODULE
from gater.erl import Node, NodeOptions, etf
from gater.erl.errors import ErlangError
from gater.erl.gen_server import call
from gater.erl.rpc import erpc_call, rpc_call
from gater.erl.terms import Atom, EncodedTerm, Pid, Term
from gater.system import System

OK = schema.OK
ERROR = schema.ERROR
ANY = schema.ANY
FORWARD = schema.FORWARD
BACKWARD = schema.BACKWARD
BY_STREAM = schema.BY_STREAM
NOBODY = Atom("no_such_store")


@dataclass
class House:
    """A gateway, who calls it, and the store nodes behind it if there are any."""

    system: System
    caller: Node
    client: Gateway
    cluster: Cluster | None

    @property
    def doors(self) -> dict[str, Ask]:
        return {
            "function": function_door(self.caller, self.system),
            "server": server_door(self.caller, self.system),
            "client": client_door(self.client),
        }


@pytest.fixture(params=["store nodes", "embedded"])
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        cluster: Cluster | None = None
        if request.param == "embedded":
            system = await stack.enter_async_context(gateway(embedded=tmp_path / "data", call_timeout_ms=30_000))
        else:
            cluster = await stack.enter_async_context(open_cluster(tmp_path, 2))
            # What is tested here are answers, and a busy machine may be slow with them.
            system = await stack.enter_async_context(gateway(cluster, call_timeout_ms=30_000))
            await connected(system, cluster)
        port = system.settings.epmd_port
        caller = await stack.enter_async_context(caller_node(port))
        client = await stack.enter_async_context(
            Gateway.connect(system.settings.name, cookie=COOKIE, options=NodeOptions(epmd_port=port))
        )
        yield House(system, caller, client, cluster)


@pytest.fixture(params=["function", "server", "client"])
def ask(request: pytest.FixtureRequest, house: House) -> Ask:
    return house.doors[request.param]


def terms(*numbers: int) -> list[Term]:
    return [event(number, {b"n": number}).to_term() for number in numbers]


def numbers(reply: Term) -> list[int]:
    ok, events = reply
    assert ok is OK, reply
    return [each[schema.EVENT_NUMBER] for each in events]


# Every operation, through every door


async def test_events_are_appended_and_read(ask: Ask) -> None:
    assert await ask("append_events", STORE, b"s", terms(0, 1)) == (OK, 1)
    assert await ask("append_events", STORE, b"s", 1, terms(2)) == (OK, 2)
    assert await ask("append_events", STORE, b"s", ANY, terms(3)) == (OK, 3)
    assert await ask("append_events", STORE, b"s", schema.STREAM_EXISTS, terms(4)) == (OK, 4)
    assert await ask("append_events", STORE, b"new", -1, terms(0)) == (OK, 0)
    assert await ask("get_version", STORE, b"s") == (OK, 4)
    assert await ask("get_version", STORE, b"none") == (OK, -1)
    assert numbers(await ask("get_events", STORE, b"s", 0, 100, FORWARD)) == [0, 1, 2, 3, 4]
    assert numbers(await ask("get_events", STORE, b"s", 3, 2, BACKWARD)) == [3, 2]
    assert numbers(await ask("stream_forward", STORE, b"s", 1, 3)) == [1, 2, 3]
    assert numbers(await ask("stream_backward", STORE, b"s", 2, 100)) == [2, 1, 0]
    assert await ask("get_streams", STORE) == (OK, [b"new", b"s"])


async def test_what_is_read_is_what_was_appended_whichever_door_it_came_by(house: House) -> None:
    data = {Atom("text"): "grüße".encode(), b"list": [1, 2.5, (True, None)], 7: [Atom("a")], b"big": 1 << 80}
    for name, ask in house.doors.items():
        assert await ask("append_events", STORE, name.encode(), [event(1, data).to_term()]) == (OK, 0)
    seen = [
        (await ask("get_events", STORE, name.encode(), 0, 1, FORWARD))[1][0]
        for ask in house.doors.values()
        for name in house.doors
    ]
    assert [each[schema.DATA] for each in seen] == [data] * 9
    assert [each[schema.METADATA] for each in seen] == [{b"n": 1}] * 9


async def test_wrong_versions_are_refused_with_the_current_one(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    # A caller that knows more than the node does might have its version of another node.
    monkeypatch.setattr("gater.api.appends.CATCH_UP_S", 0.1)
    await ask("append_events", STORE, b"s", terms(0, 1))
    for expected in (-1, 0, 5):
        assert await ask("append_events", STORE, b"s", expected, terms(2)) == (
            ERROR,
            schema.wrong_expected_version(1),
        )
    refused = await ask("append_events", STORE, b"none", schema.STREAM_EXISTS, terms(0))
    assert refused == (ERROR, schema.wrong_expected_version(-1))
    assert await ask("get_version", STORE, b"s") == (OK, 1)


async def test_the_four_checks_and_the_stores_are_answered(ask: Ask) -> None:
    for check in (
        "verify_cluster_consistency",
        "quick_health_check",
        "verify_membership_consensus",
        "check_raft_log_consistency",
    ):
        ok, found = await ask(check, STORE)
        assert ok is OK
        assert isinstance(found, dict)
    ok, stores = await ask("list_stores")
    assert ok is OK
    assert [each[Atom("store")][Atom("store_id")] for each in stores] == [STORE]


async def test_a_store_that_nobody_holds_is_not_found(ask: Ask) -> None:
    not_found = (ERROR, schema.store_not_found(NOBODY))
    assert await ask("append_events", NOBODY, b"s", terms(0)) == not_found
    assert await ask("get_events", NOBODY, b"s", 0, 1, FORWARD) == not_found
    assert await ask("get_streams", NOBODY) == not_found
    # As the original: it does not tell an unknown store from an unknown stream.
    assert await ask("get_version", NOBODY, b"s") == (OK, -1)


async def test_requests_that_would_crash_a_worker_reach_none(house: House, ask: Ask) -> None:
    for stream, expected, events, why in (
        (b"", ANY, terms(0), b"empty name"),
        (b"s" * 300, ANY, terms(0), b"300 characters"),
    ):
        error, (kind, text) = await ask("append_events", STORE, stream, expected, events)
        assert (error, kind) == (ERROR, Atom("invalid_request"))
        assert why in text
    if house.cluster is not None:
        assert house.cluster.requests == []


async def test_snapshots_are_recorded_read_listed_and_deleted(house: House) -> None:
    record = Snapshot("agg", 2, "Order", {b"total": 12}).to_term()
    function = house.doors["function"]
    assert await function("record_snapshot", STORE, b"agg", b"s", 1, record) is OK
    tell_server(house.caller, house.system, "record_snapshot", STORE, b"agg", b"s", 2, record)
    await house.client.record_snapshot(STORE.name, "agg", "s", 3, Snapshot.from_term(record))

    async def versions() -> list[int]:
        return sorted(version for _, _, version in await house.client.list_snapshots(STORE.name))

    async def are(expected: list[int]) -> bool:
        return await versions() == expected

    await wait_until(lambda: are([1, 2, 3]), "three snapshots")
    for ask in house.doors.values():
        assert await ask("read_snapshot", STORE, b"agg", b"s", 2) == (OK, record)
    for name in ("function", "server"):
        error, reason = await house.doors[name]("read_snapshot", STORE, b"agg", b"s", 9)
        assert error is ERROR
        assert schema.is_not_found(reason)
        ok, found = await house.doors[name]("list_snapshots", STORE, b"agg", ANY)
        assert ok is OK
        assert sorted(path[-1] for path in found) == [b"0000000001", b"0000000002", b"0000000003"]
    assert await house.client.read_snapshot(STORE.name, "agg", "s", 9) is None

    assert await function("delete_snapshot", STORE, b"agg", b"s", 1) is OK
    tell_server(house.caller, house.system, "delete_snapshot", STORE, b"agg", b"s", 2)
    await house.client.delete_snapshot(STORE.name, "agg", "s", 3)
    await wait_until(lambda: are([]), "no snapshots")


async def test_subscriptions_are_saved_acknowledged_and_removed(house: House) -> None:
    function = house.doors["function"]

    async def saved() -> dict[str, int]:
        return {each.subscription_name: each.start_from for each in await house.client.get_subscriptions(STORE.name)}

    async def are(expected: dict[str, int]) -> bool:
        return await saved() == {"all-events": 0, **expected}

    assert await function("save_subscription", STORE, BY_STREAM, b"$s", b"one", 0, None) is OK
    tell_server(house.caller, house.system, "save_subscription", STORE, BY_STREAM, b"$s", b"two", 5, None)
    await wait_until(lambda: are({"one": 0, "two": 5}), "two subscriptions")
    seen = {schema.EVENT_STREAM_ID: b"s", schema.EVENT_NUMBER: 2}
    assert await function("ack_event", STORE, b"one", None, seen) is OK
    await wait_until(lambda: are({"one": 3, "two": 5}), "an acknowledgement")
    assert await function("remove_subscription", STORE, BY_STREAM, b"$s", b"one") is OK
    tell_server(house.caller, house.system, "remove_subscription", STORE, BY_STREAM, b"$s", b"two")
    await wait_until(lambda: are({}), "no subscriptions")


# The functions


async def test_functions_have_the_arities_and_default_arguments_of_the_original(house: House) -> None:
    ask = house.doors["function"]
    assert await ask("append_events", STORE, b"s", terms(0, 1)) == (OK, 1)
    assert numbers(await ask("get_events", STORE, b"s", 0, 10)) == [0, 1]
    assert await ask("list_snapshots", STORE) == (OK, {})
    assert await ask("list_snapshots", STORE, ANY) == (OK, {})
    assert await ask("list_snapshots", STORE, ANY, ANY) == (OK, {})
    for given in ([], [b"mine"], [b"yours", 4], [b"theirs", 4, None]):
        assert await ask("save_subscription", STORE, BY_STREAM, b"$s", *given) is OK
    expected = {"transient": 0, "mine": 0, "yours": 4, "theirs": 4, "all-events": 0}

    async def saved() -> bool:
        found = await house.client.get_subscriptions(STORE.name)
        return {each.subscription_name: each.start_from for each in found} == expected

    await wait_until(saved, "the subscriptions")
    assert await ask("remove_subscription", STORE, BY_STREAM, b"$s") is OK


async def test_a_cast_that_cannot_be_sent_is_an_error_of_its_function(house: House) -> None:
    ask = house.doors["function"]
    error, (kind, _) = await ask("save_subscription", STORE, Atom("by_moon"), b"$s")
    assert (error, kind) == (ERROR, Atom("invalid_request"))
    refused = await ask("delete_snapshot", NOBODY, b"agg", b"s", 1)
    assert refused == (ERROR, schema.store_not_found(NOBODY))


async def test_a_refused_cast_does_not_disturb_the_server(house: House) -> None:
    tell_server(house.caller, house.system, "save_subscription", STORE, Atom("by_moon"), b"$s", b"n", 0, None)
    tell_server(house.caller, house.system, "no_such_cast")
    assert await house.doors["server"]("get_version", STORE, b"s") == (OK, -1)


async def test_a_function_that_does_not_exist_is_undef(house: House) -> None:
    name = house.system.node.name
    with pytest.raises(ErlangError) as caught:
        await erpc_call(house.caller, name, API_MODULE, "get_version", [STORE])
    undefined = (Atom(API_MODULE), Atom("get_version"), [STORE], [])
    assert caught.value.reason == (Atom("exception"), Atom("undef"), [undefined])
    badrpc = await rpc_call(house.caller, name, API_MODULE, "frobnicate")
    assert badrpc == (Atom("badrpc"), (Atom("EXIT"), (Atom("undef"), [(Atom(API_MODULE), Atom("frobnicate"), [], [])])))


async def test_the_pids_of_the_workers_can_be_asked_for(house: House) -> None:
    ask = house.doors["function"]
    own, count = house.system.node.name, house.system.settings.pool_size

    async def registered() -> list[Pid] | None:
        pids: list[Pid] = await ask("gateway_worker_pids_for_store", STORE)
        return pids if sum(pid.node is own for pid in pids) == count else None

    pids = await wait_until(registered, "its own workers")
    assert pids == await ask("gateway_worker_pids")
    others = [] if house.cluster is None else [worker.pid for worker in house.cluster.workers]
    assert sorted(str(pid) for pid in pids if pid.node is not own) == sorted(map(str, others))
    assert await ask("gateway_worker_pids_for_store", NOBODY) == []


# The GenServer


@pytest.mark.parametrize(
    "request_term",
    [Atom("hello"), (), 7, (b"get_version", STORE, b"s"), (Atom("get_version"), STORE), (Atom("save_subscription"),)],
    ids=str,
)
async def test_a_request_that_is_none_is_answered_with_a_reason_for_people(house: House, request_term: Term) -> None:
    error, (kind, text) = await call(house.caller, (API_MODULE, house.system.settings.name), request_term)
    assert (error, kind) == (ERROR, Atom("unknown_request"))
    assert text.decode().isprintable()


async def test_messages_that_are_no_requests_do_not_disturb_the_server(house: House) -> None:
    target = (Atom(API_MODULE), house.system.node.name)
    for message in (Atom("hello"), (Atom("$gen_call"), Atom("nobody"), 1), (1, 2, 3), b"x"):
        house.caller.send(target, message)
    assert await house.doors["server"]("get_version", STORE, b"s") == (OK, -1)


async def test_the_server_answers_sys_get_state(house: House) -> None:
    reference = house.caller.make_reference()
    answers: list[Term] = []

    async def main(me: Any) -> None:
        me.send((Atom(API_MODULE), house.system.node.name), (Atom("system"), (me.pid, reference), Atom("get_state")))
        answers.append(await me.get())

    house.caller.spawn(main)
    await wait_until(lambda: answers, "an answer")
    tag, state = answers[0]
    assert tag == reference
    cluster = state.pop(Atom("cluster"))
    assert state == {
        Atom("under_way"): 0,
        Atom("stores"): [STORE],
        Atom("no_quorum"): {},
        Atom("draining"): False,
    }
    if house.cluster is not None:
        nodes = cluster[Atom("nodes")]
        assert all(nodes[Atom(name)][Atom("state")] is Atom("up") for name in house.cluster.names)
        assert all(nodes[Atom(name)][Atom("stores")] == [STORE] for name in house.cluster.names)


async def test_many_callers_get_their_own_answers(house: House) -> None:
    ask = house.doors["server"]
    versions = await asyncio.gather(
        *(ask("append_events", STORE, b"stream-%d" % n, -1, terms(*range(n % 3 + 1))) for n in range(500))
    )
    assert versions == [(OK, n % 3) for n in range(500)]


# Payloads


async def test_a_payload_of_5_mb_goes_and_comes_back(ask: Ask) -> None:
    data = bytes(range(256)) * (5 * 4096)
    assert await ask("append_events", STORE, b"big", [event(0, data).to_term()]) == (OK, 0)
    ok, (read,) = await ask("get_events", STORE, b"big", 0, 1, FORWARD)
    assert ok is OK
    assert read[schema.DATA] == data


ODD = bytes([98, 0, 0, 0, 7])
"""7 as an INTEGER_EXT: right, but not how anybody encodes it, so that it shows who has encoded it anew."""


@pytest.mark.parametrize("house", ["store nodes"], indirect=True)
async def test_the_events_of_a_request_to_the_server_are_passed_on_as_the_bytes_they_came_as(house: House) -> None:
    assert house.cluster is not None
    came: list[Term] = []
    for worker in house.cluster.workers:
        worker.process.spine_levels = 2

    def keep(worker: Any, request: Term, caller: Any) -> Term:
        came.append(request)
        return schema.ok(0)

    house.cluster.always(keep, "append_events")
    encoded = etf.encode_term(terms(0))
    assert encoded.count(etf.encode_term(schema.DATA) + b"t") == 1
    odd = encoded.replace(etf.encode_term({b"n": 0}), b"t\0\0\0\1" + etf.encode_term(b"n") + ODD)
    assert odd != encoded
    assert await house.doors["server"]("append_events", STORE, b"s", -1, EncodedTerm(odd)) == (OK, 0)
    assert came[0][-1] == EncodedTerm(odd)


@pytest.mark.parametrize("house", ["store nodes"], indirect=True)
async def test_a_reply_is_passed_on_as_the_bytes_it_came_as(house: House) -> None:
    assert house.cluster is not None
    odd = EncodedTerm(b"l\0\0\0\1" + ODD + b"j")
    house.cluster.always(answering((OK, odd)), "get_streams")
    target = (API_MODULE, house.system.settings.name)
    assert await call(house.caller, target, (Atom("get_streams"), STORE), spine_levels=1) == (OK, odd)
    assert await house.doors["function"]("get_streams", STORE) == (OK, [7])


async def test_pids_and_functions_in_a_payload_keep_their_identity(house: House, ask: Ask) -> None:
    pid = Pid(Atom("elsewhere@127.0.0.1"), 5, 6, 7)
    assert await ask("append_events", STORE, b"s", [event(0, {b"pid": pid}).to_term()]) == (OK, 0)
    _, (read,) = await ask("get_events", STORE, b"s", 0, 1, FORWARD)
    assert read[schema.DATA] == {b"pid": pid}
