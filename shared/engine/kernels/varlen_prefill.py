"""Prefill on a GPU: torch's own Flash Attention (Dao, arXiv 2307.08691), chunk by chunk, without a mask in memory.

It wants half precision and heads that are alike in keys and values, and has neither soft cap nor sinks. Layers that
need more get plain attention. No GPU has run this file yet.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

from shared.engine.kernels import plain

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


def paged_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    first: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As `PagedPrefill` says."""
    num_tokens, block_size = query.shape[0], keys.shape[1]
    last = first + num_tokens
    first_block = 0 if window is None else max(0, first - window + 1) // block_size
    blocks = table[first_block : -(-last // block_size)].to(keys.device, non_blocking=True)
    origin = first_block * block_size
    seen_keys, seen_values = (part.index_select(0, blocks).flatten(0, 1)[: last - origin] for part in (keys, values))
    if not can_compute(query, values.shape[3], softcap, sinks):
        positions = torch.arange(origin, last, device=query.device)
        own = positions[first - origin :, None]
        hidden = positions > own
        if window is not None:
            hidden |= positions <= own - window
        mask = plain.additive(hidden, query.dtype)
        return plain.prefill(
            query.transpose(0, 1), seen_keys, seen_values, mask, scale=scale, softcap=softcap, sinks=sinks
        )
    output = varlen_attn(
        query,
        seen_keys,
        seen_values,
        _bounds(num_tokens, query.device),
        _bounds(last - origin, query.device),
        num_tokens,
        last - origin,
        scale=scale,
        # how many to the left and to the right, where the last query stands at the last key
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor), "nothing else was asked for"
    return output


def can_compute(query: torch.Tensor, value_dim: int, softcap: float | None, sinks: torch.Tensor | None) -> bool:
    """Whether Flash Attention is for such a layer.

    Args:
        query: [..., Dk], of the device and type in question.
        value_dim: Dv.
        softcap, sinks: as for `plain.prefill`.
    """
    key_dim = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and key_dim == value_dim <= MAX_HEAD_DIM
        and key_dim % HEAD_DIM_STEP == 0
        and softcap is None
        and sinks is None
    )


def _bounds(length: int, device: torch.device) -> torch.Tensor:
    """[0, length], made over there."""
    return torch.arange(0, 2 * length, length, dtype=torch.int32, device=device)
