"""The documentation says what is so: links lead somewhere, and tables have every name and value of the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import gater
from gater import erl
from gater.api import gateway, schema, server
from gater.api.service import Service
from gater.erl.exports import Exports
from gater.erl.terms import Atom
from gater.errors import GaterError

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
UNITS = {"MiB": 1024 * 1024, "s": 1}


def page(name: str) -> str:
    return (DOCS / name).read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_to_pages_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_file(), f"{target} leads nowhere"
        headings = [
            re.sub(r"[^a-z0-9]+", "-", line.lstrip("# ").lower()).strip("-")
            for line in linked.read_text().splitlines()
            if line.startswith("#")
        ]
        assert not heading or heading in headings, f"{target} leads to no heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_page_can_be_found(path: Path) -> None:
    name = str(path.relative_to(DOCS))
    assert name in (DOCS.parent / "mkdocs.yml").read_text()
    assert name == "index.md" or f"({name})" in page("index.md")


@pytest.mark.parametrize("name", ["terms.md", "erlang-node.md"])
def test_limits_have_the_values_of_the_code(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)\.([A-Z_]+)` \| ([\d,]+)(?: (\w+))? \|", page(name), re.MULTILINE)
    assert len(rows) >= 5
    for module, limit, value, unit in rows:
        expected = int(value.replace(",", "")) * UNITS.get(unit, 1)
        assert getattr(importlib.import_module(f"gater.erl.{module}"), limit) == expected, limit


def test_every_module_of_the_node_has_a_section() -> None:
    headings = re.findall(r"^## (\w+)$", page("protocol.md"), re.MULTILINE)
    modules = {path.stem for path in Path(erl.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules <= set(headings)
    assert len(headings) == len(set(headings))


def test_every_function_of_the_api_is_in_the_table_with_its_arities() -> None:
    exports = Exports()
    server.export_api(exports, Service.__new__(Service))
    functions = exports.functions(Atom(server.API_MODULE))
    assert len(functions) > 20
    rows = [row for row in page("gateway.md").splitlines() if row.startswith("| `")]
    for function, arity in functions:
        described = [
            named
            for row in rows
            for named in [re.match(rf"\| `{function}\((.*?)\)`(.*?) \|", row)]
            if named is not None
        ]
        assert described, f"{function} is not described"
        arities = {len([each for each in named[1].split(",") if each.strip()]) for named in described}
        arities |= {int(each) for named in described for each in re.findall(r"`/(\d)`", named[2])}
        assert arity in arities, f"{function}/{arity} is not described"


def test_every_request_and_every_method_of_the_client_is_in_the_tables() -> None:
    text = page("gateway.md")
    source = inspect.getsource(schema)
    operations = set(re.findall(r'RequestSpec\("(\w+)"', source))
    assert len(operations) > 15
    for operation in operations:
        assert f"{{:{operation}" in text, operation
    methods = [name for name, each in vars(gateway.Gateway).items() if inspect.isfunction(each) and name[0] != "_"]
    assert len(methods) > 10
    for method in methods:
        assert f"`{method}(" in text, method


def test_every_reason_and_every_exception_is_in_the_table_of_errors() -> None:
    text = page("gateway.md")
    table = inspect.getsource(schema).partition("# The error reasons of gater:")[2].partition("\n\n")[0]
    reasons = {
        name for row in table.splitlines() for name in re.findall(r":(\w+)", row.partition("|")[2].partition("|")[0])
    }
    assert len(reasons) > 10
    for reason in reasons:
        assert f":{reason}" in text, reason
    errors = [getattr(gater, name) for name in gater.__all__]
    for error in errors:
        if isinstance(error, type) and issubclass(error, GaterError) and error is not GaterError:
            assert f"`{error.__name__}" in text, error.__name__
