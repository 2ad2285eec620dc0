"""EPMD: messages, the server's state, and client and built-in server over real sockets, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from gater.erl import epmd
from gater.erl import epmd_protocol as protocol
from gater.erl.epmd import (
    BuiltinEpmd,
    EpmdPortInUse,
    EpmdProtocolError,
    EpmdUnavailable,
    NameTaken,
    lookup,
    names,
    register,
)
from gater.erl.epmd_protocol import (
    MAX_CONNECTIONS,
    MAX_NAMES,
    MAX_REQUEST_BYTES,
    Alive2Request,
    Close,
    DumpRequest,
    EpmdServer,
    Keep,
    KillRequest,
    NamesRequest,
    NodeEntry,
    NotRegistered,
    PortPlease2Request,
    Registered,
    Reply,
    Request,
    StopRequest,
    encode_alive2_response,
    encode_port2_response,
    name_fault,
    parse_alive2_response,
    parse_names_response,
    parse_port2_response,
    parse_request,
)
from gater.erl.errors import LocalProtocolError, NodeError, RemoteProtocolError

LOOPBACK = "127.0.0.1"
DEADLINE_S = 10.0

NAMES = st.text(min_size=1, max_size=60).filter(lambda name: name_fault(name) is None)
NODES = st.builds(
    NodeEntry,
    name=NAMES,
    port=st.integers(0, 65535),
    node_type=st.integers(0, 255),
    protocol=st.integers(0, 255),
    highest_version=st.integers(0, 65535),
    lowest_version=st.integers(0, 65535),
    extra=st.binary(max_size=20),
)
REQUESTS: st.SearchStrategy[Request] = st.one_of(
    st.builds(Alive2Request, NODES),
    st.builds(PortPlease2Request, NAMES),
    st.builds(StopRequest, NAMES),
    st.sampled_from([NamesRequest(), DumpRequest(), KillRequest()]),
)


# Messages


@given(REQUESTS)
def test_every_request_goes_there_and_back(request: Request) -> None:
    encoded = request.encode()
    assert int.from_bytes(encoded[:2], "big") == len(encoded) - 2
    assert parse_request(encoded[2:]) == request


def test_a_registration_has_the_bytes_of_the_document() -> None:
    request = Alive2Request(NodeEntry("gater", 0x1234))
    assert request.encode() == b"\0\22x\x12\x34\x48\0\0\6\0\6\0\5gater\0\0"


@given(st.binary(max_size=100))
def test_any_other_request_is_a_remote_error(content: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert parse_request(parse_request(content).encode()[2:]) == parse_request(content)


@pytest.mark.parametrize("length", range(1, 18))
def test_a_registration_that_ends_early_is_refused(length: int) -> None:
    content = Alive2Request(NodeEntry("gater", 1)).encode()[2:]
    with pytest.raises(RemoteProtocolError):
        parse_request(content[:length])


@given(NODES)
def test_an_answer_about_a_port_is_understood_when_it_is_whole_and_not_before(node: NodeEntry) -> None:
    encoded = encode_port2_response(node)
    assert parse_port2_response(encoded) == node
    assert all(parse_port2_response(encoded[:length]) is None for length in range(len(encoded)))


def test_an_unknown_name_is_answered_so() -> None:
    assert parse_port2_response(encode_port2_response(None)) == NotRegistered()


@pytest.mark.parametrize(("version", "size", "creation"), [(6, 6, 0xFFFFFFF0), (5, 4, 0xFFFFFFF0 % 3 + 1)])
def test_an_answer_to_a_registration_depends_on_the_version(version: int, size: int, creation: int) -> None:
    request = Alive2Request(NodeEntry("old", 1, highest_version=version, lowest_version=5))
    encoded = encode_alive2_response(request, 0xFFFFFFF0)
    assert len(encoded) == size
    assert parse_alive2_response(encoded) == Registered(creation)
    assert all(parse_alive2_response(encoded[:length]) is None for length in range(size))
    assert parse_alive2_response(encode_alive2_response(request, None)) == Registered(None)


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n", b"\0", b"v\0\0\0\0\0\0"])
def test_an_answer_no_epmd_gives_is_a_remote_error(garbage: bytes) -> None:
    for parse in (parse_alive2_response, parse_port2_response):
        with pytest.raises(RemoteProtocolError):
            parse(garbage)


@pytest.mark.parametrize("lengths", [b"\xff\xff", b"\0\1a\xff\xff"])
def test_lengths_beyond_the_limits_are_refused_before_the_bytes_come(lengths: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="MAX_"):
        parse_port2_response(b"w\0\x12\x34\x4d\0\0\6\0\6" + lengths)


def test_a_list_of_names_is_read() -> None:
    assert parse_names_response(b"\0\0\x11\x11name a at port 1\nname b at port 2\n") == (4369, {"a": 1, "b": 2})
    assert parse_names_response(b"\0\0\x11\x11") == (4369, {})


@pytest.mark.parametrize("garbage", [b"", b"\0\0", b"HTTP/1.1 400 Bad Request\r\n"])
def test_a_list_of_names_no_epmd_gives_is_a_remote_error(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_names_response(garbage)


@pytest.mark.parametrize("name", ["", "a@b", "a b", "a\nb", "x" * 256, "\ud800"])
def test_names_epmd_cannot_hold_are_our_own_mistake(name: str) -> None:
    for make in (lambda: NodeEntry(name, 1), lambda: PortPlease2Request(name), lambda: StopRequest(name)):
        with pytest.raises(LocalProtocolError):
            make()


def test_ports_and_extra_bytes_are_checked() -> None:
    with pytest.raises(LocalProtocolError):
        NodeEntry("a", 65536)
    with pytest.raises(LocalProtocolError):
        NodeEntry("a", 1, extra=bytes(protocol.MAX_EXTRA_BYTES + 1))


# The server's state


def server() -> EpmdServer:
    return EpmdServer(4369, first_creation=100)


def ask(state: EpmdServer, connection: int, request: Request, *, is_local: bool = True) -> list[Any]:
    assert state.connected(connection, is_local=is_local) == []
    return list(state.receive(connection, request.encode()))


def test_a_name_is_held_until_its_connection_ends() -> None:
    state = server()
    node = NodeEntry("gater", 5000)
    reply, keep = ask(state, 1, Alive2Request(node))
    assert parse_alive2_response(reply.data) == Registered(101)
    assert keep == Keep(node)
    assert ask(state, 2, PortPlease2Request("gater")) == [Reply(encode_port2_response(node)), Close()]
    state.disconnected(1)
    assert ask(state, 3, PortPlease2Request("gater")) == [Reply(encode_port2_response(None)), Close()]
    assert state.connection_count == 0


def test_a_taken_name_is_refused_and_free_again_later_with_another_creation() -> None:
    state = server()
    request = Alive2Request(NodeEntry("gater", 5000))
    ask(state, 1, request)
    refused, close = ask(state, 2, request)
    assert parse_alive2_response(refused.data) == Registered(None)
    assert "taken" in close.reason
    state.disconnected(1)
    reply, _ = ask(state, 3, request)
    assert parse_alive2_response(reply.data) == Registered(102)


def test_creations_stay_in_32_bits_and_above_those_of_old_nodes() -> None:
    state = EpmdServer(4369, first_creation=0xFFFFFFFE)
    creations = [
        parse_alive2_response(ask(state, number, Alive2Request(NodeEntry(f"n{number}", 1)))[0].data)
        for number in range(3)
    ]
    assert creations == [Registered(0xFFFFFFFF), Registered(4), Registered(5)]


def test_names_are_listed_for_everyone_and_dumped_for_this_machine() -> None:
    state = server()
    ask(state, 1, Alive2Request(NodeEntry("a", 1)))
    ask(state, 2, Alive2Request(NodeEntry("b", 2)))
    listing, _ = ask(state, 3, NamesRequest(), is_local=False)
    assert parse_names_response(listing.data) == (4369, {"a": 1, "b": 2})
    dump, _ = ask(state, 4, DumpRequest())
    assert b"active name     <b> at port 2, fd = 2\n" in dump.data
    (close,) = ask(state, 5, DumpRequest(), is_local=False)
    assert "another machine" in close.reason


def test_nobody_registers_from_another_machine() -> None:
    state = server()
    (close,) = ask(state, 1, Alive2Request(NodeEntry("a", 1)), is_local=False)
    assert "another machine" in close.reason
    assert state.nodes == {}


def test_kill_and_stop_change_nothing() -> None:
    state = server()
    ask(state, 1, Alive2Request(NodeEntry("a", 1)))
    assert ask(state, 2, KillRequest()) == [Reply(b"NO"), Close()]
    assert isinstance(ask(state, 3, StopRequest("a"))[0], Close)
    assert set(state.nodes) == {"a"}


def test_a_silent_connection_is_closed_and_a_name_holder_is_not() -> None:
    state = server()
    ask(state, 1, Alive2Request(NodeEntry("a", 1)))
    state.connected(2, is_local=True)
    assert state.timed_out(1) == []
    assert isinstance(state.timed_out(2)[0], Close)
    assert state.connection_count == 1


def test_a_name_holder_that_speaks_again_loses_its_name() -> None:
    state = server()
    ask(state, 1, Alive2Request(NodeEntry("a", 1)))
    assert isinstance(state.receive(1, b"x")[0], Close)
    assert state.nodes == {}


@pytest.mark.parametrize(
    "data", [b"\0\0", b"\xff\xff", b"\0\1?", b"\0\1nX", b"\0\3z\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_garbage_closes_the_connection_with_a_reason(data: bytes) -> None:
    state = server()
    state.connected(1, is_local=True)
    (close,) = state.receive(1, data)
    assert isinstance(close, Close)
    assert close.reason
    assert state.receive(1, b"more") == []


@given(REQUESTS, st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_a_request_may_come_in_pieces(request: Request, cuts: list[int]) -> None:
    whole, pieces = server(), server()
    pieces.connected(1, is_local=True)
    encoded = request.encode()
    effects: list[Any] = []
    position = index = 0
    while position < len(encoded):
        assert effects == []
        size = cuts[index % len(cuts)]
        effects = list(pieces.receive(1, encoded[position : position + size]))
        position, index = position + size, index + 1
    assert effects == ask(whole, 1, request)


def test_the_longest_request_allowed_is_taken() -> None:
    node = NodeEntry("\U0001f600" * 255, 1, extra=bytes(protocol.MAX_EXTRA_BYTES))
    encoded = Alive2Request(node).encode()
    assert len(encoded) == 2 + MAX_REQUEST_BYTES
    state = server()
    assert ask(state, 1, Alive2Request(node))[1] == Keep(node)


def test_names_and_connections_are_limited() -> None:
    state = server()
    for number in range(MAX_NAMES):
        assert len(ask(state, number, Alive2Request(NodeEntry(f"n{number}", 1)))) == 2
    refused, close = ask(state, MAX_NAMES, Alive2Request(NodeEntry("one_more", 1)))
    assert parse_alive2_response(refused.data) == Registered(None)
    assert "MAX_NAMES" in close.reason
    for number in range(MAX_NAMES, MAX_CONNECTIONS):
        assert state.connected(number, is_local=True) == []
    (overflow,) = state.connected(MAX_CONNECTIONS, is_local=True)
    assert isinstance(overflow, Close)
    assert "MAX_CONNECTIONS" in str(overflow.reason)
    state.disconnected(MAX_CONNECTIONS)
    assert state.connection_count == MAX_CONNECTIONS


# Over sockets


@contextlib.asynccontextmanager
async def builtin_epmd() -> AsyncIterator[BuiltinEpmd]:
    started = BuiltinEpmd()
    await started.start([LOOPBACK], 0)
    try:
        yield started
    finally:
        await started.close()


def on_both_loops(test: Callable[[BuiltinEpmd], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test with a built-in EPMD of its own, once on asyncio's loop and once on uvloop."""

    async def body() -> None:
        async with builtin_epmd() as builtin:
            await test(builtin)

    def on_one_loop(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        run(body())

    on_one_loop.__name__ = test.__name__
    loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
    marked: Callable[..., None] = loops(on_one_loop)
    return marked


@contextlib.asynccontextmanager
async def listener(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Something that listens on a port and answers as told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, LOOPBACK, 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # the condition is another object's state
            await asyncio.sleep(0.005)


@on_both_loops
async def test_a_node_registers_and_is_found(builtin: BuiltinEpmd) -> None:
    registration = await register("gater", 5000, epmd_port=builtin.port)
    assert registration.is_held
    assert registration.creation >= 4
    found = await lookup("gater", LOOPBACK, epmd_port=builtin.port)
    assert found == NodeEntry("gater", 5000, protocol.NODE_HIDDEN, 0, 6, 6)
    assert await names(LOOPBACK, epmd_port=builtin.port) == {"gater": 5000}
    assert await lookup("nobody", LOOPBACK, epmd_port=builtin.port) is None
    registration.close()
    await registration.wait_closed()
    await wait_for(lambda: not builtin.nodes)


@on_both_loops
async def test_a_visible_node_registers_as_such(builtin: BuiltinEpmd) -> None:
    registration = await register("seen", 1, epmd_port=builtin.port, hidden=False)
    assert builtin.nodes["seen"].node_type == protocol.NODE_NORMAL
    registration.close()


@on_both_loops
async def test_a_taken_name_is_told_in_one_sentence(builtin: BuiltinEpmd) -> None:
    registration = await register("gater", 5000, epmd_port=builtin.port)
    with pytest.raises(NameTaken, match="choose another name"):
        await register("gater", 5001, epmd_port=builtin.port)
    assert (await names(LOOPBACK, epmd_port=builtin.port)) == {"gater": 5000}
    registration.close()


async def test_the_loss_of_epmd_is_noticed_and_a_new_one_takes_the_name() -> None:
    first = BuiltinEpmd()
    await first.start([LOOPBACK], 0)
    lost = asyncio.Event()
    registration = await register("gater", 5000, epmd_port=first.port, on_lost=lost.set)
    await first.close()
    async with asyncio.timeout(DEADLINE_S):
        await lost.wait()
    assert not registration.is_held
    second = BuiltinEpmd()
    await second.start([LOOPBACK], first.port)
    again = await register("gater", 5000, epmd_port=second.port)
    assert set(second.nodes) == {"gater"}
    again.close()
    await second.close()


@on_both_loops
async def test_giving_a_name_up_is_not_a_loss(builtin: BuiltinEpmd) -> None:
    lost: list[bool] = []
    registration = await register("gater", 5000, epmd_port=builtin.port, on_lost=lambda: lost.append(True))
    registration.close()
    await registration.wait_closed()
    await wait_for(lambda: not builtin.nodes)
    assert lost == []


async def test_no_epmd_is_told_as_such() -> None:
    async with listener(_hang_up) as port:
        pass
    for attempt in (
        register("gater", 1, epmd_port=port),
        lookup("gater", LOOPBACK, epmd_port=port),
        names(LOOPBACK, epmd_port=port),
    ):
        with pytest.raises(EpmdUnavailable, match=f"EPMD at {LOOPBACK}:{port} cannot be reached"):
            await attempt


async def test_an_unknown_host_is_told_as_such() -> None:
    with pytest.raises(EpmdUnavailable, match=r"host\.invalid"):
        await lookup("gater", "host.invalid")


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def _speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def _flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    with contextlib.suppress(ConnectionError):
        writer.write(b"\0\0\x11\x11")
        while True:
            writer.write(b"name x at port 1\n" * 10_000)
            await writer.drain()


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read()


@pytest.mark.parametrize("answer", [_hang_up, _speak_http, _flood])
async def test_something_else_on_the_port_is_told_as_such(answer: Any) -> None:
    async with listener(answer) as port:
        for attempt in (
            register("gater", 1, epmd_port=port),
            lookup("gater", LOOPBACK, epmd_port=port),
            names(LOOPBACK, epmd_port=port),
        ):
            with pytest.raises(EpmdProtocolError):
                await attempt


async def test_an_epmd_that_says_nothing_is_given_up() -> None:
    async with listener(_say_nothing) as port:
        for attempt in (
            register("gater", 1, epmd_port=port, timeout_s=0.05),
            lookup("gater", LOOPBACK, epmd_port=port, timeout_s=0.05),
            names(LOOPBACK, epmd_port=port, timeout_s=0.05),
        ):
            with pytest.raises(EpmdUnavailable, match="did not answer in"):
                await attempt


async def test_a_port_held_by_something_else_is_told_as_such() -> None:
    async with listener(_hang_up) as port:
        second = BuiltinEpmd()
        with pytest.raises(EpmdPortInUse, match=str(port)):
            await second.start([LOOPBACK], port)


def test_every_failure_is_a_node_error() -> None:
    for error in (EpmdUnavailable, EpmdProtocolError, NameTaken, EpmdPortInUse):
        assert issubclass(error, NodeError)


async def test_a_connection_that_asks_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epmd, "IDLE_TIMEOUT_S", 0.05)
    async with builtin_epmd() as builtin:
        registration = await register("gater", 5000, epmd_port=builtin.port)
        reader, writer = await asyncio.open_connection(LOOPBACK, builtin.port)
        writer.write(b"\0")
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
        assert registration.is_held
        registration.close()


async def test_it_listens_on_several_addresses_with_one_port() -> None:
    started = BuiltinEpmd()
    await started.start([LOOPBACK, "127.0.0.2"], 0)
    registration = await register("gater", 5000, epmd_port=started.port)
    assert await names("127.0.0.2", epmd_port=started.port) == {"gater": 5000}
    registration.close()
    await started.close()


@on_both_loops
async def test_many_ask_at_once(builtin: BuiltinEpmd) -> None:
    registrations = await asyncio.gather(*(register(f"n{i}", i, epmd_port=builtin.port) for i in range(50)))
    assert len({each.creation for each in registrations}) == 50
    found = await asyncio.gather(*(lookup(f"n{i}", LOOPBACK, epmd_port=builtin.port) for i in range(50)))
    assert [node.port for node in found if node is not None] == list(range(50))
    for each in registrations:
        each.close()


@pytest.mark.parametrize(
    ("peer", "own", "local"),
    [
        (("127.0.0.1", 1), ("127.0.0.1", 2), True),
        (("127.8.9.10", 1), ("127.0.0.1", 2), True),
        (("::1", 1, 0, 0), ("::1", 2, 0, 0), True),
        (("::ffff:127.0.0.1", 1, 0, 0), ("::", 2, 0, 0), True),
        (("10.0.0.5", 1), ("10.0.0.5", 2), True),
        (("10.0.0.6", 1), ("10.0.0.5", 2), False),
        (("fe80::1%eth0", 1, 0, 0), ("fe80::2%eth0", 2, 0, 0), False),
        (None, None, False),
    ],
)
def test_who_counts_as_this_machine(peer: Any, own: Any, local: bool) -> None:
    class Transport:
        def get_extra_info(self, name: str) -> Any:
            return {"peername": peer, "sockname": own}[name]

    transport: Any = Transport()
    assert epmd._is_local(transport) is local
