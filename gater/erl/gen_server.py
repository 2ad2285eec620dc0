"""GenServers in Python, and calls to GenServers anywhere.

Speaks what `gen.erl`, `gen_server.erl` and `sys.erl` of OTP speak, which no manual tells. A call is a monitor, an alias
and a message with one reference in common:

| caller                                       |   | server                                         |
|----------------------------------------------|---|------------------------------------------------|
| opens the alias R, sends `MONITOR_P` with it | → | answers `noproc` if it is nobody's name or pid |
| `{'$gen_call', {Pid, Tag}, Request}`         | → | `handle_call`                                  |
| R is used up; `DEMONITOR_P`                  | ← | `{Tag, Reply}` to R                            |

where `Tag` is the improper list `[alias | R]`. If the server ends or its node is lost first, the monitor says so, and
the caller knows why there is no reply. If the caller gives up first it closes the alias: what comes later is dropped by
its node, and nobody finds the answer to an old question in his mailbox. A cast is `{'$gen_cast', Message}`; what `sys`
asks is `{system, From, Request}`, answered like a call. Anything else is a plain message.

A server is a class with callbacks. A callback that returns is done; one that is a coroutine function holds the next
message back until it has finished, as in Erlang. A call can be answered later: return `NO_REPLY` and give the answer to
`self.reply(caller, answer)` whenever it is there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType, NoneType
from typing import Any, Final, NamedTuple

import structlog

from gater.erl.errors import (
    CallError,
    CallTimeout,
    ConnectionLost,
    EncodeError,
    ErlangError,
    ErlangException,
    NoProcess,
    ProcessDied,
    shown,
)
from gater.erl.node import Monitor, Node
from gater.erl.process import NOCONNECTION, NOPROC, NORMAL, Process, Stop, error_term
from gater.erl.rpc import PendingRpc, apply_function
from gater.erl.terms import Atom, EncodedTerm, ImproperList, Pid, Term

GEN_CALL: Final = Atom("$gen_call")
GEN_CAST: Final = Atom("$gen_cast")
SYSTEM: Final = Atom("system")
ALIAS: Final = Atom("alias")
OK: Final = Atom("ok")
ERROR: Final = Atom("error")
NODEDOWN: Final = Atom("nodedown")
TIMEOUT_REASON: Final = Atom("timeout")

_BAD_REPLY: Final = Atom("bad_reply")
_NOTSUP: Final = Atom("notsup")

CALL_TIMEOUT_S: Final = 5.0
"""The default of `gen_server:call/2`."""

_TERMS: Final = frozenset({tuple, Atom, bytes, list, dict, int, bool, NoneType, str, float, Pid, EncodedTerm})
"""Types of answers that are terms beyond doubt: asking `inspect.isawaitable` costs more than the rest of the call."""

MAX_SUSPENDED_MESSAGES: Final = 100_000
"""Messages kept for a server that `sys:suspend` has stopped; one more ends it."""

REPLACE_STATE_TIMEOUT_S: Final = 5.0
"""How long the function of `sys:replace_state` may take; the server handles nothing meanwhile. The default of the
caller's own patience."""

STATE_WRAPPED_SINCE: Final = (5, 1)
"""The version of `stdlib` (OTP 26.1) from which on `sys:get_state` expects `{ok, State}`, not the state as such."""

ASK_TIMEOUT_S: Final = 5.0
"""For the question which version a peer has."""

_STDLIB_VERSION: Final = (Atom("application"), Atom("get_key"), [Atom("stdlib"), Atom("vsn")])
_GEN_SERVER: Final = Atom("gen_server")

log = structlog.get_logger(__name__)


class Caller(NamedTuple):
    """Who made a call: the `From` of `handle_call`."""

    pid: Pid
    tag: Term


class _NoReply:
    def __repr__(self) -> str:
        return "NO_REPLY"


NO_REPLY: Final = _NoReply()
"""Returned by `handle_call`: the answer comes later, through `GenServer.reply`."""


