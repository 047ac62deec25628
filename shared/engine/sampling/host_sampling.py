"""Sampling for logits anywhere: as little as possible is computed, and brought to the host in one read.

Requests that take the likeliest token as it is need nothing but its id. If any request of a step asks for more, the
logits of all come to the host and are sampled there, so that a request gets the same text on every device.
"""

import torch

from shared.engine.native.library import Library
from shared.engine.sampling.sampler import GREEDY_BELOW, LOWEST, Choice, rows_without_numbers, sample
from shared.engine.sequence import Sequence

NO_TOKEN = -1
"""What the native kernel gives for a row without a finite logit."""


def sample_on_host(
    logits: torch.Tensor, sequences: list[Sequence], library: Library | None = None
) -> list[Choice | None]:
    """As `sample`, for logits anywhere; it returns when the device has computed them."""
    if all(takes_likeliest(sequence) for sequence in sequences):
        return likeliest(logits, library)
    return sample(logits.cpu(), sequences, library)


def likeliest(logits: torch.Tensor, library: Library | None = None) -> list[Choice | None]:
    """Return what `sample` chooses for sequences that take the likeliest token. It may overwrite the logits, too."""
    if library is not None:
        logits = logits.contiguous()
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        library.likeliest(logits.data_ptr(), *logits.shape, tokens.data_ptr())
    else:
        highest, tokens = logits.max(-1)
        if not highest.isfinite().all():
            tokens = _likeliest_numbers(logits)
    return [None if token_id == NO_TOKEN else Choice(token_id, None, []) for token_id in tokens.tolist()]


def _likeliest_numbers(logits: torch.Tensor) -> torch.Tensor:
    """The token [N] that is the likeliest by those of the logits [N, V] that are numbers; they are overwritten."""
    unusable = list(rows_without_numbers(logits))
    tokens = logits.nan_to_num_(nan=LOWEST, posinf=-LOWEST, neginf=LOWEST).argmax(-1)
    tokens[unusable] = NO_TOKEN
    return tokens


def takes_likeliest(sequence: Sequence) -> bool:
    """Whether a sequence's next token is the likeliest by unchanged logits, and nobody asks how likely it is."""
    sampling = sequence.sampling
    held_back = sequence.output_index < sampling.min_tokens and sampling.stop_token_ids
    return (
        sampling.temperature < GREEDY_BELOW
        and sampling.logprobs is None
        and sampling.repetition_penalty == 1.0
        and not (sampling.logit_bias or held_back or sampling.presence_penalty or sampling.frequency_penalty)
    )
