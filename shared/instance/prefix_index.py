"""Finds blocks of the prefix cache by the prefix keys that gateways send, before the token ids are known.

Prefix keys are no cryptographic hashes: what is found here only says which blocks to count. Which blocks a request
shares is decided by its token ids (`PrefixCache.match`).
"""

from collections import OrderedDict
from collections.abc import Sequence

from shared.prefix_keys import PREFIX_BLOCK_TOKENS

MAX_PREFIX_KEYS_REMEMBERED = 16_384


class PrefixIndex:
    """Remembers which block names belong to which prefix key, for the keys that were used last.

    Args:
        block_size: tokens in a block of the cache.
        max_keys: how many keys are remembered.
    """

    def __init__(self, block_size: int, max_keys: int = MAX_PREFIX_KEYS_REMEMBERED) -> None:
        self._block_size = block_size
        self._max_keys = max_keys
        self._names: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()
        """By key, the names of the blocks that end within its 64 tokens; least recently used first."""

    def __len__(self) -> int:
        return len(self._names)

    def remember(self, keys: Sequence[int], names: Sequence[bytes]) -> None:
        """Notes the names of the leading blocks of a prompt with these keys."""
        for number, key in enumerate(keys):
            start = number * PREFIX_BLOCK_TOKENS // self._block_size
            end = (number + 1) * PREFIX_BLOCK_TOKENS // self._block_size
            if end > len(names):
                break
            self._names[key] = tuple(names[start:end])
            self._names.move_to_end(key)
        while len(self._names) > self._max_keys:
            self._names.popitem(last=False)

    def names(self, keys: Sequence[int]) -> list[bytes]:
        """Returns the names of the leading blocks of a prompt with these keys, as far as they are remembered."""
        found: list[bytes] = []
        for key in keys:
            names = self._names.get(key)
            if names is None:
                break
            found += names
        return found
