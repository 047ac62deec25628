"""Scenarios of requests that name none, found as they arrive, and their traffic for the controller to see. Pure.

- **By prefix**: a request belongs to the longest of its first 256, 512, 1024 and 2048 tokens that a good part of recent
  requests begin with. That is what a common system prompt looks like.
- **By lengths**: prompts are sorted by length (powers of two), and the outputs of each length are remembered. A request
  is labelled by what its length has led to so far: much prompt and little output, the reverse, or neither.

Labels depend on tokens and lengths alone, so different gateways that see similar requests use the same labels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages.records import LabelTraffic
from shared.prefix_keys import PREFIX_BLOCK_TOKENS

PREFIX_TOKENS = (256, 512, 1024, 2048)
"""The lengths of prefixes that make a scenario. Shorter ones are no more than a chat template's."""
HALF_LIFE_REQUESTS = 512
"""A request counts half after this many more."""
NAMED_AT_SHARE = 0.05
NAMED_AT_REQUESTS = 32
"""A prefix becomes a scenario with this share of recent requests, and this many."""
UNNAMED_BELOW_SHARE = 0.02
"""It stops being one below this share, which is too far from the other for chance to reach."""
MAX_PREFIXES = 4096
"""Prefixes that are counted: those of the last 1024 requests, if all are long and different."""

LONG_IN = "auto-long-in"
LONG_OUT = "auto-long-out"
BALANCED = "auto-balanced"
LONG_FACTOR = 4.0
"""A side is long if it has this many times the tokens of the other."""
LEAVE_FACTOR = 1.5
"""A length loses its label only when it has come back past the boundary by this factor."""
NUM_DONE_FOR_CLASS = 8
"""Finished requests of a length before it gets a label."""
NUM_DONE_FOR_MEAN = 128
"""Finished requests over which means are taken."""

MAX_LABELS = 64
"""How many labels have their traffic counted; the one that was seen longest ago is dropped first."""
NO_LABEL = ""
"""The label under which requests without one are counted."""

_DECAY: float = 0.5 ** (1 / HALF_LIFE_REQUESTS)
_PREFIX = "auto-prefix-"


class ScenarioLabels:
    """The labels of one gateway, and the finished requests of each."""

    def __init__(self) -> None:
        self._classifier = Classifier()
        self._traffic: OrderedDict[str, LabelTraffic] = OrderedDict()
        """Least recently seen first."""

    def label(self, keys: Sequence[int], num_prompt_tokens: int, max_tokens: int) -> str | None:
        """Returns the label of a request that has just arrived; None if it resembles no others."""
        return self._classifier.classify(keys, num_prompt_tokens, max_tokens)

    def done(self, label: str | None, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Counts a request of this label that has all its tokens."""
        self._classifier.finished(label, num_prompt_tokens, num_output_tokens)
        key = label or NO_LABEL
        before = self._traffic.pop(key, LabelTraffic())
        self._traffic[key] = LabelTraffic(
            num_done=before.num_done + 1,
            prompt_tokens=before.prompt_tokens + num_prompt_tokens,
            output_tokens=before.output_tokens + num_output_tokens,
            shared_prefix_tokens=self._classifier.shared_prefix_tokens(label) if label else 0,
        )
        if len(self._traffic) > MAX_LABELS:
            self._traffic.popitem(last=False)

    def traffic(self) -> dict[str, LabelTraffic]:
        """Returns the finished requests by label, summed since the gateway started."""
        return dict(self._traffic)


class Classifier:
    """Labels requests, and learns from them. It remembers a limited number of prefixes and of lengths.

    Args:
        block_tokens: tokens in the blocks of the keys; the lengths of prefixes are multiples of it.
    """

    def __init__(self, block_tokens: int = PREFIX_BLOCK_TOKENS) -> None:
        self._prefixes = _Prefixes(block_tokens)
        self._lengths: dict[int, _Length] = {}
        """By the number of bits of the prompts' lengths."""

    def classify(self, keys: Sequence[int], num_prompt_tokens: int, max_tokens: int) -> str | None:
        """Returns the label of a new request; None where nothing is known yet. Call it once for each: it counts them.

        Args:
            keys: of the prompt's leading blocks (`prefix_keys`).
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
        """Learns from a request with this label that has finished, not from one that was cancelled or failed."""
        if label is not None and label.startswith(_PREFIX):
            return  # the prompts of one scenario say nothing about other prompts of their length
        bits = num_prompt_tokens.bit_length()
        self._lengths[bits] = self._lengths.get(bits, _Length()).after(num_prompt_tokens, num_output_tokens)

    def shared_prefix_tokens(self, label: str) -> int:
        """Returns how many leading tokens the prompts of `label` have in common, at least."""
        return self._prefixes.num_tokens(label)


class _Prefixes:
    """Counts of the prefixes of recent requests: each counts less, the more requests have come since."""

    def __init__(self, block_tokens: int) -> None:
        assert PREFIX_TOKENS[0] % block_tokens == 0, "a prefix consists of whole blocks"
        self._tokens_of = {num_tokens // block_tokens: num_tokens for num_tokens in PREFIX_TOKENS}
        """By number of blocks."""
        self._num_requests = 0
        self._total = 0.0
        """The count of all requests."""
        self._counts: OrderedDict[int, tuple[float, int]] = OrderedDict()
        """By key: the count, and after how many requests it was that; least recently seen first."""
        self._named: dict[int, int] = {}
        """The keys of prefixes that are scenarios, and their lengths in tokens."""

    def longest_common(self, keys: Sequence[int]) -> int | None:
        """Counts the prefixes of a request. Returns the key of the longest that is a scenario."""
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
        if len(self._counts) > MAX_PREFIXES:
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
    """Requests whose prompts are of about one length: how many are done, their mean tokens, their label."""

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
    """Returns the label of requests of these mean lengths, whose label was `before`."""
    if prompt_tokens >= _boundary(LONG_IN, before) * output_tokens:
        return LONG_IN
    if output_tokens >= _boundary(LONG_OUT, before) * prompt_tokens:
        return LONG_OUT
    return BALANCED


def _boundary(label: str, before: str | None) -> float:
    return LONG_FACTOR / LEAVE_FACTOR if label == before else LONG_FACTOR


def _label_of(key: int) -> str:
    return f"{_PREFIX}{key & 0xFFFFFFFF:08x}"
