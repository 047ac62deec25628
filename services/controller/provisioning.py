"""Instances from elsewhere: asked for where spares are short, given back where they have long been idle.

Who starts them is behind `Provisioner`: `pdserve up` does it with processes of its own (`pdserve/provisioning.py`).
With containers nobody listens: a fixed number of spares waits there, and ends up as spares again.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import PeerUnavailable
from shared.messages.control import Provision, Provisioned
from shared.messages.records import InstanceRecord

ASK_EVERY_S = 5.0
"""Instances take seconds to start: what was asked for is waited for."""
STARTING_S = 300.0
"""How long an instance that was asked for may take until it shows itself."""
IDLE_S = 60.0
"""How long a spare that was started on demand stays without a place."""
TIMEOUT_S = 2.0


class Provisioner(Protocol):
    """Starts and ends instances somewhere."""

    async def start(self, number: int) -> int:
        """Starts so many spares, or as many as can be; how many are on their way."""

    async def end(self, processes: list[tuple[str, int]]) -> None:
        """Ends spares by host and process id; those that it does not know are no error."""


class BusProvisioner:
    """Asks whoever listens on the bus; where nobody does, nothing can be started."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def start(self, number: int) -> int:
        return await self._ask(Provision(start=number))

    async def end(self, processes: list[tuple[str, int]]) -> None:
        await self._ask(Provision(end=processes))

    async def _ask(self, wish: Provision) -> int:
        try:
            answer = await self._bus.request(subjects.PROVISION, wish, Provisioned, timeout_s=TIMEOUT_S)
        except PeerUnavailable:
            return 0
        return answer.started


@dataclass(slots=True)
class Provisioning:
    """What has been asked for, and who has been idle since when (monotonic seconds)."""

    provisioner: Provisioner
    _asked_at: float = float("-inf")
    _starting: deque[float] = field(default_factory=deque)
    """When (monotonic) each was asked for that has not shown itself yet."""
    _num_known: int = 0
    _idle_since: dict[str, float] = field(default_factory=dict)

    async def follow(self, num_lacking: int, spares: list[InstanceRecord], now: float) -> int:
        """Asks for what is lacking beyond the spares, and gives idle ones back; how many were started."""
        self._idle_since = {one.id: self._idle_since.get(one.id, now) for one in spares if one.on_demand}
        num_new = sum(one.on_demand and one.epoch == 0 for one in spares) - self._num_known
        self._num_known = sum(one.on_demand and one.epoch == 0 for one in spares)
        while self._starting and (num_new > 0 or self._starting[0] < now - STARTING_S):
            self._starting.popleft()
            num_new -= 1
        if num_lacking <= len(spares):
            idle = [one for one in spares if now - self._idle_since.get(one.id, now) > IDLE_S]
            if idle and num_lacking == 0:
                await self.provisioner.end([(one.host, one.pid) for one in idle])
            return 0
        number = num_lacking - len(spares) - len(self._starting)
        if number <= 0 or now - self._asked_at < ASK_EVERY_S:
            return 0
        self._asked_at = now
        started = await self.provisioner.start(number)
        self._starting.extend([now] * started)
        return started
