"""Decode attention over the paged pool in Triton: one query token per request, its KV split over many programs.

Split-KV is FlashDecoding (Dao, Haziza, Massa and Sizov, 2023), reading through a block table is PagedAttention
(Kwon et al., arXiv 2309.06180), and one program serving all query heads that share a key head is what GQA allows
(Ainslie et al., arXiv 2305.13245). Whether the kernel is fast is open: so far it has run in Triton's interpreter only.
"""

from functools import cache

import torch
import triton
import triton.language as tl

MIN_TILE, MAX_TILE = 16, 64
"""Tokens that a program reads at a time. `tl.dot` wants at least 16 in each direction."""
TILE_BYTES = 16384
"""It reads about so many bytes at a time, with room for more of them on their way."""
MAX_SUMS = 8192
"""A program keeps this many fp32 sums (query heads x value dimensions) in registers; larger groups take several."""
MIN_SPLIT_TOKENS = 128
"""A split is not worth its share of the second kernel for fewer tokens than these."""
MAX_SPLITS = 64
PROGRAMS_PER_SM = 2
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED: bool = triton.knobs.runtime.interpret


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
    """Attend for B tokens, each the last of its request.

    Which programs there are depends on shapes alone, so the call can be part of a CUDA graph.

    Args:
        query: [B, Hq, Dk]; Hq is a multiple of H.
        keys: [num_blocks, block_size, H, Dk]; values: [num_blocks, block_size, H, Dv]: views of the pool.
        tables: int32 [B, max_blocks], the blocks of each request; what comes after its last is not read.
        lengths: int32 [B], tokens that each sees, itself included; a row of 0 gives zeros. Slots behind are not read.
        scale: of the scores.
        window: how many positions a token sees, itself included; None is all.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: [Hq], a logit per head that takes part in the softmax and has no value (gpt-oss).

    Returns:
        [B, Hq, Dv], of the query's dtype.
    """
    num_rows, num_heads, key_dim = query.shape
    _, block_size, num_kv_heads, value_dim = values.shape
    assert num_heads % num_kv_heads == 0, "query heads share key heads evenly"
    assert keys.stride(3) == values.stride(3) == tables.stride(1) == lengths.stride(0) == 1, "elements are neighbours"
    assert query.dtype == keys.dtype == values.dtype, "the model and its KV are of one type"
    if query.stride(2) != 1:
        query = query.contiguous()
    shape = tiles(num_heads // num_kv_heads, key_dim, value_dim, keys.element_size())
    num_programs = num_kv_heads * triton.cdiv(shape["GROUP"], shape["HEADS_TILE"])
    num_splits = choose_num_splits(num_rows * num_programs, tables.shape[1] * block_size, num_processors(query.device))
    partial = torch.empty(num_rows, num_heads, num_splits, value_dim, dtype=torch.float32, device=query.device)
    peaks, sums = torch.empty(2, num_rows, num_heads, num_splits, dtype=torch.float32, device=query.device)
    _attend[(num_rows, num_programs, num_splits)](
        *(query, keys, values, tables, lengths, partial, peaks, sums),
        *(query.stride(0), query.stride(1), tables.stride(0)),
        *(keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2)),
        scale,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        NUM_SPLITS=num_splits,
        MIN_SHARE=MIN_SPLIT_TOKENS,
        # the interpreter would multiply the bit patterns of bfloat16
        WIDEN=INTERPRETED and keys.dtype == torch.bfloat16,
        enable_fp_fusion=True,  # Triton warns where nothing is said
        **shape,
    )
    output = query.new_empty(num_rows, num_heads, value_dim)
    _combine[(num_rows, num_heads)](
        *(partial, peaks, sums, query if sinks is None else sinks, output),
        HAS_SINKS=sinks is not None,
        VALUE_DIM=value_dim,
        NUM_SPLITS=num_splits,
        VALUE_DIM_PADDED=shape["VALUE_DIM_PADDED"],
        enable_fp_fusion=True,
    )
    return output


