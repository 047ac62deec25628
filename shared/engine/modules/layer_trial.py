"""Puts layers in that are one call (`layers.py`), after a trial: it has to compute what the layer does, to the bit.

The model computes a few tokens, at the first positions and at the last; every layer that could be one call does so
twice, by itself and by the call. Outputs have to be equal, and so have the keys and values that are written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from shared.engine.attention import PagedAttention
from shared.engine.batch import build_batch
from shared.engine.model import paged_logits
from shared.engine.modules.last_layer import decoder_layers
from shared.engine.modules.layer_parts import Parts, parts_of
from shared.engine.modules.layers import NativeLayer, Steps
from shared.engine.native.library import DTYPES, Library
from shared.engine.pool import KVPool
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import Sequence
from shared.kv.layout import KVLayout
from shared.sampling import SamplingParams

TRIED_TOKENS = ([1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4])
"""Of the first request all but the last are its prompt."""
CHUNK = 3


@torch.inference_mode()
def replace_layers(
    model: PreTrainedModel, attention: PagedAttention, layout: KVLayout, longest: int, library: Library
) -> int:
    """Let every layer that can be one call be one; how many those are. Call it after all other modules are in.

    Args:
        longest: the most tokens of a request.
    """
    layers = decoder_layers(model, model.config.get_text_config(decoder=True).num_hidden_layers)
    if layers is None or attention.kernels.prefill is None or model.dtype not in DTYPES:
        return 0
    build = partial(NativeLayer, steps=Steps(attention), kernel=library.function("layer", model.dtype))
    trials = [
        Trial(layer, parts, attention, model.dtype, build, is_last=layer is layers[-1])
        for layer in layers
        if (parts := parts_of(layer, model.dtype)) is not None and parts.kv == layout.layers[parts.index]
    ]
    for first in {0, max(0, longest - len(TRIED_TOKENS[0]))} if trials else ():
        _compute_some(model, attention, layout, first)
    return sum(trial.end() for trial in trials)


class Trial:
    """Stands in for a layer's forward, computes as it does, and looks whether one call gives the same."""

    def __init__(
        self,
        layer: Any,
        parts: Parts,
        attention: PagedAttention,
        dtype: torch.dtype,
        build: Callable[..., NativeLayer],
        *,
        is_last: bool,
    ) -> None:
        self._layer = layer
        self._parts = parts
        self._attention = attention
        self._dtype = dtype
        self._build = build
        self._is_last = is_last
        self._own: Callable[..., Any] = layer.forward
        self._candidates: list[NativeLayer] | None = None
        layer.forward = self

    def end(self) -> bool:
        """Leave the call in the layer, or its own forward; whether it is the call."""
        candidates = self._candidates or []
        found = len(candidates) == 1  # if several agree, the trial does not tell
        self._layer.forward = candidates[0] if found else self._own
        return found

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        own = self._own(hidden_states, *args, **kwargs)
        if self._candidates is None:
            self._candidates = self._all()
        written = self._written()
        self._candidates = [
            candidate
            for candidate in self._candidates
            if self._agrees(candidate, own, hidden_states, args, kwargs)
            and all(map(torch.equal, self._written(), written))
        ]
        # Once more, so that the next step finds the layer's own keys and values.
        return self._own(hidden_states, *args, **kwargs)

    def _all(self) -> list[NativeLayer]:
        asked = self._attention.asked.get(self._parts.index)
        if asked is None or asked["sinks"] is not None:
            return []
        return [self._build(self._parts, asked, rotates=rotates, is_last=self._is_last) for rotates in (True, False)]

    def _written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are in the pool for the rows of the step."""
        pool, batch = self._attention.current
        keys, values = (views[self._parts.index][batch.blocks, batch.offsets] for views in (pool.keys, pool.values))
        return keys, values

    def _agrees(self, candidate: NativeLayer, own: Any, hidden_states: torch.Tensor, args: Any, kwargs: Any) -> bool:
        given = (hidden_states, *(kwargs.get("position_embeddings") or ()))
        if len(given) != 3 or any(part.dtype != self._dtype for part in given):
            return False
        if given[1].shape[-1] > self._parts.head_dim or not isinstance(own, torch.Tensor):
            return False
        ours = candidate(hidden_states, *args, **kwargs)
        if self._is_last:
            rows = self._attention.current[1].logit_rows
            own, ours = own[:, rows], ours[:, rows]
        return torch.equal(own, ours)


def _compute_some(model: PreTrainedModel, attention: PagedAttention, layout: KVLayout, first_position: int) -> None:
    """Two steps: a prompt beside the begin of another, and a decode beside the rest of that.

    Only what depends on positions is told that they begin at `first_position`.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    all_ids = [[token_id % vocab_size for token_id in token_ids] for token_ids in TRIED_TOKENS]
    one, other = (_sequence(number, token_ids, layout) for number, token_ids in enumerate(all_ids))
    pool = KVPool(layout, len(one.blocks) + len(other.blocks))
    pool.data.fill_(float("nan"))  # what is read unwritten is noticed

    def compute(plan: StepPlan) -> None:
        batch = build_batch(plan, layout.block_size, pool.data.dtype)
        batch.positions += first_position
        paged_logits(model, attention, pool, batch)
        for span in batch.spans:
            span.sequence.num_computed_tokens = span.last

    last = one.token_ids.pop()
    compute(StepPlan([], [PrefillChunk(other, CHUNK), PrefillChunk(one, len(one.token_ids))]))
    one.token_ids.append(last)
    compute(StepPlan([one], [PrefillChunk(other, len(other.token_ids) - CHUNK)]))


def _sequence(number: int, token_ids: list[int], layout: KVLayout) -> Sequence:
    num_blocks = layout.num_blocks(len(token_ids))
    blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
    sampling = SamplingParams(max_tokens=len(token_ids) + 1)
    return Sequence(f"trial-{number}", list(token_ids), 1, blocks, sampling, num_to_generate=1)
