"""What every test may ask for: a store (real and fake), a manager on it, a service on it."""

import asyncio
import gc
import os
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpcore2
import pytest
import redis.utils
import time_machine
from fakeredis import FakeAsyncRedis, FakeServer
from httpx2 import AsyncClient
from hypothesis import settings as hypothesis_settings
from redis.asyncio import Redis

from app.onboarding.catalogue import Catalogue
from app.onboarding.guide import Guide, QuestionEntry, parse_questions
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings, load_settings, variable_of
from app.store.connect import connect
from app.store.gateway import Gateway, RetryPolicy
from app.store.keys import Keys
from app.store.links import PooledLink
from tests.faults.servers import Valkey
from tests.service import BASE, serving

QUICKLY = {"retry_base_s": 0.01, "retry_jitter_s": 0.0}
"""Settings that no test waits a backoff for."""

UNLIMITED = {"rate_limit": None, "create_limit": None, "miss_limit": None}
"""Settings for tests that ask as much as they like: they all come from one address."""

# Half of what Hypothesis draws by default: drawing takes a tenth of the run.
hypothesis_settings.register_profile("suite", hypothesis_settings(), max_examples=50)
hypothesis_settings.load_profile("suite")

NOON_S = 1_767_268_800.0
"""The moment at which the clock of tests begins, in Unix seconds."""


_VARIABLES = {"SESSION_TTL", *map(variable_of, Settings.model_fields)}
_LOADED: dict[bytes, Settings] = {}


def known_settings(**overrides: Any) -> Settings:
    """Load settings, equal ones once: that takes longer than many a test, and nothing changes them.

    They are made of the environment and of these alone; a file that is named may be another one by
    the next time.
    """
    set_now = {name: value for name, value in os.environ.items() if name in _VARIABLES}
    if any(name.lower().endswith("_file") for name in (*overrides, *set_now)):
        return load_settings(**overrides)
    key = pickle.dumps((set_now, overrides))
    if key not in _LOADED:
        _LOADED[key] = load_settings(**overrides)
    return _LOADED[key]


@pytest.fixture(scope="session")
def for_all() -> Iterator[pytest.MonkeyPatch]:
    """Change something for all tests, before the first one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(autouse=True, scope="session")
def no_settings_from_outside(for_all: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in _VARIABLES:
        for_all.delenv(name, raising=False)


def pytest_collection_finish() -> None:
    """Leave what was collected out of every later look for garbage: it stays for the whole run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def what_never_changes_is_read_once(for_all: pytest.MonkeyPatch) -> None:
    """Read the machine's certificates and the version of redis-py once, and index the guide once.

    The libraries read the one for every HTTP client and the other for every connection, and every
    service indexes the same texts, which takes longer than most tests.
    """
    # The questions are kept with their guide, so that no others get their id.
    guides: dict[tuple[str, int], tuple[Guide, tuple[QuestionEntry, ...]]] = {}

    def guide_to(catalogue: Catalogue, questions: tuple[QuestionEntry, ...]) -> Guide:
        key = (catalogue.pin, id(questions))
        if key not in guides:
            guides[key] = Guide(catalogue, questions), questions
        return guides[key][0]

    for_all.setattr("app.settings.parse_questions", cache(parse_questions))
    for_all.setattr("app.services.assistant.Guide", guide_to)
    once = cache(httpcore2.default_ssl_context)
    for_all.setattr(httpcore2, "default_ssl_context", once)
    for_all.setattr(redis.utils, "get_lib_version", cache(redis.utils.get_lib_version))


def nap(delay_s: float) -> Coroutine[Any, Any, None]:
    """Sleep a part of the time."""
    return asyncio.sleep(delay_s / 100)


HASTY = SimpleNamespace(**{**vars(asyncio), "sleep": nap})
"""asyncio for who need not wait."""


