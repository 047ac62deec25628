"""The plain kernels against attention's formula, one token and one head at a time, in fp64."""

import pytest
import torch

from shared.engine.kernels import plain

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, GROUP, KEY_DIM, VALUE_DIM = 40, 8, 2, 3, 12, 10
NUM_HEADS = NUM_KV_HEADS * GROUP
NAN = float("nan")


def by_formula(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token, query [Hq, Dk], that sees all of keys [S, H, Dk] and values [S, H, Dv]: [Hq, Dv]."""
    output = []
    for head in range(NUM_HEADS):
        scores = keys[:, head // GROUP].double() @ query[head].double() * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        total = scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp())
        output.append((scores.exp() / total) @ values[:, head // GROUP].double())
    return torch.stack(output).float()


def random(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


OPTIONS = pytest.mark.parametrize("softcap", [None, 3.0])
SINKS = pytest.mark.parametrize("sinks", [None, random(NUM_HEADS)], ids=["no sinks", "sinks"])


@OPTIONS
@SINKS
@pytest.mark.parametrize("window", [None, 1, 11])
@pytest.mark.parametrize("lengths", [[1], [5, 5], [16, 16, 9], [1, 7, 8, 9, 61], [3] * 20 + [150]])
def test_decode(lengths: list[int], window: int | None, sinks: torch.Tensor | None, softcap: float | None) -> None:
    """What is not written is NaN, and so are the blocks that pad the tables."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS)
    # a layer's keys and values as the pool has them: parts of a block
    pool = torch.full((NUM_BLOCKS, BLOCK_SIZE * NUM_KV_HEADS * (KEY_DIM + VALUE_DIM) + 6), NAN)
    keys, values = pool[:, 4:-2].split([BLOCK_SIZE * NUM_KV_HEADS * dim for dim in (KEY_DIM, VALUE_DIM)], 1)
    keys, values = keys.view(*shape, KEY_DIM), values.view(*shape, VALUE_DIM)
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist()
    empty = free.pop()
    max_blocks = -(-max(lengths) // BLOCK_SIZE)
    query = random(NUM_HEADS, len(lengths), KEY_DIM).transpose(0, 1)
    tables, expected = [], []
    for row, length in enumerate(lengths):
        table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        tables.append(table + [empty] * (max_blocks - len(table)))
        row_keys, row_values = random(length, NUM_KV_HEADS, KEY_DIM), random(length, NUM_KV_HEADS, VALUE_DIM)
        for position in range(length):
            keys[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = row_keys[position]
            values[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = row_values[position]
        first = 0 if window is None else max(0, length - window)
        expected.append(by_formula(query[row], row_keys[first:], row_values[first:], 0.3, softcap, sinks))
    output = plain.paged_decode(
        *(query, keys, values, torch.tensor(tables, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)),
        scale=0.3,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-5)


@OPTIONS
@SINKS
@pytest.mark.parametrize("num_earlier", [0, 14])
def test_prefill(num_earlier: int, sinks: torch.Tensor | None, softcap: float | None) -> None:
    num_tokens = 9
    num_slots = num_earlier + num_tokens
    query = random(NUM_HEADS, num_tokens, KEY_DIM)
    keys, values = random(num_slots, NUM_KV_HEADS, KEY_DIM), random(num_slots, NUM_KV_HEADS, VALUE_DIM)
    hidden = torch.arange(num_slots) > torch.arange(num_earlier, num_slots)[:, None]
    mask = plain.additive(hidden, torch.float32) if num_earlier else None
    output = plain.prefill(query, keys, values, mask, scale=0.3, softcap=softcap, sinks=sinks)
    expected = [
        by_formula(query[:, row], keys[: num_earlier + row + 1], values[: num_earlier + row + 1], 0.3, softcap, sinks)
        for row in range(num_tokens)
    ]
    torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-5)
