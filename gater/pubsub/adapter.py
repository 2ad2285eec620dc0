"""Phoenix.PubSub servers of this node: one worker process each, on top of a `pg` scope.

Follows `phoenix_pubsub` 2.1, `pubsub/pg2.ex` and `pubsub.ex` (pool size 1, the only one ExESDB uses). Wire shapes are
in `messages.py`. A BEAM broadcasts to us because our worker is a member of the group; we broadcast to the members
there.

Subscribers here are callbacks, called in the loop turn in which the message came. One that raises is logged and stays.
Where there is a key, what comes from another node on a server whose messages are signed is passed on, as it came, only
if it is signed with that key (`signatures.py`); else it is counted, and logged now and then.

`PubSub` supervises the scope and the workers: a worker that ends is replaced and joins its group again; with the scope
all of them are replaced, and the new scope tells the other nodes who is a member now. Subscribers stay subscribed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeAlias

import structlog

from gater.erl.errors import ErlError
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, start_server
from gater.erl.node import Node
from gater.erl.pg import Scope
from gater.erl.process import SHUTDOWN, Process, described
from gater.erl.supervisor import ChildSpec, Supervisor
from gater.erl.terms import Atom, Pid, Term
from gater.pubsub.messages import (
    EVENTS_SERVER,
    MAX_TOPIC_BYTES,
    MONITOR_SERVER,
    SCOPE,
    SERVERS,
    SIGNED_SERVERS,
    Broadcast,
    forward_to_local,
    parse_broadcast,
    worker_name,
)
from gater.pubsub.signatures import MessageRefused, verify

Handler: TypeAlias = Callable[[bytes, Term], None]
"""Called with topic and message."""

MAX_SUBSCRIPTIONS: Final = 100_000
"""Subscriptions of one server; more are a leak of the code that makes them."""

REPORT_EVERY_S: Final = 60.0
"""Refused messages are reported at most this often, by each server."""

log = structlog.get_logger(__name__)


class Groups(Protocol):
    """What is needed of a `pg` scope (`gater.erl.pg`)."""

    def join(self, group: Term, pid: Pid, /) -> None: ...

    def leave(self, group: Term, pid: Pid, /) -> object: ...

    def members(self, group: Term, /) -> Iterable[Pid]: ...


class Worker(GenServer):
    """The process that other nodes send broadcasts to. What is no broadcast is ignored, as by the original."""

    def __init__(self, server: PubSubServer) -> None:
        self._server = server

    def handle_info(self, message: Term) -> None:
        broadcast = parse_broadcast(message)
        if broadcast is not None:
            self._server.heard(broadcast)

    def handle_cast(self, message: Term) -> None:
        return

    def handle_call(self, request: Term, caller: Caller) -> Term:
        return NO_REPLY


class PubSubServer:
    """One server, for example `ex_esdb_events`: it can be subscribed to at any time, and hears from `start` on."""

    def __init__(self, node: Node, groups: Groups, name: str, *, key: str = "") -> None:
        """`key`: what messages of other nodes must be signed with; empty: none has to be."""
        self.name = name
        self.refused: Counter[str] = Counter()
        """Messages of other nodes that were not passed on, by the original's reason."""
        self._key = key
        self._report_again_at = float("-inf")
        self.group = worker_name(name)
        self._node = node
        self._groups = groups
        self._topics: dict[bytes, dict[int, Handler]] = {}
        self._count = 0
        self._next_key = 0
        self._worker: Process | None = None

    async def start(self) -> Worker:
        """Start the worker. Raises `NodeError` if this node has a process of its name already."""
        worker = Worker(self)
        await start_server(self._node, worker, name=self.group)
        self._worker = worker.process
        self._groups.join(self.group, worker.pid)
        return worker

    @property
    def subscriptions(self) -> int:
        """How many there are."""
        return self._count

    @property
    def peers(self) -> list[Pid]:
        """The workers of this server on other nodes."""
        ours = self._node.name
        return [pid for pid in self._groups.members(self.group) if pid.node is not ours]

    def subscribe(self, topic: str | bytes, handler: Handler) -> Callable[[], None]:
        """Have `handler(topic, message)` called for every broadcast on the topic; what is returned ends that.

        Each call counts: who subscribes twice is called twice, as in Phoenix.PubSub.
        """
        if self._count >= MAX_SUBSCRIPTIONS:
            raise ValueError(f"server {self.name} has MAX_SUBSCRIPTIONS ({MAX_SUBSCRIPTIONS}) subscriptions")
        key, self._next_key = self._next_key, self._next_key + 1
        name = _topic(topic)
        self._topics.setdefault(name, {})[key] = handler
        self._count += 1

        def unsubscribe() -> None:
            handlers = self._topics.get(name, {})
            if handlers.pop(key, None) is not None:
                self._count -= 1
                if not handlers:
                    del self._topics[name]

        return unsubscribe

    def broadcast(self, topic: str | bytes, message: Term) -> None:
        """To the subscribers on all nodes, this one included."""
        self.broadcast_elsewhere(topic, message)
        self.local_broadcast(topic, message)

    def broadcast_elsewhere(self, topic: str | bytes, message: Term) -> None:
        """To the subscribers on all other nodes."""
        forwarded = forward_to_local(_topic(topic), message)
        for pid in self.peers:
            self._node.send(pid, forwarded, self._sender)

    def direct_broadcast(self, node: str | Atom, topic: str | bytes, message: Term) -> None:
        """To the subscribers on one node: to the worker there by its name, whether or not it is known as a member."""
        target = Atom(node) if type(node) is str else node
        if target is self._node.name:
            self.local_broadcast(topic, message)
        else:
            self._node.send((self.group, target), forward_to_local(_topic(topic), message), self._sender)

    @property
    def _sender(self) -> Pid | None:
        return None if self._worker is None else self._worker.pid

    def heard(self, broadcast: Broadcast) -> None:
        """A broadcast of another node has come."""
        if broadcast.topic in self._topics and self._is_believed(broadcast.message):
            self.local_broadcast(broadcast.topic, broadcast.message)

    def _is_believed(self, message: Term) -> bool:
        if not self._key:
            return True
        try:
            verify(message, self._key)
        except ErlError as problem:
            self.refused[problem.reason.name if isinstance(problem, MessageRefused) else "invalid_format"] += 1
            now = self._node.loop.time()
            if now >= self._report_again_at:
                self._report_again_at = now + REPORT_EVERY_S
                log.warning("pubsub_messages_refused", server=self.name, refused=dict(self.refused))
            return False
        return True

    def local_broadcast(self, topic: str | bytes, message: Term) -> None:
        """To the subscribers on this node."""
        name = _topic(topic)
        handlers = self._topics.get(name)
        if handlers:
            for handler in list(handlers.values()):
                try:
                    handler(name, message)
                except Exception as error:
                    log.error(
                        "pubsub_handler_failed",
                        server=self.name,
                        topic=name.decode(errors="replace"),
                        error=described(error),
                    )

    def close(self) -> None:
        """Leave the group and end the worker."""
        if self._worker is not None and self._worker.alive:
            self._groups.leave(self.group, self._worker.pid)
            self._worker.exit(SHUTDOWN)


