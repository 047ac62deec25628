"""The best schedule in hindsight, and the simulation beside it."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.forwarding import SPEED_TOKENS, fitted_speed
from bench.hindsight import best_in_hindsight, upper_bound
from bench.load import Item
from bench.schedule import OnDemand, PlainQueue, Setup, Speed, half_of, num_in_time

hundredths = st.integers(0, 100).map(lambda number: number / 100)
jobs = st.lists(st.tuples(hundredths.map(lambda at: 2 * at), hundredths.map(lambda at: at + 0.01)), max_size=6)
TTFT_S = 1.005
"""No sum of hundredths, so that rounding decides nothing."""


def best_by_force(jobs: list[tuple[float, float]], num_instances: int) -> int:
    """Tries for each prompt every instance, and none."""
    best = 0
    for choice in product(range(num_instances + 1), repeat=len(jobs)):
        free_at, number = [0.0] * (num_instances + 1), 0
        for (at, seconds), instance in zip(sorted(jobs), choice, strict=True):
            if instance == num_instances:
                continue
            free_at[instance] = max(free_at[instance], at) + seconds
            number += free_at[instance] <= at + TTFT_S
        best = max(best, number)
    return best


@given(jobs, st.integers(1, 2))
def test_the_best_schedule_in_hindsight_is_found_where_requests_are_few(
    jobs: list[tuple[float, float]], num_instances: int
) -> None:
    arrived_at, service_s = [at for at, _ in jobs], [seconds for _, seconds in jobs]
    best = best_in_hindsight(arrived_at, service_s, TTFT_S, num_instances)
    assert best == best_by_force(jobs, num_instances)
    bound = upper_bound(arrived_at, service_s, TTFT_S, num_instances)
    assert bound == best if num_instances == 1 else bound >= best


def bursts(seed: int, num_bursts: int, per_burst: int) -> list[Item]:
    """Short and long prompts that arrive together, every two seconds."""
    source = random.Random(seed)
    return [
        Item(2.0 * burst + 0.01 * number, source.choice([30, 200, 700, 1500]), 1)
        for burst in range(num_bursts)
        for number in range(per_burst)
    ]


@pytest.mark.parametrize("per_burst", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num_gateways", [1, 2])
@pytest.mark.parametrize("bias", [-0.2, 0.0, 0.2])
def test_on_demand_is_never_worse_than_a_queue_and_close_to_the_best(
    per_burst: int, num_gateways: int, bias: float
) -> None:
    items = bursts(per_burst, 20, per_burst)
    setup = Setup(num_gateways=num_gateways, estimate_bias=bias)
    queue = num_in_time(PlainQueue(setup).play(items), items, setup.ttft_s)
    on_demand = num_in_time(OnDemand(setup).play(items), items, setup.ttft_s)
    service_s = [setup.speed.of_chunk(0, one.num_prompt_tokens) for one in items]
    best = best_in_hindsight([one.at_s for one in items], service_s, setup.ttft_s, setup.num_instances)
    assert on_demand >= queue - 0.01 * len(items)
    assert on_demand >= (0.9 if num_gateways == 1 else 0.85) * best
    if per_burst == 16:
        assert on_demand > 1.5 * queue


def test_halves_begin_at_their_first_request() -> None:
    items = [Item(float(at), at, 1) for at in range(10)]
    assert [one.at_s for one in half_of(items, "second")] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert half_of(items, "first") == items[:5]


def test_the_speed_is_found_again() -> None:
    speed = Speed(step_s=0.004, token_s=3e-4, pair_s=2e-7)
    fitted = fitted_speed(SPEED_TOKENS, [speed.step_s + speed.of_chunk(0, tokens) for tokens in SPEED_TOKENS])
    assert fitted.of_chunk(0, 800) == pytest.approx(speed.of_chunk(0, 800))
    assert fitted.step_s == pytest.approx(speed.step_s)


def test_a_speed_without_pairs_is_linear() -> None:
    fitted = fitted_speed(SPEED_TOKENS, [0.005 + 1e-4 * tokens - 1e-10 * tokens**2 for tokens in SPEED_TOKENS])
    assert fitted.pair_s == 0.0
    assert fitted.of_chunk(0, 1000) == pytest.approx(0.1, rel=0.01)
