"""Remote procedure calls, served and made: `erpc`, `rpc` (the process `rex`) and plain `spawn` from afar.

How `erpc:call` works (erpc.erl): the caller sends a SPAWN_REQUEST for `erpc:execute_call(Ref, M, F, A)` with a
monitor; the process started for it exits with `{Ref, return, Value}`, `{Ref, throw | exit, Term}` or `{Ref, error,
Reason, Stack}`, and the 'DOWN' message carries the answer. `rpc:call` is the same with other names for the outcomes;
nodes before OTP 23 and C nodes send `{call, M, F, A, GroupLeader}` to the process registered as `rex`.

Error shapes are OTP's, to the letter: a function nobody exports is `undef` with the stack `[{M, F, Args, []}]`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from gater.erl import control, etf
from gater.erl.connection import Connection
from gater.erl.control import SpawnReplyFlag, SpawnRequest, SpawnRequestTT, parse_spawn_options
from gater.erl.errors import ErlangError, ErlangException, ErlangExit, ErlangThrow
from gater.erl.exports import ExportedFunction
from gater.erl.gen_server import NO_REPLY, Caller, GenServer, spawn_server, until_read
from gater.erl.node import Monitor, Node
from gater.erl.process import (
    EXIT,
    KILLED,
    NOCONNECTION,
    NORMAL,
    Process,
    described,
    error_term,
    exit_reason,
    stacktrace,
)
from gater.erl.terms import Atom, Export, Fun, Pid, Reference, Term

MAX_CALLS: Final = 100_000
"""Functions running for peers at one time; further requests are refused with `system_limit`."""

ERPC: Final = Atom("erpc")
BADRPC: Final = Atom("badrpc")
RETURN: Final = Atom("return")
THROW: Final = Atom("throw")
ERROR: Final = Atom("error")
EXIT_CLASS: Final = Atom("exit")
EXCEPTION: Final = Atom("exception")
SIGNAL: Final = Atom("signal")
UNDEF: Final = Atom("undef")
TIMEOUT: Final = Atom("timeout")
NODEDOWN: Final = Atom("nodedown")
NOTSUP: Final = Atom("notsup")
REX: Final = Atom("rex")
_OK: Final = Atom("ok")
_EXECUTE_CALL: Final = Atom("execute_call")
_EXECUTE_CAST: Final = Atom("execute_cast")
_CALL: Final = Atom("call")
_BLOCK_CALL: Final = Atom("block_call")
_CAST: Final = Atom("cast")

log = structlog.get_logger(__name__)


class Undefined(ErlangError):
    """`Module:Function/Arity` is not exported here."""

    def __init__(self, module: Term, function: Term, arguments: list[Term]) -> None:
        super().__init__(UNDEF, f"{module}:{function}/{len(arguments)} is not exported by this node")
        self.frame: Term = (module, function, arguments, [])


def install(node: Node) -> None:
    """Let peers call the functions in `node.exports`."""
    service = _Service(node)
    node.requests = service.spawn_requested
    node.apply_function = lambda function, arguments, sender, timeout_s: apply_function(
        node, function, arguments, sender=sender, timeout_s=timeout_s
    )
    node.on_start.append(lambda: _start_rex(node, service))


def _start_rex(node: Node, service: _Service) -> None:
    spawn_server(node, _Rex(service), name=REX)


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
        elif self._running >= MAX_CALLS:
            refusal = Atom("system_limit")
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
        if module is ERPC and function is _EXECUTE_CALL and len(arguments) == 4:
            reference, module, function, arguments = arguments
            to_reason = _answer_of(reference, module, function, arguments)
        elif module is ERPC and function in (_EXECUTE_CALL, _EXECUTE_CAST) and len(arguments) == 3:
            module, function, arguments = arguments
        self._running += 1

        def done(result: Term, error: BaseException | None) -> None:
            self._running -= 1
            running.cancel = None
            process.exit(to_reason(result, error))

        running.cancel = self.apply(module, function, arguments, done)
        if not process.alive:
            running.cancel = None

    def apply(
        self,
        module: Term,
        function: Term,
        arguments: Term,
        done: Callable[[Term, BaseException | None], None],
    ) -> Callable[[], object] | None:
        """Call an exported function; `done(result, error)` once.

        What is returned cancels a function that has not ended.
        """
        if type(arguments) is not list:
            done(None, ErlangError(Atom("badarg")))
            return None
        exported = self._node.exports.find(module, function, len(arguments))
        if exported is None:
            done(None, Undefined(module, function, arguments))
            return None
        return run_exported(exported, arguments, done)


def run_exported(
    exported: ExportedFunction, arguments: list[Term], done: Callable[[Term, BaseException | None], None]
) -> Callable[[], object] | None:
    """Run a function; `done(result, error)` is called once, at once unless the function is a coroutine or deferred."""
    once = _Once(done)
    try:
        if exported.deferred:
            exported.call(once, *arguments)
            return None
        result = exported.call(*arguments)
    except Exception as error:
        once(None, error)
        return None
    if not inspect.isawaitable(result):
        once(result, None)
        return None
    task = asyncio.ensure_future(result)

    def finished(ended: asyncio.Task[Term]) -> None:
        if ended.cancelled():
            once(None, ErlangExit(KILLED))
        else:
            error = ended.exception()
            once(None if error is not None else ended.result(), error)

    task.add_done_callback(finished)
    return task.cancel


class _Once:
    """A `done` callback that ignores everything after the first call."""

    __slots__ = ("_done",)

    def __init__(self, done: Callable[[Term, BaseException | None], None]) -> None:
        self._done: Callable[[Term, BaseException | None], None] | None = done

    def __call__(self, result: Term, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result, error)


def plain_exit_reason(_: Term, error: BaseException | None) -> Term:
    """The exit reason of a process spawned for its effect."""
    if error is None:
        return NORMAL
    if isinstance(error, Undefined):
        return (UNDEF, [error.frame])
    log.warning("remote_function_failed", error=described(error))
    return exit_reason(error)


def _stack(error: BaseException, module: Term, function: Term, arguments: list[Term]) -> list[Term]:
    if isinstance(error, Undefined):
        return [error.frame]
    return [*stacktrace(error), (module, function, len(arguments), [])]


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
        return (reference, ERROR, error_term(error), _stack(error, module, function, arguments))

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
            case (Pid() as sender, Atom(name="features_request")):
                self.process.send(sender, (Atom("features_reply"), self.node.name, [ERPC]))

    def _run(self, request: tuple[Term, ...], answer: Callable[[Term], None]) -> None:
        _, module, function, arguments, _ = request

        def done(result: Term, error: BaseException | None) -> None:
            answer(result if error is None else badrpc(error, module, function, arguments))

        self._service.apply(module, function, arguments, done)


def badrpc(error: BaseException, module: Term, function: Term, arguments: list[Term]) -> Term:
    """What `rpc:execute_call` makes of an exception: `{badrpc, {'EXIT', Reason}}`, or the term thrown."""
    if isinstance(error, ErlangThrow):
        return error.reason
    if isinstance(error, ErlangExit):
        return (BADRPC, (EXIT, error.reason))
    return (BADRPC, (EXIT, (error_term(error), _stack(error, module, function, arguments))))


class PendingRpc:
    """An `erpc:call` under way, without a coroutine: `on_done(result, error)` once, unless it is cancelled."""

    __slots__ = ("_monitor", "_node", "_on_done", "_reference", "_timer")

    def __init__(
        self,
        node: Node,
        peer: Atom,
        mfa: tuple[Atom, Atom, list[Term]],
        on_done: Callable[[Term, ErlangException | None], None],
        timeout_s: float | None,
    ) -> None:
        self._node = node
        self._on_done: Callable[[Term, ErlangException | None], None] | None = on_done
        self._reference: Reference = node.make_reference()
        self._timer: asyncio.TimerHandle | None = None
        module, function, arguments = mfa
        self._monitor = node.spawn_request(
            peer,
            (ERPC, _EXECUTE_CALL, [self._reference, module, function, arguments]),
            on_error=self._refused,
            on_down=self._down,
        )
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._timed_out)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._on_done = None
        self._node.abandon_spawn(self._monitor)
        if self._timer is not None:
            self._timer.cancel()

    def _finish(self, result: Term, error: ErlangException | None) -> None:
        on_done, self._on_done = self._on_done, None
        if self._timer is not None:
            self._timer.cancel()
        if on_done is not None:
            on_done(result, error)

    def _refused(self, reason: Term) -> None:
        self._finish(None, ErlangError((ERPC, reason)))

    def _timed_out(self) -> None:
        self._node.abandon_spawn(self._monitor)
        self._finish(None, ErlangError((ERPC, TIMEOUT)))

    def _down(self, _: Monitor, reason: Term) -> None:
        match reason:
            case (self._reference, kind, result) if kind is RETURN:
                self._finish(result, None)
            case (self._reference, kind, term) if kind is THROW:
                self._finish(None, ErlangThrow(term))
            case (self._reference, kind, term) if kind is EXIT_CLASS:
                self._finish(None, ErlangExit((EXCEPTION, term)))
            case (self._reference, kind, term, stack) if kind is ERROR:
                self._finish(None, ErlangError((EXCEPTION, term, stack)))
            case (self._reference, kind, (erpc, _) as term) if kind is ERROR and erpc is ERPC:
                self._finish(None, ErlangError(term))
            case _ if reason is NOCONNECTION:
                self._finish(None, ErlangError((ERPC, NOCONNECTION)))
            case _:
                self._finish(None, ErlangExit((SIGNAL, reason)))


async def erpc_call(
    node: Node,
    peer: str | Atom,
    module: str | Atom,
    function: str | Atom,
    arguments: Iterable[Term] = (),
    *,
    timeout_s: float | None = None,
) -> Term:
    """`erpc:call(Node, Module, Function, Args, Timeout)`.

    Raises what OTP raises: `ErlangThrow(Term)`; `ErlangExit({exception, Reason})`, `ErlangExit({signal, Reason})`;
    `ErlangError({exception, Reason, Stack})`, `ErlangError({erpc, timeout | noconnection | ..})`. If too much waits for
    the peer already, the request is held back first.
    """
    mfa = (Atom(str(module)), Atom(str(function)), list(arguments))
    future: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

    def finish(result: Term, error: ErlangException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    if Atom(str(peer)) is node.name:
        return await _local_call(node, mfa, finish, future, timeout_s)
    name, loop = Atom(str(peer)), asyncio.get_running_loop()
    begun = loop.time()
    try:
        await until_read(node, name, timeout_s)
    except TimeoutError:
        raise ErlangError((ERPC, TIMEOUT)) from None
    left_s = None if timeout_s is None else max(0.0, timeout_s - (loop.time() - begun))
    pending = PendingRpc(node, name, mfa, finish, left_s)
    try:
        return await future
    except asyncio.CancelledError:
        pending.cancel()
        raise


async def _local_call(
    node: Node,
    mfa: tuple[Atom, Atom, list[Term]],
    finish: Callable[[Term, ErlangException | None], None],
    future: asyncio.Future[Term],
    timeout_s: float | None,
) -> Term:
    module, function, arguments = mfa

    def done(result: Term, error: BaseException | None) -> None:
        if error is None or isinstance(error, ErlangThrow):
            finish(result, error)
        elif isinstance(error, ErlangExit):
            finish(None, ErlangExit((EXCEPTION, error.reason)))
        else:
            finish(None, ErlangError((EXCEPTION, error_term(error), _stack(error, module, function, arguments))))

    cancel = _Service(node).apply(module, function, arguments, done)
    try:
        async with asyncio.timeout(timeout_s):
            return await future
    except TimeoutError:
        raise ErlangError((ERPC, TIMEOUT)) from None
    finally:
        if cancel is not None:
            cancel()


async def apply_function(
    node: Node,
    function: Term,
    arguments: list[Term],
    *,
    sender: str | Atom | None = None,
    timeout_s: float | None = None,
) -> Term:
    """`apply(Fun, Args)` for a fun that came from a peer; no Erlang code runs here.

    A closure is applied on the node of the process that made it, where its code is. `fun M:F/A` is applied here if this
    node exports it, else on `sender`, the node it came from. Raises what the fun raised (`ErlangError`, `ErlangExit`,
    `ErlangThrow`; `badfun` and `badarity` as in Erlang), or `ErlangError({erpc, noconnection | timeout | ..})`.
    """
    if type(function) is Fun:
        home = etf.fun_creator(function).node
    elif type(function) is not Export:
        raise ErlangError((Atom("badfun"), function))
    elif function.arity != len(arguments):
        raise ErlangError((Atom("badarity"), (function, arguments)))
    elif sender is None or node.exports.find(function.module, function.function, function.arity) is not None:
        home = node.name
    else:
        home = Atom(str(sender))
    module, name, values = Atom("erlang"), Atom("apply"), [function, arguments]
    if type(function) is Export:
        module, name, values = function.module, function.function, arguments
    try:
        return await erpc_call(node, home, module, name, values, timeout_s=timeout_s)
    except ErlangException as error:
        if not isinstance(error, ErlangThrow) and error.reason[0] is EXCEPTION:
            raise type(error)(error.reason[1]) from None
        raise


def erpc_cast(
    node: Node, peer: str | Atom, module: str | Atom, function: str | Atom, arguments: Iterable[Term] = ()
) -> None:
    """`erpc:cast(Node, Module, Function, Args)`: no answer, no error."""
    name, called, args = Atom(str(module)), Atom(str(function)), list(arguments)
    if Atom(str(peer)) is node.name:
        _Service(node).apply(name, called, args, lambda result, error: None)
        return
    node.spawn_cast(Atom(str(peer)), (ERPC, _EXECUTE_CAST, [name, called, args]))


async def erpc_multicall(
    node: Node,
    peers: Iterable[str | Atom],
    module: str | Atom,
    function: str | Atom,
    arguments: Iterable[Term] = (),
    *,
    timeout_s: float | None = None,
) -> list[Term]:
    """`erpc:multicall/5`: for each peer, in order, `{ok, Result}`, `{throw, T}`, `{exit, R}` or `{error, R}`."""
    args = list(arguments)

    async def one(peer: str | Atom) -> Term:
        try:
            return (_OK, await erpc_call(node, peer, module, function, args, timeout_s=timeout_s))
        except ErlangException as error:
            return (Atom(error.kind), error.reason)

    return list(await asyncio.gather(*(one(peer) for peer in peers)))


async def rpc_multicall(
    node: Node,
    peers: Iterable[str | Atom],
    module: str | Atom,
    function: str | Atom,
    arguments: Iterable[Term] = (),
    *,
    timeout_s: float | None = None,
) -> tuple[list[Term], list[Atom]]:
    """`rpc:multicall/5`: the results (or `{badrpc, Reason}`) in order, and the nodes that did not answer."""
    names = [Atom(str(peer)) for peer in peers]
    results: list[Term] = []
    silent: list[Atom] = []
    answers = await asyncio.gather(
        *(rpc_call(node, name, module, function, arguments, timeout_s=timeout_s) for name in names)
    )
    for name, answer in zip(names, answers, strict=True):
        if answer in ((BADRPC, NODEDOWN), (BADRPC, TIMEOUT)):
            silent.append(name)
        else:
            results.append(answer)
    return results, silent


async def rpc_call(
    node: Node,
    peer: str | Atom,
    module: str | Atom,
    function: str | Atom,
    arguments: Iterable[Term] = (),
    *,
    timeout_s: float | None = None,
) -> Term:
    """`rpc:call(Node, Module, Function, Args, Timeout)`: the result, or `{badrpc, Reason}` as rpc.erl has it.

    Reasons: `nodedown`, `timeout`, `{'EXIT', Reason}`. A thrown term is returned like a result.
    """
    try:
        result = await erpc_call(node, peer, module, function, arguments, timeout_s=timeout_s)
    except ErlangThrow as error:
        result = error.reason
    except ErlangException as error:
        return (BADRPC, _badrpc_reason(error.reason))
    is_exit = type(result) is tuple and len(result) == 2 and result[0] is EXIT
    return (BADRPC, result) if is_exit else result


def _badrpc_reason(reason: Term) -> Term:
    match reason:
        case (kind, term, stack) if kind is EXCEPTION:
            return (EXIT, (term, stack))
        case (kind, term) if kind is EXCEPTION or kind is SIGNAL:
            return (EXIT, term)
        case (kind, term) if kind is ERPC:
            return NODEDOWN if term is NOCONNECTION else term
    return (EXIT, reason)
