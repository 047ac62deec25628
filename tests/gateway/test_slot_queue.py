"""The waiting queue for slots: which instance is asked, which request goes first, what wakes it, what ends the wait."""

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from services.gateway import instance_client, slot_queue
from services.gateway.dispatcher import TTFT_SLACK
from services.gateway.instance_client import INLINE_TOKENS, InstanceClient
from services.gateway.request import Request
from services.gateway.slot_queue import SAMPLE, Accepted, NoCandidate, TooLate
from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import InstanceFailed, InvalidRequest, NoInstance, Overloaded
from shared.messages.serving import AskReply, Capacity, Message
from shared.registry.heartbeats import Heartbeat
from tests.gateway.scripted import ACCEPTED, AMPLE, FULL, NO_SLOT, Fleet, Scripted, Work, expected, fleet, member
from tests.harness import eventually
from tests.registry.test_view import record

PROMPT = [3, 1, 4, 1, 5]
NO_BLOCKS = AskReply(accepted=False, reason="no_blocks", capacity=AMPLE)


@pytest.fixture
def only_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue asks a full instance again when it is told to, and never by itself."""
    monkeypatch.setattr(slot_queue, "TICK_S", 1e6)
    monkeypatch.setattr(slot_queue, "REJECTED_S", 1e6)
    monkeypatch.setattr(instance_client, "FULL_FIRST_S", 1e6)
    monkeypatch.setattr(instance_client, "FULL_MAX_S", 1e6)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine changes nothing: what is known of capacity stays fresh, and no instance is slow to answer."""
    monkeypatch.setattr(instance_client, "CAPACITY_FRESH_S", 1e6)
    monkeypatch.setattr(instance_client, "HEDGE_MIN_S", 1e6)
    monkeypatch.setattr(instance_client, "HEDGE_MAX_S", 1e6)


class AcceptsOnly(Scripted):
    """Does nothing for what it accepts."""

    async def serve(self, work: Work) -> None:
        pass


