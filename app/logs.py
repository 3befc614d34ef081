"""Logging: one event a line on stdout, as JSON or, on a terminal, for people.

Events are named in the past tense in snake_case. A line never holds an answer, a secret or an
address: what other libraries say is reduced to who said it, since nobody knows what is in it.

Lines of one turn of an event loop are written together at its end, for to write one takes longer
than to make it. A warning, and what is worse, is written at once with all before it, and so is
everything where no loop runs. A process that is killed by SIGKILL loses the lines of its last turn.
"""

import asyncio
import atexit
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from app.clock import now_ms, rfc3339
from app.context import get_context

_WORDY = ("uvicorn",)
"""Libraries whose messages are known to hold no address and no content."""


def configure_logging(level: str, style: Literal["json", "console"] | None) -> None:
    """Send every event of `level` and above to stdout; without a style, terminals get `console`."""
    style = style or ("console" if sys.stdout.isatty() else "json")
    threshold = logging.getLevelNamesMapping()[level.upper()]
    processors: list[Any] = [render_json]
    if style == "console":
        processors = [add_context, structlog.dev.ConsoleRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=_logger_class(threshold),
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


def add_context(_: WrappedLogger, level: str, event: EventDict) -> EventDict:
    """Put what every line has first: time, level, event, request."""
    context = get_context()
    line: EventDict = {"timestamp": rfc3339(now_ms()), "level": level, "event": event["event"]}
    if context is not None:
        line["request_id"] = context.request_id
        if context.session_id is not None:
            line["session_id"] = context.session_id
    # What it begins with stands first, wherever the event has it.
    line.update(event)
    return line


def render_json(logger: WrappedLogger, level: str, event: EventDict) -> bytes:
    """Write a line as JSON; what JSON does not know is written as its type's name."""
    line = add_context(logger, level, event)
    return orjson.dumps(line, default=_name_type)


def _name_type(value: object) -> str:
    return type(value).__name__


def _logger_class(threshold: int) -> type[FilteringBoundLogger]:
    """Make what `structlog.get_logger` gives: the library's own, with shorter ways of telling.

    Its own look at positional arguments and at what was bound to a logger, neither of which we use,
    takes 3 of 5 us for a line. What is below the threshold does nothing.
    """
    own = structlog.make_filtering_bound_logger(threshold)
    levels = {
        name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error")
    }
    ways = {name: _teller(name) for name, level in levels.items() if level >= threshold}
    return type("Logger", (own,), ways)


def _teller(level: str) -> Callable[..., None]:
    def tell(self: Any, event: str, **fields: Any) -> None:
        fields["event"] = event
        line: Any = fields
        try:
            for process in self._processors:
                line = process(self._logger, level, line)
        except structlog.DropEvent:
            return
        getattr(self._logger, level)(line)

    return tell


def _logger_factory(style: str) -> Callable[..., WrappedLogger]:
    console = style == "console"
    lines = _Lines(sys.stdout, "\n") if console else _Lines(sys.stdout.buffer, b"\n")
    atexit.register(lines.flush)
    return lambda *_: lines


class _Lines:
    """Gathers lines, and writes them.

    A log that cannot be written must not stop the service that writes it.
    """

    def __init__(self, stream: Any, end: str | bytes) -> None:
        self._stream = stream
        self._end = end
        self._waiting: list[Any] = []
        self._flushing_in: asyncio.AbstractEventLoop | None = None

    def info(self, line: Any) -> None:
        """Write a line with the others of this turn of the loop."""
        self._waiting.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self._flushing_in is not loop:
            # One that was stopped before it came to that is not waited for.
            self._flushing_in = loop
            loop.call_soon(self.flush)

    def warning(self, line: Any) -> None:
        """Write a line, and all before it."""
        self._waiting.append(line)
        self.flush()

    debug = info
    error = critical = warning

    def flush(self) -> None:
        """Write what waits."""
        self._flushing_in = None
        lines, self._waiting = self._waiting, []
        if not lines:
            return
        try:
            lines.append(self._end[:0])
            self._stream.write(self._end.join(lines))
            self._stream.flush()
        except (OSError, ValueError):
            # The disk is full, or nobody reads: there is nowhere left to say so.
            return


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
