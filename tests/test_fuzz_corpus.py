"""Every input that fuzzing kept is read as promised: documented errors only, in time and memory of its size."""

from __future__ import annotations

from random import Random

import pytest

from fuzz import corpus, mutate
from fuzz.targets import TARGETS, BrokenPromise, block, blocks, checked

MUTATIONS = 150


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_and_seeds_keep_every_promise(target: str) -> None:
    inputs = corpus.kept(target)
    assert inputs, f"fuzz/corpus/{target}.hex is empty"
    for data in (*inputs, *corpus.seeds(target)):
        checked(TARGETS[target], data, memory=False)


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_take_memory_of_their_size(target: str) -> None:
    for data in corpus.kept(target)[::3]:
        checked(TARGETS[target], data, memory=True)


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_keep_every_promise(target: str) -> None:
    random = Random(f"mutations of {target}")
    inputs = corpus.seeds(target)
    for _ in range(MUTATIONS):
        data = mutate.MUTATORS[target](random.choice(inputs), random)[:8192]
        inputs.append(data)
        checked(TARGETS[target], data, memory=False)


def test_a_target_that_breaks_a_promise_is_told_from_one_that_does_not() -> None:
    def slow(data: bytes) -> None:
        sum(range(20_000_000))

    def greedy(data: bytes) -> None:
        bytes(100_000_000)

    with pytest.raises(BrokenPromise, match="allowed"):
        checked(slow, b"x", memory=False)
    with pytest.raises(BrokenPromise, match="memory"):
        checked(greedy, b"x", memory=True)


def test_blocks_are_cut_as_they_were_joined() -> None:
    parts = [b"", b"a", bytes(300), b"end"]
    assert list(blocks(b"".join(map(block, parts)))) == parts
