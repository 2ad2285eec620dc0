"""The command line: flags reach the settings, wrong ones end with one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import gater
from gater import cli
from gater.erl.errors import NodeError
from gater.errors import StartupError
from gater.settings import DEFAULT_EMBEDDED_DIR, Settings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command line in this process, with an empty environment; gives exit code, output and errors."""
    for variable in ("EX_ESDB_COOKIE", "RELEASE_COOKIE", "ERL_EPMD_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stands in for `gater.system`; holds the settings it was run with."""
    seen: list[Settings] = []
    system = types.ModuleType("gater.system")
    system.run = lambda settings: seen.append(settings) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gater.system", system)
    monkeypatch.setattr(gater, "system", system, raising=False)
    monkeypatch.setattr("gater.logs.configure", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return seen


def test_every_flag_of_start_reaches_its_setting(run: Run, started: list[Settings]) -> None:
    flags = ["--name", "g@127.0.0.2", "--cookie", "biscuit", "--connect", "a@127.0.0.1", "--connect", "b@127.0.0.1"]
    flags += ["--embedded", "somewhere", "--store", "one", "--store", "two", "--no-gossip", "--epmd-port", "4370"]
    flags += ["--log-level", "debug", "--log-format", "json"]
    flags += ["--dns-query", "stores.local", "--dns-node-basename", "store"]
    assert run("start", *flags) == (0, "", "")
    (settings,) = started
    assert settings.name == "g@127.0.0.2"
    assert settings.cookie == "biscuit"
    assert settings.connect == ("a@127.0.0.1", "b@127.0.0.1")
    assert settings.embedded == Path("somewhere")
    assert settings.stores == ("one", "two")
    assert settings.gossip is False
    assert settings.epmd_port == 4370
    assert (settings.log_level, settings.log_format) == ("debug", "json")
    assert (settings.dns_query, settings.dns_node_basename) == ("stores.local", "store")
    assert settings.source_of("stores") == "--store"


def test_a_short_name_and_the_default_directory(run: Run, started: list[Settings]) -> None:
    assert run("start", "--sname", "g@host", "--cookie", "biscuit", "--embedded") == (0, "", "")
    assert (started[0].name, started[0].long_names, started[0].embedded) == ("g@host", False, DEFAULT_EMBEDDED_DIR)


def test_without_embedded_there_is_no_embedded_store(run: Run, started: list[Settings]) -> None:
    assert run("start", "--cookie", "biscuit")[0] == 0
    assert started[0].embedded is None


def test_the_file_given_by_config_is_read(run: Run, started: list[Settings], tmp_path: Path) -> None:
    file = tmp_path / "gater.toml"
    file.write_text('[node]\ncookie = "biscuit"\nname = "g@127.0.0.3"\n')
    assert run("start", "--config", str(file))[0] == 0
    assert started[0].name == "g@127.0.0.3"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["stort"], "invalid choice: 'stort'"),
        (["start", "--nmae", "x"], "unrecognized arguments: --nmae x"),
        (["start", "--name", "a@b.c", "--sname", "a@b"], "not allowed with argument --name"),
        (["start", "--name", "a@b", "--cookie", "c"], "setting node.name (--name): got 'a@b'"),
        (["start", "--epmd-port", "x"], "setting epmd.port (--epmd-port): got 'x', allowed is a whole number"),
        (["start", "--log-level", "loud"], "setting log.level (--log-level): got 'loud', allowed is one of debug"),
        (["start", "--log-format", "xml"], "allowed is one of console, json"),
        (["start", "--connect", "x"], "setting cluster.connect (--connect): got ['x'], allowed is a list"),
        (["start", "--store", ""], "setting store.ids (--store): got ['']"),
        (["start", "--config", "missing.toml"], "setting config (missing.toml): the file cannot be read"),
        (["start"], "a cookie is needed"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(run: Run, argv: list[str], words: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("gater: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [StartupError("the port is taken"), NodeError("the name is\ntaken")])
def test_what_keeps_the_gateway_from_starting_is_one_line_and_exit_code_2(
    run: Run, started: list[Settings], error: Exception
) -> None:
    def fail(_settings: Settings) -> int:
        raise error

    sys.modules["gater.system"].run = fail  # type: ignore[attr-defined]
    code, _, err = run("start", "--cookie", "biscuit")
    assert (code, err) == (2, f"gater: {' '.join(str(error).split())}\n")


def test_config_prints_every_setting_with_its_source_and_no_secret(run: Run) -> None:
    code, out, err = run("config", "--cookie", "biscuit", "--embedded")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["node.cookie"] == ["(hidden)", "--cookie"]
    assert rows["store.embedded"] == ["gater-data", "--embedded"]
    assert rows["http.port"] == ["4001", "default"]
    assert "biscuit" not in out


def test_config_works_without_a_cookie(run: Run) -> None:
    code, out, _ = run("config")
    assert code == 0
    assert "node.cookie" in out


def test_the_command_answers_as_a_module_and_tells_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "gater", "--version"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gater 0.")
