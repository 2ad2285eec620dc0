"""A compiled copy of gater (`make compile`), to be measured beside the one that runs from source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.machine import ROOT

COMPILED: Final = "gater, compiled"
BUILD_TIMEOUT_S: Final = 300.0
_NEEDED: Final = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def compiled_copy(directory: Path) -> Path | None:
    """Make the copy in `directory`; None, and a line on standard error that says why, where it cannot be compiled."""
    for name in ("gater", "bench", "erlang_interop_tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in _NEEDED:
        shutil.copy(ROOT / name, directory)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=directory,
        env=os.environ | {"GATER_COMPILE": "1"},
        stdout=sys.stderr,
        timeout=BUILD_TIMEOUT_S,
        check=True,
    )
    return directory if list(directory.glob("gater/erl/*.so")) else None
