"""The gateway itself: one request in, one reply out, always.

All three doors (`server.py`: rpc functions and the API GenServer; `gateway.py`: the Python client) end here:
`Service.call(request, on_reply)` takes a gateway worker request as a term and calls back exactly once with
`{:ok, result}` or `{:error, reason}`, at the latest when the request's time is up.

It checks a request and decides who carries it out: workers (`worker_calls.py`), the appends of a cluster's store
(`appends.py`), an embedded store or the subscriptions. What happens to a call:

    checked -> refused: {:error, reason}
            -> no worker known -> registries asked again -> still none: {:error, {:store_not_found |
            :no_worker_available, _}} -> sent -> reply: passed on as it came (its payload is not decoded)
                    -> worker gone before it could have begun (`noproc`) -> another worker
                    -> no answer for a while -> reads: another node is asked as well, the first answer counts
                    -> worker died, connection lost or no answer in time
                         reads: another worker while there is time, else {:error, {:worker_died | :call_timeout, _}}
                         writes: {:error, {:unknown_outcome, text}}

Replies of the original that say less than they could are completed: a bare `{:error, :wrong_expected_version}` (the
answer of a worker that lost a race) gets the current version.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal, Protocol, TypeAlias

import structlog

from gater.api import guarded, schema
from gater.api.appends import Appends, events_to_send
from gater.api.decoding import decoded
from gater.api.fences import Fences
from gater.api.router import Router, Worker
from gater.api.schema import Rejected, Request, check_request
from gater.api.worker_calls import WorkerCall
from gater.erl.gen_server import cast, down_error
from gater.erl.node import Monitor, Node
from gater.erl.terms import Atom, Term

OnReply: TypeAlias = Callable[[Term], None]
OnTaken: TypeAlias = Callable[[Rejected | None], None]

MAX_REQUESTS: Final = 10_000
"""Requests under way at once; further ones are answered `{:error, :overloaded}`."""

CALL_TIMEOUT_S: Final = 4.5
"""How long a request may take if its caller does not say. Elixir callers give up after 5 s: the answer comes before."""

AppendMode: TypeAlias = Literal["auto", "guarded", "worker"]

_ABOUT_SUBSCRIPTIONS: Final = frozenset({"save_subscription", "remove_subscription", "ack_event", "nack_event"})

_FINISHING: Final = frozenset({"ack_event", "nack_event"})
"""Casts that end what has been begun: they are taken while new requests are refused."""

log = structlog.get_logger(__name__)


class Embedded(Protocol):
    """What the service needs of an embedded store (`gater.store.EmbeddedStores`)."""

    @property
    def store_ids(self) -> tuple[Atom, ...]: ...

    def submit(self, request: Request, on_reply: OnReply, /) -> None: ...

    def cast(self, request: Request, /) -> Rejected | None: ...

    def stream_counts(self, store: Atom, streams: Sequence[bytes] | None, on_reply: OnReply, /) -> None: ...

    def snapshot_places(self, store: Atom, source: str, on_reply: OnReply, /) -> None: ...

    def committed(self, store: Atom, /) -> int | None: ...


class SubscriptionDoor(Protocol):
    """Who runs the subscriptions (`gater.api.subscriptions.door`)."""

    def call(self, request: Request, on_reply: OnReply, /) -> None: ...

    def cast(self, request: Request, on_taken: OnTaken, /) -> bool: ...

    def acknowledge(self, requests: Sequence[Request | Rejected], /) -> list[int]: ...

    def follows(self, store: Atom, /) -> bool: ...

    def appended(
        self, store: Atom, stream: bytes, version: int, node: Atom, stored: Sequence[tuple[Term, bytes]], /
    ) -> None: ...


class Registries(Protocol):
    """Who knows the cluster's workers; `refresh` asks again and calls back when the answers are in. False: too many
    wait for that already."""

    def refresh(self, on_done: Callable[[], object], /) -> bool: ...


class Service:
    """Routes and carries out requests. One of these serves a node."""

    def __init__(
        self,
        node: Node,
        *,
        embedded: Embedded | None = None,
        max_requests: int = MAX_REQUESTS,
        timeout_s: float = CALL_TIMEOUT_S,
        append_mode: AppendMode = "auto",
    ) -> None:
        """`append_mode`: guarded appends where the store node offers them (`auto`), always or never."""
        self.node = node
        self.router = Router(random.randrange)
        self.embedded = embedded
        self.registries: Registries | None = None
        self.subscriptions: SubscriptionDoor | None = None
        self.append_mode: AppendMode = append_mode
        self.guarded_forms: dict[Atom, guarded.Forms | None] = {}
        """Store nodes that were asked how they append: the expressions they have parsed for us, None if they cannot."""
        self.quorum: Callable[[Atom], Term | None] = lambda store: None
        """Why a store must not be written to now (the details of `no_quorum`), or None."""
        self.doubt: Callable[[Atom], None] = lambda node: None
        """Told which node has not answered in time."""
        self.cluster_status: Callable[[], Term] = dict
        """What is seen of the cluster, for who asks for this node's state."""
        self._appends = Appends(self)
        self.fences = Fences(node, self.router, self._appends, lambda store: self.quorum(store) is None)
        self._unsettled: Counter[tuple[Atom | None, bytes | None]] = Counter()
        """The streams with appends that wait until registries have been asked again."""
        self.timeout_s = timeout_s
        self.max_requests = max_requests
        self._calls: dict[Worker, set[WorkerCall]] = {}
        self._monitors: dict[Worker, Monitor] = {}
        self._under_way = 0
        self._draining = False
        self._idle: list[asyncio.Future[None]] = []

    @property
    def under_way(self) -> int:
        """Requests that have not been answered yet."""
        return self._under_way

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused, because this node is going to stop."""
        return self._draining

    @property
    def stores(self) -> list[Atom]:
        """The stores that can be asked now: those of the cluster that have a worker, and the embedded ones."""
        embedded = () if self.embedded is None else self.embedded.store_ids
        return list(dict.fromkeys((*self.router.stores, *embedded)))

    def is_embedded(self, store: Atom | None) -> bool:
        """Whether the embedded store of this node holds `store`."""
        return self.embedded is not None and store in self.embedded.store_ids

    # Requests

    def call(self, request: Term, on_reply: OnReply, timeout_s: float | None = None, *, raw: Term = None) -> None:
        """Carry out a call; `on_reply` is called once with the reply, which may be an `EncodedTerm` in its last part.

        `raw` is the same request with its last element still encoded, if there is such: that is what is sent on.
        """
        if self._draining:
            on_reply(schema.error(schema.DRAINING))
            return
        checked = check_request(request, cast=False)
        if isinstance(checked, Rejected):
            on_reply(checked.reply)
            return
        if self._under_way >= self.max_requests:
            on_reply(schema.error(schema.OVERLOADED))
            return
        if checked.op in schema.GATER_OPS and self.subscriptions is not None:
            self.subscriptions.call(checked, on_reply)
            return
        self._under_way += 1
        to_send = raw if raw is not None and checked.term is request else checked.term
        allowed_s = self.timeout_s if timeout_s is None else timeout_s
        if checked.op == "append_events" and checked.term[-1] and not self.is_embedded(checked.store):
            deadline = asyncio.get_running_loop().time() + allowed_s
            self._append(checked, to_send, on_reply, deadline)
        else:
            if checked.op == "append_events":
                on_reply = self._telling(checked, on_reply)
            WorkerCall(self, checked, to_send, on_reply, allowed_s).begin()

    def _append(
        self, request: Request, term: Term, on_reply: OnReply, deadline: float, *, refreshed: bool = False
    ) -> None:
        """An append to a store of the cluster, or by way of another gateway where no store node is connected."""
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        if not refreshed and (request.store, request.stream) in self._unsettled:
            # Others of the stream came before it.
            self._append_refreshed(request, term, on_reply, deadline, left_s)
        elif (request.store is not None and self.router.serves(request.store)) or (
            refreshed and not self.router.serves_all
        ):
            self._appends.submit(request, events_to_send(request.term, term), on_reply, left_s)
        elif self.router.serves_all:
            WorkerCall(self, request, term, self._telling(request, on_reply), left_s).begin()
        else:
            self._append_refreshed(request, term, on_reply, deadline, left_s)

    def _append_refreshed(
        self, request: Request, term: Term, on_reply: OnReply, deadline: float, timeout_s: float
    ) -> None:
        """Append once the registries have been asked again, if that does not take longer than the caller can wait."""
        is_late = False

        key = (request.store, request.stream)
        self._unsettled[key] += 1

        def settled() -> None:
            self._unsettled[key] -= 1
            if not self._unsettled[key]:
                del self._unsettled[key]

        def out_of_time() -> None:
            nonlocal is_late
            is_late = True
            settled()
            self.done()
            on_reply(schema.error(schema.call_timeout(round(timeout_s * 1000))))

        def refreshed() -> None:
            if not is_late:
                timer.cancel()
                settled()
                self._append(request, term, on_reply, deadline, refreshed=True)

        timer = asyncio.get_running_loop().call_at(deadline, out_of_time)
        if not self.refresh(refreshed):
            timer.cancel()
            settled()
            self.done()
            on_reply(schema.error(schema.OVERLOADED))

    def _telling(self, request: Request, on_reply: OnReply) -> OnReply:
        """`on_reply`, and the subscriptions are told where the stream stands after an append."""
        store, stream = request.store, request.stream

        def answered(reply: Term) -> None:
            on_reply(reply)
            if type(reply) is tuple and reply[0] is schema.OK and store is not None and stream is not None:
                self.appended(store, stream, decoded(reply[1]))

        return answered

    def follows(self, store: Atom) -> bool:
        """Whether somebody here wants to know what is appended to `store`, and not only that."""
        return self.subscriptions is not None and self.subscriptions.follows(store)

    def appended(
        self,
        store: Atom,
        stream: bytes,
        version: Term,
        node: Atom | None = None,
        stored: Sequence[tuple[Term, bytes]] = (),
    ) -> None:
        """An append is done, on `node` (None: here): the stream is at this version, `stored` are its last events (type,
        and record as `term_to_binary`) if they are known."""
        if self.subscriptions is not None and type(version) is int and version >= 0:
            self.subscriptions.appended(store, stream, version, node or self.node.name, stored)

    def appended_elsewhere(self, store: Atom, stream: bytes, version: int, node: Atom) -> None:
        """An append has been done on `node` that went through another gateway."""
        self._appends.hear((store, stream), version, node)

    def guarded_form(self, node: Atom) -> guarded.Forms | None:
        """The expressions for guarded appends on `node`; None if its workers' appends are to be used."""
        return None if self.append_mode == "worker" else self.guarded_forms.get(node)

    def unfit_for_writes(self, store: Atom) -> set[Atom]:
        """The nodes with workers of `store` that must not be written to: a plain append beside guarded ones would undo
        what they promise, so nothing is written where the way is not known yet, nor by a worker where another node of
        the store offers the guarded way."""
        if self.append_mode == "worker":
            return set()
        nodes = self.router.nodes(store)
        unguarded = {node for node in nodes if self.guarded_forms.get(node) is None}
        if self.append_mode == "guarded" or len(unguarded) < len(nodes):
            return unguarded
        return {node for node in nodes if node not in self.guarded_forms}

    def write_refusal(self, store: Atom) -> Term | None:
        """The reason why nothing must be written to `store` now, or None."""
        details = self.quorum(store)
        return None if details is None else schema.no_quorum(details)

    def stores_without_quorum(self) -> dict[Term, Term]:
        """The stores that must not be written to now, and why."""
        found = {store: self.quorum(store) for store in self.router.stores}
        return {store: details for store, details in found.items() if details is not None}

    def cast(self, request: Term, on_taken: OnTaken, *, raw: Term = None) -> None:
        """Carry out a cast; `on_taken` is called once: with None when it has been sent, or with why it could not be."""
        checked = check_request(request, cast=True)
        if self._draining and (isinstance(checked, Rejected) or checked.op not in _FINISHING):
            on_taken(Rejected(schema.DRAINING))
        elif isinstance(checked, Rejected):
            on_taken(checked)
        elif (
            self.subscriptions is not None
            and checked.op in _ABOUT_SUBSCRIPTIONS
            and self.subscriptions.cast(checked, on_taken)
        ):
            return
        elif self._draining:
            # It is about a subscription that nobody has taken over yet: the event will come again.
            on_taken(Rejected(schema.DRAINING))
        elif self.embedded is not None and self.is_embedded(checked.store):
            on_taken(self.embedded.cast(checked))
        elif checked.store is not None and (refusal := self.write_refusal(checked.store)) is not None:
            on_taken(Rejected(refusal))
        else:
            to_send = raw if raw is not None and checked.term is request else checked.term
            if not self._send_cast(checked, to_send, on_taken) and not self.refresh(
                lambda: self._send_cast(checked, to_send, on_taken, last=True)
            ):
                on_taken(Rejected(schema.OVERLOADED))

    def acknowledge(self, acknowledgements: Sequence[tuple[Term, Term]], on_taken: OnTaken) -> None:
        """Carry out `ack_event` casts, each given with what it came as, as `cast` does; `on_taken` is called for those
        that are not about subscriptions of this gateway. What is about them is given to them together."""
        left: Iterable[int] = range(len(acknowledgements))
        if self.subscriptions is not None:
            left = self.subscriptions.acknowledge(
                [check_request(request, cast=True) for request, _ in acknowledgements]
            )
        for index in left:
            request, raw = acknowledgements[index]
            self.cast(request, on_taken, raw=raw)

    def _send_cast(self, request: Request, term: Term, on_taken: OnTaken, *, last: bool = False) -> bool:
        """Whether that settles it; with `last` it does."""
        worker = self.router.choose(request.store, None, asyncio.get_running_loop().time())
        if worker is not None:
            cast(self.node, worker.address, term)
            on_taken(None)
        elif last:
            on_taken(Rejected(self.missing(request.store)))
        return worker is not None or last

    def refresh(self, on_done: Callable[[], object]) -> bool:
        """Have the registries asked again; `on_done()` when that is over. False: too many wait for that already."""
        if self.registries is None:
            on_done()
            return True
        return self.registries.refresh(on_done)

    async def refreshed(self) -> bool:
        """As `refresh`, to be awaited."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self.refresh(lambda: None if asked.done() else asked.set_result(None)):
            return False
        await asked
        return True

    def missing(self, store: Atom | None) -> Term:
        """The reason why there is no worker for `store`."""
        if store is not None and not self.router.is_known(store):
            return schema.store_not_found(store)
        return schema.no_worker_available(store or Atom("any"))

    def done(self) -> None:
        """A call has been answered."""
        self._under_way -= 1
        if self._under_way == 0:
            for waiting in self._idle:
                if not waiting.done():
                    waiting.set_result(None)
            self._idle.clear()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait until those under way are answered; False if time ran out first."""
        self._draining = True
        if self._under_way == 0:
            return True
        idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(idle)
        try:
            async with asyncio.timeout(timeout_s):
                await idle
        except TimeoutError:
            return False
        return True

    def suspect(self, node: Atom, is_suspect: bool) -> None:
        """A node does not answer at all, or does again."""
        self.router.suspect(node, is_suspect)
        if is_suspect:
            self.fences.may_lag(node)
            self._appends.left_out(node)

    def members(self, store: Atom, nodes: Collection[Atom]) -> None:
        """These are the members of `store`, as far as anybody has said."""
        served = self.router.nodes(store)
        self.router.members(store, nodes)
        for node in set(served).difference(self.router.nodes(store)):
            self._appends.left_out(node)

    # Workers

    def watch(self, worker: Worker) -> None:
        """Learn at once when this worker dies."""
        if worker not in self._monitors:
            self._monitors[worker] = self.node.monitor(
                worker.address, lambda monitor, reason: self._worker_down(worker, reason)
            )

    def unwatch(self, worker: Worker, reason: Term) -> None:
        """This worker does not count any more; whoever waits for it is told `reason`."""
        monitor = self._monitors.pop(worker, None)
        if monitor is not None:
            self.node.demonitor(monitor)
        self._fail_calls(worker, reason)

    def _worker_down(self, worker: Worker, reason: Term) -> None:
        self._monitors.pop(worker, None)
        self.router.remove(worker)
        log.info("worker_down", store=str(worker.store), worker=str(worker.address), reason=repr(reason)[:200])
        self._fail_calls(worker, reason)
        self.refresh(lambda: None)

    def _fail_calls(self, worker: Worker, reason: Term) -> None:
        for call in list(self._calls.pop(worker, ())):
            call.worker_down(worker, down_error(worker.address, reason))

    def attach(self, call: WorkerCall, worker: Worker) -> None:
        """`call` waits for `worker`."""
        worker.load += 1
        self._calls.setdefault(worker, set()).add(call)

    def detach(self, call: WorkerCall, worker: Worker) -> None:
        """`call` does not wait for `worker` any more."""
        worker.load -= 1
        calls = self._calls.get(worker)
        if calls is not None:
            calls.discard(call)
