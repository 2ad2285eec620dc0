"""A gateway, fake ExESDB store nodes and callers in one Python process, on an EPMD of their own.

A store node here is a Python node that says it runs `ex_esdb`, answers `Swarm.registered/0` and runs gateway workers:
GenServers that answer from an embedded store, or as a test's script says. All nodes of a `Cluster` share that store, so
that it does not matter which worker is asked. The real thing is tried in `erlang_interop_tests`.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from node_kit import COOKIE, DEADLINE_S, free_port, unique_name, wait_until
from store_kit import plain

from gater import GaterError, Gateway
from gater.api import schema
from gater.api.schema import NewEvent, Rejected, Snapshot
from gater.api.server import API_MODULE
from gater.erl import Node, NodeOptions, make_node
from gater.erl.errors import ErlangExit, ErlangThrow
from gater.erl.etf import encode
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, call, cast, spawn_server
from gater.erl.process import KILLED, Stop, is_failure
from gater.erl.rpc import erpc_call
from gater.erl.signals import Alias, Monitor
from gater.erl.terms import Atom, Pid, Term
from gater.settings import Settings
from gater.store import EmbeddedStores, StoreOptions
from gater.system import System

STORE = Atom("reg_gh")
WRONG = Atom("wrong_expected_version")

Step: TypeAlias = "Callable[[Worker, Term, Caller], Term]"
"""What a worker does with a call instead of answering it."""

GuardedStep: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, Term]]], Coroutine[Any, Any, Term]]
"""What a node does with a guarded append; it is given what would carry it out."""

Ask: TypeAlias = Callable[..., Coroutine[Any, Any, Term]]
"""One door of a gateway: `await ask("get_version", STORE, b"stream")` gives the reply."""


def event(number: int, data: Term = None) -> NewEvent:
    return NewEvent("counted:v1", data, {b"n": number}, event_id=f"event-{number}")


# Store nodes


class Worker(GenServer):
    """A gateway worker: `{:gateway_worker, store, node, number}` in Swarm's registry."""

    def __init__(self, home: StoreNode, store: Atom, number: int) -> None:
        self.home = home
        self.store = store
        self.number = number

    @property
    def entry(self) -> Term:
        """Its entry in the registry."""
        return ((Atom("gateway_worker"), self.store, self.home.node.name, self.number), self.pid)

    def handle_call(self, request: Term, caller: Caller) -> Term:
        cluster = self.home.cluster
        cluster.requests.append((self, request))
        step = cluster.take_step(request)
        return self.carry_out(request, caller) if step is None else step(self, request, caller)

    def carry_out(self, request: Term, caller: Caller) -> Term:
        """Answer from the store; what would crash a real worker ends this one."""
        checked = schema.check_request(request, cast=False)
        if isinstance(checked, Rejected):
            raise Stop((Atom("function_clause"), checked.reason))
        self.home.cluster.stores.submit(checked, lambda reply: self.reply(caller, reply))
        return NO_REPLY

    def handle_cast(self, message: Term) -> None:
        self.home.cluster.casts.append(message)
        refused = self.home.cluster.stores.cast(message)
        if refused is not None:
            raise Stop((Atom("function_clause"), refused.reason))

    def terminate(self, reason: Term) -> None:
        self.home.worker_ended(self, reason)


def crash_before(worker: Worker, request: Term, caller: Caller) -> Term:
    """The worker dies and nothing has happened."""
    raise Stop(Atom("crashed"))


def crash_after(worker: Worker, request: Term, caller: Caller) -> Term:
    """The worker dies when the store has done what was asked, before it answers."""
    checked = schema.check_request(request, cast=False)
    assert not isinstance(checked, Rejected)
    worker.home.cluster.stores.submit(checked, lambda reply: worker.process.exit(Atom("crashed")))
    return NO_REPLY


def hang(worker: Worker, request: Term, caller: Caller) -> Term:
    """The worker never answers."""
    return NO_REPLY


def answering(reply: Term) -> Step:
    """The worker answers this."""
    return lambda worker, request, caller: reply


bare_refusal: Step = answering((schema.ERROR, WRONG))
"""What a worker answers that lost a race with another one of its node."""


