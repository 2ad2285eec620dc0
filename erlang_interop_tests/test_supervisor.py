"""Supervisors in Python as a BEAM sees them: children that it kills, and what `supervisor` answers."""

from __future__ import annotations

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Server, python_node
from gater.erl import Node
from gater.erl.gen_server import GenServer, start_server
from gater.erl.supervisor import ChildSpec, Restart, Strategy, Supervisor
from gater.erl.terms import Atom, Pid

OK, ERROR = Atom("ok"), Atom("error")
NAMES = ("one", "two", "three")


def child(node: Node, name: str, restart: Restart = "permanent") -> ChildSpec:
    async def start() -> GenServer:
        return await start_server(node, Server(), name=name)

    return ChildSpec(name, start, restart)


def pids(node: Node) -> list[Pid]:
    """Of the children, as far as they are running."""
    return [process.pid for process in map(node.whereis, NAMES) if process is not None]


@pytest.mark.parametrize(
    ("strategy", "replaced"),
    [("one_for_one", {"two"}), ("one_for_all", {"one", "two", "three"}), ("rest_for_one", {"two", "three"})],
)
async def test_a_child_killed_by_a_beam_is_replaced_as_its_strategy_says(
    erl_node: BeamNode, beam: Beams, strategy: Strategy, replaced: set[str]
) -> None:
    async with python_node(beam) as node:
        await start_server(node, Supervisor([child(node, name) for name in NAMES], strategy=strategy), name="sup")
        before = dict(zip(NAMES, pids(node), strict=True))
        assert await erl_node.eval("exit(P, kill)", P=before["two"]) is True
        await wait_until(lambda: len(pids(node)) == 3 and before["two"] not in pids(node))
        after = dict(zip(NAMES, pids(node), strict=True))
        assert {name for name in NAMES if after[name] != before[name]} == replaced
        assert await erl_node.eval("gen_server:call({two, N}, count)", N=node.name) == 0


async def test_a_beam_sees_the_end_of_a_supervisor_that_gives_up(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        supervisor = Supervisor([child(node, "one")], max_restarts=2)
        await start_server(node, supervisor, name="sup")
        killing = """
          R = monitor(process, {sup, N}),
          Kill = fun Again() ->
            try exit(rpc:call(N, erlang, whereis, [one]), kill) catch error:_ -> no_child_at_the_moment end,
            receive {'DOWN', R, _, _, Reason} -> Reason after 20 -> Again() end
          end,
          Kill()
        """
        assert await erl_node.eval(killing, N=node.name) is Atom("shutdown")
        assert pids(node) == []


async def test_the_functions_of_supervisor_answer(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Supervisor([child(node, name) for name in NAMES]), name="sup")
        bindings = {"S": (Atom("sup"), node.name)}
        children = await erl_node.eval("supervisor:which_children(S)", **bindings)
        assert [(name, pid) for name, pid, _, _ in children] == [
            (name.encode(), pid) for name, pid in zip(reversed(NAMES), reversed(pids(node)), strict=True)
        ]
        assert {(kind, *modules) for _, _, kind, modules in children} == {(Atom("worker"), Atom("Server"))}
        counts = "[{specs, 3}, {active, 3}, {supervisors, 0}, {workers, 3}] = supervisor:count_children(S), ok"
        assert await erl_node.eval(counts, **bindings) is OK
        for call, answer in (
            ("restart_child(S, two)", (ERROR, Atom("running"))),
            ("delete_child(S, two)", (ERROR, Atom("running"))),
            ("terminate_child(S, two)", OK),
            ('terminate_child(S, <<"two">>)', OK),
            ("terminate_child(S, four)", (ERROR, Atom("not_found"))),
            ("restart_child(S, four)", (ERROR, Atom("not_found"))),
            ("start_child(S, [])", (ERROR, Atom("not_supported"))),
        ):
            assert await erl_node.eval(f"supervisor:{call}", **bindings) == answer, call
        assert node.whereis("two") is None
        ended = '{_, undefined, worker, _} = lists:keyfind(<<"two">>, 1, supervisor:which_children(S)), ok'
        assert await erl_node.eval(ended, **bindings) is OK
        ok, pid = await erl_node.eval("supervisor:restart_child(S, two)", **bindings)
        assert (ok, pid) == (OK, pids(node)[1])
        assert (
            await erl_node.eval("supervisor:terminate_child(S, two), supervisor:delete_child(S, two)", **bindings) is OK
        )
        assert len(await erl_node.eval("supervisor:which_children(S)", **bindings)) == 2
