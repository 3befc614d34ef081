"""Sessions listed and counted: all of them for operators, their own for users."""

from functools import cache
from typing import Any

from app.clock import now_ms
from app.errors import Fault, InvalidRequestError
from app.onboarding.access import Principal, claim, is_theirs
from app.onboarding.catalogue import Catalogue
from app.onboarding.cursors import check_limit, parse_cursor, write_cursor
from app.onboarding.sessions import Owner, SessionStatus, parse_status
from app.onboarding.stats import (
    MAX_OWN_PAGE,
    MAX_PAGE,
    CapacityHealth,
    Counts,
    OwnSessionPage,
    SessionPage,
    SessionRow,
    StatsView,
    view_health,
    view_own_row,
    view_row,
    view_stats,
)
from app.services.standin import stand_in
from app.settings import Settings, load_settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.stats import Listed, StatsStore

__all__ = [
    "StatsService",
    "get_all_sessions_info",
    "get_health_status",
    "get_performance_stats",
    "get_session_count",
    "get_sessions_by_status",
    "get_stats_service",
]


class StatsService:
    """What there is to know of all sessions.

    What a call costs does not depend on how many there are. Every method raises a `StoreError`
    when the store cannot do its part; what else it raises, it says.
    """

    def __init__(self, gateway: Gateway, store: StatsStore, catalogue: Catalogue) -> None:
        self._gateway = gateway
        self._store = store
        self._catalogue = catalogue

    async def list_sessions(
        self,
        *,
        status: SessionStatus | str | None = None,
        workspace_id: str | None = None,
        user_id: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> SessionPage:
        """List sessions, newest first, 1 to 1,000 a page.

        `cursor` is the `next_cursor` of the page before: what came or went meanwhile makes no other
        session appear twice or not at all. A page with several filters may be short, or empty,
        before the end. Raises `InvalidRequestError`.
        """
        check_limit(limit, MAX_PAGE)
        listed, place = await self._store.list_page(
            "" if cursor is None else parse_cursor(cursor),
            limit,
            status=None if status is None else parse_status(status),
            workspace=workspace_id or "",
            user=user_id or "",
        )
        at_ms = now_ms()
        return SessionPage(
            sessions=[
                view_row(each.facts, each.workspace, each.user, each.progress, at_ms)
                for each in listed
            ],
            next_cursor=write_cursor(place) if place else None,
        )

    async def list_own_sessions(
        self,
        principal: Principal,
        *,
        user_id: str | None = None,
        workspace_id: str | None = None,
        cursor: str | None = None,
        limit: int = MAX_OWN_PAGE,
    ) -> OwnSessionPage:
        """List the sessions of a user, newest first, 1 to 100 a page.

        A user sees their own, whatever `user_id` says, and those of no other workspace; anybody
        else who may ask, those of `user_id`. For `cursor` see `list_sessions`. Raises
        `InvalidRequestError`.
        """
        check_limit(limit, MAX_OWN_PAGE)
        after = "" if cursor is None else parse_cursor(cursor)
        owner = claim(principal, Owner(workspace_id, user_id, "en"))
        if not owner.user_id:
            fault = Fault(pointer="/user_id", code="required", detail="This is required")
            raise InvalidRequestError("Say whose sessions: user_id", [fault])
        if workspace_id is not None and workspace_id != owner.workspace_id:
            return OwnSessionPage(sessions=[], next_cursor=None)
        listed, place = await self._store.list_page(
            after, limit, workspace=owner.workspace_id or "", user=owner.user_id, owned=True
        )
        return OwnSessionPage(
            sessions=[
                view_own_row(each.facts, each.workspace, each.state)
                for each in listed
                if _is_theirs(principal, each)
            ],
            next_cursor=write_cursor(place) if place else None,
        )

    async def count(self) -> Counts:
        """Count everything, as the index has it."""
        return await self._store.count(self._catalogue.pin, now_ms())

    async def get_performance_stats(self) -> StatsView:
        """Count everything: `GET /stats`."""
        at_ms = now_ms()
        counts = await self._store.count(self._catalogue.pin, at_ms)
        return view_stats(counts, self._catalogue.total, at_ms)

    async def get_health_status(self) -> CapacityHealth:
        """Judge how full it is, and say what is stuck."""
        seen = await self._store.occupancy(now_ms())
        return view_health(
            seen.sessions, seen.limit, seen.stuck, seen.stuck_ids, cleanup=seen.is_cleaned
        )

    async def get_session_count(self) -> int:
        """Count the sessions."""
        return (await self._store.occupancy(now_ms())).sessions

    async def get_sessions_by_status(
        self, status: SessionStatus | str, *, limit: int = MAX_PAGE
    ) -> list[SessionRow]:
        """List the newest sessions of a status, `limit` at most. Raises `InvalidRequestError`."""
        return (await self.list_sessions(status=status, limit=limit))["sessions"]

    async def get_all_sessions_info(self, **filters: Any) -> list[SessionRow]:
        """List every session, newest first: as many calls as there are pages of 1,000.

        `filters` are those of `list_sessions`. Raises `InvalidRequestError`.
        """
        rows: list[SessionRow] = []
        cursor = None
        while True:
            page = await self.list_sessions(**{"limit": MAX_PAGE, **filters, "cursor": cursor})
            rows += page["sessions"]
            cursor = page["next_cursor"]
            if cursor is None:
                return rows

    async def aclose(self) -> None:
        """Close the connections of this event loop; the next call opens them again."""
        await self._gateway.aclose()


def make_stats_service(gateway: Gateway, settings: Settings) -> StatsService:
    """Make a service over a gateway, by the settings."""
    return StatsService(gateway, make_stats_store(gateway, settings), settings.catalogue)


def make_stats_store(gateway: Gateway, settings: Settings) -> StatsStore:
    """Make what the service reads from."""
    return StatsStore(
        gateway, max_sessions=settings.max_sessions, interval_s=settings.cleanup_interval_s
    )


@cache
def get_stats_service() -> StatsService:
    """Return this process's service, made from the environment; it connects when it is first used.

    It finds the store as `get_onboarding_session_manager` does, and raises the same.
    """
    settings = load_settings()
    return make_stats_service(connect(settings), settings)


def _is_theirs(principal: Principal, listed: Listed) -> bool:
    owner = Owner(listed.workspace or None, listed.user or None, "en")
    return is_theirs(principal, listed.facts.session_id, owner)


# What callers import from here by name, for a worker or a REPL.
_service = stand_in(StatsService, get_stats_service)
get_all_sessions_info = _service.get_all_sessions_info
get_health_status = _service.get_health_status
get_performance_stats = _service.get_performance_stats
get_session_count = _service.get_session_count
get_sessions_by_status = _service.get_sessions_by_status
