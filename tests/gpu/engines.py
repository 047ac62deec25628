"""Engines whose steps of decodes go through `DecodeGraphs`."""

from typing import Any

import torch

from shared.engine.batch import Batch
from shared.engine.engine import Engine
from shared.engine.graphs.decode_graphs import DecodeGraphs
from shared.engine.pool import KVPool


class ViaGraphs:
    """A loaded model that computes what it can there. `sizes` are those of the batches that it could."""

    def __init__(self, loaded: Any, graphs: DecodeGraphs) -> None:
        self._loaded = loaded
        self._graphs = graphs
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def logits(self, pool: KVPool, batch: Batch) -> torch.Tensor:
        if not self._graphs.takes(batch):
            return self._loaded.logits(pool, batch)
        self.sizes.append(batch.num_tokens)
        return self._graphs.logits(batch)


def use_graphs(engine: Engine, num_slots: int, max_model_len: int) -> list[int]:
    """Let an engine compute its decodes there. Returns the sizes of the batches that were, which grows."""
    via: Any = ViaGraphs(engine.loaded, DecodeGraphs(engine.loaded, engine.pool, num_slots, max_model_len))
    engine.loaded = via
    return via.sizes
