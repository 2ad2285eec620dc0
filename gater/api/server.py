"""The doors for Erlang and Elixir callers: the functions of `ExESDBGater.API`, and the GenServer of that name.

Source: `api.ex` of ExESDBGater 0.8. The functions have the original's arities and default arguments and are called by
`rpc` and `erpc`; the GenServer answers what a gateway worker answers (`gateway_worker.ex`). Both only take requests
apart and hand them to `Service`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import structlog

from gater.api import schema
from gater.api.decoding import Decoder
from gater.api.schema import Rejected
from gater.api.service import Service
from gater.erl.exports import Done, Exports
from gater.erl.gen_server import NO_REPLY, Caller, GenServer
from gater.erl.terms import Atom, Term

API_MODULE: Final = "Elixir.ExESDBGater.API"
"""`ExESDBGater.API`: the module of the functions and the registered name of the GenServer."""

_DEFAULT_SUBSCRIPTION: Final = (b"transient", 0, None)
"""Name, start and subscriber of `save_subscription/3`."""

_ACK_EVENT: Final = Atom("ack_event")

Build: TypeAlias = Callable[[tuple[Term, ...]], Term]

log = structlog.get_logger(__name__)


class ApiServer(GenServer):
    """The process registered as `ExESDBGater.API`: gateway worker requests in, replies out."""

    # {'$gen_call', From, {append_events, Store, Stream, Version, Events}}: the last part stays as it came.
    spine_levels = 2

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoded = Decoder()

    def handle_call(self, request: Term, caller: Caller) -> Term:
        reply = self.process.node.reply
        self._service.call(self._decoded(request), lambda answer: reply(caller, answer), raw=request)
        return NO_REPLY

    def handle_cast(self, message: Term) -> None:
        if type(message) is tuple and message and message[0] is _ACK_EVENT:
            # The subscriber goes on without it, and whoever asks for something at the same moment waits.
            self.process.node.busy_wait.later(self._take, message)
        else:
            self._service.cast(self._decoded(message), _log_refusal, raw=message)

    def _take(self, acknowledgements: list[Term]) -> None:
        failure: Exception | None = None
        requests = []
        for raw in acknowledgements:
            try:
                requests.append((self._decoded.with_fields(raw, schema.EVENT_PLACE), raw))
            except Exception as error:
                failure = error
        try:
            self._service.acknowledge(requests, _log_refusal)
        except Exception as error:
            failure = error
        if failure is not None:
            self.process.fail(failure)

    def get_state(self) -> Term:
        return {
            Atom("under_way"): self._service.under_way,
            Atom("stores"): self._service.stores,
            # Reads go on there, and may be old.
            Atom("no_quorum"): self._service.stores_without_quorum(),
            Atom("draining"): self._service.is_draining,
            Atom("cluster"): self._service.cluster_status(),
        }


def _log_refusal(refused: Rejected | None) -> None:
    if refused is not None:
        log.warning("cast_refused", reason=repr(refused.reason))


def _named(op: str, *defaults: Term) -> Build:
    """Arguments -> `{op, ..arguments, ..defaults that were not given}`."""
    name = Atom(op)
    return lambda arguments: (name, *arguments, *defaults)


_CALLS: Final[tuple[tuple[str, int, Build], ...]] = (
    ("append_events", 3, _named("append_events")),
    ("append_events", 4, _named("append_events")),
    ("get_events", 4, _named("get_events", schema.FORWARD)),
    ("get_events", 5, _named("get_events")),
    ("stream_forward", 4, _named("stream_forward")),
    ("stream_backward", 4, _named("stream_backward")),
    ("get_version", 2, _named("get_version")),
    ("get_streams", 1, _named("get_streams")),
    ("get_subscriptions", 1, _named("get_subscriptions")),
    ("subscribe", 5, _named("subscribe")),
    ("subscription_status", 2, _named("subscription_status")),
    ("list_parked", 2, _named("list_parked")),
    ("list_parked", 3, _named("list_parked")),
    ("replay_parked", 2, _named("replay_parked")),
    ("drop_parked", 2, _named("drop_parked")),
    ("drop_parked", 3, _named("drop_parked")),
    ("list_stores", 0, _named("list_stores")),
    ("read_snapshot", 4, _named("read_snapshot")),
    ("list_snapshots", 1, _named("list_snapshots", schema.ANY, schema.ANY)),
    ("list_snapshots", 2, _named("list_snapshots", schema.ANY)),
    ("list_snapshots", 3, _named("list_snapshots")),
    ("verify_cluster_consistency", 1, _named("verify_cluster_consistency")),
    ("quick_health_check", 1, _named("quick_health_check")),
    ("verify_membership_consensus", 1, _named("verify_membership_consensus")),
    ("check_raft_log_consistency", 1, _named("check_raft_log_consistency")),
)
"""Function, arity and request of what is answered. The four checks are requests of the original without functions."""

_CASTS: Final[tuple[tuple[str, int, Build], ...]] = (
    ("save_subscription", 3, _named("save_subscription", *_DEFAULT_SUBSCRIPTION)),
    ("save_subscription", 4, _named("save_subscription", *_DEFAULT_SUBSCRIPTION[1:])),
    ("save_subscription", 5, _named("save_subscription", *_DEFAULT_SUBSCRIPTION[2:])),
    ("save_subscription", 6, _named("save_subscription")),
    ("remove_subscription", 3, _named("remove_subscription", b"transient")),
    ("remove_subscription", 4, _named("remove_subscription")),
    ("ack_event", 4, _named("ack_event")),
    ("nack_event", 5, _named("nack_event")),
    ("record_snapshot", 5, _named("record_snapshot")),
    ("delete_snapshot", 4, _named("delete_snapshot")),
)
"""Function, arity and request of what is only accepted: `:ok`, or `{:error, reason}` where nothing was sent."""


def export_api(exports: Exports, service: Service) -> None:
    """Export the functions of `ExESDBGater.API`."""
    for function, arity, build in _CALLS:
        exports.add(API_MODULE, function, _call_function(service, build), arities=[arity], deferred=True)
    for function, arity, build in _CASTS:
        exports.add(API_MODULE, function, _cast_function(service, build), arities=[arity], deferred=True)


def _call_function(service: Service, build: Build) -> Callable[..., None]:
    def function(done: Done, *arguments: Term) -> None:
        service.call(build(arguments), lambda reply: done(reply, None))

    return function


def _cast_function(service: Service, build: Build) -> Callable[..., None]:
    def function(done: Done, *arguments: Term) -> None:
        service.cast(build(arguments), lambda refused: done(schema.OK if refused is None else refused.reply, None))

    return function
