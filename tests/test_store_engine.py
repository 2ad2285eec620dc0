"""The engine of the embedded store: one file, transactions, what a damaged disk and a full one do."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import NODE, STORE, append, checked, event, plain, read, wrong

from gater.api import schema
from gater.api.schema import NewEvent, RecordedEvent
from gater.erl import etf
from gater.erl.terms import (
    Atom,
    BitString,
    EncodedTerm,
    Export,
    ImproperList,
    Pid,
    Reference,
    Term,
    TermMap,
    exact_equal,
)
from gater.errors import StoreError
from gater.store import engine, records
from gater.store.engine import StoreFile, StoreOptions, StoreReader, prepare

NOW = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)
CAPTURES = Path(__file__).parent / "captures"
OPTIONS = StoreOptions("reg_gh")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StoreFile]:
    opened = StoreFile(tmp_path / "reg_gh.sqlite3", OPTIONS, NODE)
    yield opened
    opened.close()


@pytest.fixture
def reader(file: StoreFile) -> Iterator[StoreReader]:
    opened = file.reader()
    yield opened
    opened.close()


def commit(file: StoreFile, *requests: Term, cast: bool = False) -> list[Term]:
    return file.commit([prepare(checked(request, cast=cast)) for request in requests], NOW)


def ask(reader: StoreReader, request: Term) -> Term:
    return plain(reader.answer(checked(request)))


def test_appends_of_one_batch_see_each_other(file: StoreFile) -> None:
    outcomes = commit(
        file,
        append("s", [event(0), event(1)], -1),
        append("s", [event(2)], -1),
        append("s", [event(2)], 1),
        append("s", [], 2),
        append("t", [event(0)], "stream_exists"),
        append("t", [event(0)], "any"),
        append("t", [event(1)], "stream_exists"),
        append("u", []),
    )
    assert outcomes == [
        schema.ok(1),
        wrong(1),
        schema.ok(2),
        schema.ok(2),
        wrong(-1),
        schema.ok(0),
        schema.ok(1),
        schema.ok(-1),
    ]


def test_versions_are_found_again_when_the_writer_remembers_none(file: StoreFile) -> None:
    commit(file, append("s", [event(0), event(1)]), append("t", [event(0)]))
    file._streams.clear()
    assert commit(file, append("s", [event(2)], 1), append("v", [event(0)], -1)) == [schema.ok(2), schema.ok(0)]


def test_a_batch_without_any_change_begins_no_transaction(file: StoreFile) -> None:
    commit(file, append("s", [event(0)]))
    assert file._connection is not None
    before = file._connection.total_changes
    assert commit(file, append("s", [event(1)], 5), append("s", [])) == [wrong(0), schema.ok(0)]
    assert file._connection.total_changes == before


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 1023])
def test_any_number_of_events_is_stored_in_order(file: StoreFile, reader: StoreReader, count: int) -> None:
    assert commit(file, append("s", [event(number) for number in range(count)])) == [schema.ok(count - 1)]
    _, events = ask(reader, read("s", 0, count + 10))
    assert [stored[schema.METADATA][b"n"] for stored in events] == list(range(count))
    _, events = ask(reader, read("s", count - 1, count + 10, schema.BACKWARD))
    assert [stored[schema.EVENT_NUMBER] for stored in events] == list(range(count - 1, -1, -1))


@pytest.mark.parametrize(
    ("start", "count", "direction", "expected"),
    [
        (0, 3, schema.FORWARD, [0, 1, 2]),
        (4, 10, schema.FORWARD, [4]),
        (5, 10, schema.FORWARD, []),
        (10**30, 1, schema.FORWARD, []),
        (4, 2, schema.BACKWARD, [4, 3]),
        (6, 3, schema.BACKWARD, [4]),
        (100, 10, schema.BACKWARD, []),
        (100, 1000, schema.BACKWARD, [4, 3, 2, 1, 0]),
        (0, 1, schema.BACKWARD, [0]),
    ],
)
def test_reads_give_the_numbers_a_real_worker_gives(
    file: StoreFile, reader: StoreReader, start: int, count: int, direction: Atom, expected: list[int]
) -> None:
    commit(file, append("s", [event(number) for number in range(5)]))
    _, events = ask(reader, read("s", start, count, direction))
    assert [stored[schema.EVENT_NUMBER] for stored in events] == expected


VALUES: list[Term] = [
    None,
    True,
    0,
    10**40,
    1.5,
    b"\0binary\xff\0",
    b"",
    [],
    {},
    [1, [2, [3]]],
    (1, (2,)),
    Atom("atom"),
    ImproperList([1, 2], 3),
    BitString(b"\xa0", 3),
    Pid(Atom("a@host"), 1, 2, 3),
    Reference(Atom("a@host"), 1, (1, 2, 3)),
    Export(Atom("lists"), Atom("map"), 2),
    TermMap([(1, b"int"), (1.0, b"float"), (True, b"true"), ([1], b"list")]),
    {b"nested": {Atom("key"): [{b"deep": (None,)}]}},
    b"x" * 100_000,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_kind_of_term_comes_back_equal(file: StoreFile, reader: StoreReader, value: Term) -> None:
    commit(file, append("s", [NewEvent("kept:v1", value, value)]))
    commit(file, schema.record_snapshot_cast(STORE, "a", "b", 1, [value]), cast=True)
    _, [stored] = ask(reader, read("s"))
    _, [snapshot] = ask(reader, schema.read_snapshot_request(STORE, "a", "b", 1))
    for found in (stored[schema.DATA], stored[schema.METADATA], snapshot):
        assert found == value
        assert type(found) is type(value)


def test_every_recorded_term_of_a_beam_comes_back_equal(file: StoreFile, reader: StoreReader) -> None:
    vectors = json.loads(gzip.decompress((CAPTURES / "etf.json.gz").read_bytes()))["vectors"]
    recorded = [etf.decode(bytes.fromhex(vector["plain"])) for vector in vectors]
    commit(file, append("s", [NewEvent("kept:v1", term) for term in recorded]))
    _, events = ask(reader, read("s"))
    assert all(exact_equal(stored[schema.DATA], term) for stored, term in zip(events, recorded, strict=True))


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.binary(max_size=40)
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.binary(), inner), max_leaves=8)


@given(values, values, st.text(min_size=1, max_size=20), st.integers(0, 2**40))
@settings(deadline=None)
def test_the_stored_bytes_are_those_of_the_struct(data: Term, metadata: Term, stream: str, number: int) -> None:
    new = NewEvent("typ:v1", data, metadata)
    spliced = records.event_record(
        records.stream_field(stream.encode()), records.created_fields(NOW), records.event_fields(new.to_term()), number
    )
    slow = RecordedEvent(stream, number, new.event_id, "typ:v1", data, metadata, NOW, schema.epoch_us(NOW))
    decoded = etf.decode(bytes([etf.VERSION]) + spliced)
    assert decoded == etf.decode(etf.encode(slow.to_term()))
    assert RecordedEvent.from_term(decoded) == slow


def test_the_spliced_replies_equal_those_encoded_term_by_term(file: StoreFile, reader: StoreReader) -> None:
    commit(file, append("s", [event(number, {b"n": number}) for number in range(300)]))
    reply = reader.answer(checked(read("s")))
    assert isinstance(reply, EncodedTerm)
    slow = [
        RecordedEvent("s", n, f"event-{n}", "counted:v1", {b"n": n}, {b"n": n}, NOW, schema.epoch_us(NOW))
        for n in range(300)
    ]
    assert plain(reply) == (schema.OK, [one.to_term() for one in slow])


def test_streams_are_listed_by_name_however_many_there_are(file: StoreFile, reader: StoreReader) -> None:
    assert ask(reader, schema.store_request("get_streams", STORE)) == schema.ok([])
    names = [f"stream-{number}" for number in range(600)]
    commit(file, *(append(name, [event(0)]) for name in names))
    commit(file, append("ström", [event(0)]), append("a", [event(0)]))
    _, found = ask(reader, schema.store_request("get_streams", STORE))
    assert found == sorted(name.encode() for name in [*names, "ström", "a"])


def test_snapshots_are_listed_with_filters(file: StoreFile, reader: StoreReader) -> None:
    for source, stream, version in (("a", "s", 2), ("a", "s", 10), ("a", "t", 1), ("b", "s", 1)):
        commit(file, schema.record_snapshot_cast(STORE, source, stream, version, {}), cast=True)

    def listed(source: str | Atom, stream: str | Atom) -> list[tuple[bytes, bytes, bytes]]:
        _, found = ask(reader, schema.list_snapshots_request(STORE, source, stream))
        return [tuple(path[1:]) for path in found]

    two, ten, one = b"0000000002", b"0000000010", b"0000000001"
    assert listed("a", "s") == [(b"a", b"s", two), (b"a", b"s", ten)]
    assert listed("a", schema.ANY) == [(b"a", b"s", two), (b"a", b"s", ten), (b"a", b"t", one)]
    assert listed(schema.ANY, "s") == [(b"a", b"s", two), (b"a", b"s", ten), (b"b", b"s", one)]
    assert len(listed(schema.ANY, schema.ANY)) == 4
    assert listed("c", schema.ANY) == []


def test_a_missing_snapshot_names_the_first_part_of_its_path_that_is_missing(
    file: StoreFile, reader: StoreReader
) -> None:
    def missing(source: str, stream: str, version: int) -> Term:
        _, reason = ask(reader, schema.read_snapshot_request(STORE, source, stream, version))
        details = reason[2]
        return details[Atom("node_path")], details[Atom("node_is_target")]

    assert missing("a", "s", 1) == ([schema.SNAPSHOTS], False)
    commit(file, schema.record_snapshot_cast(STORE, "a", "s", 1, {}), cast=True)
    assert missing("b", "s", 1) == ([schema.SNAPSHOTS, b"b"], False)
    assert missing("a", "t", 1) == ([schema.SNAPSHOTS, b"a", b"t"], False)
    assert missing("a", "s", 2) == ([schema.SNAPSHOTS, b"a", b"s", b"0000000002"], True)
    commit(file, schema.delete_snapshot_cast(STORE, "a", "s", 1), cast=True)
    assert missing("a", "s", 1) == ([schema.SNAPSHOTS], False)


def test_a_snapshot_that_is_undefined_counts_as_missing(file: StoreFile, reader: StoreReader) -> None:
    commit(file, schema.record_snapshot_cast(STORE, "a", "s", 1, Atom("undefined")), cast=True)
    assert ask(reader, schema.read_snapshot_request(STORE, "a", "s", 1)) == schema.error(Atom("not_found"))


def test_a_snapshot_is_replaced_by_the_next_of_its_version(file: StoreFile, reader: StoreReader) -> None:
    commit(file, schema.record_snapshot_cast(STORE, "a", "s", 1, b"old"), cast=True)
    commit(file, schema.record_snapshot_cast(STORE, "a", "s", 1, b"new"), cast=True)
    assert ask(reader, schema.read_snapshot_request(STORE, "a", "s", 1)) == schema.ok(b"new")


def test_a_removed_subscription_is_gone_and_a_second_removal_does_nothing(file: StoreFile, reader: StoreReader) -> None:
    remove = schema.remove_subscription_cast(STORE, schema.BY_STREAM, b"$all", "all-events")
    assert commit(file, remove, remove, cast=True) == [schema.OK, schema.OK]
    assert ask(reader, schema.store_request("get_subscriptions", STORE)) == schema.ok({})


def test_everything_is_there_after_the_file_is_opened_again(file: StoreFile) -> None:
    commit(file, append("s", [event(0), event(1)]))
    file.close()
    again = StoreFile(file.path, OPTIONS, NODE)
    assert again.info == file.info
    assert commit(again, append("s", [event(2)], 1)) == [schema.ok(2)]
    again.close()
    assert not list(file.path.parent.glob("*-wal"))


def test_the_log_is_copied_into_the_file_when_much_was_written(
    file: StoreFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_BYTES", 200_000)
    before = file.path.stat().st_size
    commit(file, append("s", [event(0, b"x" * 50_000)]))
    file.checkpoint_when_due()
    assert file.path.stat().st_size == before
    commit(file, append("s", [event(1, b"x" * 150_000)]))
    file.checkpoint_when_due()
    assert file.path.stat().st_size > 200_000


def fill(file: StoreFile, pages: int) -> None:
    """Lets the file grow by `pages` of 4 KiB and no further, as a disk that is almost full would."""
    assert file._connection is not None
    used = file._connection.execute("PRAGMA page_count").fetchone()[0]
    file._connection.execute(f"PRAGMA max_page_count = {used + pages}")


def test_a_full_disk_fails_the_append_and_stores_nothing_of_it(file: StoreFile, reader: StoreReader) -> None:
    commit(file, append("s", [event(0)]))
    fill(file, 10)
    big = [event(number, b"x" * 20_000) for number in range(1, 10)]
    [outcome] = commit(file, append("s", big, 0))
    assert outcome == schema.error(schema.storage_failed("database or disk is full"))
    assert ask(reader, schema.get_version_request(STORE, "s")) == schema.ok(0)
    fill(file, 1000)
    assert commit(file, append("s", big, 0)) == [schema.ok(9)]


def test_one_append_too_large_for_the_disk_does_not_fail_the_others_of_its_batch(file: StoreFile) -> None:
    fill(file, 20)
    big = append("s", [event(0, b"x" * 200_000)])
    outcomes = commit(file, append("a", [event(0)]), big, append("b", [event(0)]), append("a", [event(1)], 0))
    assert outcomes == [
        schema.ok(0),
        schema.error(schema.storage_failed("database or disk is full")),
        schema.ok(0),
        schema.ok(1),
    ]


class FailingCommit:
    """A connection whose COMMIT fails once with an error of the disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.failures = 1

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)

    def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:
        if sql == "COMMIT" and self.failures:
            self.failures -= 1
            problem = sqlite3.OperationalError("disk I/O error")
            problem.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise problem
        return self._connection.execute(sql, *parameters)


