"""What reaches the server byte by byte: nothing is lost in silence, answered twice or unbounded."""

import asyncio
import gc
import re
import socket
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.main import create_app_from_environment
from app.protocol import Protocol
from app.server import make_config
from app.settings import Settings
from tests.conftest import known_settings
from tests.connection import Connection, head
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey
from tests.service import BASE, serving

Serve = Callable[..., Any]

HEAD = "Host: x\r\nContent-Type: application/json\r\n"


async def exchange(api: AsyncClient, sent: str, *, until_closed: bool = True) -> str:
    """Send bytes as they are; give everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    try:
        async with asyncio.timeout(10):
            writer.write(sent.encode())
            received = await (reader.read() if until_closed else reader.readuntil(b"\r\n\r\n"))
    finally:
        writer.close()
    return received.decode()


def request(line: str, body: str = "", *, head: str = HEAD) -> str:
    return f"{line} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}"


async def test_a_body_behind_an_upgrade_is_refused_and_not_lost(
    api: AsyncClient, raw: Redis
) -> None:
    before = {key async for key in raw.scan_iter("onboarding:*:progress")}
    upgrade = f"{HEAD}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    answer = await exchange(
        api, request(f"POST {BASE}/session?workspace_id=q", '{"workspace_id":"w"}', head=upgrade)
    )

    assert answer.startswith("HTTP/1.1 400")
    assert "application/problem+json" in answer
    assert {key async for key in raw.scan_iter("onboarding:*:progress")} == before


async def test_an_upgrade_to_a_websocket_is_not_taken_up(api: AsyncClient) -> None:
    upgrade = (
        "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    )
    answer = await exchange(api, request("GET /livez", head=upgrade), until_closed=False)
    assert answer.startswith("HTTP/1.1 200")


async def test_a_body_that_breaks_in_the_middle_is_refused_at_once(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    head = "Host: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await exchange(
        api, f"PUT {BASE}/{session_id}/result HTTP/1.1\r\n{head}5\r\nhello\r\nZZ\r\n"
    )

    assert answer.count("HTTP/1.1 ") == 1
    assert answer.startswith("HTTP/1.1 400")
    assert "application/problem+json" in answer
    assert [key async for key in raw.scan_iter(f"onboarding:{session_id}:result*")] == []


async def test_what_follows_a_write_and_is_no_http_does_not_replace_its_answer(
    api: AsyncClient, session_id: str
) -> None:
    write = request(f"PUT {BASE}/{session_id}/steps/1", '{"data":{"a":1}}')
    answer = await exchange(api, f"{write}GARBAGE\r\n\r\n")

    assert answer.count("HTTP/1.1 ") == 1
    assert answer.startswith("HTTP/1.1 200")


async def test_a_head_without_end_is_not_waited_for(api: AsyncClient) -> None:
    answer = "HTTP/1.1 400, lost with what was still on its way"
    with suppress(ConnectionResetError):
        answer = await exchange(api, "GET /livez HTTP/1.1\r\nX-Long: " + "a" * 2_000_000)
    assert answer.startswith("HTTP/1.1 400")
    assert (await api.get("/livez")).status_code == 200


async def test_a_refusal_before_the_body_that_waits_for_leave_closes_the_connection(
    api: AsyncClient, session_id: str
) -> None:
    head = f"{HEAD}Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n"
    answer = await exchange(api, f"PUT {BASE}/{session_id}/steps/1 HTTP/1.1\r\n{head}")

    assert answer.startswith("HTTP/1.1 413")
    assert "connection: close" in answer


async def test_a_body_of_faults_is_not_answered_with_many_times_its_size(
    api: AsyncClient, session_id: str
) -> None:
    numbers = ",".join(["1e999"] * 5_000)
    body = f'{{"data":{{"{"a" * 200_000}":[{numbers}]}}}}'
    answer = await api.put(
        f"{BASE}/{session_id}/steps/1", content=body, headers={"content-type": "application/json"}
    )

    assert answer.status_code == 422
    assert len(answer.content) < 2 * len(body)


async def test_an_unreadable_catalogue_in_the_store_harms_no_other_session(
    api: AsyncClient, raw: Redis, serve: object
) -> None:
    await raw.hset("onboarding:index:catalogues", "9@dead", b"\xff garbage")
    client: AsyncClient = await serve()  # type: ignore[operator]
    created = await client.post(f"{BASE}/session", json={"workspace_id": "w"})
    path = f"{BASE}/{created.json()['session_id']}/steps/1"

    assert (await client.put(path, json={"data": {}})).status_code == 422
    assert (await client.put(path, json={"data": {"a": 1}})).status_code == 200


async def test_a_session_that_is_just_being_made_is_never_reported_as_damaged(
    api: AsyncClient,
) -> None:
    async def make() -> str:
        made = await api.post(f"{BASE}/session", json={"workspace_id": "w"})
        return str(made.json()["session_id"])

    for session_id in await asyncio.gather(*(make() for _ in range(20))):
        looked = asyncio.gather(*(api.get(f"{BASE}/{session_id}/progress") for _ in range(5)))
        deleted = api.delete(f"{BASE}/{session_id}")
        answers, _ = await asyncio.gather(looked, deleted)
        assert {answer.status_code for answer in answers} <= {200, 404}


async def test_a_lost_log_or_memory_is_begun_anew_with_the_lifetime_of_the_session(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    prefix = f"onboarding:{session_id}:"
    for name in ("events", "ops"):
        await raw.delete(prefix + name)
        await api.put(f"{BASE}/{session_id}/steps/1", json={"data": {"a": 1}})
        lifetime = await raw.pexpiretime(prefix + "progress")
        assert await raw.pexpiretime(prefix + name) == lifetime


def test_a_process_looks_for_no_garbage_in_what_it_has_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.main.configure_logging", lambda *_: None)
    assert create_app_from_environment().routes
    assert len(gc.get_objects()) < 10_000


def test_an_idle_connection_is_kept_longer_than_balancers_keep_theirs() -> None:
    assert make_config("app.main:create_app").timeout_keep_alive > 60


async def test_of_a_connection_that_was_reset_nothing_is_left(api: AsyncClient) -> None:
    def connections() -> int:
        gc.collect()
        return sum(isinstance(each, Protocol) for each in gc.get_objects())

    before = connections()
    for _ in range(3):
        reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
        writer.write(request("GET /livez").encode())
        await reader.readuntil(b"\r\n\r\n")
        link: socket.socket = writer.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    async with asyncio.timeout(2):
        while connections() > before:
            await asyncio.sleep(0.01)


# --- Plain requests, which are begun and answered with less ---------------------------------------


async def begin(connection: Connection) -> str:
    """Begin a session with one step on a connection, and give its path."""
    made = await connection.ask("POST", f"{BASE}/session", body=b'{"workspace_id":"w"}')
    path = f"{BASE}/{made.json['session_id']}"
    assert (await connection.ask("POST", f"{path}/steps/1", body=b'{"data":{"a":1}}')).status == 200
    return path


def connections() -> list[Protocol]:
    """Find those that a service in this process has open."""
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, Protocol) and not each.transport.is_closing()
    ]


async def test_pipelined_requests_are_answered_in_their_order(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        for number in range(2, 12):
            # Every other one is plain; some have a body, one is refused, one has no body to answer.
            aside = {"x-forwarded-proto": "http"} if number % 2 else {}
            body = b'{"data":{"a":%d}}' % number
            connection.write("PUT", f"{path}/steps/{number}", aside, body)
            connection.write("GET", f"{path}/steps/{number}")
            connection.write("HEAD", f"{path}/progress")
            connection.write("GET", f"{path}/steps/0")
            connection.write("GET", f"{path}/steps/%3{number % 10}")
        for number in range(2, 12):
            assert (await connection.read()).json["step_id"] == number
            assert (await connection.read()).json["data"] == {"a": number}
            assert (await connection.read(bodiless=True)).status == 200
            assert (await connection.read()).status == 422
            encoded = await connection.read()
            assert encoded.json.get("step_id", 0) == (number % 10)


async def test_a_slow_request_holds_up_those_behind_it_and_keeps_their_order(
    serve: Serve, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=f"redis://{HOST}:{proxy.port}/0", redis_timeout_s=30)
        async with Connection.open(api) as connection:
            path = await begin(connection)
            proxy.hold()
            for target in (f"{path}/steps/1", "/livez", f"{path}/progress", "/nothing"):
                connection.write("GET", target)
            await until(lambda: any(each.pipeline for each in connections()))
            proxy.release()
            assert (await connection.read()).json["step_id"] == 1
            assert [(await connection.read()).status for _ in range(3)] == [200, 200, 404]


async def test_a_body_may_come_in_pieces_of_any_size(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        for size, length in ((1, 20), (7, 200), (70_000, 200_000), (300_000, 200_000)):
            body = b'{"data":{"a":"%b"}}' % (b"x" * length)
            sent = head("PUT", f"{path}/steps/2", None, body) + body
            for start in range(0, len(sent), size):
                connection.writer.write(sent[start : start + size])
                await connection.writer.drain()
                await asyncio.sleep(0)
            assert (await connection.read()).status == 200
            got = await connection.ask("GET", f"{path}/steps/2")
            assert len(got.json["data"]["a"]) == length


async def test_what_stands_behind_a_body_is_no_header(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        for aside in ({}, {"x-forwarded-proto": "http"}):
            told = {"content-type": "application/json", "transfer-encoding": "chunked", **aside}
            sent = head("PUT", f"{path}/steps/1", told)
            trailers = b'if-match: "99"\r\nx-request-id: mine\r\ncontent-encoding: gzip\r\n'
            connection.writer.write(sent + b'10\r\n{"data":{"a":2}}\r\n0\r\n' + trailers + b"\r\n")
            answer = await connection.read()
            assert answer.status == 200, answer
            assert answer.header("x-request-id") != "mine"


@pytest.mark.parametrize("begin_of_it", ["X-Long: ", "X-Many: 1\r\n" * 1000 + "X-Long: "])
async def test_what_stands_behind_a_body_is_not_waited_for_without_end(
    api: AsyncClient, session_id: str, begin_of_it: str
) -> None:
    chunked = "Host: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = '10\r\n{"data":{"a":1}}\r\n0\r\n'
    sent = f"PUT {BASE}/{session_id}/steps/1 HTTP/1.1\r\n{chunked}{body}{begin_of_it}"
    answer = "HTTP/1.1 400, lost with what was still on its way"
    with suppress(ConnectionResetError):
        answer = await exchange(api, sent + "a" * 4_000_000)
    assert answer.startswith("HTTP/1.1 400")
    assert (await api.get(f"{BASE}/{session_id}/steps/1")).status_code == 404


async def test_the_rest_of_a_body_that_was_refused_is_no_request(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        body = b"GET / HTTP/1.1\r\n\r\n" * 20_000
        connection.writer.write(head("PUT", f"{path}/steps/1", None, body))
        assert (await connection.read()).status == 413
        connection.writer.write(body)
        connection.write("GET", f"{path}/progress")
        assert (await connection.read()).json["progress"]["completed"] == 1


@pytest.mark.parametrize("aside", [{}, {"x-forwarded-proto": "http"}], ids=["plain", "not plain"])
async def test_a_connection_is_closed_once_it_is_idle_and_not_while_it_is_used(
    serve: Serve, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, aside: dict[str, str]
) -> None:
    monkeypatch.setattr("app.server.KEEP_ALIVE_S", 0.1)
    large = b'{"data":{"a":"%b"}}' % (b"x" * 200_000)
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=f"redis://{HOST}:{proxy.port}/0", redis_timeout_s=30)
        async with (
            Connection.open(api) as busy,
            Connection.open(api) as idle,
            Connection.open(api) as piped,
            Connection.open(api) as loaded,
        ):
            path = await begin(busy)
            # Idle after one request, after several at once, and after one that held up the reading.
            await idle.ask("GET", f"{path}/steps/1", aside)
            for _ in range(3):
                piped.write("GET", f"{path}/steps/1", aside)
            for _ in range(3):
                await piped.read()
            assert (await loaded.ask("PUT", f"{path}/steps/2", aside, large)).status == 200
            proxy.hold()
            busy.write("GET", f"{path}/steps/1", aside)
            assert [await each.is_closed() for each in (idle, piped, loaded)] == [True] * 3
            proxy.release()
            assert (await busy.read()).status == 200
            assert await busy.is_closed()


async def test_whoever_speaks_an_older_http_or_asks_for_it_is_left_after_the_answer(
    api: AsyncClient,
) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
    target = f"GET {path}/steps/1"
    for sent in (
        f"{target} HTTP/1.0\r\n\r\n",
        f"{target} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        f"{target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        f"{target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n{target} HTTP/1.1\r\n\r\n",
        f"{target}?a=%20 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        answer = await exchange(api, sent)
        assert answer.startswith("HTTP/1.1 200 OK\r\n")
        assert answer.count("HTTP/1.1") == 1
        assert answer.count("connection: close\r\n") == 1
        assert '"data":{"a":1}' in answer


async def test_of_an_answer_that_nobody_takes_little_is_kept(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        body = b'{"data":{"a":"%b"}}' % (b"x" * 200_000)
        assert (await connection.ask("PUT", f"{path}/steps/1", body=body)).status == 200
        [served] = connections()
        asked = 0
        # Each when the one before it is answered, so that all are plain, until no more is taken.
        while not served.flow.write_paused:
            connection.write("GET", f"{path}/steps/1")
            asked += 1
            await until(partial(has_answered, served, asked + 3))
        connection.write("GET", f"{path}/steps/1")
        await until(lambda: bool(served.tasks))
        # Nothing more is kept, however often the loop turns and whatever is asked for.
        for _ in range(20):
            connection.write("GET", f"{path}/steps/1")
        kept = served.transport.get_write_buffer_size()
        for _ in range(100):
            await asyncio.sleep(0)
        assert 0 < served.transport.get_write_buffer_size() <= kept < 2 * len(body)
        asked += 21
        for _ in range(asked):
            assert len((await connection.read()).body) > 200_000


LINE_BREAKS = ["\r\n", "\n", "\r", "\r\n ", "\n\t", "\0", "\x0b", "\x85"]


@pytest.mark.parametrize("name", ["x-request-id", "idempotency-key", "if-match", "content-type"])
async def test_nothing_that_is_sent_becomes_a_header_of_the_answer(
    api: AsyncClient, session_id: str, name: str
) -> None:
    for line_break in LINE_BREAKS:
        told = f"Host: x\r\n{name}: a{line_break}x-made: 1\r\n"
        sent = request(f"PUT {BASE}/{session_id}/steps/1", '{"data":{"a":1}}', head=told)
        async with Connection.open(api) as connection:
            connection.writer.write(sent.encode("latin-1"))
            answer = await connection.read()
        assert {each for each, _ in answer.headers} <= {
            *("date", "cache-control", "content-type", "content-length", "etag", "connection"),
            "x-request-id",
        }


async def test_who_leaves_while_the_store_answers_leaves_nothing(
    serve: Serve, valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=f"redis://{HOST}:{proxy.port}/0", redis_timeout_s=30)
        async with Connection.open(api) as other:
            path = await begin(other)
            before = asyncio.all_tasks()
            proxy.hold()
            for body in (b"", b'{"data":{"a":2}}'):
                async with Connection.open(api) as connection:
                    connection.write("PUT" if body else "GET", f"{path}/steps/1", body=body)
                    await until(lambda: any(each.tasks for each in connections()))
            await until(lambda: len(connections()) == 1)
            proxy.release()
            await until(lambda: asyncio.all_tasks() <= before)
            assert (await other.ask("GET", f"{path}/steps/1")).json["data"] == {"a": 2}
        said = capsys.readouterr().out
        assert not re.search("error|warning|Traceback", said), said


async def test_a_connection_has_no_dictionary(api: AsyncClient) -> None:
    async with Connection.open(api) as connection:
        path = await begin(connection)
        await connection.ask("GET", f"{path}/steps/1")
        [served] = connections()
        owned = [each for each in gc.get_referents(served) if type(each) is dict]
        assert [each for each in owned if "transport" in each] == []


async def test_a_service_that_ends_finishes_what_was_asked_and_leaves_who_is_idle(
    settings: Settings, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy, AsyncExitStack() as stack:
        url = f"redis://{HOST}:{proxy.port}/0"
        own = {**settings.model_dump(exclude_unset=True), "redis_url": url, "redis_timeout_s": 30}
        api = await stack.enter_async_context(serving(known_settings(**own)))
        async with Connection.open(api) as busy, Connection.open(api) as idle:
            path = await begin(busy)
            await idle.ask("GET", f"{path}/progress")
            proxy.hold()
            busy.write("GET", f"{path}/steps/1")
            await until(lambda: any(each.tasks for each in connections()))
            ending = asyncio.create_task(stack.aclose())
            assert await idle.is_closed()
            proxy.release()
            answer = await busy.read()
            assert (answer.status, answer.header("connection")) == (200, "close")
            assert await busy.is_closed()
            await ending


def has_answered(connection: Protocol, requests: int) -> bool:
    return connection.server_state.total_requests == requests


async def until(is_true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.001)
