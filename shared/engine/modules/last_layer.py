"""In a model's last layer, what follows attention is computed for the rows that give a token only.

The keys and values of a prompt's other tokens are in the pool by then, and nothing reads their last hidden state. A
layer that is one call (`layers.py`) does so by itself.
"""

from collections.abc import Callable

import torch
from torch import nn

from shared.engine.modules.gated import NativeGatedMLP
from shared.engine.modules.linears import KernelLinear, PackedLinear

Rows = Callable[[], torch.Tensor | None]
"""The rows of a step that give a token, int64 [N]; None where all do."""


class ForRows(nn.Module):
    """A module that works row by row, applied to some rows of a step; the others are zero. What is no step, as the rows
    that a mixture of experts gives to one of them, is computed whole.
    """

    def __init__(self, inner: nn.Module, rows: Rows, out_features: int) -> None:
        super().__init__()
        self.inner = inner
        self._rows = rows
        self._out_features = out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, in_features] to [1, T, out_features], or [N, in_features] to [N, out_features]."""
        rows = self._rows()
        if rows is None or hidden.dim() != 3:
            whole: torch.Tensor = self.inner(hidden)
            return whole
        output = hidden.new_zeros(*hidden.shape[:-1], self._out_features)
        if len(rows):
            output[:, rows] = self.inner(hidden[:, rows])
        return output


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The one list of `num_layers` modules in a model; None where there are several or none."""
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_layers]
    return found[0] if len(found) == 1 else None


def spare_last_layer(model: nn.Module, num_layers: int, rows: Rows) -> int:
    """Put the output projection and the gated MLP of the last layer behind a `ForRows`; how many those are.

    Call it last: only modules of ours are known to work row by row.
    """
    layers = decoder_layers(model, num_layers)
    if layers is None:
        return 0
    num_spared = 0
    for parent in list(layers[-1].modules()):
        for name, child in list(parent.named_children()):
            out_features = _out_features(name, child)
            if out_features is not None:
                setattr(parent, name, ForRows(child, rows, out_features))
                num_spared += 1
    return num_spared


def _out_features(name: str, child: nn.Module) -> int | None:
    if isinstance(child, NativeGatedMLP):
        return child.down_proj.out_features
    if name == "o_proj" and isinstance(child, KernelLinear | PackedLinear):
        return child.out_features
    return None
