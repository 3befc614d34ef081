import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import orjson
import pytest
from httpx2 import AsyncClient, Response
from openapi_spec_validator import OpenAPIV31SpecValidator

from app import __version__
from app.api.operations import Operation
from app.api.problems import KINDS
from app.api.routes import OPERATIONS
from app.onboarding.access import MAY, Access, Kind, Scope
from tests.api_schema.walk import described, resolve, validator_of
from tests.service import BASE

SESSION = BASE + "/{id}"
STEP = SESSION + "/steps/{n}"

STREAM = SESSION + "/events/stream"
ASK_STREAM = SESSION + "/ask-stream"

RESUME = f"{BASE}/resume"
TOKENS = SESSION + "/resume-tokens"
TOKEN = TOKENS + "/{token_id}"

TASKS = "/api/v1/sessions"
ADMIN = "/api/v1/admin"
RECOVER = f"{ADMIN}/sessions/{{id}}/recover"
TASK = TASKS + "/task/{task_id}"
SHORT = TASKS + "/{short_id}"

LIMITS = ("RateLimit", "RateLimit-Policy")

STORE = {"store_unavailable", "overloaded", "store_full", "store_readonly", "deadline_exceeded"}
BODY = {"malformed_json", "payload_too_large", "unsupported_media_type"}
FILE = {"payload_too_large", "unsupported_media_type", "invalid_header"}
KEY = {"invalid_idempotency_key", "idempotency_mismatch", "idempotency_in_progress"}
PATH = {"session_not_found"}
NUMBER = {"session_not_found", "invalid_step_id"}
IF = {"invalid_header", "version_conflict"}
ASK = STORE | BODY | PATH | {"invalid_request", "rate_limited", "corrupt_record"}
SAVE = STORE | BODY | NUMBER | {"session_finalized", "invalid_step_data"}

