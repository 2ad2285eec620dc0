"""Terms passed on unread between real nodes: with the atoms of their own headers, in fragments, past one another."""

from __future__ import annotations

import random

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl import Node
from gater.erl.dist_header import HeaderReader, Message
from gater.erl.gen_server import call
from gater.erl.terms import Atom, EncodedTerm, Pid, Term

TERMS = """
begin
  Named = fun(Prefix, From, To) -> [list_to_atom(Prefix ++ integer_to_list(N)) || N <- lists:seq(From, To)] end,
  Long = fun(C) -> list_to_atom(lists:duplicate(250, C)) end,
  Event = fun(N) -> #{'__struct__' => 'Elixir.Event', number => N, kind => hd(Named("kind_", N rem 7, N rem 7)),
                      data => #{list_to_atom("key") => <<N:800>>, nothing => nil, ok => N rem 2 =:= 0}} end,
  [{ok, []},
   {ok, Named("a", 1, 10)},
   {ok, Named("b", 1, 250)},
   {ok, Named("c", 1, 300)},
   {ok, lists:reverse(Named("c", 1, 300))},
   {ok, [{A, A, [A | A]} || A <- Named("d", 1, 254)]},
   {ok, [Long($x), Long(233), Long(960), Long($x), short]},
   {ok, [true, false, nil, '', undefined, #{true => false, nil => true}]},
   {ok, {fun lists:map/2, <<3:5>>, 1.5, -1 bsl 80, "text", [improper | tail], #{1 => a, 1.0 => b}}},
   {ok, [Event(N) || N <- lists:seq(1, 1000)]},
   {ok, [Event(N) || N <- lists:seq(1, 200)], binary:copy(<<"0123456789abcdef">>, 250000)},
   {ok, binary:copy(<<1>>, 70000), Named("e", 1, 255), last_atom}]
end
"""
"""What is passed on, as both nodes make it: few atoms and many, long ones, more than a list holds, and megabytes."""

COUNT = 12

CHECKER = (
    """
    Terms = """
    + TERMS.strip()
    + """,
    Loop = fun Again(Right, Wrong) ->
        receive
            {check, {N, Term}} ->
                case lists:nth(N, Terms) =:= Term of
                    true -> Again(Right + 1, Wrong);
                    false -> Again(Right, [N | Wrong])
                end;
            {noise, _} -> Again(Right, Wrong);
            {get, From} -> From ! {Right, Wrong}, Again(Right, Wrong)
        end
    end,
    spawn(fun() -> Loop(0, []) end)
    """
)
"""Starts a process that compares what it gets with what it should be."""


class Relay:
    """A process that sends on what it gets as `{To, Message}`, unread."""

    def __init__(self, node: Node, name: str) -> None:
        self.passed = 0
        self.with_atoms = 0
        self.process = node.spawn_receiver(self, name=name)
        self.process.spine_levels = 2

    def receive(self, message: Term) -> None:
        to, passed_on = message
        assert type(to) is Pid
        self.process.send(to, passed_on)
        self.passed += 1
        last = passed_on[-1] if type(passed_on) is tuple else passed_on
        self.with_atoms += type(last) is EncodedTerm and bool(last.atoms)

    def terminate(self, reason: Term) -> None:
        return None


async def two_releases(beam: Beams, otp: int) -> tuple[BeamNode, BeamNode]:
    """A node of this release and one of the other."""
    return await beam.start("erlang", otp=otp), await beam.start("erlang", otp=53 - otp)


async def test_terms_are_passed_on_whatever_the_caches_hold(beam: Beams, otp: int) -> None:
    source, target = await two_releases(beam, otp)
    choice = random.Random(otp)
    async with python_node(beam) as node:
        relay = Relay(node, "relay")
        checker = await target.eval(CHECKER)
        await source.eval(
            "Terms = " + TERMS.strip() + ", register(sender, spawn(fun() -> (fun Again() -> receive {send, To, N} ->"
            " {relay, Node} ! {To, {check, {N, lists:nth(N, Terms)}}}, Again() end end)() end)), ok",
            Node=node.name,
        )
        sent = 0
        for _ in range(4):
            order = list(range(1, COUNT + 1))
            choice.shuffle(order)
            for number in order:
                relay.process.send((Atom("sender"), source.atom), (Atom("send"), checker, number))
                # What else is sent to the target moves its cache on.
                names = [Atom(f"noise_{choice.randrange(3000)}") for _ in range(150)]
                relay.process.send(checker, (Atom("noise"), names))
                sent += 1
        await wait_until(lambda: relay.passed == sent, 30)
        me = Collector(node)
        relay.process.send(checker, (Atom("get"), me.process.pid))
        assert await me.next() == (sent, [])
        assert relay.with_atoms > sent // 2, "most of them came with a cache"


