"""The embedded stores of a node: a directory of store files, and the threads that work on them.

Answers gateway worker requests exactly as a worker would, through callbacks in the event loop's thread. Each store has
one writer thread, which commits everything that waits in one transaction and answers only then, and reader threads of
its own. A read waits for the writes that were submitted before it and could change its answer (an append to its stream,
a snapshot, a subscription), and for nothing else. How requests reach this object (GenServer, router, Python client) is
not known here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

import structlog

from gater.api import schema
from gater.api.schema import Rejected, Request, RequestSpec
from gater.erl.errors import EncodeError
from gater.erl.terms import Atom, Term
from gater.errors import StoreError
from gater.store.engine import StoreFile, StoreOptions, StoreReader, TooLarge, Write, prepare

MAX_QUEUED_WRITES: Final = 10_000
"""Per store. At some 5,000 commits a second this is two seconds of work; a caller gives up after five."""

MAX_QUEUED_BYTES: Final = 256 * 1024 * 1024
"""Of the encoded writes that wait, per store: bounds memory where `MAX_QUEUED_WRITES` large events would not. A write
that finds the queue empty is always taken."""

MAX_QUEUED_READS: Final = 10_000
"""Per store, waiting for a reader or for a write before them."""

READERS_PER_STORE: Final = 2
"""So that one long read does not hold up all the short ones; more would only contend for the interpreter lock."""

MAX_WRITES_PER_COMMIT: Final = 1_000
"""Bounds how long the first of a batch waits for the rest to be written."""

MAX_BYTES_PER_COMMIT: Final = 32 * 1024 * 1024
"""The same for large events; a single larger write is committed alone."""

MAX_READS_PER_WAKEUP: Final = 32
"""Replies a reader collects before it wakes the loop, while more reads wait; a wake-up costs as much as a read."""

GRACE_S: Final = 0.005
"""How long a store's threads may get nowhere before the loop gives way: the interpreter's own switch interval."""

GIVE_WAY_S: Final = 0.001
"""How long the loop then stands still, at most: long enough for a commit or a read of 1,000 events."""

LOCK_FILE: Final = "gater.lock"

_MAX_FILE_NAME: Final = 255 - len(".sqlite3-journal")
"""Bytes of a file name on common file systems, less what SQLite adds."""

OnReply: TypeAlias = Callable[[Term], None]

_log = structlog.get_logger(__name__)


class EmbeddedStores:
    """The stores in `directory`, opened (and created where they are missing) at once, at work after `start`.

    Raises `StoreError` when the directory or one of the files cannot be used, or when another process uses them.
    All methods belong to the thread of the event loop given to `start`.
    """

    def __init__(self, directory: Path | str, stores: Sequence[StoreOptions], *, node: Atom) -> None:
        self.directory = Path(directory).absolute()
        self._workers: dict[Atom, _StoreWorker] = {}
        self._closing = False
        self._lock = _lock_directory(self.directory)
        try:
            for options in stores:
                if Atom(options.store_id) in self._workers:
                    raise StoreError(str(self.directory), f"the store {options.store_id} is named twice")
                worker = _StoreWorker(StoreFile(self._file_of(options.store_id), options, node))
                self._workers[worker.store_id] = worker
        except BaseException:
            self._release()
            raise

    @property
    def store_ids(self) -> tuple[Atom, ...]:
        """The stores held, in the order they were given."""
        return tuple(self._workers)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the threads; replies are given in `loop`."""
        for worker in self._workers.values():
            worker.start(loop)

    def submit(self, request: Term | Request, on_reply: OnReply) -> None:
        """Take a call. `on_reply` is called once with the reply, in the loop's thread; for a request that is refused or
        needs no disk, before `submit` returns.

        `request` is the decoded term, or what `check_request` made of it. A reply may be an `EncodedTerm`.
        """
        checked = request if isinstance(request, Request) else schema.check_request(request, cast=False)
        if isinstance(checked, Rejected):
            on_reply(checked.reply)
        elif self._closing:
            on_reply(schema.error(schema.DRAINING))
        elif checked.store is None:
            on_reply(schema.ok([worker.info for worker in self._workers.values()]))
        else:
            self._submit(checked, checked.store, on_reply)

    def _submit(self, request: Request, store: Atom, on_reply: OnReply) -> None:
        worker = self._workers.get(store)
        if worker is None:
            unknown = request.op == "get_version"  # a real worker does not tell an unknown store from an unknown stream
            version = schema.ok(schema.UNKNOWN_STREAM_VERSION)
            on_reply(version if unknown else schema.error(schema.store_not_found(store)))
            return
        refused = worker.write(request, on_reply) if request.is_write else worker.read(request, on_reply)
        if refused is not None:
            on_reply(refused.reply)

    def stream_counts(self, store: Atom, streams: Sequence[bytes] | None, on_reply: OnReply) -> None:
        """How many events these streams have (None: all streams), as `{:ok, {stream: count}}`."""
        term = (Atom("stream_counts"), store, streams)
        self._submit(Request(_COUNTS, store, None, term), store, on_reply)

    def snapshot_places(self, store: Atom, source: str, on_reply: OnReply) -> None:
        """Stream and version of each snapshot of a source, as `{:ok, [{stream, version}]}`."""
        term = (Atom("places_of_snapshots"), store, source)
        self._submit(Request(_PLACES, store, None, term), store, on_reply)

    def committed(self, store: Atom) -> int | None:
        """A number that grows with every commit of this store; None if it is not held here."""
        worker = self._workers.get(store)
        return None if worker is None else worker.committed

    def cast(self, request: Term | Request) -> Rejected | None:
        """Take a cast. Nobody is answered; what is returned says why it was not taken, for the log."""
        checked = request if isinstance(request, Request) else schema.check_request(request, cast=True)
        if isinstance(checked, Rejected):
            return checked
        if self._closing:
            return Rejected(schema.DRAINING)
        worker = self._workers.get(checked.store) if checked.store is not None else None
        if worker is None:
            return Rejected(schema.store_not_found(checked.store or Atom("undefined")))
        return worker.write(checked, None)

    async def close(self) -> None:
        """Finish what is queued, with its replies, then end the threads, close the files and release the directory."""
        if self._closing:
            return
        self._closing = True
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))
        self._release()

    def _release(self) -> None:
        for worker in self._workers.values():
            worker.close_files()
        os.close(self._lock)

    def _file_of(self, store_id: str) -> Path:
        name = quote(store_id, safe="")
        if len(name) > _MAX_FILE_NAME or not store_id:
            raise StoreError(str(self.directory), f"the store id {store_id[:60]!r} does not fit a file name")
        return self.directory / f"{name}.sqlite3"


