"""Remote procedure calls, served: spawn requests of peers, and the process `rex`.

The functions are those of `node.exports`. How an outcome becomes the exit reason or the message that carries it to the
caller is told in `rpc.py`, where calls are made. Nodes before OTP 23 and C nodes send `{call, M, F, A, GroupLeader}` to
the process registered as `rex`.

Error shapes are OTP's, to the letter: a function nobody exports is `undef` with the stack `[{M, F, Args, []}]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from gater.erl import control
from gater.erl.connection import Connection
from gater.erl.control import SpawnReplyFlag, SpawnRequest, SpawnRequestTT, parse_spawn_options
from gater.erl.errors import ErlangExit, ErlangThrow
from gater.erl.exports import UNDEF, Undefined
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, keep_server
from gater.erl.node import Node
from gater.erl.process import EXIT, NORMAL, Process, described, error_term, exit_reason
from gater.erl.rpc import BADRPC, ERPC, ERROR, EXECUTE_CALL, EXECUTE_CAST, EXIT_CLASS, RETURN, THROW, stack
from gater.erl.terms import Atom, Pid, Term

MAX_CALLS: Final = 100_000
"""Functions running for peers at one time; further requests are refused with `system_limit`."""

REX: Final = Atom("rex")
_CALL: Final = Atom("call")
_BLOCK_CALL: Final = Atom("block_call")
_CAST: Final = Atom("cast")
_SBCAST: Final = Atom("sbcast")
_NONEXISTING_NAME: Final = Atom("nonexisting_name")
_SYSTEM_LIMIT: Final = Atom("system_limit")

log = structlog.get_logger(__name__)


def install(node: Node) -> None:
    """Let peers call the functions in `node.exports`."""
    service = _Service(node)
    node.requests = service.spawn_requested
    node.on_start.append(lambda: keep_server(node, lambda: _Rex(service), REX))


class _Running:
    """The receiver of a process that runs one function: its messages are nobody's, its end cancels the function."""

    __slots__ = ("cancel",)

    def __init__(self) -> None:
        self.cancel: Callable[[], object] | None = None

    def receive(self, message: Term) -> None:
        return None

    def terminate(self, reason: Term) -> None:
        cancel, self.cancel = self.cancel, None
        if cancel is not None:
            cancel()


