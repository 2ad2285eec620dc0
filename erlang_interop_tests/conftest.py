"""Fixtures that start real BEAM nodes and end them again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, Epmd, beams
from erlang_interop_tests.standin import StandInCluster, standin_cluster


@pytest.fixture
async def epmd() -> AsyncIterator[Epmd]:
    """A real `epmd` on a port of its own."""
    async with Epmd() as started:
        yield started


@pytest.fixture
async def beam() -> AsyncIterator[Beams]:
    """Starts nodes: `await beam.start("erlang" | "elixir", otp=25 | 28, ...)`. A real `epmd` runs on demand."""
    async with beams() as started:
        yield started


@pytest.fixture(params=[25, 28], ids=["otp25", "otp28"])
def otp(request: pytest.FixtureRequest) -> int:
    """The OTP releases interop tests run against."""
    release: int = request.param
    return release


@pytest.fixture
async def erl_node(beam: Beams, otp: int) -> BeamNode:
    """A plain Erlang node of each OTP release."""
    return await beam.start("erlang", otp=otp)


@pytest.fixture
async def elixir_node(beam: Beams) -> BeamNode:
    """An Elixir node (Debian's, on OTP 25)."""
    return await beam.start("elixir")


@pytest.fixture
async def standin(beam: Beams) -> AsyncIterator[StandInCluster]:
    """A stand-in store of one member."""
    async with standin_cluster(beam) as cluster:
        yield cluster


@pytest.fixture
async def standin_of_three(beam: Beams) -> AsyncIterator[StandInCluster]:
    """A stand-in cluster of three members."""
    async with standin_cluster(beam, 3) as cluster:
        yield cluster
