"""Introductions: gateways learn of each other from the store nodes that both are connected to.

Gateways are hidden nodes. No BEAM tells a hidden node of another one, and Swarm's trackers pass a name on only when a
node joins: two gateways that start at the same time, without gossip, might not meet for minutes. Meanwhile neither
would hear of the other's appends, nor take over its subscriptions. So store nodes are asked, again and again, for the
hidden nodes they know (`nodes(hidden)`), and what each of those runs: the store node asks it, so that nobody connects
to an operator's shell. Those that run gater are named to the connector.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import sample
from typing import Final

import structlog

from gater.cluster.strategy import Wants
from gater.erl.errors import ErlangException
from gater.erl.node import Node
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom, Term

GATER: Final = Atom("gater")
"""The application a gateway says it runs."""

INTERVAL_S: Final = 1.0
"""Between two rounds. One costs a store node some tens of microseconds."""

MAX_INTRODUCERS: Final = 5
"""Store nodes asked in one round; others take their turn by chance."""

MAX_HIDDEN: Final = 256
"""Hidden nodes considered of one answer; what is beyond that is a misuse of the cluster, not gateways."""

ASK_TIMEOUT_S: Final = 2.0
"""How long a store node, and the node it asks for us, may take."""

ASK_AGAIN_S: Final = 60.0
"""When a node that did not run gater, or did not answer, is asked again: its name may be another's by then."""

_HIDDEN: Final = Atom("hidden")

log = structlog.get_logger(__name__)


class Introductions:
    """A strategy (`strategy.Strategy`). `introducers` gives the store nodes that are up now."""

    def __init__(self, node: Node, introducers: Callable[[], Sequence[Atom]], interval_s: float = INTERVAL_S) -> None:
        self._node = node
        self._introducers = introducers
        self._interval_s = interval_s
        self.others: dict[Atom, float] = {}
        """Hidden nodes that are no gateways, and until when (time of the loop) that is believed."""
        self._task: asyncio.Task[None] | None = None

    async def start(self, connector: Wants) -> None:
        """Ask now and from then on."""
        self._task = asyncio.create_task(self._rounds(connector), name="introductions")

    async def stop(self) -> None:
        """Ask no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _rounds(self, connector: Wants) -> None:
        while True:
            introducers = self._introducers()
            chosen = sample(introducers, min(MAX_INTRODUCERS, len(introducers)))
            await asyncio.gather(*(self._ask(connector, introducer) for introducer in chosen))
            now = asyncio.get_running_loop().time()
            self.others = {other: until for other, until in self.others.items() if now < until}
            await asyncio.sleep(self._interval_s)

    async def _ask(self, connector: Wants, introducer: Atom) -> None:
        try:
            hidden = await erpc_call(self._node, introducer, "erlang", "nodes", [_HIDDEN], timeout_s=ASK_TIMEOUT_S)
            for other in hidden[:MAX_HIDDEN] if type(hidden) is list else ():
                if self._is_new(other) and await self._is_gateway(introducer, other):
                    connector.want(other.name, "introduction", forever=False)
        except ErlangException as error:
            log.debug("no_introduction", peer=str(introducer), reason=repr(error.reason)[:200])

    def _is_new(self, other: Term) -> bool:
        return (
            type(other) is Atom
            and other is not self._node.name
            and other not in self.others
            and other not in self._node.nodes()
        )

    async def _is_gateway(self, introducer: Atom, other: Atom) -> bool:
        """Have `introducer` ask `other`; a node that does not answer is none for now."""
        question: list[Term] = [other, Atom("application"), Atom("which_applications"), [], int(ASK_TIMEOUT_S * 1000)]
        applications = await erpc_call(self._node, introducer, "rpc", "call", question, timeout_s=ASK_TIMEOUT_S * 2)
        if type(applications) is list and any(
            type(each) is tuple and each and each[0] is GATER for each in applications
        ):
            return True
        self.others[other] = asyncio.get_running_loop().time() + ASK_AGAIN_S
        return False
