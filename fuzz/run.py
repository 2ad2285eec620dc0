"""One target under atheris: `python -m fuzz.run SELF TARGET [libFuzzer options] DIRECTORY..`.

Started by `python -m fuzz`. SELF is a program that does the same as `python -m fuzz.run SELF TARGET`: libFuzzer starts
itself again to merge directories of inputs.

Every input is run within its time; every 50th within its memory as well, for measuring that is slow.
"""

from __future__ import annotations

import sys
from random import Random
from typing import Final

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["gater.erl", "gater.swarm", "gater.pubsub", "gater.cluster"]):
    from fuzz import mutate, targets

MEMORY_EVERY: Final = 50


def main() -> None:
    sys.argv[0], name = sys.argv.pop(1), sys.argv.pop(1)
    target, mutator = targets.TARGETS[name], mutate.MUTATORS[name]
    runs = 0

    def one_input(data: bytes) -> None:
        nonlocal runs
        runs += 1
        targets.checked(target, data, memory=runs % MEMORY_EVERY == 0)

    def mutation(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.4:
            return bytes(atheris.Mutate(data, max_size))
        for _ in range(random.choice((1, 1, 2, 4))):
            data = mutator(data, random)
        return data[:max_size]

    atheris.Setup(sys.argv, one_input, custom_mutator=mutation)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
