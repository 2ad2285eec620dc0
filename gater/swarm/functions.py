"""The functions of Swarm that other nodes call here by rpc: `Swarm`, `Swarm.Registry`, `Swarm.Tracker` and `swarm`.

Arities, default arguments and answers are those of Swarm 3.4 (`lib/swarm.ex`, `registry.ex`, `tracker/tracker.ex`,
`src/swarm.erl`). Timeouts of callers are theirs to watch: whoever gave up does not read the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeAlias

from gater.erl.errors import CallError, ErlangError, ErlangExit
from gater.erl.exports import Done, Exports
from gater.erl.terms import Atom, Pid, Term
from gater.swarm import messages
from gater.swarm.messages import MFA, AddMeta, HandOver, RemoveMeta, Request, StartAndTrack, Track, Untrack, Whereis
from gater.swarm.registry import NO_META, Entry
from gater.swarm.snapshots import OutgoingList

if TYPE_CHECKING:
    from gater.swarm.swarm import Swarm

SWARM_MODULE: Final = "Elixir.Swarm"
REGISTRY_MODULE: Final = "Elixir.Swarm.Registry"
TRACKER_MODULE: Final = "Elixir.Swarm.Tracker"
ERLANG_MODULE: Final = "swarm"

MULTI_CALL_TIMEOUT_MS: Final = 5_000
"""The default of `Swarm.multi_call/2`."""

LIST_AT_ONCE: Final = 500
"""Longer lists are encoded in pieces, so that answering does not hold up everything else."""

_OK: Final = Atom("ok")
_YES: Final = Atom("yes")
_NO: Final = Atom("no")
_ERROR: Final = Atom("error")
_INFINITY: Final = Atom("infinity")
_BADARG: Final = Atom("badarg")
_GEN_SERVER: Final = Atom("Elixir.GenServer")
_CALL: Final = Atom("call")


_Served: TypeAlias = dict[str, tuple[Callable[..., Term], tuple[int, ...], bool]]
"""Function name -> what is called, its arities, and whether it is deferred."""


def export(exports: Exports, swarm: Swarm) -> None:
    """Export all of them."""
    served = _Functions(swarm)
    names: _Served = {
        "whereis_name": (served.whereis, (1,), True),
        "register_name": (served.register_name, (2,), True),
        "unregister_name": (served.unregister, (1,), True),
    }
    groups: _Served = {
        "join": (served.join, (2,), True),
        "leave": (served.leave, (2,), True),
        "members": (served.members, (1,), False),
        "publish": (served.publish, (2,), False),
        "multi_call": (served.multi_call, (2, 3), False),
        "send": (served.send, (2,), True),
    }
    modules: dict[str, _Served] = {
        SWARM_MODULE: names
        | groups
        | {
            "registered": (served.registered, (0,), False),
            "whereis_or_register_name": (served.whereis_or_start, (4, 5), True),
        },
        ERLANG_MODULE: names | groups,
        REGISTRY_MODULE: groups
        | {
            "registered": (served.registered, (0,), False),
            "all": (served.registered, (0,), False),
            "snapshot": (served.snapshot, (0,), False),
            "register": (served.track, (2,), True),
            "unregister": (served.unregister, (1,), True),
            "whereis": (served.whereis, (1,), True),
            "whereis_or_register": (served.whereis_or_start, (4, 5), True),
            "get_by_name": (served.get_by_name, (1,), False),
            "get_by_pid": (served.get_by_pid, (1,), False),
            "get_by_pid_and_name": (served.get_by_pid_and_name, (2,), False),
            "get_by_meta": (served.get_by_meta, (1, 2), False),
            "get_by_ref": (served.get_by_ref, (1,), False),
        },
        TRACKER_MODULE: {
            "whereis": (served.ask_whereis, (1,), True),
            "track": (served.track, (2,), True),
            "untrack": (served.untrack, (1,), True),
            "add_meta": (served.add_meta, (3,), True),
            "remove_meta": (served.leave, (2,), True),
            "handoff": (served.handoff, (2,), True),
        },
    }
    for module, functions in modules.items():
        for name, (call, arities, deferred) in functions.items():
            exports.add(module, name, call, arities=arities, deferred=deferred)
    exports.add(SWARM_MODULE, "register_name", served.start, arities=(4, 5), deferred=True)
    exports.add(ERLANG_MODULE, "register_name", served.start, arities=(4,), deferred=True)
    exports.add(REGISTRY_MODULE, "register", served.start, arities=(5,), deferred=True)
    exports.add(TRACKER_MODULE, "track", served.start, arities=(5,), deferred=True)


class _Functions:
    """Functions with `done` are deferred: they answer by calling it."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    # Names

    def registered(self) -> Term:
        """`[{Name, Pid}]`."""
        return _long_list([(entry.name, entry.pid) for entry in self._swarm.registry])

    def snapshot(self) -> Term:
        """`[{entry, Name, Pid, Ref, Meta, Clock}]`."""
        return _long_list([messages.entry_to_term(entry) for entry in self._swarm.registry])

    def whereis(self, done: Done, name: Term) -> None:
        entry = self._swarm.registry.get(name)
        if entry is not None:
            done(entry.pid, None)
        else:
            self.ask_whereis(done, name)

    def ask_whereis(self, done: Done, name: Term) -> None:
        self._ask(done, Whereis(name))

    def register_name(self, done: Done, name: Term, pid: Term) -> None:
        def answer(reply: Term) -> None:
            done(_YES if _is_ok(reply) else _NO, None)

        self._swarm.ask(Track(name, _checked(pid), NO_META), answer)

    def track(self, done: Done, name: Term, pid: Term) -> None:
        self._ask(done, Track(name, _checked(pid), NO_META))

    def start(
        self, done: Done, name: Term, module: Term, function: Term, arguments: Term, timeout: Term = _INFINITY
    ) -> None:
        if type(module) is not Atom or type(function) is not Atom or type(arguments) is not list:
            raise ErlangError(_BADARG)
        self._ask(done, StartAndTrack(name, {MFA: (module, function, arguments)}))

    def whereis_or_start(
        self, done: Done, name: Term, module: Term, function: Term, arguments: Term, timeout: Term = _INFINITY
    ) -> None:
        def found(answer: Term, error: BaseException | None) -> None:
            if isinstance(answer, Pid):
                done((_OK, answer), error)
            else:
                self.start(started, name, module, function, arguments)

        def started(answer: Term, error: BaseException | None) -> None:
            match answer:
                case (_, reason):
                    pid = messages.registered_elsewhere(reason)
                    done(answer if pid is None else (_OK, pid), error)
                case _:
                    done(answer, error)

        self.whereis(found, name)

    def unregister(self, done: Done, name: Term) -> None:
        # As the original: the process loses all its names.
        entry = self._swarm.registry.get(name)
        if entry is None:
            done(_OK, None)
        else:
            self._ask(done, Untrack(entry.pid))

    def untrack(self, done: Done, pid: Term) -> None:
        self._ask(done, Untrack(_checked(pid)))

    def handoff(self, done: Done, name: Term, state: Term) -> None:
        self._ask(done, HandOver(name, state))

    def send(self, done: Done, name: Term, message: Term) -> None:
        def found(answer: Term, error: BaseException | None) -> None:
            if isinstance(answer, Pid):
                self._swarm.node.send(answer, message)
            done(_OK, None)

        self.whereis(found, name)

    # Groups

    def join(self, done: Done, group: Term, pid: Term) -> None:
        self._ask(done, AddMeta(group, True, _checked(pid)))

    def add_meta(self, done: Done, key: Term, value: Term, pid: Term) -> None:
        self._ask(done, AddMeta(key, value, _checked(pid)))

    def leave(self, done: Done, group: Term, pid: Term) -> None:
        self._ask(done, RemoveMeta(group, _checked(pid)))

    def members(self, group: Term) -> Term:
        return list(self._swarm.members(group))

    def publish(self, group: Term, message: Term) -> Term:
        self._swarm.publish(group, message)
        return _OK

    async def multi_call(self, group: Term, request: Term, limit_ms: Term = MULTI_CALL_TIMEOUT_MS) -> Term:
        timeout_s: float | None = None
        if type(limit_ms) is int and limit_ms >= 0:
            timeout_s = limit_ms / 1000
        elif limit_ms is not _INFINITY:
            raise ErlangError(_BADARG)
        answers = await self._swarm.multi_call(group, request, timeout_s=timeout_s)
        for answer in answers:
            if isinstance(answer, CallError):
                raise ErlangExit((answer.reason, (_GEN_SERVER, _CALL, [group, request, limit_ms])))
        return answers

    # Entries

    def get_by_name(self, name: Term) -> Term:
        entry = self._swarm.registry.get(name)
        return messages.UNDEFINED if entry is None else messages.entry_to_term(entry)

    def get_by_pid(self, pid: Term) -> Term:
        return _entries(self._swarm.registry.by_pid(_checked(pid)))

    def get_by_pid_and_name(self, pid: Term, name: Term) -> Term:
        entry = self._swarm.registry.get(name)
        if entry is None or entry.pid != pid:
            return messages.UNDEFINED
        return messages.entry_to_term(entry)

    def get_by_meta(self, key: Term, *value: Term) -> Term:
        return _entries(self._swarm.registry.with_property(key, *value))

    def get_by_ref(self, reference: Term) -> Term:
        """Our entries have no monitors in them: none is found."""
        return messages.UNDEFINED

    def _ask(self, done: Done, request: Request) -> None:
        self._swarm.ask(request, lambda reply: done(reply, None))


def _checked(pid: Term) -> Pid:
    if type(pid) is not Pid:
        raise ErlangError(_BADARG)
    return pid


def _is_ok(reply: Term) -> bool:
    return type(reply) is tuple and len(reply) == 2 and reply[0] is _OK


def _entries(entries: Iterable[Entry]) -> Term:
    """`undefined` for none, as Swarm has it."""
    return [messages.entry_to_term(entry) for entry in entries] or messages.UNDEFINED


def _long_list(terms: list[Term]) -> Term:
    return terms if len(terms) <= LIST_AT_ONCE else _encoded(terms)


async def _encoded(terms: list[Term]) -> Term:
    outgoing = OutgoingList(len(terms), terms)
    while True:
        if outgoing.work():
            return outgoing.encoded
        await asyncio.sleep(0)
