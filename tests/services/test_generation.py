"""The generation by the Python names that callers know: on whatever store there is."""

import asyncio
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import app
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    InvalidTransitionError,
    PayloadTooLargeError,
    SessionNotFoundError,
    StateError,
)
from app.onboarding.files import PART_BYTES
from app.services.files import BodyLimits, FileService
from app.services.generation import (
    GenerationService,
    ProgressEvent,
    SessionStatus,
    get_generation_service,
)
from app.services.manager import OnboardingSessionManager, make_manager
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import known_settings
from tests.faults.servers import Valkey
from tests.services.test_session_machine import answers as documents

PENDING, PROCESSING = SessionStatus.PENDING, SessionStatus.PROCESSING
COMPLETE, ERROR = SessionStatus.COMPLETE, SessionStatus.ERROR

BY_NAME = [
    *("update_session_status", "update_session_progress", "set_language_preference"),
    *("get_language_preference", "add_progress_event", "get_progress_events"),
    *("get_latest_progress", "store_result", "get_result"),
]
"""What callers import from the module or call on the service."""


def make_service(
    gateway: Gateway, manager: OnboardingSessionManager, *, max_result: int = 32 * 1024 * 1024
) -> GenerationService:
    limits = BodyLimits(upload=0, result=max_result)
    return GenerationService(gateway, FileService(gateway, gateway, manager, limits))


@pytest.fixture
def service(gateway: Gateway, manager: OnboardingSessionManager) -> GenerationService:
    """Give a service, on the fake store and on the real one in turn."""
    return make_service(gateway, manager)


@pytest.fixture
async def session_id(manager: OnboardingSessionManager) -> str:
    return await manager.create_session(language="en")


def report(session_id: str, stage: str = "s", progress: int = 1, **more: Any) -> ProgressEvent:
    return ProgressEvent(session_id, stage, progress, **more)


# --- By name --------------------------------------------------------------------------------------


def test_the_words_of_a_status_are_those_of_the_contract() -> None:
    assert [status.name for status in SessionStatus] == [
        *("PENDING", "PROCESSING", "COMPLETE", "ERROR")
    ]
    assert [status.value for status in SessionStatus] == [
        *("pending", "processing", "complete", "error")
    ]


def test_a_report_takes_its_members_in_order() -> None:
    event = ProgressEvent("s1", "answer_generation", 40, "Nearly")
    assert (event.session_id, event.stage) == ("s1", "answer_generation")
    assert (event.progress, event.message) == (40, "Nearly")


@pytest.fixture
def own_service(monkeypatch: pytest.MonkeyPatch, valkey: Valkey) -> Iterator[None]:
    """Let the process make its own service anew, on the real store."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    get_generation_service.cache_clear()
    yield
    get_generation_service.cache_clear()


@pytest.mark.usefixtures("own_service")
def test_the_names_of_the_module_are_those_of_the_service_of_the_process() -> None:
    module = importlib.import_module("app.services.generation")

    async def use() -> Any:
        session_id = await manager.create_session()
        await module.update_session_status(session_id, module.SessionStatus.PROCESSING)
        event = module.ProgressEvent(session_id, "knowledge_search", 10, "Looking")
        await module.add_progress_event(event)
        await module.update_session_progress(session_id, 3, 4, "Three of four")
        await module.set_language_preference(session_id, "de")
        await module.store_result(session_id, {"made": [1, "é"]})
        async with module.ProgressReporter(session_id) as reporter:
            reporter("answer_generation")
        seen = (
            await module.get_language_preference(session_id),
            [each.progress for each in await module.get_progress_events(session_id)],
            await module.get_latest_progress(session_id),
            await module.get_result(session_id),
        )
        await manager.delete_session(session_id)
        await module.get_generation_service().aclose()
        await manager.aclose()
        return seen

    chosen = known_settings()
    manager = make_manager(connect(chosen), chosen)
    # Twice: a service outlives the event loop that it was first used in.
    for _ in range(2):
        assert asyncio.run(use()) == (
            "de",
            [10, 75, 40, 100],
            {"progress": 100, "stage": "complete", "status": "complete"},
            {"made": [1, "é"]},
        )


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.usefixtures("own_service")
def test_a_name_of_the_module_is_a_method_of_the_service(name: str) -> None:
    assert callable(getattr(importlib.import_module("app.services.generation"), name))
    assert callable(getattr(GenerationService, name))


def test_another_name_of_the_module_is_none() -> None:
    module = importlib.import_module("app.services.generation")
    with pytest.raises(AttributeError, match="store_results"):
        _ = module.store_results


USAGE = """
import asyncio, json
from app.services.generation import (
    ProgressReporter, SessionStatus, get_language_preference, get_latest_progress, get_result,
    set_language_preference, store_result, update_session_status,
)
from app.services.manager import get_onboarding_session_manager

