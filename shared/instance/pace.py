"""How long prompts take here, and how far that can be relied on: what an instance promises by.

Seconds are fitted to tokens and to the pairs of tokens that attend to each other. How expectations turned out is
followed as TCP follows round-trip times (RFC 6298): a smoothed ratio, and a smoothed deviation from it.
"""

import time
from dataclasses import dataclass
from math import exp

from shared.engine.work import PromptWork
from shared.registry.records import Work

HORIZON_S = 5.0
"""After so many seconds of computing, what was measured before counts 1/e of what is new."""
INDEPENDENT = 1e-3
"""Tokens and pairs are told apart where at least this share of their squares is not common to both."""
GRAIN_S = 0.02
"""What short prompts may take longer or shorter without telling anything about long ones."""
RATIO_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
DEVIATIONS = 4
"""RFC 6298's alpha, beta and K."""
FIRST_DEVIATION = 1 / 16
"""Before any expectation has been tried."""
OLD_S = 5.0
"""What was measured so long ago may be no longer true."""


@dataclass(slots=True)
class _Speed:
    """Seconds as a sum of so much for each token and so much for each pair; least squares, the old counting less."""

    tokens2: float = 0.0
    pairs2: float = 0.0
    both: float = 0.0
    tokens_s: float = 0.0
    pairs_s: float = 0.0

    def add(self, done: PromptWork, seconds: float) -> None:
        keep = exp(-seconds / HORIZON_S)
        self.tokens2 = keep * self.tokens2 + done.tokens**2
        self.pairs2 = keep * self.pairs2 + done.pairs**2
        self.both = keep * self.both + done.tokens * done.pairs
        self.tokens_s = keep * self.tokens_s + done.tokens * seconds
        self.pairs_s = keep * self.pairs_s + done.pairs * seconds

    def seconds(self, work: PromptWork) -> float:
        """0 before anything has been measured."""
        if self.tokens2 == 0:
            return 0.0
        square = self.tokens2 * self.pairs2
        determinant = square - self.both**2
        if determinant > INDEPENDENT * square:
            token_s = (self.tokens_s * self.pairs2 - self.pairs_s * self.both) / determinant
            pair_s = (self.pairs_s * self.tokens2 - self.tokens_s * self.both) / determinant
            if token_s >= 0 and pair_s >= 0:
                return token_s * work.tokens + pair_s * work.pairs
        return self.tokens_s / self.tokens2 * work.tokens


class Pace:
    """What one engine needs for prompts, as it shows in what it has done."""

    def __init__(self) -> None:
        self._seen = Work()
        self._speed = _Speed()
        self._ratio = 1.0
        self._deviation = FIRST_DEVIATION
        self._tried_at = float("-inf")

    def is_old(self) -> bool:
        """Whether no expectation has been tried for a while."""
        return time.monotonic() - self._tried_at > OLD_S

    def expected_s(self, ahead: PromptWork, work: Work) -> float:
        """How long `ahead` takes most likely, for an engine that has done `work`; 0 before it has done any."""
        seen = self._seen
        done = PromptWork(work.prefill_tokens - seen.prefill_tokens, work.prefill_pairs - seen.prefill_pairs)
        if done.tokens > 0:
            self._speed.add(done, work.prefill_s - seen.prefill_s)
            self._seen = work
        return self._speed.seconds(ahead)

    def promised_s(self, expected_s: float) -> float:
        """How long it takes at most, in nearly all cases, where so much is expected."""
        if expected_s == 0:
            return 0.0
        return (self._ratio + DEVIATIONS * self._deviation) * (expected_s + GRAIN_S) - GRAIN_S

    def took(self, seconds: float, expected_s: float) -> None:
        """An expectation has turned out."""
        self._tried_at = time.monotonic()
        if expected_s == 0:
            return
        ratio = (seconds + GRAIN_S) / (expected_s + GRAIN_S)
        self._deviation += DEVIATION_GAIN * (abs(ratio - self._ratio) - self._deviation)
        self._ratio += RATIO_GAIN * (ratio - self._ratio)
