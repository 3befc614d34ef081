"""Who may call what: asked once per request, before anything of it is looked at."""

from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.headers import describe_policies, describe_standings
from app.api.middleware import HEADERS
from app.api.operations import Operation
from app.context import get_context, learn
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
from app.onboarding.audit import Lane
from app.onboarding.limits import Standing, caller_of_address
from app.onboarding.sessions import is_public_id
from app.services.access import AccessService
from app.services.audit import AuditTrail
from app.services.limits import Limiter, LimitReachedError
from app.wiring import AppState


class AccessMiddleware:
    """Lets a request through to its operation when whoever sent it may, as often as they may.

    Raises `UnauthenticatedError`, `ForbiddenError`, `RateLimitedError`, `OverloadedError`. Who was
    not let in stays on record.
    """

    def __init__(self, app: ASGIApp, operation: Operation) -> None:
        self.app = app
        self._operation = operation
        is_open = operation.access is Access.OPEN
        # What may be guessed: the id of a session, or a token that opens one.
        self._may_guess = is_open or "{id}" in operation.path
        self._miss = ResumeTokenNotFoundError if is_open else SessionNotFoundError
        self._refusals = (AccessError, ResumeTokenNotFoundError if is_open else NotTheirsError)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._operation.access is Access.PUBLIC:
            await self.app(scope, receive, send)
            return
        services = cast("AppState", scope["state"])["services"]
        if self._operation.at_once == "requests":
            services.in_flight.check()
        principal, refusal = await self._identify(services.access, scope)
        learn(principal=principal, session_id=_session_of(scope))
        caller = principal.identity or caller_of_address((scope.get("client") or (None,))[0])
        try:
            await self._count(services.limiter, caller, scope)
            self._check(principal, refusal)
            await self._call(services.limiter, caller, scope, receive, send)
        except self._refusals as refused:
            self._note(services.audit, refused)
            raise

    async def _identify(
        self, access: AccessService, scope: Scope
    ) -> tuple[Principal, OnboardingError | None]:
        """Say who asks, or why that is nobody; they are refused once they have been counted."""
        if self._operation.access is Access.OPEN:
            return NOBODY, None
        try:
            return await access.identify(scope["headers"]), None
        except (UnauthenticatedError, StoreError) as refusal:
            return NOBODY, refusal

    async def _count(self, limiter: Limiter, caller: str, scope: Scope) -> None:
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

    def _check(self, principal: Principal, refusal: OnboardingError | None) -> None:
        """Raise `UnauthenticatedError` or `ForbiddenError` to whoever may not, or the refusal."""
        if refusal is not None:
            raise refusal
        check_access(self._operation.access, principal)

    def _note(self, trail: AuditTrail, refused: OnboardingError) -> None:
        """Put on record that somebody was not let in."""
        context = get_context()
        if context is not None:
            who, session_id = str(context.principal), context.session_id
            trail.record(who, self._operation.name, session_id, refused.code, Lane.REFUSED)

    async def _call(
        self, limiter: Limiter, caller: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await self.app(scope, receive, send)
        except self._miss:
            # Counted before it is answered: beyond the limit, nobody learns that it was a miss.
            await limiter.count_miss(caller)
            raise


def _session_of(scope: Scope) -> str | None:
    session_id: str = scope["path_params"].get("id", "")
    return session_id if is_public_id(session_id) else None
