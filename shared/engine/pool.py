"""The memory that holds the KV of all requests of an instance, cut into blocks.

Which block belongs to whom is not known here. What a slot holds that was never written is anybody's guess, NaN
included: kernels read no slot behind a request's last token.
"""

from collections.abc import Sequence
from typing import Any

import torch

from shared.engine.blocks import runs
from shared.kv.layout import KVLayout


class KVPool:
    """One tensor `data` [num_blocks, block_elements]; memory that is never written is never touched.

    Behind the blocks stands one more, `trash_block`, which nobody may own: what has to be written somewhere and is of
    no use goes there (`decode_inputs.py`).

    Args:
        layout: what a block holds.
        num_blocks: how many blocks there are for requests.
        device: where they are.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self.trash_block = num_blocks
        # Not on huge pages: decode gains nothing that could be measured, and who is the first to write to one waits
        # until all of it is cleared, which added 10 ms to the first token of 1,024.
        everything = torch.empty(num_blocks + 1, layout.block_elements, dtype=dtype, device=self.device)
        self.data = everything[:num_blocks]
        self.keys: list[torch.Tensor] = []  # per layer [num_blocks + 1, block_size, H, Dk], views of the same memory
        self.values: list[torch.Tensor] = []  # per layer [num_blocks + 1, block_size, H, Dv]
        start = 0
        for layer in layout.layers:
            for views, dim in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                size = layout.block_size * layer.num_kv_heads * dim
                part = everything.narrow(1, start, size)
                views.append(part.view(num_blocks + 1, layout.block_size, layer.num_kv_heads, dim))
                start += size
        assert start == layout.block_elements
        self._bytes = memoryview(b"") if self.device.type != "cpu" else host_bytes(self.data)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy blocks [N] out: keys [N, block_size, H, Dk] and values [N, block_size, H, Dv]."""
        return self.keys[layer].index_select(0, blocks), self.values[layer].index_select(0, blocks)

    def byte_views(self, blocks: Sequence[int], num_bytes: int) -> list[memoryview]:
        """The first `num_bytes` bytes of these blocks, in their order, as writable views straight into the pool.

        There is one view per run of consecutive blocks, for `sock_sendall` and `sock_recv_into` without any copy. Only
        a pool on the CPU has them; `staging.py` has what goes for every pool.
        """
        assert self.device.type == "cpu", "sockets cannot reach a GPU's memory"
        block_bytes = self.layout.block_bytes
        assert 0 <= num_bytes <= len(blocks) * block_bytes, "more bytes than the blocks hold"
        views: list[memoryview] = []
        for start, length in runs(blocks):
            size = min(length * block_bytes, num_bytes)
            if size > 0:
                views.append(self._bytes[start * block_bytes : start * block_bytes + size])
            num_bytes -= size
        return views


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable; they keep its memory alive."""
    array: Any = tensor.view(torch.uint8).view(-1).numpy()
    return memoryview(array)
