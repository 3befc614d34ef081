"""The record of who did what, as operators read it over HTTP."""

from collections.abc import AsyncIterator

import pytest
from httpx2 import AsyncClient

from app.onboarding.audit import AuditEvent, Lane
from app.settings import Settings
from app.store.audit import AuditStore
from app.store.connect import connect
from tests.api.helpers import Answers, answer_of, is_time, pointers_of, problem_of
from tests.api_schema.walk import described, validator_of

AUDIT = "/api/v1/admin/audit"


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[AuditStore]:
    """Give the record of the service, as another process writes it."""
    gateway = connect(settings)
    yield AuditStore(gateway)
    await gateway.aclose()


def event(action: str, session_id: str | None = None, *, refused: bool = False) -> AuditEvent:
    outcome, lane = ("forbidden", Lane.REFUSED) if refused else ("done", Lane.DONE)
    return AuditEvent(1_767_268_800_123, "machine:ops", action, session_id, outcome, lane)


async def read(api: AsyncClient, **query: str | int) -> Answers:
    page = answer_of(await api.get(AUDIT, params=query))
    schema = described()["paths"][AUDIT]["get"]["responses"]["200"]["content"]["application/json"]
    validator_of(schema["schema"], closed=True).validate(page)
    return page


async def test_an_empty_record_ends_at_once(api: AsyncClient) -> None:
    assert await read(api) == {"events": [], "next": None}
    assert await read(api, after="1767268800000-3") == {"events": [], "next": None}


async def test_an_event_says_who_did_what_with_which_session(
    api: AsyncClient, store: AuditStore
) -> None:
    batch = [event("finalize", "s"), event("get_audit", refused=True)]
    await store.add(batch, writer="w", number=1)
    first, second = (await read(api))["events"]
    assert is_time(first["at"])
    assert first == {
        "id": first["id"],
        "at": "2026-01-01T12:00:00.123Z",
        "who": "machine:ops",
        "action": "finalize",
        "session_id": "s",
        "outcome": "done",
    }
    assert second.keys() == {"id", "at", "who", "action", "outcome"}


async def test_page_after_page_gives_every_event_once(api: AsyncClient, store: AuditStore) -> None:
    batch = [event(str(n), refused=n % 2 == 0) for n in range(130)]
    await store.add(batch, writer="w", number=1)
    page = await read(api)
    assert len(page["events"]) == 100
    page = await read(api, after=page["next"])
    assert [each["action"] for each in page["events"]] == [str(n) for n in range(100, 130)]
    assert page["next"] is None

    found: list[str] = []
    page = await read(api, limit=1, after=page["events"][24]["id"])
    while True:
        found += [each["action"] for each in page["events"]]
        if page["next"] is None:
            break
        page = await read(api, limit=1, after=page["next"])
    assert found == [str(n) for n in range(125, 130)]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "1.0"])
async def test_a_limit_is_one_to_a_thousand(api: AsyncClient, limit: str) -> None:
    problem = problem_of(await api.get(AUDIT, params={"limit": limit}), "invalid_request")
    assert pointers_of(problem) == {"/limit"}


@pytest.mark.parametrize("after", ["", "x", "1-", "-1", "9" * 20, "1-2-3"])
async def test_an_id_that_nobody_was_given_is_refused(api: AsyncClient, after: str) -> None:
    problem_of(await api.get(AUDIT, params={"after": after}), "invalid_request")


async def test_it_is_read_and_never_written_over_http(api: AsyncClient) -> None:
    refused = await api.delete(AUDIT)
    problem_of(refused, "method_not_allowed")
    assert refused.headers["allow"] == "GET, HEAD"
    response = await api.head(AUDIT)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["cache-control"] == "no-store"
