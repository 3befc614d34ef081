"""The export: the frozen answers of a session, as the BCM generator reads them."""

import hashlib
import re
from typing import Any

import orjson
import rfc8785
from typing_extensions import TypedDict

from app.clock import rfc3339
from app.onboarding.catalogue import Catalogue
from app.onboarding.documents import Document
from app.onboarding.progress import Progress
from app.onboarding.sessions import Session, SummaryMetadata, describe_owner

FORMAT_VERSION = "2.0"
"""Version of the export's shape, which generators look at."""


class ExportStep(TypedDict):
    """A step in an export."""

    step_id: int
    version: int
    saved_at: str
    data: dict[str, Any]


class ExportView(TypedDict):
    """An export; `raw_step_data` repeats the answers as `step_<n>` with `metadata` beside them."""

    version: str
    revision: int
    generated_at: str
    session_id: str
    catalogue_version: str
    metadata: SummaryMetadata
    progress: Progress
    steps: dict[str, ExportStep]
    raw_step_data: dict[str, Any]
    complete: bool
    missing_steps: list[int]
    checksum: str


class FinalizeView(TypedDict):
    """What finalize came to."""

    success: bool
    session_id: str
    business_context: ExportView
    completed_steps: int
    total_steps: int
    finalized_at: str


class Export(Document):
    """A stored export: a mapping like `ExportView`, with the `checksum` at hand."""

    __slots__ = ("checksum",)

    checksum: str

    @classmethod
    def read(cls, text: bytes) -> "Export | None":
        """Recognise a stored export by its ends without decoding it; None for anything else."""
        found = _CHECKSUM_AT_END.search(text, max(0, len(text) - _TAIL))
        if not found or not text.startswith(b'{"version":'):
            return None
        export = cls(text)
        export.checksum = found[1].decode()
        return export


class FinalizeAnswer(Document):
    """The answer to finalize: a mapping like `FinalizeView`."""

    __slots__ = ()

    @classmethod
    def compose(
        cls, *, session_id: str, export: bytes, completed: int, total: int, finalized_ms: int
    ) -> "FinalizeAnswer":
        """Put the answer together; the same arguments give the same bytes."""
        return cls(
            orjson.dumps(
                {
                    "success": True,
                    "session_id": session_id,
                    "business_context": orjson.Fragment(export),
                    "completed_steps": completed,
                    "total_steps": total,
                    "finalized_at": rfc3339(finalized_ms),
                }
            )
        )


def build_export(
    session: Session, steps: dict[int, Document], catalogue: Catalogue, now_ms: int
) -> Export:
    """Freeze a session's answers; `steps` holds what is stored of each saved step.

    The result is the export of the next revision. Takes milliseconds per megabyte: run it off the
    event loop.
    """
    missing = catalogue.missing(steps)
    owner = describe_owner(session.owner, session.state.created_ms)
    content: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "revision": session.state.revision + 1,
        "session_id": session.session_id,
        "catalogue_version": catalogue.version,
        "metadata": owner,
        "progress": session.state.progress,
        "steps": {str(number): step.value for number, step in sorted(steps.items())},
        "raw_step_data": {
            "metadata": {"workspace_id": owner["workspace_id"], "user_id": owner["user_id"]},
            **{f"step_{number}": {"data": step["data"]} for number, step in sorted(steps.items())},
        },
        "complete": not catalogue.required.intersection(missing),
        "missing_steps": missing,
    }
    checksum = compute_checksum(content)
    # Answers are written with the bytes they came in; the checksum is of their canonical form.
    verbatim = {
        **content,
        "steps": {
            str(number): orjson.Fragment(step.text) for number, step in sorted(steps.items())
        },
        "raw_step_data": {
            "metadata": content["raw_step_data"]["metadata"],
            **{
                f"step_{number}": {"data": orjson.Fragment(step.part("data").text)}
                for number, step in sorted(steps.items())
            },
        },
        "generated_at": rfc3339(now_ms),
        "checksum": checksum,
    }
    export = Export(orjson.dumps(verbatim))
    export.checksum = checksum
    return export


def compute_checksum(export: dict[str, Any]) -> str:
    """Return `sha256:<hex>` of the canonical JSON (RFC 8785) of an export.

    `checksum` and `generated_at` are left out, so a reader can pass an export as it was received.
    """
    content = {
        name: value for name, value in export.items() if name not in {"checksum", "generated_at"}
    }
    return "sha256:" + hashlib.sha256(rfc8785.dumps(content)).hexdigest()


_CHECKSUM_AT_END = re.compile(rb'"checksum":"(sha256:[0-9a-f]{64})"\}\Z')
_TAIL = len('"checksum":"sha256:"}') + 64
