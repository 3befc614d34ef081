"""Who may call what: asked once per request, before anything of it is looked at."""

from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send

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
from app.onboarding.limits import (
    Standing,
    caller_of_address,
    describe_policies,
    describe_standings,
)
from app.onboarding.sessions import is_public_id
from app.services.access import AccessService
from app.services.audit import AuditTrail
from app.services.limits import Limiter, LimitReachedError
from app.wiring import AppState

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
        if not self._operation.has_limit:
            services.in_flight.check()
        principal, refusal = await self._identify(services.access, scope)
        learn(principal=principal, session_id=_session_of(scope))
        caller = principal.identity or caller_of_address((scope.get("client") or (None,))[0])
        failure: BaseException | None = None
        try:
            await self._count(services.limiter, caller, scope)
            self._check(principal, refusal)
            await self._call(services.limiter, caller, scope, receive, send)
        except BaseException as raised:
            failure = raised
            raise
        finally:
            self._note(services.audit, failure)

    async def _identify(
        self, access: AccessService, scope: Scope
    ) -> tuple[Principal, UnauthenticatedError | None]:
        """Say who asks, or why that is nobody; they are refused once they have been counted."""
        if self._operation.access is Access.OPEN:
            return NOBODY, None
        try:
            return await access.identify(scope["headers"]), None
        except UnauthenticatedError as refusal:
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

    def _note(self, trail: AuditTrail, failure: BaseException | None) -> None:
        """Put on record who was refused, what was done, and what may have been."""
        is_refused = isinstance(failure, AccessError | NotTheirsError)
        if self._operation.access is Access.OPEN:
            # Nobody is known who could have done anything but what succeeded.
            is_refused = failure is not None
        # Where the store failed or the time was over, it may have been done all the same.
        is_undone = isinstance(failure, OnboardingError) and not isinstance(failure, StoreError)
        context = get_context()
        if context is None or not (is_refused or (self._operation.audited and not is_undone)):
            return
        outcome = DONE if failure is None else getattr(failure, "code", INTERRUPTED)
        trail.record(
            str(context.principal),
            self._operation.name,
            context.session_id,
            outcome,
            refused=is_refused,
        )


def _session_of(scope: Scope) -> str | None:
    session_id: str = scope["path_params"].get("id", "")
    return session_id if is_public_id(session_id) else None
