"""libcluster's gossip: packets, hostile packets, what is passed on, and gateways that find each other."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gater.cluster import gossip
from gater.cluster.connector import Connector
from gater.cluster.gossip import (
    EXESDB_ADDRESS,
    FLOOD_PAUSE_S,
    HINTS,
    LIBCLUSTER_ADDRESS,
    MAX_INTERVAL_S,
    MAX_NAMES,
    MAX_NEW_NAMES,
    MAX_PACKET_BYTES,
    MAX_PACKETS_PER_S,
    MAX_REPORTED_SENDERS,
    NEW_NAMES_PER_S,
    REPORT_EVERY_S,
    Gossip,
    GossipCodec,
    GossipOptions,
    Intake,
    NotHeartbeat,
    open_socket,
)
from gater.cluster.strategy import Strategy
from gater.erl import etf
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Atom, Term

CAPTURED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "captures" / "gossip.json").read_text())["packets"]
US = "gater@127.0.0.1"
PEER = "store@127.0.0.1"
SECRET = "dev_cluster_secret"
SENDER = "192.0.2.7"
DEADLINE_S = 15.0


async def eventually(condition: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


def reason_of(codec: GossipCodec, packet: bytes) -> str:
    with pytest.raises(NotHeartbeat) as caught:
        codec.decode(packet)
    assert caught.value.reason in HINTS
    return caught.value.reason


def plain(term: Term) -> bytes:
    return b"heartbeat::" + etf.encode(term)


# Packets


@pytest.mark.parametrize("captured", CAPTURED, ids=lambda each: f"{each['secret']}"[:6])
def test_packets_of_libcluster_name_their_node(captured: dict[str, Any]) -> None:
    packet = bytes.fromhex(captured["packet"])
    assert GossipCodec(captured["secret"]).decode(packet) == captured["node"]


@pytest.mark.parametrize("captured", CAPTURED, ids=lambda each: f"{each['secret']}"[:6])
def test_our_packets_have_the_shape_of_libclusters(captured: dict[str, Any]) -> None:
    """Byte for byte but for the tags of the atoms: OTP 26 and later write ours, and every OTP reads both."""
    packet = bytes.fromhex(captured["packet"])
    ours = GossipCodec(captured["secret"]).encode(captured["node"], iv=packet[:16])
    if captured["secret"]:
        assert ours[:16] == packet[:16]
        assert len(ours) == len(packet)
    else:
        assert ours.replace(b"w\x04node", b"d\0\x04node").replace(b"w\x13", b"d\0\x13") == packet


NAMES = st.from_regex(r"[0-9A-Za-z_-]{1,100}@[0-9A-Za-z_.:-]{1,100}", fullmatch=True)
SECRETS = st.one_of(st.none(), st.text(max_size=100))


@given(NAMES, SECRETS)
def test_what_is_encoded_decodes_to_the_same_name(name: str, secret: str | None) -> None:
    assert GossipCodec(secret).decode(GossipCodec(secret).encode(name)) == name


@given(NAMES, st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_another_secret_reads_nothing(name: str, ours: str, theirs: str) -> None:
    if ours != theirs:
        assert reason_of(GossipCodec(ours), GossipCodec(theirs).encode(name)) == "undecryptable"


def test_an_empty_secret_is_no_secret() -> None:
    assert not GossipCodec("").encrypts
    assert GossipCodec(None).decode(GossipCodec("").encode(PEER)) == PEER


def test_no_two_packets_are_encrypted_alike() -> None:
    codec = GossipCodec(SECRET)
    assert len({codec.encode(PEER) for _ in range(100)}) == 100


def test_a_message_of_whole_blocks_is_padded_by_a_whole_block() -> None:
    for length in range(1, 40):
        name = "n" * length + "@h"
        packet = GossipCodec(SECRET).encode(name)
        message = GossipCodec(None).encode(name)
        assert len(packet) == 16 + (len(message) // 16 + 1) * 16


def test_a_secret_that_is_not_utf8_in_the_environment_keeps_its_bytes() -> None:
    secret = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert GossipCodec(secret).decode(GossipCodec(secret).encode(PEER)) == PEER


def test_plain_and_encrypted_gossip_do_not_mix_as_in_libcluster() -> None:
    assert reason_of(GossipCodec(SECRET), GossipCodec(None).encode(PEER)) == "unencrypted"
    assert reason_of(GossipCodec(None), GossipCodec(SECRET).encode(PEER)) == "encrypted"


def test_a_plain_heartbeat_of_whole_blocks_is_told_from_an_encrypted_one() -> None:
    names = ["n" * length + "@h" for length in range(1, 20)]
    assert {reason_of(GossipCodec(SECRET), GossipCodec(None).encode(name)) for name in names} == {"unencrypted"}


NODE = Atom("node")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"heartbeat::",
        b"heartbeat::\x83",
        b"heartbeat:: " + etf.encode({NODE: Atom(PEER)}),
        plain([]),
        plain({}),
        plain({NODE: PEER.encode()}),
        plain({NODE: None}),
        plain({NODE: True}),
        plain({b"node": Atom(PEER)}),
        plain({NODE: Atom(PEER)}) + b"\0",
        plain({NODE: Atom(PEER)})[:-1],
        plain({NODE: Atom("nohost")}),
        plain({NODE: Atom("a@b@c")}),
        plain({NODE: Atom("a b@c")}),
        plain({NODE: Atom("a@b\nc")}),
        plain({NODE: Atom("a@b/../c")}),
        plain({NODE: Atom("a@\N{CYRILLIC SMALL LETTER A}.example")}),
        plain({NODE: Atom(PEER), **{Atom(f"a{number}"): 0 for number in range(30)}}),
        plain({NODE: Atom(PEER), b"more": b"x" * MAX_PACKET_BYTES}),
        b"heartbeat::" + etf.encode({NODE: Atom(PEER), b"more": b"x" * 100_000}, compressed=9),
        b"heartbeat::\x83" + b"l\0\0\0\1" * 290,
        b"heartbeat::\x83" + b"\x74\xff\xff\xff\xff" + b"j" * 100,
    ],
)
def test_a_plain_packet_that_names_no_node_is_malformed(packet: bytes) -> None:
    assert reason_of(GossipCodec(None), packet) == "malformed"


def test_more_keys_than_the_node_do_no_harm_as_in_libcluster() -> None:
    assert GossipCodec(None).decode(plain({NODE: Atom(PEER), Atom("vsn"): 2})) == PEER


@given(st.binary(max_size=200), SECRETS)
def test_whatever_comes_is_a_name_or_not_a_heartbeat(junk: bytes, secret: str | None) -> None:
    codec = GossipCodec(secret)
    for packet in (junk, b"heartbeat::" + junk, junk[: len(junk) // 16 * 16]):
        with contextlib.suppress(NotHeartbeat):
            codec.decode(packet)


@given(st.data(), st.sampled_from([None, SECRET]))
def test_a_packet_with_a_changed_bit_is_a_name_or_not_a_heartbeat(data: st.DataObject, secret: str | None) -> None:
    codec = GossipCodec(secret)
    packet = bytearray(codec.encode(PEER))
    bit = data.draw(st.integers(0, 8 * len(packet) - 1))
    packet[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(NotHeartbeat):
        codec.decode(bytes(packet))


# What is passed on


def an_intake(secret: str | None = SECRET) -> tuple[Intake, GossipCodec]:
    codec = GossipCodec(secret)
    return Intake(codec, US), codec


def test_a_name_is_passed_on_each_time_it_is_heard_and_our_own_never() -> None:
    intake, codec = an_intake()
    for second in range(5):
        assert intake.receive(codec.encode(PEER), SENDER, second).node == PEER
        assert intake.receive(codec.encode(US), SENDER, second).node is None
    assert intake.heartbeats == 10
    assert intake.names() == {PEER: 4}
    assert intake.ignored == {}


def test_a_wrong_secret_is_counted_and_reported_once_a_minute_with_the_senders() -> None:
    intake, _ = an_intake()
    wrong = GossipCodec("another").encode(PEER)
    reports = []
    for second in range(150):
        heard = intake.receive(wrong, f"192.0.2.{second % 3}", float(second))
        assert heard.node is None
        if heard.report is not None:
            reports.append((second, heard.report))
    assert [second for second, _ in reports] == [0, REPORT_EVERY_S, 2 * REPORT_EVERY_S]
    assert reports[0][1].packets == 1
    assert reports[0][1].senders == ("192.0.2.0",)
    assert reports[1][1].packets == REPORT_EVERY_S
    assert set(reports[1][1].senders) == {"192.0.2.0", "192.0.2.1", "192.0.2.2"}
    assert intake.ignored == {"undecryptable": 150}


def test_what_comes_after_a_report_is_reported_though_nothing_comes_any_more() -> None:
    intake, _ = an_intake()
    assert intake.reports(0.0) == []
    for second in range(3):
        intake.receive(GossipCodec("another").encode(PEER), f"192.0.2.{second}", float(second))
    assert intake.reports(REPORT_EVERY_S - 1) == []
    (report,) = intake.reports(REPORT_EVERY_S)
    assert (report.reason, report.packets, report.senders) == ("undecryptable", 2, ("192.0.2.1", "192.0.2.2"))
    assert intake.reports(10 * REPORT_EVERY_S) == []
    assert intake.receive(b"noise", SENDER, 10 * REPORT_EVERY_S).report is not None


def test_a_report_names_few_senders_however_many_there_were() -> None:
    intake, _ = an_intake()
    wrong = GossipCodec("another").encode(PEER)
    heard = [intake.receive(wrong, f"10.0.{number}.1", number * 0.25) for number in range(241)]
    (last,) = [each.report for each in heard[1:] if each.report is not None]
    assert len(last.senders) == MAX_REPORTED_SENDERS


def test_a_flood_of_packets_is_not_looked_at_but_the_rest_goes_on() -> None:
    intake, codec = an_intake()
    packet = codec.encode(PEER)
    heard = [intake.receive(packet, SENDER, 0.0) for _ in range(MAX_PACKETS_PER_S + 100)]
    assert sum(each.node == PEER for each in heard) == MAX_PACKETS_PER_S
    assert heard[-1].flooded
    assert intake.ignored == {"flood": 100}
    assert intake.receive(packet, SENDER, 1.0).node == PEER


def test_made_up_names_are_passed_on_slowly_while_known_ones_always_are() -> None:
    intake, codec = an_intake()
    assert intake.receive(codec.encode(PEER), SENDER, 0.0).node == PEER
    passed = 0
    for number in range(3000):
        now = number / 30
        passed += intake.receive(codec.encode(f"made_up_{number}@h"), SENDER, now).node is not None
        assert intake.receive(codec.encode(PEER), SENDER, now).node == PEER
    assert MAX_NEW_NAMES - 1 <= passed <= MAX_NEW_NAMES + 100 * NEW_NAMES_PER_S
    assert intake.ignored["names"] == 3000 - passed


def test_the_names_remembered_are_bounded_and_the_oldest_gives_way() -> None:
    intake, codec = an_intake()
    for number in range(MAX_NAMES + 10):
        at = number / NEW_NAMES_PER_S
        assert intake.receive(codec.encode(f"n{number}@h"), SENDER, at).node is not None
    names = intake.names()
    assert len(names) == MAX_NAMES
    assert "n0@h" not in names
    assert f"n{MAX_NAMES + 9}@h" in names


@given(st.lists(st.tuples(st.binary(max_size=64), st.integers(0, 50), st.floats(0, 100)), max_size=100))
def test_every_packet_is_counted_once(packets: list[tuple[bytes, int, float]]) -> None:
    intake, codec = an_intake()
    now = 0.0
    for packet, number, wait in packets:
        now += wait
        intake.receive(packet if number % 2 else codec.encode(f"n{number}@h"), SENDER, now)
    refused_names = intake.ignored["names"]
    assert intake.heartbeats - refused_names + sum(intake.ignored.values()) == len(packets)


# The strategy on loopback


class Wanted:
    """Takes every name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        assert source == "gossip"
        assert not forever
        self.names.append(peer)
        return True


