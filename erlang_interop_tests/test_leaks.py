"""What 100,000 calls leave behind on a Python node: nothing."""

from __future__ import annotations

import gc

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.python_node import Server, python_node
from gater.erl import Node
from gater.erl.gen_server import start_server

CALLS = 100_000
CALLERS = 50

OBJECTS = 500
"""Python objects that may have come to stay: caches that fill up once, not something per call."""


def counts(node: Node) -> dict[str, int]:
    """Everything a call or a remote function may leave."""
    connections = list(node.peers.table.values())
    processes = list(node.processes())
    return {
        "connections": len(connections),
        "processes": len(processes),
        "aliases": len(node._aliases),
        "watched": sum(len(each.watched) for each in connections),
        "monitors": sum(len(each.monitors) for each in connections),
        "links": sum(len(each.links) for each in connections),
        "spawns": sum(len(each.spawns) for each in connections),
        "unlinking": sum(len(each.unlinking) for each in connections),
        "monitored_by": sum(len(each.monitored_by) for each in processes),
        "messages": sum(each.queue_length() for each in processes),
    }


async def test_100000_calls_leave_nothing(erl_node: BeamNode, beam: Beams) -> None:
    async with python_node(beam) as node:
        await start_server(node, Server(), name="counter")

        async def load(calls: int) -> int:
            """Calls, remote functions, links and monitors; the number of Python objects afterwards."""
            work = """
              Self = self(),
              Each = Calls div Callers,
              Pids = [spawn_link(fun() ->
                  [ok = gen_server:call({counter, N}, {echo, ok}) || _ <- lists:seq(1, Each)],
                  [N = erpc:call(N, erlang, node, []) || _ <- lists:seq(1, Each div 20)],
                  [begin link(P), unlink(P), demonitor(monitor(process, P), [flush]) end
                    || P <- [erpc:call(N, erlang, whereis, [counter])], _ <- lists:seq(1, Each div 20)],
                  Self ! {done, self()}
                end) || _ <- lists:seq(1, Callers)],
              [receive {done, P} -> ok end || P <- Pids],
              ok
            """
            await erl_node.eval(work, timeout_s=120, N=node.name, Calls=calls, Callers=CALLERS)
            await wait_until(lambda: counts(node) == idle, what=f"{idle} after {calls} calls")
            gc.collect()
            return len(gc.get_objects())

        await node.connect(erl_node.atom)
        idle = counts(node)
        before = await load(CALLS // 50)
        after = await load(CALLS)
        assert after - before < OBJECTS
