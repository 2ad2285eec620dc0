"""Nodes among each other: start, connect from both sides, break, come back."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from node_kit import COOKIE, Collector, free_port, running, two_nodes, unique_name, wait_until
from structlog.testing import capture_logs

from gater.erl import Node, NodeOptions, control, etf, make_node
from gater.erl.epmd import BuiltinEpmd, EpmdUnavailable, NameTaken, names
from gater.erl.errors import EncodeError, HandshakeError, NodeError, NotConnected
from gater.erl.handshake import OUR_FLAGS, Completed, Handshake, LocalIdentity, Send, StatusReceived
from gater.erl.peers import MAX_HANDSHAKES
from gater.erl.process import NOCONNECTION, NOPROC
from gater.erl.terms import Atom, ImproperList, Pid, Reference

HELLO = Atom("hello")


class Changes:
    """What `monitor_nodes` has told."""

    def __init__(self, node: Node) -> None:
        self.seen: list[tuple[Atom, bool, str]] = []
        self.end: Callable[[], None] = node.monitor_nodes(lambda *change: self.seen.append(change))

    async def down(self) -> str:
        await wait_until(lambda: any(not is_up for _, is_up, _ in self.seen), "a node that goes down")
        return next(reason for _, is_up, reason in self.seen if not is_up)


class RawPeer:
    """The other end of a connection, byte by byte: a peer that does only what a test tells it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self.reader = reader
        self.writer = writer
        self.name = Atom(name)
        self.pid = Pid(self.name, 1, 0, 77)

    def send(self, message: tuple[object, ...], payload: bytes | None = None) -> None:
        body = b"p\x83" + etf.encode_term(message)
        if payload is not None:
            body += b"\x83" + payload
        self.send_frame(body)

    def send_frame(self, body: bytes) -> None:
        self.writer.write(struct.pack(">I", len(body)) + body)

    async def next(self) -> tuple[object, ...]:
        """The next control message."""
        while True:
            (size,) = struct.unpack(">I", await self.reader.readexactly(4))
            if size:
                body = await self.reader.readexactly(size)
                return etf.decode_term(body, 2, etf.AtomTable())[0]

    async def hung_up(self) -> bool:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(4096):
                    pass
            return True


