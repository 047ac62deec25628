"""What every service's process does alike: read settings, log, run until asked to end, beat its heart.

This is the start-up edge: known errors become one sentence and exit code 1 here.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from shared import settings as settings_module
from shared.errors import PDServeError, RegistryUnavailable
from shared.messages.records import Record
from shared.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)
AnyRecord = TypeVar("AnyRecord", bound=Record)
log = logging.getLogger(__name__)


class Lifetime:
    """How long a service lives: until SIGTERM or SIGINT, or until it finds that it cannot go on."""

    def __init__(self) -> None:
        self._ending = asyncio.Event()
        self.failed: str | None = None

    @property
    def ending(self) -> bool:
        return self._ending.is_set()

    def end(self) -> None:
        self._ending.set()

    def fail(self, why: str) -> None:
        """Ends the service with exit code 1."""
        self.failed = why
        self.end()

    async def until_ending(self) -> None:
        await self._ending.wait()


def run_service(
    kind: type[AnySettings],
    serve: Callable[[AnySettings, Lifetime], Awaitable[None]],
    *,
    overrides: Mapping[str, object] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Runs `serve` with its settings; exits with 1 and a sentence where it cannot start or go on.

    Args:
        overrides: settings by field name that win over the environment.
        loop_factory: makes the event loop; asyncio's own without.
    """
    try:
        settings = settings_module.load(kind, **(overrides or {}))
        set_up_logging(settings.log_level)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            failed = runner.run(_serve(settings, serve))
    except PDServeError as error:
        sys.exit(str(error))
    except BaseExceptionGroup as group:
        known = _known_error(group)
        if known is None:
            raise
        sys.exit(str(known))
    if failed is not None:
        sys.exit(failed)


async def _serve(settings: AnySettings, serve: Callable[[AnySettings, Lifetime], Awaitable[None]]) -> str | None:
    lifetime = Lifetime()
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, lifetime.end)
    await serve(settings, lifetime)
    return lifetime.failed


def set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel("WARNING")


@asynccontextmanager
async def heartbeats(
    record: Callable[[int], AnyRecord],
    write: Callable[[AnyRecord], Awaitable[None]],
    remove: Callable[[AnyRecord], Awaitable[None]],
    every_s: float,
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Writes `record(n)` now and every `every_s` seconds, and removes it at the end. Yields a way to write at once.

    While the registry is away the service goes on: readers see old heartbeats, and new ones once it is back.
    """
    beats = 0
    writing = asyncio.Lock()  # what is written last is what was true last

    async def beat() -> None:
        nonlocal beats
        async with writing:
            beats += 1
            try:
                await write(record(beats))
            except RegistryUnavailable as error:
                log.warning("a heartbeat was not written: %s", error)

    async def beat_forever() -> None:
        while True:
            await asyncio.sleep(every_s)
            await beat()

    await beat()
    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(beat_forever())
        try:
            yield beat
        finally:
            beating.cancel()
    try:
        await remove(record(beats + 1))
    except RegistryUnavailable as error:
        log.warning("the record could not be removed and will expire: %s", error)


def _known_error(group: BaseExceptionGroup[BaseException]) -> PDServeError | None:
    """The first of our errors that a task group carries."""
    for error in group.exceptions:
        found = _known_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, PDServeError):
            return found
    return None
