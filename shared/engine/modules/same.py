"""Whether a module that is to take another's place computes what that one does."""

from collections.abc import Callable, Sequence

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference, as a part of the largest value."""
TRIED_ROWS = (1, 5)
TRIED_SCALES = (1.0, 1e-3, 30.0, 1000.0)
"""Small rows show an epsilon, large ones a limit."""

Forward = Callable[[torch.Tensor], torch.Tensor]


def computes_the_same(
    ours: Forward, own: Forward, num_features: int, dtype: torch.dtype, scales: Sequence[float] = TRIED_SCALES
) -> bool:
    """Compare on random rows [1, T, num_features] of these scales.

    What is not a number never equals anything, and what is called in another way is another thing.
    """
    try:
        differences = [
            _difference(ours, own, _rows(num_rows, num_features, dtype) * scale)
            for num_rows in TRIED_ROWS
            for scale in scales
        ]
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return all(difference <= TOLERANCE.get(dtype, 0.0) for difference in differences)


def _rows(num_rows: int, num_features: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(1, num_rows, num_features, generator=generator).to(dtype)


def _difference(ours: Forward, own: Forward, rows: torch.Tensor) -> float:
    expected, got = own(rows.clone()).float(), ours(rows.clone()).float()
    if expected.shape != got.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
