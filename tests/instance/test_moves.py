"""Requests whose instances change their roles: over real roles, assignments, engines and pools."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shared.messages.serving import AskReply
from tests.engine.models import Served, prompt_of
from tests.instance.world import PATIENT_S, Instance, Message, Request, World, world

PROMPT = prompt_of(40, seed=5)
NUM_TOKENS = 30
ROOMY = {"prefill_blocks": 40, "decode_blocks": 40}


@pytest.fixture(scope="module")
def answer(small_blocks: Served) -> list[int]:
    return small_blocks.greedy(PROMPT, NUM_TOKENS)


@asynccontextmanager
async def two_decoders(served: Served, **wishes: object) -> AsyncIterator[World]:
    """A world in which the third instance decodes, too."""
    async with world(served, **{**ROOMY, **wishes}) as one:
        one.third.order("decode")
        await one.settle()
        yield one


async def until(one: World, reached: Callable[[], object]) -> None:
    """All go on, step by step, but no transfer does."""
    for _ in range(1000):
        if reached():
            return
        await one.ask()
        one.start()
        for instance in one.instances:
            instance.step()
        await one.settle()
    raise AssertionError("it is never reached")


async def is_fetched(one: World, request: Request) -> Instance:
    """The decode instance that is fetching its KV now."""
    await until(one, lambda: one.fetcher.waiting)
    [there] = [instance for instance in one.instances if any(held.transfer for held in instance.held)]
    assert request.where == "decodes"
    return there


async def decodes(one: World, request: Request, num_tokens: int) -> Instance:
    """The decode instance that has generated so many tokens of it."""
    there = await is_fetched(one, request)
    await one.transfer()
    await until(one, lambda: len(request.tokens) >= num_tokens)
    return there


def test_what_decodes_goes_on_elsewhere_and_nothing_is_computed_twice(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer)
            before = await decodes(one, request, 12)
            before.order("prefill")
            await one.settle()
            assert (request.where, request.num_moves) == ("waits for decode", 1)
            assert before.plays("prefill"), "its KV waits, and keeps nobody from the next role"
            assert [held.request_id for held in before.assignment.left[0]._held.values()] == ["r0.0"]
            after = await decodes(one, request, 20)
            assert after is not before
            await one.finish()
            assert (request.where, request.attempt, request.num_moves) == ("done", 0, 1)
            assert len(request.cached) == 1, "one prefill"
            assert one.prefill.engine.work.decode_rows + one.decode.engine.work.decode_rows + (
                one.third.engine.work.decode_rows
            ) in (NUM_TOKENS - 1, NUM_TOKENS), "at most one step came too late"

    asyncio.run(live())


def test_what_is_being_fetched_moves_once_it_is_here(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer)
            before = await is_fetched(one, request)
            before.order("prefill")
            await one.settle()
            assert (before.assignment.state, request.where) == ("changing", "decodes")
            await one.transfer()
            await until(one, lambda: before.plays("prefill"))
            await one.finish()
            assert (request.attempt, request.num_moves) == (0, 1)

    asyncio.run(live())


def test_a_transfer_that_breaks_meanwhile_is_no_move(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer)
            before = await is_fetched(one, request)
            before.order("prefill")
            await one.settle()
            await one.a_transfer_breaks()
            await until(one, lambda: before.plays("prefill"))
            assert (request.attempt, request.num_moves) == (1, 0)
            assert not one.holder.leases

    asyncio.run(live())


def test_who_waits_for_room_moves(small_blocks: Served, answer: list[int]) -> None:
    """The room that it waits for comes free just then, and is for others: what it has is all that it needs."""

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=40, decode_blocks=14) as one:

            def is_short() -> bool:
                held = one.decode.held
                return any(one.ending for one in held) and any(one.reservation.waits for one in held)

            old = one.arrive(PROMPT, answer)
            await decodes(one, old, 2)
            young = one.arrive(PROMPT[::-1], small_blocks.greedy(PROMPT[::-1], NUM_TOKENS))
            await decodes(one, young, 2)
            for _ in range(1000):
                if is_short():
                    break
                if not one.is_busy:
                    one.decode.step()
                await asyncio.sleep(0)
            await one.decode.role.move_all()
            await one.settle()
            assert (old.attempt, old.num_moves) == (0, 1)
            assert young.attempt == 1, "it was given up for the other"
            assert not one.decode.engine.has_work
            one.decode.order("decode")

    asyncio.run(live())


def test_the_same_instance_goes_on_in_a_new_role_and_shares_what_it_has(
    small_blocks: Served, answer: list[int]
) -> None:
    """It fetches from itself what is in no full block that others may share."""
    block_bytes = small_blocks.loaded.layout.block_bytes

    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, answer)
            await decodes(one, request, 12)
            one.decode.order("decode")
            await one.settle()
            assert one.decode.plays("decode")
            num_bytes = one.fetcher.num_bytes
            await is_fetched(one, request)
            assert [one.decode.assignment.left[0].slots_leased, one.decode.role.slots_used] == [1, 1]
            await one.transfer()
            num_blocks = small_blocks.loaded.layout.num_blocks(len(request.prompt) + len(request.tokens) - 1)
            [held] = one.decode.role._held.values()
            assert len(PROMPT) // 8 <= held.reservation.allocation.num_matched < num_blocks
            num_fetched = num_blocks - held.reservation.allocation.num_matched
            assert one.fetcher.num_bytes - num_bytes == num_fetched * block_bytes
            await until(one, lambda: len(request.tokens) > 20)
            assert one.decode.assignment.left[0].slots_leased == 1, "the acknowledgement is on its way"
            await one.finish()
            assert (request.where, request.attempt, request.num_moves) == ("done", 0, 1)

    asyncio.run(live())


def test_a_prefill_instance_decodes_what_it_has_prefilled_and_goes_back(
    small_blocks: Served, answer: list[int]
) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            one.decode.order(None)
            await one.settle()
            request = one.arrive(PROMPT, answer)
            await until(one, lambda: request.where == "waits for decode")
            one.prefill.order("decode")
            await one.settle()
            assert await decodes(one, request, 5) is one.prefill
            assert len(one.prefill.assignment.left) == 1
            one.prefill.order("prefill")
            one.decode.order("decode")
            await one.settle()
            assert len(one.prefill.assignment.left) == 2
            await one.finish()
            assert (request.where, request.attempt, request.num_moves) == ("done", 0, 1)

    asyncio.run(live())


def test_a_prefill_instance_ends_its_prompts_and_leaves_their_kv_behind(
    small_blocks: Served, answer: list[int]
) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, answer[:2])
            await one.ask()
            one.prefill.step()
            one.prefill.order("decode", PATIENT_S)
            await one.settle()
            assert one.prefill.assignment.state == "changing"
            while one.prefill.engine.has_work:
                one.prefill.step()
            await one.settle()
            assert one.prefill.plays("decode")
            assert request.where == "waits for decode"
            [left] = one.prefill.assignment.left
            assert (left.slots_used, left.slots_leased) == (1, 1)

    asyncio.run(live())


def test_a_prompt_that_decode_computes_is_done_again_elsewhere(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer, is_local=True)
            await one.ask()
            [before] = [instance for instance in one.instances if instance.held]
            assert before.plays("decode")
            before.order("prefill")
            await one.settle()
            assert before.plays("prefill")
            assert (request.attempt, request.num_moves) == (1, 0)
            request.is_local = False
            other = one.arrive(PROMPT, answer, is_local=True)
            await until(one, lambda: len(other.tokens) > 3)
            assert other.source is None
            next(instance for instance in other.holders).order("decode")
            await one.finish()
            assert (other.attempt, other.num_moves, other.cached) == (0, 1, [0])

    asyncio.run(live())


def test_who_has_no_token_yet_does_not_move(small_blocks: Served) -> None:
    """Not even with a prompt all of which is computed but the token that gives the first one."""
    prompt = prompt_of(2 * 20 + 1)

    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(prompt, small_blocks.greedy(prompt, 3), is_local=True)
            await one.ask()
            [before] = request.holders
            before.step()
            before.order("prefill")
            await one.settle()
            assert (request.attempt, request.num_moves) == (1, 0)
            assert not one.holder.leases

    asyncio.run(live())


@pytest.mark.parametrize("num_turns", range(8))
def test_a_cancel_at_any_moment_of_a_move(small_blocks: Served, answer: list[int], num_turns: int) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer)
            before = await decodes(one, request, 12)
            before.order("prefill")
            for _ in range(num_turns):
                await asyncio.sleep(0)
            one.cancel(request)
            one.fetcher.acknowledge()
            await one.settle()
            assert not any(instance.held for instance in one.instances)
            assert not before.assignment.left

    asyncio.run(live())


@pytest.mark.parametrize("num_turns", range(8))
def test_a_bus_that_comes_back_at_any_moment_of_a_move(small_blocks: Served, answer: list[int], num_turns: int) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks) as one:
            request = one.arrive(PROMPT, answer)
            before = await decodes(one, request, 12)
            before.order("prefill")
            for _ in range(num_turns):
                await asyncio.sleep(0)
            before.bus_came_back()
            await one.settle()
            assert not one.holder.leases
            assert (request.where, request.attempt) == ("waits for prefill", 1)
            await one.finish()
            assert request.where == "done"

    asyncio.run(live())


def test_who_ended_in_a_role_before_is_told_when_the_bus_comes_back(small_blocks: Served, answer: list[int]) -> None:
    """Its last token may be lost: the gateway is to ask again rather than to wait."""

    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, answer)
            await one.finish()
            one.decode.order("prefill")
            one.decode.order("prefill")
            await one.settle()
            assert one.decode.plays("prefill")
            request.where, request.tokens = "decodes", request.tokens[:-1]
            request.holders.add(one.decode)
            one.decode.bus_came_back()
            await one.settle()
            assert (request.where, request.attempt) == ("waits for prefill", 1)

    asyncio.run(live())


def test_the_end_of_the_process_moves_what_decodes(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with two_decoders(small_blocks, drain_timeout_s=1e-6, stall_timeout_s=PATIENT_S) as one:
            one.decode.order(None)
            await one.settle()
            request = one.arrive(PROMPT, answer)
            assert await decodes(one, request, 12) is one.third
            one.drain_third()
            await until(one, lambda: request.num_moves == 1)
            await one.finish()
            assert (request.where, request.attempt) == ("done", 0)

    asyncio.run(live())


def test_a_canary_is_taken_though_all_slots_are(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_slots=1, decode_slots=1, **ROOMY) as one:
            first = one.arrive(PROMPT, answer)
            await decodes(one, first, 2)
            one.fetcher.acknowledge()
            second = one.arrive(PROMPT[::-1], small_blocks.greedy(PROMPT[::-1], 2))
            await until(one, lambda: second.where == "waits for decode")
            canary = one.arrive(PROMPT[:6], small_blocks.greedy(PROMPT[:6], 3), is_canary=True)
            await one.ask()
            assert (canary.where, one.prefill.role.slots_used) == ("is prefilled", 2)
            await until(one, lambda: canary.where == "decodes")
            assert second.where == "waits for decode"
            assert one.decode.role.slots_used == 2
            await one.transfer()
            await until(one, lambda: canary.where == "done")

    asyncio.run(live())


def test_a_canary_needs_blocks_like_all_and_waits_for_no_hint(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=5, decode_blocks=40) as one:
            one.arrive(PROMPT, answer)
            await one.ask()
            canary = one.arrive(PROMPT[:6], small_blocks.greedy(PROMPT[:6], 3), is_canary=True)
            await one.ask()
            assert canary.where == "waits for prefill"
            assert not len(one.prefill.role.rejections)
            assert one.prefill.role.num_rejected == 1

    asyncio.run(live())


def test_who_was_refused_first_is_told_first_and_one_for_each_slot(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_slots=1, **ROOMY) as one:
            requests = [one.arrive(prompt_of(10, seed), []) for seed in range(4)]
            for request, gateway_id in zip(requests, ("taken", "b", "a", "b"), strict=True):
                request.gateway_id = gateway_id
                request.expected = small_blocks.greedy(request.prompt, 1)
            for _ in range(2):
                await one.ask()
            assert one.prefill.role.num_rejected == 6
            for told in (["b"], ["b", "a"], ["b", "a"]):
                one.cancel(next(request for request in requests if request.where == "is prefilled"))
                await one.settle()
                assert one.hints == [("prefill", "prefill", gateway_id) for gateway_id in told]
                taken = next(request for request in requests if request.where == "waits for prefill")
                assert await one._ask(taken, "prefill")

    asyncio.run(live())


def test_what_the_role_before_lets_go_of_is_room_for_the_next(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=40, decode_blocks=9) as one:
            first = one.arrive(PROMPT, answer)
            await decodes(one, first, 25)
            one.decode.order("prefill")
            one.prefill.order("decode")
            await one.settle()
            second = one.arrive(PROMPT[::-1], small_blocks.greedy(PROMPT[::-1], 1))
            assert not await one._ask(second, "prefill")
            assert one.decode.assignment.left[0].slots_leased == 1
            assert one.hints == []
            one.cancel(first)
            await one.settle()
            assert one.hints == [("decode", "prefill", second.gateway_id)]

    asyncio.run(live())


def asks(one: World, request: Request) -> AskReply:
    """The prefill instance's answer."""
    question = one.question(request, "prefill", one.prefill)
    reason = one.prefill.role._consider(question, Message.trace_context)
    return AskReply(accepted=reason is None, reason=reason, capacity=one.prefill.role.capacity())