def test_a_commit_whose_fsync_fails_has_an_unknown_outcome_and_is_never_tried_twice(file: StoreFile) -> None:
    failing = FailingCommit(file._connection)  # type: ignore[arg-type]
    file._connection = failing  # type: ignore[assignment]
    outcomes = commit(file, append("s", [event(0)]), append("t", [event(0)]))
    assert [outcome[1][0].name for outcome in outcomes] == ["unknown_outcome", "unknown_outcome"]
    assert commit(file, append("s", [event(0)], -1)) == [schema.ok(0)]


def test_a_reply_larger_than_a_node_takes_is_refused(file: StoreFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_READ_BYTES", 100_000)
    commit(file, append("s", [event(number, b"x" * 30_000) for number in range(4)]))
    reader = file.reader()
    _, reason = ask(reader, read("s"))
    assert reason[0] is Atom("reply_too_large")
    _, events = ask(reader, read("s", 0, 3))
    assert len(events) == 3
    reader.close()


def test_an_event_too_large_to_be_read_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_RECORD_BYTES", 1000)
    with pytest.raises(engine.TooLarge, match="at most 1000 bytes"):
        prepare(checked(append("s", [event(0, b"x" * 1000)])))


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reg_gh.sqlite3"
    path.write_bytes(b"not a database " * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        StoreFile(path, OPTIONS, NODE)
    assert path.read_bytes() == b"not a database " * 1000


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "reg_gh.sqlite3"
    with sqlite3.connect(path) as foreign:
        foreign.execute("CREATE TABLE theirs (x)")
    foreign.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        StoreFile(path, OPTIONS, NODE)
    assert path.read_bytes() == before


def test_a_store_of_a_later_format_is_refused(file: StoreFile) -> None:
    assert file._connection is not None
    file._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="format 99, this version of gater reads format 1"):
        StoreFile(file.path, OPTIONS, NODE)


def test_a_file_of_another_store_is_refused(file: StoreFile) -> None:
    with pytest.raises(StoreError, match="holds the store reg_gh"):
        StoreFile(file.path, StoreOptions("other"), NODE)


def test_a_damaged_file_is_refused_when_it_is_opened(file: StoreFile) -> None:
    commit(file, append("s", [event(number, os.urandom(3000)) for number in range(200)]))
    file.close()
    size = file.path.stat().st_size
    with file.path.open("r+b") as damaged:
        damaged.seek(size // 3)
        damaged.write(b"\xff" * (size // 3))
    with pytest.raises(StoreError, match=r"damaged|malformed"):
        StoreFile(file.path, OPTIONS, NODE)


def test_events_that_were_lost_from_the_file_are_an_error_and_not_a_gap(file: StoreFile, reader: StoreReader) -> None:
    commit(file, append("s", [event(number) for number in range(5)]))
    assert file._connection is not None
    file._connection.execute("DELETE FROM events WHERE number = 2")
    _, reason = ask(reader, read("s"))
    assert reason[0] is Atom("storage_failed")


def test_an_interrupted_creation_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "reg_gh.sqlite3"
    path.touch()
    opened = StoreFile(path, OPTIONS, NODE)
    assert commit(opened, append("s", [event(0)])) == [schema.ok(0)]
    opened.close()
