"""Appends to the cluster's stores: carries out what `append.py` decides.

Appends of one stream are carried out one after the other, in the order in which their callers came; different streams
do not wait for each other. The first write of an append whose stream's version is known (or named by the caller) is one
remote call and no task; asking for versions, catching up and resolving are rare and run as a task.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog

from gater.api import guarded, schema
from gater.api.append import Append, AskVersion, Done, Resolve, Step, Write
from gater.api.router import Worker
from gater.api.schema import Request
from gater.erl.errors import CallError, EncodeError, ErlangException, ErlangThrow, NoProcess
from gater.erl.gen_server import PendingCall
from gater.erl.rpc import PendingRpc, erpc_call
from gater.erl.terms import Atom, EncodedTerm, Term

if TYPE_CHECKING:
    from gater.api.service import OnReply, Service

ATTEMPT_S: Final = 1.0
"""How long one write may take before another node is asked: many times the usual, and leaves time for others ..."""
ATTEMPT_PER_EVENT_S: Final = 0.01
"""... and this much longer for each event of the batch (a real cluster needs 1 ms an event)."""

PUT_SHARE: Final = 0.8
"""How much of that the store may take for one event, and the node to begin with the last one: then a node that is alive
can say how far it has come, or that its store does not answer, before it is itself taken for one that hangs."""

LEAST_ATTEMPT_S: Final = 0.5
"""What is left of a batch is not gone on with if there is less time: it would not be much, and hardly be known."""

LEAST_LEFT_S: Final = 0.005
"""An append whose turn comes with less time left is not begun: no store answers that fast."""

PAUSE_S: Final = 0.1
"""Before the only node left is asked again."""

CATCH_UP_S: Final = 1.0
"""How long a node may take to catch up before another one is asked."""

MAX_WRITES_PER_NODE: Final = 64
"""Writes under way on one store node; further ones wait here. More at once would only make each of them slower there,
and time out."""

MAX_REMEMBERED_STREAMS: Final = 100_000
"""Streams whose last version and owner are remembered, and as many that others have told of: at some 200 bytes each,
20 MB."""

log = structlog.get_logger(__name__)


class Remembered(NamedTuple):
    """A stream as it was after an append: its version, the node that wrote, and when (of the loop's clock)."""

    version: int
    owner: Atom
    at: float


class Appends:
    """The appends under way of one service, by stream."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._queues: dict[tuple[Atom, bytes], deque[_AppendCall]] = {}
        self._remembered: OrderedDict[tuple[Atom, bytes], Remembered] = OrderedDict()
        self._heard: OrderedDict[tuple[Atom, bytes], Remembered] = OrderedDict()
        """The same of appends that went through other gateways."""
        self._writing: dict[Atom, int] = {}
        self._waiting: dict[Atom, deque[tuple[_AppendCall, Write]]] = {}
        self._quiet_until: dict[Atom, float] = {}

    def submit(self, request: Request, events: Term, on_reply: OnReply, timeout_s: float) -> None:
        """Carry out an append; `events` are its events as they are to be sent (encoded or not)."""
        call = _AppendCall(self, request, events, on_reply, timeout_s)
        queue = self._queues.get(call.key)
        if queue is None:
            self._queues[call.key] = queue = deque((call,))
            self._begin_next(queue, call.key)
        else:
            queue.append(call)

    def _begin_next(self, queue: deque[_AppendCall], key: tuple[Atom, bytes]) -> None:
        """Begin the first append of the queue that still waits for its turn; one after the other while they end at
        once."""
        while queue:
            call = queue[0]
            if not call.answered:
                call.begin()
            if not call.answered:
                return
            queue.popleft()
        del self._queues[key]

    def finished(self, call: _AppendCall) -> None:
        """`call` has been answered: the next append of its stream begins."""
        queue = self._queues[call.key]
        # One that ran out of time while it waited, or ended as soon as it began, is skipped by `_begin_next`.
        if queue[0] is call and not call.beginning:
            self._begin_next(queue, call.key)

    def may_write(self, node: Atom, call: _AppendCall, step: Write) -> bool:
        """Take a place among the writes under way on `node`; if there is none, `step` is taken when one is free."""
        writing = self._writing.get(node, 0)
        if writing >= MAX_WRITES_PER_NODE:
            self._waiting.setdefault(node, deque()).append((call, step))
            return False
        self._writing[node] = writing + 1
        return True

    def write_ended(self, node: Atom) -> None:
        """A write on `node` is over: those that wait may begin, as far as there is room."""
        self._writing[node] -= 1
        if self._writing[node] == 0:
            del self._writing[node]
        waiting = self._waiting.get(node)
        while waiting and self._writing.get(node, 0) < MAX_WRITES_PER_NODE:
            # Whoever waited chooses anew: the node may have been left out meanwhile.
            call, step = waiting.popleft()
            call.resume(step)
        if waiting is not None and not waiting and self._waiting.get(node) is waiting:
            del self._waiting[node]

    def left_out(self, node: Atom) -> None:
        """`node` gets no writes for a while: those that wait for it go elsewhere."""
        for call, step in self._waiting.pop(node, ()):
            call.resume(step)

    def complain(self, store: Atom, node: Atom, reason: Term) -> None:
        """Log that an attempt has failed, at most once a second for each node."""
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until.get(node, now):
            self._quiet_until[node] = now + 1
            log.warning("append_attempt_failed", store=str(store), peer=str(node), reason=repr(reason)[:200])

    def remembered(self, key: tuple[Atom, bytes]) -> Remembered | None:
        """What this gateway last saw of a stream."""
        return self._remembered.get(key)

    def remember(self, key: tuple[Atom, bytes], version: int, owner: Atom) -> None:
        """The stream is at `version` now."""
        _remember(self._remembered, key, version, owner)

    def hear(self, key: tuple[Atom, bytes], version: int, owner: Atom) -> None:
        """Another gateway has brought the stream to `version`."""
        heard = self._heard.get(key)
        # What several gateways tell may come in any order.
        if heard is None or heard.version < version:
            _remember(self._heard, key, version, owner)

    def latest(self, key: tuple[Atom, bytes]) -> Remembered | None:
        """The latest append of a stream that is known of, whichever gateway it went through. Its owner has all earlier
        ones too."""
        own, heard = self._remembered.get(key), self._heard.get(key)
        return own if heard is None or (own is not None and own.version >= heard.version) else heard


def _remember(
    streams: OrderedDict[tuple[Atom, bytes], Remembered], key: tuple[Atom, bytes], version: int, owner: Atom
) -> None:
    streams[key] = Remembered(version, owner, asyncio.get_running_loop().time())
    streams.move_to_end(key)
    if len(streams) > MAX_REMEMBERED_STREAMS:
        streams.popitem(last=False)


class _Asked:
    """A request to a worker: its load until it has ended, and a success or failure for its circuit breaker."""

    __slots__ = ("_on_done", "_pending", "_router", "_worker")

    def __init__(
        self,
        service: Service,
        worker: Worker,
        request: Term,
        on_done: Callable[[Term, CallError | None], None],
        timeout_s: float,
    ) -> None:
        self._router = service.router
        self._worker: Worker | None = worker
        self._on_done = on_done
        self._pending = PendingCall(service.node, worker.address, request, self._done, timeout_s=timeout_s)
        worker.load += 1
        self._router.asked(worker, asyncio.get_running_loop().time())

    def cancel(self) -> None:
        """Nobody can wait any longer."""
        self._pending.cancel()
        self._ended(is_answered=False)

    def _done(self, reply: Term, error: CallError | None) -> None:
        self._ended(is_answered=error is None)
        self._on_done(reply, error)

    def _ended(self, *, is_answered: bool) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.load -= 1
        if is_answered:
            self._router.answered(worker)
        else:
            self._router.unanswered(worker, asyncio.get_running_loop().time())


class _AppendCall:
    """One append: at most one write at a time, exactly one reply."""

    __slots__ = (
        "_all_tried",
        "_appends",
        "_avoid",
        "_deadline",
        "_events",
        "_first",
        "_loop",
        "_node",
        "_on_reply",
        "_pending",
        "_plan",
        "_records",
        "_request",
        "_service",
        "_store",
        "_stream",
        "_task",
        "_timer",
        "_writing_on",
        "_wrote_in_vain",
        "beginning",
        "key",
    )

    def __init__(self, appends: Appends, request: Request, events: Term, on_reply: OnReply, timeout_s: float) -> None:
        self._appends = appends
        self._service = appends.service
        self._request = request
        self._events = events
        self._on_reply: OnReply | None = on_reply
        self.beginning = False
        """Whether `begin` is running: what ends now ends before it has really begun."""
        assert request.store is not None
        assert request.stream is not None
        self._store = request.store
        self._stream = request.stream
        self.key = (request.store, request.stream)
        self._plan: Append
        self._avoid: set[Atom] = set()
        self._all_tried = False
        self._node: Atom | None = None
        self._writing_on: Atom | None = None
        self._wrote_in_vain = False
        """Whether a write was refused: there are other writers, and the next write may be refused too."""
        self._first = 0
        """The number of the first event in the write under way."""
        self._records: list[bytes] = []
        """What has been stored, one record for each event, empty if nobody wanted to know."""
        self._pending: PendingRpc | _Asked | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._timer = self._loop.call_later(timeout_s, self._out_of_time, timeout_s)
        term = request.term
        remembered = appends.remembered(self.key)
        self._plan = Append(
            term[3] if len(term) == 5 else None,
            [event[schema.EVENT_ID] for event in term[-1]],
            known_version=None if remembered is None else remembered.version,
        )

    @property
    def answered(self) -> bool:
        """Whether the caller has had its reply."""
        return self._on_reply is None

    def begin(self) -> None:
        """It is this append's turn."""
        self.beginning = True
        try:
            self._begin()
        finally:
            self.beginning = False

    def _begin(self) -> None:
        if self._deadline - self._loop.time() < LEAST_LEFT_S:
            # `_out_of_time` comes next, and nothing has been sent of which nobody could know what became of it.
            return
        remembered = self._appends.remembered(self.key)
        if remembered is not None:
            self._plan.saw(remembered.version)
        if not self._choose_node():
            if not self._service.refresh(self._begin_refreshed):
                self._finish(Done(schema.error(schema.OVERLOADED)))
            return
        self._first_step()

    def _begin_refreshed(self) -> None:
        if self.answered:
            return
        if self._choose_node():
            self._first_step()
        else:
            self._finish(Done(schema.error(self._service.missing(self._store))))

    def _first_step(self) -> None:
        refusal = self._service.write_refusal(self._store)
        if refusal is not None:
            self._finish(Done(schema.error(refusal)))
            return
        remembered, is_guarded = self._appends.latest(self.key), self._is_guarded
        if is_guarded or (remembered is not None and remembered.owner is self._node):
            self.take(self._plan.begin(guarded=is_guarded))
        else:
            # A worker's check looks at its own node only: a new owner has to have everything first.
            self._run(self._catch_up_and_begin())

    def _choose_node(self) -> bool:
        """Choose who writes: the stream's owner, or who takes its place. False if there is nobody (yet)."""
        service, now = self._service, self._loop.time()
        unfit = service.unfit_for_writes(self._store)
        self._all_tried = False
        self._node = service.router.owner(self._store, self._stream, now, self._avoid | unfit)
        if self._node is None and self._avoid:
            self._avoid.clear()
            self._all_tried = True
            self._node = service.router.owner(self._store, self._stream, now, unfit)
        return self._node is not None

    def _choose_another_node(self) -> bool:
        """As `_choose_node`; False also if every node has been tried since the last pause."""
        before = self._node
        return self._choose_node() and self._node is not before and not self._all_tried

    @property
    def _forms(self) -> guarded.Forms | None:
        return None if self._node is None else self._service.guarded_form(self._node)

    @property
    def _is_guarded(self) -> bool:
        return self._forms is not None

    # Steps

    def take(self, step: Step) -> None:
        """Carry out the next step."""
        match step:
            case Done():
                self._finish(step)
            case Write(first, again, True):
                self._loop.call_later(PAUSE_S, self.resume, Write(first, again))
            case Write() if (forms := self._forms) is not None:
                self._write_guarded(step, forms)
            case Write(first, False):
                self._write_by_worker(first)
            case Write(first, True) | Resolve(first):
                self._run(self._resolve(first))
            case AskVersion(fenced):
                self._run(self._ask_version(fenced))

    def _attempt_s(self) -> float:
        remaining = self._deadline - self._loop.time()
        return max(0.0, min(remaining, ATTEMPT_S + ATTEMPT_PER_EVENT_S * len(self._request.term[-1])))

    def _write_guarded(self, step: Write, forms: guarded.Forms) -> None:
        node = self._node
        assert node is not None
        if not self._appends.may_write(node, self, step):
            return
        self._writing_on = node
        self._first = step.first
        attempt_s = self._attempt_s()
        timeout_ms = max(1, round(attempt_s * PUT_SHARE * 1000))
        if step.again or self._wrote_in_vain:
            mfa = guarded.call(
                forms,
                self._store,
                self._stream,
                self._events,
                step.first,
                again=step.again,
                timeout_ms=timeout_ms,
            )
        else:
            mfa = guarded.first_call(
                forms,
                self._store,
                self._stream,
                self._events,
                step.first,
                len(self._request.term[-1]),
                wanted=self._service.follows(self._store),
                timeout_ms=timeout_ms,
            )
        self._evaluate(mfa, attempt_s)

    def _write_rest(self, number: int, mine: Sequence[Term]) -> None:
        """Go on from `number`, with the whole expression; everything before it is stored."""
        events = self._events if number == self._first else self._request.term[-1][number - self._first :]
        attempt_s = self._attempt_s()
        forms = self._forms
        assert forms is not None
        mfa = guarded.call(
            forms,
            self._store,
            self._stream,
            events,
            number,
            again=self._plan.in_doubt,
            mine=mine,
            timeout_ms=max(1, round(attempt_s * PUT_SHARE * 1000)),
        )
        self._evaluate(mfa, attempt_s)

    def _evaluate(self, mfa: tuple[Atom, Atom, list[Term]], attempt_s: float) -> None:
        node = self._node
        assert node is not None
        self._service.router.breaker(node).probing(self._loop.time())
        try:
            self._pending = PendingRpc(self._service.node, node, mfa, self._guarded_done, attempt_s)
        except EncodeError as error:
            self._finish(Done(schema.error(schema.invalid_request(f"append_events: {error}"))))
            return
        self._plan.sent()

    def _write_over(self) -> None:
        node, self._writing_on = self._writing_on, None
        if node is not None:
            self._appends.write_ended(node)

    def _guarded_done(self, result: Term, error: ErlangException | None) -> None:
        self._pending = None
        outcome = error.reason if isinstance(error, ErlangThrow) else None
        if not self.answered:
            match outcome:
                case (problem, int(number), [mine]) if guarded.is_refusal(problem):
                    # Another writer was there, or Khepri repeated the put: the whole expression tells which.
                    self._wrote_in_vain = True
                    self._write_rest(number, [mine])
                    return
                case (kind, int(number)) if kind is guarded.LATE and self._attempt_s() > LEAST_ATTEMPT_S:
                    self._write_rest(number, [])
                    return
        self._write_over()
        if self.answered:
            return
        match outcome:
            case (kind, int(last), [*records]) if kind is schema.OK:
                self._node_works()
                self._records = records
                self.take(self._plan.written(last))
            case (kind, int(last)) if kind is guarded.WRITTEN:
                self._node_works()
                self.take(self._plan.written(last))
            case (kind, int(number), int(count)) if kind is guarded.REFUSED:
                self._node_works()
                self.take(self._plan.refused(number, count))
            case (kind, int(number), int(count)) if kind is guarded.AHEAD:
                self._node_works()
                self.take(self._plan.ahead(number, count))
            case (kind, int(number)) if kind is guarded.LATE:
                self._node_works()
                self.take(self._plan.late(number))
            case _:
                self._attempt_failed(error.reason if error is not None else result)
                self._again(self._plan.unknown(guarded=True))

    def _write_by_worker(self, first: int) -> None:
        worker = self._worker_on(self._node)
        if worker is None:
            self._again(self._plan.not_sent())
            return
        request = (schema.APPEND_EVENTS, self._store, self._stream, first - 1, self._events)
        try:
            self._pending = _Asked(self._service, worker, request, self._worker_done, self._attempt_s())
        except EncodeError as error:
            self._finish(Done(schema.error(schema.invalid_request(f"append_events: {error}"))))
            return
        self._plan.sent()

    def _worker_done(self, reply: Term, error: CallError | None) -> None:
        self._pending = None
        if self.answered:
            return
        if error is not None:
            self._attempt_failed(error.reason)
            step = self._plan.not_sent() if isinstance(error, NoProcess) else self._plan.unknown(guarded=False)
            self._again(step)
            return
        match reply:
            case (schema.OK, int(version)):
                self.take(self._plan.written(version))
            case (schema.ERROR, reason) if schema.is_wrong_expected_version(reason):
                self._run(self._refused_by_worker())
            case _:
                self._finish(Done(reply))

    def _worker_on(self, node: Atom | None) -> Worker | None:
        return None if node is None else self._service.router.worker_on(self._store, node, self._loop.time())

    def _node_works(self) -> None:
        if self._node is not None:
            self._service.router.breaker(self._node).succeeded()

    def _attempt_failed(self, reason: Term) -> None:
        node = self._node
        if node is None:
            return
        self._appends.complain(self._store, node, reason)
        if self._service.router.breaker(node).failed(self._loop.time()):
            log.warning("node_left_out", store=str(self._store), peer=str(node))
            self._appends.left_out(node)
        self._service.doubt(node)
        self._avoid.add(node)

    def _again(self, step: Step) -> None:
        """Take `step` on another node if there is one, else on this one a little later."""
        if self._choose_another_node():
            self.take(step)
        else:
            self._loop.call_later(PAUSE_S, self.resume, step)

    def resume(self, step: Step) -> None:
        """Take `step`, which had to wait, on the node that is the right one now."""
        if self.answered:
            return
        if self._choose_node():
            self.take(step)
        elif not self._service.refresh(lambda: self._loop.call_later(PAUSE_S, self.resume, step)):
            self._loop.call_later(PAUSE_S, self.resume, step)

    # Rare steps, as tasks

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.ensure_future(work)

    async def _ask_version(self, fenced: bool) -> None:
        while not self.answered:
            try:
                if fenced:
                    await self._catch_up()
                version = await self._version(self._node)
            except (CallError, ErlangException) as error:
                await self._elsewhere(error)
            else:
                self.take(self._plan.version(version))
                return

    async def _catch_up_and_begin(self) -> None:
        while not self.answered:
            try:
                await self._catch_up()
            except (CallError, ErlangException) as error:
                await self._elsewhere(error)
            else:
                self.take(self._plan.begin(guarded=self._is_guarded))
                return

    async def _refused_by_worker(self) -> None:
        while not self.answered:
            try:
                await self._catch_up()
                version = await self._version(self._node)
            except (CallError, ErlangException) as error:
                await self._elsewhere(error)
            else:
                self.take(self._plan.refused_by_worker(version + 1))
                return

    async def _resolve(self, first: int) -> None:
        """Look whether the events have arrived, on a node that knows all there is."""
        while not self.answered:
            try:
                await self._catch_up()
                version = await self._version(self._node)
                count = len(self._request.term[-1])
                request = schema.get_events_request(self._store, self._stream, first, count)
                reply = await self._ask(self._node, request)
            except (CallError, ErlangException) as error:
                await self._elsewhere(error)
                continue
            match reply:
                case (schema.OK, list(events)):
                    self.take(self._plan.found([event.get(schema.EVENT_ID) for event in events], version))
                    return
                case _:
                    await asyncio.sleep(PAUSE_S)

    async def _elsewhere(self, error: CallError | ErlangException) -> None:
        """Go on on another node if there is one, else on this one a little later."""
        self._attempt_failed(error.reason)
        if not self._choose_another_node():
            await asyncio.sleep(PAUSE_S)

    async def _catch_up(self) -> None:
        """Wait until the owner's node has everything that is committed.

        With Khepri by its fence; else until it has the highest version that any live node reports. What this gateway or
        the caller knew of the stream is waited for too, but not insisted on: a store may have lost it.
        """
        node = self._node
        if node is None:
            raise NoProcess(schema.NOT_FOUND)
        if self._is_guarded:
            timeout_ms = round(CATCH_UP_S * 1000)
            outcome = await erpc_call(
                self._service.node, node, "khepri", "fence", [self._store, timeout_ms], timeout_s=CATCH_UP_S
            )
            if outcome is not schema.OK:
                raise CallError(outcome, f"{node} does not catch up: {outcome!r}")
            return
        others = self._service.router.nodes(self._store)
        answers = await asyncio.gather(*(self._version(other) for other in others), return_exceptions=True)
        highest = max((answer for answer in answers if isinstance(answer, int)), default=-1)
        remembered, expected = self._appends.latest(self.key), self._request.term[3]
        hoped_for = max(
            highest,
            -1 if remembered is None else remembered.version,
            expected if len(self._request.term) == 5 and type(expected) is int else -1,
        )
        give_up = self._loop.time() + CATCH_UP_S
        while (version := await self._version(node)) < hoped_for:
            if self._loop.time() > give_up:
                if version >= highest:
                    return
                raise CallError(schema.NOT_FOUND, f"{node} is behind version {highest} and does not catch up")
            await asyncio.sleep(PAUSE_S / 10)

    async def _version(self, node: Atom | None) -> int:
        if node is not None and self._is_guarded:
            return await guarded.version(self._service.node, node, self._store, self._stream, CATCH_UP_S)
        match await self._ask(node, schema.get_version_request(self._store, self._stream)):
            case (schema.OK, int(version)):
                return version
            case reply:
                raise CallError(reply, f"{node} does not say at which version the stream is: {reply!r}")

    async def _ask(self, node: Atom | None, request: Term) -> Term:
        """Ask a worker of this store on `node`."""
        worker = self._worker_on(node)
        if worker is None:
            raise NoProcess(schema.NOT_FOUND, f"no worker on {node}")
        answered: asyncio.Future[Term] = self._loop.create_future()

        def on_done(reply: Term, error: CallError | None) -> None:
            if answered.done():
                return
            if error is None:
                answered.set_result(reply)
            else:
                answered.set_exception(error)

        pending = _Asked(self._service, worker, request, on_done, min(CATCH_UP_S, self._attempt_s()))
        try:
            return await answered
        finally:
            pending.cancel()

    # The end

    def _out_of_time(self, timeout_s: float) -> None:
        self._finish(self._plan.out_of_time(timeout_s))

    def _finish(self, done: Done) -> None:
        on_reply, self._on_reply = self._on_reply, None
        if on_reply is None:
            return
        self._timer.cancel()
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._write_over()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if done.version is not None and self._node is not None:
            self._appends.remember(self.key, done.version, self._node)
        self._service.done()
        try:
            if done.reply[0] is schema.OK:
                self._tell(done.reply[1])
        finally:
            try:
                on_reply(done.reply)
            finally:
                self._appends.finished(self)

    def _tell(self, version: Term) -> None:
        events, records = self._request.term[-1], self._records
        stored: Sequence[tuple[Term, bytes]] = ()
        if self._service.follows(self._store) and len(records) == len(events) and all(records):
            stored = [(event[schema.EVENT_TYPE], record) for event, record in zip(events, records, strict=True)]
        self._service.appended(self._store, self._stream, version, self._node, stored)


def events_to_send(term: tuple[Term, ...], raw: Term) -> Term:
    """The events of an append as they are to be sent: still encoded if the request came so."""
    if type(raw) is tuple and raw and type(raw[-1]) is EncodedTerm:
        return raw[-1]
    return term[-1]
