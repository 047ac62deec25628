"""Instances that die, hang, forget requests, or fail them, alone or in pairs: who is lost, avoided, and back again."""

import asyncio
import time

import pytest

from services.gateway import instance_watch
from shared import circuit_breaker
from shared.bus.connection import Incoming
from shared.errors import InstanceFailed
from tests.gateway.scripted import FULL, Fleet, Scripted, Work, expected, fleet
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long for a test; the order of what happens is the same."""
    monkeypatch.setattr(instance_watch, "UNRESPONSIVE_AFTER_S", 0.2)
    monkeypatch.setattr(instance_watch, "PING_LOST_EVERY_S", 0.02)


@pytest.fixture
def avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has failed is avoided for longer than a test lasts."""
    monkeypatch.setattr(circuit_breaker, "BREAKER_FIRST_S", 1e6)
    monkeypatch.setattr(circuit_breaker, "BREAKER_MAX_S", 1e6)


class Holds(Scripted):
    """Decodes three tokens and then nothing; computes prompts."""

    is_stopped = False

    async def handle(self, incoming: Incoming) -> None:
        if not self.is_stopped:
            await super().handle(incoming)

    async def serve(self, work: Work) -> None:
        if work.role == "prefill":
            await super().serve(work)
        else:
            await self.decode(work, up_to=3)


async def streams_at(one: Fleet, decode: Scripted, number: int) -> list[asyncio.Task[list[int]]]:
    """So many requests that the decode instance has begun."""
    work = [asyncio.create_task(one.generate([*PROMPT, n])) for n in range(number)]
    await eventually(lambda: len(decode.requests) == number and one.router.num_open("d1") == number)
    await eventually(lambda: one.router.num_open("p") == 0)
    return work


async def assert_all_go_on(one: Fleet, work: list[asyncio.Task[list[int]]]) -> None:
    await one.add("d2", "decode")
    for number, each in enumerate(await asyncio.gather(*work)):
        assert each == expected([*PROMPT, number], 8)


async def test_a_question_without_responders_moves_all_requests_of_the_instance(nats_url: str) -> None:
    async with fleet(nats_url, max_attempts=1) as one:  # such a loss does not count
        await one.add("p", "prefill")
        decode = await one.add("d1", "decode", kind=Holds)
        work = await streams_at(one, decode, 3)
        await decode.vanish()
        await asyncio.sleep(0)
        assert one.lost == []
        work.append(asyncio.create_task(one.generate([*PROMPT, 3])))
        await eventually(lambda: one.lost == ["d1"])
        assert one.router.num_open("d1") == 0
        await assert_all_go_on(one, work)
        assert one.lost == ["d1"]


async def test_a_ping_without_responders_moves_all_requests_of_the_instance(nats_url: str) -> None:
    async with fleet(nats_url, watching=True, max_attempts=1) as one:
        await one.add("p", "prefill")
        decode = await one.add("d1", "decode", kind=Holds)
        work = await streams_at(one, decode, 3)
        await eventually(lambda: decode.pings)
        await decode.vanish()
        await eventually(lambda: one.lost == ["d1"])
        await assert_all_go_on(one, work)


async def test_an_instance_that_answers_no_ping_is_lost_until_it_answers_again(nats_url: str, quick: None) -> None:
    async with fleet(nats_url, watching=True, max_attempts=1) as one:
        await one.add("p", "prefill")
        decode = await one.add("d1", "decode", kind=Holds)
        assert isinstance(decode, Holds)
        work = await streams_at(one, decode, 3)
        attempts = {each.request_id for each in decode.requests}
        decode.is_stopped = True
        await eventually(lambda: one.lost == ["d1"])
        await assert_all_go_on(one, work)
        assert one.watch.client("d1").is_lost
        decode.is_stopped = False
        await eventually(lambda: one.lost == [])
        one.remove("d2")
        decode.answers = [*FULL]
        again = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: len(decode.requests) > 3)  # it is asked again
        again.cancel()
        await asyncio.wait([again])
        assert attempts.isdisjoint(each.request_id for each in decode.requests[3:])


async def test_instances_without_open_requests_and_those_that_send_tokens_get_no_pings(nats_url: str) -> None:
    async with fleet(nats_url, watching=True) as one:
        await one.add("p", "prefill")
        decode, other = await one.add("d1", "decode", kind=Holds), await one.add("d2", "decode", *FULL)
        work = await streams_at(one, decode, 1)
        one.watch._reconciled_at["d1"] = float("inf")  # so that pings are about signs of life only
        decode.pings.clear()

        async def keep_sending() -> None:
            while True:
                one.router.heard("d1")
                await asyncio.sleep(0)

        sending = asyncio.create_task(keep_sending())
        await asyncio.sleep(5 * instance_watch.PING_EVERY_S)
        assert (decode.pings, other.pings) == ([], [])
        sending.cancel()
        await eventually(lambda: decode.pings)  # as soon as it is silent
        work[0].cancel()
        await asyncio.wait([sending, *work])


