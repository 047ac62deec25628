"""Requests that a decode instance gives back with their KV: the stream goes on at another, with no seam."""

import asyncio

import pytest

from shared.messages.serving import Moved, OutputToken, StepTokens
from tests.gateway.scripted import FULL, Fleet, Scripted, Work, expected, fleet
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]


class Moves(Scripted):
    """Leaves its role: it decodes until the request has `at` tokens, moves it, and accepts no more."""

    at = 4
    error = 0
    lasts_s = 60.0

    async def serve(self, request: Work) -> None:
        assert request.role == "decode"
        token_ids = await self.decode(request, up_to=self.at)
        self.change(state="changing")
        await self.move(request, len(token_ids) - 1 + self.error, self.lasts_s)


class MovesAtOnce(Moves):
    """Before it has decoded anything."""

    at = 0


class MovesLater(Moves):
    at = 6


class MovesTooMuch(Moves):
    error = 1


class MovesTooLittle(Moves):
    error = -1


class MovesForAMoment(Moves):
    lasts_s = 0.3


class Waits(Scripted):
    """Accepts, and decodes up to the index that it is let to."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.first, self.rest = asyncio.Event(), asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def serve(self, request: Work) -> None:
        self.tasks.append(asyncio.create_task(self.when_let(request)))

    async def when_let(self, request: Work) -> None:
        assert request.role == "decode"
        await self.first.wait()
        await self.decode(request, up_to=len(request.token_ids) - request.num_prompt_tokens + 1)
        await self.rest.wait()
        await self.decode(request)


async def moving_to(one: Fleet, *kinds: type[Scripted], **changes: object) -> list[Scripted]:
    """Decode instances `d0`, `d1` …, of which each is there only once the one before has the request."""
    first = await one.add("d0", "decode", kind=kinds[0])
    instances = [first]

    async def follow() -> None:
        for number, kind in enumerate(kinds[1:], 1):
            await eventually(lambda: instances[-1].requests)
            instances.append(await one.add(f"d{number}", "decode", kind=kind, **changes))

    one.following = asyncio.create_task(follow())  # type: ignore[attr-defined]
    return instances


def decoded(instance: Scripted) -> Work:
    """The one request that the instance has been asked for."""
    [request] = instance.requests
    assert request.role == "decode"
    return request


async def indices_and_tokens(one: Fleet, max_tokens: int = 8) -> list[tuple[int, int]]:
    tokens = await one.tokens(one.request(PROMPT, max_tokens, id="r"))
    return [(token.index, token.token_id) for token in tokens]


async def test_the_stream_goes_on_at_another_without_a_seam(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        instances = await moving_to(one, Moves, Scripted)
        assert await indices_and_tokens(one) == list(enumerate(expected(PROMPT, 8)))
        assert len(prefill.requests) == 1
        first, second = instances
        request = decoded(second)
        assert request.request_id == decoded(first).request_id
        assert request.token_ids == PROMPT + expected(PROMPT, 4)
        assert request.num_prompt_tokens == len(PROMPT)
        assert request.ask.age_s >= decoded(first).ask.age_s
        assert (request.lease.instance_id, request.lease.num_tokens) == ("d0", len(PROMPT) + 3)
        for each in (prefill, first):
            assert await each.all_cancelled() == [request.request_id]
        assert await second.all_cancelled() == []


async def test_it_moves_as_often_as_need_be(nats_url: str) -> None:
    async with fleet(nats_url, max_attempts=1) as one:
        prefill = await one.add("p", "prefill")
        instances = await moving_to(one, MovesAtOnce, Moves, MovesAtOnce, MovesLater, Scripted)
        assert await indices_and_tokens(one) == list(enumerate(expected(PROMPT, 8)))
        assert len(prefill.requests) == 1
        assert [decoded(each).lease.instance_id for each in instances] == ["p", "d0", "d1", "d2", "d3"]
        assert [len(decoded(each).token_ids) - len(PROMPT) for each in instances] == [1, 1, 4, 4, 6]
        for each in (prefill, *instances[:-1]):
            assert await each.all_cancelled() == ["r.0"]
        assert await instances[-1].all_cancelled() == []


async def test_the_source_is_told_to_let_go_at_the_first_token_of_the_next(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        instances = await moving_to(one, Moves, Waits)
        work = asyncio.create_task(indices_and_tokens(one))
        await eventually(lambda: len(instances) == 2 and instances[1].requests)
        source, target = instances
        assert isinstance(target, Waits)
        # What the source says after all is no sign of the next one.
        request = decoded(source)
        await source.decode(request, up_to=2)
        stray = OutputToken(request_id="stray", index=1, token_id=1)
        await source.tell("tokens", StepTokens(instance_id="d0", tokens=[stray]))
        await eventually(lambda: source.cancelled)
        assert await source.all_cancelled() == ["stray"]
        assert {name: one.router.num_open(name) for name in one.router.participants()} == {"d0": 1, "d1": 1}
        source.cancelled.clear()
        target.first.set()
        await eventually(lambda: source.cancelled == ["r.0"])
        assert not work.done()
        assert set(one.router.participants()) == {"d1"}
        target.rest.set()
        assert await work == list(enumerate(expected(PROMPT, 8)))


@pytest.mark.parametrize("kind", [MovesTooMuch, MovesTooLittle])
async def test_a_move_with_the_kv_of_other_tokens_is_taken_again(nats_url: str, kind: type[Scripted]) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        instances = await moving_to(one, kind, Scripted)
        assert await indices_and_tokens(one) == list(enumerate(expected(PROMPT, 8)))
        first, again = prefill.requests
        assert (first.token_ids, again.token_ids) == (PROMPT, PROMPT + expected(PROMPT, 4))
        assert decoded(instances[1]).lease.instance_id == "p"
        await eventually(lambda: instances[0].cancelled == ["r.0"])


async def test_a_source_that_refuses_the_request_holds_its_kv_all_the_same(nats_url: str) -> None:
    class Stays(Moves):
        """Is taken for a decode instance still."""

        async def move(self, request: Work, num_tokens: int, lasts_s: float = 60.0) -> None:
            self.change(state="ready")
            self.answers = [*FULL]
            await super().move(request, num_tokens, lasts_s)

    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        source = await one.add("d0", "decode", kind=Stays)
        work = asyncio.create_task(indices_and_tokens(one))
        await eventually(lambda: len(source.requests) > 1)
        assert one.router.num_open("d0") == 1
        await one.add("d1", "decode")
        assert await work == list(enumerate(expected(PROMPT, 8)))
        await eventually(lambda: source.cancelled == ["r.0"])


async def test_a_request_that_is_closed_while_it_moves_is_cancelled_at_its_source(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p", "prefill")
        source = await one.add("d0", "decode", kind=Moves)
        async with one.dispatcher.serving([one.request(PROMPT, id="r")]):
            await eventually(lambda: one.queues().decode.num_waiting == 1 and source.requests)
            assert one.router.num_open("d0") == 1
        await eventually(lambda: source.cancelled == ["r.0"])
        assert len(one.router) == 0


async def test_a_source_that_is_lost_before_anybody_has_its_kv_ends_the_attempt(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        prefill = await one.add("p", "prefill")
        instances = await moving_to(one, Moves, Waits)
        work = asyncio.create_task(indices_and_tokens(one))
        await eventually(lambda: len(instances) == 2 and instances[1].requests)
        target = instances[1]
        assert isinstance(target, Waits)
        one.watch.lose("d0", "is lost")
        await eventually(lambda: len(target.requests) == 2)
        assert target.cancelled == ["r.0"]
        target.first.set()
        target.rest.set()
        assert await work == list(enumerate(expected(PROMPT, 8)))
        assert [request.token_ids for request in prefill.requests] == [PROMPT, PROMPT + expected(PROMPT, 4)]


async def test_a_move_for_which_nobody_has_a_slot_in_time_is_taken_again_and_does_not_count(nats_url: str) -> None:
    async with fleet(nats_url, max_attempts=1) as one:
        prefill = await one.add("p", "prefill")
        await one.add("d0", "decode", kind=MovesForAMoment)
        work = asyncio.create_task(indices_and_tokens(one))
        await eventually(lambda: one.queues().prefill.num_waiting == 1 and prefill.requests)
        await one.add("d1", "decode")
        assert await work == list(enumerate(expected(PROMPT, 8)))
        assert len(prefill.requests) == 2


async def test_a_move_of_a_request_that_nobody_has_is_answered_with_a_cancel(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await one.add("d0", "decode")
        await one.add("p", "prefill")
        await one.generate(PROMPT)
        await decode.move(decoded(decode), len(PROMPT))
        await eventually(lambda: decode.cancelled == [decoded(decode).request_id])


async def test_a_move_that_comes_where_the_end_of_prefill_is_due_fails_the_attempt(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        decode = await one.add("d0", "decode")
        await one.add("p", "prefill")
        await one.generate(PROMPT)
        prefill = one.instances["p"]
        prefill.answers = [None]
        request = one.request(PROMPT, id="q")
        async with one.dispatcher.serving([request]):
            await eventually(lambda: len(prefill.requests) == 2)
            move = Moved(instance_id="p", request_id="q.0", lease=decoded(decode).lease)
            await prefill.tell("moved", move)
            await eventually(lambda: len(prefill.requests) == 3)
            assert [token.token_id for _, token in await request.output.read()][:1] == expected(PROMPT, 1)
