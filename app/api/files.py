"""Files over HTTP: a session that begins with one, a result that is stored and fetched."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.calls import Call
from app.api.headers import format_disposition, parse_content_type, parse_filename
from app.api.operations import Answer, Operation, Stream
from app.api.streaming import Content, Outlet
from app.api.uploads import FORM_BYTES, UploadForm
from app.context import learn
from app.errors import AbsentError, ResultNotFoundError, StoreError, UploadNotFoundError
from app.onboarding.access import Access, claim
from app.onboarding.files import FileKind, FileView, UploadedView, clean_filename
from app.onboarding.generation import check_run
from app.services.files import NOBODYS, OpenedFile
from app.services.tokens import draw_first_token


@dataclass(slots=True)
class ResultBody:
    """A result on its way in, with what the headers say about it."""

    content: Content
    content_type: str
    filename: str

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Give the bytes as they come."""
        return aiter(self.content)


async def upload(call: Call) -> ASGIApp:
    """Make a session with a file."""
    form = UploadForm(call.headers.get("content-type"), call.incoming())
    first = None if call.credential is None else draw_first_token(call.credential)
    owner = claim(call.principal, NOBODYS)
    view = await call.services.files.begin_session(form, owner=owner, first=first)
    learn(session_id=view["session_id"])
    location = f"/api/v1/onboarding/{view['session_id']}"
    return call.answer(view, 201, {"location": location})


async def put_result(call: Call) -> ASGIApp:
    """Store the result, as it comes."""
    name = parse_filename(call.headers.get("content-disposition"))
    result = ResultBody(
        call.incoming(),
        parse_content_type(call.headers.get("content-type")),
        clean_filename(name, "result.bin"),
    )
    run = call.query.get("run")
    check_run(run)
    view = await call.services.files.store_result(
        call.session_id, result, run=run, request=call.idempotent
    )
    return call.answer(view, 201, {"etag": f'"{view["checksum"]}"'})


async def get_result(call: Call) -> ASGIApp:
    """Send the result."""
    return await _download(call, FileKind.RESULT, ResultNotFoundError)


async def get_upload(call: Call) -> ASGIApp:
    """Send the file that the session began with."""
    return await _download(call, FileKind.UPLOAD, UploadNotFoundError)


class Download:
    """A stored body, sent as it is read, to be saved and never to be shown by a browser."""

    def __init__(self, file: OpenedFile) -> None:
        self._file = file

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Send it, and cut it off where it ends too early."""
        outlet = Outlet(scope, send)
        info = self._file.info
        headers = {
            "content-type": info.content_type,
            "content-length": str(info.size),
            "content-disposition": format_disposition(info.filename),
            "etag": f'"{info.checksum}"',
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "content-security-policy": "sandbox",
        }
        await outlet.begin(200, headers)
        sent = 0
        if scope["method"] != "HEAD":
            async with aclosing(self._file.content) as content:
                try:
                    async for part in content:
                        sent += len(part)
                        await outlet.write(part)
                except StoreError:
                    await outlet.cut_off()
            if sent != info.size:
                await outlet.cut_off()
        await outlet.write(b"", more=False)


async def _download(call: Call, kind: FileKind, absent: Callable[[], AbsentError]) -> ASGIApp:
    file = await call.services.files.open(call.session_id, kind)
    if file is None:
        raise absent()
    checksum = file.info.checksum
    if call.if_none_match is not None and call.if_none_match.match_weakly(checksum):
        return call.not_modified(checksum)
    return Download(file)


_ANYTHING: dict[str, Any] = {}


def _downloads(
    path: str, name: str, summary: str, handler: Any, error: str, *, audited: bool = True
) -> Operation:
    return Operation(
        methods=["GET"],
        path=path,
        handler=handler,
        name=name,
        access=Access.FOLLOW,
        at_once="transfers",
        audited=audited,
        summary=summary,
        tag="Files",
        preconditions=["If-None-Match"],
        answers=[
            Answer(
                description="The bytes and the type that were stored, as a download",
                schema=_ANYTHING,
                media_type="*/*",
                headers=["ETag", "Content-Disposition"],
            ),
            Answer(status=304, description="Unchanged", headers=["ETag"]),
        ],
        errors=[error, "corrupt_record"],
    )


_RUN = {
    "type": "string",
    "minLength": 1,
    "maxLength": 128,
    "pattern": "^[^\\x00-\\x1f\\x7f-\\x9f]*$",
}
_SESSION = "/api/v1/onboarding/{id}"

OPERATIONS = [
    Operation(
        methods=["PUT"],
        path=_SESSION + "/result",
        handler=put_result,
        name="put_result",
        at_once="transfers",
        access=Access.REPORT,
        audited=True,
        summary="Store what was generated, instead of what was before",
        tag="Files",
        body=Stream(limit="result", schema=_ANYTHING, required=False),
        headers=["Content-Disposition"],
        query=[("run", _RUN, "The run that made it")],
        idempotency_key=True,
        answers=[
            Answer(
                status=201,
                description="Stored",
                schema=FileView,
                headers=["ETag", "Idempotent-Replayed"],
            )
        ],
        errors=["invalid_request", "invalid_header", "session_conflict", "invalid_transition"],
    ),
    _downloads(
        *(_SESSION + "/result", "get_result", "Fetch what was generated"),
        *(get_result, "result_not_found"),
    ),
    _downloads(
        *(_SESSION + "/upload", "get_upload", "Fetch the file that the session began with"),
        *(get_upload, "upload_not_found"),
        audited=False,
    ),
    Operation(
        methods=["POST"],
        path="/api/upload",
        handler=upload,
        name="upload",
        at_once="transfers",
        access=Access.CREATE,
        summary="Begin a session with a file",
        tag="Files",
        body=Stream(
            limit="upload",
            media_type="multipart/form-data",
            form_bytes=FORM_BYTES,
            schema={
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "language": {"type": "string"},
                },
            },
        ),
        answers=[
            Answer(status=201, description="The session", schema=UploadedView, headers=["Location"])
        ],
        errors=["invalid_request", "invalid_header", "session_conflict", "capacity_reached"],
    ),
    _downloads(
        *("/api/download/{id}", "download", "Fetch what was generated"),
        *(get_result, "result_not_found"),
    ),
]
