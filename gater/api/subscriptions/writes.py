"""Snapshots written and deleted by Khepri: one call for each, whose answer says that it is done.

ExESDB's own way is a cast that nobody answers. Where that ends, in `snapshots_writer_worker.ex`, a process calls
`khepri:put!(Store, [snapshots, Source, Stream, Version], Record)` or `khepri:delete!(Store, [..])`. Here the same is
called by `erpc` on a member of the store, so whoever reads or lists snapshots finds the same.

If the member does not answer in time, another one is asked. The first call may be carried out all the same, by a node
that was frozen even much later: it then undoes what has been written there meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from gater.api import schema
from gater.api.service import Service
from gater.erl.errors import ErlangException
from gater.erl.etf import encode_term
from gater.erl.rpc import PendingRpc
from gater.erl.terms import Atom, EncodedTerm, Term

MAX_WRITES: Final = 16
"""Writes under way in one store; further ones wait here, in order: appends come first in a store's time."""

WRITE_S: Final = 3.0
"""How long one may take once it has begun, on all members that are tried, before it counts as failed."""

ATTEMPT_S: Final = 1.0
"""How long one member may take if another one can be asked after it."""

STORE_SHARE: Final = 0.8
"""How much of that the store may take: then a node that is alive can say that its store does not answer."""

LEAST_ATTEMPT_S: Final = 0.1
"""With less time left no other member is asked."""

QUIET_S: Final = 1.0
"""Between two complaints in the log."""

_KHEPRI: Final = Atom("khepri")
_PUT: Final = Atom("put")
_DELETE: Final = Atom("delete")
_TIMEOUT: Final = Atom("timeout")

log = structlog.get_logger(__name__)


class Writes:
    """The writes into one store."""

    def __init__(self, service: Service, store: Atom) -> None:
        self.service = service
        self.store = store
        self._under_way: set[_Write] = set()
        self._waiting: deque[_Write] = deque()
        self._beginning = False
        self._quiet_until = 0.0

    def put(self, source: bytes, stream: bytes, version: int, record: Term, on_done: Callable[[bool], None]) -> bool:
        """Write a snapshot; `on_done` is called once, perhaps at once, with whether it is certain to be stored. False
        if no member of the store offers Khepri, as far as they have been asked: then nothing is done.

        Raises `EncodeError` if the record is no term.
        """
        if not self._offered():
            return False
        self._add(_PUT, source, stream, version, [EncodedTerm(encode_term(record))], on_done)
        return True

    def delete(self, source: bytes, stream: bytes, version: int, on_done: Callable[[bool], None]) -> bool:
        """As `put`, to have a snapshot deleted; it need not be there."""
        if not self._offered():
            return False
        self._add(_DELETE, source, stream, version, [], on_done)
        return True

    def _offered(self) -> bool:
        return len(self.unfit()) < len(self.service.router.nodes(self.store))

    def unfit(self) -> list[Atom]:
        """The members of the store that do not offer Khepri, or have not been asked yet."""
        service = self.service
        return [node for node in service.router.nodes(self.store) if service.guarded_form(node) is None]

    def _add(
        self,
        function: Atom,
        source: bytes,
        stream: bytes,
        version: int,
        data: list[Term],
        on_done: Callable[[bool], None],
    ) -> None:
        path = [schema.SNAPSHOTS, source, stream, schema.snapshot_version_key(version)]
        self._waiting.append(_Write(self, stream, function, [self.store, path, *data], on_done))
        self._begin_next()

    def _begin_next(self) -> None:
        """Begin those that wait, as far as there is room."""
        if self._beginning:
            return
        self._beginning = True
        try:
            while self._waiting and len(self._under_way) < MAX_WRITES:
                write = self._waiting.popleft()
                self._under_way.add(write)
                write.begin()
        finally:
            self._beginning = False

    def ended(self, write: _Write) -> None:
        """This one is over: the next one may begin."""
        self._under_way.discard(write)
        self._begin_next()

    def complain(self, node: Atom, reason: Term) -> None:
        """Log that a member has not done it."""
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            log.warning("snapshot_not_written", store=str(self.store), peer=str(node), reason=repr(reason)[:200])

    def close(self) -> None:
        """Wait for no answer any more, and begin nothing that waits."""
        self._waiting.clear()
        for write in self._under_way:
            write.abandon()
        self._under_way.clear()


class _Write:
    """One write: one member at a time."""

    __slots__ = ("_arguments", "_function", "_node", "_on_done", "_pending", "_stream", "_tried", "_until", "_writes")

    def __init__(
        self, writes: Writes, stream: bytes, function: Atom, arguments: list[Term], on_done: Callable[[bool], None]
    ) -> None:
        self._writes = writes
        self._stream = stream
        self._function = function
        self._arguments = arguments
        """Without the options, which come last."""
        self._on_done = on_done
        self._until = 0.0
        self._node: Atom
        self._tried: list[Atom] = []
        self._pending: PendingRpc | None = None

    def begin(self) -> None:
        """It is its turn."""
        self._until = asyncio.get_running_loop().time() + WRITE_S
        self._attempt()

    def abandon(self) -> None:
        """Nobody waits any more."""
        if self._pending is not None:
            self._pending.cancel()

    def _attempt(self) -> None:
        writes = self._writes
        service, store = writes.service, writes.store
        router, now = service.router, asyncio.get_running_loop().time()
        avoid = writes.unfit() + self._tried
        node = router.owner(store, self._stream, now, avoid)
        left_s = self._until - now
        if node is None or left_s < LEAST_ATTEMPT_S or service.write_refusal(store) is not None:
            self._finish(False)
            return
        others = len(router.nodes(store)) - len(avoid) - 1
        attempt_s = min(left_s, ATTEMPT_S) if others > 0 else left_s
        options = {_TIMEOUT: round(attempt_s * STORE_SHARE * 1000)}
        self._node = node
        if router.allows(node, now):
            # Where every member is left out all are tried, which must not keep them left out for longer and longer.
            router.breaker(node).probing(now)
        call = (_KHEPRI, self._function, [*self._arguments, options])
        self._pending = PendingRpc(service.node, node, call, self._answered, attempt_s)

    def _answered(self, result: Term, error: ErlangException | None) -> None:
        self._pending = None
        node, writes = self._node, self._writes
        breaker = writes.service.router.breaker(node)
        if error is None and result is schema.OK:
            breaker.succeeded()
            self._finish(True)
            return
        writes.complain(node, result if error is None else error.reason)
        if breaker.failed(asyncio.get_running_loop().time()):
            log.warning("node_left_out", store=str(writes.store), peer=str(node))
        writes.service.doubt(node)
        self._tried.append(node)
        self._attempt()

    def _finish(self, ok: bool) -> None:
        try:
            self._on_done(ok)
        finally:
            self._writes.ended(self)
