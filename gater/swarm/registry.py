"""Who is registered under which name: entries with every index the tracker, the router and remote callers look up.

The table `swarm_registry` of Swarm 3.4 (`lib/swarm/registry.ex`) finds by name alone and scans for the rest. This one
answers each of these with one look-up, whatever the number of names: by name, by pid, by node, by property (a group is
a property of value `true`), and by the first elements of a tuple name, so that the workers of store `S` are
`starting_with(Atom("gateway_worker"), S)`.

Left to others: which of two claims to a name is right (`tracker.py`), and the wire (`messages.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

from gater.erl.terms import Atom, Pid, Reference, Term, TermMap, exact_equal, exact_key
from gater.swarm.clock import Clock

Meta: TypeAlias = Mapping[Term, Term]
"""The properties of a registration: groups (`{Group: True}`) and `mfa`. Never changed in place."""

NO_META: Final[Meta] = {}
"""The meta of nearly every registration, shared by all that have none."""

_UNUSUAL: Final = object()
"""Marks a key made by `exact_key`, so that it is never taken for a name that is its own key."""

_OWN_KEY: Final = frozenset({Atom, bytes, int, type(None), Pid, Reference})
"""Types whose values Python tells apart exactly as Erlang does, among each other and in a tuple of them."""

_ABSENT: Final = object()


class Entry:
    """One registration, as `Swarm.Entry` (without its monitor, which is the node's affair). Never changed: replaced.

    `clock` has the identity that the tracker had when it wrote the entry, and what was seen of this registration.
    """

    __slots__ = ("clock", "meta", "name", "pid")

    def __init__(self, name: Term, pid: Pid, meta: Meta, clock: Clock) -> None:
        self.name = name
        self.pid = pid
        self.meta = meta
        self.clock = clock

    def __repr__(self) -> str:
        return f"Entry({self.name!r}, {self.pid}, {self.meta!r}, {self.clock!r})"


_Bag: TypeAlias = Entry | dict[Term, Entry]
"""One entry, or several by key: most bags of a large registry hold one, and an entry costs nothing to hold."""


def same_meta(one: Meta, other: Meta) -> bool:
    """Are these the same properties, as Erlang compares, however deep their values?"""
    return one is other or (not one and not other) or exact_equal(one, other)


def merged_meta(one: Meta, other: Meta) -> Meta:
    """The properties of both; where they differ, of `other` (`Map.merge/2`)."""
    pairs = _pairs(one)
    pairs.update(_pairs(other))
    return _meta_of(pairs)


def with_property(meta: Meta, key: Term, value: Term) -> Meta:
    """These properties and one more."""
    return merged_meta(meta, TermMap([(key, value)]))


def without_property(meta: Meta, key: Term) -> Meta:
    """These properties but one."""
    pairs = _pairs(meta)
    pairs.pop(name_key(key), None)
    return _meta_of(pairs)


def _pairs(meta: Meta) -> dict[Term, tuple[Term, Term]]:
    return {name_key(key): (key, value) for key, value in meta.items()}


def _meta_of(pairs: dict[Term, tuple[Term, Term]]) -> Meta:
    if all(type(key) in _OWN_KEY for key, _ in pairs.values()):
        return dict(pairs.values()) or NO_META
    return TermMap(pairs.values())


def name_key(name: Term) -> Term:
    """A hashable value equal for two names exactly when Erlang's `=:=` holds; the name itself for common names."""
    kind = type(name)
    if kind is tuple:
        for element in name:
            if type(element) not in _OWN_KEY:
                return _unusual_key(name)
        return name
    return name if kind in _OWN_KEY else _unusual_key(name)


def _unusual_key(name: Term) -> Term:
    as_sent = _with_binaries(name)
    return (_UNUSUAL, exact_key(name)) if as_sent is name else name_key(as_sent)


def _with_binaries(name: Term) -> Term:
    """`name` with its text as the binaries it is sent as; `name` itself if it holds none outside lists and maps."""
    if type(name) is str:
        return name.encode()
    if type(name) is tuple and str in map(type, name):
        return tuple(element.encode() if type(element) is str else element for element in name)
    return name


class Registry:
    """Names and their entries. `exact_key` errors (`TypeError`, `LimitExceeded`) pass for names that are no terms."""

    def __init__(self) -> None:
        self._by_name: dict[Term, Entry] = {}
        self._by_node: dict[Atom, dict[Pid, _Bag]] = {}
        self._names_on_node: dict[Atom, int] = {}
        self._by_property: dict[Term, dict[Term, Entry]] = {}
        self._by_first: dict[Term, dict[Term, _Bag]] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Entry]:
        """Every entry; do not change the registry meanwhile (`entries` copies)."""
        return iter(self._by_name.values())

    def __contains__(self, name: Term) -> bool:
        return name_key(name) in self._by_name

    def get(self, name: Term) -> Entry | None:
        """The entry registered under `name`."""
        return self._by_name.get(name_key(name))

    def entries(self) -> list[Entry]:
        """Every entry, as it is now."""
        return list(self._by_name.values())

    def has_pid(self, pid: Pid) -> bool:
        """Whether `pid` has a name."""
        return pid in self._by_node.get(pid.node, ())

    def by_pid(self, pid: Pid) -> tuple[Entry, ...]:
        """The entries of `pid`: one for each of its names."""
        pids = self._by_node.get(pid.node)
        return () if pids is None else _in_bag(pids.get(pid))

    def on_node(self, node: Atom) -> list[Entry]:
        """The entries of processes on `node`."""
        return [entry for bag in self._by_node.get(node, {}).values() for entry in _in_bag(bag)]

    def pids_on_node(self, node: Atom) -> list[Pid]:
        """The registered processes of `node`; a copy, made in no time."""
        return list(self._by_node.get(node, ()))

    def names_on_node(self, node: Atom) -> int:
        """How many names the processes of `node` have."""
        return self._names_on_node.get(node, 0)

    def nodes(self) -> list[Atom]:
        """The nodes that registered processes live on."""
        return list(self._by_node)

    def with_property(self, key: Term, value: Term = _ABSENT) -> list[Entry]:
        """The entries whose meta has `key` (with exactly `value`, if one is given)."""
        property_key = name_key(key)
        entries = self._by_property.get(property_key, {}).values()
        if value is _ABSENT:
            return list(entries)
        wanted = (property_key, exact_key(value))
        return [
            entry
            for entry in entries
            if any((name_key(held), exact_key(each)) == wanted for held, each in entry.meta.items())
        ]

    def members(self, group: Term) -> list[Pid]:
        """The processes that have joined `group`, each once (`Swarm.members/1`)."""
        return list(dict.fromkeys(entry.pid for entry in self._by_property.get(name_key(group), {}).values()))

    def starting_with(self, first: Term, *following: Term) -> list[Entry]:
        """The entries whose names are tuples that start so; the first two elements are looked up, not searched."""
        bags = self._by_first.get(name_key(first))
        if bags is None:
            return []
        if not following:
            return [entry for bag in bags.values() for entry in _in_bag(bag)]
        found = _in_bag(bags.get(name_key(following[0])))
        if len(following) == 1:
            return list(found)
        rest = [name_key(element) for element in following[1:]]
        return [entry for entry in found if [name_key(element) for element in entry.name[2 : 2 + len(rest)]] == rest]

    def put(self, entry: Entry) -> Entry | None:
        """Register `entry` under its name; returns the entry it replaces."""
        key = name_key(entry.name)
        old = self._by_name.get(key)
        in_place = old is not None and old.pid == entry.pid and not old.meta
        if old is not None and not in_place:
            self._remove(key, old)
        self._by_name[key] = entry
        node = entry.pid.node
        if not in_place:
            self._names_on_node[node] = self._names_on_node.get(node, 0) + 1
        _put_in_bag(self._by_node.setdefault(node, {}), entry.pid, key, entry)
        for each in entry.meta:
            self._by_property.setdefault(name_key(each), {})[key] = entry
        name = entry.name
        if type(name) is tuple and len(name) > 1:
            _put_in_bag(self._by_first.setdefault(name_key(name[0]), {}), name_key(name[1]), key, entry)
        return old

    def remove(self, name: Term) -> Entry | None:
        """Forget `name`; returns the entry it had."""
        key = name_key(name)
        entry = self._by_name.get(key)
        if entry is not None:
            self._remove(key, entry)
        return entry

    def _remove(self, key: Term, entry: Entry) -> None:
        del self._by_name[key]
        node = entry.pid.node
        _take_from_bag(self._by_node, node, entry.pid, key)
        self._names_on_node[node] -= 1
        if not self._names_on_node[node]:
            del self._names_on_node[node]
        for each in entry.meta:
            property_key = name_key(each)
            group = self._by_property[property_key]
            del group[key]
            if not group:
                del self._by_property[property_key]
        name = entry.name
        if type(name) is tuple and len(name) > 1:
            _take_from_bag(self._by_first, name_key(name[0]), name_key(name[1]), key)


def _in_bag(bag: _Bag | None) -> tuple[Entry, ...]:
    if bag is None:
        return ()
    return (bag,) if type(bag) is Entry else tuple(bag.values())  # type: ignore[union-attr]


def _put_in_bag(bags: dict[Term, _Bag], slot: Term, key: Term, entry: Entry) -> None:
    bag = bags.setdefault(slot, entry)
    if bag is entry:
        return
    if type(bag) is dict:
        bag[key] = entry
        return
    assert isinstance(bag, Entry)
    first = name_key(bag.name)
    bags[slot] = entry if first == key else {first: bag, key: entry}


def _take_from_bag(index: dict[Term, dict[Term, _Bag]], outer: Term, slot: Term, key: Term) -> None:
    bags = index[outer]
    bag = bags[slot]
    if type(bag) is dict:
        del bag[key]
        if bag:
            return
    del bags[slot]
    if not bags:
        del index[outer]