class Eager(random.Random):
    """Heartbeats twenty times a second, so that tests need not wait."""

    def uniform(self, a: float, b: float) -> float:
        assert (a, b) == (gossip.MIN_INTERVAL_S, MAX_INTERVAL_S)
        return 0.05


def udp_port() -> int:
    chooser = random.Random()
    while True:
        port = chooser.randrange(12_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port


def multicast(port: int, secret: str | None = SECRET, address: str = EXESDB_ADDRESS, ttl: int = 1) -> GossipOptions:
    return GossipOptions(port=port, address=address, multicast_if="127.0.0.1", secret=secret, ttl=ttl)


def broadcast(port: int, secret: str | None = SECRET) -> GossipOptions:
    return GossipOptions(port=port, address="127.255.255.255", secret=secret)


@contextlib.asynccontextmanager
async def gossiping(name: str, options: GossipOptions, connector: Any = None) -> AsyncIterator[tuple[Gossip, Wanted]]:
    wanted = connector or Wanted()
    strategy: Strategy = Gossip(name, options, random=Eager())
    await strategy.start(wanted)
    try:
        assert isinstance(strategy, Gossip)
        yield strategy, wanted
    finally:
        await strategy.stop()


WAYS: list[Any] = [
    pytest.param(lambda port, secret: multicast(port, secret), id="multicast"),
    pytest.param(lambda port, secret: multicast(port, secret, ttl=0), id="multicast, TTL 0"),
    pytest.param(lambda port, secret: multicast(port, secret, LIBCLUSTER_ADDRESS), id="libcluster's address"),
    pytest.param(broadcast, id="broadcast"),
]


@pytest.mark.parametrize("secret", [SECRET, None], ids=["secret", "no secret"])
@pytest.mark.parametrize("way", WAYS)
async def test_two_gateways_hear_each_other(way: Callable[..., GossipOptions], secret: str | None) -> None:
    options = way(udp_port(), secret)
    async with gossiping(US, options) as (ours, we_want), gossiping(PEER, options) as (theirs, they_want):
        await eventually(lambda: PEER in we_want.names and US in they_want.names, "both heard")
        assert US not in we_want.names
        assert list(ours.status().names) == [PEER]
        assert ours.status().open
        assert ours.status().sent >= 1
        assert theirs.status().ignored == {}


def test_two_gateways_hear_each_other_on_uvloop() -> None:
    async def scenario() -> None:
        options = multicast(udp_port())
        async with gossiping(US, options) as (_, we_want), gossiping(PEER, options) as (_, they_want):
            await eventually(lambda: PEER in we_want.names and US in they_want.names, "both heard")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [("cats", "dogs", "undecryptable"), ("cats", None, "unencrypted"), (None, "dogs", "encrypted")],
)
@pytest.mark.parametrize("way", [multicast, broadcast])
async def test_another_secret_is_never_heard_but_counted_and_named_in_the_log(
    way: Callable[..., GossipOptions], ours: str | None, theirs: str | None, why: gossip.Reason
) -> None:
    port = udp_port()
    with capture_logs() as lines:
        async with gossiping(US, way(port, ours)) as (strategy, wanted), gossiping(PEER, way(port, theirs)):
            await eventually(lambda: strategy.status().ignored.get(why, 0) >= 5, "five packets ignored")
            assert wanted.names == []
    (line,) = [line for line in lines if line["event"] == "gossip_packets_ignored" and line["node"] == US]
    assert line["why"] == why
    assert line["hint"] == HINTS[why]
    assert line["senders"] == ["127.0.0.1"]
    assert not any(str(secret) in str(line) for secret in (ours, theirs) if secret)


