"""One event store in one SQLite file: what a gateway worker of ExESDB answers, transaction by transaction.

No threads and no event loop here (`embedded.py` has them). `StoreFile` is the writer, for one thread at a time; its
`reader()` makes readers with connections of their own, which never wait for the writer (WAL). A `commit` takes many
writes and makes them durable with one fsync; each has its own outcome.

Python's `sqlite3` gives the interpreter lock away at every row it steps to, and in a busy process each return costs up
to 5 ms. So every statement here is one step, however many rows it touches: inserts of many rows, and reads that join
the stored bytes inside SQLite (a thousand events beside a busy thread: 13 ms instead of 1,250 ms).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

from gater.api import schema
from gater.api.schema import Request
from gater.erl.etf import MAX_TERM_BYTES, encode_term
from gater.erl.terms import Atom, Term
from gater.errors import StoreError
from gater.store import checks, records

APPLICATION_ID: Final = 0x67617465
"""`gate` in the file's header, so that a foreign database is recognised before anything is written to it."""

FORMAT: Final = 1
"""Version of the tables below (`PRAGMA user_version`)."""

MAX_READ_BYTES: Final = MAX_TERM_BYTES - 1024 * 1024
"""Of one reply. A node with our limits could not take more than `MAX_TERM_BYTES`; the rest is room for the envelope."""

MAX_RECORD_BYTES: Final = MAX_READ_BYTES // 2
"""Of one stored term, so that whatever is stored can be read."""

MAX_CACHED_STREAMS: Final = 100_000
"""Streams whose version the writer remembers: about 20 MB. Others cost one look-up when they are appended to."""

QUICK_CHECK_BYTES: Final = 64 * 1024 * 1024
"""Up to this size the whole file is checked when it is opened (under a second); a larger one when it is read."""

CHECKPOINT_BYTES: Final = 4 * 1024 * 1024
"""How much is written to the log before it is copied into the file: SQLite's own 1,000 pages, but after the answer."""

_COMMIT_OVERHEAD_BYTES: Final = 16 * 1024
"""Pages of indexes that a small commit adds to the log beside its records, about."""

_MAX_ROWS_PER_INSERT: Final = 256
"""Rows of one INSERT, times 3 parameters: below 999, which every SQLite allows (`SQLITE_LIMIT_VARIABLE_NUMBER`)."""

