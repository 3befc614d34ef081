"""The names of all keys. What each one holds is in the README's table of keys."""

from typing import NamedTuple

from app.onboarding.files import FileKind


class SessionKeys(NamedTuple):
    """The keys of one session. The first four open every script that changes it, in this order."""

    metadata: str
    progress: str
    events: str
    ops: str
    prefix: str

    @property
    def export(self) -> str:
        """The export of the latest revision."""
        return f"{self.prefix}export"

    def body(self, kind: FileKind) -> str:
        """What is known of a large body."""
        return f"{self.prefix}{kind}"

    def part(self, kind: FileKind, transfer: str, number: int) -> str:
        """One part of a large body, numbered from 1."""
        return f"{self.prefix}{kind}:{transfer}:{number}"

    def step(self, step_id: int) -> str:
        """One saved step."""
        return f"{self.prefix}step:{step_id}"

    def draft(self, step_id: int) -> str:
        """One draft."""
        return f"{self.prefix}draft:{step_id}"

    def idempotency(self, scope: str) -> str:
        """The answer to an Idempotency-Key, by the digest of its scope."""
        return f"{self.prefix}idem:{scope}"


class Keys:
    """Names keys, with or without a hash tag around the session id."""

    catalogues = "onboarding:index:catalogues"
    """Hash: every catalogue that a session began with, by its pin."""

    jobs = "onboarding:index:jobs"
    """Stream: finalized sessions, for the generators to share."""

    canary = "onboarding:canary"
    """What the health probe writes; lives for seconds."""

    def __init__(self, *, hash_tag: bool) -> None:
        self.hash_tag = hash_tag
        self._prefix = "onboarding:{%s}:" if hash_tag else "onboarding:%s:"

    def session(self, session_id: str) -> SessionKeys:
        """Name the keys of a session; the id is known to be safe in a key."""
        prefix = self._prefix % session_id
        return SessionKeys(
            f"{prefix}metadata", f"{prefix}progress", f"{prefix}events", f"{prefix}ops", prefix
        )

    def creation(self, scope: str) -> str:
        """The answer to an Idempotency-Key that came with the making of a session."""
        return f"onboarding:idem:{scope}"