async def test_ignored_packets_are_reported_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip, "REPORT_EVERY_S", 0.05)
    options = broadcast(udp_port(), None)
    with capture_logs() as lines, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        async with gossiping(US, options) as (strategy, _):
            for _ in range(2):
                sender.sendto(b"noise", ("127.0.0.1", options.port))

            def reported() -> int:
                return sum(line["packets"] for line in lines if line["event"] == "gossip_packets_ignored")

            await eventually(lambda: reported() == 2, "both to be reported")
            assert strategy.status().ignored == {"malformed": 2}


async def test_a_node_found_by_gossip_is_connected_and_found_again_after_its_restart() -> None:
    tcp_port, gossip_options = udp_port(), multicast(udp_port())
    options = NodeOptions(epmd_port=tcp_port)
    async with Node("found_a@127.0.0.1", cookie="c", options=options) as ours:
        connector = Connector(ours, retry_interval_s=0.2)
        connector.start()
        async with gossiping("found_a@127.0.0.1", gossip_options, connector):
            for _ in range(2):
                async with (
                    Node("found_b@127.0.0.1", cookie="c", options=options) as theirs,
                    gossiping("found_b@127.0.0.1", gossip_options),
                ):
                    await eventually(theirs.nodes, "connected")
                await eventually(lambda: not ours.nodes(), "disconnected")
        connector.stop()


