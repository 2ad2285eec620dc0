"""The programs of docs/erlang-node.md, run as printed (with an EPMD port of their own) beside real Elixir nodes."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from erlang_interop_tests.beam import Epmd

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "erlang-node.md"
TIMEOUT_S = 30


def example(language: str, containing: str) -> str:
    """The code block of the guide in this language that contains this text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if containing in block]
    assert len(found) == 1, f"{len(found)} {language} examples contain {containing!r}"
    return found[0]


@asynccontextmanager
async def started(source: str, language: str, epmd: Epmd, home: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """An example as a process; killed at the end of the block if it is still running."""
    command = ["sh", "-c", source]
    if language == "python":
        # Nothing in gater/erl reads the environment, so the port has to be written into the program.
        if "NodeOptions(" in source:
            told, count = re.subn(r"NodeOptions\(", f"NodeOptions(epmd_port={epmd.port}, ", source)
        else:
            told, count = re.subn(
                r'(make_node\("py@127\.0\.0\.1", cookie="secret")\)',
                rf"\1, options=__import__('gater.erl').erl.NodeOptions(epmd_port={epmd.port}))",
                source,
            )
        assert count == 1
        command = [sys.executable, "-c", told]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "ERL_EPMD_PORT": str(epmd.port), "LANG": "C.UTF-8"},
        cwd=home,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            # The shell and what it started.
            os.killpg(process.pid, 9)
            await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        return (await process.stdout.readline()).decode().strip()


async def printed(source: str, language: str, epmd: Epmd, home: Path) -> list[str]:
    """What an example that ends has printed."""
    async with started(source, language, epmd, home) as process:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate()
        assert process.returncode == 0, f"exit code {process.returncode}:\n{out.decode()}\n{err.decode()}"
    # Log lines of the node go to standard output, too.
    return [text for text in out.decode().splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", text)]


async def test_elixir_calls_a_gen_server_in_python(epmd: Epmd, tmp_path: Path) -> None:
    async with started(example("python", "class Counter"), "python", epmd, tmp_path) as counter:
        assert await line(counter) == "counter is up"
        lines = await printed(example("sh", ":counter"), "sh", epmd, tmp_path)
    assert lines == ["{:ok, 5}", "{:ok, 7}", "0", "100", "{:error, :unknown_request}"]


async def test_elixir_calls_functions_in_python(epmd: Epmd, tmp_path: Path) -> None:
    async with started(example("python", "def shout"), "python", epmd, tmp_path) as functions:
        assert await line(functions) == "functions are up"
        lines = await printed(example("sh", ":shout"), "sh", epmd, tmp_path)
    assert lines == ['"GRÜSSE!"', '"now"', '"then"', ":badarg", ":undef"]


@pytest.fixture
async def greeter(epmd: Epmd, tmp_path: Path) -> AsyncIterator[None]:
    async with started(example("sh", "name: :greeter"), "sh", epmd, tmp_path) as elixir:
        assert await line(elixir) == "greeter is up"
        yield


@pytest.mark.usefixtures("greeter")
async def test_python_calls_elixir(epmd: Epmd, tmp_path: Path) -> None:
    lines = await printed(example("python", "erpc_multicall"), "python", epmd, tmp_path)
    assert lines[0] == "b'HELLO'"
    assert lines[1] == "[(Atom('ok'), Atom('ex@127.0.0.1'))]"
    assert lines[2] == "badarg"
    assert lines[3].startswith("(Atom('badrpc'), (Atom('EXIT'), (Atom('badarg'), ")
    assert lines[4:] == ["5", "b'OLLEH'", "no process nobody on ex@127.0.0.1"]


@pytest.mark.usefixtures("greeter")
async def test_processes_watch_each_other(epmd: Epmd, tmp_path: Path) -> None:
    lines = await printed(example("python", "async def watch"), "python", epmd, tmp_path)
    expected = example("text", "greeter is down").splitlines()
    assert sorted(lines) == sorted(expected)


async def test_python_sends_to_the_members_of_a_group(epmd: Epmd, tmp_path: Path) -> None:
    async with started(example("sh", ":pg.join"), "sh", epmd, tmp_path) as member:
        assert await line(member) == "member is up"
        assert await printed(example("python", "Scope"), "python", epmd, tmp_path) == []
        assert await line(member) == '{:hello, :"py@127.0.0.1"}'


async def test_nodes_speak_tls(epmd: Epmd, tmp_path: Path) -> None:
    await printed(example("sh", "openssl req"), "sh", epmd, tmp_path)
    async with started(example("sh", "inet_tls"), "sh", epmd, tmp_path) as elixir:
        assert await line(elixir) == "tls is up"
        assert await printed(example("python", "NodeTls"), "python", epmd, tmp_path) == ["tls@127.0.0.1"]


def test_every_example_of_the_guide_is_run_here() -> None:
    run = re.findall(r'example\("(\w+)", "([^"]+)"\)', Path(__file__).read_text())
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    for language, block in blocks:
        assert any(language == of and containing in block for of, containing in run), block
