"""How long an engine needs for prompts: seconds per token and per pair of tokens, fitted to what it has done."""

import time
from dataclasses import dataclass
from math import exp

from shared.engine.work import PromptWork
from shared.messages.records import Work

COMPUTE_HORIZON_S, IDLE_HORIZON_S = 5.0, 10.0
"""After so many seconds of computing, or of any time, older measurements count 1/e of new ones."""
MIN_INDEPENDENT_SHARE = 1e-3
"""Tokens and pairs are told apart where at least this share of their squares is not common to both."""


@dataclass(slots=True)
class _LeastSquares:
    """Sums for the fit seconds = token_s * tokens + pair_s * pairs, in which older measurements count less."""

    tokens2: float = 0.0
    pairs2: float = 0.0
    both: float = 0.0
    tokens_s: float = 0.0
    pairs_s: float = 0.0

    def add(self, done: PromptWork, seconds: float, since_s: float) -> None:
        """Adds a measurement, `since_s` seconds after the one before."""
        keep = exp(-seconds / COMPUTE_HORIZON_S - since_s / IDLE_HORIZON_S)
        self.tokens2 = keep * self.tokens2 + done.tokens**2
        self.pairs2 = keep * self.pairs2 + done.pairs**2
        self.both = keep * self.both + done.tokens * done.pairs
        self.tokens_s = keep * self.tokens_s + done.tokens * seconds
        self.pairs_s = keep * self.pairs_s + done.pairs * seconds

    def solve(self) -> tuple[float, float]:
        """Returns (token_s, pair_s), neither of them negative; zeros before anything was measured."""
        if self.tokens2 == 0:
            return 0.0, 0.0
        square = self.tokens2 * self.pairs2
        determinant = square - self.both**2
        if determinant > MIN_INDEPENDENT_SHARE * square:
            token_s = (self.tokens_s * self.pairs2 - self.pairs_s * self.both) / determinant
            pair_s = (self.pairs_s * self.tokens2 - self.tokens_s * self.both) / determinant
            if token_s >= 0 and pair_s >= 0:
                return token_s, pair_s
        return self.tokens_s / self.tokens2, 0.0


class LatencyEstimate:
    """What one engine needs for prompts.

    Attributes:
        token_s: seconds for each token that is computed; 0 until something was measured.
        pair_s: seconds for each pair of tokens that attend to each other, in addition.
    """

    def __init__(self) -> None:
        self._observed = Work()
        self._observed_at = time.monotonic()
        self._fit = _LeastSquares()
        self.token_s = 0.0
        self.pair_s = 0.0

    def observe(self, work: Work) -> None:
        """Learns from what the engine has done since the last call."""
        before = self._observed
        done = PromptWork(work.prefill_tokens - before.prefill_tokens, work.prefill_pairs - before.prefill_pairs)
        if done.tokens > 0:
            now = time.monotonic()
            self._fit.add(done, work.prefill_s - before.prefill_s, now - self._observed_at)
            self._observed, self._observed_at = work, now
            self.token_s, self.pair_s = self._fit.solve()

    def seconds(self, prompts: PromptWork) -> float:
        """Returns how long these prompts take most likely; 0 before anything was measured."""
        return self.token_s * prompts.tokens + self.pair_s * prompts.pairs
