"""Attention in plain torch: right on every device, the reference for the other kernels and what is used without them.

Of what transformers' models ask for, `scaled_dot_product_attention` lacks two things, which are written out here: a
soft cap of the scores (Gemma 2, arXiv 2408.00118) and attention sinks (gpt-oss), one more logit per head that takes
part in the softmax and has no value.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

GROUP_COST_BLOCKS = 16
"""One more group of decodes costs a layer about as much as reading this many blocks (measured on a CPU in fp32)."""


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
    """Attend for B tokens, each to the KV of its own request.

    Args:
        query: [B, Hq, Dk], may be strided. Query head h reads KV head h // (Hq / H).
        keys, values: [num_blocks, block_size, H, Dk] and [num_blocks, block_size, H, Dv], views of the pool: only the
            last two dimensions, together, are sure to be contiguous.
        tables: int32 [B, max_blocks], the blocks of each request in order; behind those that `lengths` needs stands any
            block of the same request. What unwritten slots hold, NaN included, has no influence.
        lengths: int32 [B], how many tokens each sees, itself included; at least 1.
        scale: of the scores.
        window: a token sees the last `window` positions, itself included; None is all.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [Hq].

    Returns:
        [B, Hq, Dv].
    """
    output = query.new_empty(*query.shape[:2], values.shape[3])
    seen = [range(0 if window is None else max(0, length - window), length) for length in lengths.tolist()]
    for rows in like_lengths(seen, keys.shape[1]):
        visible = seen[rows]
        part_keys, part_values, hidden = _gather(keys, values, tables[rows], visible)
        # [B, H, G, Dk]: query heads that share a key head stand as query positions, and no key is repeated.
        grouped = query[rows].reshape(len(visible), keys.shape[2], -1, query.shape[2])
        mask = None if hidden is None else additive(hidden, query.dtype)[:, None, None, :]
        if softcap is None and sinks is None:
            part = scaled_dot_product_attention(grouped, part_keys, part_values, attn_mask=mask, scale=scale)
        else:
            head_sinks = None if sinks is None else sinks.view(keys.shape[2], -1, 1)
            part = _attend(grouped, part_keys, part_values, mask, scale, softcap, head_sinks)
        output[rows] = part.flatten(1, 2)
    return output


def put(pool: torch.Tensor, heads: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
    """Store keys or values [T, H, D] of T tokens in a view [num_blocks, block_size, H, D] of the pool.

    Token i goes to slot `offsets[i]` of block `blocks[i]` (int64 [T] both).
    """
    pool.index_put_((blocks, offsets), heads)


def like_lengths(seen: list[range], block_size: int) -> list[slice]:
    """Cut the rows into groups of neighbours for which padding to one length costs less than one more group."""
    groups: list[slice] = []
    longest = 0
    for row, positions in enumerate(seen):
        length = _num_blocks(positions, block_size)
        if groups and abs(length - longest) * (row - groups[-1].start) <= GROUP_COST_BLOCKS:
            groups[-1] = slice(groups[-1].start, row + 1)
            longest = max(longest, length)
        else:
            groups.append(slice(row, row + 1))
            longest = length
    return groups


def _gather(
    keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, seen: list[range]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Copy what B tokens see: keys [B, H, S, Dk], values [B, H, S, Dv], and which slots are none of theirs [B, S].

    The latter are zero: a NaN would pass through a masked softmax (0 x NaN is NaN).
    """
    block_size = keys.shape[1]
    starts = [positions.start // block_size for positions in seen]
    num_blocks = max(_num_blocks(positions, block_size) for positions in seen)
    columns = torch.tensor(starts, device=tables.device)[:, None] + torch.arange(num_blocks, device=tables.device)
    blocks = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1)).flatten()
    copies = [part.index_select(0, blocks).view(len(seen), -1, *part.shape[2:]) for part in (keys, values)]
    bounds = [
        (positions.start - start * block_size, positions.stop - start * block_size)
        for positions, start in zip(seen, starts, strict=True)
    ]
    hidden = None
    if all(pair == bounds[0] for pair in bounds):
        copies = [copy[:, slice(*bounds[0])] for copy in copies]
    else:
        slots = torch.arange(num_blocks * block_size, device=tables.device)
        firsts, lasts = torch.tensor(bounds, device=tables.device).unbind(1)
        hidden = (slots < firsts[:, None]) | (slots >= lasts[:, None])
        unseen = hidden.flatten().nonzero().flatten()
        for copy in copies:
            copy.flatten(0, 1).index_fill_(0, unseen, 0)
    return copies[0].transpose(1, 2), copies[1].transpose(1, 2), hidden


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend for the T tokens of one request's chunk.

    Args:
        query: [Hq, T, Dk].
        keys, values: [S, H, Dk] and [S, H, Dv], the request's own up to the chunk's last token.
        mask: [T, S], 0 for what each token sees and -inf for the rest; None is causal, and S is T.
        scale, softcap, sinks: as for `paged_decode`.

    Returns:
        [T, Hq, Dv].
    """
    # [H, G, T, Dk]: key heads stand as batch; expanding them over the query heads that share them copies nothing.
    grouped = query.reshape(keys.shape[1], -1, *query.shape[1:])
    shared_keys, shared_values = (part.transpose(0, 1)[:, None] for part in (keys, values))  # [H, 1, S, D]
    if softcap is None and sinks is None:
        shared_keys, shared_values = (
            part.expand(-1, grouped.shape[1], -1, -1) for part in (shared_keys, shared_values)
        )
        output = scaled_dot_product_attention(
            grouped, shared_keys, shared_values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return output.flatten(0, 1).transpose(0, 1)
    if mask is None:
        mask = additive(torch.ones(2 * query.shape[1:2], dtype=torch.bool, device=query.device).triu_(1), query.dtype)
    head_sinks = [None] * keys.shape[1] if sinks is None else sinks.view(keys.shape[1], -1, 1, 1)
    # Head by head: the scores of one are large enough.
    heads = [
        _attend(grouped[head], shared_keys[head], shared_values[head], mask, scale, softcap, head_sinks[head])
        for head in range(keys.shape[1])
    ]
    return torch.cat(heads).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention as its formula has it, with the softmax in fp32.

    Args:
        query: [..., T, Dk]; keys: [..., S, Dk]; values: [..., S, Dv].
        mask: added to the scores [..., T, S].
        sinks: goes with [..., T, 1].

    Returns:
        [..., T, Dv].
    """
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if mask is not None:
        scores += mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values


def additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask to add to scores: -inf where `hidden`, otherwise 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _num_blocks(positions: range, block_size: int) -> int:
    return -(-positions.stop // block_size) - positions.start // block_size
