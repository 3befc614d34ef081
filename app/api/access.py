"""Who may call what: asked once per request, before anything of it is looked at."""

from dataclasses import replace
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware import HEADERS
from app.api.operations import Operation
from app.context import get_context, set_context
from app.errors import (
    AccessError,
    NotTheirsError,
    OnboardingError,
    ResumeTokenNotFoundError,
    SessionNotFoundError,
    StoreError,
    UnauthenticatedError,
)
from app.onboarding.access import NOBODY, Access, Principal, check_access
from app.onboarding.limits import (
    Standing,
    caller_of_address,
    describe_policies,
    describe_standings,
)
from app.onboarding.sessions import is_public_id
from app.services.limits import Limiter, LimitReachedError
from app.wiring import AppState, Services

DONE = "done"
"""What the record says of a call that succeeded; of another it names the code."""

INTERRUPTED = "interrupted"
"""What it says of one that was cut short: by its deadline, or by a crash."""


class AccessMiddleware:
    """Lets a request through to its operation when whoever sent it may, as often as they may.

    Raises `UnauthenticatedError`, `ForbiddenError`, `RateLimitedError`, `OverloadedError`. What was
    refused, and what is `audited`, stays on record.
    """

    def __init__(self, app: ASGIApp, operation: Operation) -> None:
        self.app = app
        self._operation = operation
        self._is_guarded = operation.path.startswith("/api/")
        self._may_guess = "{id}" in operation.path or operation.access is Access.OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if not self._is_guarded:
            # Probes and documentation: nobody is looked at.
            await self.app(scope, receive, send)
            return
        services = cast("AppState", scope["state"])["services"]
        if self._operation.streams:
            await self._serve(services, scope, receive, send)
            return
        with services.in_flight:
            await self._serve(services, scope, receive, send)

    async def _serve(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        principal, refusal = NOBODY, None
        if self._operation.access is not Access.OPEN:
            try:
                principal = await services.access.identify(scope["headers"])
            except UnauthenticatedError as error:
                refusal = error
        session_id = _session_of(scope)
        _learn(principal, session_id)
        caller = principal.identity or caller_of_address((scope.get("client") or (None,))[0])
        outcome, is_refused, is_noted = DONE, False, self._operation.audited
        try:
            await self._admit(services.limiter, caller, scope)
            self._check(principal, refusal)
            await self._call(services.limiter, caller, scope, receive, send)
        except OnboardingError as error:
            outcome, is_refused = error.code, isinstance(error, AccessError | NotTheirsError)
            # Where the store failed, it may have been done all the same.
            is_noted = is_refused or (is_noted and isinstance(error, StoreError))
            raise
        except BaseException:
            outcome = INTERRUPTED
            raise
        finally:
            if is_noted:
                services.audit.record(
                    str(principal),
                    self._operation.name,
                    session_id,
                    outcome,
                    refused=is_refused,
                )

    async def _admit(self, limiter: Limiter, caller: str, scope: Scope) -> None:
        """Count the request. Raises `RateLimitedError`."""
        standings: list[Standing | None] = []
        try:
            if self._may_guess:
                limiter.check_misses(caller)
            standings.append(await limiter.admit(caller))
            if self._operation.access is Access.CREATE:
                standings.append(await limiter.admit_creation(caller))
        except LimitReachedError as refusal:
            standings.append(refusal.standing)
            raise
        finally:
            known = [each for each in standings if each is not None]
            if known:
                scope[HEADERS] = {
                    "ratelimit-policy": describe_policies(known),
                    "ratelimit": describe_standings(known),
                }

    def _check(self, principal: Principal, refusal: UnauthenticatedError | None) -> None:
        """Raise `UnauthenticatedError` or `ForbiddenError` to whoever may not."""
        if refusal is not None:
            raise refusal
        check_access(self._operation.access, principal)

    async def _call(
        self, limiter: Limiter, caller: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await self.app(scope, receive, send)
        except (SessionNotFoundError, ResumeTokenNotFoundError):
            # Counted before it is answered: beyond the limit, nobody learns that it was a miss.
            await limiter.count_miss(caller)
            raise


def _session_of(scope: Scope) -> str | None:
    session_id: str = scope["path_params"].get("id", "")
    return session_id if is_public_id(session_id) else None


def _learn(principal: Principal, session_id: str | None) -> None:
    context = get_context()
    if context is not None:
        set_context(replace(context, principal=principal, session_id=session_id))
