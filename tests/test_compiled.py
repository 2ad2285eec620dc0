"""The codec that runs, if it is a compiled one (`make compile`), is as new as its source."""

from __future__ import annotations

from pathlib import Path

from gater.erl import dist_header, etf, phash2


def test_compiled_modules_are_as_new_as_their_source() -> None:
    for module in (dist_header, etf, phash2):
        used = Path(str(module.__file__))
        source = used.with_name(f"{used.name.partition('.')[0]}.py")
        assert used.stat().st_mtime >= source.stat().st_mtime, f"{used} is old: run `make compile` or `make pure`"