def test_a_prompt_is_accepted_while_the_next_step_has_tokens_left(small_blocks: Served) -> None:
    """Steps of 20 tokens: the second prompt of 50 is accepted while the first computes its last step."""

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=100, decode_blocks=9, prefill_slots=20) as one:
            first, second, third = (one.arrive(prompt_of(50, seed), [0]) for seed in range(3))
            assert asks(one, first).capacity.tokens_free == 0
            assert asks(one, second).reason == "busy"
            for num_left in (30, 10):
                one.prefill.step()
                assert asks(one, second).reason == "busy", f"{num_left} tokens are left"
            one.prefill.engine.on_step = lambda plan: answers.append(asks(one, second))
            answers: list[AskReply] = []
            one.prefill.step()
            assert [answer.accepted for answer in answers] == [True], "while its last step is under way"
            assert asks(one, third).reason == "busy"
            for request in one.requests:
                request.holders.add(one.prefill)
                one.cancel(request)

    asyncio.run(live())


def test_a_gateway_is_told_when_the_step_begins_after_which_there_is_room(small_blocks: Served) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=100, decode_blocks=9, prefill_slots=20) as one:
            first = one.arrive(prompt_of(50, seed=0), small_blocks.greedy(prompt_of(50, seed=0), 1))
            second = one.arrive(prompt_of(50, seed=1), small_blocks.greedy(prompt_of(50, seed=1), 1))
            await one.ask()
            assert (first.where, second.where) == ("is prefilled", "waits for prefill")
            for told in ([], [], [("prefill", "prefill", second.gateway_id)]):
                one.prefill.step()
                assert len(one.prefill.role.rejections) == 1 - len(told), "the step is not over"
                await one.settle()
                assert one.hints == told

    asyncio.run(live())


