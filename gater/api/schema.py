"""The wire shapes of ExESDB's gateway workers: values, requests, replies and errors, each in this one place.

Source: ExESDB 0.11.0 (`gateway_worker.ex`, `streams_reader_worker.ex`, `streams_writer_worker.ex`, `snapshots.ex`,
`subscriptions_store.erl`), ExESDBGater 0.8.0 (`api.ex`, `schema/*.ex`), and what a real worker answered
(`tests/captures/exesdb_contract.json`).

Three parts: values (`NewEvent` and the others, with their struct maps), errors (the reason terms, and the Python
exceptions they stand for), requests (constructors, and `check_request`, which lets nothing pass that would crash a real
worker). Who answers a request is not decided here: the router and the embedded store do that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, Literal, NoReturn, TypeAlias

from gater import errors
from gater.erl.etf import encode_term
from gater.erl.phash2 import phash2
from gater.erl.terms import Atom, Export, Fun, Pid, Term, atom_name

OK: Final = Atom("ok")
ERROR: Final = Atom("error")
ANY: Final = Atom("any")
STREAM_EXISTS: Final = Atom("stream_exists")
FORWARD: Final = Atom("forward")
BACKWARD: Final = Atom("backward")
BY_STREAM: Final = Atom("by_stream")
BY_EVENT_TYPE: Final = Atom("by_event_type")
BY_EVENT_PATTERN: Final = Atom("by_event_pattern")
BY_EVENT_PAYLOAD: Final = Atom("by_event_payload")
NACK_ACTIONS: Final = (Atom("retry"), Atom("skip"), Atom("park"), Atom("stop"))
GATER_OPS: Final = frozenset(
    {"subscribe", "subscription_status", "list_parked", "replay_parked", "drop_parked", "nack_event"}
)
"""Requests that no store answers: they are about the subscriptions of the gateways."""
TRANSIENT: Final = b"transient"
"""The name of subscriptions that end with their subscriber."""
SUBSCRIPTION_TYPES: Final = (BY_STREAM, BY_EVENT_TYPE, BY_EVENT_PATTERN, BY_EVENT_PAYLOAD)

STRUCT: Final = Atom("__struct__")
UNKNOWN_FIELDS: Final = Atom("__unknown_fields__")
NEW_EVENT: Final = Atom("Elixir.ExESDB.Schema.NewEvent")
EVENT_RECORD: Final = Atom("Elixir.ExESDB.Schema.EventRecord")
SNAPSHOT_RECORD: Final = Atom("Elixir.ExESDB.Schema.SnapshotRecord")
DATE_TIME: Final = Atom("Elixir.DateTime")
_ISO: Final = Atom("Elixir.Calendar.ISO")
_CALENDAR: Final = Atom("calendar")
_DAY: Final = Atom("day")
_HOUR: Final = Atom("hour")
_MICROSECOND: Final = Atom("microsecond")
_MINUTE: Final = Atom("minute")
_MONTH: Final = Atom("month")
_SECOND: Final = Atom("second")
_STD_OFFSET: Final = Atom("std_offset")
_TIME_ZONE: Final = Atom("time_zone")
_UTC_OFFSET: Final = Atom("utc_offset")
_YEAR: Final = Atom("year")
_ZONE_ABBR: Final = Atom("zone_abbr")

EVENT_ID: Final = Atom("event_id")
EVENT_TYPE: Final = Atom("event_type")
DATA: Final = Atom("data")
METADATA: Final = Atom("metadata")
DATA_CONTENT_TYPE: Final = Atom("data_content_type")
METADATA_CONTENT_TYPE: Final = Atom("metadata_content_type")
EVENT_STREAM_ID: Final = Atom("event_stream_id")
EVENT_NUMBER: Final = Atom("event_number")
CREATED: Final = Atom("created")
CREATED_EPOCH: Final = Atom("created_epoch")
CREATED_AT: Final = Atom("created_at")
_SOURCE_UUID: Final = Atom("source_uuid")
_SOURCE_VERSION: Final = Atom("source_version")
_SOURCE_TYPE: Final = Atom("source_type")
APPEND_EVENTS: Final = Atom("append_events")
SNAPSHOTS: Final = Atom("snapshots")
SUBSCRIPTIONS: Final = Atom("subscriptions")
_TYPE: Final = Atom("type")
_SELECTOR: Final = Atom("selector")
_SUBSCRIPTION_NAME: Final = Atom("subscription_name")
_START_FROM: Final = Atom("start_from")
_SUBSCRIBER: Final = Atom("subscriber")
_NODE: Final = Atom("node")
_STORE: Final = Atom("store")
STORE_ID: Final = Atom("store_id")

MAX_EVENTS_PER_APPEND: Final = 100_000
"""A real worker stores about 1,000 events in a second, and its caller stops waiting long before 100 seconds."""

MAX_READ_COUNT: Final = 1_000_000
"""A larger count is read as this one. A real worker walks over every number of the count, stored or not, so that 10^9
makes it time out and crash; and event keys are padded to six digits, which is a million events in a stream."""

MAX_NAME_CHARACTERS: Final = 255
"""ExESDB names a process per stream and per snapshot with an atom, which holds no more (`MAX_ATOM_CHARACTERS`)."""

MAX_SNAPSHOT_VERSION: Final = 9_999_999_999
"""Snapshot keys are padded to ten digits (`ExESDB.Snapshots.path/3`); a longer one would sort before shorter ones."""

MAX_REASON_BYTES: Final = 4096
"""Of the reason of a `nack_event`, encoded: it is kept with the event."""

MAX_SHOWN_CHARACTERS: Final = 60
"""How much of a caller's name is repeated in an error message: enough to recognise it, too little to flood a log."""

UNKNOWN_STREAM_VERSION: Final = -1
"""What `get_version` answers for a stream without events (0-based versioning)."""


class SchemaError(ValueError):
    """A term does not have the shape its struct has in ExESDB; the message names the struct and what is wrong."""


