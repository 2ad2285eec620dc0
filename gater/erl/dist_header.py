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
cannot be read without its header. Atoms beyond the 255th stand in the term in full.

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

*Writing.* Listing an atom costs more time than writing the few bytes of a short one, and a small message names few
atoms twice. So what a message begins with stands in full (`FULL_PIECES`; a BEAM reads either), and only a longer one
makes use of the cache. While it is made, its list is

- *empty*: nothing has been listed. A term that is passed on makes it *taken over*, a container beyond `FULL_PIECES`
- *its own*: atoms in the order in which they occur, up to 255.

*Passing on.* A relay leaves a term encoded (`etf.decode_spine`) and keeps with it the list of its header, as atoms, not
as places: both caches may change before it is sent on (`EncodedTerm.atoms`). The message that carries it on

- *takes over* that list if its own is empty: it begins with that one, entry for entry, so the references in it hold and
  the bytes go as they came. What follows is found in the list or listed behind it.

Where a list has been begun otherwise (two such terms in one message, one far behind in a long message), for a peer
without headers, and where the term leaves by itself, it is rewritten with its atoms in full (`etf.plain_bytes`).

What is to be heeded: a list taken over may name an atom twice (a BEAM's does not), may name `true`, `false` and `nil`,
and may be full. Each entry has a place of the cache for itself within a message: an atom that stands at a place which
this message has already used, be it by being named before or by having just been replaced there, is put at another one,
of which there are 2,048 for 255. A reference in a garbled term that points behind its list finds another atom of the
message or ends the connection: nothing else than what its sender could have written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from gater.erl.errors import DecodeError, LimitExceeded, RemoteProtocolError
from gater.erl.etf import AtomRefs, AtomTable, encode_into, plain_bytes
from gater.erl.terms import Atom, EncodedTerm, Term, atom_bytes

__all__ = [
    "CACHE_SIZE",
    "FRAGMENT_BYTES",
    "FULL_PIECES",
    "MAX_ATOMS_PER_MESSAGE",
    "MAX_KNOWN_LISTS",
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

FULL_PIECES: Final = 100
"""Pieces (an atom, a number, the head of a tuple: each is one) that a message begins with before it makes use of the
atom cache. A call to a server and most answers have fewer: with the cache they would be 100 bytes shorter and take
three times as long to make. A list of ten maps with ten keys has more."""

MAX_KNOWN_LISTS: Final = 64
"""Lists of atoms of a peer that are kept as they came, and headers that pass such a list on. Its traffic consists of a
few kinds of messages; no list holds more than 255 atoms."""

_SMALL_PIECE_BYTES: Final = 4096
"""Fragments below this size are gathered in one buffer."""

_FRAGMENT: Final = struct.Struct(">BBQQ")
_FIRST_FRAGMENT_SIZE: Final = _FRAGMENT.size
_unpack_ids: Final = struct.Struct(">QQ").unpack_from

_EMPTY: Final = object()
_NO_ATOMS: Final = b"\x83D\0"
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
    """A message of which fragments are missing: the next one must have the id `next_id`.

    What has come of it is copied once, when it is complete; only small pieces are gathered, for an object weighs more
    than a few bytes.
    """

    __slots__ = ("atoms", "next_id", "pieces", "size")

    def __init__(self, atoms: Sequence[Term], next_id: int) -> None:
        self.atoms = atoms
        self.next_id = next_id
        self.size = 0
        self.pieces: list[bytearray | memoryview] = []

    def add(self, piece: memoryview) -> None:
        """Take the next bytes."""
        pieces = self.pieces
        self.size += len(piece)
        if len(piece) >= _SMALL_PIECE_BYTES:
            pieces.append(piece)
        elif pieces and type(pieces[-1]) is bytearray and len(pieces[-1]) < _SMALL_PIECE_BYTES:
            pieces[-1] += piece
        else:
            pieces.append(bytearray(piece))


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
        self._known: dict[bytes, Sequence[Term]] = {}
        """Lists without a new atom, by their bytes; they hold until an atom is put into the cache."""
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
        end = pos + (count >> 1) + 1 + count
        encoded_list = frame[pos - 1 : end]
        known = self._known.get(encoded_list)
        if known is not None:
            return known, end
        flags = frame[pos : pos + (count >> 1) + 1]
        pos += (count >> 1) + 1
        long_atoms = flags[count >> 1] >> ((count & 1) << 2) & 1
        cache = self._cache
        atoms: list[Term] = []
        has_new = False
        for index in range(count):
            flag = flags[index >> 1] >> ((index & 1) << 2)
            place = (flag & 7) << 8 | frame[pos]
            pos += 1
            if flag & 8:
                has_new = True
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
        listed = tuple(atoms)
        if has_new or len(self._known) >= MAX_KNOWN_LISTS:
            self._known.clear()
        if not has_new:
            self._known[encoded_list] = listed
        return listed, pos

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
        sequence = self._sequences[sequence_id] = _Sequence(atoms, fragment_id - 1)
        sequence.add(memoryview(frame)[pos:])
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
        self._count(len(frame) - _FIRST_FRAGMENT_SIZE, sequence.size)
        sequence.add(memoryview(frame)[_FIRST_FRAGMENT_SIZE:])
        if fragment_id > 1:
            sequence.next_id -= 1
            return None
        del self._sequences[sequence_id]
        self.open_bytes -= sequence.size
        return Message(b"".join(sequence.pieces), 0, sequence.atoms)

    def _count(self, more: int, already: int) -> None:
        if already + more > self._max_message_bytes:
            raise LimitExceeded("MAX_MESSAGE_BYTES", self._max_message_bytes, already + more)
        self.open_bytes += more
        if self.open_bytes > self._max_open_bytes:
            raise LimitExceeded("MAX_OPEN_BYTES", self._max_open_bytes, self.open_bytes)


class _MessageAtoms(AtomRefs):
    """How the atoms of one message are written (`encode_into` asks): a reference, or in full once 255 are listed.

    The writer's cache is only read here. It changes when the message is complete, so that a term that cannot be
    encoded leaves it as the peer knows it.
    """

    __slots__ = ("_hand", "_headers", "_places", "header", "listed", "taken_over", "used")

    def __init__(self, places: dict[bytes, int], hand: int, headers: dict[int, tuple[Sequence[Term], bytes]]) -> None:
        super().__init__()
        self._places = places
        self._hand = hand
        self._headers = headers
        self.taken_over: Sequence[Term] = ()
        self.header = b""
        """The header that lists what is taken over and nothing else, if one like that was made before. Then nothing is
        `listed` until another atom comes."""
        self.listed: list[tuple[bytes, int, bool]] = []
        self.used: set[int] = set()

    def __missing__(self, item: Atom) -> bytes:
        if self.header:
            self.header = b""
            self._take_over()
            return self[item]
        index = len(self.listed)
        if index == MAX_ATOMS_PER_MESSAGE:
            self[item] = item.etf
            return item.etf
        self._list(item.etf)
        reference = self[item] = _REFS[index]
        return reference

    def _list(self, encoded: bytes) -> None:
        place = self._places.get(encoded)
        is_new = place is None or place in self.used
        if place is None or is_new:
            # Of 2,048 places at most 254 are used by this message.
            place = self._hand
            while place in self.used:
                place = (place + 1) % CACHE_SIZE
            self._hand = (place + 1) % CACHE_SIZE
        self.used.add(place)
        self.listed.append((encoded, place, is_new))

    def passed_on(self, term: EncodedTerm) -> bytes:
        """The term as it came, if the list of this message begins with its atoms or can."""
        if term.atoms is not self.taken_over:
            if self.listed or self.header or len(term.atoms) > MAX_ATOMS_PER_MESSAGE:
                return plain_bytes(term)
            self.taken_over = term.atoms
            known = self._headers.get(id(term.atoms))
            if known is None:
                self._take_over()
            else:
                self.header = known[1]
        return term.data

    def _take_over(self) -> None:
        for index, item in enumerate(self.taken_over):
            self._list(atom_bytes(item))
            if type(item) is Atom:
                self.setdefault(item, _REFS[index])

    def begin_again(self) -> None:
        """Forget what has been taken over, of which nothing was listed."""
        self.taken_over = ()
        self.header = b""

    @property
    def hand(self) -> int:
        """The place that is given away next."""
        return self._hand


class OutgoingMessage:
    """A message made by `HeaderWriter.message`: the pieces of one frame.

    The first piece is `131, 68` and the list of atoms, then comes the control message, from `payload_at` on the
    payload.
    """

    __slots__ = ("_payload_at", "_pieces", "size")

    def __init__(self, pieces: list[bytes], payload_at: int) -> None:
        self._pieces = pieces
        self._payload_at = payload_at
        self.size = sum(map(len, pieces))
        """Bytes of the message as one frame."""

    def frame(self) -> list[bytes]:
        """The whole message as the pieces of one frame (`131, 68, ..`)."""
        return self._pieces

    def fragments(self, sequence_id: int, fragment_bytes: int = FRAGMENT_BYTES) -> Iterator[list[bytes | memoryview]]:
        """The message as frames of about `fragment_bytes` (always more, if the control message alone is larger).

        `sequence_id` (64 bits) must differ from that of any message of this connection that is under way. The first
        frame carries the header and must leave before any message made later; between the others, frames of
        other messages may leave.
        """
        beginning: list[bytes | memoryview] = [self._pieces[0][2:], *self._pieces[1 : self._payload_at]]
        cuts = self._cut(max(fragment_bytes, 1), sum(map(len, beginning)))
        total = len(cuts)
        for index, pieces in enumerate(cuts):
            start = _FRAGMENT.pack(131, 70 if index else 69, sequence_id, total - index)
            yield [start, *pieces] if index else [start, *beginning, *pieces]

    def _cut(self, fragment_bytes: int, taken: int) -> list[list[bytes | memoryview]]:
        """The payload in pieces of pieces; of the first fragment `taken` bytes are."""
        room = fragment_bytes - taken
        cuts: list[list[bytes | memoryview]] = [[]]
        for piece in self._pieces[self._payload_at :]:
            pos = 0
            while pos < len(piece):
                if room <= 0:
                    cuts.append([])
                    room = fragment_bytes
                part = piece if not pos and len(piece) <= room else memoryview(piece)[pos : pos + room]
                cuts[-1].append(part)
                pos += len(part)
                room -= len(part)
        return cuts


class HeaderWriter:
    """The sending side of one connection. How many pieces of a message stand in full is changed in tests only."""

    def __init__(self, full_pieces: int = FULL_PIECES) -> None:
        self._full_pieces = full_pieces
        self._places: dict[bytes, int] = {}
        self._cache: list[bytes] = [b""] * CACHE_SIZE
        """What the peer holds: encoded atoms, and `b""` where it has been sent none."""
        self._hand = 0
        self._headers: dict[int, tuple[Sequence[Term], bytes]] = {}
        """Headers that list what was taken over and nothing else, by the identity of that list; each with its list, so
        that no other gets that identity. They hold until an atom is put into the cache."""
        self._atoms = _MessageAtoms(self._places, 0, self._headers)
        """Of the next message that lists any."""

    def message(self, control: Term, *payload: Term) -> OutgoingMessage:
        """Make a message of a control message and its payload, if it has one.

        Its frame (or first fragment) must leave before that of any message made later. Raises `EncodeError`; then
        nothing has changed.
        """
        atoms = self._atoms
        pieces = [_NO_ATOMS]
        try:
            encode_into(pieces, control, atoms, self._full_pieces)
            payload_at = len(pieces)
            for term in payload:
                encode_into(pieces, term, atoms, self._full_pieces)
            if atoms.header:
                pieces[0] = atoms.header
            elif atoms.listed:
                pieces[0] = self._header(atoms)
        finally:
            if atoms.listed:
                self._atoms = _MessageAtoms(self._places, self._hand, self._headers)
            elif atoms.header:
                atoms.begin_again()
        return OutgoingMessage(pieces, payload_at)

    def _header(self, atoms: _MessageAtoms) -> bytes:
        """The first piece of a message that lists these atoms, which now are in the cache."""
        listed = atoms.listed
        count = len(listed)
        self._hand = atoms.hand
        flags = bytearray((count >> 1) + 1)
        long_atoms = any(is_new and encoded[0] == 118 for encoded, _, is_new in listed)
        if long_atoms:
            flags[count >> 1] |= 1 << ((count & 1) << 2)
        entries: list[bytes | bytearray] = [b"\x83D%c" % count, flags]
        for index, (encoded, place, is_new) in enumerate(listed):
            flags[index >> 1] |= (place >> 8 | (8 if is_new else 0)) << ((index & 1) << 2)
            entries.append(bytes((place & 255,)))
            if is_new:
                # An encoded atom is its tag, then length and text as the header wants them.
                short = encoded[0] == 119
                entries.append(b"\0" + encoded[1:] if short and long_atoms else encoded[1:])
                self._put(encoded, place)
        header = b"".join(entries)
        taken_over = atoms.taken_over
        if count == len(taken_over) and not any(is_new for _, _, is_new in listed):
            if len(self._headers) >= MAX_KNOWN_LISTS:
                self._headers.clear()
            self._headers[id(taken_over)] = (taken_over, header)
        return header

    def _put(self, encoded: bytes, place: int) -> None:
        self._headers.clear()
        replaced = self._cache[place]
        if self._places.get(replaced) == place:
            del self._places[replaced]
        self._cache[place] = encoded
        self._places[encoded] = place
