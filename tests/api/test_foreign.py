"""What a session of somebody else answers, where it could differ from one that is not there."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.clock import now_ms
from app.onboarding.access import Scope
from app.services.access import KEPT_MS
from tests.access import API_KEYS, AUTH, Headers, bearer, machine, user
from tests.api.conftest import Log
from tests.api.helpers import (
    ADD_EVENT,
    BATCH,
    DELETE_STEP,
    FINALIZE,
    JSON,
    PATCH,
    PROMOTE,
    PUT_DRAFT,
    PUT_RESULT,
    REOPEN,
    SAVE,
    SET_LANGUAGE,
    SET_STATUS,
    Call,
    answer_of,
    dump,
    exchange,
    keys_of,
    problem_of,
    unknown_id,
)
from tests.api.test_access import told
from tests.service import BASE

SESSION = BASE + "/{id}"
STEP = SESSION + "/steps/1"
RESULT = SESSION + "/result"
EVENT_ID = "an-event"

STRANGERS = ["another user", "another workspace", "another session's token"]

LARGE = b"x" * 1_500_000
"""A body that is kept in parts."""


class Place(NamedTuple):
    """A service with access control on, and a session on it: of user u1, with all it can have."""

    api: AsyncClient
    session_id: str
    token: str
    strangers: dict[str, Headers]


@pytest.fixture
async def place(log: Log, serve: Callable[..., Any]) -> Place:
    api = await serve(**AUTH, max_result_bytes=2_000_000)

    async def create(shown: Headers) -> dict[str, Any]:
        body = {"workspace_id": "w1"}
        return answer_of(await api.post(f"{BASE}/session", json=body, headers=shown), 201)

    made, other = await create(user()), await create(user("u2"))
    own = bearer(made["session_token"])
    event = {"stage": "s", "progress": 1, "event_id": EVENT_ID}
    for call in (
        *(SAVE, FINALIZE, PUT_RESULT, REOPEN, PUT_DRAFT),
        Call("POST", SESSION + "/events", event),
    ):
        assert (await call.send(api, made["session_id"], **own)).is_success, call
    credentials = (user("u2"), user(workspace_id="w2"), bearer(other["session_token"]))
    strangers = dict(zip(STRANGERS, credentials, strict=True))
    for shown in (user(), *strangers.values()):
        # From now on they are known, and looking them up costs nothing.
        answer_of(await api.get(f"{BASE}/steps", headers=shown))
    return Place(api, made["session_id"], made["session_token"], strangers)


async def look(place: Place, shown: Headers) -> Response:
    return await place.api.get(f"{BASE}/{place.session_id}", headers=shown)


# --- Requests of every kind -----------------------------------------------------------------------


class Sent(NamedTuple):
    """A request about a session, and what it is refused with when there is none."""

    method: str
    target: str
    content: bytes = b""
    headers: Headers = {}  # noqa: RUF012 - never changed
    code: str = "session_not_found"

    async def send(self, api: AsyncClient, session_id: str, shown: Headers) -> Response:
        """Send it about a session as somebody."""
        return await api.request(
            self.method,
            self.target.replace("{id}", session_id),
            content=self.content or None,
            headers={**self.headers, **shown, "x-request-id": "r"},
        )


def sent_json(method: str, target: str, body: Any, code: str = "session_not_found") -> Sent:
    return Sent(method, target, json.dumps(body).encode(), JSON, code)


DATA = b'{"data":{"a":1}}'

REQUESTS = {
    # Only the head of an answer.
    **{
        f"HEAD {path}": Sent("HEAD", SESSION + path)
        for path in ("", "/steps/1", "/steps/1/draft", "/export", "/result", "/events/stream")
    },
    # What would be unchanged, or changed only in one version.
    **{
        f"{path} unless it is the same": Sent("GET", SESSION + path, headers={"if-none-match": "*"})
        for path in ("/steps/1", "/export", "/result", "/upload")
    },
    "a step of this version": Sent("PUT", STEP, DATA, {**JSON, "if-match": '"1"'}),
    "a step of another version": Sent("PUT", STEP, DATA, {**JSON, "if-match": '"9"'}),
    "a step that is new": Sent("PUT", STEP, DATA, {**JSON, "if-none-match": "*"}),
    "a patch of this version": Sent("PATCH", STEP, b'{"b":1}', {**JSON, "if-match": '"1"'}),
    "a step of this version, away": Sent("DELETE", STEP, headers={"if-match": '"1"'}),
    "a draft, promoted": Sent("POST", STEP + "/draft/promote"),
    "a draft, promoted over a version": Sent(
        "POST", STEP + "/draft/promote", headers={"if-match": '"9"'}
    ),
    "a draft that there is": Sent("DELETE", STEP + "/draft"),
    "a draft that there is not": Sent("GET", SESSION + "/steps/2/draft"),
    "several steps": sent_json("POST", SESSION + "/steps", {"steps": {"1": {"a": 1}}}),
    # What is wrong before the session is looked for.
    "a step that is none": Sent("GET", SESSION + "/steps/24", code="invalid_step_id"),
    "no tag": Sent("PUT", STEP, DATA, {**JSON, "if-match": "x"}, "invalid_header"),
    "no key": Sent(
        "PUT", STEP, DATA, {**JSON, "idempotency-key": "a b"}, "invalid_idempotency_key"
    ),
    "no JSON": Sent("POST", STEP, b"{", JSON, "malformed_json"),
    "no JSON type": Sent("POST", STEP, DATA, {"content-type": "a/b"}, "unsupported_media_type"),
    "too much JSON": Sent("POST", STEP, b" " * 300_000, JSON, "payload_too_large"),
    "a number too large": Sent("POST", STEP, b'{"data":{"a":1e999}}', JSON, "invalid_step_data"),
    "a token id that is none": Sent(
        "DELETE", SESSION + "/resume-tokens/x", code="resume_token_not_found"
    ),
    # What is wrong with what an operation asks for.
    "answers of the wrong type": sent_json("POST", STEP, {"data": []}),
    "steps that are none": sent_json("POST", SESSION + "/steps", {"steps": {"24": {"a": 1}}}),
    "a patch of the wrong type": sent_json("PATCH", STEP, [], "invalid_step_data"),
    "finalize, with no boolean": sent_json("POST", SESSION + "/finalize", {"force": 1}),
    "a status that is none": sent_json("PUT", SESSION + "/status", {"status": "x"}),
    "a language that is none": sent_json("PUT", SESSION + "/language", {"language": "x y"}),
    "a question that is none": sent_json("POST", SESSION + "/ask", {"question": ""}),
    "a label too long": sent_json("POST", SESSION + "/resume-tokens", {"label": "x" * 101}),
    "no events": Sent("GET", SESSION + "/events?limit=0"),
    "events after what is none": Sent("GET", SESSION + "/events?after=x"),
    # What is streamed, either way.
    "a report again": sent_json(
        "POST", SESSION + "/events", {"stage": "s", "progress": 1, "event_id": EVENT_ID}
    ),
    "the stream": Sent("GET", SESSION + "/events/stream"),
    "the stream, gone on with": Sent(
        "GET", SESSION + "/events/stream", headers={"last-event-id": "1-1"}
    ),
    "the stream, after what is none": Sent(
        "GET", SESSION + "/events/stream", headers={"last-event-id": "x"}
    ),
    "an answer read along": sent_json("POST", SESSION + "/ask-stream", {"question": "?"}),
    "no answer read along": sent_json("POST", SESSION + "/ask-stream", {"question": ""}),
    "a result in parts": Sent("PUT", RESULT, LARGE),
    "a result of a run": Sent("PUT", RESULT + "?run=r1", b"x"),
    "a result of no type": Sent("PUT", RESULT, b"x", {"content-type": "no type"}),
    "a result with no name": Sent("PUT", RESULT, b"x", {"content-disposition": "x;;"}),
    "a result in a coding": Sent(
        "PUT", RESULT, b"x", {"content-encoding": "gzip"}, "unsupported_media_type"
    ),
    "a result too large": Sent("PUT", RESULT, b"x" * 2_000_001, code="payload_too_large"),
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_foreign_session_is_answered_as_an_unknown_one_at_the_same_cost(
    who: str, place: Place, log: Log, raw: Redis
) -> None:
    shown = place.strangers[who]
    before = await dump(raw)
    # Whose the session is, the service knows from its owner by now.
    answer_of(await look(place, user()))
    log.lines()
    for name, sent in REQUESTS.items():
        foreign = await sent.send(place.api, place.session_id, shown)
        unknown = await sent.send(place.api, other := unknown_id(), shown)
        assert told(foreign, place.session_id) == told(unknown, other), name
        if sent.method != "HEAD":
            problem_of(foreign, sent.code)
        of_foreign, of_unknown = log.requests()
        assert of_foreign["redis_commands"] == of_unknown["redis_commands"], name
    assert await dump(raw) == before


async def test_an_id_in_another_spelling_is_nobodys(place: Place) -> None:
    for spelling in (place.session_id.upper(), place.session_id + "%0a", f"%7b{place.session_id}"):
        for shown in (user(), bearer(place.token), machine(Scope.SESSIONS)):
            answer = await place.api.get(f"{BASE}/{spelling}", headers=shown)
            problem_of(answer, "session_not_found")


# --- Replays --------------------------------------------------------------------------------------

KEYED: list[Call] = [
    *(SAVE, PATCH, BATCH, PUT_DRAFT, PROMOTE, DELETE_STEP, FINALIZE),
    *(SET_STATUS, ADD_EVENT, SET_LANGUAGE, PUT_RESULT),
]


async def test_nobody_else_is_told_the_first_answer_again(place: Place, raw: Redis) -> None:
    for call in KEYED:
        first = await call.send(place.api, place.session_id, idempotency_key="k", **user())
        assert first.is_success, first.text
        before = await dump(raw)
        for shown in place.strangers.values():
            keyed = {**shown, "idempotency_key": "k"}
            foreign = await call.send(place.api, place.session_id, **keyed)
            unknown = await call.send(place.api, other := unknown_id(), **keyed)
            problem_of(foreign, "session_not_found")
            assert told(foreign, place.session_id) == told(unknown, other)
        assert await dump(raw) == before
        again = await call.send(place.api, place.session_id, idempotency_key="k", **user())
        assert again.headers["idempotent-replayed"] == "true"
        assert again.content == first.content


async def test_the_same_key_of_somebody_else_begins_another_session(place: Place) -> None:
    callers = [user(), user("u2"), user(workspace_id="w2"), machine(Scope.SESSIONS)]
    create = Call("POST", f"{BASE}/session", {"workspace_id": "w1", "user_id": "u1"})
    made: dict[str, int] = {}
    for number, shown in enumerate(callers):
        first = await create.send(place.api, idempotency_key="k", **shown)
        assert "idempotent-replayed" not in first.headers
        made[answer_of(first, 201)["session_id"]] = number
    assert len(made) == len(callers)
    for number, shown in enumerate(callers):
        again = await create.send(place.api, idempotency_key="k", **shown)
        assert again.headers["idempotent-replayed"] == "true"
        assert made[answer_of(again, 201)["session_id"]] == number


# --- Tokens that were good ------------------------------------------------------------------------


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time pass in which a service remembers what it verified."""
    monkeypatch.setattr("app.services.access.now_ms", lambda: now_ms() + KEPT_MS)


