"""Wire shapes of ExESDB: struct maps, request checking, error reasons."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gater import errors
from gater.api import schema
from gater.api.schema import NewEvent, RecordedEvent, Rejected, Request, Snapshot, Subscription, check_request
from gater.erl import etf
from gater.erl.terms import Atom, Export, ImproperList, Pid, Term

CAPTURE = Path(__file__).parent / "captures" / "exesdb_contract.json"
EXCHANGES: list[dict[str, Any]] = json.loads(CAPTURE.read_text())["exchanges"]
STORE = Atom("reg_gh")
PID = Pid(Atom("a@host"), 1, 2, 3)
EVENT = NewEvent("placed:v1", {"total": 1}, event_id="e-1").to_term()


def term_of(exchange: dict[str, Any], part: str) -> Term:
    return etf.decode(bytes.fromhex(exchange[f"{part}_etf"]))


def exchange(label: str) -> dict[str, Any]:
    return next(found for found in EXCHANGES if found["label"] == label)


def accepted(term: Term, *, cast: bool = False) -> Request:
    checked = check_request(term, cast=cast)
    assert isinstance(checked, Request), checked
    return checked


def refused(term: Term, *, cast: bool = False) -> Term:
    checked = check_request(term, cast=cast)
    assert isinstance(checked, Rejected), checked
    return checked.reason


def why(term: Term, *, cast: bool = False) -> str:
    """The text of an invalid_request."""
    reason = refused(term, cast=cast)
    assert reason[0] is Atom("invalid_request"), reason
    return str(reason[1].decode())


@pytest.mark.parametrize("recorded", EXCHANGES, ids=lambda recorded: recorded["label"])
def test_recorded_requests_pass_unless_they_crashed_the_worker_or_were_refused_by_it(recorded: dict[str, Any]) -> None:
    checked = check_request(term_of(recorded, "request"), cast=recorded["kind"] == "cast")
    answered_with_error = recorded.get("reply", "").startswith("{:error, ")
    if isinstance(checked, Request):
        assert checked.is_cast == (recorded["kind"] == "cast")
        known_only_to_the_store = "unknown store" in recorded["label"]
        assert recorded.get("outcome") != "exit" or known_only_to_the_store
    elif answered_with_error:
        assert checked.reply == term_of(recorded, "reply")
    else:
        assert recorded["outcome"] == "exit"


@pytest.mark.parametrize("recorded", EXCHANGES, ids=lambda recorded: recorded["label"])
def test_a_recorded_request_sent_the_other_way_is_refused(recorded: dict[str, Any]) -> None:
    reason = refused(term_of(recorded, "request"), cast=recorded["kind"] != "cast")
    assert reason[0] is Atom("unknown_request")


def test_recorded_events_are_read_into_values_and_back() -> None:
    _, events = term_of(exchange("read all forward"), "reply")
    values = [RecordedEvent.from_term(event) for event in events]
    assert [value.event_number for value in values] == [0, 1, 2, 3, 4]
    assert values[0].event_stream_id == "order-1"
    assert values[0].event_type == "placed:v1"
    assert values[2].data == b"raw binary"
    created = values[0].created
    assert created is not None
    assert created.tzinfo is UTC
    assert schema.epoch_us(created) == values[0].created_epoch
    assert [value.to_term() for value in values] == events


def test_recorded_new_events_are_read_into_values_and_back() -> None:
    events = term_of(exchange("append with expected version 0"), "request")[-1]
    assert [NewEvent.from_term(event).to_term() for event in events] == events


def test_a_recorded_snapshot_is_read_into_a_value_and_back() -> None:
    record = term_of(exchange("record snapshot v2"), "request")[-1]
    snapshot = Snapshot.from_term(record)
    assert (snapshot.source_uuid, snapshot.source_version, snapshot.source_type) == ("agg-1", 2, "Order")
    assert snapshot.to_term() == record


def test_recorded_subscriptions_are_read_into_values_and_have_the_recorded_keys() -> None:
    _, entries = term_of(exchange("subscriptions"), "reply")
    assert len(entries) == 6
    for path, record in entries.items():
        subscription = Subscription.from_term(record)
        assert subscription.to_term() == record
        key = schema.subscription_key(subscription.type, subscription.selector, subscription.subscription_name)
        assert path == [Atom("subscriptions"), key]


def test_recorded_stores_are_read_into_values_and_back() -> None:
    _, stores = term_of(exchange("stores"), "reply")
    info = schema.StoreInfo.from_term(stores[0])
    assert info.store_id is STORE
    assert info.to_term() == stores[0]
    created_at = schema.datetime_from_term(info.config[Atom("created_at")])
    rebuilt = schema.store_config(
        STORE,
        data_dir="/var/lib/ex_esdb/node-0",
        created_at=created_at,
        description="example store",
        tags=["example"],
    )
    assert rebuilt == stores[0][Atom("store")]


@settings(deadline=None)
@given(st.datetimes(timezones=st.just(UTC)))
def test_a_datetime_survives_the_way_through_its_struct(moment: datetime) -> None:
    assert schema.datetime_from_term(schema.datetime_to_term(moment)) == moment


def test_a_datetime_of_another_zone_keeps_its_moment() -> None:
    paris = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    term = schema.datetime_to_term(paris)
    assert (term[Atom("hour")], term[Atom("time_zone")]) == (10, b"Etc/UTC")
    elixir = term | {Atom("hour"): 12, Atom("utc_offset"): 3600, Atom("std_offset"): 3600}
    assert schema.datetime_from_term(elixir) == paris


def test_a_naive_datetime_is_refused() -> None:
    with pytest.raises(schema.SchemaError, match="time zone"):
        schema.datetime_to_term(datetime(2026, 1, 1))


@pytest.mark.parametrize("change", [{Atom("month"): 13}, {Atom("microsecond"): None}, {Atom("year"): 10_000_000}])
def test_a_datetime_python_cannot_hold_is_a_schema_error(change: dict[Atom, Term]) -> None:
    with pytest.raises(schema.SchemaError):
        schema.datetime_from_term(schema.datetime_to_term(datetime.now(UTC)) | change)


@pytest.mark.parametrize("value", [RecordedEvent, NewEvent, Snapshot, Subscription, schema.StoreInfo])
@pytest.mark.parametrize("term", [None, 1, b"x", [], {}, {Atom("__struct__"): Atom("Elixir.Other")}])
def test_a_term_of_another_shape_is_a_schema_error(value: Any, term: Term) -> None:
    with pytest.raises(schema.SchemaError):
        value.from_term(term)


@pytest.mark.parametrize("value", [schema.EVENT_RECORD, schema.SNAPSHOT_RECORD])
def test_a_struct_without_its_fields_is_a_schema_error(value: Atom) -> None:
    readers: dict[Atom, Any] = {schema.EVENT_RECORD: RecordedEvent, schema.SNAPSHOT_RECORD: Snapshot}
    with pytest.raises(schema.SchemaError, match="lacks"):
        readers[value].from_term({schema.STRUCT: value})


def test_uuids_are_of_version_7_in_order_of_time_and_all_different() -> None:
    made = [schema.uuid7() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in made
    )
    times = [one[:13] for one in made]
    assert times == sorted(times)


def test_an_event_gets_an_id_empty_metadata_and_content_types() -> None:
    term = NewEvent("placed:v1", 1).to_term()
    assert len(term[schema.EVENT_ID]) == 36
    assert term[schema.METADATA] == {}
    assert term[schema.DATA_CONTENT_TYPE] == term[schema.METADATA_CONTENT_TYPE] == 1


def test_an_event_without_metadata_is_refused_by_its_place() -> None:
    broken = {key: value for key, value in EVENT.items() if key is not schema.METADATA}
    text = why((Atom("append_events"), STORE, b"s", [EVENT, broken]))
    assert text.startswith("append_events: event 2 of 2 lacks metadata")


def test_an_event_of_another_struct_is_refused_by_name() -> None:
    text = why((Atom("append_events"), STORE, b"s", [{schema.STRUCT: Atom("Elixir.My.Event")}]))
    assert "event 1 of 1 is not an ExESDB.Schema.NewEvent but a struct :Elixir.My.Event" in text


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ((Atom("append_events"), b"reg_gh", b"s", []), "the store must be an atom"),
        ((Atom("append_events"), None, b"s", []), "the store must be an atom, got :nil"),
        ((Atom("append_events"), STORE, list(b"order"), []), "charlist"),
        ((Atom("append_events"), STORE, b"", []), "empty name"),
        ((Atom("append_events"), STORE, b"\xff", []), "not valid UTF-8"),
        ((Atom("append_events"), STORE, b"s" * 300, []), "300 characters"),
        ((Atom("append_events"), STORE, b"s", ImproperList([EVENT], EVENT)), "the events must be a list"),
        ((Atom("append_events"), STORE, b"s", EVENT), "the events must be a list"),
        ((Atom("append_events"), STORE, b"s", [EVENT] * 100_001), "100001 events at once"),
        ((Atom("append_events"), STORE, b"s", Atom("no_stream"), []), "got :no_stream"),
        ((Atom("append_events"), STORE, b"s", 1.0, []), "expected version must be"),
        ((Atom("append_events"), STORE, b"s", True, []), "got :true"),
        ((Atom("get_events"), STORE, b"s", 0, 1, Atom("sideways")), "direction"),
        ((Atom("get_events"), STORE, Atom("s"), 0, 1, schema.FORWARD), "the stream must be a binary"),
        ((Atom("get_version"), STORE, 1), "the stream must be a binary, got 1"),
        ((Atom("get_streams"), 1), "the store must be an atom"),
        ((Atom("read_snapshot"), STORE, b"a", b"b", -1), "snapshot version"),
        ((Atom("read_snapshot"), STORE, b"a", b"b", 10**10), "snapshot version"),
        ((Atom("read_snapshot"), STORE, Atom("any"), b"b", 1), "source must be a binary"),
        ((Atom("read_snapshot"), STORE, b"a" * 200, b"b" * 100, 1), "characters"),
        ((Atom("list_snapshots"), STORE, None, schema.ANY), "source must be a binary"),
    ],
)
def test_calls_that_crash_a_worker_are_refused_with_a_reason(term: Term, expected: str) -> None:
    text = why(term)
    assert text.startswith(term[0].name)
    assert expected in text


def save(kind: Term, selector: Term, name: Term = b"n", start: Term = 0, subscriber: Term = None) -> Term:
    return (Atom("save_subscription"), STORE, kind, selector, name, start, subscriber)


def ack(event: Term, name: Term = b"n", subscriber: Term = None) -> Term:
    return (Atom("ack_event"), STORE, name, subscriber, event)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (save(Atom("by_magic"), b"$all"), "subscription type"),
        (save(schema.BY_STREAM, b"order-1"), 'a by_stream selector is "$all" or "$"'),
        (save(schema.BY_STREAM, {}), "selector must be a binary"),
        (save(schema.BY_EVENT_TYPE, Atom("placed")), "selector must be a binary"),
        (save(schema.BY_EVENT_PATTERN, b"placed"), "must be a map"),
        (save(schema.BY_STREAM, b"$all", name=Atom("n")), "subscription name must be a binary"),
        (save(schema.BY_STREAM, b"$all", name=b"n" * 300), "characters"),
        (save(schema.BY_STREAM, b"$all", start=-1), "start_from"),
        (save(schema.BY_STREAM, b"$all", subscriber=b"me"), "pid or nil"),
        (ack(None), "the event must be a map"),
        (ack({}), "the stream must be a binary"),
        (ack({schema.EVENT_STREAM_ID: b"s"}), "event_number"),
        (ack({schema.EVENT_STREAM_ID: b"s", schema.EVENT_NUMBER: 1}, subscriber=1), "pid or nil"),
        ((Atom("record_snapshot"), STORE, b"a", b"b", 1, Export(Atom("m"), Atom("f"), 0)), "function"),
        ((Atom("record_snapshot"), STORE, b"a", b"b", 1, (Atom("p_sproc"), 1)), "Khepri payload"),
        ((Atom("delete_snapshot"), STORE, b"a", b"b", 1.5), "snapshot version"),
    ],
)
def test_casts_that_crash_a_worker_or_its_store_are_refused_with_a_reason(term: Term, expected: str) -> None:
    assert expected in why(term, cast=True)


@pytest.mark.parametrize("term", [None, 1, b"x", (), [], (b"get_streams", STORE), ([], {}), {}, (1, 2, 3)])
def test_what_is_no_request_at_all_is_an_unknown_request(term: Term) -> None:
    for cast in (True, False):
        assert refused(term, cast=cast)[0] is Atom("unknown_request")


def test_an_unknown_request_says_what_may_have_been_meant() -> None:
    assert refused((Atom("frobnicate"), STORE))[1] == b"there is no call frobnicate"
    assert b"is a cast, not a call" in refused(save(schema.BY_STREAM, b"$all"))[1]
    assert b"is a tuple of 4 or 5 elements, got 2" in refused((Atom("append_events"), STORE))[1]


def test_reads_are_refused_with_the_replies_of_a_real_worker() -> None:
    def get(stream: Term, start: Term, count: Term) -> Term:
        return refused((Atom("get_events"), STORE, stream, start, count, schema.FORWARD))

    assert get(b"s", 0, 0) is Atom("invalid_count")
    assert get(b"s", -1, 0) is Atom("invalid_start_version")
    assert get(b"s", 1.5, 1) == (Atom("invalid_start_version"), 1.5)
    assert get(b"s", 0, Atom("all")) == (Atom("invalid_count"), Atom("all"))
    assert get(b"", 0, 1) == schema.EMPTY_STREAM_NAME


def test_a_huge_count_is_lowered_because_a_real_worker_walks_over_all_of_it() -> None:
    request = accepted((Atom("get_events"), STORE, b"s", 0, 10**18, schema.FORWARD))
    assert request.term[4] == schema.MAX_READ_COUNT


def test_lazy_reads_become_the_reads_of_the_same_events() -> None:
    forward = accepted((Atom("stream_forward"), STORE, b"s", 3, 7))
    assert forward.op == "stream_forward"
    assert forward.term == schema.get_events_request(STORE, "s", 3, 7)
    backward = accepted((Atom("stream_backward"), STORE, b"s", 3, 7))
    assert backward.term == schema.get_events_request(STORE, "s", 3, 7, schema.BACKWARD)


def test_a_request_says_what_the_router_needs_to_know() -> None:
    append = accepted(schema.append_events_request(STORE, "order-1", [NewEvent("t", 1)], 3))
    assert (append.op, append.store, append.stream) == ("append_events", STORE, b"order-1")
    assert (append.is_write, append.is_cast, append.idempotent) == (True, False, False)
    read = accepted(schema.get_version_request(STORE, "order-1"))
    assert (read.is_write, read.idempotent, read.stream) == (False, True, b"order-1")
    stores = accepted(schema.list_stores_request())
    assert (stores.store, stores.stream) == (None, None)
    cast = accepted(schema.ack_event_cast(STORE, "n", PID, "order-1", 4), cast=True)
    assert (cast.is_cast, cast.is_write, cast.idempotent) == (True, True, False)


@pytest.mark.parametrize(
    ("term", "cast"),
    [
        (schema.append_events_request(STORE, "s", [], "any"), False),
        (schema.append_events_request(STORE, "s", [], "stream_exists"), False),
        (schema.append_events_request(STORE, "s", [], -7), False),
        (schema.get_events_request(STORE, "ström/$all", 0, 1), False),
        (schema.get_version_request(STORE, ""), False),
        (schema.store_request("get_streams", STORE), False),
        (schema.store_request("verify_cluster_consistency", STORE), False),
        (schema.read_snapshot_request(STORE, "a", "b", 0), False),
        (schema.list_snapshots_request(STORE), False),
        (schema.list_snapshots_request(STORE, "a"), False),
        (schema.record_snapshot_cast(STORE, "a", "b", 1, Snapshot("a", 1, "Order", {})), True),
        (schema.record_snapshot_cast(STORE, "a", "b", 1, b"anything"), True),
        (schema.delete_snapshot_cast(STORE, "a", "b", 9_999_999_999), True),
        (schema.save_subscription_cast(STORE, Subscription(schema.BY_STREAM, "$all", "n", 0, PID)), True),
        (schema.save_subscription_cast(STORE, Subscription(schema.BY_EVENT_PAYLOAD, {b"how": b"card"}, "n")), True),
        (schema.remove_subscription_cast(STORE, schema.BY_EVENT_TYPE, "paid:v1", "n"), True),
    ],
)
def test_what_the_constructors_build_is_accepted(term: Term, cast: bool) -> None:
    assert accepted(term, cast=cast).term == term


def test_a_refusal_never_repeats_a_payload_and_stays_short() -> None:
    secret = b"s3cret" * 10_000
    for event in (secret, {schema.DATA: secret}, [secret], (secret,), 10**100_000):
        assert len(why((Atom("append_events"), STORE, b"s", [event]))) < 200
    reason = refused((Atom("x" * 255), 1))
    assert len(reason[1]) < 200


terms = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=8)
    | st.sampled_from([STORE, schema.ANY, schema.FORWARD, schema.BY_STREAM, PID, EVENT]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.binary(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from([*schema._CALLS, *schema._CASTS]), st.data(), st.booleans())
def test_any_arguments_are_accepted_or_refused_and_refusals_can_be_sent(
    known: tuple[Atom, int], data: st.DataObject, cast: bool
) -> None:
    name, size = known
    request = (name, *(data.draw(terms) for _ in range(size - 1)))
    checked = check_request(request, cast=cast)
    if isinstance(checked, Rejected):
        etf.encode(checked.reply)
    else:
        assert checked.is_cast == cast


REQUEST = accepted(schema.append_events_request(STORE, "s", [], 3))


@pytest.mark.parametrize(
    ("reason", "kind", "text"),
    [
        (schema.wrong_expected_version(7), errors.WrongExpectedVersion, "expected version 3, found version 7"),
        (Atom("wrong_expected_version"), errors.WrongExpectedVersion, "found another version"),
        (schema.invalid_request("no"), errors.InvalidRequest, "no"),
        (schema.unknown_request("what"), errors.InvalidRequest, "what"),
        (Atom("invalid_count"), errors.InvalidRequest, "invalid_count"),
        ((Atom("invalid_count"), 1.5), errors.InvalidRequest, "count 1.5"),
        (schema.store_not_found(STORE), errors.StoreNotFound, "reg_gh"),
        (schema.no_worker_available(STORE), errors.NoWorkerAvailable, "reg_gh"),
        (schema.call_timeout(1500), errors.CallTimeout, "no answer within 1.5 s"),
        (schema.worker_died(Atom("killed")), errors.WorkerDied, "killed"),
        (schema.unknown_outcome("worker died"), errors.UnknownOutcome, "worker died"),
        (schema.OVERLOADED, errors.Overloaded, "overloaded"),
        (schema.DRAINING, errors.Draining, "draining"),
        (schema.storage_failed("disk full"), errors.RequestFailed, "disk full"),
        (schema.EMPTY_STREAM_NAME, errors.InvalidRequest, "append_events: the stream has an empty name"),
        ((Atom("khepri"), 1, {}), errors.RequestFailed, "append_events failed"),
    ],
)
def test_an_error_reason_becomes_its_exception(reason: Term, kind: type[Exception], text: str) -> None:
    for request in (REQUEST, REQUEST.term):
        problem = schema.exception_for(reason, request)
        assert type(problem) is kind
        assert text in str(problem)


@pytest.mark.parametrize(
    "reason",
    [
        schema.wrong_expected_version(7),
        Atom("wrong_expected_version"),
        schema.invalid_request("no"),
        schema.store_not_found(STORE),
        schema.no_worker_available(STORE),
        schema.call_timeout(1500),
        schema.worker_died(Atom("killed")),
        schema.unknown_outcome("worker died"),
        schema.OVERLOADED,
        schema.DRAINING,
        schema.storage_failed("disk full"),
    ],
)
def test_an_exception_becomes_its_error_reason_again(reason: Term) -> None:
    assert schema.reason_for(schema.exception_for(reason, REQUEST)) == reason


def test_a_missing_snapshot_is_recognised() -> None:
    _, reason = term_of(exchange("read a missing snapshot"), "reply")
    assert schema.is_not_found(reason)
    assert schema.is_not_found(Atom("not_found"))
    assert not schema.is_not_found(schema.OVERLOADED)
    path = [schema.SNAPSHOTS, b"agg-1", b"order-1", schema.snapshot_version_key(3)]
    assert schema.node_not_found(path, is_target=True) == reason


def test_a_wrong_version_is_recognised_in_both_shapes() -> None:
    assert schema.is_wrong_expected_version(schema.wrong_expected_version(1))
    assert schema.is_wrong_expected_version(Atom("wrong_expected_version"))
    assert not schema.is_wrong_expected_version((Atom("khepri"), Atom("x"), {}))
