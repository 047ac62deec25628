"""The mock engine. No time passes: what it would have slept is written down."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.engine.mock import (
    DEFAULT_TIMES,
    MAX_POOL_TOKENS,
    MockEngine,
    MockModel,
    MockParcel,
    MockStaging,
    MockTimes,
    WrongKV,
    digests,
    draw,
    mock_model,
    mock_num_blocks,
)
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import Allocation, PrefixCache
from shared.engine.runner import EngineRunner
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import NewToken, Sequence
from shared.errors import ModelRefused, SettingsInvalid
from shared.messages.records import Work
from shared.sampling import LEAST_LOGPROB, SamplingParams

from .models import ids, run

DEMO = Path(__file__).parents[2] / "models" / "demo"
VOCAB_SIZE = 300
BLOCK = 16
NUM_BLOCKS = 200
TIMES = MockTimes(0.005, 0.0001, 0.02, 0.0003, 0.001, 0.000005)
MODEL = MockModel.of("tiny", vocab_size=VOCAB_SIZE, max_position_embeddings=2048, block_size=BLOCK, times=TIMES)
SAMPLED = SamplingParams(max_tokens=12, seed=77)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(37 * position + 11 * seed + position * position) % VOCAB_SIZE for position in range(length)]


class Mock(MockEngine):
    """A mock engine that remembers what it was to sleep."""

    def __init__(self, max_step_tokens: int = 512) -> None:
        self.slept: list[float] = []
        pool = KVPool(MODEL.layout, NUM_BLOCKS)
        pool.data.fill_(float("nan"))  # what is read unwritten is noticed
        super().__init__(MODEL, pool, max_step_tokens, self.slept.append)


def sequence_of(
    prompt: list[int],
    sampling: SamplingParams = SAMPLED,
    *,
    request_id: str = "r",
    generated: tuple[int, ...] = (),
    num_to_generate: int = 2**20,
    num_computed_tokens: int = 0,
    blocks: list[int] | None = None,
) -> Sequence:
    """A sequence in the first blocks of the pool, if no others are given."""
    return Sequence(
        request_id,
        [*prompt, *generated],
        len(prompt),
        blocks or list(range(MODEL.layout.num_blocks(len(prompt) + sampling.max_tokens))),
        sampling,
        num_to_generate,
        num_computed_tokens,
    )


def alone(prompt: list[int], sampling: SamplingParams = SAMPLED) -> list[int]:
    engine = Mock()
    engine.add(sequence_of(prompt, sampling))
    return ids(run(engine)["r"])


def prefilled(engine: Mock, prompt: list[int], sampling: SamplingParams = SAMPLED) -> Sequence:
    """A sequence after its prefill; nothing but its KV is left in the engine."""
    sequence = sequence_of(prompt, sampling, num_to_generate=1)
    engine.add(sequence)
    run(engine)
    return sequence


def hand_over(source: Mock, sequence: Sequence, target: Mock, blocks: list[int]) -> Sequence:
    """What the roles do: its bytes into these blocks of another pool, and there a sequence that goes on."""
    num_bytes = MODEL.layout.num_blocks(sequence.num_computed_tokens) * MODEL.layout.block_bytes
    there = b"".join(MockStaging(source.pool, TIMES).export(sequence.blocks, num_bytes).views)
    for view in MockStaging(target.pool, TIMES).receive(blocks, num_bytes).views:
        view[:], there = there[: len(view)], there[len(view) :]
    prompt, generated = (
        sequence.token_ids[: sequence.num_prompt_tokens],
        sequence.token_ids[sequence.num_prompt_tokens :],
    )
    return sequence_of(
        prompt,
        sequence.sampling,
        generated=tuple(generated),
        num_computed_tokens=sequence.num_computed_tokens,
        blocks=blocks,
    )


def test_the_model_says_that_it_is_a_mock() -> None:
    assert MODEL.fingerprint.startswith("mock-")
    assert MODEL.layout.block_bytes == 8 * BLOCK
    assert (MODEL.library, MODEL.weight_bytes) == (None, 0)


def test_only_equal_models_have_equal_fingerprints() -> None:
    def fingerprint(
        name: str = "m", vocab_size: int = 10, positions: int = 20, block_size: int = 16, times: MockTimes = TIMES
    ) -> str:
        return MockModel.of(
            name, vocab_size=vocab_size, max_position_embeddings=positions, block_size=block_size, times=times
        ).fingerprint

    others = [fingerprint("n"), fingerprint(vocab_size=11), fingerprint(positions=21), fingerprint(block_size=32)]
    assert len({fingerprint(), *others}) == 5
    assert fingerprint() == fingerprint("/some/folder/m") == fingerprint(times=MockTimes.parse("step=1s"))


def test_a_model_needs_no_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    model = mock_model("step=1s", 32, name=str(tmp_path))
    assert (model.vocab_size, model.max_position_embeddings, model.layout.block_size) == (4096, 4096, 32)
    assert model.times.step_base_s == 1.0
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelRefused):
        mock_model("", 32, name=str(tmp_path))


def test_a_pool_has_no_more_tokens_than_an_accelerator() -> None:
    assert mock_num_blocks(MODEL.layout, 2**30) == MAX_POOL_TOKENS // BLOCK
    assert mock_num_blocks(MODEL.layout, 2**20) == 2**20 // (8 * BLOCK)


def test_times_have_units() -> None:
    assert MockTimes.parse("step=0.5us/row+7ms, prefill=3s") == MockTimes(3.0, 0.0, 0.007, 5e-7, 0.001, 5e-6)
    assert MockTimes.parse("prefill=0.1ms/token").prefill_base_s == 0.0
    assert MockTimes.parse("") == MockTimes.parse(DEFAULT_TIMES) == TIMES


@pytest.mark.parametrize(
    "text",
    [
        *("step", "step=", "steps=1ms", "step=1", "step=-1ms", "step=1ms+", "step=1e9s", "step=1ms,step=2ms"),
        *("step=1ms/token", "step=1ms+2ms", "step=1ms/row/row", "prefill=1ms/row", "1ms+2ms/row"),
    ],
)
def test_times_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(SettingsInvalid, match="PDSERVE_MOCK_TIMES"):
        MockTimes.parse(text)


def test_how_long_a_step_takes() -> None:
    prompt, decode = sequence_of(prompt_of(100)), sequence_of(prompt_of(5))
    assert TIMES.step_s(StepPlan([], [PrefillChunk(prompt, 40), PrefillChunk(prompt, 60)])) == pytest.approx(0.015)
    assert TIMES.step_s(StepPlan([decode] * 10, [])) == pytest.approx(0.023)
    assert TIMES.step_s(StepPlan([decode] * 10, [PrefillChunk(prompt, 100)])) == pytest.approx(0.038)


def test_the_engine_sleeps_as_long_as_each_step_takes() -> None:
    engine = Mock(max_step_tokens=64)
    engine.add(sequence_of(prompt_of(100), SamplingParams(max_tokens=3)))
    run(engine)
    assert engine.slept == pytest.approx([0.0114, 0.0086, 0.0203, 0.0203])


def test_work_is_counted() -> None:
    engine = Mock(max_step_tokens=64)
    engine.add(sequence_of(prompt_of(100), SamplingParams(max_tokens=3)))
    run(engine)
    done = engine.work.snapshot()
    assert done.model_copy(update={"prefill_s": 0.0, "decode_s": 0.0, "decode_rows_s": 0.0}) == Work(
        prefill_tokens=100, prefill_pairs=5050, num_prefilled=1, decode_steps=2, decode_rows=2, decode_rows_squared=2
    )


def test_tokens_are_of_the_vocabulary_and_come_to_an_end() -> None:
    engine = Mock()
    engine.add(sequence_of(prompt_of(30)))
    tokens = run(engine)["r"]
    assert all(0 <= token.token_id < VOCAB_SIZE for token in tokens)
    assert [token.index for token in tokens] == list(range(12))
    assert [token.finish_reason for token in tokens] == [None] * 11 + ["length"]
    assert len(set(ids(tokens))) > 6


def test_other_seeds_and_prompts_other_text() -> None:
    other_seed = SAMPLED.model_copy(update={"seed": 78})
    assert alone(prompt_of(30)) != alone(prompt_of(30), other_seed)
    assert alone(prompt_of(30)) != alone(prompt_of(30, seed=1))


def test_without_temperature_the_seed_is_of_no_matter() -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    assert alone(prompt_of(30), greedy) == alone(prompt_of(30), greedy.model_copy(update={"seed": 5}))


def test_same_text_in_a_batch_and_in_chunks() -> None:
    engine = Mock(max_step_tokens=20)
    for number in range(6):
        blocks = list(range(10 * number, 10 * number + 10))[::-1]
        engine.add(sequence_of(prompt_of(40 + number), request_id=str(number), blocks=blocks))
    assert ids(run(engine)["3"]) == alone(prompt_of(43))


@pytest.mark.parametrize("num_generated", [1, 5, 11])
def test_same_text_when_taken_over(num_generated: int) -> None:
    whole = alone(prompt_of(30))
    engine = Mock()
    engine.add(sequence_of(prompt_of(30), generated=tuple(whole[:num_generated])))
    assert ids(run(engine)["r"]) == whole[num_generated:]


def test_never_a_stop_token() -> None:
    whole = alone(prompt_of(30))
    stops = SAMPLED.model_copy(update={"stop_token_ids": tuple({whole[0], (whole[0] + 1) % VOCAB_SIZE, whole[5]})})
    engine = Mock()
    engine.add(sequence_of(prompt_of(30), stops))
    tokens = run(engine)["r"]
    assert not set(ids(tokens)) & set(stops.stop_token_ids)
    assert tokens[-1].finish_reason == "length"


def test_where_all_tokens_are_stop_tokens_it_is_one_of_them() -> None:
    assert draw(SamplingParams(max_tokens=1, stop_token_ids=(0, 1, 2)), 5, 6, vocab_size=3) in (0, 1, 2)


def test_logprobs_for_who_asks() -> None:
    engine = Mock()
    engine.add(sequence_of(prompt_of(30), SAMPLED.model_copy(update={"logprobs": 2})))
    token = run(engine)["r"][0]
    assert token.logprob == 0.0
    assert token.top == [(token.token_id, 0.0), ((token.token_id + 1) % VOCAB_SIZE, LEAST_LOGPROB)]


def test_a_digest_is_of_all_tokens_up_to_its_own() -> None:
    text = prompt_of(40)
    for position in range(40):
        other = [*text[:position], (text[position] + 1) % VOCAB_SIZE, *text[position + 1 :]]
        same = [one == two for one, two in zip(digests(text), digests(other), strict=True)]
        assert same == [True] * position + [False] * (40 - position)
    assert list(digests(text[25:], digests(text)[24])) == list(digests(text)[25:])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 47, 48])
def test_same_text_after_a_hand_over(length: int) -> None:
    source, target = Mock(), Mock()
    sequence = prefilled(source, prompt_of(length))
    target.add(hand_over(source, sequence, target, [7, 8, 3, 20, 21]))
    assert [sequence.token_ids[-1], *ids(run(target)["r"])] == alone(prompt_of(length))


def test_same_text_after_it_has_moved_between_decodes() -> None:
    first, second, third = Mock(), Mock(), Mock()
    going = hand_over(first, prefilled(first, prompt_of(40)), second, [9, 8, 7, 6])
    second.add(going)
    for _ in range(5):
        second.step()
    second.remove("r")
    third.add(hand_over(second, going, third, [50, 40, 30, 20]))
    assert [*going.token_ids[40:], *ids(run(third)["r"])] == alone(prompt_of(40))


def swapped(engine: Mock, blocks: list[int]) -> None:
    data = engine.pool.data
    data[blocks[0]], data[blocks[1]] = data[blocks[1]].clone(), data[blocks[0]].clone()


def missing_first(engine: Mock, blocks: list[int]) -> None:
    engine.pool.data[blocks[0]] = 0.0


def missing_last_token(engine: Mock, blocks: list[int]) -> None:
    for view in (engine.pool.keys[0], engine.pool.values[0]):
        view[blocks[2], (40 - 1) % BLOCK] = 0.0


def of_another_text(engine: Mock, blocks: list[int]) -> None:
    """One that ends like ours: only what was before its last block differs."""
    other = Mock()
    prefilled(other, [(prompt_of(40)[0] + 1) % VOCAB_SIZE, *prompt_of(40)[1:]])
    engine.pool.data[blocks[2]] = other.pool.data[2]


@pytest.mark.parametrize("harm", [swapped, missing_first, missing_last_token, of_another_text])
def test_a_wrong_hand_over_is_noticed(harm: Callable[[Mock, list[int]], None]) -> None:
    source, target = Mock(), Mock()
    blocks = [7, 8, 3, 20]
    target.add(hand_over(source, prefilled(source, prompt_of(40)), target, blocks))
    harm(target, blocks)
    with pytest.raises(WrongKV, match="mock engine: the KV of r is wrong at position"):
        target.step()


def test_what_says_that_there_is_more_kv_than_there_is_is_noticed() -> None:
    source, target = Mock(), Mock()
    sequence = prefilled(source, prompt_of(40))
    too_far = sequence_of(
        prompt_of(40), generated=(*sequence.token_ids[40:], 5), num_computed_tokens=41, blocks=[7, 8, 3, 20]
    )
    hand_over(source, sequence, target, too_far.blocks)
    target.add(too_far)
    with pytest.raises(WrongKV, match="at position 40 of 41, in block 3: token"):
        target.step()


def test_two_that_write_to_one_block_are_noticed() -> None:
    engine = Mock()
    engine.add(sequence_of(prompt_of(40), request_id="a", blocks=[0, 1, 2, 3]))
    engine.add(sequence_of(prompt_of(40, seed=1), request_id="b", blocks=[4, 5, 2, 6]))
    with pytest.raises(WrongKV, match="the KV of a is wrong at position 39"):
        run(engine)


def test_kv_that_changes_long_before_the_last_token_is_noticed_in_time() -> None:
    engine = Mock()
    engine.add(sequence_of(prompt_of(40), SamplingParams(max_tokens=1000)))
    engine.step()
    engine.pool.data[0] = 0.0
    with pytest.raises(WrongKV):
        run(engine)


class Shared:
    """A mock engine and a prefix cache, as the prefill role has them."""

    def __init__(self) -> None:
        self.engine = Mock(max_step_tokens=20)
        self.cache = PrefixCache(NUM_BLOCKS, BLOCK)
        self.held: dict[str, tuple[Sequence, Allocation]] = {}
        self.tokens: dict[str, list[NewToken]] = {}

    def add(self, request_id: str, prompt: list[int]) -> Sequence:
        match = self.cache.match(prompt, pending=True)
        allocation = self.cache.take(match, MODEL.layout.num_blocks(len(prompt) + SAMPLED.max_tokens))
        assert allocation is not None
        self.cache.name(allocation, prompt)
        sequence = sequence_of(prompt, request_id=request_id, blocks=list(allocation.blocks))
        sequence.num_shared_blocks = allocation.num_matched
        self.held[request_id] = (sequence, allocation)
        self.engine.add(sequence)
        return sequence

    def run(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            for token in self.engine.step():
                self.tokens.setdefault(token.request_id, []).append(token)
                if token.last:
                    self.release(token.request_id)
        return {request_id: ids(tokens) for request_id, tokens in self.tokens.items()}

    def release(self, request_id: str) -> None:
        sequence, allocation = self.held.pop(request_id)
        self.cache.release(allocation, sequence.token_ids[: sequence.num_computed_tokens])


def test_shared_blocks_are_followed_and_change_no_text() -> None:
    prompts = {str(number): [*prompt_of(70), *prompt_of(3 + 7 * number, seed=number)] for number in range(6)}
    shared = Shared()
    sequences = [shared.add(request_id, prompt) for request_id, prompt in prompts.items()]
    assert shared.run() == {request_id: alone(prompt) for request_id, prompt in prompts.items()}
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 64, 64, 64, 64, 64]
    again = shared.add("again", prompts["5"])
    assert shared.run()["again"] == alone(prompts["5"])
    assert again.num_cached_tokens == (len(prompts["5"]) - 1) // BLOCK * BLOCK


def test_a_prefix_that_is_not_the_same_is_noticed() -> None:
    shared = Shared()
    shared.add("0", prompt_of(70))
    shared.run()
    wrong = shared.add("1", prompt_of(70))
    wrong.token_ids[5] += 1
    with pytest.raises(WrongKV, match="at position 5 "):
        shared.run()


def test_nothing_is_kept_of_who_has_left() -> None:
    engine = Mock()
    engine.add(sequence_of(prompt_of(20), request_id="a", blocks=[0, 1, 2]))
    engine.add(sequence_of(prompt_of(20), request_id="b", blocks=[3, 4, 5]))
    engine.step()
    assert engine.remove("a")
    assert not engine.remove("a")
    assert run(engine).keys() == {"b"}
    assert engine._known == {}


async def test_it_runs_in_the_engines_thread() -> None:
    last: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tokens: list[NewToken] = []

    def on_tokens(new: list[NewToken]) -> None:
        tokens.extend(new)
        if new[-1].last:
            last.set_result(None)

    async with EngineRunner(Mock(), on_tokens, last.set_exception) as runner:
        runner.add(sequence_of(prompt_of(20)))
        await last
    assert ids(tokens) == alone(prompt_of(20))


async def test_transfer_takes_its_time_where_kv_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    engine = Mock()
    staging = MockStaging(engine.pool, TIMES)
    monkeypatch.setattr("shared.engine.mock.asyncio", SimpleNamespace(sleep=sleep))
    parcel = staging.export([3, 4, 9], 3 * MODEL.layout.block_bytes)
    assert isinstance(parcel, MockParcel)
    assert sum(map(len, parcel.views)) == 3 * MODEL.layout.block_bytes
    await parcel.settle()
    await staging.export([], 0).settle()
    await staging.receive([3], MODEL.layout.block_bytes).settle()
    assert slept == pytest.approx([0.001 + 48 * 0.000005, 0.0])