async def never(carry_out: Callable[[], Coroutine[Any, Any, Term]]) -> Term:
    """A guarded append that does not even begin, on a node that hangs."""
    return await asyncio.get_running_loop().create_future()


async def killed_before(carry_out: Callable[[], Coroutine[Any, Any, Term]]) -> Term:
    """The process that evaluates a guarded append is killed before it has written anything."""
    raise ErlangExit(KILLED)


async def killed_after(carry_out: Callable[[], Coroutine[Any, Any, Term]]) -> Term:
    """The process that evaluates a guarded append is killed when it has written everything."""
    with suppress(ErlangThrow):
        await carry_out()
    raise ErlangExit(KILLED)


class Held:
    """A step that keeps calls until `release`, which then has them carried out."""

    def __init__(self) -> None:
        self.calls: list[tuple[Worker, Term, Caller]] = []

    def __call__(self, worker: Worker, request: Term, caller: Caller) -> Term:
        self.calls.append((worker, request, caller))
        return NO_REPLY

    async def arrived(self, count: int = 1) -> None:
        await wait_until(lambda: len(self.calls) >= count, f"{count} calls held")

    def release(self) -> None:
        for worker, request, caller in self.calls:
            worker.carry_out(request, caller)
        self.calls.clear()


def _place(path: list[Term]) -> tuple[bytes, bytes, int]:
    """Source, stream and version of the snapshot of this path."""
    snapshots, source, stream, version = path
    assert (snapshots, version) == (Atom("snapshots"), b"%010d" % int(version))
    return (source, stream, int(version))