@contextlib.asynccontextmanager
async def raw_peer(node: Node, *, flags: int = OUR_FLAGS, cookie: str = COOKIE) -> AsyncIterator[RawPeer]:
    """Connect to `node` as a hand-driven peer."""
    name = unique_name("raw")
    machine = Handshake(
        "initiator", LocalIdentity(name, flags, 77), challenge=1, cookie=cookie, peer_name=str(node.name)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", node.listen_port)
    try:
        effects = machine.start()
        while not any(isinstance(effect, Completed) for effect in effects):
            for effect in effects:
                if isinstance(effect, Send):
                    writer.write(effect.data)
            data = await asyncio.wait_for(reader.read(4096), 5)
            if not data:
                raise ConnectionError("the node hung up during the handshake")
            effects = machine.receive(data)
        await wait_until(lambda: Atom(name) in node.nodes())
        yield RawPeer(reader, writer, name)
    finally:
        writer.close()


# Life


async def test_a_node_is_found_by_its_name_and_frees_it_when_it_stops() -> None:
    async with running(unique_name(), unique_name()) as (one, two):
        port = one.options.epmd_port
        assert set(await names("127.0.0.1", epmd_port=port)) == {str(each.name).split("@")[0] for each in (one, two)}
        await two.stop()
        await wait_until(lambda: _registered(port, 1))


async def _registered(port: int, count: int) -> bool:
    return len(await names("127.0.0.1", epmd_port=port)) == count


async def test_a_taken_name_is_refused() -> None:
    async with running(unique_name()) as (node,):
        with pytest.raises(NameTaken):
            await make_node(str(node.name), cookie=COOKIE, options=node.options).start()


async def test_two_nodes_that_start_at_once_share_one_epmd() -> None:
    options = NodeOptions(epmd_port=free_port())
    nodes = [make_node(unique_name(), cookie=COOKIE, options=options) for _ in range(4)]
    try:
        await asyncio.gather(*(node.start() for node in nodes))
        assert await _registered(options.epmd_port, 4)
    finally:
        for node in nodes:
            await node.stop()


async def test_a_node_registers_again_when_epmd_goes_with_the_node_that_ran_it() -> None:
    async with running(unique_name(), unique_name(), options=NodeOptions(epmd_grace_s=0.0)) as (one, two):
        creation = two.creation
        with capture_logs() as logs:
            await one.stop()
            await wait_until(lambda: _registered_or_gone(two))
        assert two.creation == creation
        left = [entry["registered"] for entry in logs if entry["event"] == "builtin_epmd_ends"]
        assert left == [[str(two.name).partition("@")[0]]]


async def test_the_port_of_a_lost_epmd_is_left_free_for_the_next_one() -> None:
    async with running(unique_name(), unique_name(), options=NodeOptions(epmd_grace_s=60.0)) as (one, two):
        await one.stop()
        await wait_until(lambda: two._registering is not None)
        with pytest.raises(EpmdUnavailable):
            await two._register_with_epmd(False)
        restarted = BuiltinEpmd()
        await restarted.start(["127.0.0.1"], two.options.epmd_port)
        await wait_until(lambda: _registered_or_gone(two))
        assert two._epmd is None
        await restarted.close()


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
async def test_a_node_that_looks_for_an_epmd_stops_and_leaves_none(grace_s: float) -> None:
    async with running(unique_name(), unique_name(), options=NodeOptions(epmd_grace_s=grace_s)) as (one, two):
        await one.stop()
        await wait_until(lambda: two._registering is not None)
        await two.stop()
        assert two._registering is not None
        assert two._registering.done()
        with pytest.raises(EpmdUnavailable):
            await names("127.0.0.1", epmd_port=two.options.epmd_port)


async def _registered_or_gone(node: Node) -> bool:
    with contextlib.suppress(NodeError):
        return list(await names("127.0.0.1", epmd_port=node.options.epmd_port)) == [str(node.name).split("@")[0]]
    return False


async def test_a_node_listens_on_one_port_of_several_addresses() -> None:
    options = NodeOptions(listen_hosts=("127.0.0.1", "127.0.0.2"))
    async with running(unique_name(), options=options) as (node,):
        for host in options.listen_hosts:
            _, writer = await asyncio.open_connection(host, node.listen_port)
            writer.close()


def test_names_and_cookies_that_no_node_can_have_are_refused() -> None:
    with pytest.raises(NodeError, match="not of the form"):
        Node("nohost", cookie=COOKIE)
    with pytest.raises(NodeError, match="cookie"):
        Node("name@host", cookie="kö")


async def test_nothing_can_be_done_before_start_or_after_stop() -> None:
    node = make_node(unique_name(), cookie=COOKIE, options=NodeOptions(epmd_port=free_port()))
    with pytest.raises(NodeError, match="not running"):
        Collector(node)
    with pytest.raises(NodeError, match="not been started"):
        node.send(("name", "other@127.0.0.1"), HELLO)
    async with node:
        process = Collector(node).process
    assert not process.alive
    with pytest.raises(NodeError, match="not running"):
        Collector(node)
    await node.stop()


# Connections


async def test_connect_makes_one_connection_known_to_both() -> None:
    async with two_nodes() as (one, two):
        await asyncio.gather(*(one.connect(two.name) for _ in range(5)))
        await wait_until(lambda: two.nodes() == [one.name])
        assert one.nodes() == [two.name]
        await one.connect(one.name)
        assert one.nodes() == [two.name]


async def test_a_send_connects() -> None:
    async with two_nodes() as (one, two):
        target = Collector(two, "target")
        one.send((Atom("target"), two.name), HELLO)
        assert await target.next() is HELLO


async def test_a_send_connects_again_after_a_disconnect() -> None:
    async with two_nodes() as (one, two):
        target = Collector(two, "target")
        one.send((Atom("target"), two.name), 1)
        assert await target.next() == 1
        assert one.disconnect(two.name)
        assert not one.disconnect(two.name)
        one.send((Atom("target"), two.name), 2)
        assert await target.next() == 2


async def test_what_is_sent_while_connecting_is_sent_as_it_was() -> None:
    async with two_nodes() as (one, two):
        target, victim = Collector(two, "target"), Collector(two)
        message = [1, 2]
        reason = {"reason": 1}
        one.send((Atom("target"), two.name), message)
        one.exit(victim.process.pid, reason)
        message.append(3)
        reason.clear()
        assert await target.next() == [1, 2]
        assert await victim.ended() == {b"reason": 1}


async def test_what_is_no_term_is_refused_before_and_after_connecting() -> None:
    async with two_nodes() as (one, two):
        target = Collector(two, "target")
        for _ in range(2):
            with pytest.raises(EncodeError):
                one.send((Atom("target"), two.name), object())
            await one.connect(two.name)
        one.send((Atom("target"), two.name), HELLO)
        assert await target.next() is HELLO


@pytest.mark.parametrize("greater_first", [True, False])
async def test_simultaneous_connect_keeps_one_connection(greater_first: bool) -> None:
    async with running(unique_name("a"), unique_name("b")) as (lesser, greater):
        first, second = (greater, lesser) if greater_first else (lesser, greater)
        targets = {node.name: Collector(node, "target") for node in (first, second)}
        changes = [Changes(first), Changes(second)]
        for sender, receiver in ((first, second), (second, first)):
            sender.send((Atom("target"), receiver.name), HELLO)
        await asyncio.gather(first.connect(second.name), second.connect(first.name))
        for target in targets.values():
            assert await target.next() is HELLO
        await asyncio.sleep(0.05)
        assert first.nodes() == [second.name]
        assert second.nodes() == [first.name]
        assert [[is_up for _, is_up, _ in each.seen] for each in changes] == [[True], [True]]


async def test_an_unknown_node_cannot_be_connected() -> None:
    async with running(unique_name()) as (node,):
        with pytest.raises(NotConnected, match="not known to the EPMD"):
            await node.connect("nobody@127.0.0.1")
        with pytest.raises(NotConnected, match="not a node name"):
            await node.connect("nobody")
        assert node.nodes() == []


async def test_a_wrong_cookie_is_refused_on_both_sides() -> None:
    async with running(unique_name()) as (one,), running(unique_name(), cookie="other", options=one.options) as (two,):
        with pytest.raises(HandshakeError):
            await one.connect(two.name)
        with pytest.raises(HandshakeError):
            await two.connect(one.name)
        assert one.nodes() == two.nodes() == []


async def test_a_cookie_can_be_set_for_one_peer() -> None:
    other = unique_name("other")
    port = free_port()
    options = NodeOptions(epmd_port=port, cookies={other: "their cookie"})
    async with (
        running(unique_name(), options=options) as (one,),
        running(other, cookie="their cookie", options=replace(options, cookies={str(one.name): "their cookie"})) as (
            two,
        ),
    ):
        await one.connect(two.name)
        assert one.nodes() == [two.name]


async def test_max_peers_bounds_the_table() -> None:
    async with running(*(unique_name() for _ in range(3)), options=NodeOptions(max_peers=1)) as (one, two, three):
        await one.connect(two.name)
        with pytest.raises(NotConnected, match="max_peers allows 1"):
            await one.connect(three.name)
        assert one.nodes() == [two.name]


# Down


async def test_watchers_learn_who_comes_and_why_they_go() -> None:
    async with two_nodes() as (one, two):
        mine, theirs = Changes(one), Changes(two)
        await one.connect(two.name)
        await wait_until(lambda: theirs.seen)
        one.disconnect(two.name)
        assert mine.seen == [(two.name, True, ""), (two.name, False, "disconnected by this node")]
        assert await theirs.down() == "connection closed by the peer"
        mine.end()
        await one.connect(two.name)
        assert len(mine.seen) == 2


async def test_a_failing_watcher_does_not_disturb_the_node() -> None:
    async with two_nodes() as (one, two):
        one.monitor_nodes(lambda *change: 1 / 0)
        seen = Changes(one)
        await one.connect(two.name)
        assert seen.seen == [(two.name, True, "")]


async def test_the_pids_of_an_earlier_life_are_nobody() -> None:
    async with two_nodes() as (one, two):
        old = Collector(two, "server").process.pid
        await one.connect(two.name)
        name, options = str(two.name), two.options
        await two.stop()
        async with running(name, options=options) as (reborn,):
            while (new := Collector(reborn).process.pid).id < old.id:
                pass
            assert reborn.creation != old.creation
            watcher = Collector(one)
            one.send(old, HELLO)
            watcher.process.monitor(old)
            watcher.process.monitor(new)
            reborn_process = reborn.process(new)
            assert reborn_process is not None
            assert (await watcher.next())[4] is NOPROC
            reborn_process.exit(HELLO)
            assert (await watcher.next())[4] is HELLO


async def test_a_silent_peer_is_given_up_after_the_tick_time() -> None:
    async with running(unique_name(), options=NodeOptions(ticktime_s=0.2)) as (node,):
        changes = Changes(node)
        watcher = Collector(node)
        async with raw_peer(node) as peer:
            watcher.process.monitor(peer.pid)
            assert await changes.down() == "net tick timeout"
            assert (await watcher.next())[4] is NOCONNECTION


async def test_ticks_keep_an_idle_connection_up() -> None:
    async with two_nodes(NodeOptions(ticktime_s=0.1)) as (one, two):
        changes = Changes(one)
        await one.connect(two.name)
        await asyncio.sleep(0.4)
        assert changes.seen == [(two.name, True, "")]


async def test_a_peer_that_comes_back_replaces_its_old_connection() -> None:
    async with running(unique_name()) as (node,):
        changes = Changes(node)
        async with raw_peer(node) as peer:
            name = peer.name.name
            reader, writer = await asyncio.open_connection("127.0.0.1", node.listen_port)
            machine = Handshake(
                "initiator", LocalIdentity(name, OUR_FLAGS, 78), challenge=1, cookie=COOKIE, peer_name=str(node.name)
            )
            effects = machine.start()
            while not any(isinstance(effect, Completed) for effect in effects):
                for effect in effects:
                    match effect:
                        case Send(data):
                            writer.write(data)
                        case StatusReceived("alive"):
                            effects += machine.confirm_alive(True)
                effects = machine.receive(await asyncio.wait_for(reader.read(4096), 5))
            assert await peer.hung_up()
            assert "replaced" in await changes.down()
            assert node.nodes() == [peer.name]
            writer.close()


# What peers may not do


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00\x83h\x00",
        b"p\x83h\x01a\x63",
        b"p\x83j",
        b"p\x83h\x03a\x02w\x00w\x01x\x83a\x01",
        b"p\x83" + etf.encode_term((control.OP_LINK, 1, 2)),
        b"p\x83" + etf.encode_term((control.OP_MONITOR_P, 1, Atom("a"), 2)),
    ],
)
async def test_a_broken_message_ends_the_connection_and_no_other(frame: bytes) -> None:
    async with two_nodes() as (one, two):
        await two.connect(one.name)
        changes = Changes(one)
        async with raw_peer(one) as peer:
            peer.send_frame(frame)
            assert await peer.hung_up()
            assert "protocol error" in await changes.down()
        assert one.nodes() == [two.name]