class AnswersWhenLet(AcceptsOnly):
    """Answers no question before it is let to."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.let = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def answer(self, incoming: Incoming, work: Work) -> None:
        self.requests.append(work)
        self.tasks.append(asyncio.create_task(self.when_let(incoming, work)))

    async def when_let(self, incoming: Incoming, work: Work) -> None:
        await self.let.wait()
        self.requests.remove(work)
        await super().answer(incoming, work)


def waiting_request(one: Fleet, number: int = 0, *, num_tokens: int = 1, age_s: float = 0.0, **changes: Any) -> Request:
    """A request whose prompt begins with `number`, by which scripted instances tell requests apart."""
    has_started = changes.pop("has_started", False)
    fingerprint = changes.pop("fingerprint", None)
    request = one.request([number] + [1] * (num_tokens - 1), **changes)
    request.arrived_at -= age_s
    request.fingerprint = fingerprint
    if has_started:
        request.token_ids.append(1)
    request.start_attempt()
    one.router.open(request)
    return request


def acquire(
    one: Fleet, number: int = 0, *, within_s: float = 30.0, due_in_s: float | None = None, **changes: Any
) -> asyncio.Task[Accepted]:
    """Lets a request wait for a prefill slot. Its place depends on priority, `due_in_s` and `age_s`."""
    now = time.monotonic()
    first_token_by = None if due_in_s is None else now + due_in_s
    request = waiting_request(one, number, **changes)
    work = one.queues().prefill.acquire(request, until=now + within_s, first_token_by=first_token_by)
    return asyncio.create_task(work)


class NewReply(Message):
    """An answer of another version."""

    accepted: bool
    reason: str


async def enqueue(one: Fleet, number: int = 0, **changes: Any) -> asyncio.Task[Accepted]:
    """Returns once the request is in the queue."""
    before = one.queues().prefill.num_waiting
    task = acquire(one, number, **changes)
    await eventually(lambda: one.queues().prefill.num_waiting == before + 1)
    return task


def is_full(one: Fleet, num_asked: int) -> bool:
    """Whether the gateway knows that the instance `p` has rejected so many questions and is full."""
    return len(one.instances["p"].requests) == num_asked and one.watch.client("p")._full_until > time.monotonic()


def numbers(instance: Scripted) -> list[int]:
    """The requests that an instance was asked to take, rejected or not."""
    return [work.token_ids[0] for work in instance.requests]


async def sent(one: Fleet) -> None:
    """Returns when all that has been sent so far has arrived."""
    marker = await one.add("marker", "decode")
    await marker.all_cancelled()
    one.remove("marker")


async def test_requests_are_served_by_priority_then_by_deadline_then_by_arrival(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        waiting = [
            await enqueue(one, 8, is_batch=True),
            await enqueue(one, 7, is_batch=True, age_s=1),
            await enqueue(one, 6),
            await enqueue(one, 5, age_s=1),
            await enqueue(one, 4, due_in_s=5),
            await enqueue(one, 3, due_in_s=4),
            await enqueue(one, 2, has_started=True),
            await enqueue(one, 1, has_started=True, age_s=1),
        ]
        await eventually(lambda: numbers(prefill)[-1] == 1)
        num_rejected = len(prefill.requests)
        prefill.answers.clear()
        await asyncio.gather(*waiting)
        # The question that was under way may have been rejected once more.
        assert list(dict.fromkeys(numbers(prefill)[num_rejected - 1 :])) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("first", "newcomer"),
    [
        ({"due_in_s": 20.0}, {"due_in_s": 10.0}),
        ({"is_batch": True, "age_s": 10.0}, {}),
        ({"age_s": 10.0}, {"has_started": True}),
    ],
    ids=["earlier deadline", "interactive before batch", "started before new"],
)
async def test_a_newcomer_that_is_to_be_served_before_overtakes(
    nats_url: str, first: dict[str, Any], newcomer: dict[str, Any]
) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        waiting = await enqueue(one, 1, **first)
        await eventually(lambda: numbers(prefill))
        second = await enqueue(one, 2, **newcomer)
        await eventually(lambda: numbers(prefill)[-1] == 2)
        prefill.answers.clear()
        await asyncio.gather(waiting, second)
        assert numbers(prefill)[-2:] == [2, 1]


async def test_a_newcomer_that_is_to_be_served_after_is_not_asked_for_before(
    nats_url: str, only_notified: None
) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", *[NO_SLOT] * 3, kind=AcceptsOnly)
        first = await enqueue(one, 1, age_s=1)
        second = await enqueue(one, 2)
        for num_asked in range(1, 4):
            await eventually(partial(is_full, one, num_asked))
            one.queues().prefill.slot_freed("p", Capacity())
        await asyncio.gather(first, second)
        assert numbers(prefill) == [1, 1, 1, 1, 2]


async def test_a_request_that_is_overtaken_waits_no_longer_than_it_may(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        first = await enqueue(one, 1, is_batch=True, within_s=0.5)
        await eventually(lambda: numbers(prefill))
        second = await enqueue(one, 2)
        with pytest.raises(TimeoutError):
            await first
        prefill.answers.clear()
        assert (await second).instance.id == "p"
        assert one.queues().prefill.num_waiting == 0


async def test_a_freed_slot_wakes_the_queue(nats_url: str, only_notified: None) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", NO_SLOT, kind=AcceptsOnly)
        waiting = await enqueue(one)
        await eventually(partial(is_full, one, 1))
        one.queues().decode.slot_freed("d", AMPLE)
        one.queues().prefill.notify()
        await sent(one)
        assert len(prefill.requests) == 1
        one.queues().prefill.slot_freed("p", AMPLE)
        accepted = await waiting
        assert (accepted.instance.id, accepted.num_rejections) == ("p", 1)


@pytest.mark.parametrize("rejection", [NO_SLOT, NO_BLOCKS])
async def test_a_slot_that_is_freed_while_the_question_is_under_way_is_not_missed(
    nats_url: str, only_notified: None, rejection: AskReply
) -> None:
    class FreesAtOnce(AcceptsOnly):
        """Has a free slot as soon as it has rejected, which the gateway hears before the rejection."""

        async def answer(self, incoming: Incoming, work: Work) -> None:
            if self.answers:
                one.queues().prefill.slot_freed("p", AMPLE)
            await super().answer(incoming, work)

    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        await one.add("p", "prefill", rejection, rejection, kind=FreesAtOnce)
        async with asyncio.timeout(30.0):
            assert (await acquire(one)).num_rejections == 2


async def test_requests_are_admitted_concurrently_while_there_is_capacity(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", kind=AnswersWhenLet)
        assert isinstance(prefill, AnswersWhenLet)
        one.queues().prefill.slot_freed("p", Capacity(slots_free=3, tokens_free=100))
        waiting = [await enqueue(one, number) for number in range(5)]
        await eventually(lambda: len(prefill.requests) == 3)
        await sent(one)
        assert len(prefill.requests) == 3
        prefill.let.set()  # the first answer says that there is more
        await asyncio.gather(*waiting)
        assert sorted(numbers(prefill)) == [0, 1, 2, 3, 4]


async def test_one_question_at_a_time_where_no_capacity_is_known(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", kind=AnswersWhenLet)
        assert isinstance(prefill, AnswersWhenLet)
        one.watch.client("p").capacity_at = -1e9
        waiting = [await enqueue(one, number, age_s=-number) for number in range(5)]
        await eventually(lambda: prefill.requests)
        await sent(one)
        assert numbers(prefill) == [0]
        prefill.let.set()
        await asyncio.gather(*waiting)


async def test_questions_are_bounded_by_uncomputed_tokens(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", kind=AnswersWhenLet)
        one.queues().prefill.slot_freed("p", Capacity(slots_free=100, tokens_free=10))
        waiting = [await enqueue(one, number, num_tokens=6) for number in range(5)]
        await eventually(lambda: len(prefill.requests) == 2)
        await sent(one)
        assert len(prefill.requests) == 2
        assert isinstance(prefill, AnswersWhenLet)
        prefill.let.set()
        await asyncio.gather(*waiting)


async def test_decode_is_not_bounded_by_tokens(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        decode = await one.add("d", "decode", kind=AnswersWhenLet)
        queue = one.queues().decode
        queue.slot_freed("d", Capacity(slots_free=5, tokens_free=0))
        until = time.monotonic() + 30
        waiting = [asyncio.create_task(queue.acquire(waiting_request(one, number), until=until)) for number in range(5)]
        await eventually(lambda: len(decode.requests) == 5)
        assert isinstance(decode, AnswersWhenLet)
        decode.let.set()
        await asyncio.gather(*waiting)


async def test_a_long_prompt_follows_the_acceptance_or_travels_along_where_it_is_almost_certain(
    nats_url: str, unhurried: None
) -> None:
    prompt = [1] * (INLINE_TOKENS + 1)
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", max_model_len=1000)
        decode = await one.add("d", "decode", max_model_len=1000)
        for _ in range(2):
            assert await one.generate(prompt) == expected(prompt, 8)
        await one.generate(prompt[1:])
        for instance in (prefill, decode):
            first, second, _ = instance.requests
            assert (first.ask.start, first.token_ids[: len(prompt)]) == (None, prompt)
            assert second.ask.start is not None
        one.watch.client("p").capacity_at = -1e9
        await one.generate(prompt[1:])
        assert prefill.requests[-1].ask.start is not None


async def test_a_rejected_question_about_a_long_prompt_is_small(nats_url: str) -> None:
    prompt = [1] * 100_000
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", NO_SLOT, max_model_len=200_000)
        await one.add("d", "decode", max_model_len=200_000)
        assert await one.generate(prompt, max_tokens=2) == expected(prompt, 2)
        rejected, accepted = prefill.requests
        assert rejected.ask.start is None
        assert rejected.ask.num_tokens == 100_000
        assert len(rejected.ask.model_dump_json()) < 2000
        assert accepted.token_ids == prompt


async def test_a_prompt_that_does_not_fit_into_a_message_ends_its_request_only(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bus, "max_payload", 5000)
    prompt = [10**8] * (INLINE_TOKENS + 1)
    async with fleet(nats_url) as one:
        await one.add("p", "prefill", max_model_len=1000)
        await one.add("d", "decode", max_model_len=1000)
        with pytest.raises(InvalidRequest, match="does not fit into a NATS message"):
            await one.generate(prompt, max_tokens=2)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)


async def test_an_instance_that_does_not_answer_delays_a_request_by_little(nats_url: str) -> None:
    """The next is asked as well, long before the answer time-out. A late acceptance is cancelled and gets no work."""
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        silent = await one.add("p1", "prefill", kind=AnswersWhenLet, max_model_len=1000)
        assert isinstance(silent, AnswersWhenLet)
        await one.add("d", "decode", max_model_len=1000)
        waiting = acquire(one, num_tokens=INLINE_TOKENS + 1)
        await eventually(lambda: silent.requests)
        other = await one.add("p2", "prefill", kind=AcceptsOnly, max_model_len=1000)
        async with asyncio.timeout(30.0):
            assert (await waiting).instance.id == "p2"
        [late] = silent.requests
        assert silent.cancelled == [] or silent.cancelled == [late.request_id]
        silent.let.set()
        assert await silent.all_cancelled() == [late.request_id]
        assert late.start is None
        await eventually(lambda: other.requests[0].start is not None)
        assert set(one.router.participants()) == {"p2"}


async def test_silent_instances_do_not_delay_requests_by_the_answer_timeout(nats_url: str) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        silent = [await one.add(f"p{n}", "prefill", *[None] * 1000, kind=AcceptsOnly) for n in range(4)]
        good = await one.add("p9", "prefill", kind=AcceptsOnly)
        await one.add("d", "decode")
        async with asyncio.timeout(30.0):
            accepted = await asyncio.gather(*(acquire(one, number) for number in range(5)))
        assert {one.instance.id for one in accepted} == {"p9"}
        assert sorted(numbers(good)) == [0, 1, 2, 3, 4]
        for instance in silent:
            asked = {work.request_id for work in instance.requests}
            assert set(await instance.all_cancelled()) == asked


async def test_candidates_are_found_anew_after_each_answer(nats_url: str, only_notified: None, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        first = await one.add("p1", "prefill", NO_SLOT, kind=AnswersWhenLet)
        await one.add("d", "decode")
        assert isinstance(first, AnswersWhenLet)
        waiting = acquire(one)
        await eventually(lambda: first.requests)
        gone = await one.add("p2", "prefill", kind=AcceptsOnly)
        await one.add("p3", "prefill", kind=AcceptsOnly)
        one.remove("p2")
        first.let.set()
        assert (await waiting).instance.id == "p3"
        assert gone.requests == []


async def test_nobody_waits_for_the_answer_of_an_instance_that_is_gone(nats_url: str, unhurried: None) -> None:
    """Nor is an attempt lost that another instance has accepted."""
    async with fleet(nats_url, answer_timeout_s=60.0, max_attempts=1) as one:
        gone = await one.add("p1", "prefill", None)
        await one.add("d", "decode")
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: gone.requests)
        other = await one.add("p2", "prefill")
        one.watch.lose("p1", "is gone")
        async with asyncio.timeout(30.0):
            assert await work == expected(PROMPT, 8)
        assert len(other.requests) == 1


async def test_while_decode_is_asked_its_loss_costs_no_attempt(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        prefill = await one.add("p", "prefill")
        gone = await one.add("d1", "decode", None)
        work = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: gone.requests)
        await one.add("d2", "decode")
        one.watch.lose("d1", "is gone")
        async with asyncio.timeout(30.0):
            assert await work == expected(PROMPT, 8)
        assert len(prefill.requests) == 1


class ShortOfBlocks(AcceptsOnly):
    """Rejects large requests until it `has_blocks`."""

    has_blocks = False

    async def answer(self, incoming: Incoming, work: Work) -> None:
        self.answers = [ACCEPTED if self.has_blocks or work.ask.num_tokens < 10 else NO_BLOCKS]
        await super().answer(incoming, work)


async def test_a_large_request_without_blocks_keeps_no_small_one_from_asking(
    nats_url: str, only_notified: None
) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", kind=ShortOfBlocks)
        assert isinstance(prefill, ShortOfBlocks)
        await one.add("d", "decode")
        large = acquire(one, 1, num_tokens=20, has_started=True)
        await eventually(lambda: prefill.requests)
        for number in range(2, 5):
            assert (await acquire(one, number)).instance.id == "p"
        assert numbers(prefill) == [1, 2, 3, 4]
        assert not large.done()
        prefill.has_blocks = True
        one.queues().prefill.slot_freed("p", AMPLE)
        assert (await large).num_rejections == 1


async def test_a_request_that_is_too_long_for_one_instance_is_asked_for_elsewhere(nats_url: str) -> None:
    too_long = AskReply(accepted=False, reason="too_long", capacity=AMPLE)
    async with fleet(nats_url) as one:
        small = await one.add("p1", "prefill", *[too_long] * 100, kind=AcceptsOnly)
        await one.add("d", "decode")
        waiting = acquire(one)
        await eventually(lambda: small.requests)
        await one.add("p2", "prefill", kind=AcceptsOnly)
        assert (await waiting).instance.id == "p2"
        assert len(small.requests) == 1


async def test_an_instance_that_cannot_read_requests_is_avoided_and_ends_none(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        bad = await one.add("p1", "prefill", *[AskReply(accepted=False, reason="invalid")] * 100)
        await one.add("d", "decode")
        good = await one.add("p2", "prefill")
        for number in range(20):
            assert await one.generate([*PROMPT, number]) == expected([*PROMPT, number], 8)
        assert len(good.requests) == 20
        assert len(bad.requests) <= 3
        assert one.watch.failures()[0].keys() == {"p1"}


async def test_an_answer_that_cannot_be_parsed_is_the_instances_failure_and_not_the_clients(nats_url: str) -> None:
    class Newer(Scripted):
        """Gives a reason that this version does not know."""

        async def answer(self, incoming: Incoming, work: Work) -> None:
            self.requests.append(work)
            await incoming.respond(NewReply(accepted=False, reason="no_time"))

    async with fleet(nats_url) as one:
        newer = await one.add("p1", "prefill", kind=Newer)
        await one.add("d", "decode")
        await one.add("p2", "prefill")
        for number in range(6):
            assert await one.generate([*PROMPT, number]) == expected([*PROMPT, number], 8)
        assert len(newer.requests) <= 2


def speed(name: str, token_s: float) -> dict[str, Heartbeat]:
    return {name: Heartbeat.of(record(name, prefill_token_s=token_s))}


async def test_a_request_that_cannot_make_its_deadline_is_shed_at_once(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode")
        one.groups.heartbeats = speed("p", token_s=10.0)
        one.set_objective(ttft_s=20.0)
        with pytest.raises(Overloaded, match="first token within 20 s") as caught:
            await one.generate(PROMPT)
        assert caught.value.retry_after_s
        assert prefill.requests == []
        traffic = one.traffic()
        assert (traffic.num_arrived, traffic.num_shed, traffic.num_done, traffic.open) == (1, 1, 0, 0)
        assert await one.generate(PROMPT, is_batch=True) == expected(PROMPT, 8)


async def test_a_request_that_can_still_make_its_deadline_waits(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        one.groups.heartbeats = speed("p", token_s=1.0)
        waiting = acquire(one, num_tokens=5, due_in_s=30.0)
        late = acquire(one, num_tokens=5, due_in_s=4.5)
        with pytest.raises(TooLate):  # once it has less left than prefill takes
            await late
        assert prefill.requests
        prefill.answers.clear()
        assert (await waiting).instance.id == "p"


async def test_the_fastest_instance_decides_what_is_too_late(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        await one.add("p1", "prefill", kind=AcceptsOnly)
        await one.add("p2", "prefill", kind=AcceptsOnly)
        one.groups.heartbeats = speed("p1", token_s=100.0) | speed("p2", token_s=0.001)
        assert await acquire(one, num_tokens=5, due_in_s=20.0)


async def test_old_estimates_shed_nothing(nats_url: str) -> None:
    """An instance that was slow may be fast again, which only a prompt can show."""
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        await one.add("d", "decode")
        one.groups.heartbeats = speed("p", token_s=10.0)
        one.set_objective(ttft_s=20.0)
        one.queues().prefill.prefilled_at -= slot_queue.STALE_ESTIMATE_S + 1.0
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        with pytest.raises(Overloaded):  # that prompt has confirmed them
            await one.generate(PROMPT)


async def test_the_first_token_is_due_a_little_before_the_objective(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        await one.add("d", "decode")
        due: list[float | None] = []
        queue = one.queues().prefill
        original = queue.acquire

        async def spy(request: Request, **values: Any) -> Accepted:
            by = values["first_token_by"]
            due.append(None if by is None else by - request.arrived_at)
            return await original(request, **values)

        monkeypatch.setattr(queue, "acquire", spy)
        await one.generate(PROMPT)
        one.set_objective(ttft_s=20.0)
        await one.generate(PROMPT)
        await one.generate(PROMPT, is_batch=True)
        assert due == [None, pytest.approx((1 - TTFT_SLACK) * 20.0), None]


class Counted:
    """Counts how often a gateway considers an instance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls = 0
        original = InstanceClient.may_be_asked

        def counted(client: InstanceClient, *arguments: Any) -> bool:
            self.num_calls += 1
            return original(client, *arguments)

        monkeypatch.setattr(InstanceClient, "may_be_asked", counted)


