"""Gated MLPs (GLU variants, arXiv 2002.05202) whose activation and product happen where the linears' sums come out."""

import torch
from torch import nn

from shared.engine.modules.linears import Int8Linear, NativeLinear
from shared.engine.modules.same import computes_the_same

GATES = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), 1),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), 2),
}
"""By the class of an activation, the number that `linear.cpp` has for it: SiLU, and GELU by its tanh approximation."""

Into = NativeLinear | Int8Linear
PARTS = ("gate_proj", "up_proj", "down_proj")


class NativeGatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), where `gate` is the number of the activation."""

    def __init__(self, gate_proj: Into, up_proj: Into, down_proj: Into, gate: int) -> None:
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
            if all(isinstance(getattr(child, part, None), Into) for part in PARTS):
                native = _native(child, dtype)
                if native is not None:
                    setattr(parent, name, native)
                    num_replaced += 1
    return num_replaced


def _native(own: nn.Module, dtype: torch.dtype) -> NativeGatedMLP | None:
    gate_proj, up_proj, down_proj = (getattr(own, part) for part in PARTS)
    gate = GATES.get(type(getattr(own, "act_fn", None)).__name__)
    if gate is None:
        return None
    native = NativeGatedMLP(gate_proj, up_proj, down_proj, gate)
    return native if computes_the_same(native, own, native.gate_proj.in_features, dtype) else None