def test_short_prompts_are_accepted_together(small_blocks: Served) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=100, decode_blocks=9, prefill_slots=20) as one:
            requests = [one.arrive(prompt_of(6, seed), [0]) for seed in range(5)]
            reasons = [asks(one, request).reason for request in requests]
            assert reasons == [None, None, None, "busy", "busy"], "three fit into a step"
            for request in requests:
                request.holders.add(one.prefill)
                one.cancel(request)

    asyncio.run(live())


def test_a_decode_instance_computes_no_more_prompts_than_fit_into_its_next_step(small_blocks: Served) -> None:
    """Steps of 20 tokens: one prompt of 50 begins there, and another goes to the prefill instance."""

    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            prompts = [prompt_of(50, seed) for seed in range(2)]
            first, second = (one.arrive(prompt, small_blocks.greedy(prompt, 3), is_local=True) for prompt in prompts)
            await one.ask()
            assert (first.holders, second.holders) == ({one.decode}, {one.prefill})
            assert one.refusals["decode", "decode", second.gateway_id] == 1
            await until(one, lambda: len(first.tokens) == 1)
            assert one.decode.role.capacity().tokens_free == 20 - 1, "a decode takes one token of each step"

    asyncio.run(live())


def test_a_reserved_prompt_counts_until_its_work_comes(small_blocks: Served) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=100, decode_blocks=9) as one:
            first, second = (
                one.arrive(prompt_of(50, seed), small_blocks.greedy(prompt_of(50, seed), 1)) for seed in range(2)
            )
            one.start_apart_every = 1
            await one.ask()
            assert (one.prefill.role.slots_used, len(one.prefill.reserved)) == (1, 1)
            assert (first.where, second.where) == ("is prefilled", "waits for prefill")
            one.starts_are_lost()
            assert (one.prefill.role.slots_used, first.where) == (0, "waits for prefill")
            await one.finish()
            assert (first.where, second.where) == ("done", "done")

    asyncio.run(live())


