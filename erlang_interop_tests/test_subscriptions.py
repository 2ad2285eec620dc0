"""Subscriptions of real Elixir processes: embedded store and store node, two gateways and the death of one."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.gater_process import GaterProcess, gater_process
from erlang_interop_tests.standin import StandInCluster, standin_cluster
from gater.api.schema import NewEvent
from gater.api.subscriptions.backlog import MAX_SHARE, MAX_SHARE_BYTES
from gater.erl.terms import Atom, Term

STORE = Atom("reg_gh")

COLLECT = """
collect = fn collect, seen ->
  receive do
    {:events, events} ->
      for event <- events, ack != nil do
        :ok = :erpc.call(ack, ExESDBGater.API, :ack_event, [:reg_gh, name, self(), event])
      end
      collect.(collect, seen ++ Enum.map(events, &{&1.event_stream_id, &1.event_number}))
    {:seen, from} -> send(from, {:seen, seen}); collect.(collect, seen)
    :die -> :ok
  end
end
spawn(fn -> collect.(collect, []) end)
"""


def memory_bytes(pid: int) -> int:
    """The most memory a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@dataclass
class Gate:
    gaters: list[GaterProcess]
    elixir: BeamNode
    cluster: StandInCluster | None

    async def api(self, op: str, *arguments: Term, gater: int = 0) -> Term:
        return await self.elixir.eval(
            ":erpc.call(node, ExESDBGater.API, op, arguments)",
            node=self.gaters[gater].atom,
            op=Atom(op),
            arguments=list(arguments),
        )

    async def append(self, stream: bytes, count: int = 1, gater: int = 0) -> None:
        events = [NewEvent("e", {}).to_term() for _ in range(count)]
        reply = await self.api("append_events", STORE, stream, events, gater=gater)
        assert reply[0] is Atom("ok"), reply

    async def process(self, name: bytes = b"", ack: GaterProcess | None = None) -> Term:
        return await self.elixir.eval(COLLECT, name=name, ack=None if ack is None else ack.atom)

    async def seen(self, pid: Term) -> list[Any]:
        found: list[Any] = await self.elixir.eval(
            "send(pid, {:seen, self()}); receive do {:seen, seen} -> seen after 2000 -> [] end", pid=pid
        )
        return found

    async def has(self, pid: Term, count: int, timeout_s: float = 10.0) -> list[Any]:
        async def there() -> bool:
            return len(await self.seen(pid)) >= count

        await wait_until(there, timeout_s=timeout_s)
        return await self.seen(pid)


@pytest.fixture(params=["embedded", "store node"])
async def gate(request: pytest.FixtureRequest, beam: Beams, tmp_path: Path) -> AsyncIterator[Gate]:
    elixir = await beam.start("elixir")
    options: dict[str, Any] = {"cookie": elixir.cookie, "epmd_port": await beam.epmd_port()}
    if request.param == "embedded":
        async with gater_process(embedded=tmp_path / "data", stores=[STORE.name], **options) as gater:
            yield Gate([gater], elixir, None)
        return
    async with (
        standin_cluster(beam, 1, stores=[STORE.name]) as cluster,
        gater_process(connect=cluster.names, **options) as gater,
    ):
        yield await ready(Gate([gater], elixir, cluster))


async def ready(gate: Gate) -> Gate:
    for number in range(len(gate.gaters)):

        async def known(number: int = number) -> bool:
            return bool(await gate.api("gateway_worker_pids_for_store", STORE, gater=number))

        await wait_until(known)
    return gate


async def test_one_line_subscribes_and_the_name_goes_on_after_a_death(gate: Gate) -> None:
    await gate.append(b"s", 3)
    first = await gate.process()
    saved = await gate.api("save_subscription", STORE, Atom("by_stream"), b"$s", b"projector", 0, first)
    assert saved is Atom("ok")
    await gate.has(first, 3)
    await gate.append(b"s", 2)
    assert await gate.has(first, 5) == [(b"s", number) for number in range(5)]
    await gate.elixir.eval("Process.exit(pid, :kill)", pid=first)
    await gate.append(b"s", 2)
    second = await gate.process()
    saved = await gate.api("save_subscription", STORE, Atom("by_stream"), b"$s", b"projector", 0, second)
    assert saved is Atom("ok")
    assert await gate.has(second, 2) == [(b"s", 5), (b"s", 6)]


