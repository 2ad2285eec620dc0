"""The stand-in store answers as the recorded ExESDB does, has its faults, and keeps what its Raft log promises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from erlang_interop_tests.beam import BeamError, BeamFailure, Beams, wait_until
from erlang_interop_tests.standin import DEFAULT_STORE, StandInCluster, standin_cluster
from gater.erl import etf
from gater.erl.terms import Atom, Fun, Pid, Term

CONTRACT: Final = json.loads(
    (Path(__file__).resolve().parent.parent / "tests" / "captures" / "exesdb_contract.json").read_text()
)
RECORDED_NODE: Final = "node0@127.0.0.1"
VOLATILE_KEYS: Final = {
    *("created", "created_epoch", "created_at", "timestamp"),
    *("data_dir", "store_description", "tags"),
}
STORE: Final = Atom(DEFAULT_STORE)

CALL_A_WORKER: Final = """
{_, pid} = Enum.find(Swarm.registered(), &match?({{:gateway_worker, _, _, _}, _}, &1))
try do
  {:reply, GenServer.call(pid, :erlang.binary_to_term(request))}
catch
  :exit, {{why, _}, _} -> {:exit, inspect(why)}
end
"""
CAST_TO_A_WORKER: Final = """
{_, pid} = Enum.find(Swarm.registered(), &match?({{:gateway_worker, _, _, _}, _}, &1))
GenServer.cast(pid, :erlang.binary_to_term(request))
"""


def new_event(number: int) -> dict[Term, Term]:
    """A `NewEvent` struct whose id tells which append made it."""
    return {
        Atom("__struct__"): Atom("Elixir.ExESDB.Schema.NewEvent"),
        Atom("__unknown_fields__"): [],
        Atom("event_id"): f"event-{number}".encode(),
        Atom("event_type"): b"counted:v1",
        Atom("data_content_type"): 1,
        Atom("metadata_content_type"): 1,
        Atom("data"): {b"number": number},
        Atom("metadata"): {},
    }


def comparable(term: Term, node: str) -> Any:
    """`term` without what differs from run to run: times, pids, closures, directories, and the node's name."""
    if isinstance(term, Mapping):
        return [
            (comparable(key, node), ... if str(key) in VOLATILE_KEYS else comparable(value, node))
            for key, value in sorted(term.items(), key=lambda item: repr(item[0]))
        ]
    if isinstance(term, list | tuple):
        return type(term)(comparable(element, node) for element in term)
    if isinstance(term, Fun):
        return f"fun/{term.arity}"
    if isinstance(term, Pid):
        return "pid"
    if term is Atom(node):
        return Atom(RECORDED_NODE)
    return term


async def test_every_exchange_of_the_contract_ends_as_recorded(beam: Beams) -> None:
    async with standin_cluster(beam, workers=1) as cluster:
        node = cluster.members[0]
        for exchange in CONTRACT["exchanges"]:
            label = exchange["label"]
            request = bytes.fromhex(exchange["request_etf"])
            if exchange["kind"] == "cast":
                await node.eval(CAST_TO_A_WORKER, request=request)
                continue
            outcome, reply = await node.eval(CALL_A_WORKER, request=request)
            if exchange["outcome"] == "reply":
                expected = etf.decode(bytes.fromhex(exchange["reply_etf"]))
                assert outcome is Atom("reply"), f"{label}: {reply!r}"
                assert comparable(reply, str(node.name)) == comparable(expected, RECORDED_NODE), label
            else:
                assert outcome is Atom("exit"), label
                assert crash_reason(exchange["reply"]) in reply.decode(), label
                await cluster.wait_ready()


def crash_reason(recorded: str) -> str:
    """What a recorded crash must have in common with ours: its reason, up to the first time in it."""
    reason = recorded.removeprefix('{:worker_crashed, "').split('"}')[0].replace('\\"', '"')
    return reason.split(", ~U[")[0]


async def test_what_runs_on_the_node_is_what_runs_on_a_real_one(standin: StandInCluster) -> None:
    running = await standin.members[0].eval("for {name, _, _} <- :application.which_applications(), do: name")
    assert {Atom("ex_esdb"), Atom("swarm")} <= set(running)
    name = standin.members[0].atom
    assert await standin.members[0].eval(":khepri_cluster.members(:reg_gh)") == (Atom("ok"), [(STORE, name)])
    assert await standin.members[0].eval(":ra_leaderboard.lookup_leader(:reg_gh)") == (STORE, name)