class StoreNode:
    """One node of a `Cluster`."""

    def __init__(self, cluster: Cluster, name: str | None = None) -> None:
        self.cluster = cluster
        self.node = make_node(name or unique_name("store"), cookie=COOKIE, options=cluster.options)
        self.node.add_application("ex_esdb", "event store", "0.11.0")
        self.node.exports.add("Elixir.Swarm", "registered", self._registered)
        if cluster.khepri:
            self._offer_khepri()
        self.workers: list[Worker] = []

    @property
    def name(self) -> str:
        return str(self.node.name)

    def _registered(self) -> Term | Coroutine[Any, Any, Term]:
        return self._registry() if self.cluster.registry_open.is_set() else self._registered_later()

    async def _registered_later(self) -> Term:
        await self.cluster.registry_open.wait()
        return self._registry()

    def _registry(self) -> Term:
        return self.cluster.entries() if self.cluster.registry is None else self.cluster.registry()

    def _offer_khepri(self) -> None:
        """What a gateway needs for guarded appends: an evaluator, which knows one expression."""
        exports = self.node.exports
        exports.add("Elixir.ExESDB.StreamsHelper", "to_event_record", lambda *_: None, arities=[5])
        exports.add("khepri", "get", lambda *_: None, arities=[2])
        exports.add("khepri", "put", self._put, arities=[4])
        exports.add("khepri", "delete", self._delete, arities=[3])
        exports.add("khepri", "get_many", self._snapshots, arities=[2])
        exports.add("khepri", "fence", self._fence)
        exports.add("khepri_adv", "get_many", self._child_list_length, arities=[3])
        exports.add("ra", "key_metrics", self._key_metrics)
        exports.add("timer", "tc", self._timed)
        exports.add("erl_scan", "string", lambda text: (schema.OK, [], 1))
        exports.add("erl_parse", "parse_exprs", lambda tokens: (schema.OK, [Atom("guarded_append")]))
        exports.add("erl_eval", "exprs", self._evaluate)

    async def _put(self, store: Atom, path: list[Term], record: Term, options: Term) -> Term:
        """Of a snapshot."""
        return await self._write(schema.record_snapshot_cast(store, *_place(path), record))

    async def _delete(self, store: Atom, path: list[Term], options: Term) -> Term:
        """Of a snapshot."""
        return await self._write(schema.delete_snapshot_cast(store, *_place(path)))

    async def _write(self, request: Term) -> Term:
        async def carry_out() -> Term:
            answer: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
            checked = schema.check_request(request, cast=True)
            assert not isinstance(checked, Rejected)
            self.cluster.stores.submit(checked, answer.set_result)
            return await answer

        self.cluster.written.append((self.node.name, request))
        steps = self.cluster.write_steps
        return await (steps.popleft()(carry_out) if steps else carry_out())

    async def _snapshots(self, store: Atom, path: list[Term]) -> Term:
        """Those of a stream, as a worker of this node says."""
        _, source, stream, _ = path
        request = schema.list_snapshots_request(store, source, stream)
        return await call(self.node, self.workers[0].pid, request, timeout_s=None)

    def _fence(self, store: Atom, timeout_ms: int) -> Term:
        self.cluster.fenced.append(self.node.name)
        return self.cluster.fence_answer

    async def _timed(self, module: Atom, function: Atom, arguments: list[Term]) -> Term:
        assert (str(module), str(function)) == ("khepri_adv", "get_many")
        return (200, await self._child_list_length(*arguments))

    async def _child_list_length(self, store: Atom, path: Term, options: Term) -> Term:
        if path[0] is Atom("snapshots"):
            ok, snapshots = await self.cluster.ask(("list_snapshots", store, path[1], schema.ANY))
            return (ok, {tuple(each): {} for each in snapshots})
        _, which = path
        streams = (
            {Atom("if_any"): which[1], Atom("if_node_exists"): None}[which[0]] if type(which) is tuple else [which]
        )
        answer: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self.cluster.stores.stream_counts(store, streams, answer.set_result)
        ok, counts = await answer
        found = {(path[0], stream): {Atom("child_list_length"): count} for stream, count in counts.items() if count}
        return (ok, found)

    def _key_metrics(self, server: Term) -> Term:
        return {Atom("last_applied"): self.cluster.stores.committed(server[0])}

    async def _evaluate(self, forms: Term, bindings: Term) -> Term:
        assert forms == [Atom("guarded_append")]
        given = {str(name): value for name, value in bindings}

        async def carry_out() -> Term:
            store, stream, events = given["Store"], given["Stream"], given["Events"]
            if "First" in given:
                raise ErlangThrow(
                    await self.cluster.append_guarded(store, stream, given["First"], events, again=given["Again"])
                )
            first = given["Number"] if "Number" in given else given["Last"] + 1 - len(events)
            raise ErlangThrow(await self.cluster.append_first(store, stream, first, events))

        self.cluster.guarded.append(self)
        steps = self.cluster.guarded_steps
        return await (steps.popleft()(carry_out) if steps else carry_out())

    def start_worker(self, store: Atom = STORE) -> Worker:
        worker = Worker(self, store, self.cluster.next_number())
        spawn_server(self.node, worker)
        self.workers.append(worker)
        return worker

    def worker_ended(self, worker: Worker, reason: Term) -> None:
        """As its supervisor does: another one takes its place, under another name."""
        self.workers.remove(worker)
        if self.cluster.restart_workers and is_failure(reason):
            self.node.soon(self.start_worker, worker.store)

    async def stop(self) -> None:
        await self.node.stop()


