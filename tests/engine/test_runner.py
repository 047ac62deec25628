import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shared.engine.engine import Engine
from shared.engine.runner import EngineRunner
from shared.engine.sequence import FailedSequence, NewToken, Sequence
from shared.errors import ContextTooLong, InvalidRequest
from shared.sampling import SamplingParams

from .models import VOCAB_SIZE, Served, ids, prompt_of, sequence_of

LONG = SamplingParams(max_tokens=2000, temperature=0.0)
SHORT = SamplingParams(max_tokens=8, temperature=0.0)


async def wait_until(predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not predicate():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


class Owner:
    """What a service is to a runner: it gets tokens and crashes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[NewToken]] = {}
        self.crashes: list[Exception] = []
        self.failed: list[FailedSequence] = []
        self.thread = threading.current_thread()
        self.runner = EngineRunner(engine, self.on_tokens, self.crashes.append, on_failed=self.failed.extend)

    def on_tokens(self, tokens: list[NewToken]) -> None:
        assert threading.current_thread() is self.thread
        for token in tokens:
            self.tokens.setdefault(token.request_id, []).append(token)

    def sequence(self, request_id: str, sampling: SamplingParams, first_block: int = 0) -> Sequence:
        return sequence_of(self.engine, prompt_of(20), sampling, request_id=request_id, first_block=first_block)

    def finished(self, request_id: str) -> bool:
        return bool(self.tokens.get(request_id)) and self.tokens[request_id][-1].last


@asynccontextmanager
async def running(served: Served) -> AsyncIterator[Owner]:
    owner = Owner(served.engine())
    async with owner.runner:
        yield owner
    assert not any(thread.name == "engine" for thread in threading.enumerate())


async def test_tokens_come_in_the_event_loop(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        owner.runner.add(owner.sequence("a", SHORT))
        await wait_until(lambda: owner.finished("a"))
        assert ids(owner.tokens["a"]) == llama_served.greedy(prompt_of(20), 8)


async def test_a_sequence_without_finite_logits_is_reported_and_the_others_go_on(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        damaged = sequence_of(owner.engine, prompt_of(40), SHORT, request_id="damaged", num_computed_tokens=32)
        owner.runner.add(damaged)  # nobody has computed the KV of its first 32 tokens, and the pool is full of NaN
        owner.runner.add(owner.sequence("a", SHORT, first_block=200))
        await wait_until(lambda: owner.finished("a") and bool(owner.failed))
        assert [failed.request_id for failed in owner.failed] == ["damaged"]
        assert "damaged" not in owner.tokens
        assert ids(owner.tokens["a"]) == llama_served.greedy(prompt_of(20), 8)
        assert owner.crashes == []


async def test_wakes_up_from_idleness_and_uses_no_time_in_it(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        for round_number in range(3):
            used = time.process_time()
            await asyncio.sleep(0.2)
            assert time.process_time() - used < 0.1
            owner.runner.add(owner.sequence(str(round_number), SHORT))
            await wait_until(lambda number=round_number: owner.finished(str(number)))  # type: ignore[misc]


async def test_after_remove_no_more_tokens_come(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        owner.runner.add(owner.sequence("a", LONG))
        owner.runner.add(owner.sequence("b", LONG, first_block=200))
        await wait_until(lambda: all(len(owner.tokens.get(name, [])) > 3 for name in ("a", "b")))
        await owner.runner.remove(["a", "unknown"])
        count_a, count_b = len(owner.tokens["a"]), len(owner.tokens["b"])
        await wait_until(lambda: len(owner.tokens["b"]) > count_b + 5)
        assert len(owner.tokens["a"]) == count_a


async def test_remove_before_the_first_step(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        owner.runner.add(owner.sequence("a", LONG))
        await owner.runner.remove(["a"])
        assert not owner.engine.has_work


async def test_leaving_in_the_middle_of_work(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        owner.runner.add(owner.sequence("a", LONG))
        await wait_until(lambda: "a" in owner.tokens)
    assert not owner.finished("a")
    await owner.runner.remove(["a"])


async def test_a_crash_is_told_once_and_everything_resolves(
    llama_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(llama_served) as owner:
        owner.runner.add(owner.sequence("a", LONG))
        await wait_until(lambda: "a" in owner.tokens)

        def fail() -> list[NewToken]:
            raise RuntimeError("no more memory")

        monkeypatch.setattr(owner.engine, "step", fail)
        await asyncio.gather(*(owner.runner.remove(["b"]) for _ in range(3)))
        await wait_until(lambda: bool(owner.crashes))
        await owner.runner.remove(["a"])
        owner.runner.add(owner.sequence("c", SHORT))
    assert [str(error) for error in owner.crashes] == ["no more memory"]


async def test_what_would_fail_in_a_step_is_refused(llama_served: Served) -> None:
    async with running(llama_served) as owner:
        for sampling in (
            SamplingParams(max_tokens=8, logit_bias={VOCAB_SIZE: 1.0}),
            SamplingParams(max_tokens=8, stop_token_ids=(-1,)),
        ):
            with pytest.raises(InvalidRequest):
                owner.runner.add(owner.sequence("a", sampling))
        with pytest.raises(ContextTooLong):
            owner.runner.add(owner.sequence("a", SamplingParams(max_tokens=5000)))
        sequence = owner.sequence("a", SHORT)
        sequence.token_ids[3] = VOCAB_SIZE
        with pytest.raises(InvalidRequest):
            owner.runner.add(sequence)