def choose_num_splits(num_pairs: int, max_tokens: int, num_sms: int) -> int:
    """Into how many splits the KV of each of `num_pairs` (row, key head) is cut.

    Enough to keep the processors busy and no more than the longest request has use for; a power of two, so that few
    kernels are compiled. Requests of any length get as many: each cuts its own tokens evenly, so that short ones are
    spread as well.
    """
    wanted = -(-PROGRAMS_PER_SM * num_sms // num_pairs)
    useful = -(-max_tokens // MIN_SPLIT_TOKENS)
    num_splits: int = triton.next_power_of_2(min(wanted, useful))
    return min(MAX_SPLITS, num_splits)


def tiles(group: int, key_dim: int, value_dim: int, element_bytes: int) -> dict[str, int]:
    """What the first kernel is compiled for.

    Args:
        group: query heads that share a key head.
        key_dim, value_dim: of one head.
        element_bytes: of keys and values.
    """
    group_padded, key_padded, value_padded = (
        max(MIN_TILE, triton.next_power_of_2(size)) for size in (group, key_dim, value_dim)
    )
    token_bytes = (key_padded + value_padded) * element_bytes
    num_tokens = max(MIN_TILE, min(MAX_TILE, triton.next_power_of_2(TILE_BYTES // token_bytes + 1) // 2))
    return {
        "GROUP": group,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "HEADS_TILE": min(group_padded, max(MIN_TILE, MAX_SUMS // value_padded)),
        "KEY_DIM_PADDED": key_padded,
        "VALUE_DIM_PADDED": value_padded,
        "TILE": num_tokens,
        "num_stages": 3 if num_tokens * token_bytes <= TILE_BYTES else 1,
    }


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 elsewhere, where only the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _attend(
    query,  # [B, Hq, Dk]
    keys,
    values,
    tables,
    lengths,
    partial,  # [B, Hq, NUM_SPLITS, Dv], contiguous, as are the next two
    peaks,  # [B, Hq, NUM_SPLITS]: the highest score, times log2(e)
    sums,  # [B, Hq, NUM_SPLITS]: of the exponentials beside that
    query_row_stride,
    query_head_stride,
    table_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    scale,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    TILE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The query heads of one key head (or a tile of them) over one split of one row, with online softmax."""
    row, split = tl.program_id(0), tl.program_id(2)
    num_tiles = tl.cdiv(GROUP, HEADS_TILE)
    kv_head = tl.program_id(1) // num_tiles
    heads = tl.program_id(1) % num_tiles * HEADS_TILE + tl.arange(0, HEADS_TILE)
    key_dims = tl.arange(0, KEY_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    is_head = heads < GROUP
    is_key_dim, is_value_dim = key_dims < KEY_DIM, value_dims < VALUE_DIM
    query_heads = kv_head * GROUP + heads

    last = tl.load(lengths + row).to(tl.int32)
    first = last * 0
    if WINDOW > 0:
        first = tl.maximum(last - WINDOW, 0)
    share = tl.maximum(tl.cdiv(last - first, NUM_SPLITS), MIN_SHARE)
    start = first + split * share
    stop = tl.minimum(start + share, last)

    queries = tl.load(
        query + row * query_row_stride + query_heads[:, None] * query_head_stride + key_dims[None, :],
        mask=is_head[:, None] & is_key_dim[None, :],
        other=0.0,
    )
    if WIDEN:
        queries = queries.to(tl.float32)
    peak = tl.full([HEADS_TILE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_TILE], tl.float32)
    mixed = tl.zeros([HEADS_TILE, VALUE_DIM_PADDED], tl.float32)
    for tile in range(start, stop, TILE):
        tokens = tile + tl.arange(0, TILE)
        is_token = tokens < stop
        # 64 bits: a pool has more elements than 32 can count
        blocks = tl.load(tables + row * table_stride + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        slots = tokens % BLOCK_SIZE
        key_starts = blocks * key_block_stride + slots * key_slot_stride + kv_head * key_head_stride
        value_starts = blocks * value_block_stride + slots * value_slot_stride + kv_head * value_head_stride
        some_keys = tl.load(
            keys + key_starts[None, :] + key_dims[:, None], mask=is_token[None, :] & is_key_dim[:, None], other=0.0
        )
        some_values = tl.load(
            values + value_starts[:, None] + value_dims[None, :],
            mask=is_token[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        if WIDEN:
            some_keys, some_values = some_keys.to(tl.float32), some_values.to(tl.float32)
        scores = tl.dot(queries, some_keys, input_precision="ieee") * scale
        if SOFTCAP > 0:
            # tanh written out, since Triton's own is not in its interpreter
            decay = tl.exp2(tl.abs(scores) * (-2 * LOG2_E / SOFTCAP))
            scores = tl.where(scores < 0, -SOFTCAP, SOFTCAP) * (1 - decay) / (1 + decay)
        scores = tl.where(is_token[None, :], scores * LOG2_E, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(some_values.dtype), some_values, input_precision="ieee")
        peak = new_peak

    results = (row * (tl.num_programs(1) // num_tiles) * GROUP + query_heads) * NUM_SPLITS + split
    tl.store(peaks + results, peak, mask=is_head)
    tl.store(sums + results, total, mask=is_head)
    places = results.to(tl.int64)[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(partial + places, mixed, mask=is_head[:, None] & is_value_dim[None, :])


@triton.jit
def _combine(
    partial,
    peaks,
    sums,
    sinks,  # [Hq]
    output,  # [B, Hq, Dv]
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
):
    """Put the splits of one head of one row together."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(1) + head
    splits = tl.arange(0, NUM_SPLITS)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    is_value_dim = value_dims < VALUE_DIM

    some_peaks = tl.load(peaks + place * NUM_SPLITS + splits)
    some_sums = tl.load(sums + place * NUM_SPLITS + splits)
    mixed = tl.load(
        partial + (place * NUM_SPLITS + splits).to(tl.int64)[:, None] * VALUE_DIM + value_dims[None, :],
        mask=is_value_dim[None, :],
        other=0.0,
    )
    # finite even for a row of length 0, whose peaks are all -inf
    peak = tl.maximum(tl.max(some_peaks, 0), -1.0e30)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    shrink = tl.exp2(some_peaks - peak)
    total = tl.sum(some_sums * shrink, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    result = tl.sum(mixed * shrink[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + place * VALUE_DIM + value_dims, result, mask=is_value_dim)
