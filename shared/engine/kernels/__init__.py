"""Kernels over the paged pool. `plain.py` documents them; the others are called in the same way."""

from typing import NamedTuple, Protocol

import torch


class PagedDecode(Protocol):
    """What `plain.paged_decode` documents."""

    def __call__(
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
    ) -> torch.Tensor: ...


class PagedPrefill(Protocol):
    """Attend for the T tokens of one request's chunk, whose KV is in the pool already.

    Args:
        query: [T, Hq, Dk], may be strided.
        keys, values, scale, window, softcap, sinks: as for `plain.paged_decode`.
        table: int32 [num_blocks], the request's blocks.
        first: the position of the first token.

    Returns:
        [T, Hq, Dv].
    """

    def __call__(
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
    ) -> torch.Tensor: ...


class Put(Protocol):
    """What `plain.put` documents."""

    def __call__(
        self, pool: torch.Tensor, heads: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor
    ) -> None: ...


class Kernels(NamedTuple):
    """What attention is computed with."""

    decode: PagedDecode
    prefill: PagedPrefill | None
    """Where there is none, keys and values are gathered for `plain.prefill`."""
    put: Put
