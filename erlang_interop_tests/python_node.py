"""A Python node beside the BEAM nodes of a test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from erlang_interop_tests.beam import Beams, unique_name
from gater.erl import Node, NodeOptions, make_node
from gater.erl.gen_server import NO_REPLY, Caller, GenServer
from gater.erl.terms import Atom, Term


@contextlib.asynccontextmanager
async def python_node(
    beam: Beams, *, cookie: str | None = None, ticktime_s: float = 60.0, headers: bool = True
) -> AsyncIterator[Node]:
    """A node that shares the cookie and the EPMD of `beam`."""
    options = NodeOptions(epmd_port=await beam.epmd_port(), builtin_epmd=False, ticktime_s=ticktime_s, headers=headers)
    async with make_node(unique_name("py"), cookie=cookie or beam.cookie, options=options) as node:
        yield node


class Collector:
    """A process that keeps what it receives."""

    def __init__(self, node: Node, name: str | None = None, *, trap_exit: bool = False) -> None:
        self.messages: asyncio.Queue[Term] = asyncio.Queue()
        self.reason: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self.process = node.spawn_receiver(self, name=name)
        self.process.trap_exit = trap_exit

    def receive(self, message: Term) -> None:
        self.messages.put_nowait(message)

    def terminate(self, reason: Term) -> None:
        self.reason.set_result(reason)

    async def next(self) -> Term:
        async with asyncio.timeout(10):
            return await self.messages.get()

    async def ended(self) -> Term:
        async with asyncio.timeout(10):
            return await asyncio.shield(self.reason)


class Server(GenServer):
    """Answers `{echo, Term}`, `count`, `later`, `crash`; counts casts and plain messages."""

    def __init__(self) -> None:
        self.count = 0
        self.infos: list[Term] = []
        self.waiting: list[Caller] = []

    def handle_call(self, request: Term, caller: Caller) -> Term:
        match request:
            case (Atom(name="echo"), term):
                return term
            case Atom(name="count"):
                return self.count
            case Atom(name="later"):
                self.waiting.append(caller)
                return NO_REPLY
        raise ValueError(f"unknown request {request}")

    def handle_cast(self, message: Term) -> None:
        self.count += message

    def handle_info(self, message: Term) -> None:
        self.infos.append(message)

    def get_state(self) -> Term:
        return self.count

    def set_state(self, state: Term) -> None:
        self.count = state