class Cluster:
    """Store nodes that hold one and the same store."""

    def __init__(self, stores: EmbeddedStores, epmd_port: int, *, khepri: bool) -> None:
        self.stores = stores
        self.khepri = khepri
        """Whether the nodes can evaluate guarded appends."""
        self.options = NodeOptions(epmd_port=epmd_port)
        self.nodes: list[StoreNode] = []
        self.requests: list[tuple[Worker, Term]] = []
        """Every call that reached a worker, in order."""
        self.casts: list[Term] = []
        self.guarded: list[StoreNode] = []
        """The node of every guarded append, in order."""
        self.guarded_steps: deque[GuardedStep] = deque()
        """What is done with the next guarded appends instead of carrying them out."""
        self.written: list[tuple[Atom, Term]] = []
        """The node of every snapshot that was put or deleted by Khepri, and the cast that does the same, in order."""
        self.write_steps: deque[GuardedStep] = deque()
        """What is done with the next of them instead of carrying them out."""
        self.fenced: list[Atom] = []
        """The node of every `khepri:fence/2`, in order, ..."""
        self.fence_answer: Term = schema.OK
        """... and what it is answered."""
        self.restart_workers = True
        self.registry: Callable[[], Term] | None = None
        """What `Swarm.registered/0` answers instead of the workers that are alive."""
        self.registry_open = asyncio.Event()
        """Cleared: `Swarm.registered/0` takes as long as that."""
        self.registry_open.set()
        self._steps: list[tuple[str | None, Step]] = []
        self._always: dict[str, Step] = {}
        self._numbers = 0

    async def make_anew(self, directory: Path) -> None:
        """Another store in the place of this one, with nothing in it."""
        self.stores = await made_anew(self.stores, directory)

    async def append_guarded(self, store: Atom, stream: bytes, first: int, events: Term, *, again: bool) -> Term:
        """Put one event after the other where nothing is, until one is refused."""
        for number, each in enumerate(events, first):
            outcome, reason = await self.ask(("append_events", store, stream, number - 1, [each]))
            if outcome is schema.OK:
                continue
            _, found = await self.ask(("get_events", store, stream, number, 1, schema.FORWARD))
            if again and found and found[0][schema.EVENT_ID] == each[schema.EVENT_ID]:
                continue
            return (Atom("refused" if found else "ahead"), number, reason[1] + 1)
        return (Atom("written"), first + len(events) - 1)

    async def append_first(self, store: Atom, stream: bytes, first: int, events: Term) -> Term:
        """The same for the expressions of a first attempt, which answer records and do not ask why."""
        records = []
        for number, each in enumerate(events, first):
            outcome, _ = await self.ask(("append_events", store, stream, number - 1, [each]))
            if outcome is not schema.OK:
                return ((schema.ERROR, (Atom("khepri"), Atom("mismatching_node"), {})), number, [encode(each)])
            _, found = await self.ask(("get_events", store, stream, number, 1, schema.FORWARD))
            records.append(encode(found[0]))
        return (schema.OK, first + len(events) - 1, records)

    async def ask(self, request: tuple[Any, ...]) -> Term:
        """What the store itself answers."""
        answer: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self.stores.submit((Atom(request[0]), *request[1:]), answer.set_result)
        return plain(await answer)

    @property
    def epmd_port(self) -> int:
        return self.options.epmd_port

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.nodes]

    @property
    def workers(self) -> list[Worker]:
        return [worker for each in self.nodes for worker in each.workers]

    def entries(self) -> list[Term]:
        return [worker.entry for worker in self.workers]

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def next(self, step: Step, op: str | None = None) -> None:
        """The next call (the next one of `op`), whichever worker it reaches, goes to `step`."""
        self._steps.append((op, step))

    def always(self, step: Step, *ops: str) -> None:
        """Every call of these operations goes to `step`."""
        self._always.update(dict.fromkeys(ops, step))

    def take_step(self, request: Term) -> Step | None:
        for index, (op, step) in enumerate(self._steps):
            if op is None or request[0] is Atom(op):
                del self._steps[index]
                return step
        return self._always.get(str(request[0]))

    def asked(self, op: str) -> list[Worker]:
        """The workers that were asked for `op`, one for each time."""
        return [worker for worker, request in self.requests if request[0] is Atom(op)]


async def made_anew(stores: EmbeddedStores, directory: Path) -> EmbeddedStores:
    """Empty stores of the same names, in the place of these."""
    others = EmbeddedStores(directory, [StoreOptions(STORE.name)], node=Atom("store@127.0.0.1"))
    others.start(asyncio.get_running_loop())
    await stores.close()
    return others


@asynccontextmanager
async def open_cluster(
    directory: Path,
    nodes: int = 1,
    *,
    workers: int = 2,
    stores: tuple[Atom, ...] = (STORE,),
    epmd_port: int | None = None,
    khepri: bool = False,
) -> AsyncIterator[Cluster]:
    """A started cluster with so many workers per node and store."""
    embedded = EmbeddedStores(
        directory / "cluster", [StoreOptions(str(store)) for store in stores], node=Atom("store@127.0.0.1")
    )
    embedded.start(asyncio.get_running_loop())
    cluster = Cluster(embedded, epmd_port or free_port(), khepri=khepri)
    try:
        for _ in range(nodes):
            member = StoreNode(cluster)
            await member.node.start()
            cluster.nodes.append(member)
            for store in stores:
                for _ in range(workers):
                    member.start_worker(store)
        yield cluster
    finally:
        # The first node has the EPMD.
        for member in reversed(cluster.nodes):
            await member.stop()
        await cluster.stores.close()


