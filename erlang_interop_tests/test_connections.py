"""Connections with real nodes: who wins, who is let in, what is noticed when one end is frozen, gone or new."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from erlang_interop_tests.beam import LOOPBACK, BeamNode, Beams, free_port, unique_name, wait_until
from erlang_interop_tests.python_node import Collector, Server, python_node
from gater.erl import Node, NodeOptions, make_node
from gater.erl.errors import ErlError, HandshakeError, NoProcess, NotConnected
from gater.erl.gen_server import call, start_server
from gater.erl.process import DOWN, NOCONNECTION, NOPROC, PROCESS
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom

PONG, PANG = Atom("pong"), Atom("pang")


@contextlib.asynccontextmanager
async def named(name: str, beam: Beams, **options: object) -> AsyncIterator[Node]:
    """A Python node of this name that shares cookie and EPMD with `beam`."""
    chosen = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False, **options)  # type: ignore[arg-type]
    async with make_node(name, cookie=beam.cookie, options=chosen) as node:
        yield node


@pytest.mark.parametrize("greater", [True, False], ids=["our name is greater", "our name is smaller"])
async def test_both_connecting_at_once_keep_one_connection(erl_node: BeamNode, beam: Beams, greater: bool) -> None:
    async with named(unique_name("zz" if greater else "aa"), beam) as node:
        await start_server(node, Server(), name="counter")
        for _ in range(10):
            pings = erl_node.eval("net_adm:ping(N)", N=node.name)
            answers = await asyncio.gather(pings, erpc_call(node, erl_node.atom, "erlang", "node"))
            assert answers == [PONG, erl_node.atom]
            assert node.nodes() == [erl_node.atom]
            assert await erl_node.eval("nodes(hidden)") == [node.name]
            assert await erl_node.eval("gen_server:call({counter, N}, {echo, 1})", N=node.name) == 1
            node.disconnect(erl_node.atom)
            await wait_until(lambda: _alone(erl_node))


async def _alone(peer: BeamNode) -> bool:
    return await peer.eval("nodes(connected)") == []


async def test_a_beam_notices_that_it_was_frozen_out_and_comes_back(beam: Beams, otp: int) -> None:
    peer = await beam.start("erlang", otp=otp)
    async with python_node(beam, ticktime_s=0.4) as node:
        me = Collector(node)
        await start_server(node, Server(), name="counter")
        victim = await peer.eval("V = spawn(fun() -> receive stop -> ok end end), net_kernel:monitor_nodes(true), V")
        reference = me.process.monitor(victim)
        peer.freeze()
        assert await me.next() == (DOWN, reference, PROCESS, victim, NOCONNECTION)
        with pytest.raises(ErlError):
            await call(node, victim, Atom("x"), timeout_s=0.3)
        peer.thaw()
        again = "gen_server:call({counter, N}, {echo, back})"
        assert await wait_until(lambda: _evaluated(peer, again, node), 20) is Atom("back")


async def _evaluated(peer: BeamNode, source: str, node: Node) -> object:
    try:
        return await peer.eval(source, N=node.name)
    except AssertionError:
        return None


async def test_a_silent_python_node_is_found_by_the_ticks_of_a_beam(beam: Beams, otp: int) -> None:
    peer = await beam.start("erlang", otp=otp, arguments=["-kernel", "net_ticktime", "1"])
    # A tick time of its own that is so long that it never ticks by itself, and a stream that takes nothing.
    async with python_node(beam, ticktime_s=3600) as node:
        # It never ticks in this time.
        watching = """
          net_kernel:monitor_nodes(true, [{node_type, all}, nodedown_reason]), pong = net_adm:ping(N),
          receive {nodedown, N, Info} -> proplists:get_value(nodedown_reason, Info) after 10000 -> timeout end
        """
        reason = await peer.eval(watching, N=node.name)
        assert reason is Atom("net_tick_timeout")


async def test_a_pid_of_a_restarted_python_node_is_noproc(erl_node: BeamNode, beam: Beams) -> None:
    name = unique_name("again")
    async with named(name, beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        old, creation = server.pid, node.creation
        assert await erl_node.eval("gen_server:call(P, count)", P=old) == 0
    await wait_until(lambda: _alone(erl_node))
    async with named(name, beam) as node:
        server = Server()
        await start_server(node, server, name="counter")
        assert node.creation != creation
        assert server.pid.id == old.id
        caught = "try gen_server:call(P, count) catch exit:{Why, _} -> Why end"
        assert await erl_node.eval(caught, P=old) is NOPROC
        down = "R = monitor(process, P), receive {'DOWN', R, _, _, Why} -> Why end"
        assert await erl_node.eval(down, P=old) is NOPROC
        linked = "process_flag(trap_exit, true), link(P), receive {'EXIT', P, Why} -> Why end"
        assert await erl_node.eval(linked, P=old) is NOPROC
        await erl_node.eval("P ! lost, exit(P, kill), ok", P=old)
        assert await erl_node.eval("gen_server:call({counter, N}, count)", N=node.name) == 0
        assert server.infos == []


async def test_a_call_to_a_pid_of_a_restarted_beam_is_noproc(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        old = await erl_node.eval("spawn(fun() -> receive stop -> ok end end)")
        await node.connect(erl_node.atom)
        await erl_node.kill()
        await wait_until(lambda: not node.nodes())
        await erl_node.start()
        with pytest.raises(NoProcess):
            await call(node, old, Atom("x"))


async def test_peers_have_cookies_of_their_own(beam: Beams, otp: int) -> None:
    usual = await beam.start("erlang", otp=otp)
    special = await beam.start("erlang", otp=otp, cookie="special")
    async with named(unique_name("py"), beam, cookies={str(special.name): "special"}) as node:
        for peer in (usual, special):
            assert await erpc_call(node, peer.atom, "erlang", "node") is peer.atom
            node.disconnect(peer.atom)
            await wait_until(lambda: _alone(peer))  # noqa: B023
            assert await peer.eval("net_adm:ping(N)", N=node.name) is PONG
    # A BEAM that has another cookie for us than its own.
    async with named(unique_name("py"), beam) as node:
        with pytest.raises(HandshakeError):
            await node.connect(special.atom)
        assert await special.eval("net_adm:ping(N)", N=node.name) is PANG
        told = "erlang:set_cookie(N, list_to_atom(C)), net_adm:ping(N)"
        assert await special.eval(told, N=node.name, C=[ord(each) for each in beam.cookie]) is PONG


async def test_short_names_and_long_names_do_not_mix(beam: Beams, otp: int) -> None:
    short = f"short_{unique_name().partition('@')[0]}@localhost"
    arguments = ["-sname", short, "-setcookie", beam.cookie, "-start_epmd", "false"]
    arguments += ["-kernel", "inet_dist_use_interface", "{127,0,0,1}"]
    peer = await beam.start("erlang", otp=otp, name=None, arguments=arguments)
    async with python_node(beam) as node:
        assert await peer.eval("net_adm:ping(N)", N=node.name) is PANG
        with pytest.raises(NotConnected, match="is a long name and nobody@localhost a short one"):
            await node.connect("nobody@localhost")
    options = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False, listen_hosts=(LOOPBACK,))
    async with make_node(f"py_{short}", cookie=beam.cookie, options=options) as node:
        assert await peer.eval("net_adm:ping(N)", N=node.name) is PONG
        assert await erpc_call(node, short, "net_kernel", "longnames") is False
        with pytest.raises(NotConnected, match=r"is a short name and nobody@127\.0\.0\.1 a long one"):
            await node.connect("nobody@127.0.0.1")


async def test_two_nodes_in_one_process_talk_to_each_other_and_to_a_beam(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as one, python_node(beam) as two:
        for node in (one, two):
            await start_server(node, Server(), name="counter")
        here, there = (Atom("counter"), one.name), (Atom("counter"), two.name)
        assert await call(one, there, (Atom("echo"), 1)) == 1
        assert await call(two, here, (Atom("echo"), 2)) == 2
        for node in (one, two):
            assert await erl_node.eval("gen_server:call({counter, N}, {echo, 3})", N=node.name) == 3
            assert await erpc_call(node, erl_node.atom, "erlang", "node") is erl_node.atom
        # From one by way of the BEAM to the other, and a pid that is known to all three.
        assert (
            await erpc_call(one, erl_node.atom, "erpc", "call", [two.name, Atom("erlang"), Atom("node"), []])
            is two.name
        )
        watcher, watched = Collector(one), Collector(two)
        reference = watcher.process.monitor(watched.process.pid)
        await wait_until(lambda: watched.process.monitored_by)
        await erl_node.eval("exit(P, oops)", P=watched.process.pid)
        assert await watcher.next() == (DOWN, reference, PROCESS, watched.process.pid, Atom("oops"))
        assert set(one.nodes()) == {two.name, erl_node.atom}
        assert set(await erl_node.eval("nodes(hidden)")) == {one.name, two.name}


async def test_two_nodes_of_one_process_share_a_built_in_epmd_with_a_beam(beam: Beams, otp: int) -> None:
    port = free_port()
    await beam.use_epmd_port(port)
    options = NodeOptions(epmd_port=port)
    async with (
        make_node(unique_name("first"), cookie=beam.cookie, options=options) as first,
        make_node(unique_name("second"), cookie=beam.cookie, options=options) as second,
    ):
        peer = await beam.start("erlang", otp=otp)
        for node in (first, second):
            assert await peer.eval("net_adm:ping(N)", N=node.name) is PONG
        ok, listed = await peer.eval('erl_epmd:names("127.0.0.1")')
        assert ok is Atom("ok")
        names = {"".join(map(chr, name)) for name, _ in listed}
        assert names == {str(each).partition("@")[0] for each in (first.name, second.name, peer.name)}
