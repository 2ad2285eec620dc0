"""The distribution header: the atom cache of a connection, and messages cut into fragments.

Follows the ERTS user's guide, "External Term Format", sections "Distribution Header" and "Distribution Header for
Fragmented Messages". Used on connections that negotiated `DFLAG_DIST_HDR_ATOM_CACHE` and `DFLAG_FRAGMENTS`. No I/O:
`HeaderReader` takes the frames of one peer in the order of their arrival, `HeaderWriter` gives frames that must leave
in the order in which they were made (fragments that follow the first one excepted, see below). The four-byte length
around a frame belongs to `connection.py`, the terms to `etf.py`.

Theory of operation
-------------------
*Atom cache.* Each direction of a connection has a cache of 2,048 atoms, kept alike on both sides: the sender decides
what stands where and says so, the receiver only follows. A message begins with a header that lists the atoms the
message refers to, at most 255. Each is named by its place in the cache (8 segments of 256), and by its text if it is
put there now, replacing what stood there. In the terms, `ATOM_CACHE_REF n` is the n-th atom of this list, so a term
cannot be read without its header, nor passed on (`etf.to_plain` makes it independent). Atoms beyond the 255th stand in
the term in full.

    131, 68, count, flags (half a byte per atom and one more, rounded up), one entry per atom, terms
    flag of an atom:  bit 3: the atom is new; bits 0-2: segment
    last flag:        bit 0: lengths of new atoms have two bytes
    entry:            index in the segment [, length, text if new]

Because the cache is shared state, a header counts from the moment its frame is received, even if it is the first
fragment of a message that is never completed, and what a writer says about its cache must reach the peer: a header that
was made is sent, or the connection ends.

*Fragments.* A message may be cut into fragments, so that large ones do not keep small ones waiting: the fragments of
several messages may be interleaved. They are told apart by a sequence id and counted down to 1 by a fragment id:

    131, 69, sequence id (8 bytes), fragment id (8 bytes), count, flags, entries, first bytes of the terms
    131, 70, sequence id, fragment id, next bytes of the terms

The control message is never cut. What has come of incomplete messages is bounded in number and size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from gater.erl.errors import DecodeError, LimitExceeded, RemoteProtocolError
from gater.erl.etf import AtomTable, encode_into
from gater.erl.terms import Atom, Term

__all__ = [
    "CACHE_SIZE",
    "FRAGMENT_BYTES",
    "MAX_ATOMS_PER_MESSAGE",
    "MAX_MESSAGE_BYTES",
    "MAX_OPEN_BYTES",
    "MAX_OPEN_SEQUENCES",
    "HeaderReader",
    "HeaderWriter",
    "Message",
    "OutgoingMessage",
]

CACHE_SIZE: Final = 2048
"""Entries of an atom cache: 8 segments of 256 (given by the protocol)."""

MAX_ATOMS_PER_MESSAGE: Final = 255
"""Atoms a header can list (given by the protocol: the count is one byte)."""

FRAGMENT_BYTES: Final = 64 * 1024
"""How much of a message goes into one fragment; a BEAM uses the same. At 1 Gbit/s it holds up others for 0.5 ms."""

MAX_OPEN_SEQUENCES: Final = 4096
"""Messages of one peer that may be incomplete at a time. Every process of a BEAM can have one under way, but the
scheduler lets a process send several fragments before the next one's turn; thousands at once are no traffic."""

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""The largest message that is put together from fragments: as large as one that comes in a single frame may be."""

MAX_OPEN_BYTES: Final = 512 * 1024 * 1024
"""What the incomplete messages of one peer may hold together: two of the largest, or many large ones."""

_FRAGMENT: Final = struct.Struct(">BBQQ")
_FIRST_FRAGMENT_SIZE: Final = _FRAGMENT.size
_unpack_ids: Final = struct.Struct(">QQ").unpack_from

_EMPTY: Final = object()
_REFS: Final = tuple(bytes((82, index)) for index in range(MAX_ATOMS_PER_MESSAGE))


class Message:
    """One whole message: its terms are in `data` from `pos` on (control message first, no version bytes).

    `atoms` is what `ATOM_CACHE_REF` in them refers to (the `atom_cache` argument of the functions of `etf.py`).
    """

    __slots__ = ("atoms", "data", "pos")

    def __init__(self, data: bytes, pos: int, atoms: Sequence[Term]) -> None:
        self.data = data
        self.pos = pos
        self.atoms = atoms

    def __repr__(self) -> str:
        return f"Message({len(self.data) - self.pos} bytes, {len(self.atoms)} atoms)"


class _Sequence:
    """A message of which fragments are missing: the next one must have the id `next_id`."""

    __slots__ = ("atoms", "data", "next_id")

    def __init__(self, atoms: Sequence[Term], data: bytes, next_id: int) -> None:
        self.atoms = atoms
        self.data = bytearray(data)
        self.next_id = next_id


class HeaderReader:
    """The receiving side of one connection. `atom_table` is the peer's (see `etf.AtomTable`)."""

    def __init__(
        self,
        atom_table: AtomTable,
        *,
        max_open_sequences: int = MAX_OPEN_SEQUENCES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_open_bytes: int = MAX_OPEN_BYTES,
    ) -> None:
        self._atom_table = atom_table
        self._cache: list[Term] = [_EMPTY] * CACHE_SIZE
        self._sequences: dict[int, _Sequence] = {}
        self._max_open_sequences = max_open_sequences
        self._max_message_bytes = max_message_bytes
        self._max_open_bytes = max_open_bytes
        self.open_bytes = 0
        """What the incomplete messages hold."""

    @property
    def open_sequences(self) -> int:
        """How many messages are incomplete."""
        return len(self._sequences)

    def receive(self, frame: bytes) -> Message | None:
        """Take the next frame (never an empty one: that is a tick); the message it is or completes, if any.

        Raises `RemoteProtocolError` (`DecodeError`, `LimitExceeded`); the connection cannot be used after that, for the
        two caches may differ.
        """
        try:
            if frame[0] != 131:
                raise RemoteProtocolError(f"a distribution header starts with byte 131, not {frame[0]}")
            kind = frame[1]
            if kind == 68:
                atoms, pos = self._read_atoms(frame, 2)
                return Message(frame, pos, atoms)
            if kind == 69:
                return self._first_fragment(frame)
            if kind == 70:
                return self._next_fragment(frame)
        except (IndexError, struct.error):
            raise DecodeError(f"a distribution header is cut off after {len(frame)} bytes") from None
        raise RemoteProtocolError(f"131, {kind} begins no distribution header")

    def _read_atoms(self, frame: bytes, pos: int) -> tuple[Sequence[Term], int]:
        """The atoms listed in the header whose count stands at `pos`, and the position of the terms."""
        count = frame[pos]
        pos += 1
        if not count:
            return (), pos
        flags = frame[pos : pos + (count >> 1) + 1]
        pos += (count >> 1) + 1
        long_atoms = flags[count >> 1] >> ((count & 1) << 2) & 1
        cache = self._cache
        atoms: list[Term] = []
        for index in range(count):
            flag = flags[index >> 1] >> ((index & 1) << 2)
            place = (flag & 7) << 8 | frame[pos]
            pos += 1
            if flag & 8:
                if long_atoms:
                    start = pos + 2
                    end = start + (frame[pos] << 8 | frame[pos + 1])
                    encoded = b"v" + frame[pos:end]
                else:
                    end = pos + 1 + frame[pos]
                    encoded = b"w" + frame[pos:end]
                atom = cache[place] = self._atom_table[encoded]
                pos = end
            else:
                atom = cache[place]
                if atom is _EMPTY:
                    raise DecodeError(f"a header refers to place {place} of the atom cache, where no atom was put")
            atoms.append(atom)
        return atoms, pos

    def _first_fragment(self, frame: bytes) -> Message | None:
        sequence_id, fragment_id = _unpack_ids(frame, 2)
        atoms, pos = self._read_atoms(frame, _FIRST_FRAGMENT_SIZE)
        if pos > len(frame):
            raise IndexError
        if sequence_id in self._sequences:
            raise RemoteProtocolError(f"sequence {sequence_id} begins again before it has ended")
        if fragment_id == 1:
            return Message(frame, pos, atoms)
        if fragment_id == 0:
            raise RemoteProtocolError("fragments are counted down to 1, this one is 0")
        if len(self._sequences) >= self._max_open_sequences:
            raise LimitExceeded("MAX_OPEN_SEQUENCES", self._max_open_sequences)
        self._count(len(frame) - pos, 0)
        self._sequences[sequence_id] = _Sequence(atoms, frame[pos:], fragment_id - 1)
        return None

    def _next_fragment(self, frame: bytes) -> Message | None:
        sequence_id, fragment_id = _unpack_ids(frame, 2)
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise RemoteProtocolError(f"a fragment of sequence {sequence_id}, which has not begun")
        if fragment_id != sequence.next_id:
            raise RemoteProtocolError(
                f"fragment {fragment_id} of sequence {sequence_id} came where {sequence.next_id} was due"
            )
        self._count(len(frame) - _FIRST_FRAGMENT_SIZE, len(sequence.data))
        sequence.data += memoryview(frame)[_FIRST_FRAGMENT_SIZE:]
        if fragment_id > 1:
            sequence.next_id -= 1
            return None
        del self._sequences[sequence_id]
        self.open_bytes -= len(sequence.data)
        return Message(bytes(sequence.data), 0, sequence.atoms)

    def _count(self, more: int, already: int) -> None:
        if already + more > self._max_message_bytes:
            raise LimitExceeded("MAX_MESSAGE_BYTES", self._max_message_bytes, already + more)
        self.open_bytes += more
        if self.open_bytes > self._max_open_bytes:
            raise LimitExceeded("MAX_OPEN_BYTES", self._max_open_bytes, self.open_bytes)