class _Service:
    """Runs exported functions for peers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = 0

    def spawn_requested(
        self, message: SpawnRequest | SpawnRequestTT, arguments: list[Term], connection: Connection
    ) -> None:
        """Answer a SPAWN_REQUEST: start a process that applies the function, with link and monitor as asked for."""
        options = parse_spawn_options(message.opt_list)
        refusal = None
        if options is None:
            refusal = Atom("badopt")
        elif self.is_full:
            refusal = _SYSTEM_LIMIT
        if options is None or refusal is not None:
            self._answer(connection, message, 0, refusal)
            return
        running = _Running()
        process = self._node.spawn_receiver(running, group_leader=message.group_leader)
        module, function, _ = message.mfa
        process.initial_call = message.mfa
        flags = 0
        if options.link:
            flags |= SpawnReplyFlag.LINK
            process.links.add(message.from_pid)
            connection.links.setdefault(message.from_pid, set()).add(process)
        if options.monitor:
            flags |= SpawnReplyFlag.MONITOR
            process.monitored_by[message.req_id] = (message.from_pid, process.pid)
            connection.watched[message.req_id] = process
        if options.wants_reply(True):
            self._answer(connection, message, flags, process.pid)
        self._begin(process, running, module, function, arguments)

    def _answer(self, connection: Connection, message: SpawnRequest | SpawnRequestTT, flags: int, result: Term) -> None:
        connection.send_control((control.OP_SPAWN_REPLY, message.req_id, message.from_pid, flags, result))

    def _begin(self, process: Process, running: _Running, module: Term, function: Term, arguments: list[Term]) -> None:
        to_reason: Callable[[Term, BaseException | None], Term] = plain_exit_reason
        if module is ERPC and function is EXECUTE_CALL and len(arguments) == 4:
            reference, module, function, arguments = arguments
            to_reason = _answer_of(reference, module, function, arguments)
        elif module is ERPC and function in (EXECUTE_CALL, EXECUTE_CAST) and len(arguments) == 3:
            module, function, arguments = arguments

        def done(result: Term, error: BaseException | None) -> None:
            running.cancel = None
            process.exit(to_reason(result, error))

        running.cancel = self.apply(module, function, arguments, done)
        if not process.alive:
            running.cancel = None

    @property
    def is_full(self) -> bool:
        """Whether as many functions are running as may."""
        return self._running >= MAX_CALLS

    def apply(
        self, module: Term, function: Term, arguments: Term, done: Callable[[Term, BaseException | None], None]
    ) -> Callable[[], object] | None:
        """`Exports.apply`, counted."""
        self._running += 1

        def ended(result: Term, error: BaseException | None) -> None:
            self._running -= 1
            done(result, error)

        return self._node.exports.apply(module, function, arguments, ended)


def plain_exit_reason(_: Term, error: BaseException | None) -> Term:
    """The exit reason of a process spawned for its effect."""
    if error is None:
        return NORMAL
    if isinstance(error, Undefined):
        return (UNDEF, [error.frame])
    log.warning("remote_function_failed", error=described(error))
    return exit_reason(error)


def _answer_of(
    reference: Term, module: Term, function: Term, arguments: Term
) -> Callable[[Term, BaseException | None], Term]:
    """How the outcome of `erpc:execute_call/4` becomes the exit reason that carries it."""

    def answer(result: Term, error: BaseException | None) -> Term:
        if error is None:
            return (reference, RETURN, result)
        if isinstance(error, ErlangThrow):
            return (reference, THROW, error.reason)
        if isinstance(error, ErlangExit):
            return (reference, EXIT_CLASS, error.reason)
        return (reference, ERROR, error_term(error), stack(error, module, function, arguments))

    return answer


class _Rex(GenServer):
    """The process registered as `rex` (rpc.erl): calls of old nodes and of C nodes."""

    def __init__(self, service: _Service) -> None:
        self._service = service

    def handle_call(self, request: Term, caller: Caller) -> Term:
        if type(request) is tuple and len(request) == 5 and request[0] in (_CALL, _BLOCK_CALL):
            self._run(request, lambda answer: self.reply(caller, answer))
            return NO_REPLY
        return NO_REPLY

    def handle_cast(self, message: Term) -> None:
        if type(message) is tuple and len(message) == 5 and message[0] is _CAST:
            self._run(message, lambda answer: None)

    def handle_info(self, message: Term) -> None:
        match message:
            case (Pid() as sender, (kind, _, _, _, _) as request) if kind is _CALL:
                self._run(request, lambda answer: self.process.send(sender, (REX, answer)))
            case (Pid() as sender, (kind, Atom() as name, sent)) if kind is _SBCAST:
                known = self.node.whereis(name)
                if known is not None:
                    known.deliver(sent)
                own = self.node.name
                self.process.send(sender, (REX, own, own if known is not None else (_NONEXISTING_NAME, name)))
            case (Pid() as sender, Atom(name="features_request")):
                self.process.send(sender, (Atom("features_reply"), self.node.name, [ERPC]))

    def _run(self, request: tuple[Term, ...], answer: Callable[[Term], None]) -> None:
        _, module, function, arguments, _ = request
        if self._service.is_full:
            answer((BADRPC, (EXIT, _SYSTEM_LIMIT)))
            return

        def done(result: Term, error: BaseException | None) -> None:
            answer(result if error is None else badrpc(error, module, function, arguments))

        self._service.apply(module, function, arguments, done)


def badrpc(error: BaseException, module: Term, function: Term, arguments: Term) -> Term:
    """What `rpc:execute_call` makes of an exception: `{badrpc, {'EXIT', Reason}}`, or the term thrown."""
    if isinstance(error, ErlangThrow):
        return error.reason
    if isinstance(error, ErlangExit):
        return (BADRPC, (EXIT, error.reason))
    return (BADRPC, (EXIT, (error_term(error), stack(error, module, function, arguments))))