# Every call that clients rely on, with the errors that they are told of.
CONTRACT: dict[tuple[str, str], set[str]] = {
    ("POST", f"{BASE}/session"): STORE | BODY | KEY | {"invalid_request"},
    ("GET", f"{BASE}/mine"): {"invalid_request", "store_unavailable"},
    ("POST", RESUME): STORE | BODY | {"invalid_request", "resume_token_not_found"},
    ("POST", TOKENS): STORE | BODY | PATH | {"invalid_request", "corrupt_record"},
    ("GET", TOKENS): PATH | {"corrupt_record"},
    ("DELETE", TOKEN): STORE | PATH | {"resume_token_not_found", "corrupt_record"},
    ("GET", SESSION): PATH,
    ("DELETE", SESSION): PATH | STORE,
    ("POST", STEP): SAVE | KEY | IF,
    ("PUT", STEP): SAVE | KEY | IF,
    ("PATCH", STEP): SAVE | KEY | IF | {"step_not_found", "session_conflict"},
    ("GET", STEP): NUMBER | {"step_not_found", "invalid_header"},
    ("DELETE", STEP): STORE | NUMBER | IF | {"step_not_found", "session_finalized"},
    ("POST", f"{SESSION}/steps"): SAVE,
    ("GET", f"{SESSION}/steps"): PATH | {"corrupt_record"},
    ("PUT", f"{STEP}/draft"): SAVE,
    ("GET", f"{STEP}/draft"): NUMBER | {"draft_not_found"},
    ("DELETE", f"{STEP}/draft"): STORE | NUMBER | {"draft_not_found", "session_finalized"},
    ("POST", f"{STEP}/draft/promote"): SAVE - BODY | {"draft_not_found", "session_conflict"},
    ("GET", f"{SESSION}/progress"): PATH,
    ("GET", f"{SESSION}/summary"): PATH,
    ("POST", f"{SESSION}/finalize"): STORE
    | BODY
    | KEY
    | PATH
    | {"nothing_to_finalize", "steps_missing", "session_conflict", "corrupt_record"},
    ("GET", f"{SESSION}/export"): PATH | {"export_not_found", "invalid_header"},
    ("POST", f"{SESSION}/reopen"): STORE | PATH | {"not_finalized", "generation_running"},
    ("GET", f"{SESSION}/status"): PATH | {"corrupt_record"},
    ("PUT", f"{SESSION}/status"): STORE
    | BODY
    | KEY
    | PATH
    | {"invalid_request", "invalid_transition"},
    ("POST", f"{SESSION}/events"): STORE | BODY | KEY | PATH | {"invalid_request"},
    ("GET", f"{SESSION}/events"): PATH | {"invalid_request", "corrupt_record"},
    ("GET", STREAM): PATH | {"too_many_streams", "corrupt_record"},
    ("POST", f"{SESSION}/ask"): ASK,
    ("POST", ASK_STREAM): ASK,
    ("GET", f"{SESSION}/history"): PATH | {"corrupt_record"},
    ("GET", f"{SESSION}/language"): PATH | {"corrupt_record"},
    ("PUT", f"{SESSION}/language"): STORE | BODY | KEY | PATH | {"invalid_request"},
    ("PUT", f"{SESSION}/result"): STORE | FILE | KEY | PATH | {"session_conflict"},
    ("GET", f"{SESSION}/result"): PATH | {"result_not_found", "invalid_header", "corrupt_record"},
    ("GET", f"{SESSION}/upload"): PATH | {"upload_not_found", "invalid_header", "corrupt_record"},
    ("POST", "/api/upload"): STORE | FILE | {"invalid_request", "session_conflict"},
    ("GET", "/api/status/{id}"): PATH | {"corrupt_record"},
    ("GET", "/api/download/{id}"): PATH | {"result_not_found", "invalid_header", "corrupt_record"},
    ("POST", f"{TASKS}/task"): STORE | BODY | {"invalid_request", "task_exists"},
    ("GET", TASK): {"task_not_found", "corrupt_record"},
    ("PATCH", TASK): STORE | BODY | {"task_not_found", "invalid_request", "invalid_transition"},
    ("DELETE", TASK): STORE | {"task_not_found"},
    ("GET", TASKS): {"invalid_request", "store_unavailable"},
    ("GET", SHORT): {"invalid_request", "store_unavailable"},
    ("POST", f"{SHORT}/scenario-saved"): STORE | {"invalid_request"},
    ("GET", f"{ADMIN}/sessions"): {"invalid_request", "store_unavailable"},
    ("GET", f"{ADMIN}/stats"): {"store_unavailable"},
    ("GET", f"{ADMIN}/health"): {"store_unavailable"},
    ("POST", f"{ADMIN}/cleanup"): STORE | BODY | {"invalid_request"},
    ("POST", f"{ADMIN}/sessions/bulk"): STORE | BODY | {"invalid_request"},
    ("POST", RECOVER): STORE | PATH | {"session_conflict"},
    ("DELETE", f"{ADMIN}/users/{{user_id}}"): STORE | {"invalid_request"},
    ("GET", f"{ADMIN}/audit"): {"invalid_request", "corrupt_record", "store_unavailable"},
    ("GET", f"{ADMIN}/config"): {"store_unavailable"},
    ("PATCH", f"{ADMIN}/config"): STORE | BODY | {"invalid_request"},
    **{("GET", path): set() for path in (f"{BASE}/steps", "/livez", "/health", "/healthz")},
    **{("GET", path): set() for path in ("/readyz", "/openapi.json", "/docs", "/metrics")},
}


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in described()["paths"].items()
        for method, operation in methods.items()
    }


def parameters_of(operation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in map(resolve, operation["parameters"])}


# --- The document ---------------------------------------------------------------------------------


async def test_the_served_document_is_the_one_that_describes_the_operations(
    api: AsyncClient,
) -> None:
    response = await api.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == described()


def test_the_document_is_valid_openapi_3_1() -> None:
    assert described()["openapi"].startswith("3.1.")
    assert list(OpenAPIV31SpecValidator(described()).iter_errors()) == []


def test_the_document_carries_the_version_of_the_service() -> None:
    assert described()["info"]["version"] == __version__


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    routed = {(method, each.path) for each in OPERATIONS for method in each.methods}
    assert set(operations()) == routed


def test_every_call_of_the_contract_is_in_the_document() -> None:
    assert set(CONTRACT) - set(operations()) == set()


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does() -> None:
    named = [operation["operationId"] for operation in operations().values()]
    assert max(Counter(named).values()) == 1
    known_tags = {tag["name"] for tag in described()["tags"]}
    for operation in operations().values():
        assert re.fullmatch(r"[a-z_]+", operation["operationId"])
        assert operation["summary"]
        assert set(operation["tags"]) <= known_tags


def test_every_error_code_is_described_at_its_status() -> None:
    responses = described()["components"]["responses"]
    for code, kind in KINDS.items():
        response = responses[f"Problem{kind.status}"]
        assert f"`{code}`" in response["description"]
        assert kind.title in response["description"]
        assert list(response["content"]) == ["application/problem+json"]


