"""What instances send reaches the requests in which they participate, and no others."""

import asyncio
import logging

import pytest
from pydantic import BaseModel

from services.gateway.request import Finished, Request
from services.gateway.retries import AttemptFailed
from shared.bus import subjects
from shared.errors import DeadlineExceeded
from shared.messages.serving import Failed, KVLease, Moved, OutputToken, Ping, Pong, Prefilled, StepTokens
from tests.gateway.scripted import Fleet, Scripted, fleet
from tests.harness import eventually

PROMPT = [3, 1]


async def accepted(one: Fleet, *names: str) -> Request:
    """An open request which instances have accepted."""
    request = one.request(PROMPT)
    request.start_attempt()
    one.router.open(request)
    for name in names:
        one.router.join(request, name)
    request.asked.clear()
    return request


async def decodes(one: Fleet, name: str = "d") -> Scripted:
    return await one.add(name, "decode")


def step(name: str, *tokens: tuple[Request, int]) -> StepTokens:
    made = [OutputToken(request_id=request.attempt_id, index=index, token_id=7) for request, index in tokens]
    return StepTokens(instance_id=name, tokens=made)


async def handled(one: Fleet) -> None:
    """Returns when the gateway has handled what was sent to it before."""
    await one.bus.request(subjects.gateway("g", "ping"), Ping(sender_id="d"), Pong, timeout_s=30.0)


