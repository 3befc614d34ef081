import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    FINALIZE,
    GET_PROGRESS,
    GET_STEPS,
    GET_SUMMARY,
    Answers,
    answer_of,
    check_progress,
    create,
    dump,
    pointers_of,
    problem_of,
    save,
    step_path,
    types_of,
)
from tests.service import BASE

CATALOGUE = f"{BASE}/steps"

PACKAGED = """
    Evidence Vault (1) · Brand Synthesis (1) · Strategic Integrity (1) · Truth Confirmation (1)
    · The Offer (2) · Market Intelligence (3) · Competitive Landscape (3) · Comparative Angle (3)
    · Market Category (4) · Product Capabilities (4) · Perceptual Map (4) · Position Grid (4)
    · Gap Analysis (4) · Positioning Statements (5) · Focus & Sacrifice (5) · ICP Personas (5)
    · Market Education (5)* · Messaging Rules (5) · Soundbites Library (5) · Channel Strategy (6)
    · Market Size (6)* · Validation Tasks (6)* · Final Synthesis (6)
"""

OFFER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "price": {"type": "number", "exclusiveMinimum": 0},
        "site": {"type": "string", "format": "uri"},
        "a/b~c": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    },
    "required": ["name"],
    "additionalProperties": False,
}
"""A schema for the second step of the catalogues here."""


def steps(count: int, **schemas: Any) -> list[Answers]:
    """Describe steps 1 to `count`; `s2={...}` is the schema of step 2."""
    described: list[Answers] = []
    for number in range(1, count + 1):
        step = {"id": number, "key": f"step_{number}", "title": f"Step {number}", "phase": 1}
        described.append({**step, "required": number != count})
        if f"s{number}" in schemas:
            described[-1]["schema"] = schemas[f"s{number}"]
    return described