@pytest.mark.parametrize("call", CONTRACT, ids=" ".join)
def test_every_error_that_the_contract_names_for_a_call_is_described_there(
    call: tuple[str, str],
) -> None:
    responses = operations()[call]["responses"]
    assert {str(KINDS[code].status) for code in CONTRACT[call]} - set(responses) == set()
    for status, response in responses.items():
        if int(status) >= 400 and call[1].startswith("/api/"):
            assert list(resolve(response)["content"]) == ["application/problem+json"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_an_operation_describes_what_it_takes(operation: Operation) -> None:
    for method in operation.methods:
        written = operations()[(method, operation.path)]
        parameters = parameters_of(written)
        in_path = {name for name, each in parameters.items() if each["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", operation.path))
        assert all(each["required"] for each in parameters.values() if each["in"] == "path")
        headers = {name for name, each in parameters.items() if each["in"] == "header"}
        expected = {"X-Request-ID", *operation.preconditions, *operation.headers}
        assert headers == expected | ({"Idempotency-Key"} if operation.idempotency_key else set())
        in_query = {name for name, each in parameters.items() if each["in"] == "query"}
        assert in_query == {name for name, _, _ in operation.query}
        assert ("requestBody" in written) == (operation.body is not None)
        assert all(each["description"] for each in parameters.values())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_an_operation_describes_who_may_call_it_and_how_often(operation: Operation) -> None:
    asks, limits = operation.access in MAY, operation.access is not Access.PUBLIC
    for method in operation.methods:
        written = operations()[(method, operation.path)]
        ways = {(scheme, who) for way in written["security"] for scheme, [who] in way.items()}
        assert ways == {
            ("api_key" if isinstance(each, Scope) else "bearer", each)
            for each in MAY.get(operation.access, ())
        }
        assert len(ways) == len(written["security"])
        responses = {status: resolve(each) for status, each in written["responses"].items()}
        assert ({"401", "403"} <= set(responses)) == asks
        assert ("429" in responses) == limits
        if asks:
            assert "WWW-Authenticate" in responses["401"]["headers"]
        if limits:
            assert "Retry-After" in responses["429"]["headers"]
            assert all(set(LIMITS) <= set(each["headers"]) for each in responses.values())


def test_the_document_says_what_everybody_shows() -> None:
    schemes = described()["components"]["securitySchemes"]
    assert {(each["type"], each.get("scheme"), each.get("name")) for each in schemes.values()} == {
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    }
    shown = " ".join(each["description"] for each in schemes.values())
    assert all(f"`{who}`" in shown for who in (Kind.WIZARD, Kind.USER, *Scope))


def test_a_body_is_json_but_for_a_merge_patch_a_form_and_a_result_that_may_be_anything() -> None:
    taken = {
        call: set(operation["requestBody"]["content"])
        for call, operation in operations().items()
        if "requestBody" in operation
    }
    assert taken.pop(("PATCH", STEP)) == {"application/json", "application/merge-patch+json"}
    assert taken.pop(("PUT", f"{SESSION}/result")) == {"*/*"}
    assert taken.pop(("POST", "/api/upload")) == {"multipart/form-data"}
    assert all(each == {"application/json"} for each in taken.values())


def test_a_live_stream_is_described_as_one_that_can_be_resumed() -> None:
    stream = operations()[("GET", STREAM)]
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
    resumed = parameters_of(stream)["Last-Event-ID"]
    assert (resumed["in"], resumed["required"]) == ("header", False)
    assert "429" in stream["responses"]


def test_an_answer_that_is_read_along_is_described_as_a_stream() -> None:
    stream = operations()[("POST", ASK_STREAM)]
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
    assert "429" in stream["responses"]


@pytest.mark.parametrize("path", [f"{SESSION}/result", f"{SESSION}/upload", "/api/download/{id}"])
def test_a_download_is_described_as_an_attachment_of_any_type(path: str) -> None:
    answer = operations()[("GET", path)]["responses"]["200"]
    assert list(answer["content"]) == ["*/*"]
    assert {"ETag", "Content-Disposition"} <= set(answer["headers"])
    schema = answer["content"]["*/*"].get("schema", {})
    for content in ("text", {"an": "object"}, [1]):
        assert validator_of(schema).is_valid(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Idempotency-Key", "key-1"),
        ("Idempotency-Key", '"key-1"'),
        ("Idempotency-Key", '"a \\"quoted\\" key"'),
        ("If-Match", '"3"'),
        ("If-Match", '"3", W/"4"'),
        ("If-Match", "*"),
        ("X-Request-ID", "a.b-c_1"),
        ("Last-Event-ID", "1767268800000-0"),
        ("Last-Event-ID", "what nobody can read"),
        ("Content-Disposition", 'attachment; filename="a.pdf"'),
        ("Content-Disposition", "attachment; filename*=UTF-8''%c3%a9.pdf"),
        ("n", "23"),
        ("id", "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f"),
        ("task_id", "A.b_c-9"),
        ("short_id", "s" * 128),
        ("user_id", "auth0|é/1 %"),
    ],
)
def test_what_the_contract_takes_as_a_parameter_the_document_allows(name: str, value: str) -> None:
    schema = described()["components"]["parameters"][name]["schema"]
    assert validator_of(schema).is_valid(value)


