"""The functions that peers, shells and tools call on any node by rpc: of `erlang`, `net_kernel`, `application`, ...

All are answered from memory, at once: some callers ask without a timeout. What only makes sense on a BEAM (heaps,
reductions, schedulers) is answered with numbers that say so. Nothing here reveals the cookie or ends the node
(a program that can be ended by command exports `init:stop/0`).
"""

from __future__ import annotations

import itertools
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from gater.erl.errors import ErlangError, ErlError
from gater.erl.handshake import has_long_name
from gater.erl.node import Node
from gater.erl.phash2 import phash2
from gater.erl.process import Process
from gater.erl.rpc import erpc_call, erpc_cast, erpc_multicall, rpc_call, rpc_multicall
from gater.erl.terms import Atom, Pid, Port, Reference, Term

UNDEFINED: Final = Atom("undefined")
_BADARG: Final = Atom("badarg")
_REGISTERED_NAME: Final = Atom("registered_name")
_INFINITY: Final = Atom("infinity")
_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")


def _charlist(text: str) -> list[int]:
    return [ord(character) for character in text]


def long_names(node: Node) -> bool:
    """Whether the node has a long name (`-name`)."""
    return has_long_name(node.name.name)


def _node_of(term: Term) -> Term:
    if isinstance(term, Pid | Reference | Port):
        return term.node
    raise ErlangError(_BADARG)


def install(node: Node) -> None:
    """Export all of them."""
    for functions in (_of_node(node), _of_calls(node)):
        for module, each in functions.items():
            for name, function in each.items():
                node.exports.add(module, name, function)


def _of_node(node: Node) -> dict[str, dict[str, Callable[..., Term]]]:
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
        known = _process_items(process)
        if items is None:
            return [(Atom(name), known[name]()) for name in _USUAL_ITEMS if name in known]
        if type(items) is list:
            return [_item(known, each) for each in items]
        if items is _REGISTERED_NAME and process.name is None:
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
            "port_count": 0,
            "port_limit": 1 << 16,
            "dirty_cpu_schedulers": 0,
            "dirty_cpu_schedulers_online": 0,
            "dirty_io_schedulers": 0,
            "thread_pool_size": 0,
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
        total = _resident_bytes()
        answers: dict[str, Term] = dict.fromkeys(
            ("processes", "processes_used", "atom", "atom_used", "binary", "code", "ets"), 0
        )
        answers = {"total": total, "system": total, **answers}
        if item is None:
            return [(Atom(name), value) for name, value in answers.items()]
        if type(item) is list and all(type(each) is Atom and each.name in answers for each in item):
            return [(each, answers[each.name]) for each in item]
        if type(item) is Atom and item.name in answers:
            return answers[item.name]
        raise ErlangError(_BADARG)

    def statistics(item: Term) -> Term:
        match item:
            case Atom(name="wall_clock"):
                return (int(node.uptime_s * 1000), 0)
            case Atom(name="runtime"):
                return (int(time.process_time() * 1000), 0)
            case Atom(name="reductions" | "exact_reductions" | "context_switches"):
                return (0, 0)
            case Atom(name="garbage_collection"):
                return (0, 0, 0)
            case Atom(name="io"):
                return ((Atom("input"), 0), (Atom("output"), 0))
            case Atom(name="run_queue" | "total_run_queue_lengths" | "total_active_tasks"):
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

    def is_loaded(module: Term) -> Term:
        return (Atom("file"), _charlist("python")) if node.exports.has_module(module) else False

    def application_key(application: Term, key: Term) -> Term:
        entry = node.applications.get(str(application))
        if entry is None:
            return UNDEFINED
        answers = {"description": entry[0], "vsn": entry[1]}
        return (_OK, _charlist(answers[str(key)])) if str(key) in answers else UNDEFINED

    def module_exported(module: Term, function: Term, arity: Term) -> Term:
        return node.exports.find(module, function, arity) is not None

    def monitor_node(peer: Term, flag: Term) -> Term:
        # The watcher is the process of this call, which ends with it. What remains is that a connection is made.
        if type(flag) is not bool:
            raise ErlangError(_BADARG)
        if _node_name(peer) is not node.name and flag:
            node.connection(peer)
        return True

    def unregistered_name(_: Term) -> Term:
        return UNDEFINED

    numbers = itertools.count(1)

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
            "group_leader": lambda: node.client.group_leader,
            "make_ref": node.make_reference,
            "unique_integer": lambda options=None: next(numbers),
            "timestamp": _timestamp,
            "phash2": _phash2,
            "ports": _nothing,
            "pre_loaded": _nothing,
            "loaded": node.exports.modules,
            "function_exported": module_exported,
            "module_loaded": node.exports.has_module,
            "monitor_node": monitor_node,
            "disconnect_node": lambda peer: node.disconnect(_node_name(peer)),
            "exit": _exit(node),
            "send": _send(node),
        },
        "application": {
            "which_applications": which_applications,
            "loaded_applications": which_applications,
            "get_env": lambda application, key, default=UNDEFINED: default,
            "get_all_env": lambda application: [],
            "get_key": application_key,
            "get_application": unregistered_name,
        },
        "net_kernel": {
            "get_net_ticktime": lambda: int(node.options.ticktime_s),
            "longnames": lambda: long_names(node),
            "nodename": lambda: node.name,
        },
        # The `nodes()` of the shell.
        "c": {"nodes": nodes},
        "code": {
            "ensure_loaded": ensure_loaded,
            "is_loaded": is_loaded,
            "all_loaded": lambda: [(module, _charlist("python")) for module in node.exports.modules()],
            "which": lambda module: _charlist("python") if node.exports.has_module(module) else Atom("non_existing"),
            "get_object_code": lambda module: _ERROR,
            "is_module_native": lambda module: False,
        },
        "init": {
            "get_status": lambda: (Atom("started"), Atom("started")),
            "get_arguments": _nothing,
            "get_plain_arguments": _nothing,
            "get_argument": lambda flag: _ERROR,
            "script_id": lambda: (_charlist("gater"), _charlist(platform.python_version())),
        },
        "global": {
            "whereis_name": unregistered_name,
            "registered_names": _nothing,
            "sync": lambda: _OK,
            "info": _nothing,
        },
        "os": {
            "type": lambda: (Atom("unix"), Atom(platform.system().lower())),
            "timestamp": _timestamp,
            "system_time": system_time,
        },
    }


