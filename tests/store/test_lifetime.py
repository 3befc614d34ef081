"""How long a session lives: one deadline for all its keys, moved by writes and never back."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import time_machine
from redis.asyncio import Redis

from app.errors import SessionNotFoundError
from app.onboarding.generation import ProgressEvent
from app.services.manager import get_onboarding_session_manager
from app.settings import LONGEST_LIFE_S
from app.store.gateway import Gateway
from tests.conftest import NOON_S
from tests.faults.servers import Valkey
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    READS,
    SHARED,
    WRITES,
    Manager,
    deadlines_ms,
    keyed,
    names_of_keys,
    prepare,
    prepare_with_files,
    store_time_ms,
)

HOUR_S = 3600
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S


async def shared_deadline_ms(gateway: Gateway, session_id: str) -> int:
    """Give the one deadline of a session, after a look at every key of it."""
    deadlines = await deadlines_ms(gateway, session_id)
    shared = {at for name, at in deadlines.items() if name.startswith(SHARED)}
    assert max(shared) - min(shared) <= 1000, deadlines
    own = {at for name, at in deadlines.items() if not name.startswith(SHARED)}
    assert all(0 < at <= max(shared) for at in own), deadlines
    return max(shared)


async def wait_until(is_true: Callable[[], Awaitable[bool]], limit_s: float) -> None:
    async with asyncio.timeout(limit_s):
        while not await is_true():
            await asyncio.sleep(0.005)


class TestAfterAnAcceptedWrite:
    @pytest.mark.parametrize("name", WRITES)
    @pytest.mark.parametrize("lifetime_s", [1, 100, WEEK_S, LONGEST_LIFE_S])
    async def test_all_keys_share_a_deadline_between_1_and_1_01_lifetimes_ahead(
        self,
        fake: MakePlace,
        clock: time_machine.Traveller,
        name: str,
        lifetime_s: int,
    ) -> None:
        place = fake(session_ttl_s=lifetime_s, draft_ttl_s=lifetime_s)
        gateway, write = place.gateway, WRITES[name]
        session_id = await prepare_with_files(place, finalized=write.finalized)
        made_until_ms = await shared_deadline_ms(gateway, session_id)
        assert 1.0 <= (made_until_ms / 1000 - NOON_S) / lifetime_s <= 1.01

        clock.shift(lifetime_s * 0.9)
        now_ms = await store_time_ms(gateway)
        await write.do(place, session_id)

        until_ms = await shared_deadline_ms(gateway, session_id)
        assert 1.0 <= (until_ms - now_ms) / (lifetime_s * 1000) <= 1.01

    @pytest.mark.parametrize("name", WRITES)
    async def test_the_real_store_agrees(self, real: MakePlace, name: str) -> None:
        # With ten seconds of life, a coarse step is 59 ms.
        place = real(session_ttl_s=10)
        gateway, write = place.gateway, WRITES[name]
        session_id = await prepare_with_files(place, finalized=write.finalized)
        made_until_ms = await shared_deadline_ms(gateway, session_id)

        async def crossed() -> bool:
            return await store_time_ms(gateway) + 10_000 > made_until_ms

        await wait_until(crossed, 5)
        before_ms = await store_time_ms(gateway)
        await write.do(place, session_id)
        after_ms = await store_time_ms(gateway)
        until_ms = await shared_deadline_ms(gateway, session_id)
        assert before_ms + 10_000 <= until_ms <= after_ms + 10_100
        assert until_ms > made_until_ms
        if not write.finalized:
            expires_at = (await place.manager.view_progress(session_id))["expires_at"]
            assert expires_at.endswith(f".{until_ms % 1000:03d}Z")

    async def test_a_step_saved_days_before_the_last_one_lives_as_long(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake()
        session_id = await manager.create_session(workspace_id="w")
        await manager.save_step(session_id, 1, {"a": 1})
        clock.shift(6 * DAY_S)
        await manager.save_step(session_id, 23, {"a": 23})
        until_ms = await shared_deadline_ms(gateway, session_id)
        assert until_ms >= (NOON_S + 13 * DAY_S) * 1000

        clock.move_to(until_ms / 1000 - 1)
        assert set(await manager.get_all_steps(session_id)) == {1, 23}
        clock.move_to(until_ms / 1000 + 0.001)
        with pytest.raises(SessionNotFoundError):
            await manager.get_progress(session_id)
        assert await names_of_keys(gateway, session_id) == set()

    async def test_a_step_saved_a_lifetime_ago_is_there_while_others_are_written(
        self, real: MakePlace
    ) -> None:
        manager, gateway = real(session_ttl_s=2)
        session_id = await manager.create_session(workspace_id="w")
        await manager.save_step(session_id, 1, {"a": 1})
        begun_ms = await store_time_ms(gateway)

        async def a_lifetime_has_passed() -> bool:
            await manager.save_step(session_id, 2, {"a": 2})
            return await store_time_ms(gateway) > begun_ms + 2100

        await wait_until(a_lifetime_has_passed, 10)
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}
        await shared_deadline_ms(gateway, session_id)

    async def test_the_export_and_its_idempotency_record_do_not_outlive_the_session(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake(session_ttl_s=HOUR_S)
        session_id = await prepare(manager)
        await manager.save_step(session_id, 5, {"a": 1}, request=keyed("save"))
        await manager.finalize(session_id, request=keyed("finalize"))
        await shared_deadline_ms(gateway, session_id)
        assert len(await names_of_keys(gateway, session_id)) == 4 + 3 + 2 + 1 + 2
        clock.shift(1.02 * HOUR_S)
        assert await names_of_keys(gateway, session_id) == set()

    async def test_an_idempotency_record_lives_on_with_a_session_of_less_than_a_day(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, _gateway = fake(session_ttl_s=HOUR_S)
        session_id = await prepare(manager)
        first = await manager.save_step(session_id, 5, {"a": 1}, request=keyed())
        for _ in range(26):
            clock.shift(0.9 * HOUR_S)
            await manager.update_progress(session_id, 0)
            again = keyed()
            assert await manager.save_step(session_id, 5, {"a": 1}, request=again) == first
            assert again.replayed
        clock.shift(0.9 * HOUR_S)
        later = keyed()
        assert (await manager.save_step(session_id, 5, {"a": 1}, request=later))["version"] == 2
        assert not later.replayed

    async def test_an_idempotency_record_lives_a_day_where_the_session_lives_a_week(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, _gateway = fake()
        session_id = await prepare(manager)
        first = await manager.save_step(session_id, 5, {"a": 1}, request=keyed())
        clock.shift(DAY_S - 1)
        again = keyed()
        assert await manager.save_step(session_id, 5, {"a": 1}, request=again) == first
        assert again.replayed
        clock.shift(2)
        later = keyed()
        assert (await manager.save_step(session_id, 5, {"a": 1}, request=later))["version"] == 2
        assert not later.replayed


class TestReads:
    @pytest.mark.parametrize("name", READS)
    async def test_renew_nothing(
        self, fake: MakePlace, clock: time_machine.Traveller, name: str
    ) -> None:
        place = fake(draft_ttl_s=WEEK_S)
        session_id = await prepare_with_files(place, finalized=True)
        before = await deadlines_ms(place.gateway, session_id)
        clock.shift(6 * DAY_S)
        await READS[name](place, session_id)
        assert await deadlines_ms(place.gateway, session_id) == before

    async def test_that_fail_renew_nothing(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake(draft_ttl_s=WEEK_S)
        session_id = await prepare(manager)
        before = await deadlines_ms(gateway, session_id)
        clock.shift(6 * DAY_S)
        assert await manager.get_step(session_id, 9) is None
        assert await manager.get_draft(session_id, 9) is None
        assert await manager.get_export(session_id) is None
        assert await deadlines_ms(gateway, session_id) == before


class TestTheDeadlineNeverMovesBack:
    @pytest.mark.parametrize("name", WRITES)
    async def test_when_the_configured_lifetime_shrinks(
        self, fake: MakePlace, clock: time_machine.Traveller, name: str
    ) -> None:
        long, short = fake(), fake(session_ttl_s=HOUR_S)
        write = WRITES[name]
        session_id = await prepare_with_files(long, finalized=write.finalized)
        until_ms = await shared_deadline_ms(long.gateway, session_id)
        clock.shift(DAY_S / 2)
        await write.do(short, session_id)
        assert await shared_deadline_ms(short.gateway, session_id) == until_ms

    async def test_and_moves_on_once_the_shorter_lifetime_reaches_beyond_it(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        long, short = fake(), fake(session_ttl_s=HOUR_S)
        session_id = await prepare(long.manager)
        until_ms = await shared_deadline_ms(long.gateway, session_id)
        clock.move_to(until_ms / 1000 - 60)
        await short.manager.save_step(session_id, 1, {"a": 2})
        moved_ms = await shared_deadline_ms(short.gateway, session_id)
        assert moved_ms >= until_ms + (HOUR_S - 60) * 1000
        assert moved_ms <= until_ms + (1.01 * HOUR_S - 60) * 1000

    async def test_when_the_hosts_clock_is_behind_the_stores(self, real: MakePlace) -> None:
        manager, gateway = real()
        session_id = await prepare(manager)
        until_ms = await shared_deadline_ms(gateway, session_id)
        for host_s in (0.0, 4_000_000_000.0):
            with time_machine.travel(host_s, tick=True):
                await manager.save_step(session_id, 1, {"a": 2})
            assert await shared_deadline_ms(gateway, session_id) <= until_ms + HOUR_S * 1000
            assert await shared_deadline_ms(gateway, session_id) >= until_ms


class TestTheEnd:
    @pytest.mark.parametrize("name", [name for name in WRITES if name != "set_metadata"])
    @pytest.mark.parametrize("end", ["expiry", "delete"])
    async def test_leaves_no_key_and_a_late_write_brings_none_back(
        self, fake: MakePlace, clock: time_machine.Traveller, name: str, end: str
    ) -> None:
        place = fake(draft_ttl_s=WEEK_S)
        manager, gateway = place
        write = WRITES[name]
        session_id = await prepare_with_files(place, finalized=write.finalized)
        if end == "expiry":
            clock.shift(1.01 * WEEK_S)
        else:
            await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()
        with pytest.raises(SessionNotFoundError):
            await write.do(place, session_id)
        for read in READS.values():
            with pytest.raises(SessionNotFoundError):
                await read(place, session_id)
        with pytest.raises(SessionNotFoundError):
            await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()

    async def test_a_late_write_with_an_idempotency_key_leaves_no_record(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        await manager.save_step(session_id, 5, {"a": 1}, request=keyed("before"))
        await manager.delete_session(session_id)
        for key in ("before", "after"):
            with pytest.raises(SessionNotFoundError):
                await manager.save_step(session_id, 5, {"a": 1}, request=keyed(key))
            with pytest.raises(SessionNotFoundError):
                await manager.finalize(session_id, request=keyed(key))
        assert await names_of_keys(gateway, session_id) == set()

    async def test_set_metadata_after_it_makes_the_session_anew_and_empty(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        await manager.save_step(session_id, 1, {"a": 2})
        await manager.delete_session(session_id)
        await manager.set_metadata(session_id, "u", "w")
        assert await names_of_keys(gateway, session_id) == {
            "metadata",
            "progress",
            "events",
            "ops",
        }
        assert (await manager.save_step(session_id, 1, {"a": 1}))["version"] == 1

    async def test_of_a_session_of_one_second_comes_and_takes_every_key(
        self, raw: Redis, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REDIS_URL", valkey.url)
        monkeypatch.setenv("ONBOARDING_SESSION_TTL_S", "1")
        get_onboarding_session_manager.cache_clear()
        manager = get_onboarding_session_manager()
        try:
            left: list[int] = []
            for _ in range(5):
                with suppress(SessionNotFoundError):  # the machine stood still for a second
                    session_id = await prepare(manager)
                    await manager.save_step(session_id, 5, {"a": 1}, request=keyed())
                    await manager.finalize(session_id)
                    assert await manager.get_export(session_id) is not None
                    break

            async def gone() -> bool:
                left.append(len(await raw.keys(f"onboarding:{session_id}:*")))
                return left[-1] == 0

            await wait_until(gone, 5)
            # All at once but for the drafts and the record, which may have been first.
            assert set(left) <= {11, 10, 9, 8, 0}
            assert len(left) > 1
            with pytest.raises(SessionNotFoundError):
                await manager.save_step(session_id, 6, {"a": 1})
            assert await raw.keys(f"onboarding:*{session_id}*") == []
        finally:
            await manager.aclose()
            get_onboarding_session_manager.cache_clear()


class TestADraft:
    async def test_expires_by_itself_and_the_session_does_not(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, _gateway = fake()
        session_id = await prepare(manager)
        clock.shift(DAY_S - 1)
        assert await manager.get_draft(session_id, 3) is not None
        clock.shift(2)
        assert await manager.get_draft(session_id, 3) is None
        summary = await manager.get_session_summary(session_id)
        assert not any(step["has_draft"] for step in summary["steps"])
        assert set(await manager.get_all_steps(session_id)) == {1, 2}

    async def test_is_not_kept_alive_by_other_writes(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake()
        session_id = await prepare(manager)
        before = (await deadlines_ms(gateway, session_id))["draft:3"]
        clock.shift(DAY_S / 2)
        await manager.save_step(session_id, 1, {"a": 2})
        await manager.save_draft(session_id, 4, {"a": 5})
        after = await deadlines_ms(gateway, session_id)
        assert after["draft:3"] == before
        assert after["draft:4"] == before + DAY_S / 2 * 1000

    async def test_does_not_outlive_its_session_whatever_is_configured(
        self, fake: MakePlace
    ) -> None:
        manager, gateway = fake(session_ttl_s=HOUR_S, draft_ttl_s=DAY_S)
        session_id = await prepare(manager)
        deadlines = await deadlines_ms(gateway, session_id)
        assert deadlines["draft:3"] == deadlines["progress"]


class TestOnlyAWriteThatCrossesACoarseStep:
    """168 coarse steps make a lifetime; a PEXPIREAT is what touches another key."""

    @staticmethod
    async def touched(raw: Redis) -> int:
        stats: Any = await raw.info("commandstats")
        found: dict[str, int] = stats.get("cmdstat_pexpireat", {"calls": 0})
        return found["calls"]

    async def test_touches_other_keys_and_then_every_one(self, raw: Redis, real: MakePlace) -> None:
        # One coarse step is 0.5 s.
        place = real(session_ttl_s=84)
        manager, gateway = place
        session_id = await prepare_with_files(place, finalized=True)
        await manager.reopen(session_id)
        made_until_ms = await shared_deadline_ms(gateway, session_id)

        async def crossed() -> bool:
            return await store_time_ms(gateway) + 84_000 > made_until_ms

        await wait_until(crossed, 5)
        before = await self.touched(raw)
        await manager.save_step(session_id, 1, {"a": 2})
        shared = [
            name for name in await names_of_keys(gateway, session_id) if name.startswith(SHARED)
        ]
        # Four, the export, the history, the tokens, two steps, a result and an upload in two parts
        # each, a part by itself.
        assert len(shared) == 4 + 1 + 1 + 1 + 2 + 2 * 3 + 1
        # The parts of a body are found by its description and by the memory of operations.
        assert await self.touched(raw) - before == len(shared) + 4
        assert await shared_deadline_ms(gateway, session_id) > made_until_ms

    async def test_is_one_an_hour_where_a_session_lives_a_week(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake()
        clock.shift(1)
        session_id = await prepare(manager)
        until_ms = await shared_deadline_ms(gateway, session_id)
        clock.shift(HOUR_S - 2)
        await manager.save_step(session_id, 1, {"a": 2})
        assert await shared_deadline_ms(gateway, session_id) == until_ms
        clock.shift(2)
        await manager.save_step(session_id, 1, {"a": 3})
        assert await shared_deadline_ms(gateway, session_id) == until_ms + HOUR_S * 1000

    async def test_and_none_within_a_step(self, raw: Redis, real: MakePlace) -> None:
        # One coarse step is seven months.
        place = real(session_ttl_s=LONGEST_LIFE_S)
        manager, gateway = place
        session_id = await prepare(manager)
        before = await self.touched(raw)
        for number in range(1, 24):
            await manager.save_step(session_id, number, {"a": number})
            await manager.save_draft(session_id, number, {"a": number})
        await manager.patch_step(session_id, 1, {"b": 1})
        await manager.delete_step(session_id, 2)
        await manager.update_progress(session_id, 9)
        await manager.set_metadata(session_id, "u", "w")
        await manager.finalize(session_id)
        await place.generation.update_session_status(session_id, "processing")
        await place.generation.add_progress_event(ProgressEvent(session_id, "a", 50, "b", "id"))
        await place.generation.update_session_status(session_id, "complete")
        await place.generation.set_language_preference(session_id, "de")
        await manager.reopen(session_id)
        assert await self.touched(raw) == before
        for _ in range(20):
            await place.add_answer(session_id)
        # That of the history, once.
        assert await self.touched(raw) == before + 1
        await shared_deadline_ms(gateway, session_id)
