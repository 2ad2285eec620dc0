"""Control messages: every one there and back, and every field of the wrong type named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl import control
from gater.erl.control import MESSAGES, AltActFlag, ControlMessage, SpawnOptions, parse, parse_spawn_options
from gater.erl.errors import RemoteProtocolError
from gater.erl.terms import Atom, ImproperList, Pid, Reference

PID = Pid(Atom("a@127.0.0.1"), 1, 2, 3)
OTHER = Pid(Atom("b@127.0.0.1"), 4, 5, 6)
REF = Reference(Atom("a@127.0.0.1"), 3, (1, 2, 3))
NAME = Atom("net_kernel")
MFA = (Atom("erlang"), Atom("apply"), 2)
TOKEN = (1, 2, 3, 4, 5)

EXAMPLES: list[tuple[tuple[Any, ...], ControlMessage]] = [
    ((1, PID, OTHER), control.Link(PID, OTHER)),
    ((2, Atom(""), PID), control.Send(control.UNUSED, PID)),
    ((3, PID, OTHER, Atom("normal")), control.Exit(PID, OTHER, Atom("normal"))),
    ((4, PID, OTHER), control.Unlink(PID, OTHER)),
    ((5,), control.NodeLink()),
    ((6, PID, Atom(""), NAME), control.RegSend(PID, control.UNUSED, NAME)),
    ((7, PID, OTHER), control.GroupLeader(PID, OTHER)),
    ((8, PID, OTHER, [1]), control.Exit2(PID, OTHER, [1])),
    ((12, Atom(""), PID, TOKEN), control.SendTT(control.UNUSED, PID, TOKEN)),
    ((13, PID, OTHER, TOKEN, 1), control.ExitTT(PID, OTHER, TOKEN, 1)),
    ((16, PID, Atom(""), NAME, TOKEN), control.RegSendTT(PID, control.UNUSED, NAME, TOKEN)),
    ((18, PID, OTHER, TOKEN, 1), control.Exit2TT(PID, OTHER, TOKEN, 1)),
    ((19, PID, OTHER, REF), control.MonitorP(PID, OTHER, REF)),
    ((19, PID, NAME, REF), control.MonitorP(PID, NAME, REF)),
    ((20, PID, True, REF), control.DemonitorP(PID, True, REF)),
    ((21, NAME, PID, REF, Atom("noproc")), control.MonitorPExit(NAME, PID, REF, Atom("noproc"))),
    ((22, PID, OTHER), control.SendSender(PID, OTHER)),
    ((23, PID, OTHER, TOKEN), control.SendSenderTT(PID, OTHER, TOKEN)),
    ((24, PID, OTHER), control.PayloadExit(PID, OTHER)),
    ((25, PID, OTHER, TOKEN), control.PayloadExitTT(PID, OTHER, TOKEN)),
    ((26, PID, OTHER), control.PayloadExit2(PID, OTHER)),
    ((27, PID, OTHER, TOKEN), control.PayloadExit2TT(PID, OTHER, TOKEN)),
    ((28, OTHER, PID, REF), control.PayloadMonitorPExit(OTHER, PID, REF)),
    ((29, REF, PID, PID, MFA, []), control.SpawnRequest(REF, PID, PID, MFA, [])),
    ((30, REF, PID, PID, MFA, [], TOKEN), control.SpawnRequestTT(REF, PID, PID, MFA, [], TOKEN)),
    ((31, REF, PID, 3, OTHER), control.SpawnReply(REF, PID, 3, OTHER)),
    ((32, REF, PID, 0, Atom("badopt"), TOKEN), control.SpawnReplyTT(REF, PID, 0, Atom("badopt"), TOKEN)),
    ((33, PID, REF), control.AliasSend(PID, REF)),
    ((34, PID, REF, TOKEN), control.AliasSendTT(PID, REF, TOKEN)),
    ((35, 7, PID, OTHER), control.UnlinkId(7, PID, OTHER)),
    ((36, 2**64 - 1, PID, OTHER), control.UnlinkIdAck(2**64 - 1, PID, OTHER)),
    ((37, 4, PID, REF), control.AltActSigSend(4, PID, REF)),
    ((37, 1 + 2 + 8, PID, NAME, TOKEN), control.AltActSigSend(1 + 2 + 8, PID, NAME, TOKEN)),
    ((37, 16, PID, OTHER), control.AltActSigSend(16, PID, OTHER)),
]

WITH_PAYLOAD = {2, 6, 12, 16, 22, 23, 24, 25, 26, 27, 28, 29, 30, 33, 34, 37}


@pytest.mark.parametrize(("term", "message"), EXAMPLES, ids=lambda each: getattr(type(each), "__name__", ""))
def test_every_message_goes_there_and_back(term: tuple[Any, ...], message: ControlMessage) -> None:
    parsed = parse(term)
    assert parsed == message
    assert type(parsed) is type(message)
    assert message.to_term() == term


def test_there_is_an_example_of_every_message() -> None:
    assert {message.OPCODE for _, message in EXAMPLES} == set(MESSAGES)


def test_the_opcode_constants_are_those_of_the_classes() -> None:
    constants = {value for name, value in vars(control).items() if name.startswith("OP_")}
    assert constants == set(MESSAGES)


def test_payload_follows_where_the_document_says_so() -> None:
    assert {opcode for opcode, message in MESSAGES.items() if message.has_payload} == WITH_PAYLOAD


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        control.Link(PID, OTHER).from_pid = OTHER  # type: ignore[misc]


@pytest.mark.parametrize(
    ("term", "complaint"),
    [
        ((22, PID, [1]), "SendSender: to_pid is a pid, a list came"),
        ((22, NAME, PID), "SendSender: from_pid is a pid, the atom 'net_kernel' came"),
        ((19, PID, 5, REF), "MonitorP: to_proc is a pid or an atom, an integer came"),
        ((33, PID, PID), "AliasSend: alias is a reference, a pid came"),
        ((35, True, PID, OTHER), "UnlinkId: id is an integer, the atom 'true' came"),
        ((35, 0, PID, OTHER), "UnlinkId: id is 1 to MAX_UNLINK_ID"),
        ((36, 2**64, PID, OTHER), "UnlinkIdAck: id is 1 to MAX_UNLINK_ID"),
        ((29, REF, PID, PID, (1, 2, 3), []), "SpawnRequest: mfa is {Module, Function, Arity}"),
        ((29, REF, PID, PID, MFA[:2], []), "SpawnRequest: mfa is {Module, Function, Arity}"),
        ((29, REF, PID, PID, (*MFA[:2], 256), []), "SpawnRequest: mfa is {Module, Function, Arity}"),
        ((29, REF, PID, PID, MFA, ImproperList([1], 2)), "SpawnRequest: opt_list is a list, another term came"),
        ((22, PID), "SendSender is a tuple of 3 elements, one of 2 came"),
        ((22, PID, PID, 1), "SendSender is a tuple of 3 elements, one of 4 came"),
        ((37, 0, PID), "AltActSigSend is a tuple of at least 4 elements"),
        ((37, AltActFlag.ALIAS.value, PID, PID), "AltActSigSend: to is a reference under these flags"),
        ((37, AltActFlag.NAME.value, PID, PID), "AltActSigSend: to is an atom under these flags"),
        ((37, 0, PID, REF), "AltActSigSend: to is a pid under these flags"),
        ((37, AltActFlag.TOKEN.value, PID, PID), "AltActSigSend: the flags promise a token"),
        ((9, PID), "no control message has the opcode 9"),
        ((10**400,), "no control message has the opcode an integer"),
        ((True, PID, OTHER), "no control message has the opcode the atom 'true'"),
        ((1.0, PID, OTHER), "no control message has the opcode a float"),
        (([],), "no control message has the opcode a list"),
        ((), "a control message is a tuple, a tuple came"),
        (b"x", "a control message is a tuple, a binary came"),
    ],
)
def test_what_a_peer_may_not_send_is_named(term: Any, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        parse(term)
    assert complaint in str(raised.value)


def test_elements_that_later_releases_append_to_altact_are_ignored() -> None:
    assert parse((37, 0, PID, OTHER, TOKEN, 1, 2)) == control.AltActSigSend(0, PID, OTHER)


TERMS = st.recursive(
    st.one_of(
        st.integers(),
        st.booleans(),
        st.none(),
        st.binary(max_size=4),
        st.sampled_from([PID, OTHER, REF, NAME, MFA]),
        st.floats(allow_nan=False),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner)),
    max_leaves=5,
)


@given(st.integers(0, 40), st.lists(TERMS, max_size=7))
def test_any_tuple_is_a_message_that_goes_back_or_a_remote_error(opcode: int, values: list[Any]) -> None:
    term = (opcode, *values)
    try:
        message = parse(term)
    except RemoteProtocolError:
        return
    back = message.to_term()
    assert back == term[: len(back)]


def atoms(*names: str) -> list[Any]:
    return [Atom(name) for name in names]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], SpawnOptions()),
        (atoms("link", "monitor"), SpawnOptions(link=True, monitor=True)),
        ([(Atom("monitor"), [])], SpawnOptions(monitor=True)),
        ([(Atom("reply"), Atom("no"))], SpawnOptions(reply="no")),
        ([(Atom("reply"), Atom("no")), (Atom("reply"), Atom("error_only"))], SpawnOptions(reply="error_only")),
        ([(Atom("priority"), Atom("high")), (Atom("fullsweep_after"), 0)], SpawnOptions()),
        ([(Atom("reply"), Atom("perhaps"))], None),
        ([(Atom("reply"), 1)], None),
        ([(Atom("link"), True)], None),
        (atoms("reply"), None),
        (atoms("priority"), None),
        (atoms("nonsense"), None),
        ([1], None),
        ([(1, 2, 3)], None),
        (atoms("link") * 65, None),
    ],
)
def test_spawn_options_are_read_or_bad(options: list[Any], expected: SpawnOptions | None) -> None:
    assert parse_spawn_options(options) == expected


@pytest.mark.parametrize(
    ("mode", "on_success", "on_error"),
    [("yes", True, True), ("no", False, False), ("error_only", False, True), ("success_only", True, False)],
)
def test_a_spawn_reply_is_sent_when_it_is_wanted(mode: Any, on_success: bool, on_error: bool) -> None:
    options = SpawnOptions(reply=mode)
    assert options.wants_reply(succeeded=True) is on_success
    assert options.wants_reply(succeeded=False) is on_error
