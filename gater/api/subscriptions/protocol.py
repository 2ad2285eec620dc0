"""What goes into a subscription feed and what comes out of it: events, options, inputs and effects.

`Feed.receive(inputs, now)` returns effects; the shell around it carries them out and feeds their results back. Times
are seconds of a monotonic clock, stream names and types are binaries, versions count from 0 (`-1`: an empty stream).
A `Key` names a subscription within its store: the name of a persistent one; what the shell likes for a transient one,
which belongs to its subscriber alone.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeAlias

from gater.api import schema
from gater.api.decoding import Decoder
from gater.erl.errors import DecodeError
from gater.erl.etf import decode_encoded, encode_term
from gater.erl.terms import Atom, EncodedTerm, Term

Key: TypeAlias = Hashable
SubscriberId: TypeAlias = Hashable
"""A pid; in tests of the engine whatever stands for one."""

DEFAULT_WINDOW: Final = 100
"""Events a subscriber may hold without acknowledging them."""

ACK_TIMEOUT_S: Final = 30.0
"""An event not acknowledged in this time is delivered again; twice as long each time, up to eight times as long."""

MAX_RETRIES: Final = 10
"""Times an event is delivered again because its subscriber asked so (`:retry`), before it is parked."""

RETRY_S: Final = (0.1, 10.0)
"""First and longest pause before an event is delivered again because its subscriber asked so; doubled in between."""

TERM_BYTES: Final = 64
"""What a term in a record costs beside its bytes, about; the size of an event need not be exact."""

MEMORY_OF_A_BYTE: Final = 4
"""And what a byte of an encoded record costs once that is decoded, about."""

MAX_WINDOW: Final = 10_000
"""The largest window and batch: what one subscription may keep in memory, times two."""


class Event:
    """One recorded event: what order and look-up need of it, and the record as the store has it.

    Most events are passed on without anybody here looking into them: one that came as bytes (`encoded_event`,
    `read_event`) is decoded when somebody does, one that came as a term (`event_of`) is encoded when it is sent.
    """

    __slots__ = ("_encoded", "_epoch", "_record", "_size", "number", "stream", "type")

    def __init__(
        self,
        stream: bytes,
        number: int,
        type: Term,
        record: Mapping[Term, Term] | None,
        encoded: EncodedTerm | None = None,
        epoch: int | None = None,
    ) -> None:
        """One of `record` and `encoded` is there; `epoch` may be given with the latter."""
        self.stream = stream
        self.number = number
        self.type = type
        self._record = record
        self._encoded = encoded
        self._epoch = epoch
        self._size = 0

    @property
    def record(self) -> Mapping[Term, Term]:
        """The EventRecord. DecodeError if what the store node sent is none."""
        if self._record is None:
            assert self._encoded is not None
            record = decode_encoded(self._encoded)
            if not isinstance(record, Mapping):
                raise DecodeError(f"expected an EventRecord, got {schema.show(record)}")
            self._record = record
        return self._record

    @property
    def epoch(self) -> int:
        """`created_epoch`, microseconds since 1970; 0 if the record has none."""
        if self._epoch is None:
            known = self._record
            if known is None and self._encoded is not None:
                known = _decoded.fields(self._encoded, schema.EPOCH_ONLY)
            epoch = None if known is None else known.get(schema.CREATED_EPOCH)
            self._epoch = epoch if type(epoch) is int else 0
        return self._epoch

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory, as soon as it is decoded."""
        if not self._size:
            if self._record is None and self._encoded is not None:
                self._size = MEMORY_OF_A_BYTE * len(self._encoded.data)
            else:
                self._size = _size(self._record)
        return self._size

    @property
    def encoded(self) -> EncodedTerm:
        """The record as other nodes get it, encoded once for all subscribers. EncodeError if it is no term."""
        if self._encoded is None:
            self._encoded = EncodedTerm(encode_term(self._record))
        return self._encoded

    def __repr__(self) -> str:
        return f"Event({self.stream!r}, {self.number})"


def _size(record: Term) -> int:
    found, todo = 0, [record]
    while todo:
        term = todo.pop()
        kind = type(term)
        found += TERM_BYTES
        if kind is bytes or kind is str:
            found += len(term)
        elif kind is int or kind is Atom:
            continue
        elif kind is list or kind is tuple:
            todo.extend(term)
        elif kind is dict or isinstance(term, Mapping):
            found += TERM_BYTES * len(term)
            todo.extend(term.values())
    return found


def event_of(record: Term) -> Event:
    """The event of an EventRecord (or of any map with its keys); `SchemaError` if it is none."""
    if isinstance(record, Mapping):
        stream, number = record.get(schema.EVENT_STREAM_ID), record.get(schema.EVENT_NUMBER)
        if isinstance(stream, str):
            stream = stream.encode()
        if type(stream) is bytes and type(number) is int and number >= 0:
            kind = record.get(schema.EVENT_TYPE)
            return Event(stream, number, kind.encode() if isinstance(kind, str) else kind, record)
    raise schema.SchemaError(f"expected an EventRecord, got {schema.show(record)}")


