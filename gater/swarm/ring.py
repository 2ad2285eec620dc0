"""Which node owns a key: consistent hashing as libring does it, and Swarm's two distribution strategies over it.

Follows libring 1.7 (`lib/ring.ex`) and Swarm 3.4 (`lib/swarm/distribution/`), because every member of a Swarm cluster
must place a name on the same node. Each node has 128 points on a circle of 2^32 - 1; a key belongs to the node of the
first point at or after its own hash. Hashes are `erlang:phash2/2`.

Left to others: who is on the ring (`tracker.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, Protocol

from gater.erl.errors import DecodeError, LimitExceeded
from gater.erl.phash2 import phash2
from gater.erl.terms import Term, atom_name

HASH_RANGE: Final = 2**32 - 1
"""libring's `@hash_range`."""

DEFAULT_WEIGHT: Final = 128
"""Points of a node on the ring unless told otherwise (libring's default)."""

_SMALL_ATOM_UTF8: Final = 119
_ATOM_UTF8: Final = 118
_ATOM_LATIN1: Final = 100


class Strategy(Protocol):
    """Swarm's `Swarm.Distribution.Strategy`: who is in, and who owns a key."""

    def add_node(self, node: Term, weight: int = DEFAULT_WEIGHT) -> None: ...

    def remove_node(self, node: Term) -> None: ...

    def key_to_node(self, key: Term) -> Term | None:
        """The node that owns `key`; None where Swarm says `:undefined` (there is no node, or no quorum)."""
        ...

    def preference(self, key: Term) -> Iterator[Term]:
        """The owner of `key`, then who would own it if those before were gone. Empty without a quorum."""
        ...


class HashRing:
    """libring's `HashRing` (and Swarm's `Swarm.Distribution.Ring`).

    `utf8_atoms` says how the members write an atom that is itself a key: libring hashes `term_to_binary(Key)` then, and
    OTP 26 changed what that is. False is OTP 25 and older. Keys that are not atoms do not care.
    """

    def __init__(self, *, utf8_atoms: bool = False) -> None:
        self.nodes: list[Term] = []
        self._utf8_atoms = utf8_atoms
        self._points: list[int] = []
        self._owners: list[Term] = []

    def add_node(self, node: Term, weight: int = DEFAULT_WEIGHT) -> None:
        """Put `node` on the ring; nothing happens if it is there already."""
        if node in self.nodes:
            return
        self.nodes.insert(0, node)
        for i in range(1, weight + 1):
            point = phash2((node, i), HASH_RANGE)
            at = bisect_left(self._points, point)
            # Two nodes may share a point: it stays with the node that was there first.
            if at == len(self._points) or self._points[at] != point:
                self._points.insert(at, point)
                self._owners.insert(at, node)

    def remove_node(self, node: Term) -> None:
        """Take `node` off the ring; nothing happens if it is not there."""
        if node not in self.nodes:
            return
        self.nodes.remove(node)
        kept = [(point, owner) for point, owner in zip(self._points, self._owners, strict=True) if owner != node]
        self._points = [point for point, _ in kept]
        self._owners = [owner for _, owner in kept]

    def key_to_node(self, key: Term) -> Term | None:
        """The node that owns `key`, or None if the ring is empty."""
        return next(self.preference(key), None)

    def preference(self, key: Term) -> Iterator[Term]:
        """Every node once, in the order in which they would own `key` as the ones before leave the ring."""
        seen: set[Term] = set()
        count = len(self._points)
        if not count:
            return
        start = bisect_left(self._points, self._hash(key))
        for i in range(start, start + count):
            owner = self._owners[i % count]
            if owner not in seen:
                seen.add(owner)
                yield owner

    def _hash(self, key: Term) -> int:
        name = atom_name(key)
        try:
            return phash2(key if name is None else self._atom_binary(name), HASH_RANGE)
        except (DecodeError, LimitExceeded):
            # A closure that no BEAM could read: no other member can have hashed it.
            return 0

    def _atom_binary(self, name: str) -> bytes:
        """`term_to_binary(Atom)`: libring hashes that, since `phash2` spreads atoms badly."""
        if not self._utf8_atoms:
            try:
                latin1 = name.encode("latin-1")
            except UnicodeEncodeError:
                pass  # OTP 25 writes what Latin-1 lacks in UTF-8
            else:
                return bytes((131, _ATOM_LATIN1)) + len(latin1).to_bytes(2, "big") + latin1
        text = name.encode()
        if len(text) < 256:
            return bytes((131, _SMALL_ATOM_UTF8, len(text))) + text
        return bytes((131, _ATOM_UTF8)) + len(text).to_bytes(2, "big") + text


class StaticQuorumRing:
    """Swarm's `Swarm.Distribution.StaticQuorumRing`: a ring that owns nothing while it is below `quorum` nodes."""

    def __init__(self, quorum: int = 2, *, utf8_atoms: bool = False) -> None:
        if quorum < 1:
            raise ValueError(f"the quorum is a positive number of nodes, got {quorum}")
        self.quorum = quorum
        self.ring = HashRing(utf8_atoms=utf8_atoms)

    def add_node(self, node: Term, weight: int = DEFAULT_WEIGHT) -> None:
        self.ring.add_node(node, weight)

    def remove_node(self, node: Term) -> None:
        self.ring.remove_node(node)

    def key_to_node(self, key: Term) -> Term | None:
        if len(self.ring.nodes) < self.quorum:
            return None
        return self.ring.key_to_node(key)

    def preference(self, key: Term) -> Iterator[Term]:
        return iter(()) if len(self.ring.nodes) < self.quorum else self.ring.preference(key)
