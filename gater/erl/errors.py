"""The errors of the Erlang node, one tree.

A remote's mistake (`RemoteProtocolError`) and our own (`LocalProtocolError`) are two types, because they are handled by
two kinds of people: the first ends a connection and is logged with the peer's name, the second is a bug in the calling
code and is raised to it. What a remote call can end in stands below `CallError`; its classes are Erlang's own
(`error`, `exit`, `throw`).
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any, Final


class ErlError(Exception):
    """Root of every error this package raises on purpose."""


class ProtocolError(ErlError):
    """Bytes or terms that break a protocol."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something the protocol does not allow, or that crosses one of our named limits."""


class LocalProtocolError(ProtocolError):
    """This side tried to send something the protocol does not allow."""


class DecodeError(RemoteProtocolError):
    """Bytes that are not a term of the external term format."""


class LimitExceeded(RemoteProtocolError):
    """A named limit was crossed: `limit` is its name, `allowed` its value, `got` what came."""

    def __init__(self, limit: str, allowed: int, got: int | None = None) -> None:
        self.limit = limit
        self.allowed = allowed
        self.got = got
        seen = "" if got is None else f", got {got}"
        super().__init__(f"{limit} allows {allowed}{seen}")


class EncodeError(LocalProtocolError):
    """A Python value that has no Erlang term."""


class HandshakeError(RemoteProtocolError):
    """The distribution handshake failed; the message says at which step and why."""


class AuthenticationError(HandshakeError):
    """The two nodes do not share a cookie."""


class NodeError(ErlError):
    """This node cannot do what was asked of it (taken name, no EPMD, not started)."""


class NotConnected(NodeError):
    """No connection to that node exists, and none could be made."""


class _ShortRepr(reprlib.Repr):
    """`repr` of a term of any size and depth, in a line or two. What is cut off is shown as `...`."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 8
        self.maxtuple = self.maxlist = self.maxdict = 16
        self.maxstring = self.maxother = 400
        self.maxlong = 60

    def repr_bytes(self, term: bytes, level: int) -> str:
        return repr(term) if len(term) <= self.maxstring else f"{term[: self.maxstring]!r}...({len(term)} bytes)"

    def repr_int(self, term: int, level: int) -> str:
        return repr(term) if term.bit_length() <= 256 else f"(an integer of {term.bit_length()} bits)"

    def repr_ImproperList(self, term: Any, level: int) -> str:
        return f"ImproperList({self.repr1(term.elements, level)}, {self.repr1(term.tail, level - 1)})"

    def repr_TermMap(self, term: Any, level: int) -> str:
        return f"TermMap({self.repr1(list(islice(term.pairs(), self.maxdict + 1)), level)})"


shown: Final = _ShortRepr().repr
"""A term for a person: its `repr`, cut short. Terms of a remote may be too large or too deep for `repr` itself."""


class CallError(ErlError):
    """A call to another process or node did not return normally.

    `reason` is the Erlang term, in the shape OTP gives it: `noproc`, `{nodedown, Node}`, `timeout`, ...
    """

    def __init__(self, reason: Any, message: str | None = None) -> None:
        self.reason = reason
        super().__init__(*(() if message is None else (message,)))

    def __str__(self) -> str:
        # Made when somebody reads it: what is thrown is often an answer, and a large one.
        return super().__str__() if self.args else f"call failed: {shown(self.reason)}"


class CallTimeout(CallError):
    """No answer came before the deadline. The request may have been carried out."""


class NoProcess(CallError):
    """The process called does not exist (`noproc`). The request was not carried out."""


class ConnectionLost(CallError):
    """The connection broke before the answer came (`noconnection`). The request may have been carried out."""


class ProcessDied(CallError):
    """The process called exited before it answered; `reason` is its exit reason."""


class ErlangException(CallError):
    """An exception in Erlang's three classes, raised by the function called remotely or to be shown to a remote caller.

    Functions exported to Erlang raise one of the subclasses to choose what the caller sees.
    """

    kind: str = "error"


class ErlangError(ErlangException):
    """Class `error`: `erlang:error(Reason)`."""

    kind = "error"


class ErlangExit(ErlangException):
    """Class `exit`: `erlang:exit(Reason)`."""

    kind = "exit"


class ErlangThrow(ErlangException):
    """Class `throw`: `erlang:throw(Term)`."""

    kind = "throw"
