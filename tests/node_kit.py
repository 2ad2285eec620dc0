"""Several nodes in one Python process: the pieces that tests of the node half share."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from gater.erl import Node, NodeOptions, make_node
from gater.erl.gen_server import NO_REPLY, Caller, GenServer
from gater.erl.process import Process
from gater.erl.terms import Atom, Term

COOKIE = "a cookie for tests"
DEADLINE_S = 20.0
"""Nobody waits that long where things are as they should: what a busy machine may need is no failure."""

_numbers = itertools.count(1)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, below the range from which the kernel gives a port to a node that
    listens on any."""
    chooser = random.SystemRandom()
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", chooser.randrange(12_000, 32_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])


def unique_name(prefix: str = "py") -> str:
    return f"{prefix}_{os.getpid()}_{next(_numbers)}@127.0.0.1"


async def wait_until(condition: Callable[[], Any] | Callable[[], Awaitable[Any]], what: str = "the condition") -> Any:
    """Wait for `condition` to return something true and return that."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {DEADLINE_S} s"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(*names: str, cookie: str = COOKIE, options: NodeOptions | None = None) -> AsyncIterator[list[Node]]:
    """Nodes that share a built-in EPMD on a port of its own, started in order, stopped in reverse."""
    chosen = options or NodeOptions()
    if chosen.epmd_port == NodeOptions().epmd_port:
        chosen = replace(chosen, epmd_port=free_port())
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for name in names:
            nodes.append(await stack.enter_async_context(make_node(name, cookie=cookie, options=chosen)))
        yield nodes


@contextlib.asynccontextmanager
async def two_nodes(options: NodeOptions | None = None) -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes that know nothing of each other yet."""
    async with running(unique_name("one"), unique_name("two"), options=options) as (one, two):
        yield one, two


class Collector:
    """A process that keeps what it receives."""

    def __init__(self, node: Node, name: str | None = None, *, trap_exit: bool = False) -> None:
        self.messages: list[Term] = []
        self.reason: Term = None
        self.process: Process = node.spawn_receiver(self, name=name)
        self.process.trap_exit = trap_exit

    def receive(self, message: Term) -> None:
        self.messages.append(message)

    def terminate(self, reason: Term) -> None:
        self.reason = reason

    async def next(self) -> Term:
        """The first message, waited for and removed."""
        await wait_until(lambda: self.messages, "a message")
        return self.messages.pop(0)

    async def ended(self) -> Term:
        """The exit reason, waited for."""
        await wait_until(lambda: not self.process.alive, "the end of the process")
        return self.reason


class Counter(GenServer):
    """A server with one of everything: `{add, N}`, `get`, `crash`, `later`, `never`, `slow`, a cast that adds."""

    def __init__(self) -> None:
        self.value = 0
        self.infos: list[Term] = []
        self.ended_with: Term = None
        self.waiting: list[Caller] = []

    def handle_call(self, request: Term, caller: Caller) -> Term:
        match request:
            case (Atom(name="add"), int(number)):
                self.value += number
                return self.value
            case Atom(name="crash"):
                raise ValueError("crashed on request")
            case Atom(name="later"):
                self.waiting.append(caller)
                return NO_REPLY
            case Atom(name="slow"):
                return self._slow()
            case (Atom(name="echo"), term):
                return term
        return self.value

    async def _slow(self) -> Term:
        await asyncio.sleep(0.01)
        return self.value

    def handle_cast(self, message: Term) -> None:
        self.value += message

    def handle_info(self, message: Term) -> None:
        self.infos.append(message)

    def get_state(self) -> Term:
        return self.value

    def set_state(self, state: Term) -> None:
        if type(state) is not int:
            raise TypeError("a counter counts")
        self.value = state

    def terminate(self, reason: Term) -> None:
        self.ended_with = reason
