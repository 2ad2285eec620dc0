"""What a feed asks of its store: pages of events, event counts, the Raft index.

Pages go the way of every request (`Service`). Counts and index come from the embedded store itself, or from a store
node by `erpc`: `khepri_adv:get_many/3` for the number of children below a stream's node (protocols.md, section 6), and
`ra:key_metrics/1`. Where no node of the store offers that, every stream is asked for its version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import thread_time
from typing import Any, Final, NamedTuple

from gater.api import schema
from gater.api.decoding import Decoder
from gater.api.guarded import CHILD_LIST_LENGTH, STREAMS
from gater.api.service import Service
from gater.api.subscriptions.counts import read_counts
from gater.api.subscriptions.protocol import Event, event_of, read_event
from gater.erl.errors import ErlangException, ErlError
from gater.erl.gen_server import call
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, EncodedTerm, Term

COUNTS_TIMEOUT_S: Final = 8.0
"""Less than the feed waits for an answer (`poll.ANSWER_S`), for all members that are asked in turn."""

COUNT_TIMEOUT_S: Final = 3.0
"""For one of them; a count of 100,000 streams takes half a second."""

REPLY_S: Final = 1.0
"""For a member of the store that has caught up to reply, before another one is asked."""

CERTAIN_AT_ONCE: Final = 64
"""Certain reads of snapshots under way at once, so that of thousands that are wanted together each comes within
`REPLY_S`, and other callers have their turn in between."""

INDEX_TIMEOUT_S: Final = 1.0
"""For the Raft index, which takes a fraction of a millisecond on a node that is well."""

ASK_AGAIN_S: Final = 5.0
"""Before a member that did not tell its index is asked again."""

MAX_VERSIONS_AT_ONCE: Final = 32
"""Streams asked for their version at once where counts are not to be had."""

ASKED_S: Final = 2.5
"""How long a certain read of snapshots waits for members to be asked what they offer; leaves time for the reply before
a caller gives up."""

LOOK_AGAIN_S: Final = 0.05
"""Between two looks whether they have been."""

SEEN_S: Final = 60.0
"""For so long a member of the store that went out of sight may have what the others lack."""

CONFIRM_S: Final = 5.0
"""Where no member can be told to catch up: what all of them say twice, so far apart, is certain."""

AT_ONCE_BYTES: Final = 128 * 1024
"""Counts of some 4,000 streams are read at once, in 5 ms; more of them in a thread."""

_ANY_NODE: Final = (Atom("if_node_exists"), True)
_IF_ANY: Final = Atom("if_any")
_PROPS: Final = {Atom("props_to_return"): [CHILD_LIST_LENGTH]}
_COUNTS_LEVELS: Final = 2
"""Of {Microseconds, {ok, Counts}}."""
_LAST_APPLIED: Final = Atom("last_applied")


class Counted(NamedTuple):
    """Events by stream, and what it took to count them."""

    counts: Mapping[bytes, int]
    took_s: float
    """Time of the store; where it does not say, the way to it and back included."""
    own_s: float = 0.0
    """Processor time of this gateway to read the answer."""
    applied: int | None = None
    """Of a certain count: the Raft index, read after it; None where there is none."""


class StoreReads:
    """The reads of one store."""

    def __init__(self, service: Service, store: Atom) -> None:
        self._service = service
        self._decoded = Decoder()
        self._applied: dict[Atom, int] = {}
        """The index of each member of the store, when it was last asked."""
        self._silent_until: dict[Atom, float] = {}
        self._turn = 0
        self._certain = asyncio.Semaphore(CERTAIN_AT_ONCE)
        self._seen: dict[Atom, float] = {}
        """When each member was last in sight."""
        self.store = store

    def ask(self, request: Term, on_reply: Callable[[Term], None]) -> None:
        """Any request; `on_reply` gets the whole reply decoded."""
        self._service.call(request, lambda reply: on_reply(self._decoded(reply)))

    async def reply(self, request: Term) -> Term:
        """As `ask`, to be awaited."""
        answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Term) -> None:
            if not answered.done():
                answered.set_result(reply)

        self.ask(request, on_reply)
        return await answered

    async def certain_snapshots(self, source: bytes, stream: bytes) -> Term:
        """The reply to `list_snapshots`, but of a member of the store that has everything there is, where a store
        offers to say so. Waits `ASKED_S` until the members have been asked whether they do.

        Khepri itself is asked: ExESDB has a process for each source and stream that reads for all members and makes
        their workers wait, all of them if its node is frozen.
        """
        service, loop = self._service, asyncio.get_running_loop()
        until = loop.time() + ASKED_S
        while not (nodes := self._khepri_nodes()):
            if service.is_embedded(self.store) or not self._unasked():
                return await self.reply(schema.list_snapshots_request(self.store, source.decode(), stream))
            if loop.time() >= until:
                return schema.error(schema.storage_failed("no member of the store says whether it can be waited for"))
            await asyncio.sleep(LOOK_AGAIN_S)
        arguments: list[Term] = [self.store, [schema.SNAPSHOTS, source, stream, _ANY_NODE]]
        for node in nodes:
            if not await self._catch_up(node):
                continue
            async with self._certain:
                try:
                    ok, found = await erpc_call(service.node, node, "khepri", "get_many", arguments, timeout_s=REPLY_S)
                    if ok is schema.OK:
                        return (ok, found)
                except (ErlangException, ErlError, TypeError, ValueError):
                    continue
        return schema.error(schema.storage_failed("no member of the store says that it has everything"))

    def page(self, stream: bytes, start: int, count: int, on_page: Callable[[Sequence[Event] | None], None]) -> None:
        """`count` events from `start` on; None if they could not be read."""
        request = schema.get_events_request(self.store, stream, start, count)
        self._service.call(request, lambda reply: on_page(self._events(reply)))

    def _events(self, reply: Term) -> list[Event] | None:
        """The events of a page. They stay as they came: most are passed on to subscribers so."""
        reply = self._decoded.opened(reply)
        match reply:
            case (kind, EncodedTerm() as records) if kind is schema.OK:
                found = self._decoded.maps(records, schema.EVENT_FIELDS)
                try:
                    return None if found is None else [read_event(*each) for each in found]
                except schema.SchemaError:
                    return None
        return _events(self._decoded(reply))

    async def snapshot_places(self, source: str) -> list[tuple[bytes, int]] | None:
        """Stream and version of the snapshots of a source, in order; None if there is no answer. Only where a store
        offers nothing better are the snapshots read for that."""
        service = self._service
        if service.embedded is not None and service.is_embedded(self.store):
            answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
            service.embedded.snapshot_places(
                self.store, source, lambda reply: None if answered.done() else answered.set_result(reply)
            )
            reply = await answered
            return sorted(reply[1]) if reply[0] is schema.OK else None
        for node in self._khepri_nodes():
            arguments: list[Term] = [self.store, [schema.SNAPSHOTS, source.encode(), _ANY_NODE, _ANY_NODE], _PROPS]
            try:
                ok, found = await erpc_call(
                    service.node, node, "khepri_adv", "get_many", arguments, timeout_s=COUNT_TIMEOUT_S
                )
                if ok is schema.OK:
                    return _places(found)
            except (ErlangException, ErlError, TypeError, ValueError, LookupError):
                continue
        reply = await self.reply(schema.list_snapshots_request(self.store, source, schema.ANY))
        return _places(reply[1]) if reply[0] is schema.OK else None

    async def counts(self, streams: Sequence[bytes] | None) -> Counted | None:
        """Count the events of these streams or of all; None if there is no answer."""
        service, loop = self._service, asyncio.get_running_loop()
        began = loop.time()
        if service.is_embedded(self.store):
            counted = await self._embedded_counts(streams)
            return None if counted is None else Counted(counted, loop.time() - began)
        until = loop.time() + COUNTS_TIMEOUT_S
        nodes = self._khepri_nodes()
        for node in sorted(nodes, key=lambda node: self._applied.get(node, -1), reverse=True):
            left_s = until - loop.time()
            if left_s <= 0:
                return None
            try:
                return await self._khepri_counts(node, streams, min(COUNT_TIMEOUT_S, left_s))
            except (ErlangException, ErlError, TypeError, ValueError, LookupError):
                continue
        counted = await self._versions(streams, self.reply)
        return None if counted is None else Counted(counted, loop.time() - began)

    async def certain_counts(self, streams: Sequence[bytes] | None) -> Counted | None:
        """Count what there is for certain: the most that any member of the store has, when all have caught up. None if
        nobody can say that now: there is no majority, or a member does not answer, or was seen lately and is not now.
        """
        service, loop = self._service, asyncio.get_running_loop()
        began = loop.time()
        if service.embedded is not None and service.is_embedded(self.store):
            counted = await self._embedded_counts(streams)
            if counted is None:
                return None
            return Counted(counted, loop.time() - began, applied=service.embedded.committed(self.store))
        nodes = self._look()
        if not nodes or self._seen.keys() - set(nodes) or service.write_refusal(self.store) is not None:
            return None
        khepri = self._khepri_nodes()
        if khepri:
            if len(khepri) < len(nodes):
                return None
            # Counting is what costs: not while one of them does not answer.
            if not all(await asyncio.gather(*(self._catch_up(node) for node in nodes))):
                return None
            answers = await asyncio.gather(*(self._indexed_counts(node, streams) for node in nodes))
        else:
            answers = [*await self._counts_of_all(nodes, streams)]
            await asyncio.sleep(CONFIRM_S)
            answers += await self._counts_of_all(nodes, streams)
        if None in answers or self._look() != nodes:
            return None
        most: dict[bytes, int] = {}
        for answer in answers:
            assert answer is not None
            for stream, count in answer.counts.items():
                most[stream] = max(count, most.get(stream, 0))
        indexes = [answer.applied for answer in answers if answer is not None and answer.applied is not None]
        took_s = max(answer.took_s for answer in answers if answer is not None)
        own_s = sum(answer.own_s for answer in answers if answer is not None)
        return Counted(most, took_s, own_s, max(indexes, default=None))

    def _look(self) -> list[Atom]:
        """The members of the store that are in sight."""
        now = asyncio.get_running_loop().time()
        nodes = self._service.router.nodes(self.store)
        self._seen = {node: at for node, at in self._seen.items() if at + SEEN_S > now} | dict.fromkeys(nodes, now)
        return nodes

    async def _indexed_counts(self, node: Atom, streams: Sequence[bytes] | None) -> Counted | None:
        try:
            counted = await self._khepri_counts(node, streams, COUNT_TIMEOUT_S)
            return counted._replace(applied=await self._index_of(node))
        except (ErlangException, ErlError, TypeError, ValueError, LookupError):
            return None

    async def _counts_of_all(self, nodes: Sequence[Atom], streams: Sequence[bytes] | None) -> list[Counted | None]:
        return await asyncio.gather(*(self._counts_of(node, streams) for node in nodes))

    async def _counts_of(self, node: Atom, streams: Sequence[bytes] | None) -> Counted | None:
        worker = self._service.router.worker_on(self.store, node, asyncio.get_running_loop().time())
        if worker is None:
            return None

        async def ask(request: Term) -> Term:
            return await call(self._service.node, worker.address, request, timeout_s=COUNT_TIMEOUT_S)

        try:
            counted = await self._versions(streams, ask)
        except (ErlangException, ErlError):
            return None
        return None if counted is None else Counted(counted, 0.0)

    async def _catch_up(self, node: Atom) -> bool:
        """Have a member catch up with its store; whether it has. Who come together wait for one and the same fence."""
        caught_up: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        fences = self._service.fences
        fences.catch_up(self.store, node, lambda has: None if caught_up.done() else caught_up.set_result(has))
        return await caught_up and fences.has_fence(node)

    async def _embedded_counts(self, streams: Sequence[bytes] | None) -> Mapping[bytes, int] | None:
        assert self._service.embedded is not None
        answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self._service.embedded.stream_counts(
            self.store, streams, lambda reply: None if answered.done() else answered.set_result(reply)
        )
        reply = await answered
        return reply[1] if reply[0] is schema.OK else None

    def _unasked(self) -> bool:
        """Whether some member has not been asked yet whether it offers Khepri."""
        service = self._service
        nodes = service.router.nodes(self.store)
        return service.append_mode != "worker" and any(node not in service.guarded_forms for node in nodes)

    def _khepri_nodes(self) -> list[Atom]:
        """The members of the store that offer Khepri."""
        service = self._service
        return [node for node in service.router.nodes(self.store) if service.guarded_forms.get(node) is not None]

    async def _khepri_counts(self, node: Atom, streams: Sequence[bytes] | None, timeout_s: float) -> Counted:
        if streams is None:
            which: Term = _ANY_NODE
        elif len(streams) == 1:
            which = streams[0]
        else:
            which = (_IF_ANY, list(streams))
        took_us, answer = await erpc_call(
            self._service.node,
            node,
            "timer",
            "tc",
            [Atom("khepri_adv"), Atom("get_many"), [self.store, [STREAMS, which], _PROPS]],
            timeout_s=timeout_s,
            spine_levels=_COUNTS_LEVELS,
        )
        ok, found = answer
        if ok is not schema.OK:
            raise ValueError(f"no counts: {schema.show(answer)}")
        if type(found) is EncodedTerm and len(found.data) > AT_ONCE_BYTES:
            # Everybody else would wait meanwhile.
            counts, own_s = await asyncio.to_thread(_timed_counts, found)
        else:
            counts, own_s = _timed_counts(found)
        return Counted(counts, took_us / 1e6, own_s)

    async def _versions(
        self, streams: Sequence[bytes] | None, ask: Callable[[Term], Awaitable[Term]]
    ) -> Mapping[bytes, int] | None:
        if streams is None:
            reply = await ask(schema.store_request("get_streams", self.store))
            if reply[0] is not schema.OK:
                return None
            streams = reply[1]
        found: dict[bytes, int] = {}
        for first in range(0, len(streams), MAX_VERSIONS_AT_ONCE):
            chunk = streams[first : first + MAX_VERSIONS_AT_ONCE]
            replies = await asyncio.gather(*(ask(schema.get_version_request(self.store, stream)) for stream in chunk))
            for stream, answer in zip(chunk, replies, strict=True):
                if answer[0] is not schema.OK:
                    return None
                found[stream] = answer[1] + 1
        return found

    async def index(self) -> int | None:
        """The last applied Raft index (of an embedded store: its commits); None if it is not to be had."""
        service = self._service
        if service.embedded is not None and service.is_embedded(self.store):
            return service.embedded.committed(self.store)
        self._look()
        nodes = self._khepri_nodes()
        for gone in self._applied.keys() - set(nodes):
            # What it knew may be more than the others will ever have, of a store that is made anew.
            del self._applied[gone]
        now = asyncio.get_running_loop().time()
        # In turn: one that is cut off from the others answers as well, but what it knows stands still.
        self._turn += 1
        for node in (*nodes[self._turn % len(nodes) :], *nodes[: self._turn % len(nodes)]) if nodes else ():
            if self._silent_until.get(node, now) > now:
                continue
            try:
                self._applied[node] = await self._index_of(node)
                return max(self._applied.values())
            except (ErlangException, ErlError, TypeError, ValueError, LookupError):
                self._applied.pop(node, None)
                self._silent_until[node] = now + ASK_AGAIN_S
        return None

    async def _index_of(self, node: Atom) -> int:
        arguments: list[Term] = [(self.store, node)]
        metrics: Any = await erpc_call(
            self._service.node, node, "ra", "key_metrics", arguments, timeout_s=INDEX_TIMEOUT_S
        )
        return int(metrics[_LAST_APPLIED])


def _places(found: Mapping[Term, Any]) -> list[tuple[bytes, int]]:
    return sorted((path[2], int(path[3])) for path in found if len(path) == 4)


def _timed_counts(found: Term) -> tuple[dict[bytes, int], float]:
    """The counts in an answer, and the processor time it took to read them."""
    began = thread_time()
    return read_counts(found), thread_time() - began


def _events(reply: Term) -> list[Event] | None:
    match reply:
        case (kind, list(records)) if kind is schema.OK:
            try:
                return [event_of(record) for record in records]
            except schema.SchemaError:
                return None
        case (kind, reason) if kind is schema.ERROR and reason is Atom("stream_not_found"):
            return []
    return None