@pytest.mark.parametrize(
    ("call", "body", "allowed"),
    [
        ("PUT status", {"status": "processing"}, True),
        ("PUT status", {"status": "error", "error_message": "no model"}, True),
        ("PUT status", {"status": "error", "error_message": None, "more": 1}, True),
        ("PUT status", {"status": "pending"}, False),
        ("PUT status", {"status": "done"}, False),
        ("PUT status", {}, False),
        ("POST events", {"stage": "a", "progress": 0}, True),
        (
            "POST events",
            {"stage": "a" * 128, "progress": 100, "message": "", "event_id": "e"},
            True,
        ),
        ("POST events", {"stage": "", "progress": 0}, False),
        ("POST events", {"stage": "a" * 129, "progress": 0}, False),
        ("POST events", {"stage": "a", "progress": 101}, False),
        ("POST events", {"stage": "a", "progress": -1}, False),
        ("POST events", {"stage": "a", "progress": 0.5}, False),
        ("POST events", {"stage": "a", "progress": True}, False),
        ("POST events", {"stage": "a", "progress": 0, "event_id": ""}, False),
        ("POST events", {"progress": 0}, False),
        ("POST events", {"stage": "a"}, False),
        ("POST ask", {"question": "?"}, True),
        ("POST ask", {"question": "a\nb\tc", "more": 1}, True),
        ("POST ask-stream", {"question": "x" * 2000}, True),
        ("POST ask", {"question": ""}, False),
        ("POST ask", {"question": "x" * 2001}, False),
        ("POST ask", {"question": "a\0"}, False),
        ("POST ask-stream", {"question": None}, False),
        ("POST ask-stream", {}, False),
        ("PUT language", {"language": "pt-BR"}, True),
        ("PUT language", {"language": 1}, False),
        ("PUT language", {}, False),
    ],
    ids=str,
)
def test_what_a_generator_sends_is_described_as_the_contract_has_it(
    call: str, body: Any, allowed: bool
) -> None:
    method, name = call.split()
    content = operations()[(method, f"{SESSION}/{name}")]["requestBody"]["content"]
    assert validator_of(content["application/json"]["schema"]).is_valid(body) == allowed


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"workspace_id": "w1"}, True),
        ({"workspace_id": "w1", "user_id": "u", "language": "pt-BR", "metadata": {}}, True),
        ({"workspace_id": "w1", "unknown": [1]}, True),
        ({}, True),  # the query may say the rest
        ({"language": "en"}, True),
        ({"workspace_id": 1}, False),
        ({"workspace_id": ""}, False),
        ({"workspace_id": "w" * 129}, False),
        ({"workspace_id": "w1", "metadata": []}, False),
        ([], False),
    ],
    ids=str,
)
def test_the_body_that_makes_a_session_is_described_as_it_is_checked(
    body: Any, allowed: bool
) -> None:
    content = operations()[("POST", f"{BASE}/session")]["requestBody"]["content"]
    assert validator_of(content["application/json"]["schema"]).is_valid(body) == allowed


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"task_type": "scraping"}, True),
        ({"task_type": "of_the_deployer", "short_id": "s", "more": 1}, True),
        ({"task_type": "a", "short_id": None, "user_id": "ä", "task_id": "t"}, True),
        ({"task_type": "a", "session_id": "of-python"}, True),
        ({}, False),
        ({"task_type": 1}, False),
        ({"task_type": "a", "short_id": "a b"}, False),
        ({"task_type": "a", "task_id": ""}, False),
        ({"task_type": "a", "task_id": "t" * 129}, False),
        ({"task_type": "a", "user_id": ""}, False),
    ],
    ids=str,
)
def test_the_body_that_begins_a_task_is_described_as_it_is_checked(
    body: Any, allowed: bool
) -> None:
    content = operations()[("POST", f"{TASKS}/task")]["requestBody"]["content"]
    assert validator_of(content["application/json"]["schema"]).is_valid(body) == allowed


