"""Structured logs on standard error, for everything that is not per flow. Field values that could be secrets are dropped."""

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

_FORBIDDEN = ("token", "authorization", "handle", "secret", "password", "assertion", "cookie", "svid")


def _redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The last filter: a field whose name speaks of a secret never gets out, whoever wrote the call."""
    for key in event:
        if key not in ("event", "level") and any(word in key.lower() for word in _FORBIDDEN):
            event[key] = "****"
    return event


class _Lines:
    """Standard error, as it was at the start. A line that cannot be written (its reader has gone) is lost: work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line)
            self._stream.flush()

    def flush(self) -> None:
        """Each line is flushed as it is written."""


def configure(level: str, fmt: str) -> None:
    """Sets logging up, once, at start. Tracebacks never show local variables."""
    render: Any = structlog.processors.JSONRenderer()
    traceback: Any = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    if fmt == "console":
        render = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        traceback = structlog.processors.StackInfoRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redact,
            traceback,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _Lines(sys.stderr))),
        cache_logger_on_first_use=False,
    )


def logger(name: str) -> Any:
    """A logger that says which part speaks."""
    return structlog.get_logger(part=name)
