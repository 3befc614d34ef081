"""The catalogues that sessions began with, kept beside them."""

from app.clock import monotonic_s
from app.onboarding.catalogue import Catalogue, CatalogueError
from app.store.faults import corrupt
from app.store.gateway import Gateway

KEPT_AGAIN_S = 60.0
"""How often the current catalogue is written again, in case the store was emptied meanwhile."""


class CatalogueStore:
    """Gives the catalogue of a session by its pin; the current one without asking the store."""

    def __init__(self, gateway: Gateway, current: Catalogue) -> None:
        self.current = current
        self._gateway = gateway
        self._known = {current.pin: current}
        self._kept_at = -KEPT_AGAIN_S
        self._learnt = False

    async def keep_current(self) -> None:
        """Make sure that the current catalogue is in the store before a session begins with it."""
        if monotonic_s() - self._kept_at < KEPT_AGAIN_S:
            return
        key, pin = self._gateway.keys.catalogues, self.current.pin
        await self._gateway.command("HSETNX", key, pin, self.current.text)
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

    async def learn(self) -> bool:
        """Learn once what other catalogues are in use; say whether there are any."""
        if not self._learnt:
            for pin in await self._gateway.command("HKEYS", self._gateway.keys.catalogues):
                await self.get(pin.decode())
            self._learnt = True
        return len(self._known) > 1

    def is_step(self, step_id: int) -> bool:
        """Say whether any catalogue that is known to be in use has the step."""
        return any(step_id in catalogue for catalogue in self._known.values())