async def test_a_term_with_a_cache_reaches_a_node_without_headers(beam: Beams, otp: int) -> None:
    source, _ = await two_releases(beam, otp)
    async with python_node(beam) as node, python_node(beam, headers=False) as plain:
        relay, target = Relay(node, "relay"), Collector(plain)
        # What a BEAM sends before it is connected makes no use of the cache.
        await node.connect(source.atom)
        await source.sees_hidden(node.name)
        await source.eval(
            "{relay, Node} ! {To, {ok, [{key, value, N} || N <- lists:seq(1, 20)]}}, ok",
            Node=node.name,
            To=target.process.pid,
        )
        assert await target.next() == (Atom("ok"), [(Atom("key"), Atom("value"), n) for n in range(1, 21)])
        assert relay.with_atoms == 1


LARGE = "{ok, [{item, N, binary:copy(<<N:32>>, 25000)} || N <- lists:seq(1, 300)]}"
"""Thirty megabytes: more than any socket buffer holds."""

RECORDER = """
Recorder = spawn(fun() -> (fun Again(Seen) ->
    receive {get, From} -> From ! lists:reverse(Seen), Again(Seen); {seen, What} -> Again([What | Seen]) end end)([])
end),
Noting = fun(Describe) -> spawn(fun() -> (fun Again() ->
    receive Message -> Recorder ! {seen, Describe(Message)}, Again() end end)() end) end,
{Recorder, Noting(fun({ok, Items}) -> {large, length(Items)} end), Noting(fun({small, N}) -> N end)}
"""
"""Two receivers, for the large message and for small ones, and a process that knows in which order they got them."""


async def test_small_messages_pass_a_large_one_that_is_passed_on(beam: Beams, otp: int) -> None:
    source, target = await two_releases(beam, otp)
    async with python_node(beam) as node:
        one, other = Relay(node, "one"), Relay(node, "other")
        recorder, to_large, to_small = await target.eval(RECORDER)
        await node.connect(target.atom)
        target.freeze()
        await source.eval(f"{{one, Node}} ! {{To, {LARGE}}}, ok", Node=node.name, To=to_large)
        await wait_until(lambda: one.passed == 1, 30)
        await source.eval(
            "[{other, Node} ! {To, {small, N}} || N <- lists:seq(1, 20)], ok", Node=node.name, To=to_small
        )
        await wait_until(lambda: other.passed == 20)
        target.thaw()
        me = Collector(node)

        async def seen() -> list[Term]:
            other.process.send(recorder, (Atom("get"), me.process.pid))
            return list(await me.next())

        async def all_seen() -> bool:
            return len(await seen()) == 21

        await wait_until(all_seen, 30)
        assert await seen() == [*range(1, 21), (Atom("large"), 300)]


async def test_answers_pass_a_large_message_that_is_coming_in(
    erl_node: BeamNode, beam: Beams, monkeypatch: pytest.MonkeyPatch
) -> None:
    await erl_node.eval(
        """
        register(echo, spawn(fun() -> (fun Again() ->
            receive {'$gen_call', {_, [alias | Ref] = Tag}, Request} -> Ref ! {Tag, Request}, Again() end end)() end)),
        ok"""
    )
    async with python_node(beam) as node:
        events: list[Term] = []

        class Receiver:
            def receive(self, message: Term) -> None:
                events.append(message[0])

            def terminate(self, reason: Term) -> None:
                return None

        target = node.spawn_receiver(Receiver())
        target.spine_levels = 1
        await node.connect(erl_node.atom)
        protocol = node.peers.table[erl_node.atom].protocol
        assert protocol is not None
        assert protocol.transport is not None
        transport = protocol.transport
        receive = HeaderReader.receive

        def stopping_at_the_first_fragment(reader: HeaderReader, frame: bytes) -> Message | None:
            message = receive(reader, frame)
            if message is None and "begun" not in events:
                events.append("begun")
                transport.pause_reading()
            return message

        monkeypatch.setattr(HeaderReader, "receive", stopping_at_the_first_fragment)
        await erl_node.eval(f"spawn(fun() -> To ! {LARGE} end), ok", To=target.pid)
        await wait_until(lambda: events)
        # The peer has thirty megabytes under way and is asked meanwhile.
        transport.resume_reading()
        for number in range(3):
            assert await call(node, (Atom("echo"), erl_node.atom), number) == number
            events.append(number)
        await wait_until(lambda: Atom("ok") in events, 30)
        assert events.index(0) < events.index(Atom("ok")), events