# --- The page for people --------------------------------------------------------------------------

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects what a page would load, where it leads, and whether its elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            if name in {"src", "srcset", "data", "poster", "action", "background"}:
                self.loads.append(value or "")
            if name == "href":
                (self.links if tag == "a" else self.loads).append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")
            assert name != "style"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_for_people_names_every_path_and_loads_nothing(api: AsyncClient) -> None:
    response = await api.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "*" not in policy

    page = Page(response.text)
    assert page.open == []
    assert page.loads == []
    assert page.elements.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "link"})
    assert "@import" not in response.text
    assert "url(" not in response.text
    assert max(Counter(page.ids).values()) == 1
    for link in page.links:
        assert link == "/openapi.json" or link.removeprefix("#") in page.ids

    for path, methods in described()["paths"].items():
        assert f"<code>{path}</code>" in response.text
        for operation in methods.values():
            assert operation["summary"] in response.text
    for name in described()["components"]["schemas"]:
        assert name in page.ids


async def test_the_page_for_people_describes_every_error_of_a_call(api: AsyncClient) -> None:
    text = (await api.get("/docs")).text
    for code in set().union(*CONTRACT.values()):
        assert f"<code>{code}</code>" in text


# --- Real answers against the document ------------------------------------------------------------


class Walker:
    """Walks through the API and holds every answer against the document."""

    def __init__(self, api: AsyncClient) -> None:
        self._api = api
        self.session_id = ""
        self.token_id = ""
        self.seen: set[tuple[str, str, int]] = set()

    async def __call__(
        self, method: str, path: str, status: int, *, step: int = 1, **request: Any
    ) -> Any:
        """Send a request to a path of the document, check the answer, and return its JSON."""
        target = path.replace("{id}", self.session_id).replace("{n}", str(step))
        target = target.replace("{task_id}", "t1").replace("{short_id}", "s1")
        target = target.replace("{user_id}", "u1")
        target = target.replace("{token_id}", self.token_id)
        response = await self._api.request(method, target, **request)
        assert response.status_code == status, response.text
        content = self._check(operations()[(method, path)], response)
        self.seen.add((method, path, status))
        if content is None:
            assert response.content == b""
            return None
        if "*/*" in content or "text/event-stream" in content:
            return response.content
        media_type = response.headers["content-type"].partition(";")[0]
        answer = orjson.loads(response.content)
        faults = validator_of(content[media_type]["schema"], closed=True).iter_errors(answer)
        assert [(each.instance_path, each.message) for each in faults] == []
        return answer

    async def begin_to_follow(self, path: str) -> str:
        """Begin to read an answer without an end, check it as far as that goes, and leave."""
        async with self._api.stream("GET", path.replace("{id}", self.session_id)) as response:
            assert response.status_code == 200
            content = self._check(operations()[("GET", path)], response)
            assert content is not None
            assert response.headers["content-type"].partition(";")[0] in content
            self.seen.add(("GET", path, 200))
            text = ""
            async for line in response.aiter_lines():
                if text and not line:
                    break
                text += "" if line.startswith("retry:") else f"{line}\n".lstrip("\n")
        return text

    def _check(self, operation: dict[str, Any], response: Response) -> dict[str, Any] | None:
        """Check the head of an answer, and give the media types that it may have."""
        described_as = resolve(operation["responses"][str(response.status_code)])
        headers = set(described_as["headers"])
        assert "x-request-id" in response.headers
        for name in (
            *("ETag", "Location", "Idempotent-Replayed", "Content-Disposition"),
            *("Retry-After", "WWW-Authenticate", *LIMITS),
        ):
            if name in response.headers:
                assert name in headers
        for name in headers - {"Idempotent-Replayed"}:
            assert name in response.headers
        content: dict[str, Any] | None = described_as.get("content")
        return content


JSON = {"content-type": "application/json"}
KEYED = {"idempotency-key": "k4"}
DATA = {"data": {"company_name": "Test Corp", "n": 1.5, "nested": {"a": [None, True, {}]}}}


