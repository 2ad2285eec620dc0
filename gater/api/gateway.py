"""The Python client: `async with Gateway.connect("gater@127.0.0.1", cookie="secret") as gateway: ...`.

A client is a small Erlang node of its own. It connects to nodes that hold stores, or to gateways, and finds the workers
there; from then on a request goes the same way as a request of an Elixir caller (`Service`). Terms come and go as the
typed values of `schema`; an `{:error, reason}` becomes an exception of `gater.errors`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias

import structlog
from structlog.typing import EventDict, WrappedLogger

from gater.api import schema
from gater.api.decoding import decoded
from gater.api.discovery import Discovery
from gater.api.schema import (
    Expected,
    NewEvent,
    ParkedEvent,
    RecordedEvent,
    Rejected,
    Snapshot,
    StoreInfo,
    Subscription,
)
from gater.api.service import Service
from gater.api.subscriptions.client import EventSubscription, gateway_call, gateway_tell
from gater.cluster.connector import Connector
from gater.erl import NodeOptions, make_node
from gater.erl.errors import ErlError, NotConnected
from gater.erl.node import Node
from gater.erl.terms import Atom, Pid, Term
from gater.errors import InvalidRequest
from gater.settings import Settings

Direction: TypeAlias = Literal["forward", "backward"]

PAGE_EVENTS: Final = 500
"""Events asked for at once by the iterators: large enough to hide the round trip, small enough to start quickly."""

CONNECT_TIMEOUT_S: Final = 10.0
"""How long `Gateway.connect` tries to reach a node before it gives up."""

RETRY_INTERVAL_S: Final = 5.0
"""The longest wait between attempts at a node that was named and is not connected, as a gateway's own default."""

_DIRECTIONS: Final = {"forward": schema.FORWARD, "backward": schema.BACKWARD}


