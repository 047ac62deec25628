"""One request over scripted instances: its way, over rejections, failures, silence and lost messages."""

import asyncio

import pytest

from services.gateway.groups import Group
from services.gateway.retries import AttemptFailed
from shared.bus import subjects
from shared.bus.connection import Incoming
from shared.errors import DeadlineExceeded, InstanceFailed, NoInstance, Overloaded
from shared.messages.records import Role
from shared.messages.serving import OutputToken, StepTokens
from tests.gateway.scripted import ACCEPTED, FULL, NO_SLOT, Scripted, Work, expected, fleet, token_of
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]


async def test_prefill_then_decode(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill, decode = await one.add("p", "prefill"), await one.add("d", "decode")
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        [prefilled], [decoded] = prefill.requests, decode.requests
        assert prefilled.token_ids == PROMPT
        assert decoded.token_ids == PROMPT + expected(PROMPT, 1)
        assert decoded.lease.instance_id == "p"
        assert await prefill.all_cancelled() == [prefilled.request_id]
        assert await decode.all_cancelled() == []


async def test_a_request_that_ends_with_its_first_token_needs_no_decode(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill, decode = await one.add("p", "prefill"), await one.add("d", "decode")
        assert await one.generate(PROMPT, max_tokens=1) == expected(PROMPT, 1)
        assert decode.requests == []
        assert await prefill.all_cancelled() == []


async def test_on_refusal_the_next_is_asked_and_then_all_again(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        first = await one.add("p1", "prefill", NO_SLOT, NO_SLOT, NO_SLOT)
        second = await one.add("p2", "prefill", NO_SLOT, NO_SLOT, NO_SLOT, NO_SLOT)
        await one.add("d", "decode", NO_SLOT, NO_SLOT)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert len(first.requests) == 4
        assert len(second.requests) in (3, 4)


async def test_the_line_is_first_come_first_served(nats_url: str) -> None:
    """Nobody who came later is accepted before those ahead of him."""
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *[NO_SLOT] * 10)
        await one.add("d", "decode")
        async with asyncio.TaskGroup() as tasks:
            for number in range(6):
                tasks.create_task(one.generate([*PROMPT, number]))
                await eventually(
                    lambda waiting=number + 1: one.queues().prefill.num_waiting == waiting or prefill.answers == []
                )
        accepted = [request.token_ids[-1] for request in prefill.requests[10:]]
        assert accepted == sorted(accepted)


async def test_no_slot_before_the_ttft_deadline(nats_url: str) -> None:
    async with fleet(nats_url, ttft_timeout_s=0.3) as one:
        await one.add("p", "prefill", *FULL)
        await one.add("d", "decode")
        with pytest.raises(Overloaded, match=r"no prefill instance can give the first token within 0\.3 s") as caught:
            await one.generate(PROMPT)
        assert caught.value.retry_after_s


async def test_a_line_that_is_too_long_refuses_at_once(nats_url: str) -> None:
    async with fleet(nats_url, ttft_timeout_s=1.0, max_waiting=1) as one:
        await one.add("p", "prefill", *FULL)
        await one.add("d", "decode")
        waiting = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.queues().prefill.num_waiting == 1)
        with pytest.raises(Overloaded, match="1 requests wait"):
            await one.generate(PROMPT)
        with pytest.raises(Overloaded):
            await waiting


async def test_nobody_there(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        with pytest.raises(NoInstance, match="No prefill instance"):
            await one.generate(PROMPT)


async def test_an_instance_of_other_weights_is_not_asked_to_decode(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        other = await one.add("d1", "decode", fingerprint="other")
        await one.add("d2", "decode")
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert other.requests == []


async def test_silence_instead_of_an_answer_is_cancelled_and_avoided(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        silent = await one.add("p1", "prefill", None, None)
        await one.add("d", "decode")

        async def answer_later() -> None:
            await eventually(lambda: silent.requests)
            await one.add("p2", "prefill")

        later = asyncio.create_task(answer_later())
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert silent.cancelled == [silent.requests[0].request_id]
        await later


class FailsAfter(Scripted):
    """Decodes three tokens and fails, the first time."""

    async def serve(self, request: Work) -> None:
        if request.role == "decode" and len(self.requests) == 1:
            await self.decode(request, up_to=3)
            await self.fail(request)
        else:
            await super().serve(request)


class LosesTokens(FailsAfter):
    async def serve(self, request: Work) -> None:
        if request.role == "decode" and len(self.requests) == 1:
            await self.decode(request, up_to=3)
            token = token_of(request, [*request.token_ids, 0, 0, 0, 0])
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        else:
            await super().serve(request)


class DoublesTokens(Scripted):
    async def serve(self, request: Work) -> None:
        if request.role == "decode":
            await self.decode(request, up_to=4)
        await super().serve(request)


class FallsSilent(FailsAfter):
    async def fail(self, request: Work, error: object = None) -> None:
        pass


@pytest.mark.parametrize("kind", [FailsAfter, LosesTokens])
async def test_a_decode_that_fails_or_loses_tokens_is_taken_over_without_a_seam(
    nats_url: str, kind: type[Scripted]
) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=kind)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        again = prefill.requests[1]
        assert again.token_ids == PROMPT + expected(PROMPT, 3)
        assert again.num_prompt_tokens == len(PROMPT)
        if kind is LosesTokens:  # the other has said itself that it has released the request
            await eventually(lambda: decode.requests[0].request_id in decode.cancelled)


async def test_over_all_attempts_it_is_as_old_as_it_was(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=FailsAfter)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        ages = [request.ask.age_s for request in (*prefill.requests, *decode.requests)]
        assert len(prefill.requests) == len(decode.requests) == 2
        assert max(prefill.requests[0].ask.age_s, decode.requests[0].ask.age_s) < prefill.requests[1].ask.age_s
        assert all(0 < age_s < 30 for age_s in ages)


async def test_what_was_cached_is_told_with_the_first_token_and_once(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode", kind=FailsAfter)
        prefill.num_cached_tokens = 4
        first, *others = await one.tokens(one.request(PROMPT))
        assert first.num_cached_tokens == 4
        assert not any(token.num_cached_tokens for token in others)
        assert len(prefill.requests) == 2


async def test_a_decode_instance_with_a_shorter_context_is_not_asked(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        short = await one.add("d1", "decode", max_model_len=12)
        await one.add("d2", "decode", max_model_len=13)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert short.requests == []


async def test_tokens_that_come_twice_are_passed_over(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        await one.add("d", "decode", kind=DoublesTokens)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)


async def test_silence_in_the_middle_is_a_failure(nats_url: str) -> None:
    async with fleet(nats_url, token_timeout_s=0.3) as one:
        await one.add("p", "prefill")
        await one.add("d", "decode", kind=FallsSilent)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)


async def test_a_lost_instance_and_a_bus_that_was_away_end_the_attempt(nats_url: str) -> None:
    for lose in (lambda one: one.watch.lose("d", "is lost"), lambda one: one.router.bus_reconnected()):
        async with fleet(nats_url, watching=True, max_attempts=2) as one:
            await one.add("p", "prefill")
            decode = await one.add("d", "decode", kind=FallsSilent)
            work = asyncio.create_task(one.generate(PROMPT))
            await eventually(lambda decode=decode, one=one: decode.requests and one.router.num_open("d"))
            lose(one)
            assert await work == expected(PROMPT, 8)


class AlwaysFails(Scripted):
    async def serve(self, request: Work) -> None:
        await self.fail(request)


class PastDeadline(Scripted):
    async def serve(self, request: Work) -> None:
        await self.fail(request, DeadlineExceeded("too late"))


async def test_after_enough_failures_the_request_fails(nats_url: str) -> None:
    async with fleet(nats_url, max_attempts=3) as one:
        prefill = await one.add("p", "prefill", kind=AlwaysFails)
        await one.add("d", "decode")
        with pytest.raises(InstanceFailed, match="3 attempts at this request failed"):
            await one.generate(PROMPT)
        assert len(prefill.requests) == 3


async def test_a_deadline_that_an_instance_tells_of_ends_the_request(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill", kind=PastDeadline)
        await one.add("d", "decode")
        with pytest.raises(DeadlineExceeded):
            await one.generate(PROMPT)


async def test_the_requests_own_deadline(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *FULL)
        await one.add("d", "decode", kind=FallsSilent)
        with pytest.raises(DeadlineExceeded):
            await one.generate(PROMPT, timeout_s=0.3)
        prefill.answers.clear()
        with pytest.raises(DeadlineExceeded):
            await one.generate(PROMPT, timeout_s=0.5)


async def test_leaving_the_block_cancels_wherever_the_request_is(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=FallsSilent)
        await one.tokens(one.request(PROMPT, id="r"), up_to=3)
        await eventually(lambda: decode.cancelled == ["r.0"])
        await eventually(lambda: prefill.cancelled == ["r.0"])
        assert len(one.router) == 0


async def test_a_request_that_is_cancelled_while_it_is_asked_for_is_cancelled_there(nats_url: str) -> None:
    async with fleet(nats_url, answer_timeout_s=5.0) as one:
        prefill = await one.add("p", "prefill", None)
        await one.add("d", "decode")
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: prefill.requests)
        work.cancel()
        await asyncio.wait([work])
        await eventually(lambda: prefill.cancelled == [prefill.requests[0].request_id])


async def test_tokens_of_a_request_that_nobody_has_are_answered_with_a_cancel(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await one.add("d", "decode")
        token = OutputToken(request_id="stray.0", index=0, token_id=1)
        await decode.tell("tokens", StepTokens(instance_id="d", tokens=[token]))
        await eventually(lambda: decode.cancelled == ["stray.0"])


async def test_a_request_is_not_begun_that_no_decode_instance_can_go_on_with(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode", fingerprint="other")
        with pytest.raises(NoInstance):
            await one.generate(PROMPT)
        assert prefill.requests == []


async def test_a_request_goes_on_with_the_weights_that_it_began_with(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        await one.add("d", "decode", kind=FailsAfter)
        other = await one.add("p2", "prefill", fingerprint="other")
        await one.add("d2", "decode", fingerprint="other")
        one.instances["p2"].answers = [*FULL]
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert all(request.token_ids == PROMPT for request in other.requests)


async def test_a_stream_that_has_begun_stands_before_newcomers_and_is_never_turned_away(nats_url: str) -> None:
    async with fleet(nats_url, watching=True, max_waiting=1, instance_wait_s=0.2) as one:
        await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=FallsSilent)
        begun = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: decode.requests)
        prefill = one.instances["p"]
        one.remove("p")
        one.watch.lose("d", "is lost")
        await eventually(lambda: one.queues().prefill.num_waiting == 1)
        with pytest.raises(Overloaded):
            await one.generate([*PROMPT, 9])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(begun), 0.5)
        one.instances["p"] = prefill
        one.refresh()
        assert await begun == expected(PROMPT, 8)


class AnswersLate(Scripted):
    """Accepts, but says so only after it has been given up; and then prefills all the same."""

    async def handle(self, incoming: Incoming) -> None:
        await super().handle(incoming)
        verb, _ = subjects.verb_and_key(incoming.subject)
        if verb == "cancel" and len(self.cancelled) == 1 and self.requests[-1].role == "prefill":
            await self.prefilled(self.requests[-1])


async def test_what_an_instance_says_that_was_given_up_is_not_heard(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        late = await one.add("p1", "prefill", None, kind=AnswersLate)
        await one.add("d", "decode")

        async def another_comes() -> None:
            await eventually(lambda: late.cancelled)
            await one.add("p2", "prefill")

        coming = asyncio.create_task(another_comes())
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        await coming
        await eventually(lambda: len(late.cancelled) == 2)


async def test_each_attempt_asks_for_a_group_of_its_scenario_and_the_weights_it_began_with(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        other = one.make_group("other")
        await one.add("p1", "prefill")
        await one.add("d1", "decode", kind=FailsAfter)
        prefill = await one.add("p2", "prefill", group=other)
        decode = await one.add("d2", "decode", group=other)
        asked: list[tuple[str | None, str | None]] = []

        def group_of(scenario: str | None, fingerprint: str | None = None) -> Group:
            asked.append((scenario, fingerprint))
            return one.group if len(asked) == 1 else other

        one.groups.of = group_of
        assert await one.generate(PROMPT, scenario="chat") == expected(PROMPT, 8)
        assert asked == [("chat", None), ("chat", "f")]
        assert len(prefill.requests) == len(decode.requests) == 1


class FailsAndGoes(Scripted):
    async def serve(self, request: Work) -> None:
        self.change(state="draining")
        await self.fail(request)


async def test_one_that_has_not_begun_is_bound_to_no_weights(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=10.0) as one:
        old = await one.add("p1", "prefill", kind=FailsAndGoes, fingerprint="old")
        await one.add("d1", "decode", fingerprint="old")
        await one.add("d2", "decode", fingerprint="new")
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: old.requests)
        await one.add("p2", "prefill", fingerprint="new")
        assert await work == expected(PROMPT, 8)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_who_waits_where_nobody_is_left_goes_where_somebody_is(nats_url: str, role: Role) -> None:
    async with fleet(nats_url, instance_wait_s=60.0, max_attempts=1) as one:
        other = one.make_group("other")
        one.groups.of = lambda scenario, fingerprint=None: other if other.serves(fingerprint) else one.group
        await one.add("p1", "prefill", *[NO_SLOT] * (10_000 if role == "prefill" else 0))
        await one.add("d1", "decode", *FULL)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: one.queues().of(role).num_waiting == 1)
        await one.add("p2", "prefill", group=other)
        await one.add("d2", "decode", group=other)
        await one.bus.flush()
        assert not work.done()
        one.remove("d1")
        assert await work == expected(PROMPT, 8)
        assert one.traffic().num_done == 1
        assert one.traffic().open == one.traffic(other).num_arrived == 0


async def test_a_group_counts_what_its_requests_do(nats_url: str) -> None:
    async with fleet(nats_url, ttft_timeout_s=0.2) as one:
        await one.add("p", "prefill")
        decode = await one.add("d", "decode", kind=FailsAfter)
        one.set_objective(ttft_s=60.0)
        await one.generate(PROMPT)
        one.set_objective(ttft_s=1e-9)
        await one.generate(PROMPT, max_tokens=4, is_batch=True)
        decode.answers = [*FULL]
        waiting = asyncio.create_task(one.generate(PROMPT, is_batch=True))
        await eventually(lambda: one.traffic().waiting_decode == 1)
        now = one.traffic()
        assert (now.open, now.waiting_prefill, now.num_arrived, now.num_done) == (1, 0, 3, 2)
        assert (now.num_first_tokens, now.num_in_time) == (3, 1)
        assert (now.prompt_tokens, now.output_tokens) == (2 * len(PROMPT), 8 + 4)
        assert now.ttft_s > 0
        assert now.e2e_s > 0
        waiting.cancel()
        await asyncio.wait([waiting])
        one.instances["p"].answers = [*FULL]
        one.set_objective(None)
        with pytest.raises(Overloaded):
            await one.generate(PROMPT)
        after = one.traffic()
        assert (after.open, after.waiting_decode, after.num_arrived, after.num_done, after.num_shed) == (0, 0, 4, 2, 1)


@pytest.mark.parametrize("how", ["it is lost", "it says so"])
async def test_whoever_waits_for_decode_begins_anew_when_who_keeps_its_kv_fails(nats_url: str, how: str) -> None:
    async with fleet(nats_url, watching=True, max_attempts=2) as one:
        prefill = await one.add("p", "prefill")
        decode = await one.add("d", "decode", *FULL)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: decode.requests)
        if how == "it is lost":
            one.watch.lose("p", "is lost")
        else:
            await prefill.fail(prefill.requests[0])
        await eventually(lambda: len(prefill.requests) == 2, timeout_s=10.0)
        first, again = prefill.requests
        assert (first.token_ids, again.token_ids) == (PROMPT, PROMPT + expected(PROMPT, 1))
        if how == "it is lost":
            await eventually(lambda: prefill.cancelled == [first.request_id])
        await eventually(lambda: decode.requests[-1].request_id == again.request_id)
        num_rejected = len(decode.requests)
        decode.answers.clear()
        assert await work == expected(PROMPT, 8)
        assert {request.request_id for request in decode.requests[num_rejected:]} == {again.request_id}
        assert one.queues().decode.num_waiting == 0


async def test_a_stream_whose_weights_are_served_no_more_is_told_so(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.3) as one:
        await one.add("p1", "prefill", fingerprint="old")
        decode = await one.add("d1", "decode", kind=FallsSilent, fingerprint="old")
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: decode.requests)
        one.remove()
        await one.add("p2", "prefill", fingerprint="new")
        await one.add("d2", "decode", fingerprint="new")
        one.watch.lose("d1", "is lost")
        with pytest.raises(InstanceFailed, match="no longer served"):
            await work


async def test_who_waits_for_prefill_when_its_weights_are_left_at_decode_only_goes_there(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.3) as one:
        prefill = await one.add("p1", "prefill", ACCEPTED, *FULL, fingerprint="old")
        decode = await one.add("d1", "decode", kind=FailsAfter, fingerprint="old")
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: len(prefill.requests) > 1)
        await one.add("p2", "prefill", fingerprint="new")
        one.remove("p1")
        assert await work == expected(PROMPT, 8)
        again = decode.requests[-1]
        assert (again.ask.lease, again.token_ids) == (None, PROMPT + expected(PROMPT, 3))


async def test_one_whose_weights_are_left_at_decode_only_waits_there_to_its_deadline(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p1", "prefill", fingerprint="old")
        decode = await one.add("d1", "decode", kind=FallsSilent, fingerprint="old")
        work = asyncio.create_task(one.generate(PROMPT, timeout_s=2.0))
        await eventually(lambda: decode.requests)
        await one.add("p2", "prefill", fingerprint="new")
        one.remove("p1")
        decode.answers = [*FULL]
        one.watch.lose("d1", "is lost")
        with pytest.raises(DeadlineExceeded, match="no decode instance"):
            await work
        assert len(prefill.requests) == 1


async def test_a_failure_behind_the_last_token_starts_no_further_attempt(nats_url: str) -> None:
    class FailsAtTheEnd(Scripted):
        """Sends its failure before the last token, and both in one go."""

        async def serve(self, work: Work) -> None:
            await self.decode(work, up_to=7)
            request = one.router._requests[work.request_id]
            await eventually(lambda: request.num_output_tokens == 7)
            request.push_event(AttemptFailed("mine", instance_id="d"))
            request.push_token("d", token_of(work, work.token_ids + expected(work.token_ids, 6)))

    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode", kind=FailsAtTheEnd)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        await eventually(lambda: one.traffic().num_done == 1)
        assert len(prefill.requests) == 1