async def test_a_request_that_an_instance_does_not_know_any_more_is_attempted_again(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_watch, "RECONCILE_SILENT_S", 0.1)
    monkeypatch.setattr(instance_watch, "RECONCILE_EVERY_S", 0.1)  # both a second, which is long for a test
    async with fleet(nats_url, watching=True, max_attempts=1) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d1", "decode", kind=Holds)
        kept, dropped = await streams_at(one, decode, 2)
        await eventually(lambda: any(len(ping.request_ids) == 2 for ping in decode.pings))
        forgotten = next(each for each in decode.requests if each.token_ids[5] == 1)
        decode.answers = [*FULL]
        decode.unknown.add(forgotten.request_id)
        await eventually(lambda: len(prefill.requests) == 3)
        assert prefill.requests[-1].token_ids == [*PROMPT, 1, *expected([*PROMPT, 1], 3)]
        await one.add("d2", "decode")
        assert await dropped == expected([*PROMPT, 1], 8)
        assert one.lost == []
        assert not kept.done()
        kept.cancel()
        await asyncio.wait([kept])


class Dies(Scripted):
    """Decodes three more tokens and dies."""

    async def serve(self, work: Work) -> None:
        num_tokens = len(work.token_ids) - work.num_prompt_tokens
        await self.decode(work, up_to=num_tokens + 3)
        await self.vanish()


class FailsLater(Scripted):
    """Decodes three more tokens and fails."""

    async def serve(self, work: Work) -> None:
        num_tokens = len(work.token_ids) - work.num_prompt_tokens
        await self.decode(work, up_to=num_tokens + 3)
        await self.fail(work)


@pytest.mark.parametrize(("kind", "max_attempts"), [(Dies, 1), (FailsLater, 2)])
async def test_a_stream_survives_any_number_of_failures_with_tokens_in_between(
    nats_url: str, kind: type[Scripted], max_attempts: int, avoided: None
) -> None:
    async with fleet(nats_url, watching=True, max_attempts=max_attempts) as one:
        prefill = await one.add("p", "prefill")
        failing = [await one.add(f"d{n}", "decode", kind=kind) for n in range(4)]
        work = asyncio.create_task(one.generate(PROMPT, max_tokens=30))
        await eventually(lambda: all(each.requests for each in failing))
        await one.add("good", "decode")
        assert await work == expected(PROMPT, 30)
        assert [len(each.requests) for each in failing] == [1] * 4
        assert len(prefill.requests) == 5


class DiesAtOnce(Scripted):
    async def serve(self, work: Work) -> None:
        await self.vanish()


async def test_a_request_that_takes_instances_down_fails_in_the_end(nats_url: str) -> None:
    """The first crash may be another request's fault."""
    async with fleet(nats_url, watching=True, max_attempts=2) as one:
        prefills = [await one.add(f"p{n}", "prefill", kind=DiesAtOnce) for n in range(4)]
        await one.add("d", "decode")
        with pytest.raises(InstanceFailed, match="2 attempts at this request failed without progress"):
            await one.generate(PROMPT)
        assert sum(len(each.requests) for each in prefills) == 3


class FailsPrefill(Scripted):
    """Fails every prompt at once."""

    async def serve(self, work: Work) -> None:
        await self.fail(work)


async def test_an_instance_that_fails_fast_is_avoided(nats_url: str, avoided: None) -> None:
    async with fleet(nats_url) as one:
        bad = await one.add("p1", "prefill", kind=FailsPrefill)
        await one.add("d", "decode")
        first = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.watch.failures()[0] == {"p1": 1})
        good = await one.add("p2", "prefill")
        assert await first == expected(PROMPT, 8)
        for number in range(20):
            assert await one.generate([number]) == expected([number], 8)
        assert (len(bad.requests), len(good.requests)) == (1, 21)
        assert one.watch.failures() == ({"p1": 1}, {})


async def test_another_instance_is_chosen_than_the_one_that_just_failed(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "BREAKER_FIRST_S", 0.0)  # to see what the request itself remembers
    async with fleet(nats_url) as one:
        bad = await one.add("p1", "prefill", kind=FailsPrefill)
        await one.add("p2", "prefill")
        await one.add("d", "decode")
        others = [one.request(PROMPT) for _ in range(5)]
        for each in others:
            each.start_attempt()
            one.router.join(each, "p2")  # which has much more to do
        for number in range(5):
            assert await one.generate([number]) == expected([number], 8)
            assert len(bad.requests) == number + 1
            one.watch.client("p1").breaker.succeeded()


class FailsOnce(Scripted):
    async def serve(self, work: Work) -> None:
        if len(self.requests) == 1:
            await self.fail(work)
        else:
            await super().serve(work)


