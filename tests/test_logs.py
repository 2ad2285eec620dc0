"""Log lines: their shape, their level, and what never stands in one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from gater import logs
from gater.erl.terms import Atom
from gater.settings import HIDDEN

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Sets the logs up on a buffer, and leaves structlog and logging as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(level: str = "info", log_format: str = "json") -> io.StringIO:
        out = io.StringIO()
        logs.configure(level, log_format, out)
        return out

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def _lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_json_line_has_its_event_level_time_and_fields(configure: Configure) -> None:
    out = configure()
    structlog.get_logger().warning("peer_refused", node=Atom("a@b"), attempts=3)
    (line,) = _lines(out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "peer_refused", "level": "warning", "node": repr(Atom("a@b")), "attempts": 3}


def test_a_console_line_is_one_line_without_colours_where_no_terminal_is(configure: Configure) -> None:
    out = configure(log_format="console")
    structlog.get_logger().info("node_up", node="a@b")
    assert out.getvalue().endswith("node_up node=a@b\n")
    assert "\x1b" not in out.getvalue()


def test_lines_below_the_level_are_left_out(configure: Configure) -> None:
    out = configure("warning")
    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")
    logging.getLogger("asyncio").info("quiet")
    assert [line["event"] for line in _lines(out)] == ["loud"]


def test_cookies_secrets_and_payloads_never_stand_in_a_line(configure: Configure) -> None:
    out = configure()
    structlog.get_logger().info("event", cookie="c00kie", secret=b"s3cret", data={"card": "4711"}, payload="4711")
    (line,) = _lines(out)
    assert {line[name] for name in ("cookie", "secret", "data", "payload")} == {HIDDEN}
    assert not [text for text in ("c00kie", "s3cret", "4711") if text in out.getvalue()]


def test_a_long_field_is_shortened(configure: Configure) -> None:
    out = configure()
    structlog.get_logger().info("crash", reason=("state", "x" * 1_000_000))
    assert len(out.getvalue()) < 2 * logs.MAX_FIELD_CHARACTERS


def test_logging_of_other_libraries_comes_out_in_the_same_shape_with_its_traceback(configure: Configure) -> None:
    out = configure()
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("asyncio").exception("Task exception was never %s", "retrieved")
    (line,) = _lines(out)
    assert (line["event"], line["logger"], line["level"]) == (
        "Task exception was never retrieved",
        "asyncio",
        "error",
    )
    assert "ValueError: broken" in line["exception"]
