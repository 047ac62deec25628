"""Of every family, in fp32 and greedy: tokens and logits are those of transformers' `generate`, however computed."""

import pytest

from shared.engine.sequence import NewToken
from shared.sampling import SamplingParams
from tests.engine.models import run, sequence_of
from tests.families.conftest import LENGTHS, NUM_TOKENS, NUM_TOP, Case
from tests.families.worker import Prefilled, Worker

SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=NUM_TOP)


def prompts_of(case: Case) -> list[list[int]]:
    return [case.prompt(length) for length in LENGTHS]


@pytest.mark.parametrize("max_step_tokens", [512, 13], ids=["packed", "chunked"])
def test_together(case: Case, max_step_tokens: int) -> None:
    """In one packed row, and in chunks beside each other's decodes."""
    engine = case.served.engine(num_blocks=64, max_step_tokens=max_step_tokens)
    prompts = prompts_of(case)
    first_block = 0
    for prompt in prompts:
        sequence = sequence_of(engine, prompt, SAMPLING, request_id=str(len(prompt)), first_block=first_block)
        first_block += len(sequence.blocks)
        engine.add(sequence)
    tokens = run(engine)
    for prompt in prompts:
        case.check(prompt, tokens[str(len(prompt))])


@pytest.mark.parametrize("num_shared", [1, 4])
def test_prefix_cache_hit(case: Case, num_shared: int) -> None:
    """A request begins with blocks that another one filled."""
    engine = case.served.engine(num_blocks=64)
    earlier = case.prompt(LENGTHS[-1])
    engine.add(sequence_of(engine, earlier, SAMPLING, request_id="earlier"))
    tokens = run(engine)
    num_computed_tokens = num_shared * engine.pool.layout.block_size
    prompt = case.prompt(7, start=earlier[:num_computed_tokens])
    later = sequence_of(
        engine, prompt, SAMPLING, request_id="later", num_computed_tokens=num_computed_tokens, first_block=30
    )
    later.blocks[:num_shared] = range(num_shared)
    later.__post_init__()
    engine.add(later)
    tokens |= run(engine)
    case.check(earlier, tokens["earlier"])
    case.check(prompt, tokens["later"])


def test_prefill_in_one_process_and_decode_in_another(case: Case, workers: tuple[Worker, Worker]) -> None:
    """The second computes without the native kernels."""
    prefill, decode = workers
    prefill.ask("load", case.folder, True)
    decode.ask("load", case.folder, False)
    assert prefill.answer() == decode.answer() == case.served.loaded.fingerprint
    prompts = prompts_of(case)
    prefill.ask("prefill", prompts, SAMPLING)
    handed: list[Prefilled] = prefill.answer()
    decode.ask("decode", handed, SAMPLING)
    answers: list[list[NewToken]] = decode.answer()
    for prompt, tokens in zip(prompts, answers, strict=True):
        case.check(prompt, tokens)
