"""Generators as operators run them: one session or all, killed, frozen, told to stop."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from app.services.files import make_file_service
from app.services.generation import GenerationService
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings
from app.store.connect import connect
from tests.api.helpers import ask, unknown_id
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey, wait_until
from tests.process.generator_process import GeneratorProcess
from tests.process.service_process import REPOSITORY, environment_for, frozen, linux_only, within

pytestmark = linux_only

GONE_S = 0.5
"""How soon a generator counts as gone here."""

StartGenerator = Callable[..., GeneratorProcess]
RunGenerator = Callable[..., subprocess.CompletedProcess[str]]


class Wizard:
    """Makes finalized sessions and looks at what becomes of them."""

    def __init__(self, settings: Settings, raw: Redis) -> None:
        gateway = connect(settings)
        self.manager: OnboardingSessionManager = make_manager(gateway, settings)
        self.generation = GenerationService(
            gateway, make_file_service(gateway, self.manager, settings)
        )
        self._raw = raw

    async def finalized(self) -> str:
        session_id = await self.manager.create_session(workspace_id="w1")
        await self.manager.save_step(session_id, 1, {"company": "Test Corp"})
        await self.manager.finalize(session_id)
        return session_id

    async def wait_for_status(self, session_id: str, status: str) -> None:
        async with asyncio.timeout(20):
            while (await self.generation.get_status(session_id))["status"] != status:
                await asyncio.sleep(0.01)

    async def statuses(self, session_id: str) -> list[str]:
        """Give the statuses that a session went through."""
        entries: Any = await self._raw.xrange(f"onboarding:{session_id}:events")
        return [fields[b"status"].decode() for _, fields in entries if b"status" in fields]

    async def reports(self, session_id: str) -> list[int]:
        """Give the progress that was reported."""
        return [each.progress for each in await self.generation.get_progress_events(session_id)]

    async def jobs(self) -> set[str]:
        """Give the sessions that wait for a generator."""
        entries: Any = await self._raw.xrange("onboarding:index:jobs")
        return {fields[b"session_id"].decode() for _, fields in entries}

    async def stored(self, session_id: str) -> bytes:
        """Give the bytes of a result of one part."""
        [key] = await self._raw.keys(f"onboarding:{session_id}:result:*")
        return bytes(await ask(self._raw, "GET", key))


@pytest.fixture
async def wizard(settings: Settings, raw: Redis) -> AsyncIterator[Wizard]:
    wizard = Wizard(settings, raw)
    yield wizard
    await wizard.generation.aclose()


@pytest.fixture
def start_generator(tmp_path: Path, valkey: Valkey) -> Iterator[StartGenerator]:
    """Give a function that starts the generator of this repository on the real store."""
    number = count()
    with ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> GeneratorProcess:
            files = tmp_path / f"generator-{next(number)}"
            environment = {"REDIS_URL": valkey.url, **environment}
            return stack.enter_context(GeneratorProcess.reference(files, *arguments, **environment))

        yield start


@pytest.fixture
def start_slow(tmp_path: Path, valkey: Valkey) -> Iterator[StartGenerator]:
    """Give a function that starts a generator whose model takes its time."""
    number = count()
    with ExitStack() as stack:

        def start() -> GeneratorProcess:
            files = tmp_path / f"slow-{next(number)}"
            slow = GeneratorProcess.slow(files, abandoned_s=3 * GONE_S, REDIS_URL=valkey.url)
            return stack.enter_context(slow)

        yield start


@pytest.fixture
def run_generator(tmp_path: Path) -> RunGenerator:
    """Give a function that runs the generator to its end."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.generator", *arguments],
            cwd=REPOSITORY,
            env=environment_for(tmp_path / "data", **environment),
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )

    return run


# One session


async def test_a_session_that_is_named_is_generated_and_again_with_the_same_bytes(
    wizard: Wizard, valkey: Valkey, run_generator: RunGenerator
) -> None:
    session_id = await wizard.finalized()
    results = []
    for _ in range(2):
        finished = run_generator("--session", session_id, REDIS_URL=valkey.url)
        assert (finished.returncode, finished.stderr) == (0, "")
        results.append(await wizard.stored(session_id))

    assert results[0] == results[1]
    assert results[0].startswith(b'{"format":"business-context-manifest/1"')
    assert await wizard.statuses(session_id) == ["processing", "complete"] * 2
    assert (await wizard.reports(session_id)).count(100) == 2


async def test_what_cannot_be_generated_is_refused_in_one_line(
    wizard: Wizard, valkey: Valkey, run_generator: RunGenerator
) -> None:
    unfinished = await wizard.manager.create_session(workspace_id="w1")

    async def refusal(session_id: str) -> str:
        finished = await asyncio.to_thread(
            run_generator, "--session", session_id, REDIS_URL=valkey.url
        )
        assert finished.returncode == 1
        lines: list[str] = finished.stderr.splitlines()
        assert len(lines) == 1, finished.stderr
        return lines[0]

    unknown, not_finalized, no_name = await asyncio.gather(
        *map(refusal, (unknown_id(), unfinished, "no such/name"))
    )

    assert "There is no such session" in unknown
    assert "finalize" in not_finalized
    assert "session" in no_name
    assert (await wizard.generation.get_status(unfinished))["status"] == "pending"
    assert await wizard.statuses(unfinished) == []


# Killed, frozen


