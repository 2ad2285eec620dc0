"""The build of gater: as `pyproject.toml` says, and with GATER_COMPILE=1 what each message passes compiled by mypyc.

    GATER_COMPILE=1 pip install .     or, in a checkout:     make compile

The compiled modules are made from the very files that run without them and are preferred by Python when they are there.
What cannot be compiled (no C compiler, no headers of Python, no mypy) is one line on standard error, and gater runs
from source. Which of the two runs is `gater.erl.etf.COMPILED`.

Compiled are modules that nobody makes subclasses of, and whose annotations hold for whatever a peer may send: what
mypyc compiles raises TypeError where a value is not what it is declared to be.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES: Final = (
    "gater/api/append.py",
    "gater/api/decoding.py",
    "gater/api/guarded.py",
    "gater/api/router.py",
    "gater/api/subscriptions/backlog.py",
    "gater/api/subscriptions/checkpoints.py",
    "gater/api/subscriptions/delivery.py",
    "gater/api/subscriptions/feed.py",
    "gater/api/subscriptions/poll.py",
    "gater/api/subscriptions/protocol.py",
    "gater/api/subscriptions/subscription.py",
    "gater/erl/busy_wait.py",
    "gater/erl/connection.py",
    "gater/erl/dist_header.py",
    "gater/erl/etf.py",
    "gater/erl/phash2.py",
    "gater/erl/process.py",
    "gater/erl/routing.py",
    "gater/erl/signals.py",
    "gater/pubsub/messages.py",
)
LIBRARY: Final = "gater.erl._compiled"
"""mypyc adds `__mypyc`: one library beside the modules, each of which is a stub that leads into it."""

WANTED: Final = os.environ.get("GATER_COMPILE", "0") not in ("", "0")
OPTIMIZATION: Final = "1"
"""Of the C compiler: as quick as -O3 here, in half the time. -O0 is slower than Python."""


class CannotCompile(Exception):
    """Something needed is missing; says what."""


class BuildCompiled(build_ext):
    """`build_ext` that compiles all of `SOURCES` or nothing, and never fails."""

    def finalize_options(self) -> None:
        self.distribution.ext_modules = _extensions()
        super().finalize_options()

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            # A module without its library could not be imported, and would be preferred to the source.
            for built in map(Path, self.get_outputs()):
                built.unlink(missing_ok=True)
            _left_out(f"the C compiler failed: {error!s:.60}")


def _extensions() -> list[Extension]:
    remarks = io.StringIO()
    try:
        _require()
        from mypyc.build import mypycify

        with contextlib.redirect_stdout(remarks):
            return mypycify(["--strict", *SOURCES], group_name=LIBRARY, opt_level=OPTIMIZATION, debug_level="0")
    except CannotCompile as error:
        _left_out(str(error))
    except SystemExit as error:
        print(remarks.getvalue(), file=sys.stderr)
        _left_out(f"mypyc refuses the sources: {error}")
    return []


def _require() -> None:
    if sys.implementation.name != "cpython":
        raise CannotCompile(f"mypyc compiles for CPython, this is {sys.implementation.name}")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        raise CannotCompile(f"there is no {compiler}: install a C compiler (Debian: gcc)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise CannotCompile(f"there is no {header}: install the headers of Python (Debian: python3-dev)")
    if find_spec("mypyc") is None:
        raise CannotCompile("mypy is not installed")


def _left_out(why: str) -> None:
    print(f"gater: not compiled, it runs from source: {why}", file=sys.stderr, flush=True)


extra: dict[str, Any] = {}
if WANTED:
    # The extension only says that there is something to build: what, `BuildCompiled` finds out once mypy is there.
    extra = {"ext_modules": [Extension(LIBRARY, [])], "cmdclass": {"build_ext": BuildCompiled}}
    if "egg_info" in sys.argv and find_spec("mypyc") is None:
        # This is pip, asking what the build needs.
        extra["setup_requires"] = ["mypy>=1.11"]
setup(**extra)
