"""What ends sessions before their lifetime does: who may be removed, who sweeps, what is set."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from app.errors import SessionNotFoundError
from app.onboarding.retention import (
    DeleteReason,
    SessionFacts,
    Since,
    Terms,
)
from app.onboarding.sessions import SessionStatus
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway
from app.store.index import SessionIndex
from app.store.sessions import SessionStore
from app.store.stats import CLASSES, read_listed

LISTED_AT_ONCE = 200
"""How many sessions are looked up at a time."""


class Config(NamedTuple):
    """What operators have set for all processes; None where the settings hold."""

    max_sessions: int | None
    cleanup_interval_s: float | None


class RetentionStore:
    """Finds sessions that may go, lends the right to sweep, keeps what operators have set."""

    def __init__(self, gateway: Gateway, *, steps: int = 0) -> None:
        """Take the way to the store; sessions are looked through for at least so many steps."""
        self._gateway = gateway
        self._steps = steps
        self._keys = gateway.keys
        self._entries = [gateway.keys.index("entries")]
        self._config = gateway.keys.index("config")
        self._sessions = SessionStore(gateway)
        self._index = SessionIndex(gateway)

    # --- Sessions that may go ---------------------------------------------------------------------

    async def list_due(self, terms: Terms, *, most: int | None = None) -> list[SessionFacts]:
        """List sessions that meet the terms as the index has it, of each class the oldest first.

        At most `most` of them. One round trip for each 200.
        """
        order = (terms.since or Since.CREATED).value
        latest_ms = _END_OF_TIME_MS if terms.since is None else max(0, terms.before_ms)
        due: list[SessionFacts] = []
        for class_ in _classes_of(terms):
            skip = 0
            while most is None or len(due) < most:
                args: list[Argument] = [order, class_, latest_ms, skip, LISTED_AT_ONCE]
                listed = read_listed(await self._gateway.evaluate("list_due", self._entries, args))
                due += listed
                skip += len(listed)
                if len(listed) < LISTED_AT_ONCE:
                    break
        return due[:most]

    async def remove(
        self, session_id: str, terms: Terms, reason: DeleteReason, *, at_ms: int
    ) -> bool:
        """Remove a session that still meets the terms; say whether it was done.

        An index that still names a session which is gone is mended.
        """
        try:
            return await self._sessions.delete(
                session_id, self._steps, at_ms=at_ms, reason=reason, terms=terms
            )
        except SessionNotFoundError:
            await self._index.remove(session_id, DeleteReason.LIFETIME, at_ms=at_ms)
            return False

    async def list_of_user(self, user_id: str, *, most: int) -> list[str]:
        """List the places of a user's sessions, as the index has them, the oldest first."""
        places = await self._gateway.command(
            *("ZRANGEBYLEX", self._keys.index(f"user:{user_id}"), "-", "+", "LIMIT", 0, most)
        )
        return [place.decode() for place in places]

    async def delist_user(self, user_id: str, places: Sequence[str], spared: Sequence[str]) -> None:
        """Mend the places of a user's sessions, of which some were `spared` from removal."""
        await self._index.follow_all(spared)
        await self._gateway.evaluate("delist_user", self._entries, [user_id, *places])

    async def reclaim(self) -> None:
        """Take every session out of the index whose lifetime is over."""
        await self._index.reclaim()

    async def finish_evictions(self, *, at_ms: int) -> None:
        """Remove the sessions that have lost their room and were not removed for it."""
        if self._keys.hash_tag:
            for session_id in await self._index.list_condemned():
                await self._sessions.evict(session_id, at_ms=at_ms)

    async def adopt(self) -> int:
        """Bring in sessions that the index does not know: as `SessionIndex.adopt`."""
        return await self._index.adopt()

    async def repair(self, cursor: str) -> tuple[str, int]:
        """Mend a part of the index: as `SessionIndex.repair`."""
        return await self._index.repair(cursor)

    # --- Who sweeps -------------------------------------------------------------------------------

    async def claim_sweep(
        self, sweeper: str, *, lease_s: float, interval_s: float, now: bool = False
    ) -> bool:
        """Take the lease for a sweep, or prolong one's own; False when none is due, or it is taken.

        With `now` it is due in any case.
        """
        args: list[Argument] = [
            sweeper,
            int(lease_s * 1000),
            int(interval_s * 1000),
            "1" if now else "",
        ]
        return (await self._gateway.evaluate("claim_sweep", self._entries, args)).word == "ok"

    async def want_sweep(self) -> None:
        """Make a sweep due, whoever does it."""
        await self._gateway.command("HSET", self._keys.index("cleanup"), "wanted", 1)

    async def finish_sweep(self, sweeper: str, *, failures: int, tasks_removed: int) -> None:
        """Give the lease back, and note what came of the sweep."""
        args: list[Argument] = [sweeper, failures, tasks_removed]
        await self._gateway.evaluate("finish_sweep", self._entries, args)

    # --- What is set for all processes ------------------------------------------------------------

    async def get_config(self) -> Config:
        """Read what operators have set."""
        limit, interval = await self._gateway.command(
            "HMGET", self._config, "max_sessions", "cleanup_interval_s"
        )
        try:
            return Config(
                None if limit is None else int(limit), None if interval is None else float(interval)
            )
        except ValueError:
            raise corrupt(self._config, "the configuration") from None

    async def set_config(self, changes: Mapping[str, int | float | None]) -> None:
        """Set fields of `Config`; None goes back to the settings."""
        present = {name: str(value) for name, value in changes.items() if value is not None}
        absent = [name for name, value in changes.items() if value is None]
        if present:
            flat = [part for pair in present.items() for part in pair]
            await self._gateway.write("HSET", self._config, *flat)
        if absent:
            await self._gateway.write("HDEL", self._config, *absent)


def _classes_of(terms: Terms) -> Iterator[str]:
    """Give the classes in which sessions may meet the terms."""
    for class_ in CLASSES:
        status, _, kind = class_.partition(":")
        is_asked = not terms.statuses or SessionStatus(status) in terms.statuses
        if is_asked and not (kind == "held" and terms.spares_held):
            yield class_


_END_OF_TIME_MS = 99_999_999_999_999
"""Later than any session, in Unix ms."""
