"""The composition root: which object gets which other."""

from dataclasses import dataclass

import structlog
from typing_extensions import TypedDict

from app.services.access import AccessService, make_access_service
from app.services.assistant import AssistantService, make_assistant
from app.services.audit import AuditTrail
from app.services.background import Repeated
from app.services.events import EventService, StreamLimits
from app.services.files import FileService, make_file_service
from app.services.generation import GenerationService
from app.services.health import HealthMonitor
from app.services.limits import TRANSFERS_OF_ONE, InFlight, Limiter, make_limiter
from app.services.manager import LEARN_EVERY_S, OnboardingSessionManager, make_manager
from app.services.metrics import MetricsService
from app.services.retention import RetentionService, make_retention_service
from app.services.stats import StatsService, make_stats_service
from app.services.tasks import TaskService
from app.services.tokens import TokenService
from app.settings import Settings
from app.store.connect import connect, make_probe, make_subscription
from app.store.gateway import Gateway
from app.store.subscription import Subscription

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers work with, one of each per process."""

    manager: OnboardingSessionManager
    generation: GenerationService
    events: EventService
    files: FileService
    tasks: TaskService
    tokens: TokenService
    retention: RetentionService
    stats: StatsService
    assistant: AssistantService
    audit: AuditTrail
    access: AccessService
    limiter: Limiter
    in_flight: InFlight
    transfers: InFlight
    health: HealthMonitor
    metrics: MetricsService
    learning: Repeated
    gateway: Gateway
    subscription: Subscription

    async def start(self) -> None:
        """See how the store is, and begin what goes on in the background."""
        await self.health.start()
        if self.health.report()["redis"]["connected"]:
            await self.manager.learn_catalogues()
        else:
            # It may come later: the process serves, says that it is down, and heals.
            log.warning("store_missed_at_start")
        self.audit.start()
        await self.access.start()
        self.learning.start()
        self.metrics.start()
        await self.retention.start()

    def stop_soon(self) -> None:
        """Tell balancers and everybody who follows a session that this process is about to end."""
        self.health.stop_soon()
        self.events.stop_soon()
        self.assistant.stop_soon()

    async def aclose(self) -> None:
        """Close what was opened, last opened first."""
        await self.retention.aclose()
        await self.learning.aclose()
        await self.audit.aclose()
        await self.subscription.aclose()
        await self.health.aclose()
        await self.access.aclose()
        await self.assistant.aclose()
        await self.files.aclose()
        await self.metrics.aclose()
        await self.gateway.aclose()


class AppState(TypedDict):
    """What the lifespan hands to every request."""

    services: Services
    settings: Settings


def build_services(settings: Settings) -> Services:
    """Construct the services.

    Raises `EmbeddedStoreError` when there is no store to attach to, and `SettingsError` when what
    the deployer named gives no agents.
    """
    gateway = connect(settings)
    subscription = make_subscription(settings)
    manager = make_manager(gateway, settings)
    files = make_file_service(gateway, manager, settings)
    tasks = TaskService(gateway, settings.task_rules)
    limits = StreamLimits(settings.max_streams, settings.max_streams_per_session)
    events = EventService(gateway, subscription, limits)
    stats = make_stats_service(gateway, settings)
    assistant = make_assistant(gateway, settings)
    in_flight = InFlight(settings.max_in_flight)
    transfers = InFlight(settings.max_in_flight, TRANSFERS_OF_ONE)
    health = HealthMonitor(make_probe(settings), gateway)
    return Services(
        manager=manager,
        generation=GenerationService(gateway, files),
        events=events,
        files=files,
        tasks=tasks,
        tokens=TokenService(gateway, manager),
        retention=make_retention_service(gateway, tasks, settings),
        stats=stats,
        assistant=assistant,
        audit=AuditTrail(gateway),
        access=make_access_service(gateway, settings),
        limiter=make_limiter(gateway, settings),
        in_flight=in_flight,
        transfers=transfers,
        health=health,
        metrics=MetricsService(stats, events, assistant, in_flight, transfers, health),
        learning=Repeated("catalogues", manager.learn_catalogues, LEARN_EVERY_S),
        gateway=gateway,
        subscription=subscription,
    )
