"""What every Erlang node answers: the processes and functions that peers, shells and tools take for granted.

`net_kernel` answers `is_auth` (that is `net_adm:ping`), and the modules `erlang`, `net_kernel`, `application`, `code`,
`init`, `net_adm` and `rpc` have the functions that other nodes call on a node by rpc. All are answered from memory, at
once: some callers ask without a timeout.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Final

from gater.erl.errors import ErlangError
from gater.erl.gen_server import Caller, GenServer, spawn_server
from gater.erl.node import Node
from gater.erl.terms import Atom, Pid, Port, Reference, Term

KERNEL_VERSION: Final = "8.5"
"""The version of the application `kernel` whose behaviour is followed (OTP 25)."""
STDLIB_VERSION: Final = "4.2"
"""Likewise for `stdlib`."""

YES: Final = Atom("yes")
UNDEFINED: Final = Atom("undefined")
_BADARG: Final = Atom("badarg")


def install(node: Node) -> None:
    """Export the kernel functions of `node` and start its kernel processes when it starts."""
    node.add_application("kernel", "ERTS  CXC 138 10", KERNEL_VERSION)
    node.add_application("stdlib", "ERTS  CXC 138 10", STDLIB_VERSION)
    node.on_start.append(lambda: _start_processes(node))
    for module, functions in _functions(node).items():
        for name, function in functions.items():
            node.exports.add(module, name, function)


def _start_processes(node: Node) -> None:
    spawn_server(node, _NetKernel(), name="net_kernel")


class _NetKernel(GenServer):
    """The process registered as `net_kernel`."""

    def handle_call(self, request: Term, caller: Caller) -> Term:
        if type(request) is tuple and request:
            match request[0]:
                case Atom(name="is_auth"):
                    return YES
                case Atom(name="longnames"):
                    return _long_names(self.node)
        if request is Atom("longnames"):
            return _long_names(self.node)
        if request is Atom("get_net_ticktime"):
            return int(self.node.options.ticktime_s)
        return (Atom("error"), Atom("bad_request"))

    def handle_cast(self, message: Term) -> None:
        return None


def _charlist(text: str) -> list[int]:
    return [ord(character) for character in text]


def _long_names(node: Node) -> bool:
    return "." in node.host or ":" in node.host


def _node_of(term: Term) -> Term:
    if isinstance(term, Pid | Reference | Port):
        return term.node
    raise ErlangError(_BADARG)


def _functions(node: Node) -> dict[str, dict[str, Callable[..., Term]]]:
    def which_applications(_timeout: Term = None) -> Term:
        return [
            (Atom(name), _charlist(description), _charlist(version))
            for name, (description, version) in node.applications.items()
        ]

    def this_node(term: Term = None) -> Term:
        return node.name if term is None else _node_of(term)

    def nodes(kinds: Term = Atom("visible")) -> Term:  # noqa: B008  (an interned atom)
        wanted = kinds if type(kinds) is list else [kinds]
        peers: set[Atom] = set()
        for kind in wanted:
            match kind:
                # Every connection of a hidden node is a hidden one.
                case Atom(name="hidden" | "connected"):
                    peers.update(node.nodes())
                case Atom(name="this"):
                    peers.add(node.name)
                case Atom(name="visible" | "known"):
                    pass
                case _:
                    raise ErlangError(_BADARG)
        return sorted(peers, key=str)

    def whereis(name: Term) -> Term:
        process = node.whereis(name) if type(name) is Atom else None
        return UNDEFINED if process is None else process.pid

    def is_process_alive(pid: Term) -> Term:
        if type(pid) is not Pid or pid.node is not node.name:
            raise ErlangError(_BADARG)
        return node.process(pid) is not None

    def process_info(pid: Term, items: Term = None) -> Term:
        if type(pid) is not Pid or pid.node is not node.name:
            raise ErlangError(_BADARG)
        process = node.process(pid)
        if process is None:
            return UNDEFINED
        known: dict[str, Term] = {
            "registered_name": Atom(process.name) if process.name is not None else [],
            "current_function": process.initial_call or (Atom("python"), Atom("receive"), 0),
            "initial_call": process.initial_call or (Atom("python"), Atom("spawn"), 0),
            "status": Atom("waiting"),
            "message_queue_len": process.queue_length(),
            "links": list(process.links),
            "dictionary": [],
            "trap_exit": process.trap_exit,
            "error_handler": Atom("error_handler"),
            "priority": Atom("normal"),
            "group_leader": process.group_leader,
            "total_heap_size": 0,
            "heap_size": 0,
            "stack_size": 0,
            "reductions": 0,
            "memory": 0,
            "monitors": [(Atom("process"), monitor.object) for monitor in process.monitors.values()],
            "monitored_by": [each[0] for each in process.monitored_by.values() if isinstance(each, tuple)],
        }
        if items is None:
            hidden = ("monitors", "monitored_by", "memory")
            return [(Atom(name), value) for name, value in known.items() if name not in hidden]
        if type(items) is list:
            return [_item(known, each) for each in items]
        if items is Atom("registered_name") and process.name is None:
            return []
        return _item(known, items)

    def system_info(item: Term) -> Term:
        answers: dict[str, Term] = {
            "otp_release": _charlist("25"),
            "version": _charlist("13.1"),
            "system_version": _charlist(f"gater on Python {platform.python_version()}\n"),
            "machine": _charlist("BEAM"),
            "system_architecture": _charlist(f"{platform.machine()}-{platform.system().lower()}"),
            "wordsize": 8,
            "schedulers": 1,
            "schedulers_online": 1,
            "logical_processors": 1,
            "process_count": len(list(node.processes())),
            "process_limit": 1 << 28,
            "creation": node.creation,
            "smp_support": True,
            "threads": True,
            "endian": Atom(sys.byteorder),
        }
        name = item.name if type(item) is Atom else ""
        if name not in answers:
            raise ErlangError(_BADARG)
        return answers[name]

    def memory(item: Term = None) -> Term:
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers: dict[str, Term] = dict.fromkeys(
            ("processes", "processes_used", "atom", "atom_used", "binary", "code", "ets"), 0
        )
        answers = {"total": total, "system": total, **answers}
        if item is None:
            return [(Atom(name), value) for name, value in answers.items()]
        if type(item) is Atom and item.name in answers:
            return answers[item.name]
        raise ErlangError(_BADARG)

    def statistics(item: Term) -> Term:
        match item:
            case Atom(name="wall_clock"):
                return (int(node.uptime_s * 1000), 0)
            case Atom(name="runtime"):
                return (int(time.process_time() * 1000), 0)
            case Atom(name="reductions" | "exact_reductions"):
                return (0, 0)
            case Atom(name="run_queue" | "total_run_queue_lengths"):
                return 0
        raise ErlangError(_BADARG)

    def date_and_time(clock: time.struct_time) -> Term:
        return ((clock.tm_year, clock.tm_mon, clock.tm_mday), (clock.tm_hour, clock.tm_min, clock.tm_sec))

    def system_time(unit: Term = Atom("native")) -> Term:  # noqa: B008
        units = {"native": 1, "nanosecond": 1, "microsecond": 1_000, "millisecond": 1_000_000, "second": 1_000_000_000}
        if type(unit) is not Atom or unit.name not in units:
            raise ErlangError(_BADARG)
        return time.time_ns() // units[unit.name]

    def ensure_loaded(module: Term) -> Term:
        if node.exports.has_module(module):
            return (Atom("module"), module)
        return (Atom("error"), Atom("nofile"))

    def ping(peer: Term) -> Term:
        return Atom("pong") if peer is node.name or peer in node.nodes() else Atom("pang")

    return {
        "erlang": {
            "node": this_node,
            "nodes": nodes,
            "processes": lambda: [process.pid for process in node.processes()],
            "registered": lambda: list(node.registered()),
            "whereis": whereis,
            "is_process_alive": is_process_alive,
            "process_info": process_info,
            "system_info": system_info,
            "memory": memory,
            "statistics": statistics,
            "is_alive": lambda: True,
            "localtime": lambda: date_and_time(time.localtime()),
            "universaltime": lambda: date_and_time(time.gmtime()),
            "date": lambda: date_and_time(time.localtime())[0],
            "time": lambda: date_and_time(time.localtime())[1],
            "system_time": system_time,
            "monotonic_time": lambda: time.monotonic_ns(),
            "self": lambda: node.client.pid,
        },
        "application": {
            "which_applications": which_applications,
            "loaded_applications": which_applications,
            "get_env": lambda application, key, default=UNDEFINED: default,
        },
        "net_kernel": {
            "get_net_ticktime": lambda: int(node.options.ticktime_s),
            "longnames": lambda: _long_names(node),
            "nodename": lambda: node.name,
        },
        "net_adm": {"ping": ping},
        "code": {"ensure_loaded": ensure_loaded},
        "init": {"get_status": lambda: (Atom("started"), Atom("started"))},
    }


def _item(known: dict[str, Term], item: Term) -> Term:
    if type(item) is Atom and item.name in known:
        return (item, known[item.name])
    raise ErlangError(_BADARG)