async def test_what_is_appended_on_the_store_node_itself_is_delivered(gate: Gate) -> None:
    if gate.cluster is None:
        return
    await gate.append(b"s", 1)
    me = await gate.process()
    assert await gate.api("save_subscription", STORE, Atom("by_stream"), b"$all", b"all", 0, me) is Atom("ok")
    await gate.has(me, 1)
    event = NewEvent("e", {}).to_term()
    began = time.monotonic()
    await gate.cluster.call((Atom("append_events"), STORE, b"direct", [event]))
    assert await gate.has(me, 2) == [(b"s", 0), (b"direct", 0)]
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("frozen", [False, True])
async def test_another_gateway_takes_over_when_one_is_killed_or_stands_still(beam: Beams, frozen: bool) -> None:
    elixir = await beam.start("elixir")
    options: dict[str, Any] = {"cookie": elixir.cookie, "epmd_port": await beam.epmd_port()}
    async with (
        standin_cluster(beam, 1, stores=[STORE.name]) as cluster,
        gater_process(connect=cluster.names, **options) as stays,
        gater_process(connect=[*cluster.names, str(stays.atom)], **options) as goes,
    ):
        gate = await ready(Gate([goes, stays], elixir, cluster))
        me = await gate.process(b"p", ack=stays)
        reply = await gate.api("subscribe", STORE, Atom("by_stream"), b"$all", b"p", {Atom("subscriber"): me})
        assert reply == (Atom("ok"), b"p")
        await gate.append(b"s", 3, gater=1)
        await gate.has(me, 3)

        async def saved() -> bool:
            found = await gate.api("subscription_status", STORE, b"p", gater=1)
            return bool(found[0] is Atom("ok") and found[1][Atom("unsaved_streams")] == 0)

        await wait_until(saved)
        if frozen:
            goes.process.send_signal(signal.SIGSTOP)
        else:
            await goes.kill()
        began = time.monotonic()
        await gate.append(b"s", 2, gater=1)
        assert await gate.has(me, 5) == [(b"s", number) for number in range(5)]
        if not frozen:
            assert time.monotonic() - began < 5.0
            return

        async def owners() -> set[Term]:
            replies = [await gate.api("subscription_status", STORE, b"p", gater=number) for number in range(2)]
            return {found[Atom("node")] if kind is Atom("ok") else None for kind, found in replies}

        async def one_owner() -> bool:
            return len(found := await owners()) == 1 and None not in found

        goes.process.send_signal(signal.SIGCONT)
        await wait_until(one_owner, timeout_s=20.0)
        await gate.append(b"s", 2, gater=0)
        await gate.append(b"s", 2, gater=1)

        async def all_seen() -> bool:
            # What one owner has sent may come again from the other.
            return list(dict.fromkeys(await gate.seen(me))) == [(b"s", number) for number in range(9)]

        await wait_until(all_seen, timeout_s=20.0)


async def test_a_store_that_was_wiped_is_delivered_from_its_beginning_and_keeps_the_subscription(beam: Beams) -> None:
    elixir = await beam.start("elixir")
    options: dict[str, Any] = {"cookie": elixir.cookie, "epmd_port": await beam.epmd_port()}
    async with (
        standin_cluster(beam, 1, stores=[STORE.name]) as cluster,
        gater_process(connect=cluster.names, **options) as gater,
    ):
        gate = await ready(Gate([gater], elixir, cluster))
        me = await gate.process(b"p", ack=gater)
        reply = await gate.api("subscribe", STORE, Atom("by_stream"), b"$all", b"p", {Atom("subscriber"): me})
        assert reply == (Atom("ok"), b"p")
        await gate.append(b"s", 5)
        await gate.has(me, 5)

        async def saved(number: int) -> bool:
            found = await gate.api("list_snapshots", STORE, b"gater.checkpoint", b"p")
            positions = [record[Atom("positions")].get(b"s") for record in found[1].values()] if found[1] else []
            return positions == [number]

        await wait_until(lambda: saved(5))
        await cluster.kill(0)
        cluster.wipe(0)
        await cluster.restart(0)
        await ready(gate)

        async def appended() -> bool:
            events = [NewEvent("new", {}).to_term() for _ in range(3)]
            return (await gate.api("append_events", STORE, b"s", -1, events))[0] is Atom("ok")

        await wait_until(appended)
        assert (await gate.has(me, 8))[5:] == [(b"s", 0), (b"s", 1), (b"s", 2)]
        await wait_until(lambda: saved(3))


