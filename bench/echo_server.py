"""The Python half of the echo: a node of `gater.erl` with one GenServer, run as a user would run it.

    python -m bench.echo_server NAME COOKIE EPMD_PORT uvloop|asyncio

Prints `NAME is up` once it can be called; SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable

from gater.erl.gen_server import Caller, GenServer, start_server
from gater.erl.memory import keep_freed_memory
from gater.erl.node import Node, NodeOptions
from gater.erl.terms import Term
from gater.settings import DEFAULT_BUSY_WAIT_US


class Echo(GenServer):
    """Answers every call with its request."""

    def handle_call(self, request: Term, caller: Caller) -> Term:
        return request


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop; None lets asyncio choose its own."""
    if name == "asyncio":
        return None
    import uvloop

    return uvloop.new_event_loop


async def serve(name: str, cookie: str, epmd_port: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    options = NodeOptions(epmd_port=epmd_port, builtin_epmd=False, busy_wait_s=DEFAULT_BUSY_WAIT_US / 1e6)
    async with Node(name, cookie=cookie, options=options) as node:
        await start_server(node, Echo(), name="echo")
        print(f"{name} is up", flush=True)
        await ended.wait()


def main() -> None:
    name, cookie, epmd_port, loop = sys.argv[1:]
    keep_freed_memory()
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(serve(name, cookie, int(epmd_port)))


if __name__ == "__main__":
    main()
