"""Everything that can go wrong, by the code that callers see.

Whatever goes wrong with a session is an `OnboardingError`. Its `code` is stable, its message says
what was wrong and what would be right; it never holds an answer of a user, a secret or an address.
Which HTTP status a code has is the business of `app/api/problems.py`.
"""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import TypedDict


class Fault(TypedDict):
    """One thing that is wrong with a document, at `pointer` (RFC 6901)."""

    pointer: str
    code: str
    detail: str


class OnboardingError(Exception):
    """The root: catch it to catch everything this product raises on purpose."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


# --- What a caller sent cannot be taken -----------------------------------------------------------


class RequestError(OnboardingError):
    """The request itself is at fault; nothing was changed."""

    code = "invalid_request"

    def __init__(self, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail)
        self.faults = list(faults)


class MalformedJsonError(RequestError):
    """The body is not JSON in UTF-8."""

    code = "malformed_json"


class InvalidHeaderError(RequestError):
    """A header cannot be read."""

    code = "invalid_header"


class InvalidIdempotencyKeyError(RequestError):
    """The Idempotency-Key is neither a structured-field string nor a bare token."""

    code = "invalid_idempotency_key"


class UnsupportedMediaTypeError(RequestError):
    """The body has a media type, charset or encoding that is not taken here."""

    code = "unsupported_media_type"


class PayloadTooLargeError(RequestError):
    """The body, or what would be stored for it, is larger than the limit."""

    code = "payload_too_large"


class InvalidRequestError(RequestError):
    """A field of the request is missing or wrong."""


class InvalidStepIdError(RequestError):
    """The number is no step of the session's catalogue."""

    code = "invalid_step_id"


class InvalidStepDataError(RequestError):
    """The answers of a step cannot be taken as they are."""

    code = "invalid_step_data"


class IdempotencyMismatchError(RequestError):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_mismatch"


# --- Who asks may not -----------------------------------------------------------------------------


class AccessError(OnboardingError):
    """The request is refused for who sent it; nothing was changed."""


class UnauthenticatedError(AccessError):
    """Nobody is known by what was shown. `is_invalid` says that something was."""

    code = "unauthenticated"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(
            detail
            or "Send the token of a session or a user as Authorization: Bearer <token>, or an API"
            " key as X-API-Key"
        )
        self.is_invalid = detail is not None


class ForbiddenError(AccessError):
    """Whoever asks is known, and may not do this."""

    code = "forbidden"


# --- What was asked for is not there --------------------------------------------------------------


class AbsentError(OnboardingError):
    """Something that the request names does not exist."""

    code = "not_found"


class SessionManagerError(OnboardingError):
    """The root of what goes wrong with sessions as such: absent, one too many, always changing."""


class SessionNotFoundError(SessionManagerError, AbsentError):
    """No such session: never made, expired, or deleted."""

    code = "session_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such session: it was never made, has expired, or was deleted")


class NotTheirsError(SessionNotFoundError):
    """The session is somebody else's; who asks is told what is said of an unknown one."""


class StepNotFoundError(AbsentError):
    """The step has no saved answers."""

    code = "step_not_found"

    def __init__(self, step_id: int) -> None:
        super().__init__(f"Step {step_id} has not been saved")


class DraftNotFoundError(AbsentError):
    """The step has no draft."""

    code = "draft_not_found"

    def __init__(self, step_id: int) -> None:
        super().__init__(f"Step {step_id} has no draft, or its draft has expired")


class ExportNotFoundError(AbsentError):
    """The session was never finalized."""

    code = "export_not_found"

    def __init__(self) -> None:
        super().__init__("The session has no export yet; finalize makes it")


class ResultNotFoundError(AbsentError):
    """No generator has stored a result."""

    code = "result_not_found"

    def __init__(self) -> None:
        super().__init__("The session has no result yet; a generator stores it")


class UploadNotFoundError(AbsentError):
    """The session was not made with a file."""

    code = "upload_not_found"

    def __init__(self) -> None:
        super().__init__("The session has no file; only one that was made by an upload has")


class ResumeTokenNotFoundError(AbsentError):
    """No such resume token: never made, used, revoked, or its time is over."""

    code = "resume_token_not_found"

    def __init__(self) -> None:
        super().__init__(
            "There is no such resume token: it was never made, was used, was revoked, or its time"
            " is over; ask for a new link"
        )


class TaskNotFoundError(AbsentError):
    """No such task: never tracked, removed at its end, or expired."""

    code = "task_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such task: it was never tracked, has ended, or has expired")


# --- The session's state forbids it ---------------------------------------------------------------


class StateError(OnboardingError):
    """The session is not in a state that allows this."""


class SessionFinalizedError(StateError):
    """The steps are locked."""

    code = "session_finalized"

    def __init__(self) -> None:
        super().__init__("The session is finalized, its steps are locked; reopen it to change them")


class NothingToFinalizeError(StateError):
    """No step is saved."""

    code = "nothing_to_finalize"

    def __init__(self) -> None:
        super().__init__("No step has been saved; save at least one before finalize")


