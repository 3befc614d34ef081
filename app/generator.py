"""A generator to begin your own with: it makes a manifest out of every session that is finalized.

    python -m app.generator                  wait for finalized sessions and work on each
    python -m app.generator --session ID     work on one session, and end

Three things make a generator. It takes a job, or is told a session. It reads the export, which is
frozen: whatever the person does meanwhile, a run sees the answers of one revision. And it reports
its stages and stores a result, which whoever waits sees at once.

Start as many as you like. They share the sessions among them; one that dies leaves its job to
another, which begins it anew. So a run may come twice, and its result must not depend on that: this
one's is made of the answers alone, and the same answers make the same bytes.

It finds the store by the same settings as the service. One that cannot, on another machine or in
another language, does the same over HTTP: see `app/client.py`.
"""

import argparse
import asyncio
import hashlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import rfc8785
import structlog

from app.errors import ExportNotFoundError, NotFinalizedError, OnboardingError
from app.logs import configure_logging
from app.onboarding.catalogue import Catalogue
from app.onboarding.documents import escape_pointer
from app.services.generation import (
    GenerationService,
    ProgressReporter,
    get_generation_service,
)
from app.services.jobs import ABANDONED_S, JobService, get_job_service
from app.services.manager import OnboardingSessionManager, get_onboarding_session_manager
from app.settings import SettingsError, load_settings
from app.store.embedded import EmbeddedStoreError

log = structlog.get_logger()


async def generate(
    manager: OnboardingSessionManager, generation: GenerationService, session_id: str
) -> None:
    """Make the manifest of one session, from its export to its result, reporting on the way."""
    if (await manager.view_progress(session_id))["finalized_at"] is None:
        raise NotFinalizedError
    async with ProgressReporter(session_id, generation) as report:
        # Not before: while a generation is running, nobody reopens the session under it.
        report("knowledge_search", message="Reading the export")
        export = await manager.get_export(session_id)
        if export is None:
            raise ExportNotFoundError

        report("context_building", message="Sorting the answers into sections")
        sections = sort_into_sections(export, manager.catalogue)

        report("answer_generation", message="Condensing the answers")
        manifest: dict[str, Any] = {
            "format": "business-context-manifest/1",
            "session_id": session_id,
            "revision": export["revision"],
            "export_checksum": export["checksum"],
            "language": export["metadata"]["language"],
            "complete": export["complete"],
            "sections": [],
        }
        for number, (phase, steps) in enumerate(sections.items(), start=1):
            # Here a real generator would ask its language model, one section after the other.
            manifest["sections"].append(digest_section(phase, steps))
            progress = 40 + 50 * number // len(sections)
            report("answer_generation", progress, f"Section {number} of {len(sections)}")

        report("citation_generation", message="Storing the manifest")
        await generation.store_result(
            session_id, manifest, filename="manifest.json", run=report.run
        )


def sort_into_sections(
    export: Mapping[str, Any], catalogue: Catalogue
) -> dict[int, list[dict[str, Any]]]:
    """Sort the answered steps by the phase of the catalogue that they belong to.

    A step that the catalogue does not know, because the session began with another one, belongs to
    phase 0.
    """
    known = {step.id: step for step in catalogue.steps}
    sections: dict[int, list[dict[str, Any]]] = {}
    for answered in export["steps"].values():
        step = known.get(answered["step_id"])
        phase = 0 if step is None else step.phase
        title = f"Step {answered['step_id']}" if step is None else step.title
        sections.setdefault(phase, []).append({"title": title, **answered})
    return dict(sorted(sections.items()))


def digest_section(phase: int, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Condense the answers of a section into facts, each with the place where it stands.

    `digest` is the SHA-256 of the answers' canonical JSON (RFC 8785): the same for equal answers.
    """
    answers = {str(step["step_id"]): step["data"] for step in steps}
    return {
        "phase": phase,
        "digest": "sha256:" + hashlib.sha256(rfc8785.dumps(answers)).hexdigest(),
        "steps": [
            {
                "step_id": step["step_id"],
                "title": step["title"],
                "version": step["version"],
                "facts": [{"at": at, "value": value} for at, value in facts_of(step["data"])],
            }
            for step in steps
        ],
    }


def facts_of(answers: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Give every single value of some answers with its JSON pointer, in their order."""
    match answers:
        case dict():
            for name, value in answers.items():
                yield from facts_of(value, f"{at}/{escape_pointer(name)}")
        case list():
            for index, value in enumerate(answers):
                yield from facts_of(value, f"{at}/{index}")
        case _:
            yield at, answers


async def work(
    manager: OnboardingSessionManager, generation: GenerationService, jobs: JobService
) -> None:
    """Work on finalized sessions, one after the other, until cancelled."""
    log.info("generator_started")
    async for job in jobs.jobs():
        async with jobs.hold(job):
            await generate(manager, generation, job.session_id)


def seconds(text: str) -> float:
    """Read a duration of the command line. Raises `ValueError` for what is none."""
    value = float(text)
    if not 0.1 <= value <= 86_400:
        raise ValueError(text)
    return value


async def run(session_id: str | None, abandoned_s: float) -> None:
    """Do what the command line asks for; SIGTERM ends it, and leaves the job to others."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    manager, generation = get_onboarding_session_manager(), get_generation_service()
    worker = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
    jobs = get_job_service(worker, abandoned_s=abandoned_s)
    try:
        if session_id is None:
            await work(manager, generation, jobs)
        else:
            await generate(manager, generation, session_id)
    finally:
        for service in (jobs, generation, manager):
            await service.aclose()


def main() -> int:
    """Read the command line, run, and return the exit status: 1 for what failed, 2 for settings."""
    parser = argparse.ArgumentParser(prog="python -m app.generator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--session", metavar="ID", help="work on this session alone, and end")
    parser.add_argument(
        "--take-over-after",
        metavar="SECONDS",
        type=seconds,
        default=ABANDONED_S,
        help="when a generator that is not heard of has lost its job (default: %(default)s)",
    )
    asked = parser.parse_args()
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        with suppress(asyncio.CancelledError, KeyboardInterrupt):
            asyncio.run(run(asked.session, asked.take_over_after))
    except (SettingsError, EmbeddedStoreError) as refused:
        print(f"the generator cannot start: {refused}", file=sys.stderr)  # noqa: T201
        return 2
    except OnboardingError as failed:
        print(f"the generator failed: {failed.detail}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
