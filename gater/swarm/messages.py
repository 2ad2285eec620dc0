"""What Swarm trackers say to each other and what is asked of one: the values, and their terms on the wire.

Read from Swarm 3.4 (`lib/swarm/tracker/tracker.ex`, `lib/swarm/tracker/entry.ex`) and seen in `swarm_tracker_a.json`
and `_b.json`. This is the only place where the shapes of that protocol are spelled; names are Swarm's.

Left to others: what a message means (`tracker.py`) and who carries it (`peer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from gater.erl.errors import RemoteProtocolError, shown
from gater.erl.terms import Atom, Pid, Term, TermMap
from gater.swarm import clock as itc
from gater.swarm.clock import Clock
from gater.swarm.registry import NO_META, Entry, Meta, name_key

TRACKER: Final = Atom("Elixir.Swarm.Tracker")
"""The name that every tracker is registered under."""

MFA: Final = Atom("mfa")
"""The property that says how a process placed by Swarm is started: `{Module, Function, Args}`."""

_GEN_CAST: Final = Atom("$gen_cast")
_ENTRY: Final = Atom("entry")
_EVENT: Final = Atom("event")
_SYNC: Final = Atom("sync")
_SYNC_RECV: Final = Atom("sync_recv")
_SYNC_ACK: Final = Atom("sync_ack")
_SYNC_ERR: Final = Atom("sync_err")
_HANDOFF: Final = Atom("handoff")
_TRACK: Final = Atom("track")
_UNTRACK: Final = Atom("untrack")
_UPDATE_META: Final = Atom("update_meta")
_WHEREIS: Final = Atom("whereis")
_ADD_META: Final = Atom("add_meta")
_REMOVE_META: Final = Atom("remove_meta")
_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")
_ALREADY_REGISTERED: Final = Atom("already_registered")

NODE_IGNORED: Final = Atom("node_ignored")
NO_NODE_AVAILABLE: Final = Atom("no_node_available")
TOO_MANY_ATTEMPTS: Final = Atom("too_many_attempts")
OVERLOADED: Final = Atom("overloaded")
UNDEFINED: Final = Atom("undefined")
UNDEF: Final = Atom("undef")
NOPROC: Final = Atom("noproc")
NODEDOWN: Final = Atom("nodedown")


@dataclass(frozen=True, slots=True)
class Track:
    """`{track, Name, Pid, Meta}`: a change told to the members, or asked of a tracker."""

    name: Term
    pid: Pid
    meta: Meta


@dataclass(frozen=True, slots=True)
class Untrack:
    """`{untrack, Pid}`: every name of the process goes."""

    pid: Pid


@dataclass(frozen=True, slots=True)
class UpdateMeta:
    """`{update_meta, Meta, Pid}`: the new properties of every name of the process."""

    meta: Meta
    pid: Pid


Change: TypeAlias = Track | Untrack | UpdateMeta


@dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """`{event, Tracker, Clock, Change}`, a plain message to the tracker of each member."""

    sender: Pid
    clock: Clock
    change: Change


@dataclass(frozen=True, slots=True)
class Sync:
    """`{sync, Tracker, Clock}`: tell me your registry."""

    sender: Pid
    clock: Clock


class Entries(Protocol):
    """The entries of a registry, which may be looked at once only."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Term]: ...


@dataclass(frozen=True, slots=True)
class SyncRecv:
    """`{sync_recv, Tracker, Clock, Registry}`: the answer to `sync`; the clock is the receiver's from now on.

    `entries` are `Entry` values in what we send. In what we receive they are still terms, because a registry of 10^5
    names is to be looked at in pieces: `entry_from_term` takes either.
    """

    sender: Pid
    clock: Clock
    entries: Entries


@dataclass(frozen=True, slots=True)
class SyncAck:
    """`{sync_ack, Tracker, Clock, Registry}`: the registry of who asked, after it has taken over the answer."""

    sender: Pid
    clock: Clock
    entries: Entries


@dataclass(frozen=True, slots=True)
class SyncErr:
    """`{sync_err, Reason}`: no."""

    reason: Term


@dataclass(frozen=True, slots=True)
class Handoff:
    """`{handoff, Tracker, {Name, Meta, State, Clock}}`: start this process where you are, with this state."""

    sender: Pid
    name: Term
    meta: Meta
    state: Term
    clock: Clock


