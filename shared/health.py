"""`python -m shared.health instance|controller`: whether the service on this host is well; a container's health check.

Exits with 0 if it is, and else with 1 and a sentence. It asks where the service's peers would: the registry for an
instance's record, which lives only as long as its heartbeat, and NATS for the controller. A gateway has /health/ready.
It imports no torch.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from shared import settings as settings_module
from shared.bus import connection, subjects
from shared.errors import PDServeError, PeerUnavailable
from shared.messages.control import Status, StatusRequest
from shared.registry import registry
from shared.settings import Settings, hostname

TIMEOUT_S = 3.0


async def instance_not_well(settings: Settings) -> str | None:
    """Why no instance on this host is well; None if one is, in whichever group and role, or as a spare."""
    host = hostname()
    async with registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=TIMEOUT_S) as records:
        found = [one for one in await records.instances() if one.host == host]
    if not found:
        return f"no instance of {host} is in the registry"
    return None if any(one.state != "draining" for one in found) else f"the instance of {host} is draining"


async def controller_not_well(settings: Settings) -> str | None:
    """Why no controller answers; None if one does, on whichever host: they share their subject."""
    async with connection.connect(settings.nats_url, name="health", timeout_s=TIMEOUT_S) as bus:
        try:
            await bus.request(subjects.STATUS, StatusRequest(), Status, timeout_s=TIMEOUT_S)
        except PeerUnavailable as error:
            return f"no controller answers: {error}"
    return None


CHECKS: dict[str, Callable[[Settings], Awaitable[str | None]]] = {
    "instance": instance_not_well,
    "controller": controller_not_well,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.health", description="Is the service on this host well?")
    parser.add_argument("service", choices=CHECKS)
    check = CHECKS[parser.parse_args().service]
    try:
        sys.exit(asyncio.run(_run(check)))
    except PDServeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


async def _run(check: Callable[[Settings], Awaitable[str | None]]) -> str | None:
    return await check(settings_module.load(Settings))


if __name__ == "__main__":
    main()
