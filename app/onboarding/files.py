"""Large bodies of a session: the file that was uploaded, the result that was generated."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import InvalidRequestError
from app.onboarding.documents import Document

PART_BYTES = 512 * 1024
"""How large the parts are that a body is kept in, in bytes: the store is busy with one for less
than a millisecond."""

MAX_FILENAME_BYTES = 255
"""Longest file name, in bytes of UTF-8: what file systems take."""

ANY_TYPE = "application/octet-stream"
"""The type of what came without one (RFC 9110 section 8.3)."""


class FileKind(StrEnum):
    """Which body of a session."""

    UPLOAD = "upload"
    RESULT = "result"


class FileView(TypedDict):
    """What is known of a stored body; `size` in bytes."""

    session_id: str
    checksum: str
    size: int
    content_type: str
    filename: str
    stored_at: str


class UploadedView(TypedDict):
    """A session that was made with a file; `session_token` opens it, with access control on."""

    session_id: str
    status: Literal["pending"]
    session_token: NotRequired[str]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What is known of a body: `checksum` is `sha256:<hex>` of its bytes, `size` counts them.

    `is_document` tells a body that Python callers gave as a dict. `transfer` names its parts, of
    which there are `parts`.
    """

    transfer: str
    parts: int
    size: int
    content_type: str
    filename: str
    checksum: str
    is_document: bool
    stored_ms: int


def view_file(session_id: str, info: FileInfo) -> FileView:
    """Describe a stored body to a client."""
    return FileView(
        session_id=session_id,
        checksum=info.checksum,
        size=info.size,
        content_type=info.content_type,
        filename=info.filename,
        stored_at=rfc3339(info.stored_ms),
    )


def content_of(result: bytes | Mapping[str, Any]) -> tuple[bytes, str]:
    """Give the bytes of what was generated, and the type of such a body without another one.

    Raises `InvalidRequestError` for what is neither bytes nor a JSON object. Takes 0.2 s for a
    megabyte of JSON: run it off the event loop.
    """
    if isinstance(result, bytes | bytearray | memoryview):
        return bytes(result), ANY_TYPE
    if not isinstance(result, Mapping):
        raise InvalidRequestError("A result is bytes or a JSON object")
    return Document.of(result).text, "application/json"


def check_media_type(content_type: str) -> str:
    """Return a media type. Raises `InvalidRequestError` for what is none."""
    if not is_media_type(content_type):
        raise InvalidRequestError("content_type is a media type, such as application/pdf")
    return content_type


def clean_filename(name: str | None, otherwise: str) -> str:
    """Make a name that can be given to any file system: the last part of a path, nothing hidden.

    Control characters, what Windows reserves and surrounding dots and spaces go; a name of which
    nothing is left is `otherwise`.
    """
    last = re.split(r"[/\\]", name or "")[-1]
    visible = "".join(each for each in last if each.isprintable() and not _is_surrogate(each))
    return _shorten(re.sub(r'[<>:"|?*]', "_", visible).strip(". ")) or otherwise


def is_media_type(text: str) -> bool:
    """Say whether text is a media type with or without parameters (RFC 9110 section 8.3.1)."""
    return len(text) <= _LONGEST_TYPE and _MEDIA_TYPE.fullmatch(text) is not None


def _shorten(name: str) -> str:
    if len(name.encode()) <= MAX_FILENAME_BYTES:
        return name
    # The ending says what it is, so the middle goes.
    stem, dot, ending = name.rpartition(".")
    if not stem or len(ending) > _LONGEST_ENDING:
        stem, dot, ending = name, "", ""
    room = MAX_FILENAME_BYTES - len((dot + ending).encode())
    return stem.encode()[:room].decode(errors="ignore").rstrip(". ") + dot + ending


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


_LONGEST_ENDING = 16
_LONGEST_TYPE = 255
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA_TYPE = re.compile(
    rf'{_WORD}/{_WORD}(?:[ \t]*;[ \t]*{_WORD}=(?:{_WORD}|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))*'
)
