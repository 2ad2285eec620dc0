"""Which node and worker get a request: what is known of the gateway workers of each store, and the choice among them.

Pure: the caller tells it what registries say (`registered`), which workers and nodes are gone or fail, and what time it
is, and asks for a worker. A gateway worker has the Swarm name `{:gateway_worker, store, node, n}` (protocol of ExESDB
0.11, `gateway_worker.ex`). Every store node lists the workers of the whole cluster, and its list may lag; so a worker
counts as long as any node that was asked still lists it and it has not been seen to die.

Choice. Requests about a stream go to the stream's *owner*: of the store's members, the one whose hash with the stream
is highest (rendezvous hashing), so that all gateways agree without talking, a reader sees what was written through any
of them, and a node that comes or goes moves only its own streams. If the owner has no worker or is out of order, the
next in that order takes its place. Where nobody says who the members are (no Khepri) all nodes with workers count as
such. Other requests go to the less loaded of two random workers of these nodes, which is nearly as good as the least
loaded of all and cannot make all gateways choose the same one.

A node whose requests fail `MAX_FAILURES` times in a row is left out (*open*), after a while one request is let through
(*half-open*), and its outcome decides (a circuit breaker); the same goes for a worker beside others of its node. A node
that is *suspect* is left out until it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, NamedTuple

from gater.erl.terms import Atom, Pid, Term

GATEWAY_WORKER: Final = Atom("gateway_worker")

MAX_WORKERS: Final = 100_000
"""Workers kept. A node has a handful for each of its stores; a registry that lists more is broken or hostile."""

MAX_FAILURES: Final = 3
"""Failures in a row after which a node is left out; fewer would let one lost message move streams."""

OPEN_S: Final = 1.0
"""How long a node is left out the first time; doubled with every probe that fails, ..."""
MAX_OPEN_S: Final = 15.0
"""... up to this."""

MAX_RANKED: Final = 10_000
"""Streams whose order of nodes is kept: at some 250 bytes each, 2.5 MB."""

ANY_STORE: Final = None
"""The store of a worker that serves every store: the API server of another gateway."""


class Registered(NamedTuple):
    """One entry of a Swarm registry that names a gateway worker."""

    store: Atom
    node: Atom
    pid: Pid


@dataclass(slots=True, eq=False)
class Worker:
    """A process that answers gateway worker requests. `address` is what to send to, `load` its unanswered requests."""

    address: Term
    node: Atom
    store: Atom | None
    load: int = 0
    leaving: bool = False
    """It is a gateway that is shutting down."""
    listed_by: set[Atom] = field(default_factory=set)


@dataclass(slots=True)
class Breaker:
    """Whether requests are sent to a node."""

    failures: int = 0
    open_until: float = 0.0
    open_s: float = OPEN_S
    is_probed: bool = False

    def allows(self, now: float) -> bool:
        """Closed, or open for long enough that one more request may try."""
        return self.failures < MAX_FAILURES or now >= self.open_until

    def failed(self, now: float) -> bool:
        """A request was not answered in time, or its worker died; True if the node is left out from now on."""
        self.failures += 1
        if self.failures < MAX_FAILURES:
            return False
        if self.failures > MAX_FAILURES:
            if now < self.open_until and not self.is_probed:
                # Sent before the node was left out; says nothing new.
                return False
            self.open_s = min(self.open_s * 2, MAX_OPEN_S)
        self.is_probed = False
        self.open_until = now + self.open_s
        return self.failures == MAX_FAILURES

    def probing(self, now: float) -> None:
        """A request is sent: while the breaker is open it is the only one for a while."""
        if self.failures >= MAX_FAILURES:
            self.open_until = now + self.open_s
            self.is_probed = True

    def succeeded(self) -> None:
        """A request was answered."""
        self.failures = 0
        self.open_s = OPEN_S
        self.is_probed = False


def parse_registry(entries: Term) -> list[Registered]:
    """The gateway workers in an answer of `Swarm.registered/0`, `[{Name, Pid}]`; everything else in it is left out."""
    found: list[Registered] = []
    if type(entries) is not list:
        return found
    for entry in entries:
        match entry:
            case ((kind, Atom() as store, Atom() as node, int()), Pid() as pid) if kind is GATEWAY_WORKER:
                found.append(Registered(store, node, pid))
    return found


def owner_rank(store: Atom, stream: bytes, node: Atom) -> bytes:
    """The weight of `node` in the choice of the stream's owner; the highest wins. The same on every gateway."""
    key = b"\0".join((store.name.encode(), stream, node.name.encode()))
    return blake2b(key, digest_size=8).digest()


