"""A request and its output: which tokens count, what ends a phase, how failures are counted, what the reader gets."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.gateway import request as request_module
from services.gateway.request import DecodeStarted, Finished, Request, TokenOutput
from services.gateway.retries import RETRY_PAUSE_MAX_S, RETRY_PAUSE_S, AttemptFailed, Failures
from shared.errors import DeadlineExceeded, InternalError, SlowClient
from shared.messages.serving import OutputToken, Prefilled
from shared.sampling import FinishReason, SamplingParams
from tests.harness import eventually


def made(timeout_s: float = 30.0, output: TokenOutput | None = None) -> Request:
    request = Request("r", [3, 1], SamplingParams(max_tokens=8), time.monotonic() + timeout_s, output or TokenOutput())
    request.start_attempt()
    return request


def token(index: int, finish_reason: FinishReason | None = None) -> OutputToken:
    return OutputToken(request_id="r.0", index=index, token_id=10 + index, finish_reason=finish_reason)


class Work:
    """Waits until `goes_on` is set."""

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
async def beside(request: Request, work: Work) -> AsyncIterator[asyncio.Task[str]]:
    """The work beside the request, once it has begun; nothing of it is left over."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(request.unless_failed(asyncio.ensure_future(work.do())))
    await eventually(lambda: work.has_begun)
    yield task
    await asyncio.wait([task])
    assert asyncio.all_tasks() == before


async def test_work_gives_its_result_and_takes_no_event() -> None:
    request, work = made(), Work()
    async with beside(request, work) as task:
        request.push_event(Finished("d"))
        work.goes_on.set()
        assert await task == "done"
    request.push_event(AttemptFailed("mine"))
    assert await request.next_event(1.0) == Finished("d")
    with pytest.raises(AttemptFailed, match="mine"):
        await request.next_event(1.0)


async def test_an_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await made().unless_failed(asyncio.ensure_future(fail()))


async def test_a_failure_cancels_the_work_and_is_raised() -> None:
    request, work = made(), Work()
    async with beside(request, work) as task:
        request.push_event(Finished("d"))
        request.push_event(AttemptFailed("first"))
        request.push_event(AttemptFailed("second"))
        with pytest.raises(AttemptFailed, match="first"):
            await task
        assert work.was_cancelled
    assert await request.next_event(1.0) == Finished("d")


async def test_after_a_failure_the_work_does_not_begin() -> None:
    request, work = made(), Work()
    request.push_event(AttemptFailed("mine"))
    with pytest.raises(AttemptFailed, match="mine"):
        await request.unless_failed(asyncio.ensure_future(work.do()))
    assert not work.has_begun


async def test_the_work_is_cancelled_with_its_waiter() -> None:
    work = Work()
    async with beside(made(), work) as task:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert work.was_cancelled


async def test_an_instance_that_sends_nothing_fails_the_attempt() -> None:
    request = made()
    request.participants.add("d")
    with pytest.raises(AttemptFailed, match=r"d sent nothing for 0\.05 s") as caught:
        await request.next_event(max_silence_s=0.05)
    assert caught.value.instance_id == "d"


async def test_silence_of_two_instances_is_blamed_on_neither() -> None:
    request = made()
    request.participants |= {"p", "d"}
    with pytest.raises(AttemptFailed, match="d and p sent nothing") as caught:
        await request.next_event(max_silence_s=0.05)
    assert caught.value.instance_id is None


async def test_tokens_end_the_silence() -> None:
    """The wait for the end goes on for as long as tokens come, with no event in between."""
    request = made()
    waiting = asyncio.create_task(request.next_event(max_silence_s=0.05))
    await asyncio.sleep(0)
    before = request.last_event_at
    request.push_token("d", token(0))
    assert request.last_event_at > before
    request.last_event_at += 30.0  # as if this token had come so much later
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.2)
    request.push_token("d", token(1, "length"))
    assert await waiting == Finished("d")


async def test_the_deadline_ends_the_wait() -> None:
    with pytest.raises(DeadlineExceeded):
        await made(timeout_s=0.05).next_event(max_silence_s=30.0)


async def test_events_that_came_before_the_deadline_are_given_after_it() -> None:
    request = made(timeout_s=-1.0)
    request.push_event(Finished("d"))
    assert await request.next_event(1.0) == Finished("d")


async def test_each_token_is_taken_once_and_a_gap_fails_the_attempt() -> None:
    request = made()
    for index in (0, 1, 0, 1, 2):
        request.push_token("d", token(index))
    assert request.token_ids == [3, 1, 10, 11, 12]
    request.push_token("d", token(4))
    with pytest.raises(AttemptFailed, match="expected token 3 but received 4") as caught:
        await request.next_event(1.0)
    assert caught.value.instance_id == "d"
    assert [each.index for _, each in await request.output.read()] == [0, 1, 2]


