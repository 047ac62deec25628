"""One of the controllers leads: whoever holds a lease in Redis. The others watch, and take over when it runs out."""

import asyncio
import logging
import time

from shared.errors import RegistryUnavailable
from shared.registry.registry import Lead, Registry

RENEWALS = 4
"""How often a lease is renewed within its time."""

log = logging.getLogger(__name__)


class Leadership:
    """This controller's part in it.

    Args:
        lease_s: how long a lease lasts without renewal: about as long as a takeover takes.
    """

    def __init__(self, registry: Registry, controller_id: str, lease_s: float) -> None:
        self._registry = registry
        self._id = controller_id
        self._lease_s = lease_s
        self._lead: Lead | None = None
        self._valid_until = 0.0

    @property
    def lead(self) -> Lead | None:
        """The leadership, while we have it. It ends by our own clock, too, when Redis cannot be asked."""
        return self._lead if time.monotonic() < self._valid_until else None

    async def hold_forever(self) -> None:
        """Takes and renews the lease for ever."""
        while True:
            await self.renew()
            await asyncio.sleep(self._lease_s / RENEWALS)

    async def renew(self) -> None:
        asked_at = time.monotonic()
        try:
            lead = await self._registry.lead(self._id, self._lease_s)
        except RegistryUnavailable as error:
            log.warning("the lease cannot be renewed: %s", error)
            return
        if lead is not None and (self._lead is None or lead.term != self._lead.term):
            log.info("leads from now on, term %d", lead.term)
        if lead is None and self._lead is not None:
            log.warning("leads no more")
        self._lead = lead
        self._valid_until = asked_at + self._lease_s

    async def resign(self) -> None:
        """Lets another controller lead at once."""
        lead, self._lead = self._lead, None
        if lead is not None:
            try:
                await self._registry.resign(lead)
            except RegistryUnavailable as error:
                log.warning("the lease will run out by itself: %s", error)
