"""The four consistency checks, as a healthy store with a single member answers them.

Shapes: `consistency_checker.ex` of ExESDB 0.11.0 and the recorded replies (`tests/captures/exesdb_contract.json`).
"""

from __future__ import annotations

from datetime import datetime

from gater.api.schema import ERROR, OK, STORE_ID, datetime_to_term, ok
from gater.erl.terms import Atom, Term


def _map(**fields: Term) -> Term:
    return {Atom(key): value for key, value in fields.items()}


def quick_health(store: Atom, node: Atom) -> Term:
    """The reply to `quick_health_check`."""
    return ok({STORE_ID: store, **_map(status=Atom("healthy"), member_count=1, members=[(store, node)])})


def cluster_consistency(store: Atom, node: Atom, now: datetime) -> Term:
    """The reply to `verify_cluster_consistency`."""
    members = [(store, node)]
    raft = _map(status=Atom("healthy"), members=members, leader=(store, node), quorum_size=1)
    report = _map(
        timestamp=datetime_to_term(now),
        status=Atom("consistent"),
        nodes_checked=1,
        leader=node,
        members=members,
        raft_status=raft,
        cross_node_verification=[(node, OK, members)],
        potential_issues=[],
        recommendations=[],
    )
    return ok({STORE_ID: store, **report})


def membership_consensus(store: Atom, node: Atom) -> Term:
    """The reply to `verify_membership_consensus`."""
    return ok(_map(status=Atom("consensus"), nodes_checked=1, consistent_view=[(store, node)]))


def raft_log_consistency(store: Atom, node: Atom) -> Term:
    """The reply to `check_raft_log_consistency`: that of the original, to the letter.

    ExESDB asks each member for `ra:log_overview/1`, which does not exist, and so always reports a partial failure. A
    store in one file has no Raft log that could be shown instead, and `rpc` to this node fails in the same way; an
    invented log would look like a check that was made.
    """
    undefined: Term = (Atom("undef"), [(Atom("ra"), Atom("log_overview"), [(store, node)], [])])
    logs = [(node, ERROR, (Atom("badrpc"), (Atom("EXIT"), undefined)))]
    consistency = _map(status=Atom("partial_failure"), failed_nodes=[node], successful_count=0)
    return ok({STORE_ID: store, **_map(raft_logs=logs, consistency=consistency)})
