"""Swarm among Python nodes in one process: names, groups, lost connections, what is served by rpc, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from node_kit import COOKIE, Collector, Counter, free_port, unique_name, wait_until

from gater.erl import Node, NodeOptions, etf, make_node, rpc_server
from gater.erl.errors import CallError, EncodeError, ErlangError, NoProcess, ProcessDied
from gater.erl.gen_server import GEN_CAST, call, start_server
from gater.erl.process import NOPROC
from gater.erl.rpc import erpc_call
from gater.erl.supervisor import ChildSpec, Supervisor
from gater.erl.terms import Atom, EncodedTerm, ImproperList, Pid, Term
from gater.swarm.messages import TRACKER, Track, UntrackName
from gater.swarm.registry import Entry
from gater.swarm.snapshots import IncomingList, OutgoingList
from gater.swarm.swarm import AlreadyRegistered, Swarm
from gater.swarm.tracker import TrackerOptions

OK = Atom("ok")
UNDEFINED = Atom("undefined")
QUICK = TrackerOptions(sync_nodes_timeout_s=0.02)


class Member:
    """A node with Swarm."""

    def __init__(self, epmd_port: int, name: str | None = None, options: TrackerOptions = QUICK) -> None:
        self.node = make_node(name or unique_name("member"), cookie=COOKIE, options=NodeOptions(epmd_port=epmd_port))
        self.node.add_application("gater", "", "0")
        self.swarm = Swarm(self.node, options)

    async def start(self) -> Member:
        await self.node.start()
        await self.swarm.start()
        return self

    def names(self) -> dict[Term, Pid]:
        return dict(self.swarm.registered())

    def owner(self, name: Term) -> Term:
        """The node that `name` belongs to."""
        assert self.swarm._peer is not None
        return self.swarm._peer.tracker.strategy.key_to_node(name)

    def process(self) -> Collector:
        return Collector(self.node)

    async def ask(self, other: Member, module: str, function: str, *arguments: Term) -> Term:
        """By rpc, on `other`."""
        return await erpc_call(self.node, other.node.name, module, function, arguments, timeout_s=5)


@asynccontextmanager
async def cluster(
    count: int, options: TrackerOptions = QUICK, *, connected: bool = True
) -> AsyncIterator[list[Member]]:
    port = free_port()
    async with AsyncExitStack() as stack:
        members = []
        for _ in range(count):
            member = await Member(port, options=options).start()
            stack.push_async_callback(member.node.stop)
            members.append(member)
        if connected:
            await meet(*members)
        yield members


async def meet(*members: Member) -> None:
    """Connect all, and wait until they have told each other their registries."""
    for one in members:
        for other in members:
            await one.node.connect(other.node.name)
    await wait_until(
        lambda: all(
            one.swarm.joined and all(one.swarm.is_synced(other.node.name) for other in members if other is not one)
            for one in members
        ),
        "the members to be in step",
    )


async def agree(name: Term, pid: Pid | None, *members: Member) -> None:
    await wait_until(
        lambda: all(member.swarm.whereis(name) == pid for member in members), f"{name!r} to be {pid} everywhere"
    )


# Names


async def test_a_name_is_seen_on_every_member() -> None:
    async with cluster(3) as (one, two, three):
        process = one.process().process
        await one.swarm.register((Atom("worker"), 1), process)
        await agree((Atom("worker"), 1), process.pid, one, two, three)
        assert await two.swarm.find((Atom("worker"), 1)) == process.pid


async def test_who_comes_later_is_told_every_name() -> None:
    async with cluster(2, connected=False) as (one, two):
        for number in range(50):
            await one.swarm.register(number, one.process().process)
            await two.swarm.register(b"name %d" % number, two.process().process)
        await meet(one, two)
        await wait_until(lambda: one.names() == two.names() and len(one.names()) == 100, "all names on both")


async def test_a_process_that_dies_loses_its_names() -> None:
    async with cluster(2) as (one, two):
        process = one.process().process
        await one.swarm.register(b"a", process)
        await one.swarm.register(b"b", process)
        await agree(b"b", process.pid, two)
        process.exit(Atom("boom"))
        await agree(b"a", None, one, two)
        await agree(b"b", None, one, two)


async def test_a_process_that_has_lost_its_name_in_the_same_turn_is_not_monitored() -> None:
    async with cluster(1) as (one,):
        brief, lasting = one.process().process, one.process().process
        replies: list[Term] = []
        one.swarm.ask(Track(b"brief", brief.pid, {}), replies.append)
        one.swarm.ask(UntrackName(b"brief"), replies.append)
        await one.swarm.register(b"lasting", lasting)
        await wait_until(lambda: bool(lasting.monitored_by), "the other process to be monitored")
        assert len(replies) == 2
        assert not brief.monitored_by


async def test_a_name_that_is_unregistered_is_gone_and_the_other_names_stay() -> None:
    async with cluster(2) as (one, two):
        process = one.process().process
        await one.swarm.register(b"a", process)
        await one.swarm.register(b"b", process)
        await agree(b"b", process.pid, two)
        await one.swarm.unregister(b"a")
        await agree(b"a", None, one, two)
        await agree(b"b", process.pid, one, two)


async def test_a_name_that_is_taken_is_refused() -> None:
    async with cluster(2) as (one, two):
        process = one.process().process
        await one.swarm.register(b"a", process)
        await one.swarm.register(b"a", process)
        await agree(b"a", process.pid, two)
        with pytest.raises(AlreadyRegistered) as refused:
            await two.swarm.register(b"a", two.process().process)
        assert refused.value.pid == process.pid


async def test_two_that_registered_one_name_apart_end_with_one_and_the_other_is_told_to_die() -> None:
    async with cluster(2, connected=False) as (one, two):
        first, second = one.process(), two.process()
        await one.swarm.register(b"a", first.process)
        await two.swarm.register(b"a", second.process)
        await meet(one, two)
        await wait_until(lambda: first.messages or second.messages, "one to be told")
        winner = second if first.messages else first
        assert (first.messages or second.messages) == [(Atom("swarm"), Atom("die"))]
        await agree(b"a", winner.process.pid, one, two)


async def test_what_is_no_term_cannot_be_a_name() -> None:
    async with cluster(1) as (one,):
        with pytest.raises(EncodeError):
            await one.swarm.register((Atom("worker"), object()), one.process().process)


# Connections


async def test_names_of_a_lost_node_go_and_come_back_with_it() -> None:
    async with cluster(3) as (one, two, three):
        process = one.process().process
        await one.swarm.register(b"a", process)
        await agree(b"a", process.pid, two, three)
        one.node.disconnect(two.node.name)
        await agree(b"a", None, two)
        assert three.swarm.whereis(b"a") == process.pid
        await meet(one, two, three)
        await agree(b"a", process.pid, one, two, three)


async def test_a_node_that_ends_takes_its_names_with_it() -> None:
    async with cluster(3) as (one, two, three):
        process = one.process().process
        await one.swarm.register(b"a", process)
        await agree(b"a", process.pid, two, three)
        await one.node.stop()
        await agree(b"a", None, two, three)
        assert one.node.name not in two.swarm.members_of_cluster


async def test_a_node_without_swarm_is_no_member() -> None:
    async with (
        cluster(1) as (one,),
        make_node(
            unique_name("plain"), cookie=COOKIE, options=NodeOptions(epmd_port=one.node.options.epmd_port)
        ) as plain,
    ):
        await plain.connect(one.node.name)
        await wait_until(lambda: plain.name in one.node.nodes(), "the connection")
        process = one.process().process
        await one.swarm.register(b"a", process)
        assert one.swarm.members_of_cluster == []


async def test_a_node_that_does_not_say_what_it_runs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gater.swarm.peer.ASK_AGAIN_S", (0.01, 0.02))
    async with cluster(1) as (one,):
        answers: list[Any] = [ErlangError(Atom("not_yet")), ErlangError(Atom("not_yet"))]
        slow = Node(unique_name("slow"), cookie=COOKIE, options=NodeOptions(epmd_port=one.node.options.epmd_port))
        rpc_server.install(slow)

        def which_applications() -> Term:
            if answers:
                raise answers.pop()
            return [(Atom("swarm"), [], []), (Atom("gater"), [], [])]

        slow.exports.add("application", "which_applications", which_applications)
        async with slow:
            await slow.connect(one.node.name)
            await wait_until(lambda: one.swarm.members_of_cluster == [slow.name], "the member")


async def test_which_applications_says_swarm_as_soon_as_there_is_a_tracker() -> None:
    member = Member(free_port())
    assert "swarm" not in member.node.applications
    await member.start()
    assert "swarm" in member.node.applications
    assert member.node.whereis(TRACKER) is not None
    await member.node.stop()


# Groups


async def test_groups_reach_every_member_wherever_it_is() -> None:
    async with cluster(2) as (one, two):
        servers = []
        for number, member in enumerate((one, two)):
            server = await start_server(member.node, Counter())
            await member.swarm.register(number, server)
            # From either side, once the name is known there: the owner is told.
            await agree(number, server.pid, one)
            await one.swarm.join(Atom("group"), server)
            servers.append(server)
        pids = {server.pid for server in servers}
        await wait_until(lambda: set(two.swarm.members(Atom("group"))) == pids, "the group on two")
        await wait_until(lambda: set(one.swarm.members(Atom("group"))) == pids, "the group on one")
        assert await one.swarm.multi_call(Atom("group"), (Atom("add"), 5)) == [5, 5]
        two.swarm.publish(Atom("group"), b"news")
        await wait_until(lambda: [server.infos for server in servers] == [[b"news"], [b"news"]], "the news")
        await two.swarm.leave(Atom("group"), servers[0])
        await wait_until(lambda: one.swarm.members(Atom("group")) == [servers[1].pid], "one to be left")


async def test_multi_call_gives_the_error_of_who_does_not_answer() -> None:
    async with cluster(1) as (one,):
        server = await start_server(one.node, Counter())
        await one.swarm.register(b"a", server)
        await one.swarm.join(b"g", server)
        (answer,) = await one.swarm.multi_call(b"g", Atom("crash"))
        assert isinstance(answer, ProcessDied)
        (answer,) = await one.swarm.multi_call(b"g", Atom("later"), timeout_s=0.01) or [CallError(None, "")]
        assert isinstance(answer, CallError)


# Watching


async def test_watchers_are_told_of_their_names_only() -> None:
    async with cluster(2) as (one, two):
        by_first: list[tuple[Term, bool, bool]] = []
        by_name: list[Term] = []
        every: list[Term] = []

        def changed(name: Term, old: Entry | None, new: Entry | None) -> None:
            by_first.append((name, old is not None, new is not None))

        end = two.swarm.watch_starting_with(Atom("worker"), changed)
        two.swarm.watch_name(b"b", lambda name, old, new: by_name.append(name))
        two.swarm.watch(lambda name, old, new: every.append(name))
        process = one.process().process
        for name in ((Atom("worker"), 1), b"a", b"b"):
            await one.swarm.register(name, process)
        await agree(b"b", process.pid, two)
        assert by_first == [((Atom("worker"), 1), False, True)]
        assert by_name == [b"b"]
        assert every == [(Atom("worker"), 1), b"a", b"b"]
        process.exit(Atom("normal"))
        await agree((Atom("worker"), 1), None, two)
        assert by_first[1:] == [((Atom("worker"), 1), True, False)]
        end()
        await one.swarm.register((Atom("worker"), 2), one.process().process)
        await wait_until(lambda: two.swarm.whereis((Atom("worker"), 2)), "the second worker")
        assert len(by_first) == 2


# By rpc


async def test_the_functions_of_swarm_answer_by_rpc_as_swarm_does() -> None:
    async with cluster(2) as (one, two):
        pid, name = one.process().process.pid, (Atom("n"), b"x")
        entry = (Atom("entry"), name, pid, None, {}, (0, 1))

        def same(found: Term) -> bool:
            return type(found) is tuple and found[:5] == entry[:5]

        ask = one.ask
        assert await ask(two, "Elixir.Swarm", "whereis_name", name) is UNDEFINED
        assert await ask(two, "Elixir.Swarm", "register_name", name, pid) is Atom("yes")
        assert await ask(two, "Elixir.Swarm", "register_name", name, two.process().process.pid) is Atom("no")
        assert await ask(two, "Elixir.Swarm", "whereis_name", name) == pid
        assert await ask(two, "swarm", "whereis_name", name) == pid
        assert await ask(two, "Elixir.Swarm", "registered") == [(name, pid)]
        assert same(await ask(two, "Elixir.Swarm.Registry", "get_by_name", name))
        assert same((await ask(two, "Elixir.Swarm.Registry", "get_by_pid", pid))[0])
        assert same(await ask(two, "Elixir.Swarm.Registry", "get_by_pid_and_name", pid, name))
        assert await ask(two, "Elixir.Swarm.Registry", "get_by_name", b"other") is UNDEFINED
        assert await ask(two, "Elixir.Swarm.Registry", "get_by_meta", b"g") is UNDEFINED
        assert await ask(two, "Elixir.Swarm", "join", b"g", pid) is OK
        assert await ask(two, "Elixir.Swarm", "members", b"g") == [pid]
        assert len(await ask(two, "Elixir.Swarm.Registry", "get_by_meta", b"g", True)) == 1
        assert await ask(two, "Elixir.Swarm.Registry", "get_by_meta", b"g", False) is UNDEFINED
        assert await ask(two, "Elixir.Swarm", "leave", b"g", pid) is OK
        assert await ask(two, "Elixir.Swarm", "members", b"g") == []
        assert await ask(two, "Elixir.Swarm.Tracker", "track", name, pid) == (OK, pid)
        assert await ask(two, "Elixir.Swarm", "unregister_name", name) is OK
        await agree(name, None, one, two)
        with pytest.raises(ErlangError):
            await ask(two, "Elixir.Swarm", "register_name", name, b"no pid")


async def test_messages_and_calls_by_name_reach_their_process() -> None:
    async with cluster(2) as (one, two):
        collector = one.process()
        await one.swarm.register(b"a", collector.process)
        await one.swarm.join(b"g", collector.process)
        await wait_until(lambda: two.swarm.members(b"g"), "the group")
        assert await one.ask(two, "Elixir.Swarm", "send", b"a", b"one") is OK
        assert await one.ask(two, "Elixir.Swarm", "send", b"nobody", b"lost") is OK
        assert await one.ask(two, "Elixir.Swarm", "publish", b"g", b"two") is OK
        assert two.swarm.send(b"a", b"three")
        assert not two.swarm.send(b"nobody", b"lost")
        assert [await collector.next() for _ in range(3)] == [b"one", b"two", b"three"]


async def test_a_long_registry_is_answered_whole() -> None:
    async with cluster(2) as (one, two):
        pid = two.process().process.pid
        for number in range(1_200):
            two.swarm.ask(Track(number, pid, {}), lambda reply: None)
        await wait_until(lambda: len(two.names()) == 1_200, "the names")
        listed = await one.ask(two, "Elixir.Swarm", "registered")
        assert dict(listed) == dict.fromkeys(range(1200), pid)


# Placement


async def test_a_process_is_started_where_its_name_belongs_if_it_can_run_there() -> None:
    async with cluster(3) as members:
        started: list[tuple[Atom, Pid]] = []

        def offer(member: Member) -> None:
            def start(argument: Term) -> Term:
                pid = member.process().process.pid
                started.append((member.node.name, pid))
                return (OK, pid)

            member.node.exports.add("placed", "start_link", start)

        for member in members:
            offer(member)
        for number in range(12):
            name = (Atom("placed"), number)
            pid = await members[0].swarm.register_started(name, "placed", "start_link", [number])
            assert pid.node is members[1].owner(name)
            await agree(name, pid, *members)
        assert len({node for node, _ in started}) > 1


async def test_what_no_node_can_run_is_refused_and_what_one_can_is_run_there() -> None:
    async with cluster(2) as (one, two):
        # A tracker that another one answers so asks again for ten seconds, as the original.
        name = next(name for name in range(1_000) if two.owner(name) is two.node.name)
        reply = await one.ask(two, "Elixir.Swarm", "register_name", name, Atom("no"), Atom("such"), [])
        assert reply == (Atom("error"), Atom("undef"))
        pid = two.process().process.pid
        two.node.exports.add("only", "here", lambda: (OK, pid))
        for number in range(6):
            name = b"name %d" % number
            # The name may belong to a node that cannot run it.
            reply = await two.ask(one, "Elixir.Swarm", "whereis_or_register_name", name, Atom("only"), Atom("here"), [])
            assert reply == (OK, pid)


# The tracker's process


async def test_bad_messages_and_requests_do_no_harm() -> None:
    async with cluster(2) as (one, two):
        process = one.process().process
        await one.swarm.register(b"a", process)
        to = (TRACKER, two.node.name)
        tracker = two.node.whereis(TRACKER)
        sender = one.node.whereis(TRACKER)
        assert sender is not None
        assert tracker is not None
        clock = (1, 0)
        for message in (
            b"nonsense",
            Atom("nonsense"),
            (),
            (GEN_CAST, Atom("nonsense")),
            (GEN_CAST, (Atom("sync"), b"no pid", clock)),
            (GEN_CAST, (Atom("sync"), sender.pid, b"no clock")),
            (GEN_CAST, (Atom("sync_recv"), sender.pid, clock, {})),
            (GEN_CAST, (Atom("sync_recv"), sender.pid, clock, b"no list")),
            (GEN_CAST, (Atom("sync_recv"), sender.pid, clock, [1, (Atom("entry"), 1), {}])),
            (GEN_CAST, (Atom("sync_err"), Atom("because"))),
            (Atom("event"), sender.pid, clock, Atom("nonsense")),
            (Atom("event"), sender.pid, clock, (Atom("track"), b"b", b"no pid", {})),
            (Atom("event"), Pid(Atom("elsewhere@127.0.0.1"), 1, 0, 1), clock, (Atom("untrack"), process.pid)),
        ):
            one.node.send(to, message, sender.pid)
        assert await call(one.node, to, Atom("nonsense")) == (Atom("error"), Atom("badarg"))
        assert await call(one.node, to, (Atom("track"), b"b", b"no pid", {})) == (Atom("error"), Atom("badarg"))
        assert two.node.whereis(TRACKER) is tracker
        assert two.swarm.members_of_cluster == [one.node.name]
        late = one.process().process
        await one.swarm.register(b"late", late)
        await agree(b"late", late.pid, two)


async def test_a_registry_that_breaks_off_ends_the_connection_and_nothing_else() -> None:
    async with cluster(2) as (one, two):
        process = two.process().process
        await two.swarm.register(b"mine", process)
        sender = one.node.whereis(TRACKER)
        assert sender is not None
        # A list that announces three elements and has one and a half.
        broken = EncodedTerm(b"l\0\0\0\x03" + etf.encode_term(1) + b"h\x06w\x05entry" + b"x" * 10)
        one.node.send((TRACKER, two.node.name), (GEN_CAST, (Atom("sync_recv"), sender.pid, (1, 0), broken)), sender.pid)
        await wait_until(lambda: one.node.name not in two.node.nodes(), "the end of the connection")
        await wait_until(lambda: one.node.name not in two.swarm.members_of_cluster, "the member to go")
        await meet(one, two)
        assert one.swarm.whereis(b"mine") == process.pid


async def test_a_tracker_that_is_started_again_keeps_the_names_of_its_node() -> None:
    async with cluster(2) as (one, two):
        supervisor = Supervisor([ChildSpec("swarm", two.swarm.start)])
        old = two.node.whereis(TRACKER)
        assert old is not None
        process, other = two.process().process, one.process().process
        await two.swarm.register(b"mine", process)
        await one.swarm.register(b"theirs", other)
        await agree(b"theirs", other.pid, two)
        old.exit(Atom("crashed"))
        with pytest.raises(NoProcess):
            await two.swarm.register(b"nobody", process)
        await start_server(two.node, supervisor)
        await agree(b"mine", process.pid, one, two)
        await agree(b"theirs", other.pid, one, two)


async def test_who_waits_for_a_tracker_that_ends_is_told() -> None:
    async with cluster(1, TrackerOptions(sync_nodes_timeout_s=60), connected=False) as (one,):
        waiting = asyncio.ensure_future(one.swarm.register(b"a", one.process().process))
        await asyncio.sleep(0)
        tracker = one.node.whereis(TRACKER)
        assert tracker is not None
        tracker.exit(Atom("crashed"))
        with pytest.raises(NoProcess) as ended:
            await waiting
        assert ended.value.reason is NOPROC


async def test_sys_get_state_shows_the_tracker() -> None:
    async with cluster(2) as (one, two):
        state = await call_sys(one, two)
        assert state[Atom("state")] is Atom("tracking")
        assert state[Atom("nodes")] == [one.node.name]


async def call_sys(one: Member, two: Member) -> Any:
    answered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
    reference = one.node.open_alias(lambda message: answered.set_result(message[1]))
    sender = one.node.client.pid
    caller = (sender, ImproperList([Atom("alias")], reference))
    one.node.send((TRACKER, two.node.name), (Atom("system"), caller, Atom("get_state")))
    return await answered


# Large registries


def test_a_list_in_pieces_is_the_list() -> None:
    terms: list[Term] = [(number, b"x" * (number % 7)) for number in range(500)]
    long = [b"y" * size for size in (10, 70_000, 65_531, 300_000, 1, 2)]
    for each in ([], terms[:1], terms, terms * 20, long):
        outgoing = OutgoingList(len(each), each)
        while not outgoing.work(0):
            pass
        assert outgoing.encoded.data == etf.encode_term(each)
        for before in (b"", b"before"):
            encoded = EncodedTerm(before + outgoing.encoded.data, len(before))
            assert list(IncomingList(encoded, etf.AtomTable(), pytest.fail)) == each


@pytest.mark.parametrize("cut", range(6, 40))
def test_a_list_that_is_cut_off_says_so_once_and_ends(cut: int) -> None:
    data = etf.encode_term([(number, b"four") for number in range(4)])[:cut]
    errors: list[Exception] = []
    try:
        incoming = IncomingList(EncodedTerm(data), etf.AtomTable(), errors.append)
    except Exception as error:
        errors.append(error)
    else:
        while incoming:
            incoming.pop()
    assert len(errors) == 1
