"""The names of all keys. What each one holds is in the README's table of keys."""

from typing import NamedTuple

from app.onboarding.files import FileKind

_OPENING = ("metadata", "progress", "events", "ops", "")


class SessionKeys(NamedTuple):
    """The keys of one session. The first four open every script that changes it, in this order."""

    metadata: str
    progress: str
    events: str
    ops: str
    prefix: str

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.prefix.split(":")[1].strip("{}")

    @property
    def export(self) -> str:
        """The export of the latest revision."""
        return f"{self.prefix}export"

    @property
    def tokens(self) -> str:
        """The digests of all tokens of the session, in its slot."""
        return f"onboarding:token:{self.prefix.split(':')[1]}"

    @property
    def history(self) -> str:
        """The last questions, with their answers."""
        return f"{self.prefix}history"

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


class ListKeys(NamedTuple):
    """The keys of a list of tasks. Scripts take them in this order."""

    entries: str
    """Sorted set: the entries by their names, which begin with when the task was made."""

    ends: str
    """Sorted set: the same entries by when their tasks expire, in Unix milliseconds."""


class Keys:
    """Names keys, with or without a hash tag around the session id."""

    catalogues = "onboarding:index:catalogues"
    """Hash: every catalogue that a session began with, by its pin."""

    jobs = "onboarding:index:jobs"
    """Stream: finalized sessions, for the generators to share."""

    asks = "onboarding:rate:asks"
    """List: when questions were asked within the last second, by all processes."""

    @staticmethod
    def bucket(policy: str, digest: str) -> str:
        """What a caller, by a digest of their name, has used up of a limit."""
        return f"onboarding:rate:{policy}:{digest}"

    canary = "onboarding:canary"
    """What the health probe writes; lives for seconds."""

    def mark(self, key: str) -> str:
        """What is written where a write must be vouched for; lives for a minute.

        It lies in the slot of `key`, where there are slots.
        """
        if not self.hash_tag:
            return "onboarding:mark"
        tag = key.partition("{")[2].partition("}")[0] or key
        return f"onboarding:mark:{{{tag}}}"

    def __init__(self, *, hash_tag: bool) -> None:
        self.hash_tag = hash_tag
        self._before, self._after = ("onboarding:{", "}:") if hash_tag else ("onboarding:", ":")
        self._index = f"onboarding:index:{'{sessions}' if hash_tag else 'sessions'}:"
        self._audit = f"onboarding:index:{'{audit}' if hash_tag else 'audit'}:"

    session_prefix = "onboarding:"
    """What comes before the id of a session, where keys have no hash tags."""

    def index(self, part: str) -> str:
        """A part of the index of all sessions; `lua/index.lua` tells what each one holds."""
        return self._index + part

    def audit(self, part: str) -> str:
        """A part of the record: a lane, or `batch:<writer>`."""
        return self._audit + part

    def session(self, session_id: str) -> SessionKeys:
        """Name the keys of a session; the id is known to be safe in a key."""
        prefix = f"{self._before}{session_id}{self._after}"
        # As SessionKeys(...) makes it, at half the cost: every change begins here.
        return tuple.__new__(SessionKeys, map(prefix.__add__, _OPENING))

    def of(self, session_id: str, name: str) -> str:
        """One key of a session, by what `SessionKeys` has behind the prefix: `step:4`.

        For who needs no other: to name them all takes twice as long.
        """
        return f"{self._before}{session_id}{self._after}{name}"

    task_prefix = "onboarding:task:"
    """How the key of every task begins."""

    def task(self, task_id: str) -> str:
        """A task; its id is known to be safe in a key."""
        return self.task_prefix + task_id

    def short(self, short_id: str) -> ListKeys:
        """The tasks of a short; its id is known to be safe in a key."""
        name = "onboarding:short:" + (f"{{{short_id}}}" if self.hash_tag else short_id)
        return ListKeys(name, f"{name}:ends")

    def tasks(self, user_id: str | None = None) -> ListKeys:
        """The tasks of a user, or all of them."""
        index = f"onboarding:index:{'{tasks}' if self.hash_tag else 'tasks'}:"
        if user_id is None:
            return ListKeys(f"{index}all", f"{index}all-ends")
        return ListKeys(f"{index}of:{user_id}", f"{index}of-ends:{user_id}")

    def creation(self, scope: str) -> str:
        """The answer to an Idempotency-Key that came with the making of a session."""
        return f"onboarding:idem:{scope}"