async def test_a_crashed_worker_comes_back_under_a_new_name(standin: StandInCluster) -> None:
    before = await standin.workers()
    with pytest.raises(BeamError, match=r"FunctionClauseError"):
        await standin.call((Atom("frobnicate"), STORE))
    await standin.wait_ready()
    after = await standin.workers()
    assert len(after) == len(before)
    assert len(set(after) - set(before)) == 1


async def test_every_member_sees_the_workers_of_all(standin_of_three: StandInCluster) -> None:
    seen = [await standin_of_three.workers(node) for node in standin_of_three.members]
    assert seen[0] == seen[1] == seen[2]
    assert {str(name[2]) for name in seen[0]} == set(standin_of_three.names)


async def test_junk_names_fill_the_registry_of_every_member(standin_of_three: StandInCluster) -> None:
    await standin_of_three.add_junk_names(10_000)

    async def filled() -> bool:
        sizes = [await node.eval("length(Swarm.registered())") for node in standin_of_three.members]
        return all(size > 10_000 for size in sizes)

    await wait_until(filled, what="10,000 junk names on every member")


async def test_concurrent_worker_appends_on_several_members_lose_events(standin_of_three: StandInCluster) -> None:
    async def append(number: int) -> Term:
        request = (Atom("append_events"), STORE, b"contended", [new_event(number)])
        return await standin_of_three.call(request, member=number % 3)

    answers = await asyncio.gather(*(append(number) for number in range(60)))
    acknowledged = [answer for answer in answers if answer[0] is Atom("ok")]
    stored = await standin_of_three.events("contended")
    assert len(stored) < len(acknowledged)


async def test_without_the_race_worker_appends_lose_nothing(standin_of_three: StandInCluster) -> None:
    await standin_of_three.set("race", False)

    async def append(number: int) -> Term:
        request = (Atom("append_events"), STORE, b"guarded", [new_event(number)])
        return number, await standin_of_three.call(request, member=number % 3)

    answers = await asyncio.gather(*(append(number) for number in range(60)))
    acknowledged = {f"event-{number}".encode() for number, answer in answers if answer[0] is Atom("ok")}
    refused = {answer for _, answer in answers if answer[0] is Atom("error")}
    assert acknowledged == {event[Atom("event_id")] for event in await standin_of_three.events("guarded")}
    assert refused <= {(Atom("error"), Atom("wrong_expected_version"))}


async def test_a_follower_that_lags_answers_with_old_versions(standin_of_three: StandInCluster) -> None:
    leader = await standin_of_three.leader()
    assert leader is not None
    follower = (leader + 1) % 3
    await standin_of_three.set("replication_lag_ms", 1_000, member=follower)
    append = (Atom("append_events"), STORE, b"lagging", [new_event(1)])
    version = (Atom("get_version"), STORE, b"lagging")
    assert await standin_of_three.call(append, member=leader) == (Atom("ok"), 0)
    assert await standin_of_three.call(version, member=leader) == (Atom("ok"), 0)
    assert await standin_of_three.call(version, member=follower) == (Atom("ok"), -1)
    assert await standin_of_three.members[follower].eval(":khepri.fence(:reg_gh, 5_000)") is Atom("ok")
    assert await standin_of_three.call(version, member=follower) == (Atom("ok"), 0)


@pytest.mark.parametrize(("moment", "stored"), [("before", 0), ("after", 1)])
async def test_a_worker_may_die_before_or_after_it_stored_the_event(
    standin: StandInCluster, moment: str, stored: int
) -> None:
    await standin.set("die_in_next_append", Atom(moment))
    with pytest.raises(BeamError, match="killed"):
        await standin.call((Atom("append_events"), STORE, b"deadly", [new_event(1)]))
    assert len(await standin.events("deadly")) == stored
    await standin.wait_ready()
    assert await standin.call((Atom("append_events"), STORE, b"deadly", [new_event(2)])) == (Atom("ok"), stored)


async def test_a_switch_crashes_the_worker_of_the_next_request(standin: StandInCluster) -> None:
    version = (Atom("get_version"), STORE, b"any")
    await standin.set("crash_next", True)
    with pytest.raises(BeamError, match="crashed by the test"):
        await standin.call(version)
    await standin.wait_ready()
    assert await standin.call(version) == (Atom("ok"), -1)


