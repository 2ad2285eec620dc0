"""Structured logs: one event name and its fields a line, on standard error.

`configure` is called once, by the command line, before anything logs; libraries that use Python's own `logging`
(asyncio above all) come out in the same shape. Whoever embeds the node or the client sets up structlog as they like.
Never a cookie, a secret or event payload: fields with such names are hidden whatever they hold.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from gater.settings import HIDDEN

SECRET_FIELDS: Final = frozenset({"cookie", "secret", "secret_key_base", "password", "payload", "data"})
"""Names of fields that are never shown. `data` and `payload` are what an event carries."""

MAX_FIELD_CHARACTERS: Final = 2_000
"""Of one field's text. A crash reason may hold a peer's whole state; a log line that long helps nobody."""


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Makes structlog and `logging` write lines of at least `level` to `stream` (standard error).

    `log_format` is `console` (for people, coloured on a terminal) or `json` (one object a line, for machines).
    """
    out = sys.stderr if stream is None else stream
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            hide_secrets,
            *_renderers(log_format, out),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(max(threshold, logging.INFO))


def hide_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor that hides the fields named in `SECRET_FIELDS` and shortens long text."""
    for key, value in event.items():
        if key in SECRET_FIELDS:
            event[key] = HIDDEN
        elif not isinstance(value, (int, float, bool, type(None))) and key not in ("exc_info", "exception"):
            text = value if isinstance(value, str) else repr(value)
            event[key] = text if len(text) <= MAX_FIELD_CHARACTERS else text[:MAX_FIELD_CHARACTERS] + "..."
    return event


def _renderers(log_format: str, out: TextIO) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [
        structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    ]


class _ToStructlog(logging.Handler):
    """Sends the records of `logging` through structlog, with the logger's name as a field."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        structlog.get_logger().log(record.levelno, record.getMessage(), **fields)
