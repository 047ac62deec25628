"""Linears whose weights are laid out anew at load: for our own kernel, or else for oneDNN.

Linears are the largest part of a step on a CPU. With few rows they are as fast as weights come from memory, and our
kernel reads them in one straight line; it also sums in the same order whatever the number of rows, so that a request's
results do not depend on its batch. Where it cannot be compiled, torch's private oneDNN operators spare the reordering
that `F.linear` does on every call. Each linear is tried, and whatever fails stays as it was.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from inspect import getsource
from itertools import accumulate
from typing import Any, Literal, Self, TypeGuard

import torch
from torch import nn
from torch.nn.functional import linear

from shared.engine.modules.same import computes_the_same
from shared.engine.native import layer
from shared.engine.native.library import DTYPES, Library

Quantization = Literal["none", "int8"]

ROUTERS = ("gate", "router")
"""How the names of linears end that choose experts: they are small, and a choice is not a matter of degree."""
PANEL = 32
"""Output features that lie together in weights packed for our kernel."""
INT8_FEATURES = 16
"""Input features of a linear with 8-bit weights are a multiple of this."""
STEP = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
"""Input features of an output feature that lie side by side: what fills 32 bits."""

log = logging.getLogger(__name__)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay weights [N, K] out as [N / PANEL, K / STEP, PANEL, STEP]; features that lack to a whole panel are zero."""
    num_out, num_in = weight.shape
    step = STEP[weight.dtype]
    panels = weight.new_zeros(-(-num_out // PANEL) * PANEL, num_in)
    panels[:num_out] = weight
    return panels.view(-1, PANEL, num_in // step, step).transpose(1, 2).contiguous()


class KernelLinear(nn.Module, ABC):
    """`nn.Linear` by a kernel of ours."""

    packed: torch.Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.bias = plain.bias
        self.dtype = plain.weight.dtype
        """Of rows and outputs."""
        self._num_threads = torch.get_num_threads()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        output = rows.new_empty(*rows.shape[:-1], self.out_features)
        self.into(output, rows, gate=0)
        return output

    @abstractmethod
    def into(self, output: torch.Tensor, rows: torch.Tensor, gate: int) -> None:
        """Write to `output`; with a gate (`gated.py`) multiply by the activation of what it holds."""

    def part(self, start: int, size: int) -> Self:
        """Outputs `start` .. `start + size - 1` alone, with the same packed weights; `start` begins a panel."""
        assert start % PANEL == 0, "a panel stays whole"
        part = copy.copy(self)
        bias = None if self.bias is None else nn.Parameter(self.bias[start : start + size], requires_grad=False)
        part._parameters = {"bias": bias}
        part.packed = self.packed[start // PANEL : -(-(start + size) // PANEL)]
        part.out_features = size
        return part

    def struct(self) -> layer.Linear:
        """What `layer.cpp` needs to know of it."""
        return layer.Linear(
            packed=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
        )


class NativeLinear(KernelLinear):
    """With weights of the type of the rows."""

    def __init__(self, plain: nn.Linear, library: Library) -> None:
        super().__init__(plain)
        self.packed = pack(plain.weight.detach())
        self._kernel = library.function("linear", plain.weight.dtype)

    def into(self, output: torch.Tensor, rows: torch.Tensor, gate: int) -> None:
        """As `KernelLinear.into`."""
        rows = rows.contiguous()
        self._kernel(
            rows.data_ptr(),
            rows.numel() // self.in_features,
            self.packed.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            output.data_ptr(),
            *(self.in_features, self.out_features, gate, self._num_threads),
        )


def quantised_weights(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, K] as int8 and a scale for each output [N]: symmetric, by the largest magnitude of a row."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class Int8Linear(KernelLinear):
    """With 8-bit weights, one scale per output feature, and rows quantised as they come (W8A8)."""

    def __init__(self, plain: nn.Linear, library: Library) -> None:
        super().__init__(plain)
        quantised, scales = quantised_weights(plain.weight)
        num_padded = -(-self.out_features // PANEL) * PANEL
        self.packed = pack(quantised)
        self._scales = torch.zeros(num_padded)
        self._scales[: self.out_features] = scales
        self._sums = torch.zeros(num_padded, dtype=torch.int32)
        self._sums[: self.out_features] = 128 * quantised.sum(1, dtype=torch.int32)
        self._kernel = library.function("linear_int8", plain.weight.dtype)

    def into(self, output: torch.Tensor, rows: torch.Tensor, gate: int) -> None:
        """As `KernelLinear.into`."""
        rows = rows.contiguous()
        num_rows = rows.numel() // self.in_features
        quantised = torch.empty(num_rows, self.in_features, dtype=torch.uint8)
        row_scales = torch.empty(num_rows)
        self._kernel(
            rows.data_ptr(),
            num_rows,
            *(self.packed.data_ptr(), self._scales.data_ptr(), self._sums.data_ptr()),
            None if self.bias is None else self.bias.data_ptr(),
            output.data_ptr(),
            *(self.in_features, self.out_features, gate),
            *(quantised.data_ptr(), row_scales.data_ptr(), self._num_threads),
        )

    def part(self, start: int, size: int) -> Self:
        """As `KernelLinear.part`."""
        part = super().part(start, size)
        part._scales, part._sums = self._scales[start:], self._sums[start:]
        return part

    def struct(self) -> layer.Linear:
        """As `KernelLinear.struct`."""
        struct = super().struct()
        struct.scales, struct.sums = self._scales.data_ptr(), self._sums.data_ptr()
        return struct


def split(linear: KernelLinear, sizes: Sequence[int]) -> list[KernelLinear] | None:
    """A linear for so many outputs each, one after another; None where a part would begin within a panel."""
    starts = list(accumulate(sizes, initial=0))
    if starts.pop() != linear.out_features or any(start % PANEL for start in starts):
        return None
    return [linear.part(start, size) for start, size in zip(starts, sizes, strict=True)]


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU. The weights exist in oneDNN's layout only."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.bias = plain.bias
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return result


@torch.inference_mode()
def pack_linears(model: nn.Module, library: Library | None) -> int:
    """Put a faster linear in place of every one of `model` that it computes like; how many those are.

    Without a library only oneDNN's are tried.
    """
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child, parent, name) and child.weight.device.type == "cpu":
                packed = _packed(child, library)
                if packed is not None:
                    setattr(parent, name, packed)
                    num_packed += 1
    return num_packed


@torch.inference_mode()
def quantise_linears(model: nn.Module, library: Library) -> int:
    """Put an `Int8Linear` in place of every linear of `model` that has a kernel; how many those are.

    The output layer is among them, routers of mixtures of experts are not. Each is compared with what its quantised
    weights give in plain torch, and with what it was; one that fails stays as it was.
    """
    num_quantised = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child, parent, name) and not name.endswith(ROUTERS) and _suits(child, INT8_FEATURES):
                int8 = Int8Linear(child, library)
                if _is_quantised_right(int8, child):
                    setattr(parent, name, int8)
                    num_quantised += 1
    return num_quantised


def _is_quantised_right(int8: Int8Linear, plain: nn.Linear) -> bool:
    weights, weight_scales = quantised_weights(plain.weight)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, plain.in_features, generator=generator).to(plain.weight.dtype)
    row_scales = rows.float().abs().amax(1, keepdim=True) / 127
    sums = (rows.float() / row_scales).round_() @ weights.float().T
    emulated = sums * row_scales * weight_scales + (0 if plain.bias is None else plain.bias.float())
    got, own = int8(rows).float(), linear(rows, plain.weight, plain.bias).float()
    largest = own.abs().max().clamp_min(1e-12)
    return bool((got - emulated).abs().max() <= 0.01 * largest and (got - own).abs().max() <= 0.1 * largest)


def _is_plain(child: nn.Module, parent: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Whether a child is an `nn.Linear`, and no subclass, which may do more than multiply; and is only ever called.

    Some routers of mixtures of experts take the weight of their linear and multiply themselves.
    """
    kind: Any = type(parent)
    return type(child) is nn.Linear and f"self.{name}.weight" not in _source(kind)


@cache
def _source(kind: Any) -> str:
    try:
        return getsource(kind)
    except (OSError, TypeError):
        return ""


def _packed(plain: nn.Linear, library: Library | None) -> NativeLinear | PackedLinear | None:
    """The first packed form that there is and that computes what the plain one does."""
    if library is not None and _suits(plain, STEP.get(plain.weight.dtype, 1)):
        native = NativeLinear(plain, library)
        if _computes_like(native, plain):
            return native
    try:
        packed = PackedLinear(plain)
        return packed if _computes_like(packed, plain) else None
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.debug("linears are not packed: %s", error)
        return None


def _suits(plain: nn.Linear, multiple: int) -> bool:
    """Whether there is a kernel for the type, and it takes this many input features."""
    return plain.weight.dtype in DTYPES and plain.weight.device.type == "cpu" and plain.in_features % multiple == 0


def _computes_like(packed: nn.Module, plain: nn.Linear) -> bool:
    def own(rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, plain.weight, plain.bias)

    return computes_the_same(packed, own, plain.in_features, plain.weight.dtype, scales=(1.0,))
