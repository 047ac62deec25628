"""What the next step computes. Pure: it looks at the sequences and changes none."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class PrefillChunk:
    """The next `num_tokens` tokens of a sequence that has more than one without KV, or is still at its prompt."""

    sequence: Sequence
    num_tokens: int


@dataclass(slots=True, frozen=True)
class StepPlan:
    """One step: one token of each of `decodes`, and `prefills`."""

    decodes: list[Sequence]
    prefills: list[PrefillChunk]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)


def schedule(sequences: Iterable[Sequence], max_step_tokens: int, block_size: int) -> StepPlan:
    """Every decode, then prefill chunks in order of arrival while the step has at most `max_step_tokens` tokens.

    Decodes are never held back: a step with more of them than `max_step_tokens` has them all, and no prefill. A
    prefill whose next block is also one that an earlier sequence is still to fill waits for it. The earliest never
    waits, so that no step is empty.

    Args:
        sequences: in order of arrival. None of them stands before a shared block that is filled.
        max_step_tokens: tokens a step should have at most.
        block_size: tokens in a block.
    """
    assert max_step_tokens > 0, "a step has room for a token"
    decodes: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in sequences:
        assert sequence.num_uncomputed_tokens > 0, f"{sequence.request_id} has nothing to compute"
        # The last token of a prompt is prefill even where it stands alone, so that its logits do not depend on the cut.
        is_generated = sequence.num_computed_tokens >= sequence.num_prompt_tokens
        (decodes if sequence.num_uncomputed_tokens == 1 and is_generated else prompts).append(sequence)
    prefills: list[PrefillChunk] = []
    budget = max_step_tokens - len(decodes)
    to_be_filled: set[int] = set()
    for sequence in prompts:
        if budget <= 0:
            break
        next_block = sequence.num_computed_tokens // block_size
        is_shared = next_block < sequence.num_shared_blocks
        waits = is_shared and sequence.blocks[next_block] in to_be_filled
        to_be_filled.update(sequence.blocks[next_block:])
        if not waits:
            chunk = PrefillChunk(sequence, min(sequence.num_uncomputed_tokens, budget))
            budget -= chunk.num_tokens
            prefills.append(chunk)
    plan = StepPlan(decodes, prefills)
    assert 0 < plan.num_tokens <= max(max_step_tokens, len(decodes)), "a step has work, and not too much"
    return plan
