"""Conditional disaggregation: which prompts a decode instance computes itself, by what this gateway measures."""

from dataclasses import dataclass, field

from services.gateway.groups import Group
from services.gateway.request import Request
from shared.messages.records import ROLES

LOCAL_PREFILL_WAIT_S = 0.05
"""How long a short prompt waits for a decode instance that computes it itself, before it goes to prefill."""
EWMA_ALPHA = 0.1
"""The weight of each new measurement, once there are enough."""
MIN_SAMPLES = 20
"""Measurements needed before an average is used."""
MIN_MEASURED_TOKENS = 32
"""Shorter prompts say little about the time per token."""
MAX_LOCAL_PREFILL_TOKENS = 128
"""The longest prompt that a decode instance computes itself: the next token of all its requests waits for it."""
MEASURE_EVERY = 20
"""One in so many prompts that would be quicker at decode goes to prefill, so that the averages stay current."""


@dataclass(slots=True)
class Average:
    """An exponentially weighted average, in seconds."""

    value: float = 0.0
    num_samples: int = 0

    def observe(self, seconds: float) -> None:
        self.num_samples += 1
        self.value += max(EWMA_ALPHA, 1 / self.num_samples) * (seconds - self.value)


@dataclass(slots=True)
class GroupLatencies:
    """What requests of one group wait for, as this gateway measures it: to know when a decode instance would compute a
    short prompt sooner (conditional disaggregation).
    """

    wait_s: Average = field(default_factory=Average)
    """In the waiting queue for prefill."""
    prefill_token_s: Average = field(default_factory=Average)
    """From acceptance to the first token, for each computed token."""
    handoff_s: Average = field(default_factory=Average)
    """From the first token to the second, beyond the time between later tokens."""
    _num_quicker: int = 0

    def observe_prefill(self, seconds: float, num_computed_tokens: int) -> None:
        if num_computed_tokens >= MIN_MEASURED_TOKENS:
            self.prefill_token_s.observe(seconds / num_computed_tokens)

    def observe_decode(self, first_gap_s: float, second_gap_s: float) -> None:
        """Takes the times before the first and the second token of a decode instance."""
        self.handoff_s.observe(max(0.0, first_gap_s - second_gap_s))

    def is_quicker_at_decode(self, num_tokens: int, num_rows: int) -> bool:
        """Returns whether a decode instance with `num_rows` requests should prefill `num_tokens` new tokens.

        Computing takes as long as at prefill. It saves the wait for a prefill slot and the handoff, but all rows wait
        for the prompt. One in `MEASURE_EVERY` prompts goes to prefill nevertheless.
        """
        num_samples = min(self.handoff_s.num_samples, self.prefill_token_s.num_samples)
        if num_tokens > MAX_LOCAL_PREFILL_TOKENS or num_samples < MIN_SAMPLES:
            return False
        if num_tokens * self.prefill_token_s.value * num_rows >= self.wait_s.value + self.handoff_s.value:
            return False
        self._num_quicker += 1
        return self._num_quicker % MEASURE_EVERY != 0


def is_at_decode_only(request: Request, group: Group) -> bool:
    """Returns whether only decode instances still have the weights a request started on: late in an upgrade."""
    if not request.has_started or not group.ready("prefill"):
        return False
    has_weights = {role: any(one.fingerprint == request.fingerprint for one in group.ready(role)) for role in ROLES}
    return has_weights["decode"] and not has_weights["prefill"]
