"""Every error of the gateway, one tree under `GaterError`.

`GaterError` is an `ErlError`, so that one `except ErlError` holds the node's errors and the gateway's. Each class has
the facts as attributes and says in its message what was expected, what came, and what to do. The Erlang terms these
become for BEAM callers stand with the wire shapes in `gater.api.schema`.
"""

from __future__ import annotations

from typing import Any

from gater.erl.errors import ErlError, shown


class GaterError(ErlError):
    """Root of every error gater raises on purpose."""


class StartupError(GaterError):
    """The gateway cannot start; the message is one line for the person who started it."""


class SettingsError(StartupError):
    """A setting is wrong: `setting` is its name, `source` where its value came from."""

    def __init__(self, setting: str, source: str, problem: str) -> None:
        self.setting = setting
        self.source = source
        self.problem = problem
        super().__init__(f"setting {setting} ({source}): {problem}")


class StoreError(StartupError):
    """The embedded store cannot be opened: `path` is its directory or file."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"embedded store {path}: {problem}")


class InvalidRequest(GaterError):
    """The request was refused before it was sent anywhere; nothing was done. `reason` says what is wrong with it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"invalid request: {reason}")


class WrongExpectedVersion(GaterError):
    """The stream is not at the version the append expected; nothing was written.

    `expected` is what the caller gave, `current` the stream's version (-1: no such stream), or None where the store did
    not say.
    """

    def __init__(self, expected: int | str, current: int | None) -> None:
        self.expected = expected
        self.current = current
        seen = "another version" if current is None else "no such stream" if current == -1 else f"version {current}"
        super().__init__(f"expected version {expected}, found {seen}: read the stream again and decide anew")


class StoreNotFound(GaterError):
    """No node known to this gateway holds the store."""

    def __init__(self, store: str) -> None:
        self.store = store
        super().__init__(f"store {store!r} is not known: check its name, and that a node holding it is connected")


class NoWorkerAvailable(GaterError):
    """The store is known, but no gateway worker of it can be reached now. The request was not sent."""

    def __init__(self, store: str) -> None:
        self.store = store
        super().__init__(f"no gateway worker of store {store!r} can be reached now: try again later")


class CallTimeout(GaterError):
    """No answer to `operation` came within `timeout_s` seconds. Only for requests that change nothing.

    A write that was sent and not answered is an `UnknownOutcome`.
    """

    def __init__(self, operation: str, timeout_s: float) -> None:
        self.operation = operation
        self.timeout_s = timeout_s
        super().__init__(f"{operation}: no answer within {timeout_s:g} s")


class WorkerDied(GaterError):
    """The worker that was asked exited before it answered; `reason` is its exit reason, an Erlang term."""

    def __init__(self, operation: str, reason: Any) -> None:
        self.operation = operation
        self.reason = reason
        super().__init__(f"{operation}: the worker died before it answered, reason {shown(reason)}")


class UnknownOutcome(GaterError):
    """A write was sent and no answer came: it may or may not have been carried out.

    Read the stream and look for the ids of the events before writing them again. `details` says what is known.
    """

    def __init__(self, operation: str, details: Any) -> None:
        self.operation = operation
        self.details = details
        known = details if isinstance(details, str) else shown(details)
        super().__init__(f"{operation}: the outcome is unknown ({known}); read the stream before trying again")


class PartiallyAppended(GaterError):
    """Another writer came between the events of a batch, or there was no time for all: `stored` of `of` are in the
    stream, up to number `last`."""

    def __init__(self, last: int, stored: int, of: int) -> None:
        self.last = last
        self.stored = stored
        self.of = of
        super().__init__(
            f"{stored} of {of} events were appended, up to version {last}: read the stream and decide anew"
        )


class NoQuorum(GaterError):
    """The members of the store that this gateway reaches are no majority, or do not agree; nothing was written."""

    def __init__(self, details: Any) -> None:
        self.details = details
        super().__init__(f"the store has no quorum that this gateway can see ({shown(details)}): try again later")


class RequestFailed(GaterError):
    """The store answered `operation` with an error that has no class of its own; `reason` is its Erlang term."""

    def __init__(self, operation: str, reason: Any) -> None:
        self.operation = operation
        self.reason = reason
        super().__init__(f"{operation} failed: {shown(reason)}")


class Overloaded(GaterError):
    """As many requests wait as a limit allows; this one was not sent. `allowed` is None where only the store knows."""

    def __init__(self, limit: str, allowed: int | None = None) -> None:
        self.limit = limit
        self.allowed = allowed
        known = "is full" if allowed is None else f"allows {allowed} requests at once"
        super().__init__(f"overloaded: {limit} {known}; try again later")


class Draining(GaterError):
    """The gateway is shutting down and takes no new work; use another one."""

    def __init__(self) -> None:
        super().__init__("draining: this gateway is shutting down; use another one")