def _lock_directory(directory: Path) -> int:
    """The open lock file of `directory`, which is made if it is missing. The kernel releases the lock when we die."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise StoreError(
            str(directory), f"cannot be used ({reason}): give a directory this user may write to"
        ) from problem
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        known = f" (process {holder})" if holder else ""
        raise StoreError(str(directory), f"is in use by another gater{known}") from problem
    os.ftruncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


@dataclass(frozen=True, slots=True)
class _QueuedWrite:
    number: int
    topics: tuple[bytes | str, ...]
    prepared: Write
    on_reply: OnReply | None


@dataclass(frozen=True, slots=True)
class _QueuedRead:
    request: Request
    on_reply: OnReply


def _own_read(op: str) -> RequestSpec:
    """Asked by this node's subscriptions only: no request that comes from outside is checked into one of these."""

    def check(spec: RequestSpec, term: tuple[Term, ...]) -> Request:
        return Request(spec, term[1], None, term)

    return RequestSpec(op, 3, is_cast=False, is_write=False, idempotent=True, check=check)


_COUNTS: Final = _own_read("stream_counts")
_PLACES: Final = _own_read("places_of_snapshots")

_SNAPSHOTS: Final = "snapshots"
_SUBSCRIPTIONS: Final = "subscriptions"
_STREAMS: Final = "streams"


