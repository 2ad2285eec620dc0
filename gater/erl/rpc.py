"""Remote procedure calls, made: `erpc`, `rpc`, and funs of peers. They are served by `rpc_server.py`.

How `erpc:call` works (erpc.erl): the caller sends a SPAWN_REQUEST for `erpc:execute_call(Ref, M, F, A)` with a
monitor; the process started for it exits with `{Ref, return, Value}`, `{Ref, throw | exit, Term}` or `{Ref, error,
Reason, Stack}`, and the 'DOWN' message carries the answer. `rpc:call` is the same with other names for the outcomes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from gater.erl import etf
from gater.erl.errors import ErlangError, ErlangException, ErlangExit, ErlangThrow
from gater.erl.exports import Undefined
from gater.erl.node import Monitor, Node
from gater.erl.process import EXIT, NOCONNECTION, error_term, stacktrace
from gater.erl.terms import Atom, Export, Fun, Reference, Term

ERPC: Final = Atom("erpc")
BADRPC: Final = Atom("badrpc")
RETURN: Final = Atom("return")
THROW: Final = Atom("throw")
ERROR: Final = Atom("error")
EXIT_CLASS: Final = Atom("exit")
EXCEPTION: Final = Atom("exception")
SIGNAL: Final = Atom("signal")
TIMEOUT: Final = Atom("timeout")
NODEDOWN: Final = Atom("nodedown")
_OK: Final = Atom("ok")
EXECUTE_CALL: Final = Atom("execute_call")
EXECUTE_CAST: Final = Atom("execute_cast")


def stack(error: BaseException, module: Term, function: Term, arguments: Term) -> list[Term]:
    """The stack trace shown to the caller of `module:function`, which has raised `error`."""
    if isinstance(error, Undefined):
        return [error.frame]
    arity = len(arguments) if type(arguments) is list else arguments
    return [*stacktrace(error), (module, function, arity, [])]


class PendingRpc:
    """An `erpc:call` under way, without a coroutine: `on_done(result, error)` once, unless it is cancelled.

    `spine_levels` says how deep a result is decoded (`etf.decode_spine`); None decodes all of it.
    """

    __slots__ = ("_monitor", "_node", "_on_done", "_reference", "_timer")

    def __init__(
        self,
        node: Node,
        peer: Atom,
        mfa: tuple[Atom, Atom, list[Term]],
        on_done: Callable[[Term, ErlangException | None], None],
        timeout_s: float | None,
        spine_levels: int | None = None,
    ) -> None:
        self._node = node
        self._on_done: Callable[[Term, ErlangException | None], None] | None = on_done
        self._reference: Reference = node.make_reference()
        self._timer: asyncio.TimerHandle | None = None
        module, function, arguments = mfa
        self._monitor = node.spawn_request(
            peer,
            (ERPC, EXECUTE_CALL, [self._reference, module, function, arguments]),
            on_error=self._refused,
            on_down=self._down,
        )
        if spine_levels is not None:
            # It comes in {Ref, return, Result}.
            self._monitor.spine_levels = spine_levels + 1
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
    spine_levels: int | None = None,
) -> Term:
    """`erpc:call(Node, Module, Function, Args, Timeout)`. `spine_levels` as for `PendingRpc`.

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
        await node.drain(name, timeout_s)
    except TimeoutError:
        raise ErlangError((ERPC, TIMEOUT)) from None
    left_s = None if timeout_s is None else max(0.0, timeout_s - (loop.time() - begun))
    pending = PendingRpc(node, name, mfa, finish, left_s, spine_levels)
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
            finish(None, ErlangError((EXCEPTION, error_term(error), stack(error, module, function, arguments))))

    cancel = node.exports.apply(module, function, arguments, done)
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
        node.exports.apply(name, called, args, lambda result, error: None)
        return
    node.spawn_cast(Atom(str(peer)), (ERPC, EXECUTE_CAST, [name, called, args]))


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
