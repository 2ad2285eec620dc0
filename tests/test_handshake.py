"""The handshake machine: both sides wired to each other, and each side against a peer that breaks the rules."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import md5
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.errors import AuthenticationError, HandshakeError, LocalProtocolError
from gater.erl.handshake import (
    HEADER_FLAGS,
    MANDATORY_25_FLAGS,
    MANDATORY_FLAGS,
    MAX_HANDSHAKE_PACKET_BYTES,
    MAX_NODE_NAME_CHARACTERS,
    OUR_FLAGS,
    Completed,
    ConnectionYielded,
    DistributionFlag,
    Effect,
    Handshake,
    LocalIdentity,
    PeerNamed,
    Send,
    State,
    StatusReceived,
    digest,
    flag_names,
    node_name_fault,
    pick_simultaneous,
)

ALICE = LocalIdentity("alice@127.0.0.1", OUR_FLAGS, 11)
BOB = LocalIdentity("bob@127.0.0.1", OUR_FLAGS | HEADER_FLAGS, 22)


def initiator(cookie: str = "secret", *, peer: str = BOB.name) -> Handshake:
    return Handshake("initiator", ALICE, challenge=0x01020304, cookie=cookie, peer_name=peer)


def acceptor() -> Handshake:
    return Handshake("acceptor", BOB, challenge=0xFFFFFFFF)


def sent(effects: list[Effect]) -> bytes:
    return b"".join(effect.data for effect in effects if isinstance(effect, Send))


def packet(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def name_packet(name: bytes = b"alice@127.0.0.1", flags: int = OUR_FLAGS, creation: int = 11) -> bytes:
    return packet(b"N" + flags.to_bytes(8, "big") + creation.to_bytes(4, "big") + len(name).to_bytes(2, "big") + name)


def challenge_packet(
    name: bytes = b"bob@127.0.0.1", flags: int = OUR_FLAGS, challenge: int = 7, creation: int = 22
) -> bytes:
    numbers = flags.to_bytes(8, "big") + challenge.to_bytes(4, "big") + creation.to_bytes(4, "big")
    return packet(b"N" + numbers + len(name).to_bytes(2, "big") + name)


class Pair:
    """An initiator and an acceptor with a wire between them that cuts the bytes as told."""

    def __init__(
        self,
        *,
        status: str = "ok",
        alive_answer: bool = True,
        initiator_cookie: str = "secret",
        acceptor_cookie: str = "secret",
        cuts: list[int] | None = None,
        tamper: tuple[str, int, int] | None = None,
    ) -> None:
        self.initiator = initiator(initiator_cookie)
        self.acceptor = acceptor()
        self.status: Any = status
        self.alive_answer = alive_answer
        self.acceptor_cookie = acceptor_cookie
        self.cuts = cuts or [1 << 20]
        self.taken = 0
        self.tamper = tamper
        self.sent_to = {"initiator": 0, "acceptor": 0}
        self.seen: dict[Handshake, list[Effect]] = {self.initiator: [], self.acceptor: []}
        self.wire: dict[Handshake, bytearray] = {self.initiator: bytearray(), self.acceptor: bytearray()}

    def run(self) -> None:
        self.carry_out(self.acceptor, self.acceptor.start())
        self.carry_out(self.initiator, self.initiator.start())
        while any(self.wire.values()):
            for machine, waiting in self.wire.items():
                if waiting:
                    size = self.cuts[self.taken % len(self.cuts)]
                    self.taken += 1
                    chunk = bytes(waiting[:size])
                    del waiting[:size]
                    self.carry_out(machine, machine.receive(chunk))

    def carry_out(self, machine: Handshake, effects: list[Effect]) -> None:
        other = self.acceptor if machine is self.initiator else self.initiator
        for effect in effects:
            self.seen[machine].append(effect)
            match effect:
                case Send(data):
                    self.put_on_wire(other, data)
                case PeerNamed():
                    self.carry_out(machine, machine.accept(self.status, self.acceptor_cookie))
                case StatusReceived("alive"):
                    self.carry_out(machine, machine.confirm_alive(self.alive_answer))

    def put_on_wire(self, receiver: Handshake, data: bytes) -> None:
        """`tamper` is (role of the receiver, which byte on the way to it, the value it gets)."""
        role = "initiator" if receiver is self.initiator else "acceptor"
        start = self.sent_to[role]
        self.sent_to[role] += len(data)
        changed = bytearray(data)
        if self.tamper is not None and self.tamper[0] == role and 0 <= self.tamper[1] - start < len(data):
            changed[self.tamper[1] - start] = self.tamper[2]
        self.wire[receiver] += changed

    def completed(self, machine: Handshake) -> Completed | None:
        return next((effect for effect in self.seen[machine] if isinstance(effect, Completed)), None)


@pytest.mark.parametrize("status", ["ok", "ok_simultaneous", "alive"])
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_both_sides_complete_however_the_stream_is_cut(status: str, cuts: list[int]) -> None:
    pair = Pair(status=status, cuts=cuts)
    pair.run()
    common = ALICE.flags & BOB.flags
    assert pair.completed(pair.initiator) == Completed(BOB.name, common, BOB.flags, 22)
    assert pair.completed(pair.acceptor) == Completed(ALICE.name, common, ALICE.flags, 11)
    assert StatusReceived(status) in pair.seen[pair.initiator]
    assert pair.initiator.leftover == pair.acceptor.leftover == b""


def test_both_sides_complete_byte_by_byte() -> None:
    pair = Pair(cuts=[1])
    pair.run()
    assert pair.initiator.state is pair.acceptor.state is State.DONE


def test_the_bytes_are_those_of_the_protocol_document() -> None:
    machine = acceptor()
    machine.start()
    assert initiator().start() == [Send(name_packet())]
    assert machine.receive(name_packet()) == [PeerNamed("alice@127.0.0.1", OUR_FLAGS, 11)]
    challenge = challenge_packet(flags=BOB.flags, challenge=0xFFFFFFFF)
    assert sent(machine.accept("ok", "secret")) == b"\0\3sok" + challenge
    reply = packet(b"r\1\2\3\4" + md5(b"secret4294967295").digest())
    assert sent(machine.receive(reply)) == packet(b"a" + md5(b"secret16909060").digest())


def test_an_initiator_wants_a_status_even_if_the_challenge_comes_in_the_same_chunk() -> None:
    machine = initiator()
    machine.start()
    effects = machine.receive(b"\0\3sok" + challenge_packet())
    assert effects[0] == StatusReceived("ok")
    assert sent(effects) == packet(b"r\1\2\3\4" + digest("secret", 7))


@given(st.binary(max_size=3000))
def test_bytes_behind_the_handshake_belong_to_the_connection(behind: bytes) -> None:
    machine = initiator()
    machine.start()
    machine.receive(b"\0\3sok" + challenge_packet())
    acknowledgement = packet(b"a" + digest("secret", 0x01020304))
    assert isinstance(machine.receive(acknowledgement + behind)[-1], Completed)
    assert machine.leftover == behind
    with pytest.raises(LocalProtocolError):
        machine.receive(b"more")


def test_alive_and_the_old_connection_lives_ends_both_sides() -> None:
    pair = Pair(status="alive", alive_answer=False)
    with pytest.raises(HandshakeError, match="keeps the connection that is already up"):
        pair.run()
    assert pair.initiator.state is pair.acceptor.state is State.FAILED
    assert pair.completed(pair.initiator) is None


def test_nok_tells_the_initiator_that_the_other_attempt_is_kept() -> None:
    pair = Pair(status="nok")
    with pytest.raises(ConnectionYielded, match="its attempt is kept"):
        pair.run()


def test_not_allowed_is_told_to_the_initiator() -> None:
    pair = Pair(status="not_allowed")
    with pytest.raises(HandshakeError, match="does not allow us"):
        pair.run()


@pytest.mark.parametrize("cookies", [("wrong", "secret"), ("secret", "wrong")])
def test_a_wrong_cookie_is_noticed_by_the_acceptor_first(cookies: tuple[str, str]) -> None:
    pair = Pair(initiator_cookie=cookies[0], acceptor_cookie=cookies[1])
    with pytest.raises(AuthenticationError, match="another cookie") as raised:
        pair.run()
    assert pair.acceptor.state is State.FAILED
    assert pair.completed(pair.acceptor) is None
    assert "wrong" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_an_initiator_notices_an_acceptor_that_does_not_know_the_cookie() -> None:
    machine = initiator()
    machine.start()
    machine.receive(b"\0\3sok" + challenge_packet())
    with pytest.raises(AuthenticationError, match=r"bob@127\.0\.0\.1"):
        machine.receive(packet(b"a" + digest("wrong", 0x01020304)))


def test_an_acceptor_that_is_refused_for_its_name_learns_which_name_was_called() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match=r"calls itself 'eve@127\.0\.0\.1'"):
        machine.receive(b"\0\3sok" + challenge_packet(name=b"eve@127.0.0.1"))


def test_missing_mandatory_flags_are_named_and_the_peer_is_told() -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match=r"lacks MAP_TAG, V4_NC; it has to run OTP 25") as raised:
        machine.receive(name_packet(flags=MANDATORY_FLAGS & ~(DistributionFlag.MAP_TAG | DistributionFlag.V4_NC)))
    assert "alice@127.0.0.1" in str(raised.value)
    assert machine.farewell == b"\0\14snot_allowed"


def test_an_initiator_refuses_an_acceptor_without_mandatory_flags() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match="lacks UNLINK_ID"):
        machine.receive(b"\0\3sok" + challenge_packet(flags=MANDATORY_FLAGS & ~DistributionFlag.UNLINK_ID))


def test_the_digest_flag_stands_for_the_flags_of_otp_25() -> None:
    machine = acceptor()
    machine.start()
    offered = DistributionFlag.MANDATORY_25_DIGEST | DistributionFlag.V4_NC | DistributionFlag.UNLINK_ID
    (named,) = machine.receive(name_packet(flags=offered))
    assert isinstance(named, PeerNamed)
    assert named.flags == offered | MANDATORY_25_FLAGS


def test_flags_of_releases_to_come_are_kept_and_ignored() -> None:
    machine = acceptor()
    machine.start()
    (named,) = machine.receive(name_packet(flags=OUR_FLAGS | 1 << 60))
    assert isinstance(named, PeerNamed)
    assert named.flags & (1 << 60)


def test_bytes_behind_the_name_in_its_packet_are_ignored_for_releases_to_come() -> None:
    machine = acceptor()
    machine.start()
    content = name_packet()[2:] + b"more fields"
    assert isinstance(machine.receive(packet(content))[0], PeerNamed)


def test_the_name_message_of_version_5_is_refused_with_advice() -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match="upgrade the peer"):
        machine.receive(packet(b"n\0\5\0\0\0\0alice@127.0.0.1"))
    assert machine.farewell == b"\0\14snot_allowed"


def test_a_challenge_of_version_5_is_refused_with_advice() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match="handshake version 5"):
        machine.receive(b"\0\3sok" + packet(b"n\0\5\0\0\0\0\0\0\0\0bob@127.0.0.1"))


def test_a_peer_that_wants_to_be_named_is_refused_and_told() -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match="asks for a node name"):
        machine.receive(name_packet(name=b"127.0.0.1", flags=OUR_FLAGS | DistributionFlag.NAME_ME))
    assert machine.farewell == b"\0\14snot_allowed"


def test_an_initiator_does_not_let_itself_be_renamed() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match="wants to give us a name"):
        machine.receive(packet(b"snamed:\0\3a@b\0\0\0\1"))


@pytest.mark.parametrize(
    "name", [b"", b"alice", b"@host", b"alice@", b"a@b@c", b"a" * MAX_NODE_NAME_CHARACTERS + b"@h", b"a\nb@h", b"a b@h"]
)
def test_a_peer_without_a_proper_name_is_refused(name: bytes) -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match="the peer's name"):
        machine.receive(name_packet(name=name))


def test_a_name_in_latin_1_arrives_as_it_was_meant() -> None:
    machine = acceptor()
    machine.start()
    (named,) = machine.receive(name_packet(name="zoë@höst".encode("latin-1")))
    assert isinstance(named, PeerNamed)
    assert named.name == "zoë@höst"


@given(st.binary(max_size=200), st.sampled_from(["initiator", "acceptor"]))
def test_garbage_raises_a_handshake_error_or_waits_for_more(garbage: bytes, role: str) -> None:
    machine = initiator() if role == "initiator" else acceptor()
    machine.start()
    try:
        effects = machine.receive(garbage)
    except HandshakeError:
        assert machine.state is State.FAILED
    else:
        assert not sent(effects)
        assert machine.state is not State.DONE


@given(position=st.integers(0, 80), value=st.integers(0, 255), towards=st.sampled_from(["initiator", "acceptor"]))
def test_a_changed_byte_is_noticed_or_harmless(position: int, value: int, towards: str) -> None:
    pair = Pair(cuts=[1], tamper=(towards, position, value))
    try:
        pair.run()
    except HandshakeError:
        return
    for machine in (pair.initiator, pair.acceptor):
        done = pair.completed(machine)
        assert done is None or (node_name_fault(done.peer_name) is None and done.peer_flags & MANDATORY_FLAGS)


@pytest.mark.parametrize("start", [b"\0\0", b"\xff\xff", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_a_length_no_packet_has_is_refused_at_once(start: bytes) -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match="MAX_HANDSHAKE_PACKET_BYTES"):
        machine.receive(start)


@pytest.mark.parametrize("length", range(2, 16))
def test_a_packet_that_ends_early_is_refused(length: int) -> None:
    machine = acceptor()
    machine.start()
    with pytest.raises(HandshakeError, match=r"at least 15 bytes|a name of 15 bytes"):
        machine.receive(packet(name_packet()[2 : 2 + length]))


def test_a_peer_that_talks_instead_of_waiting_for_the_status_is_cut_off() -> None:
    machine = acceptor()
    machine.start()
    machine.receive(name_packet())
    machine.receive(bytes(MAX_HANDSHAKE_PACKET_BYTES))
    with pytest.raises(HandshakeError, match="came before our answer"):
        machine.receive(b"x")


def test_a_status_nobody_knows_is_an_error() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match="unknown status 'maybe'"):
        machine.receive(packet(b"smaybe"))


def test_an_answer_to_alive_that_is_neither_true_nor_false_is_an_error() -> None:
    machine = acceptor()
    machine.start()
    machine.receive(name_packet())
    machine.accept("alive", "secret")
    with pytest.raises(HandshakeError, match="true or false was expected, 'ok' came"):
        machine.receive(packet(b"sok"))


@pytest.mark.parametrize("wrong", [b"x", b"r\1\2\3\4short", b"r" + bytes(21), b"a" + bytes(16)])
def test_a_malformed_reply_is_an_error(wrong: bytes) -> None:
    machine = acceptor()
    machine.start()
    machine.receive(name_packet())
    machine.accept("ok", "secret")
    with pytest.raises(HandshakeError, match="challenge reply"):
        machine.receive(packet(wrong))


@pytest.mark.parametrize("wrong", [b"x", b"a", b"a" + bytes(17)])
def test_a_malformed_acknowledgement_is_an_error(wrong: bytes) -> None:
    machine = initiator()
    machine.start()
    machine.receive(b"\0\3sok" + challenge_packet())
    with pytest.raises(HandshakeError, match="acknowledgement"):
        machine.receive(packet(wrong))


def test_anything_but_a_status_after_our_name_is_an_error() -> None:
    machine = initiator()
    machine.start()
    with pytest.raises(HandshakeError, match=r"status message \(s\) was expected"):
        machine.receive(challenge_packet())


def test_the_greater_name_wins_when_both_connect_at_once() -> None:
    assert pick_simultaneous("b@h", "a@h") == pick_simultaneous("a@h", "b@h") == "b@h"


def test_a_stalled_handshake_says_what_it_waited_for() -> None:
    machine = initiator()
    machine.start()
    assert "status" in machine.describe_stall()
    machine.receive(b"\0\3sok" + challenge_packet())
    assert "another cookie" in machine.describe_stall()
    silent = acceptor()
    silent.start()
    assert "nothing at all" in silent.describe_stall()
    silent.receive(name_packet())
    silent.accept("ok", "secret")
    assert "refuses our flags" in silent.describe_stall()


def test_methods_called_at_the_wrong_time_are_our_own_mistake() -> None:
    machine = acceptor()
    calls: list[Callable[[], object]] = [
        lambda: machine.receive(b""),
        lambda: machine.accept("ok", "x"),
        lambda: machine.confirm_alive(True),
    ]
    for call in calls:
        with pytest.raises(LocalProtocolError):
            call()
    machine.start()
    with pytest.raises(LocalProtocolError):
        machine.start()
    machine.receive(name_packet())
    with pytest.raises(LocalProtocolError):
        machine.confirm_alive(True)
    with pytest.raises(LocalProtocolError):
        machine.accept("ok")


def test_an_initiators_owner_cannot_accept() -> None:
    machine = initiator()
    machine.start()
    machine.receive(packet(b"salive"))
    with pytest.raises(LocalProtocolError):
        machine.accept("ok", "secret")


@pytest.mark.parametrize(
    "arguments",
    [
        {"role": "initiator", "challenge": 1},
        {"role": "initiator", "challenge": 1, "cookie": "x", "peer_name": "nohost"},
        {"role": "acceptor", "challenge": 1, "cookie": "x"},
        {"role": "acceptor", "challenge": 1 << 32},
    ],
)
def test_a_machine_is_not_made_with_arguments_that_cannot_work(arguments: dict[str, Any]) -> None:
    role = arguments.pop("role")
    with pytest.raises(LocalProtocolError):
        Handshake(role, ALICE, **arguments)


def test_an_identity_is_checked() -> None:
    with pytest.raises(LocalProtocolError):
        LocalIdentity("nohost", OUR_FLAGS, 1)
    with pytest.raises(LocalProtocolError):
        LocalIdentity("a@b", OUR_FLAGS, 1 << 32)


def test_a_cookie_outside_latin_1_is_our_own_mistake_and_not_shown() -> None:
    with pytest.raises(LocalProtocolError) as raised:
        digest("пароль", 1)
    assert "пароль" not in str(raised.value)


def test_our_flags_are_those_of_a_hidden_node_that_every_supported_release_accepts() -> None:
    assert MANDATORY_FLAGS & ~OUR_FLAGS == 0
    assert not OUR_FLAGS & (DistributionFlag.PUBLISHED | DistributionFlag.NAME_ME)
    assert not OUR_FLAGS & HEADER_FLAGS


def test_flags_have_names_for_people() -> None:
    assert flag_names(DistributionFlag.MAP_TAG | DistributionFlag.ALIAS) == "MAP_TAG, ALIAS"
    assert flag_names(0) == "none"


@given(st.text(max_size=300))
def test_a_name_without_fault_can_be_sent(name: str) -> None:
    if node_name_fault(name) is None:
        name.encode("latin-1")
        assert LocalIdentity(name, OUR_FLAGS, 1).name == name