async def test_a_network_that_is_not_there_is_logged_once_and_tried_until_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = 0

    def failing_at_first(options: GossipOptions) -> socket.socket:
        nonlocal attempts
        attempts += 1
        if attempts < 5:
            raise OSError(errno.ENODEV, "No such device")
        return open_socket(options)

    monkeypatch.setattr(gossip, "open_socket", failing_at_first)
    options = multicast(udp_port())
    with capture_logs() as lines:
        async with gossiping(US, options) as (strategy, wanted), gossiping(PEER, options):
            assert strategy.status().error == "No such device"
            await eventually(lambda: PEER in wanted.names, "heard at last")
            assert strategy.status().error is None
    events = [line["event"] for line in lines if line.get("log_level") != "debug"]
    assert events.count("gossip_works_again") == 2
    assert [line["reason"] for line in lines if line["event"] == "gossip_failed"] == ["No such device"] * 2


async def test_an_address_that_cannot_be_sent_to_is_logged_once_and_hearing_goes_on() -> None:
    """TEST-NET-1 is on no interface of ours; from a socket bound to loopback it cannot be reached."""
    port = udp_port()
    options = GossipOptions(port=port, bind="127.0.0.1", address="192.0.2.1", secret=SECRET)
    with capture_logs() as lines:
        async with gossiping(US, options) as (strategy, wanted):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(GossipCodec(SECRET).encode(PEER), ("127.0.0.1", port))
            await eventually(lambda: PEER in wanted.names, "heard")
            await eventually(lambda: strategy.status().error, "failed")
            assert strategy.status().open
    assert len([line for line in lines if line["event"] == "gossip_failed"]) == 1


