"""What is done beside a stream for as long as the stream has not failed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.gateway.streams import AttemptFailed, Decoded, Stream
from shared.messages.serving import OutputToken
from tests.harness import eventually

TOKEN = Decoded("d", OutputToken(request_id="r", index=0, token_id=1))


class Work:
    """Waits until it is let go on."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.has_begun = self.was_cancelled = False

    async def do(self) -> str:
        self.has_begun = True
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return "done"


@asynccontextmanager
async def beside(stream: Stream, work: Work) -> AsyncIterator[asyncio.Task[str]]:
    """The work beside the stream, once it has begun; nothing of it is left over."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(stream.unless_failed(work.do()))
    await eventually(lambda: work.has_begun)
    yield task
    await asyncio.wait([task])
    assert asyncio.all_tasks() == before


async def test_its_result_comes_and_all_events_are_left() -> None:
    stream, work = Stream("r"), Work()
    async with beside(stream, work) as task:
        stream.put(TOKEN)
        work.goes_on.set()
        assert await task == "done"
    stream.put(AttemptFailed("mine"))
    assert await stream.token_or_move(1.0) == TOKEN
    with pytest.raises(AttemptFailed, match="mine"):
        await stream.token_or_move(1.0)


async def test_its_own_error_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await Stream("r").unless_failed(fail())


async def test_a_failure_ends_it_and_is_raised() -> None:
    stream, work = Stream("r"), Work()
    async with beside(stream, work) as task:
        stream.put(TOKEN)
        stream.put(AttemptFailed("first"))
        stream.put(AttemptFailed("second"))
        with pytest.raises(AttemptFailed, match="first"):
            await task
        assert work.was_cancelled
    assert await stream.token_or_move(1.0) == TOKEN


async def test_after_a_failure_it_does_not_even_begin() -> None:
    stream, work = Stream("r"), Work()
    stream.put(AttemptFailed("mine"))
    with pytest.raises(AttemptFailed, match="mine"):
        await stream.unless_failed(work.do())
    assert not work.has_begun


async def test_it_is_cancelled_with_whoever_waits_for_it() -> None:
    work = Work()
    async with beside(Stream("r"), work) as task:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert work.was_cancelled