async def test_a_switch_delays_every_request(standin: StandInCluster) -> None:
    await standin.set("delay_ms", 200)
    started = asyncio.get_running_loop().time()
    await standin.call((Atom("get_version"), STORE, b"any"))
    assert asyncio.get_running_loop().time() - started >= 0.2


async def test_a_switch_makes_one_worker_hang(standin: StandInCluster) -> None:
    await standin.set("hang_next", Atom("infinity"))
    with pytest.raises(BeamFailure, match="did not answer"):
        await standin.call((Atom("get_version"), STORE, b"any"), timeout_s=0.3)


async def test_a_killed_member_catches_up_and_the_others_go_on(standin_of_three: StandInCluster) -> None:
    leader = await standin_of_three.leader()
    assert leader is not None
    survivor = (leader + 1) % 3

    async def append(number: int) -> Term:
        request = (Atom("append_events"), STORE, b"survivor", number, [new_event(number)])
        return await standin_of_three.call(request, member=survivor)

    assert await append(-1) == (Atom("ok"), 0)
    await standin_of_three.kill(leader)
    assert await append(0) == (Atom("ok"), 1)
    await standin_of_three.restart(leader)
    ids = [event[Atom("event_id")] for event in await standin_of_three.events("survivor", member=leader)]
    assert ids == [b"event--1", b"event-0"]


async def test_all_members_restarted_still_have_the_events(standin_of_three: StandInCluster) -> None:
    await standin_of_three.call((Atom("append_events"), STORE, b"kept", [new_event(1), new_event(2)]))
    for member in range(3):
        await standin_of_three.kill(member)
    await asyncio.gather(*(standin_of_three._start_member(node) for node in standin_of_three.members))
    await standin_of_three.wait_ready()
    assert len(await standin_of_three.events("kept", member=2)) == 2


async def test_a_member_that_is_cut_off_writes_nothing_until_it_is_healed(standin_of_three: StandInCluster) -> None:
    others = standin_of_three.names[1:]
    await standin_of_three.cut(0, others)
    put = ':khepri.put(:reg_gh, [:streams, "cut", "000000"], 1, %{timeout: timeout})'
    node = standin_of_three.members[0]
    assert await node.eval(put, timeout=300) == (Atom("error"), Atom("timeout"))

    async def led_by_another() -> bool:
        return await standin_of_three.leader(member=1) in (1, 2)

    await wait_until(led_by_another, timeout_s=10, what="a leader on the other side")
    assert await standin_of_three.members[1].eval(put, timeout=5_000) is Atom("ok")
    await standin_of_three.heal(0, others)
    await standin_of_three.wait_ready()
    assert await node.eval(put, timeout=5_000) is Atom("ok")


GUARDED_PUT: Final = """
Name = list_to_binary(io_lib:format("~6..0B", [Expected])),
Path = case Expected of
  0 -> [streams, Stream, {if_all, [Name, {if_node_exists, false}]}];
  _ -> [streams, {if_all, [Stream, {if_child_list_length, Expected}]}, {if_all, [Name, {if_node_exists, false}]}]
end,
khepri:put(reg_gh, Path, Event)
"""


async def test_of_racers_with_guarded_puts_one_wins_each_number(standin_of_three: StandInCluster) -> None:
    async def race(number: int, expected: int) -> Term:
        node = standin_of_three.members[number % 3]
        return await node.eval(GUARDED_PUT, language="erlang", Stream=b"raced", Expected=expected, Event=number)

    for expected in range(3):
        answers = await asyncio.gather(*(race(number, expected) for number in range(20)))
        assert answers.count(Atom("ok")) == 1
        refusals = [answer for answer in answers if answer is not Atom("ok")]
        assert {answer[1][1] for answer in refusals} == {Atom("mismatching_node")}
        assert all(Atom("condition") in answer[1][2] for answer in refusals)