async def test_the_only_instance_is_asked_again_after_a_pause(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", kind=FailsOnce)
        await one.add("d", "decode")
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert len(prefill.requests) == 2
        assert one.watch.client("p").breaker.num_failures == 0
        assert one.watch.failures() == ({"p": 1}, {})


class CannotFetchFromP1(Scripted):
    async def serve(self, work: Work) -> None:
        if work.lease.instance_id == "p1":
            await self.fail(work, kv_source_id="p1")
        else:
            await super().serve(work)


def num_from(decode: Scripted, source_id: str) -> int:
    return len([work for work in decode.requests if work.lease.instance_id == source_id])


async def test_a_broken_link_fails_no_request_beside_a_healthy_path(nats_url: str, avoided: None) -> None:
    async with fleet(nats_url) as one:
        await one.add("p1", "prefill")
        half = await one.add("d1", "decode", kind=CannotFetchFromP1)
        first = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.watch.failures() == ({}, {"p1>d1": 1}))
        await one.add("p2", "prefill")
        whole = await one.add("d2", "decode")
        assert await first == expected(PROMPT, 8)
        found = await asyncio.gather(*(one.generate([number]) for number in range(20)))
        assert found == [expected([number], 8) for number in range(20)]
        assert num_from(half, "p1") == 1
        assert one.watch.failures() == ({}, {"p1>d1": 1})
        one.remove("d2")  # what p2 computes may go to d1, and p1 is not asked where nobody could fetch from it
        num_computed = len(one.instances["p1"].requests)
        other = one.request(PROMPT)
        other.start_attempt()
        one.router.join(other, "p2")  # p1 has less to do
        for number in range(5):
            assert await one.generate([number]) == expected([number], 8)
        assert num_from(half, "p2") >= 5
        assert len(one.instances["p1"].requests) == num_computed
        assert whole.requests


class CannotFetchAtFirst(CannotFetchFromP1):
    async def serve(self, work: Work) -> None:
        if len(self.requests) == 1:
            await super().serve(work)
        else:
            await Scripted.serve(self, work)


async def test_a_link_is_tried_again_after_a_pause_and_used_once_it_works(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p1", "prefill")
        decode = await one.add("d1", "decode", kind=CannotFetchAtFirst)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert num_from(decode, "p1") == 3
        assert one.watch.link_allows("p1", "d1", time.monotonic())
        assert one.watch.failures() == ({}, {"p1>d1": 1})


async def test_after_a_failed_link_one_request_at_a_time_tries_it(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        watch = one.watch
        watch.failed("d", "p", time.monotonic())
        later = time.monotonic() + 2 * circuit_breaker.BREAKER_FIRST_S
        assert watch.link_allows("p", "d", later)
        watch.transfer_started("p", "d")
        assert not watch.link_allows("p", "d", later)
        assert not watch.can_send_to_any("p", ["d"], later)
        assert watch.can_send_to_any("p", ["d", "e"], later)
        assert watch.can_send_to_any("q", ["d"], later)
        watch.transferred("p", "d")
        assert watch.can_send_to_any("p", ["d"], later)


async def test_what_is_known_of_instances_that_are_gone_is_dropped(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        watch = one.watch
        for name in ("a", "b", "c"):
            watch.failed(name, None, time.monotonic())
            watch.failed(name, "a", time.monotonic())
            watch._reconciled_at[name] = 1.0
        request = one.request(PROMPT)
        request.start_attempt()
        one.router.join(request, "b")
        watch.keep({"a"})
        assert watch.failures() == ({"a": 1, "b": 1}, {"a>a": 1, "a>b": 1})
        assert set(watch._reconciled_at) == {"a", "b"}


async def test_an_instance_that_was_only_out_of_reach_is_told_to_cancel(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await one.add("d1", "decode")
        request = one.request(PROMPT)
        request.start_attempt()
        one.router.join(request, "d1")
        one.watch.lose("d1", "is gone")
        one.watch.lose("d1", "is gone again")
        await eventually(lambda: decode.cancelled == [request.attempt_id])
        assert one.lost == ["d1"]
        one.watch.found("d1")
        one.watch.found("d1")
        assert one.lost == []


async def test_the_source_of_kv_may_release_the_request_once_decode_has_accepted(nats_url: str) -> None:
    """The first decode token may take longer than two pings: the request does not move for that."""

    class DecodesLater(Scripted):
        async def serve(self, work: Work) -> None:
            self.accepted = work

    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=DecodesLater)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: hasattr(decode, "accepted"))
        accepted: Work = decode.accepted  # type: ignore[attr-defined]
        one.router.drop("p", [accepted.request_id])
        assert set(one.router.participants()) == {"d"}
        await decode.decode(accepted)
        assert await work == expected(PROMPT, 8)
        assert len(prefill.requests) == len(decode.requests) == 1
