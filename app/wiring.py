"""The composition root: which object gets which other."""

from dataclasses import dataclass

from typing_extensions import TypedDict

from app.services.health import HealthMonitor
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings
from app.store.connect import connect, make_probe
from app.store.gateway import Gateway


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers work with, one of each per process."""

    manager: OnboardingSessionManager
    health: HealthMonitor
    gateway: Gateway

    async def aclose(self) -> None:
        """Close what was opened, last opened first."""
        await self.health.aclose()
        await self.gateway.aclose()


class AppState(TypedDict):
    """What the lifespan hands to every request."""

    services: Services
    settings: Settings


def build_services(settings: Settings) -> Services:
    """Construct the services; nothing connects yet. Raises `EmbeddedStoreError`."""
    gateway = connect(settings)
    return Services(
        manager=make_manager(gateway, settings),
        health=HealthMonitor(make_probe(settings), gateway),
        gateway=gateway,
    )