async def main(session_id):
    manager = get_onboarding_session_manager()
    await manager.set_metadata(session_id, "user-1", "workspace-1")
    await set_language_preference(session_id, "pt-BR")
    async with ProgressReporter(session_id) as report:
        report("knowledge_search", 10, "Looking")
        await store_result(session_id, b"%PDF" * 300_000, filename="r.pdf")
    result = await get_result(session_id)
    outcome = (
        await get_language_preference(session_id),
        await get_latest_progress(session_id),
        [len(result), result[:4].decode()],
    )
    await manager.delete_session(session_id)
    return outcome

print("OUTCOME", json.dumps(asyncio.run(main("test-session-001"))), flush=True)
"""


def test_the_names_work_in_a_fresh_process_on_an_embedded_store(tmp_path: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ONBOARDING_", "REDIS_", "UPSTASH_"))
    }
    environment["ONBOARDING_DATA_DIR"] = str(tmp_path / "data")
    environment["PYTHONPATH"] = str(Path(app.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", USAGE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [outcome] = [line[8:] for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    assert json.loads(outcome) == [
        "pt-BR",
        {"progress": 100, "stage": "complete", "status": "complete"},
        [1_200_000, "%PDF"],
    ]
    assert "Traceback" not in done.stderr


# --- Status ---------------------------------------------------------------------------------------


class TestUpdateSessionStatus:
    async def test_takes_a_status_or_its_word(
        self, service: GenerationService, session_id: str
    ) -> None:
        first = await service.update_session_status(session_id, PROCESSING)
        second = await service.update_session_status(session_id, "error", "It broke")
        assert (first["status"], first["error_message"]) == ("processing", None)
        assert (second["status"], second["error_message"]) == ("error", "It broke")
        assert await service.get_status(session_id) == second

    @pytest.mark.parametrize("word", ["pending", "", "done", "Processing"])
    async def test_refuses_what_cannot_be_set(
        self, service: GenerationService, session_id: str, word: str
    ) -> None:
        with pytest.raises(InvalidRequestError):
            await service.update_session_status(session_id, word)

    async def test_says_what_the_status_is_when_another_may_not_follow(
        self, service: GenerationService, session_id: str
    ) -> None:
        with pytest.raises(InvalidTransitionError) as refused:
            await service.update_session_status(session_id, COMPLETE)
        assert refused.value.current == "pending"

    async def test_knows_how_long_it_will_take_from_an_even_pace(
        self,
        service: GenerationService,
        session_id: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        begun_ms = 1_767_268_800_000
        times_ms = iter(begun_ms + seconds * 1000 for seconds in (0, 10, 20, 25))
        monkeypatch.setattr("app.services.generation.now_ms", lambda: next(times_ms))

        begun = await service.update_session_status(session_id, PROCESSING)
        assert begun["eta_seconds"] is None
        for progress in (10, 20):
            await service.add_progress_event(report(session_id, progress=progress))
        assert (await service.get_status(session_id))["eta_seconds"] == 75

    async def test_measures_the_pace_anew_when_a_run_begins_anew(
        self,
        service: GenerationService,
        session_id: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        times_ms = iter(1000 * seconds for seconds in (0, 90, 100, 110, 110))
        monkeypatch.setattr("app.services.generation.now_ms", lambda: next(times_ms))

        await service.update_session_status(session_id, PROCESSING)
        for progress in (90, 10, 30):
            await service.add_progress_event(report(session_id, progress=progress))

        assert (await service.get_status(session_id))["eta_seconds"] == 35


# --- Reports --------------------------------------------------------------------------------------


class TestProgress:
    async def test_of_a_new_session_is_nothing(
        self, service: GenerationService, session_id: str
    ) -> None:
        assert await service.get_progress_events(session_id) == []
        latest = await service.get_latest_progress(session_id)
        assert latest == {"progress": 0, "stage": None, "status": "pending"}

    async def test_reads_back_as_it_was_reported(
        self, service: GenerationService, session_id: str
    ) -> None:
        sent = [
            report(session_id, "a", 10, message="é 中 \U0001f600", event_id="e1"),
            report(session_id, "b", 5),
            report(session_id, "a", 100, event_id="e2"),
        ]
        for event in sent:
            await service.add_progress_event(event)

        assert await service.get_progress_events(session_id) == sent
        latest = await service.get_latest_progress(session_id)
        assert latest == {"progress": 100, "stage": "a", "status": "pending"}

    async def test_with_an_event_id_is_taken_once(
        self, service: GenerationService, session_id: str
    ) -> None:
        first = await service.add_progress_event(report(session_id, "a", 10, event_id="e1"))
        again = await service.add_progress_event(report(session_id, "b", 20, event_id="e1"))

        assert again == first
        assert len(await service.get_progress_events(session_id)) == 1

    async def test_counts_steps(self, service: GenerationService, session_id: str) -> None:
        for done in (0, 1, 2, 3):
            await service.update_session_progress(session_id, done, 3, f"{done} done")

        events = await service.get_progress_events(session_id)
        assert [event.progress for event in events] == [0, 33, 66, 100]
        assert [event.message for event in events] == ["0 done", "1 done", "2 done", "3 done"]

    @pytest.mark.parametrize(("done", "total"), [(-1, 3), (4, 3), (0, 0), (1, 0), (1, -1)])
    async def test_refuses_steps_that_cannot_be(
        self, service: GenerationService, session_id: str, done: int, total: int
    ) -> None:
        with pytest.raises(InvalidRequestError):
            await service.update_session_progress(session_id, done, total, "x")
        assert await service.get_progress_events(session_id) == []


# --- Results --------------------------------------------------------------------------------------

RESULTS: dict[str, bytes | dict[str, Any]] = {
    "nothing": b"",
    "a byte": b"\x00",
    "what looks like JSON": b'{"a":1}',
    "a part": b"\xff" * PART_BYTES,
    "parts": bytes(range(256)) * 4097,
    "an empty object": {},
    "an object": {"a": {"b": [1, 1.5, None, True, "é\u2028\x00"]}, "": "", "\U0001f600": -0.0},
    "a large object": {"text": "é" * PART_BYTES},
}


class TestResults:
    @pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
    async def test_come_back_as_they_went_in(
        self, service: GenerationService, session_id: str, result: bytes | dict[str, Any]
    ) -> None:
        await service.store_result(session_id, result)
        back = await service.get_result(session_id)
        assert type(back) is type(result)
        assert back == result

    async def test_that_are_not_there_are_none(
        self, service: GenerationService, session_id: str
    ) -> None:
        assert await service.get_result(session_id) is None

    async def test_replace_one_another(self, service: GenerationService, session_id: str) -> None:
        for result in RESULTS.values():
            await service.store_result(session_id, result)
            assert await service.get_result(session_id) == result

    async def test_have_the_type_and_the_name_that_were_given_or_those_that_fit(
        self, service: GenerationService, session_id: str
    ) -> None:
        pdf = await service.store_result(
            session_id, b"%PDF", content_type="application/pdf", filename="../é.pdf"
        )
        data = await service.store_result(session_id, b"x")
        document = await service.store_result(session_id, {"a": 1})

        assert (pdf["content_type"], pdf["filename"]) == ("application/pdf", "é.pdf")
        assert (data["content_type"], data["filename"]) == (
            "application/octet-stream",
            "result.bin",
        )
        assert (document["content_type"], document["filename"]) == (
            "application/json",
            "result.json",
        )

    @pytest.mark.parametrize(
        ("result", "named"),
        [
            ({"a": float("nan")}, {}),
            ({"a": {1, 2}}, {}),
            ({1: "a"}, {}),
            ({"a": "\ud800"}, {}),
            (b"x", {"content_type": "pdf"}),
            (b"x", {"content_type": "text/plain\r\nX: y"}),
        ],
        ids=ascii,
    )
    async def test_that_could_not_be_given_back_are_refused(
        self, service: GenerationService, session_id: str, result: Any, named: dict[str, str]
    ) -> None:
        with pytest.raises(InvalidRequestError):
            await service.store_result(session_id, result, **named)
        assert await service.get_result(session_id) is None

    async def test_that_have_lost_a_part_are_damage_and_not_cut_short(
        self, service: GenerationService, gateway: Gateway, session_id: str
    ) -> None:
        await service.store_result(session_id, b"x" * 3 * PART_BYTES)
        parts = sorted(await gateway.command("KEYS", f"*{session_id}:result:*"))
        for part in reversed(parts):
            await gateway.command("DEL", part)
            with pytest.raises(CorruptRecordError):
                await service.get_result(session_id)

    async def test_past_the_limit_are_refused(
        self, gateway: Gateway, manager: OnboardingSessionManager, session_id: str
    ) -> None:
        service = make_service(gateway, manager, max_result=PART_BYTES + 10)
        largest = b"x" * (PART_BYTES + 10)
        await service.store_result(session_id, largest)
        for result in (largest + b"x", {"a": "x" * PART_BYTES + "1234"}):
            with pytest.raises(PayloadTooLargeError):
                await service.store_result(session_id, result)
        assert await service.get_result(session_id) == largest


class TestAnUnknownSession:
    async def test_is_not_found_by_any_name(self, service: GenerationService) -> None:
        for call in (
            service.get_status("unknown"),
            service.update_session_status("unknown", PROCESSING),
            service.update_session_progress("unknown", 1, 2, "x"),
            service.set_language_preference("unknown", "de"),
            service.get_language_preference("unknown"),
            service.add_progress_event(report("unknown")),
            service.get_progress_events("unknown"),
            service.get_latest_progress("unknown"),
            service.store_result("unknown", b"x"),
            service.store_result("unknown", b""),
            service.get_result("unknown"),
        ):
            with pytest.raises(SessionNotFoundError):
                await call

    @pytest.mark.parametrize("bad_id", ["", "a:b", "a b", "{x}", "*", "é", "x\n"])
    async def test_is_no_id_if_it_could_name_another_key(
        self, service: GenerationService, bad_id: str
    ) -> None:
        for call in (
            service.get_status(bad_id),
            service.update_session_status(bad_id, PROCESSING),
            service.set_language_preference(bad_id, "de"),
            service.get_language_preference(bad_id),
            service.add_progress_event(report(bad_id)),
            service.get_progress_events(bad_id),
            service.get_latest_progress(bad_id),
            service.store_result(bad_id, b"x"),
            service.get_result(bad_id),
        ):
            with pytest.raises(InvalidRequestError):
                await call


# --- Properties -----------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A service on the real store, and the loop that its connections belong to."""

    runner: asyncio.Runner
    service: GenerationService
    manager: OnboardingSessionManager


