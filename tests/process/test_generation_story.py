"""A session from its first step to its manifest, over HTTP, with a generator in another process."""

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.client import OnboardingClient
from app.onboarding.generation import STAGES
from app.store.embedded import attach
from tests.api.helpers import Answers, answer_of, create, step_path
from tests.events import Event, following
from tests.faults.servers import free_ports
from tests.process.conftest import StartService
from tests.process.generator_process import GeneratorProcess
from tests.process.service_process import linux_only
from tests.service import BASE

pytestmark = linux_only

RUN = json.loads((Path(__file__).parents[1] / "data" / "wizard_run.json").read_text())

StartGenerator = Callable[..., GeneratorProcess]


@pytest.fixture
def start_generator(tmp_path: Path, data_dir: Path) -> Iterator[StartGenerator]:
    """Give a function that starts the generator beside the service on `data_dir`."""
    number = count()
    with ExitStack() as stack:

        def start(**environment: str) -> GeneratorProcess:
            files = tmp_path / f"generator-{next(number)}"
            beside = {"ONBOARDING_DATA_DIR": str(data_dir), **environment}
            return stack.enter_context(GeneratorProcess.reference(files, **beside))

        yield start


async def fill_in(api: AsyncClient, session_id: str) -> None:
    """Answer the 23 steps, one after the other."""
    for number, answers in RUN.items():
        answer_of(await api.post(step_path(session_id, number), json={"data": answers}))


async def test_a_session_is_answered_finalized_and_generated_and_seen_live(
    start: StartService, start_generator: StartGenerator, data_dir: Path
) -> None:
    service = start().wait_until_it_answers()
    generator = start_generator()
    async with AsyncClient(base_url=service.url, timeout=30, trust_env=False) as api:
        session_id = await create(api)
        async with following(service.url, session_id) as source:
            await fill_in(api, session_id)
            finalized = answer_of(await api.post(f"{BASE}/{session_id}/finalize"))
            events = await source.receive_until("result_stored")
            while events[-1].data.get("status") != "complete":
                events.append(await source.receive())

        status = answer_of(await api.get(f"{BASE}/{session_id}/status"))
        log = answer_of(await api.get(f"{BASE}/{session_id}/events"))["events"]
        result = await api.get(f"{BASE}/{session_id}/result")
        download = await api.get(f"/api/download/{session_id}")

    check_what_was_seen(events)
    # The stream began after the session, and missed nothing else.
    assert [event.data for event in events[1:]] == log[1:]

    assert (status["status"], status["progress"], status["eta_seconds"]) == ("complete", 100, 0)
    stored = await stored_bytes(data_dir, session_id)
    assert result.content == download.content == stored
    assert result.headers["content-type"] == "application/json"
    assert "manifest.json" in result.headers["content-disposition"]
    [told] = [event.data for event in events if event.type == "result_stored"]
    assert told["size"] == len(stored)
    assert told["checksum"] == f"sha256:{hashlib.sha256(stored).hexdigest()}"
    check_manifest(json.loads(stored), finalized["business_context"])

    assert generator.stderr == ""
    assert not generator.has_ended()


def check_what_was_seen(events: list[Event]) -> None:
    """Check the story as the person before the wizard sees it."""
    kinds = [event.type for event in events]
    generated = kinds.index("finalized") + 1
    assert kinds[:generated] == ["snapshot", *["step_saved"] * 23, "finalized"]
    assert [event.data["step_id"] for event in events[1:24]] == list(range(1, 24))

    snapshot = events[0].data
    assert (snapshot["status"], snapshot["progress"]) == ("pending", 0)
    assert snapshot["steps"]["completed"] == 0

    first, *run, last = events[generated:]
    assert (first.type, first.data["status"]) == ("status_changed", "processing")
    assert (last.type, last.data["status"]) == ("status_changed", "complete")
    reports = [event.data for event in run if event.type == "progress"]
    stages = [each["stage"] for each in reports]
    assert list(dict.fromkeys(stages)) == [
        *("knowledge_search", "context_building", "answer_generation"),
        *("citation_generation", "complete"),
    ]
    for stage in dict.fromkeys(stages):
        assert reports[stages.index(stage)]["progress"] == STAGES[stage]
    progress = [each["progress"] for each in reports]
    assert progress == sorted(progress)
    assert progress.count(100) == 1
    assert [event.type for event in run if event.type != "progress"] == ["result_stored"]

    ids = [tuple(map(int, str(event.id).split("-"))) for event in events]
    assert all(before < after for before, after in pairwise(ids))


