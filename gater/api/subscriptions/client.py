"""A Python program's end of a subscription: `async for event in gateway.subscribe(...)`, or a callback: `run(handler)`.

The subscription runs in a gateway; here is a process of the client's node which gets its events and an iterator that
hands them out. A window of unacknowledged events is all that ever waits here. When the gateway goes, a persistent
subscription goes on by way of another one; a transient one ends, because nobody knows where it stood.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from inspect import isawaitable
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

import structlog

from gater.api import schema
from gater.api.router import Worker
from gater.api.schema import RecordedEvent
from gater.api.server import API_MODULE
from gater.api.service import Service
from gater.erl.errors import CallError, ErlangException
from gater.erl.gen_server import call, cast
from gater.erl.node import Monitor
from gater.erl.process import SHUTDOWN, CallbackReceiver, Process, described
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Term
from gater.errors import InvalidRequest
from gater.pubsub.messages import parse_events

Action: TypeAlias = Literal["retry", "skip", "park", "stop"]
Handler: TypeAlias = Callable[[RecordedEvent], object]
"""A function or a coroutine function; what it returns is awaited if it can be, and has no meaning otherwise."""

FIND_GATEWAY_S: Final = 10.0
"""How long a gateway that takes the subscription is looked for when it starts."""

MOVE_S: Final = 60.0
"""The same when the one that had it is gone: there may be none for a while."""

_FOR_GOOD: Final = frozenset({Atom("subscription_refused"), Atom("invalid_request")})
"""Reasons that will be the same wherever and whenever it is tried again."""

TRY_AGAIN_S: Final = 0.1
"""Between two looks."""

MAX_REASON_CHARACTERS: Final = 1_000
"""Of what a handler raised, kept with its event."""

CALL_TIMEOUT_S: Final = 5.0
"""For a gateway's answer; it gives up itself a little earlier."""

_SUBSCRIBE: Final = Atom("subscribe")
_DRAINING: Final = (schema.ERROR, schema.DRAINING)

log = structlog.get_logger(__name__)


class EventSubscription:
    """Made by `Gateway.subscribe`. Iterate over it, or over what `async with` gives, which stops it at the end; or have
    `run` call a callback.

    Raises in iteration what `Gateway` raises, when the subscription is refused or its gateway is gone for good.
    """

    def __init__(
        self,
        service: Service,
        store: Atom,
        kind: Atom,
        selector: Term,
        name: bytes,
        options: dict[Term, Term],
        acks: bool,
    ) -> None:
        self._service = service
        self._request = (store, kind, selector, name)
        self._options = options
        self._acks = acks
        """Whether asking for the next event acknowledges the one before."""
        self._events: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._last: RecordedEvent | None = None
        self._process: Process | None = None
        self._gateway: Worker | None = None
        self._monitor: Monitor | None = None
        self._moving: asyncio.Task[None] | None = None
        self._problem: Exception | None = None
        self._stopped = False

    # Iteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordedEvent:
        await self.start()
        if self._acks and self._last is not None:
            await self.ack(self._last)
        self._last = None
        while not self._events:
            if self._stopped:
                raise StopAsyncIteration
            if self._problem is not None:
                raise self._problem
            self._arrived.clear()
            await self._arrived.wait()
        self._last = RecordedEvent.from_term(self._events.popleft())
        return self._last

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def run(self, handler: Handler) -> None:
        """Call `handler` with one event after the other, until `stop` is called; it stops at the end in any case.

        An event is acknowledged when its handler has returned, unless the handler has called `nack` for it; with
        `auto_ack=False` the handler calls `ack` as well. An event whose handler raises an exception is logged and
        delivered again after a pause (`nack` with `retry`), at most `max_retries` times; then it is parked. Events
        of its stream that are here already (at most `window`) are handled before it comes again: where that must not
        be, subscribe with `window=1`. When `run` is cancelled the event in hand is not acknowledged.
        """
        async with self:
            async for event in self:
                try:
                    result = handler(event)
                    if isawaitable(result):
                        await result
                except Exception as error:
                    log.warning(
                        "handler_failed",
                        stream=event.event_stream_id,
                        number=event.event_number,
                        error=described(error),
                    )
                    await self.nack(event, "retry", described(error)[:MAX_REASON_CHARACTERS])

    # What can be done

    async def start(self) -> None:
        """Subscribe, if that has not been done. When this returns, whatever is appended from now on will come."""
        if self._process is None and not self._stopped:
            process = self._process = self._service.node.spawn_receiver(CallbackReceiver(self._received))
            try:
                await self._subscribe()
            except BaseException:
                self._process = None
                process.exit(SHUTDOWN)
                raise

    async def ack(self, event: RecordedEvent) -> None:
        """This event has been dealt with."""
        self._tell("ack_event", event)

    async def nack(self, event: RecordedEvent, action: Action = "retry", reason: Term = None) -> None:
        """This event has not been dealt with: deliver it again, skip it, put it aside, or stop the subscription.

        The `reason`, any term (a `str` is sent as a binary), at most 4,096 bytes, is kept with an event that is put
        aside, at once or because it was delivered too often.
        """
        if action not in ("retry", "skip", "park", "stop"):
            raise InvalidRequest(f"nack: the action must be retry, skip, park or stop, got {action!r}")
        if event is self._last:
            self._last = None
        told = Atom(action)
        if isinstance(reason, str):
            reason = reason.encode()
        self._tell("nack_event", event, told if reason is None else (told, reason))

    async def stop(self) -> None:
        """End it here. A persistent one goes on, from the first event not acknowledged, for who comes back."""
        self._stopped = True
        self._events.clear()
        self._arrived.set()
        if self._moving is not None:
            self._moving.cancel()
        if self._monitor is not None:
            self._service.node.demonitor(self._monitor)
            self._monitor = None
        if self._process is not None and self._process.alive:
            self._process.exit(SHUTDOWN)

    # The gateway

    def _received(self, message: Term) -> None:
        self._events.extend(parse_events(message) or ())
        self._arrived.set()

    def _tell(self, op: str, event: RecordedEvent, *more: Term) -> None:
        store, _, _, name = self._request
        gateway, process = self._gateway, self._process
        if gateway is None or process is None:
            return  # between two gateways: the event will come again
        cast(
            self._service.node, gateway.address, (Atom(op), store, name, process.pid, schema.event_place(event), *more)
        )

    async def _subscribe(self, patience_s: float = FIND_GATEWAY_S, *, resume: bool = True) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        store, kind, selector, name = self._request
        process = self._process
        assert process is not None
        options = self._options | {Atom("subscriber"): process.pid}
        if not resume:
            options[Atom("resume")] = False
        request = (_SUBSCRIBE, store, kind, selector, name, options)
        tried: set[Worker] = set()
        while True:
            gateway = await _find(self._service, until, tried)
            reply = await _ask(self._service, gateway, request)
            if reply[0] is not schema.OK:
                reason = reply[1][0] if type(reply[1]) is tuple else reply[1]
                if reason not in _FOR_GOOD and loop.time() < until:
                    await asyncio.sleep(TRY_AGAIN_S)
                    continue
                raise schema.exception_for(reply[1], request)
            self._gateway = gateway
            self._monitor = self._service.node.monitor(gateway.address, self._gateway_down)
            return

    def _gateway_down(self, _: Monitor, reason: Term) -> None:
        self._gateway = self._monitor = None
        if self._stopped:
            return
        if self._request[3] == schema.TRANSIENT:
            self._fail(schema.exception_for(schema.worker_died(reason), (_SUBSCRIBE, *self._request)))
        else:
            self._moving = asyncio.get_running_loop().create_task(self._move())

    async def _move(self) -> None:
        try:
            await self._subscribe(MOVE_S, resume=False)
        except Exception as problem:
            self._fail(problem)

    def _fail(self, problem: Exception) -> None:
        self._problem = problem
        self._arrived.set()


