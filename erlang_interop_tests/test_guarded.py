"""The expression of the guarded append, evaluated by real nodes: on the stand-in, and where Khepri repeats commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from erlang_interop_tests.beam import BeamNode, Beams
from erlang_interop_tests.standin import DEFAULT_STORE, StandInCluster
from gater.api import guarded
from gater.api.schema import NewEvent
from gater.erl.etf import decode, encode, encode_term
from gater.erl.terms import Atom, EncodedTerm, Term

STORE = Atom(DEFAULT_STORE)
STREAM = b"stream"
TIMEOUT_MS = 1_000
OK, WRITTEN, REFUSED, AHEAD, FAILED = Atom("ok"), Atom("written"), Atom("refused"), Atom("ahead"), Atom("failed")

_EVALUATE = """
{:ok, tokens, _} = :erl_scan.string(String.to_charlist(source))
{:ok, forms} = :erl_parse.parse_exprs(tokens)
bindings = [Again: again, Events: events, First: first, Mine: mine, Store: store, Stream: stream, TimeoutMs: timeout_ms]

try do
  :erl_eval.exprs(forms, bindings)
catch
  thrown -> thrown
end
"""

_EVALUATE_FIRST = """
{:ok, tokens, _} = :erl_scan.string(String.to_charlist(source))
{:ok, forms} = :erl_parse.parse_exprs(tokens)

try do
  :erl_eval.exprs(forms, bindings)
catch
  thrown -> thrown
