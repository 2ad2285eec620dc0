"""The hash ring: which node owns a key, as libring 1.7 says, and both of Swarm's distribution strategies."""

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gater.erl.etf import decode
from gater.erl.terms import Atom
from gater.swarm.ring import HashRing, StaticQuorumRing

CAPTURE = Path(__file__).parent / "captures" / "hash_ring.json.gz"
NODES = [Atom(f"n{i}@127.0.0.1") for i in range(7)]


def ring_of(nodes, **options):
    ring = HashRing(**options)
    for node in nodes:
        ring.add_node(node)
    return ring


def test_every_recorded_key_belongs_to_the_recorded_node():
    rings = json.loads(gzip.decompress(CAPTURE.read_bytes()))["rings"]
    checked = 0
    for recorded in rings:
        ring = ring_of([Atom(name) for name in recorded["nodes"]])
        for key in recorded["keys"]:
            assert ring.key_to_node(decode(bytes.fromhex(key["etf"]))) is Atom(key["node"]), key
            checked += 1
    assert checked == 4 * 305


def test_an_empty_ring_owns_nothing():
    assert HashRing().key_to_node(b"a") is None
    assert list(HashRing().preference(b"a")) == []


def test_adding_a_node_twice_and_removing_an_absent_one_change_nothing():
    ring = ring_of(NODES[:3])
    before = [ring.key_to_node(i) for i in range(200)]
    ring.add_node(NODES[1])
    ring.remove_node(NODES[6])
    assert [ring.key_to_node(i) for i in range(200)] == before
    assert ring.nodes == [NODES[2], NODES[1], NODES[0]]


@settings(max_examples=20)
@given(st.permutations(NODES), st.integers(1, 6), st.lists(st.binary(max_size=8), min_size=1, max_size=10))
def test_the_preference_of_a_key_is_the_order_in_which_nodes_inherit_it(nodes, gone, keys):
    ring = ring_of(nodes)
    for key in keys:
        order = list(ring.preference(key))
        assert sorted(map(str, order)) == sorted(map(str, NODES))
        left = ring_of([node for node in nodes if node not in order[:gone]])
        assert left.key_to_node(key) is order[gone]


def test_a_heavier_node_owns_more():
    ring = HashRing()
    ring.add_node(NODES[0], 32)
    ring.add_node(NODES[1], 512)
    owners = [ring.key_to_node(i) for i in range(500)]
    assert owners.count(NODES[1]) > 4 * owners.count(NODES[0])


def test_atoms_as_keys_follow_the_release_of_otp():
    # term_to_binary(grp) is 131,100,0,3,"grp" until OTP 25 and 131,119,3,"grp" from OTP 26 on.
    old, new = ring_of(NODES), ring_of(NODES, utf8_atoms=True)
    assert old.key_to_node(Atom("grp")) is old.key_to_node(b"\x83d\x00\x03grp")
    assert new.key_to_node(Atom("grp")) is old.key_to_node(b"\x83w\x03grp")
    assert old.key_to_node(True) is old.key_to_node(b"\x83d\x00\x04true")
    assert old.key_to_node(Atom("\u0439")) is old.key_to_node(b"\x83w\x02\xd0\xb9")
    assert new.key_to_node(Atom("\u0439" * 200)) is old.key_to_node(b"\x83v\x01\x90" + b"\xd0\xb9" * 200)
    # Atoms inside a key are hashed by phash2, which does not care.
    assert old.key_to_node((Atom("grp"), 1)) is new.key_to_node((Atom("grp"), 1))


def test_a_static_quorum_ring_owns_nothing_below_its_quorum():
    quorum, ring = StaticQuorumRing(3), ring_of(NODES[:3])
    for node in NODES[:2]:
        quorum.add_node(node)
    assert quorum.key_to_node(b"a") is None
    assert list(quorum.preference(b"a")) == []
    quorum.add_node(NODES[2])
    assert quorum.key_to_node(b"a") is ring.key_to_node(b"a")
    assert list(quorum.preference(b"a")) == list(islice(ring.preference(b"a"), 3))
    quorum.remove_node(NODES[0])
    assert quorum.key_to_node(b"a") is None


def test_a_quorum_is_positive():
    with pytest.raises(ValueError, match="positive"):
        StaticQuorumRing(0)