Message: TypeAlias = ReplicaEvent | Sync | SyncRecv | SyncAck | SyncErr | Handoff


@dataclass(frozen=True, slots=True)
class Whereis:
    """`{whereis, Name}`; answered by the pid or `undefined`."""

    name: Term


@dataclass(frozen=True, slots=True)
class StartAndTrack:
    """`{track, Name, Meta}` with an `mfa` in the meta: start the process where the name belongs."""

    name: Term
    meta: Meta


@dataclass(frozen=True, slots=True)
class AddMeta:
    """`{add_meta, Key, Value, Pid}`."""

    key: Term
    value: Term
    pid: Pid


@dataclass(frozen=True, slots=True)
class RemoveMeta:
    """`{remove_meta, Key, Pid}`."""

    key: Term
    pid: Pid


@dataclass(frozen=True, slots=True)
class HandOver:
    """`{handoff, Name, State}`: move this process of ours to the member that comes next."""

    name: Term
    state: Term


@dataclass(frozen=True, slots=True)
class UntrackName:
    """Forget one name of a process and keep its others; Swarm has no word for it: only our own code asks."""

    name: Term


Request: TypeAlias = Whereis | Track | StartAndTrack | Untrack | AddMeta | RemoveMeta | HandOver | UntrackName


def ok(pid: Pid) -> Term:
    """`{ok, Pid}`: the reply to a registration."""
    return (_OK, pid)


def done() -> Term:
    """`ok`: the reply to what cannot fail."""
    return _OK


def finished() -> Term:
    """`finished`: the reply to a handoff that was asked for."""
    return Atom("finished")


def error(reason: Term) -> Term:
    """`{error, Reason}`."""
    return (_ERROR, reason)


def already_registered(pid: Pid) -> Term:
    """`{error, {already_registered, Pid}}`."""
    return (_ERROR, (_ALREADY_REGISTERED, pid))


def registered_elsewhere(reason: Term) -> Pid | None:
    """The pid in a reason `{already_registered, Pid}`."""
    match reason:
        case (tag, Pid() as pid) if tag is _ALREADY_REGISTERED:
            return pid
    return None


def message_from_term(term: Term) -> Message | None:
    """What a tracker told ours: `term` is the message, without `$gen_cast` around it.

    None for the two casts that Swarm sends while it resolves a conflict, `{track, ..}` and `{untrack, ..}`, and that no
    tracker understands, Swarm's own neither.

    Raises:
        RemoteProtocolError: no tracker says this. `LimitExceeded`: a clock in it is larger than we follow.
    """
    if type(term) is tuple and term and type(term[0]) is Atom:
        read = _READERS.get((term[0], len(term)))
        if read is not None:
            return read(*term[1:])
        if (term[0], len(term)) in ((_TRACK, 4), (_UNTRACK, 2)):
            return None
    raise RemoteProtocolError(f"a Swarm tracker does not say {_brief(term)}")


def message_to_term(message: Message) -> Term:
    """The message as it is sent to a tracker, `$gen_cast` included where Swarm casts."""
    match message:
        case ReplicaEvent(sender, clock, change):
            return (_EVENT, sender, clock, change_to_term(change))
        case Sync(sender, clock):
            content: Term = (_SYNC, sender, clock)
        case SyncRecv(sender, clock, entries):
            content = (_SYNC_RECV, sender, clock, [entry_to_term(entry) for entry in entries])
        case SyncAck(sender, clock, entries):
            content = (_SYNC_ACK, sender, clock, [entry_to_term(entry) for entry in entries])
        case SyncErr(reason):
            content = (_SYNC_ERR, reason)
        case Handoff(sender, name, meta, state, clock):
            content = (_HANDOFF, sender, (name, meta, state, clock))
    return (_GEN_CAST, content)


def change_to_term(change: Change) -> Term:
    """The change inside an event."""
    match change:
        case Track(name, pid, meta):
            return (_TRACK, name, pid, meta)
        case Untrack(pid):
            return (_UNTRACK, pid)
        case UpdateMeta(meta, pid):
            return (_UPDATE_META, meta, pid)


