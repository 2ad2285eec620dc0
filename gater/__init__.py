"""gater: a gateway to ExESDB that is an Erlang node written in Python.

The client, for example:

    from gater import Gateway, NewEvent

    async with Gateway.connect("gater@127.0.0.1", cookie="gater") as gateway:
        await gateway.append_events("ex_esdb_store", "order-1", NewEvent("placed:v1", {"total": 12}))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gater.api.gateway import Gateway
    from gater.api.schema import NewEvent, ParkedEvent, RecordedEvent, Snapshot
    from gater.errors import (
        CallTimeout,
        Draining,
        GaterError,
        InvalidRequest,
        NoQuorum,
        NoWorkerAvailable,
        Overloaded,
        PartiallyAppended,
        RequestFailed,
        StoreNotFound,
        UnknownOutcome,
        WorkerDied,
        WrongExpectedVersion,
    )

__all__ = [
    "CallTimeout",
    "Draining",
    "GaterError",
    "Gateway",
    "InvalidRequest",
    "NewEvent",
    "NoQuorum",
    "NoWorkerAvailable",
    "Overloaded",
    "ParkedEvent",
    "PartiallyAppended",
    "RecordedEvent",
    "RequestFailed",
    "Snapshot",
    "StoreNotFound",
    "UnknownOutcome",
    "WorkerDied",
    "WrongExpectedVersion",
]

_HOMES: Final = {
    "Gateway": "gater.api.gateway",
    "NewEvent": "gater.api.schema",
    "ParkedEvent": "gater.api.schema",
    "RecordedEvent": "gater.api.schema",
    "Snapshot": "gater.api.schema",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `gater.erl` can be used without the gateway."""
    if name not in __all__:
        raise AttributeError(f"module 'gater' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "gater.errors")), name)
