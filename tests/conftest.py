"""What holds for all tests here."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes says more about what else the machine is doing than about the code.
settings.register_profile("gater", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gater")
