"""Whether a module that is to take another's place computes what that one does."""

from collections.abc import Callable

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference, as a part of the largest value."""
TRIED_ROWS = (1, 5)

Forward = Callable[[torch.Tensor], torch.Tensor]


def computes_the_same(ours: Forward, own: Forward, num_features: int, dtype: torch.dtype) -> bool:
    """Compare on random rows [1, T, num_features]. What is not a number never equals anything."""
    return all(_difference(ours, own, num_features, dtype, rows) <= TOLERANCE.get(dtype, 0.0) for rows in TRIED_ROWS)


def _difference(ours: Forward, own: Forward, num_features: int, dtype: torch.dtype, num_rows: int) -> float:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(1, num_rows, num_features, generator=generator).to(dtype)
    expected = own(rows.clone()).float()
    return float((ours(rows.clone()).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
