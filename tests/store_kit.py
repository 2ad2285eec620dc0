"""What the tests of the embedded store share: a store to talk to, events to store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gater.api import schema
from gater.api.schema import NewEvent, Rejected, Request
from gater.erl import etf
from gater.erl.terms import Atom, EncodedTerm, Term
from gater.store import EmbeddedStores, StoreOptions

STORE = Atom("reg_gh")
NODE = Atom("node0@127.0.0.1")


def plain(term: Term) -> Term:
    """A reply as the caller on the other side of the wire sees it."""
    data = term.data if isinstance(term, EncodedTerm) else etf.encode_term(term)
    return etf.decode(bytes([etf.VERSION]) + data)


def checked(term: Term, *, cast: bool = False) -> Request:
    request = schema.check_request(term, cast=cast)
    assert isinstance(request, Request), request
    return request


def event(number: int, data: Term = None) -> NewEvent:
    return NewEvent("counted:v1", data, {b"n": number}, event_id=f"event-{number}")


def append(stream: str, events: list[NewEvent], expected: schema.Expected = schema.ANY, store: Atom = STORE) -> Term:
    return schema.append_events_request(store, stream, events, expected)


def read(stream: str, start: int = 0, count: int = 1000, direction: Atom = schema.FORWARD) -> Term:
    return schema.get_events_request(STORE, stream, start, count, direction)


def wrong(current: int) -> Term:
    return schema.error(schema.wrong_expected_version(current))


class Caller:
    """Calls and casts, as a process of the node would make them."""

    def __init__(self, stores: EmbeddedStores) -> None:
        self.stores = stores

    def send(self, request: Term) -> asyncio.Future[Term]:
        future: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
        self.stores.submit(request, future.set_result)
        return future

    async def call(self, request: Term) -> Term:
        return plain(await asyncio.wait_for(self.send(request), 30))

    def cast(self, request: Term) -> Rejected | None:
        return self.stores.cast(request)

    async def numbers(self, stream: str) -> list[int]:
        """The `n` of the metadata of every event of a stream, in order."""
        _, events = await self.call(read(stream, count=schema.MAX_READ_COUNT))
        assert [event[schema.EVENT_NUMBER] for event in events] == list(range(len(events)))
        return [event[schema.METADATA][b"n"] for event in events]


@asynccontextmanager
async def open_stores(directory: Path, *options: StoreOptions) -> AsyncIterator[Caller]:
    stores = EmbeddedStores(directory, options or [StoreOptions("reg_gh")], node=NODE)
    stores.start(asyncio.get_running_loop())
    try:
        yield Caller(stores)
    finally:
        await stores.close()
