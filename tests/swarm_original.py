"""A test double: the tracker of Swarm 3.4 as it is, faults included, behind the interface of ours.

Follows `lib/swarm/tracker/tracker.ex` clause by clause, without processes that are placed by Swarm (`mfa`). What is
wrong there is wrong here: it waits without limit, postpones everything while it syncs, leaves conflicts unhandled,
believes any untrack whose clock it cannot refute, tells others of processes it merely lost sight of, and never starts
anti-entropy unless it was alone when it joined.
"""

from gater.swarm import clock as itc
from gater.swarm import messages
from gater.swarm.events import (
    Call,
    Changed,
    Demonitor,
    DemonitorTracker,
    Die,
    Kill,
    Monitor,
    MonitorTracker,
    NodeDown,
    NodeUp,
    ProcessDown,
    Received,
    Reply,
    Send,
    SetTimer,
    TimerFired,
    TrackerDown,
)
from gater.swarm.messages import (
    AddMeta,
    RemoveMeta,
    ReplicaEvent,
    Sync,
    SyncAck,
    SyncRecv,
    Track,
    Untrack,
    UntrackName,
    UpdateMeta,
    Whereis,
)
from gater.swarm.registry import Entry, Registry
from gater.swarm.ring import HashRing

POSTPONE = object()


