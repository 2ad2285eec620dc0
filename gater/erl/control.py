"""Control messages of the distribution protocol: the tuple that precedes a message between two connected nodes.

Follows the ERTS user's guide, "Distribution Protocol", sections "Protocol between Connected Nodes" and the "New
Ctrlmessages" of later releases; one class per message with the document's field names, in the document's order. The
types of the fields are checked here; what a message does is the node's business, and turning bytes into tuples is that
of `etf.py`.

A node routes its hot messages by `match control[0]` on the `OP_..` constants and reads the fields by position; `parse`
is for everything else, and gives every malformed message one clear error.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints

from gater.erl.errors import RemoteProtocolError
from gater.erl.terms import Atom, Pid, Reference, Term, atom_name

OP_LINK: Final = 1
OP_SEND: Final = 2
OP_EXIT: Final = 3
OP_UNLINK: Final = 4
OP_NODE_LINK: Final = 5
OP_REG_SEND: Final = 6
OP_GROUP_LEADER: Final = 7
OP_EXIT2: Final = 8
OP_SEND_TT: Final = 12
OP_EXIT_TT: Final = 13
OP_REG_SEND_TT: Final = 16
OP_EXIT2_TT: Final = 18
OP_MONITOR_P: Final = 19
OP_DEMONITOR_P: Final = 20
OP_MONITOR_P_EXIT: Final = 21
OP_SEND_SENDER: Final = 22
OP_SEND_SENDER_TT: Final = 23
OP_PAYLOAD_EXIT: Final = 24
OP_PAYLOAD_EXIT_TT: Final = 25
OP_PAYLOAD_EXIT2: Final = 26
OP_PAYLOAD_EXIT2_TT: Final = 27
OP_PAYLOAD_MONITOR_P_EXIT: Final = 28
OP_SPAWN_REQUEST: Final = 29
OP_SPAWN_REQUEST_TT: Final = 30
OP_SPAWN_REPLY: Final = 31
OP_SPAWN_REPLY_TT: Final = 32
OP_ALIAS_SEND: Final = 33
OP_ALIAS_SEND_TT: Final = 34
OP_UNLINK_ID: Final = 35
OP_UNLINK_ID_ACK: Final = 36
OP_ALTACT_SIG_SEND: Final = 37

UNUSED: Final = Atom("")
"""What stands in the fields called `Unused`, where a cookie once was."""

MAX_OPCODE: Final = 255
"""No release has used an opcode above 37; an error message does not repeat a larger integer from a peer."""

MAX_UNLINK_ID: Final = 2**64 - 1
"""Unlink identifiers are 1 to 2^64-1."""

MAX_ARITY: Final = 255
"""The most arguments a function has (`MAX_ARG` in `erl_vm.h`)."""

AtomTerm: TypeAlias = Atom | bool | None
"""Any atom: `true`, `false` and `nil` are Python values of their own."""

ProcessTerm: TypeAlias = Pid | Atom | bool | None
"""A pid, or the registered name of a process."""


class SpawnReplyFlag(enum.IntFlag):
    """What was set up for the requester together with the new process (`SPAWN_REPLY`)."""

    LINK = 1
    MONITOR = 2


class AltActFlag(enum.IntFlag):
    """Bits of `ALTACT_SIG_SEND`."""

    PRIO = 1
    """A priority message (EEP 76)."""
    TOKEN = 2
    """The tuple has a fifth element, a trace token."""
    ALIAS = 4
    """`to` is an alias."""
    NAME = 8
    """`to` is a registered name."""
    EXIT = 16
    """The payload is an exit reason, not a message."""


class ControlMessage:
    """What all control messages have in common."""

    __slots__ = ()

    OPCODE: ClassVar[int]
    has_payload: ClassVar[bool] = False
    """Whether a second term (message, reason, arguments) follows the control message."""

    def to_term(self) -> tuple[Term, ...]:
        """The tuple to send."""
        return (self.OPCODE, *_FORMATS[self.OPCODE].values_of(self))


@dataclass(frozen=True, slots=True)
class Link(ControlMessage):
    """`{1, FromPid, ToPid}`: link the two."""

    OPCODE: ClassVar[int] = OP_LINK
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class Send(ControlMessage):
    """`{2, Unused, ToPid}`, then the message."""

    OPCODE: ClassVar[int] = OP_SEND
    has_payload: ClassVar[bool] = True
    unused: Term
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class Exit(ControlMessage):
    """`{3, FromPid, ToPid, Reason}`: a link broke."""

    OPCODE: ClassVar[int] = OP_EXIT
    from_pid: Pid
    to_pid: Pid
    reason: Term


@dataclass(frozen=True, slots=True)
class Unlink(ControlMessage):
    """`{4, FromPid, ToPid}`: the old way to unlink; peers with `UNLINK_ID` do not send it."""

    OPCODE: ClassVar[int] = OP_UNLINK
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class NodeLink(ControlMessage):
    """`{5}`: obsolete, to be ignored."""

    OPCODE: ClassVar[int] = OP_NODE_LINK


@dataclass(frozen=True, slots=True)
class RegSend(ControlMessage):
    """`{6, FromPid, Unused, ToName}`, then the message for the process registered as `to_name`."""

    OPCODE: ClassVar[int] = OP_REG_SEND
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    unused: Term
    to_name: AtomTerm


@dataclass(frozen=True, slots=True)
class GroupLeader(ControlMessage):
    """`{7, FromPid, ToPid}`: `from_pid` becomes the group leader of `to_pid`."""

    OPCODE: ClassVar[int] = OP_GROUP_LEADER
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class Exit2(ControlMessage):
    """`{8, FromPid, ToPid, Reason}`: `exit(ToPid, Reason)`."""

    OPCODE: ClassVar[int] = OP_EXIT2
    from_pid: Pid
    to_pid: Pid
    reason: Term


@dataclass(frozen=True, slots=True)
class SendTT(ControlMessage):
    """`{12, Unused, ToPid, TraceToken}`, then the message."""

    OPCODE: ClassVar[int] = OP_SEND_TT
    has_payload: ClassVar[bool] = True
    unused: Term
    to_pid: Pid
    trace_token: Term


@dataclass(frozen=True, slots=True)
class ExitTT(ControlMessage):
    """`{13, FromPid, ToPid, TraceToken, Reason}`."""

    OPCODE: ClassVar[int] = OP_EXIT_TT
    from_pid: Pid
    to_pid: Pid
    trace_token: Term
    reason: Term


@dataclass(frozen=True, slots=True)
class RegSendTT(ControlMessage):
    """`{16, FromPid, Unused, ToName, TraceToken}`, then the message."""

    OPCODE: ClassVar[int] = OP_REG_SEND_TT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    unused: Term
    to_name: AtomTerm
    trace_token: Term


@dataclass(frozen=True, slots=True)
class Exit2TT(ControlMessage):
    """`{18, FromPid, ToPid, TraceToken, Reason}`."""

    OPCODE: ClassVar[int] = OP_EXIT2_TT
    from_pid: Pid
    to_pid: Pid
    trace_token: Term
    reason: Term


@dataclass(frozen=True, slots=True)
class MonitorP(ControlMessage):
    """`{19, FromPid, ToProc, Ref}`: `from_pid` monitors `to_proc`; an unknown one is answered with `noproc` at once."""

    OPCODE: ClassVar[int] = OP_MONITOR_P
    from_pid: Pid
    to_proc: ProcessTerm
    ref: Reference


@dataclass(frozen=True, slots=True)
class DemonitorP(ControlMessage):
    """`{20, FromPid, ToProc, Ref}`: the monitor ends."""

    OPCODE: ClassVar[int] = OP_DEMONITOR_P
    from_pid: Pid
    to_proc: ProcessTerm
    ref: Reference


@dataclass(frozen=True, slots=True)
class MonitorPExit(ControlMessage):
    """`{21, FromProc, ToPid, Ref, Reason}`: the monitored process ended; `from_proc` is what was monitored."""

    OPCODE: ClassVar[int] = OP_MONITOR_P_EXIT
    from_proc: ProcessTerm
    to_pid: Pid
    ref: Reference
    reason: Term


@dataclass(frozen=True, slots=True)
class SendSender(ControlMessage):
    """`{22, FromPid, ToPid}`, then the message; takes the place of `SEND` under `DFLAG_SEND_SENDER`."""

    OPCODE: ClassVar[int] = OP_SEND_SENDER
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class SendSenderTT(ControlMessage):
    """`{23, FromPid, ToPid, TraceToken}`, then the message."""

    OPCODE: ClassVar[int] = OP_SEND_SENDER_TT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid
    trace_token: Term


@dataclass(frozen=True, slots=True)
class PayloadExit(ControlMessage):
    """`{24, FromPid, ToPid}`, then the reason; takes the place of `EXIT` under `DFLAG_EXIT_PAYLOAD`."""

    OPCODE: ClassVar[int] = OP_PAYLOAD_EXIT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class PayloadExitTT(ControlMessage):
    """`{25, FromPid, ToPid, TraceToken}`, then the reason."""

    OPCODE: ClassVar[int] = OP_PAYLOAD_EXIT_TT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid
    trace_token: Term


@dataclass(frozen=True, slots=True)
class PayloadExit2(ControlMessage):
    """`{26, FromPid, ToPid}`, then the reason; takes the place of `EXIT2`."""

    OPCODE: ClassVar[int] = OP_PAYLOAD_EXIT2
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class PayloadExit2TT(ControlMessage):
    """`{27, FromPid, ToPid, TraceToken}`, then the reason."""

    OPCODE: ClassVar[int] = OP_PAYLOAD_EXIT2_TT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    to_pid: Pid
    trace_token: Term


@dataclass(frozen=True, slots=True)
class PayloadMonitorPExit(ControlMessage):
    """`{28, FromProc, ToPid, Ref}`, then the reason; takes the place of `MONITOR_P_EXIT`."""

    OPCODE: ClassVar[int] = OP_PAYLOAD_MONITOR_P_EXIT
    has_payload: ClassVar[bool] = True
    from_proc: ProcessTerm
    to_pid: Pid
    ref: Reference


@dataclass(frozen=True, slots=True)
class SpawnRequest(ControlMessage):
    """`{29, ReqId, From, GroupLeader, {Module, Function, Arity}, OptList}`, then the list of arguments.

    `req_id` is also the reference of the monitor, if one is asked for. `opt_list` is read by `parse_spawn_options`.
    """

    OPCODE: ClassVar[int] = OP_SPAWN_REQUEST
    has_payload: ClassVar[bool] = True
    req_id: Reference
    from_pid: Pid
    group_leader: Pid
    mfa: tuple[Any, ...]
    opt_list: list[Any]


@dataclass(frozen=True, slots=True)
class SpawnRequestTT(ControlMessage):
    """`{30, ReqId, From, GroupLeader, {Module, Function, Arity}, OptList, Token}`, then the list of arguments."""

    OPCODE: ClassVar[int] = OP_SPAWN_REQUEST_TT
    has_payload: ClassVar[bool] = True
    req_id: Reference
    from_pid: Pid
    group_leader: Pid
    mfa: tuple[Any, ...]
    opt_list: list[Any]
    token: Term


@dataclass(frozen=True, slots=True)
class SpawnReply(ControlMessage):
    """`{31, ReqId, To, Flags, Result}`: `result` is the new pid, or an atom that says why there is none.

    `flags` are `SpawnReplyFlag`s.
    """

    OPCODE: ClassVar[int] = OP_SPAWN_REPLY
    req_id: Reference
    to: Pid
    flags: int
    result: ProcessTerm


@dataclass(frozen=True, slots=True)
class SpawnReplyTT(ControlMessage):
    """`{32, ReqId, To, Flags, Result, Token}`."""

    OPCODE: ClassVar[int] = OP_SPAWN_REPLY_TT
    req_id: Reference
    to: Pid
    flags: int
    result: ProcessTerm
    token: Term


@dataclass(frozen=True, slots=True)
class AliasSend(ControlMessage):
    """`{33, FromPid, Alias}`, then the message; dropped when the alias is no longer active."""

    OPCODE: ClassVar[int] = OP_ALIAS_SEND
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    alias: Reference


@dataclass(frozen=True, slots=True)
class AliasSendTT(ControlMessage):
    """`{34, FromPid, Alias, Token}`, then the message."""

    OPCODE: ClassVar[int] = OP_ALIAS_SEND_TT
    has_payload: ClassVar[bool] = True
    from_pid: Pid
    alias: Reference
    token: Term


@dataclass(frozen=True, slots=True)
class UnlinkId(ControlMessage):
    """`{35, Id, FromPid, ToPid}`: unlink; must be answered with `UnlinkIdAck(id, to_pid, from_pid)`.

    `id` is unique among the unlinks of that pair of processes (section "New Link Protocol").
    """

    OPCODE: ClassVar[int] = OP_UNLINK_ID
    id: int
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class UnlinkIdAck(ControlMessage):
    """`{36, Id, FromPid, ToPid}`: `from_pid` has seen the `UNLINK_ID` of `to_pid`."""

    OPCODE: ClassVar[int] = OP_UNLINK_ID_ACK
    id: int
    from_pid: Pid
    to_pid: Pid


@dataclass(frozen=True, slots=True)
class AltActSigSend(ControlMessage):
    """`{37, Flags, SenderPid, To}` or `{37, Flags, SenderPid, To, Token}`, then the message or exit reason.

    OTP 28, under `DFLAG_ALTACT_SIG`. `flags` are `AltActFlag`s; `to` is a pid, a name or an alias, as they say; `token`
    counts only with `AltActFlag.TOKEN`. More elements may follow in later releases and are to be ignored.
    """

    OPCODE: ClassVar[int] = OP_ALTACT_SIG_SEND
    has_payload: ClassVar[bool] = True
    flags: int
    sender_pid: Pid
    to: Pid | Reference | Atom | bool | None
    token: Term = None

    def to_term(self) -> tuple[Term, ...]:
        """The tuple to send: of five elements with `AltActFlag.TOKEN`, else of four."""
        head = (OP_ALTACT_SIG_SEND, self.flags, self.sender_pid, self.to)
        return (*head, self.token) if self.flags & AltActFlag.TOKEN else head


@dataclass(frozen=True, slots=True)
class _Format:
    """One row of the table: how the tuple of one opcode becomes a message and back.

    `arity` counts the opcode. `allowed` holds for each field (its position in the tuple, the Python types it may have).
    """

    message: type[ControlMessage]
    arity: int
    names: tuple[str, ...]
    allowed: tuple[tuple[int, frozenset[type]], ...]

    def values_of(self, message: ControlMessage) -> list[Term]:
        return [getattr(message, name) for name in self.names]


def _format(message: type[ControlMessage]) -> _Format:
    hints = get_type_hints(message)
    names = tuple(field.name for field in fields(message))  # type: ignore[arg-type]  # every message is a dataclass
    allowed = []
    for position, name in enumerate(names, start=1):
        hint = hints[name]
        if hint is Any:
            continue
        alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        allowed.append((position, frozenset(get_origin(each) or each for each in alternatives)))
    return _Format(message, 1 + len(names), names, tuple(allowed))


_ALL: Final[tuple[type[ControlMessage], ...]] = (
    Link,
    Send,
    Exit,
    Unlink,
    NodeLink,
    RegSend,
    GroupLeader,
    Exit2,
    SendTT,
    ExitTT,
    RegSendTT,
    Exit2TT,
    MonitorP,
    DemonitorP,
    MonitorPExit,
    SendSender,
    SendSenderTT,
    PayloadExit,
    PayloadExitTT,
    PayloadExit2,
    PayloadExit2TT,
    PayloadMonitorPExit,
    SpawnRequest,
    SpawnRequestTT,
    SpawnReply,
    SpawnReplyTT,
    AliasSend,
    AliasSendTT,
    UnlinkId,
    UnlinkIdAck,
    AltActSigSend,
)
_FORMATS: Final[dict[int, _Format]] = {message.OPCODE: _format(message) for message in _ALL}

MESSAGES: Final[Mapping[int, type[ControlMessage]]] = MappingProxyType(
    {opcode: each.message for opcode, each in _FORMATS.items()}
)
"""The class of each opcode."""


_TYPE_NAMES: Final[dict[type, str]] = {
    Pid: "a pid",
    Reference: "a reference",
    Atom: "an atom",
    bool: "an atom",
    type(None): "an atom",
    int: "an integer",
    float: "a float",
    bytes: "a binary",
    list: "a list",
    tuple: "a tuple",
}


def parse(control: Term) -> ControlMessage:
    """The message of a control tuple.

    Raises RemoteProtocolError, naming the message and the field, for anything a peer has no right to send.
    """
    if type(control) is not tuple or not control:
        raise RemoteProtocolError(f"a control message is a tuple, {_kind(control)} came")
    opcode = control[0]
    layout = _FORMATS.get(opcode) if type(opcode) is int else None
    if layout is None:
        shown = opcode if type(opcode) is int and 0 <= opcode <= MAX_OPCODE else _kind(opcode)
        raise RemoteProtocolError(f"no control message has the opcode {shown}")
    if opcode == OP_ALTACT_SIG_SEND:
        return _parse_altact(control)
    if len(control) != layout.arity:
        raise RemoteProtocolError(
            f"{layout.message.__name__} is a tuple of {layout.arity} elements, one of {len(control)} came"
        )
    _check(layout, control)
    if opcode in (OP_SPAWN_REQUEST, OP_SPAWN_REQUEST_TT):
        _check_mfa(layout, control[4])
    elif opcode in (OP_UNLINK_ID, OP_UNLINK_ID_ACK) and not 1 <= control[1] <= MAX_UNLINK_ID:
        raise RemoteProtocolError(f"{layout.message.__name__}: id is 1 to MAX_UNLINK_ID ({MAX_UNLINK_ID})")
    return layout.message(*control[1:])


def _check(layout: _Format, control: tuple[Term, ...]) -> None:
    for position, types in layout.allowed:
        if type(control[position]) not in types:
            expected = " or ".join(sorted({_TYPE_NAMES[each] for each in types}))
            raise RemoteProtocolError(
                f"{layout.message.__name__}: {layout.names[position - 1]} is {expected}, "
                f"{_kind(control[position])} came"
            )


def _check_mfa(layout: _Format, mfa: tuple[Term, ...]) -> None:
    if (
        len(mfa) != 3
        or atom_name(mfa[0]) is None
        or atom_name(mfa[1]) is None
        or type(mfa[2]) is not int
        or not 0 <= mfa[2] <= MAX_ARITY
    ):
        raise RemoteProtocolError(f"{layout.message.__name__}: mfa is {{Module, Function, Arity}}")


def _parse_altact(control: tuple[Term, ...]) -> AltActSigSend:
    layout = _FORMATS[OP_ALTACT_SIG_SEND]
    if len(control) < 4:
        raise RemoteProtocolError(f"AltActSigSend is a tuple of at least 4 elements, one of {len(control)} came")
    _check(layout, control)
    flags, sender_pid, to = control[1:4]
    wanted = Reference if flags & AltActFlag.ALIAS else Atom if flags & AltActFlag.NAME else Pid
    if type(to) is not wanted and not (wanted is Atom and atom_name(to) is not None):
        raise RemoteProtocolError(f"AltActSigSend: to is {_TYPE_NAMES[wanted]} under these flags, {_kind(to)} came")
    if not flags & AltActFlag.TOKEN:
        return AltActSigSend(flags, sender_pid, to)
    if len(control) < 5:
        raise RemoteProtocolError("AltActSigSend: the flags promise a token, none came")
    return AltActSigSend(flags, sender_pid, to, control[4])


def _kind(term: Term) -> str:
    """What to call a term of a peer in an error, whatever its size."""
    name = atom_name(term)
    return f"the atom {name!r}" if name is not None else _TYPE_NAMES.get(type(term), "another term")


SpawnReplyMode: TypeAlias = Literal["yes", "no", "error_only", "success_only"]


@dataclass(frozen=True, slots=True)
class SpawnOptions:
    """What the option list of a `SPAWN_REQUEST` asks for.

    `link`, `monitor`: set these up before the process runs. `reply`: when to send a `SPAWN_REPLY` (`error_only`: only
    when the process could not be started).
    """

    link: bool = False
    monitor: bool = False
    reply: SpawnReplyMode = "yes"

    def wants_reply(self, succeeded: bool) -> bool:
        return self.reply == "yes" or self.reply == ("success_only" if succeeded else "error_only")


MAX_SPAWN_OPTIONS: Final = 64
"""`spawn_request` knows about a dozen options; a peer may repeat some, not fill our time with them."""

_HEAP_OPTIONS: Final = frozenset(
    {
        "priority",
        "max_heap_size",
        "min_heap_size",
        "min_bin_vheap_size",
        "fullsweep_after",
        "message_queue_data",
        "async_dist",
        "scheduler",
        "reply_tag",
    }
)
_REPLY_MODES: Final[Mapping[str, SpawnReplyMode]] = MappingProxyType(
    {"yes": "yes", "no": "no", "error_only": "error_only", "success_only": "success_only"}
)


def parse_spawn_options(opt_list: list[Term]) -> SpawnOptions | None:
    """The options of a spawn request, or None if the answer is the error `badopt`.

    Options of `erlang:spawn_request/5`: `link`; `monitor`, `{monitor, MonitorOpts}`; `{reply, yes | no | error_only |
    success_only}`. Those that tune a BEAM process (`{priority, _}`, `{fullsweep_after, _}`, ..) are accepted and mean
    nothing here. As with `proplists`, the last of several wins.
    """
    if len(opt_list) > MAX_SPAWN_OPTIONS:
        return None
    link = monitor = False
    reply: SpawnReplyMode = "yes"
    for option in opt_list:
        name, value = option if type(option) is tuple and len(option) == 2 else (option, None)
        match atom_name(name):
            case "link" if name is option:
                link = True
            case "monitor" if name is option or type(value) is list:
                monitor = True
            case "reply" if name is not option:
                mode = _REPLY_MODES.get(atom_name(value) or "")
                if mode is None:
                    return None
                reply = mode
            case str(tuning) if tuning in _HEAP_OPTIONS and name is not option:
                pass
            case _:
                return None
    return SpawnOptions(link, monitor, reply)