class StepsMissingError(StateError):
    """Steps that finalize requires are not saved; `missing` holds their numbers, ascending."""

    code = "steps_missing"

    def __init__(self, missing: Sequence[int]) -> None:
        numbers = ", ".join(map(str, missing))
        super().__init__(f'Save steps {numbers} first, or finalize with {{"force": true}}')
        self.missing = list(missing)


class NotFinalizedError(StateError):
    """Only a finalized session can be reopened."""

    code = "not_finalized"

    def __init__(self) -> None:
        super().__init__("The session is not finalized, so its answers may still change")


class GenerationRunningError(StateError):
    """A generator works on the export."""

    code = "generation_running"

    def __init__(self) -> None:
        super().__init__("A generator is working on the export; reopen when it has ended")


class InvalidTransitionError(StateError):
    """The status may not follow the current one, which is `current`."""

    code = "invalid_transition"

    def __init__(self, current: str, wanted: str, what: str = "session") -> None:
        super().__init__(f"A {what} that is {current} cannot become {wanted}")
        self.current = current


class TaskExistsError(StateError):
    """There is a task with this id already."""

    code = "task_exists"

    def __init__(self) -> None:
        super().__init__("There is a task with this id already; take another task_id, or none")


class RunSupersededError(StateError):
    """Another run of the generation has begun since."""

    code = "invalid_transition"

    def __init__(self) -> None:
        super().__init__("Another run has begun since, and this one has nothing more to say")


class BodyLostError(StateError):
    """Parts of a body that was being sent are gone."""

    code = "session_conflict"

    def __init__(self) -> None:
        super().__init__("The body took too long to arrive, and its beginning is gone; send again")


class TooManyStreamsError(StateError):
    """As many live streams as may be open are open already."""

    code = "too_many_streams"

    def __init__(self, whose: str) -> None:
        super().__init__(f"As many live streams as {whose} may have are open; close one, or wait")


class RateLimitedError(StateError):
    """More is asked than is let through at a time; `retry_after_s` is when there is room again."""

    code = "rate_limited"

    def __init__(
        self,
        detail: str = "Too many questions are being asked; ask again in a moment",
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class IdempotencyInProgressError(StateError):
    """The first request with this Idempotency-Key has not been answered yet."""

    code = "idempotency_in_progress"

    def __init__(self) -> None:
        super().__init__("The first request with this Idempotency-Key is still running; ask again")


class SessionConflictError(SessionManagerError, StateError):
    """Others kept changing the session while this change was prepared."""

    code = "session_conflict"

    def __init__(self) -> None:
        super().__init__("The session kept changing meanwhile; nothing was done, try again")


SessionLockError = SessionConflictError
"""The same, by the name of those who expect a lock; nothing is locked over the network."""


class SessionCapacityError(SessionManagerError):
    """There are as many sessions as there may be."""

    code = "capacity_reached"

    def __init__(self) -> None:
        super().__init__("There are as many sessions as there may be; try again later")


class VersionConflictError(StateError):
    """A precondition failed; `current_version` is None when the step is absent."""

    code = "version_conflict"

    def __init__(self, current_version: int | None) -> None:
        state = "is not saved" if current_version is None else f"is at version {current_version}"
        super().__init__(f"The precondition does not hold: the step {state}; read it and try again")
        self.current_version = current_version


# --- The agent cannot do it -----------------------------------------------------------------------


class AgentFailedError(OnboardingError):
    """The agent that was to answer a question did not."""

    def __init__(self) -> None:
        super().__init__("The question could not be answered; the operators have been told")


# --- The store cannot do it -----------------------------------------------------------------------


class StoreError(OnboardingError):
    """The store did not do what was asked; whether it was done may be unknown."""


class CorruptRecordError(StoreError):
    """A record cannot be read. `key` names it, for the log and never for a client."""

    code = "corrupt_record"

    def __init__(self, key: str, part: str = "the session") -> None:
        super().__init__(f"What is stored of {part} cannot be read; the operators have been told")
        self.key = key


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or will not serve us."""

    code = "store_unavailable"

    def __init__(
        self, detail: str = "The store does not answer at the moment; try again shortly"
    ) -> None:
        super().__init__(detail)


class KeysUnavailableError(StoreUnavailableError):
    """What tokens of users are verified with could not be fetched yet."""

    def __init__(self) -> None:
        super().__init__(
            "There is no key to verify the tokens of users with at the moment; try again shortly"
        )


class StoreFullError(StoreError):
    """The store is out of memory: reads and deletes go on."""

    code = "store_full"

    def __init__(self) -> None:
        super().__init__("The store has no room for a write; reads and deletes still work")


class StoreReadonlyError(StoreError):
    """The store refuses writes: reads go on."""

    code = "store_readonly"

    def __init__(self) -> None:
        super().__init__("The store takes no writes at the moment; reads still work")


class OverloadedError(StoreError):
    """More is asked at once than there is room for."""

    code = "overloaded"

    def __init__(self) -> None:
        super().__init__("Too many requests at once; try again shortly")


class DeadlineExceededError(StoreError):
    """The request took longer than it may."""

    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The request took too long; whether it was done is unknown")
