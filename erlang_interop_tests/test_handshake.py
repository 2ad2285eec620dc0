"""The handshake machine against real nodes, in both roles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from erlang_interop_tests.beam import LOOPBACK, BeamNode, Beams, unique_name
from gater.erl.epmd import BuiltinEpmd, register
from gater.erl.errors import AuthenticationError, HandshakeError
from gater.erl.handshake import (
    HEADER_FLAGS,
    MANDATORY_FLAGS,
    OUR_FLAGS,
    AcceptStatus,
    Completed,
    DistributionFlag,
    Effect,
    Handshake,
    LocalIdentity,
    PeerNamed,
    Send,
    StatusReceived,
)
from gater.erl.terms import Atom

DEADLINE_S = 10.0


@dataclass
class Shaken:
    """How a handshake over a socket went."""

    effects: list[Effect] = field(default_factory=list)
    error: HandshakeError | None = None
    hung_up: bool = False

    @property
    def completed(self) -> Completed | None:
        return next((effect for effect in self.effects if isinstance(effect, Completed)), None)


async def shake(
    machine: Handshake,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    status: AcceptStatus = "ok",
    cookie: str = "",
) -> Shaken:
    """Run `machine` until it completes, fails, or the peer hangs up."""
    shaken = Shaken()

    def carry_out(effects: list[Effect]) -> None:
        shaken.effects += effects
        for effect in effects:
            match effect:
                case Send(data):
                    writer.write(data)
                case PeerNamed():
                    carry_out(machine.accept(status, cookie))
                case StatusReceived("alive"):
                    carry_out(machine.confirm_alive(True))

    async with asyncio.timeout(DEADLINE_S):
        try:
            carry_out(machine.start())
            while shaken.completed is None:
                data = await reader.read(64)
                if not data:
                    shaken.hung_up = True
                    break
                carry_out(machine.receive(data))
        except HandshakeError as error:
            shaken.error = error
            writer.write(machine.farewell)
            writer.close()
    return shaken


@dataclass
class Place:
    """A name of ours, registered, with a listener that shakes hands with every node that connects."""

    identity: LocalIdentity
    epmd: BuiltinEpmd
    results: asyncio.Queue[Shaken]
    cookie: str = "right"
    status: AcceptStatus = "ok"

    async def result(self) -> Shaken:
        return await asyncio.wait_for(self.results.get(), DEADLINE_S)


@pytest.fixture
async def place(beam: Beams) -> AsyncIterator[Place]:
    epmd = BuiltinEpmd()
    await epmd.start([LOOPBACK], 0)
    await beam.use_epmd_port(epmd.port)
    here = Place(LocalIdentity(unique_name("gater"), OUR_FLAGS | HEADER_FLAGS, 77), epmd, asyncio.Queue())
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        machine = Handshake("acceptor", here.identity, challenge=0xFEDCBA98)
        here.results.put_nowait(await shake(machine, reader, writer, status=here.status, cookie=here.cookie))

    listener = await asyncio.start_server(serve, LOOPBACK, 0)
    port = listener.sockets[0].getsockname()[1]
    registration = await register(here.identity.name.partition("@")[0], port, epmd_port=epmd.port)
    yield here
    registration.close()
    listener.close()
    for writer in writers:
        writer.close()
    await epmd.close()


@contextlib.asynccontextmanager
async def called(
    place: Place, node: BeamNode, *, cookie: str = "right", flags: DistributionFlag = OUR_FLAGS, peer: str | None = None
) -> AsyncIterator[Shaken]:
    """A handshake that we started with `node`."""
    assert node.name is not None
    identity = LocalIdentity(place.identity.name, flags, place.identity.creation)
    machine = Handshake("initiator", identity, challenge=1, cookie=cookie, peer_name=peer or node.name)
    port = place.epmd.nodes[node.name.partition("@")[0]].port
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        yield await shake(machine, reader, writer)
    finally:
        writer.close()


async def connect(node: BeamNode, place: Place) -> object:
    return await node.eval("net_kernel:connect_node(Node)", Node=Atom(place.identity.name))


async def test_a_node_that_we_call_accepts_us_as_hidden(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    for flags in (OUR_FLAGS, OUR_FLAGS | HEADER_FLAGS, MANDATORY_FLAGS):
        async with called(place, node, flags=flags) as shaken:
            assert shaken.completed is not None
            assert shaken.completed.peer_name == node.name
            assert shaken.completed.flags == flags & shaken.completed.peer_flags
            assert shaken.completed.flags & MANDATORY_FLAGS == MANDATORY_FLAGS
            assert shaken.completed.creation == await node.eval("erts_internal:get_creation()")
            await node.sees_hidden(Atom(place.identity.name))
            assert await node.eval("nodes()") == []
        await node.eval("erlang:disconnect_node(Node)", Node=Atom(place.identity.name))


async def test_a_node_that_calls_us_connects(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    assert await connect(node, place) is True
    done = (await place.result()).completed
    assert done is not None
    assert done.peer_name == node.name
    assert done.flags & OUR_FLAGS == OUR_FLAGS
    assert done.peer_flags & DistributionFlag.PUBLISHED
    assert await node.eval("nodes(hidden)") == [Atom(place.identity.name)]


async def test_a_wrong_cookie_is_refused_by_both(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="wrong")
    assert await connect(node, place) is False
    assert isinstance((await place.result()).error, AuthenticationError)
    async with called(place, node) as shaken:
        assert shaken.hung_up
        assert shaken.completed is None


async def test_a_node_we_do_not_want_is_told_so(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    place.status = "not_allowed"
    assert await connect(node, place) is False
    assert (await place.result()).hung_up


async def test_a_node_asked_whether_the_old_connection_lives_goes_on(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    place.status = "alive"
    assert await connect(node, place) is True
    assert (await place.result()).completed is not None


async def test_a_node_with_a_connection_to_us_asks_whether_it_lives(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    async with called(place, node) as first:
        assert first.completed is not None
        await node.sees_hidden(Atom(place.identity.name))
        async with called(place, node) as second:
            assert StatusReceived("alive") in second.effects
            assert second.completed is not None
            await node.sees_hidden(Atom(place.identity.name))


async def test_a_node_refuses_us_without_mandatory_flags(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, cookie="right")
    async with called(place, node, flags=MANDATORY_FLAGS & ~DistributionFlag.MAP_TAG) as shaken:
        assert shaken.error is not None
        assert "does not allow us" in str(shaken.error)


async def test_a_node_under_another_name_than_called_is_noticed(place: Place, beam: Beams) -> None:
    node = await beam.start("erlang", cookie="right")
    async with called(place, node, peer=f"somebody_else@{LOOPBACK}") as shaken:
        assert shaken.error is not None
        assert str(node.name) in str(shaken.error)


async def test_a_node_without_a_name_is_refused(place: Place, beam: Beams, otp: int) -> None:
    node = await beam.start("erlang", otp=otp, name=f"undefined@{LOOPBACK}", cookie="right")
    assert await connect(node, place) is False
    error = (await place.result()).error
    assert error is not None
    assert "asks for a node name" in str(error)