def check_manifest(manifest: Answers, export: Answers) -> None:
    """Check that a manifest tells every answer of an export, each once."""
    assert manifest["export_checksum"] == export["checksum"]
    assert (manifest["revision"], manifest["complete"]) == (1, True)
    steps = [step for section in manifest["sections"] for step in section["steps"]]
    assert sorted(step["step_id"] for step in steps) == list(range(1, 24))
    for step in steps:
        answers = RUN[str(step["step_id"])]
        assert sorted(json.dumps(fact["value"]) for fact in step["facts"]) == sorted(
            json.dumps(value) for value in single_values(answers)
        )


def single_values(answers: Any) -> list[Any]:
    if isinstance(answers, dict):
        answers = list(answers.values())
    if isinstance(answers, list):
        return [value for each in answers for value in single_values(each)]
    return [answers]


async def test_generators_and_who_follows_go_on_when_the_service_is_started_anew(
    start: StartService, start_generator: StartGenerator
) -> None:
    port = free_ports(1)[0]
    first = start(PORT=str(port), ONBOARDING_DRAIN_S="0").wait_until_it_answers()
    generator = start_generator(
        ONBOARDING_RETRY_ATTEMPTS="2",
        ONBOARDING_RETRY_BASE_S="0.05",
        ONBOARDING_RETRY_JITTER_S="0",
    )
    generator.wait_for_event("generator_started")
    async with (
        AsyncClient(base_url=first.url, timeout=30, trust_env=False) as api,
        OnboardingClient(first.url) as client,
        asyncio.timeout(30),
    ):
        session_id = await create(api)
        seen = []
        async for event in client.follow(session_id):
            seen.append((event["type"], event.get("status") or event.get("reason")))
            if seen == [("snapshot", "pending")]:
                answer_of(await api.post(step_path(session_id, 1), json={"data": {"a": 1}}))
            elif event["type"] == "step_saved":
                first.send(signal.SIGTERM)
            elif event["type"] == "bye":
                await asyncio.to_thread(first.wait_for_exit)
                await asyncio.to_thread(generator.wait_for_event, "queue_unreachable")
                again = start(PORT=str(port))
                await asyncio.to_thread(again.wait_until_it_answers)
                answer_of(await api.post(f"{BASE}/{session_id}/finalize"))
            elif event.get("status") == "complete" and event["type"] == "status_changed":
                break

    assert [each for each in seen if each[0] != "progress"] == [
        ("snapshot", "pending"),
        ("step_saved", None),
        ("bye", "stopping"),
        ("snapshot", seen[3][1]),
        ("finalized", None),
        ("status_changed", "processing"),
        ("result_stored", None),
        ("status_changed", "complete"),
    ]
    assert generator.stderr == ""


async def stored_bytes(data_dir: Path, session_id: str) -> bytes:
    """Read a result of one part from the embedded store itself."""
    async with embedded_store(data_dir) as store:
        [key] = await store.keys(f"onboarding:{session_id}:result:*")
        content: Any = await store.get(key)
        return bytes(content)


@asynccontextmanager
async def embedded_store(data_dir: Path) -> AsyncIterator[Redis]:
    """Give a client of the store that the service runs."""
    store = Redis(unix_socket_path=attach(data_dir))
    yield store
    await store.aclose()
