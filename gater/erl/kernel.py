"""The processes that every Erlang node has and that other nodes talk to: `net_kernel` and `global_name_server`.

`net_kernel` answers `is_auth` (that is `net_adm:ping`). `global_name_server` answers what `global` of a peer may ask,
so that nobody waits: a hidden node takes no part in global names, objects to no lock and knows no name. The functions
that are called by rpc are those of `kernel_functions.py`.
"""

from __future__ import annotations

from typing import Final

from gater.erl import kernel_functions
from gater.erl.gen_server import Caller, GenServer, keep_server
from gater.erl.node import Node
from gater.erl.terms import Atom, Term

KERNEL_VERSION: Final = "8.5"
"""The version of the application `kernel` whose behaviour is followed (OTP 25)."""
STDLIB_VERSION: Final = "4.2"
"""Likewise for `stdlib`."""

GLOBAL_PROTOCOL_VERSION: Final = 8
"""What `global_name_server` of OTP 25 to 28 says of itself."""

_YES: Final = Atom("yes")
_NO: Final = Atom("no")
_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")


def install(node: Node) -> None:
    """Export the kernel functions of `node` and start its kernel processes when it starts."""
    node.add_application("kernel", "ERTS  CXC 138 10", KERNEL_VERSION)
    node.add_application("stdlib", "ERTS  CXC 138 10", STDLIB_VERSION)
    node.on_start.append(lambda: _start_processes(node))
    kernel_functions.install(node)


def _start_processes(node: Node) -> None:
    keep_server(node, _NetKernel, "net_kernel")
    keep_server(node, _GlobalNames, "global_name_server")


class _NetKernel(GenServer):
    """The process registered as `net_kernel`."""

    def handle_call(self, request: Term, caller: Caller) -> Term:
        kind = request[0] if type(request) is tuple and request else request
        match kind:
            case Atom(name="is_auth"):
                return _YES
            case Atom(name="longnames"):
                return kernel_functions.long_names(self.node)
            case Atom(name="get_net_ticktime"):
                return int(self.node.options.ticktime_s)
        return (_ERROR, Atom("bad_request"))

    def handle_cast(self, message: Term) -> None:
        return None


class _GlobalNames(GenServer):
    """The process registered as `global_name_server` (global.erl)."""

    def handle_call(self, request: Term, caller: Caller) -> Term:
        kind = request[0] if type(request) is tuple and request else request
        match kind:
            case Atom(name="set_lock" | "del_lock"):
                return True
            case Atom(name="register" | "register_ext"):
                return _NO
            case Atom(name="unregister" | "sync"):
                return _OK
            case Atom(name="get_known" | "get_synced" | "get_names_ext" | "disconnect"):
                return []
            case Atom(name="get_protocol_version"):
                return GLOBAL_PROTOCOL_VERSION
        return (_ERROR, Atom("bad_request"))

    def handle_cast(self, message: Term) -> None:
        return None