async def walk_through_a_generation(walk: Walker) -> None:
    """Walk on through the generation of a finalized session."""
    await walk("GET", f"{SESSION}/status", 200)
    await walk("PUT", f"{SESSION}/status", 409, json={"status": "complete"})
    await walk("PUT", f"{SESSION}/status", 422, json={"status": "pending"})
    await walk("PUT", f"{SESSION}/status", 400, content=b"{", headers=JSON)
    for _ in range(2):
        processing = {"status": "processing"}
        await walk("PUT", f"{SESSION}/status", 200, json=processing, headers=KEYED)
    await walk("POST", f"{SESSION}/reopen", 409)

    report = {"stage": "answer_generation", "progress": 40, "message": "é", "event_id": "e1"}
    first = await walk("POST", f"{SESSION}/events", 201, json=report)
    assert await walk("POST", f"{SESSION}/events", 200, json=report) == first
    for status in (200, 200):
        await walk("POST", f"{SESSION}/events", status, json=report, headers=KEYED)
    other = {"stage": "visual_detection", "progress": 70}
    for _ in range(2):
        key = {"idempotency-key": "another"}
        await walk("POST", f"{SESSION}/events", 201, json=other, headers=key)
    await walk("POST", f"{SESSION}/events", 422, json={**report, "progress": 101})
    await walk(
        "POST", f"{SESSION}/events", 415, content=b"a", headers={"content-type": "text/plain"}
    )

    await walk("GET", f"{SESSION}/language", 200)
    for _ in range(2):
        await walk("PUT", f"{SESSION}/language", 200, json={"language": "de"}, headers=KEYED)
    await walk("PUT", f"{SESSION}/language", 422, json={"language": "no language"})

    await walk("GET", f"{SESSION}/result", 404)
    await walk("GET", f"{SESSION}/upload", 404)
    for content, media_type in ((b"{}", "application/json"), (b"\x00\xff", "image/png")):
        headers = {"content-type": media_type, "content-disposition": 'attachment; filename="a"'}
        for _ in range(2):
            stored = await walk(
                *("PUT", f"{SESSION}/result", 201),
                content=content,
                headers={**headers, "idempotency-key": media_type.replace("/", ".")},
            )
        assert await walk("GET", f"{SESSION}/result", 200) == content
    await walk("PUT", f"{SESSION}/result", 400, content=b"x", headers={"content-type": "no type"})
    etag = {"if-none-match": f'"{stored["checksum"]}"'}
    await walk("GET", f"{SESSION}/result", 304, headers=etag)
    await walk("GET", f"{SESSION}/result", 400, headers={"if-none-match": "x"})

    await walk("PUT", f"{SESSION}/status", 200, json={"status": "error", "error_message": "m"})
    log = await walk("GET", f"{SESSION}/events", 200)
    assert len({event["type"] for event in log["events"]}) >= 8
    page = await walk("GET", f"{SESSION}/events", 200, params={"limit": "2", "type": "progress"})
    assert [event["stage"] for event in page["events"]] == [report["stage"], other["stage"]]
    await walk("GET", f"{SESSION}/events", 422, params={"limit": "0"})
    await walk("GET", "/api/status/{id}", 200)

    text = await walk.begin_to_follow(STREAM)
    assert "event: snapshot\n" in text
    assert '"status":"error"' in text


async def walk_through_questions(walk: Walker) -> None:
    """Ask, in a session that is there."""
    question = {"question": "What is a draft?"}
    await walk("POST", f"{SESSION}/ask", 200, json=question)
    await walk("POST", f"{SESSION}/ask", 200, json={"question": "What is step 5?"})
    await walk("POST", f"{SESSION}/ask", 200, json={"question": "xyzzy"})
    await walk("POST", f"{SESSION}/ask", 422, json={"question": ""})
    await walk("POST", f"{SESSION}/ask", 400, content=b"{", headers=JSON)
    text = await walk("POST", ASK_STREAM, 200, json=question)
    assert text.count(b"event: done\ndata: {") == 1
    await walk("POST", ASK_STREAM, 422, json={})
    history = await walk("GET", f"{SESSION}/history", 200)
    assert len(history["history"]) == 4


async def walk_with_a_resume_token(walk: Walker) -> None:
    """Hand a session over that is there, and list it."""
    made = await walk("POST", TOKENS, 201, json={"ttl_s": 60, "label": "my phone"})
    for _ in range(2):
        await walk("POST", RESUME, 200, json={"token": made["token"]})
    await walk("POST", TOKENS, 201)
    await walk("POST", TOKENS, 422, json={"ttl_s": 59})
    await walk("POST", TOKENS, 400, content=b"{", headers=JSON)
    assert len((await walk("GET", TOKENS, 200))["resume_tokens"]) == 2
    walk.token_id = made["token_id"]
    await walk("DELETE", TOKEN, 200)
    await walk("DELETE", TOKEN, 404)
    await walk("POST", RESUME, 404, json={"token": made["token"]})
    await walk("POST", RESUME, 422, json={})
    mine = await walk("GET", f"{BASE}/mine", 200, params={"user_id": "u1", "workspace_id": "w1"})
    assert [each["session_id"] for each in mine["sessions"]] == [walk.session_id]
    await walk("GET", f"{BASE}/mine", 422)