def _of_calls(node: Node) -> dict[str, dict[str, Callable[..., Any]]]:
    """Functions that go to other nodes from here, and so may take their time."""

    async def connect_node(peer: Term) -> Term:
        name = _node_name(peer)
        try:
            await node.connect(name)
        except ErlError:
            return False
        return True

    async def ping(peer: Term) -> Term:
        return Atom("pong" if await connect_node(peer) else "pang")

    async def remote_call(
        peer: Term, module: Term, function: Term, arguments: Term, limit_ms: Term = _INFINITY
    ) -> Term:
        return await rpc_call(node, peer, module, function, arguments, timeout_s=_seconds(limit_ms))

    async def remote_erpc(
        peer: Term, module: Term, function: Term, arguments: Term, limit_ms: Term = _INFINITY
    ) -> Term:
        return await erpc_call(node, peer, module, function, arguments, timeout_s=_seconds(limit_ms))

    async def multicall(*arguments: Term) -> Term:
        match arguments:
            case ([*peers], Atom() as module, Atom() as function, [*values]):
                return await rpc_multicall(node, peers, module, function, values)
            case ([*peers], Atom() as module, Atom() as function, [*values], limit_ms):
                return await rpc_multicall(node, peers, module, function, values, timeout_s=_seconds(limit_ms))
            case (Atom() as module, Atom() as function, [*values], *rest) if len(rest) < 2:
                timeout_s = _seconds(rest[0]) if rest else None
                return await rpc_multicall(node, [node.name], module, function, values, timeout_s=timeout_s)
        raise ErlangError(_BADARG)

    async def all_of(peers: Term, module: Term, function: Term, arguments: Term, limit_ms: Term = _INFINITY) -> Term:
        if type(peers) is not list:
            raise ErlangError(_BADARG)
        return await erpc_multicall(node, peers, module, function, arguments, timeout_s=_seconds(limit_ms))

    def cast_to(peer: Term, module: Term, function: Term, arguments: Term) -> Term:
        erpc_cast(node, _node_name(peer), module, function, arguments)
        return True

    node.exports.add("rpc", "multicall", multicall, arities=[3, 4, 5])
    return {
        "net_adm": {"ping": ping},
        "net_kernel": {"connect_node": connect_node, "hidden_connect_node": connect_node},
        "rpc": {"call": remote_call, "cast": cast_to},
        "erpc": {"call": remote_erpc, "multicall": all_of},
    }


