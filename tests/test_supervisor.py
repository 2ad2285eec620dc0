"""Supervisors: who is restarted when, in which order, and when they give up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from node_kit import Counter, running, unique_name, wait_until

from gater.erl import Node
from gater.erl.errors import NodeError
from gater.erl.gen_server import GenServer, call, start_server
from gater.erl.process import NORMAL, SHUTDOWN
from gater.erl.supervisor import ChildError, ChildSpec, Restart, Strategy, Supervisor
from gater.erl.terms import Atom

OOPS = Atom("oops")
GET = Atom("get")


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running(unique_name()) as (node,):
        yield node


class Family:
    """A supervisor with children `a`, `b`, `c` and a record of what they did."""

    def __init__(self, node: Node, strategy: Strategy, restart: Restart = "permanent", **options: float) -> None:
        self.node = node
        self.events: list[str] = []
        self.failures_to_come = 0
        self.supervisor = Supervisor(
            [ChildSpec(each, self._starter(each), restart) for each in "abc"],
            strategy=strategy,
            **options,  # type: ignore[arg-type]
        )

    def _starter(self, child: str) -> Callable[[], object]:
        async def start() -> GenServer:
            if self.failures_to_come:
                self.failures_to_come -= 1
                raise RuntimeError("cannot start yet")
            server = _Child(child, self.events)
            await start_server(self.node, server, name=child)
            self.events.append(f"+{child}")
            return server

        return start

    async def start(self) -> Family:
        await start_server(self.node, self.supervisor)
        self.events.clear()
        return self

    def kill(self, child: str, reason: Atom = OOPS) -> None:
        process = self.node.whereis(child)
        assert process is not None
        process.exit(reason)

    async def settled(self, count: int) -> list[str]:
        await wait_until(lambda: len(self.events) >= count)
        # Whatever the supervisor still does, it does before it answers this.
        if self.supervisor.process.alive:
            await call(self.node, self.supervisor.pid, Atom("count_children"))
        return self.events


class _Child(Counter):
    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self._name = name
        self._events = events

    def terminate(self, reason: object) -> None:
        self._events.append(f"-{self._name}")


@pytest.mark.parametrize(
    ("strategy", "events"),
    [
        ("one_for_one", ["-b", "+b"]),
        ("rest_for_one", ["-b", "-c", "+b", "+c"]),
        ("one_for_all", ["-b", "-c", "-a", "+a", "+b", "+c"]),
    ],
)
async def test_a_strategy_says_who_is_restarted(node: Node, strategy: Strategy, events: list[str]) -> None:
    family = await Family(node, strategy).start()
    family.kill("b")
    assert await family.settled(len(events)) == events
    assert {child: await call(node, child, GET) for child in "abc"} == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize(
    ("restart", "reason", "restarted"),
    [
        ("permanent", NORMAL, True),
        ("permanent", OOPS, True),
        ("transient", NORMAL, False),
        ("transient", SHUTDOWN, False),
        ("transient", (SHUTDOWN, OOPS), False),
        ("transient", OOPS, True),
        ("temporary", OOPS, False),
    ],
)
async def test_a_restart_type_says_when(node: Node, restart: Restart, reason: Atom, restarted: bool) -> None:
    family = await Family(node, "one_for_one", restart).start()
    family.kill("b", reason)
    if restarted:
        assert await family.settled(2) == ["-b", "+b"]
    else:
        await wait_until(lambda: family.supervisor.child("b") is None)
        assert family.events == ["-b"]
    assert family.supervisor.process.alive


async def test_temporary_siblings_are_ended_and_not_started_again(node: Node) -> None:
    family = Family(node, "one_for_all")
    family.supervisor = Supervisor(
        [
            ChildSpec("a", family._starter("a")),
            ChildSpec("b", family._starter("b"), "temporary"),
        ],
        strategy="one_for_all",
    )
    await family.start()
    family.kill("a")
    assert await family.settled(3) == ["-a", "-b", "+a"]
    assert node.whereis("b") is None


async def test_too_many_restarts_end_the_supervisor_and_its_children(node: Node) -> None:
    family = await Family(node, "one_for_one", max_restarts=2, max_seconds=60).start()
    for _ in range(2):
        family.kill("b")
        await wait_until(lambda: node.whereis("b"))
    family.kill("b")
    await wait_until(lambda: not family.supervisor.process.alive)
    assert [node.whereis(child) for child in "abc"] == [None, None, None]
    assert family.events[-2:] == ["-c", "-a"]


async def test_restarts_are_forgotten_with_time(node: Node) -> None:
    family = await Family(node, "one_for_one", max_restarts=1, max_seconds=0.0).start()
    for _ in range(5):
        family.kill("b")
        await wait_until(lambda: node.whereis("b"))
    assert family.supervisor.process.alive


async def test_a_start_that_fails_is_tried_again_and_counted(node: Node) -> None:
    family = await Family(node, "one_for_one", max_restarts=3, max_seconds=60).start()
    family.failures_to_come = 2
    family.kill("b")
    assert await family.settled(2) == ["-b", "+b"]
    family.failures_to_come = 100
    family.kill("b")
    await wait_until(lambda: not family.supervisor.process.alive)


async def test_children_end_in_reverse_order_with_their_supervisor(node: Node) -> None:
    family = await Family(node, "one_for_one").start()
    family.supervisor.process.exit(SHUTDOWN)
    assert family.events == ["-c", "-b", "-a"]


async def test_a_child_that_cannot_start_ends_those_before_it(node: Node) -> None:
    family = Family(node, "one_for_one")

    async def fail() -> GenServer:
        raise RuntimeError("never")

    supervisor = Supervisor([ChildSpec("a", family._starter("a")), ChildSpec("x", fail)])
    with pytest.raises(RuntimeError, match="never"):
        await start_server(node, supervisor)
    assert family.events == ["+a", "-a"]


async def test_children_can_be_added(node: Node) -> None:
    family = await Family(node, "one_for_one").start()
    await family.supervisor.start_child(ChildSpec("d", family._starter("d")))
    family.kill("d")
    assert await family.settled(3) == ["+d", "-d", "+d"]
    with pytest.raises(NodeError, match="exists already"):
        await family.supervisor.start_child(ChildSpec("d", family._starter("d")))
    family.failures_to_come = 1
    with pytest.raises(RuntimeError):
        await family.supervisor.start_child(ChildSpec("e", family._starter("e")))
    await family.supervisor.start_child(ChildSpec("e", family._starter("e")))


async def test_a_supervisor_says_whom_it_has(node: Node) -> None:
    family = await Family(node, "one_for_one").start()
    children = await call(node, family.supervisor.pid, Atom("which_children"))
    pids = {child: process.pid for child in "abc" if (process := node.whereis(child))}
    assert children == [(child.encode(), pids[child], Atom("worker"), [Atom("_Child")]) for child in ("c", "b", "a")]
    counts = dict(await call(node, family.supervisor.pid, Atom("count_children")))
    assert {str(kind): count for kind, count in counts.items()} == {
        "specs": 3,
        "active": 3,
        "supervisors": 0,
        "workers": 3,
    }
    assert await call(node, family.supervisor.pid, Atom("nonsense")) == (Atom("error"), Atom("not_supported"))


async def test_a_child_can_be_ended_started_again_and_forgotten(node: Node) -> None:
    family = await Family(node, "one_for_one").start()
    supervisor = family.supervisor
    supervisor.terminate_child("b")
    assert family.events == ["-b"]
    assert supervisor.child("b") is None
    listed = await call(node, supervisor.pid, Atom("which_children"))
    assert (b"b", Atom("undefined"), Atom("worker"), []) in listed
    assert (await supervisor.restart_child("b")) is supervisor.child("b")
    with pytest.raises(ChildError, match="is running"):
        await supervisor.restart_child("b")
    with pytest.raises(ChildError, match="is running"):
        supervisor.delete_child("b")
    supervisor.terminate_child("b")
    supervisor.delete_child("b")
    with pytest.raises(ChildError, match="no child"):
        supervisor.terminate_child("b")
    # One that is ended on purpose is not missed, and a restart of others brings it back only with one_for_all.
    supervisor.terminate_child("a")
    family.kill("c")
    await family.settled(6)
    assert supervisor.child("a") is None


async def test_one_for_all_brings_back_a_child_that_was_ended(node: Node) -> None:
    family = await Family(node, "one_for_all").start()
    family.supervisor.terminate_child("a")
    family.kill("c")
    await wait_until(lambda: all(family.supervisor.child(each) for each in "abc"))


async def test_a_temporary_child_that_is_ended_is_forgotten(node: Node) -> None:
    family = await Family(node, "one_for_one", "temporary").start()
    family.supervisor.terminate_child("a")
    with pytest.raises(ChildError):
        await family.supervisor.restart_child("a")


async def test_a_child_that_cannot_start_again_is_told_so(node: Node) -> None:
    family = await Family(node, "one_for_one").start()
    assert await call(node, family.supervisor.pid, (Atom("terminate_child"), b"a")) is Atom("ok")
    family.failures_to_come = 1
    error, (reason, _) = await call(node, family.supervisor.pid, (Atom("restart_child"), b"a"))
    assert (error, reason) == (Atom("error"), (Atom("python_error"), b"RuntimeError", b"cannot start yet"))
    ok, pid = await call(node, family.supervisor.pid, (Atom("restart_child"), Atom("a")))
    assert (ok, pid) == (Atom("ok"), node.whereis("a").pid)


def test_ids_are_unique() -> None:
    async def start() -> GenServer:
        raise AssertionError

    with pytest.raises(NodeError, match="share an id"):
        Supervisor([ChildSpec("a", start), ChildSpec("a", start)])
