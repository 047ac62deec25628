"""Chunks of prompts in the pool: Flash Attention, which exists on a GPU only, and what stands in for it elsewhere."""

import pytest
import torch

from shared.engine.kernels import plain
from shared.engine.kernels.varlen_prefill import can_compute, paged_prefill

BLOCK_SIZE = 16
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_what_flash_attention_is_not_for() -> None:
    assert not can_compute(torch.zeros(1, 4, 64, dtype=torch.bfloat16), 64, None, None)


@pytest.mark.parametrize(
    ("device", "dtype", "softcap"),
    [
        ("cpu", torch.float32, None),
        ("cpu", torch.float32, 5.0),
        pytest.param("cuda", torch.bfloat16, None, marks=NO_GPU),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("first", "num_tokens"), [(0, 1), (0, 33), (16, 16), (70, 5), (37, 64)])
def test_as_plain(
    device: str, dtype: torch.dtype, softcap: float | None, window: int | None, first: int, num_tokens: int
) -> None:
    torch.manual_seed(first)
    last = first + num_tokens
    pool = torch.randn(2, 20, BLOCK_SIZE, 2, 32, device=device).to(dtype)
    table = torch.randperm(20)
    pool[:, table[-(-last // BLOCK_SIZE) :].to(device)] = float("nan")
    query = torch.randn(6, num_tokens, 32, device=device).to(dtype)
    sinks = None if softcap is None else torch.randn(6, device=device)
    result = paged_prefill(
        query.transpose(0, 1), *pool, table, first, scale=0.2, window=window, softcap=softcap, sinks=sinks
    )
    positions = torch.arange(last, device=device)
    own = positions[first:, None]
    hidden = (positions > own) | (positions <= own - (window or last + 1))
    keys, values = (part[table.to(device)].flatten(0, 1)[:last].float() for part in pool)
    mask = plain.additive(hidden, torch.float32)
    expected = plain.prefill(query.float(), keys, values, mask, scale=0.2, softcap=softcap, sinks=sinks)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
