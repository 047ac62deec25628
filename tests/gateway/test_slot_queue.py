"""The line for slots: who is asked, who goes first, what wakes it, and when it is given up."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from services.gateway import line as line_module
from services.gateway.generation import SLACK
from services.gateway.line import Accepted, NobodyHere, TooLate, Wish
from shared.bus.connection import Incoming
from shared.errors import InstanceFailed, NoInstance, Overloaded
from shared.messages.records import InstanceRecord
from shared.messages.serving import AskReply, PrefillRequest
from shared.sampling import SamplingParams
from tests.gateway.scripted import Fleet, Scripted, expected, fleet
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]
NO_SLOT = AskReply(accepted=False, reason="no_slot")
NO_TIME = AskReply(accepted=False, reason="no_time")
FULL = [NO_SLOT] * 10_000


@pytest.fixture
def only_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line asks again when it is told to, and never by itself."""
    monkeypatch.setattr(line_module, "ASK_AGAIN_S", 1e6)
    monkeypatch.setattr(line_module, "ASK_AGAIN_AT_MOST_S", 1e6)


class AcceptsOnly(Scripted):
    """Does nothing for what it accepts."""

    async def serve(self, request: object) -> None:
        pass


def wish(
    number: int = 0,
    *,
    within_s: float = 30.0,
    has_begun: bool = False,
    fingerprint: str | None = None,
    is_batch: bool = False,
    matched: Mapping[str, float] | None = None,
    holders: set[str] | None = None,
    suits: Callable[[InstanceRecord], bool] | None = None,
    elsewhere: Callable[[], bool] = lambda: False,
) -> Wish:
    """For a prefill of the one token `number`, by which scripted instances tell requests apart."""

    def request_for(instance: InstanceRecord) -> PrefillRequest:
        return PrefillRequest(
            request_id=f"r{number}",
            gateway_id="g",
            epoch=instance.epoch,
            fingerprint=instance.fingerprint,
            token_ids=[number],
            num_prompt_tokens=1,
            sampling=SamplingParams(max_tokens=8),
        )

    def has_the_weights(instance: InstanceRecord) -> bool:
        return fingerprint in (None, instance.fingerprint)

    return Wish(
        request_for=request_for,
        suits=suits or has_the_weights,
        holders=set() if holders is None else holders,
        until=time.time() + within_s,
        deadline=time.time() + 60,
        has_begun=has_begun,
        fingerprint=fingerprint,
        is_batch=is_batch,
        matched=matched or {},
        elsewhere=elsewhere,
    )


async def join(one: Fleet, asked: Wish) -> asyncio.Task[Accepted]:
    """Returns once the wish is in the line."""
    before = one.prefill_line.num_waiting
    task = asyncio.create_task(one.prefill_line.ask(asked))
    await eventually(lambda: one.prefill_line.num_waiting == before + 1)
    return task


def numbers(instance: Scripted) -> list[int]:
    return [request.token_ids[0] for request in instance.requests]


async def test_it_is_served_by_kind_then_by_deadline(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        waiting = [
            await join(one, wish(6, is_batch=True, within_s=60)),
            await join(one, wish(5, is_batch=True, within_s=20)),
            await join(one, wish(4, within_s=50)),
            await join(one, wish(3, within_s=40)),
            await join(one, wish(2, has_begun=True, within_s=59)),
            await join(one, wish(1, has_begun=True, within_s=58)),
        ]
        await eventually(lambda: numbers(prefill)[-1] == 1)
        num_rejected = len(prefill.requests)
        prefill.answers.clear()
        await asyncio.gather(*waiting)
        # The one whose question was on its way may have been refused once more.
        assert list(dict.fromkeys(numbers(prefill)[num_rejected - 1 :])) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("head", "newcomer"),
    [
        ({"within_s": 50.0}, {"within_s": 40.0}),
        ({"is_batch": True, "within_s": 40.0}, {"within_s": 50.0}),
        ({"within_s": 40.0}, {"has_begun": True, "within_s": 50.0}),
    ],
    ids=["earlier deadline", "interactive before batch", "begun before newcomers"],
)
async def test_the_head_gives_way_to_one_that_is_to_be_served_before(
    nats_url: str, head: dict[str, Any], newcomer: dict[str, Any]
) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        first = await join(one, wish(1, **head))
        await eventually(lambda: numbers(prefill))
        second = await join(one, wish(2, **newcomer))
        await eventually(lambda: numbers(prefill)[-1] == 2)
        prefill.answers.clear()
        await second
        await first
        assert numbers(prefill)[-2:] == [2, 1]


