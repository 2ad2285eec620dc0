"""The registry: every index agrees with a plain search, names are told apart as Erlang does, size and speed."""

import sys
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.terms import Atom, ImproperList, Pid, Reference, exact_equal, exact_key
from gater.swarm.registry import NO_META, Entry, Registry, name_key

NODE = Atom("a@127.0.0.1")
WORKER = Atom("gateway_worker")
CLOCK = (0, 1)

atoms = st.sampled_from([Atom("ok"), Atom("gateway_worker"), Atom("s"), True, False, None])
plain = st.one_of(atoms, st.integers(-2, 2), st.sampled_from([b"a", b"s", "a", "s", 0.0, -0.0, 1.0, 2.0]))
pids = st.builds(Pid, st.sampled_from([NODE, Atom("b@127.0.0.1")]), st.integers(1, 3), st.just(0), st.integers(1, 2))
terms = st.recursive(
    st.one_of(plain, pids, st.builds(Reference, st.just(NODE), st.just(1), st.just((1, 2, 3)))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(ImproperList, st.lists(inner, min_size=1, max_size=2), plain),
        st.dictionaries(st.sampled_from([b"a", Atom("s")]), inner, max_size=2),
    ),
    max_leaves=6,
)
metas = st.dictionaries(st.sampled_from([Atom("grp"), b"grp", 1]), st.sampled_from([True, 1, 1.0]), max_size=2)
entries = st.builds(Entry, terms, pids, metas, st.just(CLOCK))


@given(terms, terms)
def test_two_names_have_one_key_exactly_when_erlang_calls_them_equal(one, other):
    assert (name_key(one) == name_key(other)) == exact_equal(one, other)


@given(st.lists(st.one_of(entries, terms), max_size=25), terms, pids)
def test_every_index_agrees_with_a_search_through_all_entries(steps, name, pid):
    registry, model = Registry(), {}
    for step in steps:
        if isinstance(step, Entry):
            assert registry.put(step) is model.get(exact_key(step.name))
            model[exact_key(step.name)] = step
        else:
            assert registry.remove(step) is model.pop(exact_key(step), None)

    def same(found, expected):
        assert sorted(map(id, found)) == sorted(map(id, expected))

    everything = list(model.values())
    names = [name, *(entry.name for entry in everything)]
    assert len(registry) == len(everything)
    same(registry, everything)
    same(registry.entries(), everything)
    for each in names:
        assert registry.get(each) is model.get(exact_key(each))
        assert (each in registry) == (exact_key(each) in model)
    for each in (pid, *(entry.pid for entry in everything)):
        same(registry.by_pid(each), [entry for entry in everything if entry.pid == each])
        on_node = [entry for entry in everything if entry.pid.node is each.node]
        same(registry.on_node(each.node), on_node)
        assert registry.names_on_node(each.node) == len(on_node)
    assert set(registry.nodes()) == {entry.pid.node for entry in everything}
    for key in (Atom("grp"), b"grp", "grp", 1, 1.0):
        having = [
            (entry, value) for entry in everything for held, value in entry.meta.items() if exact_equal(held, key)
        ]
        same(registry.with_property(key), [entry for entry, _ in having])
        assert set(registry.members(key)) == {entry.pid for entry, _ in having}
        assert len(registry.members(key)) == len(set(registry.members(key)))
        same(registry.with_property(key, 1), [entry for entry, value in having if exact_equal(value, 1)])
    for each in names:
        if type(each) is tuple:
            for length in range(1, len(each) + 1):
                start = each[:length]
                same(
                    registry.starting_with(*start),
                    [
                        entry
                        for entry in everything
                        if type(entry.name) is tuple and len(entry.name) > 1 and exact_equal(entry.name[:length], start)
                    ],
                )


def test_the_workers_of_a_store_are_one_look_up():
    registry = Registry()
    for store in ("s1", "s2"):
        for n in range(3):
            registry.put(Entry((WORKER, Atom(store), NODE, n), Pid(NODE, n, 0, 1), NO_META, CLOCK))
    registry.put(Entry((Atom("gater_api"), 7), Pid(NODE, 9, 0, 1), NO_META, CLOCK))
    assert [entry.name[3] for entry in registry.starting_with(WORKER, Atom("s1"))] == [0, 1, 2]
    assert [entry.name[3] for entry in registry.starting_with(WORKER, Atom("s1"), NODE, 1)] == [1]
    assert len(registry.starting_with(WORKER)) == 6
    assert registry.starting_with(WORKER, Atom("s3")) == []
    assert registry.starting_with(Atom("nobody")) == []


def test_an_emptied_registry_holds_nothing():
    registry = Registry()
    for n in range(4):
        registry.put(Entry((WORKER, n % 2, n), Pid(NODE, n % 3, 0, 1), {Atom("grp"): True}, CLOCK))
    for n in range(4):
        registry.remove((WORKER, n % 2, n))
    assert not any((registry._by_name, registry._by_node, registry._by_property, registry._by_first))


def stream_name(n):
    return (Atom("streams_reader_worker"), Atom("reg_gh"), b"stream-%08d" % n)


def full_registry(count):
    registry = Registry()
    for n in range(count):
        registry.put(Entry(stream_name(n), Pid(NODE, 1000 + n, 0, 0x6B03A82B), NO_META, CLOCK))
    return registry


@pytest.mark.skipif(sys.gettrace() is not None, reason="measures")
def test_a_name_costs_at_most_600_bytes_with_its_pid_and_every_index():
    count = 25_000
    tracemalloc.start()
    try:
        registry = full_registry(count)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(registry) == count
    assert used / count < 600


@pytest.mark.skipif(sys.gettrace() is not None, reason="measures")
def test_looking_up_a_worker_takes_no_longer_in_a_large_registry():
    def microseconds(registry):
        wanted = [(WORKER, Atom("s"), NODE, n) for n in range(10)]
        for name in wanted:
            registry.put(Entry(name, Pid(NODE, name[3], 0, 1), NO_META, CLOCK))
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for name in wanted * 20:
                registry.get(name)
            best = min(best, (time.perf_counter() - start) / 200 * 1e6)
        return best

    small, large = microseconds(full_registry(10)), microseconds(full_registry(100_000))
    assert large < 2
    assert large < 3 * small
