"""Rotary position embedding (RoFormer, arXiv 2104.09864) in place, for attention modules that do it in a dozen steps.

transformers' modules call a function of their file, `apply_rotary_pos_emb`. A module gets a `forward` of its own that
finds ours under that name; nothing outside of the module changes.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shared.engine.modules.same import TOLERANCE
from shared.engine.native.library import DTYPES, Library

NAME = "apply_rotary_pos_emb"
TRIED_SHAPE = (3, 5, 2)
"""Tokens, query heads and key heads of the test."""

Apply = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class NativeRotary:
    """`apply_rotary_pos_emb` of Llama and of all who do as it does."""

    def __init__(self, library: Library, dtype: torch.dtype, own: Apply) -> None:
        self._own = own
        self._dtype = dtype
        self._kernel = library.function("rotate", dtype)
        self._num_threads = torch.get_num_threads()

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the first R elements of query [1, Hq, T, D] and key [1, H, T, D], in place, by cos and sin [1, T, R].

        What comes in another form than it was tested in goes to the model's own function.
        """
        size = cos.shape[-1]
        suits = query.dtype == key.dtype == cos.dtype == sin.dtype == self._dtype
        if not suits or unsqueeze_dim != 1 or cos.shape != (1, query.shape[2], size) or size > query.shape[3]:
            return self._own(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def _rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if heads.stride(3) != 1:
            heads = heads.contiguous()
        _, num_heads, num_tokens, _ = heads.shape
        self._kernel(
            *(heads.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(num_tokens, num_heads, cos.shape[-1], heads.stride(2), heads.stride(1), self._num_threads),
        )
        return heads


@torch.inference_mode()
def replace_rotary(model: nn.Module, dtype: torch.dtype, library: Library) -> int:
    """Let every attention module of `model` rotate with `NativeRotary`, where that computes the same; how many do."""
    if dtype not in DTYPES:
        return 0
    num_replaced = 0
    for module in model.modules():
        forward: Any = type(module).forward
        own = getattr(forward, "__globals__", {}).get(NAME)
        head_dim = getattr(module, "head_dim", None)
        called = NAME in getattr(getattr(forward, "__code__", None), "co_names", ())
        if own is None or not called or not isinstance(head_dim, int):
            continue
        ours = NativeRotary(library, dtype, own)
        if _same(ours, own, head_dim, head_dim, dtype) and _same(ours, own, head_dim, head_dim // 2, dtype):
            module.forward = types.MethodType(_with(forward, ours), module)
            num_replaced += 1
    return num_replaced


def _with(forward: types.FunctionType, ours: Apply) -> types.FunctionType:
    """The same function in a module namespace that has ours under the name."""
    space = {**forward.__globals__, NAME: ours}
    copy = types.FunctionType(forward.__code__, space, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _same(ours: Apply, own: Apply, head_dim: int, size: int, dtype: torch.dtype) -> bool:
    """Whether both agree on heads whose first `size` elements are rotated, or the own one cannot do that."""
    num_tokens, num_heads, num_kv_heads = TRIED_SHAPE
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key = (random(1, num_tokens, heads, head_dim).transpose(1, 2) for heads in (num_heads, num_kv_heads))
    cos, sin = (random(1, size, num_tokens).transpose(1, 2) for _ in range(2))
    try:
        expected = own(query.clone(), key.clone(), cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return size < head_dim
    return all(
        one.shape == other.shape
        and float((one.float() - other.float()).abs().max()) <= TOLERANCE[dtype] * float(one.float().abs().max())
        for one, other in zip(expected, ours(query.clone(), key.clone(), cos, sin), strict=True)
    )
