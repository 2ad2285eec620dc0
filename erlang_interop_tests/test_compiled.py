"""The codec compiled by mypyc (`setup.py`) passes the tests of its source.

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
CODEC_TESTS = ("test_etf.py", "test_etf_captures.py", "test_dist_header.py", "test_phash2.py")
LIMIT_S = 300.0
"""For each of the programs; on an idle machine none takes more than some 15 s."""

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
IS_COMPILED = """
from gater.erl.etf import COMPILED
def test_the_compiled_codec_is_what_is_tested():
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
    """The source, its build and the tests, with nothing compiled."""
    for name in ("gater", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(directory: Path, **variables: str) -> str:
    """Compile in place; what was said."""
    pytest.importorskip("mypyc")
    pytest.importorskip("setuptools", minversion="77")
    built = run(directory, "setup.py", "--quiet", "build_ext", "--inplace", GATER_COMPILE="1", **variables)
    assert built.returncode == 0, built.stdout
    return built.stdout.strip()


def test_the_compiled_codec_passes_the_tests_of_its_source(copy: Path) -> None:
    said = build(copy)
    if "source: there is no " in said:
        warnings.warn(f"the compiled codec has not been tested: {said}", stacklevel=1)
        pytest.skip(said)
    assert "not compiled" not in said, said
    (copy / "tests" / "test_is_compiled.py").write_text(IS_COMPILED)
    tests = [f"tests/{name}" for name in ("test_is_compiled.py", *CODEC_TESTS)]
    tested = run(copy, "-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert tested.returncode == 0, tested.stdout[-8000:]


def test_without_a_c_compiler_the_source_runs(copy: Path) -> None:
    assert build(copy, CC="no-such-compiler") == (
        "gater: codec not compiled, it runs from source: "
        "there is no no-such-compiler: install a C compiler (Debian: gcc)"
    )
    assert not list(copy.rglob("*.so"))
    assert run(copy, "-c", "from gater.erl.etf import COMPILED; print(COMPILED)").stdout == "False\n"
