"""A session handed over by a token: used once, the same within a minute, and nothing else opens."""

import asyncio
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import time_machine
from fakeredis import FakeServer

from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    ResumeTokenNotFoundError,
    SessionNotFoundError,
)
from app.onboarding.tokens import (
    MAX_OPEN_TOKENS,
    digest_of,
    make_resume_token,
    parse_resume_token,
    parse_session_token,
)
from app.services.manager import make_manager
from app.services.tokens import TokenService
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import NOON_S, fake_gateway, known_settings
from tests.store.sessions import Place, names_of_keys

MINUTE_S = 60


class Office(Place):
    """A manager, and what hands its sessions over."""

    @property
    def service(self) -> TokenService:
        """The resume tokens."""
        return TokenService(self.gateway, self.manager)

    async def begin(self) -> str:
        """Make a session."""
        return await self.manager.create_session(workspace_id="w1", user_id="u1")

    async def is_open(self, session_token: str) -> bool:
        """Say whether a session token opens its session."""
        parsed = parse_session_token(session_token)
        assert parsed is not None
        return await self.tokens.is_session_token(*parsed)


@pytest.fixture
def office(gateway: Gateway) -> Office:
    """Give all of it, on the fake store and on the real one in turn."""
    return Office(make_manager(gateway, known_settings()), gateway)


@pytest.fixture
def standing(clock: time_machine.Traveller) -> Office:
    """Give all of it on a fake store that goes by `clock`."""
    gateway = fake_gateway(FakeServer())
    return Office(make_manager(gateway, known_settings()), gateway)


async def refused(call: Awaitable[Any]) -> str:
    """Check that a token is refused; give what is said."""
    with pytest.raises(ResumeTokenNotFoundError) as refusal:
        await call
    return str(refusal.value)


async def test_a_token_takes_the_session_up_and_gives_a_token_that_opens_it(
    office: Office,
) -> None:
    session_id = await office.begin()
    await office.manager.save_step(session_id, 1, {"a": 1})
    made = await office.service.create_resume_token(session_id, label="a phone")
    view, session_token = await office.service.resume(made["token"])
    assert view == await office.manager.get_session(session_id)
    assert view["progress"]["completed"] == 1
    assert parse_session_token(session_token) == (session_id, digest_of(session_token))
    assert await office.is_open(session_token)
    [listed] = (await office.service.list_resume_tokens(session_id))["resume_tokens"]
    assert (listed["token_id"], listed["label"]) == (made["token_id"], "a phone")
    assert listed["expires_at"] == made["expires_at"]
    assert listed["used_at"] is not None


async def test_it_is_used_once_and_within_a_minute_gives_the_same(
    standing: Office, clock: time_machine.Traveller
) -> None:
    session_id = await standing.begin()
    made = await standing.service.create_resume_token(session_id)
    first = await standing.service.resume(made["token"])
    for _ in range(3):
        clock.shift(MINUTE_S / 3)
        assert await standing.service.resume(made["token"]) == first
    clock.shift(0.001)
    await refused(standing.service.resume(made["token"]))
    # What it gave goes on opening.
    assert await standing.is_open(first[1])


async def test_its_time_is_over_when_it_was_said_to_be(
    standing: Office, clock: time_machine.Traveller
) -> None:
    session_id = await standing.begin()
    made = await standing.service.create_resume_token(session_id, ttl_s=90)
    late = await standing.service.create_resume_token(session_id, ttl_s=90)
    assert made["expires_at"] == "2026-01-01T12:01:30.000Z"
    clock.move_to(NOON_S + 89.999)
    first = await standing.service.resume(made["token"])
    clock.move_to(NOON_S + 90)
    await refused(standing.service.resume(late["token"]))
    # An answer that was lost just before the end is given again, whoever else made tokens since.
    await standing.service.create_resume_token(session_id)
    assert await standing.service.resume(made["token"]) == first


