"""Which worker gets a request: registries, owners of streams, load and circuit breakers, without any node."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.api import router as router_module
from gater.api.router import MAX_FAILURES, MAX_OPEN_S, OPEN_S, Registered, Router, parse_registry
from gater.erl.terms import Atom, Pid, Term

STORE = Atom("reg_gh")
OTHER = Atom("other")
NODES = [Atom(f"store{number}@host") for number in range(4)]
NOW = 1_000.0


def pid(node: int, number: int) -> Pid:
    return Pid(NODES[node], number, 0, 1)


def entry(node: int, number: int, store: Atom = STORE) -> Registered:
    return Registered(store, NODES[node], pid(node, number))


def first(count: int) -> int:
    """Chance that always picks the first."""
    return 0


def in_turn(*picks: int) -> Callable[[int], int]:
    remaining = list(picks)
    return lambda count: remaining.pop(0)


def router_of(*entries: Registered, choose: Callable[[int], int] = first) -> Router:
    router = Router(choose)
    router.registered(NODES[0], entries)
    return router


# Registries


def test_gateway_workers_are_picked_out_of_a_registry() -> None:
    worker = ((Atom("gateway_worker"), STORE, NODES[0], 3), pid(0, 7))
    answer: list[Term] = [
        ((Atom("streams_reader_worker"), STORE, b"s"), pid(0, 1)),
        worker,
        ((Atom("gater_api"), 1), pid(0, 2)),
        ((Atom("gateway_worker"), b"no atom", NODES[0], 3), pid(0, 3)),
        ((Atom("gateway_worker"), STORE, NODES[0], 3), Atom("no_pid")),
        Atom("junk"),
        (),
    ]
    assert parse_registry(answer) == [Registered(STORE, NODES[0], pid(0, 7))]


@pytest.mark.parametrize("answer", [None, Atom("undefined"), (Atom("badrpc"), Atom("nodedown")), b"", {}], ids=str)
def test_an_answer_that_is_no_registry_names_nobody(answer: Term) -> None:
    assert parse_registry(answer) == []


def test_a_worker_counts_as_long_as_one_node_lists_it() -> None:
    router = Router(first)
    added, dropped = router.registered(NODES[0], [entry(2, 1)])
    assert ([worker.address for worker in added], dropped) == ([pid(2, 1)], [])
    assert router.registered(NODES[1], [entry(2, 1)]) == ([], [])
    assert router.registered(NODES[0], []) == ([], [])
    assert router.stores == [STORE]
    _, dropped = router.registered(NODES[1], [])
    assert [worker.address for worker in dropped] == [pid(2, 1)]
    assert (len(router), router.stores) == (0, [])


def test_a_lost_node_takes_its_workers_and_its_listings_with_it() -> None:
    router = Router(first)
    router.registered(NODES[0], [entry(0, 1), entry(1, 1), entry(2, 1)])
    router.registered(NODES[1], [entry(0, 1), entry(1, 1)])
    assert [worker.address for worker in router.node_down(NODES[0])] == [pid(0, 1)]
    # The worker on node 2 was listed by the lost node only.
    assert [worker.address for worker in router] == [pid(1, 1)]


def test_a_store_that_was_seen_stays_known_without_workers() -> None:
    router = router_of(entry(0, 1))
    (worker,) = router
    router.remove(worker)
    router.remove(worker)
    assert router.is_known(STORE)
    assert not router.is_known(OTHER)
    assert router.choose(STORE, b"s", NOW) is None


@pytest.mark.changes_source
def test_no_more_workers_are_kept_than_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WORKERS", 5)
    router = router_of(*(entry(0, number) for number in range(20)))
    assert len(router) == 5


# The choice


def test_the_less_loaded_of_two_random_workers_is_chosen() -> None:
    router = router_of(entry(0, 1), entry(0, 2), entry(0, 3), choose=in_turn(0, 1, 0, 1, 1, 1))
    one, two, _ = router.workers(STORE)
    one.load = 5
    assert router.choose(STORE, None, NOW) is two
    two.load = 9
    assert router.choose(STORE, None, NOW) is one
    assert router.choose(STORE, None, NOW) is two


def test_a_request_about_no_store_may_go_to_any_worker() -> None:
    router = router_of(entry(0, 1, OTHER))
    assert router.choose(None, None, NOW) is not None
    assert router.choose(STORE, None, NOW) is None


def test_another_gateway_serves_every_store_that_has_no_worker_of_its_own() -> None:
    router = router_of(entry(0, 1))
    through = router.add((Atom("api"), NODES[3]), NODES[3], None)
    assert router.add((Atom("api"), NODES[3]), NODES[3], None) is through
    assert router.choose(OTHER, b"s", NOW) is through
    chosen = router.choose(STORE, b"s", NOW)
    assert chosen is not None
    assert chosen.address == pid(0, 1)
    assert router.is_known(OTHER)


# Owners of streams


def test_every_gateway_chooses_the_same_owner_whatever_the_order_in_which_it_learned_the_nodes() -> None:
    entries = [entry(node, number) for node in range(4) for number in range(3)]
    shuffled = random.Random(7).sample(entries, len(entries))
    one, two = router_of(*entries), router_of(*shuffled, choose=lambda count: count - 1)
    for number in range(200):
        stream = b"stream-%d" % number
        assert one.owner(STORE, stream, NOW) is two.owner(STORE, stream, NOW)
        chosen = two.choose(STORE, stream, NOW)
        assert chosen is not None
        assert chosen.node is one.owner(STORE, stream, NOW)


def test_streams_are_spread_over_the_nodes() -> None:
    router = router_of(*(entry(node, 1) for node in range(4)))
    owned = Counter(router.owner(STORE, b"stream-%d" % number, NOW) for number in range(4_000))
    assert set(owned) == set(NODES)
    assert all(800 < count < 1_200 for count in owned.values())


def test_a_node_that_leaves_moves_its_own_streams_only() -> None:
    entries = [entry(node, 1) for node in range(4)]
    before, after = router_of(*entries), router_of(*entries[:3])
    for number in range(500):
        stream = b"stream-%d" % number
        owner = before.owner(STORE, stream, NOW)
        if owner is not NODES[3]:
            assert after.owner(STORE, stream, NOW) is owner
        else:
            assert after.owner(STORE, stream, NOW) is before.owners(STORE, stream)[1]


def test_the_next_in_order_answers_for_an_owner_that_is_avoided() -> None:
    router = router_of(*(entry(node, 1) for node in range(3)))
    owners = router.owners(STORE, b"s")
    assert router.owner(STORE, b"s", NOW, avoid=owners[:1]) is owners[1]
    assert router.owner(STORE, b"s", NOW, avoid=owners) is None
    assert router.owner(OTHER, b"s", NOW) is None


# Circuit breakers


def fail(router: Router, node: Atom, times: int, now: float = NOW) -> list[bool]:
    return [router.breaker(node).failed(now) for _ in range(times)]


def test_a_node_is_left_out_after_failures_in_a_row() -> None:
    router = router_of(*(entry(node, 1) for node in range(3)))
    owners = router.owners(STORE, b"s")
    assert fail(router, owners[0], MAX_FAILURES) == [False] * (MAX_FAILURES - 1) + [True]
    assert router.owner(STORE, b"s", NOW) is owners[1]
    for _ in range(20):
        chosen = router.choose(STORE, None, NOW)
        assert chosen is not None
        assert chosen.node is not owners[0]


def test_an_answer_between_failures_starts_the_count_anew() -> None:
    router = router_of(entry(0, 1), entry(1, 1))
    fail(router, NODES[0], MAX_FAILURES - 1)
    router.breaker(NODES[0]).succeeded()
    assert not any(fail(router, NODES[0], MAX_FAILURES - 1))
    assert router.breaker(NODES[0]).allows(NOW)


def test_after_a_while_one_request_is_let_through_and_its_answer_closes_the_breaker() -> None:
    router = router_of(entry(0, 1), entry(1, 1))
    breaker = router.breaker(NODES[0])
    fail(router, NODES[0], MAX_FAILURES)
    later = NOW + OPEN_S
    assert breaker.allows(later)
    breaker.probing(later)
    assert not breaker.allows(later)
    breaker.succeeded()
    assert breaker.allows(later)


def test_a_node_that_keeps_failing_is_asked_ever_less_often() -> None:
    breaker = router_of(entry(0, 1)).breaker(NODES[0])
    now, pauses = NOW, []
    for _ in range(MAX_FAILURES):
        breaker.failed(now)
    for _ in range(8):
        pauses.append(breaker.open_until - now)
        now = breaker.open_until
        breaker.probing(now)
        breaker.failed(now)
    assert pauses[0] == OPEN_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_OPEN_S


def test_a_worker_that_does_not_answer_is_left_out_beside_others_of_its_node() -> None:
    router = router_of(entry(0, 1), entry(0, 2), choose=random.Random(0).randrange)
    silent, other = router.workers(STORE)
    for _ in range(MAX_FAILURES):
        router.asked(silent, NOW)
        router.unanswered(silent, NOW)

    def chosen(now: float, stream: bytes | None) -> set[object]:
        return {router.choose(STORE, stream, now) for _ in range(20)}

    for stream in (None, b"s"):
        assert chosen(NOW, stream) == {other}
    later = NOW + OPEN_S
    assert chosen(later, b"s") == {silent, other}
    router.asked(silent, later)
    assert chosen(later, b"s") == {other}, "one request is the probe"
    router.answered(silent)
    assert chosen(later, b"s") == {silent, other}
    # The only one left is asked all the same, and nothing is kept of one that is gone.
    for _ in range(MAX_FAILURES):
        router.unanswered(silent, NOW)
    router.remove(other)
    assert chosen(NOW, b"s") == {silent}
    router.remove(silent)
    assert not router._slow


def test_a_suspect_node_gets_nothing_until_it_answers_again() -> None:
    router = router_of(*(entry(node, 1) for node in range(3)))
    owner, second, _ = router.owners(STORE, b"stream")
    router.suspect(owner, True)
    assert router.owner(STORE, b"stream", NOW) is second
    assert all(worker.node is not owner for _ in range(10) if (worker := router.choose(STORE, None, NOW)) is not None)
    # However long ago it was: it is others who ask it.
    assert router.owner(STORE, b"stream", NOW + 10 * MAX_OPEN_S) is second
    for _ in range(MAX_FAILURES):
        router.breaker(owner).failed(NOW)
    router.suspect(owner, False)
    assert router.owner(STORE, b"stream", NOW) is owner
    router.suspect(owner, True)
    router.node_down(owner)
    router.registered(NODES[0], [entry(node, 1) for node in range(3)])
    assert router.owner(STORE, b"stream", NOW) is owner


def test_a_node_that_is_no_member_of_the_store_is_not_asked_about_it() -> None:
    other = Atom("other_store")
    router = router_of(*(entry(node, 1) for node in range(3)), entry(0, 2, other))
    owner, second, third = router.owners(STORE, b"stream")
    router.members(STORE, (second, third))
    assert router.owners(STORE, b"stream") == [second, third]
    assert set(router.nodes(STORE)) == {second, third}
    assert router.owner(STORE, b"stream", NOW, avoid=(second, third)) is None
    assert router.choose(other, b"stream", NOW) is not None
    router.members(STORE, (NODES[3],))
    assert router.choose(STORE, b"stream", NOW) is None, "no answer is better than one of the past"
    router.members(STORE, ())
    assert router.owner(STORE, b"stream", NOW) is owner, "who the members are is not known"


def test_gateways_that_see_different_workers_agree_on_every_owner_both_see() -> None:
    members = NODES[:3]
    # One has found the workers of a node that is no member yet, the other those of a member only the other misses.
    one = router_of(entry(0, 1), entry(1, 1), entry(3, 1))
    two = router_of(entry(0, 1), entry(2, 1))
    everything = router_of(*(entry(node, 1) for node in range(4)))
    for router in (one, two, everything):
        router.members(STORE, members)
    agreed = 0
    for number in range(300):
        stream = b"stream-%d" % number
        ranked = everything.owners(STORE, stream)
        assert set(ranked) == set(members)
        # Who has no worker is passed over, and the others keep their order.
        assert one.owners(STORE, stream) == [node for node in ranked if node is not NODES[2]]
        assert two.owners(STORE, stream) == [node for node in ranked if node is not NODES[1]]
        if ranked[0] is NODES[0]:
            agreed += 1
            assert one.owner(STORE, stream, NOW) is two.owner(STORE, stream, NOW) is NODES[0]
    assert agreed > 50


@pytest.mark.changes_source
def test_the_order_of_nodes_is_found_anew_when_workers_or_members_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_RANKED", 10)
    router = router_of(entry(0, 1), entry(1, 1))
    for number in range(50):
        assert set(router.owners(STORE, b"%d" % number)) == set(NODES[:2])
        router.owners(Atom(f"unknown{number}"), b"s")
        router.choose(Atom(f"unknown{number}"), None, NOW)
    assert (len(router._ranked), len(router._serving)) == (10, 1)
    router.registered(NODES[1], [entry(2, 1)])
    assert set(router.owners(STORE, b"49")) == set(NODES[:3])
    router.node_down(NODES[0])
    assert set(router.owners(STORE, b"49")) == {NODES[2]}
    router.members(STORE, NODES[:2])
    assert router.owners(STORE, b"49") == []


def test_when_every_node_is_left_out_one_is_asked_all_the_same() -> None:
    router = router_of(entry(0, 1), entry(1, 1))
    for node in NODES[:2]:
        fail(router, node, MAX_FAILURES)
    assert router.owner(STORE, b"s", NOW) is router.owners(STORE, b"s")[0]
    assert router.choose(STORE, None, NOW) is not None


def test_a_node_that_comes_back_starts_with_a_closed_breaker() -> None:
    router = router_of(entry(0, 1), entry(1, 1))
    fail(router, NODES[1], MAX_FAILURES)
    router.node_down(NODES[1])
    assert router.breaker(NODES[1]).allows(NOW)


# Whatever happens


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("listed"),
            st.integers(0, 3),
            st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from([STORE, OTHER])), max_size=6),
        ),
        st.tuples(st.just("down"), st.integers(0, 3), st.just([])),
        st.tuples(st.just("died"), st.integers(0, 11), st.just([])),
    ),
    max_size=30,
)


@given(OPERATIONS)
def test_only_workers_that_are_listed_and_alive_are_chosen(
    operations: list[tuple[str, int, list[tuple[int, int, Atom]]]],
) -> None:
    router = Router(random.Random(1).randrange)
    # A pid is of one store only.
    listings: dict[Atom, dict[Pid, Atom]] = {}
    kinds: dict[Pid, Atom] = {}
    for what, number, named in operations:
        if what == "listed":
            entries = [entry(node, index, kinds.setdefault(pid(node, index), store)) for node, index, store in named]
            router.registered(NODES[number], entries)
            listings[NODES[number]] = {each.pid: each.store for each in entries}
        elif what == "down":
            router.node_down(NODES[number])
            listings.pop(NODES[number], None)
            for listed in listings.values():
                for each in [each for each in listed if each.node is NODES[number]]:
                    del listed[each]
        else:
            workers = list(router)
            if workers:
                died = workers[number % len(workers)]
                router.remove(died)
                for listed in listings.values():
                    listed.pop(died.address, None)
        alive = {each: store for listed in listings.values() for each, store in listed.items()}
        assert {worker.address: worker.store for worker in router} == alive
        for store in (STORE, OTHER):
            chosen = router.choose(store, b"s", NOW)
            of_store = {each for each, kind in alive.items() if kind is store}
            assert (chosen.address in of_store) if chosen is not None else not of_store
            assert {worker.address for worker in router.workers(store)} == of_store
