"""Who asks, by what they show, and whether a session is theirs.

Both answers are remembered for a while, so that a request costs no look at the store in most cases:
what was verified by its SHA-256, an owner by the session.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import structlog

from app.clock import LAST_MS, now_ms
from app.errors import (
    CorruptRecordError,
    NotTheirsError,
    UnauthenticatedError,
)
from app.onboarding.access import (
    ANYONE,
    NOBODY,
    ApiKey,
    Kind,
    Principal,
    find_api_key,
    is_theirs,
)
from app.onboarding.sessions import Owner
from app.onboarding.tokens import SessionToken, parse_session_token
from app.services.keyring import Keyring, make_keyring
from app.settings import Settings
from app.store.gateway import Gateway
from app.store.sessions import SessionStore
from app.store.tokens import TokenStore

log = structlog.get_logger()

KEPT_MS = 10_000
"""How long it is remembered that a session token is good and whose a session is, in milliseconds:
so soon a token that another process revoked, or an owner who was replaced, counts nowhere.
"""

REMEMBERED = 10_000
"""How many credentials, and how many owners, are remembered: some 5 MB."""

K = TypeVar("K")
V = TypeVar("V")


class Shown(NamedTuple):
    """A credential that is still to be verified: the header it came in, and what is kept of it."""

    name: bytes
    value: bytes
    digest: bytes


class AccessService:
    """Knows who asks, and whose a session is."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        enabled: bool,
        api_keys: Sequence[ApiKey] = (),
        keyring: Keyring | None = None,
    ) -> None:
        """Take what may be shown: everybody is `ANYONE` unless this is enabled."""
        self._enabled = enabled
        self._api_keys = api_keys
        self._keyring = keyring
        self._generation = 0
        self._tokens = TokenStore(gateway)
        self._sessions = SessionStore(gateway)
        self._verified: _Remembered[bytes, Principal] = _Remembered(REMEMBERED)
        self._owners: _Remembered[str, Owner] = _Remembered(REMEMBERED)

    async def start(self) -> None:
        """Fetch what tokens of users are verified with."""
        if self._keyring is not None:
            await self._keyring.start()

    async def aclose(self) -> None:
        """Stop what goes on in the background."""
        if self._keyring is not None:
            await self._keyring.aclose()

    def recognise(self, name: bytes, value: bytes) -> Principal | Shown:
        """Say who shows this in a header of that name, where nothing else is shown."""
        if not self._enabled:
            return ANYONE
        if self._keyring is not None and self._keyring.generation != self._generation:
            # A key may have been taken back, and with it what it signed.
            self._generation = self._keyring.generation
            self._verified.clear()
        digest = hashlib.sha256(name + value).digest()
        return self._verified.get(digest) or Shown(name, value, digest)

    async def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """Say who sent a request with these headers: `NOBODY` when nothing is shown.

        Raises `UnauthenticatedError` when it is more than one thing, or not good.
        """
        if not self._enabled:
            return ANYONE
        shown = [each for each in headers if each[0] in CREDENTIALS]
        if len(shown) > 1:
            raise UnauthenticatedError("Show one credential: a Bearer token, or an API key")
        if not shown:
            return NOBODY
        found = self.recognise(*shown[0])
        return found if isinstance(found, Principal) else await self.verify(found)

    async def verify(self, shown: Shown) -> Principal:
        """Say who showed this, and remember it. Raises `UnauthenticatedError`."""
        verify = self._verify_key if shown.name == b"x-api-key" else self._verify_bearer
        principal, until_ms = await verify(shown.value)
        self._verified.put(shown.digest, principal, until_ms)
        return principal

    def is_known_theirs(self, principal: Principal, session_id: str) -> bool:
        """Say whether it is known without a look at the store that a session is somebody's."""
        if principal.kind is not Kind.USER:
            return is_theirs(principal, session_id, None)
        owner = self._owners.get(session_id)
        return owner is not None and is_theirs(principal, session_id, owner)

    async def check_session(self, principal: Principal, session_id: str) -> None:
        """Raise `SessionNotFoundError` unless somebody may know that a session exists."""
        if self.is_known_theirs(principal, session_id):
            return
        if principal.kind is not Kind.USER:
            raise NotTheirsError
        # What is foreign costs a look at the store each time, as what is unknown does.
        owner = await self._find_owner(session_id)
        if not is_theirs(principal, session_id, owner):
            raise NotTheirsError
        self._owners.put(session_id, owner, now_ms() + KEPT_MS)

    def forget_tokens(self, session_id: str) -> None:
        """Look at the session's tokens again, in this process, when they are shown next."""
        self._verified.forget_value(Principal(Kind.WIZARD, session_id))

    async def _find_owner(self, session_id: str) -> Owner:
        try:
            return (await self._sessions.get(session_id)).owner
        except CorruptRecordError as damage:
            # Nobody can be shown to own it; operators see what is wrong with it.
            log.warning("owner_not_read", session_id=session_id)
            raise NotTheirsError from damage

    async def _verify_key(self, sent: bytes) -> tuple[Principal, int]:
        known = find_api_key(self._api_keys, sent.strip(b" \t"))
        if known is None:
            raise UnauthenticatedError("The API key is not, or no longer, one of those in use")
        return Principal(Kind.MACHINE, known.name, scopes=known.scopes), LAST_MS

    async def _verify_bearer(self, sent: bytes) -> tuple[Principal, int]:
        scheme, _, token = sent.decode("latin-1").strip(" \t").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError("Send Authorization: Bearer <token>")
        session = parse_session_token(token)
        if session is not None:
            return await self._verify_session_token(session)
        if self._keyring is None:
            raise UnauthenticatedError("This is no session token, and no others are taken here")
        verified = await self._keyring.verify(token)
        return verified.principal, int(min(verified.expires_at_s * 1000, LAST_MS))

    async def _verify_session_token(self, token: SessionToken) -> tuple[Principal, int]:
        try:
            is_good = await self._tokens.is_session_token(*token)
        except CorruptRecordError:
            # Nobody can be shown to have it.
            log.warning("tokens_not_read", session_id=token.session_id)
            is_good = False
        if not is_good:
            raise UnauthenticatedError("The session token is not, or no longer, good")
        return Principal(Kind.WIZARD, token.session_id), now_ms() + KEPT_MS


class _Remembered(Generic[K, V]):
    """What is known until a time in Unix milliseconds, so many at most: the oldest goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[K, tuple[V, int]] = {}

    def get(self, key: K) -> V | None:
        found = self._known.get(key)
        if found is None:
            return None
        if found[1] <= now_ms():
            del self._known[key]
            return None
        return found[0]

    def put(self, key: K, value: V, until_ms: int) -> None:
        if len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        self._known[key] = (value, until_ms)

    def forget_value(self, value: V) -> None:
        for key in [key for key, (known, _) in self._known.items() if known == value]:
            del self._known[key]

    def clear(self) -> None:
        self._known.clear()


CREDENTIALS = frozenset({b"authorization", b"x-api-key"})


def make_access_service(gateway: Gateway, settings: Settings) -> AccessService:
    """Make a service over a gateway, by the settings."""
    enabled = settings.auth == "on"
    return AccessService(
        gateway,
        enabled=enabled,
        api_keys=settings.known_api_keys,
        keyring=make_keyring(settings) if enabled else None,
    )