async def test_it_lives_as_long_as_asked_or_a_day(
    standing: Office, clock: time_machine.Traveller
) -> None:
    session_id = await standing.begin()
    made = await standing.service.create_resume_token(session_id)
    assert made["expires_at"] == "2026-01-02T12:00:00.000Z"
    week = await standing.service.create_resume_token(session_id, ttl_s=604_800)
    assert week["expires_at"] == "2026-01-08T12:00:00.000Z"
    clock.move_to(NOON_S + 604_799)
    assert (await standing.service.resume(week["token"]))[0]["session_id"] == session_id


async def test_it_goes_with_its_session(standing: Office, clock: time_machine.Traveller) -> None:
    session_id, other = await standing.begin(), await standing.begin()
    made = await standing.service.create_resume_token(session_id)
    await standing.manager.delete_session(session_id)
    await refused(standing.service.resume(made["token"]))
    made = await standing.service.create_resume_token(other, ttl_s=604_800)
    clock.shift(604_799)
    used, session_token = await standing.service.resume(made["token"])
    # It was a write: the session lives on.
    assert used["expires_at"] == "2026-01-15T12:00:00.000Z"
    clock.shift(604_800 * 1.01)
    assert not await standing.is_open(session_token)
    assert await names_of_keys(standing.gateway, other) == set()


async def test_revoking_ends_it_and_what_it_gave(office: Office) -> None:
    session_id = await office.begin()
    unused = await office.service.create_resume_token(session_id)
    used = await office.service.create_resume_token(session_id)
    kept = await office.service.create_resume_token(session_id)
    _, session_token = await office.service.resume(used["token"])
    for made in (unused, used):
        revoked = await office.service.revoke_resume_token(session_id, made["token_id"])
        assert revoked == {
            "success": True,
            "session_id": session_id,
            "token_id": made["token_id"],
        }
        await refused(office.service.resume(made["token"]))
        await refused(office.service.revoke_resume_token(session_id, made["token_id"]))
    assert not await office.is_open(session_token)
    assert (await office.service.resume(kept["token"]))[0]["session_id"] == session_id


async def test_uses_at_once_all_get_the_same(office: Office) -> None:
    session_id = await office.begin()
    made = await office.service.create_resume_token(session_id)
    given = await asyncio.gather(*(office.service.resume(made["token"]) for _ in range(8)))
    assert len({session_token for _, session_token in given}) == 1
    assert await office.is_open(given[0][1])


async def test_whatever_is_wrong_with_a_token_the_same_is_said(
    standing: Office, clock: time_machine.Traveller
) -> None:
    session_id, service = await standing.begin(), standing.service
    over = await service.create_resume_token(session_id, ttl_s=60)
    used = await service.create_resume_token(session_id)
    revoked = await service.create_resume_token(session_id)
    made = await service.create_resume_token(session_id)
    _, session_token = await service.resume(used["token"])
    await service.revoke_resume_token(session_id, revoked["token_id"])
    clock.shift(61)
    tokens = {
        "over": over["token"],
        "used": used["token"],
        "revoked": revoked["token"],
        "a session token": session_token,
        "no token": "hello",
        "nothing": "",
        "of an unknown session": make_resume_token(str(uuid.uuid4()), "0" * 16, bytes(32)),
        "of an unknown id": make_resume_token(session_id, "0" * 16, bytes(32)),
        "of another secret": make_resume_token(session_id, made["token_id"], bytes(32)),
    }
    said = {how: await refused(service.resume(token)) for how, token in tokens.items()}
    assert len(set(said.values())) == 1, said
    # A wrong guess does not use it up.
    assert (await service.resume(made["token"]))[0]["session_id"] == session_id


async def test_a_wrong_guess_writes_nothing(office: Office) -> None:
    session_id = await office.begin()
    made = await office.service.create_resume_token(session_id)
    keys = office.gateway.keys.session(session_id)

    async def everything() -> list[Any]:
        return [await office.gateway.command("HGETALL", key) for key in (keys.tokens, keys.ops)]

    before = await everything()
    await refused(office.service.resume(make_resume_token(session_id, made["token_id"], bytes(32))))
    assert await everything() == before