async def walk_through_tasks(walk: Walker) -> None:
    """Walk through the life of a task."""
    task = {"task_type": "scenario_generation", "short_id": "s1", "task_id": "t1", "user_id": "u"}
    await walk("POST", f"{TASKS}/task", 201, json=task)
    await walk("POST", f"{TASKS}/task", 409, json=task)
    await walk("POST", f"{TASKS}/task", 200, json={"task_type": "scraping"})
    await walk("POST", f"{TASKS}/task", 422, json={"task_type": "no_type"})
    await walk("GET", TASK, 200)
    await walk("PATCH", TASK, 200, json={"status": "completed"})
    await walk("PATCH", TASK, 409, json={"status": "failed"})
    await walk("PATCH", TASK, 422, json={"status": "done"})
    await walk("PATCH", TASK, 400, content=b"{", headers=JSON)
    await walk("GET", TASKS, 200, params={"limit": "1", "user_id": "u"})
    await walk("GET", TASKS, 422, params={"cursor": "x"})
    await walk("GET", SHORT, 200, params={"status": "completed"})
    await walk("GET", SHORT, 422, params={"status": "done"})
    await walk("POST", f"{SHORT}/scenario-saved", 200)
    await walk("GET", TASK, 404)
    await walk("POST", f"{TASKS}/task", 201, json=task)
    await walk("DELETE", TASK, 200)
    await walk("DELETE", TASK, 404)


async def walk_as_an_operator(walk: Walker) -> None:
    """Walk through what operators do, with a session that is there."""
    await walk("GET", f"{ADMIN}/sessions", 200, params={"workspace_id": "w1", "limit": "1"})
    await walk("GET", f"{ADMIN}/sessions", 422, params={"cursor": "x"})
    await walk("GET", f"{ADMIN}/stats", 200)
    await walk("GET", f"{ADMIN}/health", 200)
    change = {"session_ids": [walk.session_id, "another"], "set": {"language": "pt-BR"}}
    done = await walk("POST", f"{ADMIN}/sessions/bulk", 200, json=change)
    assert done["updated"] == len(done["failed"]) == 1
    await walk("POST", f"{ADMIN}/sessions/bulk", 422, json={**change, "set": {}})
    await walk("POST", f"{ADMIN}/sessions/bulk", 400, content=b"{", headers=JSON)
    await walk("POST", RECOVER, 200)
    await walk("GET", f"{ADMIN}/config", 200)
    await walk("PATCH", f"{ADMIN}/config", 200, json={"max_sessions": 9, "cleanup_interval_s": 60})
    await walk("PATCH", f"{ADMIN}/config", 200, json={"max_sessions": None})
    await walk("PATCH", f"{ADMIN}/config", 422, json={"max_sessions": -1})
    await walk("DELETE", f"{ADMIN}/users/{{user_id}}", 200)
    await walk("GET", f"{ADMIN}/audit", 200)
    await walk("GET", f"{ADMIN}/audit", 422, params={"after": "x"})
    await walk("POST", f"{ADMIN}/cleanup", 422, json={"dry_run": True})
    await walk("POST", f"{ADMIN}/cleanup", 415, content=b"a", headers={"content-type": "a/b"})
    await walk("POST", f"{ADMIN}/cleanup", 200, json={"status": "error", "dry_run": True})


