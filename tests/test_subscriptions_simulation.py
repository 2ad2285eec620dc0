"""The subscription engine under thousands of schedules: see `subscriptions_simulation.py`.

`GATER_SUBSCRIPTION_SCHEDULES=20000` runs more of them, `GATER_SUBSCRIPTION_SEED=n` one.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from subscriptions_simulation import Simulation

SCHEDULES = int(os.environ.get("GATER_SUBSCRIPTION_SCHEDULES", "200"))
SEED = os.environ.get("GATER_SUBSCRIPTION_SEED")


@settings(max_examples=SCHEDULES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_every_wanted_event_is_delivered_in_order_whatever_fails(seed: int) -> None:
    note(f"GATER_SUBSCRIPTION_SEED={seed}")
    Simulation(seed).run()


@pytest.mark.skipif(SEED is None, reason="no seed given")
def test_the_schedule_of_one_seed() -> None:
    Simulation(int(SEED or 0)).run()
