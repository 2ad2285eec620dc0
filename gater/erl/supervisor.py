"""Supervisors: start children in order, restart those that fail, give up when they fail too often.

Follows "Supervisor Behaviour" of the OTP design principles: strategies `one_for_one`, `one_for_all`, `rest_for_one`; a
child is `permanent` (always restarted), `transient` (restarted after a failure) or `temporary` (never); more than
`max_restarts` restarts within `max_seconds` end the supervisor with `shutdown`, and its children with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import structlog

from gater.erl.errors import NodeError
from gater.erl.gen_server import Caller, GenServer
from gater.erl.process import EXIT, SHUTDOWN, Stop, described, exit_reason, is_failure
from gater.erl.terms import Atom, Term

Strategy: TypeAlias = Literal["one_for_one", "one_for_all", "rest_for_one"]
Restart: TypeAlias = Literal["permanent", "transient", "temporary"]

MAX_RESTARTS: Final = 3
"""Default intensity: this many restarts ..."""
MAX_SECONDS: Final = 5.0
"""... within this time are accepted."""

log = structlog.get_logger(__name__)


_OK: Final = Atom("ok")
_ERROR: Final = Atom("error")
_NOT_FOUND: Final = Atom("not_found")
_RUNNING: Final = Atom("running")


class ChildError(NodeError):
    """What was asked of a child cannot be done; `reason` is that of `supervisor`: `not_found` or `running`."""

    def __init__(self, reason: Atom, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one child: `start()` gives a server whose process is running (`start_server` or the like)."""

    id: str
    start: Callable[[], Awaitable[GenServer]]
    restart: Restart = "permanent"