async def test_a_flood_is_left_to_the_kernel_and_the_gossip_survives_it() -> None:
    port = udp_port()
    options = broadcast(port)
    async with gossiping(US, options) as (strategy, wanted):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:

            def flooded() -> int:
                for _ in range(100):
                    sender.sendto(b"x" * 100, ("127.0.0.1", port))
                return strategy.intake.ignored["flood"]

            await eventually(flooded, "flooded")
        async with gossiping(PEER, options):
            await eventually(lambda: PEER in wanted.names, "heard after the flood", within_s=DEADLINE_S + FLOOD_PAUSE_S)
        assert strategy.intake.ignored["malformed"] < 2 * MAX_PACKETS_PER_S


async def test_a_stopped_gossip_says_and_hears_nothing() -> None:
    options = broadcast(udp_port())
    async with gossiping(PEER, options) as (theirs, they_want):
        async with gossiping(US, options) as (ours, _):
            await eventually(lambda: US in they_want.names, "heard")
        sent, heard = ours.status().sent, len(they_want.names)
        before = theirs.status().sent
        await eventually(lambda: theirs.status().sent >= before + 3, "time passes")
        assert ours.status().sent == sent
        assert not ours.status().open
        assert len(they_want.names) <= heard + 1


async def test_the_first_heartbeat_is_sent_at_once_and_the_next_after_at_most_five_seconds() -> None:
    strategy = Gossip(US, broadcast(udp_port()), random=random.Random(1))
    await strategy.start(Wanted())
    assert strategy.status().sent == 1
    assert strategy._timer is not None
    assert 0 < strategy._timer.when() - asyncio.get_running_loop().time() <= MAX_INTERVAL_S
    await strategy.stop()


async def test_a_socket_bound_to_one_address_is_warned_about() -> None:
    with capture_logs() as lines:
        async with gossiping(US, GossipOptions(port=udp_port(), bind="127.0.0.1", multicast_if="127.0.0.1")):
            pass
    assert "gossip_bound_to_one_address" in [line["event"] for line in lines]


@pytest.mark.parametrize(
    ("address", "broadcast_only", "is_multicast"),
    [
        (EXESDB_ADDRESS, False, True),
        (LIBCLUSTER_ADDRESS, False, True),
        (EXESDB_ADDRESS, True, False),
        ("255.255.255.255", False, False),
        ("192.0.2.255", False, False),
    ],
)
def test_an_address_outside_the_multicast_range_is_broadcast(
    address: str, broadcast_only: bool, is_multicast: bool
) -> None:
    assert GossipOptions(address=address, broadcast_only=broadcast_only).multicast is is_multicast


@pytest.mark.parametrize(
    "wrong", [{"address": "x"}, {"bind": "::1"}, {"multicast_if": "eth0"}, {"port": 0}, {"ttl": 256}]
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"IPv4|octets|not permitted|a port is|Expected"):
        GossipOptions(**wrong)