async def gateway_call(service: Service, request: tuple[Term, ...]) -> tuple[Term, Term]:
    """What a gateway answers; one that is shutting down is not the one to ask."""
    tried: set[Worker] = set()
    while True:
        gateway = await _find(service, asyncio.get_running_loop().time() + CALL_TIMEOUT_S, tried)
        reply = await _ask(service, gateway, request)
        if reply != _DRAINING or tried.issuperset(_gateways(service)):
            return reply


async def gateway_tell(service: Service, request: tuple[Term, ...]) -> Term | None:
    """Have a gateway carry out a request that is a cast, by its function: None, or the reason why it did not.

    A client of store nodes alone tells one of these.
    """
    if not _gateways(service) and not service.stores and not await service.refreshed():
        return schema.OVERLOADED
    tried: set[Worker] = set()
    while not tried.issuperset(_gateways(service)):
        gateway = await _find(service, 0, tried)
        function, *arguments = request
        try:
            reply = await erpc_call(
                service.node, gateway.node, API_MODULE, str(function), arguments, timeout_s=CALL_TIMEOUT_S
            )
        except ErlangException as error:
            return schema.worker_died(error.reason)
        if reply is schema.OK:
            return None
        if reply != _DRAINING:
            return reply[1]
    taken: asyncio.Future[Term | None] = asyncio.get_running_loop().create_future()
    service.cast(
        request,
        lambda refused: None if taken.done() else taken.set_result(None if refused is None else refused.reason),
    )
    return await taken


async def _ask(service: Service, gateway: Worker, request: tuple[Term, ...]) -> tuple[Term, Term]:
    try:
        reply: tuple[Term, Term] = await call(service.node, gateway.address, request, timeout_s=CALL_TIMEOUT_S)
    except CallError as error:
        return (schema.ERROR, schema.worker_died(error.reason))
    return reply


def _gateways(service: Service) -> list[Worker]:
    """The gateways in sight, those that are shutting down last."""
    return sorted((worker for worker in service.router if worker.store is None), key=lambda worker: worker.leaving)


async def _find(service: Service, until: float, tried: set[Worker]) -> Worker:
    """A gateway in sight, one after the other of those that are; it is among the `tried` ones then."""
    while True:
        gateways = _gateways(service)
        if tried.issuperset(gateways):
            tried.clear()
        for gateway in gateways:
            if gateway not in tried:
                tried.add(gateway)
                return gateway
        if asyncio.get_running_loop().time() >= until:
            raise InvalidRequest("the client is connected to no gateway: name one in Gateway.connect")
        await asyncio.sleep(TRY_AGAIN_S)
