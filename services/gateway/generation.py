"""A request on its way: what was asked for, when it came, and what has been generated so far."""

import time
from dataclasses import dataclass, field

from shared.sampling import SamplingParams

SLACK = 0.05
"""The share of the TTFT objective that is left for the way of the first token."""


@dataclass(slots=True)
class Generation:
    """One request, over all attempts at it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    arrived_at: float = field(default_factory=time.time)
    output_token_ids: list[int] = field(default_factory=list)
    fingerprint: str | None = None
    """Of the weights that the request has begun with: it never goes on with others."""
    scenario: str | None = None
    is_batch: bool = False
    prefix_keys: tuple[int, ...] = ()

    @property
    def has_begun(self) -> bool:
        return bool(self.output_token_ids)

    @property
    def num_tokens_at_end(self) -> int:
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    def first_token_by(self, ttft_s: float | None) -> float | None:
        """When the first token is due (Unix seconds); None for requests that have it already, or may wait."""
        if self.has_begun or self.is_batch or ttft_s is None:
            return None
        return self.arrived_at + (1 - SLACK) * ttft_s
