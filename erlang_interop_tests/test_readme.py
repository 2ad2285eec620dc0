"""The README's examples, run as printed against the gateway that `make run` starts."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from erlang_interop_tests.beam import free_port
from erlang_interop_tests.gater_process import GaterProcess

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE_TIMEOUT_S = 30


def example(language: str, containing: str) -> str:
    """The code block of the README in this language that contains this text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if containing in block]
    assert len(found) == 1, f"{len(found)} {language} examples contain {containing!r}"
    return found[0]


def make_run_flags() -> list[str]:
    """The flags with which `make run` starts the gateway, its data directory left out."""
    makefile = (ROOT / "Makefile").read_text()
    flags = re.search(r"^RUN := (.*)$", makefile, re.MULTILINE)
    assert flags is not None
    return shlex.split(flags[1])


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GaterProcess]:
    """The gateway of `make run`, with an EPMD port and a data directory of its own."""
    flags = make_run_flags()
    values = {flag: flags[flags.index(flag) + 1] for flag in ("--name", "--cookie", "--embedded")}
    gater = GaterProcess(
        name=values["--name"],
        cookie=values["--cookie"],
        epmd_port=free_port(),
        embedded=tmp_path / values["--embedded"],
        arguments=[flag for flag in flags if flag not in (*values, *values.values())],
    )
    try:
        yield await gater.start()
    finally:
        await gater.close()


async def run_example(command: list[str], source: str, gateway: GaterProcess, home: Path) -> str:
    """What the example prints; it must end with exit code 0."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "ERL_EPMD_PORT": str(gateway.epmd_port),
        "LANG": "C.UTF-8",
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(EXAMPLE_TIMEOUT_S):
            out, err = await process.communicate(source.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"exit code {process.returncode}:\n{out.decode()}\n{err.decode()}"
    return out.decode()


async def test_the_elixir_example_appends_an_event_and_reads_it_back(gateway: GaterProcess, tmp_path: Path) -> None:
    printed = await run_example(["sh", "-s"], example("sh", "elixir --name"), gateway, tmp_path)
    assert 'read back: [%{text: "hello"}]' in printed


async def test_the_python_example_appends_reads_and_is_refused(gateway: GaterProcess, tmp_path: Path) -> None:
    printed = await run_example([sys.executable, "-"], example("python", "Gateway.connect"), gateway, tmp_path)
    assert "0 placed:v1 {b'total': 12.5}" in printed
    assert "expected version 41, found version 0" in printed


async def test_the_gen_server_example_is_answered(gateway: GaterProcess, tmp_path: Path) -> None:
    line = example("elixir", "GenServer.call").strip()
    command = ["elixir", "--name", "me@127.0.0.1", "--cookie", gateway.cookie, "-e", f"IO.inspect({line})"]
    assert "{:ok, -1}" in await run_example(command, "", gateway, tmp_path)
