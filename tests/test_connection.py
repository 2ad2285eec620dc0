"""Cutting a stream into frames."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.connection import FrameReader
from gater.erl.errors import LimitExceeded


def framed(bodies: list[bytes]) -> bytes:
    return b"".join(struct.pack(">I", len(body)) + body for body in bodies)


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_frames_come_out_whole_however_the_stream_is_cut(bodies: list[bytes], data: st.DataObject) -> None:
    stream = framed(bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader = FrameReader()
    frames: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames += reader.feed(stream[start:end])
    assert frames == bodies


def test_a_stream_that_comes_byte_by_byte_is_cut_all_the_same() -> None:
    reader = FrameReader()
    assert [frame for byte in framed([b"one", b"", b"two"]) for frame in reader.feed(bytes((byte,)))] == [
        b"one",
        b"",
        b"two",
    ]


def test_a_prefix_beyond_the_limit_is_refused_before_anything_is_kept() -> None:
    with pytest.raises(LimitExceeded, match="MAX_FRAME_BYTES allows 100, got 4294967295"):
        FrameReader(100).feed(b"\xff\xff\xff\xff")


def test_a_frame_of_exactly_the_limit_is_accepted() -> None:
    assert FrameReader(3).feed(framed([b"abc"])) == [b"abc"]