def uuid7() -> str:
    """A fresh UUID of version 7 as its 36-character string, as `UUIDv7.generate/0` makes (RFC 9562, section 5.7)."""
    value = int.from_bytes(os.urandom(10), "big") & ~(0xF << 76) & ~(0x3 << 62)
    value |= (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | 0x2 << 62
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def datetime_to_term(moment: datetime, *, milliseconds: bool = False) -> Term:
    """The `%DateTime{}` of `moment`, in UTC with six digits of microseconds, as `DateTime.utc_now/0` gives it.

    `milliseconds`: with three digits, as `DateTime.truncate(moment, :millisecond)`.
    """
    if moment.tzinfo is None:
        raise SchemaError("a DateTime needs a time zone: give a datetime with tzinfo, for example datetime.now(UTC)")
    utc = moment.astimezone(UTC)
    return {
        STRUCT: DATE_TIME,
        _CALENDAR: _ISO,
        _DAY: utc.day,
        _HOUR: utc.hour,
        _MICROSECOND: (utc.microsecond // 1000 * 1000, 3) if milliseconds else (utc.microsecond, 6),
        _MINUTE: utc.minute,
        _MONTH: utc.month,
        _SECOND: utc.second,
        _STD_OFFSET: 0,
        _TIME_ZONE: b"Etc/UTC",
        _UTC_OFFSET: 0,
        _YEAR: utc.year,
        _ZONE_ABBR: b"UTC",
    }


def datetime_from_term(term: Term) -> datetime:
    """The moment of a `%DateTime{}`, aware, in the offset the struct names. `SchemaError` if it is not one."""
    if not is_struct(term, DATE_TIME):
        raise SchemaError(f"expected a DateTime struct, got {show(term)}")
    try:
        offset = term[_UTC_OFFSET] + term[_STD_OFFSET]
        return datetime(
            term[_YEAR],
            term[_MONTH],
            term[_DAY],
            term[_HOUR],
            term[_MINUTE],
            term[_SECOND],
            term[_MICROSECOND][0],
            UTC if offset == 0 else timezone(timedelta(seconds=offset)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, IndexError) as problem:
        raise SchemaError(f"a DateTime that Python has no datetime for: {problem}") from problem


def is_struct(term: Term, module: Atom) -> bool:
    """Whether `term` is a struct of the Elixir module `module`."""
    return isinstance(term, Mapping) and term.get(STRUCT) is module


def _text(term: Term) -> Any:
    """A binary as the `str` it holds; a binary that is not UTF-8, or any other term, as it is."""
    if type(term) is bytes:
        try:
            return term.decode()
        except UnicodeDecodeError:
            return term
    return term


def _binary(value: Any) -> Term:
    return value.encode() if type(value) is str else value


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be appended: `%ExESDB.Schema.NewEvent{}` (`schema/new_event.ex`).

    `data` and `metadata` are any terms; ExESDB stores them as they are. `event_id` is a UUID of version 7 unless given.
    """

    event_type: str
    data: Term
    metadata: Term = field(default_factory=dict)
    event_id: str | bytes = field(default_factory=uuid7)
    data_content_type: int = 1
    metadata_content_type: int = 1

    def to_term(self) -> Term:
        return {
            STRUCT: NEW_EVENT,
            UNKNOWN_FIELDS: [],
            DATA: self.data,
            DATA_CONTENT_TYPE: self.data_content_type,
            EVENT_ID: _binary(self.event_id),
            EVENT_TYPE: _binary(self.event_type),
            METADATA: self.metadata,
            METADATA_CONTENT_TYPE: self.metadata_content_type,
        }

    @classmethod
    def from_term(cls, term: Term) -> NewEvent:
        """Read the struct map back; `SchemaError` names what is wrong with it."""
        problem = new_event_problem(term)
        if problem is not None:
            raise SchemaError(f"NewEvent {problem}")
        return cls(
            event_type=_text(term[EVENT_TYPE]),
            data=term[DATA],
            metadata=term[METADATA],
            event_id=_text(term[EVENT_ID]),
            data_content_type=term[DATA_CONTENT_TYPE],
            metadata_content_type=term[METADATA_CONTENT_TYPE],
        )


@dataclass(frozen=True, slots=True)
class ParkedEvent:
    """An event that a subscription has put aside: `list_parked`."""

    event: RecordedEvent
    reason: Term
    """As given with the `nack`; `:max_retries` if it was delivered too often and no reason was given; else None."""
    attempts: int
    """How often it was delivered."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """A stored event: `%ExESDB.Schema.EventRecord{}` (`schema/event_record.ex`).

    `event_number` counts from 0 in its stream, `created` is when it was stored (UTC) and `created_epoch` the same in
    microseconds since 1970.
    """

    event_stream_id: str
    event_number: int
    event_id: str | bytes
    event_type: str
    data: Term
    metadata: Term
    created: datetime | None
    created_epoch: int | None
    data_content_type: int = 1
    metadata_content_type: int = 1

    def to_term(self) -> Term:
        return {
            STRUCT: EVENT_RECORD,
            UNKNOWN_FIELDS: [],
            CREATED: None if self.created is None else datetime_to_term(self.created),
            CREATED_EPOCH: self.created_epoch,
            DATA: self.data,
            DATA_CONTENT_TYPE: self.data_content_type,
            EVENT_ID: _binary(self.event_id),
            EVENT_NUMBER: self.event_number,
            EVENT_STREAM_ID: _binary(self.event_stream_id),
            EVENT_TYPE: _binary(self.event_type),
            METADATA: self.metadata,
            METADATA_CONTENT_TYPE: self.metadata_content_type,
        }

    @classmethod
    def from_term(cls, term: Term) -> RecordedEvent:
        """Read the struct map; `SchemaError` if it is not an EventRecord."""
        if not is_struct(term, EVENT_RECORD):
            raise SchemaError(f"expected an EventRecord struct, got {show(term)}")
        try:
            created = term[CREATED]
            return cls(
                event_stream_id=_text(term[EVENT_STREAM_ID]),
                event_number=term[EVENT_NUMBER],
                event_id=_text(term[EVENT_ID]),
                event_type=_text(term[EVENT_TYPE]),
                data=term[DATA],
                metadata=term[METADATA],
                created=None if created is None else datetime_from_term(created),
                created_epoch=term[CREATED_EPOCH],
                data_content_type=term[DATA_CONTENT_TYPE],
                metadata_content_type=term[METADATA_CONTENT_TYPE],
            )
        except KeyError as missing:
            raise SchemaError(f"an EventRecord lacks {missing.args[0]}") from missing


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot's usual record: `%ExESDB.Schema.SnapshotRecord{}` (`schema/snapshot_record.ex`).

    ExESDB stores any term as a snapshot, so what another program recorded need not be one of these.
    """

    source_uuid: str
    source_version: int
    source_type: str
    data: Term
    metadata: Term = field(default_factory=dict)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    created_epoch: int | None = None

    def to_term(self) -> Term:
        epoch = self.created_epoch
        return {
            STRUCT: SNAPSHOT_RECORD,
            CREATED_AT: datetime_to_term(self.created_at),
            CREATED_EPOCH: epoch_us(self.created_at) if epoch is None else epoch,
            DATA: self.data,
            METADATA: self.metadata,
            _SOURCE_TYPE: _binary(self.source_type),
            _SOURCE_UUID: _binary(self.source_uuid),
            _SOURCE_VERSION: self.source_version,
        }

    @classmethod
    def from_term(cls, term: Term) -> Snapshot:
        """Read the struct map; `SchemaError` if it is not a SnapshotRecord."""
        if not is_struct(term, SNAPSHOT_RECORD):
            raise SchemaError(f"expected a SnapshotRecord struct, got {show(term)}")
        try:
            return cls(
                source_uuid=_text(term[_SOURCE_UUID]),
                source_version=term[_SOURCE_VERSION],
                source_type=_text(term[_SOURCE_TYPE]),
                data=term[DATA],
                metadata=term[METADATA],
                created_at=datetime_from_term(term[CREATED_AT]),
                created_epoch=term[CREATED_EPOCH],
            )
        except KeyError as missing:
            raise SchemaError(f"a SnapshotRecord lacks {missing.args[0]}") from missing


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription as the store keeps it: a plain map of five keys (`subscriptions_writer.ex`).

    `selector` is a binary (`"$all"`, `"$<stream>"`, an event type) or a map (pattern, payload); `start_from` the number
    of the next event to deliver.
    """

    type: Atom
    selector: Term
    subscription_name: str
    start_from: int = 0
    subscriber: Pid | None = None

    def to_term(self) -> Term:
        return {
            _SELECTOR: _binary(self.selector),
            _START_FROM: self.start_from,
            _SUBSCRIBER: self.subscriber,
            _SUBSCRIPTION_NAME: _binary(self.subscription_name),
            _TYPE: self.type,
        }

    @classmethod
    def from_term(cls, term: Term) -> Subscription:
        """Read the map; `SchemaError` if one of the five keys is missing."""
        try:
            return cls(
                term[_TYPE],
                _text(term[_SELECTOR]),
                _text(term[_SUBSCRIPTION_NAME]),
                term[_START_FROM],
                term[_SUBSCRIBER],
            )
        except (KeyError, TypeError) as problem:
            raise SchemaError(f"expected a subscription map, got {show(term)}") from problem


def subscription_key(type_: Atom, selector: Term, name: Term) -> bytes:
    """The key of a subscription below `[:subscriptions]`: `phash2({Type, Selector, Name})` in decimal digits.

    Source: `subscriptions_store:key/1`.
    """
    return b"%d" % phash2((type_, _binary(selector), _binary(name)))


def snapshot_version_key(version: int) -> bytes:
    """The last part of a snapshot's path: the version, padded to ten digits (`ExESDB.Snapshots.path/3`)."""
    return b"%010d" % version


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """One entry of `list_stores`: which node holds which store; `config` is the store's map as it came."""

    node: Atom
    store_id: Atom
    config: Mapping[Term, Term]

    def to_term(self) -> Term:
        return {_NODE: self.node, _STORE: self.config}

    @classmethod
    def from_term(cls, term: Term) -> StoreInfo:
        """Read `%{node: node, store: %{store_id: id, ...}}`; `SchemaError` if it is not that."""
        try:
            return cls(term[_NODE], term[_STORE][STORE_ID], term[_STORE])
        except (KeyError, TypeError) as problem:
            raise SchemaError(f"expected %{{node: .., store: %{{store_id: ..}}}}, got {show(term)}") from problem


def store_config(
    store_id: Atom,
    *,
    data_dir: str,
    created_at: datetime,
    description: str | None = None,
    tags: Sequence[str] = (),
    timeout_ms: int = 10_000,
) -> Term:
    """The `store` map of `list_stores` (`StoreRegistry.build_store_config/1`) of a store that stands alone."""
    values: dict[str, Term] = {
        "auto_start": True,
        "created_at": datetime_to_term(created_at),
        "data_dir": data_dir.encode(),
        "db_type": Atom("single"),
        "environment": None,
        "priority": Atom("normal"),
        "pub_sub": None,
        "reader_idle_ms": None,
        "status": Atom("active"),
        "store_description": None if description is None else description.encode(),
        "store_id": store_id,
        "tags": [tag.encode() for tag in tags],
        "timeout": timeout_ms,
        "version": 1,
        "writer_idle_ms": None,
    }
    return {Atom(key): value for key, value in values.items()}


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def epoch_us(moment: datetime) -> int:
    """Microseconds from 1970 to `moment`, exact (`DateTime.to_unix(moment, :microsecond)`)."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


# The error reasons of gater:
#
# | reason                                | meaning                                               | was it done?   |
# |---------------------------------------|-------------------------------------------------------|----------------|
# | {:wrong_expected_version, current}    | the stream is at `current` (-1: no such stream)       | no             |
# | :wrong_expected_version               | the same from a racing worker, current unknown        | no             |
# | {:invalid_request, text}              | would crash a worker; text says why                   | no             |
# | {:unknown_request, text}              | no such request                                       | no             |
# | :invalid_count, :invalid_start_version, {:invalid_count, x}, {:invalid_start_version, x} | as ExESDB    | no |
# | {:store_not_found, store}             | no node known to the gateway holds the store          | no             |
# | {:no_worker_available, store}         | the store is known, none of its workers is reachable  | no             |
# | :overloaded                           | a limit on waiting requests is reached                | no             |
# | :draining                             | this gateway is shutting down                         | no             |
# | {:call_timeout, milliseconds}         | a request that changes nothing was not answered       | nothing to do  |
# | {:worker_died, reason}                | the worker exited before it answered such a request   | nothing to do  |
# | {:unknown_outcome, text}              | a write was sent and not answered                     | perhaps        |
# | {:partially_appended, last, map}      | another writer came between the events, or time was up | in part       |
# | {:no_quorum, details}                 | the store's members in reach are no majority          | no             |
# | {:storage_failed, text}               | the embedded store could not read or write its file   | no             |
# | {:reply_too_large, text}              | ask for fewer events                                  | nothing to do  |
# | :not_found, {:khepri, :node_not_found, map} | no such snapshot                                | nothing to do  |

_WRONG_EXPECTED_VERSION: Final = Atom("wrong_expected_version")
_INVALID_REQUEST: Final = Atom("invalid_request")
_UNKNOWN_REQUEST: Final = Atom("unknown_request")
_INVALID_COUNT: Final = Atom("invalid_count")
_INVALID_START_VERSION: Final = Atom("invalid_start_version")
_STORE_NOT_FOUND: Final = Atom("store_not_found")
_NO_WORKER_AVAILABLE: Final = Atom("no_worker_available")
_CALL_TIMEOUT: Final = Atom("call_timeout")
_WORKER_DIED: Final = Atom("worker_died")
_UNKNOWN_OUTCOME: Final = Atom("unknown_outcome")
_PARTIALLY_APPENDED: Final = Atom("partially_appended")
_STORED: Final = Atom("stored")
_OF: Final = Atom("of")
NO_QUORUM: Final = Atom("no_quorum")
STORAGE_FAILED: Final = Atom("storage_failed")
_REPLY_TOO_LARGE: Final = Atom("reply_too_large")
NOT_FOUND: Final = Atom("not_found")
_KHEPRI: Final = Atom("khepri")
_NODE_NOT_FOUND: Final = Atom("node_not_found")
OVERLOADED: Final = Atom("overloaded")
DRAINING: Final = Atom("draining")

EMPTY_STREAM_NAME: Final[Term] = (
    Atom("exception"),
    {
        Atom("__exception__"): True,
        STRUCT: Atom("Elixir.ArgumentError"),
        Atom("message"): b"Invalid child_spec parameters: :stream_id_required",
    },
)
"""What a real worker answers to a read of the stream `""` (`streams_reader.ex` rescues the exception)."""


def ok(value: Term) -> Term:
    """The reply `{:ok, value}`."""
    return (OK, value)


def error(reason: Term) -> Term:
    """The reply `{:error, reason}`."""
    return (ERROR, reason)


def wrong_expected_version(current: int) -> Term:
    return (_WRONG_EXPECTED_VERSION, current)


def invalid_request(text: str) -> Term:
    return (_INVALID_REQUEST, text.encode())


def unknown_request(text: str) -> Term:
    return (_UNKNOWN_REQUEST, text.encode())


def store_not_found(store: Atom) -> Term:
    return (_STORE_NOT_FOUND, store)


def no_worker_available(store: Atom) -> Term:
    return (_NO_WORKER_AVAILABLE, store)


def call_timeout(timeout_ms: int) -> Term:
    return (_CALL_TIMEOUT, timeout_ms)


def worker_died(exit_reason: Term) -> Term:
    return (_WORKER_DIED, exit_reason)


def unknown_outcome(text: str) -> Term:
    return (_UNKNOWN_OUTCOME, text.encode())


def partially_appended(last_version: int, stored: int, of: int) -> Term:
    """`stored` of the `of` events are in the stream, up to number `last_version`; then another writer came,
    or time was up."""
    return (_PARTIALLY_APPENDED, last_version, {_STORED: stored, _OF: of})


def no_quorum(details: Term) -> Term:
    return (NO_QUORUM, details)


def storage_failed(text: str) -> Term:
    return (STORAGE_FAILED, text.encode())


def reply_too_large(text: str) -> Term:
    return (_REPLY_TOO_LARGE, text.encode())


def node_not_found(path: list[Term], *, is_target: bool) -> Term:
    """Khepri's reason for a path that ends at nothing: `path` reaches to the first part that is missing."""
    return (
        _KHEPRI,
        _NODE_NOT_FOUND,
        {Atom("node_is_target"): is_target, Atom("node_name"): path[-1], Atom("node_path"): path},
    )


def is_not_found(reason: Term) -> bool:
    """Whether an error reason says that there is no such snapshot."""
    if reason is NOT_FOUND:
        return True
    return type(reason) is tuple and len(reason) == 3 and reason[0] is _KHEPRI and reason[1] is _NODE_NOT_FOUND


def is_wrong_expected_version(reason: Term) -> bool:
    """Whether an error reason refuses an append because of its version (the racing worker's bare atom included)."""
    return reason is _WRONG_EXPECTED_VERSION or (
        type(reason) is tuple and len(reason) == 2 and reason[0] is _WRONG_EXPECTED_VERSION
    )


def exception_for(reason: Term, request: Request | Term) -> errors.GaterError:
    """The Python exception that an `{:error, reason}` to `request`, checked or as its term, stands for."""
    term = request.term if isinstance(request, Request) else request
    op = str(term[0])
    if reason is OVERLOADED:
        return errors.Overloaded("the queue of waiting requests")
    if reason is DRAINING:
        return errors.Draining()
    if is_wrong_expected_version(reason):
        current = reason[1] if type(reason) is tuple else None
        return errors.WrongExpectedVersion(_shown_expectation(term), current)
    if reason in (_INVALID_COUNT, _INVALID_START_VERSION):
        return errors.InvalidRequest(f"{op}: {reason}")
    if reason == EMPTY_STREAM_NAME:
        return errors.InvalidRequest(f"{op}: the stream has an empty name")
    match reason:
        case (kind, int(last), Mapping() as counts) if kind is _PARTIALLY_APPENDED:
            return errors.PartiallyAppended(last, int(counts.get(_STORED, 0)), int(counts.get(_OF, 0)))
        case (Atom() as name, detail) if name in _EXCEPTIONS:
            return _EXCEPTIONS[name](op, detail)
        case _:
            return errors.RequestFailed(op, reason)


def _shown_expectation(term: Term) -> int | str:
    if len(term) != 5:
        return "any"
    expected = term[3]
    return expected if type(expected) is int else str(expected)


_EXCEPTIONS: Final[dict[Atom, Callable[[str, Term], errors.GaterError]]] = {
    _INVALID_REQUEST: lambda op, text: errors.InvalidRequest(str(_text(text))),
    _UNKNOWN_REQUEST: lambda op, text: errors.InvalidRequest(str(_text(text))),
    _INVALID_COUNT: lambda op, count: errors.InvalidRequest(f"{op}: count {show(count)}"),
    _INVALID_START_VERSION: lambda op, start: errors.InvalidRequest(f"{op}: start version {show(start)}"),
    _STORE_NOT_FOUND: lambda op, store: errors.StoreNotFound(str(store)),
    _NO_WORKER_AVAILABLE: lambda op, store: errors.NoWorkerAvailable(str(store)),
    _CALL_TIMEOUT: lambda op, timeout_ms: errors.CallTimeout(op, timeout_ms / 1000),
    _WORKER_DIED: errors.WorkerDied,
    _UNKNOWN_OUTCOME: lambda op, text: errors.UnknownOutcome(op, _text(text)),
    NO_QUORUM: lambda op, details: errors.NoQuorum(details),
}


def reason_for(problem: errors.GaterError) -> Term:
    """The error reason a BEAM caller gets for a Python exception; `exception_for` is its inverse."""
    match problem:
        case errors.WrongExpectedVersion(current=None):
            return _WRONG_EXPECTED_VERSION
        case errors.WrongExpectedVersion(current=current):
            return (_WRONG_EXPECTED_VERSION, current)
        case errors.InvalidRequest(reason=text):
            return invalid_request(text)
        case errors.StoreNotFound(store=store):
            return store_not_found(Atom(store))
        case errors.NoWorkerAvailable(store=store):
            return no_worker_available(Atom(store))
        case errors.CallTimeout(timeout_s=timeout_s):
            return call_timeout(round(timeout_s * 1000))
        case errors.WorkerDied(reason=exit_reason):
            return worker_died(exit_reason)
        case errors.UnknownOutcome(details=details):
            return unknown_outcome(str(details))
        case errors.PartiallyAppended(last=last, stored=stored, of=of):
            return partially_appended(last, stored, of)
        case errors.NoQuorum(details=details):
            return no_quorum(details)
        case errors.Overloaded():
            return OVERLOADED
        case errors.Draining():
            return DRAINING
        case errors.RequestFailed(reason=reason):
            return reason
        case _:
            return (Atom("gater_error"), str(problem).encode())


Expected: TypeAlias = "int | Literal['any', 'stream_exists'] | Atom"
"""What an append expects of its stream: its version (-1: no such stream), `:any` or `:stream_exists`."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What is known of a kind of request before it is looked into.

    `is_write`: it changes the store. `idempotent`: carrying it out twice leaves the same state and the same answer, so
    that it may be sent again when nobody knows whether it arrived.
    """

    op: str
    size: int
    is_cast: bool
    is_write: bool
    idempotent: bool
    check: Callable[[RequestSpec, tuple[Term, ...]], Request]


@dataclass(slots=True, eq=False)
class Request:
    """A request that a worker can be given. `term` is what to send, which is not always what came: see `check_request`.

    Made for each, so it is not frozen, which takes three times as long; nobody changes it.
    `store` is None for `list_stores` only; `stream` is the event stream it concerns, if it concerns one.
    """

    spec: RequestSpec
    store: Atom | None
    stream: bytes | None
    term: tuple[Term, ...]

    @property
    def op(self) -> str:
        return self.spec.op

    @property
    def is_write(self) -> bool:
        return self.spec.is_write

    @property
    def is_cast(self) -> bool:
        return self.spec.is_cast

    @property
    def idempotent(self) -> bool:
        return self.spec.idempotent


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that is not sent to anyone. `reason` is an error reason of the table above."""

    reason: Term

    @property
    def reply(self) -> Term:
        return (ERROR, self.reason)


class _Refused(Exception):
    """Ends the checking of a request."""

    def __init__(self, reason: Term) -> None:
        self.reason = reason


def check_request(request: Term, *, cast: bool) -> Request | Rejected:
    """Check a decoded gateway worker request (`cast`: it came by `GenServer.cast`).

    Nothing that crashes a real worker passes. What a real worker answers with an error keeps that worker's exact reply.
    Two requests are rewritten, so that `Request.term` differs from what came: a `count` above `MAX_READ_COUNT` is
    lowered to it, and `stream_forward`/`stream_backward` become the `get_events` that reads the same events (a real
    worker answers them with closures, which run on no other node).
    """
    if type(request) is not tuple or not request or type(request[0]) is not Atom:
        return Rejected(unknown_request(f"expected a tuple that begins with the request's name, got {show(request)}"))
    spec = (_CASTS if cast else _CALLS).get((request[0], len(request)))
    if spec is None:
        return Rejected(unknown_request(_unknown(request, cast)))
    try:
        return spec.check(spec, request)
    except _Refused as refused:
        return Rejected(refused.reason)


def _unknown(request: tuple[Term, ...], cast: bool) -> str:
    """Says which request may have been meant."""
    name, size = request[0].name[:MAX_SHOWN_CHARACTERS], len(request)
    here, there = (_CASTS, _CALLS) if cast else (_CALLS, _CASTS)
    if (request[0], size) in there:
        return f"{name} is a {'call' if cast else 'cast'}, not a {'cast' if cast else 'call'}"
    sizes = sorted(known for op, known in here if op is request[0])
    if sizes:
        return f"{name} is a tuple of {' or '.join(map(str, sizes))} elements, got {size}"
    return f"there is no {'cast' if cast else 'call'} {name}"


def show(term: Term) -> str:
    """A few words for a term in an error message: names in full, never a payload."""
    name = atom_name(term)
    if name is not None:
        return f":{name[:MAX_SHOWN_CHARACTERS]}"
    if type(term) is bytes:
        return f'"{term[:MAX_SHOWN_CHARACTERS].decode(errors="replace")}"'
    if type(term) is int and term.bit_length() <= 64:
        return str(term)
    if type(term) is float:
        return str(term)
    if isinstance(term, Mapping):
        module = term.get(STRUCT)
        return "a map" if module is None else f"a struct {show(module)}"
    return _KINDS.get(type(term).__name__, f"a {type(term).__name__}")


_KINDS: Final = {
    "int": "a very large integer",
    "tuple": "a tuple",
    "list": "a list",
    "ImproperList": "an improper list",
    "Pid": "a pid",
    "Fun": "a function",
    "Export": "a function",
    "BitString": "a bitstring",
}


def _refuse(op: str, problem: str) -> NoReturn:
    raise _Refused(invalid_request(f"{op}: {problem}"))


def _store(spec: RequestSpec, term: Term) -> Atom:
    if type(term) is not Atom:
        _refuse(spec.op, f"the store must be an atom, got {show(term)}")
    return term


def _name(spec: RequestSpec, what: str, term: Term, room: int) -> bytes:
    """A name that ExESDB makes part of an atom: valid UTF-8 of at most `room` characters."""
    if type(term) is not bytes:
        hint = " (a charlist: use double quotes)" if type(term) is list else ""
        _refuse(spec.op, f"the {what} must be a binary, got {show(term)}{hint}")
    if term.isascii():
        size = len(term)
    else:
        try:
            size = len(term.decode())
        except UnicodeDecodeError:
            _refuse(spec.op, f"the {what} is not valid UTF-8")
    if size > room:
        _refuse(spec.op, f"the {what} has {size} characters, ExESDB can name at most {max(room, 0)} in this store")
    return term


_STREAM_WORKER_NAME: Final = len("streams_writer_worker__")
_SNAPSHOT_WORKER_NAME: Final = len("snapshots_writer___")
_EMITTER_NAME: Final = len(":_emitter_pool")


def _stream(spec: RequestSpec, store: Atom, term: Term) -> bytes:
    return _name(spec, "stream", term, MAX_NAME_CHARACTERS - _STREAM_WORKER_NAME - len(store.name))


def new_event_problem(term: Term) -> str | None:
    """What is wrong with an event to be appended, as the end of a sentence, or None."""
    if type(term) is dict and term.get(STRUCT) is NEW_EVENT and term.keys() >= NEW_EVENT_FIELDS:
        return None
    if not is_struct(term, NEW_EVENT):
        return f"is not an ExESDB.Schema.NewEvent but {show(term)}"
    missing = sorted(key.name for key in NEW_EVENT_FIELDS if key not in term)
    return f"lacks {', '.join(missing)}: build it with %ExESDB.Schema.NewEvent{{}}" if missing else None


EVENT_PLACE: Final = frozenset((EVENT_STREAM_ID, EVENT_NUMBER))
"""Where a recorded event stands."""

EPOCH_ONLY: Final = frozenset((CREATED_EPOCH,))
EVENT_FIELDS: Final = EVENT_PLACE | EPOCH_ONLY | {EVENT_TYPE}
"""What order and look-up need of a recorded event."""

NEW_EVENT_FIELDS: Final = frozenset(
    (EVENT_ID, EVENT_TYPE, DATA, METADATA, DATA_CONTENT_TYPE, METADATA_CONTENT_TYPE)
)  # those `StreamsHelper.to_event_record/5` reads


def _check_events(spec: RequestSpec, events: Term) -> None:
    if type(events) is not list:
        _refuse(spec.op, f"the events must be a list, got {show(events)}")
    if len(events) > MAX_EVENTS_PER_APPEND:
        _refuse(spec.op, f"{len(events)} events at once, at most {MAX_EVENTS_PER_APPEND} are allowed")
    for place, event in enumerate(events, 1):
        problem = new_event_problem(event)
        if problem is not None:
            _refuse(spec.op, f"event {place} of {len(events)} {problem}")


def _check_append(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    store = _store(spec, term[1])
    stream = _stream(spec, store, term[2])
    if not stream:
        _refuse(spec.op, "the stream has an empty name; its events could never be read")
    if len(term) == 5:
        expected = term[3]
        if type(expected) is not int and expected is not ANY and expected is not STREAM_EXISTS:
            _refuse(spec.op, f"expected version must be an integer, :any or :stream_exists, got {show(expected)}")
    _check_events(spec, term[-1])
    return Request(spec, store, stream, term)


def _check_read(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    store = _store(spec, term[1])
    stream, start, count = term[2], term[3], term[4]
    _stream(spec, store, stream)
    if not stream:
        raise _Refused(EMPTY_STREAM_NAME)
    direction = term[5] if len(term) == 6 else _LAZY_DIRECTIONS[spec.op]
    if direction is not FORWARD and direction is not BACKWARD:
        _refuse(spec.op, f"the direction must be :forward or :backward, got {show(direction)}")
    if type(start) is not int:
        raise _Refused((_INVALID_START_VERSION, start))
    if start < 0:
        raise _Refused(_INVALID_START_VERSION)
    if type(count) is not int:
        raise _Refused((_INVALID_COUNT, count))
    if count < 1:
        raise _Refused(_INVALID_COUNT)
    if len(term) == 6 and count <= MAX_READ_COUNT:
        return Request(spec, store, stream, term)
    return Request(spec, store, stream, (_GET_EVENTS, store, stream, start, min(count, MAX_READ_COUNT), direction))


_GET_EVENTS: Final = Atom("get_events")
_LAZY_DIRECTIONS: Final = {"stream_forward": FORWARD, "stream_backward": BACKWARD}


def _check_version(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    store = _store(spec, term[1])
    return Request(spec, store, _stream(spec, store, term[2]), term)


def _check_store_only(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    return Request(spec, _store(spec, term[1]), None, term)


def _check_nothing(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    return Request(spec, None, None, term)


def _check_snapshot(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{op, store, source, stream, version[, record]}`: `Snapshots.path/3` has a guard on each of the three."""
    store = _store(spec, term[1])
    room = MAX_NAME_CHARACTERS - _SNAPSHOT_WORKER_NAME - len(store.name)
    source = _name(spec, "snapshot's source", term[2], room)
    _name(spec, "snapshot's stream", term[3], room - len(source.decode()))
    version = term[4]
    if type(version) is not int or not 0 <= version <= MAX_SNAPSHOT_VERSION:
        _refuse(
            spec.op, f"the snapshot version must be an integer from 0 to {MAX_SNAPSHOT_VERSION}, got {show(version)}"
        )
    if len(term) == 6:
        _check_snapshot_record(spec, term[5])
    return Request(spec, store, None, term)


def _check_snapshot_record(spec: RequestSpec, record: Term) -> None:
    """Khepri takes any data, but stores a function as a procedure and its own payload records as what they hold."""
    if isinstance(record, Fun | Export):
        _refuse(spec.op, "the snapshot is a function, which Khepri would store as a procedure; give a map")
    if type(record) is tuple and record and record[0] in (Atom("p_data"), Atom("p_sproc")):
        _refuse(spec.op, f"the snapshot is a Khepri payload record {show(record[0])}; give a map")


def _check_snapshot_list(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    store = _store(spec, term[1])
    room = MAX_NAME_CHARACTERS - _SNAPSHOT_WORKER_NAME - len(store.name)
    for what, name in (("snapshot's source", term[2]), ("snapshot's stream", term[3])):
        if name is not ANY:
            room -= len(_name(spec, what, name, room).decode())
    return Request(spec, store, None, term)


def _check_subscription(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{op, store, type, selector, name[, start_from, subscriber]}`.

    A worker itself takes anything here; what crashes afterwards is the store's emitters (`emitters.ex`, `topics.ex`).
    """
    store = _store(spec, term[1])
    kind, selector = term[2], term[3]
    if kind not in SUBSCRIPTION_TYPES:
        known = ", ".join(show(known) for known in SUBSCRIPTION_TYPES)
        _refuse(spec.op, f"the subscription type must be one of {known}, got {show(kind)}")
    name = _subscription_name(spec, store, term[4])
    if kind is BY_STREAM or kind is BY_EVENT_TYPE:
        _name(spec, "selector", selector, MAX_NAME_CHARACTERS - _EMITTER_NAME - len(store.name) - len(name.decode()))
        if kind is BY_STREAM and b"$" not in selector:
            _refuse(spec.op, f'a by_stream selector is "$all" or "$" and the stream, got {show(selector)}')
    elif not isinstance(selector, Mapping) and not (kind is BY_EVENT_PAYLOAD and type(selector) is bytes):
        _refuse(spec.op, f"the selector of {show(kind)} must be a map, got {show(selector)}")
    if len(term) == 7:
        start_from = term[5]
        if type(start_from) is not int or start_from < 0:
            _refuse(spec.op, f"start_from must be an integer from 0, got {show(start_from)}")
        _check_subscriber(spec, term[6])
    return Request(spec, store, None, term)


def _subscription_name(spec: RequestSpec, store: Atom, term: Term) -> bytes:
    return _name(spec, "subscription name", term, MAX_NAME_CHARACTERS - _EMITTER_NAME - len(store.name))


def _check_subscriber(spec: RequestSpec, term: Term) -> None:
    if term is not None and type(term) is not Pid:
        _refuse(spec.op, f"the subscriber must be a pid or nil, got {show(term)}")


def event_place(event: RecordedEvent) -> Mapping[Term, Term]:
    """What names a stored event in requests about it: its stream and its number."""
    stream = event.event_stream_id
    return {
        EVENT_STREAM_ID: stream.encode() if isinstance(stream, str) else stream,
        EVENT_NUMBER: event.event_number,
    }


def _check_ack(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{:ack_event, store, name, pid, event}`: the worker reads the event's stream and number."""
    store, event = _store(spec, term[1]), term[4]
    _subscription_name(spec, store, term[2])
    _check_subscriber(spec, term[3])
    _check_event_place(spec, store, event)
    return Request(spec, store, None, term)


def _check_event_place(spec: RequestSpec, store: Atom, event: Term) -> None:
    """An event that is stored already: its stream and its number are all that is read of it."""
    if not isinstance(event, Mapping):
        _refuse(spec.op, f"the event must be a map, got {show(event)}")
    _stream(spec, store, event.get(EVENT_STREAM_ID))
    number = event.get(EVENT_NUMBER)
    if type(number) is not int or number < 0:
        _refuse(spec.op, f"the event's event_number must be an integer from 0, got {show(number)}")


def _check_nack(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{:nack_event, store, name, pid, event, action}`, `{action, reason}` instead of an action."""
    action, reason = nack_of(term[5])
    if action not in NACK_ACTIONS:
        known = ", ".join(show(known) for known in NACK_ACTIONS)
        _refuse(spec.op, f"the action must be one of {known}, or one of them with a reason, got {show(term[5])}")
    if len(encode_term(reason)) > MAX_REASON_BYTES:
        _refuse(spec.op, f"the reason must have at most {MAX_REASON_BYTES} bytes (MAX_REASON_BYTES)")
    return _check_ack(spec, term)


def nack_of(action: Term) -> tuple[Term, Term]:
    """The action, and its reason (nil: none was given)."""
    return (action[0], action[1]) if type(action) is tuple and len(action) == 2 else (action, None)


def _check_subscribe(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{:subscribe, store, type, selector, name, options}`: gater's own, with everything that can be chosen."""
    options = term[5]
    if not isinstance(options, Mapping):
        _refuse(spec.op, f"the options must be a map, got {show(options)}")
    for key, value in options.items():
        problem = _option_problem(key, value)
        if problem is not None:
            _refuse(spec.op, f"{show(key)} {problem}, got {show(value)}")
    _check_subscription(spec, term[:5])
    return Request(spec, term[1], None, term)


def _option_problem(key: Term, value: Term) -> str | None:
    name = atom_name(key)
    if name == "start_from":
        good = value is Atom("now") or (type(value) is int and value >= 0)
        return None if good else "must be an integer from 0 or :now"
    if name == "subscriber":
        return None if type(value) is Pid else "must be a pid"
    if name in ("auto_ack", "resume"):
        return None if type(value) is bool else "must be a boolean"
    if name == "strategy":
        return None if value in (Atom("round_robin"), Atom("by_stream")) else "must be :round_robin or :by_stream"
    if name in ("window", "batch_size", "max_retries", "ack_timeout_ms"):
        return None if type(value) is int and 0 <= value < 2**31 else "must be an integer from 0"
    return "is no option of a subscription"


def _check_named(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{op, store, name}`: a subscription by its name."""
    store = _store(spec, term[1])
    _subscription_name(spec, store, term[2])
    return Request(spec, store, None, term)


def _check_parked(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
    """`{op, store, name, event}`: a parked event of a subscription."""
    request = _check_named(spec, term)
    _check_event_place(spec, term[1], term[3])
    return request


def _specs() -> list[RequestSpec]:
    call, cast, read, write = False, True, False, True
    once, again = False, True
    return [
        # A second append would store the events twice, or be refused because of the first.
        RequestSpec("append_events", 4, call, write, once, _check_append),
        RequestSpec("append_events", 5, call, write, once, _check_append),
        RequestSpec("get_events", 6, call, read, again, _check_read),
        RequestSpec("stream_forward", 5, call, read, again, _check_read),
        RequestSpec("stream_backward", 5, call, read, again, _check_read),
        RequestSpec("get_version", 3, call, read, again, _check_version),
        RequestSpec("get_streams", 2, call, read, again, _check_store_only),
        RequestSpec("get_subscriptions", 2, call, read, again, _check_store_only),
        RequestSpec("read_snapshot", 5, call, read, again, _check_snapshot),
        RequestSpec("list_snapshots", 4, call, read, again, _check_snapshot_list),
        RequestSpec("verify_cluster_consistency", 2, call, read, again, _check_store_only),
        RequestSpec("quick_health_check", 2, call, read, again, _check_store_only),
        RequestSpec("verify_membership_consensus", 2, call, read, again, _check_store_only),
        RequestSpec("check_raft_log_consistency", 2, call, read, again, _check_store_only),
        RequestSpec("list_stores", 1, call, read, again, _check_nothing),
        RequestSpec("save_subscription", 7, cast, write, again, _check_subscription),
        RequestSpec("remove_subscription", 5, cast, write, again, _check_subscription),
        # A late copy of an old ack would move the subscription back.
        RequestSpec("ack_event", 5, cast, write, once, _check_ack),
        RequestSpec("nack_event", 6, cast, write, once, _check_nack),
        RequestSpec("subscribe", 6, call, write, again, _check_subscribe),
        RequestSpec("subscription_status", 3, call, read, again, _check_named),
        RequestSpec("list_parked", 3, call, read, again, _check_named),
        RequestSpec("list_parked", 4, call, read, again, _check_parked),
        RequestSpec("replay_parked", 3, call, write, again, _check_named),
        RequestSpec("drop_parked", 3, call, write, again, _check_named),
        RequestSpec("drop_parked", 4, call, write, again, _check_parked),
        RequestSpec("record_snapshot", 6, cast, write, again, _check_snapshot),
        RequestSpec("delete_snapshot", 5, cast, write, again, _check_snapshot),
    ]


_SPECS: Final = _specs()
_CALLS: Final = {(Atom(spec.op), spec.size): spec for spec in _SPECS if not spec.is_cast}
_CASTS: Final = {(Atom(spec.op), spec.size): spec for spec in _SPECS if spec.is_cast}


# The constructors below build the request tuples of `ExESDBGater.API` (`api.ex`); a `str` name becomes its binary.

Name: TypeAlias = str | bytes


def append_events_request(store: Atom, stream: Name, events: Sequence[NewEvent], expected: Expected = ANY) -> Term:
    """Append with an expected version; `"any"` and `"stream_exists"` may be given as strings."""
    version = Atom(expected) if isinstance(expected, str) else expected
    return (APPEND_EVENTS, store, _binary(stream), version, [event.to_term() for event in events])


def get_events_request(store: Atom, stream: Name, start: int, count: int, direction: Atom = FORWARD) -> Term:
    return (_GET_EVENTS, store, _binary(stream), start, count, direction)


def get_version_request(store: Atom, stream: Name) -> Term:
    return (Atom("get_version"), store, _binary(stream))


def store_request(op: str, store: Atom) -> Term:
    """A request with the store only: `get_streams`, `get_subscriptions`, and the four checks."""
    return (Atom(op), store)


def list_stores_request() -> Term:
    return (Atom("list_stores"),)


def read_snapshot_request(store: Atom, source: Name, stream: Name, version: int) -> Term:
    return (Atom("read_snapshot"), store, _binary(source), _binary(stream), version)


def list_snapshots_request(store: Atom, source: Name | Atom = ANY, stream: Name | Atom = ANY) -> Term:
    return (Atom("list_snapshots"), store, _binary(source), _binary(stream))


def record_snapshot_cast(store: Atom, source: Name, stream: Name, version: int, record: Snapshot | Term) -> Term:
    term = record.to_term() if isinstance(record, Snapshot) else record
    return (Atom("record_snapshot"), store, _binary(source), _binary(stream), version, term)


def delete_snapshot_cast(store: Atom, source: Name, stream: Name, version: int) -> Term:
    return (Atom("delete_snapshot"), store, _binary(source), _binary(stream), version)


def save_subscription_cast(store: Atom, subscription: Subscription) -> Term:
    return (
        Atom("save_subscription"),
        store,
        subscription.type,
        _binary(subscription.selector),
        _binary(subscription.subscription_name),
        subscription.start_from,
        subscription.subscriber,
    )


def remove_subscription_cast(store: Atom, type_: Atom, selector: Term, name: Name) -> Term:
    return (Atom("remove_subscription"), store, type_, _binary(selector), _binary(name))


def ack_event_cast(store: Atom, name: Name, subscriber: Pid | None, stream: Name, number: int) -> Term:
    event = {EVENT_STREAM_ID: _binary(stream), EVENT_NUMBER: number}
    return (Atom("ack_event"), store, _binary(name), subscriber, event)
