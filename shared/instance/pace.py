"""How fast an instance computes prompts just now, and when a new one would be done."""

from shared.registry.records import Work

RECENT = 0.3
"""How much of what is new each look at the work counts."""
MARGIN = 1.25
"""Prompts are taken to be slower than they were by this factor: a promise is kept, or not given."""


class Pace:
    """Seconds per prompt token, smoothed over what the engine has done lately."""

    def __init__(self) -> None:
        self._seen = Work()
        self._token_s: float | None = None

    def seconds(self, num_tokens: int, work: Work) -> float:
        """How long `num_tokens` take, with a margin; 0 before anything has been measured."""
        tokens = work.prefill_tokens - self._seen.prefill_tokens
        if tokens > 0:
            token_s = (work.prefill_s - self._seen.prefill_s) / tokens
            before = token_s if self._token_s is None else self._token_s
            self._token_s = (1 - RECENT) * before + RECENT * token_s
            self._seen = work
        return MARGIN * num_tokens * (self._token_s or 0.0)