def encoded_event(stream: bytes, number: int, type: Term, record: bytes) -> Event:
    """The event whose record is here as `term_to_binary` has made it."""
    return Event(stream, number, type.encode() if isinstance(type, str) else type, None, EncodedTerm(record[1:]))


def read_event(fields: Mapping[Term, Term], record: EncodedTerm) -> Event:
    """The event of a record of which `schema.EVENT_FIELDS` have been read; `SchemaError` if it is none."""
    event, epoch = event_of(fields), fields.get(schema.CREATED_EPOCH)
    return Event(event.stream, event.number, event.type, None, record, epoch if type(epoch) is int else 0)


_decoded: Final = Decoder()


class Start(Enum):
    """Where a subscription begins when it has no checkpoint; a number instead is a version in every stream."""

    NOW = "now"


class Strategy(Enum):
    """How several subscribers of one subscription share its events."""

    ROUND_ROBIN = "round_robin"
    """Each event to the next one with room: order holds among the events of one subscriber."""
    BY_STREAM = "by_stream"
    """A stream stays with one subscriber while that lives: order holds within each stream."""


class Action(Enum):
    """What to do with an event its subscriber does not want to acknowledge."""

    RETRY = "retry"
    """Deliver it again after a pause; park it when that was done `max_retries` times."""
    SKIP = "skip"
    """Go on as if it had been acknowledged."""
    PARK = "park"
    """Put it aside, to be looked at and replayed later, and go on."""
    STOP = "stop"
    """Deliver nothing more until somebody resumes the subscription; begin again with this event then."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a subscription is delivered. ValueError for a number that makes no sense."""

    auto_ack: bool = False
    """An event counts as acknowledged as soon as it has been sent."""
    window: int = DEFAULT_WINDOW
    batch_size: int = 1
    """Events in one message, at most."""
    ack_timeout_s: float = ACK_TIMEOUT_S
    max_retries: int = MAX_RETRIES
    strategy: Strategy = Strategy.ROUND_ROBIN

    def __post_init__(self) -> None:
        for name, value, most in (
            ("window", self.window, MAX_WINDOW),
            ("batch_size", self.batch_size, MAX_WINDOW),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {value}")
        if not self.ack_timeout_s > 0:
            raise ValueError(f"ack_timeout_s must be greater than 0, got {self.ack_timeout_s}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must not be negative, got {self.max_retries}")


@dataclass(frozen=True, slots=True)
class Spec:
    """What somebody subscribes to. `persistent` ones have checkpoints and outlive their subscribers."""

    kind: Atom
    selector: Term
    start: int | Start = 0
    persistent: bool = False
    options: Options = field(default_factory=Options)


# Inputs
#
# Inputs and effects are made for every event. They are never changed, but not frozen: that takes three times as long.


@dataclass(slots=True)
class Subscribe:
    """Start a subscription, or join the one of that key (`Refused` if it has another kind or selector).

    `positions` is its saved checkpoint, None if there is none; `subscriber` None starts it without one. One that was
    `stopped` where it ran before, or is here, goes on if that is what the subscriber wants (`resumes`).
    """

    key: Key
    spec: Spec
    subscriber: SubscriberId | None = None
    positions: Mapping[bytes, int] | None = None
    stopped: bool = False
    resumes: bool = True


@dataclass(slots=True)
class SubscriberDown:
    """This subscriber is gone, from all its subscriptions (`key` None) or from one."""

    subscriber: SubscriberId
    key: Key | None = None


@dataclass(slots=True)
class SubscriberBusy:
    """The way to this subscriber is full (`busy`) or free again; what was delivered is not lost by it."""

    subscriber: SubscriberId
    busy: bool


@dataclass(slots=True)
class Ack:
    """This event has been dealt with. Acknowledging it twice, or one that is not outstanding, does nothing."""

    key: Key
    stream: bytes
    number: int


@dataclass(slots=True)
class Nack:
    """This event has not been dealt with: do `action`; `reason` is kept with a parked event."""

    key: Key
    stream: bytes
    number: int
    action: Action
    reason: Term = None


@dataclass(slots=True)
class Resume:
    """Go on delivering a subscription that was stopped."""

    key: Key


@dataclass(slots=True)
class ReplayParked:
    """Deliver these parked events again; each is dropped from the parked ones (`DropParked`) once acknowledged. Those
    that wait for that already are not delivered twice; of too many the first are."""

    key: Key
    events: Sequence[Event]


@dataclass(slots=True)
class Remove:
    """End a subscription for good, without a last checkpoint."""

    key: Key


@dataclass(slots=True)
class Release:
    """Another gateway takes over: save where it stands and forget it."""

    key: Key


@dataclass(slots=True)
class Hint:
    """A stream has come to at least this version; `events`, if there are any, are its events up to there, in order."""

    stream: bytes
    version: int
    events: Sequence[Event] = ()


@dataclass(slots=True)
class Page:
    """The answer to a `ReadPage`: events in ascending order, or None if the read failed."""

    token: int
    events: Sequence[Event] | None


@dataclass(slots=True)
class Counts:
    """The answer to a `ReadCounts`: events by stream (None: it failed), how long the store took for it, and how much of
    this gateway's time it took; `index` of a certain one is the Raft index from after the count, if there is one.

    Streams without events may be left out.
    """

    token: int
    counts: Mapping[bytes, int] | None
    took_s: float
    own_s: float = 0.0
    index: int | None = None


@dataclass(slots=True)
class Index:
    """The answer to a `ReadIndex`: the store's last applied Raft index, None if it could not be read or has none."""

    token: int
    value: int | None


@dataclass(slots=True)
class Saved:
    """The answer to a `SaveCheckpoint`."""

    key: Key
    token: int
    ok: bool


@dataclass(slots=True)
class ParkSaved:
    """The answer to a `Park`."""

    key: Key
    stream: bytes
    number: int
    ok: bool


@dataclass(slots=True)
class Tick:
    """Time has passed: `Feed.deadline` is reached."""


Input: TypeAlias = (
    Subscribe
    | SubscriberDown
    | SubscriberBusy
    | Ack
    | Nack
    | Resume
    | ReplayParked
    | Remove
    | Release
    | Hint
    | Page
    | Counts
    | Index
    | Saved
    | ParkSaved
    | Tick
)


# Effects


@dataclass(slots=True)
class ReadPage:
    """Read `count` events of a stream from number `start` on; answer with `Page`, always."""

    token: int
    stream: bytes
    start: int
    count: int


@dataclass(slots=True)
class ReadCounts:
    """Ask how many events these streams have (None: all streams); answer with `Counts`, always.

    `certain`: not what some member of the store knows by now, but everything there is; no answer is better than that.
    """

    token: int
    streams: tuple[bytes, ...] | None
    certain: bool = False


@dataclass(slots=True)
class ReadIndex:
    """Ask for the store's last applied Raft index; answer with `Index`, always."""

    token: int


@dataclass(slots=True)
class Deliver:
    """Send these events to the subscriber, as one message."""

    key: Key
    subscriber: SubscriberId
    events: list[Event]


@dataclass(slots=True)
class SaveCheckpoint:
    """Save for each of these streams the number of the next event not yet dealt with; answer with `Saved`.

    Streams not named keep what was saved for them. A number never goes back but by `BeginAnew`: of two writers, in one
    gateway or in two, the higher one counts.
    """

    key: Key
    token: int
    positions: dict[bytes, int]


@dataclass(slots=True)
class BeginAnew:
    """What was saved for these streams is about events that the store does not have any more: it counts no longer. The
    store may be another one, so that everything else that was saved may be gone too."""

    key: Key
    streams: Collection[bytes]


@dataclass(slots=True)
class Park:
    """Save this event among the parked ones; answer with `ParkSaved`. Its checkpoint waits for that."""

    key: Key
    event: Event
    reason: Term
    attempts: int


@dataclass(slots=True)
class DropParked:
    """This parked event has been dealt with: forget it."""

    key: Key
    stream: bytes
    number: int


@dataclass(slots=True)
class Started:
    """The subscription knows where it begins: what is appended from now on will be delivered."""

    key: Key


@dataclass(slots=True)
class Refused:
    """The subscriber could not subscribe; `reason` says why."""

    key: Key
    subscriber: SubscriberId | None
    reason: str


@dataclass(slots=True)
class Stopped:
    """A subscriber stopped the subscription at this event."""

    key: Key
    stream: bytes
    number: int
    reason: Term


@dataclass(slots=True)
class Resumed:
    """It goes on again."""

    key: Key


@dataclass(slots=True)
class Ended:
    """A transient subscription has ended with its subscriber."""

    key: Key


@dataclass(slots=True)
class Log:
    """Something an operator may want to know: an event name and its fields, never payload."""

    event: str
    fields: Mapping[str, Any]


Effect: TypeAlias = (
    ReadPage
    | ReadCounts
    | ReadIndex
    | Deliver
    | SaveCheckpoint
    | BeginAnew
    | Park
    | DropParked
    | Started
    | Refused
    | Stopped
    | Resumed
    | Ended
    | Log
)


@dataclass(frozen=True, slots=True)
class Status:
    """How a subscription stands (`subscription_status`)."""

    key: Key
    kind: Atom
    selector: Term
    persistent: bool
    state: str
    """`starting`, `catching_up`, `live` or `stopped`."""
    subscribers: int
    in_flight: int
    """Events delivered and not acknowledged, those that wait to be delivered again included."""
    buffered: int
    """Events read and not yet delivered."""
    streams_behind: int
    """Streams in which it is not at the feed's position."""
    parking: int
    unsaved_streams: int
    """Streams in which the saved checkpoint is behind."""
