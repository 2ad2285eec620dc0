"""A world of trackers for tests: nodes, processes, connections that break and heal, messages that are late.

What one node sends another arrives in order, after any delay; different senders overtake each other. A broken
connection loses what is under way; both ends notice, each in its own time, and only then it can be made again.
Everything is drawn from one random source, so a world can be run again.
"""

import heapq
import itertools
import random

from swarm_original import Original

from gater.erl.terms import Atom, Pid
from gater.swarm.events import (
    AskApplications,
    Call,
    Changed,
    Demonitor,
    DemonitorTracker,
    Die,
    Kept,
    Kill,
    Monitor,
    MonitorTracker,
    NodeDown,
    NodeUp,
    Note,
    ProcessDown,
    Received,
    Reply,
    Resume,
    Send,
    SetTimer,
    TimerFired,
    TrackerDown,
)
from gater.swarm.messages import SyncAck, SyncRecv, Track, UntrackName, message_from_term, message_to_term
from gater.swarm.tracker import Tracker, TrackerOptions

GROUPS = [Atom("g1"), Atom("g2")]


class Connection:
    """One connection between two nodes; `ends` are those that have not noticed yet that it is lost."""

    def __init__(self, ends):
        self.lost_at = None
        self.ends = set(ends)
        self.last_arrival = dict.fromkeys(ends, 0.0)


class Node:
    def __init__(self, name, original):
        self.name = name
        self.original = original
        self.machine = None
        self.creation = 0
        self.ids = itertools.count(100)
        self.timers = {}
        self.monitors = {}
        self.tracker_monitors = set()


