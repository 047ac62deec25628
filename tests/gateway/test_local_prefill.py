"""Short prompts that a decode instance computes itself, where that has been measured to be quicker."""

import asyncio
import time

import pytest

from services.gateway import attempt as attempt_module
from services.gateway.api import FirstToken
from services.gateway.costs import ENOUGH, LOCAL_AT_MOST, MEASURE_EVERY
from shared.bus.connection import Incoming
from shared.messages.serving import AskReply, DecodeRequest, StepTokens
from shared.sampling import SamplingParams
from tests.gateway.scripted import Fleet, Request, Scripted, expected, fleet, token_of
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]
NO_SLOT = AskReply(accepted=False, reason="no_slot")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode instance has all the time to answer."""
    monkeypatch.setattr(attempt_module, "LOCAL_PATIENCE_S", 30.0)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "LOCAL_PATIENCE_S", 0.1)


def measure(one: Fleet, *, token_s: float = 0.001, handoff_s: float = 0.1) -> None:
    """What the fleet's group has measured so far."""
    for _ in range(ENOUGH):
        one.group.costs.prefilled(100 * token_s, 100)
        one.group.costs.decoded(handoff_s, 0.0)


class Computes(Scripted):
    """A decode instance that found two tokens of what it computes itself in its cache."""

    async def serve(self, request: Request) -> None:
        if isinstance(request, DecodeRequest) and request.lease is None:
            token = token_of(request, request.token_ids).model_copy(update={"num_cached_tokens": 2})
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        await super().serve(request)


async def test_it_stays_at_the_decode_instance(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=Computes)
        measure(one)
        tokens = one.generator.generate(PROMPT, SamplingParams(max_tokens=8), request_id="r", deadline=time.time() + 30)
        first, *others = [token async for token in tokens]
        assert [token.token_id for token in (first, *others)] == expected(PROMPT, 8)
        assert isinstance(first, FirstToken)
        assert (first.num_cached_tokens, first.scenario) == (2, "default")
        assert not any(isinstance(token, FirstToken) for token in others)
        [request] = decode.requests
        assert isinstance(request, DecodeRequest)
        assert (request.lease, request.token_ids) == (None, PROMPT)
        assert prefill.requests == []
        assert await decode.all_cancelled() == []


@pytest.mark.parametrize("why", ["nothing measured", "switched off", "too dear", "too long", "too many rows"])
async def test_it_goes_the_usual_way_where_that_is_not_quicker(nats_url: str, why: str) -> None:
    async with fleet(nats_url, local_prefill="off" if why == "switched off" else "auto") as one:
        prefill = await one.add("p", "prefill", max_model_len=1000)
        decode = await one.add("d", "decode", max_model_len=1000)
        if why != "nothing measured":
            measure(one, token_s=0.1 if why == "too dear" else 0.001)
        prompt = [1] * (LOCAL_AT_MOST + 1) if why == "too long" else PROMPT
        with one.streams.open("a") as stream:
            if why == "too long":
                measure(one, token_s=1e-6)
            if why == "too many rows":
                measure(one, token_s=0.015)
                stream.holders.add("d")
            assert await one.generate(prompt) == expected(prompt, 8)
        assert len(prefill.requests) == 1
        [request] = decode.requests
        assert isinstance(request, DecodeRequest)
        assert request.lease is not None


async def test_a_request_that_has_begun_goes_the_usual_way(nats_url: str) -> None:
    class FailsOnce(Scripted):
        async def serve(self, request: Request) -> None:
            if len(self.requests) > 1:
                return await super().serve(request)
            assert isinstance(request, DecodeRequest)
            await self.decode(request, up_to=3)
            return await self.fail(request)

    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode", kind=FailsOnce)
        measure(one)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert [request.token_ids for request in prefill.requests] == [PROMPT + expected(PROMPT, 3)]


async def test_where_no_decode_instance_has_a_slot_it_goes_the_usual_way(nats_url: str, impatient: None) -> None:
    async with fleet(nats_url, max_attempts=1) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", *[NO_SLOT] * 10_000)
        measure(one)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: prefill.requests)
        decode.answers.clear()
        assert await work == expected(PROMPT, 8)


async def test_where_the_line_for_decode_is_too_long_it_goes_the_usual_way(nats_url: str) -> None:
    async with fleet(nats_url, max_waiting=1) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", *[NO_SLOT] * 10_000)
        waiting = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.group.decode_line.num_waiting == 1)
        measure(one)
        work = asyncio.create_task(one.generate([*PROMPT, 9]))
        await eventually(lambda: len(prefill.requests) == 2)
        decode.answers.clear()
        assert await work == expected([*PROMPT, 9], 8)
        assert await waiting == expected(PROMPT, 8)


async def test_one_that_accepts_too_late_is_told_to_cancel_and_not_heard(nats_url: str, impatient: None) -> None:
    """Its tokens would be taken for those that are due, or fail the attempt."""

    class AcceptsTooLate(Scripted):
        """Takes what is to stay there, and says so too late."""

        async def handle(self, incoming: Incoming) -> None:
            if incoming.subject.endswith(".decode") and incoming.parse(DecodeRequest).lease is None:
                request = incoming.parse(DecodeRequest)
                self.requests.append(request)
                await eventually(lambda: prefill.requests)
                await incoming.respond(AskReply(accepted=True))
                return await self.serve(request)
            return await super().handle(incoming)

    class WaitsForTheLate(Scripted):
        """Prefills once the other has sent all its tokens, and the gateway has seen them."""

        async def serve(self, request: Request) -> None:
            self.task = asyncio.create_task(self.prefill_later(request))

        async def prefill_later(self, request: Request) -> None:
            await eventually(lambda: len(decode.cancelled) > 1)
            await super().serve(request)

    async with fleet(nats_url, max_attempts=1, answer_timeout_s=30.0) as one:
        prefill = await one.add("p", "prefill", kind=WaitsForTheLate)
        decode = await one.add("d", "decode", kind=AcceptsTooLate)
        measure(one)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert len(prefill.requests) == 1
        assert [request.lease is None for request in decode.requests if isinstance(request, DecodeRequest)] == [
            True,
            False,
        ]


async def test_one_in_so_many_goes_the_usual_way_so_that_it_is_measured(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode")
        measure(one)
        for number in range(2 * MEASURE_EVERY):
            assert len(prefill.requests) == number // MEASURE_EVERY
            assert await one.generate([*PROMPT, number], max_tokens=4) == expected([*PROMPT, number], 4)
        assert len(prefill.requests) == one.group.costs.wait_s.number == 2
        assert one.group.costs.handoff_s.number == ENOUGH + 2
        assert len(decode.requests) == 2 * MEASURE_EVERY
