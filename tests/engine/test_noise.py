"""Noise by seed, index and token id: distributed as it should be, and the same wherever it is asked for."""

import math

import torch

from shared.engine.noise import gumbel


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
