"""A few seconds of what `make soak` does for ten minutes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from erlang_interop_tests.beam import Beams
from erlang_interop_tests.soak import soak

SECONDS = 4.0


@pytest.fixture
def quiet() -> Iterator[None]:
    """Processes crash by the thousand here, each with a log line."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("quiet")
async def test_every_call_is_answered_and_nothing_stays_behind(beam: Beams) -> None:
    verdict = await soak(SECONDS, 1, beam)
    assert not verdict.faults, "\n".join(verdict.lines)
