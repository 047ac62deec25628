"""KV blocks that requests share where their tokens begin alike: pure bookkeeping, owned by the event loop.

A full block may have a name: a hash over its tokens and all before them. Who comes with tokens of the same name gets
the same block. A block is in use while requests hold it (it counts their references); once nobody does, it is cached
if it is named and has all its KV, else free. Cached blocks are evicted, least recently used first, when free ones are
short.
"""

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from shared.engine.blocks import BlockAllocator

HASH_BYTES = 16


def block_hashes(token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The name of each full block of `token_ids`: a hash over the name of the block before and the block's tokens.

    It is a cryptographic one, as with two names alike a request would go on from somebody else's text.

    Args:
        known: the names of leading blocks, as far as they have been worked out before.
    """
    hashes = list(known)
    name = hashes[-1] if hashes else b""
    packed = struct.Struct(f"<{block_size}Q")
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = packed.pack(*token_ids[start : start + block_size])
        name = blake2b(name + tokens, digest_size=HASH_BYTES).digest()
        hashes.append(name)
    return hashes


@dataclass(slots=True, frozen=True)
class Match:
    """What is here of a sequence: `blocks` hold its leading tokens. It is out of date once the cache has changed.

    Args:
        num_tokens: of the sequence.
        hashes: the names of its full blocks.
    """

    num_tokens: int
    hashes: list[bytes]
    blocks: list[int]


@dataclass(slots=True, eq=False)
class Allocation:
    """The blocks that one request holds; the first `num_matched` of them were here before it."""

    blocks: list[int]
    num_matched: int
    hashes: list[bytes]
    """The names of its leading full blocks, as far as they have been worked out."""


class PrefixCache:
    """Hands out blocks, those that are here already first.

    Args:
        num_blocks: how many blocks the pool has.
        block_size: tokens in a block.
        enabled: without, no block is ever named, and so none is shared or cached.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enabled: bool = True) -> None:
        self.num_blocks = num_blocks
        self.num_query_tokens = 0
        """Tokens of all sequences that blocks were taken for."""
        self.num_hit_tokens = 0
        """Those of them whose blocks were here."""
        self._block_size = block_size
        self._enabled = enabled
        self._allocator = BlockAllocator(num_blocks)
        self._references: Counter[int] = Counter()
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._complete: set[int] = set()
        """Named blocks that have all their KV."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Complete blocks that nobody holds, least recently used first."""

    @property
    def num_free(self) -> int:
        """How many blocks can be taken: the free and the cached ones."""
        return self._allocator.num_free + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def match(self, token_ids: Sequence[int], *, pending: bool = False) -> Match:
        """Look for the longest run of leading blocks that are here. The block of the last token is never among them.

        Args:
            pending: whether blocks count whose KV is still being computed.
        """
        hashes = block_hashes(token_ids, self._block_size) if self._enabled else []
        return Match(len(token_ids), hashes, self._find(hashes, len(token_ids), pending))

    def match_names(self, names: Sequence[bytes], num_tokens: int, *, pending: bool = False) -> Match:
        """As `match`, for a sequence of which only the names of its first blocks are known, which may be wrong."""
        return Match(num_tokens, [], self._find(names, num_tokens, pending))

    def _find(self, names: Sequence[bytes], num_tokens: int, pending: bool) -> list[int]:
        blocks: list[int] = []
        for name in names[: (num_tokens - 1) // self._block_size]:
            block = self._by_name.get(name)
            if block is None or not (pending or block in self._complete):
                break
            blocks.append(block)
        return blocks

    def num_freed_by(self, allocation: Allocation) -> int:
        """Returns by how much `num_free` would grow if these blocks were released: nobody else uses them."""
        return sum(self._references[block] == 1 for block in allocation.blocks)

    def cost(self, match: Match, num_blocks: int) -> int:
        """By how much `num_free` would fall if `num_blocks` blocks were taken, those of the match among them."""
        return num_blocks - sum(self._references[block] > 0 for block in match.blocks)

    def take(self, match: Match, num_blocks: int, *, is_counted: bool = True) -> Allocation | None:
        """Hold the blocks of the match, and so many more that there are `num_blocks`; None, taking nothing, when short.

        They are in order: the match comes first. Without `is_counted`, the figures of the cache stay as they are.
        """
        assert num_blocks >= len(match.blocks), "a match has no more blocks than its sequence"
        if self.cost(match, num_blocks) > self.num_free:
            return None
        for block in match.blocks:
            self._cached.pop(block, None)
        blocks = match.blocks + self._allocate(num_blocks - len(match.blocks))
        self._references.update(blocks)
        if is_counted:
            self.num_query_tokens += match.num_tokens
            self.num_hit_tokens += len(match.blocks) * self._block_size
        return Allocation(blocks, len(match.blocks), match.hashes)

    def extend(self, allocation: Allocation, num_blocks: int) -> bool:
        """Hold so many more blocks that there are `num_blocks`; False, taking nothing, when short."""
        num_more = num_blocks - len(allocation.blocks)
        if num_more > self.num_free:
            return False
        more = self._allocate(max(0, num_more))
        self._references.update(more)
        allocation.blocks += more
        return True

    def name(self, allocation: Allocation, token_ids: Sequence[int]) -> None:
        """Name the blocks that these leading tokens of its sequence fill, or will, so that others find them.

        Where another block has the name already, that one keeps it.
        """
        if not self._enabled:
            return
        allocation.hashes = block_hashes(token_ids, self._block_size, allocation.hashes)
        for block, name in zip(self._full(allocation, token_ids), allocation.hashes, strict=False):
            if self._by_name.setdefault(name, block) == block:
                self._names[block] = name

    def fill(self, allocation: Allocation, token_ids: Sequence[int]) -> None:
        """Name the blocks that these leading tokens fill: their KV is there now."""
        self.name(allocation, token_ids)
        self._complete.update(block for block in self._full(allocation, token_ids) if block in self._names)

    def release(self, allocation: Allocation, token_ids: Sequence[int]) -> None:
        """Let go of all blocks. The KV of these leading tokens of its sequence is in them."""
        self.fill(allocation, token_ids)
        blocks, allocation.blocks = allocation.blocks, []
        unused = []
        for block in reversed(blocks):  # of blocks that are let go together, the last is to be evicted first
            assert self._references[block] > 0, f"block {block} is let go twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                unused.append(block)
        self._cached.update(dict.fromkeys(block for block in unused if block in self._complete))
        self._free([block for block in unused if block not in self._complete])

    def _full(self, allocation: Allocation, token_ids: Sequence[int]) -> list[int]:
        return allocation.blocks[: len(token_ids) // self._block_size]

    def _allocate(self, num_blocks: int) -> list[int]:
        if num_blocks == 0:
            return []
        num_missing = num_blocks - self._allocator.num_free
        if num_missing > 0:
            self._free([self._cached.popitem(last=False)[0] for _ in range(num_missing)])
        blocks = self._allocator.allocate(num_blocks)
        assert blocks is not None, "as many are free as are missing"
        return blocks

    def _free(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        for block in blocks:
            name = self._names.pop(block, None)
            if name is not None:
                del self._by_name[name]
                self._complete.discard(block)
        self._allocator.free(blocks)
