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
from gater.erl.process import EXIT, SHUTDOWN, Stop, described, is_failure
from gater.erl.terms import Atom, Term

Strategy: TypeAlias = Literal["one_for_one", "one_for_all", "rest_for_one"]
Restart: TypeAlias = Literal["permanent", "transient", "temporary"]

MAX_RESTARTS: Final = 3
"""Default intensity: this many restarts ..."""
MAX_SECONDS: Final = 5.0
"""... within this time are accepted."""

log = structlog.get_logger(__name__)


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
        """`supervisor:which_children/1` and `count_children/1`; whatever else may be asked changes nothing here."""
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
        return (Atom("error"), Atom("not_supported"))

    def _described(self, spec: ChildSpec) -> Term:
        """`{Id, Child, Type, Modules}`."""
        server = self._running.get(spec.id)
        kind = Atom("supervisor" if isinstance(server, Supervisor) else "worker")
        child = Atom("restarting") if server is None else server.process.pid
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
