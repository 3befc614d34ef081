"""Tokens that open a session: told to who begins it, handed over by a link, taken up elsewhere."""

import secrets
import uuid
from typing import NamedTuple, cast

from app.clock import now_ms, rfc3339
from app.errors import ResumeTokenNotFoundError
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import NewSessionView, Owner, SessionView, view_session
from app.onboarding.tokens import (
    DEFAULT_TTL_S,
    SECRET_BYTES,
    TOKEN_ID_BYTES,
    CreatedResumeToken,
    ResumeTokenList,
    RevokedResumeToken,
    check_may_have_tokens,
    check_resume_token,
    check_token_id,
    derive_first_token,
    derive_session_token,
    digest_of,
    make_resume_token,
    parse_resume_token,
    view_resume_token,
)
from app.services.manager import OnboardingSessionManager
from app.store.gateway import Gateway
from app.store.tokens import NewResumeToken, TokenStore


class FirstToken(NamedTuple):
    """The token that a session begins with, drawn before it, and what is kept of it."""

    session_id: str
    token: str
    digest: str
    seed: str


def draw_first_token(credential: bytes) -> FirstToken:
    """Draw an id for a session, and a token for who shows this."""
    session_id, seed = str(uuid.uuid4()), secrets.token_hex(SECRET_BYTES)
    token = derive_first_token(session_id, seed, credential)
    return FirstToken(session_id, token, digest_of(token), seed)


class TokenService:
    """What can be done with the resume tokens of sessions whose ids are UUID4s.

    Every method raises a `StoreError` when the store cannot do its part, and those that name a
    session raise `SessionNotFoundError` when there is none, `InvalidRequestError` when it can have
    no tokens; what else they raise, they say.
    """

    def __init__(self, gateway: Gateway, manager: OnboardingSessionManager) -> None:
        self._store = TokenStore(gateway)
        self._manager = manager

    async def begin_session(
        self, owner: Owner, *, credential: bytes | None, request: IdempotentRequest | None = None
    ) -> NewSessionView:
        """Make a session for an owner that was checked, with a token that opens it.

        `credential` is what its maker showed; without access control it is None, and there is no
        token. A repeat by Idempotency-Key tells the same token to
        who shows the same, and another one to who shows something newer: only digests are kept.
        """
        if credential is None:
            view = await self._manager.begin_session(owner, request=request)
            return cast("NewSessionView", view)  # with nothing more to tell
        first = draw_first_token(credential)
        token = first.token
        view = await self._manager.begin_session(
            owner,
            request=request,
            session_id=first.session_id,
            token_digest=first.digest,
            # Who cannot ask again needs none.
            seed=None if request is None else first.seed,
        )
        if view["session_id"] != first.session_id:
            now = await self._manager.get_session(view["session_id"])
            if (now["workspace_id"], now["user_id"]) != (owner.workspace_id, owner.user_id):
                # It is somebody else's by now.
                return cast("NewSessionView", view)
            token = await self._tell_again(view["session_id"], credential)
        return NewSessionView(**view, session_token=token)

    async def _tell_again(self, session_id: str, credential: bytes) -> str:
        seed = await self._store.get_seed(session_id) or secrets.token_hex(SECRET_BYTES)
        token = derive_first_token(session_id, seed, credential)
        await self._store.add_session_token(session_id, digest_of(token), at_ms=now_ms())
        return token

    async def create_resume_token(
        self, session_id: str, *, ttl_s: int = DEFAULT_TTL_S, label: str | None = None
    ) -> CreatedResumeToken:
        """Make a token that opens the session once, within `ttl_s` seconds.

        It is told this once: only its digest is kept. Raises `InvalidRequestError` also when too
        many wait to be used.
        """
        check_may_have_tokens(session_id)
        check_resume_token(ttl_s, label)
        token_id = secrets.token_hex(TOKEN_ID_BYTES)
        token = make_resume_token(session_id, token_id, secrets.token_bytes(SECRET_BYTES))
        new = NewResumeToken(token_id, digest_of(token), ttl_s * 1000, label or "")
        expires_ms = await self._store.create(session_id, new, at_ms=now_ms())
        return CreatedResumeToken(token_id=token_id, token=token, expires_at=rfc3339(expires_ms))

    async def list_resume_tokens(self, session_id: str) -> ResumeTokenList:
        """Tell of the tokens that can be used, or revoked, newest first."""
        check_may_have_tokens(session_id)
        records = await self._store.list_open(session_id)
        return ResumeTokenList(
            session_id=session_id, resume_tokens=[view_resume_token(each) for each in records]
        )

    async def revoke_resume_token(self, session_id: str, token_id: str) -> RevokedResumeToken:
        """Make a token useless, and the session token that it gave.

        Raises `ResumeTokenNotFoundError`.
        """
        check_may_have_tokens(session_id)
        check_token_id(token_id)
        await self._store.revoke(session_id, token_id, at_ms=now_ms())
        return RevokedResumeToken(success=True, session_id=session_id, token_id=token_id)

    async def resume(self, token: str) -> tuple[SessionView, str]:
        """Take a session up with a resume token; give it, and a session token that opens it.

        A token is used once; within a minute it gives the same again. Raises
        `ResumeTokenNotFoundError` for everything that is wrong with it.
        """
        resumed = parse_resume_token(token)
        if resumed is None:
            raise ResumeTokenNotFoundError
        session_token = derive_session_token(resumed)
        session = await self._store.use(resumed, digest_of(session_token), at_ms=now_ms())
        return view_session(session.session_id, session.owner, session.state), session_token
