"""Gateways that only know the same store node learn of each other from it; nobody else is connected to."""

from __future__ import annotations

from contextlib import AsyncExitStack

from erlang_interop_tests.beam import BeamNode, Beams, unique_name, wait_until
from erlang_interop_tests.gater_process import gater_process
from erlang_interop_tests.standin import StandInCluster
from gater.cluster.introductions import Introductions
from gater.erl import make_node
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom


class Heard:
    """A connector that only remembers what it was told."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        assert (source, forever) == ("introduction", False)
        self.wanted.add(peer)
        return True


async def test_a_store_node_introduces_gateways_and_nobody_else(erl_node: BeamNode, beam: Beams) -> None:
    options = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False)
    async with AsyncExitStack() as stack:

        async def hidden(application: str) -> Node:
            node = make_node(unique_name(application), cookie=beam.cookie, options=options)
            await stack.enter_async_context(node)
            node.add_application(application, "", "1")
            await node.connect(erl_node.name)
            return node

        ours, gateway, client = await hidden("gater"), await hidden("gater"), await hidden("client")
        heard = Heard()
        introductions = Introductions(ours, lambda: [erl_node.atom], interval_s=0.05)
        await introductions.start(heard)
        try:
            await wait_until(lambda: gateway.name.name in heard.wanted, what="the other gateway being named")
            await wait_until(lambda: client.name in introductions.others, what="the client being asked")
            assert heard.wanted == {gateway.name.name}
            late = await hidden("gater")
            await wait_until(lambda: late.name.name in heard.wanted, what="a third gateway being named")
        finally:
            await introductions.stop()
        assert ours.nodes() == [erl_node.atom]


async def test_gateways_without_gossip_and_without_names_meet(beam: Beams, standin: StandInCluster) -> None:
    shared = {"cookie": beam.cookie, "epmd_port": await beam.epmd_port(), "connect": standin.names}
    async with gater_process(**shared) as first, gater_process(**shared) as second:
        caller = await beam.start("erlang", cookie=beam.cookie)
        ask = "lists:member(Other, erpc:call(Gater, erlang, nodes, [connected]))"
        for gater, other in ((first, second), (second, first)):

            async def meet(gater: Atom = gater.atom, other: Atom = other.atom) -> bool:
                return bool(await caller.eval(ask, Gater=gater, Other=other))

            await wait_until(meet, what="the gateways being connected")
