"""Large messages and slow peers: small messages pass, senders wait, nothing is lost or reordered."""

from __future__ import annotations

import asyncio

import pytest
from node_kit import COOKIE, Collector, Counter, running, two_nodes, unique_name, wait_until
from test_node import RawPeer

from gater.erl import Node, NodeOptions
from gater.erl.connection import BUSY_BYTES, MAX_QUEUED_BYTES, MAX_READY_BYTES, READ_AT_ONCE_BYTES
from gater.erl.dist_header import FRAGMENT_BYTES
from gater.erl.errors import CallTimeout, ErlangError
from gater.erl.etf import encode_term
from gater.erl.gen_server import call, start_server
from gater.erl.handshake import OUR_FLAGS, Completed, Handshake, LocalIdentity, Send
from gater.erl.process import DOWN, PROCESS
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, EncodedTerm, Pid

LARGE = bytes(8 * 1024 * 1024)
SMALL = Atom("small")
TICK = bytes(4)


async def connected(one: Node, two: Node) -> None:
    await one.connect(two.name)
    await wait_until(lambda: two.nodes() == [one.name])


async def unread_peer(node: Node, *, flags: int = OUR_FLAGS) -> RawPeer:
    """A peer that has shaken hands and reads nothing until told to."""
    name = unique_name("unread")
    machine = Handshake(
        "initiator", LocalIdentity(name, flags, 7), challenge=1, cookie=COOKIE, peer_name=str(node.name)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", node.listen_port, limit=65536)
    effects = machine.start()
    while not any(isinstance(effect, Completed) for effect in effects):
        for effect in effects:
            if isinstance(effect, Send):
                writer.write(effect.data)
        effects = machine.receive(await asyncio.wait_for(reader.read(4096), 5))
    await wait_until(lambda: Atom(name) in node.nodes())
    return RawPeer(reader, writer, name)


async def test_a_message_in_fragments_arrives_whole() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        target = Collector(two)
        for size in (FRAGMENT_BYTES - 100, FRAGMENT_BYTES, FRAGMENT_BYTES + 1, 5 * FRAGMENT_BYTES + 7):
            body = bytes(range(256)) * (size // 256 + 1)
            one.send(target.process.pid, (Atom("body"), body[:size], {Atom("key"): size}))
            assert await target.next() == (Atom("body"), body[:size], {Atom("key"): size})


@pytest.mark.parametrize("headers", [True, False])
async def test_a_message_that_is_encoded_already_goes_to_many_as_it_is(headers: bool) -> None:
    async with two_nodes(NodeOptions(headers=headers)) as (one, two):
        await connected(one, two)
        targets = [Collector(two) for _ in range(3)]
        for size in (0, 1, MAX_READY_BYTES - 100, MAX_READY_BYTES + 1, FRAGMENT_BYTES, 3 * FRAGMENT_BYTES):
            body = (Atom("events"), [{Atom("key"): bytes(size)}])
            ready = EncodedTerm(encode_term(body))
            for target in targets:
                one.send(target.process.pid, ready)
                one.send(target.process.pid, SMALL)
            for target in targets:
                # In the order in which they were sent, whatever way they went.
                assert [await target.next(), await target.next()] == [body, SMALL]


async def test_small_messages_of_others_pass_a_large_one() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        sender, other = Collector(one), Collector(one)
        target = Collector(two)
        sender.process.send(target.process.pid, LARGE)
        other.process.send(target.process.pid, SMALL)
        assert await target.next() is SMALL
        assert await target.next() == LARGE


async def test_the_signals_of_one_process_keep_their_order() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        sender, target = Collector(one), Collector(two)
        reference = target.process.monitor(sender.process.pid)
        await wait_until(lambda: sender.process.monitored_by)
        for message in (1, LARGE, 2, LARGE, 3):
            sender.process.send(target.process.pid, message)
        sender.process.exit(SMALL)
        received = [await target.next() for _ in range(6)]
        assert received == [1, LARGE, 2, LARGE, 3, (DOWN, reference, PROCESS, sender.process.pid, SMALL)]


async def test_calls_pass_a_large_call_of_the_same_node() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        first, second = Counter(), Counter()
        for server in (first, second):
            await start_server(two, server)
        large = asyncio.create_task(call(one, first.pid, (Atom("echo"), LARGE)))
        await asyncio.sleep(0)
        assert await call(one, second.pid, Atom("get")) == 0
        assert not large.done()
        assert await large == LARGE


async def test_many_large_messages_at_once_all_arrive() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        server = Counter()
        await start_server(two, server)
        bodies = [bytes([number]) * (200_000 + number) for number in range(40)]
        answers = await asyncio.gather(*(call(one, server.pid, (Atom("echo"), body)) for body in bodies))
        assert answers == bodies


async def test_an_answer_left_encoded_can_be_sent_on_whatever_the_atom_cache_said() -> None:
    async with running(*(unique_name() for _ in range(3))) as (one, two, three):
        await connected(one, two)
        await connected(two, three)
        server, target = Counter(), Collector(three)
        await start_server(one, server)
        event = [{Atom("event"): Atom("name"), Atom("number"): number} for number in range(3)]
        for _ in range(2):
            answer = await call(two, server.pid, (Atom("echo"), (Atom("ok"), event)), spine_levels=1)
            assert isinstance(answer[1], EncodedTerm)
            two.send(target.process.pid, answer)
            assert await target.next() == (Atom("ok"), event)


@pytest.mark.parametrize("headers", [True, False])
async def test_a_process_that_sends_to_a_peer_that_does_not_read_has_to_wait(headers: bool) -> None:
    async with two_nodes(NodeOptions(headers=headers)) as (one, _):
        peer = await unread_peer(one, flags=one.flags)
        sent: list[int] = []

        class Sender(Collector):
            def receive(self, message: object) -> None:
                self.process.send(peer.pid, bytes(1_000_000))
                sent.append(1)

        sender = Sender(one)
        for number in range(200):
            one.send(sender.process.pid, number)
        connection = one.peers.table[peer.name]
        await wait_until(lambda: connection.busy and not one._ready)
        held = len(sent)
        assert held < 200
        assert sender.process.queue_length() == 200 - held
        other = Collector(one)
        one.send(other.process.pid, SMALL)
        assert await other.next() is SMALL

        async def read_everything() -> None:
            while await peer.reader.read(1 << 20):
                pass

        reading = asyncio.create_task(read_everything())
        await wait_until(lambda: len(sent) == 200)
        async with asyncio.timeout(5):
            await one.drain(peer.name)
        peer.writer.close()
        await reading


async def test_the_rest_of_a_large_message_holds_only_the_process_that_has_sent_it() -> None:
    async with running(unique_name()) as (node,):
        peer = await unread_peer(node, flags=node.flags)

        class Forwarder(Collector):
            def receive(self, message: object) -> None:
                super().receive(message)
                self.process.send(peer.pid, message)

        large, small = Forwarder(node), Forwarder(node)
        node.send(large.process.pid, LARGE)
        assert await large.next() is LARGE
        node.send(large.process.pid, SMALL)
        for number in range(20):
            node.send(small.process.pid, number)
        assert [await small.next() for _ in range(20)] == list(range(20))
        # More small messages than may wait for a peer hold their sender too.
        for _ in range(3 * BUSY_BYTES // 50_000):
            node.send(small.process.pid, bytes(50_000))
        await wait_until(lambda: not node._ready)
        assert small.process.queue_length() > BUSY_BYTES // 50_000
        assert large.process.queue_length() == 1

        async def read_everything() -> None:
            while await peer.reader.read(1 << 20):
                pass

        reading = asyncio.create_task(read_everything())
        assert await large.next() is SMALL
        await wait_until(lambda: not small.process.queue_length())
        peer.writer.close()
        await reading


async def test_a_call_to_a_peer_that_does_not_read_sends_nothing_and_times_out() -> None:
    async with running(unique_name()) as (node,):
        peer = await unread_peer(node)
        while not node.peers.table[peer.name].busy:
            node.send(peer.pid, bytes(BUSY_BYTES))
            await asyncio.sleep(0)
        with pytest.raises(CallTimeout, match="nothing was sent"):
            await call(node, peer.pid, SMALL, timeout_s=0.01)
        assert not node._aliases
        with pytest.raises(ErlangError) as timed_out:
            await erpc_call(node, peer.name, "erlang", "node", timeout_s=0.01)
        assert timed_out.value.reason == (Atom("erpc"), Atom("timeout"))
        connection = node.peers.table[peer.name]
        assert not connection.spawns
        assert not connection.monitors
        peer.writer.close()


async def test_drain_returns_when_the_peer_is_gone() -> None:
    async with running(unique_name()) as (node,):
        peer = await unread_peer(node)
        await node.drain(peer.name)
        await node.drain("nobody@127.0.0.1")
        while not node.peers.table[peer.name].busy:
            node.send(peer.pid, bytes(BUSY_BYTES))
            await asyncio.sleep(0)
        waiting = asyncio.create_task(node.drain(peer.name))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        node.disconnect(peer.name)
        async with asyncio.timeout(5):
            await waiting
        peer.writer.close()


@pytest.mark.changes_source
async def test_a_peer_for_which_too_much_waits_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.erl.connection.MAX_QUEUED_BYTES", 30 * 1024 * 1024)
    assert MAX_QUEUED_BYTES > 30 * 1024 * 1024
    async with running(unique_name()) as (node,):
        reasons: list[str] = []
        node.monitor_nodes(lambda peer, is_up, reason: None if is_up else reasons.append(reason))
        peer = await unread_peer(node)
        for _ in range(40):
            node.send(peer.pid, bytes(1024 * 1024))
            await asyncio.sleep(0)
        await wait_until(lambda: reasons)
        assert "MAX_QUEUED_BYTES" in reasons[0]
        peer.writer.close()


@pytest.mark.changes_source
async def test_too_much_for_a_peer_still_to_be_connected_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.erl.connection.MAX_QUEUED_BYTES", 1024 * 1024)
    async with two_nodes() as (one, two):
        attempt = asyncio.create_task(one.connect(two.name))
        await asyncio.sleep(0)
        one.send(Pid(two.name, 1, 0, 1), bytes(2 * 1024 * 1024))
        with pytest.raises(Exception, match="MAX_QUEUED_BYTES"):
            await attempt


async def test_a_peer_that_sends_much_lets_others_have_their_turn() -> None:
    async with two_nodes() as (one, two):
        await connected(one, two)
        protocol = two.peers.table[one.name].protocol
        assert protocol is not None
        transport = protocol.transport
        assert transport is not None
        protocol.data_received(TICK * (READ_AT_ONCE_BYTES // len(TICK) // 2))
        assert transport.is_reading()
        protocol.data_received(TICK * (READ_AT_ONCE_BYTES // len(TICK) // 2))
        assert not transport.is_reading()
        await wait_until(transport.is_reading)
        protocol.data_received(TICK)
        assert transport.is_reading()
