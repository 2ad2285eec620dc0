"""What is compiled (`make compile`), if anything is, is as new as its source."""

from __future__ import annotations

from pathlib import Path

import gater


def test_compiled_modules_are_as_new_as_their_source() -> None:
    for built in Path(str(gater.__file__)).parent.rglob("*.so"):
        source = built.with_name(f"{built.name.partition('.')[0]}.py")
        assert not source.exists() or built.stat().st_mtime >= source.stat().st_mtime, (
            f"{built.name} is old: run `make compile` or `make pure`"
        )