class Original:
    def __init__(self, pid, options):
        self.pid, self.node, self.options = pid, pid.node, options
        self.state = "cluster_wait"
        self.clock = itc.seed()
        self.registry = Registry()
        self.nodes = []
        self.ring = HashRing()
        self.ring.add_node(self.node)
        self.sync_node = None
        self.pending = []
        self.postponed = []
        self.effects = []

    def start(self, now):
        return [SetTimer("cluster_join", self.options.sync_nodes_timeout_s)]

    def receive(self, event, now):
        self.effects = []
        self.handle(event)
        return self.effects

    def handle(self, event):
        """One event, and after a change of state all that were postponed, as `gen_statem` does."""
        queue = [event]
        while queue:
            event, before = queue.pop(0), self.state
            if getattr(self, self.state)(event) is POSTPONE:
                self.postponed.append(event)
            if self.state != before:
                queue, self.postponed = self.postponed + queue, []

    # States.

    def cluster_wait(self, event):
        match event:
            case NodeUp():
                self.nodeup(event)
            case NodeDown(node):
                self.nodedown(node)
            case TimerFired("cluster_join"):
                self.cluster_join()
            case Received(node, Sync(sender, clock)) if self.nodes == [node]:
                self.monitor_tracker(node)
                self.clock, theirs = itc.fork(clock)
                self.send(sender, SyncRecv(self.pid, theirs, self.snapshot()))
                self.state = "awaiting_sync_ack"
            case Received(_, Sync(sender, _)):
                self.pending.insert(0, sender)
            case _:
                return POSTPONE
        return None

    def cluster_join(self):
        if not self.nodes:
            self.effects.append(SetTimer("anti_entropy", self.options.anti_entropy_interval_s))
            self.clock = itc.seed()
            self.state = "tracking"
        else:
            self.start_sync(self.options.random.choice(self.nodes))

    def syncing(self, event):
        match event:
            case NodeUp():
                self.nodeup(event)
            case TrackerDown(node) if node is self.sync_node:
                others = [each for each in self.nodes if each is not node]
                if others:
                    self.start_sync(self.options.random.choice(others))
                else:
                    self.sync_node = None
                    self.state = "tracking"
            case NodeDown(node) if node is self.sync_node:
                self.nodedown(node)
                if self.nodes:
                    self.start_sync(self.options.random.choice(self.nodes))
                else:
                    self.sync_node = None
                    self.state = "tracking"
            case NodeDown(node):
                self.nodedown(node)
            case Received(node, SyncRecv(sender, clock, registry)) if node is self.sync_node:
                self.sync_registry(node, registry)
                self.send(sender, SyncAck(self.pid, clock, self.snapshot()))
                self.clock = clock
                self.resolve_pending_sync_requests()
            case Received(node, Sync(sender, clock)) if node is self.sync_node:
                order = itc.compare(self.clock, clock)
                if order == "gt" or (order != "lt" and not node.name > self.node.name):
                    self.clock, theirs = itc.fork(self.clock)
                    self.send(sender, SyncRecv(self.pid, theirs, self.snapshot()))
                    self.state = "awaiting_sync_ack"
            case Received(_, Sync(sender, _)):
                if sender not in self.pending:
                    self.pending.insert(0, sender)
            case _:
                return POSTPONE
        return None

    def resolve_pending_sync_requests(self):
        while self.pending:
            sender = self.pending.pop(0)
            if sender.node is self.sync_node or sender.node not in self.nodes:
                continue
            self.demonitor_tracker()
            self.clock, theirs = itc.fork(self.clock)
            self.monitor_tracker(sender.node)
            self.send(sender, SyncRecv(self.pid, theirs, self.snapshot()))
            self.state = "awaiting_sync_ack"
            return
        self.demonitor_tracker()
        self.sync_node = None
        self.state = "tracking"

    def awaiting_sync_ack(self, event):
        match event:
            case Received(node, SyncAck(_, _, registry)) if node is self.sync_node:
                self.sync_registry(node, registry)
                self.resolve_pending_sync_requests()
            case TrackerDown(node) if node is self.sync_node:
                self.sync_node = None
                self.resolve_pending_sync_requests()
            case NodeUp():
                self.nodeup(event)
            case NodeDown(node):
                self.nodedown(node)
                if node is self.sync_node:
                    self.sync_node = None
                    self.resolve_pending_sync_requests()
            case _:
                return POSTPONE
        return None

    def tracking(self, event):
        match event:
            case NodeUp() if not self.nodes:
                self.nodeup(event)
                if self.nodes:
                    self.cluster_join()
            case NodeUp():
                self.nodeup(event)
            case NodeDown(node):
                self.nodedown(node)
                self.topology_change()
            case TimerFired("anti_entropy"):
                self.effects.append(SetTimer("anti_entropy", self.options.anti_entropy_interval_s))
                if self.nodes:
                    self.start_sync(self.options.random.choice(self.nodes))
            case Received(_, ReplicaEvent(_, clock, change)):
                self.replica_event(clock, change)
            case Received(node, Sync(sender, clock)):
                self.monitor_tracker(node)
                self.send(sender, SyncRecv(self.pid, clock, self.snapshot()))
                self.state = "awaiting_sync_ack"
            case Call(caller, request):
                self.call(caller, request)
            case ProcessDown(pid, _):
                for entry in self.registry.by_pid(pid):
                    self.remove_registration(entry)

    # Nodes.

    def nodeup(self, event):
        if event.has_swarm and event.node not in self.nodes:
            self.nodes.insert(0, event.node)
            self.ring.add_node(event.node)

    def nodedown(self, node):
        # The pending requests are pids and the filter looks for the node: none is ever taken out.
        if node in self.nodes:
            self.nodes.remove(node)
            self.ring.remove_node(node)

    def topology_change(self):
        for entry in self.registry.entries():
            if entry.pid.node is not self.node and entry.pid.node not in self.nodes:
                self.remove_registration(entry)

    def start_sync(self, node):
        self.monitor_tracker(node)
        self.send(node, Sync(self.pid, self.clock))
        self.state = "syncing"

    def monitor_tracker(self, node):
        self.sync_node = node
        self.effects.append(MonitorTracker(node))

    def demonitor_tracker(self):
        if self.sync_node is not None:
            self.effects.append(DemonitorTracker(self.sync_node))

    # Registries.

    def snapshot(self):
        return [Entry(entry.name, entry.pid, entry.meta, itc.peek(entry.clock)) for entry in self.registry]

    def sync_registry(self, node, registry):
        for remote in registry:
            local = self.registry.get(remote.name)
            if local is None:
                self.new(remote.name, remote.pid, remote.meta, itc.join(self.clock, remote.clock))
                continue
            order = itc.compare(local.clock, remote.clock)
            if local.pid == remote.pid:
                if order == "lt":
                    self.update(local, remote.meta, itc.join(local.clock, remote.clock))
                elif order == "concurrent":
                    meta = {**local.meta, **remote.meta}
                    clock = itc.event(itc.join(local.clock, remote.clock))
                    self.update(local, meta, clock)
                    self.broadcast(clock, UpdateMeta(meta, remote.pid))
            elif order == "lt":
                self.resolve_incorrect_local_reg(local, remote)
            elif order == "gt":
                self.effects.append(Die(remote.pid))
            else:
                here, there = local.pid.node, remote.pid.node
                owner = self.ring.key_to_node(remote.name)
                age = (local.pid.creation, local.pid.id) > (remote.pid.creation, remote.pid.id)
                if (owner is here and here is not there) or (here is there and age):
                    self.effects.append(Die(remote.pid))
                else:
                    self.resolve_incorrect_local_reg(local, remote)

    def resolve_incorrect_local_reg(self, local, remote):
        self.remove_registration(local)
        self.effects.append(Die(local.pid))
        self.new(remote.name, remote.pid, remote.meta, itc.join(local.clock, remote.clock))

    def replica_event(self, clock, change):
        match change:
            case Track(name, pid, meta):
                entry = self.registry.get(name)
                if entry is None:
                    self.new(name, pid, meta, itc.join(self.clock, clock))
                elif entry.pid == pid:
                    if entry.meta != meta and itc.leq(entry.clock, clock):
                        self.update(entry, meta, itc.join(entry.clock, clock))
                elif itc.leq(entry.clock, clock) and entry.pid.node is self.node:
                    self.remove(entry)
                    self.effects.append(Kill(entry.pid))
                    self.new(name, pid, meta, itc.join(entry.clock, clock))
            case Untrack(pid):
                for entry in self.registry.by_pid(pid):
                    if itc.leq(entry.clock, clock):
                        self.remove(entry)
            case UpdateMeta(meta, pid):
                for entry in self.registry.by_pid(pid):
                    if itc.leq(entry.clock, clock):
                        self.update(entry, meta, itc.join(entry.clock, clock))
                    elif not itc.leq(clock, entry.clock):
                        both = itc.event(itc.join(entry.clock, clock))
                        self.update(entry, {**entry.meta, **meta}, both)
                        self.broadcast(both, UpdateMeta({**entry.meta, **meta}, pid))

    # Calls.

    def call(self, caller, request):
        match request:
            case Track(name, pid, meta):
                entry = self.registry.get(name)
                if entry is None:
                    clock = itc.event(self.clock)
                    self.new(name, pid, meta, clock)
                    self.broadcast(clock, Track(name, pid, meta))
                    self.reply(caller, messages.ok(pid))
                elif entry.pid == pid:
                    self.reply(caller, messages.ok(pid))
                else:
                    self.reply(caller, messages.already_registered(entry.pid))
            case Untrack(pid):
                for entry in self.registry.by_pid(pid):
                    self.remove_registration(entry)
                self.reply(caller, messages.done())
            case UntrackName(name):
                # `Swarm.unregister_name/1` unregisters the process.
                entry = self.registry.get(name)
                if entry is not None:
                    self.call(caller, Untrack(entry.pid))
            case AddMeta(key, value, pid):
                self.change_meta(pid, lambda meta: {**meta, key: value})
                self.reply(caller, messages.done())
            case RemoveMeta(key, pid):
                self.change_meta(pid, lambda meta: {k: v for k, v in meta.items() if k != key})
                self.reply(caller, messages.done())
            case Whereis(name):
                entry = self.registry.get(name)
                self.reply(caller, messages.UNDEFINED if entry is None else entry.pid)

    def change_meta(self, pid, change):
        for entry in self.registry.by_pid(pid):
            clock = itc.event(entry.clock)
            self.update(entry, change(entry.meta), clock)
            self.broadcast(clock, UpdateMeta(change(entry.meta), pid))

    # Helpers.

    def new(self, name, pid, meta, clock):
        self.effects.append(Monitor(pid))
        self.registry.put(Entry(name, pid, meta, clock))

    def update(self, entry, meta, clock):
        self.registry.put(Entry(entry.name, entry.pid, meta, clock))

    def remove(self, entry):
        self.registry.remove(entry.name)
        self.effects.append(Changed(entry.name, entry, None))
        if not self.registry.by_pid(entry.pid):
            self.effects.append(Demonitor(entry.pid))

    def remove_registration(self, entry):
        self.remove(entry)
        self.broadcast(itc.event(entry.clock), Untrack(entry.pid))

    def broadcast(self, clock, change):
        if self.nodes:
            self.effects.append(Send(tuple(self.nodes), ReplicaEvent(self.pid, itc.peek(clock), change)))

    def send(self, to, message):
        self.effects.append(Send((to,), message))

    def reply(self, caller, value):
        self.effects.append(Reply(caller, value))
