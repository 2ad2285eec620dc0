"""Real BEAM nodes for tests: start them, evaluate in them, freeze and kill them, and never leave one behind.

A node is driven over a socket pair that it inherits (an Erlang `fd` port with 4-byte length prefixes), not over the
distribution and not over standard output: what is tested never carries the test, and stray output disturbs nothing.
When this process dies, however it dies, the socket closes and the node halts. Everything listens on 127.0.0.1 only,
with an EPMD, a cookie and a home directory of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

from gater.erl import etf
from gater.erl.epmd import EpmdUnavailable, lookup
from gater.erl.terms import Atom, Term

Language: TypeAlias = Literal["erlang", "elixir"]

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 20.0
"""A node is up in about half a second; the rest is for machines where many tests start nodes at once."""
EVAL_TIMEOUT_S: Final = 15.0
STOP_TIMEOUT_S: Final = 10.0
FREEZE_TIMEOUT_S: Final = 5.0
LOG_TAIL_CHARACTERS: Final = 4000

_FRAME_HEADER: Final = struct.Struct(">I")
_REQUEST_HEADER: Final = struct.Struct(">QBI")
_REPLY_HEADER: Final = struct.Struct(">QB")
_LANGUAGE_CODES: Final[dict[Language, int]] = {"erlang": 0, "elixir": 1}
_HELLO_ID: Final = 0
_name_counter: Final = itertools.count(1)

# Runs in the node, interpreted: frames <<Id:64, Language, SourceSize:32, Source/binary, Bindings/binary>> come in,
# <<Id:64, 0, Value/binary>> or <<Id:64, 1, {Class, Reason, Text}/binary>> go out; every request has its own process.
_DRIVER: Final = r"""
  spawn(fun() ->
    register(gater_test_driver, self()),
    Port = open_port({fd, %(read_fd)d, %(write_fd)d}, [{packet, 4}, binary, eof]),
    Evaluate = fun
      (0, Source, Bindings) ->
        {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Source)),
        Forms = case erl_parse:parse_exprs(Tokens) of
          {ok, F} -> F;
          {error, {At, Module, Why}} -> error({syntax, At, lists:flatten(Module:format_error(Why))})
        end,
        {value, Value, _} = erl_eval:exprs(Forms, Bindings),
        Value;
      (1, Source, Bindings) ->
        {Value, _} = 'Elixir.Code':eval_string(Source, Bindings),
        Value
    end,
    Describe = fun
      (1, Class, Reason, Stack) -> 'Elixir.Exception':format(Class, Reason, Stack);
      (0, Class, Reason, Stack) -> unicode:characters_to_binary(erl_error:format_exception(Class, Reason, Stack))
    end,
    Loop = fun Again() ->
      receive
        {Port, {data, <<Id:64, Language, Size:32, Source:Size/binary, Encoded/binary>>}} ->
          spawn(fun() ->
            Reply = try
              [0, term_to_binary(Evaluate(Language, Source, binary_to_term(Encoded)))]
            catch Class:Reason:Stack ->
              Text = try Describe(Language, Class, Reason, Stack)
                     catch _:_ -> unicode:characters_to_binary(io_lib:format("~p:~p", [Class, Reason])) end,
              [1, term_to_binary({Class, Reason, Text})]
            end,
            port_command(Port, [<<Id:64>> | Reply])
          end),
          Again();
        {Port, eof} -> erlang:halt(0);
        _ -> Again()
      end
    end,
    %(prepare)s
    Hello = {node(), list_to_integer(erlang:system_info(otp_release))},
    port_command(Port, [<<0:64, 0>>, term_to_binary(Hello)]),
    Loop()
  end).
"""


class BeamError(AssertionError):
    """An expression raised in the node: `kind` is `error`, `exit` or `throw`, `reason` the term, `text` as printed."""

    def __init__(self, node: str, kind: str, reason: Term, text: str) -> None:
        self.kind = kind
        self.reason = reason
        self.text = text
        super().__init__(f"{node}: {text}")


class BeamFailure(AssertionError):
    """A node or EPMD did not start, ended unasked, or did not answer in time; the message ends with its output."""


async def wait_until(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]],
    timeout_s: float = 5.0,
    *,
    what: str = "the condition",
    interval_s: float = 0.02,
) -> Any:
    """Wait for `condition` (sync or async) to return something true and return that; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what} did not come true in {timeout_s} s; last seen: {value!r}")
        await asyncio.sleep(interval_s)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, below the range the kernel gives to outgoing connections."""
    chooser = random.Random(secrets.randbits(64))
    while True:
        port = chooser.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


def unique_name(prefix: str = "node") -> str:
    """A node name (`prefix_<pid>_<n>@127.0.0.1`) no other test of this machine uses, other test workers included."""
    return f"{prefix}_{os.getpid()}_{next(_name_counter)}@{LOOPBACK}"


def _dies_with_us() -> list[str]:
    """A command prefix that lets the kernel kill a process whose parent died, even a frozen one (Linux only)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv is not None else []


