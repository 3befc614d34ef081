"""What a request costs, counted and not timed, so that it is the same on any machine.

`python -m tests.costs` counts and prints the table that `tests/test_costs.py` holds the service to.
"""

import asyncio
import gc
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import uvloop

from app.logs import configure_logging
from app.main import create_app
from tests.access import AUTH, bearer, user
from tests.conftest import known_settings
from tests.connection import Answer, Connection
from tests.faults.proxy import OPENING, Proxy
from tests.faults.servers import HOST, Valkey
from tests.service import BASE, serving_app


class Cost(NamedTuple):
    """What one request costs.

    `commands` go to the store, `sent` and `received` are bytes of them and of its replies.
    `instructions` of Python are carried out in `calls` of Python functions, in all that runs from
    the bytes of the request to those of the answer.
    """

    commands: int
    sent: int
    received: int
    instructions: int
    calls: int


ROUNDS = 5
"""How often what leaves no doubt is looked at."""

SEEN = 3
"""How often the least number of instructions has to be seen: what goes on beside the requests, all
the more on a busy machine, happens to meet the one or other of them."""

MOST_ROUNDS = 60
"""How often a request is sent to see that."""

WARM = 3
"""How often it is sent before, for what is done once and then remembered."""

LOOKED_AT = 30
"""Requests of a round after which garbage is looked for."""

ANSWERS = b'{"data":{"answer":"%b","n":1}}' % (b"x" * 950)
"""The body of a step, of a usual size."""

NOT_OURS = ("asyncio/streams.py", "/tests/")
"""Where the code lies that sends the requests."""

BESIDE_REQUESTS = {"EVAL", "AUDIT", "HKEYS", "INFO", *OPENING}
"""What is sent to the store by others: who asks how it is, what is in use, who keeps the record."""


class Wizard:
    """Somebody with a session of which one step is unsaved, and their connection to the service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._target = ""
        self._shown: dict[str, str] = {}

    async def begin(self, *, finalized: bool = False) -> None:
        """Begin a session with all steps but the last."""
        made = await self._connection.ask(
            "POST", f"{BASE}/session", user(), b'{"workspace_id":"w"}'
        )
        self._target = f"{BASE}/{made.json['session_id']}"
        self._shown = bearer(made.json["session_token"])
        for number in range(1, 23):
            await self.ask("POST", f"/steps/{number}", ANSWERS)
        if finalized:
            await self.ask("POST", "/finalize", b"{}")

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Send a request, and give its answer, which says that it was done."""
        answer = await self._connection.ask(method, self._target + path, self._shown, body)
        assert answer.status == 200, answer
        return answer


class Request(NamedTuple):
    """A request that wizards send all day; one that saves a new step needs a session each time."""

    method: str
    path: str
    body: bytes = b""
    is_once: bool = False


REQUESTS = {
    "save a step over another": Request("POST", "/steps/4", ANSWERS),
    "save a new step": Request("POST", "/steps/23", ANSWERS, is_once=True),
    "read a step": Request("GET", "/steps/4"),
    "read the progress": Request("GET", "/progress"),
    "summarize": Request("GET", "/summary"),
    "read the export": Request("GET", "/export"),
}


class Work:
    """Counts instructions and calls of Python in a block, but those of who asks."""

    def __init__(self) -> None:
        self.instructions = 0
        self.calls = 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever traced before goes on.
        sys.settrace(self._before)

    def _begin(self, frame: FrameType, _: str, __: Any) -> Any:
        if any(each in frame.f_code.co_filename for each in NOT_OURS):
            return None
        self.calls += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._go_on

    def _go_on(self, _: FrameType, event: str, __: Any) -> Any:
        self.instructions += event == "opcode"
        return self._go_on


@asynccontextmanager
async def _wizard(url: str) -> AsyncIterator[Wizard]:
    """Serve with all that costs something."""
    settings = known_settings(
        **AUTH, redis_url=url, redis_timeout_s=10, rate_limit="1000000/day", create_limit=None
    )
    async with (
        serving_app(create_app(settings)) as api,
        Connection.open(api, limit_s=100) as connection,
    ):
        yield Wizard(connection)


async def _count_work(url: str) -> dict[str, tuple[int, int]]:
    """Count instructions and calls of each request."""
    found = {}
    async with _wizard(url) as wizard:
        for name, request in REQUESTS.items():
            counted: Counter[tuple[int, int]] = Counter()
            for number in range(MOST_ROUNDS):
                await _prepare(wizard, request, number)
                with Work() as work:
                    await wizard.ask(*request[:3])
                counted[work.instructions, work.calls] += number >= WARM
                if number >= WARM and counted[min(+counted)] == SEEN:
                    break
            found[name] = min(+counted)
    return found


async def _count_on_the_wire(store: Valkey) -> dict[str, tuple[int, int, int]]:
    """Count commands and bytes of each request."""
    found = {}
    async with Proxy(store.port) as proxy, _wizard(f"redis://{HOST}:{proxy.port}/0") as wizard:
        told = proxy.commands, proxy.sent_bytes, proxy.answered_bytes
        for name, request in REQUESTS.items():
            counted = []
            for number in range(WARM + ROUNDS):
                await _prepare(wizard, request, number)
                before = [_of_requests(each) for each in told]
                await wizard.ask(*request[:3])
                after = [_of_requests(each) for each in told]
                commands, sent, received = (
                    now - then for now, then in zip(after, before, strict=True)
                )
                counted.append((commands, sent, received))
            found[name] = min(counted[WARM:])
    return found


def _of_requests(told: Counter[str]) -> int:
    return sum(count for word, count in told.items() if word not in BESIDE_REQUESTS)


async def _prepare(wizard: Wizard, request: Request, number: int) -> None:
    """Begin a session for a request that is sent for the n-th time, if that needs one."""
    if request.is_once or number == 0:
        await wizard.begin(finalized=request.path == "/export")


async def _count_garbage(url: str) -> dict[str, int]:
    """Count what a round of each request leaves behind for the garbage collector."""
    found = {}
    async with _wizard(url) as wizard:
        for name, request in REQUESTS.items():
            if request.is_once:
                continue
            await wizard.begin(finalized=request.path == "/export")
            await wizard.ask(*request[:3])
            left = []
            for _ in range(ROUNDS):
                with _without_collection():
                    for _ in range(LOOKED_AT):
                        await wizard.ask(*request[:3])
                    gc.set_debug(gc.DEBUG_SAVEALL)
                    gc.collect()
                    left.append(len(gc.garbage))
            found[name] = min(left)
    return found


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


class Counted(NamedTuple):
    """What was counted: the cost of each request, and what a round of each leaves behind."""

    costs: dict[str, Cost]
    garbage: dict[str, int]


async def _count(store: Valkey) -> Counted:
    wire = await _count_on_the_wire(store)
    work = await _count_work(store.url)
    costs = {name: Cost(*wire[name], *work[name]) for name in REQUESTS}
    return Counted(costs, await _count_garbage(store.url))


def count() -> Counted:
    """Count in this process, on a store of its own, as the service runs."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Valkey.start(Path(directory)) as store,
        # The loop that the service runs on.
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_count(store))


def main() -> None:
    """Count, and print the table; as JSON with `--json`."""
    out = sys.stdout
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = nowhere
        configure_logging("info", "json")
        counted = count()
        sys.stdout = out
    if "--json" in sys.argv:
        out.write(json.dumps(counted))
        return
    for name, cost in counted.costs.items():
        out.write(f'    "{name}": Cost{tuple(cost)},\n')


if __name__ == "__main__":
    main()