@pytest.fixture(scope="module")
def bench(valkey: Valkey) -> Iterator[Bench]:
    chosen = known_settings(redis_url=valkey.url)
    gateway = connect(chosen)
    manager = make_manager(gateway, chosen)
    service = make_service(gateway, manager)
    with asyncio.Runner() as runner:
        yield Bench(runner, service, manager)
        runner.run(service.aclose())


bounded = settings(max_examples=50, deadline=None, derandomize="CI" in os.environ)

_texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)

_reports: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    stage=_texts | st.sampled_from(["", "a\nb"]),
    progress=st.integers(-2, 102),
    message=st.none() | _texts | st.just("\x00"),
    event_id=st.none() | st.sampled_from(["e1", "e2", "e3"]),
)
"""Reports of which some cannot be taken, and some have been taken already."""


@bounded
@given(sent=st.lists(_reports, max_size=25))
def test_every_report_that_is_accepted_is_seen_in_order(
    bench: Bench, sent: list[dict[str, Any]]
) -> None:
    service = bench.service

    async def run() -> None:
        session_id = await bench.manager.create_session()
        accepted: list[ProgressEvent] = []
        ids: list[str] = []
        for members in sent:
            event = ProgressEvent(session_id, **members)
            try:
                view = await service.add_progress_event(event)
            except InvalidRequestError:
                continue
            if view["id"] not in ids:
                ids.append(view["id"])
                accepted.append(event)
            else:
                assert event.event_id in {each.event_id for each in accepted}
            assert await service.get_progress_events(session_id) == accepted
            latest = await service.get_latest_progress(session_id)
            last = accepted[-1]
            assert (latest["stage"], latest["progress"]) == (last.stage, last.progress)
        assert ids == sorted(ids, key=lambda each: [int(part) for part in each.split("-")])
        given_ids = [each.event_id for each in accepted if each.event_id is not None]
        assert len(given_ids) == len(set(given_ids))
        await bench.manager.delete_session(session_id)

    bench.runner.run(run())