@pytest.fixture
def serve_catalogue(serve: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Give a function that runs the service with a catalogue: its version and its steps."""

    async def start(version: str, described: list[Answers], **settings: Any) -> AsyncClient:
        path = tmp_path / f"steps-{version}.json"
        path.write_text(json.dumps({"version": version, "steps": described}))
        client: AsyncClient = await serve(steps_file=path, **settings)
        return client

    return start


# --- GET /steps -----------------------------------------------------------------------------------


async def test_the_packaged_catalogue_is_shown(api: AsyncClient) -> None:
    catalogue = answer_of(await api.get(CATALOGUE))

    assert catalogue["version"]
    shown = [
        f"{each['title']} ({each['phase']}){'' if each['required'] else '*'}"
        for each in catalogue["steps"]
    ]
    assert shown == " ".join(PACKAGED.split()).split(" · ")
    assert [each["id"] for each in catalogue["steps"]] == list(range(1, 24))
    assert len({each["key"] for each in catalogue["steps"]}) == 23
    assert not any("schema" in each for each in catalogue["steps"])


async def test_a_catalogue_of_ones_own_is_shown_with_help_and_schemas(
    serve_catalogue: Callable[..., Any],
) -> None:
    described = steps(3, s2=OFFER)
    described[0]["help"] = "Say what you have."
    api = await serve_catalogue("own-1", described)

    catalogue = answer_of(await api.get(CATALOGUE))

    assert catalogue["version"] == "own-1"
    assert catalogue["steps"] == described


async def test_progress_is_of_the_steps_of_the_catalogue(
    serve_catalogue: Callable[..., Any],
) -> None:
    api = await serve_catalogue("own-1", steps(3))
    session_id = await create(api)

    check_progress((await save(api, session_id, 3))["progress"], saved=[3], total=3)
    problem_of(await api.get(step_path(session_id, 4)), "invalid_step_id")
    export = answer_of(await FINALIZE.send(api, session_id))["business_context"]

    assert export["catalogue_version"] == "own-1"
    assert export["missing_steps"] == [1, 2]
    assert export["complete"] is False


# --- Schemas --------------------------------------------------------------------------------------

UNFIT: list[tuple[Answers, set[str]]] = [
    ({"price": 1}, {""}),
    ({"name": "x"}, {"/name"}),
    ({"name": 1, "price": 0, "a/b~c": 1}, {"/name", "/price", "/a~1b~0c"}),
    ({"name": "ok", "site": "no uri", "tags": ["a", 1, 2]}, {"/site", "/tags/1", "/tags/2"}),
    ({"name": "ok", "tags": ["a", "a"]}, {"/tags"}),
    ({"name": "ok", "other": 1}, {""}),
]


@pytest.mark.parametrize(("data", "pointers"), UNFIT)
async def test_answers_that_do_not_meet_the_schema_are_refused_with_every_fault(
    serve_catalogue: Callable[..., Any], raw: Redis, data: Answers, pointers: set[str]
) -> None:
    api = await serve_catalogue("own-1", steps(3, s2=OFFER))
    session_id = await create(api)
    before = await dump(raw)

    saved = await api.post(step_path(session_id, 2), json={"data": data})
    batch = await api.post(f"{BASE}/{session_id}/steps", json={"steps": {"1": {"a": 1}, "2": data}})

    problem = problem_of(saved, "invalid_step_data")
    assert pointers_of(problem) == {f"/data{pointer}" for pointer in pointers}
    problem = problem_of(batch, "invalid_step_data")
    assert pointers_of(problem) == {f"/steps/2{pointer}" for pointer in pointers}
    assert await dump(raw) == before


async def test_every_one_of_many_faults_is_reported(serve_catalogue: Callable[..., Any]) -> None:
    schema = {"additionalProperties": {"type": "string"}}
    api = await serve_catalogue("own-1", steps(2, s1=schema))
    session_id = await create(api)
    data = {f"m{number}": number for number in range(30)}

    response = await api.post(step_path(session_id, 1), json={"data": data})

    problem = problem_of(response, "invalid_step_data")
    assert pointers_of(problem) == {f"/data/{name}" for name in data}


async def test_answers_that_meet_the_schema_are_saved(
    serve_catalogue: Callable[..., Any],
) -> None:
    api = await serve_catalogue("own-1", steps(3, s2=OFFER))
    session_id = await create(api)
    data = {"name": "ok", "price": 0.5, "site": "https://example.com", "tags": ["a"]}

    await save(api, session_id, 2, data)
    await save(api, session_id, 1, {"anything": [1]})


async def test_a_patch_is_checked_by_its_outcome(
    serve_catalogue: Callable[..., Any], raw: Redis
) -> None:
    api = await serve_catalogue("own-1", steps(3, s2=OFFER))
    session_id = await create(api)
    await save(api, session_id, 2, {"name": "ok", "price": 1})
    before = await dump(raw)
    for patch in ({"name": None}, {"price": -1}, {"name": {"x": 1}}, {"other": 1}):
        response = await api.patch(step_path(session_id, 2), json=patch)
        assert problem_of(response, "invalid_step_data")["errors"]
    assert await dump(raw) == before

    answer_of(await api.patch(step_path(session_id, 2), json={"price": None}))


async def test_a_draft_is_not_checked_by_the_schema_until_it_is_promoted(
    serve_catalogue: Callable[..., Any], raw: Redis
) -> None:
    api = await serve_catalogue("own-1", steps(3, s2=OFFER))
    session_id = await create(api)
    draft = step_path(session_id, "2/draft")
    answer_of(await api.put(draft, json={"data": {"name": "x", "price": "much"}}))
    before = await dump(raw)

    response = await api.post(f"{draft}/promote")

    problem = problem_of(response, "invalid_step_data")
    assert pointers_of(problem) == {"/data/name", "/data/price"}
    assert await dump(raw) == before
    answer_of(await api.put(draft, json={"data": {"name": "ok"}}))
    answer_of(await api.post(f"{draft}/promote"))


async def test_a_refused_save_makes_no_event(
    serve_catalogue: Callable[..., Any], raw: Redis
) -> None:
    api = await serve_catalogue("own-1", steps(3, s2=OFFER))
    session_id = await create(api)

    response = await api.post(step_path(session_id, 2), json={"data": {"x": 1}})

    problem_of(response, "invalid_step_data")
    assert await types_of(raw, session_id) == ["session_created"]


# --- A session keeps the catalogue it began with --------------------------------------------------


async def test_a_session_keeps_its_number_of_steps_under_a_shorter_catalogue(
    serve_catalogue: Callable[..., Any], api: AsyncClient
) -> None:
    session_id = await create(api)
    await save(api, session_id, 20)

    newer = await serve_catalogue("2", steps(3))

    check_progress((await save(newer, session_id, 21))["progress"], saved=[20, 21])
    check_progress(answer_of(await GET_PROGRESS.send(newer, session_id))["progress"], [20, 21])
    assert answer_of(await newer.get(step_path(session_id, 20)))["version"] == 1
    draft = step_path(session_id, "22/draft")
    answer_of(await newer.put(draft, json={"data": {"d": 1}}))
    answer_of(await newer.get(draft))
    answer_of(await newer.post(f"{draft}/promote"))
    answer_of(await newer.patch(step_path(session_id, 22), json={"e": 1}))
    batch = {"steps": {"2": {"a": 1}, "23": {"a": 1}}}
    answer_of(await newer.post(f"{BASE}/{session_id}/steps", json=batch))
    answer_of(await newer.delete(step_path(session_id, 23)))
    listed = answer_of(await GET_STEPS.send(newer, session_id))
    assert listed["steps"].keys() == {"2", "20", "21", "22"}
    assert len(listed["missing"]) == 19
    summary = answer_of(await GET_SUMMARY.send(newer, session_id))
    assert [each["title"] for each in summary["steps"]][18:20] == [
        "Soundbites Library",
        "Channel Strategy",
    ]
    export = answer_of(await FINALIZE.send(newer, session_id))["business_context"]
    assert export["catalogue_version"] == "1"
    check_progress(export["progress"], saved=[2, 20, 21, 22])


async def test_the_summary_of_a_long_wizard_sees_the_drafts_of_all_its_steps(
    serve_catalogue: Callable[..., Any], api: AsyncClient
) -> None:
    longer = await serve_catalogue("2", steps(112))
    session_id = await create(longer)
    drafts = [1, 9, 10, 23, 24, 30, 31, 99, 100, 112]
    for number in drafts:
        answer_of(await longer.put(step_path(session_id, f"{number}/draft"), json={"data": {}}))
    for each in (longer, api):
        summary = answer_of(await GET_SUMMARY.send(each, session_id))
        assert [step["step_id"] for step in summary["steps"] if step["has_draft"]] == drafts


async def test_a_new_session_has_the_steps_of_the_new_catalogue(
    serve_catalogue: Callable[..., Any], api: AsyncClient
) -> None:
    await create(api)
    newer = await serve_catalogue("2", steps(3))

    session_id = await create(newer)

    check_progress((await save(newer, session_id, 1))["progress"], saved=[1], total=3)
    problem_of(
        await newer.post(step_path(session_id, 4), json={"data": {"a": 1}}), "invalid_step_id"
    )
    for call in (newer.get, newer.delete):
        problem_of(await call(step_path(session_id, 20)), "invalid_step_id")
    assert len(answer_of(await GET_SUMMARY.send(newer, session_id))["steps"]) == 3
    assert answer_of(await newer.get(CATALOGUE))["version"] == "2"


@pytest.mark.parametrize(
    ("method", "suffix", "body"),
    [
        ("POST", "", {"data": {"a": 1}}),
        ("PUT", "/draft", {"data": {"a": 1}}),
        ("GET", "", None),
        ("PATCH", "", {"a": 1}),
        ("DELETE", "", None),
        ("GET", "/draft", None),
        ("DELETE", "/draft", None),
        ("POST", "/draft/promote", None),
    ],
)
async def test_a_session_does_not_grow_under_a_longer_catalogue(
    serve_catalogue: Callable[..., Any], api: AsyncClient, method: str, suffix: str, body: Any
) -> None:
    session_id = await create(api)
    newer = await serve_catalogue("2", steps(25))

    response = await newer.request(method, step_path(session_id, f"24{suffix}"), json=body)

    problem_of(response, "invalid_step_id")


async def test_a_session_keeps_its_schema(
    serve_catalogue: Callable[..., Any],
) -> None:
    older = await serve_catalogue("1", steps(3, s2={"required": ["old"]}))
    session_id = await create(older)
    newer = await serve_catalogue("2", steps(3, s2={"required": ["new"]}))
    new_id = await create(newer)
    old, new = {"old": 1}, {"new": 1}

    await save(newer, session_id, 2, old)
    await save(newer, new_id, 2, new)
    for each, data in [(session_id, new), (new_id, old)]:
        response = await newer.post(step_path(each, 2), json={"data": data})
        problem_of(response, "invalid_step_data")


@pytest.fixture
def quick_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process look for catalogues of newer ones more often than it usually does."""
    monkeypatch.setattr("app.wiring.LEARN_EVERY_S", 0.02)


async def saved_soon(api: AsyncClient, session_id: str, step_id: int) -> Answers:
    """Save a step as soon as the service knows the session's catalogue: within 2 s."""
    begun = monotonic()
    while True:
        response = await api.post(step_path(session_id, step_id), json={"data": {"a": 1}})
        if response.is_success or monotonic() - begun > 2:
            return answer_of(response)
        await asyncio.sleep(0.02)


async def test_a_service_that_was_there_before_serves_sessions_of_a_longer_catalogue(
    quick_to_learn: None, serve_catalogue: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    # As in a rolling deployment: the old process meets what the new one has made.
    api = await serve()
    await create(api)
    newer = await serve_catalogue("2", steps(25))
    session_id = await create(newer)

    saved = await saved_soon(api, session_id, 25)

    check_progress(saved["progress"], saved=[25], total=25)


async def test_a_service_that_was_there_before_checks_by_the_schema_of_the_session(
    quick_to_learn: None, serve_catalogue: Callable[..., Any]
) -> None:
    older = await serve_catalogue("1", steps(3, s2={"required": ["old"]}))
    await create(older)
    newer = await serve_catalogue("2", steps(3))
    session_id = await create(newer)

    await saved_soon(older, session_id, 2)


async def test_an_edited_catalogue_of_the_same_version_is_another_one(
    serve_catalogue: Callable[..., Any],
) -> None:
    older = await serve_catalogue("1", steps(3, s2={"required": ["old"]}))
    session_id = await create(older)
    newer = await serve_catalogue("1", steps(4))

    response = await newer.post(step_path(session_id, 2), json={"data": {"x": 1}})
    problem_of(response, "invalid_step_data")
    assert (await save(newer, session_id, 2, {"old": 1}))["progress"]["total"] == 3
    assert (await save(newer, await create(newer), 4))["progress"]["total"] == 4
