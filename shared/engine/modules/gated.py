"""Gated MLPs (GLU variants, arXiv 2002.05202) whose activation and product happen where the linears' sums come out."""

import torch
from torch import nn

from shared.engine.modules.linears import KernelLinear, split
from shared.engine.modules.same import computes_the_same

GATES = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), 1),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), 2),
}
"""By the class of an activation, the number that `linear.cpp` has for it: SiLU, and GELU by its tanh approximation."""

ACTIVATIONS = ("act_fn", "activation_fn")
"""Names that modules have for it."""


class NativeGatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), where `gate` is the number of the activation."""

    def __init__(self, gate_proj: KernelLinear, up_proj: KernelLinear, down_proj: KernelLinear, gate: int) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.gate = gate

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        inner = self.gate_proj(rows)
        self.up_proj.into(inner, rows, gate=self.gate)
        output: torch.Tensor = self.down_proj(inner)
        return output


@torch.inference_mode()
def replace_gated_mlps(model: nn.Module, dtype: torch.dtype) -> int:
    """Put a `NativeGatedMLP` in place of every MLP of `model` that it computes like; how many those are.

    Call it after linears have been packed or quantised.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            native = _native(child)
            if native is not None and computes_the_same(native, child, native.gate_proj.in_features, dtype):
                setattr(parent, name, native)
                num_replaced += 1
    return num_replaced


def _native(own: nn.Module) -> NativeGatedMLP | None:
    parts = {name: part for name, part in own.named_children() if isinstance(part, KernelLinear)}
    activations = [GATES.get(type(getattr(own, name)).__name__) for name in ACTIVATIONS if hasattr(own, name)]
    gate_and_up = _gate_and_up(parts)
    if gate_and_up is None or parts.keys() != {"down_proj"} or len(activations) != 1 or activations[0] is None:
        return None
    gate_proj, up_proj = gate_and_up
    return NativeGatedMLP(gate_proj, up_proj, parts["down_proj"], activations[0])


def _gate_and_up(parts: dict[str, KernelLinear]) -> list[KernelLinear] | None:
    """Both, taken out of the parts, in which they may be one (Phi-3)."""
    both = parts.pop("gate_up_proj", None)
    if both is not None:
        return split(both, [both.out_features // 2] * 2)
    found = [parts.pop(name) for name in ("gate_proj", "up_proj") if name in parts]
    return found if len(found) == 2 else None