def test_what_is_cached_is_not_counted_before_the_token_ids_are_known(small_blocks: Served) -> None:
    """A prompt of 136 tokens, two blocks of 64 of which are known by their prefix keys, in a pool of 18 blocks."""
    prompt = prompt_of(136, seed=3)

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=18, decode_blocks=40) as one:
            first = one.arrive(prompt, small_blocks.greedy(prompt, 1))
            await one.finish()
            one.start_apart_every = 1
            second = one.arrive(prompt, first.expected)
            await one.ask()
            [reserved] = one.prefill.reserved
            assert reserved.num_uncomputed_tokens == 136 - 128
            before = one.prefill.cache.num_query_tokens
            await one.finish()
            assert (second.where, second.cached) == ("done", [128])
            assert one.prefill.cache.num_query_tokens == before + 136, "it is counted once"

    asyncio.run(live())


def test_prefix_keys_that_promise_too_much_fail_the_request_without_counting(small_blocks: Served) -> None:
    """Another prompt comes with the keys of the first, whose blocks are in use."""
    prompt, other = prompt_of(136, seed=3), prompt_of(136, seed=4)

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=24, decode_blocks=40) as one:
            first = one.arrive(prompt, small_blocks.greedy(prompt, 2))
            await until(one, lambda: first.where == "decodes")
            forged = one.arrive(other, small_blocks.greedy(other, 1))
            question = one.question(forged, "prefill", one.prefill)
            keys = one.question(first, "prefill", one.prefill).prefix_keys
            asked = question.model_copy(update={"start": None, "prefix_keys": keys})
            assert (await one.prefill.role.take(Message(asked))).accepted  # type: ignore[arg-type]
            forged.where = "is prefilled"
            forged.holders.add(one.prefill)
            assert question.start is not None
            assert one.prefill.role.start(question.start)
            await one.settle()
            assert (forged.attempt, forged.where) == (1, "waits for prefill")

    asyncio.run(live())


