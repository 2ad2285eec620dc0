"""Swarm with BEAM members: the stand-in's tracker speaks `sync`, `sync_recv`, `sync_ack` and events as the original's.

The original itself was tried by hand: docs/interop.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from erlang_interop_tests.beam import BeamNode, Beams, unique_name, wait_until
from erlang_interop_tests.gater_process import GaterProcess, gater_process
from erlang_interop_tests.standin import DEFAULT_STORE, StandInCluster
from gater.erl import NodeOptions, make_node
from gater.erl.gen_server import Caller, GenServer, start_server
from gater.erl.terms import Atom, Term
from gater.swarm.swarm import Swarm
from gater.swarm.tracker import TrackerOptions

SEEN_S = 15.0
"""Seconds for what takes a second; the rest is for machines where many tests run at once."""


class Echo(GenServer):
    """Answers `{python, Request}`."""

    def __init__(self) -> None:
        self.infos: list[Term] = []

    def handle_call(self, request: Term, caller: Caller) -> Term:
        return (Atom("python"), request)

    def handle_info(self, message: Term) -> None:
        self.infos.append(message)


@asynccontextmanager
async def python_member(beam: Beams, *connect: str | None) -> AsyncIterator[Swarm]:
    """A Python node with Swarm, connected with these nodes and in step with them."""
    options = NodeOptions(epmd_port=await beam.epmd_port())
    node = make_node(unique_name("python"), cookie=beam.cookie, options=options)
    swarm = Swarm(node, TrackerOptions(sync_nodes_timeout_s=0.1))
    async with node:
        await swarm.start()
        for peer in connect:
            await node.connect(str(peer))
        await wait_until(
            lambda: swarm.joined and all(swarm.is_synced(Atom(str(peer))) for peer in connect),
            SEEN_S,
            what="the registries to be in step",
        )
        yield swarm


async def whereis(node: BeamNode, name: Term) -> Term:
    """The process of a name in the node's registry, None if there is none."""
    found = await node.eval("Swarm.whereis_name(name)", name=name)
    return None if found is Atom("undefined") else found


async def seen(node: BeamNode, name: Term, pid: Term) -> None:
    async def same() -> bool:
        return bool(await whereis(node, name) == pid)

    await wait_until(same, SEEN_S, what=f"{name!r} on {node.name}")


async def register(node: BeamNode, name: Term) -> Term:
    """Start a process on the node and register it; its pid."""
    return await node.eval(
        "{:ok, pid} = Agent.start(fn -> 1 end); :yes = Swarm.register_name(name, pid); pid", name=name
    )


async def workers_of(gater: GaterProcess, node: BeamNode) -> list[Term]:
    """The gateway's workers for the cluster's store in the node's registry."""
    found: list[Term] = await node.eval(
        "for {{:gateway_worker, ^store, ^gater, _}, pid} <- Swarm.registered(), do: pid",
        store=Atom(DEFAULT_STORE),
        gater=gater.atom,
    )
    return found


@asynccontextmanager
async def gateway_of(standin: StandInCluster, beam: Beams, **options: object) -> AsyncIterator[GaterProcess]:
    """A gateway connected with all members, whose two workers every one of them knows."""
    async with gater_process(
        cookie=beam.cookie,
        epmd_port=await beam.epmd_port(),
        connect=standin.names,
        env={"EXESDB_GATER_POOL_SIZE": "2"},
        **options,
    ) as gater:
        for member in standin.members:
            await wait_until(lambda member=member: _two(gater, member), SEEN_S, what=f"workers on {member.name}")
        yield gater


async def _two(gater: GaterProcess, member: BeamNode) -> bool:
    return len(await workers_of(gater, member)) == 2


async def test_names_of_either_side_are_seen_on_the_other(standin_of_three: StandInCluster, beam: Beams) -> None:
    first, second, third = standin_of_three.members
    async with python_member(beam, *standin_of_three.names) as swarm:
        echo = await start_server(swarm.node, Echo())
        await swarm.register((Atom("echo"), 1), echo)
        for member in standin_of_three.members:
            await seen(member, (Atom("echo"), 1), echo.pid)
        pid = await register(second, b"theirs")
        await wait_until(lambda: swarm.whereis(b"theirs") == pid, SEEN_S)
        await second.eval("Process.exit(pid, :kill)", pid=pid)
        await wait_until(lambda: swarm.whereis(b"theirs") is None, SEEN_S)
        await swarm.unregister((Atom("echo"), 1))
        for member in (first, third):
            await seen(member, (Atom("echo"), 1), None)


