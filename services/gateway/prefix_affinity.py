"""Which instances have computed which beginnings of prompts: a guess, from where this gateway's requests went. Pure.

Instances evict blocks without a word, and other gateways send them prompts too, so it is good for a preference only.
"""

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from xxhash import xxh3_64_intdigest

BLOCK = 64
"""Tokens in a block."""
AT_MOST = 32
"""Blocks of a prompt that are looked at: its first 2048 tokens."""
ENTRIES = 10_000
"""Pairs of an instance and a block that are remembered."""

_TOKEN_BYTES = 8


def prefix_keys(token_ids: Sequence[int], block: int = BLOCK, at_most: int = AT_MOST) -> tuple[int, ...]:
    """The key of each full block that the prompt begins with: a hash over the key of the block before and the tokens.

    Two prompts with the same n-th key have the first n blocks in common. The keys are the same in every process. They
    only say whom to ask first: two alike by accident cost time, and never mix up texts (the cache has its own names).

    Args:
        block: tokens in a block.
        at_most: blocks that are looked at.
    """
    num_blocks = min(len(token_ids) // block, at_most)
    num_tokens = num_blocks * block
    packed = memoryview(struct.pack(f"<{num_tokens}Q", *token_ids[:num_tokens]))
    keys = []
    key = 0
    num_bytes = block * _TOKEN_BYTES
    for start in range(0, len(packed), num_bytes):
        key = xxh3_64_intdigest(packed[start : start + num_bytes], key)
        keys.append(key)
    return tuple(keys)


def shares(matched: Mapping[str, int], num_tokens: int, block: int = BLOCK) -> dict[str, float]:
    """What share (0 .. 1) of a prompt of `num_tokens` tokens each instance has, at least. `matched` counts blocks."""
    return {one: min(1.0, num_blocks * block / max(1, num_tokens)) for one, num_blocks in matched.items()}


class Affinity:
    """Who has which blocks. The pair that was remembered longest ago is forgotten first, and of one prompt the last
    block: so who has a block has all before it.

    Args:
        at_most: pairs of an instance and a block that are remembered.
    """

    def __init__(self, at_most: int = ENTRIES) -> None:
        self._at_most = at_most
        self._pairs: OrderedDict[tuple[int, str], None] = OrderedDict()
        """Least recently remembered first."""
        self._holders: dict[int, set[str]] = {}
        """By key: the same pairs."""

    def __len__(self) -> int:
        return len(self._pairs)

    def remember(self, instance_id: str, keys: Sequence[int]) -> None:
        """The instance has computed a prompt that begins with the blocks of `keys`."""
        for key in reversed(keys):
            pair = (key, instance_id)
            self._pairs[pair] = None
            self._pairs.move_to_end(pair)
            self._holders.setdefault(key, set()).add(instance_id)
        while len(self._pairs) > self._at_most:
            (key, holder), _ = self._pairs.popitem(last=False)
            self._drop(key, holder)

    def matched(self, keys: Sequence[int]) -> dict[str, int]:
        """How many of the prompt's leading blocks each instance has. Instances that have none are left out."""
        found: dict[str, int] = {}
        for num_blocks, key in enumerate(keys, 1):
            holders = self._holders.get(key)
            if not holders:
                break
            found.update(dict.fromkeys(holders, num_blocks))
        return found

    def forget(self, instance_id: str) -> None:
        """The instance is gone, or has lost its cache."""
        for key, holder in [pair for pair in self._pairs if pair[1] == instance_id]:
            del self._pairs[key, holder]
            self._drop(key, holder)

    def _drop(self, key: int, instance_id: str) -> None:
        holders = self._holders[key]
        holders.discard(instance_id)
        if not holders:
            del self._holders[key]