class Router:
    """The workers known, by store and node."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        """`choose(n)` gives a random number below n."""
        self._choose = choose
        self._workers: dict[Term, Worker] = {}
        self._stores: dict[Atom | None, dict[Atom, list[Worker]]] = {}
        self._breakers: dict[Atom, Breaker] = {}
        self._members: dict[Atom, frozenset[Atom]] = {}
        self._serving: dict[Atom, dict[Atom, list[Worker]]] = {}
        """By store: the nodes that may be asked about it, as `_nodes_serving` finds them."""
        self._ranked: dict[tuple[Atom, bytes], list[Atom]] = {}
        """By stream: these nodes, the owner first."""
        self._suspect: set[Atom] = set()
        self._slow: dict[Worker, Breaker] = {}
        """Workers whose latest requests were not answered in time."""

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    @property
    def stores(self) -> list[Atom]:
        """The stores that have a worker now."""
        return [store for store, nodes in self._stores.items() if nodes and store is not None]

    def serves(self, store: Atom) -> bool:
        """Whether the store has a worker now."""
        return bool(self._stores.get(store))

    def is_known(self, store: Atom | None) -> bool:
        """Whether a worker of this store has ever been seen, or there is one that serves every store."""
        return store in self._stores or self.serves_all

    @property
    def serves_all(self) -> bool:
        """Whether there is a worker that serves every store."""
        return bool(self._stores.get(ANY_STORE))

    def stores_on(self, node: Atom) -> list[Atom]:
        """The stores that have a worker on this node."""
        return [store for store, nodes in self._stores.items() if store is not None and node in nodes]

    def workers(self, store: Atom | None = None) -> list[Worker]:
        """The workers of `store`, or all of them."""
        if store is None:
            return list(self._workers.values())
        return [worker for workers in self._stores.get(store, {}).values() for worker in workers]

    def nodes(self, store: Atom) -> list[Atom]:
        """The nodes that have a worker of `store` and may be asked about it."""
        return list(self._nodes_serving(store))

    def members(self, store: Atom, nodes: Collection[Atom]) -> None:
        """These are the members of `store`; none: nobody has said yet. A node that is none may hold a copy which no
        writes reach: whoever reads there reads the past."""
        self._members[store] = frozenset(nodes)
        self._nodes_changed(store)

    def _nodes_serving(self, store: Atom) -> dict[Atom, list[Worker]]:
        serving = self._serving.get(store)
        if serving is None:
            nodes = self._stores.get(store)
            if nodes is None:
                return {}
            members = self._members.get(store)
            serving = {node: workers for node, workers in nodes.items() if not members or node in members}
            self._serving[store] = serving
        return serving

    def _nodes_changed(self, store: Atom | None) -> None:
        """The members of `store` or the nodes with workers of it are others now."""
        if store is not None:
            self._serving.pop(store, None)
            self._ranked.clear()

    def worker_on(self, store: Atom, node: Atom, now: float) -> Worker | None:
        """A worker of `store` on this node."""
        return self._less_loaded(self._quick(self._stores.get(store, {}).get(node, []), now))

    def has(self, worker: Worker) -> bool:
        """Whether this worker still counts."""
        return self._workers.get(worker.address) is worker

    def add(self, address: Term, node: Atom, store: Atom | None) -> Worker:
        """A worker that no registry lists: another gateway's API server."""
        worker = self._workers.get(address)
        if worker is None:
            worker = Worker(address, node, store)
            self._insert(worker)
        return worker

    def leaving(self, address: Term) -> None:
        """This worker is a gateway's that is shutting down: others are asked, if there are any."""
        worker = self._workers.get(address)
        if worker is not None:
            worker.leaving = True

    def registered(self, source: Atom, entries: Iterable[Registered]) -> tuple[list[Worker], list[Worker]]:
        """`source` lists these workers, and no others: (workers that are new, workers that nobody lists any more)."""
        added: list[Worker] = []
        listed: set[Term] = set()
        for entry in entries:
            listed.add(entry.pid)
            worker = self._workers.get(entry.pid)
            if worker is None:
                if len(self._workers) >= MAX_WORKERS:
                    continue
                worker = Worker(entry.pid, entry.pid.node, entry.store)
                self._insert(worker)
                added.append(worker)
            worker.listed_by.add(source)
        dropped = []
        for worker in list(self._workers.values()):
            if source in worker.listed_by and worker.address not in listed:
                worker.listed_by.discard(source)
                if not worker.listed_by:
                    self.remove(worker)
                    dropped.append(worker)
        return added, dropped

    def remove(self, worker: Worker) -> None:
        """This worker is gone."""
        if self._workers.pop(worker.address, None) is None:
            return
        self._slow.pop(worker, None)
        nodes = self._stores[worker.store]
        nodes[worker.node].remove(worker)
        if not nodes[worker.node]:
            del nodes[worker.node]
            self._nodes_changed(worker.store)

    def node_down(self, node: Atom) -> list[Worker]:
        """A node is gone, with its workers and with what it listed; the workers that go with it."""
        gone = [worker for worker in self._workers.values() if worker.node is node]
        for worker in gone:
            self.remove(worker)
        self.registered(node, ())
        self._breakers.pop(node, None)
        self._suspect.discard(node)
        return gone

    def suspect(self, node: Atom, is_suspect: bool) -> None:
        """A node does not answer, or does again; who says so goes on asking, so that no request has to be the probe."""
        if is_suspect:
            self._suspect.add(node)
        elif node in self._suspect:
            self._suspect.discard(node)
            self.breaker(node).succeeded()

    def allows(self, node: Atom, now: float) -> bool:
        """Whether requests are sent to a node."""
        return node not in self._suspect and self.breaker(node).allows(now)

    def breaker(self, node: Atom) -> Breaker:
        """The circuit breaker of a node."""
        breaker = self._breakers.get(node)
        if breaker is None:
            breaker = self._breakers[node] = Breaker()
        return breaker

    def asked(self, worker: Worker, now: float) -> None:
        """A request is sent to a worker."""
        self.breaker(worker.node).probing(now)
        slow = self._slow.get(worker)
        if slow is not None:
            slow.probing(now)

    def answered(self, worker: Worker) -> None:
        """A worker has answered."""
        self.breaker(worker.node).succeeded()
        self._slow.pop(worker, None)

    def unanswered(self, worker: Worker, now: float) -> None:
        """A worker has not answered in time; others of its node may."""
        if self.has(worker):
            self._slow.setdefault(worker, Breaker()).failed(now)

    def owners(self, store: Atom, stream: bytes) -> Sequence[Atom]:
        """The members of `store` that have workers, the owner of `stream` first, then who takes its place."""
        owners = self._ranked.get((store, stream))
        if owners is None:
            nodes = self._nodes_serving(store)
            owners = sorted(nodes, key=lambda node: owner_rank(store, stream, node), reverse=True)
            if len(self._ranked) >= MAX_RANKED:
                self._ranked.clear()
            self._ranked[store, stream] = owners
        return owners

    def owner(self, store: Atom, stream: bytes, now: float, avoid: Collection[Atom] = ()) -> Atom | None:
        """The node that answers for a stream now: its owner, or the first in order that is neither open nor avoided.

        If all of them are, the first that is not avoided; None if there is none.
        """
        first = None
        for node in self.owners(store, stream):
            if node not in avoid:
                if self.allows(node, now):
                    return node
                first = first or node
        return first

    def choose(
        self, store: Atom | None, stream: bytes | None, now: float, avoid: Collection[Atom] = ()
    ) -> Worker | None:
        """A worker for a request about `stream` of `store`, of `store` (stream None), or of any store (both None)."""
        if store is None:
            return self._less_loaded(self._allowed(list(self._workers.values()), now, avoid))
        nodes = self._nodes_serving(store)
        if not nodes:
            nodes = self._stores.get(ANY_STORE, {})
            if not nodes:
                return None
        elif stream is not None:
            node = self.owner(store, stream, now, avoid)
            return None if node is None else self._less_loaded(self._quick(nodes[node], now))
        everyone = [worker for workers in nodes.values() for worker in workers]
        return self._less_loaded(self._allowed(everyone, now, avoid))

    def _allowed(self, workers: list[Worker], now: float, avoid: Collection[Atom]) -> list[Worker]:
        if avoid:
            workers = [worker for worker in workers if worker.node not in avoid]
        workers = [worker for worker in workers if not worker.leaving] or workers
        allowed = [worker for worker in workers if self.allows(worker.node, now)]
        return self._quick(allowed or workers, now)

    def _quick(self, workers: list[Worker], now: float) -> list[Worker]:
        """Those of the workers that are not left out; all of them if all are."""
        slow = self._slow
        if not slow:
            return workers
        return [each for each in workers if each not in slow or slow[each].allows(now)] or workers

    def _less_loaded(self, workers: list[Worker]) -> Worker | None:
        count = len(workers)
        if count == 0:
            return None
        first = workers[self._choose(count)]
        if count == 1:
            return first
        second = workers[self._choose(count)]
        return second if second.load < first.load else first

    def _insert(self, worker: Worker) -> None:
        self._workers[worker.address] = worker
        nodes = self._stores.setdefault(worker.store, {})
        if worker.node not in nodes:
            nodes[worker.node] = []
            self._nodes_changed(worker.store)
        nodes[worker.node].append(worker)
