"""`gater start` as a process: the line that says it is up, the ways it ends, and why it may not start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from node_kit import free_port

from gater import Gateway, NewEvent
from gater.erl import NodeOptions

TIMEOUT_S = 20
STORE = "ex_esdb_store"


@asynccontextmanager
async def started(home: Path, *arguments: str, command: str = "start") -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gater",
        command,
        "--cookie",
        "secret",
        "--no-gossip",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        return (await process.stdout.readline()).decode().strip()


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(TIMEOUT_S):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
async def test_a_gateway_says_that_it_is_up_and_ends_cleanly(tmp_path: Path, stop_signal: signal.Signals) -> None:
    flags = ["--name", "g@127.0.0.1", "--epmd-port", str(free_port()), "--embedded", str(tmp_path / "data")]
    async with started(tmp_path, *flags) as process:
        assert await first_line(process) == "g@127.0.0.1 is up"
        process.send_signal(stop_signal)
        code, err = await ended(process)
    assert code == 0
    assert "Traceback" not in err


async def test_a_gateway_ends_cleanly_by_command(tmp_path: Path) -> None:
    flags = ["--name", "g@127.0.0.1", "--epmd-port", str(free_port()), "--embedded", str(tmp_path / "data")]
    async with started(tmp_path, *flags) as process:
        await first_line(process)
        async with started(tmp_path, *flags, command="stop") as stopping:
            assert await ended(stopping) == (0, "")
        code, err = await ended(process)
    assert code == 0
    assert "Traceback" not in err


async def test_a_gateway_that_does_not_run_cannot_be_stopped_and_that_is_one_line(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--epmd-port", str(port)]
    async with started(tmp_path, "--name", "nobody@127.0.0.1", *flags, command="stop") as stopping:
        code, err = await ended(stopping)
    assert code == 2
    one_line(err, containing=[str(port)])
    async with started(tmp_path, "--name", "g@127.0.0.1", *flags) as process:
        await first_line(process)
        async with started(tmp_path, "--name", "nobody@127.0.0.1", *flags, command="stop") as stopping:
            code, err = await ended(stopping)
        assert code == 2
        one_line(err, containing=["nobody@127.0.0.1"])


async def test_what_was_appended_is_there_after_a_restart(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--name", "g@127.0.0.1", "--epmd-port", str(port), "--embedded", str(tmp_path / "data")]
    client = {"cookie": "secret", "options": NodeOptions(epmd_port=port)}
    async with started(tmp_path, *flags) as process:
        await first_line(process)
        async with Gateway.connect("g@127.0.0.1", **client) as gateway:
            assert await gateway.append_events(STORE, "s", NewEvent("kept:v1", {"n": 1})) == 0
        process.kill()
        await process.wait()
    async with started(tmp_path, *flags) as process:
        await first_line(process)
        async with Gateway.connect("g@127.0.0.1", **client) as gateway:
            (event,) = await gateway.get_events(STORE, "s")
    assert (event.event_type, event.data) == ("kept:v1", {b"n": 1})


def one_line(err: str, *, containing: Sequence[str]) -> None:
    lines = [line for line in err.splitlines() if line.startswith("gater: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for text in containing:
        assert text in lines[0]


async def test_a_taken_node_name_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    flags = ["--name", "g@127.0.0.1", "--epmd-port", str(free_port())]
    async with started(tmp_path, *flags) as first:
        await first_line(first)
        async with started(tmp_path, *flags) as second:
            code, err = await ended(second)
    assert code == 2
    one_line(err, containing=["name g"])


async def test_an_epmd_port_held_by_something_else_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with started(tmp_path, "--name", "g@127.0.0.1", "--epmd-port", str(port)) as process:
        code, err = await ended(process)
    server.close()
    assert code == 2
    one_line(err, containing=[str(port)])


async def test_a_store_directory_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    port = str(free_port())
    data = str(tmp_path / "data")
    async with started(tmp_path, "--name", "g1@127.0.0.1", "--epmd-port", port, "--embedded", data) as first:
        await first_line(first)
        async with started(tmp_path, "--name", "g2@127.0.0.1", "--epmd-port", port, "--embedded", data) as second:
            code, err = await ended(second)
    assert code == 2
    one_line(err, containing=["in use"])


async def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    async with started(tmp_path, "--name", "no host at all") as process:
        code, err = await ended(process)
    assert code == 2
    one_line(err, containing=["--name"])