async def test_the_head_does_not_give_way_to_one_that_is_to_be_served_after(nats_url: str, only_hints: None) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *[NO_SLOT] * 3, kind=AcceptsOnly)
        first = await join(one, wish(1, within_s=20))
        second = await join(one, wish(2, within_s=25))
        for num_asked in range(1, 4):
            await eventually(lambda expected=num_asked: len(prefill.requests) == expected)
            one.prefill_line.hint()
        await asyncio.gather(first, second)
        assert numbers(prefill) == [1, 1, 1, 1, 2]


async def test_one_that_gave_way_waits_no_longer_than_it_may(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", *FULL, kind=AcceptsOnly)
        first = await join(one, wish(1, is_batch=True, within_s=0.5))
        await eventually(lambda: numbers(prefill))
        second = await join(one, wish(2))
        with pytest.raises(TimeoutError):
            await first
        prefill.answers.clear()
        assert (await second).instance.id == "p"
        assert one.prefill_line.num_waiting == 0


async def test_a_hint_wakes_the_line(nats_url: str, only_hints: None) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill", NO_SLOT, kind=AcceptsOnly)
        waiting = await join(one, wish())
        await eventually(lambda: prefill.answers == [])
        one.group.decode_line.hint()
        assert len(prefill.requests) == 1
        one.prefill_line.hint()
        accepted = await waiting
        assert (accepted.instance.id, accepted.num_refusals) == ("p", 1)


async def test_a_hint_while_it_asks_is_not_lost(nats_url: str, only_hints: None) -> None:
    class Full(AcceptsOnly):
        """Has a free slot as soon as it has refused."""

        async def handle(self, incoming: object) -> None:
            one.prefill_line.hint()
            await super().handle(incoming)  # type: ignore[arg-type]

    async with fleet(nats_url) as one:
        await one.add("p", "prefill", NO_SLOT, NO_SLOT, kind=Full)
        assert (await one.prefill_line.ask(wish())).num_refusals == 2


async def test_it_gives_up_at_once_where_all_would_be_too_late(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        several = [await one.add(f"p{n}", "prefill", *[NO_TIME] * 10, kind=AcceptsOnly) for n in range(3)]
        holders: set[str] = set()
        with pytest.raises(TooLate, match="all 3 prefill instances"):
            await one.prefill_line.ask(wish(holders=holders))
        assert [len(prefill.requests) for prefill in several] == [1, 1, 1]
        assert holders == set()


async def test_one_that_only_has_no_slot_may_still_be_in_time(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        late = await one.add("p1", "prefill", *[NO_TIME] * 10_000, kind=AcceptsOnly)
        await one.add("p2", "prefill", *[NO_SLOT] * 5, kind=AcceptsOnly)
        assert (await one.prefill_line.ask(wish())).instance.id == "p2"
        assert late.requests


async def test_a_request_that_nobody_would_begin_in_time_is_refused_at_once(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        several = [await one.add(f"p{n}", "prefill", *[NO_TIME] * 10) for n in range(2)]
        await one.add("d", "decode")
        one.set_objective(ttft_s=20.0)
        with pytest.raises(Overloaded, match="first token within 20 s") as caught:
            await one.generate(PROMPT)
        assert caught.value.retry_after_s
        assert [len(prefill.requests) for prefill in several] == [1, 1]
        traffic = one.group.traffic()
        assert (traffic.num_arrived, traffic.num_shed, traffic.num_done, traffic.open) == (1, 1, 0, 0)


async def test_instances_are_told_when_the_first_token_is_due(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d", "decode")
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        one.set_objective(ttft_s=20.0)
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        assert await one.generate(PROMPT, priority="batch") == expected(PROMPT, 8)
        without, interactive, batch = prefill.requests
        assert isinstance(interactive, PrefillRequest)
        assert interactive.first_token_by is not None
        assert interactive.first_token_by - interactive.arrived_at == pytest.approx((1 - SLACK) * 20.0, abs=1e-3)
        assert {one.first_token_by for one in (without, batch) if isinstance(one, PrefillRequest)} == {None}


async def test_who_has_the_prefix_is_asked_first_unless_it_has_much_more_to_do(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p1", "prefill", kind=AcceptsOnly)
        await one.add("p2", "prefill", kind=AcceptsOnly)
        with one.streams.open("a") as first, one.streams.open("b") as second:
            first.holders.add("p2")
            assert (await one.prefill_line.ask(wish())).instance.id == "p1"
            assert (await one.prefill_line.ask(wish(matched={"p2": 0.25}))).instance.id == "p1"
            assert (await one.prefill_line.ask(wish(matched={"p2": 1.0}))).instance.id == "p2"
            second.holders.add("p2")
            with one.streams.open("c") as third:
                third.holders.add("p2")
                assert (await one.prefill_line.ask(wish(matched={"p2": 1.0}))).instance.id == "p1"


async def test_a_prompt_goes_where_one_that_began_alike_went(nats_url: str) -> None:
    prefix = list(range(64))
    async with fleet(nats_url) as one:
        several = [await one.add(f"p{n}", "prefill") for n in range(4)]
        decodes = [await one.add(f"d{n}", "decode") for n in range(4)]
        for number in range(6):
            await one.generate([*prefix, number])
        for instances in (several, decodes):
            assert sorted(len(instance.requests) for instance in instances) == [0, 0, 0, 6]


async def test_an_instance_that_refuses_holds_what_it_held_before_and_no_more(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p1", "prefill", NO_SLOT, NO_TIME, kind=AcceptsOnly)
        await one.add("p2", "prefill", NO_SLOT, NO_TIME, kind=AcceptsOnly)
        holders = {"p1"}
        with pytest.raises(TooLate):
            await one.prefill_line.ask(wish(holders=holders))
        assert holders == {"p1"}


@pytest.mark.parametrize("has_begun", [False, True])
async def test_it_is_left_once_there_is_nobody_here_but_elsewhere(nats_url: str, has_begun: bool) -> None:
    there = False
    async with fleet(nats_url, instance_wait_s=60.0) as one:
        leaving = await join(one, wish(has_begun=has_begun, elsewhere=lambda: there))
        prefill = await one.add("p", "prefill", NO_SLOT, kind=AcceptsOnly)
        await eventually(lambda: prefill.requests)
        assert (await leaving).instance.id == "p"
        one.instances.clear()
        leaving = await join(one, wish(has_begun=has_begun, elsewhere=lambda: there))
        there = True
        with pytest.raises(NobodyHere):
            await leaving


@pytest.mark.parametrize("has_begun", [False, True])
async def test_one_whom_nobody_suits_keeps_nobody_waiting(nats_url: str, has_begun: bool) -> None:
    async with fleet(nats_url, instance_wait_s=60.0) as one:
        prefill = await one.add("p", "prefill", kind=AcceptsOnly)
        picky = wish(1, within_s=20, has_begun=has_begun, suits=lambda instance: instance.id == "q")
        waiting = await join(one, picky)
        assert (await one.prefill_line.ask(wish(2))).instance.id == "p"
        assert numbers(prefill) == [2]
        await one.add("q", "prefill", kind=AcceptsOnly)
        assert (await waiting).instance.id == "q"


async def test_one_whom_nobody_suits_is_refused_though_others_are_served(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.2) as one:
        await one.add("p", "prefill", kind=AcceptsOnly)
        picky = await join(one, wish(1, suits=lambda instance: False))
        while not picky.done():
            await one.prefill_line.ask(wish(2))
        with pytest.raises(NoInstance):
            await picky


async def test_newcomers_are_refused_where_nobody_comes_and_streams_that_have_begun_wait(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.2) as one:
        with pytest.raises(NoInstance):
            await one.prefill_line.ask(wish(within_s=30))
        begun = await join(one, wish(has_begun=True))
        with pytest.raises(NoInstance):
            await one.prefill_line.ask(wish(1, within_s=30))
        await one.add("p", "prefill", kind=AcceptsOnly)
        assert (await begun).instance.id == "p"


@pytest.mark.parametrize("behind", ["new", None])
async def test_a_head_that_its_own_weights_refuse_keeps_nobody_from_others(nats_url: str, behind: str | None) -> None:
    async with fleet(nats_url) as one:
        old = await one.add("p1", "prefill", *FULL, kind=AcceptsOnly, fingerprint="old")
        head = await join(one, wish(1, has_begun=True, fingerprint="old"))
        await eventually(lambda: old.requests)
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        async with asyncio.timeout(10.0):
            assert (await one.prefill_line.ask(wish(2, fingerprint=behind))).instance.id == "p2"
        assert not head.done()
        old.answers.clear()
        assert (await head).instance.id == "p1"


async def test_among_unlike_weights_each_line_keeps_its_order(nats_url: str) -> None:
    """Also from when they were one line, and to when they are one again."""
    async with fleet(nats_url) as one:
        old = await one.add("p1", "prefill", *FULL, kind=AcceptsOnly, fingerprint="old")
        waiting = [
            await join(one, wish(number, has_begun=True, fingerprint="old", within_s=30 + number))
            for number in range(4)
        ]
        new = await one.add("p2", "prefill", *FULL, kind=AcceptsOnly, fingerprint="new")
        waiting += [await join(one, wish(number, within_s=30 + number)) for number in (14, 15)]
        waiting += [await join(one, wish(number, fingerprint="new", within_s=30 + number)) for number in (25, 24)]
        await eventually(lambda: {14, 24} <= set(numbers(new)))
        assert {0} <= set(numbers(old)) <= {0, 14}
        del one.instances["p1"]
        new.record = new.record.model_copy(update={"fingerprint": "old"})
        await eventually(lambda: numbers(new)[-1] == 0)
        num_rejected = len(new.requests)
        await eventually(lambda: set(numbers(new)[num_rejected:]) == {0})
        num_rejected = len(new.requests)
        new.answers.clear()
        await asyncio.gather(*waiting[:6])
        assert list(dict.fromkeys(numbers(new)[num_rejected - 1 :])) == [0, 1, 2, 3, 14, 15]
        assert not any(task.done() for task in waiting[6:])
        new.record = new.record.model_copy(update={"fingerprint": "new"})
        await asyncio.gather(*waiting)
        assert numbers(new)[-2:] == [24, 25]


async def test_a_hint_wakes_every_head(nats_url: str, only_hints: None) -> None:
    """Also one that asks while another has begun to ask since."""

    class AnswersWhenLet(AcceptsOnly):
        async def handle(self, incoming: Incoming) -> None:
            self.requests.append(incoming.parse(PrefillRequest))
            if len(self.requests) == 1:
                await let.wait()
            await incoming.respond(AskReply(accepted=len(self.requests) > 1, reason="no_slot"))

    let = asyncio.Event()
    async with fleet(nats_url, answer_timeout_s=30.0) as one:
        slow = await one.add("p1", "prefill", kind=AnswersWhenLet, fingerprint="old")
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        head = await join(one, wish(1, fingerprint="old"))
        await eventually(lambda: slow.requests)
        one.prefill_line.hint()
        assert (await one.prefill_line.ask(wish(2, fingerprint="new"))).instance.id == "p2"
        let.set()
        assert (await head).num_refusals == 1


async def test_a_stream_whose_weights_others_have_replaced_is_told_to_begin_anew(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=0.3) as one:
        await one.add("p", "prefill", *FULL, kind=AcceptsOnly, fingerprint="new")
        saturating = await join(one, wish(1, has_begun=True, fingerprint="new", within_s=20))
        before = time.monotonic()
        with pytest.raises(InstanceFailed, match="served no more: send it again"):
            await one.prefill_line.ask(wish(has_begun=True, fingerprint="old", within_s=30))
        assert time.monotonic() - before > 0.3
        with pytest.raises(NobodyHere):
            await one.prefill_line.ask(wish(has_begun=True, fingerprint="old", elsewhere=lambda: True))
        assert not saturating.done()
        saturating.cancel()
        await asyncio.wait([saturating])


async def test_the_time_in_which_nobody_at_all_was_there_does_not_count(nats_url: str) -> None:
    async with fleet(nats_url, instance_wait_s=1.0) as one:
        begun = await join(one, wish(has_begun=True, fingerprint="old"))
        with pytest.raises(NoInstance):  # which takes as long as others would have had
            await one.prefill_line.ask(wish(1))
        await one.add("p2", "prefill", kind=AcceptsOnly, fingerprint="new")
        one.prefill_line.hint()
        assert (await one.prefill_line.ask(wish(2))).instance.id == "p2"
        assert not begun.done()
        await one.add("p1", "prefill", kind=AcceptsOnly, fingerprint="old")
        one.prefill_line.hint()
        assert (await begun).instance.id == "p1"