end
"""


async def first_attempt(
    node: BeamNode, first: int, *events: Term, wanted: bool = True, timeout_ms: int = TIMEOUT_MS
) -> Any:
    """What the expression of a first attempt throws, with its records decoded."""
    forms = guarded.Forms(*(EncodedTerm(encode_term(None)) for _ in guarded.Forms._fields))
    encoded = EncodedTerm(encode_term(list(events)))
    _, _, (form, bindings) = guarded.first_call(
        forms, STORE, STREAM, encoded, first, len(events), wanted=wanted, timeout_ms=timeout_ms
    )
    source = guarded.QUICK if form is forms.quick else guarded.BATCH
    outcome, number, *records = await node.eval(_EVALUATE_FIRST, source=source.encode(), bindings=bindings)
    return outcome, number, *([record and decode(record) for record in each] for each in records)


async def write(
    node: BeamNode,
    first: int,
    *events: Term,
    again: bool = False,
    mine: Sequence[Term] = (),
    timeout_ms: int = TIMEOUT_MS,
) -> Any:
    """What the expression throws."""
    return await node.eval(
        _EVALUATE,
        source=guarded.SOURCE.encode(),
        again=again,
        mine=list(mine),
        events=list(events),
        first=first,
        store=STORE,
        stream=STREAM,
        timeout_ms=timeout_ms,
    )


def event(name: str, data: Term = None) -> Term:
    return NewEvent("counted:v1", data, {b"by": b"test"}, event_id=name).to_term()


async def stored(cluster: StandInCluster) -> list[Any]:
    return await cluster.events(STREAM.decode())


async def ids(cluster: StandInCluster) -> list[bytes]:
    return [each[Atom("event_id")] for each in await cluster.events(STREAM.decode())]


async def test_events_are_written_one_after_the_other(standin: StandInCluster) -> None:
    node = standin.members[0]
    assert await write(node, 0, event("a"), event("b")) == (WRITTEN, 1)
    assert await write(node, 2, event("c")) == (WRITTEN, 2)
    assert await ids(standin) == [b"a", b"b", b"c"]


async def test_a_first_attempt_answers_what_it_has_stored(standin: StandInCluster) -> None:
    node = standin.members[0]
    for number, name in enumerate(("a", "b")):
        assert await first_attempt(node, number, event(name)) == (OK, number, (await stored(standin))[number:])
    assert await first_attempt(node, 2, event("c"), event("d"), event("e")) == (OK, 4, (await stored(standin))[2:])
    assert await ids(standin) == [b"a", b"b", b"c", b"d", b"e"]
    written = await first_attempt(node, 5, *(event(f"{number}") for number in range(300)))
    assert written == (OK, 304, (await stored(standin))[5:])


async def test_records_that_nobody_wants_are_not_sent_unless_they_are_small(standin: StandInCluster) -> None:
    node = standin.members[0]
    assert await first_attempt(node, 0, event("a"), wanted=False) == (OK, 0, await stored(standin))
    large = event("b", b"x" * guarded.SMALL_BYTES)
    assert await first_attempt(node, 1, large, wanted=False) == (OK, 1, [b""])
    assert await first_attempt(node, 2, event("c"), event("d"), wanted=False) == (OK, 3, [b"", b""])
    problem, number, [mine] = await first_attempt(node, 1, large, wanted=False)
    assert (guarded.is_refusal(problem), number, mine[Atom("event_id")]) == (True, 1, b"b")
    assert await ids(standin) == [b"a", b"b", b"c", b"d"]


async def test_a_first_attempt_stops_where_somebody_elses_event_is(standin: StandInCluster) -> None:
    node = standin.members[0]
    await write(node, 0, event("a"), event("theirs"))
    problem, number, [mine] = await first_attempt(node, 1, event("x"))
    assert guarded.is_refusal(problem)
    assert (number, mine[Atom("event_id")], mine[Atom("event_number")]) == (1, b"x", 1)
    assert await write(node, 1, event("x"), mine=[encode(mine)]) == (REFUSED, 1, 2)
    for events in ([event("x")], [event("x"), event("y")]):
        problem, number, _ = await first_attempt(node, 5, *events)
        assert (guarded.is_refusal(problem), number) == (True, 5)
    assert await ids(standin) == [b"a", b"theirs"]


async def test_a_first_attempt_with_several_events_stops_in_the_middle(standin: StandInCluster) -> None:
    """Khepri refuses what only a writer without conditions can have put there."""
    node = standin.members[0]
    await write(node, 0, event("a"))
    await node.eval(
        ':ok = :khepri.put(store, [:streams, stream, "000002"], %{event_id: "theirs"})', store=STORE, stream=STREAM
    )
    # The stream has two events then, the second of them of number 2.
    problem, number, [mine] = await first_attempt(node, 2, event("x"), event("y"))
    assert (guarded.is_refusal(problem), number, mine[Atom("event_id")]) == (True, 2, b"x")
    await node.eval(
        ':ok = :khepri.delete(store, [:streams, stream, "000002"])\n'
        ':ok = :khepri.put(store, [:streams, stream, "000003"], %{event_id: "theirs"})',
        store=STORE,
        stream=STREAM,
    )
    problem, number, [mine] = await first_attempt(node, 2, event("x"), event("y"), event("z"))
    assert (guarded.is_refusal(problem), number, mine[Atom("event_id")]) == (True, 3, b"y")
    assert b"x" in await ids(standin)
    assert b"z" not in await ids(standin)


async def test_records_equal_those_of_the_workers_own_appends(standin: StandInCluster) -> None:
    await write(standin.members[0], 0, event("a", {1: [2.5]}))
    assert await standin.call((Atom("append_events"), STORE, STREAM, 0, [event("a", {1: [2.5]})])) == (Atom("ok"), 1)
    ours, theirs = await standin.events(STREAM.decode())
    assert ours.keys() == theirs.keys()
    different = {key.name for key in ours if ours[key] != theirs[key]}
    assert different == {"event_number", "created", "created_epoch"}
    assert ours[Atom("created")].keys() == theirs[Atom("created")].keys()


async def test_the_number_of_somebody_elses_event_is_refused(standin: StandInCluster) -> None:
    node = standin.members[0]
    await write(node, 0, event("a"), event("b"))
    for again in (False, True):
        assert await write(node, 0, event("x"), again=again) == (REFUSED, 0, 2)
        assert await write(node, 1, event("x"), event("y"), again=again) == (REFUSED, 1, 2)
    assert await ids(standin) == [b"a", b"b"]


async def test_a_number_the_stream_does_not_reach_is_out_of_reach(standin: StandInCluster) -> None:
    node = standin.members[0]
    assert await write(node, 5, event("x")) == (AHEAD, 5, 0)
    await write(node, 0, event("a"))
    assert await write(node, 5, event("x"), again=True) == (AHEAD, 5, 1)
    assert await ids(standin) == [b"a"]


async def test_what_an_earlier_attempt_has_stored_is_not_stored_twice(standin: StandInCluster) -> None:
    node = standin.members[0]
    batch = [event(name, {b"of": name.encode()}) for name in "abc"]
    await write(node, 0, *batch[:2])
    assert await write(node, 0, *batch, again=True) == (WRITTEN, 2)
    assert await write(node, 0, *batch, again=True) == (WRITTEN, 2)
    assert await write(node, 0, *batch) == (REFUSED, 0, 3)
    assert await ids(standin) == [b"a", b"b", b"c"]


async def test_another_event_with_the_same_id_is_not_taken_for_ours(standin: StandInCluster) -> None:
    node = standin.members[0]
    await write(node, 0, event("a", 1))
    assert await write(node, 0, event("a", 2), again=True) == (REFUSED, 0, 1)


async def test_a_batch_stops_where_somebody_elses_event_is(standin: StandInCluster) -> None:
    node = standin.members[0]
    await write(node, 0, event("a"), event("theirs"))
    assert await write(node, 0, event("a"), event("b"), event("c"), again=True) == (REFUSED, 1, 2)
    assert await ids(standin) == [b"a", b"theirs"]


@pytest.mark.parametrize("attempt", [first_attempt, write])
async def test_a_batch_stops_by_itself_when_its_time_is_up(standin: StandInCluster, attempt: Any) -> None:
    node = standin.members[0]
    batch = [event(str(number)) for number in range(4_000)]
    late, number = await attempt(node, 0, *batch, timeout_ms=20)
    assert (late, len(await ids(standin))) == (Atom("late"), number)
    assert number < len(batch)


async def test_without_a_majority_nobody_knows(standin_of_three: StandInCluster) -> None:
    cluster = standin_of_three
    await cluster.kill(1)
    await cluster.kill(2)
    outcome = await write(cluster.members[0], 0, event("a"))
    assert outcome[0] is FAILED


_REPEATING_KHEPRI = """
defmodule :khepri do
  # A put that was carried out, and whose answer is that of its repetition (Khepri sends again when a leader goes down).
  def put(_, path, record, _) do
    number = path |> List.last() |> elem(1) |> hd()

    case :ets.lookup(:stored, number) do
      [] -> :ets.insert(:stored, {number, record})
      _ -> :ok
    end

    {:error, {:khepri, :mismatching_node, %{}}}
  end

  def fence(_, _), do: :ok
  def get(_, path), do: {:ok, :ets.lookup_element(:stored, List.last(path), 2)}