_languages = st.sampled_from(
    ["en", "de", "pt-BR", "zh-Hans-CN", "i-klingon", "x-own", "EN", "sl-rozaj-biske-1994"]
)
_no_languages = st.sampled_from(["", "e", "english language", "a_b", "en\n", "é", "en-", "x" * 36])
_others = st.sampled_from(["step", "report", "status", "result", "finalize", "reopen"])


@bounded
@given(
    first=_languages,
    work=st.lists(
        st.tuples(st.just("set"), _languages)
        | st.tuples(st.just("refused"), _no_languages)
        | st.tuples(st.just("other"), _others),
        max_size=12,
    ),
)
def test_a_language_that_was_set_is_the_one_that_is_read_until_it_is_changed(
    bench: Bench, first: str, work: list[tuple[str, str]]
) -> None:
    service, manager = bench.service, bench.manager

    async def do(session_id: str, what: str) -> None:
        calls: dict[str, Any] = {
            "step": lambda: manager.save_step(session_id, 1, {"a": 1}),
            "report": lambda: service.add_progress_event(report(session_id)),
            "status": lambda: service.update_session_status(session_id, PROCESSING),
            "result": lambda: service.store_result(session_id, b"x"),
            "finalize": lambda: manager.finalize(session_id),
            "reopen": lambda: manager.reopen(session_id),
        }
        # Whether the state allows it is of no interest here.
        with suppress(StateError):
            await calls[what]()

    async def run() -> None:
        language = first
        session_id = await manager.create_session(language=first)
        for kind, value in work:
            if kind == "set":
                assert await service.set_language_preference(session_id, value) == value
                language = value
            elif kind == "refused":
                with pytest.raises(InvalidRequestError):
                    await service.set_language_preference(session_id, value)
            else:
                await do(session_id, value)
            assert await service.get_language_preference(session_id) == language
            assert (await manager.get_session(session_id))["language"] == language
        await manager.delete_session(session_id)

    bench.runner.run(run())


@bounded
@given(results=st.lists(st.binary(max_size=50) | documents, min_size=1, max_size=4))
def test_any_result_comes_back_as_it_went_in(
    bench: Bench, results: list[bytes | dict[str, Any]]
) -> None:
    async def run() -> None:
        session_id = await bench.manager.create_session()
        for result in results:
            await bench.service.store_result(session_id, result)
            back = await bench.service.get_result(session_id)
            assert type(back) is type(result)
            assert repr(back) == repr(result)
        await bench.manager.delete_session(session_id)

    bench.runner.run(run())
