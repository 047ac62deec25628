"""A decoder layer as one call into the library (`layer.cpp`), where all its parts are ours already.

A step of few tokens takes Python about as long as the kernels take for a layer of a small model.
"""

from ctypes import addressof
from typing import Any

import torch

from shared.engine.attention import Asked, PagedAttention
from shared.engine.batch import Batch
from shared.engine.modules.layer_parts import Parts
from shared.engine.native import layer as native
from shared.engine.pool import KVPool


class Steps:
    """The step under way as `layer.cpp` reads it, made once for all layers. It keeps the batch: the memory is its."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention
        self._batch: Batch | None = None
        self._spans: Any = None
        self._step = native.Step()

    def current(self) -> tuple[KVPool, int]:
        """The pool, and the address of the step."""
        pool, batch = self._attention.current
        if batch is not self._batch:
            self._batch = batch
            self._describe(batch)
        return pool, addressof(self._step)

    def _describe(self, batch: Batch) -> None:
        assert len(batch.logit_rows) >= batch.num_decodes, "all decodes get a token"
        prefills = batch.spans[batch.num_decodes :]
        self._spans = (native.Span * len(prefills))(
            *(native.Span(span.start, span.stop, span.first, span.sequence.block_table.data_ptr()) for span in prefills)
        )
        self._step = native.Step(
            blocks=batch.blocks.data_ptr(),
            offsets=batch.offsets.data_ptr(),
            tables=batch.tables.data_ptr(),
            lengths=batch.lengths.data_ptr(),
            sampled=batch.logit_rows.data_ptr(),
            spans=addressof(self._spans),
            num_rows=batch.num_tokens,
            num_decodes=batch.num_decodes,
            num_spans=len(prefills),
            num_sampled=len(batch.logit_rows),
            table_stride=batch.tables.stride(0),
            block_size=batch.block_size,
        )


class NativeLayer:
    """The forward of a decoder layer.

    Args:
        parts: what it is made of.
        asked: what its attention asks for.
        steps: where the step under way is found.
        kernel: the library's "layer", for the type of the weights.
        rotates: whether queries and keys are rotated.
        is_last: only rows that give a token are computed to the end; the others stay as they come.
    """

    def __init__(self, parts: Parts, asked: Asked, steps: Steps, kernel: Any, *, rotates: bool, is_last: bool) -> None:
        self._parts = parts
        self._steps = steps
        self._kernel = kernel
        assert asked["sinks"] is None, "layers that have sinks are not taken"
        mlp = {"gate": parts.mlp.gate_proj, "up": parts.mlp.up_proj, "down": parts.mlp.down_proj}
        self._layer = native.Layer(
            num_heads=parts.linears["query"].out_features // parts.head_dim,
            num_kv_heads=parts.kv.num_kv_heads,
            key_dim=parts.kv.key_dim,
            value_dim=parts.kv.value_dim,
            window=asked["window"] or 0,
            scale=asked["scale"],
            softcap=asked["softcap"] or 0.0,
            residual=parts.residual,
            activation=parts.mlp.gate,
            rotates=rotates,
            is_last=is_last,
            num_threads=torch.get_num_threads(),
            **{name: part.struct() for name, part in (parts.linears | parts.norms | mlp).items()},
        )
        self._index = parts.index

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **__: Any,
    ) -> torch.Tensor:
        """[1, T, hidden] to the same, with cos and sin [1, T, R] of the rows' positions."""
        pool, step = self._steps.current()
        hidden_states = hidden_states.contiguous()
        output = torch.empty_like(hidden_states)
        cos, sin = position_embeddings
        cos, sin = cos.contiguous(), sin.contiguous()
        keys, values = pool.keys[self._index], pool.values[self._index]
        self._kernel(
            *(addressof(self._layer), step),
            *(keys.data_ptr(), values.data_ptr(), keys.stride(0)),
            *(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]),
            *(hidden_states.data_ptr(), output.data_ptr()),
        )
        return output