class Unscanned(dict[Any, Any]):
    """A table in which things are looked up, and never gone through."""

    def __iter__(self) -> Any:
        raise AssertionError("all open requests were gone through")

    values = items = keys = copy = __iter__


async def test_a_request_examines_a_few_instances_and_no_open_requests(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    async with fleet(nats_url) as one:
        for role in ("prefill", "decode"):
            instances = [Scripted(one.bus, record(f"{role}{n}", role=role)) for n in range(150)]
            one.instances |= {each.record.id: each for each in instances}
        members = tuple(member(each.record) for each in one.instances.values())
        one.group.map = one.group.map.model_copy(update={"members": members})
        one.refresh()

        async def answer(incoming: Incoming) -> None:
            if subjects.verb_and_key(incoming.subject)[0] in ("prefill", "decode"):
                await one.instances[incoming.subject.split(".")[3]].handle(incoming)

        await one.bus.subscribe(subjects.instance("*", ">"), answer)
        one.router._requests = Unscanned()  # no public way shows what is looked at
        for number in range(1000):
            request = waiting_request(one, number)
            one.router.join(request, f"prefill{number % 150}")
        prompt = list(range(64 * 3))
        assert len(one.group.ready("prefill")) == len(one.group.ready("decode")) == 150
        for n in range(150):
            one.group.affinity.remember(f"prefill{n}", one.request(prompt).prefix_keys)
        for _ in range(3):
            counted.num_calls = 0
            await one.queues().prefill.acquire(waiting_request(one, 1), until=time.monotonic() + 30)
            assert 0 < counted.num_calls <= SAMPLE + 16


async def test_an_instance_with_the_prefix_is_asked_first_unless_it_has_much_more_to_do(nats_url: str) -> None:
    prompt = list(range(64 * 4))

    async def chosen(one: Fleet) -> str:
        request = one.request(prompt)
        request.prefix_keys = tuple(range(4))
        request.start_attempt()
        accepted = await one.queues().prefill.acquire(request, until=time.monotonic() + 30)
        await one.router.close(request)
        return accepted.instance.id

    async with fleet(nats_url) as one:
        for name in ("p1", "p2"):
            await one.add(name, "prefill", kind=AcceptsOnly, max_model_len=1000)
        await one.add("d", "decode", max_model_len=1000)
        others = [waiting_request(one, number) for number in range(3)]
        one.router.join(others[0], "p2")
        assert await chosen(one) == "p1"
        one.group.affinity.remember("p2", [0])
        assert await chosen(one) == "p1"  # what it would save is worth less than an open request
        one.group.affinity.remember("p2", list(range(4)))
        assert await chosen(one) == "p2"
        for other in others:
            one.router.join(other, "p2")
        assert await chosen(one) == "p1"


async def test_a_prompt_goes_where_one_that_began_alike_went(nats_url: str) -> None:
    prefix = list(range(64))
    async with fleet(nats_url) as one:
        several = [await one.add(f"p{n}", "prefill") for n in range(4)]
        decodes = [await one.add(f"d{n}", "decode") for n in range(4)]
        for number in range(6):
            await one.generate([*prefix, number])
        for instances in (several, decodes):
            assert sorted(len(instance.requests) for instance in instances) == [0, 0, 0, 6]


async def test_an_instance_that_rejects_participates_only_if_it_did_before(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("d", "decode")
        several = [await one.add(name, "prefill", *FULL, kind=AcceptsOnly) for name in ("p1", "p2")]
        request = waiting_request(one)
        one.router.join(request, "p1")
        request.asked.clear()  # as a participant that has accepted
        with pytest.raises(TimeoutError):
            await one.queues().prefill.acquire(request, until=time.monotonic() + 0.3)
        assert all(instance.requests for instance in several)
        assert request.participants == {"p1"}
        assert request.asked == set()


@pytest.mark.parametrize("has_started", [False, True])
async def test_the_wait_ends_where_no_instance_is_left_but_another_group_has_one(
    nats_url: str, has_started: bool
) -> None:
    async with fleet(nats_url, instance_wait_s=60.0) as one:
        other = one.make_group("other")
        first = await enqueue(one, has_started=has_started, fingerprint="f" if has_started else None)
        prefill = await one.add("p", "prefill", NO_SLOT, kind=AcceptsOnly)
        await one.add("d", "decode")
        assert (await first).instance.id == "p"
        one.remove()
        leaving = await enqueue(one, has_started=has_started, fingerprint="f" if has_started else None)
        one.groups.of = lambda scenario=None, fingerprint=None: other
        await one.add("p2", "prefill", group=other)
        assert not leaving.done()
        await one.add("d2", "decode", group=other)
        with pytest.raises(NoCandidate):
            await leaving
        assert len(prefill.requests) == 2


@pytest.mark.parametrize("has_started", [False, True])
async def test_a_request_that_no_instance_can_serve_keeps_no_other_waiting(nats_url: str, has_started: bool) -> None:
    async with fleet(nats_url, instance_wait_s=60.0) as one:
        prefill = await one.add("p", "prefill", kind=AcceptsOnly)
        await one.add("d", "decode")
        waiting = await enqueue(one, 1, age_s=5, fingerprint="new", has_started=has_started)
        assert (await acquire(one, 2)).instance.id == "p"
        assert numbers(prefill) == [2]
        await one.add("q", "prefill", kind=AcceptsOnly, fingerprint="new")
        await one.add("e", "decode", fingerprint="new")
        assert (await waiting).instance.id == "q"


async def test_requests_that_no_instance_can_serve_are_looked_at_without_end_to_the_others(nats_url: str) -> None:
    """Some hundred of them ahead of one that can be served do not hide it."""
    async with fleet(nats_url, instance_wait_s=60.0) as one:
        await one.add("p", "prefill", kind=AcceptsOnly)
        await one.add("d", "decode")
        unserved = [acquire(one, number, age_s=5, fingerprint="new") for number in range(100)]
        await eventually(lambda: one.queues().prefill.num_waiting == 100)
        assert (await acquire(one, 200)).instance.id == "p"
        for task in unserved:
            task.cancel()
        await asyncio.wait(unserved)


async def test_a_request_that_no_instance_can_serve_is_rejected_though_others_are_served(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.2) as one:
        await one.add("p", "prefill", kind=AcceptsOnly)
        await one.add("d", "decode")
        unserved = await enqueue(one, 1, fingerprint="new")
        while not unserved.done():
            await acquire(one, 2)
        with pytest.raises(NoInstance):
            await unserved


async def test_without_instances_newcomers_are_rejected_and_started_streams_wait(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.2) as one:
        with pytest.raises(NoInstance):
            await acquire(one)
        started = await enqueue(one, has_started=True)
        with pytest.raises(NoInstance):
            await acquire(one, 1)
        await one.add("p", "prefill", kind=AcceptsOnly)
        await one.add("d", "decode")
        assert (await started).instance.id == "p"


@pytest.mark.parametrize("behind", ["new", None])
async def test_a_request_that_its_own_weights_reject_keeps_no_other_from_other_weights(
    nats_url: str, behind: str | None
) -> None:
    async with fleet(nats_url) as one:
        old = await one.add("p1", "prefill", *FULL, kind=AcceptsOnly, fingerprint="old")
        await one.add("d1", "decode", fingerprint="old")
        first = await enqueue(one, 1, has_started=True, fingerprint="old")
        await eventually(lambda: old.requests)
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        await one.add("d2", "decode", fingerprint="new")
        async with asyncio.timeout(30.0):
            assert (await acquire(one, 2, fingerprint=behind)).instance.id == "p2"
        assert not first.done()
        old.answers.clear()
        assert (await first).instance.id == "p1"


async def test_requests_for_either_weights_keep_their_order(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        weights = ("old", "new")
        prefills = {
            name: await one.add(f"p-{name}", "prefill", *FULL, kind=AcceptsOnly, fingerprint=name) for name in weights
        }
        for name in weights:
            await one.add(f"d-{name}", "decode", fingerprint=name)
        waiting = [await enqueue(one, number, fingerprint=weights[number % 2], age_s=number) for number in range(1, 9)]
        await eventually(lambda: numbers(prefills["old"]) and numbers(prefills["new"]))
        num_rejected = {name: len(prefills[name].requests) for name in weights}
        for name in weights:
            prefills[name].answers.clear()
        await asyncio.gather(*waiting)
        for name, order in (("old", [8, 6, 4, 2]), ("new", [7, 5, 3, 1])):
            asked = numbers(prefills[name])[num_rejected[name] :]
            assert list(dict.fromkeys(asked)) == order


async def test_one_slow_answer_keeps_no_other_request_from_asking(nats_url: str, unhurried: None) -> None:
    async with fleet(nats_url, answer_timeout_s=60.0) as one:
        slow = await one.add("p1", "prefill", kind=AnswersWhenLet, fingerprint="old")
        assert isinstance(slow, AnswersWhenLet)
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        for name in ("old", "new"):
            await one.add(f"d-{name}", "decode", fingerprint=name)
        first = acquire(one, 1, fingerprint="old")
        await eventually(lambda: slow.requests)
        assert (await acquire(one, 2, fingerprint="new")).instance.id == "p2"
        slow.let.set()
        assert (await first).num_rejections == 0


async def test_a_stream_whose_weights_were_replaced_is_told_to_start_again(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.3) as one:
        await one.add("p", "prefill", *FULL, kind=AcceptsOnly, fingerprint="new")
        await one.add("d", "decode", fingerprint="new")
        saturating = await enqueue(one, 1, has_started=True, fingerprint="new")
        with pytest.raises(InstanceFailed, match="no longer served"):
            await acquire(one, has_started=True, fingerprint="old")
        assert not saturating.done()
        saturating.cancel()
        await asyncio.wait([saturating])


async def test_the_time_in_which_no_instance_at_all_was_there_does_not_count(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=1.0) as one:
        started = await enqueue(one, has_started=True, fingerprint="old")
        with pytest.raises(NoInstance):  # which takes as long as others would have had
            await acquire(one, 1)
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        await one.add("d2", "decode", fingerprint="new")
        assert (await acquire(one, 2)).instance.id == "p2"
        assert not started.done()
        await one.add("p1", "prefill", kind=AcceptsOnly, fingerprint="old")
        await one.add("d1", "decode", fingerprint="old")
        assert (await started).instance.id == "p1"
