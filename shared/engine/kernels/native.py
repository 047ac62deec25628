"""Attention in C++ on a CPU (`decode.cpp` and `prefill.cpp` in `shared/engine/native/`), where it could be compiled."""

import torch

from shared.engine.kernels import Kernels
from shared.engine.native.library import DTYPES, Library
from shared.kv.layout import KVLayout

LANES = 16


def native_kernels(layout: KVLayout, library: Library) -> Kernels | None:
    """The native kernels for a layout; None where there are none for it."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    dims = {dim for layer in layout.layers for dim in (layer.key_dim, layer.value_dim)}
    if dtype not in DTYPES or any(dim % LANES for dim in dims):
        return None
    kernels = NativeKernels(library, dtype, torch.get_num_threads())
    return Kernels(kernels.paged_decode, kernels.paged_prefill, kernels.put)


class NativeKernels:
    """The functions of the library for one type of KV."""

    def __init__(self, library: Library, dtype: torch.dtype, num_threads: int) -> None:
        self._decode = library.function("decode", dtype)
        self._prefill = library.function("prefill", dtype)
        self._put = library.function("put", dtype)
        self._num_threads = num_threads

    def paged_decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `plain.paged_decode`."""
        num_rows, num_heads, key_dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        head_sinks = None if sinks is None else sinks.detach().float().contiguous()
        output = torch.empty(num_rows, num_heads, values.shape[3], dtype=query.dtype)
        self._decode(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            *(keys.data_ptr(), *keys.stride()[:3], key_dim),
            *(values.data_ptr(), *values.stride()[:3], values.shape[3]),
            *(tables.data_ptr(), tables.stride(0), lengths.data_ptr()),
            None if head_sinks is None else head_sinks.data_ptr(),
            output.data_ptr(),
            *(num_rows, num_heads, keys.shape[2], keys.shape[1]),
            *(scale, softcap or 0.0, window or 0, self._num_threads),
        )
        return output

    def paged_prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        first: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `PagedPrefill` documents."""
        num_tokens, num_heads, key_dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        head_sinks = None if sinks is None else sinks.detach().float().contiguous()
        output = torch.empty(num_tokens, num_heads, values.shape[3], dtype=query.dtype)
        self._prefill(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), *keys.stride()[:3], key_dim),
            *(values.data_ptr(), *values.stride()[:3], values.shape[3]),
            *(table.data_ptr(), first, first + num_tokens),
            None if head_sinks is None else head_sinks.data_ptr(),
            output.data_ptr(),
            *(num_heads, keys.shape[2], keys.shape[1]),
            *(scale, softcap or 0.0, window or 0, self._num_threads),
        )
        return output

    def put(self, pool: torch.Tensor, heads: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
        """As `plain.put`."""
        num_tokens, num_heads, dim = heads.shape
        if heads.stride(2) != 1:
            heads = heads.contiguous()
        self._put(
            *(pool.data_ptr(), pool.stride(0), pool.stride(1)),
            *(heads.data_ptr(), heads.stride(0), heads.stride(1)),
            *(blocks.data_ptr(), offsets.data_ptr()),
            *(num_tokens, num_heads, dim),
        )
