"""Logging: one event a line on stdout, as JSON or, on a terminal, for people.

Events are named in the past tense in snake_case. A line never holds an answer, a secret or an
address: what other libraries say is reduced to who said it, since nobody knows what is in it.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from app.clock import now_ms, rfc3339
from app.context import get_context

_WORDY = ("uvicorn",)
"""Libraries whose messages are known to hold no address and no content."""


def configure_logging(level: str, style: Literal["json", "console"] | None) -> None:
    """Send every event of `level` and above to stdout; without a style, terminals get `console`."""
    style = style or ("console" if sys.stdout.isatty() else "json")
    threshold = logging.getLevelNamesMapping()[level.upper()]
    render: list[Any] = [orjson_renderer]
    if style == "console":
        render = [structlog.dev.ConsoleRenderer()]
    structlog.configure(
        processors=[structlog.processors.add_log_level, add_context, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_logger_factory(style),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Bridge()], level=logging.WARNING, force=True)
    # It warns of every form that a client got wrong.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
        library.setLevel(logging.WARNING)


def add_context(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Put what every line has first: time, level, event, request."""
    context = get_context()
    line: dict[str, Any] = {
        "timestamp": rfc3339(now_ms()),
        "level": event.pop("level"),
        "event": event.pop("event"),
    }
    if context is not None:
        line["request_id"] = context.request_id
        if context.session_id is not None:
            line["session_id"] = context.session_id
    return {**line, **event}


def orjson_renderer(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    """Write a line as JSON; what JSON does not know is written as its type's name."""
    return orjson.dumps(event, default=lambda value: type(value).__name__)


def _logger_factory(style: str) -> Callable[..., WrappedLogger]:
    console = style == "console"
    logger = _LineLogger(sys.stdout, "\n") if console else _LineLogger(sys.stdout.buffer, b"\n")
    return lambda *_: logger


class _LineLogger:
    """Writes lines; a log that cannot be written must not stop the service that writes it."""

    def __init__(self, stream: Any, end: str | bytes) -> None:
        self._stream = stream
        self._end = end

    def msg(self, line: Any) -> None:
        try:
            self._stream.write(line + self._end)
            self._stream.flush()
        except (OSError, ValueError):
            # The disk is full, or nobody reads: there is nowhere left to say so.
            return

    log = debug = info = warn = warning = error = critical = exception = fatal = msg


class _Bridge(logging.Handler):
    """Turns what libraries log through the standard library into events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        # One line: what follows is a stack, whose values nobody has looked through.
        message = record.getMessage().partition("\n")[0]
        said = message if record.name.startswith(_WORDY) else None
        failure = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        fields = {"logger": record.name, "message": said, "exception": failure}
        structlog.get_logger().log(
            record.levelno,
            "library_message_logged",
            **{name: value for name, value in fields.items() if value is not None},
        )
