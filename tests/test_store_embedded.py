"""The embedded stores under an event loop: order, concurrency, limits, locks, and kill -9."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_kit import NODE, STORE, Caller, append, event, open_stores, plain, read, wrong

from gater.api import schema
from gater.api.schema import NewEvent, Rejected, Subscription
from gater.erl.terms import Atom, Term
from gater.errors import StoreError
from gater.store import EmbeddedStores, StoreOptions, embedded
from gater.store.engine import StoreFile

HERE = Path(__file__).parent


async def test_concurrent_appends_to_one_stream_lose_nothing(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        replies = await asyncio.gather(*(caller.call(append("s", [event(number)])) for number in range(500)))
        assert sorted(version for _, version in replies) == list(range(500))
        assert sorted(await caller.numbers("s")) == list(range(500))


async def test_of_many_racers_for_one_version_exactly_one_wins(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        for turn in range(10):
            race = [caller.call(append("s", [event(number)], turn - 1)) for number in range(50)]
            replies = await asyncio.gather(*race)
            assert replies.count(schema.ok(turn)) == 1
            assert replies.count(wrong(turn)) == 49


async def test_appends_that_wait_together_are_committed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    commit = StoreFile.commit
    monkeypatch.setattr(
        StoreFile, "commit", lambda self, writes, now: batches.append(len(writes)) or commit(self, writes, now)
    )
    async with open_stores(tmp_path) as caller:
        await asyncio.gather(*(caller.call(append(f"s{number}", [event(0)])) for number in range(400)))
    assert sum(batches) == 400
    assert len(batches) < 100


async def test_a_caller_sees_its_casts_and_calls_in_order(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        for number in range(50):
            caller.cast(schema.record_snapshot_cast(STORE, "a", "s", 1, number))
            snapshot = caller.send(schema.read_snapshot_request(STORE, "a", "s", 1))
            caller.cast(schema.ack_event_cast(STORE, "p", None, "s", number))
            subscriptions = caller.send(schema.store_request("get_subscriptions", STORE))
            caller.send(append("s", [event(number)]))
            version = caller.send(schema.get_version_request(STORE, "s"))
            streams = caller.send(schema.store_request("get_streams", STORE))
            assert plain(await snapshot) == schema.ok(number)
            starts = {record[Atom("start_from")] for record in plain(await subscriptions)[1].values()}
            assert starts == {0, number + 1}
            assert plain(await version) == schema.ok(number)
            assert plain(await streams) == schema.ok([b"s"])


class Gate:
    """Holds the writer before its commits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        commit = StoreFile.commit

        def held(file: StoreFile, writes: list[Term], now: object) -> list[Term]:
            assert self._open.wait(30)
            return commit(file, writes, now)  # type: ignore[arg-type]

        monkeypatch.setattr(StoreFile, "commit", held)

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()


async def test_a_read_waits_for_writes_it_could_see_and_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.open()
    async with open_stores(tmp_path) as caller:
        await caller.call(append("quiet", [event(0)]))
        gate.shut()
        pending = caller.send(append("busy", [event(0)]))
        behind = [
            caller.send(schema.get_version_request(STORE, "busy")),
            caller.send(read("busy")),
            caller.send(schema.store_request("get_streams", STORE)),
        ]
        assert await caller.call(schema.get_version_request(STORE, "quiet")) == schema.ok(0)
        assert len((await caller.call(read("quiet")))[1]) == 1
        assert (await caller.call(schema.store_request("get_subscriptions", STORE)))[0] is schema.OK
        assert (await caller.call(schema.store_request("quick_health_check", STORE)))[0] is schema.OK
        assert not pending.done()
        assert not any(future.done() for future in behind)
        gate.open()
        assert plain(await behind[0]) == schema.ok(0)
        assert len(plain(await behind[1])[1]) == 1
        assert plain(await behind[2]) == schema.ok([b"busy", b"quiet"])


async def test_beyond_the_limit_of_waiting_writes_the_store_is_overloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MAX_QUEUED_WRITES", 10)
    gate = Gate(monkeypatch)
    async with open_stores(tmp_path) as caller:
        taken = [caller.send(append("s", [event(number)])) for number in range(10)]
        assert await caller.call(append("s", [event(99)])) == schema.error(Atom("overloaded"))
        refused = caller.cast(schema.delete_snapshot_cast(STORE, "a", "b", 1))
        assert refused == Rejected(Atom("overloaded"))
        gate.open()
        assert [plain(await one) for one in taken] == [schema.ok(number) for number in range(10)]
        assert await caller.call(append("s", [event(10)])) == schema.ok(10)


async def test_beyond_the_limit_of_waiting_bytes_the_store_is_overloaded_but_one_write_is_always_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MAX_QUEUED_BYTES", 10_000)
    gate = Gate(monkeypatch)
    async with open_stores(tmp_path) as caller:
        large = append("s", [event(0, b"x" * 50_000)])
        taken = caller.send(large)
        assert await caller.call(large) == schema.error(Atom("overloaded"))
        gate.open()
        assert plain(await taken) == schema.ok(0)
        assert await caller.call(large) == schema.ok(1)