async def test_the_token_of_a_deleted_session_opens_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bearer(place.token)
    answer_of(await place.api.delete(f"{BASE}/{place.session_id}", headers=own))
    problem_of(await look(place, own), "session_not_found")
    forget(monkeypatch)
    problem_of(await look(place, own), "unauthenticated")


async def test_the_token_of_an_expired_session_opens_nothing(
    place: Place, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bearer(place.token)
    for key in await keys_of(raw, place.session_id):
        await raw.pexpire(key, 1)
    async with asyncio.timeout(5):
        while await keys_of(raw, place.session_id):
            pass
    problem_of(await look(place, own), "session_not_found")
    forget(monkeypatch)
    problem_of(await look(place, own), "unauthenticated")


async def test_what_a_revoked_resume_token_gave_is_worth_nothing(place: Place) -> None:
    own, tokens = bearer(place.token), f"{BASE}/{place.session_id}/resume-tokens"
    made = answer_of(await place.api.post(tokens, headers=own), 201)
    resumed = await place.api.post(f"{BASE}/resume", json={"token": made["token"]})
    given = bearer(answer_of(resumed)["session_token"])
    answer_of(await look(place, given))
    answer_of(await place.api.delete(f"{tokens}/{made['token_id']}", headers=given))
    # The process that revoked it knows at once; others remember for a while what they verified.
    problem_of(await look(place, given), "unauthenticated")
    assert KEPT_MS <= 10_000
    answer_of(await look(place, own))


async def test_a_token_with_any_other_character_is_none(place: Place) -> None:
    token = place.token
    spellings = {
        token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        for at in range(len(token))
    }
    spellings |= {token[:-1], token + "A", token + "=", token.swapcase(), f"ort_{token[4:]}"}
    assert len(spellings) == len(token) + 5
    for spelling in spellings:
        problem_of(await look(place, bearer(spelling)), "unauthenticated")
    answer_of(await look(place, bearer(token)))


# --- Credentials that are none --------------------------------------------------------------------

Shown = list[tuple[str, str | bytes]]


async def test_what_is_no_credential_is_refused_however_it_is_written(place: Place) -> None:
    jwt, key = user()["authorization"], API_KEYS[Scope.SESSIONS]
    own, path = f"Bearer {place.token}", f"{BASE}/{place.session_id}"
    good: list[Shown] = [
        [("authorization", jwt)],
        [("authorization", own)],
        [("x-api-key", key)],
        [("authorization", f"bearer {place.token}")],
        [("authorization", f"BEARER {place.token}")],
    ]
    for headers in good:
        answer_of(await exchange(place.api, "GET", path, headers))
    authorization: list[str | bytes] = [
        *("", "Bearer", "Bearer ", "Bearer  ", "bearer", place.token, key, jwt[7:]),
        *(f"Bearer {key}", f"Bearer{place.token}", f"Bearer {own}", f"Bearer {place.token} x"),
        *(f"Basic {place.token}", "Basic dTpw", "Digest a=b", f"Token {place.token}"),
        *(f"Bearer {place.token},{place.token}", "Bearer .", "Bearer a.b.c", "Bearer ost_"),
        *(b"Bearer \xe9\xff", b"\xe9", f"Bearer {'é' * 40}".encode(), b"Bearer \x80.\x80.\x80"),
        *(f"Bearer {'a' * 9000}", f"Bearer {'a.' * 5000}", jwt + "a" * 9000, "a" * 20_000),
    ]
    keys: list[str | bytes] = [
        *("", " ", "x", jwt, own, place.token, f"Bearer {key}", f"{key}x", key[:-1], key.upper()),
        *(f"{key},{key}", b"\xe9\xff", "é".encode() * 10, key.encode() + b"\xa0", "a" * 9000),
    ]
    bad: list[Shown] = [
        *([("authorization", value)] for value in authorization),
        *([("x-api-key", value)] for value in keys),
        *([*one, *two] for one in good[:3] for two in good[:3]),
        *([*one, (name, "")] for one in good for name in ("authorization", "x-api-key")),
        *([("authorization", "é".encode()), *one] for one in good),
    ]
    for headers in bad:
        answer = await exchange(place.api, "GET", path, headers)
        problem_of(answer, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer ")
    for size in (70_000, 300_000):
        for name in ("authorization", "x-api-key"):
            answer = await exchange(place.api, "GET", path, [(name, f"Bearer {'a' * size}")])
            assert answer.status_code in (400, 401, 431)
