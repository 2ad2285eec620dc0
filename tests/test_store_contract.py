"""Every recorded exchange with a real gateway worker, replayed in order against the embedded store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from store_kit import Caller, open_stores

from gater.api import schema
from gater.erl import etf
from gater.erl.terms import Atom, Term, TermMap
from gater.store import StoreOptions

CAPTURE = Path(__file__).parent / "captures" / "exesdb_contract.json"
EXCHANGES: list[dict[str, Any]] = json.loads(CAPTURE.read_text())["exchanges"]

TIMES = {schema.CREATED, schema.CREATED_EPOCH, Atom("timestamp")}
LAZY = {"stream_forward", "stream_backward"}
EXAMPLE = StoreOptions("reg_gh", "example store", ("example",))


def without_times(term: Term) -> Term:
    """Replies compare equal when only the moments of this run differ from those of the recording."""
    if isinstance(term, TermMap):
        return TermMap((key, without_times(value)) for key, value in term.items())
    if isinstance(term, dict):
        return {key: None if _is_time(key, value) else without_times(value) for key, value in term.items()}
    if isinstance(term, list | tuple):
        return type(term)(without_times(element) for element in term)
    return term


def _is_time(key: Term, value: Term) -> bool:
    return key in TIMES or (key is schema.CREATED_AT and schema.is_struct(value, schema.DATE_TIME))


def term_of(exchange: dict[str, Any], part: str) -> Term:
    return etf.decode(bytes.fromhex(exchange[f"{part}_etf"]))


async def answer(caller: Caller, exchange: dict[str, Any]) -> Term:
    request = term_of(exchange, "request")
    if exchange["kind"] == "cast":
        return caller.cast(request)
    return await caller.call(request)


async def test_every_recorded_exchange_gives_the_recorded_reply(tmp_path: Path) -> None:
    data_dir = str(tmp_path).encode()
    async with open_stores(tmp_path, EXAMPLE) as caller:
        for exchange in EXCHANGES:
            label, reply = exchange["label"], await answer(caller, exchange)
            if exchange["kind"] == "cast":
                assert reply is None, label
            elif exchange["outcome"] == "exit":
                assert reply[0] is schema.ERROR, label
            elif label in LAZY:
                recorded = term_of(exchange, "reply")[1]
                numbers = [event[schema.EVENT_NUMBER] for event in reply[1]]
                assert numbers == recorded[Atom("enum")], label
            else:
                recorded = without_times(term_of(exchange, "reply"))
                if label == "stores":
                    recorded[1][0][Atom("store")][Atom("data_dir")] = data_dir
                assert without_times(reply) == recorded, label


async def test_requests_that_crashed_the_worker_say_what_is_wrong(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        reasons = {
            exchange["label"]: (await answer(caller, exchange))[1]
            for exchange in EXCHANGES
            if exchange.get("outcome") == "exit"
        }
    unknown = schema.store_not_found(Atom("no_such_store"))
    assert reasons.pop("append to an unknown store") == reasons.pop("streams of an unknown store") == unknown
    assert {label: reason[0].name for label, reason in reasons.items()} == {
        "append with an unknown expected atom": "invalid_request",
        "append something that is not a NewEvent": "invalid_request",
        "unknown request": "unknown_request",
    }