_TABLES: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE streams (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, version INTEGER NOT NULL);
CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    number INTEGER NOT NULL,
    record BLOB NOT NULL,
    UNIQUE (stream, number)
);
CREATE TABLE subscriptions (key BLOB PRIMARY KEY, entry BLOB NOT NULL);
CREATE TABLE snapshots (
    source BLOB NOT NULL,
    stream BLOB NOT NULL,
    version INTEGER NOT NULL,
    entry BLOB NOT NULL,
    PRIMARY KEY (source, stream, version)
);
"""
# `streams.name` is the name as an ETF binary, `entry` a pair of a map in ETF: the path, then the record.


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """A store to be held: its id (the atom's name) and what `list_stores` says about it."""

    store_id: str
    description: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Append:
    """An append whose events are encoded already. `expected` is None where the request names no version."""

    stream: bytes
    expected: int | Atom | None
    events: tuple[bytes, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Change:
    """A write of a subscription or a snapshot."""

    sql: str
    parameters: tuple[bytes | int, ...]
    size: int


Write: TypeAlias = Append | Change


class TooLarge(Exception):
    """A term of the request is larger than `MAX_RECORD_BYTES`."""


def prepare(request: Request) -> Write:
    """Encode a write, so that committing it is all that is left.

    Raises `EncodeError` for a Python value that is no term, and `TooLarge`.
    """
    return _PREPARE[request.op](request.term)


def _prepare_append(term: tuple[Term, ...]) -> Append:
    events = tuple([_bounded(records.event_fields(event)) for event in term[-1]])
    return Append(term[2], term[3] if len(term) == 5 else None, events, sum(map(len, events)))


def _bounded(encoded: bytes) -> bytes:
    if len(encoded) > MAX_RECORD_BYTES:
        raise TooLarge(f"a stored term has at most {MAX_RECORD_BYTES} bytes, this one has {len(encoded)}")
    return encoded


_SAVE_SUBSCRIPTION: Final = (
    "INSERT INTO subscriptions (key, entry) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET entry = excluded.entry"
)
_SAVE_SNAPSHOT: Final = (
    "INSERT INTO snapshots (source, stream, version, entry) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (source, stream, version) DO UPDATE SET entry = excluded.entry"
)


def _save(subscription: schema.Subscription) -> Change:
    key = schema.subscription_key(subscription.type, subscription.selector, subscription.subscription_name)
    entry = _bounded(records.path((schema.SUBSCRIPTIONS, key)) + encode_term(subscription.to_term()))
    return Change(_SAVE_SUBSCRIPTION, (key, entry), len(entry))


def _prepare_save_subscription(term: tuple[Term, ...]) -> Change:
    return _save(schema.Subscription(*term[2:]))


def _prepare_remove_subscription(term: tuple[Term, ...]) -> Change:
    key = schema.subscription_key(term[2], term[3], term[4])
    return Change("DELETE FROM subscriptions WHERE key = ?", (key,), len(key))


def _prepare_ack(term: tuple[Term, ...]) -> Change:
    """An ack writes the by_stream subscription of the event's stream, whatever its type (`gateway_worker.ex`)."""
    event = term[4]
    selector = b"$" + event[schema.EVENT_STREAM_ID]
    return _save(schema.Subscription(schema.BY_STREAM, selector, term[2], event[schema.EVENT_NUMBER] + 1, term[3]))


def _snapshot_path(source: bytes, stream: bytes, version: int) -> bytes:
    return records.path((schema.SNAPSHOTS, source, stream, schema.snapshot_version_key(version)))


def _prepare_record_snapshot(term: tuple[Term, ...]) -> Change:
    source, stream, version, record = term[2:]
    entry = _bounded(_snapshot_path(source, stream, version) + encode_term(record))
    return Change(_SAVE_SNAPSHOT, (source, stream, version, entry), len(entry))


def _prepare_delete_snapshot(term: tuple[Term, ...]) -> Change:
    return Change("DELETE FROM snapshots WHERE source = ? AND stream = ? AND version = ?", term[2:], 0)


_PREPARE: Final[dict[str, Callable[[tuple[Term, ...]], Write]]] = {
    "append_events": _prepare_append,
    "save_subscription": _prepare_save_subscription,
    "remove_subscription": _prepare_remove_subscription,
    "ack_event": _prepare_ack,
    "record_snapshot": _prepare_record_snapshot,
    "delete_snapshot": _prepare_delete_snapshot,
}


class _Uncertain(Exception):
    """COMMIT failed in a way that leaves open whether the transaction will be found after a crash."""


class StoreFile:
    """The file of one store, opened or created, and its one writer. Raises `StoreError` when it cannot be used."""

    def __init__(self, path: Path, options: StoreOptions, node: Atom) -> None:
        self.path = path
        self.node = node
        self.store_id = Atom(options.store_id)
        self._options = options
        self._connection: sqlite3.Connection | None = None
        self._streams: dict[bytes, tuple[int, int]] = {}
        self._logged_bytes = 0
        try:
            self._connection = _connect(path)
            self._created_at = self._open()
        except (sqlite3.Error, OSError) as problem:
            self.close()
            raise StoreError(str(path), f"cannot be opened as a store: {problem}") from problem
        except StoreError:
            self.close()
            raise

    @property
    def info(self) -> Term:
        """This store's entry of `list_stores`."""
        config = schema.store_config(
            self.store_id,
            data_dir=str(self.path.parent),
            created_at=self._created_at,
            description=self._options.description,
            tags=self._options.tags,
        )
        return schema.StoreInfo(self.node, self.store_id, config).to_term()

    def reader(self) -> StoreReader:
        """A reader with its own connection. Raises `StoreError`."""
        try:
            return StoreReader(_connect(self.path, read_only=True), self.store_id, self.node)
        except sqlite3.Error as problem:
            raise StoreError(str(self.path), f"cannot be opened for reading: {problem}") from problem

    def close(self) -> None:
        """Close the writer's connection; the last connection to close leaves one file without a log beside it."""
        if self._connection is not None:
            with suppress(sqlite3.Error):  # the log is then simply read again at the next start
                self._connection.close()
            self._connection = None

    def commit(self, writes: Sequence[Write], now: datetime) -> list[Term]:
        """Carry out `writes` in order and make them durable; the reply to each, in the same order.

        An append answers `{:ok, version}` or `{:error, reason}`, any other write `:ok` or `{:error, reason}`. Only
        what is on disk is answered with ok. Should the transaction fail before its COMMIT, nothing of it is stored and
        each write is tried alone, so that one bad write does not fail the others.
        """
        try:
            return self._transact(writes, now)
        except _Uncertain as problem:
            self._recover()
            reason = schema.unknown_outcome(f"the store's file could not be synchronised: {problem}")
            return [schema.error(reason)] * len(writes)
        except sqlite3.Error as problem:
            self._recover()
            if len(writes) == 1:
                return [schema.error(schema.storage_failed(str(problem)))]
        return [self.commit([write], now)[0] for write in writes]

    def checkpoint_when_due(self) -> None:
        """Copy the log into the file if much was written since; for after the answers, because it may take long.

        Raises `sqlite3.Error` if that is not possible now: then the log grows, and nothing is lost.
        """
        if self._logged_bytes >= CHECKPOINT_BYTES and self._connection is not None:
            self._logged_bytes = 0
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _transact(self, writes: Sequence[Write], now: datetime) -> list[Term]:
        if self._connection is None:
            self._connection = _connect(self.path)
        plan = _Plan(self._connection, self._streams, records.created_fields(now))
        outcomes = [plan.append(write) if isinstance(write, Append) else plan.change(write) for write in writes]
        if plan.is_empty:
            return outcomes
        self._connection.execute("BEGIN IMMEDIATE")
        plan.carry_out()
        self._commit(self._connection)
        self._logged_bytes += _COMMIT_OVERHEAD_BYTES + sum(write.size for write in writes)
        self._streams.update(plan.streams)
        if len(self._streams) > MAX_CACHED_STREAMS:
            self._streams.clear()
        return outcomes

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as problem:
            if _primary_code(problem) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                raise  # the frame that marks the transaction as complete was not written
            raise _Uncertain(str(problem)) from problem

    def _recover(self) -> None:
        """Back to a state in which the next transaction can begin: nothing remembered, nothing half done."""
        self._streams.clear()
        if self._connection is None:
            return
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()

    def _open(self) -> datetime:
        connection = self._connection
        assert connection is not None
        if self.path.stat().st_size <= QUICK_CHECK_BYTES:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise StoreError(str(self.path), f"is damaged: {verdict}; restore it from a backup")
        marked = connection.execute("PRAGMA application_id").fetchone()[0]
        if marked == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            self._create(connection)
        elif marked != APPLICATION_ID:
            raise StoreError(str(self.path), "is a database of another program; move it away or name another directory")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            raise StoreError(str(self.path), f"has format {found}, this version of gater reads format {FORMAT}")
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        if meta["store_id"] != self._options.store_id.encode():
            raise StoreError(str(self.path), f"holds the store {meta['store_id'].decode(errors='replace')}")
        connection.execute("PRAGMA journal_mode = WAL")
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(meta["created_epoch"]))

    def _create(self, connection: sqlite3.Connection) -> None:
        """All in one transaction: a crash leaves either an empty file, which is created anew, or a whole store."""
        epoch = schema.epoch_us(datetime.now(UTC))
        default = _save(schema.Subscription(schema.BY_STREAM, b"$all", "all-events"))  # as `leader_worker.ex` does
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("INSERT INTO meta VALUES ('store_id', ?)", (self._options.store_id.encode(),))
        connection.execute("INSERT INTO meta VALUES ('created_epoch', ?)", (epoch,))
        connection.execute(default.sql, default.parameters)
        connection.execute("COMMIT")


class _Plan:
    """What a transaction will write: decided in Python first, so that the transaction itself is a few statements."""

    def __init__(self, connection: sqlite3.Connection, known: dict[bytes, tuple[int, int]], created: bytes) -> None:
        self._connection = connection
        self._known = known
        self._created = created
        self._events: list[bytes | int] = []
        self._changes: list[Change] = []
        self._last_row: int | None = None
        self.streams: dict[bytes, tuple[int, int]] = {}
        """The streams that change, with their row and their version afterwards."""

    @property
    def is_empty(self) -> bool:
        return not self.streams and not self._changes

    def append(self, write: Append) -> Term:
        row, version = self._look_up(write.stream)
        expected = write.expected
        wrong = expected != version if type(expected) is int else expected is schema.STREAM_EXISTS and version < 0
        if wrong:
            return schema.error(schema.wrong_expected_version(version))
        if not write.events:
            return schema.ok(version)
        if row == 0:
            row = self._next_row()
        stream = records.stream_field(write.stream)
        for event in write.events:
            version += 1
            self._events += (row, version, records.event_record(stream, self._created, event, version))
        self.streams[write.stream] = (row, version)
        return schema.ok(version)

    def change(self, write: Change) -> Term:
        self._changes.append(write)
        return schema.OK

    def carry_out(self) -> None:
        """Inside a transaction."""
        execute = self._connection.execute
        for sql, parameters in _in_chunks("INSERT INTO events (stream, number, record) VALUES ", self._events, ""):
            execute(sql, parameters)
        rows: list[bytes | int] = []
        for name, (row, version) in self.streams.items():
            rows += (row, encode_term(name), version)
        update = " ON CONFLICT (id) DO UPDATE SET version = excluded.version"
        for sql, parameters in _in_chunks("INSERT INTO streams (id, name, version) VALUES ", rows, update):
            execute(sql, parameters)
        for change in self._changes:
            execute(change.sql, change.parameters)

    def _look_up(self, stream: bytes) -> tuple[int, int]:
        """The row (0: none yet) and the version of a stream."""
        found = self.streams.get(stream) or self._known.get(stream)
        if found is None:
            select = "SELECT id, version FROM streams WHERE name = ?"
            found = self._connection.execute(select, (encode_term(stream),)).fetchone()
            if found is None:
                return (0, schema.UNKNOWN_STREAM_VERSION)
            self._known[stream] = found
        return found

    def _next_row(self) -> int:
        if self._last_row is None:
            self._last_row = self._connection.execute("SELECT coalesce(max(id), 0) FROM streams").fetchone()[0]
        self._last_row += 1
        return self._last_row


def _in_chunks(head: str, values: list[bytes | int], tail: str) -> Iterable[tuple[str, list[bytes | int]]]:
    """INSERTs of three columns for all `values`, in sizes that are powers of two, so that few statements exist."""
    at, rows = 0, len(values) // 3
    while rows:
        size = min(1 << (rows.bit_length() - 1), _MAX_ROWS_PER_INSERT)
        yield head + "(?, ?, ?), " * (size - 1) + "(?, ?, ?)" + tail, values[at : at + 3 * size]
        at += 3 * size
        rows -= size


class StoreReader:
    """Answers the requests that change nothing. One thread at a time."""

    def __init__(self, connection: sqlite3.Connection, store_id: Atom, node: Atom) -> None:
        self._connection = connection
        self._store_id = store_id
        self._node = node

    def close(self) -> None:
        with suppress(sqlite3.Error):  # nothing can be lost: it only read
            self._connection.close()

    def answer(self, request: Request) -> Term:
        """The reply to a read; what cannot be read is an `{:error, reason}`."""
        try:
            return _ANSWERS[request.op](self, request.term)
        except sqlite3.Error as problem:
            if _primary_code(problem) == sqlite3.SQLITE_TOOBIG:
                text = f"{request.op}: the reply is larger than {MAX_READ_BYTES} bytes; ask for less at once"
                return schema.error(schema.reply_too_large(text))
            return schema.error(schema.storage_failed(str(problem)))

    def _get_events(self, term: tuple[Term, ...]) -> Term:
        _, _, stream, start, count, direction = term
        found = self._one("SELECT id, version FROM streams WHERE name = ?", encode_term(stream))
        if found is None:
            return schema.ok([])
        row, version = found
        if direction is schema.FORWARD:
            low, high, order = start, min(start + count - 1, version), "ASC"
            expected = range(low, high + 1)
        else:
            low, high, order = max(start - count + 1, 0), min(start, version), "DESC"
            expected = range(high, low - 1, -1)
        if not expected:
            return schema.ok([])
        numbers, size, joined = self._one(
            "SELECT group_concat(number), sum(length(record)), CAST(group_concat(record, '') AS BLOB) FROM"
            f" (SELECT number, record FROM events WHERE stream = ? AND number BETWEEN ? AND ? ORDER BY number {order})",
            row,
            low,
            high,
        )
        if size != len(joined or b"") or numbers != ",".join(map(str, expected)):
            raise sqlite3.DatabaseError(f"events {low} to {high} of a stream are not all there, or not in order")
        return records.ok_list(len(expected), joined)

    def _get_version(self, term: tuple[Term, ...]) -> Term:
        found = self._one("SELECT version FROM streams WHERE name = ?", encode_term(term[2]))
        return schema.ok(schema.UNKNOWN_STREAM_VERSION if found is None else found[0])

    def _get_streams(self, term: tuple[Term, ...]) -> Term:
        return records.ok_list(*self._joined("SELECT name AS term FROM streams ORDER BY substr(name, 6)"))

    def _stream_counts(self, term: tuple[Term, ...]) -> Term:
        """`{:stream_counts, store, streams | nil}`: events by stream; for this node only."""
        streams = term[2]
        if streams is None:
            rows = self._connection.execute("SELECT substr(name, 6), version + 1 FROM streams").fetchall()
            return schema.ok(dict(rows))
        found = {}
        for stream in streams:
            row = self._one("SELECT version + 1 FROM streams WHERE name = ?", encode_term(stream))
            if row is not None:
                found[stream] = row[0]
        return schema.ok(found)

    def _get_subscriptions(self, term: tuple[Term, ...]) -> Term:
        return records.ok_map(*self._joined("SELECT entry AS term FROM subscriptions ORDER BY key"))

    def _read_snapshot(self, term: tuple[Term, ...]) -> Term:
        source, stream, version = term[2:]
        select = "SELECT entry FROM snapshots WHERE source = ? AND stream = ? AND version = ?"
        found = self._one(select, source, stream, version)
        if found is None:
            return schema.error(self._missing_snapshot(source, stream, version))
        record = found[0][len(_snapshot_path(source, stream, version)) :]
        return _NO_SNAPSHOT if record == _UNDEFINED else records.ok_encoded(record)

    def _missing_snapshot(self, source: bytes, stream: bytes, version: int) -> Term:
        """Khepri names the first part of the path that is missing."""
        path: list[Term] = [schema.SNAPSHOTS]
        if self._one("SELECT 1 FROM snapshots LIMIT 1") is None:
            return schema.node_not_found(path, is_target=False)
        path.append(source)
        if self._one("SELECT 1 FROM snapshots WHERE source = ? LIMIT 1", source) is None:
            return schema.node_not_found(path, is_target=False)
        path.append(stream)
        if self._one("SELECT 1 FROM snapshots WHERE source = ? AND stream = ? LIMIT 1", source, stream) is None:
            return schema.node_not_found(path, is_target=False)
        return schema.node_not_found([*path, schema.snapshot_version_key(version)], is_target=True)

    def _list_snapshots(self, term: tuple[Term, ...]) -> Term:
        conditions = [(column, name) for column, name in zip(("source", "stream"), term[2:], strict=True)]
        given = [(column, name) for column, name in conditions if name is not schema.ANY]
        where = " AND ".join(["1", *(f"{column} = ?" for column, _ in given)])
        select = f"SELECT entry AS term FROM snapshots WHERE {where} ORDER BY source, stream, version"
        return records.ok_map(*self._joined(select, *(name for _, name in given)))

    def _places_of_snapshots(self, term: tuple[Term, ...]) -> Term:
        """`{:places_of_snapshots, store, source}`: stream and version of each of its snapshots; for this node only."""
        select = "SELECT stream, version FROM snapshots WHERE source = ?"
        return schema.ok(self._connection.execute(select, (term[2].encode(),)).fetchall())

    def _quick_health_check(self, term: tuple[Term, ...]) -> Term:
        self._one("SELECT 1 FROM meta LIMIT 1")
        return checks.quick_health(self._store_id, self._node)

    def _verify_cluster_consistency(self, term: tuple[Term, ...]) -> Term:
        return checks.cluster_consistency(self._store_id, self._node, datetime.now(UTC))

    def _verify_membership_consensus(self, term: tuple[Term, ...]) -> Term:
        return checks.membership_consensus(self._store_id, self._node)

    def _check_raft_log_consistency(self, term: tuple[Term, ...]) -> Term:
        return checks.raft_log_consistency(self._store_id, self._node)

    def _one(self, sql: str, *parameters: Any) -> Any:
        return self._connection.execute(sql, parameters).fetchone()

    def _joined(self, select: str, *parameters: Any) -> tuple[int, bytes]:
        """How many rows `select` gives, and the bytes of its column `term` one after the other."""
        count, size, joined = self._one(
            f"SELECT count(*), total(length(term)), CAST(group_concat(term, '') AS BLOB) FROM ({select})", *parameters
        )
        if size != len(joined or b""):
            raise sqlite3.DatabaseError("stored terms could not be joined")
        return count, joined or b""


_UNDEFINED: Final = encode_term(Atom("undefined"))
_NO_SNAPSHOT: Final = schema.error(schema.NOT_FOUND)

_ANSWERS: Final[dict[str, Callable[[StoreReader, tuple[Term, ...]], Term]]] = {
    "get_events": StoreReader._get_events,
    "stream_forward": StoreReader._get_events,
    "stream_backward": StoreReader._get_events,
    "get_version": StoreReader._get_version,
    "get_streams": StoreReader._get_streams,
    "stream_counts": StoreReader._stream_counts,
    "get_subscriptions": StoreReader._get_subscriptions,
    "read_snapshot": StoreReader._read_snapshot,
    "list_snapshots": StoreReader._list_snapshots,
    "places_of_snapshots": StoreReader._places_of_snapshots,
    "quick_health_check": StoreReader._quick_health_check,
    "verify_cluster_consistency": StoreReader._verify_cluster_consistency,
    "verify_membership_consensus": StoreReader._verify_membership_consensus,
    "check_raft_log_consistency": StoreReader._check_raft_log_consistency,
}


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection that leaves transactions to us; `synchronous = FULL` makes COMMIT wait until the log is on disk."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # see `checkpoint_when_due`
    connection.execute("PRAGMA journal_size_limit = 67108864")  # a log that grew once is cut back to 64 MiB
    if read_only:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_READ_BYTES)
        connection.execute("PRAGMA query_only = ON")
    return connection


def _primary_code(problem: sqlite3.Error) -> int:
    """SQLite's error code without its extension; 0 where Python raised the error itself."""
    return getattr(problem, "sqlite_errorcode", 0) & 0xFF