async def test_each_token_of_a_step_reaches_its_request(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await decodes(one)
        first, second = [await accepted(one, "d") for _ in range(2)]
        await decode.tell("tokens", step("d", (second, 0), (first, 0), (first, 1)))
        await handled(one)
        assert (first.num_output_tokens, second.num_output_tokens) == (2, 1)
        assert await decode.all_cancelled() == []


async def test_an_instance_that_does_not_participate_is_not_heard_and_told_to_cancel(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        other = await decodes(one, "other")
        request = await accepted(one, "d")
        await other.tell("tokens", step("other", (request, 0)))
        token = OutputToken(request_id=request.attempt_id, index=0, token_id=7)
        values = {"lease_id": "l", "host": "h", "port": 1, "num_tokens": 2, "num_bytes": 1, "expires_in_s": 60.0}
        lease = KVLease.model_validate({"instance_id": "other", **values})
        await other.tell("prefilled", Prefilled(instance_id="other", token=token, lease=lease))
        await other.tell("moved", Moved(instance_id="other", request_id=request.attempt_id, lease=lease))
        error = DeadlineExceeded("forged").body
        await other.tell("failed", Failed(instance_id="other", request_id=request.attempt_id, error=error))
        await handled(one)
        assert await other.all_cancelled() == [request.attempt_id] * 3
        assert not request.has_started
        with pytest.raises(AttemptFailed, match="sent nothing"):  # and no other event has come
            await request.next_event(max_silence_s=0.0)


async def test_the_last_token_ends_the_participation(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await decodes(one)
        request = await accepted(one, "d")
        token = OutputToken(request_id=request.attempt_id, index=0, token_id=7, finish_reason="stop")
        await decode.tell("tokens", StepTokens(instance_id="d", tokens=[token]))
        assert await request.next_event(30.0) == Finished("d")
        assert request.participants == set()
        await one.router.close(request)
        assert await decode.all_cancelled() == []
        assert list(one.router.participants()) == []


async def test_a_failure_says_what_the_instance_said(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await decodes(one)
        request = await accepted(one, "p", "d")
        values = {"kv_source_id": "p", "counts": False, "in_failed_step": True}
        error = {"code": "instance_failed", "message": "scripted"}
        failed = {"instance_id": "d", "request_id": request.attempt_id, "error": error, **values}
        await decode.tell("failed", Failed.model_validate(failed))
        with pytest.raises(AttemptFailed, match="d: scripted") as caught:
            await request.next_event(30.0)
        failure = caught.value
        assert {name: getattr(failure, name) for name in values} == values
        assert failure.instance_id == "d"
        assert request.participants == {"p"}


async def test_a_deadline_that_passed_at_an_instance_ends_the_request(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await decodes(one)
        request = await accepted(one, "d")
        error = DeadlineExceeded("late").body
        await decode.tell("failed", Failed(instance_id="d", request_id=request.attempt_id, error=error))
        with pytest.raises(DeadlineExceeded, match="late"):
            await request.next_event(30.0)


async def test_the_end_of_an_attempt_cancels_it_wherever_it_uses_anything(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        instances = [await decodes(one, name) for name in ("a", "b", "c")]
        request = await accepted(one, "a", "b")
        await one.router.close(request)
        assert [await each.all_cancelled() for each in instances] == [[request.attempt_id]] * 2 + [[]]
        assert len(one.router) == one.router.num_open("a") == 0


async def test_a_loss_fails_what_the_instance_accepted_and_nothing_that_it_was_only_asked(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        serving, asked, other = [await accepted(one, *names) for names in ("d", "", "e")]
        one.router.join(asked, "d")
        assert set(one.router.lose("d", "is gone")) == {serving.attempt_id, asked.attempt_id}
        with pytest.raises(AttemptFailed, match="d is gone") as caught:
            await serving.next_event(30.0)
        assert caught.value.in_failed_step
        assert (serving.participants, asked.participants, other.participants) == (set(), set(), {"e"})
        for request in (asked, other):
            request.push_event(Finished("e"))
            assert await request.next_event(30.0) == Finished("e")


async def test_an_instance_that_is_asked_for_its_own_kv_stays_the_source(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        request = await accepted(one, "d")
        one.router.join(request, "d")
        assert request.asked == set()
        one.router.lose("d", "is gone")
        with pytest.raises(AttemptFailed, match="d is gone"):
            await request.next_event(30.0)


async def test_an_attempt_is_dropped_only_by_a_participant(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        request = await accepted(one, "d")
        one.router.drop("other", [request.attempt_id])
        one.router.drop("d", ["unknown.0"])
        request.push_event(Finished("d"))
        one.router.drop("d", [request.attempt_id])
        assert await request.next_event(30.0) == Finished("d")
        with pytest.raises(AttemptFailed, match="does not know this request") as caught:
            await request.next_event(30.0)
        assert not caught.value.counts


async def test_attempts_are_checked_that_had_no_event_lately_and_were_accepted(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        silent, lively, asked = [await accepted(one, *names) for names in ("d", "d", "")]
        one.router.join(asked, "d")
        for request in (silent, asked):
            request.last_event_at -= 60.0
        assert one.router.silent_attempts("d", 30.0) == [silent.attempt_id]
        assert set(one.router.silent_attempts("d", -1.0)) == {silent.attempt_id, lively.attempt_id}


async def test_whatever_an_instance_sends_is_a_sign_of_life(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await decodes(one)
        request = await accepted(one, "d")
        error = DeadlineExceeded("late").body
        token = OutputToken(request_id=request.attempt_id, index=0, token_id=7)
        for verb, message in (
            ("tokens", step("d", (request, 0))),
            ("prefilled", Prefilled(instance_id="d", token=token, lease=None)),
            ("failed", Failed(instance_id="d", request_id="other.0", error=error)),
        ):
            one.router._heard_at["d"] = 0.0  # as if it had been silent for ever
            await decode.tell(verb, message)
            await handled(one)
            assert one.router._heard_at["d"] > 0.0
        assert one.router.silent_s("stranger") > 0.0


async def test_a_bus_that_was_away_fails_what_instances_have_accepted(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        serving, asked = await accepted(one, "d"), await accepted(one)
        one.router.join(asked, "d")
        one.router.bus_reconnected()
        with pytest.raises(AttemptFailed, match="connection to NATS") as caught:
            await serving.next_event(30.0)
        assert not caught.value.counts
        asked.push_event(Finished("d"))
        assert await asked.next_event(30.0) == Finished("d")


async def test_instances_learn_which_attempts_this_gateway_does_not_have(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        request, other = await accepted(one, "d"), await accepted(one, "other")
        ids = [request.attempt_id, other.attempt_id, "gone.0"]
        ping = Ping(sender_id="d", request_ids=ids)
        pong = await one.bus.request(subjects.gateway("g", "ping"), ping, Pong, timeout_s=30.0)
        assert pong.unknown == [other.attempt_id, "gone.0"]


async def test_a_message_that_cannot_be_read_is_logged_and_affects_nothing(
    nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Nonsense(BaseModel):
        nonsense: float = 1.5

    async with fleet(nats_url) as one:
        decode = await decodes(one)
        request = await accepted(one, "d")
        with caplog.at_level(logging.ERROR):
            for verb in ("tokens", "prefilled", "moved", "failed", "ping"):
                await one.bus.publish(subjects.gateway("g", verb), Nonsense(), no_responders_to="_INBOX.x")
        await decode.tell("tokens", step("d", (request, 0)))
        await handled(one)
        assert request.num_output_tokens == 1
        assert len([each for each in caplog.records if "while handling a message" in each.message]) == 5


async def test_participants_are_counted(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        first, second = await accepted(one, "d"), await accepted(one, "d", "e")
        assert {name: one.router.num_open(name) for name in ("d", "e", "f")} == {"d": 2, "e": 1, "f": 0}
        await asyncio.gather(one.router.close(first), one.router.leave_and_cancel(second, "d"))
        await eventually(lambda: set(one.router.participants()) == {"e"})
        one.router.leave(second, "d")  # a second time changes nothing
        assert second.participants == {"e"}
