"""Distribution headers spoken with real nodes: atom cache and fragments, both ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from erlang_interop_tests.beam import LOOPBACK, BeamNode, Beams, unique_name
from gater.erl.dist_header import HeaderReader, HeaderWriter, Message
from gater.erl.epmd import lookup
from gater.erl.etf import AtomTable, decode_spine, decode_term, encode_term, plain_bytes
from gater.erl.handshake import HEADER_FLAGS, OUR_FLAGS, Completed, DistributionFlag, Handshake, LocalIdentity, Send
from gater.erl.terms import Atom, EncodedTerm, Pid, Term, exact_equal

DEADLINE_S = 20.0

ECHO = """
Echo = fun Loop() ->
    receive
        {From, T} -> From ! T, Loop()
    end
end,
register(echo, spawn(Echo)), ok"""


class Speaker:
    """A bare connection that speaks headers: what the peer's processes send to `pid` comes out of `receive`."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rest: bytes) -> None:
        self.pid = Pid(Atom(name), 1, 0, 1)
        self.sender = HeaderWriter(0)
        self.receiver = HeaderReader(AtomTable())
        self.fragments_seen = 0
        self._reader = reader
        self._writer = writer
        self._rest = rest

    def write(self, *pieces: bytes) -> None:
        body = b"".join(pieces)
        self._writer.write(len(body).to_bytes(4, "big") + body)

    def send(self, message: Term, fragment_bytes: int | None = None) -> None:
        control = (6, self.pid, Atom(""), Atom("echo"))
        outgoing = self.sender.message(control, message)
        frames = [outgoing.frame()] if fragment_bytes is None else outgoing.fragments(7, fragment_bytes)
        for frame in frames:
            self.write(*frame)

    async def _exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            more = await asyncio.wait_for(self._reader.read(1 << 20), DEADLINE_S)
            assert more, "the peer ended the connection"
            self._rest += more
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def next_message(self) -> Message:
        while True:
            frame = await self._exactly(int.from_bytes(await self._exactly(4), "big"))
            if not frame:
                self.write()
                continue
            self.fragments_seen += frame[1] in (69, 70)
            message = self.receiver.receive(frame)
            if message is not None:
                return message

    async def receive(self) -> Term:
        """The next term that is sent to `pid` (other signals are passed over)."""
        while True:
            message = await self.next_message()
            control, pos = decode_term(message.data, message.pos, AtomTable(), message.atoms)
            if control[0] in (2, 22):
                payload, end = decode_term(message.data, pos, AtomTable(), message.atoms)
                assert end == len(message.data)
                assert encode_term(payload) == encode_term(
                    decode_spine(message.data, pos, 2, AtomTable(), message.atoms)
                )
                return payload


@contextlib.asynccontextmanager
async def speaking(beams: Beams, node: BeamNode, flags: DistributionFlag) -> AsyncIterator[Speaker]:
    assert node.name is not None
    name = unique_name("headers")
    found: Any = await lookup(node.name.partition("@")[0], LOOPBACK, epmd_port=await beams.epmd_port())
    reader, writer = await asyncio.open_connection(LOOPBACK, found.port)
    try:
        machine = Handshake(
            "initiator", LocalIdentity(name, flags, 1), challenge=1, cookie="right", peer_name=node.name
        )
        effects = machine.start()
        while True:
            for effect in effects:
                if isinstance(effect, Send):
                    writer.write(effect.data)
            done = next((effect for effect in effects if isinstance(effect, Completed)), None)
            if done is not None:
                break
            data = await asyncio.wait_for(reader.read(4096), DEADLINE_S)
            assert data, "the peer hung up"
            effects = machine.receive(data)
        assert done.flags & HEADER_FLAGS == HEADER_FLAGS
        yield Speaker(name, reader, writer, machine.leftover)
    finally:
        writer.close()


@pytest.fixture
async def speaker(beam: Beams, otp: int) -> AsyncIterator[Speaker]:
    node = await beam.start("erlang", otp=otp, cookie="right")
    await node.eval(ECHO)
    async with speaking(beam, node, OUR_FLAGS | HEADER_FLAGS) as opened:
        yield opened


def atoms_named(prefix: str, numbers: range) -> list[Atom]:
    return [Atom(f"{prefix}{number}") for number in numbers]


async def test_a_node_reads_our_atom_cache_and_we_read_its(speaker: Speaker) -> None:
    terms: list[Term] = [
        Atom("ok"),
        (Atom("ok"), {Atom("a"): [True, False, None, Atom("é" * 255)]}),
        atoms_named("a", range(300)),
        *(atoms_named("many_", range(start, start + 250)) for start in range(0, 6000, 250)),
        *(atoms_named("many_", range(start, start + 120)) for start in range(0, 6000, 60)),
        [speaker.pid, (b"x", 1.5, 1 << 80)],
    ]
    for term in terms:
        speaker.send((speaker.pid, term))
    for term in terms:
        assert exact_equal(await speaker.receive(), term)


async def test_a_node_reads_our_fragments_and_we_read_its(speaker: Speaker) -> None:
    large = (Atom("large"), [b"%06d" % number * 20 for number in range(20_000)], bytes(300_000), Atom("fresh_atom"))
    for fragment_bytes in (None, 64 * 1024, 1000, 1):
        term = large if fragment_bytes != 1 else (Atom("small"), [Atom("in"), b"pieces" * 10])
        speaker.send((speaker.pid, term), fragment_bytes)
        assert exact_equal(await speaker.receive(), term)
    assert speaker.fragments_seen > 10


async def test_fragments_of_several_messages_may_be_interleaved(speaker: Speaker) -> None:
    control = (6, speaker.pid, Atom(""), Atom("echo"))
    messages = [(Atom(f"number_{number}"), number, bytes(5000)) for number in range(20)]
    outgoing = [speaker.sender.message(control, (speaker.pid, message)) for message in messages]
    under_way = [message.fragments(number + 1, 500) for number, message in enumerate(outgoing)]
    while under_way:
        for frames in list(under_way):
            frame = next(frames, None)
            if frame is None:
                under_way.remove(frames)
            else:
                speaker.write(*frame)
    seen = {(await speaker.receive())[1] for _ in messages}
    assert seen == set(range(20))


async def test_what_we_pass_on_from_a_message_with_a_cache_means_the_same_elsewhere(speaker: Speaker) -> None:
    term = (Atom("ok"), [{Atom("key"): Atom(f"value_{number}")} for number in range(50)])
    speaker.send((speaker.pid, (1, term)))
    while True:
        message = await speaker.next_message()
        control, pos = decode_term(message.data, message.pos, AtomTable(), message.atoms)
        if control[0] in (2, 22):
            break
    spine = decode_spine(message.data, pos, 2, AtomTable(), message.atoms)
    events = spine[1][1]
    assert type(events) is EncodedTerm
    assert events.atoms
    assert plain_bytes(events) == encode_term(term[1])
    speaker.send((speaker.pid, spine))
    assert await speaker.receive() == (1, term)
