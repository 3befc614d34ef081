"""What wizards and generators send, and what must come back; the same bytes to every contestant."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.bench.load import Address, Request, Wanted, fetch

BASE = "/api/v1/onboarding"

STEPS = 23
"""How many steps a session has."""

BODY_BYTES = 1024
"""How long the body of a save is."""

ANY_LENGTH = 2**40

TOKEN = "x" * 43
"""What is sent as a token to those who ask for none, so that everybody reads the same headers."""

SAMPLE = 4096
"""Most requests that one measurement goes round: 5 MB."""


class Session(NamedTuple):
    """A session and the token that opens it."""

    session_id: str
    token: str = TOKEN


def write(
    method: str, path: str, body: bytes = b"", *, token: str = TOKEN, key: str | None = None
) -> bytes:
    """Write a request as a frontend sends it, with a token, or with the key of a machine."""
    shown = f"Authorization: Bearer {token}" if key is None else f"X-API-Key: {key}"
    head = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "User-Agent: bench",
        "Accept: application/json",
        shown,
    ]
    if method != "GET":
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def answers(step: int) -> dict[str, Any]:
    """Make the answers of a step, such that the body of its save has `BODY_BYTES` bytes."""
    data: dict[str, Any] = {
        "company": "Müller & Søn, Zürich",
        "step": step,
        "confidence": 0.75,
        "sources": ["crm", "interviews", "web"],
        "market": {"size": 1_250_000, "region": ["EU", "CH"], "grows": True, "rival": None},
        "summary": "",
    }
    words = "who buys it first, and why they would not wait for the next one; "
    data["summary"] = (words * 16)[: BODY_BYTES - len(save_body(data))]
    return data


def save_body(data: dict[str, Any]) -> bytes:
    """Write the body of a save."""
    return as_json({"data": data})


def as_json(value: Any) -> bytes:
    """Write JSON without a byte too many, as browsers do."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


BODIES = {step: save_body(answers(step)) for step in range(1, STEPS + 1)}
CREATE_BODY = as_json({"workspace_id": "w1", "user_id": "u1"})
FILL_BODY = as_json({"steps": {step: answers(step) for step in BODIES}})
EVENT_BODY = as_json({"stage": "manifest", "progress": 40, "message": "Section 4"})


def path_of(session: Session, rest: str = "") -> str:
    return f"{BASE}/{session.session_id}{rest}"


def save(session: Session, step: int) -> bytes:
    return write("POST", path_of(session, f"/steps/{step}"), BODIES[step], token=session.token)


def get(session: Session, step: int) -> bytes:
    return write("GET", path_of(session, f"/steps/{step}"), token=session.token)


def read(session: Session, what: str) -> bytes:
    return write("GET", path_of(session, f"/{what}"), token=session.token)


def everywhere(sessions: list[Session], seed: int = 1) -> Iterator[tuple[Session, int]]:
    """Go over steps of sessions without an order: all of them, or as many as are asked for."""
    chance = random.Random(seed)
    if len(sessions) * STEPS <= SAMPLE:
        pairs = [(session, step) for session in sessions for step in BODIES]
        chance.shuffle(pairs)
        yield from pairs
        return
    for _ in range(SAMPLE):
        yield chance.choice(sessions), chance.randint(1, STEPS)


@dataclass(frozen=True)
class Operation:
    """One call of a service: what is sent, and how its answer is known to be right.

    `check` looks at a whole answer. `slack` is how many bytes another right answer may be shorter
    or longer: numbers in it grow.
    """

    name: str
    sent: list[bytes]
    check: Callable[[Any], bool]
    status: int = 200
    slack: int = 0

    async def learn(self, address: Address) -> list[Request]:
        """Look at the first and the last answer, and give the requests with what is wanted.

        Raises RuntimeError when an answer is not right.
        """
        ends = [
            Request(sent, Wanted(self.status, 0, ANY_LENGTH))
            for sent in (self.sent[0], self.sent[-1])
        ]
        found = [answer.body for answer in await fetch(address, ends, 1)]
        for body in found:
            if not self.check(json.loads(body)):
                raise RuntimeError(f"{self.name} answered {body[:500]!r}")
        lengths = [len(body) for body in found]
        wanted = Wanted(self.status, min(lengths) - self.slack, max(lengths) + self.slack)
        return [Request(sent, wanted) for sent in self.sent]


def of_a_wizard(sessions: list[Session]) -> list[Operation]:
    """The calls that every contestant with a store has, over sessions that are full."""
    pairs = list(everywhere(sessions))
    ids = {session.session_id for session in sessions}

    def is_saved(answer: Any) -> bool:
        return answer["success"] is True and is_full(answer)

    def is_full(answer: Any) -> bool:
        return answer["session_id"] in ids and answer["progress"]["completed"] == STEPS

    def is_step(answer: Any) -> bool:
        return answer["session_id"] in ids and answer["data"] == answers(answer["step_id"])

    def is_summary(answer: Any) -> bool:
        saved = [step for step in answer["steps"] if step["saved_at"]]
        return is_full(answer) and len(saved) == STEPS and "data" not in saved[0]

    return [
        # Versions grow by some digits, percentages and times keep their length.
        Operation("save", [save(*pair) for pair in pairs], is_saved, slack=8),
        Operation("get", [get(*pair) for pair in pairs], is_step, slack=8),
        Operation("progress", [read(each, "progress") for each in sessions], is_full, slack=2),
        Operation("summary", [read(each, "summary") for each in sessions], is_summary, slack=200),
    ]
