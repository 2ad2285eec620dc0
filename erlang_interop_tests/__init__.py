"""Tests of gater against real `erl` and `elixir` nodes."""