def _topics(request: Request) -> tuple[bytes | str, ...]:
    """What a request changes or looks at: a stream by its name, or one of the three tables."""
    if request.stream is not None:
        return (request.stream, _STREAMS) if request.is_write else (request.stream,)
    if request.op == "get_streams":
        return (_STREAMS,)
    if request.op.endswith(("snapshot", "snapshots")):
        return (_SNAPSHOTS,)
    if request.op.endswith(("subscription", "subscriptions")) or request.op == "ack_event":
        return (_SUBSCRIPTIONS,)
    return ()


class _Courtesy:
    """Keeps a busy event loop from starving a store's threads.

    A thread that waits for the interpreter lock is given it by force after 5 ms, but only if the holder kept it all
    that time. An event loop under load lets go of it at every system call and takes it back before the waiting thread
    has woken up, and so the thread can wait for many seconds (15 were seen). Therefore, while something is under way
    and the threads report no progress for `GRACE_S`, the loop blocks until they do, for `GIVE_WAY_S` at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, is_idle: Callable[[], bool]) -> None:
        self._loop = loop
        self._is_idle = is_idle
        self._progress = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    def expect_progress(self) -> None:
        """Something was queued (loop's thread)."""
        if self._timer is None:
            self._timer = self._loop.call_later(GRACE_S, self._look)

    def note_progress(self) -> None:
        """Something was done (store's threads)."""
        self._progress.set()

    def _look(self) -> None:
        self._timer = None
        if self._is_idle():
            return
        if not self._progress.is_set():
            self._progress.wait(GIVE_WAY_S)
        self._progress.clear()
        self.expect_progress()


class _StoreWorker:
    """One store's threads and queues. What is not a thread's main loop runs in the event loop's thread.

    Writes are numbered as they come and committed in that order. `_last_write` knows, for each topic with a write under
    way, the number of the last; a read of that topic is parked until that number is committed.
    """

    def __init__(self, file: StoreFile) -> None:
        self.store_id = file.store_id
        self._file = file
        self._readers = [file.reader() for _ in range(READERS_PER_STORE)]
        self._writes: queue.SimpleQueue[_QueuedWrite | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_QueuedRead | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._courtesy: _Courtesy | None = None
        self._written = 0
        self.committed = 0
        """Commits so far."""
        self._queued_writes = 0
        self._queued_bytes = 0
        self._queued_reads = 0
        self._last_write: dict[bytes | str, int] = {}
        self._parked: dict[int, list[_QueuedRead]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> Term:
        return self._file.info

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._courtesy = _Courtesy(loop, self._idle.is_set)
        name = f"store {self.store_id}"
        self._threads = [threading.Thread(target=self._write_loop, name=f"{name} writer", daemon=True)]
        for reader in self._readers:
            self._threads.append(
                threading.Thread(target=self._read_loop, args=(reader,), name=f"{name} reader", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        self._note_work()

    async def stop(self) -> None:
        if self._threads:
            await self._idle.wait()
            for thread in self._threads:
                (self._writes if thread is self._threads[0] else self._reads).put(None)
            for thread in self._threads:
                await asyncio.to_thread(thread.join)
            self._threads = []

    def close_files(self) -> None:
        for reader in self._readers:
            reader.close()
        self._file.close()

    def write(self, request: Request, on_reply: OnReply | None) -> Rejected | None:
        """Queue a write; what is returned says why it was not queued."""
        if self._queued_writes >= MAX_QUEUED_WRITES:
            return Rejected(schema.OVERLOADED)
        try:
            prepared = prepare(request)
        except (EncodeError, TooLarge) as problem:
            return Rejected(schema.invalid_request(f"{request.op}: {problem}"))
        if self._queued_bytes and self._queued_bytes + prepared.size > MAX_QUEUED_BYTES:
            return Rejected(schema.OVERLOADED)
        self._written += 1
        topics = _topics(request)
        for topic in topics:
            self._last_write[topic] = self._written
        self._queued_writes += 1
        self._queued_bytes += prepared.size
        self._note_work()
        self._writes.put(_QueuedWrite(self._written, topics, prepared, on_reply))
        return None

    def read(self, request: Request, on_reply: OnReply) -> Rejected | None:
        """Queue a read, or park it behind the writes it has to see."""
        if self._queued_reads >= MAX_QUEUED_READS:
            return Rejected(schema.OVERLOADED)
        self._queued_reads += 1
        self._note_work()
        read = _QueuedRead(request, on_reply)
        after = max((self._last_write.get(topic, 0) for topic in _topics(request)), default=0)
        if after:
            self._parked.setdefault(after, []).append(read)
        else:
            self._reads.put(read)
        return None

    def _committed(self, batch: list[_QueuedWrite], outcomes: list[Term]) -> None:
        self.committed += 1
        for write, outcome in zip(batch, outcomes, strict=True):
            self._queued_writes -= 1
            self._queued_bytes -= write.prepared.size
            for topic in write.topics:
                if self._last_write.get(topic) == write.number:
                    del self._last_write[topic]
            for read in self._parked.pop(write.number, ()):
                self._reads.put(read)
            if write.on_reply is not None:
                _reply(write.on_reply, outcome)
            elif outcome is not schema.OK:
                _log.error("cast_not_stored", store=str(self.store_id), reason=repr(outcome))
        self._note_idle()

    def _answered(self, replies: list[tuple[OnReply, Term]]) -> None:
        self._queued_reads -= len(replies)
        for on_reply, reply in replies:
            _reply(on_reply, reply)
        self._note_idle()

    def _note_work(self) -> None:
        if self._queued_writes or self._queued_reads:
            self._idle.clear()
            if self._courtesy is not None:
                self._courtesy.expect_progress()

    def _note_idle(self) -> None:
        if self._queued_writes == 0 and self._queued_reads == 0:
            self._idle.set()

    def _write_loop(self) -> None:
        """The writer thread: everything that waits goes into one commit, up to the limits of one."""
        ahead: deque[_QueuedWrite | None] = deque()
        while True:
            first = ahead.popleft() if ahead else self._writes.get()
            if first is None:
                return
            batch, size = [first], first.prepared.size
            while len(batch) < MAX_WRITES_PER_COMMIT:
                try:
                    write = self._writes.get_nowait()
                except queue.Empty:
                    break
                if write is None or size + write.prepared.size > MAX_BYTES_PER_COMMIT:
                    ahead.append(write)
                    break
                batch.append(write)
                size += write.prepared.size
            self._in_loop(self._committed, batch, self._commit(batch))
            self._checkpoint()

    def _commit(self, batch: list[_QueuedWrite]) -> list[Term]:
        try:
            return self._file.commit([write.prepared for write in batch], datetime.now(UTC))
        except Exception as problem:
            # A defect of ours must not leave callers waiting for ever.
            _log.exception("store_writer_failed", store=str(self.store_id))
            return [schema.error(schema.unknown_outcome(f"the store's writer failed: {problem!r}"))] * len(batch)

    def _checkpoint(self) -> None:
        try:
            self._file.checkpoint_when_due()
        except sqlite3.Error as problem:
            _log.warning("store_checkpoint_failed", store=str(self.store_id), reason=str(problem))

    def _read_loop(self, reader: StoreReader) -> None:
        """A reader thread."""
        while True:
            read = self._reads.get()
            replies: list[tuple[OnReply, Term]] = []
            while read is not None:
                replies.append((read.on_reply, self._answer(reader, read.request)))
                if len(replies) == MAX_READS_PER_WAKEUP:
                    break
                try:
                    read = self._reads.get_nowait()
                except queue.Empty:
                    break
            self._in_loop(self._answered, replies)
            if read is None:
                return

    def _answer(self, reader: StoreReader, request: Request) -> Term:
        try:
            return reader.answer(request)
        except Exception as problem:
            _log.exception("store_reader_failed", store=str(self.store_id), operation=request.op)
            return schema.error(schema.storage_failed(f"the store's reader failed: {problem!r}"))

    def _in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        assert self._courtesy is not None
        self._courtesy.note_progress()
        with suppress(RuntimeError):  # the loop was closed under us: nobody is left to be answered
            self._loop.call_soon_threadsafe(callback, *arguments)


def _reply(on_reply: OnReply, reply: Term) -> None:
    try:
        on_reply(reply)
    except Exception:
        # The others of the batch have their answers coming.
        _log.exception("store_reply_callback_failed")
