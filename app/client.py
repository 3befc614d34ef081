"""A client of the service over HTTP, for generators that run in a process of their own.

    async with OnboardingClient("http://127.0.0.1:8000") as client:
        async with client.report(session_id) as report:
            export = await client.get_export(session_id)
            report("answer_generation", message="Writing the manifest")
            await client.store_result(session_id, make_manifest(export), filename="bcm.json")

A call is sent four times at most, when the service cannot be reached or says that it cannot do its
part now. That is safe: a report carries an id of its own, so that it is taken once, a result a key.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import orjson
from httpx2 import AsyncClient, HTTPError, Response, Timeout
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from app.errors import OnboardingError, StoreUnavailableError
from app.onboarding.files import check_media_type, content_of
from app.onboarding.generation import ProgressEvent
from app.onboarding.sessions import SessionStatus
from app.services.reporter import ProgressReporter

ATTEMPTS = 4
"""How often a call is sent at most."""

ANSWER_S = 20.0
"""Longest wait for an answer, in seconds: the service gives itself 15."""

SILENCE_S = 30.0
"""Longest silence on a live stream, in seconds: the service breaks it every 15."""

COME_BACK_S = 1.0
"""Pause before a live stream is opened again, in seconds, until the service names another."""


LONGEST_PAUSE_S = 30.0
"""Longest pause that is kept because the service asks for it, in seconds."""


class RefusedError(OnboardingError):
    """The service refused a call: its `code`, the HTTP `status`, and what would be right."""

    def __init__(self, code: str, status: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code  # type: ignore[misc] # each class of ours has one, this one has any
        self.status = status


class UnreachableError(StoreUnavailableError):
    """The service could not be reached, or could not do its part, however often it was asked.

    `retry_after_s` is when it wants to be asked again.
    """

    def __init__(self, retry_after_s: float = 0.0) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


class _NoRoomError(UnreachableError):
    """The service has no room for one more at the moment."""


class OnboardingClient:
    """Calls the service. Raises `RefusedError` and `UnreachableError`."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        """Take the address of the service, such as `http://127.0.0.1:8000`."""
        self._http = AsyncClient(
            base_url=base_url,
            headers={} if api_key is None else {"x-api-key": api_key},
            timeout=Timeout(ANSWER_S),
        )

    async def __aenter__(self) -> Self:
        """Open nothing yet: connections are opened as they are needed."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.aclose()

    def report(self, session_id: str, *, questions: int = 1) -> ProgressReporter:
        """Report a run: `async with client.report(session_id) as report`."""
        return ProgressReporter(session_id, self, questions=questions)

    async def get_export(self, session_id: str) -> dict[str, Any]:
        """Read the latest export."""
        return await self._call("GET", session_id, "export")

    async def get_status(self, session_id: str) -> dict[str, Any]:
        """Say how far the generation is."""
        return await self._call("GET", session_id, "status")

    async def update_session_status(
        self,
        session_id: str,
        status: SessionStatus | str,
        error_message: str | None = None,
        *,
        run: str | None = None,
    ) -> dict[str, Any]:
        """Set the status and say how far the generation is."""
        body = {"status": str(status), "error_message": error_message, "run": run}
        return await self._call("PUT", session_id, "status", body)

    async def add_progress_event(self, event: ProgressEvent) -> dict[str, Any]:
        """Add a report of progress to the log."""
        body = {
            "stage": event.stage,
            "progress": event.progress,
            "message": event.message,
            "event_id": event.event_id or os.urandom(8).hex(),
            "run": event.run,
        }
        return await self._call("POST", event.session_id, "events", body)

    async def store_result(
        self,
        session_id: str,
        result: bytes | Mapping[str, Any],
        *,
        content_type: str | None = None,
        filename: str | None = None,
        run: str | None = None,
    ) -> dict[str, Any]:
        """Keep what was generated, bytes or a JSON object, instead of what was before.

        Raises `InvalidRequestError` too.
        """
        content, own_type = await asyncio.to_thread(content_of, result)
        headers = {"content-type": check_media_type(content_type or own_type)}
        headers["idempotency-key"] = os.urandom(16).hex()
        if filename is not None:
            headers["content-disposition"] = (
                f"attachment; filename*=UTF-8''{quote(filename, errors='replace')}"
            )
        what = "result" if run is None else f"result?run={quote(run, safe='')}"
        response = await self._send("PUT", session_id, what, content, headers)
        return dict(orjson.loads(response.content))

    async def get_result(self, session_id: str) -> bytes:
        """Fetch what was generated."""
        return (await self._send("GET", session_id, "result")).content

    async def follow(
        self, session_id: str, last_event_id: str | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Give every event of a session as it happens, a `snapshot` first, until it is deleted.

        Comes back by itself, with a snapshot more, when the connection or the service ends. Raises
        `UnreachableError` when it could not be reached in the first place.
        """
        failures, has_begun = 0, False
        pause_s = COME_BACK_S
        while True:
            headers = {} if last_event_id is None else {"last-event-id": last_event_id}
            read = self._http.stream(
                "GET",
                _path(session_id, "events/stream"),
                headers=headers,
                timeout=Timeout(ANSWER_S, read=SILENCE_S),
            )
            try:
                async with read as response:
                    await _check(response)
                    has_begun = True
                    async for fields in _blocks(response):
                        if "retry" in fields:
                            pause_s = int(fields["retry"]) / 1000
                        if "data" in fields:
                            last_event_id = fields.get("id", last_event_id)
                            event = dict(orjson.loads(fields["data"]))
                            yield event
                            if event["type"] == "deleted":
                                return
            except (HTTPError, UnreachableError) as failure:
                if isinstance(failure, UnreachableError):
                    pause_s = max(pause_s, min(failure.retry_after_s, LONGEST_PAUSE_S))
                # Where there is only no room, there will be.
                failures += not isinstance(failure, _NoRoomError)
                if failures >= ATTEMPTS and not has_begun:
                    raise UnreachableError from None
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _call(
        self, method: str, session_id: str, what: str, body: object = None
    ) -> dict[str, Any]:
        content = b"" if body is None else orjson.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        response = await self._send(method, session_id, what, content, headers)
        return dict(orjson.loads(response.content))

    async def _send(
        self,
        method: str,
        session_id: str,
        what: str,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        path = _path(session_id, what)
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=_wait,
            retry=retry_if_exception_type(UnreachableError),
            reraise=True,
        ):
            with attempt:
                try:
                    response = await self._http.request(
                        method, path, content=content, headers=headers
                    )
                except HTTPError:
                    raise UnreachableError from None
                await _check(response)
                return response
        raise AssertionError("tenacity reraises the last failure")


async def _check(response: Response) -> None:
    """Raise what a refusal stands for."""
    if response.is_success:
        return
    status = response.status_code
    retry_after_s = _seconds(response.headers.get("retry-after", ""))
    if status == 429:
        raise _NoRoomError(retry_after_s)
    if status >= 500:
        raise UnreachableError(retry_after_s)
    code, detail = "unknown", f"It was not the service that answered with {status}"
    # What else answers in its place, such as a balancer, knows no codes of ours.
    with suppress(HTTPError, ValueError, LookupError, TypeError):
        problem = orjson.loads(await response.aread())
        code, detail = problem["code"], problem["detail"]
    raise RefusedError(code, status, detail)


async def _blocks(response: Response) -> AsyncIterator[dict[str, str]]:
    """Read server-sent events: the fields of each, of which ours have one line each."""
    fields: dict[str, str] = {}
    async for line in _lines(response):
        if not line:
            yield fields
            fields = {}
        name, _, value = line.partition(": ")
        if name:
            fields[name] = value


async def _lines(response: Response) -> AsyncIterator[str]:
    """Read lines as server-sent events end them; to `aiter_lines`, U+2028 would be an end too."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode()


def _wait(state: RetryCallState) -> float:
    failure = state.outcome and state.outcome.exception()
    wanted_s = failure.retry_after_s if isinstance(failure, UnreachableError) else 0.0
    return max(min(wanted_s, LONGEST_PAUSE_S), _BACKOFF(state))


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def _path(session_id: str, what: str) -> str:
    return f"/api/v1/onboarding/{quote(session_id, safe='')}/{what}"


_BACKOFF = wait_exponential(multiplier=0.2, max=5.0) + wait_random(0, 0.2)