def _node_name(term: Term) -> Atom:
    if type(term) is not Atom:
        raise ErlangError(_BADARG)
    return term


def _seconds(timeout_ms: Term) -> float | None:
    """A timeout of Erlang, in milliseconds or `infinity`, as one of Python."""
    if timeout_ms is _INFINITY:
        return None
    if type(timeout_ms) is not int or timeout_ms < 0:
        raise ErlangError(_BADARG)
    return timeout_ms / 1000


def _nothing() -> Term:
    return []


def _timestamp() -> Term:
    microseconds = time.time_ns() // 1000
    return (microseconds // 10**12, microseconds // 10**6 % 10**6, microseconds % 10**6)


def _phash2(term: Term, limit: Term = 1 << 27) -> Term:
    if type(limit) is not int or not 1 <= limit <= 1 << 32:
        raise ErlangError(_BADARG)
    return phash2(term, limit)


def _exit(node: Node) -> Callable[[Term, Term], Term]:
    def exit_signal(pid: Term, reason: Term) -> Term:
        if type(pid) is not Pid:
            raise ErlangError(_BADARG)
        node.exit(pid, reason)
        return True

    return exit_signal


def _send(node: Node) -> Callable[[Term, Term], Term]:
    def send(to: Term, message: Term) -> Term:
        try:
            node.send(to, message)
        except TypeError:
            raise ErlangError(_BADARG) from None
        return message

    return send


def _process_items(process: Process) -> dict[str, Callable[[], Term]]:
    """What `erlang:process_info/2` may be asked of a process, and how it is found out."""
    call = process.initial_call or (Atom("python"), Atom("receive"), 0)
    numbers = ("total_heap_size", "heap_size", "stack_size", "reductions", "memory", "min_heap_size", "catchlevel")
    nothing = ("dictionary", "garbage_collection", "suspending", "binary", "sequential_trace_token")
    return {
        **dict.fromkeys(numbers, lambda: 0),
        **dict.fromkeys(nothing, _nothing),
        "registered_name": lambda: [] if process.name is None else Atom(process.name),
        "current_function": lambda: call,
        "current_location": lambda: (*call, []),
        "current_stacktrace": lambda: [(*call, [])],
        "initial_call": lambda: process.initial_call or (Atom("python"), Atom("spawn"), 0),
        "status": lambda: Atom("waiting"),
        "message_queue_len": process.queue_length,
        "messages": process.messages,
        "message_queue_data": lambda: Atom("on_heap"),
        "links": lambda: list(process.links),
        "trap_exit": lambda: process.trap_exit,
        "error_handler": lambda: Atom("error_handler"),
        "priority": lambda: Atom("normal"),
        "group_leader": lambda: process.group_leader,
        "parent": lambda: UNDEFINED,
        "trace": lambda: 0,
        "monitors": lambda: [(Atom("process"), monitor.object) for monitor in process.monitors.values()],
        "monitored_by": lambda: [each[0] for each in process.monitored_by.values() if isinstance(each, tuple)],
    }


_USUAL_ITEMS: Final = (
    "registered_name",
    "current_function",
    "initial_call",
    "status",
    "message_queue_len",
    "links",
    "dictionary",
    "trap_exit",
    "error_handler",
    "priority",
    "group_leader",
    "total_heap_size",
    "heap_size",
    "stack_size",
    "reductions",
    "garbage_collection",
    "suspending",
)
"""The items of `erlang:process_info/1`, in its order."""


def _item(known: dict[str, Callable[[], Term]], item: Term) -> Term:
    if type(item) is Atom and item.name in known:
        return (item, known[item.name]())
    if type(item) is tuple and len(item) == 2 and item[0] is Atom("dictionary"):
        # One key of the process dictionary; there is none.
        return (item, UNDEFINED)
    raise ErlangError(_BADARG)


def _resident_bytes() -> int:
    """The memory of this process that is in RAM, or the most it ever was where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
