"""Sessions for a contestant, begun and filled through its API."""

import json
from collections.abc import Callable

from tests.bench import wizard
from tests.bench.contestants import KEY, Contestant
from tests.bench.load import Request, Wanted, fetch
from tests.bench.wizard import ANY_LENGTH, Session

AT_ONCE = 1000
"""How many sessions are begun before they are filled."""

CREATE = Request(
    wizard.write("POST", f"{wizard.BASE}/session", wizard.CREATE_BODY, key=KEY),
    Wanted(201, 0, ANY_LENGTH),
)
"""Begin a session, as a machine that may; those that ask nobody do not mind."""

FILLED = Wanted(200, 0, ANY_LENGTH)

Filling = Callable[[Session], list[bytes]]


def step_by_step(session: Session) -> list[bytes]:
    """Save every step, in 23 requests."""
    return [wizard.save(session, step) for step in wizard.BODIES]


def at_once(session: Session) -> list[bytes]:
    """Save every step in one request, which only ours takes."""
    path = wizard.path_of(session, "/steps")
    return [wizard.write("POST", path, wizard.FILL_BODY, token=session.token)]


def first_steps(session: Session) -> list[bytes]:
    """Save three steps, where there is no memory for more."""
    return [wizard.save(session, step) for step in (1, 2, 3)]


def and_finalize(session: Session) -> list[bytes]:
    """Freeze what was saved."""
    return [wizard.write("POST", wizard.path_of(session, "/finalize"), token=session.token)]


async def begin(contestant: Contestant, count: int, *filling: Filling) -> list[Session]:
    """Begin sessions, and fill them one way after the other. Raises RuntimeError when refused."""
    sessions: list[Session] = []
    while len(sessions) < count:
        some = min(AT_ONCE, count - len(sessions))
        begun = [_read(answer.body) for answer in await fetch(contestant.address, [CREATE] * some)]
        for fill in filling:
            # One after the other in each session: some contestants count wrong when they overlap.
            for nth in range(len(fill(begun[0]))):
                requests = (Request(fill(each)[nth], FILLED) for each in begun)
                await fetch(contestant.address, requests)
        sessions += begun
    return sessions


def _read(body: bytes) -> Session:
    answer = json.loads(body)
    return Session(answer["session_id"], answer.get("session_token", wizard.TOKEN))
