"""The catalogues that sessions began with, kept beside them."""

from app.clock import monotonic_s
from app.errors import CorruptRecordError
from app.onboarding.catalogue import Catalogue, CatalogueError
from app.store.faults import corrupt
from app.store.gateway import Gateway

KEPT_AGAIN_S = 5.0
"""How soon the current catalogue is written again, in case the store was emptied meanwhile."""


class CatalogueStore:
    """Gives the catalogue of a session by its pin; the current one without asking the store."""

    def __init__(self, gateway: Gateway, current: Catalogue) -> None:
        self.current = current
        self._gateway = gateway
        self._known = {current.pin: current}
        self._unreadable: set[str] = set()
        self._kept_at = -KEPT_AGAIN_S

    async def keep_current(self) -> None:
        """Make sure that the current catalogue is in the store before a session begins with it."""
        if monotonic_s() - self._kept_at < KEPT_AGAIN_S:
            return
        key, pin = self._gateway.keys.catalogues, self.current.pin
        await self._gateway.write("HSETNX", key, pin, self.current.text)
        self._kept_at = monotonic_s()

    async def get(self, pin: str) -> Catalogue:
        """Return the catalogue with this pin. Raises `CorruptRecordError` when it is lost."""
        if pin not in self._known:
            key = self._gateway.keys.catalogues
            text = await self._gateway.command("HGET", key, pin)
            try:
                self._known[pin] = Catalogue.parse(text or b"")
            except CatalogueError:
                raise corrupt(f"{key} {pin}", "the session's catalogue") from None
        return self._known[pin]

    async def learn(self) -> None:
        """Learn every catalogue that is in use; one that cannot be read is left out."""
        for field in await self._gateway.command("HKEYS", self._gateway.keys.catalogues):
            pin = field.decode(errors="replace")
            if pin in self._unreadable:
                continue
            try:
                await self.get(pin)
            except CorruptRecordError:
                # Reported once, and an error for the sessions that need it.
                self._unreadable.add(pin)

    @property
    def has_others(self) -> bool:
        """Whether any other catalogue than the current one is known to be in use."""
        return len(self._known) > 1

    def is_step(self, step_id: int) -> bool:
        """Say whether any catalogue that is known to be in use has the step."""
        return step_id in self.current or any(step_id in each for each in self._known.values())
