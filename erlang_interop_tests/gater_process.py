"""A gateway as people run it: `gater start` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from erlang_interop_tests.beam import free_port, unique_name
from gater.erl.terms import Atom

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 40.0


class GaterProcess:
    """`gater start` with name, cookie, EPMD port and home directory of its own; no gossip unless `arguments` say so.

    `source` is a directory with another gater in it than the one that is installed.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        cookie: str | None = None,
        epmd_port: int | None = None,
        embedded: Path | None = None,
        stores: Sequence[str] = (),
        connect: Sequence[str] = (),
        arguments: Sequence[str] = ("--no-gossip",),
        env: Mapping[str, str] | None = None,
        source: Path | None = None,
    ) -> None:
        self.name = name or unique_name("gater")
        self.cookie = cookie or secrets.token_hex(12)
        self.epmd_port = epmd_port or free_port()
        self._arguments = ["--name", self.name, "--cookie", self.cookie, "--epmd-port", str(self.epmd_port)]
        if embedded is not None:
            self._arguments += ["--embedded", str(embedded)]
        for store in stores:
            self._arguments += ["--store", store]
        for peer in connect:
            self._arguments += ["--connect", peer]
        self._arguments += arguments
        self._env = dict(env or {})
        self._source = source
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def atom(self) -> Atom:
        """The node name as a term."""
        return Atom(self.name)

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The operating system's process."""
        assert self._process is not None, "not started"
        return self._process

    async def start(self) -> GaterProcess:
        """Start it and wait for `NAME is up`."""
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="gater-test-")
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gater",
                "start",
                *self._arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=self._source,
                env={"PATH": os.environ["PATH"], "HOME": self._home.name, **self._env},
            )
        stdout = self._process.stdout
        assert stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await stdout.readline()
        if line.decode().strip() != f"{self.name} is up":
            await self.process.wait()
            raise AssertionError(f"gater did not start (it said {line!r}):\n{self.log()}")
        return self

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as an operator does; its exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await self.process.wait()

    async def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        await self.process.wait()

    async def close(self) -> None:
        """End it however it is, and remove its home directory."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    def log(self) -> str:
        """What it has logged so far."""
        return self._log_path.read_text(errors="replace") if self._home is not None else ""

    @property
    def _log_path(self) -> Path:
        assert self._home is not None
        return Path(self._home.name) / "log"


@asynccontextmanager
async def gater_process(**options: Any) -> AsyncIterator[GaterProcess]:
    """A started gateway, ended with the block."""
    gater = GaterProcess(**options)
    try:
        yield await gater.start()
    finally:
        await gater.close()
