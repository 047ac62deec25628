"""Which tokens may be drawn at all: min-p, then top-k, then top-p, each after temperature, as vLLM has them.

All three come down to a lowest logit per row. Tokens with equal logits are kept or dropped together, so what is kept
does not depend on how a sort breaks ties.
"""

import torch

from shared.sampling import SamplingParams

FIRST_SORTED = 128
SORTED_GROWTH = 16
"""Top-p looks at so many of the likeliest tokens first, then at so many times more, in the end at the vocabulary."""


def truncate(logits: torch.Tensor, sampling: list[SamplingParams]) -> None:
    """Set the logits [N, V] of tokens that may not be drawn to -inf, in place.

    min-p (arXiv 2407.01082) keeps tokens of at least `min_p` times the highest probability; top-k the k likeliest;
    top-p (nucleus, arXiv 1904.09751) the smallest set of the likeliest whose share of what is left reaches `top_p`.
    """
    if any(params.min_p > 0 for params in sampling):
        min_p = torch.tensor([[params.min_p] for params in sampling], dtype=logits.dtype)
        # log(0) is -inf, which keeps every token
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + min_p.log(), float("-inf"))
    num_tokens = logits.shape[1]
    rows = [row for row, params in enumerate(sampling) if 0 < params.top_k < num_tokens or params.top_p < 1.0]
    if rows:
        chosen = [sampling[row] for row in rows]
        part = logits if len(rows) == len(sampling) else logits[rows]
        top_k = torch.tensor([[params.top_k or num_tokens] for params in chosen]).clamp_(max=num_tokens)
        top_p = torch.tensor([[params.top_p] for params in chosen], dtype=torch.float64)
        lowest = _lowest_kept(part, top_k, top_p)
        logits[rows] = part.masked_fill(part < lowest, float("-inf"))


def _lowest_kept(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest logit [N, 1] that top-k [N, 1] and then top-p [N, 1] keep."""
    num_tokens = logits.shape[1]
    bounded = top_k < num_tokens
    num_sorted = max(FIRST_SORTED, int(top_k[bounded].max()) if bounded.any() else 0)
    while True:
        top = _likeliest(logits, num_sorted)
        inside = torch.arange(top.shape[1]) < top_k
        of_top_k = top.masked_fill(~inside, float("-inf"))
        total = torch.where(bounded, of_top_k.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
        probs = (of_top_k - total).exp()
        before = probs.cumsum(-1, dtype=torch.float64) - probs
        # a row of top-p alone may need more tokens than were sorted
        short = ~bounded & (top_p < 1.0) & (before[:, -1:] < top_p)
        if num_sorted >= num_tokens or not short.any():
            break
        num_sorted *= SORTED_GROWTH
    kept = inside & ((before < top_p) | (top_p >= 1.0))
    kept[:, 0] = True
    lowest = top.gather(1, kept.sum(-1, keepdim=True) - 1)
    return lowest.masked_fill_(~bounded & (top_p >= 1.0), float("-inf"))


def _likeliest(logits: torch.Tensor, num_sorted: int) -> torch.Tensor:
    """The highest logits of each row, descending: [N, min(num_sorted, V)]."""
    if num_sorted < logits.shape[1]:
        return logits.topk(num_sorted).values
    return logits.sort(-1, descending=True).values