def elixir_lib() -> Path:
    """The `lib` directory of the installed Elixir (1.14 in Debian)."""
    script = shutil.which("elixir")
    if script is None:
        raise BeamFailure("elixir is not installed (Debian package: elixir)")
    return Path(script).resolve().parent.parent / "lib"


class Epmd:
    """A real `epmd` in the foreground on a port of its own. Use as an async context manager or `start()`/`stop()`."""

    def __init__(self, port: int | None = None, executable: str | None = None) -> None:
        self.port: int = port if port is not None else free_port()
        self._executable = executable or shutil.which("epmd")
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> Epmd:
        """Start it and wait until it accepts connections."""
        if self._executable is None:
            raise BeamFailure("epmd is not installed (Debian package: erlang-base)")
        self._process = await asyncio.create_subprocess_exec(
            *(*_dies_with_us(), self._executable),
            *("-port", str(self.port), "-address", LOOPBACK),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await wait_until(self._listening, START_TIMEOUT_S, what=f"epmd listening on port {self.port}")
        return self

    async def stop(self) -> None:
        """Kill it, so that nodes lose their registration; `start()` begins anew on the same port."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)

    async def names(self) -> dict[str, int]:
        """The registered nodes (name without host → distribution port), asked as `epmd -names` does."""
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        try:
            writer.write(b"\x00\x01n")
            answer = await asyncio.wait_for(reader.read(), EVAL_TIMEOUT_S)
        finally:
            writer.close()
        lines = [line.split() for line in answer[4:].decode().splitlines()]
        return {words[1]: int(words[4]) for words in lines}

    async def _listening(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            raise BeamFailure(f"epmd ended at once; is port {self.port} taken?")
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.stop()


class BeamNode:
    """One `erl` or `elixir` node.

    `language` decides what `eval` reads unless told otherwise (an `elixir` node evaluates both). `erl` is the path of
    the `erl` program (default: the installed one); `name=None` starts the node without distribution. `arguments` go
    to `erl` as they are, `env` is added to a minimal environment. The node asks EPMD on `epmd_port`, which may be
    served by a real `epmd` or by a Python node, and never starts one.
    """

    def __init__(
        self,
        *,
        language: Language = "erlang",
        name: str | None = "",
        cookie: str = "",
        epmd_port: int | None = None,
        erl: str | os.PathLike[str] | None = None,
        hidden: bool = False,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        prepare: str = "",
    ) -> None:
        self.language: Language = language
        self.name: str | None = unique_name(language) if name == "" else name
        self.cookie: str = cookie or secrets.token_hex(12)
        self.epmd_port: int | None = epmd_port
        self.otp_release: int = 0
        self._erl = os.fspath(erl) if erl is not None else shutil.which("erl")
        self._hidden = hidden
        self._arguments = list(arguments)
        self._env = dict(env or {})
        self._prepare = prepare
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._request_ids = itertools.count(_HELLO_ID + 1)

    @property
    def atom(self) -> Atom:
        """The node name as a term."""
        assert self.name is not None, "this node has no distribution"
        return Atom(self.name)

    @property
    def pid(self) -> int:
        """The operating system's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> BeamNode:
        """Start (or, after it ended, start again under the same name) and wait until it evaluates."""
        assert not self.running, f"{self.name} is running"
        if self._erl is None:
            raise BeamFailure("erl is not installed (Debian package: erlang)")
        await self._forget()
        if self._process is not None:
            await wait_until(self._name_is_free, what=f"{self.name} forgotten by EPMD")
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="gater-beam-")
        ours, theirs = socket.socketpair()
        theirs_too = theirs.dup()
        hello: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[_HELLO_ID] = hello
        try:
            with self._log_path.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command_line(theirs.fileno(), theirs_too.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    cwd=self._home.name,
                    pass_fds=(theirs.fileno(), theirs_too.fileno()),
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            theirs_too.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read(reader), name=f"read {self.name}")
        try:
            status, encoded = await asyncio.wait_for(hello, timeout_s)
        except TimeoutError:
            await self.kill()
            raise BeamFailure(f"{self.name} was not up after {timeout_s} s; {self._described_output()}") from None
        if status != 0:
            await self.kill()
            raise BeamFailure(f"{self.name} failed while starting: {etf.decode(encoded)!r}")
        _, self.otp_release = etf.decode(encoded)
        return self

    async def eval(
        self, source: str, /, *, language: Language | None = None, timeout_s: float = EVAL_TIMEOUT_S, **bindings: Term
    ) -> Term:
        """The value of `source` (Erlang expressions or Elixir code) as a term.

        Keyword arguments are variables in it (`await node.eval("X + 1", X=41)`). Raises `BeamError` with what was
        raised there, `BeamFailure` when the node dies or is silent for `timeout_s`.
        """
        return etf.decode(await self.eval_bytes(source, language=language, timeout_s=timeout_s, **bindings))

    async def eval_bytes(
        self, source: str, /, *, language: Language | None = None, timeout_s: float = EVAL_TIMEOUT_S, **bindings: Term
    ) -> bytes:
        """As `eval`, but the value as the node's `term_to_binary` made it, undecoded."""
        chosen = language or self.language
        text = source if chosen == "elixir" or source.rstrip().endswith(".") else source + "\n."
        encoded_bindings = etf.encode([(Atom(name), value) for name, value in sorted(bindings.items())])
        request_id = next(self._request_ids)
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            self._send(request_id, _LANGUAGE_CODES[chosen], text.encode(), encoded_bindings)
            status, encoded = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            output = self._described_output()
            raise BeamFailure(f"{self.name} did not answer {source!r} in {timeout_s} s; {output}") from None
        finally:
            self._waiting.pop(request_id, None)
        if status != 0:
            kind, reason, described = etf.decode(encoded)
            raise BeamError(str(self.name), str(kind), reason, described.decode(errors="replace"))
        return encoded

    async def sees_hidden(self, *names: Atom) -> None:
        """Wait until these and no other hidden nodes are connected.

        Whoever connects is done with the handshake a moment before the node that it has called.
        """

        async def sees() -> bool:
            return set(await self.eval("nodes(hidden)", language="erlang")) == set(names)

        await wait_until(sees, what=f"the hidden nodes of {self.name} being {names}")

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop as `init:stop/0` does: applications first. Kills the node when that takes longer than `timeout_s`."""
        if self.running:
            await self.eval("init:stop()", language="erlang")
            with contextlib.suppress(TimeoutError):
                await self.wait_ended(timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """`kill -9`, also when frozen; returns when the process is gone."""
        if self.running:
            assert self._process is not None
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.wait_ended(STOP_TIMEOUT_S)
        await self._forget()

    def freeze(self) -> None:
        """SIGSTOP: the node keeps its connections and answers nothing. Returns when all its threads stand still."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + FREEZE_TIMEOUT_S
        while not all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in self._thread_stats()):
            assert time.monotonic() < deadline, f"{self.name} did not stand still within {FREEZE_TIMEOUT_S} s"

    def _thread_stats(self) -> Iterator[Path]:
        return Path(f"/proc/{self.pid}/task").glob("*/stat")

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def wait_ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the end of the process; its exit code."""
        assert self._process is not None, "not started"
        return await asyncio.wait_for(self._process.wait(), timeout_s)

    def output(self) -> str:
        """What the node wrote to standard output and error so far."""
        if self._home is None or not self._log_path.exists():
            return ""
        return self._log_path.read_text(errors="replace")

    async def close(self) -> None:
        """Kill the node and remove its directory."""
        await self.kill()
        home, self._home = self._home, None
        if home is not None:
            home.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def home(self) -> Path:
        """The node's home and working directory."""
        assert self._home is not None, "not started"
        return Path(self._home.name)

    @property
    def _log_path(self) -> Path:
        return self.home / "output.log"

    def _command_line(self, read_fd: int, write_fd: int) -> list[str]:
        assert self._erl is not None
        command = [*_dies_with_us(), self._erl, "-noinput", "-boot", "start_clean", "+fnu", "+pc", "unicode"]
        # Spinning schedulers of several nodes would starve each other on a machine of two cores.
        command += ["+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none"]
        if self.name is not None:
            command += ["-name", self.name, "-setcookie", self.cookie, "-start_epmd", "false"]
            command += ["-kernel", "inet_dist_use_interface", "{127,0,0,1}"]
            command += ["-hidden"] if self._hidden else []
        prepare = self._prepare
        if self.language == "elixir":
            for application in ("eex", "elixir", "ex_unit", "iex", "logger", "mix"):
                command += ["-pa", str(elixir_lib() / application / "ebin")]
            prepare = f"{{ok, _}} = application:ensure_all_started(elixir), {prepare}"
        driver = _DRIVER % {"read_fd": read_fd, "write_fd": write_fd, "prepare": prepare}
        return [*command, *self._arguments, "-eval", " ".join(driver.split())]

    def _environment(self) -> dict[str, str]:
        environment = {
            "HOME": str(self.home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_CRASH_DUMP_SECONDS": "0",
        }
        if self.epmd_port is not None:
            environment["ERL_EPMD_PORT"] = str(self.epmd_port)
        return environment | self._env

    def _send(self, request_id: int, language: int, source: bytes, bindings: bytes) -> None:
        if self._writer is None or not self.running:
            raise BeamFailure(f"{self.name} is not running; {self._described_output()}")
        body = _REQUEST_HEADER.pack(request_id, language, len(source)) + source + bindings
        self._writer.write(_FRAME_HEADER.pack(len(body)) + body)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (size,) = _FRAME_HEADER.unpack(await reader.readexactly(_FRAME_HEADER.size))
                frame = await reader.readexactly(size)
                request_id, status = _REPLY_HEADER.unpack_from(frame)
                answer = self._waiting.pop(request_id, None)
                if answer is not None and not answer.done():
                    answer.set_result((status, frame[_REPLY_HEADER.size :]))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._fail_waiting()

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(BeamFailure(f"{self.name} ended; {self._described_output()}"))

    async def _forget(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._fail_waiting()

    async def _name_is_free(self) -> bool:
        if self.name is None or self.epmd_port is None:
            return True
        try:
            return await lookup(self.name.partition("@")[0], LOOPBACK, epmd_port=self.epmd_port) is None
        except EpmdUnavailable:
            return True

    def _described_output(self) -> str:
        output = self.output()[-LOG_TAIL_CHARACTERS:].strip()
        return f"its output:\n{output}" if output else "it printed nothing"


class Beams:
    """What one test starts: nodes that share a cookie and an EPMD, all ended by `close()` whatever happened before.

    `epmd_port=None` starts a real `epmd`; a port makes the nodes use whoever serves it (a Python node's own EPMD).
    """

    def __init__(self, epmd_port: int | None = None) -> None:
        self.cookie: str = secrets.token_hex(12)
        self.nodes: list[BeamNode] = []
        self.epmd: Epmd | None = None
        self._epmd_port = epmd_port

    async def use_epmd_port(self, port: int) -> None:
        """Let nodes started from now on use this port instead of a real `epmd`."""
        self._epmd_port = port

    async def epmd_port(self) -> int:
        """The EPMD port of the nodes; starts the real `epmd` when it is to be one and does not run yet."""
        if self._epmd_port is None:
            self.epmd = await Epmd().start()
            self._epmd_port = self.epmd.port
        return self._epmd_port

    async def start(self, language: Language = "erlang", *, otp: int | None = None, **options: Any) -> BeamNode:
        """Start a node; `otp` is 25 (installed) or 28 (provisioned), `options` those of `BeamNode`."""
        if otp == 28:
            if language == "elixir":
                raise BeamFailure("there is no Elixir for OTP 28 here: Debian's 1.14 does not run on it")
            from erlang_interop_tests import otp28

            options.setdefault("erl", await asyncio.to_thread(otp28.erl_path))
        options.setdefault("cookie", self.cookie)
        options.setdefault("epmd_port", await self.epmd_port())
        node = BeamNode(language=language, **options)
        self.nodes.append(node)
        return await node.start()

    async def close(self) -> None:
        """Kill everything started here."""
        results = await asyncio.gather(*(node.close() for node in self.nodes), return_exceptions=True)
        if self.epmd is not None:
            await self.epmd.stop()
        for result in results:
            if isinstance(result, BaseException):
                raise result


@contextlib.asynccontextmanager
async def beams(epmd_port: int | None = None) -> AsyncIterator[Beams]:
    """`Beams` for a `with` block."""
    started = Beams(epmd_port)
    try:
        yield started
    finally:
        await started.close()