@pytest.fixture(autouse=True, scope="session")
def hasty_server(for_all: pytest.MonkeyPatch) -> None:
    """Take the waits out of servers that tests start and stop in their own loop.

    uvicorn waits a tenth of a second before it ends, and as long between two looks at the
    connections that are still open. We wait 2 s for a store that is away, to leave the record of
    what was done there.
    """
    for_all.setattr("uvicorn.server.asyncio", HASTY)
    for_all.setattr("app.services.audit.LEAVE_S", 0.3)


@pytest.fixture(autouse=True, scope="session")
def no_sweeps_beside(for_all: pytest.MonkeyPatch) -> None:
    """Let nothing sweep in the background of a test that counts commands, or looks at all keys."""
    for_all.setattr("app.services.sweeper.LOOK_EVERY_S", 3600.0)


@pytest.fixture(autouse=True, scope="session")
def patient_limits(for_all: pytest.MonkeyPatch) -> None:
    """Let a busy machine be no reason to let more through than a limit says."""
    for_all.setattr("app.store.limits.TAKE_S", 30.0)


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """Give a clock that stands still until it is moved; fake stores go by it."""
    with time_machine.travel(NOON_S, tick=False) as traveller:
        yield traveller


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Run a real Valkey for the whole session."""
    with Valkey.start(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
async def raw(valkey: Valkey) -> AsyncIterator[Redis]:
    """Give an empty real store, and afterwards fail the test that left a key without a lifetime."""
    client = Redis(host=valkey.host, port=valkey.port)
    await client.flushdb()
    yield client
    immortal = [key async for key in client.scan_iter() if await client.pttl(key) == -1]
    await client.aclose()
    assert [key for key in immortal if not key.startswith(b"onboarding:index:")] == []


@pytest.fixture
def settings(raw: Redis, valkey: Valkey) -> Settings:
    """Give settings for the empty real store."""
    return known_settings(redis_url=valkey.url, **QUICKLY, **UNLIMITED)


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[AsyncClient]:
    """Run the service on the empty real store and give a client for it."""
    async with serving(settings) as client:
        yield client


@pytest.fixture
async def serve(settings: Settings) -> AsyncIterator[Callable[..., Any]]:
    """Give a function that runs the service with other settings: `await serve(session_ttl_s=2)`."""
    async with AsyncExitStack() as stack:

        async def start(**overrides: Any) -> AsyncClient:
            changed = known_settings(**{**settings.model_dump(exclude_unset=True), **overrides})
            return await stack.enter_async_context(serving(changed))

        yield start


@pytest.fixture
async def session_id(api: AsyncClient) -> str:
    """Begin a session over HTTP and give its id."""
    response = await api.post(f"{BASE}/session", json={"workspace_id": "w1"})
    assert response.status_code == 201
    return str(response.json()["session_id"])


def fake_gateway(server: FakeServer | None = None, **settings: Any) -> Gateway:
    """Make a gateway to a fake store; `FakeServer.connected = False` is an outage."""
    server = server or FakeServer()
    chosen = known_settings(**settings)
    return Gateway(
        lambda _: PooledLink(FakeAsyncRedis(server=server, legacy_responses=False), send_s=1.5),
        keys=Keys(hash_tag=chosen.hash_tag),
        lifetime_ms=chosen.session_ttl_s * 1000,
        mode="standalone",
        policy=RetryPolicy(base_s=0.01, jitter_s=0.0),
    )


@pytest.fixture(params=["fakeredis", "valkey"])
async def gateway(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Gateway]:
    """Give a gateway, to the fake store and to the real one in turn."""
    gateway = fake_gateway() if request.param == "fakeredis" else connect(settings)
    yield gateway
    await gateway.aclose()


@pytest.fixture
def manager(gateway: Gateway) -> OnboardingSessionManager:
    """Give a manager, on the fake store and on the real one in turn."""
    return make_manager(gateway, known_settings())


@pytest.fixture
def steps_file(tmp_path: Path) -> Callable[[str], Path]:
    """Give a function that writes a catalogue file."""

    def write(text: str) -> Path:
        path = tmp_path / "steps.json"
        path.write_text(text)
        return path

    return write
