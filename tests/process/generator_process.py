"""Generators in processes of their own: that of this repository, and one as somebody writes it."""

import subprocess
import sys
from pathlib import Path

from tests.faults.servers import ends_with_us
from tests.process.service_process import REPOSITORY, ServiceProcess, environment_for

SLOW = """
import asyncio
import os
import sys
from pathlib import Path

import structlog

from app.logs import configure_logging
from app.services.generation import ProgressReporter, get_generation_service
from app.services.jobs import get_job_service
from app.services.manager import get_onboarding_session_manager

log = structlog.get_logger()


async def ask_the_model(word: Path) -> str:
    while not word.exists():
        await asyncio.sleep(0.01)
    return word.read_text()


async def main(word: Path, abandoned_s: float) -> None:
    manager, generation = get_onboarding_session_manager(), get_generation_service()
    jobs = get_job_service(f"slow-{os.getpid()}", abandoned_s=abandoned_s)
    async for job in jobs.jobs():
        async with jobs.hold(job), ProgressReporter(job.session_id, generation) as report:
            export = await manager.get_export(job.session_id)
            report("answer_generation", message="The model thinks")
            log.info("model_asked", session_id=job.session_id)
            match await ask_the_model(word):
                case "fail":
                    raise ConnectionResetError("the model has hung up")
                case "go on":
                    report("visual_detection", message="The model thinks again")
                    await asyncio.Event().wait()
            await generation.store_result(job.session_id, {"made_of": export["checksum"]})


configure_logging("info", "json")
asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
"""
"""A generator as one is written from the parts, whose model answers when a file says what."""


class GeneratorProcess(ServiceProcess):
    """One generator, with its output in files, killed after its block."""

    def __init__(self, files: Path, *command: str, **environment: str) -> None:
        """Start it; `files` is a fresh directory for what it says."""
        files.mkdir(parents=True)
        self.data_dir = Path(environment.get("ONBOARDING_DATA_DIR", files / "data"))
        self._stdout, self._stderr = files / "stdout", files / "stderr"
        self._mark = f"STARTED_BY_TEST={files}"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                ends_with_us([sys.executable, *command]),
                cwd=REPOSITORY,
                env=environment_for(self.data_dir, STARTED_BY_TEST=str(files), **environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @classmethod
    def reference(cls, files: Path, *arguments: str, **environment: str) -> "GeneratorProcess":
        """Start `python -m app.generator`."""
        return cls(files, "-m", "app.generator", *arguments, **environment)

    @classmethod
    def slow(cls, files: Path, *, abandoned_s: float, **environment: str) -> "GeneratorProcess":
        """Start a generator that waits for `answer`."""
        word = files.with_name(files.name + "-word")
        return cls(files, "-c", SLOW, str(word), str(abandoned_s), **environment)

    def answer(self, word: str) -> None:
        """Let the model of a slow one answer: `fail`, `go on`, or anything else to end."""
        files = self._stdout.parent
        fresh = files / "word"
        fresh.write_text(word)
        fresh.replace(files.with_name(files.name + "-word"))
