"""Reports of progress, and the log that they and everything else are in."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.onboarding.generation import ProgressEvent
from app.services.manager import make_manager
from app.settings import Settings
from app.store.connect import connect
from tests.api.helpers import (
    ADD_EVENT,
    BATCH,
    CREATE,
    DELETE_SESSION,
    DELETE_STEP,
    FINALIZE,
    GET_EVENTS,
    GET_STATUS,
    PATCH,
    PROMOTE,
    PUT_DRAFT,
    PUT_RESULT,
    REOPEN,
    SAVE,
    SET_LANGUAGE,
    SET_STATUS,
    Answers,
    Call,
    answer_of,
    compact,
    create,
    dump,
    events_of,
    exchange,
    is_time,
    pointers_of,
    problem_of,
    save,
    types_of,
)
from tests.api.test_bad_input import untouched
from tests.faults.proxy import Loss, Proxy
from tests.faults.servers import Valkey
from tests.service import BASE
from tests.services.test_generation import make_service

REPORT = {"id", "type", "stage", "progress", "message", "at"}


def sending(**body: Any) -> Call:
    """Give the call that sends a report with these members."""
    return ADD_EVENT._replace(body={"stage": "s", "progress": 1, **body})


async def log_of(api: AsyncClient, session_id: str, **query: str | int) -> Answers:
    target = GET_EVENTS.target.replace("{id}", session_id)
    return answer_of(await api.get(target, params={name: str(v) for name, v in query.items()}))


async def stages_of(api: AsyncClient, session_id: str) -> list[str]:
    """Give the stages of all reports, in order."""
    events = (await log_of(api, session_id, type="progress"))["events"]
    return [event["stage"] for event in events]


def order_of(event: Answers) -> tuple[int, int]:
    ms, _, sequence = event["id"].partition("-")
    return int(ms), int(sequence)


# --- POST /{id}/events ----------------------------------------------------------------------------


async def test_a_report_is_answered_as_it_stands_in_the_log(
    api: AsyncClient, session_id: str
) -> None:
    text = "Halfway: é 中 \U0001f600 \u2028 <b>"
    sent = await sending(stage="own: é", progress=50, message=text).send(api, session_id)

    event = answer_of(sent, 201)

    assert event.keys() >= REPORT
    assert event == {
        **event,
        "type": "progress",
        "stage": "own: é",
        "progress": 50,
        "message": text,
    }
    assert is_time(event["at"])
    assert sent.headers["cache-control"] == "no-store"
    assert (await log_of(api, session_id))["events"][-1] == event


async def test_a_report_needs_no_message(api: AsyncClient, session_id: str) -> None:
    for body in ({}, {"message": None}, {"message": ""}, {"event_id": None}):
        event = answer_of(await sending(**body).send(api, session_id), 201)
        assert event["message"] is None
        assert (await log_of(api, session_id))["events"][-1] == event


@pytest.mark.parametrize("statuses", [[], ["processing"], ["processing", "complete"], ["error"]])
async def test_a_report_is_taken_in_any_status(
    api: AsyncClient, finalized_id: str, statuses: list[str]
) -> None:
    for status in statuses:
        answer_of(await SET_STATUS._replace(body={"status": status}).send(api, finalized_id))

    answer_of(await sending(progress=70).send(api, finalized_id), 201)

    shown = answer_of(await GET_STATUS.send(api, finalized_id))
    assert (shown["status"], shown["progress"]) == ([*statuses, "pending"][len(statuses) - 1], 70)


async def test_progress_may_fall(api: AsyncClient, session_id: str) -> None:
    for progress in (0, 100, 30, 100, 0):
        answer_of(await sending(progress=progress).send(api, session_id), 201)
        assert answer_of(await GET_STATUS.send(api, session_id))["progress"] == progress


async def test_reports_that_are_alike_are_taken_each(api: AsyncClient, session_id: str) -> None:
    ids = {
        answer_of(await sending(message="Again").send(api, session_id), 201)["id"] for _ in range(3)
    }
    assert len(ids) == 3


GOOD: list[Answers] = [
    {"stage": "s" * 128},
    {"stage": "é" * 128},
    {"stage": "\U0001f600" * 128},
    {"stage": " "},
    {"progress": 0},
    {"progress": 100},
    {"message": "m" * 2000},
    {"message": "\U0001f600" * 2000},
    {"event_id": "e" * 128},
    {"event_id": "turn"},
    {"event_id": "0:x"},
    {"event_id": "key:onboarding:x:metadata"},
    {"event_id": "part:onboarding:x:metadata"},
    {"event_id": '"\\ é'},
]

BAD: dict[str, list[Any]] = {
    "stage": [
        *("", "s" * 129, "a\nb", "\0", "\x7f", "\x9f"),
        *(None, 1, True, [], {}),
    ],
    "progress": [-1, 101, 1e2, 50.5, "50", None, True, [], {}],
    "message": ["m" * 2001, "a\nb", "\r", "\t", "\x85", 1, True, [], {}],
    "event_id": ["", "e" * 129, "a\nb", "\0", 1, [], {}],
}


async def test_a_report_within_its_limits_is_kept_as_it_is(
    api: AsyncClient, session_id: str
) -> None:
    for body in GOOD:
        call = sending(**body)
        event = answer_of(await call.send(api, session_id), 201)
        assert (await log_of(api, session_id))["events"][-1] == event
        assert event["stage"] == call.body["stage"]
        assert event["message"] == call.body.get("message")
        if "event_id" in body:
            assert answer_of(await call.send(api, session_id)) == event


async def test_a_report_past_its_limits_is_refused_by_the_member(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for name, values in BAD.items():
            for value in values:
                response = await sending(**{name: value}).send(api, session_id)
                problem = problem_of(response, "invalid_request")
                assert pointers_of(problem) == {f"/{name}"}, value
        for name in ("stage", "progress"):
            call = sending()
            without = {other: value for other, value in call.body.items() if other != name}
            response = await call._replace(body=without).send(api, session_id)
            assert pointers_of(problem_of(response, "invalid_request")) == {f"/{name}"}


# --- The same report again ------------------------------------------------------------------------


async def test_a_report_that_was_taken_is_answered_as_the_first_time(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    first = answer_of(await sending(event_id="e1", message="M").send(api, session_id), 201)
    answer_of(await sending(stage="other", progress=90).send(api, session_id), 201)
    events = await events_of(raw, session_id)

    for call in (
        sending(event_id="e1", message="M"),
        sending(event_id="e1", stage="another", progress=7, message=None),
    ):
        assert answer_of(await call.send(api, session_id)) == first

    assert await events_of(raw, session_id) == events
    assert answer_of(await GET_STATUS.send(api, session_id))["stage"] == "other"


async def test_an_event_id_is_that_of_its_session(api: AsyncClient, session_id: str) -> None:
    other = await create(api)
    for each in (session_id, other):
        answer_of(await sending(event_id="e1").send(api, each), 201)


async def test_of_many_at_once_with_one_event_id_one_is_taken(
    api: AsyncClient, session_id: str
) -> None:
    calls = (sending(event_id="e1", progress=n).send(api, session_id) for n in range(40))

    answers = await asyncio.gather(*calls)

    assert Counter(response.status_code for response in answers) == {201: 1, 200: 39}
    assert len({response.content for response in answers}) == 1
    [event] = (await log_of(api, session_id, type="progress"))["events"]
    assert event == answers[0].json()


async def test_a_report_whose_answer_nobody_took_is_taken_once(
    api: AsyncClient, session_id: str
) -> None:
    call = sending(event_id="e1")
    body = compact(call.body)
    target = call.target.replace("{id}", session_id)
    _, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    head = f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    async with asyncio.timeout(10):
        while not await stages_of(api, session_id):
            await asyncio.sleep(0.002)
    writer.transport.abort()

    again = answer_of(await call.send(api, session_id))

    assert (await log_of(api, session_id, type="progress"))["events"] == [again]


async def test_of_500_reports_whose_replies_are_lost_now_and_then_500_are_in_the_log(
    serve: Callable[..., Any], raw: Redis, valkey: Valkey
) -> None:
    count = 500
    async with Proxy(valkey.port) as proxy:
        api = await serve(
            redis_url=f"redis://{proxy.host}:{proxy.port}/0",
            redis_timeout_s=0.15,
            retry_attempts=12,
        )
        session_id = await create(api)
        turns = iter(range(count))

        async def send() -> None:
            for number in turns:
                if number % 10 in (1, 4, 7):
                    proxy.lose_replies(Loss.RESET, 1, to="EVALSHA")
                call = sending(stage=str(number), event_id=f"e{number}" if number % 2 else None)
                answer_of(await call.send(api, session_id), 201)

        await asyncio.gather(*(send() for _ in range(40)))
        stages = await stages_of(api, session_id)

    assert sorted(map(int, stages)) == [*range(count)]
    assert proxy.commands["EVALSHA"] > count * 1.25


# --- GET /{id}/events -----------------------------------------------------------------------------


async def test_the_log_has_every_type_with_its_members(
    api: AsyncClient, settings: Settings, session_id: str
) -> None:
    gateway = connect(settings)
    manager = make_manager(gateway, settings)
    answer_of(await SAVE.send(api, session_id))
    answer_of(await PATCH.send(api, session_id))
    answer_of(await BATCH.send(api, session_id))
    answer_of(await DELETE_STEP.send(api, session_id))
    await manager.set_metadata(session_id, "u1", "w2")
    await gateway.aclose()
    answer_of(await SET_LANGUAGE.send(api, session_id))
    answer_of(await FINALIZE.send(api, session_id))
    answer_of(await SET_STATUS.send(api, session_id))
    answer_of(await sending(event_id="e1").send(api, session_id), 201)
    result = answer_of(await PUT_RESULT.send(api, session_id), 201)
    failed = {"status": "error", "error_message": "It broke"}
    answer_of(await SET_STATUS._replace(body=failed).send(api, session_id))
    answer_of(await REOPEN.send(api, session_id))

    log = await log_of(api, session_id)

    assert log.keys() >= {"session_id", "events", "next"}
    assert (log["session_id"], log["next"]) == (session_id, None)
    assert all(event.keys() >= {"id", "type", "at"} for event in log["events"])
    assert all(is_time(event["at"]) for event in log["events"])
    orders = [order_of(event) for event in log["events"]]
    assert orders == sorted(set(orders))
    told = [
        {name: value for name, value in event.items() if name not in {"id", "at"}}
        for event in log["events"]
    ]
    assert told == [
        {"type": "session_created"},
        {"type": "step_saved", "step_id": 1, "version": 1},
        {"type": "step_saved", "step_id": 1, "version": 2},
        {"type": "step_saved", "step_id": 1, "version": 3},
        {"type": "step_saved", "step_id": 2, "version": 1},
        {"type": "step_deleted", "step_id": 1, "version": 3},
        {"type": "metadata_changed"},
        {"type": "language_changed", "language": "de"},
        {"type": "finalized", "revision": 1},
        {"type": "status_changed", "status": "processing"},
        {
            "type": "progress",
            "stage": "s",
            "progress": 1,
            "message": None,
            "event_id": "e1",
        },
        {
            "type": "result_stored",
            **{name: result[name] for name in ("size", "checksum", "content_type", "filename")},
        },
        {"type": "status_changed", "status": "error", "error_message": "It broke"},
        {"type": "reopened", "revision": 1},
    ]


async def test_drafts_and_what_is_refused_make_no_event(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))
    answer_of(await PROMOTE.send(api, session_id))
    answer_of(await PUT_DRAFT.send(api, session_id))
    problem_of(await SAVE.send(api, session_id, if_match='"9"'), "version_conflict")
    problem_of(await REOPEN.send(api, session_id), "not_finalized")

    types = [event["type"] for event in (await log_of(api, session_id))["events"]]

    assert types == ["session_created", "step_saved"]


async def test_a_log_is_read_page_by_page(api: AsyncClient, session_id: str) -> None:
    for number in range(25):
        answer_of(await sending(stage=str(number)).send(api, session_id), 201)
    whole = (await log_of(api, session_id))["events"]
    assert len(whole) == 26

    for limit in (1, 7, 13, 26, 1000):
        pages, after = [], None
        while True:
            query = {"limit": limit} if after is None else {"limit": limit, "after": after}
            page = await log_of(api, session_id, **query)
            assert page["gap"] is False
            pages.append(page["events"])
            if page["next"] is None:
                break
            assert page["next"] == page["events"][-1]["id"]
            after = page["next"]
        assert [event for page in pages for event in page] == whole
        assert all(len(page) == limit for page in pages[:-1])
        assert 1 <= len(pages[-1]) <= limit


async def test_a_log_is_read_on_after_an_event(api: AsyncClient, session_id: str) -> None:
    for number in range(5):
        answer_of(await sending(stage=str(number)).send(api, session_id), 201)
    whole = (await log_of(api, session_id))["events"]

    for at, event in enumerate(whole):
        page = await log_of(api, session_id, after=event["id"])
        assert page == {**page, "events": whole[at + 1 :], "next": None, "gap": False}

    newest = whole[-1]["id"]
    answer_of(await sending(stage="new").send(api, session_id), 201)
    [event] = (await log_of(api, session_id, after=newest))["events"]
    assert event["stage"] == "new"


async def test_the_events_of_one_type_are_paged_like_all(api: AsyncClient, session_id: str) -> None:
    for number in range(6):
        answer_of(await sending(stage=str(number)).send(api, session_id), 201)
        await save(api, session_id)
    whole = (await log_of(api, session_id))["events"]

    for event_type in ("progress", "step_saved", "session_created", "deleted", "recovered"):
        expected = [event for event in whole if event["type"] == event_type]
        found: list[Answers] = []
        page = await log_of(api, session_id, type=event_type, limit=2)
        while page["next"] is not None:
            found += page["events"]
            page = await log_of(api, session_id, type=event_type, limit=2, after=page["next"])
        assert found + page["events"] == expected


async def test_a_part_of_an_id_stands_for_the_beginning_of_its_millisecond(
    api: AsyncClient, session_id: str
) -> None:
    answer_of(await sending().send(api, session_id), 201)
    [created, event] = (await log_of(api, session_id))["events"]

    first = await log_of(api, session_id, after="0")
    assert first == {**first, "events": [created, event], "gap": False}
    at_ms = order_of(event)[0] - 1
    later = await log_of(api, session_id, after=at_ms)
    assert event in later["events"]


BAD_QUERIES = [
    *(f"limit={each}" for each in ("0", "1001", "-1", "+1", "x", "1.0", "", "1e2", "99999")),
    *(f"limit={each}" for each in ("%EF%BC%91", "%D9%A1", "1%0A", "1_0", "0x1", "1" * 5000)),
    *(f"after={each}" for each in ("x", "-", "1-", "-1", "1-2-3", "", "%2B", "1%20", "$", "*")),
    *(f"after={each}" for each in (f"{2**64}", f"1-{2**64}", "9" * 5000, "%D9%A1-0", "1%0A")),
    *(f"type={each}" for each in ("x", "", "Progress", "progress,deleted", "progress%00")),
    *("limit=1&limit=2", "after=1&after=1", "type=progress&type=progress", "limit=%ff", "type=%ff"),
]


async def test_a_query_that_cannot_be_is_refused(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    target = GET_EVENTS.target.replace("{id}", session_id)
    async with untouched(raw):
        for query in BAD_QUERIES:
            response = await exchange(api, "GET", f"{target}?{query}")
            problem_of(response, "invalid_request")


async def test_a_look_at_the_log_changes_nothing(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    before = await dump(raw)
    answer_of(await GET_EVENTS.send(api, session_id))
    assert await dump(raw) == before


async def test_a_log_ends_with_its_session(api: AsyncClient, session_id: str) -> None:
    answer_of(await sending().send(api, session_id), 201)
    answer_of(await DELETE_SESSION.send(api, session_id))
    problem_of(await GET_EVENTS.send(api, session_id), "session_not_found")


async def test_an_event_that_cannot_be_read_is_an_error(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await raw.xadd(f"onboarding:{session_id}:events", {"type": "progress", "at": "yesterday"})
    problem_of(await GET_EVENTS.send(api, session_id), "corrupt_record")


async def test_events_of_many_at_once_are_all_there_in_the_order_of_their_ids(
    api: AsyncClient, session_id: str
) -> None:
    async def write(number: int) -> list[str]:
        ids = []
        for round_ in range(5):
            call = sending(stage=str(number), progress=round_)
            ids.append(answer_of(await call.send(api, session_id), 201)["id"])
            await save(api, session_id, number + 1)
        return ids

    written = await asyncio.gather(*(write(number) for number in range(10)))

    events = (await log_of(api, session_id))["events"]
    orders = [order_of(event) for event in events]
    assert orders == sorted(set(orders))
    kinds = Counter(event["type"] for event in events)
    assert kinds == {"session_created": 1, "progress": 50, "step_saved": 50}
    for number, ids in enumerate(written):
        own = [event["id"] for event in events if event.get("stage") == str(number)]
        assert own == ids


# --- A log that is too long -----------------------------------------------------------------------


async def test_the_last_1000_events_are_kept_and_who_missed_some_is_told(
    api: AsyncClient, raw: Redis, settings: Settings, session_id: str
) -> None:
    [created] = (await log_of(api, session_id))["events"]
    gateway = connect(settings)
    service = make_service(gateway, make_manager(gateway, settings))
    count = 1300

    async def write(numbers: range) -> None:
        for number in numbers:
            event = ProgressEvent(session_id, str(number), number % 100, event_id=f"e{number}")
            await service.add_progress_event(event)

    await write(range(5))
    await asyncio.gather(*(write(range(5 + at, count - 5, 8)) for at in range(8)))
    await write(range(count - 5, count))
    await gateway.aclose()

    page = await log_of(api, session_id)
    assert len(page["events"]) == 1000
    assert page["next"] == page["events"][-1]["id"]
    assert page["gap"] is False
    rest = await log_of(api, session_id, after=page["next"])
    assert (rest["next"], rest["gap"]) == (None, False)
    events = page["events"] + rest["events"]
    assert 1000 <= len(events) < count
    assert [event["stage"] for event in events[-5:]] == [str(n) for n in range(count - 5, count)]

    missed = await log_of(api, session_id, after=created["id"], limit=1)
    assert (missed["gap"], missed["events"]) == (True, events[:1])
    beyond = await log_of(api, session_id, after="99999999999999-0")
    assert (beyond["gap"], beyond["events"]) == (True, [])

    # An id that was given is known as long as its event is there, and longer does no harm.
    again = await sending(event_id=f"e{count - 1}").send(api, session_id)
    assert answer_of(again)["stage"] == str(count - 1)
    assert (await types_of(raw, session_id)).count("progress") == len(events)


async def test_a_log_that_is_whole_has_no_gap(api: AsyncClient) -> None:
    created = answer_of(await CREATE.send(api), 201)
    [event] = (await log_of(api, created["session_id"]))["events"]
    before_ms = order_of(event)[0] - 1

    for after in ("0", "0-1", str(before_ms), event["id"]):
        assert (await log_of(api, created["session_id"], after=after))["gap"] is False


@pytest.mark.parametrize("path", ["/events/", "/events/1", "/Events"])
async def test_another_path_is_no_log(api: AsyncClient, session_id: str, path: str) -> None:
    problem_of(await api.get(f"{BASE}/{session_id}{path}"), "not_found")
