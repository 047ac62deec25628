"""A model that has been loaded and tested, and its forward pass over the paged pool."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from shared.engine.attention import PagedAttention
from shared.engine.batch import Batch
from shared.engine.native.library import Library
from shared.engine.pool import KVPool
from shared.kv.layout import KVLayout


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A model whose attention is ours.

    Args:
        name: the hub id or folder it came from.
        fingerprint: equal for equal weights in an equal layout (`fingerprint.py`).
        vocab_size: token ids are 0 .. vocab_size - 1.
        max_position_embeddings: the most tokens a sequence may have.
    """

    name: str
    model: PreTrainedModel
    attention: PagedAttention
    layout: KVLayout
    fingerprint: str
    vocab_size: int
    max_position_embeddings: int
    weight_bytes: int
    num_parameters: int
    library: Library | None = None
    """The native kernels, where they are in use."""

    def logits(self, pool: KVPool, batch: Batch) -> torch.Tensor:
        """Compute a batch, write its KV to the pool, return fp32 logits [N, V] of the sequences that get a token."""
        return paged_logits(self.model, self.attention, pool, batch)


def paged_logits(model: PreTrainedModel, attention: PagedAttention, pool: KVPool, batch: Batch) -> torch.Tensor:
    """`LoadedModel.logits`, for a model that is still being loaded."""
    batch = batch.to(pool.device)
    with attention.batch(pool, batch):
        output = model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.logit_rows,
        )
    logits: torch.Tensor = output.logits[0].float()
    return logits
