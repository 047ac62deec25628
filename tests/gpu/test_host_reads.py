from collections.abc import Callable

import pytest
import torch

from shared.engine.graphs.host_reads import host_reads

NUMBERS = torch.arange(6)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: NUMBERS[0].item(),
        lambda: NUMBERS.tolist(),
        lambda: int(NUMBERS.max()),
        lambda: bool(NUMBERS[1]),
        lambda: 1 if (NUMBERS > 3).any() else 0,
        lambda: [0] * NUMBERS[2],
        lambda: NUMBERS.nonzero(),
        lambda: torch.where(NUMBERS > 3),
        lambda: NUMBERS[NUMBERS > 3],
        lambda: NUMBERS.clone().index_put_((NUMBERS > 3,), NUMBERS[:2]),
        lambda: NUMBERS.clone().__setitem__(NUMBERS > 3, NUMBERS[:2]),
        lambda: NUMBERS.masked_select(NUMBERS > 3),
        lambda: NUMBERS.unique(),
        lambda: NUMBERS.bincount(),
        lambda: NUMBERS.repeat_interleave(NUMBERS),
        lambda: torch.equal(NUMBERS, NUMBERS),
        lambda: [NUMBERS[:count] for count in NUMBERS],
        lambda: 3 in NUMBERS,
        lambda: NUMBERS + torch.tensor([1]),
        lambda: NUMBERS.cpu(),
    ],
)
def test_reads_are_seen(compute: Callable[[], object]) -> None:
    assert host_reads(compute)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: NUMBERS + 1,
        lambda: NUMBERS[NUMBERS.flip(0)],
        lambda: NUMBERS.where(NUMBERS > 3, 0),
        lambda: NUMBERS.masked_fill(NUMBERS > 3, 0),
        lambda: NUMBERS.float().softmax(-1).topk(2),
        lambda: NUMBERS.clone().index_put_((NUMBERS,), NUMBERS),
        lambda: NUMBERS.clone().__setitem__(NUMBERS > 3, 0),
        lambda: NUMBERS.repeat_interleave(2),
        lambda: NUMBERS.to(torch.float64).cumsum(0),
        lambda: NUMBERS[None, 1:3],
    ],
)
def test_nothing_else_is(compute: Callable[[], object]) -> None:
    assert host_reads(compute) == set()
