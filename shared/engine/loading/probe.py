"""What a model's layers ask of attention, found out by a three-token forward pass; and whether we can give it.

A feature that our attention does not have would make results silently wrong, so anything unknown leads to refusal.

Two kinds of rotary embeddings change with the longest position of a row, and rows are packed from many requests:
dynamic NTK behind `max_position_embeddings`, LongRoPE (arXiv 2402.13753) behind `original_max_position_embeddings`. Up
to there they are constant, so that is as far as requests may reach (`context_length`), and results are the model's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig, PreTrainedModel

from shared.errors import ModelRefused
from shared.kv.layout import KVLayout, LayerLayout

PROBE = "pdserve_probe"
HARMLESS = frozenset(
    {
        *("scaling", "sliding_window", "softcap", "s_aux"),
        *("dropout", "is_causal", "position_ids", "cache_position", "use_cache"),
    }
)
"""Keyword arguments of an attention call that `PagedAttention` heeds, or may leave unheeded in inference."""
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(slots=True)
class Probe:
    """Records the attention calls of a forward pass; answers them with zeros."""

    layers: dict[int, LayerLayout] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self.layers:
            self.problems.append(f"a {type(module).__name__} does not say which layer it is, or attends twice")
            layer = -1
        self.layers[layer] = LayerLayout(num_kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        self.windows[layer] = kwargs.get("sliding_window")
        if key.shape[2] != query.shape[2]:
            self.problems.append(f"layer {layer} attends to other tokens than those of the text")
        if attention_mask is not None:
            self.problems.append(f"layer {layer} brings an attention mask of its own")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            self.problems.append(f"the attention of layer {layer} is not causal")
        asked = {name for name, given in kwargs.items() if given is not None and given is not False}
        unknown = sorted(asked - HARMLESS)
        if unknown:
            self.problems.append(f"layer {layer} needs {', '.join(unknown)} in attention")
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse what can be told before weights are loaded.

    Raises:
        ModelRefused: with the reason.
    """
    if config.is_encoder_decoder:
        raise ModelRefused(f"model {name!r} is an encoder-decoder; only decoder-only models can be served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelRefused(
            f"model {name!r} ({config.model_type}) cannot be served: transformers has no causal model of it"
        )
    for problem in _config_problems(config.get_text_config(decoder=True)):
        raise ModelRefused(f"model {name!r} ({config.model_type}) cannot be served: {problem}")


def _config_problems(config: PreTrainedConfig) -> Iterator[str]:
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if strange:
        yield f"it has layers of type {', '.join(strange)}, which the engine does not have"
    if getattr(config, "max_position_embeddings", None) is None:
        yield "its config.json does not say max_position_embeddings, the most tokens it can take"


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens a request may have: as many as the model takes, or fewer where its rope would change."""
    length: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "longrope":
            length = min(length, parameters["original_max_position_embeddings"])
    return length


@torch.inference_mode()
def probe_layout(name: str, model: PreTrainedModel, dtype: str, block_size: int) -> KVLayout:
    """The layout of a model's KV. Leaves the model without a usable attention function.

    Raises:
        ModelRefused: attention is asked for something it does not have, or a layer goes without it.
    """
    probe = Probe()
    AttentionInterface.register(PROBE, probe)
    model.set_attn_implementation(PROBE)
    token_ids = torch.tensor([[1, 2, 3]], device=model.device)
    model(input_ids=token_ids, position_ids=torch.arange(3, device=model.device)[None], use_cache=False)
    config = model.config.get_text_config(decoder=True)
    problems = probe.problems + list(_coverage_problems(probe, config))
    if problems:
        raise ModelRefused(f"model {name!r} ({model.config.model_type}) cannot be served: {problems[0]}")
    return KVLayout(
        dtype=dtype, block_size=block_size, layers=tuple(layer for _, layer in sorted(probe.layers.items()))
    )


def _coverage_problems(probe: Probe, config: PreTrainedConfig) -> Iterator[str]:
    missing = sorted(set(range(config.num_hidden_layers)) - probe.layers.keys())
    if missing:
        yield f"layers {missing} do not use transformers' attention interface, so their state would be lost"
    for layer, window in sorted(probe.windows.items()):
        if _is_sliding(config, layer) and window is None:
            yield f"layer {layer} has a sliding window in config.json that it does not tell attention"


def _is_sliding(config: PreTrainedConfig, layer: int) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return bool(layer_types[layer] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
