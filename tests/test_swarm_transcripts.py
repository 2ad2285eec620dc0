"""Two original trackers, recorded: fed what they received, ours sends what they sent."""

import json
from pathlib import Path

import pytest

from gater.erl.etf import decode
from gater.erl.terms import Atom, Pid
from gater.swarm import messages
from gater.swarm.events import Call, NodeDown, NodeUp, ProcessDown, Received, Reply, Send, TimerFired
from gater.swarm.tracker import State, Tracker

CAPTURES = Path(__file__).parent / "captures"
A, B = Atom("sa@127.0.0.1"), Atom("sb@127.0.0.1")
CREATION = {A: 0x6B03A82B, B: 0x6B03A82E}
SWARM = (Atom("swarm"), list(b"swarm"), list(b"3.4.0"))


def recorded(name):
    content = json.loads((CAPTURES / f"swarm_tracker_{name}.json").read_text())
    return Atom(content["node"]), [
        (each["dir"], each["ms"] / 1000, decode(bytes.fromhex(each["etf"])), each["to"]) for each in content["messages"]
    ]


def event_of(term):
    """What the runner of a tracker makes of a message to the original's process; None if it keeps it to itself."""
    match term:
        case Atom() as timer if timer.name in ("cluster_join", "anti_entropy"):
            return TimerFired(timer.name)
        case (Atom(name="$gen_call"), caller, request):
            return Call(caller, messages.request_from_term(request))
        case (Atom(name="$gen_cast"), content):
            return Received(content[1].node, messages.message_from_term(content))
        case (Atom(name="event"), sender, _, _):
            return Received(sender.node, messages.message_from_term(term))
        case (Atom(name="DOWN"), _, _, pid, (_, Atom(name="return"), applications)):
            return NodeUp(pid.node, has_swarm=SWARM in applications)
        case (Atom(name="DOWN"), _, _, pid, reason):
            return ProcessDown(pid, connection_lost=reason is Atom("noconnection"))
        case (Atom(name="nodedown"), node, _):
            return NodeDown(node)
        # The original asks for the applications itself; it sees the timeout of `demonitor` flushing.
        case (Atom(name="nodeup"), _, _) | Atom(name="timeout"):
            return None
    raise AssertionError(f"not expected in a transcript: {term!r}")


def without_monitors(term):
    """A registry is a set, and each member's monitors are its own."""
    match term:
        case (Atom(name="$gen_cast"), (tag, sender, clock, registry)):
            entries = sorted(((e[0], e[1], e[2], e[4], e[5]) for e in registry), key=repr)
            return (tag, sender, clock, entries)
    return term


def address(to):
    """How the recording names who a message is sent to: a pid without its node, or the registered name."""
    return f"<{to.id}.{to.serial}>" if isinstance(to, Pid) else f"{{Swarm.Tracker, :{to.name!r}}}".replace("'", '"')


def recorded_address(text):
    return f"<{text.split('.', 1)[1]}" if text.startswith("#PID") else text


def sent_by(effects):
    for effect in effects:
        match effect:
            case Send(to, message):
                for each in to:
                    yield address(each), without_monitors(messages.message_to_term(message))
            case Reply((pid, tag), value):
                yield address(pid), (tag, value)


def registrations(tracker):
    return {entry.name: (entry.pid, entry.meta) for entry in tracker.registry}


def pid(node, number):
    return Pid(node, number, 0, CREATION[node])


WORKER = (Atom("gateway_worker"), Atom("reg_gh"), A, 17)
END = {
    "a": {WORKER: (pid(A, 121), {}), (Atom("gater_api"), 123456): (pid(B, 127), {})},
    "b": {(Atom("gater_api"), 123456): (pid(B, 127), {})},
}


@pytest.mark.parametrize("name", ["a", "b"])
def test_our_tracker_sends_what_the_recorded_one_sent(name):
    node, recording = recorded(name)
    tracker = Tracker(pid(node, 120))
    tracker.start(0.0)
    sent, expected, states = [], [], []
    for direction, now, term, to in recording:
        if direction == "recv":
            event = event_of(term)
            if event is not None:
                sent += sent_by(tracker.receive(event, now))
                states.append(tracker.state)
        elif direction == "send":
            expected.append((recorded_address(to), without_monitors(term)))
    assert sent == expected
    assert len(expected) > 4
    assert registrations(tracker) == END[name]
    assert tracker.state is State.TRACKING
    assert {State.TRACKING, State.SYNCING if name == "a" else State.AWAITING_SYNC_ACK} <= set(states)
