"""Which blocks of the KV pool are free: pure bookkeeping, owned by the event loop.

A run is a range of consecutive block ids. One run is one contiguous range of bytes in the pool, so it travels in one
piece; that is why allocation tries hard to hand out a single run.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Coalesce consecutive ids, in the given order: [4, 5, 6, 2] -> [(4, 3), (2, 1)] as (start, length)."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and sum(found[-1]) == block:
            start, length = found[-1]
            found[-1] = (start, length + 1)
        else:
            found.append((block, 1))
    return found


class BlockAllocator:
    """Hands out the blocks 0 .. num_blocks - 1.

    Args:
        num_blocks: how many blocks the pool has.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self._starts = [0]  # of the free runs, ascending; no two runs touch
        self._lengths = {0: num_blocks}
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` blocks, or return None and take nothing when fewer are free.

        They come from the smallest free run that holds them all; if none does, from the longest runs first, so that
        they are in as few pieces as possible.
        """
        assert num_blocks > 0, "allocate at least one block"
        if num_blocks > self._num_free:
            return None
        fitting = [start for start in self._starts if self._lengths[start] >= num_blocks]
        if fitting:
            return self._take(min(fitting, key=self._lengths.__getitem__), num_blocks)
        blocks: list[int] = []
        for start in sorted(self._starts, key=self._lengths.__getitem__, reverse=True):
            blocks += self._take(start, min(self._lengths[start], num_blocks - len(blocks)))
            if len(blocks) == num_blocks:
                break
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back; they merge with the free runs beside them. A block that is free already is a bug."""
        for start, length in runs(sorted(blocks)):
            self._give_back(start, length)

    def _take(self, start: int, num_blocks: int) -> list[int]:
        length = self._lengths.pop(start)
        position = bisect_left(self._starts, start)
        if length == num_blocks:
            del self._starts[position]
        else:
            self._starts[position] = start + num_blocks
            self._lengths[start + num_blocks] = length - num_blocks
        self._num_free -= num_blocks
        return list(range(start, start + num_blocks))

    def _give_back(self, start: int, length: int) -> None:
        end = start + length
        assert 0 <= start < end <= self.num_blocks, f"blocks {start}..{end - 1} are not of this pool"
        position = bisect_left(self._starts, start)
        before = self._starts[position - 1] if position > 0 else None
        after = self._starts[position] if position < len(self._starts) else None
        assert before is None or before + self._lengths[before] <= start, f"block {start} is freed twice"
        assert after is None or end <= after, f"block {after} is freed twice"
        self._num_free += length
        if after == end:
            length += self._lengths.pop(after)
            del self._starts[position]
        if before is not None and before + self._lengths[before] == start:
            self._lengths[before] += length
        else:
            insort(self._starts, start)
            self._lengths[start] = length