async def test_parked_events_are_listed_replayed_and_dropped(gate: Gate) -> None:
    me = await gate.process()
    options = {Atom("subscriber"): me}
    assert (await gate.api("subscribe", STORE, Atom("by_stream"), b"$s", b"p", options))[0] is Atom("ok")
    await gate.append(b"s", 3)
    await gate.has(me, 3)
    for number in range(3):
        place = {Atom("event_stream_id"): b"s", Atom("event_number"): number}
        nack = (STORE, b"p", me, place, (Atom("park"), b"why"))
        assert await gate.api("nack_event", *nack) is Atom("ok")

    async def parked(*after: Term) -> list[Any]:
        _, found = await gate.api("list_parked", STORE, b"p", *after)
        return [(each[Atom("event")][Atom("event_number")], each[Atom("reason")]) for each in found]

    async def all_parked() -> bool:
        return await parked() == [(number, b"why") for number in range(3)]

    await wait_until(all_parked)
    assert await parked({Atom("event_stream_id"): b"s", Atom("event_number"): 1}) == [(2, b"why")]
    assert await gate.api("replay_parked", STORE, b"p") == (Atom("ok"), 3)
    await gate.has(me, 6)
    assert await gate.api("replay_parked", STORE, b"p") == (Atom("ok"), 0)
    assert await gate.api("drop_parked", STORE, b"p") == (Atom("ok"), 3)
    assert await parked() == []


SNAPSHOTS = """
any = {:if_node_exists, true}
stored = fn ->
  {:ok, found} = :khepri.get_many(:reg_gh, [:snapshots, any, any, any])
  for {path, record} <- Enum.sort(found), do: {path, :erlang.term_to_binary(record, [:deterministic])}
end
by_cast = fn -> for {{:snapshots_writer, _, _, _} = name, _} <- Swarm.registered(), do: name end
found = stored.()
before = by_cast.()
{_, worker} = Enum.find(Swarm.registered(), &match?({{:gateway_worker, _, node, _}, _} when node == node(), &1))
for {[:snapshots, source, stream, version], record} <- found do
  version = String.to_integer(version)
  record = :erlang.binary_to_term(record)
  GenServer.cast(worker, {:record_snapshot, :reg_gh, source, stream, version, record})
  {:ok, ^record} = GenServer.call(worker, {:read_snapshot, :reg_gh, source, stream, version})
end
{for({path, _} <- found, do: Enum.take(path, 3)), before, stored.() == found, length(by_cast.())}
"""
"""The snapshots there are, by whom they were written, and whether casts to ExESDB's own worker store the same."""


async def test_snapshots_are_written_by_khepri_and_are_those_that_casts_would_have_stored(beam: Beams) -> None:
    elixir = await beam.start("elixir")
    options: dict[str, Any] = {"cookie": elixir.cookie, "epmd_port": await beam.epmd_port()}
    async with (
        standin_cluster(beam, 3, stores=[STORE.name]) as cluster,
        gater_process(connect=cluster.names, **options) as gater,
    ):
        gate = await ready(Gate([gater], elixir, cluster))
        me = await gate.process()
        await gate.append(b"s", 2)
        subscriber = {Atom("subscriber"): me}
        subscribed = await gate.api("subscribe", STORE, Atom("by_stream"), b"$s", b"p", subscriber)
        assert subscribed == (Atom("ok"), b"p")
        await gate.has(me, 2)
        for number in range(2):
            place = {Atom("event_stream_id"): b"s", Atom("event_number"): number}
            assert await gate.api("nack_event", STORE, b"p", me, place, Atom("park")) is Atom("ok")

        async def saved() -> bool:
            _, records = await cluster.call((Atom("list_snapshots"), STORE, b"gater.checkpoint", b"p"))
            return [record[Atom("positions")] for record in records.values()] == [{b"s": 2}]

        await wait_until(saved)
        paths, written_by_cast, same, casts = await cluster.members[0].eval(SNAPSHOTS)
        sources = [source for _, source, _ in paths]
        assert sources == [b"gater.checkpoint", b"gater.parked.p", b"gater.parked.p"]
        assert written_by_cast == []
        assert same is True
        assert casts == 2
        # Deleted by Khepri as well.
        assert await gate.api("drop_parked", STORE, b"p") == (Atom("ok"), 2)
        assert await gate.api("remove_subscription", STORE, Atom("by_stream"), b"$s", b"p") is Atom("ok")

        async def gone() -> bool:
            _, records = await cluster.call((Atom("list_snapshots"), STORE, Atom("any"), Atom("any")))
            return not records

        await wait_until(gone)


