"""Which worker gets a request: what is known of the gateway workers of each store, and the choice among them.

Pure: the caller tells it what registries say (`registered`), which workers and nodes are gone, and asks for a worker.
A gateway worker has the Swarm name `{:gateway_worker, store, node, n}` (protocol of ExESDB 0.11, `gateway_worker.ex`).
Every store node lists the workers of the whole cluster, and its list may lag; so a worker counts as long as any node
that was asked still lists it and it has not been seen to die.

Choice: the less loaded of two workers taken at random, which is nearly as good as the least loaded of all and cannot
make all gateways choose the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from gater.erl.terms import Atom, Pid, Term

GATEWAY_WORKER: Final = Atom("gateway_worker")

MAX_WORKERS: Final = 100_000
"""Workers kept. A node has a handful for each of its stores; a registry that lists more is broken or hostile."""

ANY_STORE: Final = None
"""The store of a worker that serves every store: the API server of another gateway."""


class Registered(NamedTuple):
    """One entry of a Swarm registry that names a gateway worker."""

    store: Atom
    node: Atom
    pid: Pid


@dataclass(slots=True, eq=False)
class Worker:
    """One process that answers gateway worker requests.

    `address` is what to send to, `load` its unanswered requests.
    """

    address: Term
    node: Atom
    store: Atom | None
    load: int = 0
    listed_by: set[Atom] = field(default_factory=set)
    alive: bool = True


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


class Router:
    """The workers known, by store."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        """`choose(n)` gives a random number below n."""
        self._choose = choose
        self._workers: dict[Term, Worker] = {}
        self._by_store: dict[Atom | None, list[Worker]] = {}
        self._seen_stores: set[Atom] = set()

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    @property
    def stores(self) -> list[Atom]:
        """The stores that have a worker now."""
        return [store for store, workers in self._by_store.items() if workers and store is not None]

    def is_known(self, store: Atom | None) -> bool:
        """Whether a worker of this store has ever been seen, or there is one that serves every store."""
        return store in self._seen_stores or bool(self._by_store.get(ANY_STORE))

    def workers(self, store: Atom | None = None) -> list[Worker]:
        """The workers of `store`, or all of them."""
        return list(self._workers.values()) if store is None else list(self._by_store.get(store, ()))

    def add(self, address: Term, node: Atom, store: Atom | None) -> Worker:
        """A worker that no registry lists: an embedded store, or another gateway's API server."""
        worker = self._workers.get(address)
        if worker is None:
            worker = Worker(address, node, store)
            self._insert(worker)
        return worker

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
        worker.alive = False
        if self._workers.pop(worker.address, None) is not None:
            self._by_store[worker.store].remove(worker)

    def node_down(self, node: Atom) -> list[Worker]:
        """A node is gone, with its workers and with what it listed; the workers that go with it."""
        gone = [worker for worker in self._workers.values() if worker.node is node]
        for worker in gone:
            self.remove(worker)
        self.registered(node, ())
        return gone

    def choose(self, store: Atom | None, avoid: Collection[Worker] = ()) -> Worker | None:
        """A worker for a request about `store` (None: about no store in particular), none of `avoid`."""
        if store is None:
            candidates: list[Worker] = list(self._workers.values())
        else:
            candidates = self._by_store.get(store) or self._by_store.get(ANY_STORE, [])
        if avoid:
            candidates = [worker for worker in candidates if worker not in avoid]
        count = len(candidates)
        if count == 0:
            return None
        first = candidates[self._choose(count)]
        if count == 1:
            return first
        second = candidates[self._choose(count)]
        return second if second.load < first.load else first

    def _insert(self, worker: Worker) -> None:
        self._workers[worker.address] = worker
        self._by_store.setdefault(worker.store, []).append(worker)
        if worker.store is not None:
            self._seen_stores.add(worker.store)