async def test_a_peer_speaks_for_its_own_processes_only() -> None:
    async with running(unique_name()) as (node,):
        target = Collector(node, "target")
        changes = Changes(node)
        async with raw_peer(node) as peer:
            stranger = Pid(Atom("third@127.0.0.1"), 1, 0, 1)
            peer.send((control.OP_LINK, stranger, target.process.pid))
            assert "speaks for a process of third@127.0.0.1" in await changes.down()
        assert target.process.links == set()


async def test_streams_without_a_handshake_are_limited() -> None:
    async with running(unique_name()) as (node,):
        streams = [await asyncio.open_connection("127.0.0.1", node.listen_port) for _ in range(MAX_HANDSHAKES + 1)]
        reader, _ = streams[-1]
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(1) == b""
        streams[0][1].close()
        for _, writer in streams:
            writer.close()


async def test_the_nodes_own_name_is_not_let_in() -> None:
    async with running(unique_name()) as (node,):
        machine = Handshake(
            "initiator",
            LocalIdentity(str(node.name), OUR_FLAGS, 77),
            challenge=1,
            cookie=COOKIE,
            peer_name=str(node.name),
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", node.listen_port)
        for effect in machine.start():
            assert isinstance(effect, Send)
            writer.write(effect.data)
        with pytest.raises(HandshakeError, match="does not allow us"):
            machine.receive(await asyncio.wait_for(reader.read(4096), 5))
        writer.close()


async def test_a_peer_without_the_newer_flags_gets_the_older_messages() -> None:
    flags = OUR_FLAGS & ~(
        type(OUR_FLAGS).EXIT_PAYLOAD
        | type(OUR_FLAGS).SEND_SENDER
        | type(OUR_FLAGS).SPAWN
        | type(OUR_FLAGS).DIST_MONITOR
    )
    async with running(unique_name()) as (node,), raw_peer(node, flags=flags) as peer:
        process = Collector(node).process
        process.send(peer.pid, HELLO)
        assert await peer.next() == (control.OP_SEND, control.UNUSED, peer.pid)
        process.monitor(peer.pid)
        refused: list[object] = []
        node.spawn_request(
            peer.name,
            (Atom("m"), Atom("f"), []),
            on_error=refused.append,
            on_down=lambda monitor, reason: refused.append("down"),
        )
        process.link(peer.pid)
        assert await peer.next() == (control.OP_LINK, process.pid, peer.pid)
        process.exit(HELLO)
        assert await peer.next() == (control.OP_EXIT, process.pid, peer.pid, HELLO)
        assert refused == [Atom("notsup")]


async def test_replies_go_where_the_tag_of_the_call_says() -> None:
    async with running(unique_name()) as (node,), raw_peer(node) as peer:
        reference = Reference(peer.name, 77, (1, 2, 3))
        aliased = ImproperList([Atom("alias")], reference)
        node.reply((peer.pid, reference), 1)
        node.reply((peer.pid, aliased), 2)
        node.reply((peer.pid, ImproperList([aliased], HELLO)), 3)
        node.reply((peer.pid, [aliased, HELLO]), 4)
        assert [(await peer.next())[0] for _ in range(4)] == [
            control.OP_SEND_SENDER,
            control.OP_ALIAS_SEND,
            control.OP_ALIAS_SEND,
            control.OP_ALIAS_SEND,
        ]


async def test_a_peer_that_proves_no_cookie_is_refused() -> None:
    async with running(unique_name()) as (node,):
        with pytest.raises(ConnectionError):
            async with raw_peer(node, cookie="another"):
                pass
        assert node.nodes() == []