async def test_the_end_of_prefill_with_another_token_than_the_next_fails_the_attempt() -> None:
    request = made()
    request.push_prefilled(Prefilled(instance_id="p", token=token(1), lease=None))
    with pytest.raises(AttemptFailed, match="expected token 0 at the end of prefill but received 1"):
        await request.next_event(1.0)
    assert not request.has_started


async def test_decode_starts_with_the_first_token_that_is_not_from_the_source() -> None:
    request = made()
    request.expect_decode("d1")
    request.push_token("d1", token(0))
    request.push_token("d2", token(1))
    request.push_token("d2", token(2, "stop"))
    assert await request.next_event(1.0) == DecodeStarted("d2", 1)
    assert await request.next_event(1.0) == Finished("d2")
    assert request.is_complete


async def test_a_new_attempt_drops_the_events_of_the_last_one() -> None:
    request = made()
    request.push_event(AttemptFailed("old"))
    request.start_attempt()
    assert request.attempt_id == "r.1"
    request.push_event(Finished("d"))
    assert await request.next_event(1.0) == Finished("d")


def test_failures_count_until_there_is_progress() -> None:
    failures = Failures()
    failure = AttemptFailed("mine", instance_id="d1")
    assert [failures.count(failure, 5) for _ in range(2)] == [1, 2]
    assert failures.instances == {"d1"}
    assert failures.count(failure, 6) == 3  # each attempt's prefill generates a token
    assert failures.count(AttemptFailed("mine", instance_id="d2"), 8) == 1
    assert failures.instances == {"d2"}


def test_a_failure_that_others_may_have_caused_counts_from_the_second_time_on() -> None:
    failures = Failures()
    shared = AttemptFailed("crash", instance_id="d", in_failed_step=True)
    assert [failures.count(shared, 5) for _ in range(3)] == [0, 1, 2]
    assert [failures.count(shared, 9) for _ in range(2)] == [0, 1]


def test_a_failure_that_does_not_count_is_remembered_by_its_instance_only() -> None:
    failures = Failures()
    assert failures.count(AttemptFailed("preempted", instance_id="d", counts=False), 5) == 0
    assert failures.instances == {"d"}


def test_the_first_retry_follows_at_once_and_further_ones_after_longer_and_longer_pauses() -> None:
    failures = Failures()
    pauses = []
    for _ in range(40):
        failures.count(AttemptFailed("mine", instance_id="d"), 5)
        pauses.append(failures.pause_s)
    assert pauses[:4] == [0.0, RETRY_PAUSE_S, 2 * RETRY_PAUSE_S, 4 * RETRY_PAUSE_S]
    assert pauses[-1] == RETRY_PAUSE_MAX_S


async def test_a_reader_gets_everything_that_arrived() -> None:
    output = TokenOutput()
    first, second = made(output=output), made(output=output)
    reading = asyncio.create_task(output.read())
    await asyncio.sleep(0)
    first.push_token("d", token(0))
    second.push_token("d", token(0))
    first.push_token("d", token(1))
    assert [(request is first, each.index) for request, each in await reading] == [(True, 0), (False, 0), (True, 1)]


async def test_an_error_comes_after_the_tokens_before_it_and_nothing_follows_it() -> None:
    request = made()
    request.push_token("d", token(0))
    request.output.fail(InternalError("first"))
    request.output.fail(InternalError("second"))
    request.push_token("d", token(1))
    assert [each.index for _, each in await request.output.read()] == [0]
    for _ in range(2):
        with pytest.raises(InternalError, match="first"):
            await request.output.read()


async def test_an_error_wakes_the_reader() -> None:
    output = TokenOutput()
    reading = asyncio.create_task(output.read())
    await asyncio.sleep(0)
    output.fail(InternalError("mine"))
    with pytest.raises(InternalError, match="mine"):
        await reading


async def test_a_reader_that_is_too_far_behind_loses_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "MAX_UNREAD_TOKENS", 3)
    request = made()
    for index in range(3):
        request.push_token("d", token(index))
    assert len(await request.output.read()) == 3  # as many as that may be unread
    for index in range(3, 8):
        request.push_token("d", token(index))
    assert [each.index for _, each in await request.output.read()] == [3, 4, 5]
    request.push_token("d", token(8))
    with pytest.raises(SlowClient, match="3 tokens unread"):
        await request.output.read()
