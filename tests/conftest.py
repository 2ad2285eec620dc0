"""What holds for all tests here."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from gater import system
from gater.erl.etf import COMPILED

# How long an example takes says more about what else the machine is doing than about the code.
settings.register_profile("gater", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gater")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In what is compiled, constants are built in, and Python code cannot make subclasses of its classes."""
    if COMPILED:
        for item in items:
            if item.get_closest_marker("changes_source") is not None:
                item.add_marker(pytest.mark.skip(reason="changes what is built in where gater is compiled"))


@pytest.fixture(autouse=True)
def _quick_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway joins the cluster of names at once. A stop, which frees its names, would wait for that otherwise."""
    monkeypatch.setattr(system, "SYNC_NODES_TIMEOUT_S", 0.02)


@pytest.fixture
def young_heap() -> Iterator[None]:
    """`gc` knows what the test has made and nothing older: counting objects costs the same at any point of a session.

    With the objects of two thousand tests before it, one count takes most of a second on a busy machine, during which
    nothing that is waited for can happen.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
