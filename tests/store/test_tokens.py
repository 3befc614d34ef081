"""Tokens in the store: only digests, in one hash that lives and goes with its session."""

import uuid

import pytest
import time_machine
from redis.asyncio import Redis

from app.clock import now_ms
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    ResumeTokenNotFoundError,
    SessionConflictError,
    SessionNotFoundError,
)
from app.onboarding.sessions import Owner
from app.onboarding.tokens import (
    MAX_OPEN_TOKENS,
    MAX_RESUME_TOKENS,
    MAX_SESSION_TOKENS,
    ResumeRecord,
    ResumeToken,
    make_resume_token,
    parse_resume_token,
)
from app.store.catalogue import CatalogueStore
from app.store.gateway import Gateway
from app.store.recovery import RecoveryStore
from app.store.tokens import NewResumeToken
from tests.conftest import NOON_S
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Place,
    count_events,
    deadlines_ms,
    keyed,
    names_of_keys,
    prepare,
)

OWNER = Owner("w1", "u1", "en")
ALL_OF_A_NEW_SESSION = {"metadata", "progress", "events", "ops", "tokens"}


async def begin(place: Place, digest: str | None = "0a", seed: str | None = "5e") -> str:
    """Make a session with a token, and give its id."""
    view = await place.manager.begin_session(OWNER, token_digest=digest, seed=seed)
    return view["session_id"]


async def add(place: Place, session_id: str, digest: str) -> None:
    await place.tokens.add_session_token(session_id, digest, at_ms=now_ms())


async def changes_of(gateway: Gateway, session_id: str) -> bytes:
    [changes] = await gateway.command("HMGET", gateway.keys.session(session_id).progress, "changes")
    assert isinstance(changes, bytes)
    return changes


@pytest.fixture(params=["off", "on"])
def tagged_or_not(request: pytest.FixtureRequest, real: MakePlace) -> Place:
    """Give a place on the real store, without hash tags and with them."""
    return real(key_hash_tag=request.param)


# --- Session tokens -------------------------------------------------------------------------------


async def test_a_session_may_begin_with_a_token(place: Place) -> None:
    session_id = await begin(place)
    assert await place.tokens.is_session_token(session_id, "0a")
    assert not await place.tokens.is_session_token(session_id, "0b")
    assert await place.tokens.get_seed(session_id) == "5e"
    assert await names_of_keys(place.gateway, session_id) == ALL_OF_A_NEW_SESSION
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1


async def test_a_session_that_begins_without_one_has_no_tokens_at_all(place: Place) -> None:
    session_id = await begin(place, None, None)
    assert not await place.tokens.is_session_token(session_id, "0a")
    assert await place.tokens.get_seed(session_id) is None
    assert "tokens" not in await names_of_keys(place.gateway, session_id)


async def test_nothing_opens_an_unknown_session(place: Place) -> None:
    unknown = str(uuid.uuid4())
    assert not await place.tokens.is_session_token(unknown, "0a")
    assert await place.tokens.get_seed(unknown) is None
    with pytest.raises(SessionNotFoundError):
        await add(place, unknown, "0a")
    assert await names_of_keys(place.gateway, unknown) == set()


async def test_a_session_whose_id_is_known_before_is_made_once(place: Place) -> None:
    wanted = str(uuid.uuid4())
    view = await place.manager.begin_session(OWNER, session_id=wanted, token_digest="0a")
    assert view["session_id"] == wanted
    with pytest.raises(SessionConflictError):
        await place.manager.begin_session(OWNER, session_id=wanted, token_digest="0b")
    assert not await place.tokens.is_session_token(wanted, "0b")


async def test_a_session_whose_reply_was_lost_has_the_token_of_the_first_sending(
    wired: Place, proxy: Proxy
) -> None:
    await prepare(wired.manager)
    proxy.drop_replies(1, to="EVALSHA")
    session_id = await begin(wired)
    assert await wired.tokens.is_session_token(session_id, "0a")


async def test_a_replay_of_the_making_changes_no_token(tagged_or_not: Place) -> None:
    place = tagged_or_not
    first = await place.manager.begin_session(OWNER, request=keyed(), token_digest="0a", seed="5e")
    again = await place.manager.begin_session(OWNER, request=keyed(), token_digest="0b", seed="5f")
    session_id = first["session_id"]
    assert again["session_id"] == session_id
    assert await place.tokens.is_session_token(session_id, "0a")
    assert not await place.tokens.is_session_token(session_id, "0b")
    assert await place.tokens.get_seed(session_id) == "5e"


