"""Strategies: ways to learn which nodes there are. Several may run at once; all tell one `Connector`.

As libcluster's `Cluster.Strategy`, a strategy is something that is started and stopped; it only names nodes, and what
is done about a name is decided in `connector.py`. Here: the static list and DNS (`Cluster.Strategy.DNSPoll`); gossip
stands in `gossip.py`, what store nodes tell in `introductions.py`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

import structlog

from gater.cluster.connector import FORGET_AFTER_S

DNS_INTERVAL_S: Final = 5.0
"""As `polling_interval` of libcluster's DNSPoll."""

MAX_DNS_INTERVAL_S: Final = FORGET_AFTER_S / 2
"""A name must be heard again, one failed query included, before the connector forgets it."""

MAX_ADDRESSES: Final = 256
"""Addresses taken from one answer: far above any cluster, and no more than the connector would take."""

Resolve = Callable[[str], Awaitable[Iterable[str]]]
"""From a DNS name to its IPv4 addresses. Raises `OSError` (`socket.gaierror`) when it cannot."""

log = structlog.get_logger(__name__)


class Wants(Protocol):
    """What a strategy needs of `gater.cluster.connector.Connector`."""

    def want(self, peer: str, source: str, *, forever: bool) -> bool:
        """Name a node; False if the name is not taken."""


class Strategy(Protocol):
    """A way to learn which nodes there are."""

    async def start(self, connector: Wants) -> None:
        """Begin to name nodes to `connector`. A network that is not there now is no error: it is tried again."""

    async def stop(self) -> None:
        """Name nobody any more and close what was opened."""


class StaticList:
    """The nodes that were named in the settings (`EX_ESDB_GATER_CONNECT_TO`, `--connect`): wanted for ever."""

    def __init__(self, peers: Iterable[str]) -> None:
        self._peers = tuple(peers)

    async def start(self, connector: Wants) -> None:
        """Name them all."""
        for peer in self._peers:
            connector.want(peer, "static", forever=True)

    async def stop(self) -> None:
        """Nothing to stop."""


class DnsPoll:
    """The A records of a DNS name, asked every `interval_s`: each address is a node `NODE_BASENAME@ADDRESS`.

    What a headless service of Kubernetes or a service of Docker answers. Raises `ValueError` for an interval above
    `MAX_DNS_INTERVAL_S`. `resolve` asks the system unless given.
    """

    def __init__(
        self, query: str, node_basename: str, interval_s: float = DNS_INTERVAL_S, *, resolve: Resolve | None = None
    ) -> None:
        if not 0 < interval_s <= MAX_DNS_INTERVAL_S:
            raise ValueError(f"DNS is asked every 0 to {MAX_DNS_INTERVAL_S:g} seconds, not every {interval_s!r}")
        self._query = query
        self._node_basename = node_basename
        self._interval_s = interval_s
        self._resolve = resolve or resolve_ipv4
        self._task: asyncio.Task[None] | None = None
        self.last_error: str | None = None
        """Why the last query failed; None if it did not."""

    async def start(self, connector: Wants) -> None:
        """Ask now and from then on."""
        self._task = asyncio.create_task(self._poll(connector), name=f"DNS poll of {self._query}")

    async def stop(self) -> None:
        """Ask no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _poll(self, connector: Wants) -> None:
        while True:
            await self._ask(connector)
            await asyncio.sleep(self._interval_s)

    async def _ask(self, connector: Wants) -> None:
        try:
            addresses = sorted(set(await self._resolve(self._query)))
        except OSError as error:
            reason = str(error)
            if reason != self.last_error:
                log.warning("dns_query_failed", query=self._query, reason=reason)
            self.last_error = reason
            return
        if self.last_error is not None:
            log.info("dns_query_answered_again", query=self._query)
            self.last_error = None
        for address in addresses[:MAX_ADDRESSES]:
            connector.want(f"{self._node_basename}@{address}", "dns", forever=False)


async def resolve_ipv4(query: str) -> list[str]:
    """The IPv4 addresses of `query`, as the system resolves it. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(query, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{query!r} cannot be asked of DNS: {error}") from None
    return [str(address[0]) for *_, address in found]