def entry_to_term(entry: Entry) -> Term:
    """`{entry, Name, Pid, Ref, Meta, Clock}`, the clock without identity as in every snapshot.

    `Ref` is the sender's monitor, which no receiver looks at: ours is `nil`, the default of Swarm's record.
    """
    return (_ENTRY, entry.name, entry.pid, None, entry.meta, (0, entry.clock[1]))


def entry_from_term(term: Term) -> Entry:
    """The entry of a received registry; an `Entry` passes as it is. Raises `RemoteProtocolError` for anything else."""
    if type(term) is Entry:
        return term
    if type(term) is tuple and len(term) == 6 and term[0] is _ENTRY:
        return Entry(term[1], _pid(term[2]), _meta(term[4]), _seen(term[5]))
    raise RemoteProtocolError(f"a Swarm registry does not hold {_brief(term)}")


def request_from_term(term: Term) -> Request:
    """What a caller asks of the tracker (the request in `$gen_call`). Raises `RemoteProtocolError`."""
    match term:
        case (tag, name) if tag is _WHEREIS:
            return Whereis(name)
        case (tag, name, pid, meta) if tag is _TRACK:
            return Track(name, _pid(pid), _meta(meta))
        case (tag, name, meta) if tag is _TRACK:
            return StartAndTrack(name, _meta(meta))
        case (tag, pid) if tag is _UNTRACK:
            return Untrack(_pid(pid))
        case (tag, key, value, pid) if tag is _ADD_META:
            return AddMeta(key, value, _pid(pid))
        case (tag, key, pid) if tag is _REMOVE_META:
            return RemoveMeta(key, _pid(pid))
        case (tag, name, state) if tag is _HANDOFF:
            return HandOver(name, state)
    raise RemoteProtocolError(f"nobody asks a Swarm tracker {_brief(term)}")


def request_to_term(request: StartAndTrack) -> Term:
    """The request that one tracker sends to another."""
    return (_TRACK, request.name, request.meta)


def _event(sender: Term, clock: Term, change: Term) -> Message:
    match change:
        case (tag, name, pid, meta) if tag is _TRACK:
            return ReplicaEvent(_pid(sender), _seen(clock), Track(name, _pid(pid), _meta(meta)))
        case (tag, pid) if tag is _UNTRACK:
            return ReplicaEvent(_pid(sender), _seen(clock), Untrack(_pid(pid)))
        case (tag, meta, pid) if tag is _UPDATE_META:
            return ReplicaEvent(_pid(sender), _seen(clock), UpdateMeta(_meta(meta), _pid(pid)))
    raise RemoteProtocolError(f"no Swarm event changes {_brief(change)}")


def _handoff(sender: Term, content: Term) -> Message:
    match content:
        case (name, meta, state, clock):
            return Handoff(_pid(sender), name, _meta(meta), state, _seen(clock))
    raise RemoteProtocolError(f"a Swarm handoff is not {_brief(content)}")


_READERS: Final[Mapping[tuple[Atom, int], Callable[..., Message]]] = {
    (_EVENT, 4): _event,
    (_SYNC, 3): lambda sender, clock: Sync(_pid(sender), itc.checked(clock)),
    (_SYNC_RECV, 4): lambda sender, clock, found: SyncRecv(_pid(sender), itc.checked(clock), _registry(found)),
    (_SYNC_ACK, 4): lambda sender, clock, found: SyncAck(_pid(sender), itc.checked(clock), _registry(found)),
    (_SYNC_ERR, 2): SyncErr,
    (_HANDOFF, 3): _handoff,
}


def _pid(term: Term) -> Pid:
    if type(term) is not Pid:
        raise RemoteProtocolError(f"expected a pid, got {_brief(term)}")
    return term


def _meta(term: Term) -> Meta:
    if type(term) is not dict and type(term) is not TermMap:
        raise RemoteProtocolError(f"expected the properties of a registration, got {_brief(term)}")
    if not term:
        return NO_META
    for key in term:
        name_key(key)  # raises for what could not be looked up afterwards
    return term


def _seen(term: Term) -> Clock:
    # Identities are never told in events and snapshots; one that is anyway must not become ours.
    return (0, itc.checked(term)[1])


def _registry(term: Term) -> list[Term]:
    if type(term) is not list:
        raise RemoteProtocolError(f"expected a registry, got {_brief(term)}")
    return term


def _brief(term: Term) -> str:
    text = shown(term)
    return text if len(text) <= 200 else text[:200] + ".."
