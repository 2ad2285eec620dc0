"""EPMD with the real ones: our client against `epmd`, and `epmd`'s client and Erlang nodes against our server."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator

import pytest

from erlang_interop_tests.beam import LOOPBACK, BeamNode, Beams, Epmd, free_port, unique_name, wait_until
from gater.erl import Node, NodeOptions, make_node
from gater.erl.epmd import BuiltinEpmd, EpmdUnavailable, NameTaken, lookup, names, register
from gater.erl.epmd_protocol import NODE_HIDDEN, NODE_NORMAL, NodeEntry
from gater.erl.terms import Atom

PROGRAM_TIMEOUT_S = 10.0


@pytest.fixture
async def builtin() -> AsyncIterator[BuiltinEpmd]:
    started = BuiltinEpmd()
    await started.start([LOOPBACK], 0)
    yield started
    await started.close()


async def run_epmd(port: int, *arguments: str) -> tuple[int, str]:
    """The exit code and output of the program `epmd` used as a client."""
    program = shutil.which("epmd")
    assert program is not None, "epmd is not installed (Debian package: erlang-base)"
    process = await asyncio.create_subprocess_exec(
        program,
        *("-port", str(port), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PROGRAM_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_our_client_registers_at_a_real_epmd(epmd: Epmd) -> None:
    registration = await register("gater", 5000, epmd_port=epmd.port)
    assert registration.creation >= 4
    found = await lookup("gater", LOOPBACK, epmd_port=epmd.port)
    assert found == NodeEntry("gater", 5000, NODE_HIDDEN)
    assert await names(LOOPBACK, epmd_port=epmd.port) == {"gater": 5000}
    assert await lookup("nobody", LOOPBACK, epmd_port=epmd.port) is None
    with pytest.raises(NameTaken):
        await register("gater", 5001, epmd_port=epmd.port)
    registration.close()

    async def gone() -> bool:
        return not await names(LOOPBACK, epmd_port=epmd.port)

    await wait_until(gone, what="the name given up")


async def test_the_restart_of_a_real_epmd_is_noticed(epmd: Epmd) -> None:
    lost = asyncio.Event()
    registration = await register("gater", 5000, epmd_port=epmd.port, on_lost=lost.set)
    await epmd.stop()
    await asyncio.wait_for(lost.wait(), PROGRAM_TIMEOUT_S)
    assert not registration.is_held
    await epmd.start()
    again = await register("gater", 5000, epmd_port=epmd.port)
    assert await epmd.names() == {"gater": 5000}
    again.close()


async def test_the_epmd_program_lists_the_names_of_our_server(builtin: BuiltinEpmd) -> None:
    first = await register("gater", 5000, epmd_port=builtin.port)
    second = await register("zoë", 5001, epmd_port=builtin.port)
    code, output = await run_epmd(builtin.port, "-names")
    assert code == 0
    assert f"up and running on port {builtin.port} with data:" in output
    assert "name gater at port 5000\n" in output
    assert "name zoë at port 5001\n" in output
    _, dump = await run_epmd(builtin.port, "-dump")
    assert "active name     <gater> at port 5000" in dump
    first.close()
    second.close()


async def test_the_epmd_program_cannot_end_our_server(builtin: BuiltinEpmd) -> None:
    registration = await register("gater", 5000, epmd_port=builtin.port)
    _, output = await run_epmd(builtin.port, "-kill")
    assert "Killing not allowed" in output
    await run_epmd(builtin.port, "-stop", "gater")
    assert await names(LOOPBACK, epmd_port=builtin.port) == {"gater": 5000}
    registration.close()


async def test_a_second_real_epmd_leaves_our_server_alone(builtin: BuiltinEpmd) -> None:
    await run_epmd(builtin.port, "-address", LOOPBACK)
    assert await names(LOOPBACK, epmd_port=builtin.port) == {}


async def test_erlang_nodes_find_each_other_through_our_server(builtin: BuiltinEpmd, beam: Beams, otp: int) -> None:
    await beam.use_epmd_port(builtin.port)
    one = await beam.start("erlang", otp=otp)
    two = await beam.start("erlang", otp=otp, hidden=True)
    assert one.name is not None
    assert two.name is not None
    assert await one.eval("net_adm:ping(Node)", Node=two.atom) is Atom("pong")
    alive, _, host = one.name.partition("@")
    assert builtin.nodes[alive].node_type == NODE_NORMAL
    ok, listed = await two.eval("erl_epmd:names(Host)", Host=[ord(character) for character in host])
    assert ok is Atom("ok")
    assert {"".join(map(chr, name)) for name, _ in listed} == set(builtin.nodes)
    creation = await one.eval("erts_internal:get_creation()")
    assert creation > 3
    await one.kill()
    await wait_until(lambda: alive not in builtin.nodes, what="the name of a dead node free again")


async def test_an_erlang_node_registers_again_when_our_server_is_back(beam: Beams, builtin: BuiltinEpmd) -> None:
    await beam.use_epmd_port(builtin.port)
    node = await beam.start("erlang")
    assert node.name is not None
    await builtin.close()
    second = BuiltinEpmd()
    await second.start([LOOPBACK], builtin.port)
    try:
        await wait_until(lambda: node.name.partition("@")[0] in second.nodes, 15.0, what="the node registered again")
    finally:
        await second.close()


async def test_a_taken_name_stops_an_erlang_node(builtin: BuiltinEpmd, beam: Beams) -> None:
    registration = await register("taken", 5000, epmd_port=builtin.port)
    await beam.use_epmd_port(builtin.port)
    with pytest.raises(AssertionError, match=r"duplicate_name|seems to be in use"):
        await beam.start("erlang", name=f"taken@{LOOPBACK}")
    registration.close()


async def printed(program: str, port: int, *arguments: str) -> str:
    """What `erl` or `elixir`, started as people start it, has printed when it ends."""
    process = await asyncio.create_subprocess_exec(
        *(program, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
        },
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 3 * PROGRAM_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode()


async def test_erl_and_elixir_as_people_start_them_are_content_with_our_server() -> None:
    options = NodeOptions(epmd_port=free_port())
    async with make_node(unique_name("py"), cookie="secret", options=options) as node:
        evaluated = f"io:format(\"~p~n\", [net_adm:ping('{node.name}')]), halt()."
        erl = ["-noshell", "-name", unique_name("erl"), "-setcookie", "secret", "-eval", evaluated]
        assert await printed("erl", options.epmd_port, *erl) == "pong\n"
        elixir = ["--name", unique_name("ex"), "--cookie", "secret", "-e", f'IO.inspect Node.ping(:"{node.name}")']
        assert await printed("elixir", options.epmd_port, *elixir) == ":pong\n"
        await wait_until(lambda: _only(node, options.epmd_port))


async def _only(node: Node, port: int) -> bool:
    return set(await names(LOOPBACK, epmd_port=port)) == {str(node.name).partition("@")[0]}


async def test_the_next_node_serves_when_the_one_with_the_epmd_ends(beam: Beams) -> None:
    options = NodeOptions(epmd_port=free_port(), epmd_grace_s=0.1)
    await beam.use_epmd_port(options.epmd_port)
    first = make_node(unique_name("first"), cookie=beam.cookie, options=options)
    await first.start()
    async with make_node(unique_name("second"), cookie=beam.cookie, options=options) as second:
        creation = second.creation
        peer = await beam.start("erlang")
        assert await peer.eval("net_adm:ping(N)", N=second.name) is Atom("pong")
        await first.stop()
        expected = {str(name).partition("@")[0] for name in (second.name, peer.name)}
        await wait_until(lambda: _registered(options.epmd_port, expected), 20.0, what=f"{expected} registered again")
        assert second.creation == creation
        second.disconnect(peer.atom)
        assert await wait_until(lambda: _pings(peer, second)) is True


async def _registered(port: int, expected: set[str]) -> bool:
    try:
        return set(await names(LOOPBACK, epmd_port=port)) == expected
    except EpmdUnavailable:
        return False


async def _pings(peer: BeamNode, node: Node) -> bool:
    return await peer.eval("net_adm:ping(N)", N=node.name) is Atom("pong")


async def test_a_node_uses_the_real_epmd_while_there_is_one(epmd: Epmd) -> None:
    options = NodeOptions(epmd_port=epmd.port, epmd_grace_s=0.1)
    async with make_node(unique_name("py"), cookie="secret", options=options) as node:
        short = str(node.name).partition("@")[0]
        assert set(await epmd.names()) == {short}
        _, listed = await run_epmd(epmd.port, "-names")
        assert f"name {short} at port {node.listen_port}" in listed
        # It ends: the node has to serve for itself.
        await epmd.stop()
        await wait_until(lambda: _registered(epmd.port, {short}), 10.0, what="the node registered at its own EPMD")
        _, refused = await run_epmd(epmd.port, "-kill")
        assert "Killing not allowed" in refused


async def test_a_real_epmd_that_is_restarted_gets_its_port_and_all_nodes_back(
    epmd: Epmd, beam: Beams, otp: int
) -> None:
    await beam.use_epmd_port(epmd.port)
    peer = await beam.start("erlang", otp=otp)
    async with make_node(unique_name("py"), cookie=beam.cookie, options=NodeOptions(epmd_port=epmd.port)) as node:
        creation = node.creation
        expected = {str(name).partition("@")[0] for name in (node.name, peer.name)}
        assert set(await epmd.names()) == expected
        await epmd.stop()
        await epmd.start()
        await wait_until(lambda: _registered(epmd.port, expected), 20.0, what=f"{expected} registered again")
        assert node.creation == creation
        assert node._epmd is None
        assert await peer.eval("net_adm:ping(N)", N=node.name) is Atom("pong")


async def test_a_real_epmd_takes_the_place_of_a_built_in_that_ends(beam: Beams, otp: int) -> None:
    options = NodeOptions(epmd_port=free_port())
    await beam.use_epmd_port(options.epmd_port)
    first = make_node(unique_name("first"), cookie=beam.cookie, options=options)
    await first.start()
    peer = await beam.start("erlang", otp=otp)
    alive = str(peer.name).partition("@")[0]
    # While the built-in one is there, a real one that is started ends at once.
    await run_epmd(options.epmd_port, "-address", LOOPBACK)
    assert await _registered(options.epmd_port, {str(first.name).partition("@")[0], alive})
    await first.stop()
    async with Epmd(options.epmd_port) as real:
        await wait_until(lambda: _registered(real.port, {alive}), 20.0, what=f"{alive} registered at the real one")
        async with make_node(str(first.name), cookie=beam.cookie, options=options) as again:
            assert set(await real.names()) == {alive, str(again.name).partition("@")[0]}
            assert await peer.eval("net_adm:ping(N)", N=again.name) is Atom("pong")
            again.disconnect(peer.atom)
            await again.connect(peer.atom)


async def test_nodes_register_again_when_the_node_with_the_built_in_is_restarted(beam: Beams, otp: int) -> None:
    options = NodeOptions(epmd_port=free_port())
    await beam.use_epmd_port(options.epmd_port)
    name = unique_name("py")
    async with make_node(name, cookie=beam.cookie, options=options):
        peer = await beam.start("erlang", otp=otp)
    async with make_node(name, cookie=beam.cookie, options=options) as again:
        expected = {str(each).partition("@")[0] for each in (name, peer.name)}
        await wait_until(lambda: _registered(options.epmd_port, expected), 20.0, what=f"{expected} registered again")
        assert await peer.eval("net_adm:ping(N)", N=again.name) is Atom("pong")
        again.disconnect(peer.atom)
        await again.connect(peer.atom)
