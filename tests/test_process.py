"""Processes of one node and of two: links, monitors, exit signals, aliases, mailboxes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from node_kit import Collector, Counter, running, two_nodes, unique_name, wait_until

from gater.erl import Node
from gater.erl.errors import NodeError
from gater.erl.gen_server import GEN_CALL, GEN_CAST, SYSTEM, Caller, call, start_server
from gater.erl.process import DOWN, EXIT, KILL, KILLED, NOCONNECTION, NOPROC, NORMAL, PROCESS, Mailbox, Stop
from gater.erl.terms import Atom, Pid, Term

OOPS, GET = Atom("oops"), Atom("get")


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running(unique_name()) as (node,):
        yield node


@pytest.fixture(params=["same node", "two nodes"])
async def places(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Node, Node]]:
    """Where two processes live: what holds between processes holds on one node and across two."""
    async with two_nodes() as (one, two):
        if request.param == "two nodes":
            await one.connect(two.name)
            yield one, two
        else:
            yield one, one


# Links


async def test_a_link_carries_the_exit_reason(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    there.process.exit(OOPS)
    assert await here.ended() is OOPS


async def test_a_link_works_from_both_ends(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    here.process.exit(OOPS)
    assert await there.ended() is OOPS


async def test_a_trapped_exit_becomes_a_message(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0], trap_exit=True), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    there.process.exit(NORMAL)
    assert await here.next() == (EXIT, there.process.pid, NORMAL)
    assert here.process.alive


async def test_a_normal_exit_does_not_end_linked_processes(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    there.process.exit(NORMAL)
    await wait_until(lambda: there.process.pid not in here.process.links)
    assert here.process.alive


async def test_kill_through_a_link_is_an_ordinary_reason(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0], trap_exit=True), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    there.process.exit(KILL)
    assert await here.next() == (EXIT, there.process.pid, KILL)


async def test_an_unlinked_process_hears_nothing(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0], trap_exit=True), Collector(places[1])
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links)
    here.process.unlink(there.process.pid)
    there.process.exit(OOPS)
    reference = here.process.monitor(there.process.pid)
    assert await here.next() == (DOWN, reference, PROCESS, there.process.pid, NOPROC)
    assert here.messages == []
    await wait_until(lambda: not here.process.unlinking)


async def test_a_link_can_be_made_again_after_an_unlink(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0], trap_exit=True), Collector(places[1])
    here.process.link(there.process.pid)
    here.process.unlink(there.process.pid)
    here.process.link(there.process.pid)
    await wait_until(lambda: here.process.pid in there.process.links and not here.process.unlinking)
    there.process.exit(OOPS)
    assert await here.next() == (EXIT, there.process.pid, OOPS)


async def test_a_link_to_nobody_answers_noproc(places: tuple[Node, Node]) -> None:
    here = Collector(places[0], trap_exit=True)
    nobody = Pid(places[1].name, 123_456, 0, places[1].creation)
    here.process.link(nobody)
    assert here.messages == []
    assert await here.next() == (EXIT, nobody, NOPROC)


async def test_a_link_to_oneself_is_none(node: Node) -> None:
    me = Collector(node)
    me.process.link(me.process.pid)
    assert me.process.links == set()
    me.process.exit(OOPS)
    assert me.reason is OOPS


async def test_a_long_chain_of_links_falls_without_recursion(node: Node) -> None:
    chain = [Collector(node) for _ in range(5_000)]
    for one, next_one in itertools.pairwise(chain):
        one.process.link(next_one.process.pid)
    chain[0].process.exit(OOPS)
    assert all(each.reason is OOPS for each in chain)


async def test_a_broken_connection_breaks_links_and_monitors() -> None:
    async with two_nodes() as (one, two):
        here, there = Collector(one, trap_exit=True), Collector(two)
        here.process.link(there.process.pid)
        reference = here.process.monitor(there.process.pid)
        await wait_until(lambda: here.process.pid in there.process.links and there.process.monitored_by)
        one.disconnect(two.name)
        messages = [await here.next(), await here.next()]
        assert (EXIT, there.process.pid, NOCONNECTION) in messages
        assert (DOWN, reference, PROCESS, there.process.pid, NOCONNECTION) in messages
        assert await there.ended() is NOCONNECTION


# Exit signals


async def test_kill_cannot_be_trapped(places: tuple[Node, Node]) -> None:
    target = Collector(places[1], trap_exit=True)
    places[0].exit(target.process.pid, KILL)
    assert await target.ended() is KILLED


async def test_a_trapped_exit_signal_becomes_a_message(places: tuple[Node, Node]) -> None:
    target = Collector(places[1], trap_exit=True)
    places[0].exit(target.process.pid, OOPS)
    assert await target.next() == (EXIT, places[0].client.pid, OOPS)


async def test_exit_normal_from_another_process_is_ignored(places: tuple[Node, Node]) -> None:
    target = Collector(places[1])
    places[0].exit(target.process.pid, NORMAL)
    places[0].send(target.process.pid, Atom("after"))
    assert await target.next() is Atom("after")


async def test_exit_normal_from_oneself_ends_the_process(node: Node) -> None:
    me = Collector(node)
    node.exit(me.process.pid, NORMAL, me.process.pid)
    assert await me.ended() is NORMAL


async def test_a_failing_terminate_changes_nothing_for_the_others(node: Node) -> None:
    class Failing(Collector):
        def terminate(self, reason: object) -> None:
            raise RuntimeError("terminate fails")

    watcher, failing = Collector(node), Failing(node, "failing")
    reference = watcher.process.monitor(failing.process.pid)
    failing.process.exit(OOPS)
    assert await watcher.next() == (DOWN, reference, PROCESS, failing.process.pid, OOPS)
    assert node.whereis("failing") is None


# Monitors


async def test_a_monitor_by_pid_names_the_pid(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    reference = here.process.monitor(there.process.pid)
    await wait_until(lambda: there.process.monitored_by)
    there.process.exit(OOPS)
    assert await here.next() == (DOWN, reference, PROCESS, there.process.pid, OOPS)


async def test_a_monitor_by_name_names_name_and_node(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1], "target")
    reference = here.process.monitor((Atom("target"), places[1].name))
    await wait_until(lambda: there.process.monitored_by)
    there.process.exit(OOPS)
    assert await here.next() == (DOWN, reference, PROCESS, (Atom("target"), places[1].name), OOPS)


async def test_a_monitor_on_nobody_answers_noproc(places: tuple[Node, Node]) -> None:
    here = Collector(places[0])
    reference = here.process.monitor((Atom("nobody"), places[1].name))
    assert here.messages == []
    assert await here.next() == (DOWN, reference, PROCESS, (Atom("nobody"), places[1].name), NOPROC)


async def test_a_monitor_on_an_unknown_node_answers_noconnection(node: Node) -> None:
    here = Collector(node)
    away = Atom("nobody_there@127.0.0.1")
    reference = here.process.monitor((Atom("name"), away))
    assert await here.next() == (DOWN, reference, PROCESS, (Atom("name"), away), NOCONNECTION)


async def test_a_demonitored_process_ends_unheard(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    reference = here.process.monitor(there.process.pid)
    assert here.process.demonitor(reference)
    assert not here.process.demonitor(reference)
    await wait_until(lambda: not there.process.monitored_by)
    there.process.exit(OOPS)
    second = here.process.monitor(there.process.pid)
    assert await here.next() == (DOWN, second, PROCESS, there.process.pid, NOPROC)


async def test_the_monitors_of_a_process_end_with_it(places: tuple[Node, Node]) -> None:
    here, there = Collector(places[0]), Collector(places[1])
    here.process.monitor(there.process.pid)
    await wait_until(lambda: there.process.monitored_by)
    here.process.exit(NORMAL)
    await wait_until(lambda: not there.process.monitored_by)


# Aliases


async def test_messages_to_an_alias_arrive_until_it_is_closed(places: tuple[Node, Node]) -> None:
    me = Collector(places[0])
    alias = me.process.alias()
    places[1].send(alias, 1)
    places[1].send(alias, 2)
    assert [await me.next(), await me.next()] == [1, 2]
    assert me.process.unalias(alias)
    assert not me.process.unalias(alias)
    places[1].send(alias, 3)
    places[1].send(me.process.pid, 4)
    assert await me.next() == 4


async def test_a_reply_alias_takes_one_message(places: tuple[Node, Node]) -> None:
    me = Collector(places[0])
    alias = me.process.alias(reply=True)
    for message in (1, 2):
        places[1].send(alias, message)
    places[1].send(me.process.pid, 3)
    assert [await me.next(), await me.next()] == [1, 3]
    assert me.process.aliases == set()


async def test_an_alias_of_a_monitor_ends_as_its_mode_says(node: Node) -> None:
    me, other = Collector(node), Collector(node)
    pid = other.process.pid
    reply = me.process.monitor(pid, alias="reply_demonitor")
    node.send(reply, "answer")
    assert await me.next() == "answer"
    assert not other.process.monitored_by
    assert me.process.aliases == set()
    tied = me.process.monitor(pid, alias="demonitor")
    me.process.demonitor(tied)
    assert me.process.aliases == set()
    kept = me.process.monitor(pid, alias="explicit_unalias")
    me.process.demonitor(kept)
    node.send(kept, "still there")
    assert await me.next() == "still there"
    again = me.process.monitor(pid, alias="demonitor")
    other.process.exit(OOPS)
    assert (await me.next())[1] == again
    assert me.process.aliases == {kept}


async def test_the_aliases_of_a_process_end_with_it(node: Node) -> None:
    me = Collector(node)
    alias = me.process.alias()
    me.process.exit(NORMAL)
    assert node.alias(alias) is None


# Names and messages


async def test_a_name_belongs_to_one_process_at_a_time(node: Node) -> None:
    first = Collector(node, "name")
    with pytest.raises(NodeError, match="taken"):
        Collector(node, "name")
    first.process.exit(NORMAL)
    second = Collector(node, "name")
    assert node.whereis("name") is second.process
    assert node.unregister("name")
    assert not node.unregister("name")
    with pytest.raises(NodeError, match="has ended"):
        node.register("name", first.process)


async def test_messages_arrive_in_order_and_what_cannot_arrive_is_dropped(places: tuple[Node, Node]) -> None:
    target = Collector(places[1], "target")
    dead = Collector(places[1])
    dead.process.exit(NORMAL)
    for number in range(100):
        places[0].send((Atom("target"), places[1].name), number)
        places[0].send(dead.process.pid, number)
        places[0].send((Atom("nobody"), places[1].name), number)
        places[0].send(target.process.pid, -number)
    await wait_until(lambda: len(target.messages) == 200)
    assert target.messages == [signed for number in range(100) for signed in (number, -number)]


async def test_a_timer_sends_when_due_and_not_when_cancelled(node: Node) -> None:
    me = Collector(node)
    cancelled = me.process.send_after(0.001, me.process.pid, "cancelled")
    cancelled.cancel()
    me.process.send_after(0.002, me.process.pid, "due")
    assert await me.next() == "due"


async def test_one_message_is_handled_at_a_time(node: Node) -> None:
    seen: list[object] = []
    release = asyncio.Event()

    async def slow(message: object) -> None:
        seen.append(("begin", message))
        await release.wait()
        seen.append(("end", message))

    process = node.spawn_receiver(_Handler(slow))
    node.send(process.pid, 1)
    node.send(process.pid, 2)
    await wait_until(lambda: seen)
    assert seen == [("begin", 1)]
    release.set()
    await wait_until(lambda: len(seen) == 4)
    assert seen == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]


async def test_an_exit_cancels_the_handler_that_runs(node: Node) -> None:
    cancelled = asyncio.Event()

    async def slow(message: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    process = node.spawn_receiver(_Handler(slow))
    node.send(process.pid, 1)
    await wait_until(lambda: process._task is not None)
    await asyncio.sleep(0)
    process.exit(OOPS)
    async with asyncio.timeout(5):
        await cancelled.wait()


class _Handler:
    def __init__(self, handle: object) -> None:
        self.receive = handle

    def terminate(self, reason: object) -> None:
        return None


# Coroutines with selective receive


async def test_a_mailbox_receives_selectively_and_keeps_the_rest_in_order(node: Node) -> None:
    got: list[object] = []

    async def main(me: Mailbox) -> None:
        got.append(await me.get(lambda message: message == 3))
        got.extend([await me.get(), await me.get()])
        with pytest.raises(TimeoutError):
            await me.get(timeout_s=0.001)
        got.append("done")

    process = node.spawn(main)
    for number in (1, 2, 3):
        node.send(process.pid, number)
    await wait_until(lambda: not process.alive)
    assert got == [3, 1, 2, "done"]


@pytest.mark.parametrize(("ending", "reason"), [(None, NORMAL), (Stop(OOPS), OOPS)])
async def test_the_end_of_a_mailbox_coroutine_is_the_end_of_its_process(
    node: Node, ending: Exception | None, reason: Atom
) -> None:
    async def main(me: Mailbox) -> None:
        await me.get()
        if ending is not None:
            raise ending

    watcher = Collector(node)
    process = node.spawn(main)
    watcher.process.monitor(process.pid)
    node.send(process.pid, "go")
    assert (await watcher.next())[4] is reason


async def test_an_exit_signal_cancels_a_mailbox_coroutine(node: Node) -> None:
    ended = asyncio.Event()

    async def main(me: Mailbox) -> None:
        try:
            await me.get()
        finally:
            ended.set()

    process = node.spawn(main)
    await asyncio.sleep(0)
    node.exit(process.pid, OOPS)
    async with asyncio.timeout(5):
        await ended.wait()
    assert not process.alive


def never(message: Term) -> bool:
    return False


async def busy(server: Counter) -> None:
    """Have `server` handle a call for as long as it lives."""

    async def for_ever(request: Term, caller: Caller) -> Term:
        await asyncio.Event().wait()

    server.handle_call = for_ever  # type: ignore[method-assign]
    server.process.deliver((GEN_CALL, (server.pid, 1), GET))
    await wait_until(lambda: not server.process.queue_length())


@pytest.mark.changes_source
async def test_a_process_that_lets_too_many_messages_wait_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.erl.process.MAX_MAILBOX_MESSAGES", 100)
    monkeypatch.setattr("gater.erl.gen_server.MAX_SUSPENDED_MESSAGES", 100)
    slow, suspended = Counter(), Counter()
    for server in (slow, suspended):
        await start_server(node, server)
    await busy(slow)
    suspended.process.deliver((SYSTEM, (node.client.pid, 1), Atom("suspend")))
    selective = node.spawn(lambda me: me.get(never))
    await wait_until(lambda: not suspended.process.queue_length())
    watcher = Collector(node)
    for process in (slow.process, suspended.process, selective):
        watcher.process.monitor(process.pid)
        for number in range(100):
            process.deliver((GEN_CAST, number))
        await wait_until(lambda process=process: process.queue_length() == 100)
        assert process.alive
        process.deliver((GEN_CAST, 100))
        process.deliver((GEN_CAST, 101))
        assert (await watcher.next())[4] is Atom("mailbox_limit")


async def test_messages_that_a_receiver_sets_aside_are_in_its_queue_in_order(node: Node) -> None:
    release = asyncio.Event()

    async def main(me: Mailbox) -> None:
        await me.get(lambda message: message == 3)
        await release.wait()

    process = node.spawn(main)
    for number in range(5):
        node.send(process.pid, number)
    await wait_until(lambda: process.queue_length() == 4)
    assert process.messages() == [0, 1, 2, 4]
    release.set()
    await wait_until(lambda: not process.alive)


MALFORMED = [
    (GEN_CALL,),
    (GEN_CALL, 1, 2),
    (GEN_CALL, (1, 2), 3),
    (GEN_CALL, (), 3),
    (GEN_CAST,),
    (GEN_CAST, 1, 2),
    (SYSTEM, 1, Atom("get_state")),
    (SYSTEM, (Atom("x"), 1), (Atom("terminate"), 1)),
    (),
    [],
    {},
    b"",
    None,
    7,
]


async def test_what_only_looks_like_a_call_is_a_plain_message() -> None:
    async with two_nodes() as (one, two):
        server = Counter()
        await start_server(two, server)
        for message in MALFORMED:
            one.send(server.pid, message)
        assert await call(one, server.pid, GET) == 0
        assert server.infos == MALFORMED


async def test_odd_system_messages_are_answered_and_the_server_lives(node: Node) -> None:
    server = Counter()
    await start_server(node, server)
    me = Collector(node)
    odd = [(), 7, Atom("nonsense"), (Atom("replace_state"),), (Atom("replace_state"), 1, 2), (7, 8), [Atom("suspend")]]
    for request in odd:
        server.process.deliver((SYSTEM, (me.process.pid, 1), request))
        assert await me.next() == (1, (Atom("error"), (Atom("unknown_system_msg"), request)))
    assert await call(node, server.pid, GET) == 0
