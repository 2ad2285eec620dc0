"""The machine and the versions a run was made with, and what Linux knows of a process: memory and CPU time.

Elsewhere than on Linux the figures of `/proc` are missing and shown as such.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from gater.erl.etf import COMPILED

ROOT = Path(__file__).resolve().parent.parent
NOT_INSTALLED = "not installed"


def rss_kb(pid: int | str = "self") -> int | None:
    """The memory of a process now, in kB."""
    return _status(pid, "VmRSS")


def peak_rss_kb(pid: int | str = "self") -> int | None:
    """The most memory a process has had, in kB. `ru_maxrss` would count that of the parent before `exec` as well."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int | str = "self") -> None:
    """Let `peak_rss_kb` begin anew."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return


def cpu_s(pid: int) -> float | None:
    """The CPU time a process has used, in seconds; ticks of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def version_of(distribution: str) -> str:
    """The installed version of a Python package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def load() -> str:
    """The load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def description(otp: str) -> list[tuple[str, str]]:
    """Where and with what a run is made. `otp` is the release of the BEAM nodes."""
    return [
        ("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("processor", f"{_cpu_model()}, {os.cpu_count()} cores"),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("gater", _commit()),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("gater runs", "compiled" if COMPILED else "from source, unless it says *compiled*"),
        ("uvloop", version_of("uvloop")),
        ("Erlang/OTP", otp),
        ("erlang_py", version_of("erlang_py")),
        ("erlpack", version_of("erlpack")),
    ]


def _status(pid: int | str, name: str) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) if found else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown processor"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    version = version_of("gater")
    try:
        changed = " and changes not committed" if git("status", "--porcelain", "--", "gater") else ""
        return f"{version}, commit {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return version
