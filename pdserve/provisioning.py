"""`pdserve up` as the one that starts and ends instances when the leading controller asks."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.errors import PDServeError, RequestError
from shared.messages.control import Provision, Provisioned

CONNECT_TIMEOUT_S = 10.0
CLOSE_POLL_S = 0.1

log = logging.getLogger(__name__)


class Wanted:
    """What controllers ask for, heard in a thread of its own and carried out by the launcher.

    Args:
        room: how many instances more may be started now; asked in that thread.
    """

    def __init__(self, nats_url: str, room: Callable[[], int]) -> None:
        self._nats_url = nats_url
        self._room = room
        self._wishes: queue.SimpleQueue[Provision] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="provisioning", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hears no more, before the bus goes."""
        self._closed.set()
        self._thread.join(CONNECT_TIMEOUT_S)

    def next(self) -> Provision | None:
        """The next wish to carry out, if there is one."""
        try:
            return self._wishes.get_nowait()
        except queue.Empty:
            return None

    def _run(self) -> None:
        try:
            asyncio.run(self._listen())
        except PDServeError as error:
            log.warning("instances are not started on demand: %s", error)

    async def _listen(self) -> None:
        async with connection.connect(self._nats_url, name="pdserve-up", timeout_s=CONNECT_TIMEOUT_S) as bus:
            await bus.subscribe(subjects.PROVISION, self._on_wish)
            await self._until_closed()

    async def _until_closed(self) -> None:
        while not self._closed.is_set():  # set by another thread  # noqa: ASYNC110
            await asyncio.sleep(CLOSE_POLL_S)

    async def _on_wish(self, incoming: Incoming) -> None:
        try:
            wish = incoming.parse(Provision)
        except RequestError:
            return
        room = max(0, self._room() - self._wishes.qsize())
        started = min(wish.start, room)
        if started or wish.end:
            self._wishes.put(Provision(start=started, end=wish.end))
        if incoming.reply_to:
            await incoming.respond(Provisioned(started=started, capacity=room - started))
