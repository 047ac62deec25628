"""Linears whose weights are laid out once for oneDNN, where torch has the means and a test finds them right.

Linears are the largest part of a step on a CPU. `F.linear` reorders weights on every call; packed ones are reordered at
load. torch has this in private operators, so each linear is tried, and whatever fails stays as it was.
"""

import logging

import torch
from torch import nn
from torch.nn.functional import linear

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference from `F.linear`, as a part of the largest value."""
TRIED_ROWS = (1, 5)

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU. The weights exist in oneDNN's layout only."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.bias = plain.bias
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return result


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Puts `PackedLinear` in place of every linear of `model` that it computes like; how many those are.

    Only exact `nn.Linear`s: a subclass may do more than multiply.
    """
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                packed = _packed(child)
                if packed is not None:
                    setattr(parent, name, packed)
                    num_packed += 1
    return num_packed


def _packed(plain: nn.Linear) -> PackedLinear | None:
    """The packed form, if there is one and it computes what the plain one does."""
    try:
        packed = PackedLinear(plain)
        worst = max(_difference(packed, plain, num_rows) for num_rows in TRIED_ROWS)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.debug("linears are not packed: %s", error)
        return None
    allowed = TOLERANCE.get(plain.weight.dtype, 0.0)
    return packed if worst <= allowed else None


def _difference(packed: PackedLinear, plain: nn.Linear, num_rows: int) -> float:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(1, num_rows, plain.in_features, generator=generator).to(plain.weight.dtype)
    expected = linear(rows, plain.weight, plain.bias)
    return float((packed(rows) - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
