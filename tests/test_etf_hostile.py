"""Bytes made to cost more than they weigh: each of these once took quadratic time, recursion or memory."""

from __future__ import annotations

import contextlib
import gc
import time

import pytest

from gater.erl import etf
from gater.erl.errors import DecodeError, LimitExceeded
from gater.erl.terms import Atom, Pid, TermMap, exact_key
from gater.swarm.ring import HashRing

COLLIDING_STEP = 2**61 - 1
"""CPython's hash of an integer is its remainder by this."""

PID = etf.encode_term(Pid(Atom("a@b"), 1, 0, 1))


def cpu_seconds(data: bytes) -> float:
    best = 1e9
    for _ in range(3):
        start = time.thread_time()
        etf.decode(data)
        best = min(best, time.thread_time() - start)
    return best


def nested_keys(levels: int) -> bytes:
    return b"\x83" + b"t\0\0\0\1" * levels + b"j" + b"a\1" * levels


@pytest.mark.parametrize("wrap", [b"", b"h\1", b"h\1h\1"])
def test_maps_nested_in_the_keys_of_maps_take_linear_time(wrap: bytes) -> None:
    def nested(levels: int) -> bytes:
        return b"\x83" + (b"t\0\0\0\1" + wrap) * levels + b"a\1" + b"a\1" * levels

    small, large = cpu_seconds(nested(250)), cpu_seconds(nested(4000))
    assert large < 16 * small * 4


def test_maps_nested_in_keys_keep_their_meaning() -> None:
    term = etf.decode(nested_keys(50))
    depth = 0
    while isinstance(term, TermMap):
        ((term, value),) = term.pairs()
        assert value == 1
        depth += 1
    assert (depth, term) == (50, [])


def test_the_digest_of_a_map_seen_before_is_the_digest_it_has_alone() -> None:
    inner = TermMap([([], 1), ({}, 2)])
    digests: dict[int, bytes] = {}
    first = exact_key([inner, (inner,)], digests)
    assert digests
    assert exact_key([inner, (inner,)], digests) == first == exact_key([inner, (inner,)])


@pytest.mark.parametrize("make", [lambda number: number, lambda number: (number,), lambda number: [number]])
def test_a_map_of_keys_chosen_to_meet_is_refused_or_harmless(make: object) -> None:
    keys = [etf.encode_term(make(COLLIDING_STEP * index)) for index in range(1, 20_000)]  # type: ignore[operator]
    data = b"\x83t" + len(keys).to_bytes(4, "big") + b"".join(key + b"j" for key in keys)
    started = time.thread_time()
    with contextlib.suppress(LimitExceeded):
        assert len(etf.decode(data)) == len(keys)
    assert time.thread_time() - started < 2


def test_a_map_of_keys_that_cannot_stand_in_a_dict_is_guarded_alike() -> None:
    keys = [COLLIDING_STEP * index for index in range(1, 2_000)]
    pairs = b"".join(etf.encode_term(key) + b"j" for key in keys) + b"jj"
    with pytest.raises(LimitExceeded, match="MAX_KEYS_OF_ONE_HASH"):
        etf.decode(b"\x83t" + (len(keys) + 1).to_bytes(4, "big") + pairs)


def test_large_maps_of_numbers_and_pids_are_maps() -> None:
    node = Atom("a@b")
    keys = [*range(2_000), *map(float, range(2_000)), *(Pid(node, 1, 0, creation) for creation in range(2_000))]
    term = etf.decode(b"\x83t" + len(keys).to_bytes(4, "big") + b"".join(etf.encode_term(key) + b"j" for key in keys))
    assert len(term) == len(keys)
    assert term[1.0] == []
    assert term[Pid(node, 1, 0, 7)] == []


