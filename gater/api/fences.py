"""Own writes are read: which store nodes have caught up with their store, and waiting until one has.

Any member of a Raft cluster answers reads, and one that was out of reach, or that did not carry out the last append
itself, may not have applied it yet. `khepri:fence/2` on a node returns when everything committed before it is applied
there. A fence is asked for only where a read could miss something (`lags`); whoever comes while one is under way waits
for the next, since that one may have begun before the append that is to be seen. Where nodes offer no fence, a version
lower than that of an append just told of is asked for again (`least_version`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gater.api import schema
from gater.api.appends import Appends
from gater.api.router import Router, Worker
from gater.erl.errors import ErlangError, ErlangException
from gater.erl.node import Node
from gater.erl.rpc import PendingRpc
from gater.erl.terms import Atom, Term

FENCE_S: Final = 1.0
"""How long a node may take to catch up with its store before a read goes elsewhere."""

TOLD_S: Final = 2.0
"""How long after an append a node without fences that does not know of it is asked again: it follows by then, or the
store has lost the append."""

_FENCE: Final = (Atom("khepri"), Atom("fence"))


class Fences:
    """Who has caught up with which store, as far as this gateway knows."""

    __slots__ = ("_appends", "_caught_up", "_fenceless", "_fences", "_has_quorum", "_node", "_router")

    def __init__(self, node: Node, router: Router, appends: Appends, has_quorum: Callable[[Atom], bool]) -> None:
        """`appends` know the last append of a stream; `has_quorum` says whether a store has a majority."""
        self._node = node
        self._router = router
        self._appends = appends
        self._has_quorum = has_quorum
        self._caught_up: dict[tuple[Atom, Atom], float] = {}
        """When a node (of a store) was last known to have everything; it follows from then on, a little behind."""
        self._fenceless: set[Atom] = set()
        """Nodes that do not offer `khepri:fence/2`."""
        self._fences: dict[tuple[Atom, Atom], list[Callable[[bool], None]]] = {}
        """The fences under way, and who came too late for them: those wait for the next."""

    def may_lag(self, node: Atom) -> None:
        """A node was out of reach: it may have missed something."""
        for key in [key for key in self._caught_up if key[1] is node]:
            del self._caught_up[key]
        # It may be another version when it comes back.
        self._fenceless.discard(node)

    def lags(self, store: Atom, stream: bytes, node: Atom) -> bool:
        """Whether a read of this stream on `node` might miss what was appended before: the node was out of reach, or
        the last append went to another one."""
        last = self._appends.latest((store, stream))
        wrote_elsewhere = last is not None and last.owner is not node
        if node in self._fenceless:
            return wrote_elsewhere
        caught_up = self._caught_up.get((store, node))
        return caught_up is None or (last is not None and wrote_elsewhere and last.at > caught_up)

    def least_version(self, store: Atom, stream: bytes, node: Atom) -> int:
        """Where nodes offer no fence, the version that one must know of: that of an append just made, through this
        gateway or another one that has told. -1 if there is none, or the node has been fenced."""
        if not self._fenceless or (store, node) in self._caught_up:
            return -1
        last = self._appends.latest((store, stream))
        return last.version if last is not None and asyncio.get_running_loop().time() < last.at + TOLD_S else -1

    def has_fence(self, node: Atom) -> bool:
        """Whether a node offers a fence, as far as it has been asked."""
        return node not in self._fenceless

    def can_catch_up(self, store: Atom, node: Atom) -> bool:
        """Whether it makes sense to wait for `catch_up`: not without a fence, and not without a majority."""
        return node not in self._fenceless and self._has_quorum(store)

    def last_writer(self, store: Atom, stream: bytes) -> Worker | None:
        """A worker on the node that carried out the last append of this stream, if requests are sent there."""
        last = self._appends.latest((store, stream))
        now = asyncio.get_running_loop().time()
        if last is None or not self._router.allows(last.owner, now):
            return None
        return self._router.worker_on(store, last.owner, now)

    def catch_up(self, store: Atom, node: Atom, on_done: Callable[[bool], None]) -> None:
        """Wait until `node` has everything that is committed now (`khepri:fence/2`); `on_done(whether it has)`. Where
        there is no such function nobody can wait: then it counts as caught up."""
        waiting = self._fences.get((store, node))
        if waiting is None:
            self._fences[store, node] = []
            self._fence(store, node, [on_done])
        else:
            waiting.append(on_done)

    def _fence(self, store: Atom, node: Atom, callers: list[Callable[[bool], None]]) -> None:
        began = asyncio.get_running_loop().time()

        def done(result: Term, error: ErlangException | None) -> None:
            has_all = error is None and result is schema.OK
            if has_all:
                self._caught_up[store, node] = began
            elif isinstance(error, ErlangError) and _is_undefined(error.reason):
                self._fenceless.add(node)
                has_all = True
            late, self._fences[store, node] = self._fences[store, node], []
            if late:
                self._fence(store, node, late)
            else:
                del self._fences[store, node]
            for on_done in callers:
                on_done(has_all)

        mfa: tuple[Atom, Atom, list[Term]] = (*_FENCE, [store, round(FENCE_S * 1000)])
        PendingRpc(self._node, node, mfa, done, FENCE_S)


def _is_undefined(reason: Term) -> bool:
    """Whether a call of `khepri:fence/2` failed because there is no such function."""
    match reason:
        case (_, Atom(name="undef"), [(module, function, *_), *_]):
            return (module, function) == _FENCE
    return False
