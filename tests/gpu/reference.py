"""Decode attention as its formula has it, in fp32 on any device, with no value read on the host."""

import torch


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What `shared.engine.kernels.triton_decode.paged_decode` documents."""
    num_rows, num_heads, _ = query.shape
    block_size, num_kv_heads, value_dim = values.shape[1:]
    positions = torch.arange(tables.shape[1] * block_size, device=query.device)
    ends = lengths[:, None]
    seen = (positions < ends) & (positions >= (0 if window is None else ends - window))  # [B, S]
    gathered = [
        part[tables.long()].flatten(1, 2).float().masked_fill(~seen[:, :, None, None], 0)  # [B, S, H, D]
        for part in (keys, values)
    ]
    grouped = query.float().reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)
    scores = torch.einsum("bhgd,bshd->bhgs", grouped, gathered[0]) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        head_sinks = sinks.float().view(num_kv_heads, -1, 1).expand(num_rows, -1, -1, -1)
        weights = torch.cat([scores, head_sinks], -1).softmax(-1)[..., :-1]
    weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0)
    result = torch.einsum("bhgs,bshd->bhgd", weights, gathered[1])
    return result.reshape(num_rows, num_heads, value_dim).to(query.dtype)