class _MessageAtoms(dict[Atom, bytes]):
    """How the atoms of one message are written (`encode_into` asks): a reference, or in full once 255 are listed.

    The writer's cache is only read here. It changes when the message is complete, so that a term that cannot be
    encoded leaves it as the peer knows it.
    """

    __slots__ = ("_hand", "_places", "listed", "used")

    def __init__(self, places: dict[Atom, int], hand: int) -> None:
        super().__init__()
        self._places = places
        self._hand = hand
        self.listed: list[tuple[Atom, int, bool]] = []
        self.used: set[int] = set()

    def __missing__(self, item: Atom) -> bytes:
        index = len(self.listed)
        if index == MAX_ATOMS_PER_MESSAGE:
            self[item] = item.etf
            return item.etf
        place = self._places.get(item)
        is_new = place is None or place in self.used
        if place is None or is_new:
            # Of 2,048 places at most 254 are used by this message.
            place = self._hand
            while place in self.used:
                place = (place + 1) % CACHE_SIZE
            self._hand = (place + 1) % CACHE_SIZE
        self.used.add(place)
        self.listed.append((item, place, is_new))
        reference = self[item] = _REFS[index]
        return reference

    @property
    def hand(self) -> int:
        """The place that is given away next."""
        return self._hand


class OutgoingMessage:
    """A message made by `HeaderWriter.message`: its header and the pieces of its terms."""

    __slots__ = ("_atoms", "_control", "_payload", "size")

    def __init__(self, atoms: bytes, control: bytes, payload: list[bytes]) -> None:
        self._atoms = atoms
        self._control = control
        self._payload = payload
        self.size = len(atoms) + len(control) + sum(map(len, payload))
        """Bytes of the message without the two or eighteen that begin a frame."""

    def frame(self) -> list[bytes]:
        """The whole message as the pieces of one frame (`131, 68, ..`)."""
        return [b"\x83D", self._atoms, self._control, *self._payload]

    def fragments(self, sequence_id: int, fragment_bytes: int = FRAGMENT_BYTES) -> Iterator[list[bytes]]:
        """The message as frames of about `fragment_bytes` (always more, if the control message alone is larger).

        `sequence_id` (64 bits) must differ from that of any message of this connection that is under way. The first
        frame carries the header and must leave before any message made later; between the others, frames of
        other messages may leave.
        """
        cuts = self._cut(max(fragment_bytes, 1))
        total = len(cuts)
        for index, pieces in enumerate(cuts):
            start = _FRAGMENT.pack(131, 70 if index else 69, sequence_id, total - index)
            yield [start, *pieces] if index else [start, self._atoms, self._control, *pieces]

    def _cut(self, fragment_bytes: int) -> list[list[bytes]]:
        """The payload in pieces of pieces; the first leaves room for header and control message."""
        room = fragment_bytes - len(self._atoms) - len(self._control)
        cuts: list[list[bytes]] = [[]]
        for piece in self._payload:
            pos = 0
            while pos < len(piece):
                if room <= 0:
                    cuts.append([])
                    room = fragment_bytes
                part = piece if not pos and len(piece) <= room else piece[pos : pos + room]
                cuts[-1].append(part)
                pos += len(part)
                room -= len(part)
        return cuts


