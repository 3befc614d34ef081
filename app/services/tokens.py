"""Resume tokens: a session handed over by a link, and taken up elsewhere."""

import secrets

from app.clock import now_ms, rfc3339
from app.errors import ResumeTokenNotFoundError
from app.onboarding.sessions import SessionView, view_session
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
    derive_session_token,
    digest_of,
    make_resume_token,
    parse_resume_token,
    view_resume_token,
)
from app.store.gateway import Gateway
from app.store.tokens import NewResumeToken, TokenStore


class TokenService:
    """What can be done with the resume tokens of sessions whose ids are UUID4s.

    Every method raises a `StoreError` when the store cannot do its part, and those that name a
    session raise `SessionNotFoundError` when there is none, `InvalidRequestError` when it can have
    no tokens; what else they raise, they say.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._store = TokenStore(gateway)

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
        """Tell of the tokens whose time is not over, newest first."""
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