class Supervisor(GenServer):
    """A process that keeps its children running. Start it with `start_server`."""

    def __init__(
        self,
        children: list[ChildSpec],
        *,
        strategy: Strategy = "one_for_one",
        max_restarts: int = MAX_RESTARTS,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        ids = [child.id for child in children]
        if len(set(ids)) != len(ids):
            raise NodeError(f"two children of one supervisor share an id: {ids}")
        self._specs = list(children)
        self._strategy = strategy
        self._max_restarts = max_restarts
        self._max_seconds = max_seconds
        self._running: dict[str, GenServer] = {}
        self._restarts: deque[float] = deque()

    def child(self, child_id: str) -> GenServer | None:
        """The running child with this id."""
        return self._running.get(child_id)

    async def start_child(self, spec: ChildSpec) -> GenServer:
        """Add a child and start it. Raises `NodeError` if its id is taken, and whatever `start` raises."""
        if any(known.id == spec.id for known in self._specs):
            raise NodeError(f"a child {spec.id!r} exists already")
        self._specs.append(spec)
        try:
            return await self._start(spec)
        except BaseException:
            self._specs.remove(spec)
            raise

    def terminate_child(self, child_id: str) -> None:
        """End a child and leave it ended; a temporary one is forgotten. `NodeError` if there is none of this id."""
        spec = self._spec(child_id)
        self._end(spec)
        if spec.restart == "temporary":
            self._specs.remove(spec)

    async def restart_child(self, child_id: str) -> GenServer:
        """Start a child that was ended. Raises `NodeError` if it is running or unknown, and whatever `start` raises."""
        spec = self._spec(child_id)
        self._check_ended(spec)
        return await self._start(spec)

    def delete_child(self, child_id: str) -> None:
        """Forget a child that was ended. `NodeError` if it is running or unknown."""
        spec = self._spec(child_id)
        self._check_ended(spec)
        self._specs.remove(spec)

    def _spec(self, child_id: str) -> ChildSpec:
        for spec in self._specs:
            if spec.id == child_id:
                return spec
        raise ChildError(_NOT_FOUND, f"there is no child {child_id!r}")

    def _check_ended(self, spec: ChildSpec) -> None:
        if spec.id in self._running:
            raise ChildError(_RUNNING, f"the child {spec.id!r} is running")

    async def init(self) -> None:
        self.process.trap_exit = True
        for spec in self._specs:
            await self._start(spec)

    async def _start(self, spec: ChildSpec) -> GenServer:
        server = await spec.start()
        self._running[spec.id] = server
        self.process.link(server.process.pid)
        return server

    def handle_call(self, request: Term, caller: Caller) -> Term:
        """The functions of `supervisor` that need no Erlang code: children are started by Python functions only."""
        match request:
            case Atom(name="which_children"):
                return [self._described(spec) for spec in reversed(self._specs)]
            case Atom(name="count_children"):
                supervisors = sum(isinstance(each, Supervisor) for each in self._running.values())
                return [
                    (Atom("specs"), len(self._specs)),
                    (Atom("active"), len(self._running)),
                    (Atom("supervisors"), supervisors),
                    (Atom("workers"), len(self._specs) - supervisors),
                ]
            case (Atom(name="terminate_child" | "delete_child" as name), child_id):
                change = self.terminate_child if name == "terminate_child" else self.delete_child
                try:
                    change(_id_text(child_id))
                except ChildError as error:
                    return (_ERROR, error.reason)
                return _OK
            case (Atom(name="restart_child"), child_id):
                return self._restart_on_request(_id_text(child_id))
        return (_ERROR, Atom("not_supported"))

    async def _restart_on_request(self, child_id: str) -> Term:
        try:
            server = await self.restart_child(child_id)
        except ChildError as error:
            return (_ERROR, error.reason)
        except Exception as error:
            return (_ERROR, exit_reason(error))
        return (_OK, server.pid)

    def _described(self, spec: ChildSpec) -> Term:
        """`{Id, Child, Type, Modules}`."""
        server = self._running.get(spec.id)
        kind = Atom("supervisor" if isinstance(server, Supervisor) else "worker")
        child = Atom("undefined") if server is None else server.process.pid
        return (spec.id.encode(), child, kind, [Atom(type(server).__name__)] if server is not None else [])

    async def handle_info(self, message: Term) -> None:
        if type(message) is not tuple or len(message) != 3 or message[0] is not EXIT:
            return
        _, pid, reason = message
        spec = next((each for each in self._specs if self._is_child(each, pid)), None)
        if spec is None:
            return
        del self._running[spec.id]
        if spec.restart == "temporary" or (spec.restart == "transient" and not is_failure(reason)):
            self._specs.remove(spec)
            return
        self._count_restart(spec, reason)
        affected = self._affected(spec)
        for each in reversed(affected):
            self._end(each)
        for each in affected:
            if each.restart == "temporary":
                self._specs.remove(each)
            else:
                await self._restart(each)

    def _is_child(self, spec: ChildSpec, pid: Term) -> bool:
        server = self._running.get(spec.id)
        return server is not None and server.process.pid == pid

    def _affected(self, spec: ChildSpec) -> list[ChildSpec]:
        match self._strategy:
            case "one_for_one":
                return [spec]
            case "one_for_all":
                return list(self._specs)
            case "rest_for_one":
                return self._specs[self._specs.index(spec) :]

    def _count_restart(self, spec: ChildSpec, reason: Term) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts.append(now)
        while self._restarts and now - self._restarts[0] > self._max_seconds:
            self._restarts.popleft()
        log.warning("child_restarts", child=spec.id, count=len(self._restarts), reason=repr(reason)[:200])
        if len(self._restarts) > self._max_restarts:
            log.error("restart_intensity_reached", supervisor=str(self.pid), child=spec.id)
            raise Stop(SHUTDOWN)

    def _end(self, spec: ChildSpec) -> None:
        server = self._running.pop(spec.id, None)
        if server is not None:
            self.process.unlink(server.process.pid)
            server.process.exit(SHUTDOWN)

    async def _restart(self, spec: ChildSpec) -> None:
        while True:
            try:
                await self._start(spec)
            except Exception as error:
                log.error("child_start_failed", child=spec.id, error=described(error))
                self._count_restart(spec, SHUTDOWN)
            else:
                return

    def terminate(self, reason: Term) -> None:
        for spec in reversed(self._specs):
            self._end(spec)


def _id_text(child_id: Term) -> str:
    """The id that an Erlang caller means: shown to it as a binary, taken as a binary or an atom."""
    return child_id.decode("utf-8", "replace") if type(child_id) is bytes else str(child_id)