class PubSub:
    """All servers of a node; `pubsub["ex_esdb_events"]` is one. `start`, as a child of a supervisor."""

    def __init__(self, node: Node, *, secret_key_base: str = "", events_server: str = EVENTS_SERVER) -> None:
        """`events_server` carries the events, whatever its name; `secret_key_base` signs what is signed."""
        self._node = node
        self._scope: Scope | None = None
        signed = SIGNED_SERVERS - {events_server}
        self._servers = {
            name: PubSubServer(node, self, name, key=secret_key_base if name in signed else "")
            for name in dict.fromkeys((*SERVERS, MONITOR_SERVER, events_server))
        }

    async def start(self) -> Supervisor:
        """Start the scope and the workers. Raises `NodeError` if one of their names is taken."""
        children = [ChildSpec(str(SCOPE), self._start_scope)]
        children += [ChildSpec(server.name, server.start) for server in self]
        supervisor = Supervisor(children, strategy="rest_for_one")
        await start_server(self._node, supervisor)
        return supervisor

    async def _start_scope(self) -> Scope:
        scope = Scope(SCOPE)
        await start_server(self._node, scope, name=SCOPE)
        self._scope = scope
        return scope

    def join(self, group: Term, pid: Pid) -> None:
        """Add a process of this node to a group of the scope."""
        if self._scope is not None:
            self._scope.join(group, pid)

    def leave(self, group: Term, pid: Pid) -> bool:
        """Take a process out of a group; False if it was not in it."""
        return self._scope is not None and self._scope.leave(group, pid)

    def members(self, group: Term) -> list[Pid]:
        """The members of a group on all nodes."""
        return [] if self._scope is None else self._scope.members(group)

    def __getitem__(self, name: str) -> PubSubServer:
        return self._servers[name]

    def __iter__(self) -> Iterator[PubSubServer]:
        return iter(self._servers.values())


def _topic(topic: str | bytes) -> bytes:
    name = topic.encode() if isinstance(topic, str) else topic
    if len(name) > MAX_TOPIC_BYTES:
        raise ValueError(f"a topic has at most MAX_TOPIC_BYTES ({MAX_TOPIC_BYTES}) bytes, this one has {len(name)}")
    return name
