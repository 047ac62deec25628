"""Attention over the paged pool, as an attention function of transformers.

transformers calls it in every layer with the queries, keys and values of the whole row. It makes no mask for an
attention function that it does not know, so masks are ours (`batch.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from shared.engine.batch import Batch, DecodeRead, PrefillRead
from shared.engine.pool import KVPool

_numbers = count()


class PagedAttention:
    """The attention of one loaded model, registered with transformers under its own `name`.

    transformers has no way to hand a batch through to it, so it holds the current one, set by `batch()`.
    """

    def __init__(self) -> None:
        self.name = f"pdserve_paged_{next(_numbers)}"
        self._current: tuple[KVPool, Batch] | None = None
        AttentionInterface.register(self.name, self)

    @contextmanager
    def batch(self, pool: KVPool, batch: Batch) -> Iterator[None]:
        """Attend for this batch, with KV in this pool, until the end of the `with`."""
        assert self._current is None, "a model computes one step at a time"
        self._current = (pool, batch)
        try:
            yield
        finally:
            self._current = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Store the row's keys and values, then attend.

        Args:
            module: the attention module; its `layer_idx` says which layer.
            query: [1, Hq, T, Dk]; key: [1, H, T, Dk]; value: [1, H, T, Dv]. Hq is a multiple of H.
            scaling: of the scores; None is 1 / sqrt(Dk).
            sliding_window: how many positions a token sees, itself included; None is all.
            _: what the probe has found harmless at load (`probe.py`).

        Returns:
            [1, T, Hq, Dv], and None for the weights.
        """
        assert self._current is not None, "attention outside of a step"
        pool, batch = self._current
        layer = module.layer_idx
        assert isinstance(layer, int)
        new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, D]
        pool.write(layer, batch.blocks, batch.offsets, new_keys, new_values)
        decodes, prefills = batch.reads(sliding_window)
        if len(decodes) == 1 and not prefills:
            return _decode(pool, layer, decodes[0], query, scaling)[None], None
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for decode in decodes:
            output[0, decode.start : decode.stop] = _decode(pool, layer, decode, query, scaling)
        for prefill in prefills:
            chunk = slice(prefill.start, prefill.stop)
            if prefill.blocks is None:
                keys, values = new_keys[chunk], new_values[chunk]
            else:
                keys, values = (part.flatten(0, 1)[: prefill.last] for part in pool.gather(layer, prefill.blocks))
            output[0, chunk] = _prefill(query[0, :, chunk], keys, values, prefill, scaling)
        return output, None


def _decode(pool: KVPool, layer: int, read: DecodeRead, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Attend for B tokens, each to its own blocks, all at once: [B, Hq, Dv].

    The query heads that share a key head stand where SDPA expects query positions, so no key is ever repeated.
    """
    num_rows = read.stop - read.start
    keys, values = (
        part.view(num_rows, -1, *part.shape[2:])[:, read.first : read.last].transpose(1, 2)  # [B, H, S, D]
        for part in pool.gather(layer, read.blocks)
    )
    num_kv_heads = keys.shape[1]
    queries = query[0, :, read.start : read.stop].transpose(0, 1)  # [B, Hq, Dk]
    grouped = queries.view(num_rows, num_kv_heads, -1, queries.shape[2])  # [B, H, G, Dk]
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=read.mask, scale=scaling)
    return output.flatten(1, 2)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, read: PrefillRead, scaling: float | None
) -> torch.Tensor:
    """Attend for one chunk, query [Hq, T, Dk], to keys [S, H, Dk] and values [S, H, Dv]: [T, Hq, Dv].

    Key heads stand where SDPA expects the batch; expanding them over the query heads that share them copies nothing.
    """
    num_kv_heads = keys.shape[1]
    grouped = query.view(num_kv_heads, -1, *query.shape[1:])  # [H, G, T, Dk]
    shared_keys, shared_values = (
        part.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1)  # [H, G, S, D]
        for part in (keys, values)
    )
    output = scaled_dot_product_attention(
        grouped, shared_keys, shared_values, attn_mask=read.mask, is_causal=read.mask is None, scale=scaling
    )
    return output.flatten(0, 1).transpose(0, 1)
