"""What the shell, tools and libraries of a BEAM ask any node: each question is answered, and nobody hangs."""

from __future__ import annotations

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Collector, python_node
from gater.erl.errors import NotConnected
from gater.erl.process import Mailbox
from gater.erl.terms import Atom

OK, PONG = Atom("ok"), Atom("pong")


QUESTIONS = [
    ("erlang, node, []", "fun(X) -> X =:= N end"),
    ("erlang, nodes, []", "fun(X) -> X =:= [] end"),
    ("erlang, nodes, [connected]", "fun(X) -> X =:= [node()] end"),
    ("erlang, nodes, [[hidden, this]]", "fun(X) -> X =:= lists:sort([node(), N]) end"),
    ("c, nodes, []", "fun(X) -> X =:= [] end"),
    ("erlang, monitor_node, [node(), true]", "fun(X) -> X =:= true end"),
    ("erlang, processes, []", "fun([P | _]) -> node(P) =:= N end"),
    ("erlang, registered, []", "fun(X) -> lists:member(net_kernel, X) andalso lists:member(rex, X) end"),
    ("erlang, whereis, [rex]", "fun(X) -> is_pid(X) end"),
    ("erlang, whereis, [nobody]", "fun(X) -> X =:= undefined end"),
    ("erlang, memory, []", "fun(X) -> proplists:get_value(total, X) > 0 end"),
    ("erlang, memory, [total]", "fun(X) -> X > 0 end"),
    ("erlang, memory, [[total, ets]]", "fun([{total, X}, {ets, 0}]) -> X > 0 end"),
    ("erlang, statistics, [garbage_collection]", "fun({A, B, _}) -> is_integer(A) andalso is_integer(B) end"),
    ("erlang, statistics, [io]", "fun({{input, _}, {output, _}}) -> true end"),
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


async def test_what_only_a_beam_has_is_undef_to_tools_that_ask_for_it(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        for call in (
            "observer_backend, vsn, []",
            "observer_backend, sys_info, []",
            "observer_backend, procs_info, [self()]",
            "appmon_info, start_link2, [self(), N, []]",
            "dbg, start, []",
            "code, load_binary, [m, [], <<>>]",
            "net_adm, world, []",
            "shell, start, []",
            "'Elixir.IEx', started, []",
        ):
            source = f"""
              {{M, F, A}} = {{{call}}},
              rpc:call(N, M, F, A) =:= {{badrpc, {{'EXIT', {{undef, [{{M, F, A, []}}]}}}}}}
            """
            assert await erl_node.eval(source, N=node.name) is True, call


async def test_a_process_is_shown_to_tools(erl_node: BeamNode, beam: Beams) -> None:
    async def idle(me: Mailbox) -> None:
        await me.get(lambda message: message is Atom("stop"))

    async with python_node(beam) as node:
        process = node.spawn(idle, name="idle")
        await erl_node.eval("[{idle, N} ! X || X <- [a, b]], ok", N=node.name)
        await wait_until(lambda: process.queue_length() == 2)
        info = "{ok, V} = {ok, rpc:call(N, erlang, process_info, [P | Items])}, V"
        for items, expected in (
            ("[message_queue_len]", "{message_queue_len, 2}"),
            ("[messages]", "{messages, [a, b]}"),
            ("[registered_name]", "{registered_name, idle}"),
            ("[[memory, trap_exit]]", "[{memory, 0}, {trap_exit, false}]"),
            ("[{dictionary, key}]", "{{dictionary, key}, undefined}"),
        ):
            shown = await erl_node.eval(f"Items = {items}, {info}", N=node.name, P=process.pid)
            assert shown == await erl_node.eval(expected), items
        # What the shell's i() picks out, and in the order of a BEAM.
        same = """
          Names = fun(Info) -> [Name || {Name, _} <- Info] end,
          Names(rpc:pinfo(P)) -- [registered_name] =:= Names(rpc:pinfo(spawn(fun() -> receive x -> x end end)))
        """
        assert await erl_node.eval(same, P=process.pid) is True
        badarg = "{badrpc, {'EXIT', {badarg, _}}} = rpc:call(N, erlang, process_info, [P, nonsense]), ok"
        assert await erl_node.eval(badarg, N=node.name, P=process.pid) is OK


async def test_what_every_node_has_is_there_again_when_a_peer_has_killed_it(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        for name in ("net_kernel", "rex", "global_name_server"):
            before = node.whereis(name)
            killed = """
              R = monitor(process, {Name, N}), exit(rpc:call(N, erlang, whereis, [Name]), kill),
              receive {'DOWN', R, _, _, Reason} -> Reason end
            """
            assert await erl_node.eval(killed, N=node.name, Name=Atom(name)) is Atom("killed")
            after = node.whereis(name)
            assert after is not None
            assert after is not before
        node.disconnect(erl_node.atom)
        assert await erl_node.eval("net_adm:ping(N)", N=node.name) is PONG
        old = "gen_server:call({rex, N}, {call, erlang, node, [], self()})"
        assert await erl_node.eval(old, N=node.name) is node.name


async def test_connections_are_made_and_cut_by_rpc(erl_node: BeamNode, beam: Beams, otp: int) -> None:
    other = await beam.start("erlang", otp=otp)
    async with python_node(beam) as node:
        bindings = {"N": node.name, "O": other.atom}
        assert await erl_node.eval("rpc:call(N, net_kernel, connect_node, [O])", **bindings) is True
        assert set(node.nodes()) == {erl_node.atom, other.atom}
        assert await erl_node.eval("rpc:call(N, erlang, disconnect_node, [O])", **bindings) is True
        assert await erl_node.eval("rpc:call(N, erlang, disconnect_node, [O])", **bindings) is False
        assert node.nodes() == [erl_node.atom]
        assert await erl_node.eval("rpc:call(N, net_kernel, connect_node, ['nobody@127.0.0.1'])", **bindings) is False
        assert await erl_node.eval("rpc:call(N, net_adm, ping, [O])", **bindings) is PONG
        assert await erl_node.eval("rpc:call(N, erlang, monitor_node, [O, true])", **bindings) is True
        # Watched from outside: a monitor of the asking node.
        watched = "erlang:monitor_node(N, true), erlang:disconnect_node(N), receive {nodedown, N} -> ok end"
        assert await erl_node.eval(watched, **bindings) is OK


async def test_messages_to_a_name_on_several_nodes_arrive(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        inbox = Collector(node, "inbox")
        assert await erl_node.eval("rpc:sbcast([N], inbox, one)", N=node.name) == ([node.name], [])
        assert await erl_node.eval("rpc:sbcast([N], nobody, one)", N=node.name) == ([], [node.name])
        assert await erl_node.eval("rpc:abcast([N], inbox, two)", N=node.name) is Atom("abcast")
        assert await erl_node.eval("gen_server:abcast([N], inbox, three)", N=node.name) is Atom("abcast")
        assert [await inbox.next() for _ in range(3)] == [
            Atom("one"),
            Atom("two"),
            (Atom("$gen_cast"), Atom("three")),
        ]


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