async def test_a_session_whose_generator_is_killed_is_completed_once_by_another(
    wizard: Wizard, start_slow: StartGenerator, start_generator: StartGenerator
) -> None:
    session_id = await wizard.finalized()
    killed = start_slow()
    killed.wait_for_event("model_asked")
    await wizard.wait_for_status(session_id, "processing")
    killed.kill()

    heir = start_generator("--take-over-after", str(GONE_S))

    await wizard.wait_for_status(session_id, "complete")
    assert await wizard.statuses(session_id) == ["processing", "complete"]
    assert (await wizard.reports(session_id)).count(100) == 1
    assert (await wizard.stored(session_id)).startswith(b'{"format":')
    heir.wait_for_event("job_finished")
    assert heir.stderr == ""


WORDS = {
    "waits for its model": None,
    "goes on": "go on",
    "comes to its end": "end",
    "fails": "fail",
}
"""What a generator does when it thaws."""


async def test_generators_that_thaw_after_another_has_completed_undo_nothing(
    wizard: Wizard, start_slow: StartGenerator
) -> None:
    slow = {name: start_slow() for name in WORDS}
    for _ in slow:
        await wizard.finalized()
    sessions = {
        name: str(each.wait_for_event("model_asked")["session_id"]) for name, each in slow.items()
    }
    results = {}
    with ExitStack() as stack:
        for each in slow.values():
            stack.enter_context(frozen(each.pid))
        heir = start_slow()
        heir.answer("end")
        for name, session_id in sessions.items():
            await wizard.wait_for_status(session_id, "complete")
            results[name] = await wizard.generation.get_result(session_id)
        heir.wait_for_event("job_finished", count=len(sessions))
        heir.kill()
        for name, word in WORDS.items():
            if word is not None:
                slow[name].answer(word)

    for each in slow.values():
        wait_until(partial(is_done_with_its_session, each), 15.0, "it is done with the session")
    for name, session_id in sessions.items():
        status = await wizard.generation.get_status(session_id)
        seen = (status["status"], status["progress"], status["error_message"])
        assert (name, *seen) == (name, "complete", 100, None)
        assert (name, await wizard.statuses(session_id)) == (name, ["processing", "complete"])
        assert await wizard.generation.get_result(session_id) == results[name]
        assert slow[name].stderr == ""
        assert not slow[name].has_ended()


def is_done_with_its_session(generator: GeneratorProcess) -> bool:
    """Say whether a generator has come to an end with its session, one way or another."""
    return bool(
        {"job_lost", "job_finished", "job_finished_elsewhere", "generation_failed", "job_left"}
        & {*generator.events}
    )


async def test_a_generator_that_thaws_and_fails_does_not_spoil_the_work_of_who_has_its_job(
    wizard: Wizard, start_slow: StartGenerator
) -> None:
    session_id = await wizard.finalized()
    late = start_slow()
    late.wait_for_event("model_asked")
    with frozen(late.pid):
        heir = start_slow()
        heir.wait_for_event("model_asked")
        late.answer("fail")
    wait_until(partial(is_done_with_its_session, late), 15.0, "it is done with the session")

    heir.answer("end")

    heir.wait_for_event("job_finished")
    status = await wizard.generation.get_status(session_id)
    assert (status["status"], status["error_message"]) == ("complete", None)
    assert (await wizard.statuses(session_id)).count("complete") == 1


# Told to stop


async def test_sigterm_ends_a_generator_that_waits_at_once(
    wizard: Wizard, start_generator: StartGenerator
) -> None:
    generator = start_generator()
    session_id = await wizard.finalized()
    await wizard.wait_for_status(session_id, "complete")
    generator.wait_for_event("job_finished")

    with within(2.0):
        generator.send(signal.SIGTERM)
        assert generator.wait_for_exit() == 0
    assert generator.stderr == ""


async def test_sigterm_ends_generators_in_the_middle_of_their_work_at_once_and_no_job_is_lost(
    wizard: Wizard, start_generator: StartGenerator
) -> None:
    sessions = [await wizard.finalized() for _ in range(150)]
    generators = [start_generator() for _ in range(3)]
    for generator in generators:
        generator.wait_for_event("job_finished")
        with within(2.0):
            generator.send(signal.SIGTERM)
            assert generator.wait_for_exit() == 0
        assert generator.stderr == ""

    jobs = await wizard.jobs()
    for session_id in sessions:
        status = (await wizard.generation.get_status(session_id))["status"]
        assert status == "complete" or session_id in jobs
    assert jobs


async def test_sigterm_ends_a_generator_whose_store_is_silent_and_leaves_its_job(
    wizard: Wizard, start_generator: StartGenerator, valkey: Valkey
) -> None:
    session_id = await wizard.finalized()
    async with Proxy(valkey.port) as proxy:
        generator = start_generator(REDIS_URL=f"redis://{proxy.host}:{proxy.port}/0")
        async with asyncio.timeout(15):
            while not proxy.commands["GET"]:  # of the export: the work has begun
                await asyncio.sleep(0)
        proxy.hold()

        with within(2.0):
            generator.send(signal.SIGTERM)
            status = await asyncio.to_thread(generator.wait_for_exit)

    assert (status, generator.stderr) == (0, "")
    start_generator("--take-over-after", str(GONE_S))
    await wizard.wait_for_status(session_id, "complete")
    assert (await wizard.statuses(session_id)).count("complete") == 1
