"""Saved steps and drafts, and the preconditions under which a step may change."""

from dataclasses import dataclass
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from app.onboarding.documents import Document
from app.onboarding.progress import Progress


class StepView(TypedDict):
    """A saved step or a draft; `version` is None for a draft of a step that is not saved."""

    session_id: str
    step_id: int
    data: dict[str, Any]
    version: int | None
    saved_at: str
    is_draft: bool


class SavedStep(TypedDict):
    """What saving a step came to."""

    success: Literal[True]
    session_id: str
    step_id: int
    version: int
    progress: Progress
    updated_at: str


class StepVersion(TypedDict):
    """One of several saved steps."""

    step_id: int
    version: int


class SavedSteps(TypedDict):
    """What saving several steps came to."""

    success: Literal[True]
    session_id: str
    saved: list[StepVersion]
    progress: Progress


class DeletedStep(TypedDict):
    """What deleting a step came to."""

    success: Literal[True]
    session_id: str
    step_id: int
    progress: Progress


class DroppedDraft(TypedDict):
    """What dropping a draft came to: the draft as it was, if it could still be read."""

    success: Literal[True]
    session_id: str
    step_id: int
    data: NotRequired[dict[str, Any]]
    version: NotRequired[int | None]
    saved_at: NotRequired[str]
    is_draft: NotRequired[bool]


class Step(Document):
    """A saved step or a draft: a mapping like `StepView`, with the `version` at hand."""

    __slots__ = ("version",)

    version: int | None

    @classmethod
    def of_record(cls, session_id: str, record: bytes, version: int) -> "Step":
        """Put a saved step together around the bytes it is stored as, which are not decoded.

        `record` is an object of all but the members that are put around it.
        """
        step = cls(b'{"session_id":"%b",%b,"is_draft":false}' % (session_id.encode(), record[1:-1]))
        step.version = version
        return step

    @classmethod
    def of_draft(
        cls, session_id: str, step_id: int, data: bytes, version: int | None, saved_at: str
    ) -> "Step":
        """Put a draft together around the bytes of its answers; `version` is the saved step's."""
        number = "null" if version is None else version
        opening = f'{{"session_id":"{session_id}","step_id":{step_id},"version":{number}'
        step = cls(
            b'%b,"saved_at":"%b","data":%b,"is_draft":true}'
            % (opening.encode(), saved_at.encode(), data)
        )
        step.version = version
        return step


@dataclass(frozen=True, slots=True)
class Tags:
    """The entity tags of one precondition header, as far as they can be a step's version.

    `any_version` stands for `*`. Tags that are not ours are left out: they match nothing.
    """

    any_version: bool = False
    versions: frozenset[int] = frozenset()

    def match(self, version: int | None) -> bool:
        """Say whether a step at `version` (None: absent) is among the tags."""
        return version is not None and (self.any_version or version in self.versions)


@dataclass(frozen=True, slots=True)
class Precondition:
    """If-Match and If-None-Match of a change (RFC 9110 section 13); None: not sent."""

    if_match: Tags | None = None
    if_none_match: Tags | None = None

    def holds(self, version: int | None) -> bool:
        """Say whether a step at `version` (None: absent) may be changed."""
        if self.if_match is not None and not self.if_match.match(version):
            return False
        return self.if_none_match is None or not self.if_none_match.match(version)


NO_PRECONDITION = Precondition()


class StepMap(dict[int, Step]):
    """The saved steps by number, with the numbers of those that are `missing`."""

    missing: list[int]

    def __init__(self, steps: dict[int, Step], missing: list[int]) -> None:
        super().__init__(steps)
        self.missing = missing
