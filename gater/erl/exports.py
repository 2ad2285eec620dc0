"""Python functions under Erlang names: what `Module:Function/Arity` means on this node.

A function gets its arguments as terms and returns a term. It may be a coroutine function; it may raise `ErlangError`,
`ErlangExit` or `ErlangThrow` to choose what the caller sees. A *deferred* function gets, before its arguments, a
callback `done(result, error)` to call once, at any time: the way of a relay that must not cost a task per call.

Who calls them from afar is served by `rpc_server.py`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from gater.erl.errors import ErlangError, ErlangExit, NodeError
from gater.erl.process import KILLED
from gater.erl.terms import Atom, Term

Done: TypeAlias = Callable[[Term, BaseException | None], None]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

UNDEF: Final = Atom("undef")

MAX_ARITY: Final = 255
"""No Erlang function has more arguments (`MAX_ARG` in the emulator)."""


class Undefined(ErlangError):
    """`Module:Function/Arity` is not exported here."""

    def __init__(self, module: Term, function: Term, arguments: list[Term]) -> None:
        super().__init__(UNDEF, f"{module}:{function}/{len(arguments)} is not exported by this node")
        self.frame: Term = (module, function, arguments, [])


@dataclass(frozen=True, slots=True)
class ExportedFunction:
    """One function and how it is called."""

    call: Callable[..., Any]
    deferred: bool = False


class Exports:
    """The exported functions of one node."""

    def __init__(self) -> None:
        self._functions: dict[tuple[Atom, Atom, int], ExportedFunction] = {}
        self._modules: dict[Atom, int] = {}

    def add(
        self,
        module: str,
        function: str,
        call: Callable[..., Any],
        *,
        arities: Iterable[int] | None = None,
        deferred: bool = False,
    ) -> None:
        """Export `call` as `module:function`, with the arities its signature allows unless `arities` says otherwise.

        `NodeError` if one of them is exported already.
        """
        exported = ExportedFunction(call, deferred)
        for arity in _arities(call, deferred) if arities is None else arities:
            key = (Atom(module), Atom(function), arity)
            if key in self._functions:
                raise NodeError(f"{module}:{function}/{arity} is exported already")
            self._functions[key] = exported
            self._modules[key[0]] = self._modules.get(key[0], 0) + 1

    def export(
        self, module: str, function: str | None = None, *, deferred: bool = False
    ) -> Callable[[AnyFunction], AnyFunction]:
        """The decorator form of `add`; the function's own name is used unless another is given."""

        def decorate(call: AnyFunction) -> AnyFunction:
            self.add(module, function or call.__name__, call, deferred=deferred)
            return call

        return decorate

    def find(self, module: Term, function: Term, arity: int) -> ExportedFunction | None:
        """The function behind `module:function/arity`, or None (`undef`)."""
        if type(module) is not Atom or type(function) is not Atom:
            return None
        return self._functions.get((module, function, arity))

    def apply(self, module: Term, function: Term, arguments: Term, done: Done) -> Callable[[], object] | None:
        """Call a function; `done(result, error)` once (`Undefined` if it is not exported).

        What is returned cancels a function that has not ended.
        """
        if type(arguments) is not list:
            done(None, ErlangError(Atom("badarg")))
            return None
        exported = self.find(module, function, len(arguments))
        if exported is None:
            done(None, Undefined(module, function, arguments))
            return None
        return run_exported(exported, arguments, done)

    def has_module(self, module: Term) -> bool:
        """Whether any function of this module is exported."""
        return type(module) is Atom and module in self._modules

    def modules(self) -> list[Atom]:
        """The modules that have functions here."""
        return list(self._modules)

    def functions(self, module: Term) -> list[tuple[Atom, int]]:
        """Names and arities of the functions of a module, as `Module:module_info(exports)`."""
        return sorted(
            ((function, arity) for of, function, arity in self._functions if of is module),
            key=lambda each: (each[0].name, each[1]),
        )


def _arities(call: Callable[..., Any], deferred: bool) -> range:
    least = most = 0
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = MAX_ARITY
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    taken = 1 if deferred else 0
    return range(least - taken, min(most, MAX_ARITY) - taken + 1)


def run_exported(exported: ExportedFunction, arguments: list[Term], done: Done) -> Callable[[], object] | None:
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

    def __init__(self, done: Done) -> None:
        self._done: Done | None = done

    def __call__(self, result: Term, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result, error)
