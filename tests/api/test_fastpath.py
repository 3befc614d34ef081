"""Plain requests are answered in a shorter way than others, and nobody can tell by the answer.

What is sent both ways is the same but for a header that comes twice: it means nothing to anybody,
and a request that has one is not plain.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import uvloop
from httpx2 import AsyncClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

import app.store
from app.api.fastpath import FastPath, _plain_endpoints
from app.api.routes import build_routes
from app.main import Service, create_app
from app.onboarding.access import Scope
from app.settings import Settings
from app.store.scripts import load_script
from app.wiring import Services
from tests.access import AUTH, bearer, machine, user
from tests.api.conftest import Log
from tests.api.helpers import answer_of, ask, unknown_id
from tests.api.test_metrics import Series, grown, told
from tests.conftest import QUICKLY, UNLIMITED, known_settings
from tests.connection import Connection, head
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.service import BASE, serving_app

PLAIN = {(method, found.route) for (method, _, _), found in _plain_endpoints(build_routes())}
"""Every operation that has the short way, by its method and route."""

ASIDE = b"x-aside: 1\r\nx-aside: 1\r\n"
"""The header that comes twice."""

FAST, LAYERED = "fast", "layered"
WAYS = (FAST, LAYERED)

SCRIPTS = Path(app.store.__file__).parent / "lua"


# --- What is sent, and what is seen of it ---------------------------------------------------------


class Sent(NamedTuple):
    """A request: `target` stands behind the session's path, unless it begins with /api.

    `who` names one of `Place.shown`. `chunked` sends the body in that many pieces of no known
    length; `declared` says how long it is, and it never comes.
    """

    method: str
    target: str
    body: Any = None
    headers: Mapping[str, str] = {}
    who: str = "user"
    chunked: int = 0
    declared: int = 0


class Seen(NamedTuple):
    """All that can be seen of a request but for what is another at each: ids and times."""

    status: int
    headers: list[tuple[str, str]]
    body: str
    lines: list[dict[str, Any]]


class Place:
    """A session, and the credentials that are shown for it."""

    def __init__(self, session_id: str, shown: Mapping[str, dict[str, str]]) -> None:
        self.session_id = session_id
        self.shown = shown

    def path(self, target: str) -> str:
        """Give the path that a request goes to."""
        return target if target.startswith("/api") else f"{BASE}/{self.session_id}{target}"


class Served:
    """A service that says which way its requests went."""

    def __init__(self, app: Service, log: Log) -> None:
        self.fast_path: FastPath = app.fast_path
        self.services: Services
        self.api: AsyncClient
        self.sent: Counter[str] = Counter()
        self.layered: Counter[str] = Counter()
        self._log = log
        self.said: list[dict[str, Any]] = []
        self._layers = self.fast_path.app
        self.fast_path.app = self

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.layered[dict(scope["headers"]).get(b"x-way", b"").decode()] += 1
            self.services = scope["state"]["services"]
        await self._layers(scope, receive, send)

    async def see(self, way: str, place: Place, sent: Sent) -> Seen:
        """Send a request one way on a connection of its own, and look at what comes of it."""
        async with self.begun(way, place, sent) as (connection, request_id):
            answer = await connection.read(bodiless=sent.method == "HEAD")
        headers = [_neutral(pair) for pair in answer.headers if pair[0] != "date"]
        lines = self.lines(request_id)
        told = [json.dumps(headers), answer.body.decode("latin-1"), json.dumps(lines)]
        # What is no HTTP has no id.
        ids = {request_id, answer.header("x-request-id") or request_id}
        head, body, said = (_without_ids(text, place.session_id, ids) for text in told)
        return Seen(answer.status, json.loads(head), body, json.loads(said))

    async def both(self, places: Mapping[str, Place], sent: Sent) -> Seen:
        """Send a request both ways, each about its own place, and give what is seen of either."""
        seen = [await self.see(way, places[way], sent) for way in WAYS]
        assert seen[0] == seen[1], sent
        return seen[0]

    @asynccontextmanager
    async def begun(
        self, way: str, place: Place, sent: Sent
    ) -> AsyncIterator[tuple[Connection, str]]:
        """Write a request, and give its connection and its id."""
        self.sent[way] += 1
        request_id = f"r-{self.sent.total():05}"
        told = {"x-request-id": request_id, "x-way": way}
        async with Connection.open(self.api) as connection:
            connection.writer.write(_write(place, sent, told, ASIDE if way == LAYERED else b""))
            yield connection, request_id

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """Give what was logged of a request, without its times."""
        self.said += self._log.lines()
        lines = [line for line in self.said if line.get("request_id") == request_id]
        for line in lines:
            for name in ("timestamp", "duration_ms"):
                line.pop(name, None)
            # Of the way to a crash, the end is the same.
            line.update({"at": line["at"][-1:]} if "at" in line else {})
        return lines


def _write(place: Place, sent: Sent, told: Mapping[str, str], aside: bytes) -> bytes:
    body = sent.body if isinstance(sent.body, bytes) else b""
    if sent.body is not None and not isinstance(sent.body, bytes):
        body = orjson.dumps(sent.body)
    headers = {**told, **place.shown[sent.who], **sent.headers}
    if sent.chunked:
        headers |= {"transfer-encoding": "chunked", "content-length": ""}
    if sent.declared:
        headers |= {"content-type": "application/json", "content-length": str(sent.declared)}
    begin = head(sent.method, place.path(sent.target), headers, body)
    begin = begin[:-2] + aside + begin[-2:]
    if not sent.chunked:
        return begin + body
    size = len(body) // sent.chunked + 1
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join([begin, *(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces), b"0\r\n\r\n"])


def _neutral(pair: tuple[str, str]) -> tuple[str, str]:
    name, value = pair
    if name in ("ratelimit", "retry-after"):
        # Of what many share, how much is left is not compared.
        value = re.sub(r"(^|t=)\d+|(?<=r=)\d{5,}", r"\g<1><number>", value)
    return name, value


OTHERWISE = [
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"), "<time>"),
    (re.compile(r'(?<="session_age_seconds":)\d+'), "<age>"),
    (re.compile(r"sha256:[0-9a-f]{64}"), "<checksum>"),
    (re.compile(r"\d{13}-\d+"), "<event>"),
    (re.compile(r'(?<="token":")[^"]+'), "<token>"),
    (re.compile(r'(?<="token_id":")[^"]+'), "<token id>"),
    (re.compile(r'(?<="user_id":")u\d'), "<user>"),
]
"""What differs between two requests that are the same."""


def _without_ids(text: str, session_id: str, request_ids: Iterable[str]) -> str:
    text = text.replace(session_id, "<session>")
    for request_id in request_ids:
        text = text.replace(request_id, "<request>")
    for pattern, word in OTHERWISE:
        text = pattern.sub(word, text)
    return text


# --- The service ----------------------------------------------------------------------------------


@asynccontextmanager
async def served(settings: Settings, log: Log) -> AsyncIterator[Served]:
    app = create_app(settings)
    assert isinstance(app, Service)
    service = Served(app, log)
    async with serving_app(app) as service.api:
        yield service


Serve = Callable[..., Any]


@pytest.fixture
async def serve(
    settings: Settings, log: Log, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Serve]:
    """Give a function that runs the service with access control on, and with other settings."""
    # What is looked up once, by whichever way comes first, is no difference between them.
    monkeypatch.setattr("app.services.access.KEPT_MS", 600_000)
    for path in SCRIPTS.glob("*.lua"):
        await ask(raw, "SCRIPT", "LOAD", load_script(path.stem).text)
    services: list[Served] = []
    async with AsyncExitStack() as stack:

        async def start(**overrides: Any) -> Served:
            chosen = {**settings.model_dump(exclude_unset=True), **AUTH, **overrides}
            services.append(await stack.enter_async_context(served(known_settings(**chosen), log)))
            return services[-1]

        yield start
    for each in services:
        assert each.layered[FAST] == 0
        assert each.layered[LAYERED] == each.sent[LAYERED]


async def begin(service: Served) -> dict[str, Place]:
    """Make a session for each way: what one user does one way, another does the other way."""
    strange = await _create(service.api, user("u9"))
    common = {
        "nobody": {},
        "garbage": bearer("garbage"),
        "no scheme": {"authorization": "garbage"},
        "two": {**user(), "x-api-key": "a key"},
        "another": user("u9"),
        "another's": bearer(strange["session_token"]) if "session_token" in strange else {},
        "no key": {"x-api-key": "a key"},
        **{str(scope): machine(scope) for scope in Scope},
    }
    for headers in common.values():
        await service.api.get(f"{BASE}/steps", headers=headers)
    places = {}
    for number, way in enumerate(WAYS, start=1):
        made = await _create(service.api, user(f"u{number}"))
        own = {"user": user(f"u{number}"), "wizard": bearer(made.get("session_token", ""))}
        places[way] = Place(made["session_id"], {**common, **own})
    return places


async def _create(api: AsyncClient, headers: dict[str, str]) -> dict[str, Any]:
    made = await api.post(f"{BASE}/session", json={"workspace_id": "w1"}, headers=headers)
    return answer_of(made, 201)


# --- The same requests ----------------------------------------------------------------------------

EVERY = [
    Sent("POST", "/steps/1", {"data": {"a": 1}}),
    Sent("PUT", "/steps/1", {"data": {"a": 2}}),
    Sent("PATCH", "/steps/1", {"b": 1}),
    Sent("GET", "/steps/1"),
    Sent("POST", "/steps", {"steps": {"2": {"a": 1}, "3": {"b": [1.50]}}}),
    Sent("GET", "/steps"),
    Sent("DELETE", "/steps/2"),
    Sent("GET", "/progress"),
    Sent("GET", "/summary"),
    Sent("GET", "/status"),
    Sent("PUT", "/status", {"status": "processing"}),
    Sent("POST", "/events", {"stage": "a stage", "progress": 10, "event_id": "e1"}),
    Sent("GET", "/events"),
    Sent("PUT", "/language", {"language": "de"}),
    Sent("GET", "/language"),
    Sent("GET", "/history"),
    Sent("POST", "/resume-tokens", {"label": "a phone"}),
    Sent("GET", "/resume-tokens"),
    Sent("POST", "/finalize", {}),
    Sent("GET", "/export"),
    Sent("PUT", "/status", {"status": "complete"}),
    Sent("POST", "/reopen"),
]
"""Every plain operation once, each where it succeeds."""

SAVE = Sent("POST", "/steps/1", {"data": {"a": 1}})
JSON = "application/json"


def _saved(body: Any, **headers: str) -> Sent:
    return Sent("POST", "/steps/1", body, {k.replace("_", "-"): v for k, v in headers.items()})


NUMBERS = ["0", "24", "01", "9999999999", "1" * 300]
TAGS = ['"1"', '"99"', "*", 'W/"1"', '"1", "2"', "1", '"', "", '"\xe9"']
KEYS = ["k1", '"k1"', "k 1", '""', "x" * 256]
QUERIES = ["limit=1", "limit=0", "limit=x", "after=1-0", "after=x", "type=progress", "type=x"]
ODD_QUERIES = ["limit=1&limit=2", "%ff=1", "limit=%31", "a", "&&", "x=" + "y" * 390, "?", "~|^{}"]
BODIES = [
    *(b"{", b"", b"[]", b"null", b"\xef\xbb\xbf{}", b'{"data":{"a":"\xff"}}', b'{"data":{}}'),
    *(b'{"data":[]}', b'{"data":{"a":1,"a":2}}', b'{"data":{"a":1e999}}', b'{"other":1}'),
    *(b'{"data":' + b"[" * 70 + b"]" * 70 + b"}", b'{"data":{"a":"' + b"x" * 20_000 + b'"}}'),
    b" " * (256 * 1024 + 1),
]
TYPES = [
    *("text/plain", f"{JSON}; charset=utf-8", f"{JSON};charset=latin-1", "application/JSON"),
    *("application/merge-patch+json", "x"),
]

BEFORE = [
    Sent("GET", "/export"),
    Sent("POST", "/finalize"),
    Sent("GET", "/steps/1"),
    Sent("PATCH", "/steps/1", {"b": 1}),
    Sent("POST", "/reopen", who="wizard"),
]
"""What fails as long as nothing is saved."""

VARIED = [
    *(
        Sent(method, f"/steps/{number}", {"data": {"a": 1}} if method == "PUT" else None)
        for method in ("GET", "PUT")
        for number in NUMBERS
    ),
    *(Sent("GET", "/steps/1", None, {"if-none-match": tag}) for tag in TAGS),
    *(Sent("GET", "/export", None, {"if-none-match": tag}) for tag in ("*", '"x"', "x")),
    *(_saved({"data": {"a": 1}}, if_match=tag) for tag in TAGS),
    *(_saved({"data": {"a": 1}}, if_none_match=tag) for tag in TAGS),
    *(_saved({"data": {"a": n}}, idempotency_key=key) for key in KEYS for n in (1, 1, 2)),
    *(_saved({"data": {"a": 1}}, if_match='"99"', idempotency_key="k9") for _ in range(2)),
    *(_saved(body) for body in BODIES),
    *(_saved({"data": {"a": 1}}, content_type=each) for each in TYPES),
    *(Sent("PATCH", "/steps/1", {"b": None}, {"content-type": each}) for each in TYPES),
    *(_saved({"data": {"a": 1}}, content_encoding=each) for each in ("gzip", "identity", "br, x")),
    *(
        _saved(body)._replace(chunked=n)
        for body in ({"data": {"a": 1}}, b"{", b" " * 300_000)
        for n in (1, 3)
    ),
    _saved(None)._replace(declared=256 * 1024 + 1),
    Sent("PUT", "/language", declared=64 * 1024 + 1),
    Sent("PUT", "/language", {"language": "no language"}),
    Sent("PUT", "/language", {"language": 1}),
    Sent("PUT", "/language", b" " * 70_000),
    Sent("PUT", "/status", {"status": "pending"}),
    Sent("PUT", "/status", {"status": "nothing"}),
    Sent("POST", "/events", {"stage": "a stage", "progress": 10, "event_id": "e1"}),
    Sent("POST", "/events", {"stage": "", "progress": 101}),
    *(Sent("GET", f"/events?{query}") for query in QUERIES + ODD_QUERIES),
    *(Sent("GET", f"/progress?{query}") for query in ODD_QUERIES),
    Sent("GET", "/progress", b"a body that nobody asks for"),
    Sent("DELETE", "/steps/9"),
    Sent("DELETE", "/steps/3", None, {"if-match": '"9"'}),
    *(Sent("POST", "/finalize", {"force": True}, {"idempotency-key": "k3"}) for _ in range(2)),
    Sent("POST", "/finalize", {"force": 1}),
    SAVE,
    *(Sent("POST", "/reopen", None, {"idempotency-key": "k4"}) for _ in range(2)),
    *(Sent("GET", f"{BASE}/{unknown_id()}/{word}") for word in ("progress", "steps/1", "export")),
    Sent("PUT", f"{BASE}/{unknown_id()}/steps/1", {"data": {"a": 1}}),
    *(
        Sent("GET", "/progress", None, {name: value})
        for name, value in (
            ("origin", "https://a.example"),
            ("accept", "x"),
            ("cookie", "a=b"),
            ("x-empty", " "),
            ("x-long", "y" * 5000),
            ("host", ""),
            ("te", "x"),
        )
    ),
]
"""Requests with all that can be right or wrong about them; most fail."""

SHOWN = [
    *("nobody", "garbage", "no scheme", "two", "another", "another's", "no key"),
    *("wizard", *map(str, Scope)),
]
ASKED = [
    *(Sent("GET", "/progress"), Sent("GET", "/export"), SAVE),
    *(Sent("POST", "/events", {"stage": "a stage", "progress": 10}), Sent("GET", "/steps/1")),
]
CALLERS = [sent._replace(who=who) for sent in ASKED for who in SHOWN]
"""The same by everybody."""


@pytest.mark.parametrize("auth", ["on", "off"])
async def test_the_short_way_and_the_long_one_cannot_be_told_apart(
    serve: Serve, raw: Redis, auth: str
) -> None:
    service = await serve(auth=auth, rate_limit="1000000/day")
    places = await begin(service)
    requests = [*BEFORE, *EVERY, *VARIED, *CALLERS]
    seen, counted = {}, {}
    for way in WAYS:
        before = told()
        seen[way] = [await service.see(way, places[way], sent) for sent in requests]
        counted[way] = _counted(before, told())
    for sent, *both in zip(requests, *seen.values(), strict=True):
        assert both[0] == both[1], sent
    assert counted[FAST] == counted[LAYERED]
    assert [each for each in seen[FAST] if "ratelimit" not in dict(each.headers)] == []
    recorded = await _recorded(service, places)
    assert recorded[FAST] == recorded[LAYERED]
    assert {outcome for _, _, outcome in recorded[FAST]} >= OUTCOMES[auth]

    lines = [line for each in seen[FAST] for line in each.lines if line["event"] == SERVED]
    assert [line["status"] for line in lines] == [each.status for each in seen[FAST]]
    assert {(line["method"], line["route"]) for line in lines if line["status"] < 300} == PLAIN
    assert {line["status"] for line in lines} >= STATUSES[auth]


SERVED = "request_served"
_WRONG = {200, 201, 304, 400, 404, 409, 412, 413, 415, 422}
STATUSES = {"on": _WRONG | {401, 403}, "off": _WRONG}
"""How requests end where nothing is wrong with the service."""


OUTCOMES = {"on": {"done", "session_not_found", "forbidden"}, "off": {"done"}}
"""How what stays on record ends there."""


async def _recorded(
    service: Served, places: Mapping[str, Place]
) -> dict[str, list[tuple[str, str, str]]]:
    """Read what stands on record of each session; each lane has an order of its own."""
    path, shown = "/api/v1/admin/audit?limit=1000", machine(Scope.ADMIN)
    told = answer_of(await service.api.get(path, headers=shown))
    return {
        way: sorted(
            (_who(each["who"], place), each["action"], each["outcome"])
            for each in told["events"]
            if each.get("session_id") == place.session_id
        )
        for way, place in places.items()
    }


def _who(told: str, place: Place) -> str:
    return _without_ids(re.sub(r"^user:u\d", "user", told), place.session_id, ())


def _counted(before: Series, after: Series) -> Series:
    names = "onboarding_requests_total", "onboarding_request_duration_seconds_count"
    return {series: n for name in names for series, n in grown(before, after, name).items()}


async def test_whoever_has_asked_for_as_much_as_they_may_is_told_so_either_way(
    serve: Serve,
) -> None:
    service = await serve(rate_limit="5/day", miss_limit="2/day")
    places = await begin(service)
    left = [(await service.both(places, SAVE)).headers for _ in range(4)]
    assert [dict(headers)["ratelimit"].partition(";t")[0] for headers in left] == [
        f'"requests";r={n}' for n in (3, 2, 1, 0)
    ]
    for sent in (SAVE, Sent("GET", "/progress")):
        assert (await service.both(places, sent)).status == 429
    # The wizard is another caller, who guesses.
    guess = Sent("GET", f"{BASE}/{unknown_id()}/progress", who="wizard")
    asked = [*[guess] * 2, guess._replace(target="/progress")]
    assert [(await service.both(places, sent)).status for sent in asked] == [404, 404, 429]


async def test_a_session_that_is_gone_is_a_miss_either_way(serve: Serve, raw: Redis) -> None:
    service = await serve(miss_limit="2/day")
    places = await begin(service)
    look = Sent("GET", "/progress", who="wizard")
    assert (await service.both(places, look)).status == 200
    for place in places.values():
        # Its token is remembered for a while.
        await raw.delete(*[key async for key in raw.scan_iter(f"*{place.session_id}*")])
    seen = [(await service.both(places, look)).status for _ in range(3)]
    assert seen == [404, 404, 429]


# --- Trouble --------------------------------------------------------------------------------------

BY_WIZARD = [sent._replace(who="wizard") for sent in EVERY]
"""The same by whose credential is looked up in the store."""


async def test_while_the_store_is_away_both_ways_say_so(serve: Serve, valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        service = await serve(redis_url=url, retry_attempts=2, redis_timeout_s=5)
        places = await begin(service)
        proxy.refuse()
        proxy.reset_all()
        for sent in [*EVERY, *BY_WIZARD]:
            assert (await service.both(places, sent)).status == 503


async def test_requests_that_are_too_many_at_once_are_refused_either_way(
    serve: Serve, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        service = await serve(redis_url=url, max_in_flight=2, redis_timeout_s=30)
        places = await begin(service)
        proxy.hold()
        # One each way is being served, and counts.
        first = [asyncio.create_task(service.see(way, places[way], SAVE)) for way in WAYS]
        async with asyncio.timeout(5):
            while service.services.in_flight.count < 2:
                await asyncio.sleep(0.001)
        for sent in EVERY:
            seen = await service.both(places, sent)
            assert seen.status == 503
            assert "overloaded" in seen.body
        proxy.release()
        assert [(await each).status for each in first] == [200, 200]
        assert service.services.in_flight.count == 0


async def test_what_cannot_be_read_is_told_alike(serve: Serve, raw: Redis) -> None:
    service = await serve()
    places = await begin(service)
    for sent in EVERY:
        await service.both(places, sent)
    damaged = set()
    for name in ("step:1", "export", "history", "progress", "metadata", "events"):
        for place in places.values():
            await raw.delete(key := f"onboarding:{place.session_id}:{name}")
            await raw.set(key, b"\xff", ex=600)
        for sent in EVERY:
            seen = await service.both(places, sent)
            if seen.status == 500:
                assert "corrupt_record" in seen.body
                damaged.add((sent.method, sent.target))
    assert len(damaged) > 15


async def test_a_crash_is_told_alike(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await serve()
    places = await begin(service)

    def crash(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("app.services.limits.InFlight.enter", crash)
    for sent in EVERY:
        seen = await service.both(places, sent)
        assert seen.status == 500
        assert "internal_error" in seen.body
        assert "request_crashed" in {line["event"] for line in seen.lines}
        assert "secret" not in f"{seen}"


async def test_a_request_is_given_up_at_its_deadline_and_leaves_nothing_either_way(
    serve: Serve, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        service = await serve(redis_url=url, redis_timeout_s=30, request_deadline_s=0.4)
        places = await begin(service)
        before = len(asyncio.all_tasks())
        proxy.hold()
        requests = [*EVERY, *BY_WIZARD]
        seen = await asyncio.gather(
            *(service.see(way, places[way], sent) for sent in requests for way in WAYS)
        )
        for fast, layered in zip(seen[::2], seen[1::2], strict=True):
            assert fast.status == 504
            assert fast == layered
        assert service.fast_path._running == {}
        assert service.services.in_flight.count == 0
        proxy.release()
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.001)


async def test_a_body_that_does_not_come_is_given_up_either_way(serve: Serve) -> None:
    service = await serve(request_deadline_s=0.2)
    places = await begin(service)
    stalled = SAVE._replace(body=None, declared=100)
    assert (await service.both(places, stalled)).status == 504


async def test_who_leaves_in_the_middle_of_a_body_is_noted_alike(serve: Serve) -> None:
    service = await serve()
    places = await begin(service)
    half = SAVE._replace(body=b'{"data"', headers={"content-length": "100"})
    seen = []
    for way in WAYS:
        async with service.begun(way, places[way], half) as (connection, request_id):
            await connection.writer.drain()
        async with asyncio.timeout(5):
            while not (lines := service.lines(request_id)):
                await asyncio.sleep(0.001)
        [line] = lines
        assert (line["event"], line["status"], line["redis_commands"]) == (SERVED, 499, 0)
        seen.append({**line, "request_id": "", "session_id": ""})
    assert seen[0] == seen[1]
    assert service.fast_path._running == {}


# --- Beside the answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["a.b_C-9", "x" * 128])
async def test_the_id_of_a_request_is_taken_over_where_it_can_be(serve: Serve, told: str) -> None:
    service = await serve()
    places = await begin(service)
    sent = Sent("GET", "/progress", None, {"x-request-id": told})
    for way in WAYS:
        async with service.begun(way, places[way], sent) as (connection, _):
            assert (await connection.read()).header("x-request-id") == told
        assert [line["status"] for line in service.lines(told)[-1:]] == [200]


@pytest.mark.parametrize("told", ["a b", "x" * 129, "\xe9", "a,b", ""])
async def test_an_id_that_cannot_be_taken_over_is_replaced(serve: Serve, told: str) -> None:
    service = await serve()
    place = (await begin(service))[FAST]
    before = service.layered[""]
    async with Connection.open(service.api) as connection:
        headers = {**place.shown["user"], "x-request-id": told}
        answers = [
            await connection.ask("GET", place.path(f"/steps/{n}"), headers) for n in (1, 1, 0)
        ]
    ids = [answer.header("x-request-id") for answer in answers]
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", each or "") for each in ids)
    assert [answer.json["request_id"] for answer in answers] == ids
    assert service.layered[""] == before


async def test_a_page_of_an_origin_that_is_listed_is_answered_by_the_layers(serve: Serve) -> None:
    service = await serve(cors_origins="https://a.example")
    place = (await begin(service))[FAST]
    before = service.layered[""]
    async with Connection.open(service.api) as connection:
        for origin, cors in (
            ("https://a.example", "https://a.example"),
            ("https://b.example", None),
        ):
            headers = {**place.shown["user"], "origin": origin}
            answer = await connection.ask("GET", place.path("/progress"), headers)
            assert (answer.status, answer.header("access-control-allow-origin")) == (200, cors)
    assert service.layered[""] - before == 1


async def test_a_service_that_stops_sends_clients_elsewhere_either_way(serve: Serve) -> None:
    service = await serve()
    places = await begin(service)
    assert "connection" not in dict(map(tuple, (await service.both(places, SAVE)).headers))
    service.services.stop_soon()
    for sent in (*EVERY, SAVE._replace(who="nobody")):
        seen = await service.both(places, sent)
        assert seen.headers[-1] == ["connection", "close"]
    async with service.begun(FAST, places[FAST], SAVE) as (connection, _):
        await connection.read()
        assert await connection.is_closed()


async def test_what_does_not_end_with_the_service_is_ended_alike(
    settings: Settings, valkey: Valkey, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.server.GRACE_S", 0.05)
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        chosen = {**settings.model_dump(exclude_unset=True), **AUTH, "redis_url": url}
        async with AsyncExitStack() as stack, AsyncExitStack() as requests:
            running = served(known_settings(**chosen, redis_timeout_s=30), log)
            service = await stack.enter_async_context(running)
            places = await begin(service)
            proxy.hold()
            begun = [
                await requests.enter_async_context(service.begun(way, places[way], SAVE))
                for way in WAYS
            ]
            async with asyncio.timeout(5):
                while service.services.in_flight.count < len(WAYS):
                    await asyncio.sleep(0.001)
            await stack.aclose()
            seen = []
            for connection, request_id in begun:
                assert (await connection.read()).status == 500
                [line] = [each for each in service.lines(request_id) if each["event"] == SERVED]
                seen.append({**line, "request_id": "", "session_id": ""})
            assert seen[0]["status"] == 499
            assert seen[0] == seen[1]
            assert service.fast_path._running == {}
    # What the server says of it is told in our words.
    events = {line["event"] for line in [*service.said, *log.lines()]}
    assert "library_message_logged" in events
    assert [each for each in events if not re.fullmatch("[a-z_]+", each)] == []


# --- Whatever is sent -----------------------------------------------------------------------------

NAMES = [
    *("content-type", "content-encoding", "if-match", "if-none-match", "idempotency-key"),
    *("accept", "origin", "cookie", "connection", "user-agent", "te", "content-language"),
]
VALUES = [
    *("*", '"1"', "k1", "application/json", "text/plain", "gzip", "close", "keep-alive", "x y"),
    *("https://a.example", "\xff", "identity", "0"),
]
WORDS = sorted({route.removeprefix(f"{BASE}/{{id}}/").partition("/")[0] for _, route in PLAIN})
TARGETS = st.builds(
    lambda word, rest, query: f"/{word}{rest}{query and '?' + query}",
    st.sampled_from(WORDS) | st.text("abz-/0.~_%", max_size=9),
    st.sampled_from(["", "/1", "/2", "/99", "/0", "/", "/1/draft"]),
    # Whatever may stand in a request line.
    st.text([chr(n) for n in range(33, 127)], max_size=20),
)
REQUESTS = st.builds(
    Sent,
    st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]),
    TARGETS,
    st.sampled_from([sent.body for sent in EVERY] + BODIES[:-1]),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=3),
    st.sampled_from(["user", "user", "wizard", "nobody", "another", "two"]),
    st.sampled_from([0, 0, 1, 2]),
    st.just(0),
)


def test_whatever_is_sent_is_answered_alike(
    valkey: Valkey, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.access.KEPT_MS", 600_000)
    settings = known_settings(redis_url=valkey.url, **QUICKLY, **UNLIMITED, **AUTH)
    # The loop that the service runs on.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        service = runner.run(stack.enter_async_context(served(settings, log)))
        places = runner.run(begin(service))
        for sent in EVERY:
            for way in WAYS:
                # The first time, scripts are sent to the store.
                runner.run(service.see(way, places[way], sent))

        @hypothesis_settings(max_examples=150, deadline=None)
        @given(REQUESTS)
        def send(sent: Sent) -> None:
            runner.run(service.both(places, sent))

        try:
            send()
        finally:
            runner.run(stack.aclose())
