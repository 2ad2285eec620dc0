"""The bench runs, and prints every row; what the figures are is no test's business."""

import itertools
import sys
from pathlib import Path
from subprocess import run

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 180


def test_a_quick_bench_prints_and_writes_every_row(tmp_path):
    page = tmp_path / "benchmarks.md"
    done = run(
        [sys.executable, "-m", "bench", "--quick", "--write", str(page)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert page.read_text().strip() == done.stdout.strip()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in done.stdout.splitlines() if "|" in line}
    sizes = [f"{size}, {callers}" for size in ("10 B", "10 KB", "1 MB") for callers in (1, 64)]
    requests = [f"{request}, {callers}" for request in ("get_version", "append of one event") for callers in (1, 64)]
    assert rows >= {
        *itertools.product(sizes, ("BEAM", "gater, uvloop", "gater, asyncio")),
        *itertools.product(
            ("1 event, idle", "1,000 events/s offered", "1 subscriber, replay"), ("store node", "embedded store")
        ),
        ("on the store node, 100 streams", "store node"),
        *itertools.product(requests, ("store node, direct", "through gater", "gater's embedded store")),
    }
    if "not compiled" not in done.stderr:
        assert rows >= {
            *itertools.product(sizes, ("gater, compiled",)),
            *itertools.product(requests, ("through gater, compiled",)),
            *itertools.product(("1 event, idle", "1 subscriber, replay"), ("store node, gater compiled",)),
        }
    first_cells = {first for first, _ in rows}
    codecs = {"BEAM", "gater", "erlang_py", "erlpack (C)", "marshal (C, not a term format)"}
    assert first_cells >= codecs | {"10", "1,000", "load averages before the run", "Erlang/OTP", "gater, uvloop"}
    assert str(ROOT) not in done.stdout
