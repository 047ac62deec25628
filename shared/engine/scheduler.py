"""What the next step computes. Pure: it looks at the sequences and changes none."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class PrefillChunk:
    """The next `num_tokens` tokens of a sequence that has more than one without KV."""

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


def schedule(sequences: Iterable[Sequence], max_step_tokens: int) -> StepPlan:
    """Every decode, then prefill chunks in order of arrival while the step has at most `max_step_tokens` tokens.

    Decodes are never held back: a step with more of them than `max_step_tokens` has them all, and no prefill.

    Args:
        sequences: in order of arrival.
        max_step_tokens: tokens a step should have at most.
    """
    assert max_step_tokens > 0, "a step has room for a token"
    decodes: list[Sequence] = []
    waiting: list[Sequence] = []
    for sequence in sequences:
        assert sequence.num_uncomputed_tokens > 0, f"{sequence.request_id} has nothing to compute"
        (decodes if sequence.num_uncomputed_tokens == 1 else waiting).append(sequence)
    prefills: list[PrefillChunk] = []
    budget = max_step_tokens - len(decodes)
    for sequence in waiting:
        if budget <= 0:
            break
        chunk = PrefillChunk(sequence, min(sequence.num_uncomputed_tokens, budget))
        budget -= chunk.num_tokens
        prefills.append(chunk)
    plan = StepPlan(decodes, prefills)
    assert plan.num_tokens <= max(max_step_tokens, len(decodes))
    return plan
