"""Short prompts that a decode instance computes itself, where that has been measured to be quicker."""

import asyncio

import pytest

from services.gateway import dispatcher
from services.gateway.local_prefill import MAX_LOCAL_PREFILL_TOKENS, MEASURE_EVERY, MIN_SAMPLES
from shared.bus.connection import Incoming
from shared.messages.serving import StepTokens
from tests.gateway.scripted import ACCEPTED, FULL, Fleet, Scripted, Work, expected, fleet, token_of
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode instance has all the time to answer, however busy the machine is."""
    monkeypatch.setattr(dispatcher, "LOCAL_PREFILL_WAIT_S", 30.0)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "LOCAL_PREFILL_WAIT_S", 0.1)


def measure(one: Fleet, *, token_s: float = 0.001, handoff_s: float = 0.1) -> None:
    """What the fleet's group has measured so far."""
    latencies = one.queues().latencies
    for _ in range(MIN_SAMPLES):
        latencies.observe_prefill(100 * token_s, 100)
        latencies.observe_decode(handoff_s, 0.0)


class Computes(Scripted):
    """A decode instance that found two tokens of what it computes itself in its cache."""

    async def serve(self, work: Work) -> None:
        if work.ask.lease is None:
            token = token_of(work, work.token_ids).model_copy(update={"num_cached_tokens": 2})
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        await super().serve(work)


async def test_a_short_prompt_is_computed_at_the_decode_instance(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=Computes)
        measure(one)
        first, *others = await one.tokens(one.request(PROMPT))
        assert [token.token_id for token in (first, *others)] == expected(PROMPT, 8)
        assert first.num_cached_tokens == 2
        assert not any(token.num_cached_tokens for token in others)
        [work] = decode.requests
        assert (work.ask.lease, work.token_ids) == (None, PROMPT)
        assert prefill.requests == []
        assert await decode.all_cancelled() == []
        assert one.traffic().num_first_tokens == 1


@pytest.mark.parametrize("why", ["nothing measured", "switched off", "too expensive", "too long", "too many rows"])
async def test_it_goes_to_prefill_where_decode_is_not_quicker(nats_url: str, why: str) -> None:
    async with fleet(nats_url, local_prefill="off" if why == "switched off" else "auto") as one:
        prefill = await one.add("p", "prefill", max_model_len=1000)
        decode = await one.add("d", "decode", max_model_len=1000)
        if why != "nothing measured":
            measure(one, token_s=0.1 if why == "too expensive" else 0.001)
        prompt = [1] * (MAX_LOCAL_PREFILL_TOKENS + 1) if why == "too long" else PROMPT
        if why == "too long":
            measure(one, token_s=1e-6)
        if why == "too many rows":
            measure(one, token_s=0.015)
            one.router.join(one.request(PROMPT), "d")
        assert await one.generate(prompt) == expected(prompt, 8)
        assert len(prefill.requests) == 1
        [work] = decode.requests
        assert work.ask.lease is not None


async def test_a_stream_that_has_started_goes_to_prefill(nats_url: str) -> None:
    class FailsOnce(Scripted):
        async def serve(self, work: Work) -> None:
            if len(self.requests) > 1:
                return await super().serve(work)
            await self.decode(work, up_to=3)
            return await self.fail(work)

    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode", kind=FailsOnce)
        measure(one)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert [work.token_ids for work in prefill.requests] == [PROMPT + expected(PROMPT, 3)]


async def test_where_no_decode_instance_has_a_slot_it_goes_to_prefill(nats_url: str, impatient: None) -> None:
    async with fleet(nats_url, max_attempts=1) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", *FULL)
        measure(one)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: prefill.requests)
        decode.answers.clear()
        assert await work == expected(PROMPT, 8)


async def test_where_too_many_wait_for_decode_it_goes_to_prefill(nats_url: str) -> None:
    async with fleet(nats_url, max_waiting=1) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", *FULL)
        waiting = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.queues().decode.num_waiting == 1)
        measure(one)
        work = asyncio.create_task(one.generate([*PROMPT, 9]))
        await eventually(lambda: len(prefill.requests) == 2)
        decode.answers.clear()
        assert await work == expected([*PROMPT, 9], 8)
        assert await waiting == expected(PROMPT, 8)


async def test_a_late_acceptance_is_cancelled_and_its_tokens_are_dropped(nats_url: str, impatient: None) -> None:
    """Its tokens would be taken for those that are expected, or fail the attempt."""

    class AcceptsTooLate(Scripted):
        """Accepts what it is to compute itself only when prefill has it already."""

        async def answer(self, incoming: Incoming, work: Work) -> None:
            if work.ask.lease is not None:
                return await super().answer(incoming, work)
            self.requests.append(work)
            await eventually(lambda: prefill.requests)
            await incoming.respond(ACCEPTED)
            return await self.serve(work)

    class WaitsForTheLate(Scripted):
        """Prefills once the other has sent all its tokens, and the gateway has seen them."""

        async def serve(self, work: Work) -> None:
            self.task = asyncio.create_task(self.prefill_later(work))

        async def prefill_later(self, work: Work) -> None:
            await eventually(lambda: len(decode.cancelled) > 1)
            await super().serve(work)

    async with fleet(nats_url, max_attempts=1, answer_timeout_s=30.0) as one:
        prefill = await one.add("p", "prefill", kind=WaitsForTheLate)
        decode = await one.add("d", "decode", kind=AcceptsTooLate)
        measure(one)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert len(prefill.requests) == 1
        assert [work.ask.lease is None for work in decode.requests] == [True, False]


async def test_some_go_to_prefill_so_that_it_is_measured(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode")
        measure(one)
        for number in range(2 * MEASURE_EVERY):
            assert len(prefill.requests) == number // MEASURE_EVERY
            assert await one.generate([*PROMPT, number], max_tokens=4) == expected([*PROMPT, number], 4)
        latencies = one.queues().latencies
        assert len(prefill.requests) == latencies.wait_s.num_samples == 2
        assert latencies.handoff_s.num_samples == MIN_SAMPLES + 2
        assert len(decode.requests) == 2 * MEASURE_EVERY