async def test_every_answer_of_a_walk_is_as_the_document_describes_it(
    serve: Callable[..., Any],
) -> None:
    walk = Walker(await serve(rate_limit="1000/minute"))
    await walk("GET", f"{BASE}/steps", 200)
    made = await walk(
        "POST",
        f"{BASE}/session",
        201,
        json={"workspace_id": "w1", "user_id": "u1", "metadata": {"plan": {"n": 1}}},
        headers={"idempotency-key": "k1"},
    )
    walk.session_id = made["session_id"]
    await walk("GET", SESSION, 200)
    await walk("GET", f"{SESSION}/summary", 200)
    await walk("POST", f"{SESSION}/finalize", 409)
    await walk("POST", f"{SESSION}/reopen", 409)
    await walk("GET", f"{SESSION}/export", 404)

    for _ in range(2):
        await walk("POST", STEP, 200, json=DATA, headers={"idempotency-key": "k2"})
    await walk("PUT", STEP, 200, json=DATA, headers={"if-match": '"1"'})
    await walk("PUT", STEP, 412, json=DATA, headers={"if-match": '"1"'})
    await walk("POST", STEP, 412, step=2, json=DATA, headers={"if-match": "*"})
    await walk("POST", STEP, 400, json=DATA, headers={"if-match": "x"})
    await walk("POST", STEP, 400, content=b"{", headers={"content-type": "application/json"})
    await walk("POST", STEP, 413, json={"data": {"a": "x" * 300_000}})
    await walk("POST", STEP, 415, content=b"a", headers={"content-type": "text/plain"})
    await walk("POST", STEP, 422, json={"data": {}})
    await walk("POST", STEP, 422, step=24, json=DATA)
    await walk("GET", STEP, 200)
    await walk("GET", STEP, 304, headers={"if-none-match": '"2"'})
    await walk("GET", STEP, 404, step=2)
    await walk("PATCH", STEP, 200, json={"nested": None, "more": 1})
    await walk("PATCH", STEP, 404, step=2, json={"a": 1})
    await walk("POST", f"{SESSION}/steps", 200, json={"steps": {"2": {"a": 1}, "3": {"b": 2}}})
    await walk("POST", f"{SESSION}/steps", 422, json={"steps": {"2": {"a": 1}, "x": {"b": 2}}})
    await walk("GET", f"{SESSION}/steps", 200)
    await walk("DELETE", STEP, 412, step=2, headers={"if-match": '"9"'})
    await walk("DELETE", STEP, 200, step=2)
    await walk("DELETE", STEP, 404, step=2)

    await walk("PUT", f"{STEP}/draft", 200, step=2, json={"data": {}})
    await walk("PUT", f"{STEP}/draft", 200, step=1, json=DATA)
    await walk("GET", f"{STEP}/draft", 200, step=1)
    await walk("DELETE", f"{STEP}/draft", 200, step=1)
    await walk("DELETE", f"{STEP}/draft", 404, step=1)
    await walk("POST", f"{STEP}/draft/promote", 404, step=1)
    await walk("POST", f"{STEP}/draft/promote", 422, step=2)
    await walk("PUT", f"{STEP}/draft", 200, step=4, json=DATA)
    await walk("POST", f"{STEP}/draft/promote", 200, step=4)
    await walk("GET", f"{SESSION}/summary", 200)
    await walk("GET", f"{SESSION}/progress", 200)
    await walk_through_questions(walk)
    await walk_with_a_resume_token(walk)

    first = await walk("POST", f"{SESSION}/finalize", 200, headers={"idempotency-key": "k3"})
    assert first == await walk("POST", f"{SESSION}/finalize", 200, json={"force": True})
    await walk("POST", f"{SESSION}/finalize", 200, headers={"idempotency-key": "k3"})
    await walk("POST", STEP, 409, json=DATA)
    await walk("PUT", f"{STEP}/draft", 409, json=DATA)
    export = await walk("GET", f"{SESSION}/export", 200)
    etag = f'"{export["checksum"]}"'
    await walk("GET", f"{SESSION}/export", 304, headers={"if-none-match": etag})
    await walk("GET", SESSION, 200)
    await walk_through_a_generation(walk)
    await walk("POST", f"{SESSION}/reopen", 200)
    await walk("GET", f"{SESSION}/progress", 200)
    await walk("DELETE", SESSION, 200)
    await walk("GET", SESSION, 404)
    await walk("DELETE", SESSION, 404)
    await walk("GET", STREAM, 404)
    await walk("POST", ASK_STREAM, 404, json={"question": "?"})
    await walk("GET", f"{SESSION}/history", 404)

    made = await walk("POST", "/api/upload", 201, files={"file": ("a.txt", b"text", "text/plain")})
    await walk("POST", "/api/upload", 415, json={"file": "text"})
    await walk("POST", "/api/upload", 422, files={"other": ("a.txt", b"text")})
    walk.session_id = made["session_id"]
    await walk("GET", "/api/status/{id}", 200)
    assert await walk("GET", f"{SESSION}/upload", 200) == b"text"
    await walk("GET", f"{SESSION}/upload", 304, headers={"if-none-match": "*"})
    await walk("GET", "/api/download/{id}", 404)
    await walk("PUT", f"{SESSION}/result", 201, content=b"result")
    assert await walk("GET", "/api/download/{id}", 200) == b"result"
    await walk_as_an_operator(walk)
    await walk("DELETE", SESSION, 200)

    await walk_through_tasks(walk)
    for probe in ("/livez", "/health", "/healthz", "/readyz"):
        await walk("GET", probe, 200)

    succeeded = {(method, path) for method, path, status in walk.seen if status < 300}
    aside = {("GET", path) for path in ("/openapi.json", "/docs", "/metrics")}
    assert set(operations()) - succeeded == aside


async def test_what_is_no_call_at_all_is_a_problem_as_the_document_describes_it(
    api: AsyncClient,
) -> None:
    responses = described()["components"]["responses"]
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", f"{BASE}/steps/", 404),
        ("POST", "/health", 405),
        ("TRACE", f"{BASE}/steps", 405),
    ):
        response = await api.request(method, path)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        schema = responses[f"Problem{status}"]["content"]["application/problem+json"]["schema"]
        assert validator_of(schema, closed=True).is_valid(response.json())
