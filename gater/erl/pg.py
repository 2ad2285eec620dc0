"""Process groups: `pg` of kernel, as one scope process that BEAM nodes of OTP 23 to 28 take for one of theirs.

Follows pg.erl. The scope process is registered under the name of the scope. It tells the scope processes of the other
nodes about its own members and keeps what they tell: `{discover, Pid}` asks for `{sync, Pid, [{Group, Pids}]}`,
`{join, Pid, Group, Pids}` and `{leave, Pid, Pids, Groups}` keep that up to date, the end of a scope process ends the
membership of all it has told of. A pid can be in a group several times.

`pg` watches visible nodes only and this node is hidden, so no other node ever begins: this one sends the first
`discover` to every node that comes up and again, in growing intervals, while no scope process there has answered.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import structlog

from gater.erl.errors import ErlangError, LimitExceeded
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, cast
from gater.erl.node import Node
from gater.erl.process import DOWN, described
from gater.erl.terms import Atom, Pid, Reference, Term, exact_key

DEFAULT_SCOPE: Final = Atom("pg")

MAX_MEMBERSHIPS: Final = 1_000_000
"""Memberships in one scope, all nodes together. `pg` was built for some hundred thousand."""

DISCOVER_AGAIN_S: Final = (1.0, 60.0)
"""First and longest interval between two `discover`s to a node without a scope process; doubled in between."""

DISCOVER: Final = Atom("discover")
SYNC: Final = Atom("sync")
JOIN: Final = Atom("join")
LEAVE: Final = Atom("leave")
_JOIN_LOCAL: Final = Atom("join_local")
_LEAVE_LOCAL: Final = Atom("leave_local")
_MONITOR: Final = Atom("monitor")
_DEMONITOR: Final = Atom("demonitor")
_NOT_JOINED: Final = Atom("not_joined")
_OK: Final = Atom("ok")

GroupWatcher: TypeAlias = Callable[[Term, list[Pid], list[Pid]], None]
"""`watcher(group, joined, left)`: one of the two lists is empty."""

log = structlog.get_logger(__name__)


class _Group:
    """The members of one group, in the order they came."""

    __slots__ = ("all", "local", "name")

    def __init__(self, name: Term) -> None:
        self.name = name
        self.all: list[Pid] = []
        self.local: list[Pid] = []


class _Peer:
    """What the scope process of another node has told: group key -> (group, pids)."""

    __slots__ = ("groups", "reference")

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.groups: dict[Term, tuple[Term, list[Pid]]] = {}


class Scope(GenServer):
    """One scope. Start it with `start_scope`, or `start_server` under the name of the scope."""

    def __init__(self, name: str | Atom = DEFAULT_SCOPE) -> None:
        self.name = Atom(str(name))
        self._groups: dict[Term, _Group] = {}
        self._memberships = 0
        self._local: dict[Pid, tuple[Reference, list[Term]]] = {}
        self._peers: dict[Pid, _Peer] = {}
        self._searching: dict[Atom, asyncio.TimerHandle] = {}
        self._monitors: dict[Reference, tuple[Pid, Term | None]] = {}
        """Erlang processes that watch: reference -> (pid, key of the group; None: all)."""
        self._watchers: list[tuple[Term | None, GroupWatcher]] = []
        self._end_watch: Callable[[], None] = lambda: None

    def init(self) -> None:
        self._end_watch = self.node.monitor_nodes(self._node_changed)
        for peer in self.node.nodes():
            self._discover(peer, DISCOVER_AGAIN_S[0])

    def terminate(self, reason: Term) -> None:
        self._end_watch()
        for timer in self._searching.values():
            timer.cancel()
        self._searching.clear()

    # For Python

    def join(self, group: Term, pids: Pid | Iterable[Pid]) -> None:
        """Add processes of this node to a group. ValueError for processes of other nodes."""
        joining = self._own(pids)
        for pid in joining:
            if pid not in self._local:
                self._local[pid] = (self.process.monitor(pid), [])
            self._local[pid][1].append(group)
        self._joined(group, joining)
        self._broadcast((JOIN, self.pid, group, joining))

    def leave(self, group: Term, pids: Pid | Iterable[Pid]) -> bool:
        """Take processes out of a group, once each; False if none of them was in it."""
        key = exact_key(group)
        leaving = []
        for pid in self._own(pids):
            entry = self._local.get(pid)
            at = next((index for index, each in enumerate(entry[1]) if exact_key(each) == key), None) if entry else None
            if entry is None or at is None:
                continue
            del entry[1][at]
            leaving.append(pid)
            if not entry[1]:
                self.process.demonitor(entry[0])
                del self._local[pid]
        if leaving:
            self._left(group, leaving)
            self._broadcast((LEAVE, self.pid, leaving, [group]))
        return bool(leaving)

    def members(self, group: Term) -> list[Pid]:
        """The members of a group on all nodes."""
        found = self._groups.get(exact_key(group))
        return list(found.all) if found is not None else []

    def local_members(self, group: Term) -> list[Pid]:
        """The members of a group on this node."""
        found = self._groups.get(exact_key(group))
        return list(found.local) if found is not None else []

    def groups(self) -> list[Term]:
        """All groups that have members."""
        return [group.name for group in self._groups.values()]

    def peers(self) -> list[Pid]:
        """The scope processes of other nodes that are known."""
        return list(self._peers)

    def watch(self, watcher: GroupWatcher, group: Term = None) -> Callable[[], None]:
        """Call `watcher(group, joined, left)` at every change, of one group or (None) of all.

        The function returned ends that.
        """
        entry = (None if group is None else exact_key(group), watcher)
        self._watchers.append(entry)

        def end() -> None:
            if entry in self._watchers:
                self._watchers.remove(entry)

        return end

    def _own(self, pids: Pid | Iterable[Pid]) -> list[Pid]:
        listed = [pids] if isinstance(pids, Pid) else list(pids)
        for pid in listed:
            if not isinstance(pid, Pid) or pid.node is not self.node.name:
                raise ValueError(f"only processes of this node join and leave groups here, not {pid}")
        return listed

    # Other nodes

    def _node_changed(self, peer: Atom, is_up: bool, _: str) -> None:
        self._stop_search(peer)
        if is_up:
            self._discover(peer, DISCOVER_AGAIN_S[0])

    def _stop_search(self, peer: Atom) -> None:
        timer = self._searching.pop(peer, None)
        if timer is not None:
            timer.cancel()

    def _discover(self, peer: Atom, again_s: float) -> None:
        """Ask for the scope process on `peer`, until there is one or the node is gone."""
        if peer not in self.node.nodes() or any(known.node is peer for known in self._peers):
            self._searching.pop(peer, None)
            return
        self.process.send((self.name, peer), (DISCOVER, self.pid))
        longer_s = min(again_s * 2, DISCOVER_AGAIN_S[1])
        self._searching[peer] = self.node.loop.call_later(again_s, self._discover, peer, longer_s)

    def _broadcast(self, message: Term) -> None:
        for peer in self._peers:
            self.process.send(peer, message)

    def _meet(self, peer: Pid) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            self._stop_search(peer.node)
            known = self._peers[peer] = _Peer(self.process.monitor(peer))
        return known

    def handle_info(self, message: Term) -> None:
        match message:
            case (kind, Pid() as peer, *_) if kind is DISCOVER and peer.node is not self.node.name:
                is_known = peer in self._peers
                groups: dict[Term, tuple[Term, list[Pid]]] = {
                    key: (group.name, group.local) for key, group in self._groups.items() if group.local
                }
                cast(self.node, peer, (SYNC, self.pid, list(groups.values())), self.pid)
                if not is_known:
                    self._meet(peer)
                    self.process.send(peer, (DISCOVER, self.pid))
            case (kind, Pid() as peer, group, pids) if kind is JOIN and peer in self._peers:
                joined = _pids(pids)
                _, known = self._peers[peer].groups.setdefault(exact_key(group), (group, []))
                self._joined(group, joined)
                known.extend(joined)
            case (kind, Pid() as peer, pids, [*groups_left]) if kind is LEAVE and peer in self._peers:
                for group in groups_left:
                    self._peer_left(self._peers[peer], group, _pids(pids))
            case (kind, Reference() as reference, _, Pid() as pid, _) if kind is DOWN:
                self._gone(reference, pid)

    def handle_cast(self, message: Term) -> None:
        match message:
            case (kind, Pid() as peer, [*groups]) if kind is SYNC and peer.node is not self.node.name:
                self._synchronise(self._meet(peer), groups)

    def _synchronise(self, peer: _Peer, told: list[Term]) -> None:
        """Make what is known of a scope process what it has just told."""
        now: dict[Term, tuple[Term, list[Pid]]] = {}
        for entry in told:
            if type(entry) is tuple and len(entry) == 2:
                now[exact_key(entry[0])] = (entry[0], _pids(entry[1]))
        for key, (group, before) in list(peer.groups.items()):
            self._peer_left(peer, group, _less(before, now[key][1] if key in now else []))
        for key, (group, pids) in now.items():
            before = peer.groups[key][1] if key in peer.groups else []
            self._joined(group, _less(pids, before))
        peer.groups = now

    def _peer_left(self, peer: _Peer, group: Term, pids: list[Pid]) -> None:
        key = exact_key(group)
        entry = peer.groups.get(key)
        if entry is None:
            return
        remaining = _less(entry[1], pids)
        left = pids if len(remaining) + len(pids) == len(entry[1]) else _less(entry[1], remaining)
        if remaining:
            peer.groups[key] = (entry[0], remaining)
        else:
            del peer.groups[key]
        self._left(group, left)

    def _gone(self, reference: Reference, pid: Pid) -> None:
        """A member here, a scope process elsewhere, or one that watched has ended."""
        if self._monitors.pop(reference, None) is not None:
            return
        peer = self._peers.get(pid)
        if peer is not None and peer.reference == reference:
            del self._peers[pid]
            for group, pids in list(peer.groups.values()):
                self._left(group, pids)
            self._discover(pid.node, DISCOVER_AGAIN_S[0])
            return
        local = self._local.get(pid)
        if local is not None and local[0] == reference:
            del self._local[pid]
            for group in local[1]:
                self._left(group, [pid])
            self._broadcast((LEAVE, self.pid, pid, local[1]))

    # Membership

    def _joined(self, name: Term, pids: list[Pid]) -> None:
        if not pids:
            return
        if self._memberships + len(pids) > MAX_MEMBERSHIPS:
            raise LimitExceeded("MAX_MEMBERSHIPS", MAX_MEMBERSHIPS)
        self._memberships += len(pids)
        group = self._groups.setdefault(exact_key(name), _Group(name))
        group.all += pids
        group.local += [pid for pid in pids if pid.node is self.node.name]
        self._tell(JOIN, name, pids)

    def _left(self, name: Term, pids: list[Pid]) -> None:
        key = exact_key(name)
        group = self._groups.get(key)
        if group is None or not pids:
            return
        remaining = _less(group.all, pids)
        self._memberships -= len(group.all) - len(remaining)
        group.all = remaining
        if group.local:
            group.local = _less(group.local, pids)
        if not group.all:
            del self._groups[key]
        self._tell(LEAVE, name, list(pids))

    def _tell(self, what: Atom, name: Term, pids: list[Pid]) -> None:
        key = exact_key(name)
        for reference, (pid, watched) in list(self._monitors.items()):
            if watched is None or watched == key:
                self.process.send(pid, (reference, what, name, pids))
        joined, left = (pids, []) if what is JOIN else ([], pids)
        for watched, watcher in list(self._watchers):
            if watched is None or watched == key:
                try:
                    watcher(name, joined, left)
                except Exception as error:
                    log.error("group_watcher_failed", scope=str(self.name), error=described(error))

    # For Erlang (`pg:join/3` and its kin call these on their own node; by rpc they come here)

    def handle_call(self, request: Term, caller: Caller) -> Term:
        match request:
            case (kind, group, pids) if kind is _JOIN_LOCAL:
                self.join(group, _pids(pids))
                return _OK
            case (kind, group, pids) if kind is _LEAVE_LOCAL:
                return _OK if self.leave(group, _pids(pids)) else _NOT_JOINED
            case kind if kind is _MONITOR:
                return (self._monitor(caller.pid, None), {group.name: group.all for group in self._groups.values()})
            case (kind, group) if kind is _MONITOR:
                return (self._monitor(caller.pid, exact_key(group)), self.members(group))
            case (kind, Reference() as reference) if kind is _DEMONITOR:
                if self._monitors.pop(reference, None) is None:
                    return False
                self.process.demonitor(reference)
                return _OK
        log.warning("unknown_request", scope=str(self.name), caller=str(caller.pid))
        return NO_REPLY

    def _monitor(self, pid: Pid, key: Term | None) -> Reference:
        reference = self.process.monitor(pid)
        self._monitors[reference] = (pid, key)
        return reference

    def get_state(self) -> Term:
        return [(group.name, group.all) for group in self._groups.values()]


def _pids(term: Term) -> list[Pid]:
    """A pid or a list of pids as a list; what is no pid is left out."""
    return [each for each in (term if type(term) is list else [term]) if type(each) is Pid]


def _less(pids: list[Pid], taken: list[Pid]) -> list[Pid]:
    """`pids` without those in `taken`, each as often as it stands there."""
    rest = []
    if len(taken) <= 1:
        rest = list(pids)
        for pid in taken:
            if pid in rest:
                rest.remove(pid)
        return rest
    left = Counter(taken)
    for pid in pids:
        if left[pid]:
            left[pid] -= 1
        else:
            rest.append(pid)
    return rest


def install(node: Node) -> None:
    """Export the functions of the module `pg`, for whichever scopes run on `node`."""

    def scope(name: Term) -> Scope:
        process = node.find(name)
        server = getattr(process.receiver, "server", None) if process is not None else None
        if not isinstance(server, Scope):
            raise ErlangError(Atom("badarg"), f"no scope {name} runs here")
        return server

    def join(name: Term, group: Term, pids: Term) -> Term:
        scope(name).join(group, _pids(pids))
        return _OK

    def leave(name: Term, group: Term, pids: Term) -> Term:
        return _OK if scope(name).leave(group, _pids(pids)) else _NOT_JOINED

    add = node.exports.add
    add("pg", "join", lambda group, pids: join(DEFAULT_SCOPE, group, pids))
    add("pg", "join", join)
    add("pg", "leave", lambda group, pids: leave(DEFAULT_SCOPE, group, pids))
    add("pg", "leave", leave)
    for function, answer in {
        "get_members": Scope.members,
        "get_local_members": Scope.local_members,
    }.items():
        add("pg", function, lambda group, answer=answer: answer(scope(DEFAULT_SCOPE), group), arities=[1])
        add("pg", function, lambda name, group, answer=answer: answer(scope(name), group), arities=[2])
    add("pg", "which_groups", lambda: scope(DEFAULT_SCOPE).groups())
    add("pg", "which_groups", lambda name: scope(name).groups())
