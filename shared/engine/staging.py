"""KV between pool and sockets: bytes in host memory that a socket can send or fill, wherever the pool is.

On a CPU these are the pool's own bytes, and nothing is copied. A GPU's pool is copied through pinned host memory on a
stream of its own, so that steps go on meanwhile: one copy per run of consecutive blocks, which the allocator keeps few,
and no gathering on the GPU. Only KV on the wire takes host memory, and torch keeps that for the next.
"""

from collections.abc import Callable, Sequence

import torch

from shared.engine.blocks import runs
from shared.engine.pool import KVPool, host_bytes
from shared.kv.parcel import Parcel


class InPlace:
    """Staging for a pool on the CPU."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def export(self, blocks: Sequence[int], num_bytes: int) -> Parcel:
        """The first `num_bytes` bytes of these blocks; to be read once settled."""
        return Parcel(self._pool.byte_views(blocks, num_bytes))

    def receive(self, blocks: Sequence[int], num_bytes: int) -> Parcel:
        """Memory for the first `num_bytes` bytes of these blocks; to be filled, then settled."""
        return Parcel(self._pool.byte_views(blocks, num_bytes))


class Staged:
    """Staging for a pool on a GPU. Of a pool on the CPU it makes copies, too, which is how it is tested."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._stream: torch.cuda.Stream | None = None
        if pool.device.type == "cuda":
            self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]

    def export(self, blocks: Sequence[int], num_bytes: int) -> Parcel:
        """As `InPlace.export`. The steps that filled these blocks have ended: the host has read what they sampled."""
        buffer = self._buffer(blocks, num_bytes)

        def move() -> None:
            for part, of_pool in self._pairs(buffer, blocks):
                part.copy_(of_pool, non_blocking=True)

        return Parcel([host_bytes(buffer)[:num_bytes]], lambda: self._on_stream(move))

    def receive(self, blocks: Sequence[int], num_bytes: int) -> Parcel:
        """As `InPlace.receive`."""
        buffer = self._buffer(blocks, num_bytes)

        def move() -> None:
            if self._stream is not None:
                # a step that has not ended may still write for a request that has left these blocks
                self._stream.wait_stream(torch.cuda.default_stream(self._pool.device))
            for part, of_pool in self._pairs(buffer, blocks):
                of_pool.copy_(part, non_blocking=True)

        return Parcel([host_bytes(buffer)[:num_bytes]], lambda: self._on_stream(move))

    def _buffer(self, blocks: Sequence[int], num_bytes: int) -> torch.Tensor:
        layout = self._pool.layout
        num_blocks = -(-num_bytes // layout.block_bytes)
        assert num_blocks <= len(blocks), "more bytes than the blocks hold"
        return host_tensor((num_blocks, layout.block_elements), self._pool.data.dtype, self._pool.device)

    def _pairs(self, buffer: torch.Tensor, blocks: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which blocks of the buffer go with which of the pool, per run."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = 0
        for start, length in runs(blocks[: buffer.shape[0]]):
            pairs.append((buffer[first : first + length], self._pool.data[start : start + length]))
            first += length
        return pairs

    @torch.inference_mode()
    def _on_stream(self, move: Callable[[], None]) -> None:
        """Move, and return when it is done."""
        if self._stream is None:
            move()
            return
        with torch.cuda.stream(self._stream):
            move()
            done = self._stream.record_event()
        done.synchronize()


Staging = InPlace | Staged


def staging_of(pool: KVPool) -> Staging:
    """The way between this pool and sockets."""
    return InPlace(pool) if pool.device.type == "cpu" else Staged(pool)


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised host memory, pinned if it is for copies to and from a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
