"""Packed weights side by side in memory, in the order in which a step reads them, on huge pages.

A step reads all weights once, so it is as fast as memory is.
"""

from torch import nn

from shared.engine.memory import huge_pages
from shared.engine.modules.linears import KernelLinear

ALIGNMENT = 4096


def lay_together(model: nn.Module) -> int:
    """Move the packed weights of all native linears of `model` to one place; how many bytes they are.

    One after another, so that hardly more memory is needed meanwhile.
    """
    linears = [module for module in model.modules() if isinstance(module, KernelLinear)]
    sizes = [-(-linear.packed.nbytes // ALIGNMENT) * ALIGNMENT for linear in linears]
    if not linears:
        return 0
    arena, start = huge_pages(sum(sizes)), 0
    for linear, size in zip(linears, sizes, strict=True):
        place = arena[start : start + linear.packed.nbytes].view(linear.packed.dtype).view(linear.packed.shape)
        linear.packed = place.copy_(linear.packed)
        start += size
    return start