class GenServer:
    """Base class of servers. Start one with `start_server`; override what is needed.

    `spine_levels` says how deep the last elements of messages are decoded (`etf.decode_spine`); None decodes
    everything.
    """

    process: Process
    spine_levels: int | None = None

    @property
    def pid(self) -> Pid:
        """The pid of this server."""
        return self.process.pid

    @property
    def node(self) -> Node:
        """The node it runs on."""
        return self.process.node

    def init(self) -> Coroutine[Any, Any, None] | None:
        """Called once before the first message."""
        return None

    def handle_call(self, request: Term, caller: Caller) -> Term:
        """Answer a call: the returned term is the reply (or `NO_REPLY`). May be a coroutine function."""
        raise Stop((Atom("bad_call"), request))

    def handle_cast(self, message: Term) -> Coroutine[Any, Any, None] | None:
        """Handle a cast."""
        raise Stop((Atom("bad_cast"), message))

    def handle_info(self, message: Term) -> Coroutine[Any, Any, None] | None:
        """Handle any other message."""
        return None

    def terminate(self, reason: Term) -> None:
        """The server is ending, for whatever reason; called once."""
        return

    def get_state(self) -> Term:
        """What `sys:get_state` shows."""
        return Atom("undefined")

    def set_state(self, state: Term) -> None:
        """Go on with `state`, made by `sys:replace_state` of what `get_state` has shown.

        Not overridden, that is refused. An exception leaves the server as it is and is told to the caller.
        """
        raise ErlangError(_NOTSUP)

    def reply(self, caller: Caller, answer: Term) -> None:
        """Answer a call that was left open with `NO_REPLY`."""
        process = self.process
        process.node.reply(caller, answer, process.pid)

    def cast_after(self, delay_s: float, message: Term) -> asyncio.TimerHandle:
        """Have `handle_info(message)` called in `delay_s` seconds; the handle returned can cancel it."""
        return asyncio.get_running_loop().call_later(delay_s, self.process.deliver, message)