async def test_elixir_calls_a_python_server_by_its_name(standin: StandInCluster, beam: Beams) -> None:
    (member,) = standin.members
    async with python_member(beam, member.name) as swarm:
        echo = await start_server(swarm.node, Echo())
        await swarm.register(b"echo", echo)
        await seen(member, b"echo", echo.pid)
        # `{:via, :swarm, name}` asks a module `swarm`, which the stand-in has under its Elixir name.
        assert await member.eval('GenServer.call({:via, Swarm, "echo"}, :hello)') == (Atom("python"), Atom("hello"))


async def test_groups_hold_processes_of_both_sides(standin: StandInCluster, beam: Beams) -> None:
    (member,) = standin.members
    async with python_member(beam, member.name) as swarm:
        echo = await start_server(swarm.node, Echo())
        await swarm.register(b"ours", echo)
        theirs = await register(member, b"theirs")
        await wait_until(lambda: swarm.whereis(b"theirs"), SEEN_S)
        await swarm.join(Atom("group"), echo)
        await member.eval("Swarm.join(:group, pid)", pid=theirs)
        both = {echo.pid, theirs}

        async def known() -> bool:
            return set(await member.eval("Swarm.members(:group)")) == both == set(swarm.members(Atom("group")))

        await wait_until(known, SEEN_S, what="the group on both sides")


async def test_a_member_that_is_killed_takes_its_names_and_brings_new_ones(
    standin_of_three: StandInCluster, beam: Beams
) -> None:
    third = standin_of_three.members[2]
    async with python_member(beam, *standin_of_three.names) as swarm:
        await register(third, b"there")
        await wait_until(lambda: swarm.whereis(b"there"), SEEN_S)
        await standin_of_three.kill(2)
        await wait_until(lambda: swarm.whereis(b"there") is None, SEEN_S)
        await standin_of_three.restart(2)
        await swarm.node.connect(str(third.name))
        pid = await register(third, b"there")
        await wait_until(lambda: swarm.whereis(b"there") == pid, SEEN_S)


async def test_a_gateways_workers_are_in_the_registry_and_answer(standin_of_three: StandInCluster, beam: Beams) -> None:
    async with gateway_of(standin_of_three, beam) as gater:
        member = standin_of_three.members[1]
        for pid in await workers_of(gater, member):
            reply = await member.eval("GenServer.call(pid, {:get_streams, store})", pid=pid, store=Atom(DEFAULT_STORE))
            assert reply[0] is Atom("ok")
        names = await member.eval("for {{:gater_api, _}, pid} <- Swarm.registered(), do: node(pid)")
        assert gater.atom in names
        assert await gater.stop() == 0
        assert await workers_of(gater, member) == []


async def test_a_frozen_gateway_comes_back_into_the_registry_by_itself(standin: StandInCluster, beam: Beams) -> None:
    (member,) = standin.members
    async with gateway_of(standin, beam) as gater:
        os.kill(gater.process.pid, signal.SIGSTOP)
        try:
            # As a BEAM does when the tick time is over.
            await member.eval("Node.disconnect(gater)", gater=gater.atom)
            await wait_until(lambda: _none(gater, member), SEEN_S, what="the workers to be gone")
        finally:
            os.kill(gater.process.pid, signal.SIGCONT)
        await wait_until(lambda: _two(gater, member), SEEN_S, what="the workers to be back")


async def _none(gater: GaterProcess, member: BeamNode) -> bool:
    return not await workers_of(gater, member)


async def test_a_registry_of_many_names_is_taken_over(standin: StandInCluster, beam: Beams) -> None:
    (member,) = standin.members
    await standin.add_junk_names(20_000)
    async with python_member(beam, member.name) as swarm:
        await wait_until(lambda: len(swarm.registry) >= 20_000, SEEN_S, what="the names")
        assert len(swarm.registry) == await member.eval("length(Swarm.registered())")