def test_work_that_was_not_asked_for_fails_the_request(small_blocks: Served) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, small_blocks.greedy(PROMPT, 1))
            one.start_apart_every = 1
            await one.ask()
            [(_, _, start)] = one.starts
            one.starts = []
            assert one.prefill.role.start(start.model_copy(update={"token_ids": PROMPT[1:]}))
            await one.settle()
            assert (request.attempt, one.prefill.role.slots_used) == (1, 0)

    asyncio.run(live())


def test_a_dead_gateways_requests_are_released_and_no_others(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, prefill_blocks=100, decode_blocks=9, max_step_tokens=200) as one:
            one.start_apart_every = 2
            requests = [
                one.arrive(prompt_of(20, seed), small_blocks.greedy(prompt_of(20, seed), 1)) for seed in range(3)
            ]
            await one.ask()
            assert (len(one.prefill.held), len(one.prefill.reserved)) == (1, 2)
            one.gateway_is_gone(requests[0].gateway_id)
            await one.settle()
            assert [held.gateway_id for held in one.prefill.held] == [requests[1].gateway_id]
            assert one.prefill.reserved == []

    asyncio.run(live())


def test_an_exception_in_a_transfer_ends_that_request_only(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            first, second = (one.arrive(PROMPT, answer), one.arrive(PROMPT[::-1], small_blocks.greedy(PROMPT[::-1], 3)))
            await until(one, lambda: len(one.fetcher.waiting) == 2)
            one.fetcher.waiting[0].set_exception(RuntimeError("as the test wants it"))
            await one.settle()
            assert sorted((first.attempt, second.attempt)) == [0, 1]

    asyncio.run(live())


def test_a_transfer_that_breaks_names_the_source_of_the_kv(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, answer)
            await is_fetched(one, request)
            await one.a_transfer_breaks()
            assert [(one.kv_source_id, one.counts) for one in one.failed] == [("prefill", True)]

    asyncio.run(live())


def test_a_lease_of_another_size_is_invalid(small_blocks: Served, answer: list[int]) -> None:
    async def live() -> None:
        async with world(small_blocks, **ROOMY) as one:
            request = one.arrive(PROMPT, answer)
            await until(one, lambda: request.lease is not None)
            assert request.lease is not None
            question = one.question(request, "decode", one.decode)
            forged = question.model_copy(update={"lease": request.lease.model_copy(update={"num_bytes": 10**12})})
            reply = await one.decode.role.take(Message(forged))  # type: ignore[arg-type]
            assert (reply.accepted, reply.reason) == (False, "invalid")

    asyncio.run(live())
