"""What the tests of the HTTP interface may ask for beside the common fixtures."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import structlog
from httpx2 import AsyncClient

from app.logs import configure_logging
from tests.api.helpers import FINALIZE, Answers, answer_of, save


@pytest.fixture
async def finalized_id(api: AsyncClient, session_id: str) -> str:
    """Finalize a session with step 1 saved and give its id."""
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    return session_id


LIBRARIES = ["", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"]


class Log:
    """What was logged."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self.stdout = io.TextIOWrapper(self._buffer, write_through=True)
        self._seen = 0

    @property
    def text(self) -> str:
        """Everything, since the beginning."""
        return self._buffer.getvalue().decode()

    def lines(self) -> list[Answers]:
        """Give the lines since the last call."""
        text = self.text[self._seen :]
        self._seen += len(text)
        return [json.loads(line) for line in text.splitlines()]

    def requests(self) -> list[Answers]:
        """Give the lines about requests since the last call."""
        return [line for line in self.lines() if line["event"] == "request_served"]


def forget_bound_loggers() -> None:
    """Let the loggers of the modules ask for their configuration again."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("app.") and hasattr(module, "log"):
            # Where structlog keeps what a logger became when it was first used.
            vars(module.log).pop("bind", None)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Log as the running service does, into memory; afterwards everything is as it was."""
    captured = Log()
    # Not in `sys` itself, where pytest has a stdout of its own for each phase of a test.
    own = SimpleNamespace(**{**vars(sys), "stdout": captured.stdout})
    monkeypatch.setattr("app.logs.sys", own)
    before = structlog.get_config()
    libraries = {name: logging.getLogger(name) for name in LIBRARIES}
    kept = {
        name: (library.handlers[:], library.level, library.propagate)
        for name, library in libraries.items()
    }
    forget_bound_loggers()
    # Not by force: that would close the handlers of whoever runs the tests.
    logging.getLogger().handlers = []
    configure_logging("info", "json")
    yield captured
    for name, (handlers, level, propagate) in kept.items():
        libraries[name].handlers = handlers
        libraries[name].setLevel(level)
        libraries[name].propagate = propagate
    structlog.configure(**before)
    forget_bound_loggers()
