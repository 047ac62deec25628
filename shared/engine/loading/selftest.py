"""Does the packed, paged computation give the model's own logits? Asked of every model before it serves anyone."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from shared.engine.attention import PagedAttention
from shared.engine.batch import build_batch
from shared.engine.model import paged_logits
from shared.engine.pool import KVPool
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import Sequence
from shared.errors import ModelRefused
from shared.kv.layout import KVLayout
from shared.sampling import SamplingParams

TOLERANCE = {"float32": 2e-3, "bfloat16": 8e-2, "float16": 2e-2, "int8": 8e-2}
"""Largest difference of two logits, as a part of their spread: rounding stays well below, a wrong mask does not.

Activations that are rounded to 8 bits may come out on the other side, so 8-bit weights differ more than their type."""
NUM_TOKENS = (7, 21)
LONGEST = 300
"""The second request is made longer, up to this, to be longer than the model's sliding window."""
CHUNK = 10
NUM_DECODES = (2, 1)
"""How many tokens at the end of each are computed as decodes."""


@dataclass(slots=True, frozen=True)
class Expected:
    """Token ids of the test requests, and the model's own logits [T, V] at each of their positions."""

    token_ids: list[list[int]]
    logits: list[torch.Tensor]


@torch.inference_mode()
def own_logits(model: PreTrainedModel, vocab_size: int, window: int | None, longest: int) -> Expected:
    """Compute the test requests, up to `longest` tokens, one by one with the attention that the model came with."""
    short, long = NUM_TOKENS
    if window is not None and window + short <= LONGEST:
        long = max(long, window + short)
    long = min(long, longest)
    token_ids = [[(7 + 31 * i + 5 * length) % vocab_size for i in range(length)] for length in (short, long)]
    logits = [
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
        for ids in token_ids
    ]
    return Expected(token_ids, logits)


@torch.inference_mode()
def check_logits(
    name: str,
    model: PreTrainedModel,
    attention: PagedAttention,
    layout: KVLayout,
    expected: Expected,
    allowed: float,
) -> float:
    """Compute them packed: prompts and chunks side by side, a decode beside the rest of a prompt, then decodes alone.

    Returns:
        The largest difference found, as a part of the spread of the logits.

    Raises:
        ModelRefused: it is more than `allowed`.
    """
    known = [ids[:-number] for ids, number in zip(expected.token_ids, NUM_DECODES, strict=True)]
    short, long = (_sequence(f"selftest-{i}", ids) for i, ids in enumerate(known))
    num_blocks = [layout.num_blocks(len(ids)) for ids in expected.token_ids]
    pool = KVPool(layout, sum(num_blocks), model.device)
    pool.data.fill_(float("nan"))  # what is read unwritten is noticed
    # Blocks out of order, so that a mix-up of blocks is noticed.
    _reserve(short, list(range(num_blocks[0])))
    _reserve(long, list(range(num_blocks[0], sum(num_blocks)))[::-1])
    steps = [
        StepPlan([], [PrefillChunk(short, len(short.token_ids)), PrefillChunk(long, CHUNK)]),
        StepPlan([short], [PrefillChunk(long, len(long.token_ids) - CHUNK)]),
        StepPlan([short, long], []),
    ]
    worst = 0.0
    for step in steps:
        batch = build_batch(step, layout.block_size, pool.data.dtype)
        logits = paged_logits(model, attention, pool, batch)
        for span in batch.spans:
            span.sequence.num_computed_tokens = span.last
        for sequence, row in zip(batch.sampled, logits, strict=True):
            which, length = 0 if sequence is short else 1, len(sequence.token_ids)
            worst = max(worst, _difference(row, expected.logits[which][length - 1]))
            sequence.token_ids += expected.token_ids[which][length : length + 1]
    if not worst <= allowed:
        raise ModelRefused(
            f"model {name!r} ({model.config.model_type}) cannot be served: requests computed together "
            f"give other logits than one alone (difference {worst:.2g} of their spread, {allowed:.2g} allowed)"
        )
    return worst


def logits_difference(one: Expected, other: Expected) -> float:
    """The largest difference of two models' logits on the test requests, as a part of their spread."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max(_difference(row, own) for ours, owns in pairs for row, own in zip(owns, ours, strict=True))


def _difference(row: torch.Tensor, own: torch.Tensor) -> float:
    difference = float((row - own).abs().max() / (own.max() - own.min()).clamp_min(1e-6))
    return difference if difference >= 0 else float("inf")  # what is not a number is no small difference


def _sequence(request_id: str, token_ids: list[int]) -> Sequence:
    return Sequence(request_id, token_ids, 1, [], SamplingParams(max_tokens=len(token_ids) + 1), num_to_generate=1)


def _reserve(sequence: Sequence, blocks: list[int]) -> None:
    sequence.blocks = blocks
    sequence.block_table = torch.tensor(blocks, dtype=torch.int32)