class Gateway:
    """A client of ExESDB stores. Made by `Gateway.connect`.

    Every method takes the store's id first. `timeout_s` bounds each request. Raised: `WrongExpectedVersion`,
    `StoreNotFound`, `NoWorkerAvailable`, `CallTimeout`, `WorkerDied`, `UnknownOutcome`, `InvalidRequest`, `Overloaded`,
    `Draining`, or `RequestFailed` for any other `{:error, reason}`.
    """

    def __init__(self, service: Service, *, timeout_s: float | None = None) -> None:
        self._service = service
        self._timeout_s = timeout_s

    @staticmethod
    @asynccontextmanager
    async def connect(
        *nodes: str,
        cookie: str | None = None,
        name: str | None = None,
        options: NodeOptions | None = None,
        timeout_s: float | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> AsyncIterator[Gateway]:
        """Start a client node, connect it to `nodes` (store nodes or gateways; one that answers is enough) and use it.
        The others, and those that are lost, are tried again and again, with growing pauses.

        `cookie` is the cluster's, by default that of the environment (`EX_ESDB_COOKIE`, `RELEASE_COOKIE`) or of
        `~/.erlang.cookie`; so is EPMD's port (`ERL_EPMD_PORT`). `name` is the client node's own name, by default a
        random one on 127.0.0.1.
        Raises `NotConnected` or `HandshakeError` if no node can be reached within `connect_timeout_s` seconds.
        """
        _log_to_standard_error()
        if not nodes:
            raise ValueError("Gateway.connect needs the name of at least one node")
        if cookie is None or options is None:
            settings = Settings.load()
            cookie = settings.require_cookie() if cookie is None else cookie
            options = NodeOptions(epmd_port=settings.epmd_port) if options is None else options
        node = make_node(name or _client_name(), cookie=cookie, options=options)
        connector = Connector(node, retry_interval_s=RETRY_INTERVAL_S)
        discovery: Discovery | None = None
        try:
            async with asyncio.timeout(connect_timeout_s):
                await node.start()
                await _connect_to_any(node, nodes)
            service = Service(node)
            discovery = Discovery(service, connector, through_gateways=True)
            discovery.start()
            connector.start()
            for peer in nodes:
                connector.want(peer, "static", forever=True)
            yield Gateway(service, timeout_s=timeout_s)
        except TimeoutError as error:
            if discovery is not None:
                raise
            raise NotConnected(f"no node answered within {connect_timeout_s:g} s") from error
        finally:
            connector.stop()
            if discovery is not None:
                discovery.stop()
            await node.stop()

    @property
    def node(self) -> Node:
        """The Erlang node this client is."""
        return self._service.node

    # Events

    async def append_events(
        self, store: str, stream: str, events: NewEvent | Sequence[NewEvent], expected_version: Expected = "any"
    ) -> int:
        """Append events; the stream's new version.

        `expected_version` is the version the stream must have: a number (-1: it must not exist), `"any"` or
        `"stream_exists"`; if it has another, `WrongExpectedVersion` is raised and nothing is written. `UnknownOutcome`
        is raised when the store was asked and did not answer.
        """
        batch = [events] if isinstance(events, NewEvent) else list(events)
        for event in batch:
            if not isinstance(event, NewEvent):
                raise InvalidRequest(f"append_events: expected NewEvents, got a {type(event).__name__}")
        version = await self._ask(schema.append_events_request(Atom(store), stream, batch, expected_version))
        return int(version)

    async def get_events(
        self,
        store: str,
        stream: str,
        start_version: int = 0,
        count: int = PAGE_EVENTS,
        direction: Direction = "forward",
    ) -> list[RecordedEvent]:
        """At most `count` events from `start_version` on, upwards or downwards; [] if there are none."""
        request = schema.get_events_request(Atom(store), stream, start_version, count, _DIRECTIONS[direction])
        return [RecordedEvent.from_term(event) for event in await self._ask(request)]

    async def stream_forward(
        self, store: str, stream: str, start_version: int = 0, count: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        """All events from `start_version` on (at most `count`), read page by page while they are asked for."""
        position, left = start_version, count
        while left is None or left > 0:
            size = PAGE_EVENTS if left is None else min(PAGE_EVENTS, left)
            page = await self.get_events(store, stream, position, size)
            for event in page:
                yield event
            if not page:
                return
            position = page[-1].event_number + 1
            left = None if left is None else left - len(page)

    async def stream_backward(
        self, store: str, stream: str, start_version: int | None = None, count: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        """All events from `start_version` (None: the last one) down to the first (at most `count`), page by page."""
        position = await self.get_version(store, stream) if start_version is None else start_version
        left = count
        while position >= 0 and (left is None or left > 0):
            size = PAGE_EVENTS if left is None else min(PAGE_EVENTS, left)
            page = await self.get_events(store, stream, position, size, "backward")
            for event in page:
                yield event
            # A page may be empty because the start lies above the last event: numbers below it are still to be read.
            position = page[-1].event_number - 1 if page else position - size
            left = None if left is None else left - len(page)

    async def get_version(self, store: str, stream: str) -> int:
        """The number of the last event of a stream; -1 if it has none."""
        return int(await self._ask(schema.get_version_request(Atom(store), stream)))

    async def get_streams(self, store: str) -> list[str]:
        """The names of all streams of a store."""
        return [_text(name) for name in await self._ask(schema.store_request("get_streams", Atom(store)))]

    async def list_stores(self) -> list[StoreInfo]:
        """The stores of the cluster."""
        return [StoreInfo.from_term(entry) for entry in await self._ask(schema.list_stores_request())]

    async def get_subscriptions(self, store: str) -> list[Subscription]:
        """The subscriptions saved in a store."""
        saved = await self._ask(schema.store_request("get_subscriptions", Atom(store)))
        return [Subscription.from_term(each) for each in saved.values()]

    def subscribe(
        self,
        store: str,
        selector: str | Mapping[Term, Term] = "$all",
        *,
        type: str = "by_stream",
        name: str | None = None,
        start_from: int | Literal["now"] = 0,
        auto_ack: bool = True,
        window: int | None = None,
        batch_size: int | None = None,
        ack_timeout_s: float | None = None,
        max_retries: int | None = None,
        strategy: Literal["round_robin", "by_stream"] | None = None,
    ) -> EventSubscription:
        """Events as they come: those there from number `start_from` on, then those that are appended.

        `type` is the kind of the selector (`by_stream`: `"$all"` or `"$"` and the stream, `by_event_type`,
        `by_event_pattern`, `by_event_payload`). With a `name` the subscription is kept: it goes on where it stopped
        when somebody subscribes under the same name again. An event is acknowledged when the next one is asked for;
        with `auto_ack=False` when `ack` is called. `await gateway.subscribe(..).run(handler)` calls a function with
        each event instead. Runs in a gateway this client is connected to.
        """
        given = {
            "start_from": Atom("now") if start_from == "now" else start_from,
            "window": window,
            "batch_size": batch_size,
            "ack_timeout_ms": None if ack_timeout_s is None else round(ack_timeout_s * 1000),
            "max_retries": max_retries,
            "strategy": None if strategy is None else Atom(strategy),
        }
        options: dict[Term, Term] = {Atom(key): value for key, value in given.items() if value is not None}
        return EventSubscription(
            self._service,
            Atom(store),
            Atom(type),
            selector.encode() if isinstance(selector, str) else selector,
            schema.TRANSIENT if name is None else name.encode(),
            options,
            auto_ack,
        )

    async def save_subscription(
        self,
        store: str,
        selector: str | Mapping[Term, Term] = "$all",
        *,
        type: str = "by_stream",
        name: str,
        start_from: int = 0,
        subscriber: Pid | None = None,
    ) -> None:
        """As the original: without a `subscriber` only the record is saved in the store. A `subscriber` is a process
        of any node, which gets the events. For a program in Python there is `subscribe`."""
        record = schema.Subscription(Atom(type), selector, name, start_from, subscriber)
        await self._tell_gateway(schema.save_subscription_cast(Atom(store), record))

    async def remove_subscription(
        self, store: str, selector: str | Mapping[Term, Term] = "$all", *, type: str = "by_stream", name: str
    ) -> None:
        """End the subscription of this name, and forget where it stood and what was put aside. Type and selector must
        be its own. Returns when a gateway has been told."""
        await self._tell_gateway(schema.remove_subscription_cast(Atom(store), Atom(type), selector, name))

    async def _tell_gateway(self, request: Any) -> None:
        reason = await gateway_tell(self._service, request)
        if reason is not None:
            raise schema.exception_for(reason, request)

    async def subscription_status(self, store: str, name: str) -> Mapping[Term, Term]:
        """How a persistent subscription stands; a map with atoms as keys."""
        found: Mapping[Term, Term] = await self._ask_gateway("subscription_status", store, name)
        return found

    async def list_parked(self, store: str, name: str) -> list[ParkedEvent]:
        """The events that were put aside, why, and how often each had been delivered."""
        parked: list[ParkedEvent] = []
        while True:
            after = (schema.event_place(parked[-1].event),) if parked else ()
            page = await self._ask_gateway("list_parked", store, name, *after)
            if not page:
                return parked
            parked += [
                ParkedEvent(RecordedEvent.from_term(each[Atom("event")]), each[Atom("reason")], each[Atom("attempts")])
                for each in page
            ]

    async def replay_parked(self, store: str, name: str) -> int:
        """Have the events that were put aside delivered again; how many. Of very many (1,000, or 16 MB) the first that
        are not on their way again already: call it again for the rest."""
        return int(await self._ask_gateway("replay_parked", store, name))

    async def drop_parked(self, store: str, name: str, event: RecordedEvent | None = None) -> int:
        """Forget the events that were put aside, or one of them; how many there were."""
        places = () if event is None else (schema.event_place(event),)
        return int(await self._ask_gateway("drop_parked", store, name, *places))

    async def _ask_gateway(self, op: str, store: str, name: str, *more: Term) -> Any:
        request = (Atom(op), Atom(store), name.encode(), *more)
        return self._result(request, await gateway_call(self._service, request))

    # Snapshots

    async def record_snapshot(
        self, store: str, source: str, stream: str, version: int, record: Snapshot | Term
    ) -> None:
        """Save a snapshot. Returns when the request has been sent: the original acknowledges nothing here."""
        await self._tell(schema.record_snapshot_cast(Atom(store), source, stream, version, record))

    async def read_snapshot(self, store: str, source: str, stream: str, version: int) -> Snapshot | Term | None:
        """The snapshot of that version, None if there is none; no `SnapshotRecord`: the term that was recorded."""
        request = schema.read_snapshot_request(Atom(store), source, stream, version)
        reply = await self._reply(request)
        if reply[0] is schema.ERROR and schema.is_not_found(reply[1]):
            return None
        return _snapshot(self._result(request, reply))

    async def delete_snapshot(self, store: str, source: str, stream: str, version: int) -> None:
        """Delete a snapshot. Returns when the request has been sent."""
        await self._tell(schema.delete_snapshot_cast(Atom(store), source, stream, version))

    async def list_snapshots(
        self, store: str, source: str | None = None, stream: str | None = None
    ) -> dict[tuple[str, str, int], Snapshot | Term]:
        """The snapshots of a source and stream (None: any), by (source, stream, version)."""
        request = schema.list_snapshots_request(
            Atom(store), schema.ANY if source is None else source, schema.ANY if stream is None else stream
        )
        found: Mapping[Term, Term] = await self._ask(request)
        return {(_text(path[1]), _text(path[2]), int(path[3])): _snapshot(record) for path, record in found.items()}

    # Checks

    async def verify_cluster_consistency(self, store: str) -> Mapping[Term, Term]:
        """Compare the members' views of the store's cluster; the original's map, with atoms as keys."""
        return await self._check("verify_cluster_consistency", store)

    async def quick_health_check(self, store: str) -> Mapping[Term, Term]:
        """Members and status of the store's cluster."""
        return await self._check("quick_health_check", store)

    async def verify_membership_consensus(self, store: str) -> Mapping[Term, Term]:
        """Whether all members agree who the members are."""
        return await self._check("verify_membership_consensus", store)

    async def check_raft_log_consistency(self, store: str) -> Mapping[Term, Term]:
        """Compare the members' Raft logs."""
        return await self._check("check_raft_log_consistency", store)

    async def _check(self, op: str, store: str) -> Mapping[Term, Term]:
        found: Mapping[Term, Term] = await self._ask(schema.store_request(op, Atom(store)))
        return found

    # Requests

    async def _ask(self, request: Term) -> Any:
        return self._result(request, await self._reply(request))

    async def _reply(self, request: Term) -> tuple[Term, Term]:
        answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Term) -> None:
            if not answered.done():
                answered.set_result(reply)

        self._service.call(request, on_reply, self._timeout_s)
        reply = decoded(await answered)
        if type(reply) is tuple and len(reply) == 2:
            return reply
        return (schema.ERROR, reply)

    @staticmethod
    def _result(request: Term, reply: tuple[Term, Term]) -> Term:
        if reply[0] is schema.OK:
            return reply[1]
        raise schema.exception_for(reply[1], request)

    async def _tell(self, request: Term) -> None:
        taken: asyncio.Future[Rejected | None] = asyncio.get_running_loop().create_future()

        def on_taken(refused: Rejected | None) -> None:
            if not taken.done():
                taken.set_result(refused)

        self._service.cast(request, on_taken)
        refused = await taken
        if refused is not None:
            raise schema.exception_for(refused.reason, request)


def _text(name: Term) -> str:
    return name.decode() if type(name) is bytes else str(name)


def _snapshot(record: Term) -> Snapshot | Term:
    return Snapshot.from_term(record) if schema.is_struct(record, schema.SNAPSHOT_RECORD) else record


def _client_name() -> str:
    return f"gater_client_{os.getpid()}_{secrets.token_hex(4)}@127.0.0.1"


def _log_to_standard_error() -> None:
    """Where nobody has set structlog up, warnings and worse go to standard error: its own default is everything, on
    standard output, which is the program's."""
    if not structlog.is_configured():
        structlog.configure(
            processors=[_drop_below_warning, *structlog.get_config()["processors"]],
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )


def _drop_below_warning(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    if method in ("debug", "info"):
        raise structlog.DropEvent
    return event


async def _connect_to_any(node: Node, peers: Iterable[str]) -> None:
    """Connect to all peers at once; done when the first one is up, an error when none can be reached."""
    attempts = {asyncio.ensure_future(node.connect(peer)) for peer in peers}
    problem: BaseException = NotConnected("no node was named")
    try:
        while attempts:
            done, attempts = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                error = attempt.exception()
                if error is None:
                    return
                if not isinstance(error, ErlError):
                    raise error
                problem = error
    finally:
        for attempt in attempts:
            # What fails later is reported by the node's log.
            attempt.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    raise problem
