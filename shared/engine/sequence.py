"""A request as the engine sees it, and what comes out of a step."""

from dataclasses import dataclass, field

import torch

from shared.sampling import FinishReason, SamplingParams


def num_kv_tokens(num_token_ids: int, num_prompt_tokens: int, max_tokens: int, num_to_generate: int) -> int:
    """How many tokens of KV a sequence comes to need: reserve `layout.num_blocks()` of this.

    The last token that is generated never gets KV here, hence the 1.
    """
    num_left = max_tokens - (num_token_ids - num_prompt_tokens)
    return num_token_ids + min(num_left, num_to_generate) - 1


@dataclass(slots=True)
class Sequence:
    """A request that the engine works on. The engine appends to `token_ids` and advances the counts; the rest is fixed.

    Once it has left the engine, `num_computed_tokens` says exactly whose KV is there.

    Args:
        request_id: unique among the sequences of an engine.
        token_ids: prompt and generated tokens. It may hold generated tokens from the start: when a failed attempt is
            taken over, and when decode goes on after prefill elsewhere.
        num_prompt_tokens: how many of them are the client's prompt.
        blocks: pool blocks for all the KV this sequence will need here (`num_kv_tokens`), reserved by the caller, who
            also frees them once the sequence has left the engine.
        sampling: how tokens are chosen, and when the request ends.
        num_to_generate: how many tokens to generate here; 1 in the prefill role.
        num_computed_tokens: the leading tokens whose KV is in `blocks`.
        num_shared_blocks: the leading blocks that sequences before this one have filled, or are to fill. The block of
            the last token is never among them.
        num_cached_tokens: the leading tokens that were computed for others, as far as this one has come.
        num_planned_tokens: the leading tokens whose KV is there once the step under way is over; 0 until a step
            computes tokens of this prompt. Other threads may read it.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    blocks: list[int]
    sampling: SamplingParams
    num_to_generate: int
    num_computed_tokens: int = 0
    num_generated: int = 0
    num_shared_blocks: int = 0
    num_cached_tokens: int = 0
    num_planned_tokens: int = 0
    block_table: torch.Tensor = field(init=False, repr=False)
    """`blocks` as int32 [num_blocks]."""

    def __post_init__(self) -> None:
        assert 0 < self.num_prompt_tokens <= len(self.token_ids), "a sequence has a prompt"
        assert 0 <= self.num_computed_tokens < len(self.token_ids), "the last token has no KV yet"
        assert self.num_to_generate > 0, "a sequence generates something"
        assert self.output_index < self.sampling.max_tokens, "the request has all its tokens"
        self.block_table = torch.tensor(self.blocks, dtype=torch.int32)

    @property
    def output_index(self) -> int:
        """Index of the next generated token, over all attempts."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_kv_tokens(self) -> int:
        """How many tokens of KV this sequence comes to need here."""
        num_left = self.num_to_generate - self.num_generated
        return num_kv_tokens(len(self.token_ids), self.num_prompt_tokens, self.sampling.max_tokens, num_left)


@dataclass(slots=True, frozen=True)
class NewToken:
    """A token that a step generated.

    Args:
        index: the request's generated tokens counted from 0, over all attempts.
        logprob: under the unmodified distribution (natural logarithm); None unless the request asks for it.
        top: (token id, logprob) of the likeliest tokens, likeliest first.
        last: the sequence has left the engine, finished or not.
    """

    request_id: str
    index: int
    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    finish_reason: FinishReason | None
    last: bool


@dataclass(slots=True, frozen=True)
class FailedSequence:
    """A sequence that has left the engine without another token, because the model computed nothing to choose one by.

    Args:
        message: what happened, for the client.
    """

    request_id: str
    message: str
