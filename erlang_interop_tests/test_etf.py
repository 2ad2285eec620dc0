"""The external term format against a real BEAM: what we encode is, to Erlang, the very same term."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from erlang_interop_tests.beam import BeamNode
from gater.erl import etf

CAPTURES = Path(__file__).resolve().parent.parent / "tests" / "captures"


def vectors() -> list[dict[str, Any]]:
    with gzip.open(CAPTURES / "etf.json.gz") as file:
        found: list[dict[str, Any]] = json.load(file)["vectors"]
    return found


async def different(node: BeamNode, pairs: list[tuple[bytes, bytes]]) -> list[int]:
    """The positions of the pairs whose two encodings are not the same term to Erlang."""
    source = "[N || {N, {A, B}} <- lists:enumerate(Pairs), binary_to_term(A) =/= binary_to_term(B)]"
    answer: list[int] = await node.eval(source, Pairs=pairs, timeout_s=60)
    return answer


async def test_every_recorded_term_comes_back_identical(erl_node: BeamNode) -> None:
    pairs = []
    for vector in vectors():
        plain = bytes.fromhex(vector["plain"])
        pairs.append((plain, etf.encode(etf.decode(plain))))
        pairs.append((plain, etf.encode(etf.decode(plain), compressed=6)))
    assert len(pairs) >= 2 * 640
    assert await different(erl_node, pairs) == []


async def test_a_term_nested_ten_thousand_deep_comes_back_identical(erl_node: BeamNode) -> None:
    build = "lists:foldl(fun(_, T) -> [{x, #{k => T}}] end, [], lists:seq(1, 3333))"
    original = await erl_node.eval_bytes(f"term_to_binary({build})")
    nested = etf.decode(etf.decode(original))
    assert await different(erl_node, [(etf.decode(original), etf.encode(nested))]) == []


async def test_terms_made_by_the_node_itself_come_back_identical(erl_node: BeamNode) -> None:
    source = """
    [term_to_binary(T) || T <- [
        self(), make_ref(), hd(erlang:ports()), fun erlang:node/0, fun(X) -> X + 1 end,
        #{1 => a, 1.0 => b, true => c}, #{[1] => x, #{} => y}, [a | b], <<5:3>>, 1 bsl 100000, -(1 bsl 2048),
        0.1, -0.0, 'ünïcode', '', "string", lists:seq(1, 70000), {}, #{}, [], <<>>
    ]]
    """
    encoded: list[bytes] = await erl_node.eval(source)
    assert await different(erl_node, [(each, etf.encode(etf.decode(each))) for each in encoded]) == []
