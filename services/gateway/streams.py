"""What instances tell this gateway, sorted by request. Everything a request waits for arrives in its `Stream`."""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import DeadlineExceeded, PDServeError
from shared.messages.serving import Cancel, Failed, Moved, OutputToken, Prefilled, StepTokens

T = TypeVar("T")

log = logging.getLogger(__name__)


class AttemptFailed(PDServeError):
    """An instance failed a request, which another may take over. `counts`: it speaks against trying for ever."""

    def __init__(self, message: str, *, counts: bool = True) -> None:
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True, slots=True)
class Decoded:
    """A token, and who generated it."""

    instance_id: str
    token: OutputToken


Event = Prefilled | Decoded | Moved


class Stream:
    """The events of one attempt at a request, in order."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.holders: set[str] = set()
        """Instances that hold something of the request, or may: they are heard, missed if lost, told to cancel."""
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """The first failure among the events, as soon as it has come."""

    def put(self, event: Event | Exception) -> None:
        self._events.put_nowait(event)
        if isinstance(event, Exception) and not self._failure.done():
            self._failure.set_result(event)

    async def unless_failed(self, work: Coroutine[None, None, T]) -> T:
        """What `work` gives. A failure that comes before its end is raised, and ends it. No event is taken."""
        task = asyncio.create_task(work)
        either: set[asyncio.Future[Any]] = {task, self._failure}
        try:
            if not self._failure.done():
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._failure.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def prefilled(self, timeout_s: float) -> Prefilled:
        """The end of prefill. Raises `AttemptFailed` or a `RequestError` instead where there is none."""
        event = await self._next(timeout_s)
        if not isinstance(event, Prefilled):
            raise AttemptFailed("a token of decode came where the end of prefill was due")
        return event

    async def token_or_move(self, timeout_s: float) -> Decoded | Moved:
        """The next token of decode, or where to go on. Raises likewise."""
        event = await self._next(timeout_s)
        if isinstance(event, Prefilled):
            raise AttemptFailed("the end of prefill came where a token of decode was due")
        return event

    async def _next(self, timeout_s: float) -> Event:
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._events.get()
        except TimeoutError as error:
            raise AttemptFailed(f"{', '.join(self.holders)} said nothing for {timeout_s} s") from error
        if isinstance(event, Exception):
            raise event
        return event


class Streams:
    """All open streams of this gateway, and the subscription that feeds them."""

    def __init__(self, bus: Bus, gateway_id: str) -> None:
        self._bus = bus
        self.gateway_id = gateway_id
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @contextmanager
    def open(self, request_id: str) -> Iterator[Stream]:
        stream = Stream(request_id)
        self._streams[request_id] = stream
        try:
            yield stream
        finally:
            del self._streams[request_id]

    def num_open(self) -> Counter[str]:
        """Open streams by the id of each instance that holds something of them."""
        return Counter(holder for stream in self._streams.values() for holder in stream.holders)

    async def on_message(self, verb: str, incoming: Incoming) -> None:
        """One event from an instance. Whoever still works for a request that is over is told to cancel it."""
        if verb == "tokens":
            step = incoming.parse(StepTokens)
            strangers = [
                token.request_id
                for token in step.tokens
                if not self._give(step.instance_id, token.request_id, Decoded(step.instance_id, token))
            ]
            await self._cancel(step.instance_id, strangers)
        elif verb == "prefilled":
            prefilled = incoming.parse(Prefilled)
            request_id = prefilled.token.request_id
            if not self._give(prefilled.instance_id, request_id, prefilled) and prefilled.lease is not None:
                await self._cancel(prefilled.instance_id, [request_id])
        elif verb == "moved":
            moved = incoming.parse(Moved)
            if not self._give(moved.instance_id, moved.request_id, moved):
                await self._cancel(moved.instance_id, [moved.request_id])
        elif verb == "failed":
            failed = incoming.parse(Failed)
            self._give(failed.instance_id, failed.request_id, _as_exception(failed))

    def lose(self, instance_id: str) -> None:
        """Fails every attempt of which the instance holds something."""
        for stream in self._streams.values():
            if instance_id in stream.holders:
                stream.put(AttemptFailed(f"{instance_id} is lost"))

    def bus_came_back(self) -> None:
        """Fails every attempt: events may be lost, and what an attempt has so far is enough to go on from."""
        for stream in self._streams.values():
            if stream.holders:
                stream.put(AttemptFailed("the connection to the bus was lost for a while", counts=False))

    def _give(self, instance_id: str, request_id: str, event: Event | Exception) -> bool:
        """Whether the stream is open and the instance one that may speak to it: what others say came too late."""
        stream = self._streams.get(request_id)
        if stream is None or instance_id not in stream.holders:
            return False
        stream.put(event)
        return True

    async def _cancel(self, instance_id: str, request_ids: list[str]) -> None:
        if request_ids:
            await self._bus.publish(subjects.instance(instance_id, "cancel"), Cancel(request_ids=request_ids))


def _as_exception(failed: Failed) -> Exception:
    if failed.error.code == DeadlineExceeded.code:
        return DeadlineExceeded(failed.error.message)
    return AttemptFailed(f"{failed.instance_id}: {failed.error.message}", counts=failed.counts)
