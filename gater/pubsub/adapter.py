"""Phoenix.PubSub servers of this node: one worker process each, on top of a `pg` scope.

Follows `phoenix_pubsub` 2.1, `pubsub/pg2.ex` and `pubsub.ex` (pool size 1, the only one ExESDB uses). Wire shapes are
in `messages.py`. A BEAM broadcasts to us because our worker is a member of the group; we broadcast to the members
there.

Subscribers here are callbacks, called in the loop turn in which the message came. One that raises is logged and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeAlias

import structlog

from gater.erl.node import Node
from gater.erl.process import SHUTDOWN, Process, described
from gater.erl.terms import Atom, Pid, Term
from gater.pubsub.messages import (
    MAX_TOPIC_BYTES,
    MONITOR_SERVER,
    SERVERS,
    forward_to_local,
    parse_broadcast,
    worker_name,
)

Handler: TypeAlias = Callable[[bytes, Term], None]
"""Called with topic and message."""

MAX_SUBSCRIPTIONS: Final = 100_000
"""Subscriptions of one server; more are a leak of the code that makes them."""

log = structlog.get_logger(__name__)


class Groups(Protocol):
    """What is needed of a `pg` scope (`gater.erl.pg`)."""

    def join(self, group: Term, pid: Pid, /) -> None: ...

    def leave(self, group: Term, pid: Pid, /) -> object: ...

    def members(self, group: Term, /) -> Iterable[Pid]: ...


class PubSubServer:
    """One server, for example `ex_esdb_events`; it lives until `close`."""

    def __init__(self, node: Node, groups: Groups, name: str) -> None:
        """Raises `NodeError` if this node has a process of the worker's name already."""
        self.name = name
        self.group = worker_name(name)
        self._node = node
        self._groups = groups
        self._topics: dict[bytes, dict[int, Handler]] = {}
        self._count = 0
        self._next_key = 0
        self._worker: Process = node.spawn_receiver(self)
        self._worker.register(self.group)
        groups.join(self.group, self._worker.pid)

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
            self._node.send(pid, forwarded, self._worker.pid)

    def direct_broadcast(self, node: str | Atom, topic: str | bytes, message: Term) -> None:
        """To the subscribers on one node: to the worker there by its name, whether or not it is known as a member."""
        target = Atom(node) if type(node) is str else node
        if target is self._node.name:
            self.local_broadcast(topic, message)
        else:
            self._node.send((self.group, target), forward_to_local(_topic(topic), message), self._worker.pid)

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

    def receive(self, message: Term) -> None:
        """A message to the worker; what is no broadcast is ignored, as by the original."""
        broadcast = parse_broadcast(message)
        if broadcast is not None:
            self.local_broadcast(broadcast.topic, broadcast.message)

    def terminate(self, reason: Term) -> None:
        """The worker has ended; subscribers hear nothing more."""
        self._topics.clear()
        self._count = 0

    def close(self) -> None:
        """Leave the group and end the worker."""
        if self._worker.alive:
            self._groups.leave(self.group, self._worker.pid)
            self._worker.exit(SHUTDOWN)


class PubSub:
    """All servers of a node; `pubsub["ex_esdb_events"]` is one."""

    def __init__(self, node: Node, groups: Groups, servers: Iterable[str] = (*SERVERS, MONITOR_SERVER)) -> None:
        self._servers = {name: PubSubServer(node, groups, name) for name in servers}

    def __getitem__(self, name: str) -> PubSubServer:
        return self._servers[name]

    def __iter__(self) -> Iterator[PubSubServer]:
        return iter(self._servers.values())

    def close(self) -> None:
        """End all workers."""
        for server in self._servers.values():
            server.close()


def _topic(topic: str | bytes) -> bytes:
    name = topic.encode() if isinstance(topic, str) else topic
    if len(name) > MAX_TOPIC_BYTES:
        raise ValueError(f"a topic has at most MAX_TOPIC_BYTES ({MAX_TOPIC_BYTES}) bytes, this one has {len(name)}")
    return name
