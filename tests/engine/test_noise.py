"""Noise by seed, index and token id: distributed as it should be, and the same wherever it is asked for."""

import math

import pytest
import torch

from shared.engine.native.library import native_library
from shared.engine.sampling.noise import gumbel, likeliest_with_noise


def test_it_is_standard_gumbel_noise() -> None:
    noise = gumbel([(seed, 0) for seed in range(50)], 4000).flatten()
    assert noise.isfinite().all()
    for value in (-1.0, 0.0, 0.5, 1.0, 3.0):
        expected = math.exp(-math.exp(-value))
        assert abs((noise <= value).double().mean().item() - expected) < 0.005


def test_a_row_depends_on_its_own_draw_alone() -> None:
    draws = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 5)]
    together = gumbel(draws, 1000)
    for row, draw in enumerate(draws):
        assert torch.equal(gumbel([draw], 1000)[0], together[row])
    assert torch.equal(gumbel([(7, 3)], 10)[0], gumbel([(7, 3)], 500)[0, :10])


def test_neighbours_have_nothing_in_common() -> None:
    noise = gumbel([(0, 0), (0, 1), (1, 0)], 20_000)
    correlations = torch.corrcoef(torch.cat([noise, noise[:1].roll(1, 1)]))
    assert (correlations - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 1000, 50_257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_the_native_draw_finds_the_same_token(vocab_size: int, scale: float) -> None:
    library = native_library()
    if library is None:
        pytest.skip("there is no C++ compiler here")
    num_draws = 2_000_000 // max(vocab_size, 10_000)
    draws = [(seed * 977 + 2**63, seed) for seed in range(num_draws)]
    logits = scale * torch.randn(num_draws, vocab_size, generator=torch.Generator().manual_seed(1))
    logits[:, 1::3] = float("-inf")  # as truncation leaves them
    expected = likeliest_with_noise(logits, draws, None)
    assert torch.equal(likeliest_with_noise(logits, draws, library), expected)
