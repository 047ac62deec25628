"""Which decoder layers could be one call (`layers.py`), by what they are made of.

Their parts have to be ours already, of sizes that fit together, and to stand where `layer.cpp` has them. And their code
must mention nothing else, which a trial of a few tokens may not show; what it does with what it mentions, the trial has
to show (`layer_trial.py`).
"""

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared.engine.modules.gated import NativeGatedMLP
from shared.engine.modules.last_layer import ForRows
from shared.engine.modules.linears import KernelLinear, split
from shared.engine.modules.norms import NativeRMSNorm
from shared.kv.layout import LayerLayout

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}
"""What `native.Layer` calls the parts of attention, and what transformers calls them."""
PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")
NORMS: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),  # Llama, Qwen, Mistral
    (
        *("input_layernorm", "post_attention_layernorm"),  # Gemma 2 and 3
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
)
"""Where norms may stand, and what they are called there by those whose layers have all of them and no others."""
LAYER_CODE = frozenset(
    {
        *("self_attn", "mlp", "residual_multiplier", *(name for norms in NORMS for name in norms if name)),
        *("resid_attn_dropout", "resid_mlp_dropout"),  # not in inference
    }
)
"""What the code of a layer may mention."""
ATTENTION_CODE = frozenset(
    {
        *PROJECTIONS.values(),
        *HEAD_NORMS.values(),
        *("qkv_proj", "num_attention_heads", "num_key_value_heads"),
        *("shape", "view", "transpose", "reshape", "contiguous", "head_dim", "layer_idx", "getattr"),
        *("apply_rotary_pos_emb", "use_rope", "is_sliding"),
        *("ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation", "eager_attention_forward"),
        *("scaling", "sliding_window", "attn_logit_softcapping"),  # which our attention is told
        *("training", "attention_dropout", "residual_dropout", "nn", "functional", "dropout"),  # not in inference
        "update",  # of a cache that there is not
    }
)
"""What the code of its attention may mention."""


@dataclass(slots=True, frozen=True)
class Parts:
    """What a layer is made of; linears and norms by the names that `native.Layer` has for them.

    Args:
        index: the number of the layer, by which attention and the pool know it.
        residual: what comes out of attention and of the MLP is multiplied by this before it is added.
    """

    index: int
    head_dim: int
    linears: dict[str, KernelLinear]
    norms: dict[str, NativeRMSNorm]
    mlp: NativeGatedMLP
    residual: float

    @property
    def kv(self) -> LayerLayout:
        """What it keeps of a token."""
        num_kv_heads = self.linears["key"].out_features // self.head_dim
        return LayerLayout(num_kv_heads=num_kv_heads, key_dim=self.head_dim, value_dim=self.head_dim)

    def fit(self, dtype: torch.dtype) -> bool:
        """Whether all are of this type, and each takes what the one before gives."""
        query, key, value, output = (self.linears[name] for name in PROJECTIONS)
        gate, up, down = self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj
        width = output.out_features
        sizes = {name: norm.weight.shape[0] for name, norm in self.norms.items()}
        head_sizes = {"query_norm": query.out_features, "key_norm": key.out_features}
        return (
            all(linear.dtype == dtype for linear in (query, key, value, output, gate, up, down))
            and all(norm.weight.dtype == dtype for norm in self.norms.values())
            and all(linear.in_features == width for linear in (query, key, value, gate, up))
            and (key.out_features, output.in_features) == (value.out_features, query.out_features)
            and (gate.out_features, down.in_features) == (up.out_features, up.out_features)
            and down.out_features == width
            and not any(linear.out_features % self.head_dim for linear in (query, key))
            and query.out_features % key.out_features == 0
            and all(sizes.get(place, width) == width for place in PLACES)
            and all(sizes.get(name, self.head_dim) in (self.head_dim, size) for name, size in head_sizes.items())
        )


def parts_of(layer: nn.Module, dtype: torch.dtype) -> Parts | None:
    """The parts of a layer, if they and its code are those of layers that could be one call with this type."""
    of_layer = _children(layer)
    attention, mlp = of_layer.pop("self_attn", None), of_layer.pop("mlp", None)
    places = next((names for names in NORMS if set(names) - {None} == of_layer.keys()), None)
    if places is None or attention is None or not isinstance(mlp, NativeGatedMLP):
        return None
    of_attention = _children(attention)
    head_norms = {ours: of_attention.pop(own) for ours, own in HEAD_NORMS.items() if own in of_attention}
    linears = _linears(attention, of_attention)
    all_norms = {place: of_layer[own] for place, own in zip(PLACES, places, strict=True) if own} | head_norms
    norms = {name: part for name, part in all_norms.items() if isinstance(part, NativeRMSNorm)}
    index, head_dim = getattr(attention, "layer_idx", None), getattr(attention, "head_dim", None)
    if linears is None or len(norms) < len(all_norms) or not (isinstance(index, int) and isinstance(head_dim, int)):
        return None
    parts = Parts(index, head_dim, linears, norms, mlp, getattr(layer, "residual_multiplier", 1.0))
    suits = _mentions_only(layer, LAYER_CODE) and _mentions_only(attention, ATTENTION_CODE)
    return parts if suits and parts.fit(dtype) else None


def _linears(attention: Any, parts: dict[str, nn.Module]) -> dict[str, KernelLinear] | None:
    """Its projections, if there is nothing else among its parts; queries, keys and values may be one (Phi-3)."""
    linears = {name: part for name, part in parts.items() if isinstance(part, KernelLinear)}
    if linears.keys() == {"qkv_proj", "o_proj"}:
        num_heads, num_kv_heads = attention.config.num_attention_heads, attention.num_key_value_heads
        sizes = [number * attention.head_dim for number in (num_heads, num_kv_heads, num_kv_heads)]
        split_up = split(linears["qkv_proj"], sizes)
        linears = {} if split_up is None else dict(zip(PROJECTIONS, [*split_up, linears["o_proj"]], strict=True))
        return linears or None
    if len(linears) < len(parts) or linears.keys() != set(PROJECTIONS.values()):
        return None
    return {ours: linears[own] for ours, own in PROJECTIONS.items()}


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """By their names, without those that do nothing in inference."""
    return {
        name: child.inner if isinstance(child, ForRows) else child
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout)
    }


def _mentions_only(module: nn.Module, known: frozenset[str]) -> bool:
    """Whether a module's forward has no other names, of globals and attributes or in words, and no code within."""
    function = inspect.unwrap(type(module).forward)
    constants = function.__code__.co_consts
    words = {part for part in constants if isinstance(part, str)} - {function.__doc__}
    has_code = any(isinstance(part, types.CodeType) for part in constants)
    return set(function.__code__.co_names) | words <= known and not has_code
