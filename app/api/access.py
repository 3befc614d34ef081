"""Who may call what: asked once per request, before anything of it is looked at."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive, Scope, Send

from app.api.middleware import FIELDS, STANDINGS
from app.api.operations import Operation
from app.context import RequestContext, get_context
from app.errors import (
    AccessError,
    NotTheirsError,
    OnboardingError,
    ResumeTokenNotFoundError,
    SessionNotFoundError,
    StoreError,
    UnauthenticatedError,
)
from app.onboarding.access import MAY, NOBODY, Access, Principal, check_access
from app.onboarding.audit import Lane
from app.onboarding.limits import Standing, caller_of_address
from app.onboarding.sessions import is_public_id
from app.services.limits import Limiter, LimitReachedError
from app.wiring import Services

if TYPE_CHECKING:
    from app.api.dispatch import Endpoint


T = TypeVar("T")


class AccessMiddleware:
    """Lets a request through to its operation when whoever sent it may, as often as they may.

    Raises `UnauthenticatedError`, `ForbiddenError`, `RateLimitedError`, `OverloadedError`. Who was
    not let in stays on record.
    """

    def __init__(self, app: "Endpoint", operation: Operation) -> None:
        self.app = app
        self._operation = operation
        is_open = operation.access is Access.OPEN
        self._kinds = MAY.get(operation.access, frozenset())
        self._creates = operation.access is Access.CREATE
        # What may be guessed: the id of a session, or a token that opens one.
        self._may_guess = is_open or "{id}" in operation.path
        self._miss = ResumeTokenNotFoundError if is_open else SessionNotFoundError
        self._refusals = (AccessError, ResumeTokenNotFoundError if is_open else NotTheirsError)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self._let_through(scope, lambda: self.app(scope, receive, send))

    def reply(self, scope: Scope, receive: Receive) -> Awaitable[Any]:
        """Give the answer to a plain request."""
        return self._let_through(scope, lambda: self.app.reply(scope, receive))

    def reply_at_once(self, scope: Scope, context: RequestContext) -> Awaitable[Any] | None:
        """Give the answer to a plain request that has nothing unusual, of somebody who is known.

        None for any other: then nothing was done, and `reply` sees to everything.
        """
        if self.app.is_usual(scope) and self._admit_at_once(scope, context):
            return self._reply_admitted(scope, context)
        return None

    async def _reply_admitted(self, scope: Scope, context: RequestContext) -> Any:
        services: Services = scope["state"]["services"]
        call = self.app.call(scope, context)
        try:
            services.in_flight.enter()
            try:
                return await self.app.handle(call)
            finally:
                services.in_flight.leave()
        except OnboardingError as failure:
            await self.weigh(services, context.principal.identity, failure)
            raise

    def _admit_at_once(self, scope: Scope, context: RequestContext) -> bool:
        """Let somebody in, if all is known that this takes, without a look at the store."""
        services: Services = scope["state"]["services"]
        fields = scope[FIELDS]
        shown = fields.get(b"authorization")
        if not shown or b"x-api-key" in fields or services.in_flight.is_full:
            return False
        access, session_id = services.access, scope["path_params"]["id"]
        principal = access.recognise(b"authorization", shown)
        if (
            not isinstance(principal, Principal)
            or principal.kind not in self._kinds
            or not access.is_known_theirs(principal, session_id)
        ):
            return False
        standing = services.limiter.admit_at_once(principal.identity)
        if standing is None:
            return False
        scope[STANDINGS] = (standing,)
        context.principal, context.session_id = principal, session_id
        return True

    async def weigh(self, services: Services, caller: str, failure: OnboardingError) -> None:
        """Count what was not there, and put on record that somebody was not let in.

        Raises `LimitReachedError`.
        """
        if isinstance(failure, self._miss):
            # Counted before it is answered: beyond the limit, nobody learns that it was a miss.
            await services.limiter.count_miss(caller)
        context = get_context()
        if isinstance(failure, self._refusals) and context is not None:
            who, session_id = str(context.principal), context.session_id
            services.audit.record(who, self._operation.name, session_id, failure.code, Lane.REFUSED)

    async def _let_through(self, scope: Scope, pass_on: Callable[[], Awaitable[T]]) -> T:
        access = self._operation.access
        if access is Access.PUBLIC:
            return await pass_on()
        services: Services = scope["state"]["services"]
        if self._operation.at_once == "requests":
            services.in_flight.check()
        principal, refusal = NOBODY, None
        if access is not Access.OPEN:
            try:
                # Who is refused is refused once they have been counted.
                principal = await services.access.identify(scope["headers"])
            except (UnauthenticatedError, StoreError) as failure:
                refusal = failure
        context = get_context()
        if context is not None:
            context.principal = principal
            context.session_id = _session_of(scope)
        limiter = services.limiter
        caller = principal.identity or caller_of_address((scope.get("client") or (None,))[0])
        try:
            if self._may_guess:
                limiter.check_misses(caller)
            standing = None if self._creates else limiter.admit_at_once(caller)
            if standing is None:
                await self._count(limiter, caller, scope)
            else:
                scope[STANDINGS] = (standing,)
            if refusal is not None:
                try:
                    raise refusal
                finally:
                    # It leads back here: a circle would be left for the garbage collector.
                    refusal = None
            if principal.kind not in self._kinds:
                check_access(access, principal)
            return await pass_on()
        except LimitReachedError as reached:
            scope.setdefault(STANDINGS, (reached.standing,))
            raise
        except OnboardingError as failure:
            await self.weigh(services, caller, failure)
            raise

    async def _count(self, limiter: Limiter, caller: str, scope: Scope) -> None:
        """Count a request for which the store has to be asked. Raises `RateLimitedError`."""
        standings: list[Standing | None] = []
        try:
            standings.append(await limiter.admit(caller))
            if self._creates:
                standings.append(await limiter.admit_creation(caller))
        except LimitReachedError as refusal:
            standings.append(refusal.standing)
            raise
        finally:
            known = [each for each in standings if each is not None]
            if known:
                scope[STANDINGS] = known


def _session_of(scope: Scope) -> str | None:
    session_id: str = scope["path_params"].get("id", "")
    return session_id if is_public_id(session_id) else None
