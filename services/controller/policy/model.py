"""What a split of a group's instances into prefill and decode would do, predicted from what requests cost.

P/D-Serve balances n_p * b_p / T_p with n_d * b_d / T_d (arXiv 2408.08147). Here T_p and T_d are no constants: the more
requests a role has, the longer it holds each. So prefill and decode are the two stations of a closed network with N
requests, solved by mean value analysis: N = X * (T_p(X) + T_d(X)), with X in requests per second.

- A prefill instance computes one prompt after another. A prompt finds others * X * T_p / n_p before it, so
  T_p = prefill_s / (1 - others * X * prefill_s / n_p).
- A decode instance computes all its requests in each step: a row of its own, and one of each request that is there,
  so T_d = steps * (base + row) / (1 - others * X * steps * row / n_d), with at most `decode_slots` rows.

`others` = (N - 1) / N is the share of requests that are not oneself (Schweitzer's approximation). Together they are a
quadratic equation for X. Prefill slots are not in it: who finds none waits in the gateway instead of at the instance,
and who holds one because decode has no room is held back by the bound of decode.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from services.controller.policy.load import GroupLoad

MAX_ERROR = 0.5
SAME_TRAFFIC = 0.1, 3.0
"""Two windows with the same traffic differ by no more than the first, and the second by the root of the requests."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one split: requests per second, seconds to the first token (waiting included), and per further token."""

    throughput_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Model:
    """What requests cost, whatever the split.

    Attributes:
        num_open: requests in the system, above 0.
        prefill_s: engine seconds of one prefill.
        num_steps: decode steps of a request. The first token is prefill's, so one less than it has tokens.
        step_base_s, step_row_s: a step of `rows` rows takes step_base_s + rows * step_row_s.
        decode_slots: the most rows of a step.
        num_seen: requests that were measured.
    """

    num_open: float
    prefill_s: float
    num_steps: float
    step_base_s: float
    step_row_s: float
    decode_slots: float
    num_seen: float = 1.0

    @classmethod
    def fitted(cls, windows: Sequence[GroupLoad]) -> Self | None:
        """The model of the newest window and of those before it with the same traffic, at least one, newest last.

        None where the newest lacks a figure, and where requests cost nothing.
        """
        newest = windows[-1]
        if newest.num_open <= 0 or newest.prefill_s is None or newest.output_tokens is None:
            return None
        if newest.output_tokens > 1 and (newest.step_base_s is None or newest.step_row_s is None):
            return None
        seen = _with_same_traffic(windows)
        model = cls(
            num_open=sum(one.num_open for one in seen) / len(seen),
            prefill_s=_mean(seen, lambda one: one.prefill_s),
            num_steps=max(0.0, _mean(seen, lambda one: one.output_tokens) - 1),
            step_base_s=_mean(seen, lambda one: one.step_base_s),
            step_row_s=_mean(seen, lambda one: one.step_row_s),
            decode_slots=max(1.0, newest.decode_slots),
            num_seen=sum(map(_num_done, seen)),
        )
        return model if model.prefill_s + model.num_steps * model.step_s(1) > 0 else None

    def in_doubt(self, doubt: float) -> tuple[Self, Self]:
        """The same with decode as cheap, and as dear, as it may be beside prefill.

        Lengths vary about as much as their mean, so what `num_seen` requests cost is known to 1 / √num_seen; `doubt` is
        how many times that to allow for.
        """
        error = min(MAX_ERROR, doubt / math.sqrt(self.num_seen))
        return replace(self, num_steps=self.num_steps * (1 - error)), replace(
            self, num_steps=self.num_steps * (1 + error)
        )

    def step_s(self, rows: float) -> float:
        return self.step_base_s + rows * self.step_row_s

    def predict(self, num_prefill: int, num_decode: int) -> Prediction:
        """What so many instances would do, at least one of each."""
        alone_s = self.num_steps * self.step_s(1)
        full_s = self.num_steps * self.step_s(self.decode_slots)
        others = max(0.0, 1 - 1 / self.num_open)
        prefill_load_s = others * self.prefill_s / num_prefill
        decode_load_s = others * self.num_steps * self.step_row_s / num_decode
        throughput = _smaller_root(
            self.num_open * prefill_load_s * decode_load_s + self.prefill_s * decode_load_s + alone_s * prefill_load_s,
            self.prefill_s + alone_s + self.num_open * (prefill_load_s + decode_load_s),
            self.num_open,
        )
        if full_s:
            throughput = min(throughput, num_decode * self.decode_slots / full_s)
        held_decode_s = min(full_s, alone_s / (1 - throughput * decode_load_s))
        return Prediction(
            throughput_per_s=throughput,
            ttft_s=max(0.0, self.num_open / throughput - held_decode_s),
            tpot_s=held_decode_s / self.num_steps if self.num_steps else 0.0,
        )


def _smaller_root(square: float, linear: float, constant: float) -> float:
    """The smaller x with square * x² - linear * x + constant = 0, where it has roots; `square` may be 0."""
    return 2 * constant / (linear + math.sqrt(max(0.0, linear**2 - 4 * square * constant)))


def _with_same_traffic(windows: Sequence[GroupLoad]) -> Sequence[GroupLoad]:
    """The newest, and those before it up to the first with other lengths than those after it."""
    count = 1
    while count < len(windows) and _alike(windows[-count - 1], windows[-count:]):
        count += 1
    return windows[-count:]


def _alike(one: GroupLoad, later: Sequence[GroupLoad]) -> bool:
    least, by_chance = SAME_TRAFFIC
    limit = least + by_chance / math.sqrt(_num_done(one))
    return _differ_by(one, later, lambda load: load.prefill_s) <= limit and (
        _differ_by(one, later, lambda load: load.output_tokens) <= limit
    )


def _differ_by(one: GroupLoad, later: Sequence[GroupLoad], figure: Callable[[GroupLoad], float | None]) -> float:
    """The logarithm of the factor between them; 0 where one of them is unknown."""
    before, after = figure(one), _mean(later, figure)
    return abs(math.log(before / after)) if before and before > 0 and after > 0 else 0.0


def _mean(windows: Sequence[GroupLoad], figure: Callable[[GroupLoad], float | None]) -> float:
    """Of the windows that know it, by their requests; 0 where none does, and never less."""
    known = [(value, _num_done(one)) for one in windows if (value := figure(one)) is not None]
    return max(0.0, sum(value * num for value, num in known) / sum(num for _, num in known)) if known else 0.0


def _num_done(load: GroupLoad) -> float:
    return max(1.0, load.done_per_s * load.window_s)
