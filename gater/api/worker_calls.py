"""One request carried out on workers: sent, sent again where that is safe, and answered exactly once.

Which worker is asked, `router.py` decides; whether its node must catch up first, `fences.py`. What may be done twice is
asked of another node when the first takes long or is lost. A write whose worker died may have happened: its caller is
told `unknown_outcome`. Appends with events go another way (`appends.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import structlog

from gater.api import schema
from gater.api.decoding import decoded
from gater.api.router import ANY_STORE, Worker
from gater.api.schema import Request
from gater.erl.errors import CallError, EncodeError, NoProcess
from gater.erl.gen_server import PendingCall
from gater.erl.terms import Atom, Term

if TYPE_CHECKING:
    from gater.api.service import OnReply, Service

MAX_ATTEMPTS: Final = 5
"""Workers asked for one request before the caller is told."""

ATTEMPT_SHARE: Final = 0.4
"""Of the time left, how much the first worker may take before another node is asked as well: a frozen node answers
never, and a large read answers late; two more can be asked before time is up."""

MIN_ATTEMPT_S: Final = 0.5
"""But never less than this."""

PAUSE_S: Final = 0.02
"""Before a node that lags behind what has been appended is asked for a version again."""

_REPLY_LEVELS: Final = 1
_DRAINING: Final = schema.error(schema.DRAINING)

log = structlog.get_logger(__name__)


class WorkerCall:
    """One request under way: one worker, and for what may be done twice one more on another node each time the latest
    takes too long; the first reply counts. Exactly one reply."""

    __slots__ = (
        "_asked",
        "_attempts",
        "_deadline",
        "_loop",
        "_on_reply",
        "_request",
        "_service",
        "_slow",
        "_stale",
        "_term",
        "_timer",
        "_tried",
    )

    def __init__(self, service: Service, request: Request, term: Term, on_reply: OnReply, timeout_s: float) -> None:
        self._service = service
        self._request = request
        self._term = term
        self._on_reply: OnReply | None = on_reply
        self._attempts = 0
        self._tried: set[Atom] = set()
        self._asked: dict[Worker, PendingCall] = {}
        self._slow: asyncio.TimerHandle | None = None
        self._stale: Term = None
        """A reply that does not know of the last append: better than none when time is up."""
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._timer = self._loop.call_later(timeout_s, self._timed_out, timeout_s)

    def begin(self) -> None:
        """Send the request to whoever can answer it."""
        service, request = self._service, self._request
        if service.is_embedded(request.store):
            assert service.embedded is not None
            service.embedded.submit(request, self._answer)
            return
        if request.store is None and service.embedded is not None:
            service.embedded.submit(request, self._merge_stores)
            return
        self._send()

    def _send(self, *, refreshed: bool = False) -> None:
        service, request = self._service, self._request
        now = self._loop.time()
        worker = service.router.choose(request.store, request.stream, now, self._tried)
        if worker is None and self._asked:
            # Every node has been asked, and some have not answered yet.
            return
        if worker is None and self._tried:
            self._tried.clear()
            worker = service.router.choose(request.store, request.stream, now)
        if worker is None and request.op == "get_version" and not service.router.is_known(request.store):
            # As the original: whoever is asked answers, for a store it does not know too.
            if service.embedded is not None:
                service.embedded.submit(request, self._answer)
                return
            worker = service.router.choose(None, None, now, self._tried)
        if worker is None:
            if refreshed:
                self._answer(schema.error(service.missing(request.store)))
            elif not service.refresh(self._refreshed):
                self._answer(schema.error(schema.OVERLOADED))
            return
        if (
            worker.store is None
            or request.stream is None
            or not request.idempotent
            or not service.fences.lags(worker.store, request.stream, worker.node)
        ):
            self._ask(worker, now)
        elif service.fences.can_catch_up(worker.store, worker.node):
            service.fences.catch_up(worker.store, worker.node, lambda has_all: self._caught_up(worker, has_all))
        else:
            self._ask(self._last_writer(self._tried) or worker, now)

    def _last_writer(self, avoid: Collection[Atom] = ()) -> Worker | None:
        """Who has at least what was appended last through this gateway, if it has not been asked yet."""
        store, stream = self._request.store, self._request.stream
        writer = None if store is None or stream is None else self._service.fences.last_writer(store, stream)
        if writer is None or writer.node in avoid or any(asked.node is writer.node for asked in self._asked):
            return None
        return writer

    def _caught_up(self, worker: Worker, has_all: bool) -> None:
        """Ask `worker`, whose node has caught up; if it has not, another one. If none can, reads go on all the same."""
        if self._on_reply is None:
            return
        service, request = self._service, self._request
        now = self._loop.time()
        if not has_all:
            self._failed(worker)
            if service.router.choose(request.store, request.stream, now, self._tried) is not None:
                self._send()
                return
            worker = self._last_writer() or worker
        if service.router.has(worker):
            self._ask(worker, now)
        else:
            self._send()

    def _ask(self, worker: Worker, now: float) -> None:
        service, request = self._service, self._request
        service.attach(self, worker)
        service.router.asked(worker, now)
        try:
            self._asked[worker] = PendingCall(
                service.node,
                worker.address,
                self._term,
                lambda reply, error: self._replied(worker, reply, error),
                timeout_s=None,
                spine_levels=_REPLY_LEVELS,
                watched=False,
            )
        except EncodeError as error:
            service.detach(self, worker)
            self._answer(schema.error(schema.invalid_request(f"{request.op}: {error}")))
            return
        if request.idempotent and request.store is not None and len(service.router.nodes(request.store)) > 1:
            wait_s = max((self._deadline - now) * ATTEMPT_SHARE, MIN_ATTEMPT_S)
            if self._slow is not None:
                self._slow.cancel()
            self._slow = self._loop.call_later(wait_s, self._too_slow, worker)

    def _refreshed(self) -> None:
        if self._on_reply is not None:
            self._send(refreshed=True)

    def _too_slow(self, worker: Worker) -> None:
        """Ask another node as well. What this one has begun goes on: a large read takes as long anywhere."""
        if worker in self._asked:
            self._service.router.unanswered(worker, self._loop.time())
            self._failed(worker)
            self._attempts += 1
            if self._attempts < MAX_ATTEMPTS:
                self._send()

    def _failed(self, worker: Worker) -> None:
        if worker.node in self._tried:
            return
        if self._service.router.breaker(worker.node).failed(self._loop.time()):
            log.warning("node_left_out", store=str(worker.store), peer=str(worker.node))
        self._service.doubt(worker.node)
        self._tried.add(worker.node)

    def _replied(self, worker: Worker, reply: Term, error: CallError | None) -> None:
        if self._on_reply is None:
            return
        if error is not None:
            self.worker_down(worker, error)
            return
        router = self._service.router
        router.answered(worker)
        if worker.store is ANY_STORE and _is_error(reply) and decoded(reply) == _DRAINING:
            # That gateway is shutting down, and has done nothing.
            router.leaving(worker.address)
            others = any(each.store is ANY_STORE and not each.leaving for each in router)
            self._attempts += 1
            if others and self._attempts < MAX_ATTEMPTS:
                self._asked.pop(worker)
                self._service.detach(self, worker)
                self._send()
                return
        if self._request.op == "get_version" and self._misses(worker, reply):
            self._stale = reply
            self._asked.pop(worker)
            self._service.detach(self, worker)
            self._loop.call_later(PAUSE_S, self._ask_again)
            return
        self._answer(reply)

    def _misses(self, worker: Worker, reply: Term) -> bool:
        store, stream = self._request.store, self._request.stream
        if store is None or stream is None:
            return False
        least = self._service.fences.least_version(store, stream, worker.node)
        if least < 0 or _is_error(reply):
            return False
        version = decoded(reply)[1]
        return type(version) is int and version < least

    def _ask_again(self) -> None:
        if self._on_reply is not None:
            self._send()

    def worker_down(self, worker: Worker, error: CallError) -> None:
        """The worker is gone, or was not there at all: try another one, or say so."""
        pending = self._asked.pop(worker, None)
        if self._on_reply is None or pending is None:
            return
        pending.cancel()
        self._service.detach(self, worker)
        self._attempts += 1
        never_begun = isinstance(error, NoProcess)
        if never_begun:
            self._service.router.remove(worker)
        else:
            self._failed(worker)
        if self._attempts < MAX_ATTEMPTS and (never_begun or self._request.idempotent):
            self._send()
        elif self._asked:
            return
        elif self._request.is_write and not never_begun:
            self._answer(schema.error(schema.unknown_outcome(f"{error}; read the stream and look for the event ids")))
        else:
            self._answer(schema.error(schema.worker_died(error.reason)))

    def _timed_out(self, timeout_s: float) -> None:
        for worker in self._asked:
            self._service.router.unanswered(worker, self._loop.time())
        if self._stale is not None:
            self._answer(self._stale)
            return
        if self._request.is_write and self._asked:
            reason = schema.unknown_outcome(
                f"no answer within {timeout_s:g} s; read the stream and look for the event ids"
            )
        else:
            reason = schema.call_timeout(round(timeout_s * 1000))
        self._answer(schema.error(reason))

    def _merge_stores(self, own: Term) -> None:
        """`list_stores` of a node with an embedded store: its own and those of the cluster."""
        service = self._service
        if len(service.router) == 0:
            self._answer(own)
            return
        finish = self._on_reply
        if finish is None:
            return

        def merged(reply: Term) -> None:
            match own, decoded(reply):
                case (schema.OK, list(mine)), (schema.OK, list(theirs)):
                    finish((schema.OK, mine + theirs))
                case _:
                    finish(own)

        self._on_reply = merged
        self._send()

    def _let_go(self) -> None:
        for worker, pending in self._asked.items():
            pending.cancel()
            self._service.detach(self, worker)
        self._asked.clear()
        if self._slow is not None:
            self._slow.cancel()

    def _answer(self, reply: Term) -> None:
        on_reply, self._on_reply = self._on_reply, None
        if on_reply is None:
            return
        self._let_go()
        self._timer.cancel()
        self._service.done()
        on_reply(reply)


def _is_error(reply: Term) -> bool:
    return type(reply) is tuple and len(reply) == 2 and reply[0] is schema.ERROR
