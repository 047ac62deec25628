"""`pdserve flip`, `drain`, `control`, `upgrade`: an operator's wish, and what became of it."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from pdserve.status import find_nats
from shared import settings
from shared.addresses import shown
from shared.bus import connection, subjects
from shared.bus.connection import Bus
from shared.errors import BusUnavailable, PDServeError, PeerUnavailable
from shared.messages.control import AdminAnswer, AdminRequest, Status, StatusRequest

CONNECT_TIMEOUT_S = 3.0
LOOK_EVERY_S, LOOK_AGAIN_S = 2.0, 0.2
TAKEOVER_S = 10.0
"""How long nobody may lead."""
TIMEOUT_S = 900.0
"""An instance that changes its role ends what it holds first."""


class WishRefused(PDServeError):
    """The controller says no, and why."""


def wish(verb: str, values: Mapping[str, object], nats_url: str | None, key: str | None, folder: Path) -> int:
    """Asks the leading controller, prints its answer.

    Raises:
        WishRefused: it does not grant it.
        BusUnavailable: nobody leads.
    """
    request = AdminRequest.model_validate({"key": key or settings.given("admin_key") or "", **values})
    answer = asyncio.run(ask_admin(nats_url or find_nats(folder), verb, request))
    if not answer.ok:
        raise WishRefused(answer.message)
    print(answer.message)
    return 0


async def ask_admin(nats_url: str, verb: str, request: AdminRequest) -> AdminAnswer:
    """The leading controller's answer. Raises `BusUnavailable` where nobody leads."""
    async with connection.connect(nats_url, name=f"pdserve-{verb}", timeout_s=CONNECT_TIMEOUT_S) as bus:
        asking = asyncio.ensure_future(bus.request(subjects.admin(verb), request, AdminAnswer, timeout_s=TIMEOUT_S))
        asked = None
        try:
            while not asking.done():
                # Controllers that do not lead are silent: while we wait, the one that has heard us has to lead.
                leader = await _leader(bus, nats_url)
                asked = asked or leader
                if leader != asked:
                    raise BusUnavailable("another controller leads by now: see `pdserve status`, and ask again")
                await asyncio.wait([asking], timeout=LOOK_EVERY_S)
            return asking.result()
        except PeerUnavailable as error:
            raise BusUnavailable(f"no controller leads at {shown(nats_url)}: is one running?") from error
        finally:
            asking.cancel()


async def _leader(bus: Bus, nats_url: str) -> str:
    """Who leads. Raises `BusUnavailable` where nobody does for a while."""
    end = time.monotonic() + TAKEOVER_S
    while True:
        status = await bus.request(subjects.STATUS, StatusRequest(), Status, timeout_s=CONNECT_TIMEOUT_S)
        if status.leader is not None:
            return status.leader
        if time.monotonic() > end:
            raise BusUnavailable(f"no controller leads at {shown(nats_url)}: can they reach Redis?")
        await asyncio.sleep(LOOK_AGAIN_S)