async def test_reads_by_path_pattern_answer_as_khepri_does(standin: StandInCluster) -> None:
    await standin.call((Atom("append_events"), STORE, b"a", [new_event(1), new_event(2)]))
    await standin.call((Atom("append_events"), STORE, b"b", [new_event(3)]))
    node = standin.members[0]
    many = await node.eval(
        ':khepri.get_many(:reg_gh, [:streams, "a", {:if_node_exists, true}]) |> elem(1) |> Map.keys()'
    )
    assert many == [[Atom("streams"), b"a", b"000000"], [Atom("streams"), b"a", b"000001"]]
    assert await node.eval(':khepri.count(:reg_gh, [:streams, "a", {:if_node_exists, true}])') == (Atom("ok"), 2)
    lengths = await node.eval(
        """
        options = %{props_to_return: [:child_list_length]}
        {:ok, found} = :khepri_adv.get_many(:reg_gh, [:streams, {:if_node_exists, true}], options)
        Enum.sort(found)
        """
    )
    length = Atom("child_list_length")
    assert lengths == [([Atom("streams"), b"a"], {length: 2}), ([Atom("streams"), b"b"], {length: 1})]
    assert await node.eval(':khepri.create(:reg_gh, [:gater, "x"], 1)') is Atom("ok")
    assert (await node.eval(':khepri.create(:reg_gh, [:gater, "x"], 2)'))[0] is Atom("error")
    assert await node.eval(':khepri.get(:reg_gh, [:gater, "x"])') == (Atom("ok"), 1)
    assert await node.eval(":khepri.get(:no_such_store, [:gater])") == (Atom("error"), Atom("noproc"))


async def test_the_raft_index_moves_with_writes_only(standin: StandInCluster) -> None:
    node = standin.members[0]
    index = ":ra.key_metrics({:reg_gh, node()}).last_applied"
    before = await node.eval(index)
    await standin.call((Atom("get_streams"), STORE))
    assert await node.eval(index) == before
    await standin.call((Atom("append_events"), STORE, b"a", [new_event(1)]))
    assert await node.eval(index) == before + 1


async def test_a_store_without_khepri_has_workers_only(beam: Beams) -> None:
    async with standin_cluster(beam, khepri=False) as cluster:
        assert await cluster.call((Atom("append_events"), STORE, b"a", [new_event(1)])) == (Atom("ok"), 0)
        with pytest.raises(BeamError, match="undef"):
            await cluster.members[0].eval(":khepri.fence(:reg_gh, 1_000)")


async def test_a_member_of_another_kind_joins_the_registry(standin_of_three: StandInCluster, beam: Beams) -> None:
    other = await beam.start("elixir", hidden=True)
    joined = await other.eval(
        """
        Process.register(self(), Swarm.Tracker)
        :pong = Node.ping(member)
        GenServer.cast({Swarm.Tracker, member}, {:sync, self(), {1, 0}})
        receive do
          {:"$gen_cast", {:sync_recv, tracker, clock, entries}} ->
            entry = {:entry, {:gater_api, 1}, self(), make_ref(), %{}, {0, 1}}
            GenServer.cast(tracker, {:sync_ack, self(), clock, [entry]})
            :pong = Node.ping(second)
            send({Swarm.Tracker, second}, {:event, self(), {0, 1}, {:track, :late, self(), %{}}})
            seen_by = fn node, name -> :rpc.call(node, Swarm, :whereis_name, [name]) == self() end
            true = Enum.any?(1..100, fn _ -> seen_by.(member, {:gater_api, 1}) end)
            true = Enum.any?(1..100, fn _ -> seen_by.(second, :late) end)
            for {:entry, {:gateway_worker, _, node, _}, _, _, _, _} <- entries, uniq: true, do: node
        end
        """,
        member=standin_of_three.members[0].atom,
        second=standin_of_three.members[1].atom,
    )
    assert {str(name) for name in joined} == set(standin_of_three.names)


async def test_emitters_send_new_events_where_subscriptions_say(standin_of_three: StandInCluster) -> None:
    await standin_of_three.set("emitters", True)
    leader = await standin_of_three.leader()
    assert leader is not None
    received = await standin_of_three.members[(leader + 1) % 3].eval(
        """
        {_, worker} = Enum.find(Swarm.registered(), fn {name, _} ->
          match?({:gateway_worker, _, node, _} when node == node(), name) end)
        GenServer.cast(worker, {:save_subscription, :reg_gh, :by_event_payload, %{"number" => 7}, "sevens", 0, nil})
        topic = "reg_gh:evt-pay-sevens-" <> Integer.to_string(:erlang.phash2(%{"number" => 7}), 16)
        :ok = ExESDB.StandIn.PubSub.subscribe(topic, self())
        {:ok, 1} = GenServer.call(worker, {:append_events, :reg_gh, "numbers", events})
        receive do: ({:events, [event]} -> {event.event_number, event.data})
        """,
        events=[new_event(6), new_event(7)],
    )
    assert received == (1, {b"number": 7})
