"""What peers may do to streams and to the texts of errors: single bytes, made-up flags, reasons of any shape."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from gater.erl import etf
from gater.erl.connection import FrameReader
from gater.erl.errors import CallError, shown
from gater.erl.handshake import MANDATORY_FLAGS, OUR_FLAGS, Handshake, LocalIdentity
from gater.erl.terms import Atom, ImproperList, TermMap


def kept(act: Callable[[], object]) -> int:
    """Bytes that are still allocated after `act`, beyond what it returned."""
    act()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        act()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_a_frame_that_comes_byte_by_byte_takes_little_more_than_its_bytes() -> None:
    reader = FrameReader()
    size = 200_000
    reader.feed((size + 1).to_bytes(4, "big"))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for value in range(size):
            assert reader.feed(bytes((value & 255,))) == []
        assert tracemalloc.get_traced_memory()[0] - before < 2 * size
    finally:
        tracemalloc.stop()
    (frame,) = reader.feed(b"x")
    assert frame == bytes(value & 255 for value in range(size)) + b"x"


@pytest.mark.parametrize("role", ["acceptor", "initiator"])
def test_flags_that_peers_make_up_are_not_remembered(role: str) -> None:
    local = LocalIdentity("a@b", OUR_FLAGS, 1)

    def shake() -> None:
        for number in range(500):
            flags = (int(MANDATORY_FLAGS) | number << 40).to_bytes(8, "big")
            if role == "acceptor":
                machine = Handshake("acceptor", local, challenge=1)
                packet = b"N" + flags + b"\0\0\0\1" + b"\0\3c@d"
                machine.start()
            else:
                machine = Handshake("initiator", local, challenge=1, cookie="x", peer_name="c@d")
                packet = b"N" + flags + b"\0\0\0\1" + b"\0\0\0\1" + b"\0\3c@d"
                machine.start()
                machine.receive(b"\0\3sok")
            assert machine.receive(len(packet).to_bytes(2, "big") + packet)

    assert kept(shake) < 10_000


def deep(levels: int) -> object:
    return etf.decode(b"\x83" + b"l\0\0\0\1" * levels + b"j" * (levels + 1))


@pytest.mark.parametrize(
    "reason",
    [
        10**10_000,
        -(10**10_000),
        deep(10_000),
        {1: deep(5_000)},
        (deep(5_000),),
        ImproperList([deep(5_000)], deep(5_000) and (deep(5_000),)),
        TermMap([([], deep(5_000)), (deep(5_000), 1)]),
        b"x" * 10_000_000,
        [1] * 1_000_000,
        dict.fromkeys(range(100000), 1),
    ],
    ids=["large", "small", "list", "map", "tuple", "improper", "term map", "binary", "long list", "long map"],
)
def test_the_reason_of_a_failed_call_is_shown_short_whatever_it_is(reason: object) -> None:
    error = CallError(reason)
    assert error.reason is reason
    assert len(str(error)) < 20_000


def test_usual_reasons_are_shown_whole() -> None:
    for reason in ((Atom("nodedown"), Atom("a@b")), {Atom("a"): [1, 2.5, b"text"]}, ImproperList([1], 2), [], ()):
        assert shown(reason) == repr(reason)
    assert shown(TermMap([([], 1)])) == "TermMap([([], 1)])"