async def test_no_more_wait_than_may(office: Office) -> None:
    session_id = await office.begin()
    for _ in range(MAX_OPEN_TOKENS):
        await office.service.create_resume_token(session_id)
    with pytest.raises(InvalidRequestError, match="revoke one first"):
        await office.service.create_resume_token(session_id)
    listed = (await office.service.list_resume_tokens(session_id))["resume_tokens"]
    assert len(listed) == MAX_OPEN_TOKENS


Use = Callable[[TokenService, str], Awaitable[Any]]
USES: dict[str, Use] = {
    "create": lambda service, session_id: service.create_resume_token(session_id),
    "list": lambda service, session_id: service.list_resume_tokens(session_id),
    "revoke": lambda service, session_id: service.revoke_resume_token(session_id, "0" * 16),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
async def test_only_a_session_that_is_there_and_has_a_uuid4_has_tokens(
    office: Office, use: Use
) -> None:
    with pytest.raises(SessionNotFoundError):
        await use(office.service, str(uuid.uuid4()))
    await office.manager.set_metadata("a-name", "u1", "w1")
    with pytest.raises(InvalidRequestError):
        await use(office.service, "a-name")


@pytest.mark.parametrize("asked", [{"ttl_s": 59}, {"ttl_s": 604_801}, {"label": "a\0"}])
async def test_what_may_not_be_asked_for_makes_no_token(
    office: Office, asked: dict[str, Any]
) -> None:
    session_id = await office.begin()
    with pytest.raises(InvalidRequestError):
        await office.service.create_resume_token(session_id, **asked)
    assert (await office.service.list_resume_tokens(session_id))["resume_tokens"] == []


async def test_a_damaged_session_is_told_as_such(office: Office) -> None:
    session_id = await office.begin()
    made = await office.service.create_resume_token(session_id)
    key = office.gateway.keys.session(session_id).metadata
    await office.gateway.command("HSET", key, "custom", "no object")
    with pytest.raises(CorruptRecordError):
        await office.service.resume(made["token"])
    # Nor is the token lost by it: what is mended within the minute can be taken up.
    await office.gateway.command("HSET", key, "custom", "{}")
    assert (await office.service.resume(made["token"]))[0]["session_id"] == session_id


@pytest.mark.parametrize("hash_tag", ["off", "on"])
async def test_nothing_in_the_store_is_a_token_or_a_part_of_one_that_is_secret(
    settings: Settings, hash_tag: str
) -> None:
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), "key_hash_tag": hash_tag})
    gateway = connect(chosen)
    office = Office(make_manager(gateway, chosen), gateway)
    try:
        session_id = await office.begin()
        made = [await office.service.create_resume_token(session_id, label="l") for _ in range(2)]
        _, session_token = await office.service.resume(made[0]["token"])
        kept = await everything_in(gateway)
    finally:
        await gateway.aclose()
    assert digest_of(session_token).encode() in kept
    secrets: list[bytes] = [session_token.encode(), session_token[26:].encode()]
    for each in made:
        parsed = parse_resume_token(each["token"])
        assert parsed is not None
        assert parsed.digest.encode() in kept
        secrets += [each["token"].encode(), each["token"][40:].encode()]
        secrets += [parsed.secret, parsed.secret.hex().encode()]
        secrets += [urlsafe_b64encode(parsed.secret)[:-2]]
    assert [secret for secret in secrets if secret in kept] == []


async def everything_in(gateway: Gateway) -> bytes:
    """Give every value of the store, and every name."""
    kept: list[bytes] = []
    reads: dict[bytes, tuple[str, list[str | int]]] = {
        b"string": ("GET", []),
        b"hash": ("HGETALL", []),
        b"stream": ("XRANGE", ["-", "+"]),
        b"zset": ("ZRANGE", [0, -1]),
    }
    for key in await gateway.command("KEYS", "*"):
        command, further = reads[await gateway.command("TYPE", key)]
        kept += [key, repr(await gateway.command(command, key, *further)).encode()]
        found = await gateway.command(command, key, *further)
        kept += _bytes_of(found)
    return b"\n".join(kept)


def _bytes_of(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return _bytes_of([*value.items()])
    if isinstance(value, list | tuple):
        return [each for part in value for each in _bytes_of(part)]
    return [value if isinstance(value, bytes) else str(value).encode()]
