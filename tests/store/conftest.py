"""What the tests of the store share: a proxy before the real store, managers with any settings."""

import datetime as dt
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

import pytest
import structlog
import time_machine
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fakeredis import FakeServer
from redis.asyncio import Redis

from app.services.manager import OnboardingSessionManager, make_manager
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey
from tests.store.sessions import Place, working_at


class MakePlace(Protocol):
    """Make a manager on the same store as the others, with settings of its own."""

    def __call__(self, **overrides: Any) -> Place: ...


@pytest.fixture
async def proxy(raw: Redis, valkey: Valkey) -> AsyncIterator[Proxy]:
    """Stand before the empty real store."""
    async with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def wired(proxy: Proxy) -> AsyncIterator[Place]:
    """Give a manager whose every command passes the proxy."""
    async with working_at(f"redis://{proxy.host}:{proxy.port}/0", redis_timeout_s=0.25) as place:
        yield place


@pytest.fixture
def place(manager: OnboardingSessionManager, gateway: Gateway) -> Place:
    """Give a place on the fake store and on the real one in turn."""
    return Place(manager, gateway)


@pytest.fixture
async def real(raw: Redis, valkey: Valkey) -> AsyncIterator[MakePlace]:
    """Make managers on the empty real store."""
    places: list[Place] = []

    def make(**overrides: Any) -> Place:
        settings = known_settings(redis_url=valkey.url, **{**QUICKLY, **overrides})
        gateway = connect(settings)
        places.append(Place(make_manager(gateway, settings), gateway))
        return places[-1]

    yield make
    for place in places:
        await place.gateway.aclose()


@pytest.fixture
async def fake(clock: time_machine.Traveller) -> AsyncIterator[MakePlace]:
    """Make managers on one fake store that goes by `clock`."""
    server = FakeServer()
    places: list[Place] = []

    def make(**overrides: Any) -> Place:
        gateway = fake_gateway(server, **overrides)
        places.append(Place(make_manager(gateway, known_settings(**overrides)), gateway))
        return places[-1]

    yield make
    for place in places:
        await place.gateway.aclose()


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    for module in ("app.store.faults", "app.store.gateway", "app.store.subscription"):
        monkeypatch.setattr(f"{module}.log", structlog.get_logger())


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that signs itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address(HOST))]
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path
