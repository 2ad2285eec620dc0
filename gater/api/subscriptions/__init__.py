"""Subscriptions that never miss: a pure engine, `Feed`, and what goes in and comes out of it (`protocol.py`).

Floors within: `protocol`, `matching`, `checkpoints`, `poll` know nobody; `delivery` (what is with subscribers) and
`backlog` (what a subscription is behind in) know the protocol; `subscription` joins them, `feed` runs the subscriptions
of one store. Nothing here knows an event loop, a socket or a clock.
"""

from gater.api.subscriptions.feed import Feed
from gater.api.subscriptions.matching import Matcher, SelectorError, compile_selector

__all__ = ["Feed", "Matcher", "SelectorError", "compile_selector"]
