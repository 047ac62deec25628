"""How long prompts take here, and how far that can be relied on: what an instance promises by.

Seconds are fitted to tokens and to the pairs of tokens that attend to each other. What is promised is beyond what is
expected by as much as the worst of the last outcomes was: of n that are alike and one more, that one is the worst in
one case of n + 1 (conformal prediction; Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005).
"""

import time
from collections import deque
from dataclasses import dataclass
from math import exp

from shared.engine.work import PromptWork
from shared.messages.records import Work

HORIZON_S, FADE_S = 5.0, 10.0
"""After so many seconds of computing, or of any time, what was measured before counts 1/e of what is new."""
INDEPENDENT = 1e-3
"""Tokens and pairs are told apart where at least this share of their squares is not common to both."""
NUM_OUTCOMES = 99
"""With these, one promise of a hundred is not kept."""
NEW_S = 30.0
"""For so long an outcome counts: one that was odd is not to be feared for ever."""
FIRST = 1.25
"""The outcome that is feared while there are few."""
OLD_S = 5.0
"""What was tried so long ago may be no longer true."""


@dataclass(slots=True)
class _Speed:
    """Seconds as a sum of so much for each token and so much for each pair; least squares, the old counting less."""

    tokens2: float = 0.0
    pairs2: float = 0.0
    both: float = 0.0
    tokens_s: float = 0.0
    pairs_s: float = 0.0

    def add(self, done: PromptWork, seconds: float, since_s: float) -> None:
        """`since_s` is how long ago the addition before was."""
        keep = exp(-seconds / HORIZON_S - since_s / FADE_S)
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
    """What one engine needs for prompts, as it shows in what it has done.

    Args:
        step_tokens: of a step of the engine. Who comes waits for the step under way, and gets its token with those who
            share the last of its own, so expectations err by about a step, be they long or short.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step = PromptWork.of(step_tokens)
        self._seen = Work()
        self._seen_at = time.monotonic()
        self._speed = _Speed()
        self._outcomes: deque[tuple[float, float]] = deque(maxlen=NUM_OUTCOMES)
        """When (monotonic), and how many times longer than expected, a step added to both."""

    def look(self, work: Work) -> None:
        """Learns from what the engine has done since the last look."""
        seen = self._seen
        done = PromptWork(work.prefill_tokens - seen.prefill_tokens, work.prefill_pairs - seen.prefill_pairs)
        if done.tokens > 0:
            now = time.monotonic()
            self._speed.add(done, work.prefill_s - seen.prefill_s, now - self._seen_at)
            self._seen, self._seen_at = work, now

    def seconds(self, prompts: PromptWork) -> float:
        """How long they take most likely; 0 before anything has been measured."""
        return self._speed.seconds(prompts)

    def promised_s(self, expected_s: float) -> float:
        """How long it takes at most, in all cases but one of a hundred, where so much is expected."""
        if expected_s == 0:
            return 0.0
        recent = time.monotonic() - NEW_S
        outcomes = [outcome for at, outcome in self._outcomes if at >= recent]
        if len(outcomes) < NUM_OUTCOMES:
            outcomes.append(FIRST)
        step_s = self.seconds(self._step)
        return max(outcomes) * (expected_s + step_s) - step_s

    def took(self, seconds: float, expected_s: float) -> None:
        """An expectation has turned out."""
        step_s = self.seconds(self._step)
        outcome = (seconds + step_s) / (expected_s + step_s) if expected_s else 1.0
        self._outcomes.append((time.monotonic(), outcome))

    def is_old(self) -> bool:
        """Whether no expectation has been tried for a while."""
        return not self._outcomes or time.monotonic() - self._outcomes[-1][0] > OLD_S
