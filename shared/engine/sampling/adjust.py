"""Changes to the logits before temperature: logit bias, `min_tokens`, penalties, in the order vLLM has them."""

import torch

from shared.engine.sequence import Sequence


def adjust(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Change logits [N, V] in place, for the sequences whose parameters ask for it."""
    for row, sequence in zip(logits, sequences, strict=True):
        sampling = sequence.sampling
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            row[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype)
        if sequence.output_index < sampling.min_tokens and sampling.stop_token_ids:
            row[torch.tensor(sampling.stop_token_ids)] = float("-inf")
        if sampling.repetition_penalty != 1.0:
            _penalise_repetition(row, sequence)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _penalise_generated(row, sequence)


def _penalise_repetition(row: torch.Tensor, sequence: Sequence) -> None:
    """Divide positive and multiply negative logits of all tokens seen so far (CTRL, arXiv 1909.05858)."""
    ids = torch.tensor(sequence.token_ids)
    seen = row[ids]
    penalty = sequence.sampling.repetition_penalty
    row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_generated(row: torch.Tensor, sequence: Sequence) -> None:
    """Subtract presence_penalty from generated tokens, and frequency_penalty per occurrence (as OpenAI's API)."""
    generated = sequence.token_ids[sequence.num_prompt_tokens :]
    if not generated:
        return
    ids, counts = torch.unique(torch.tensor(generated), return_counts=True)
    row[ids] -= sequence.sampling.presence_penalty + sequence.sampling.frequency_penalty * counts
