"""What a group's requests cost on their way, as this gateway measures it: to know when a short prompt is quicker at the
decode instance itself (conditional disaggregation).
"""

import time
from dataclasses import dataclass, field

RECENT = 0.1
"""How much each new figure counts."""
ENOUGH = 20
"""Figures that there have to be before they are trusted."""
MEASURED_TOKENS = 32
"""Prompts of fewer tokens say little about what a token takes."""
LOCAL_AT_MOST = 128
"""Tokens of the longest prompt that a decode instance computes: everybody's next token waits for it."""
MEASURE_EVERY = 20
"""Of prompts that had better stay at decode, one in so many goes the usual way, so that the figures follow."""


@dataclass(slots=True)
class Mean:
    """A smoothed figure, in seconds."""

    value: float = 0.0
    number: int = 0

    def add(self, seconds: float) -> None:
        self.number += 1
        self.value += max(RECENT, 1 / self.number) * (seconds - self.value)


@dataclass(slots=True)
class Costs:
    """Of one group."""

    wait_s: Mean = field(default_factory=Mean)
    """In the line for prefill."""
    prefill_token_s: Mean = field(default_factory=Mean)
    """From acceptance to the first token, for each token that was computed."""
    handoff_s: Mean = field(default_factory=Mean)
    """From the first token to the second one, beyond what lies between further ones."""
    num_quicker: int = 0
    """Prompts that a decode instance had better compute."""

    def prefilled(self, took_s: float, num_computed_tokens: int) -> None:
        if num_computed_tokens >= MEASURED_TOKENS:
            self.prefill_token_s.add(took_s / num_computed_tokens)

    def decoded(self, first_gap_s: float, next_gap_s: float) -> None:
        """The gaps before a request's first and second token of decode."""
        self.handoff_s.add(max(0.0, first_gap_s - next_gap_s))

    def is_quicker_at_decode(self, num_tokens: int, num_rows: int) -> bool:
        """Whether a prompt of `num_tokens` new tokens is better computed by a decode instance that has `num_rows`.

        Computing takes as long there as elsewhere. What is saved is the wait for a prefill slot and the hand-over; what
        it costs is that all rows wait for the prompt. Now and then a prompt is sent the other way, to measure it.
        """
        if num_tokens > LOCAL_AT_MOST or min(self.handoff_s.number, self.prefill_token_s.number) < ENOUGH:
            return False
        if num_tokens * self.prefill_token_s.value * num_rows >= self.wait_s.value + self.handoff_s.value:
            return False
        self.num_quicker += 1
        return self.num_quicker % MEASURE_EVERY != 0


class Gaps:
    """The seconds before the first and the second token of decode, counted from when it is made."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: list[float] = []

    def are_measured(self) -> bool:
        """To be asked at each token; true once, at the second."""
        if len(self.seconds) == 2:
            return False
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self._last = now
        return len(self.seconds) == 2
