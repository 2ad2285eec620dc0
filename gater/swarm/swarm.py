"""Our membership in a Swarm cluster: names and groups of processes that every member sees.

    swarm = Swarm(node)
    await swarm.start()
    await swarm.register((Atom("worker"), 1), pid)
    swarm.whereis((Atom("worker"), 1))

Follows the API of `Swarm` 3.4 (`lib/swarm.ex`). What is looked up is looked up here, in our own registry, at once. What
changes something goes through the tracker's process (`peer.py`) and waits until the tracker has joined the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar

import structlog

from gater.erl.errors import CallError, ErlError, NoProcess
from gater.erl.etf import encode_term
from gater.erl.gen_server import CALL_TIMEOUT_S, GenServer, PendingCall, start_server
from gater.erl.node import Node
from gater.erl.process import NOPROC, Process, described
from gater.erl.terms import Atom, Pid, Term
from gater.swarm import functions, messages
from gater.swarm.messages import MFA, TRACKER, AddMeta, RemoveMeta, Request, StartAndTrack, Track, UntrackName, Whereis
from gater.swarm.peer import OnChange, OnKept, TrackerPeer
from gater.swarm.registry import NO_META, Entry, Meta, Registry, name_key
from gater.swarm.tracker import TrackerOptions

SWARM_VERSION: Final = "3.4.0"
"""The version of Swarm whose protocol is spoken."""

Owner: TypeAlias = Pid | Process | GenServer
Watcher = TypeVar("Watcher")

log = structlog.get_logger(__name__)


class AlreadyRegistered(ErlError):
    """The name belongs to another process, `pid`."""

    def __init__(self, name: Term, pid: Pid) -> None:
        self.pid = pid
        super().__init__(f"the name {name!r} is registered for {pid}")


class RegistrationFailed(ErlError):
    """The tracker refused; `reason` is Swarm's: `overloaded`, `no_node_available`, `too_many_attempts`, ..."""

    def __init__(self, name: Term, reason: Term) -> None:
        self.reason = reason
        super().__init__(f"the name {name!r} could not be registered: {reason!r}")