class World:
    def __init__(
        self, seed, members, originals=0, original_first=True, anti_entropy_s=30.0, original_anti_entropy_s=None
    ):
        self.random = random.Random(seed)
        self.anti_entropy_s = anti_entropy_s
        self.original_anti_entropy_s = anti_entropy_s if original_anti_entropy_s is None else original_anti_entropy_s
        self.now = 0.0
        self.queue = []
        self.order = itertools.count()
        self.nodes = {}
        self.connections = {}
        self.alive = set()
        self.callers = {}
        self.granted = set()
        self.asked_for = {}
        self.told_to_die = set()
        self.died = set()
        self.unregistered = set()
        self.trace = []
        for i in range(members):
            # Originals come first or last in the order of names, which decides who begins.
            name = Atom(f"n{i}@h")
            self.nodes[name] = Node(name, original=(i if original_first else members - 1 - i) < originals)
        for name in self.nodes:
            self.boot(name)

    # Time.

    def at(self, delay, action, *args):
        heapq.heappush(self.queue, (self.now + delay, next(self.order), action, args))

    def delay(self):
        return self.random.choice((0.0, 0.0, 0.01, self.random.random() / 2))

    def run(self, seconds):
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self.queue)
            action(*args)
        self.now = end

    # Nodes and connections.

    def boot(self, name):
        node = self.nodes[name]
        if node.machine is not None:
            return
        node.creation += 1
        options = TrackerOptions(
            anti_entropy_interval_s=self.original_anti_entropy_s if node.original else self.anti_entropy_s,
            random=random.Random(self.random.random()),
            merge_chunk=2,
        )
        node.timers, node.monitors, node.tracker_monitors = {}, {}, set()
        pid = Pid(name, 1, 0, node.creation)
        node.machine = Original(pid, options) if node.original else Tracker(pid, options)
        self.trace.append((self.now, name, "boot"))
        self.carry_out(node, node.machine.start(self.now))
        for other in self.nodes:
            self.connect(name, other)

    def crash(self, name):
        node = self.nodes[name]
        if node.machine is None:
            return
        self.trace.append((self.now, name, "crash"))
        node.machine = None
        for pid in [pid for pid in self.alive if pid.node is name]:
            self.alive.discard(pid)
            self.died.add(pid)
        for other in self.nodes:
            self.disconnect(name, other)

    def connection(self, one, other):
        connection = self.connections.get(frozenset((one, other)))
        return connection if connection is not None and connection.lost_at is None else None

    def connect(self, one, other):
        if one is other or self.nodes[one].machine is None or self.nodes[other].machine is None:
            return
        known = self.connections.get(frozenset((one, other)))
        if known is not None and (known.lost_at is None or known.ends):
            return
        self.trace.append((self.now, one, f"connects {other}"))
        connection = self.connections[frozenset((one, other))] = Connection((one, other))
        for here, there in ((one, other), (other, one)):
            self.at(self.delay(), self.node_up, connection, here, there)

    def node_up(self, connection, here, there):
        if here in connection.ends:
            self.give(here, NodeUp(there, True, is_gater=not self.nodes[there].original))

    def disconnect(self, one, other):
        connection = self.connection(one, other)
        if connection is None:
            return
        self.trace.append((self.now, one, f"loses {other}"))
        connection.lost_at = self.now
        for here, there in ((one, other), (other, one)):
            if self.nodes[here].machine is None:
                connection.ends.discard(here)
            else:
                self.at(self.delay(), self.node_down, connection, here, there)

    def node_down(self, connection, here, there):
        if here not in connection.ends:
            return
        connection.ends.discard(here)
        node = self.nodes[here]
        for pid in [pid for pid in node.monitors if pid.node is there]:
            if node.monitors.pop(pid, None):
                self.give(here, ProcessDown(pid, connection_lost=True))
        if there in node.tracker_monitors:
            node.tracker_monitors.discard(there)
            self.give(here, TrackerDown(there))
        self.give(here, NodeDown(there))

    def transmit(self, here, there, arrive, *args):
        connection = self.connection(here, there)
        if connection is None and self.nodes[here].original and self.random.random() < 0.5:
            # A BEAM connects when it has something to send.
            self.connect(here, there)
            connection = self.connection(here, there)
        if connection is None:
            return
        arrival = max(self.now + self.delay(), connection.last_arrival[there])
        connection.last_arrival[there] = arrival

        def deliver():
            if there in connection.ends:
                arrive(*args)

        self.at(arrival - self.now, deliver)

    # Machines.

    def give(self, name, event):
        node = self.nodes[name]
        if node.machine is not None:
            self.trace.append((self.now, name, event))
            self.carry_out(node, node.machine.receive(event, self.now))

    def carry_out(self, node, effects):
        names_taken = any(
            isinstance(effect, Reply) and isinstance(self.callers[effect.caller][1], UntrackName) for effect in effects
        )
        for effect in effects:
            match effect:
                case Send(to, message):
                    for each in to:
                        there = each.node if isinstance(each, Pid) else each
                        self.transmit(node.name, there, self.give, there, Received(node.name, on_the_wire(message)))
                case SetTimer(timer, after_s):
                    version = node.timers[timer] = next(self.order)
                    self.at(after_s, self.fire, node, node.machine, timer, version)
                case Resume():
                    self.at(0.001, self.resume, node, node.machine)
                case Monitor(pid):
                    self.monitor(node, pid)
                case Demonitor(pid):
                    node.monitors.pop(pid, None)
                case MonitorTracker(other):
                    if self.connection(node.name, other) is None:
                        self.at(0.0, self.give, node.name, TrackerDown(other))
                    else:
                        node.tracker_monitors.add(other)
                case DemonitorTracker(other):
                    node.tracker_monitors.discard(other)
                case Die(pid):
                    self.told_to_die.add(pid)
                    if self.random.random() < 0.5:
                        self.end(pid)
                case Kill(pid):
                    self.told_to_die.add(pid)
                    self.end(pid)
                case Reply(caller, value):
                    self.replied(caller, value)
                case AskApplications(other):
                    self.give(node.name, NodeUp(other, True, not self.nodes[other].original))
                case Changed(_, old, _) if names_taken and old is not None:
                    self.unregistered.add(old.pid)
                case Changed() | Kept() | Note():
                    pass
                case _:
                    raise AssertionError(effect)

    def fire(self, node, machine, timer, version):
        if node.machine is machine and node.timers.get(timer) == version:
            self.give(node.name, TimerFired(timer))

    def resume(self, node, machine):
        if node.machine is machine:
            self.give(node.name, Resume())

    # Processes.

    def spawn(self, name):
        node = self.nodes[name]
        pid = Pid(name, next(node.ids), 0, node.creation)
        self.alive.add(pid)
        return pid

    def monitor(self, node, pid):
        node.monitors[pid] = monitor = object()
        if pid.node is node.name:
            if pid not in self.alive:
                self.at(0.0, self.process_down, node.name, pid, monitor)
        elif self.connection(node.name, pid.node) is None:
            self.at(0.0, self.process_down, node.name, pid, monitor, True)
        else:
            self.transmit(node.name, pid.node, self.monitored, node.name, pid, monitor)

    def monitored(self, holder, pid, monitor):
        if pid not in self.alive:
            self.transmit(pid.node, holder, self.process_down, holder, pid, monitor)

    def process_down(self, holder, pid, monitor, connection_lost=False):
        node = self.nodes[holder]
        if node.monitors.get(pid) is monitor:
            del node.monitors[pid]
            self.give(holder, ProcessDown(pid, connection_lost))

    def end(self, pid):
        if pid not in self.alive:
            return
        self.alive.discard(pid)
        for node in self.nodes.values():
            monitor = node.monitors.get(pid)
            if monitor is None:
                continue
            if node.name is pid.node:
                self.at(0.0, self.process_down, node.name, pid, monitor)
            else:
                self.transmit(pid.node, node.name, self.process_down, node.name, pid, monitor)

    # What a test does.

    def call(self, name, request):
        if self.nodes[name].machine is not None:
            caller = next(self.order)
            self.callers[caller] = (name, request)
            if isinstance(request, Track):
                self.asked_for.setdefault(request.pid, set()).add(request.name)
            self.give(name, Call(caller, request))

    def register(self, name, key):
        if self.nodes[name].machine is not None:
            pid = self.spawn(name)
            self.call(name, Track(key, pid, {}))
            return pid
        return None

    def replied(self, caller, value):
        name, request = self.callers.pop(caller)
        if isinstance(request, Track) and value == (Atom("ok"), request.pid) and request.pid.node is name:
            self.granted.add((request.name, request.pid))

    def kill(self, pid):
        self.died.add(pid)
        self.end(pid)

    def heal(self):
        for one, other in itertools.combinations(self.nodes, 2):
            self.connect(one, other)

    def quiet(self, seconds):
        """Let everything come together: all connections up, time for anti-entropy with everybody."""
        for _ in range(4):
            self.heal()
            self.run(1.0)
        self.run(seconds)

    def machines(self, original=False):
        return [node.machine for node in self.nodes.values() if node.machine and node.original is original]

    def story(self):
        return "\n".join(f"{when:9.3f} {name}: {what}" for when, name, what in self.trace)


def on_the_wire(message):
    """The message after the wire: as terms and back, with entries still terms."""
    if isinstance(message, SyncRecv | SyncAck):
        entries = list(message.entries)
        return type(message)(message.sender, message.clock, entries)
    term = message_to_term(message)
    return message_from_term(term[1] if term[0] is Atom("$gen_cast") else term)