end

defmodule :khepri_adv do
  def get_many(_, path, _), do: {:ok, %{path => %{child_list_length: :ets.info(:stored, :size)}}}
end

defmodule ExESDB.StreamsHelper do
  def to_event_record(event, stream, number, created, epoch),
    do: Map.merge(event, %{event_stream_id: stream, event_number: number, created: created, created_epoch: epoch})
end

keeper = self()
spawn(fn ->
  :ets.new(:stored, [:named_table, :public])
  send(keeper, :made)
  Process.sleep(:infinity)
end)
receive do: (:made -> :ok)
"""


@pytest.fixture
async def repeating(beam: Beams) -> BeamNode:
    """A node with a store whose Khepri carries out every put and then answers that it was refused."""
    node = await beam.start("elixir")
    await node.eval(_REPEATING_KHEPRI)
    return node


async def test_streams_may_have_more_events_than_their_names_have_digits(repeating: BeamNode) -> None:
    assert await write(repeating, 999_999, event("a"), event("b")) == (WRITTEN, 1_000_000)
    stored = await repeating.eval("for {name, record} <- :ets.tab2list(:stored), do: {name, record.event_number}")
    assert sorted(stored) == [(b"1000000", 1_000_000), (b"999999", 999_999)]


async def test_a_put_that_khepri_repeated_is_known_by_its_record(repeating: BeamNode) -> None:
    assert await write(repeating, 0, event("a"), event("b")) == (WRITTEN, 1)
    # Of another evaluation it is somebody else's.
    assert await write(repeating, 0, event("a")) == (REFUSED, 0, 2)
    assert await write(repeating, 0, event("a"), again=True) == (WRITTEN, 0)


async def test_a_first_attempt_that_khepri_repeated_is_known_by_its_record(repeating: BeamNode) -> None:
    problem, number, [mine] = await first_attempt(repeating, 0, event("a"))
    assert (guarded.is_refusal(problem), number) == (True, 0)
    assert await write(repeating, 0, event("a"), mine=[encode(mine)]) == (WRITTEN, 0)


async def test_a_first_attempt_that_nobody_answers_has_failed(standin_of_three: StandInCluster) -> None:
    await standin_of_three.kill(1)
    await standin_of_three.kill(2)
    problem, number, _ = await first_attempt(standin_of_three.members[0], 0, event("a"))
    assert (problem is OK, guarded.is_refusal(problem), number) == (False, False, 0)
