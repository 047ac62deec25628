"""RMSNorm (arXiv 1910.07467) in one pass, for the modules of transformers that compute it in five."""

import torch
from torch import nn

from shared.engine.modules.same import computes_the_same
from shared.engine.native import layer
from shared.engine.native.library import DTYPES, Library

KINDS = (0, 1)
"""Weights that multiply the narrowed value (Llama), or 1 + weight in fp32 (Gemma); see `elementwise.cpp`."""


class NativeRMSNorm(nn.Module):
    """RMSNorm over the last dimension. Rows of another type than the weight's go to the model's own."""

    def __init__(self, own: nn.Module, weight: torch.Tensor, eps: float, kind: int, library: Library) -> None:
        super().__init__()
        self._own = own
        self.weight = weight
        self._eps = eps
        self._kind = kind
        self._kernel = library.function("rms_norm", weight.dtype)
        self._num_threads = torch.get_num_threads()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same."""
        if rows.dtype != self.weight.dtype:
            return self._own(rows)  # type: ignore[no-any-return]
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        size = rows.shape[-1]
        self._kernel(
            *(rows.data_ptr(), self.weight.data_ptr(), output.data_ptr()),
            *(rows.numel() // size, size, self._eps, self._kind, self._num_threads),
        )
        return output

    def struct(self) -> layer.Norm:
        """What `layer.cpp` needs to know of it."""
        return layer.Norm(weight=self.weight.data_ptr(), size=self.weight.shape[0], eps=self._eps, kind=self._kind)


@torch.inference_mode()
def replace_norms(model: nn.Module, library: Library) -> int:
    """Put a `NativeRMSNorm` in place of every norm of `model` that it computes like; how many those are."""
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RMSNorm" in type(child).__name__:
                native = _native(child, library)
                if native is not None:
                    setattr(parent, name, native)
                    num_replaced += 1
    return num_replaced


def _native(own: nn.Module, library: Library) -> NativeRMSNorm | None:
    eps = getattr(own, "variance_epsilon", getattr(own, "eps", None))
    weight = getattr(own, "weight", None)
    if eps is None or weight is None or weight.dim() != 1 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    for kind in KINDS:
        native = NativeRMSNorm(own, weight, float(eps), kind, library)
        if computes_the_same(native, own, weight.shape[0], weight.dtype):
            return native
    return None