class ServerReceiver:
    """Takes the messages of a process apart for a `GenServer`."""

    __slots__ = ("_kept", "process", "server", "suspended")

    def __init__(self, server: GenServer) -> None:
        self.server = server
        self.suspended = False
        self.process: Process
        self._kept: deque[Term] = deque()

    def attach(self, process: Process) -> None:
        """Take the messages of `process`, which runs the server."""
        self.process = process
        process.kept = self._kept

    def receive(self, message: Term) -> Awaitable[None] | None:
        if type(message) is tuple and message:
            kind = message[0]
            if kind is SYSTEM and len(message) == 3 and _is_from(message[1]):
                return self._system(Caller(*message[1]), message[2])
            if self.suspended:
                self._keep(message)
                return None
            if kind is GEN_CALL and len(message) == 3 and _is_from(message[1]):
                caller = Caller(*message[1])
                answer = self.server.handle_call(message[2], caller)
                if answer is NO_REPLY:
                    return None
                if type(answer) is CoroutineType or (type(answer) not in _TERMS and inspect.isawaitable(answer)):
                    return self._answer_later(caller, answer)
                process = self.process
                process.node.reply(caller, answer, process.pid)
                return None
            if kind is GEN_CAST and len(message) == 2:
                return self.server.handle_cast(message[1])
        elif self.suspended:
            self._keep(message)
            return None
        return self.server.handle_info(message)

    def _answer_later(self, caller: Caller, answer: Awaitable[Term]) -> Awaitable[None]:
        """Have `answer` run and reply with what it returns."""
        task = asyncio.ensure_future(answer)

        def answered(ended: asyncio.Future[Term]) -> None:
            if ended.cancelled() or ended.exception() is not None or ended.result() is NO_REPLY:
                return
            try:
                self.process.node.reply(caller, ended.result(), self.process.pid)
            except Exception as error:
                self.process.fail(error)

        # Before the callback of the process, which goes on with the next message.
        task.add_done_callback(answered)
        return task

    def _keep(self, message: Term) -> None:
        if len(self._kept) >= MAX_SUSPENDED_MESSAGES:
            raise Stop(Atom("mailbox_limit"))
        self._kept.append(message)

    def _system(self, caller: Caller, request: Term) -> Awaitable[None] | None:
        reply: Term
        kind = request[0] if type(request) is tuple and request else request
        name = kind.name if type(kind) is Atom else None
        match name:
            case "get_state":
                state, failure = self._state()
                if failure is None:
                    self._reply_with_state(caller, state, "system_get_state")
                    return None
                reply = failure
            case "get_status":
                reply = self._status()
            case "suspend":
                self.suspended = True
                reply = OK
            case "resume":
                self.suspended = False
                kept = list(self._kept)
                self._kept.clear()
                self.process.node.reply(caller, OK, self.process.pid)
                self.process.put_back(kept)
                return None
            case "terminate":
                self.process.node.reply(caller, OK, self.process.pid)
                raise Stop(request[1] if type(request) is tuple and len(request) == 2 else NORMAL)
            case "replace_state" if type(request) is tuple and len(request) == 2:
                return self._replace_state(caller, request[1])
            case _:
                reply = (ERROR, (Atom("unknown_system_msg"), request))
        self.process.node.reply(caller, reply, self.process.pid)
        return None

    async def _replace_state(self, caller: Caller, function: Term) -> None:
        """Have `function` make a new state of the present one: where the function came from, as none can run here."""
        server, node = self.server, self.process.node
        try:
            if type(server).set_state is GenServer.set_state:
                raise ErlangError(_NOTSUP)
            state = await apply_function(
                node, function, [server.get_state()], sender=caller.pid.node, timeout_s=REPLACE_STATE_TIMEOUT_S
            )
            server.set_state(state)
        except Exception as error:
            node.reply(caller, _callback_failed("system_replace_state", error), self.process.pid)
        else:
            self._reply_with_state(caller, state, "system_replace_state")

    def _state(self) -> tuple[Term, Term | None]:
        """The state as the server shows it, and what `sys` says if that raises."""
        try:
            return self.server.get_state(), None
        except Exception as error:
            return None, _callback_failed("system_get_state", error)

    def _reply_with_state(self, caller: Caller, state: Term, callback: str) -> None:
        """Answer `get_state` or `replace_state` in the shape that the asking node takes for granted.

        `sys` of one release fails on the shape of the other, and nothing in what it sends tells which it is: its node
        is asked. The server goes on meanwhile.
        """
        node, own = self.process.node, self.process.pid

        def told(version: Term, error: ErlangException | None) -> None:
            if error is not None and error.reason == (Atom("erpc"), NOCONNECTION):
                return
            try:
                is_wrapped = error is None and _numbers(version) >= STATE_WRAPPED_SINCE
                node.reply(caller, (OK, state) if is_wrapped else state, own)
            except EncodeError as refusal:
                node.reply(caller, _callback_failed(callback, refusal), own)

        if caller.pid.node is node.name:
            node.reply(caller, state, own)
        else:
            PendingRpc(node, caller.pid.node, _STDLIB_VERSION, told, ASK_TIMEOUT_S)

    def _status(self) -> Term:
        """`{status, Pid, {module, Module}, [PDict, SysState, Parent, Debug, Misc]}`, as `sys.erl` builds it."""
        process = self.process
        sys_state = Atom("suspended" if self.suspended else "running")
        state, failure = self._state()
        header = (Atom("header"), list(f"Status for {type(self.server).__name__}".encode()))
        misc = [
            header,
            (
                Atom("data"),
                [(list(b"Status"), sys_state), (list(b"Parent"), process.pid), (list(b"Logged events"), [])],
            ),
            (Atom("data"), [(list(b"State"), state if failure is None else failure)]),
        ]
        return (
            Atom("status"),
            process.pid,
            (Atom("module"), _GEN_SERVER),
            [[], sys_state, process.pid, [], misc],
        )

    def terminate(self, reason: Term) -> None:
        self.server.terminate(reason)


