"""Phoenix.PubSub with BEAM nodes: broadcasts and signatures both ways, and patterns against match specifications.

The BEAM's side is what Phoenix.PubSub 2.1 does there: a worker in the `pg` group that bears its name.
"""

from __future__ import annotations

import random

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import python_node
from gater.api.subscriptions.matching import pattern_test
from gater.erl.gen_server import start_server
from gater.erl.pg import Scope
from gater.erl.terms import Atom, ImproperList, Term
from gater.pubsub.adapter import PubSubServer
from gater.pubsub.messages import SCOPE
from gater.pubsub.signatures import Format, MessageRefused, sign, verify

SECRET = "not a real secret"

WORKER = """
{ok, _} = pg:start('Elixir.Phoenix.PubSub'),
Name = 'Elixir.ex_esdb_events.Adapter',
Loop = fun Loop(Heard) ->
    receive
        {forward_to_local, Topic, Message, 'Elixir.Phoenix.PubSub'} -> Loop([{Topic, Message} | Heard]);
        {heard, From} -> From ! {heard, lists:reverse(Heard)}, Loop(Heard)
    end
end,
Pid = spawn(fun() -> Loop([]) end),
register(Name, Pid),
pg:join('Elixir.Phoenix.PubSub', Name, Pid)
"""
HEARD = "'Elixir.ex_esdb_events.Adapter' ! {heard, self()}, receive {heard, Heard} -> Heard end"
BROADCAST = """
Name = 'Elixir.ex_esdb_events.Adapter',
[Pid ! {forward_to_local, Topic, Message, 'Elixir.Phoenix.PubSub'}
    || Pid <- pg:get_members('Elixir.Phoenix.PubSub', Name), node(Pid) =/= node()],
length(pg:get_members('Elixir.Phoenix.PubSub', Name))
"""
SIGNED = "{secure_message, crypto:mac(hmac, sha256, Secret, term_to_binary(Message)), Message}"
BELIEVED = "{secure_message, S, M} = Signed, S =:= crypto:mac(hmac, sha256, Secret, term_to_binary(M))"
MATCHES = """
[try ets:match_spec_run([{Data}], ets:match_spec_compile([{{Pattern}, [], [true]}])) =:= [true]
    catch error:badarg -> badarg end || {Pattern, Data} <- Pairs]
"""


async def test_broadcasts_go_both_ways(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        scope = Scope(SCOPE)
        await start_server(node, scope, name=SCOPE)
        server = PubSubServer(node, scope, "ex_esdb_events")
        await server.start()
        heard: list[tuple[bytes, Term]] = []
        server.subscribe("s:$all", lambda topic, message: heard.append((topic, message)))
        await erl_node.eval(WORKER)
        await node.connect(erl_node.atom)
        await wait_until(lambda: server.peers)

        server.broadcast("s:$all", (Atom("events"), []))
        server.direct_broadcast(erl_node.atom, "t", 1)
        expected = [(b"s:$all", (Atom("events"), [])), (b"t", 1)]
        await wait_until(lambda: _heard(erl_node, expected))
        assert heard == expected[:1]

        await wait_until(lambda: _broadcasts(erl_node, 2))
        await wait_until(lambda: len(heard) == 2)
        assert heard[1] == (b"s:$all", Atom("hello"))
        server.close()
        await wait_until(lambda: _broadcasts(erl_node, 1))


async def _heard(node: BeamNode, expected: list[Term]) -> bool:
    return bool(await node.eval(HEARD) == expected)


async def _broadcasts(node: BeamNode, members: int) -> bool:
    return bool(await node.eval(BROADCAST, Topic=b"s:$all", Message=Atom("hello")) == members)


MESSAGE: Term = (
    Atom("node_health_updated"),
    {Atom("status"): Atom("healthy"), Atom("node"): Atom("a@b"), Atom("load"): [1, 2, 3], "é": [0.5, -1, 1 << 70]},
)


async def test_what_a_beam_signs_is_believed(erl_node: BeamNode) -> None:
    signed = await erl_node.eval(SIGNED, Message=MESSAGE, Secret=SECRET)
    assert verify(signed, SECRET) == signed[2]
    with pytest.raises(MessageRefused):
        verify(signed, "another secret")


async def test_a_beam_believes_what_is_signed_for_it(erl_node: BeamNode, request: pytest.FixtureRequest) -> None:
    old = await erl_node.eval("list_to_integer(erlang:system_info(otp_release)) =< 25")
    # Newer releases have an order of their own for several atoms as keys: one key is what can be signed for them.
    message = MESSAGE if old else (MESSAGE[0], {Atom("status"): Atom("healthy")})
    signed = sign(message, SECRET, Format.OTP_25 if old else Format.OTP_26)
    assert await erl_node.eval(BELIEVED, Signed=signed, Secret=SECRET) is True


def _term(rng: random.Random, depth: int, pattern: bool) -> Term:
    kind = rng.randrange(9 if depth else 5)
    keys = [Atom("a"), Atom("b"), b"k", 1]
    match kind:
        case 0 | 1:
            return rng.choice([0, 1, 1.0, Atom("x"), b"x", True, None, []])
        case 2 if pattern:
            return Atom(rng.choice(["_", "$1", "$2", "$0", "$01", "$"]))
        case 2 | 3 | 4:
            return rng.choice([1, 2, Atom("y")])
        case 5 | 6:
            return {key: _term(rng, depth - 1, pattern) for key in rng.sample(keys, rng.randrange(3 + (not pattern)))}
        case 7:
            elements = [_term(rng, depth - 1, pattern) for _ in range(rng.randrange(1, 3))]
            tail = _term(rng, 0, pattern)
            return elements if rng.random() < 0.5 or tail == [] else ImproperList(elements, tail)
    return tuple(_term(rng, depth - 1, pattern) for _ in range(rng.randrange(3)))


async def test_patterns_match_what_a_beam_matches(erl_node: BeamNode) -> None:
    rng = random.Random(6)
    pairs = []
    for _ in range(2000):
        pattern = _term(rng, 3, pattern=True)
        pairs.append((pattern, rng.choice([pattern, _term(rng, 3, pattern=False)])))
    answers = await erl_node.eval(MATCHES, Pairs=pairs)
    ours = [pattern_test(pattern)(data) for pattern, data in pairs]
    different = [(pair, theirs) for pair, theirs, mine in zip(pairs, answers, ours, strict=True) if theirs != mine]
    assert different == []
    assert 200 < sum(ours) < 1900
