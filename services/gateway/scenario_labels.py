"""Scenarios of requests that name none, found as they come: by what prompts begin with, else by lengths. Pure.

- **By prefix**: a request belongs to the longest of its first 256, 512, 1024 and 2048 tokens that a good part of recent
  requests begin with. That is what a common system prompt looks like.
- **By lengths**: prompts are sorted by length (powers of two), and the outputs of each length are remembered. A request
  is called after what its length has led to so far: much prompt and little output, the reverse, or neither.

Labels depend on tokens and lengths alone, so different gateways that see alike requests call them alike.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.prefix_affinity import BLOCK

PREFIX_TOKENS = (256, 512, 1024, 2048)
"""The lengths of prefixes that make a scenario. Shorter ones are no more than a chat template's."""
HALF_LIFE_REQUESTS = 512
"""A request counts half after so many more."""
NAMED_AT_SHARE = 0.05
NAMED_AT_REQUESTS = 32
"""A prefix becomes a scenario with this share of recent requests, and this many."""
UNNAMED_BELOW_SHARE = 0.02
"""It is one no more below this share: far enough from the other that chance does not bring it here."""
PREFIXES = 4096
"""Prefixes that are counted: those of the last 1024 requests, if all are long and different."""

LONG_IN = "auto-long-in"
LONG_OUT = "auto-long-out"
BALANCED = "auto-balanced"
LONG_FACTOR = 4.0
"""A side is long that has so many times the tokens of the other."""
LEAVE_FACTOR = 1.5
"""A length is called otherwise only when it has come back past the boundary by this."""
NUM_DONE_FOR_CLASS = 8
"""A length has no class before so many of its requests are done."""
NUM_DONE_FOR_MEAN = 128
"""How far back means reach."""

_DECAY: float = 0.5 ** (1 / HALF_LIFE_REQUESTS)
_PREFIX = "auto-prefix-"


class Classifier:
    """Labels requests, and learns from them. It holds a bounded number of prefixes and of lengths.

    Args:
        block: tokens in the blocks of the keys; the lengths of prefixes are multiples of it.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._prefixes = _Prefixes(block)
        self._lengths: dict[int, _Length] = {}
        """By the power of two below which the prompts are."""

    def classify(self, keys: Sequence[int], num_prompt_tokens: int, max_tokens: int) -> str | None:
        """The label of a new request; None where nothing is known yet. To be called once for each, as it counts them.

        Args:
            keys: of the prompt's leading blocks (`affinity.prefix_keys`).
            max_tokens: that the request may generate.
        """
        key = self._prefixes.longest_common(keys)
        if key is not None:
            return _label_of(key)
        if num_prompt_tokens >= LONG_FACTOR * max_tokens:
            return LONG_IN
        length = self._lengths.get(num_prompt_tokens.bit_length())
        return length.label if length else None

    def finished(self, label: str | None, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request that `label` was given to has come to its own end; not one that was cancelled or failed."""
        if label is not None and label.startswith(_PREFIX):
            return  # what one scenario's prompts lead to says nothing about others of their length
        bits = num_prompt_tokens.bit_length()
        self._lengths[bits] = self._lengths.get(bits, _Length()).after(num_prompt_tokens, num_output_tokens)

    def shared_prefix_tokens(self, label: str) -> int:
        """How many leading tokens the prompts of `label` have in common, at least."""
        return self._prefixes.num_tokens(label)


class _Prefixes:
    """Counts of the prefixes of recent requests: each counts less, the more requests have come since."""

    def __init__(self, block: int) -> None:
        assert PREFIX_TOKENS[0] % block == 0, "a prefix has no part of a block"
        self._tokens_of = {num_tokens // block: num_tokens for num_tokens in PREFIX_TOKENS}
        """By number of blocks."""
        self._num_requests = 0
        self._total = 0.0
        """The count of all requests."""
        self._counts: OrderedDict[int, tuple[float, int]] = OrderedDict()
        """By key: the count, and after how many requests it was that; least recently seen first."""
        self._named: dict[int, int] = {}
        """The keys of prefixes that are scenarios, and their lengths in tokens."""

    def longest_common(self, keys: Sequence[int]) -> int | None:
        """Count the prefixes of a request. The key of the longest that is a scenario."""
        self._num_requests += 1
        self._total = self._total * _DECAY + 1
        longest = None
        for num_blocks, num_tokens in self._tokens_of.items():
            if num_blocks > len(keys):
                break
            key = keys[num_blocks - 1]
            self._name(key, self._count(key), num_tokens)
            longest = key if key in self._named else longest
        return longest

    def num_tokens(self, label: str) -> int:
        return next((num_tokens for key, num_tokens in self._named.items() if _label_of(key) == label), 0)

    def _count(self, key: int) -> float:
        before, at = self._counts.pop(key, (0.0, 0))
        count = before * _DECAY ** (self._num_requests - at) + 1
        self._counts[key] = (count, self._num_requests)
        if len(self._counts) > PREFIXES:
            oldest, _ = self._counts.popitem(last=False)
            self._named.pop(oldest, None)
        return count

    def _name(self, key: int, count: float, num_tokens: int) -> None:
        share = count / self._total
        if share < UNNAMED_BELOW_SHARE:
            self._named.pop(key, None)
        elif share >= NAMED_AT_SHARE and count >= NAMED_AT_REQUESTS:
            self._named[key] = num_tokens


@dataclass(frozen=True, slots=True)
class _Length:
    """Requests whose prompts are of about one length: how many are done, their mean tokens, what they are called."""

    num_done: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    label: str | None = None

    def after(self, num_prompt_tokens: int, num_output_tokens: int) -> "_Length":
        """With one more that is done."""
        num_done = self.num_done + 1
        weight = 1 / min(num_done, NUM_DONE_FOR_MEAN)
        prompt_tokens = self.prompt_tokens + weight * (num_prompt_tokens - self.prompt_tokens)
        output_tokens = self.output_tokens + weight * (num_output_tokens - self.output_tokens)
        label = self.label
        if num_done >= NUM_DONE_FOR_CLASS:
            label = _class_of(prompt_tokens, output_tokens, label)
        return _Length(num_done, prompt_tokens, output_tokens, label)


def _class_of(prompt_tokens: float, output_tokens: float, before: str | None) -> str:
    """What requests of these mean lengths are called, having been called `before`."""
    if prompt_tokens >= _boundary(LONG_IN, before) * output_tokens:
        return LONG_IN
    if output_tokens >= _boundary(LONG_OUT, before) * prompt_tokens:
        return LONG_OUT
    return BALANCED


def _boundary(label: str, before: str | None) -> float:
    return LONG_FACTOR / LEAVE_FACTOR if label == before else LONG_FACTOR


def _label_of(key: int) -> str:
    return f"{_PREFIX}{key & 0xFFFFFFFF:08x}"