def _numbers(version: Term) -> tuple[int, ...]:
    """The numbers of `{ok, "5.1.2"}`; none if it is nothing like that."""
    match version:
        case (Atom(name="ok"), [*characters]) if all(type(each) is int and 0 <= each < 128 for each in characters):
            return tuple(int(part) for part in "".join(map(chr, characters)).split(".") if part.isdecimal())
    return ()


def _callback_failed(callback: str, error: Exception) -> Term:
    """What `sys` answers when a callback of `gen_server` has raised."""
    kind = Atom(error.kind) if isinstance(error, ErlangException) else ERROR
    return (ERROR, (Atom("callback_failed"), (_GEN_SERVER, Atom(callback)), (kind, error_term(error))))


def _is_from(term: Term) -> bool:
    return type(term) is tuple and len(term) == 2 and type(term[0]) is Pid


async def start_server(
    node: Node, server: GenServer, *, name: str | Atom | None = None, link: Process | None = None
) -> GenServer:
    """Start `server` as a process of `node`, registered as `name` if one is given; returns once `init` is done.

    Messages that come during `init` wait for it.

    Raises `NodeError` if the name is taken, and whatever `init` raises.
    """
    process = spawn_server(node, server, name=name)
    if link is not None:
        process.link(link.pid)
    try:
        begun = server.init()
        if begun is not None:
            process.hold()
            await begun
            process.release()
    except BaseException as error:
        process.exit((Atom("init_failed"), str(error).encode()))
        raise
    return server


def spawn_server(node: Node, server: GenServer, *, name: str | Atom | None = None) -> Process:
    """The process of `server`, without calling its `init`."""
    receiver = ServerReceiver(server)
    process = node.spawn_receiver(receiver, name=name)
    receiver.attach(process)
    server.process = process
    process.spine_levels = server.spine_levels
    process.initial_call = (_GEN_SERVER, Atom("init_it"), 6)
    return process


def keep_server(node: Node, make: Callable[[], GenServer], name: str | Atom) -> None:
    """Have a server called `name`, made by `make`, for as long as the node runs: one that has ended is replaced.

    For servers that peers take for granted, and may end by an exit signal. Their `init` is not called.
    """
    process = spawn_server(node, make(), name=name)

    def ended(_: Monitor, reason: Term) -> None:
        if node.is_running:
            log.warning("server_replaced", node=str(node.name), name=str(name), reason=shown(reason))
            keep_server(node, make, name)

    node.monitor(process.pid, ended, process.pid)


class PendingCall:
    """A `gen_server:call` under way, without a coroutine: exactly one of its callbacks' outcomes will be reported.

    `on_done(reply, error)`: `error` is None and `reply` the term, or `error` says why there is none. `cancel` drops the
    call; a reply that comes later is thrown away. With `watched=False` no monitor is set: the caller watches the
    server itself and calls `fail` when it is gone.
    """

    __slots__ = ("_alias", "_monitor", "_node", "_on_done", "_timer", "target")

    def __init__(
        self,
        node: Node,
        target: Term,
        request: Term,
        on_done: Callable[[Term, CallError | None], None],
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        spine_levels: int | None = None,
        watched: bool = True,
    ) -> None:
        self._node = node
        self._on_done: Callable[[Term, CallError | None], None] | None = on_done
        self.target = target
        self._timer: asyncio.TimerHandle | None = None
        self._monitor: Monitor | None = None
        sender = node.client.pid
        # The message is {Tag, Reply}: one level more than the reply itself.
        self._alias = node.open_alias(self._replied, None if spine_levels is None else spine_levels + 1, once=True)
        try:
            if watched:
                self._monitor = node.monitor(target, self._down, sender, self._alias)
            node.send(target, (GEN_CALL, (sender, ImproperList([ALIAS], self._alias)), request), sender)
        except BaseException:
            self._end()
            raise
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._timed_out, timeout_s)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._on_done = None
        self._end()

    def fail(self, error: CallError) -> None:
        """End the call with `error`, unless it has ended already."""
        on_done = self._on_done
        if on_done is not None:
            self._on_done = None
            self._end()
            on_done(None, error)

    def _end(self) -> None:
        self._node.close_alias(self._alias)
        if self._timer is not None:
            self._timer.cancel()
        if self._monitor is not None:
            self._node.demonitor(self._monitor)

    def _replied(self, message: Term) -> None:
        on_done = self._on_done
        if on_done is None:
            return
        self._on_done = None
        self._end()
        if type(message) is tuple and len(message) == 2:
            on_done(message[1], None)
        else:
            on_done(None, ProcessDied(_BAD_REPLY, f"{_shown(self.target)} sent something that is no reply"))

    def _down(self, _: Monitor, reason: Term) -> None:
        self.fail(down_error(self.target, reason))

    def _timed_out(self, timeout_s: float) -> None:
        self.fail(CallTimeout(TIMEOUT_REASON, f"{_shown(self.target)} did not answer within {timeout_s:g} s"))


