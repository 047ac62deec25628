"""How a token is chosen from logits.

The draw depends on a request's seed and the token's index alone, on neither the batch nor the instance.
"""

from dataclasses import dataclass

import torch

from shared.engine.native.library import Library
from shared.engine.sampling.adjust import adjust
from shared.engine.sampling.noise import likeliest_with_noise
from shared.engine.sampling.truncate import truncate
from shared.engine.sequence import Sequence

LOWEST = -1e30
"""Stands in for logits that are no number; far below any that is, and far above what arithmetic would make infinite."""

GREEDY_BELOW = 1e-5
"""Temperatures below this take the likeliest token; dividing by them would overflow."""


@dataclass(slots=True, frozen=True)
class Choice:
    """The chosen token; if the request wants them, its log probability and the likeliest tokens with theirs."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


def sample(logits: torch.Tensor, sequences: list[Sequence], library: Library | None = None) -> list[Choice | None]:
    """Choose the next token of N sequences; None for a sequence none of whose logits is finite.

    Args:
        logits: fp32 [N, V]; they are overwritten. A model that overflows gives NaN: such tokens are never chosen.
        sequences: their sequences, still without the new token.
        library: the native kernels, if there are any; they choose the same.
    """
    if not sequences:
        return []
    unusable = rows_without_numbers(logits)
    logits.nan_to_num_(nan=LOWEST, posinf=-LOWEST, neginf=LOWEST)
    with_logprobs = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    logprobs = logits[with_logprobs].log_softmax(-1) if with_logprobs else None
    adjust(logits, sequences)
    tokens = logits.argmax(-1)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        part = logits if len(drawn) == len(sequences) else logits[drawn]
        tokens[drawn] = draw(part, [sequences[row] for row in drawn], library)
    choices = [Choice(token, None, []) for token in tokens.tolist()]
    if logprobs is not None:
        num_top = max(sequences[row].sampling.logprobs or 0 for row in with_logprobs)
        top_values, top_ids = (part.tolist() for part in logprobs.topk(min(num_top, logits.shape[1])))
        for index, row in enumerate(with_logprobs):
            token_id = choices[row].token_id
            top = list(zip(top_ids[index], top_values[index], strict=True))[: sequences[row].sampling.logprobs]
            choices[row] = Choice(token_id, logprobs[index, token_id].item(), top)
    return [None if row in unusable else choice for row, choice in enumerate(choices)]


def rows_without_numbers(logits: torch.Tensor) -> set[int]:
    """Return the rows of logits [N, V] in which no logit is finite: there is nothing to choose a token by."""
    # The highest logit is no finite number where one of the row is NaN: all others are right without a second look.
    suspects = (~logits.amax(-1).isfinite()).nonzero().flatten().tolist()
    return {row for row in suspects if not logits[row].isfinite().any()}


def draw(logits: torch.Tensor, sequences: list[Sequence], library: Library | None = None) -> torch.Tensor:
    """Draw a token [N] per row of logits [N, V]: the likeliest after Gumbel noise has been added.

    That is a draw from the softmax (Gumbel-max; Maddison et al., arXiv 1411.0030). Unlike a draw by the cumulative
    distribution it does not go to another token when logits differ in their last digits, as they do between batches.
    """
    sampling = [sequence.sampling for sequence in sequences]
    logits = logits / torch.tensor([[params.temperature] for params in sampling], dtype=logits.dtype)
    truncate(logits, sampling)
    draws = [(sequence.sampling.seed, sequence.output_index) for sequence in sequences]
    return likeliest_with_noise(logits, draws, library)
