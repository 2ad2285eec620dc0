"""The Erlang node is useful without what is built on it: nothing in `gater/erl` knows of that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gater.erl

SOURCES = sorted(Path(gater.erl.__file__).parent.rglob("*.py"))
ABOVE = re.compile(r"ex_?esdb|swarm|gateway|khepri|phoenix", re.IGNORECASE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_node_mentions_what_is_built_on_it(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if ABOVE.search(line)]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_node_imports_what_is_built_on_it(path: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) (gater[\w.]*)", path.read_text(), re.MULTILINE)
    assert all(name == "gater.erl" or name.startswith("gater.erl.") for name in imported)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_node_reads_the_environment(path: Path) -> None:
    assert not re.search(r"os\.environ|os\.getenv", path.read_text())
