"""Two to seven trackers in any weather: once it is quiet they agree, and what they agree on is true.

`GATER_SIMULATIONS=5000 pytest tests/test_swarm_simulation.py` runs that many schedules of each kind; the falsifying
example that hypothesis prints holds the seed and the steps.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarm_simulation import GROUPS, World

from gater.erl.terms import Atom
from gater.swarm.messages import AddMeta, RemoveMeta, Track, Untrack, UntrackName
from gater.swarm.tracker import State

SCHEDULES = int(os.environ.get("GATER_SIMULATIONS", "100"))
NAMES = [(Atom("gateway_worker"), Atom("s"), n) for n in range(4)] + [b"alpha"]

numbers = st.integers(0, 1_000)
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["register"] * 5
            + ["everywhere"] * 2
            + ["register_other", "second_name", "untrack", "untrack_name", "kill", "kill", "join", "leave"]
            + ["cut", "split", "heal", "crash", "boot"]
        ),
        numbers,
        numbers,
        st.sampled_from([0.0, 0.0, 0.05, 0.3, 3.0]),
    ),
    max_size=40,
)
simulated = settings(
    max_examples=SCHEDULES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def play(world, schedule):
    if world.random.random() < 0.75:
        # Otherwise it all begins while they still wait for each other.
        world.run(7.0)
    nodes = list(world.nodes)
    for kind, a, b, pause in schedule:
        node, other, name = nodes[a % len(nodes)], nodes[b % len(nodes)], NAMES[b % len(NAMES)]
        pids = sorted(world.alive, key=str)
        pid = pids[b % len(pids)] if pids else None
        match kind:
            case "register":
                world.register(node, name)
            case "everywhere":
                for each in nodes:
                    world.register(each, name)
            case "register_other" if pid:
                world.call(node, Track(NAMES[a % len(NAMES)], pid, {}))
            case "second_name" if pid:
                world.call(pid.node, Track(NAMES[a % len(NAMES)], pid, {}))
            case "untrack" if pid:
                world.unregistered.add(pid)
                world.call(node, Untrack(pid))
            case "untrack_name":
                world.call(node, UntrackName(name))
            case "kill" if pid:
                world.kill(pid)
            case "join" if pid:
                world.call(node, AddMeta(GROUPS[a % 2], True, pid))
            case "leave" if pid:
                world.call(node, RemoveMeta(GROUPS[a % 2], pid))
            case "cut":
                world.disconnect(node, other)
            case "split":
                for i, one in enumerate(nodes):
                    for each in nodes[i + 1 :]:
                        if (b >> nodes.index(one)) % 2 != (b >> nodes.index(each)) % 2:
                            world.disconnect(one, each)
            case "heal":
                world.heal()
            case "crash":
                world.crash(node)
            case "boot":
                world.boot(node)
        world.run(pause)


def shown(machine):
    return {entry.name: (entry.pid, entry.meta) for entry in machine.registry}


def check_all_come_back_to_tracking(world):
    waiting = set(world.machines())
    for _ in range(200):
        waiting = {machine for machine in waiting if machine.state is not State.TRACKING}
        if not waiting:
            return
        world.run(0.1)
    raise AssertionError([machine.state for machine in waiting])


def check_ours(world):
    check_all_come_back_to_tracking(world)
    ours = world.machines()
    if not ours:
        return
    agreed = shown(ours[0])
    for machine in ours:
        assert shown(machine) == agreed, (machine.node, ours[0].node)
        assert machine.contested == []
    assert {pid for pid, _ in agreed.values()} <= world.alive
    untouched = world.alive - world.told_to_die - world.unregistered
    for name, pid in world.granted:
        if pid in untouched and not world.nodes[pid.node].original:
            assert agreed.get(name, (None,))[0] == pid, (name, pid)


def check_nobody_lost_a_name_to_nobody(world):
    """A name whose processes neither ended for another reason nor were unregistered still has one of them."""
    several_names = {pid for pid, names in world.asked_for.items() if len(names) > 1}
    for name in {name for name, _ in world.granted}:
        pids = {pid for pid, names in world.asked_for.items() if name in names}
        if not pids & (world.died | world.unregistered | several_names):
            assert any(name in machine.registry for machine in world.machines()), name


@simulated
@given(seed=numbers, members=st.integers(2, 7), schedule=steps)
def test_our_trackers_agree_on_the_truth(seed, members, schedule):
    # Without anti-entropy: among ours, events and the sync at nodeup are enough.
    world = World(seed, members, anti_entropy_s=1e6)
    play(world, schedule)
    world.quiet(30.0)
    check_ours(world)
    check_nobody_lost_a_name_to_nobody(world)


@simulated
@given(
    seed=numbers,
    members=st.integers(2, 6),
    schedule=steps,
    first=st.booleans(),
    original_s=st.sampled_from([20.0, 1e6]),
)
def test_beside_an_original_ours_agree_on_the_truth(seed, members, schedule, first, original_s):
    # Most originals never compare registries by themselves: they do only if they were alone when they joined.
    world = World(
        seed, members, originals=1, original_first=first, anti_entropy_s=20.0, original_anti_entropy_s=original_s
    )
    play(world, schedule)
    world.quiet(200.0)
    check_ours(world)
    for original in world.machines(original=True):
        for machine in world.machines():
            for entry in original.registry.on_node(original.node):
                assert machine.registry.get(entry.name).pid == entry.pid


@pytest.mark.parametrize("members", [2, 5])
def test_a_world_without_trouble_needs_no_repair(members):
    world = World(1, members)
    world.run(10.0)
    for i, node in enumerate(world.nodes):
        world.register(node, (b"name", i))
    world.run(2.0)
    for machine in world.machines():
        assert len(machine.registry) == members
        assert len(machine.nodes) == members - 1
