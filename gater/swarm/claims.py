"""Claims to names: the registry shows one for each name, the others wait behind it.

Two processes can claim one name at the same time, told by different nodes in any order. Swarm keeps the one it saw
first, throws the other away and may be left without either. Here every claim that was told and not taken back is kept,
and the best is shown; when that one ends, the next is already there.

Left to others: which claim is better, and when one ends (`tracker.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from gater.erl.terms import Atom, Pid, Term
from gater.swarm.registry import Entry, Registry, name_key, same_meta


class Claims:
    """`better(one, other)` orders two claims to one name; `changed(name, old, new)` is told what shows."""

    def __init__(
        self, better: Callable[[Entry, Entry], bool], changed: Callable[[Term, Entry | None, Entry | None], None]
    ) -> None:
        self.registry = Registry()
        self._better = better
        self._changed = changed
        self._waiting: dict[Term, dict[Pid, Entry]] = {}
        self._waiting_names: dict[Pid, dict[Term, None]] = {}

    def find(self, name: Term, pid: Pid) -> Entry | None:
        """The claim of `pid` to `name`."""
        shown = self.registry.get(name)
        if shown is None or shown.pid == pid:
            return shown
        return self._waiting.get(name_key(name), {}).get(pid) if self._waiting else None

    def of_name(self, name: Term) -> list[Entry]:
        """Every claim to `name`, the one that shows first."""
        shown = self.registry.get(name)
        if shown is None:
            return []
        return [shown, *self._waiting.get(name_key(name), {}).values()]

    def has_pid(self, pid: Pid) -> bool:
        """Whether `pid` has any claim."""
        return self.registry.has_pid(pid) or pid in self._waiting_names

    def of_pid(self, pid: Pid) -> list[Entry]:
        """Every claim of `pid`."""
        shown = list(self.registry.by_pid(pid))
        waiting = self._waiting_names.get(pid)
        return shown if waiting is None else shown + [self._waiting[key][pid] for key in waiting]

    def pids_on_node(self, node: Atom) -> list[Pid]:
        """The processes of `node` that have a claim."""
        pids = self.registry.pids_on_node(node)
        if self._waiting_names:
            pids += [pid for pid in self._waiting_names if pid.node is node and not self.registry.by_pid(pid)]
        return pids

    def names_on_node(self, node: Atom) -> int:
        """How many claims the processes of `node` have."""
        waiting = sum(len(names) for pid, names in self._waiting_names.items() if pid.node is node)
        return self.registry.names_on_node(node) + waiting

    @property
    def peaceful(self) -> bool:
        """Nobody claims what somebody else has."""
        return not self._waiting

    def contested(self) -> list[Entry]:
        """The claims that wait behind a better one."""
        return [entry for entries in self._waiting.values() for entry in entries.values()]

    def put_first(self, entry: Entry) -> None:
        """Add a claim to a name that nobody has: `put` without looking."""
        self.registry.put(entry)
        self._changed(entry.name, None, entry)

    def put(self, entry: Entry) -> None:
        """Add a claim, or replace the one that this process has to this name."""
        shown = self.registry.get(entry.name)
        if shown is None or shown.pid == entry.pid:
            self._show(entry, shown)
        else:
            self._wait(entry)
        if self._waiting:
            self.rank(entry.name)

    def drop(self, name: Term, pid: Pid) -> Entry | None:
        """End the claim of `pid` to `name`; returns it."""
        shown = self.registry.get(name)
        if shown is None:
            return None
        if shown.pid != pid:
            return self._no_longer_wait(name_key(name), pid)
        waiting = self._waiting.get(name_key(name)) if self._waiting else None
        if waiting:
            best = self._best(list(waiting.values()))
            self._no_longer_wait(name_key(name), best.pid)
            self._show(best, shown)
        else:
            self.registry.remove(name)
            self._changed(name, shown, None)
        return shown

    def rank(self, name: Term) -> None:
        """Show the best claim to `name`, after something that `better` depends on has changed."""
        if not self._waiting:
            return
        waiting = self._waiting.get(name_key(name))
        if not waiting:
            return
        shown = self.registry.get(name)
        assert shown is not None, "a claim waits behind none"
        best = self._best([shown, *waiting.values()])
        if best is not shown:
            self._no_longer_wait(name_key(name), best.pid)
            self._wait(shown)
            self._show(best, shown)

    def _best(self, entries: list[Entry]) -> Entry:
        best = entries[0]
        for entry in entries[1:]:
            if self._better(entry, best):
                best = entry
        return best

    def _show(self, entry: Entry, instead_of: Entry | None) -> None:
        self.registry.put(entry)
        if instead_of is None or instead_of.pid != entry.pid or not same_meta(instead_of.meta, entry.meta):
            self._changed(entry.name, instead_of, entry)

    def _wait(self, entry: Entry) -> None:
        key = name_key(entry.name)
        self._waiting.setdefault(key, {})[entry.pid] = entry
        self._waiting_names.setdefault(entry.pid, {})[key] = None

    def _no_longer_wait(self, key: Term, pid: Pid) -> Entry | None:
        waiting = self._waiting.get(key)
        entry = None if waiting is None else waiting.pop(pid, None)
        if waiting is None or entry is None:
            return None
        if not waiting:
            del self._waiting[key]
        names = self._waiting_names[pid]
        del names[key]
        if not names:
            del self._waiting_names[pid]
        return entry
