"""Peers that break the rules: refused with a reason in the log, while memory and other connections are unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import struct
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from erlang_interop_tests.beam import BeamNode, Beams, unique_name, wait_until
from erlang_interop_tests.python_node import Server, python_node
from gater.erl import Node, connection, control, etf
from gater.erl.errors import HandshakeError
from gater.erl.gen_server import start_server
from gater.erl.handshake import OUR_FLAGS, Completed, Handshake, LocalIdentity, Send
from gater.erl.terms import Atom

MEMORY_BYTES = 64 * 1024 * 1024
"""How much an attack may add to the peak memory of this process."""


@contextlib.asynccontextmanager
async def unharmed(node: Node, friend: BeamNode) -> AsyncIterator[list[dict[str, object]]]:
    """While the block runs a friendly BEAM stays connected, is answered, and memory stays where it was.

    Gives the log entries of the block.
    """
    await start_server(node, Server(), name="counter")
    echo = "gen_server:call({counter, N}, {echo, ok})"
    assert await friend.eval(echo, N=node.name) is Atom("ok")
    downs: list[Atom] = []
    node.monitor_nodes(lambda peer, is_up, reason: None if is_up else downs.append(peer))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capture_logs() as entries:
        try:
            yield entries
        except BaseException:
            print(*entries, sep="\n")
            raise
    assert friend.atom not in downs
    assert await friend.eval(echo, N=node.name) is Atom("ok")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY_BYTES


@contextlib.asynccontextmanager
async def stream(node: Node) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", node.listen_port)
    try:
        yield reader, writer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def shaken(node: Node, cookie: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream that has finished its handshake, without distribution headers."""
    name = unique_name("hostile")
    machine = Handshake(
        "initiator", LocalIdentity(name, OUR_FLAGS, 7), challenge=1, cookie=cookie, peer_name=str(node.name)
    )
    async with stream(node) as (reader, writer):
        effects = machine.start()
        while not any(isinstance(effect, Completed) for effect in effects):
            for effect in effects:
                if isinstance(effect, Send):
                    writer.write(effect.data)
            effects = machine.receive(await asyncio.wait_for(reader.read(4096), 5))
        await wait_until(lambda: Atom(name) in node.nodes())
        yield reader, writer


async def hung_up(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(15):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass


def reasons(entries: list[dict[str, object]], event: str) -> str:
    return " | ".join(str(entry["reason"]) for entry in entries if entry["event"] == event)


async def test_a_wrong_cookie_is_refused_in_both_directions(erl_node: BeamNode, beam: Beams, otp: int) -> None:
    stranger = await beam.start("erlang", otp=otp, cookie="their_secret")
    async with python_node(beam) as node:
        async with unharmed(node, erl_node) as entries:
            assert await stranger.eval("net_adm:ping(N)", N=node.name) is Atom("pang")
            await wait_until(lambda: "cookie" in reasons(entries, "handshake_failed"))
            failed = next(entry for entry in entries if entry["event"] == "handshake_failed")
            assert failed["peer"] == str(stranger.name)
            entries.clear()
            with pytest.raises(HandshakeError):
                await node.connect(stranger.atom)
            assert "cookie" in reasons(entries, "handshake_failed")
        assert "their_secret" not in str(entries)
        assert beam.cookie not in str(entries)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 64, b"\x00\x00" * 100, b"\x00\x05Nabcd", b"\xff" * 10],
    ids=["http", "bytes", "empty packets", "short name", "high bytes"],
)
async def test_garbage_instead_of_a_handshake_is_refused(erl_node: BeamNode, beam: Beams, garbage: bytes) -> None:
    async with python_node(beam) as node, unharmed(node, erl_node) as entries:
        async with stream(node) as (reader, writer):
            writer.write(garbage)
            await hung_up(reader)
        await wait_until(lambda: reasons(entries, "handshake_failed"))


async def test_a_stream_that_says_nothing_or_drips_is_given_up(
    erl_node: BeamNode, beam: Beams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with python_node(beam) as node, unharmed(node, erl_node) as entries:
        async with stream(node) as (silent, _), stream(node) as (slow, drip):
            name = Handshake(
                "initiator", LocalIdentity("slow@127.0.0.1", OUR_FLAGS, 7), challenge=1, cookie="c", peer_name="a@b"
            ).start()[0]
            assert isinstance(name, Send)

            async def send_slowly() -> None:
                with contextlib.suppress(ConnectionError):
                    for byte in name.data:
                        drip.write(bytes((byte,)))
                        await drip.drain()
                        await asyncio.sleep(0.05)

            dripping = asyncio.create_task(send_slowly())
            await asyncio.gather(hung_up(silent), hung_up(slow))
            await dripping
        said = reasons(entries, "handshake_failed")
        assert "it sent nothing at all" in said
        assert "no handshake within 0.3 s" in said


async def test_a_truncated_frame_is_no_message(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node, unharmed(node, erl_node) as entries:
        async with shaken(node, beam.cookie) as (_, writer):
            writer.write(struct.pack(">I", 1000) + b"p\x83h\x04")
        await wait_until(lambda: "closed by the peer" in reasons(entries, "node_down"))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"\xff\xff\xff\xff", "MAX_FRAME_BYTES"),
        (struct.pack(">I", 4) + b"nope", "begins with"),
        (struct.pack(">I", 5) + b"p\x83h\x03a", "are to come"),
        (struct.pack(">I", 3) + b"p\x83j", "a control message is a tuple"),
    ],
    ids=["4 GB prefix", "no distribution message", "cut term", "no tuple"],
)
async def test_a_broken_frame_ends_its_connection(erl_node: BeamNode, beam: Beams, frame: bytes, said: str) -> None:
    async with python_node(beam) as node, unharmed(node, erl_node) as entries:
        async with shaken(node, beam.cookie) as (reader, writer):
            writer.write(frame)
            await hung_up(reader)
        await wait_until(lambda: said in reasons(entries, "protocol_error"))


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        (b"l\x00\x00\x00\x01" * 100_000, "MAX_DEPTH"),
        (b"h\x01" * 100_000 + b"j", "MAX_DEPTH"),
        (b"l\xff\xff\xff\xff", "cut off|to come"),
        (b"t\xff\xff\xff\xff", "cut off|to come"),
        (b"n\xff\x00", "cut off"),
        (b"P\x7f\xff\xff\xff" + b"x", "compressed term"),
        (b"w\x05abc", "cut off"),
    ],
    ids=["nested lists", "nested tuples", "list of 4 G", "map of 4 G", "cut integer", "compressed inside", "cut atom"],
)
async def test_a_bomb_of_a_term_ends_its_connection(erl_node: BeamNode, beam: Beams, bomb: bytes, said: str) -> None:
    async with python_node(beam) as node, unharmed(node, erl_node) as entries:
        head = etf.encode_term((control.OP_REG_SEND, node.client.pid, control.UNUSED, Atom("counter")))
        async with shaken(node, beam.cookie) as (reader, writer):
            body = b"p\x83" + head + b"\x83" + bomb
            writer.write(struct.pack(">I", len(body)) + body)
            await hung_up(reader)
        await wait_until(lambda: any(part in reasons(entries, "protocol_error") for part in said.split("|")))


async def test_more_streams_than_allowed_are_closed_and_the_others_live(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node, unharmed(node, erl_node):
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream(node)) for _ in range(200)]
            await hung_up(streams[-1][0])
        await wait_until(lambda: not node.peers._inbound)
