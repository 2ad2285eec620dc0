"""Gater compiled by mypyc (`setup.py`) passes the tests of its source.

Left out, with a warning, where there is no C compiler. It stands here, where tests may take long, because of the build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 900.0
"""For each of the programs; on an idle machine each takes a minute or two."""

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
IS_COMPILED = """
from gater.erl.etf import COMPILED
def test_what_is_compiled_is_what_is_tested():
    assert COMPILED
"""


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=CLEAN | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project, with nothing compiled."""
    directory = tmp_path / "gater"
    shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns("*.so", ".*cache*", ".git", ".venv", "__pycache__"))
    return directory


def build(directory: Path, **variables: str) -> str:
    """Compile in place; what was said."""
    pytest.importorskip("mypyc")
    pytest.importorskip("setuptools", minversion="77")
    built = run(directory, "setup.py", "--quiet", "build_ext", "--inplace", GATER_COMPILE="1", **variables)
    assert built.returncode == 0, built.stdout
    return built.stdout.strip()


def test_what_is_compiled_passes_the_tests_of_its_source(copy: Path) -> None:
    said = build(copy)
    if "source: there is no " in said:
        warnings.warn(f"nothing compiled has been tested: {said}", stacklevel=1)
        pytest.skip(said)
    assert "not compiled" not in said, said
    (copy / "tests" / "test_is_compiled.py").write_text(IS_COMPILED)
    tested = run(copy, "-m", "pytest", "-p", "no:cacheprovider", "tests")
    assert tested.returncode == 0, tested.stdout[-8000:]


def test_without_a_c_compiler_the_source_runs(copy: Path) -> None:
    assert build(copy, CC="no-such-compiler") == (
        "gater: not compiled, it runs from source: there is no no-such-compiler: install a C compiler (Debian: gcc)"
    )
    assert not list(copy.rglob("*.so"))
    assert run(copy, "-c", "from gater.erl.etf import COMPILED; print(COMPILED)").stdout == "False\n"
