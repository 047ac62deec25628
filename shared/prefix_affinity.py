"""Which instances have computed which beginnings of prompts: a guess, from where this gateway's requests went. Pure.

Instances evict blocks without saying so, and other gateways send them prompts too, so it is a preference only.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice

from shared.prefix_keys import PREFIX_BLOCK_TOKENS

MAX_ENTRIES = 10_000
"""Pairs of an instance and a block that are remembered."""
MAX_MATCHES = 16
"""Instances that `matched` returns: looking at more would make a request dearer, and its choice hardly better."""


def shares(matched: Mapping[str, int], num_tokens: int, block_tokens: int = PREFIX_BLOCK_TOKENS) -> dict[str, float]:
    """Returns which share (0 .. 1) of a prompt each instance has computed, at least. `matched` counts blocks."""
    return {one: min(1.0, num_blocks * block_tokens / max(1, num_tokens)) for one, num_blocks in matched.items()}


class PrefixAffinity:
    """Remembers which instance has computed which blocks, for a limited number of pairs of an instance and a block.

    The pair that was used longest ago is dropped first, and of one prompt the last block. So an instance that has a
    block has all blocks before it, too.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._pairs: OrderedDict[tuple[int, str], None] = OrderedDict()
        """Least recently used first."""
        self._instances_with: dict[int, set[str]] = {}
        """The same pairs by key."""
        self._keys_of: dict[str, set[int]] = {}
        """The same pairs by instance."""

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, instance_id: str) -> bool:
        """Returns whether any block of this instance is remembered."""
        return instance_id in self._keys_of

    def remember(self, instance_id: str, keys: Sequence[int]) -> None:
        """Notes that the instance has computed a prompt that begins with the blocks of `keys`."""
        for key in reversed(keys):
            pair = (key, instance_id)
            self._pairs[pair] = None
            self._pairs.move_to_end(pair)
            self._instances_with.setdefault(key, set()).add(instance_id)
            self._keys_of.setdefault(instance_id, set()).add(key)
        while len(self._pairs) > self._max_entries:
            self._remove(*next(iter(self._pairs)))

    def matched(self, keys: Sequence[int], max_matches: int = MAX_MATCHES) -> dict[str, int]:
        """Returns how many of the prompt's leading blocks instances have: those with the most, and only some of many.

        The cost does not depend on how many instances have them.
        """
        found: dict[str, int] = {}
        for num_blocks in range(self._num_known(keys), 0, -1):
            instances = self._instances_with[keys[num_blocks - 1]]
            more = (one for one in islice(instances, max_matches) if one not in found)
            found.update(dict.fromkeys(islice(more, max_matches - len(found)), num_blocks))
            if len(found) == max_matches:
                break
        return found

    def num_blocks(self, instance_id: str, keys: Sequence[int]) -> int:
        """Returns how many of the prompt's leading blocks one instance has."""
        known = self._keys_of.get(instance_id, ())
        return next((count for count, key in enumerate(keys) if key not in known), len(keys)) if known else 0

    def forget(self, instance_id: str) -> None:
        """Drops an instance that has ended or lost its cache."""
        for key in self._keys_of.get(instance_id, set()).copy():
            self._remove(key, instance_id)

    def _num_known(self, keys: Sequence[int]) -> int:
        """Returns the number of leading blocks that any instance has."""
        return next((count for count, key in enumerate(keys) if key not in self._instances_with), len(keys))

    def _remove(self, key: int, instance_id: str) -> None:
        del self._pairs[key, instance_id]
        instances = self._instances_with[key]
        instances.discard(instance_id)
        if not instances:
            del self._instances_with[key]
        known = self._keys_of[instance_id]
        known.discard(key)
        if not known:
            del self._keys_of[instance_id]