async def test_a_process_that_never_reads_holds_up_nobody_and_gets_no_more_than_its_window(gate: Gate) -> None:
    lazy = await gate.elixir.eval("spawn(fn -> Process.sleep(:infinity) end)")
    busy = await gate.process(b"busy", ack=gate.gaters[0])
    for name, pid in ((b"lazy", lazy), (b"busy", busy)):
        options = {Atom("subscriber"): pid, Atom("window"): 20}
        reply = await gate.api("subscribe", STORE, Atom("by_stream"), b"$all", name, options)
        assert reply == (Atom("ok"), name)
    for _ in range(10):
        await gate.append(b"s", 30)
    assert await gate.has(busy, 300) == [(b"s", number) for number in range(300)]
    waiting = await gate.elixir.eval(
        "{:message_queue_len, count} = Process.info(pid, :message_queue_len); count", pid=lazy
    )
    assert waiting == 20
    _, status = await gate.api("subscription_status", STORE, b"lazy")
    assert (status[Atom("in_flight")], status[Atom("streams_behind")]) == (20, 1)


async def test_large_events_for_a_process_that_does_not_acknowledge_fill_no_memory(gate: Gate) -> None:
    lazy = await gate.elixir.eval("spawn(fn -> Process.sleep(:infinity) end)")
    first = await gate.process()
    for name, pid in ((b"lazy", lazy), (b"first", first)):
        options = {Atom("subscriber"): pid, Atom("auto_ack"): pid == first}
        reply = await gate.api("subscribe", STORE, Atom("by_stream"), b"$all", name, options)
        assert reply == (Atom("ok"), name)
    large = [NewEvent("e", bytes(1_000_000)).to_term() for _ in range(5)]
    for _ in range(60):
        reply = await gate.api("append_events", STORE, b"s", large)
        assert reply[0] is Atom("ok"), reply
    everything = [(b"s", number) for number in range(300)]
    assert await gate.has(first, 300, timeout_s=60) == everything
    _, status = await gate.api("subscription_status", STORE, b"lazy")
    assert status[Atom("in_flight")] * 1_000_000 <= MAX_SHARE_BYTES + 1_000_000
    assert status[Atom("buffered")] * 1_000_000 <= MAX_SHARE_BYTES + 1_000_000
    # The interpreter, what is kept of 300 MB, appends and pages on their way.
    assert memory_bytes(gate.gaters[0].process.pid) < 400_000_000
    again = await gate.process()
    reply = await gate.api("save_subscription", STORE, Atom("by_stream"), b"$all", b"again", 0, again)
    assert await gate.has(again, 300, timeout_s=60) == everything
    assert memory_bytes(gate.gaters[0].process.pid) < 400_000_000


async def test_a_node_that_stands_still_holds_up_nobody_and_gets_the_rest_when_it_goes_on(
    gate: Gate, beam: Beams
) -> None:
    still = await beam.start("elixir")
    frozen = await still.eval(COLLECT, name=b"", ack=None)
    awake = await gate.process()
    for name, pid in ((b"frozen", frozen), (b"awake", awake)):
        reply = await gate.api("save_subscription", STORE, Atom("by_stream"), b"$all", name, 0, pid)
        assert reply is Atom("ok")
    still.freeze()
    large = [NewEvent("e", b"x" * 10_000).to_term() for _ in range(150)]
    for _ in range(20):
        reply = await gate.api("append_events", STORE, b"s", large)
        assert reply[0] is Atom("ok"), reply
    everything = [(b"s", number) for number in range(3_000)]
    assert await gate.has(awake, 3_000, timeout_s=30) == everything
    _, status = await gate.api("subscription_status", STORE, b"frozen")
    # 30 MB are for it: some are on their way, some are kept, the others are where they were.
    assert status[Atom("streams_behind")] == 1
    assert status[Atom("buffered")] <= MAX_SHARE
    still.thaw()

    async def there() -> bool:
        seen = await still.eval(
            "send(pid, {:seen, self()}); receive do {:seen, seen} -> seen after 2000 -> [] end", pid=frozen
        )
        return list(dict.fromkeys(seen)) == everything

    await wait_until(there, timeout_s=30)