# Gateways


@asynccontextmanager
async def gateway(
    *cluster: Cluster, embedded: Path | None = None, epmd_port: int | None = None, **settings: Any
) -> AsyncIterator[System]:
    """A running gateway, connected to the nodes of `cluster`."""
    ports = [each.epmd_port for each in cluster]
    chosen: dict[str, Any] = {
        "name": unique_name("gater"),
        "cookie": COOKIE,
        "gossip": False,
        "epmd_port": epmd_port or (ports[0] if ports else free_port()),
        "http_port": free_port(),
        "embedded": embedded,
        "stores": (STORE.name,),
        "connect": tuple(name for each in cluster for name in each.names),
        "connection_retry_interval_ms": 100,
        "drain_timeout_ms": 200,
    }
    system = System(Settings(**(chosen | settings)))
    await system.start()
    try:
        yield system
    finally:
        await system.stop()


async def connected(system: System, cluster: Cluster) -> None:
    """Wait until the gateway knows every worker of the cluster."""
    workers = {worker.pid for worker in cluster.workers}

    async def known() -> bool:
        listed = await erpc_call(system.node, system.node.name, API_MODULE, "gateway_worker_pids")
        return workers <= {each for each in listed if type(each) is Pid}

    await wait_until(known, "discovery of the workers")


@asynccontextmanager
async def caller_node(epmd_port: int) -> AsyncIterator[Node]:
    """A node whose program uses the gateway, as an Elixir program would."""
    async with make_node(unique_name("caller"), cookie=COOKIE, options=NodeOptions(epmd_port=epmd_port)) as node:
        yield node


def function_door(caller: Node, system: System) -> Ask:
    """Door (a): the functions of `ExESDBGater.API`."""

    async def ask(op: str, *arguments: Term) -> Term:
        return await erpc_call(caller, system.node.name, API_MODULE, op, arguments, timeout_s=DEADLINE_S)

    return ask


def server_door(caller: Node, system: System) -> Ask:
    """Door (b): requests to the GenServer of that name."""

    async def ask(op: str, *arguments: Term) -> Term:
        target = (Atom(API_MODULE), system.node.name)
        return await call(caller, target, (Atom(op), *arguments), timeout_s=DEADLINE_S)

    return ask


def tell_server(caller: Node, system: System, op: str, *arguments: Term) -> None:
    """A cast through door (b)."""
    cast(caller, (Atom(API_MODULE), system.node.name), (Atom(op), *arguments))


def client_door(client: Gateway) -> Ask:
    """Door (c): the Python client, its values and errors turned back into terms."""

    async def ask(op: str, *arguments: Term) -> Term:
        try:
            return schema.ok(await _by_client(client, op, *[_python(each) for each in arguments]))
        except GaterError as error:
            return schema.error(schema.reason_for(error))

    return ask


def _python(argument: Term) -> Any:
    if type(argument) is Atom:
        return argument.name
    if type(argument) is bytes:
        return argument.decode()
    if schema.is_struct(argument, schema.SNAPSHOT_RECORD):
        return Snapshot.from_term(argument)
    if type(argument) is list:
        return [NewEvent.from_term(each) for each in argument]
    return argument


async def _by_client(client: Gateway, op: str, *arguments: Any) -> Term:
    if op == "append_events" and len(arguments) == 4:
        store, stream, expected, events = arguments
        return await client.append_events(store, stream, events, expected)
    if op in ("stream_forward", "stream_backward"):
        return [each.to_term() async for each in getattr(client, op)(*arguments)]
    answer = await getattr(client, op)(*arguments)
    if op == "get_events":
        return [each.to_term() for each in answer]
    if op == "list_stores":
        return [each.to_term() for each in answer]
    if op == "get_streams":
        return [name.encode() for name in answer]
    if op == "read_snapshot" and isinstance(answer, Snapshot):
        return answer.to_term()
    return answer


# What must not be left over


def signal_counts() -> Counter[str]:
    """How many aliases and how many monitors exist in this process."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in (Alias, Monitor))