def down_error(target: Term, reason: Term) -> CallError:
    """The error of a call whose server went down with `reason`."""
    if reason is NOPROC:
        return NoProcess(NOPROC, f"no process {_shown(target)}")
    if reason is NOCONNECTION:
        node = target.node if type(target) is Pid else target[1] if type(target) is tuple else target
        return ConnectionLost((NODEDOWN, node), f"the connection to {node} broke before {_shown(target)} answered")
    return ProcessDied(reason, f"{_shown(target)} exited before it answered: {shown(reason)}")


def _shown(target: Term) -> str:
    if type(target) is tuple:
        return f"{target[0]} on {target[1]}"
    return str(target)


async def call(
    node: Node,
    target: Term,
    request: Term,
    *,
    timeout_s: float | None = CALL_TIMEOUT_S,
    spine_levels: int | None = None,
) -> Term:
    """`gen_server:call(Target, Request, Timeout)`: `target` is a pid, a local name or `(name, node)`.

    Raises `NoProcess`, `ConnectionLost`, `ProcessDied` or `CallTimeout`; None as timeout waits for ever. Cancelling the
    coroutine drops the call. If too much waits for the server's node already, the request is held back first.
    """
    peer = target.node if type(target) is Pid else target[1] if type(target) is tuple else None
    try:
        if peer is not None:
            await node.drain(peer, timeout_s)
    except TimeoutError:
        raise CallTimeout(TIMEOUT_REASON, f"{peer} does not read what waits for it: nothing was sent") from None
    done: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

    def finish(reply: Term, error: CallError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(reply)
        else:
            done.set_exception(error)

    pending = PendingCall(node, target, request, finish, timeout_s=timeout_s, spine_levels=spine_levels)
    try:
        return await done
    except asyncio.CancelledError:
        pending.cancel()
        raise


def cast(node: Node, target: Term, message: Term, sender: Pid | None = None) -> None:
    """`gen_server:cast(Target, Message)`: no answer, no error."""
    node.send(target, (GEN_CAST, message), sender)


async def stop(node: Node, target: Term, reason: Term = NORMAL, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
    """`gen_server:stop(Target, Reason, Timeout)`: have a server terminate, and wait until it has.

    Raises `CallTimeout`, `NoProcess` or, if it ended for another reason, `ProcessDied` or `ConnectionLost`.
    """
    gone: asyncio.Future[Term] = asyncio.get_running_loop().create_future()

    def down(monitor: Monitor, why: Term) -> None:
        if not gone.done():
            gone.set_result(why)

    monitor = node.monitor(target, down)
    tag = node.make_reference()
    node.send(target, (SYSTEM, (node.client.pid, tag), (Atom("terminate"), reason)))
    try:
        async with asyncio.timeout(timeout_s):
            why = await gone
    except TimeoutError:
        raise CallTimeout(TIMEOUT_REASON, f"{_shown(target)} did not stop within {timeout_s:g} s") from None
    finally:
        node.demonitor(monitor)
    if why != reason:
        raise down_error(target, why)
