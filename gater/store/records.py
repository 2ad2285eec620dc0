"""Stored events as bytes: an EventRecord is built once, when it is stored, as the external term format it is read in.

A read then joins stored bytes and neither decodes nor encodes an event. The shape is that of
`gater.api.schema.RecordedEvent`; a test holds the two together. What is on disk and who writes it is `engine.py`'s
business.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from gater.api import schema
from gater.erl.etf import encode_term
from gater.erl.terms import Atom, EncodedTerm, Term

_U32: Final = struct.Struct(">I").pack
_SMALL_INTEGER: Final = struct.Struct("BB").pack
_INTEGER: Final = struct.Struct(">Bi").pack
_NIL: Final = b"j"
_LIST: Final = b"l"
_MAP: Final = b"t"
_OK_TUPLE: Final = b"h\x02" + encode_term(schema.OK)
"""`{ok, ` without its second element."""


def _fields(fields: Mapping[Term, Term]) -> bytes:
    """The keys and values of a map in external term format, without the map's own tag and size."""
    return encode_term(fields)[5:]


_RECORD_FIELDS: Final = 12
_RECORD_HEAD: Final = (
    _MAP + _U32(_RECORD_FIELDS) + _fields({schema.STRUCT: schema.EVENT_RECORD, schema.UNKNOWN_FIELDS: []})
)
_NUMBER_KEY: Final = encode_term(schema.EVENT_NUMBER)


def event_fields(event: Mapping[Term, Term]) -> bytes:
    """The six fields an EventRecord takes over from its NewEvent. Raises `EncodeError`."""
    return _fields({key: event[key] for key in schema.NEW_EVENT_FIELDS})


def stream_field(stream: bytes) -> bytes:
    """The field that names the stream."""
    return _fields({schema.EVENT_STREAM_ID: stream})


def created_fields(moment: datetime) -> bytes:
    """The two fields that say when the event was stored."""
    created = schema.datetime_to_term(moment)
    return _fields({schema.CREATED: created, schema.CREATED_EPOCH: schema.epoch_us(moment)})


def event_record(stream: bytes, created: bytes, event: bytes, number: int) -> bytes:
    """A whole EventRecord from the results of the three functions above and the event's number."""
    return b"".join((_RECORD_HEAD, stream, created, event, _NUMBER_KEY, _integer(number)))


def _integer(number: int) -> bytes:
    if number < 256:
        return _SMALL_INTEGER(97, number)
    if number < 2**31:
        return _INTEGER(98, number)
    return encode_term(number)


def ok_list(count: int, joined: bytes) -> Term:
    """The reply `{:ok, list}` of `count` terms, given as their bytes one after the other."""
    if count == 0:
        return schema.ok([])
    return EncodedTerm(b"".join((_OK_TUPLE, _LIST, _U32(count), joined, _NIL)))


def ok_map(count: int, joined: bytes) -> Term:
    """The reply `{:ok, map}` of `count` pairs, given as the bytes of key, value, key, value, ..."""
    return EncodedTerm(b"".join((_OK_TUPLE, _MAP, _U32(count), joined)))


def ok_encoded(term: bytes) -> Term:
    """The reply `{:ok, term}` of a term given as its bytes."""
    return EncodedTerm(_OK_TUPLE + term)


def path(parts: Sequence[Atom | bytes]) -> bytes:
    """A Khepri path, a list of atoms and binaries, in external term format."""
    return encode_term(list(parts))