async def test_beyond_the_limit_of_waiting_reads_the_store_is_overloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MAX_QUEUED_READS", 5)
    gate = Gate(monkeypatch)
    async with open_stores(tmp_path) as caller:
        caller.send(append("s", [event(0)]))
        parked = [caller.send(schema.get_version_request(STORE, "s")) for _ in range(5)]
        assert await caller.call(schema.get_version_request(STORE, "s")) == schema.error(Atom("overloaded"))
        gate.open()
        assert [plain(await one) for one in parked] == [schema.ok(0)] * 5
        assert await caller.call(schema.get_version_request(STORE, "s")) == schema.ok(0)


async def test_a_loop_that_is_never_idle_does_not_starve_the_store(tmp_path: Path) -> None:
    """Without the loop giving way, single requests here took up to 20 seconds."""

    async def keep_busy() -> None:
        while True:
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(0)

    async with open_stores(tmp_path) as caller:
        busy = asyncio.ensure_future(keep_busy())
        slowest = 0.0
        for number in range(40):
            started = time.perf_counter()
            await caller.call(append("s", [event(number)]))
            await caller.call(read("s"))
            slowest = max(slowest, time.perf_counter() - started)
        busy.cancel()
        assert slowest < 5


async def test_what_a_writer_has_to_remember_is_forgotten_when_all_is_done(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        await asyncio.gather(*(caller.call(append(f"s{number}", [event(0)])) for number in range(100)))
        worker = caller.stores._workers[STORE]
        assert worker._last_write == {}
        assert worker._parked == {}
        assert (worker._queued_writes, worker._queued_bytes, worker._queued_reads) == (0, 0, 0)


async def test_a_value_that_is_no_term_is_refused_and_nothing_stored(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        _, reason = await caller.call(append("s", [event(0), NewEvent("x", object())]))
        assert reason[0] is Atom("invalid_request")
        assert await caller.call(schema.get_version_request(STORE, "s")) == schema.ok(-1)


async def test_stores_of_one_node_are_apart(tmp_path: Path) -> None:
    odd = "weird/../name with ünicode"
    options = [StoreOptions("one"), StoreOptions("two", "second", ("t",)), StoreOptions(odd)]
    async with open_stores(tmp_path, *options) as caller:
        for number, option in enumerate(options):
            events = [event(0)] * (number + 1)
            reply = await caller.call(append("s", events, store=Atom(option.store_id)))
            assert reply == schema.ok(number)
        _, stores = await caller.call(schema.list_stores_request())
        infos = [schema.StoreInfo.from_term(store) for store in stores]
        assert [(info.node, info.store_id.name) for info in infos] == [(NODE, "one"), (NODE, "two"), (NODE, odd)]
        assert infos[1].config[Atom("tags")] == [b"t"]
        assert caller.stores.store_ids == (Atom("one"), Atom("two"), Atom(odd))
    assert sorted(name for name in os.listdir(tmp_path) if "%2F" in name) == [
        "weird%2F..%2Fname%20with%20%C3%BCnicode.sqlite3"
    ]


async def test_an_unknown_store_is_told_except_to_get_version(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        nowhere = Atom("nowhere")
        not_found = schema.error(schema.store_not_found(nowhere))
        assert await caller.call(schema.get_version_request(nowhere, "s")) == schema.ok(-1)
        assert await caller.call(append("s", [event(0)], store=nowhere)) == not_found
        assert await caller.call(schema.store_request("get_subscriptions", nowhere)) == not_found
        assert caller.cast(schema.delete_snapshot_cast(nowhere, "a", "b", 1)) == Rejected(not_found[1])


async def test_requests_checked_before_are_taken_as_they_are(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        assert await caller.call(schema.check_request(append("s", [event(0)]), cast=False)) == schema.ok(0)
        subscription = Subscription(schema.BY_STREAM, "$s", "n")
        save = schema.check_request(schema.save_subscription_cast(STORE, subscription), cast=True)
        assert caller.cast(save) is None


async def test_close_finishes_and_answers_what_is_queued_and_takes_nothing_new(tmp_path: Path) -> None:
    async with open_stores(tmp_path) as caller:
        appends = [caller.send(append("s", [event(number)])) for number in range(200)]
        last = caller.send(schema.get_version_request(STORE, "s"))
        closing = asyncio.ensure_future(caller.stores.close())
        await asyncio.wait([closing], timeout=0)
        assert await caller.call(append("s", [event(0)])) == schema.error(Atom("draining"))
        assert caller.cast(schema.delete_snapshot_cast(STORE, "a", "b", 1)) == Rejected(Atom("draining"))
        await closing
        assert [plain(one.result()) for one in appends] == [schema.ok(number) for number in range(200)]
        assert plain(last.result()) == schema.ok(199)
    async with open_stores(tmp_path) as caller:
        assert len(await caller.numbers("s")) == 200


async def test_a_reply_callback_that_fails_does_not_keep_the_others_from_theirs(tmp_path: Path) -> None:
    def fail(reply: Term) -> None:
        raise RuntimeError("callback")

    async with open_stores(tmp_path) as caller:
        caller.stores.submit(append("s", [event(0)]), fail)
        assert await caller.call(append("s", [event(1)])) == schema.ok(1)
        caller.stores.submit(schema.get_version_request(STORE, "s"), fail)
        assert await caller.call(schema.get_version_request(STORE, "s")) == schema.ok(1)


async def test_a_defect_of_the_writer_is_answered_and_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StoreFile.commit

    def fail(self: StoreFile, writes: object, now: object) -> list[Term]:
        raise TypeError("a defect")

    async with open_stores(tmp_path) as caller:
        monkeypatch.setattr(StoreFile, "commit", fail)
        _, reason = await caller.call(append("s", [event(0)]))
        assert reason[0] is Atom("unknown_outcome")
        monkeypatch.setattr(StoreFile, "commit", commit)
        assert await caller.call(append("s", [event(0)])) == schema.ok(0)


async def test_an_event_of_20_megabytes_comes_back(tmp_path: Path) -> None:
    payload = os.urandom(20_000_000)
    async with open_stores(tmp_path) as caller:
        assert await caller.call(append("s", [event(0, payload)])) == schema.ok(0)
        _, [stored] = await caller.call(read("s"))
        assert stored[schema.DATA] == payload


async def test_a_directory_in_use_is_refused_until_it_is_released(tmp_path: Path) -> None:
    async with open_stores(tmp_path):
        with pytest.raises(StoreError, match=f"in use by another gater .process {os.getpid()}."):
            EmbeddedStores(tmp_path, [StoreOptions("reg_gh")], node=NODE)
    async with open_stores(tmp_path) as caller:
        assert await caller.call(append("s", [event(0)])) == schema.ok(0)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used"):
        EmbeddedStores(tmp_path / "file" / "below", [StoreOptions("reg_gh")], node=NODE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        EmbeddedStores(tmp_path, [StoreOptions("reg_gh")], node=NODE)


def test_a_store_that_cannot_be_opened_releases_the_directory(tmp_path: Path) -> None:
    (tmp_path / "bad.sqlite3").write_bytes(b"rubbish" * 1000)
    for _ in range(2):
        with pytest.raises(StoreError, match="not a database"):
            EmbeddedStores(tmp_path, [StoreOptions("good"), StoreOptions("bad")], node=NODE)


@pytest.mark.parametrize("store_id", ["", "x" * 250, "ü" * 100])
def test_a_store_id_that_does_not_fit_a_file_name_is_refused(tmp_path: Path, store_id: str) -> None:
    with pytest.raises(StoreError, match="does not fit a file name"):
        EmbeddedStores(tmp_path, [StoreOptions(store_id)], node=NODE)


def test_a_store_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="named twice"):
        EmbeddedStores(tmp_path, [StoreOptions("a"), StoreOptions("a")], node=NODE)


APPENDER = """
import asyncio, sys
from store_kit import append, event, open_stores

async def write(caller, stream):
    number = 0
    while True:
        reply = await caller.call(append(stream, [event(number), event(number + 1)], number - 1))
        number = reply[1] + 1
        print(stream, reply[1], flush=True)

async def main():
    async with open_stores(__import__("pathlib").Path(sys.argv[1])) as caller:
        await asyncio.gather(*(write(caller, f"s{n}") for n in range(8)))

asyncio.run(main())
"""


def appended_until_killed(directory: Path, lines: int) -> dict[str, int]:
    """The last version answered for each stream by a process that was killed after so many answers."""
    answered: dict[str, int] = {}
    process = subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(directory)], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for number, line in enumerate(process.stdout):
        if number == lines:
            process.send_signal(signal.SIGKILL)
        if line.endswith("\n"):
            stream, version = line.split()
            answered[stream] = int(version)
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    return answered


async def stored(caller: Caller) -> dict[str, list[int]]:
    _, streams = await caller.call(schema.store_request("get_streams", STORE))
    return {stream.decode(): await caller.numbers(stream.decode()) for stream in streams}


async def test_what_was_answered_survives_kill_9_and_appends_are_whole(tmp_path: Path) -> None:
    for turn in range(3):
        directory = tmp_path / str(turn)
        answered = await asyncio.to_thread(appended_until_killed, directory, random.randrange(20, 400))
        assert answered
        async with open_stores(directory) as caller:
            found = await stored(caller)
            for stream, version in answered.items():
                assert len(found[stream]) > version
            for numbers in found.values():
                assert numbers == list(range(len(numbers)))
                assert len(numbers) % 2 == 0
            stream, numbers = next(iter(found.items()))
            assert await caller.call(append(stream, [event(0)], len(numbers) - 1)) == schema.ok(len(numbers))
