"""What the shell, tools and libraries of a BEAM ask any node: each question is answered, and nobody hangs."""

from __future__ import annotations

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl.errors import NotConnected
from gater.erl.terms import Atom

OK, PONG = Atom("ok"), Atom("pong")


QUESTIONS = [
    ("erlang, node, []", "fun(X) -> X =:= N end"),
    ("erlang, nodes, []", "fun(X) -> X =:= [] end"),
    ("erlang, nodes, [connected]", "fun(X) -> X =:= [node()] end"),
    ("erlang, processes, []", "fun([P | _]) -> node(P) =:= N end"),
    ("erlang, registered, []", "fun(X) -> lists:member(net_kernel, X) andalso lists:member(rex, X) end"),
    ("erlang, whereis, [rex]", "fun(X) -> is_pid(X) end"),
    ("erlang, whereis, [nobody]", "fun(X) -> X =:= undefined end"),
    ("erlang, memory, []", "fun(X) -> proplists:get_value(total, X) > 0 end"),
    ("erlang, memory, [total]", "fun(X) -> X > 0 end"),
    ("erlang, statistics, [wall_clock]", "fun({A, B}) -> is_integer(A) andalso is_integer(B) end"),
    ("erlang, statistics, [runtime]", "fun({A, B}) -> is_integer(A) andalso is_integer(B) end"),
    ("erlang, system_info, [otp_release]", "fun(X) -> is_list(X) end"),
    ("erlang, system_info, [process_count]", "fun(X) -> X > 0 end"),
    ("erlang, localtime, []", "fun({{Y, _, _}, {_, _, _}}) -> Y > 2020 end"),
    ("erlang, phash2, [{a, [1], <<2>>}]", "fun(X) -> X =:= erlang:phash2({a, [1], <<2>>}) end"),
    ("application, which_applications, []", "fun(X) -> lists:keymember(kernel, 1, X) end"),
    ("application, which_applications, [1000]", "fun(X) -> lists:keymember(stdlib, 1, X) end"),
    ("code, ensure_loaded, [no_such]", "fun(X) -> X =:= {error, nofile} end"),
    ("init, get_status, []", "fun(X) -> X =:= {started, started} end"),
    ("net_kernel, get_net_ticktime, []", "fun(X) -> X =:= 60 end"),
    ("net_adm, ping, [node()]", "fun(X) -> X =:= pong end"),
    ("rpc, multicall, [[node(), N], erlang, node, []]", "fun(X) -> X =:= {[node(), N], []} end"),
    ("global, whereis_name, [x]", "fun(X) -> X =:= undefined end"),
]


async def test_every_question_by_rpc_is_answered(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        for question, shape in QUESTIONS:
            source = f"Shape = {shape}, Shape(rpc:call(N, {question}, 5000))"
            assert await erl_node.eval(source, N=node.name) is True, question


async def test_no_call_of_global_hangs_on_the_node(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        assert await erl_node.eval("net_adm:ping(N)", N=node.name) is PONG
        for call, answer in (
            ("global:register_name(thing, self())", Atom("yes")),
            ("global:whereis_name(other)", Atom("undefined")),
            ("global:set_lock({lock, self()}, [node(), N], 1)", True),
            ("global:del_lock({lock, self()}, [node(), N])", True),
            ("global:trans({lock, self()}, fun() -> done end, [node(), N], 1)", Atom("done")),
            ("global:sync()", OK),
            ("global:unregister_name(thing), ok", OK),
            ("try gen_server:call({global_name_server, N}, what) of _ -> ok catch exit:_ -> ok end", OK),
        ):
            assert await erl_node.eval(call, N=node.name) == answer, call


async def test_what_would_end_the_node_or_show_its_cookie_is_undef(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        for call in ("init, stop, []", "erlang, halt, []", "erlang, get_cookie, []", 'os, cmd, ["id"]'):
            caught = f"try erpc:call(N, {call}) catch error:{{exception, undef, _}} -> undef end"
            assert await erl_node.eval(caught, N=node.name) is Atom("undef"), call


async def test_a_send_connects_again_as_in_erlang(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        seen: list[tuple[Atom, bool, str]] = []
        node.monitor_nodes(lambda peer, is_up, reason: seen.append((peer, is_up, reason)))
        inbox = Collector(node, "inbox")
        keep = "spawn(fun() -> Loop = fun Again() -> receive {P, M} -> P ! M, Again() end end, Loop() end)"
        echo = await erl_node.eval(keep)
        for number in range(3):
            inbox.process.send(echo, (inbox.process.pid, number))
            assert await inbox.next() == number
            if number == 1:
                assert await erl_node.eval("erlang:disconnect_node(N)", N=node.name) is True
            else:
                assert node.disconnect(erl_node.atom)
            await wait_until(lambda: not node.nodes())
        assert [is_up for _, is_up, _ in seen] == [True, False] * 3
        reasons = [reason for _, is_up, reason in seen if not is_up]
        assert reasons == ["disconnected by this node", "connection closed by the peer", "disconnected by this node"]
        # A send in the moment before the BEAM notices is lost, as between two BEAM nodes.
        await wait_until(lambda: _alone(erl_node))
        await erl_node.eval("{inbox, N} ! hello, ok", N=node.name)
        assert await inbox.next() is Atom("hello")
        with pytest.raises(NotConnected):
            await node.connect("nobody@127.0.0.1")


async def _alone(peer: BeamNode) -> bool:
    return await peer.eval("nodes(connected)") == []
