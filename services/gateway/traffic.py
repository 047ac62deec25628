"""What one group's requests do in this gateway, for the controller to see."""

import time
from dataclasses import asdict, dataclass

from shared.messages.records import Traffic


@dataclass(slots=True)
class Counts:
    """A `Traffic` that grows."""

    open: int = 0
    num_arrived: int = 0
    num_done: int = 0
    num_shed: int = 0
    num_first_tokens: int = 0
    num_in_time: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0

    def first_token(self, arrived_at: float, ttft_s: float | None) -> None:
        """A request that arrived then (Unix seconds) has its first token; `ttft_s` is the objective."""
        took_s = time.time() - arrived_at
        self.num_first_tokens += 1
        self.ttft_s += took_s
        self.num_in_time += ttft_s is None or took_s <= ttft_s

    def done(self, arrived_at: float, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request has all its tokens."""
        self.num_done += 1
        self.prompt_tokens += num_prompt_tokens
        self.output_tokens += num_output_tokens
        self.e2e_s += time.time() - arrived_at

    def snapshot(self, waiting_prefill: int, waiting_decode: int) -> Traffic:
        return Traffic(**asdict(self), waiting_prefill=waiting_prefill, waiting_decode=waiting_decode)
