"""A form with a file, taken apart while it comes in (RFC 7578)."""

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.headers import parse_content_type, parse_filename
from app.api.streaming import Content
from app.errors import Fault, InvalidRequestError, UnsupportedMediaTypeError
from app.onboarding.files import ANY_TYPE, clean_filename
from app.onboarding.sessions import check_language

FORM_BYTES = 64 * 1024
"""What may surround the file in a form, in bytes: boundaries, heads, the other fields."""

LONGEST_FIELD = 1024
"""Longest head of a part, and longest field beside the file, in bytes."""


class UploadForm:
    """A form with the fields `file` and, if you like, `language`; others are passed over.

    Iterated once, it gives the bytes of the file; what else it says is known then.
    """

    def __init__(self, content_type: str | None, content: Content) -> None:
        """Take a body. Raises `UnsupportedMediaTypeError`, `InvalidRequestError`."""
        # A longer one names no boundary, and would only take long to take apart.
        sent = (content_type or "")[:LONGEST_FIELD]
        media_type, options = parse_options_header(sent)
        if media_type != b"multipart/form-data":
            raise UnsupportedMediaTypeError("Send a form: multipart/form-data with a field file")
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 70:
            raise InvalidRequestError("The Content-Type of a form names its boundary")
        self.content_type = ANY_TYPE
        self.filename = ""
        self.language = "en"
        self._content = content
        self._files = 0
        self._is_complete = False
        self._part: str | None = None
        self._head: dict[bytes, bytes] = {}
        self._name = bytearray()
        self._value = bytearray()
        self._bytes: list[bytes] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_name,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_head,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Give the bytes of the file. Raises `InvalidRequestError`, and what the body raises."""
        async for chunk in self._content:
            try:
                self._parser.write(chunk)
            except FormParserError:
                raise InvalidRequestError("The body is no form of the boundary it names") from None
            for piece in self._bytes:
                yield piece
            self._bytes.clear()
        if not self._is_complete:
            raise InvalidRequestError("The form has no end: its last boundary is missing")
        if self._files != 1:
            fault = Fault(pointer="/file", code="required", detail="One file is required")
            raise InvalidRequestError("The form needs one field file, with a file", [fault])

    def _begin_part(self) -> None:
        self._part, self._head = None, {}
        self._name.clear()
        self._value.clear()

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += _bounded(data[start:end], self._name)

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += _bounded(data[start:end], self._value)

    def _end_header(self) -> None:
        self._head[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end_head(self) -> None:
        disposition = self._head.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part == "file":
            self._files += 1
            sent = self._head.get(b"content-type", b"").decode("latin-1")
            self.content_type = parse_content_type(sent)
            name = parse_filename(disposition.decode("latin-1"))
            self.filename = clean_filename(name, "upload.bin")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part == "file" and self._files == 1:
            self._bytes.append(piece)
        elif self._part == "language":
            self._value += _bounded(piece, self._value)

    def _end_part(self) -> None:
        if self._part == "language":
            self.language = self._value.decode("utf-8", "replace").strip() or "en"
            check_language(self.language)

    def _end(self) -> None:
        self._is_complete = True


def _bounded(more: bytes, so_far: bytearray) -> bytes:
    if len(so_far) + len(more) > LONGEST_FIELD:
        raise InvalidRequestError(f"A field beside the file may take {LONGEST_FIELD} bytes")
    return more
