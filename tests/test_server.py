"""What reaches the server byte by byte: nothing is lost in silence, answered twice or unbounded."""

import asyncio
import gc
import socket
import struct
from contextlib import suppress

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.main import create_app_from_environment
from app.protocol import Protocol
from app.server import make_config
from tests.service import BASE

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
