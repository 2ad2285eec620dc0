"""`python -m fuzz`: all targets under atheris, one after the other; status 1 if something was found.

    python -m fuzz --seconds 600          in all, shared by the targets
    python -m fuzz --keep etf_alone       one target; add what reaches new code, made small, to fuzz/corpus

Inputs found on the way stay in .cache/fuzz between runs; those that broke something are printed and kept there.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from fuzz import corpus
from fuzz.targets import TARGETS
from gater.erl.etf import COMPILED

WORK: Final = corpus.ROOT.parent / ".cache" / "fuzz"

MAX_INPUT_BYTES: Final = 8192
"""Long enough for quadratic time to show."""

MAX_RESIDENT_MB: Final = 1024
"""libFuzzer ends the run when the process grows beyond this: a leak, or one huge allocation."""

SECONDS_PER_INPUT: Final = 20
"""libFuzzer takes an input that runs longer for a hang."""

MAX_KEPT_TOTAL: Final = 24 * 1024
"""Bytes of inputs of a target that `--keep` adds at most, the shortest first; twice that in hexadecimal."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz what reads bytes of a peer.")
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="in all, shared by the targets (600)")
    parser.add_argument("--keep", action="store_true", help="add what reaches new code to fuzz/corpus")
    arguments = parser.parse_args()
    if COMPILED:
        print("fuzz: the codec is compiled, so no input reaches new code in it; `make pure` undoes that", flush=True)
    names = arguments.targets or list(TARGETS)
    broken = [name for name in names if not _fuzz(name, arguments.seconds / len(names), arguments.keep)]
    print(f"fuzz: something was found in {', '.join(broken)}" if broken else "fuzz: nothing was found")
    return 1 if broken else 0


def _fuzz(name: str, seconds: float, keep: bool) -> bool:
    """Fuzz one target; whether all went well."""
    work, found = WORK / name, WORK / f"{name}-found"
    found.mkdir(parents=True, exist_ok=True)
    corpus.unpack(name, work)
    before = set(found.iterdir())
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-rss_limit_mb={MAX_RESIDENT_MB}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    started = time.monotonic()
    done = _run(name, *options, str(work))
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    count = int(runs[1]) if runs else 0
    print(f"{name:12} {count:>9,} inputs in {time.monotonic() - started:.0f} s", flush=True)
    inputs = sorted(set(found.iterdir()) - before)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], *(f"input: {path}" for path in inputs), sep="\n", flush=True)
    if keep:
        _keep(name, work, [path.read_bytes() for path in inputs])
    return done.returncode == 0


def _keep(name: str, work: Path, found: list[bytes]) -> None:
    """Add to the kept inputs those that broke something and the fewest that reach all that was reached."""
    small = WORK / f"{name}-small"
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir()
    _run(name, "-merge=1", f"-max_len={corpus.MAX_KEPT_BYTES}", str(small), str(work))
    chosen: list[bytes] = []
    for data in sorted((path.read_bytes() for path in small.iterdir()), key=lambda data: (len(data), data)):
        if sum(map(len, chosen)) + len(data) <= MAX_KEPT_TOTAL:
            chosen.append(data)
    added = corpus.keep(name, found, "broke something") + corpus.keep(
        name, chosen, "reaches what the ones above do not"
    )
    print(f"{name:12} {added} inputs added to fuzz/corpus", flush=True)


def _run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    itself = WORK / f"run-{name}"
    itself.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fuzz.run "$0" {name} "$@"\n')
    itself.chmod(0o755)
    command = [str(itself), *options]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, cwd=corpus.ROOT.parent
    )


if __name__ == "__main__":
    sys.exit(main())
