"""Gossip with BEAM nodes: they hear us, we hear them, whoever hears first connects; another secret finds nobody.

The nodes run a gossip peer of this test's own, written in Erlang after what libcluster sends; libcluster itself was run
against the gateway by hand (docs/interop.md).
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from erlang_interop_tests.beam import LOOPBACK, BeamNode, Beams, unique_name, wait_until
from gater.cluster.connector import Connector
from gater.cluster.gossip import EXESDB_ADDRESS, LIBCLUSTER_ADDRESS, Gossip, GossipOptions
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom

SECRET: Final = "dev_cluster_secret"
FOUND_WITHIN_S: Final = 15.0

# Bindings: Port, Address, Interface (`none`: broadcast), Secret (<<>>: none), Connect, IntervalMs.
PEER: Final = r"""
  Key = crypto:hash(sha256, Secret),
  Encode = fun(Message) when Secret =:= <<>> -> Message;
              (Message) ->
                Iv = crypto:strong_rand_bytes(16),
                Options = [{encrypt, true}, {padding, pkcs_padding}],
                [Iv, crypto:crypto_one_time(aes_256_cbc, Key, Iv, Message, Options)]
           end,
  Decode = fun(Packet) when Secret =:= <<>> -> Packet;
              (<<Iv:16/binary, Encrypted/binary>>) ->
                Options = [{encrypt, false}, {padding, pkcs_padding}],
                try crypto:crypto_one_time(aes_256_cbc, Key, Iv, Encrypted, Options) catch error:_ -> <<>> end;
              (_) -> <<>>
           end,
  Multicast = case Interface of
    none -> [];
    _ -> [{multicast_if, Interface}, {multicast_ttl, 1}, {multicast_loop, true}, {add_membership, {Address, Interface}}]
  end,
  Heard = fun(Name) when Name =:= node() -> false;
             (Name) when Connect -> net_kernel:connect_node(Name), true;
             (_) -> true
          end,
  Loop = fun Again(Socket, Names, Ignored) ->
    receive
      heartbeat ->
        Heartbeat = <<"heartbeat::", (term_to_binary(#{node => node()}))/binary>>,
        ok = gen_udp:send(Socket, Address, Port, Encode(Heartbeat)),
        erlang:send_after(IntervalMs, self(), heartbeat),
        Again(Socket, Names, Ignored);
      {udp, Socket, _, _, Packet} ->
        case Decode(Packet) of
          <<"heartbeat::", Term/binary>> ->
            #{node := Name} = binary_to_term(Term),
            case Heard(Name) of
              true -> Again(Socket, lists:usort([Name | Names]), Ignored);
              false -> Again(Socket, Names, Ignored)
            end;
          _ -> Again(Socket, Names, Ignored + 1)
        end;
      {heard, From} -> From ! {heard, Names, Ignored}, Again(Socket, Names, Ignored)
    end
  end,
  Starter = self(),
  spawn(fun() ->
    register(gossip_peer, self()),
    Options = [binary, {active, true}, {ip, {0, 0, 0, 0}}, {reuseaddr, true}, {broadcast, true} | Multicast],
    {ok, Socket} = gen_udp:open(Port, Options),
    Starter ! open,
    self() ! heartbeat,
    Loop(Socket, [], 0)
  end),
  receive open -> ok after 5000 -> error(no_socket) end
"""

HEARD: Final = (
    "gossip_peer ! {heard, self()}, receive {heard, Names, Ignored} -> {Names, Ignored} after 5000 -> none end"
)


def udp_port() -> int:
    chooser = random.Random()
    while True:
        port = chooser.randrange(12_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port


def multicast(secret: str | None, address: str = EXESDB_ADDRESS) -> GossipOptions:
    return GossipOptions(port=udp_port(), address=address, multicast_if=LOOPBACK, secret=secret)


def libcluster_default(secret: str | None) -> GossipOptions:
    return multicast(secret, LIBCLUSTER_ADDRESS)


def broadcast(secret: str | None) -> GossipOptions:
    return GossipOptions(port=udp_port(), address="127.255.255.255", secret=secret)


def erlang_address(address: str) -> tuple[int, ...]:
    return tuple(int(part) for part in address.split("."))


async def start_peer(node: BeamNode, options: GossipOptions, secret: str | None, *, connect: bool = False) -> None:
    await node.eval(
        PEER,
        language="erlang",
        Port=options.port,
        Address=erlang_address(options.address),
        Interface=erlang_address(LOOPBACK) if options.multicast else Atom("none"),
        Secret=(secret or "").encode(),
        Connect=connect,
        IntervalMs=50,
    )


class Eager(random.Random):
    """Heartbeats twenty times a second, so that tests need not wait."""

    def uniform(self, a: float, b: float) -> float:
        return 0.05


@contextlib.asynccontextmanager
async def gateway(
    beam: Beams, options: GossipOptions, *, connecting: bool = True
) -> AsyncIterator[tuple[Node, Gossip]]:
    """A node of ours that gossips; if not `connecting`, it only lets others connect."""
    name = unique_name("gater")
    node_options = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False)
    async with Node(name, cookie=beam.cookie, options=node_options) as node:
        connector = Connector(node, retry_interval_s=0.5)
        gossip = Gossip(name, options, random=Eager())
        if connecting:
            connector.start()
        await gossip.start(connector)
        try:
            yield node, gossip
        finally:
            await gossip.stop()
            connector.stop()


async def heard_by(peer: BeamNode) -> tuple[list[Any], int]:
    names, ignored = await peer.eval(HEARD, language="erlang")
    return names, ignored


@pytest.mark.parametrize("secret", [SECRET, None], ids=["secret", "no secret"])
@pytest.mark.parametrize("way", [multicast, libcluster_default, broadcast])
async def test_the_gateway_hears_and_connects_to_a_beam_node_and_is_heard_by_it(
    beam: Beams, erl_node: BeamNode, way: Callable[[str | None], GossipOptions], secret: str | None
) -> None:
    options = way(secret)
    await start_peer(erl_node, options, secret)
    async with gateway(beam, options) as (node, gossip):
        await wait_until(lambda: erl_node.atom in node.nodes(), FOUND_WITHIN_S, what="connected")

        async def heard() -> bool:
            return node.name in (await heard_by(erl_node))[0]

        await wait_until(heard, FOUND_WITHIN_S, what="heard by the BEAM node")
        assert (await heard_by(erl_node))[1] == 0
        await erl_node.sees_hidden(node.name)
        assert await erl_node.eval("nodes()") == [], "the gateway is hidden"
        assert gossip.status().ignored == {}


async def test_a_beam_node_that_hears_the_gateway_connects_to_it(beam: Beams, erl_node: BeamNode) -> None:
    options = multicast(SECRET)
    async with gateway(beam, options, connecting=False) as (node, _):
        await start_peer(erl_node, options, SECRET, connect=True)
        await wait_until(lambda: erl_node.atom in node.nodes(), FOUND_WITHIN_S, what="connected")


async def test_both_connecting_at_once_end_up_with_one_connection(beam: Beams, erl_node: BeamNode) -> None:
    options = multicast(SECRET)
    async with gateway(beam, options) as (node, _):
        await start_peer(erl_node, options, SECRET, connect=True)
        await wait_until(lambda: erl_node.atom in node.nodes(), FOUND_WITHIN_S, what="connected")
        await erl_node.sees_hidden(node.name)
        assert await erl_node.eval("nodes(connected)") == [node.name]


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [("cats", "dogs", "undecryptable"), ("cats", None, "unencrypted"), (None, "dogs", "encrypted")],
)
async def test_with_another_secret_nobody_connects_and_the_sender_is_named(
    beam: Beams, ours: str | None, theirs: str | None, why: Any
) -> None:
    peer = await beam.start("erlang")
    options = multicast(ours)
    with capture_logs() as lines:
        async with gateway(beam, options) as (node, gossip):
            await start_peer(peer, options, theirs, connect=True)

            async def both_ignored_some() -> bool:
                ignored = gossip.status().ignored.get(why, 0)
                return ignored >= 10 and (await heard_by(peer))[1] >= 10

            await wait_until(both_ignored_some, FOUND_WITHIN_S, what="ten packets ignored by both")
            assert node.nodes() == []
            assert (await heard_by(peer))[0] == []
    (line,) = [line for line in lines if line["event"] == "gossip_packets_ignored"]
    assert (line["why"], line["senders"]) == (why, [LOOPBACK])


async def test_a_beam_node_that_was_killed_is_found_again_when_it_is_back(beam: Beams, erl_node: BeamNode) -> None:
    options = multicast(SECRET)
    async with gateway(beam, options) as (node, _):
        for _ in range(2):
            await start_peer(erl_node, options, SECRET)
            await wait_until(lambda: erl_node.atom in node.nodes(), FOUND_WITHIN_S, what="connected")
            await erl_node.kill()
            await wait_until(lambda: not node.nodes(), FOUND_WITHIN_S, what="seen to be gone")
            await erl_node.start()


async def test_two_gateways_and_a_beam_node_find_each_other(beam: Beams) -> None:
    peer = await beam.start("elixir")
    options = broadcast(SECRET)
    await start_peer(peer, options, SECRET)
    async with gateway(beam, options) as (one, _), gateway(beam, options) as (other, _):
        everybody = {one.name, other.name, peer.atom}

        async def all_connected() -> bool:
            theirs = await peer.eval("nodes(connected)", language="erlang")
            seen = [{one.name, *one.nodes()}, {other.name, *other.nodes()}, {peer.atom, *theirs}]
            return all(each == everybody for each in seen)

        await wait_until(all_connected, FOUND_WITHIN_S, what="all connected")