class Swarm:
    """The names of a cluster, seen from one node. Make it before the node is started, start it afterwards.

    `start` starts the tracker's process; a supervisor may call it again when that has ended: processes of this node
    keep their names.
    """

    def __init__(self, node: Node, options: TrackerOptions | None = None) -> None:
        self.node = node
        self._options = options
        self._peer: TrackerPeer | None = None
        self._registry = Registry()
        self._by_name: dict[Term, list[OnChange]] = {}
        self._by_first: dict[Term, list[OnChange]] = {}
        self._all: list[OnChange] = []
        self._kept: list[OnKept] = []
        functions.export(node.exports, self)

    async def start(self) -> GenServer:
        """Start the tracker's process. From then on `application:which_applications()` lists `swarm`."""
        before = self._registry
        peer = TrackerPeer(self._options, self._changed, self._keeps)
        await start_server(self.node, peer, name=TRACKER)
        self._peer = peer
        self._registry = peer.tracker.registry
        self.node.add_application("swarm", "Names of a cluster", SWARM_VERSION)
        self._carry_over(before)
        return peer

    def _carry_over(self, before: Registry) -> None:
        """An earlier tracker has ended: its processes here keep their names, everything else is learnt again."""
        for entry in before.on_node(self.node.name):
            if self.node.process(entry.pid) is not None:
                self.ask(Track(entry.name, entry.pid, entry.meta), _ignore)
        for name, watchers in self._by_name.items():
            entry_then = before.get(name)
            if entry_then is not None:
                self._tell(watchers, entry_then.name, entry_then, None)
        for first, watchers in self._by_first.items():
            for entry in before.starting_with(first):
                self._tell(watchers, entry.name, entry, None)
        if self._all:
            for entry in before:
                self._tell(self._all, entry.name, entry, None)

    @property
    def registry(self) -> Registry:
        """Every name that is known now. Read only; another object after the tracker has been started again."""
        return self._registry

    @property
    def members_of_cluster(self) -> list[Atom]:
        """The other nodes that run Swarm."""
        return self._peer.tracker.nodes if self._peer is not None else []

    @property
    def joined(self) -> bool:
        """Whether the tracker has joined: registrations are not held back any more."""
        return self._peer is not None and self._peer.tracker.joined

    def is_synced(self, node: Atom) -> bool:
        """Whether the processes of this node that are registered are known: it has told its registry."""
        return self._peer is not None and self._peer.tracker.is_synced(node)

    # Names

    async def register(self, name: Term, owner: Owner, meta: Meta = NO_META) -> None:
        """Register a process under `name`, a term. Nothing happens if it has that name already.

        Raises `AlreadyRegistered`, `RegistrationFailed`, `EncodeError` if `name` or `meta` are no terms, or `NoProcess`
        if the tracker ends meanwhile.
        """
        _check(name, meta)
        reply = await self._ask(Track(name, _pid(owner), meta))
        self._started(name, reply)

    async def register_started(self, name: Term, module: str, function: str, arguments: list[Term]) -> Pid:
        """`Swarm.register_name/5`: have `module:function(arguments)` start a process on the node that the name belongs
        to, which answers `{ok, Pid}`; when that node goes another one takes over. Functions that this node exports can
        be run here, others on a node that has them.

        Raises as `register` does.
        """
        meta = {MFA: (Atom(module), Atom(function), arguments)}
        _check(name, meta)
        return self._started(name, await self._ask(StartAndTrack(name, meta)))

    @staticmethod
    def _started(name: Term, reply: Term) -> Pid:
        match reply:
            case (Atom(name="ok"), Pid() as pid):
                return pid
            case (Atom(name="error"), reason):
                other = messages.registered_elsewhere(reason)
                if other is not None:
                    raise AlreadyRegistered(name, other)
                if reason is messages.NOPROC:
                    raise NoProcess(NOPROC, "the tracker has ended")
                raise RegistrationFailed(name, reason)
        raise RegistrationFailed(name, reply)

    def whereis(self, name: Term) -> Pid | None:
        """The process registered under `name`, as far as this node knows."""
        entry = self._registry.get(name)
        return None if entry is None else entry.pid

    async def find(self, name: Term) -> Pid | None:
        """`Swarm.whereis_name/1`: as `whereis`, but who is not known here is asked for on the node that the name
        belongs to."""
        found = await self._ask(Whereis(name))
        return found if isinstance(found, Pid) else None

    async def unregister(self, name: Term) -> None:
        """Free a name. The process keeps its other names."""
        await self._ask(UntrackName(name))

    def registered(self) -> Iterator[tuple[Term, Pid]]:
        """All names and their processes."""
        return ((entry.name, entry.pid) for entry in self._registry.entries())

    # Groups

    async def join(self, group: Term, owner: Owner) -> None:
        """Add a registered process to `group`. Nothing happens if it has no name, as in Swarm."""
        _check(group, NO_META)
        await self._ask(AddMeta(group, True, _pid(owner)))

    async def leave(self, group: Term, owner: Owner) -> None:
        """Remove a process from `group`."""
        await self._ask(RemoveMeta(group, _pid(owner)))

    def members(self, group: Term) -> list[Pid]:
        """The processes in `group`."""
        return self._registry.members(group)

    def publish(self, group: Term, message: Term) -> None:
        """Send `message` to every process in `group`."""
        for pid in self.members(group):
            self.node.send(pid, message)

    async def multi_call(
        self, group: Term, request: Term, *, timeout_s: float | None = CALL_TIMEOUT_S
    ) -> list[Term | CallError]:
        """`gen_server:call` every process in `group` at once: what each answered, or the error of its call."""
        return await asyncio.gather(*(self._call(pid, request, timeout_s) for pid in self.members(group)))

    async def _call(self, pid: Pid, request: Term, timeout_s: float | None) -> Term | CallError:
        done: asyncio.Future[Term | CallError] = asyncio.get_running_loop().create_future()

        def finish(reply: Term, error: CallError | None) -> None:
            if not done.done():
                done.set_result(reply if error is None else error)

        pending = PendingCall(self.node, pid, request, finish, timeout_s=timeout_s)
        try:
            return await done
        except asyncio.CancelledError:
            pending.cancel()
            raise

    def send(self, name: Term, message: Term) -> bool:
        """Send `message` to the process registered under `name`; False if there is none."""
        pid = self.whereis(name)
        if pid is not None:
            self.node.send(pid, message)
        return pid is not None

    # Changes

    def watch(self, callback: OnChange) -> Callable[[], None]:
        """Call `callback(name, old, new)` at every change of any name; the function returned ends that.

        `old` and `new` are entries, None where there is none. A change of the properties (groups) is one too.
        """
        return _added(self._all, callback)

    def watch_name(self, name: Term, callback: OnChange) -> Callable[[], None]:
        """As `watch`, of one name."""
        return _added(self._by_name.setdefault(name_key(name), []), callback)

    def watch_starting_with(self, first: Term, callback: OnChange) -> Callable[[], None]:
        """As `watch`, of the names that are tuples with this first element."""
        return _added(self._by_first.setdefault(name_key(first), []), callback)

    def watch_kept(self, callback: OnKept) -> Callable[[], None]:
        """Call `callback(name, pid)` when a process of this node keeps its name which another gater, that was cut off
        from this one or has been as quick, has given to a process of its own too; the function returned ends that."""
        return _added(self._kept, callback)

    def _keeps(self, name: Term, pid: Pid) -> None:
        for watcher in list(self._kept):
            try:
                watcher(name, pid)
            except Exception as error:
                log.error("swarm_watcher_failed", error=described(error))

    def _changed(self, name: Term, old: Entry | None, new: Entry | None) -> None:
        if self._by_first and type(name) is tuple and len(name) > 1:
            watchers = self._by_first.get(name_key(name[0]))
            if watchers:
                self._tell(watchers, name, old, new)
        if self._by_name:
            watchers = self._by_name.get(name_key(name))
            if watchers:
                self._tell(watchers, name, old, new)
        if self._all:
            self._tell(self._all, name, old, new)

    @staticmethod
    def _tell(watchers: list[OnChange], name: Term, old: Entry | None, new: Entry | None) -> None:
        for watcher in list(watchers):
            try:
                watcher(name, old, new)
            except Exception as error:
                log.error("swarm_watcher_failed", error=described(error))

    # The tracker

    def ask(self, request: Request, on_reply: Callable[[Term], None]) -> None:
        """Ask the tracker; `on_reply` gets Swarm's answer, `{error, noproc}` if there is no tracker (any more)."""
        peer = self._peer
        if peer is None or not peer.process.alive:
            on_reply(messages.error(messages.NOPROC))
        else:
            peer.call(request, on_reply)

    async def _ask(self, request: Request) -> Term:
        answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Term) -> None:
            if not answered.done():
                answered.set_result(reply)

        self.ask(request, on_reply)
        return await answered


def _ignore(reply: Term) -> None:
    return None


def _added(watchers: list[Watcher], callback: Watcher) -> Callable[[], None]:
    watchers.append(callback)

    def end() -> None:
        if callback in watchers:
            watchers.remove(callback)

    return end


def _pid(owner: Owner) -> Pid:
    return owner if isinstance(owner, Pid) else owner.pid


def _check(name: Term, meta: Meta) -> None:
    """What is registered is told to others: it must be a term. Raises `EncodeError`."""
    encode_term((name, dict(meta)))
