"""The harness itself: nodes start, evaluate, fail, freeze and die as tests need them to."""

from __future__ import annotations

import asyncio

import pytest

from erlang_interop_tests.beam import BeamError, BeamFailure, BeamNode, Beams, wait_until
from gater.erl.terms import Atom


async def test_an_erlang_node_evaluates_with_bindings(erl_node: BeamNode, otp: int) -> None:
    assert erl_node.otp_release == otp
    assert await erl_node.eval("X + 1", X=41) == 42
    assert await erl_node.eval("node()") is erl_node.atom


async def test_an_elixir_node_evaluates_both_languages(elixir_node: BeamNode) -> None:
    assert await elixir_node.eval("Enum.map(1..3, & &1 * x)", x=2) == [2, 4, 6]
    assert await elixir_node.eval("{ok, X} = {ok, <<1>>}, X", language="erlang") == b"\x01"


async def test_what_is_raised_in_the_node_is_raised_here(elixir_node: BeamNode) -> None:
    with pytest.raises(BeamError, match=r"RuntimeError.*oops") as raised:
        await elixir_node.eval('raise "oops"')
    assert raised.value.kind == "error"
    with pytest.raises(BeamError) as exited:
        await elixir_node.eval("exit(normal)", language="erlang")
    assert (exited.value.kind, exited.value.reason) == ("exit", Atom("normal"))


async def test_concurrent_evaluations_get_their_own_values(elixir_node: BeamNode) -> None:
    answers = await asyncio.gather(*(elixir_node.eval("x * x", x=number) for number in range(30)))
    assert answers == [number * number for number in range(30)]


async def test_stray_output_is_kept_apart(elixir_node: BeamNode) -> None:
    assert await elixir_node.eval('IO.puts("stray"); 1') == 1
    await wait_until(lambda: "stray" in elixir_node.output())


async def test_nodes_of_both_releases_see_each_other(beam: Beams) -> None:
    old = await beam.start("elixir", otp=25)
    new = await beam.start("erlang", otp=28)
    assert await new.eval("net_adm:ping(Other)", Other=old.atom) is Atom("pong")
    assert beam.epmd is not None
    assert {name.split("@")[0] for name in (str(old.name), str(new.name))} == set(await beam.epmd.names())


async def test_a_frozen_node_is_silent_until_thawed(beam: Beams) -> None:
    node = await beam.start()
    node.freeze()
    with pytest.raises(BeamFailure, match="did not answer"):
        await node.eval("1", timeout_s=0.2)
    node.thaw()
    assert await node.eval("2") == 2


async def test_a_killed_node_ends_its_evaluations_and_can_start_again(beam: Beams) -> None:
    node = await beam.start()
    waiting = asyncio.create_task(node.eval("receive nothing -> ok end"))
    await asyncio.sleep(0)
    await node.kill()
    with pytest.raises(BeamFailure, match=r"ended|not running"):
        await waiting
    await node.start()
    assert await node.eval("node()") is node.atom


async def test_a_taken_name_is_reported_with_the_nodes_words(beam: Beams) -> None:
    node = await beam.start()
    with pytest.raises(BeamFailure, match="in use by another Erlang node"):
        await beam.start(name=node.name)