@pytest.mark.parametrize("levels", [2, 200, 20_000])
def test_the_creator_of_a_fun_is_a_pid_and_nothing_that_nests(levels: int) -> None:
    data = b"\x83" + b"u\0\0\0\0" * levels + b"j" * 4 * levels
    with pytest.raises(DecodeError, match="creator"):
        etf.decode(data)
    with pytest.raises(DecodeError, match="creator"):
        etf.skip_term(data, 1)


@pytest.mark.parametrize("uniq", [etf.encode_term([]), etf.encode_term(2**40), etf.encode_term(Atom("x"))])
def test_the_numbers_of_a_fun_are_numbers(uniq: bytes) -> None:
    body = b"\0" + bytes(16) + bytes(4) + bytes(4) + etf.encode_term(Atom("m")) + b"a\0" + uniq + PID
    data = b"\x83p" + (len(body) + 4).to_bytes(4, "big") + body
    with pytest.raises(DecodeError, match="small integers"):
        etf.decode(data)


def test_the_head_of_a_spine_is_counted_before_it_is_built() -> None:
    heads = etf.MAX_ELEMENTS + 1
    data = b"i" + (heads + 1).to_bytes(4, "big") + b"j" * (heads + 1)
    with pytest.raises(LimitExceeded, match="MAX_ELEMENTS"):
        etf.decode_spine(data, 0, 2, etf.AtomTable())
    inner = b"h\2l" + heads.to_bytes(4, "big") + b"j" * heads + b"j" + b"j"
    with pytest.raises(LimitExceeded, match="MAX_ELEMENTS"):
        etf.decode_spine(inner, 0, 1, etf.AtomTable())


def test_small_maps_count_for_the_memory_they_take() -> None:
    count = etf.MAX_ELEMENTS // 7 + 1
    data = b"l" + count.to_bytes(4, "big") + b"t\0\0\0\1jj" * count + b"j"
    assert count * 3 < etf.MAX_ELEMENTS
    with pytest.raises(LimitExceeded, match="MAX_ELEMENTS"):
        etf.decode_term(data, 0, etf.AtomTable())


@pytest.mark.parametrize("cut", [0, 5])
def test_the_garbage_collector_goes_on_after_a_large_term(cut: int) -> None:
    data = etf.encode([[number] for number in range(100_000)])
    assert gc.isenabled()
    with contextlib.suppress(DecodeError):
        etf.decode(data[: len(data) - cut])
    assert gc.isenabled()
    gc.disable()
    try:
        with contextlib.suppress(DecodeError):
            etf.decode(data[: len(data) - cut])
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "data",
    [
        b"F\x7f\xf0" + bytes(6),
        b"F\xff\xf8" + bytes(6),
        b"c" + b"nan".ljust(31, b"\0"),
        b"c" + b"1.0e999".ljust(31, b"\0"),
        b"M\0\0\0\1\0x",
        b"M\0\0\0\1\x09x",
        b"M\0\0\0\0\1",
    ],
)
def test_what_is_passed_on_unread_is_checked_as_what_is_read(data: bytes) -> None:
    with pytest.raises(DecodeError):
        etf.decode_term(data, 0, etf.AtomTable())
    with pytest.raises(DecodeError):
        etf.skip_term(data, 0)
    body = b"\0" + bytes(16) + bytes(4) + b"\0\0\0\1" + etf.encode_term(Atom("m")) + b"a\0a\0" + PID + data
    with pytest.raises(DecodeError):
        etf.decode(b"\x83p" + (len(body) + 4).to_bytes(4, "big") + body)


def test_a_closure_that_holds_no_term_has_a_place_on_the_ring_nonetheless() -> None:
    twice = b"t\0\0\0\2jjjj"
    body = b"\0" + bytes(16) + bytes(4) + b"\0\0\0\1" + etf.encode_term(Atom("m")) + b"a\0a\0" + PID + twice
    name = etf.decode(b"\x83p" + (len(body) + 4).to_bytes(4, "big") + body)
    ring = HashRing()
    strategy_node = Atom("a@b")
    ring.add_node(strategy_node)
    assert ring.key_to_node(name) is strategy_node
