"""The `gater` command: `start`, `stop` and `config`.

It turns flags into `Settings` and hands them to `gater.system`; every rule about a value is the settings' own. Whatever
keeps the gateway from starting is one line on standard error and exit code 2. Heavy modules are imported by the command
that needs them, so that `gater config` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from gater.erl.errors import ErlError
from gater.errors import StartupError
from gater.settings import Given, Settings

EXIT_OK: Final = 0
EXIT_CANNOT_START: Final = 2

_VALUE_FLAGS: Final = {
    "--cookie": "cookie",
    "--epmd-port": "epmd_port",
    "--log-level": "log_level",
    "--log-format": "log_format",
    "--connect": "connect",
    "--dns-query": "dns_query",
    "--dns-node-basename": "dns_node_basename",
    "--store": "stores",
    "--embedded": "embedded",
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, as every other one of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CANNOT_START, f"gater: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit code: 0, or 2 if it cannot."""
    arguments = _parser().parse_args(argv)
    try:
        settings = Settings.load(_given(arguments), config=arguments.config)
        return _COMMANDS[arguments.command](settings)
    except (StartupError, ErlError) as error:
        print(f"gater: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CANNOT_START


def _start(settings: Settings) -> int:
    settings.require_cookie()
    # Until the event loop watches signals, a stop ends the start cleanly too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(EXIT_OK))
    from gater import logs, system

    logs.configure(settings.log_level, settings.log_format)
    return system.run(settings)


def _stop(settings: Settings) -> int:
    settings.require_cookie()
    import asyncio

    from gater import logs, system

    # Silence is success, unless somebody wants to see more.
    logs.configure(settings.log_level if "log_level" in settings.sources else "warning", settings.log_format)
    asyncio.run(system.stop_running(settings))
    return EXIT_OK


def _show(settings: Settings) -> int:
    rows = list(settings.effective())
    key_width = max(len(row.key) for row in rows)
    value_width = max(len(row.value) for row in rows)
    for row in rows:
        print(f"{row.key:<{key_width}}  {row.value:<{value_width}}  {row.source}")
    return EXIT_OK


_COMMANDS: Final = {"start": _start, "stop": _stop, "config": _show}


def _given(arguments: argparse.Namespace) -> dict[str, Given]:
    """The flags that were given, by the name of the field they set."""
    given = {
        name: Given(value, flag)
        for flag, name in _VALUE_FLAGS.items()
        if (value := getattr(arguments, name)) is not None
    }
    for kind, flag in (("long", "--name"), ("short", "--sname")):
        if (value := getattr(arguments, f"{kind}_name")) is not None:
            given["name"] = Given(value, flag)
            given["name_kind"] = Given(kind, flag)
    if arguments.no_gossip:
        given["gossip"] = Given(False, "--no-gossip")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gater", description="A gateway to ExESDB that is an Erlang node written in Python.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, help_text in (
        ("start", "start the gateway and serve until SIGTERM or SIGINT"),
        ("stop", "have a running gateway answer what it has begun, then end, and wait for that"),
        ("config", "print the effective settings and where each comes from, secrets hidden"),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", allow_abbrev=False
        )
        _add_settings(command)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    names = command.add_mutually_exclusive_group()
    names.add_argument("--name", dest="long_name", metavar="NAME@HOST", help="node name, long: the host has a dot")
    names.add_argument(
        "--sname", dest="short_name", metavar="NAME[@HOST]", help="node name, short: the host has no dot"
    )
    command.add_argument("--cookie", help="else EX_ESDB_COOKIE, RELEASE_COOKIE, ~/.erlang.cookie")
    command.add_argument("--connect", action="append", metavar="NODE", help="a node to connect to; repeatable")
    command.add_argument(
        "--embedded",
        nargs="?",
        const=True,
        metavar="DIR",
        help="serve an embedded store kept in DIR (default ./gater-data)",
    )
    command.add_argument(
        "--store", dest="stores", action="append", metavar="ID", help="a store of the embedded store; repeatable"
    )
    command.add_argument("--dns-query", metavar="NAME", help="connect to a node at each A record of this DNS name ...")
    command.add_argument("--dns-node-basename", metavar="NAME", help="... named NAME@ADDRESS")
    command.add_argument("--no-gossip", action="store_true", help="do not look for nodes by gossip")
    command.add_argument("--epmd-port", metavar="PORT", help="port of EPMD (default 4369)")
    command.add_argument("--log-level", metavar="LEVEL", help="debug, info (default), warning, error or critical")
    command.add_argument("--log-format", metavar="FORMAT", help="console (default) or json")
    command.add_argument("--config", type=Path, metavar="FILE", help="settings file, TOML")


class _Version(argparse.Action):
    """Prints the version of the installed package; looks it up only when asked."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        from importlib.metadata import version

        print(f"gater {version('gater')}")
        parser.exit(EXIT_OK)