class HeaderWriter:
    """The sending side of one connection."""

    def __init__(self) -> None:
        self._places: dict[Atom, int] = {}
        self._cache: list[Atom | None] = [None] * CACHE_SIZE
        self._hand = 0

    def message(self, control: Term, *payload: Term) -> OutgoingMessage:
        """Make a message of a control message and its payload, if it has one.

        Its frame (or first fragment) must leave before that of any message made later. Raises `EncodeError`; then
        nothing has changed.
        """
        atoms = _MessageAtoms(self._places, self._hand)
        control_pieces: list[bytes] = []
        encode_into(control_pieces, control, atoms)
        pieces: list[bytes] = []
        for term in payload:
            encode_into(pieces, term, atoms)
        return OutgoingMessage(self._header(atoms), b"".join(control_pieces), pieces)

    def _header(self, atoms: _MessageAtoms) -> bytes:
        """Count, flags and entries for the atoms of a message, which now are in the cache."""
        listed = atoms.listed
        count = len(listed)
        if not count:
            return b"\0"
        self._hand = atoms.hand
        flags = bytearray((count >> 1) + 1)
        long_atoms = any(is_new and item.etf[0] == 118 for item, _, is_new in listed)
        if long_atoms:
            flags[count >> 1] |= 1 << ((count & 1) << 2)
        entries: list[bytes | bytearray] = [bytes((count,)), flags]
        for index, (item, place, is_new) in enumerate(listed):
            flags[index >> 1] |= (place >> 8 | (8 if is_new else 0)) << ((index & 1) << 2)
            entries.append(bytes((place & 255,)))
            if is_new:
                # An encoded atom is its tag, then length and text as the header wants them.
                short = item.etf[0] == 119
                entries.append(b"\0" + item.etf[1:] if short and long_atoms else item.etf[1:])
                self._put(item, place)
        return b"".join(entries)

    def _put(self, item: Atom, place: int) -> None:
        replaced = self._cache[place]
        if replaced is not None and self._places.get(replaced) == place:
            del self._places[replaced]
        self._cache[place] = item
        self._places[item] = place