async def test_further_tokens_open_a_session_beside_the_first(tagged_or_not: Place) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    await add(place, session_id, "0b")
    await add(place, session_id, "0b")
    for digest in ("0a", "0b"):
        assert await place.tokens.is_session_token(session_id, digest)
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1
    await place.manager.delete_session(session_id)
    assert not await place.tokens.is_session_token(session_id, "0a")
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_the_oldest_token_goes_where_there_are_too_many(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake()
    session_id = await begin(place, "first")
    for number in range(MAX_SESSION_TOKENS):
        assert await place.tokens.is_session_token(session_id, "first")
        clock.shift(1)
        await add(place, session_id, f"{number}")
        # One that is there already takes nobody's place.
        await add(place, session_id, f"{number}")
    assert not await place.tokens.is_session_token(session_id, "first")
    for number in range(MAX_SESSION_TOKENS):
        assert await place.tokens.is_session_token(session_id, f"{number}")
    assert await place.tokens.get_seed(session_id) == "5e"


async def test_a_token_is_no_event_and_no_change_but_renews_the_life(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await begin(place)
    events = await count_events(place.gateway, session_id)
    changes = await changes_of(place.gateway, session_id)
    for _ in range(3):
        clock.shift(900)
        await add(place, session_id, "0b")
    assert await count_events(place.gateway, session_id) == events
    assert await changes_of(place.gateway, session_id) == changes
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1


async def test_the_tokens_end_with_the_life_of_their_session(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await begin(place)
    clock.shift(1011)
    assert not await place.tokens.is_session_token(session_id, "0a")
    with pytest.raises(SessionNotFoundError):
        await add(place, session_id, "0b")
    assert await names_of_keys(place.gateway, session_id) == set()


# --- Resume tokens --------------------------------------------------------------------------------


def token_id(number: int) -> str:
    return f"{number:016x}"


def secret_token(session_id: str, number: int = 0) -> ResumeToken:
    """Make a resume token as its holder knows it."""
    token = parse_resume_token(make_resume_token(session_id, token_id(number), bytes(32)))
    assert token is not None
    return token


async def hand_over(
    place: Place, session_id: str, number: int = 0, *, ttl_s: int = 3600, label: str = ""
) -> int:
    """Keep a resume token; give when its time is over."""
    digest = secret_token(session_id, number).digest
    new = NewResumeToken(token_id(number), digest, ttl_s * 1000, label)
    return await place.tokens.create(session_id, new, at_ms=now_ms())


async def use(place: Place, session_id: str, number: int = 0, digest: str = "0d") -> None:
    token = secret_token(session_id, number)
    session = await place.tokens.use(token, digest, at_ms=now_ms())
    assert (session.session_id, session.owner) == (session_id, OWNER)


async def revoke(place: Place, session_id: str, number: int = 0) -> None:
    await place.tokens.revoke(session_id, token_id(number), at_ms=now_ms())


async def ids_of(place: Place, session_id: str) -> list[str]:
    return [record.token_id for record in await place.tokens.list_open(session_id)]


async def test_resume_tokens_are_listed_newest_first_while_of_use(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake()
    session_id = await begin(place)
    ends = []
    for number, ttl_s in enumerate((100, 300, 200)):
        clock.shift(1)
        ends.append(await hand_over(place, session_id, number, ttl_s=ttl_s, label=f"l {number}  é"))
    made_ms = int(NOON_S * 1000)
    assert ends == [made_ms + 101_000, made_ms + 302_000, made_ms + 203_000]
    await use(place, session_id, 1)
    listed = await place.tokens.list_open(session_id)
    assert [record.token_id for record in listed] == [token_id(n) for n in (2, 1, 0)]
    assert listed[1] == ResumeRecord(token_id(1), "l 1  é", made_ms + 2000, ends[1], made_ms + 3000)
    clock.shift(98)
    assert await ids_of(place, session_id) == [token_id(2), token_id(1)]
    # The one that was used can be revoked as long as the session is there.
    clock.shift(3600)
    assert await ids_of(place, session_id) == [token_id(1)]
    assert await place.tokens.is_session_token(session_id, "0d")
    await hand_over(place, session_id, 3)
    await revoke(place, session_id, 1)
    assert await ids_of(place, session_id) == [token_id(3)]
    assert not await place.tokens.is_session_token(session_id, "0d")


async def test_a_resume_token_is_no_event_and_no_change_but_renews_the_life(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await begin(place, None, None)
    events = await count_events(place.gateway, session_id)
    changes = await changes_of(place.gateway, session_id)
    for call in (hand_over, use, hand_over, revoke):
        clock.shift(900)
        await call(place, session_id)
        assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1
    assert await count_events(place.gateway, session_id) == events
    assert await changes_of(place.gateway, session_id) == changes


async def test_no_more_wait_to_be_used_than_may(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake()
    session_id = await begin(place)
    for number in range(MAX_OPEN_TOKENS):
        await hand_over(place, session_id, number, ttl_s=60 if number == 0 else 3600)
    with pytest.raises(InvalidRequestError, match=r"20 resume tokens.*revoke one first"):
        await hand_over(place, session_id, 99)
    # One that is used, one that is revoked, and one whose time is over make room.
    await use(place, session_id, 1)
    await hand_over(place, session_id, 100)
    await revoke(place, session_id, 2)
    await hand_over(place, session_id, 101)
    with pytest.raises(InvalidRequestError):
        await hand_over(place, session_id, 99)
    clock.shift(60)
    await hand_over(place, session_id, 102)
    with pytest.raises(InvalidRequestError):
        await hand_over(place, session_id, 99)
    kept = await place.gateway.command("HKEYS", place.gateway.keys.session(session_id).tokens)
    assert f"resume:{token_id(0)}".encode() not in kept


async def test_so_many_used_ones_are_remembered_that_they_do_not_pile_up(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake()
    session_id = await begin(place)
    for number in range(MAX_RESUME_TOKENS + 5):
        await hand_over(place, session_id, number)
        await use(place, session_id, number, f"{number}")
        clock.shift(1)
    remembered = await ids_of(place, session_id)
    assert remembered == [token_id(number) for number in range(MAX_RESUME_TOKENS + 4, 4, -1)]


async def test_revoking_takes_the_session_token_back_that_was_given(tagged_or_not: Place) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    await hand_over(place, session_id, 0)
    await hand_over(place, session_id, 1)
    await use(place, session_id, 0, "0d")
    await use(place, session_id, 1, "0e")
    await revoke(place, session_id, 0)
    assert [await place.tokens.is_session_token(session_id, each) for each in OPENING] == [
        *(True, False, True)
    ]
    for call in (use, revoke):
        with pytest.raises(ResumeTokenNotFoundError):
            await call(place, session_id, 0)
    assert await ids_of(place, session_id) == [token_id(1)]


OPENING = ("0a", "0d", "0e")
"""The digests of the first session token, and of two that resume tokens gave."""


async def test_of_an_unknown_session_there_is_nothing(place: Place) -> None:
    unknown = str(uuid.uuid4())
    with pytest.raises(SessionNotFoundError):
        await hand_over(place, unknown)
    with pytest.raises(SessionNotFoundError):
        await place.tokens.list_open(unknown)
    with pytest.raises(SessionNotFoundError):
        await revoke(place, unknown)
    with pytest.raises(ResumeTokenNotFoundError):
        await use(place, unknown)
    assert await names_of_keys(place.gateway, unknown) == set()


async def test_a_lost_reply_changes_no_answer(wired: Place, proxy: Proxy) -> None:
    session_id = await begin(wired)
    proxy.drop_replies(1, to="EVALSHA")
    ends_ms = await hand_over(wired, session_id)
    [record] = await wired.tokens.list_open(session_id)
    assert record.expires_ms == ends_ms
    proxy.drop_replies(1, to="EVALSHA")
    await use(wired, session_id)
    assert await wired.tokens.is_session_token(session_id, "0d")
    proxy.drop_replies(1, to="EVALSHA")
    await revoke(wired, session_id)
    assert await ids_of(wired, session_id) == []


# --- Damage ---------------------------------------------------------------------------------------


async def test_what_are_no_tokens_is_an_error_that_names_them_and_of_nothing_else(
    place: Place,
) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    await place.gateway.command("SET", key, "x", "PX", 60_000)
    for call in (
        place.tokens.is_session_token(session_id, "0a"),
        place.tokens.get_seed(session_id),
        add(place, session_id, "0b"),
    ):
        with pytest.raises(CorruptRecordError) as damage:
            await call
        assert damage.value.key == key
    await place.manager.save_step(session_id, 1, {"a": 1})
    await place.manager.delete_session(session_id)
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_a_seed_that_is_no_text_is_an_error(place: Place) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    await place.gateway.command("HSET", key, "seed", b"\xff")
    with pytest.raises(CorruptRecordError):
        await place.tokens.get_seed(session_id)


DAMAGED_RECORDS = {
    "another text": "hello",
    "nothing": "",
    "a time that is none": "0c then 1767268800000 0 - ",
    "a time beyond the calendar": f"0c 1767268800000 {'9' * 30} 0 - ",
}


@pytest.mark.parametrize("how", DAMAGED_RECORDS)
async def test_a_damaged_record_is_an_error_of_what_asks_for_it(place: Place, how: str) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    name = f"resume:{token_id(0)}"
    await place.gateway.command("HSET", key, name, DAMAGED_RECORDS[how])
    with pytest.raises(CorruptRecordError) as damage:
        await place.tokens.list_open(session_id)
    assert damage.value.key == key
    if "calendar" not in how:
        for call in (hand_over, revoke):
            with pytest.raises(CorruptRecordError) as damage:
                await call(place, session_id)
            assert damage.value.key == key
        # Whether the token is good, nobody can say: it tells of no session.
        with pytest.raises(ResumeTokenNotFoundError):
            await use(place, session_id)
    # What it does not concern goes on.
    assert await place.tokens.is_session_token(session_id, "0a")
    await add(place, session_id, "0b")
    await place.manager.save_step(session_id, 1, {"a": 1})


async def test_a_record_under_no_id_is_an_error(place: Place) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    await place.gateway.command("HSET", key, "resume:x", "0c 1 2 0 - ")
    with pytest.raises(CorruptRecordError):
        await place.tokens.list_open(session_id)


async def test_a_session_of_which_half_is_gone_is_damaged_and_not_absent(place: Place) -> None:
    session_id = await begin(place)
    await hand_over(place, session_id)
    keys = place.gateway.keys.session(session_id)
    await place.gateway.command("DEL", keys.metadata)
    # Its token can be judged, so its holder may know.
    with pytest.raises(CorruptRecordError):
        await use(place, session_id)
    await place.gateway.command("DEL", keys.progress)
    await place.gateway.command("HSET", keys.metadata, "language", "en")
    await place.gateway.command("PEXPIRE", keys.metadata, 60_000)
    for call in (hand_over, revoke, ids_of):
        with pytest.raises(CorruptRecordError):
            await call(place, session_id)
    with pytest.raises(ResumeTokenNotFoundError):
        await use(place, session_id)


async def recover(place: Place, session_id: str) -> tuple[list[str], list[str]]:
    """Recover a session; give what was kept and what was lost."""
    recovery = RecoveryStore(place.gateway, CatalogueStore(place.gateway, place.manager.catalogue))
    remains = await recovery.recover(session_id, at_ms=now_ms())
    return remains.kept, remains.lost


@pytest.mark.parametrize("damage", [None, "of another type", "in a record"])
async def test_a_recovered_session_keeps_its_tokens_if_they_can_be_read(
    tagged_or_not: Place, damage: str | None
) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    await hand_over(place, session_id)
    keys, is_whole = place.gateway.keys.session(session_id), damage is None
    if damage == "in a record":
        await place.gateway.command("HSET", keys.tokens, f"resume:{token_id(0)}", "x")
    elif damage is not None:
        await place.gateway.command("SET", keys.tokens, "x", "PX", 60_000)
    await place.gateway.command("HSET", keys.progress, "saved", "damaged")
    kept, lost = await recover(place, session_id)
    assert ("tokens" in kept) is is_whole
    assert ("tokens" in lost) is not is_whole
    assert await place.tokens.is_session_token(session_id, "0a") is is_whole
    deadlines = await deadlines_ms(place.gateway, session_id)
    assert set(deadlines.values()) == {deadlines["progress"]}


async def test_tokens_alone_keep_no_session(tagged_or_not: Place, raw: Redis) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    keys = place.gateway.keys.session(session_id)
    await place.gateway.command("DEL", keys.metadata, keys.events, keys.ops)
    await place.gateway.command("HSET", keys.progress, "saved", "damaged")
    assert (await recover(place, session_id))[0] == []
    assert await names_of_keys(place.gateway, session_id) == set()
    assert await raw.keys(f"*{session_id}*") == []
