"""Which operations of a computation need the host: to read values of its device, or to send it new ones.

A CUDA graph cannot have any: it is recorded once and replayed without the host. On a CPU they cost nothing, but they
are called just the same, so a model can be looked at anywhere. What C++ code does by itself is not seen.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ALWAYS = frozenset(
    {
        *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
        *("equal", "allclose", "is_nonzero"),
        # their results have as many elements as values say
        *("nonzero", "argwhere", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount"),
        # made of values that the host has
        *("tensor", "from_numpy"),
    }
)


@torch.inference_mode()
def host_reads(compute: Callable[[], object]) -> set[str]:
    """The names of such operations that `compute` calls."""
    watch = _Watch()
    with watch:
        compute()
    return watch.found


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ALWAYS or _reads(name, args, kwargs or {}):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Of operations that do so with some arguments only."""
    if name in ("__getitem__", "__setitem__"):
        one_value = name == "__setitem__" and (not isinstance(args[2], torch.Tensor) or args[2].numel() == 1)
        return any((_is_mask(part) and not one_value) or _is_bound(part) for part in _parts(args[1]))
    if name in ("index_put_", "index_put"):
        return any(_is_mask(part) for part in _parts(args[1]))
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    return False


def _parts(index: Any) -> Iterable[Any]:
    return index if isinstance(index, (tuple, list)) else (index,)


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)


def _is_bound(part: Any) -> bool:
    """Whether an index is a slice that ends or starts where a tensor says."""
    return isinstance(part, slice) and any(isinstance(bound, torch.Tensor) for bound in (part.start, part.stop))
