"""Attention over the paged pool, as an attention function of transformers.

transformers calls it in every layer with the queries, keys and values of the whole row. It makes no mask for an
attention function that it does not know, so masks are ours (`batch.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypedDict

import torch
from transformers import AttentionInterface

from shared.engine.batch import Batch
from shared.engine.kernels import Kernels, plain
from shared.engine.pool import KVPool

_numbers = count()


class PagedAttention:
    """The attention of one loaded model, registered with transformers under its own `name`.

    transformers has no way to hand a batch through to it, so it holds the current one, set by `batch()`.
    `kernels` may be set to others that compute the same.
    """

    def __init__(self) -> None:
        self.kernels = Kernels(plain.paged_decode, None, plain.put)
        self.name = f"pdserve_paged_{next(_numbers)}"
        self.asked: dict[int, Asked] = {}
        """By the number of a layer, what it asked for the last time."""
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

    @property
    def current(self) -> "tuple[KVPool, Batch]":
        """The pool and the batch of the step under way."""
        assert self._current is not None, "a layer outside of a step"
        return self._current

    def sampled_rows(self) -> torch.Tensor | None:
        """The rows of the current step that give a token, int64 [N]; None where all do."""
        _, batch = self.current
        return None if len(batch.logit_rows) == batch.num_tokens else batch.logit_rows

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Store the row's keys and values, then attend.

        Args:
            module: the attention module; its `layer_idx` says which layer.
            query: [1, Hq, T, Dk]; key: [1, H, T, Dk]; value: [1, H, T, Dv]. Hq is a multiple of H.
            scaling: of the scores; None is 1 / sqrt(Dk).
            sliding_window: how many positions a token sees, itself included; None is all.
            softcap: of the scores; None is none.
            s_aux: attention sinks [Hq]; None is none.
            _: what the probe has found harmless at load (`probe.py`).

        Returns:
            [1, T, Hq, Dv], and None for the weights.
        """
        pool, batch = self.current
        layer = module.layer_idx
        assert isinstance(layer, int)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, D]
        self.kernels.put(pool.keys[layer], new_keys, batch.blocks, batch.offsets)
        self.kernels.put(pool.values[layer], new_values, batch.blocks, batch.offsets)
        asked = Asked(scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
        self.asked[layer] = asked
        places = (pool, batch, layer, query[0], asked)
        parts = [*self._decodes(*places), *self._prefills(*places)]
        return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None

    def _decodes(
        self, pool: KVPool, batch: Batch, layer: int, query: torch.Tensor, asked: "Asked"
    ) -> Iterator[torch.Tensor]:
        """The decodes' part of the output, [B, Hq, Dv], from query [Hq, T, Dk]; nothing without decodes."""
        if batch.num_decodes:
            queries = query[:, : batch.num_decodes].transpose(0, 1)
            yield self.kernels.decode(
                queries, pool.keys[layer], pool.values[layer], batch.tables, batch.lengths, **asked
            )

    def _prefills(
        self, pool: KVPool, batch: Batch, layer: int, query: torch.Tensor, asked: "Asked"
    ) -> Iterator[torch.Tensor]:
        """The chunks' parts of the output, [tokens of the chunk, Hq, Dv] each."""
        if self.kernels.prefill is not None:
            for span in batch.spans[batch.num_decodes :]:
                queries = query[:, span.start : span.stop].transpose(0, 1)
                yield self.kernels.prefill(
                    queries, pool.keys[layer], pool.values[layer], span.sequence.block_table, span.first, **asked
                )
            return
        for read in batch.prefill_reads(asked["window"]):
            keys, values = (part.flatten(0, 1)[: read.last] for part in pool.gather(layer, read.blocks))
            yield plain.prefill(
                query[:, read.start : read.stop],
                keys,
                values,
                read.mask,
                scale=asked["scale"],
                softcap=asked["softcap"],
                sinks=asked["sinks"],
            )


class Asked(TypedDict):
    """What a layer asks of attention; see `plain.paged_decode`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
