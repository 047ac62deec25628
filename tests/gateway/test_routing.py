"""The order in which waiting requests are served, which of them are hopeless, and which instances are asked; pure."""

import random
from collections import Counter
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.routing import (
    BATCH,
    DUE_WITHOUT_OBJECTIVE_S,
    ESTIMATE_ERROR,
    INTERACTIVE,
    STARTED,
    Waiting,
    can_prefill,
    candidates,
    hopeless_at,
    is_hopeless,
    longest_by_fingerprint,
    prefill_s,
    service_order,
    shortest_prefill_s,
)
from tests.registry.test_view import record

TTFT_S = 1.0


def waiting(arrived_at: float, expected_s: float = 0.0, ttft_s: float | None = TTFT_S, **fields: int) -> Waiting:
    by = None if ttft_s is None else arrived_at + ttft_s
    return Waiting(arrived_at, by, expected_s / ESTIMATE_ERROR, **fields)


def num_in_time(order: list[Waiting], num_instances: int, now: float = 0.0) -> int:
    """How many are in time if they are served in this order, and none is shed."""
    free_at, number = [now] * num_instances, 0
    for one in order:
        instance = free_at.index(min(free_at))
        free_at[instance] += ESTIMATE_ERROR * one.expected_s
        number += one.first_token_by is not None and free_at[instance] <= one.first_token_by
    return number


def test_without_lack_of_time_the_earliest_deadline_is_first() -> None:
    late, early, soon = waiting(0.2, 0.1), waiting(0.1, 0.3), waiting(0.3, 0.1, ttft_s=0.5)
    assert service_order([late, early, soon], [0.0], 0.3) == [soon, early, late]


def test_equal_requests_are_served_in_the_order_of_arrival() -> None:
    requests = [waiting(at / 100, 0.25) for at in range(8)]
    shuffled = random.Random(0).sample(requests, len(requests))
    # Four are in time with one instance; the last arrivals are set aside.
    assert service_order(shuffled, [0.0], 0.0) == requests


def test_the_longest_is_set_aside_where_all_cannot_be_in_time() -> None:
    long, short, other = waiting(0.0, 0.9), waiting(0.01, 0.3), waiting(0.02, 0.3)
    assert service_order([long, short, other], [0.0], 0.02) == [short, other, long]
    assert service_order([long, short, other], [0.0, 0.0], 0.02)[0] is long, "there is time for all"


def test_time_until_an_instance_is_free_counts() -> None:
    long, short = waiting(0.0, 0.5), waiting(0.01, 0.3)
    assert service_order([long, short], [0.0], 0.1) == [long, short]
    assert service_order([long, short], [0.3], 0.1) == [short, long]


def test_a_request_that_was_set_aside_comes_back_when_there_is_time() -> None:
    long, short = waiting(0.0, 0.8), waiting(0.01, 0.3)
    assert service_order([long, short], [0.0], 0.0)[0] is short
    assert service_order([long], [0.0], 0.1) == [long]


def test_started_requests_come_first_and_batch_requests_last() -> None:
    batch = waiting(0.0, 0.1, ttft_s=None, priority=BATCH)
    started = waiting(0.4, 5.0, ttft_s=0.1, priority=STARTED)
    interactive = waiting(0.2, 0.1)
    hopeless = waiting(0.1, 2.0)
    assert service_order([batch, hopeless, interactive, started], [0.0], 0.4)[0] is started
    assert service_order([batch, hopeless, interactive], [0.0], 0.4) == [interactive, hopeless, batch]


def test_a_request_without_an_objective_is_overtaken_for_a_limited_time_only() -> None:
    patient = waiting(0.0, 3.0, ttft_s=None)
    for now in (0.0, DUE_WITHOUT_OBJECTIVE_S - TTFT_S - 0.1):
        assert service_order([patient, waiting(now, 0.1)], [0.0], now)[0] is not patient
    now = DUE_WITHOUT_OBJECTIVE_S
    assert service_order([patient, *(waiting(now, 0.1) for _ in range(50))], [0.0], now)[0] is patient


def test_without_instances_or_estimates_deadlines_decide() -> None:
    requests = [waiting(at / 10) for at in range(5)]
    assert service_order(reversed(requests), [], 0.0) == requests
    assert service_order(reversed(requests), [0.5], 0.5) == requests


times = st.integers(0, 100).map(lambda number: number / 100)
between = TTFT_S + 0.005
"""Deadlines are no sums of `times`, so that rounding decides nothing."""


def some_waiting(max_size: int) -> st.SearchStrategy[list[Waiting]]:
    one = st.builds(lambda at, seconds: waiting(at, seconds + 0.01, between), times, times)
    return st.lists(one, max_size=max_size)


@given(some_waiting(7), st.lists(times, max_size=4), times)
def test_every_request_is_in_the_order_once(requests: list[Waiting], free_in_s: list[float], now: float) -> None:
    order = service_order(requests, free_in_s, now)
    assert sorted(map(id, order)) == sorted(map(id, requests))


@given(some_waiting(7))
def test_with_one_instance_no_order_has_more_in_time(requests: list[Waiting]) -> None:
    """Moore and Hodgson's theorem; by brute force, as the best order of those in time is by deadline."""
    most = 0
    for size in range(len(requests), 0, -1):
        by_due = (sorted(subset, key=lambda one: one.due) for subset in combinations(requests, size))
        if any(num_in_time(order, 1) == size for order in by_due):
            most = size
            break
    assert num_in_time(service_order(requests, [0.0], 0.0), 1) == most


@given(some_waiting(5))
def test_with_two_instances_it_is_close_to_the_best_order(requests: list[Waiting]) -> None:
    most = max(num_in_time(list(order), 2) for order in permutations(requests))
    assert num_in_time(service_order(requests, [0.0, 0.0], 0.0), 2) >= most - 1


def test_only_what_cannot_be_in_time_is_hopeless() -> None:
    one = Waiting(arrived_at=0.0, first_token_by=1.0, expected_s=0.6)
    assert hopeless_at(one) == 1.0 - 0.6 / ESTIMATE_ERROR
    assert not is_hopeless(one, 0.45)
    assert is_hopeless(one, 0.55)
    assert is_hopeless(one, 0.35, starts_in_s=0.2)


@pytest.mark.parametrize("priority", [STARTED, BATCH])
def test_requests_that_may_be_late_are_never_hopeless(priority: int) -> None:
    assert not is_hopeless(Waiting(0.0, 1.0, 5.0, priority), 100.0)
    assert not is_hopeless(Waiting(0.0, None, 5.0, INTERACTIVE), 100.0)
    assert hopeless_at(Waiting(0.0, 1.0, 5.0, priority)) == float("inf")


def test_the_time_of_prefill_has_a_part_for_tokens_and_one_for_pairs() -> None:
    instance = record("a").model_copy(update={"prefill_token_s": 1e-4, "prefill_pair_s": 1e-7})
    assert prefill_s(instance, 1000) == pytest.approx(0.1 + 1e-7 * 1000 * 1001 / 2)
    whole = prefill_s(instance, 400) + prefill_s(instance, 600, num_cached_tokens=400)
    assert whole == pytest.approx(prefill_s(instance, 1000))
    assert prefill_s(record("b"), 1000) == 0.0


def test_the_fastest_instance_is_the_one_that_has_the_prompt_cached() -> None:
    slow = record("slow").model_copy(update={"prefill_token_s": 2e-4})
    fast = record("fast").model_copy(update={"prefill_token_s": 1e-4})
    assert shortest_prefill_s([slow, fast], 1000, {}) == pytest.approx(0.1)
    assert shortest_prefill_s([slow, fast], 1000, {"slow": 0.9}) == pytest.approx(0.02)
    assert shortest_prefill_s([], 1000, {}) == 0.0


@pytest.mark.parametrize(
    ("open_at_caching", "matched", "first"),
    [(0, 1.0, "caching"), (1, 1.0, "caching"), (3, 1.0, "other"), (0, 0.1, "caching"), (1, 0.4, "other")],
)
def test_the_instance_with_the_prompt_is_asked_first_unless_it_has_clearly_more_to_do(
    open_at_caching: int, matched: float, first: str
) -> None:
    instances = [record("other"), record("caching")]
    found = candidates(instances, {"caching": open_at_caching}, random.Random(0), {"caching": matched})
    assert found[0].id == first


def test_ties_are_broken_at_random() -> None:
    tie = random.Random(0)
    instances = [record(name) for name in "abc"]
    firsts = Counter(candidates(instances, {"a": 1, "b": 1, "c": 3}, tie, {"c": 1.0})[0].id for _ in range(300))
    assert set(firsts) == {"a", "b", "c"}
    assert min(firsts.values()) > 50


def test_without_prefixes_fewest_open_requests_come_first() -> None:
    found = candidates([record(name) for name in "abc"], {"a": 2, "b": 0, "c": 1}, random.Random(0))
    assert [one.id for one in found] == ["b", "c", "a"]


def test_prefill_starts_only_what_a_decode_instance_of_the_same_weights_can_continue() -> None:
    ours = record("p").model_copy(update={"fingerprint": "ours", "max_model_len": 100})
    limits = longest_by_fingerprint(
        record("d").model_copy(update={"fingerprint": fingerprint, "max_model_len": length})
        for fingerprint, length in (("ours", 50), ("ours", 80), ("theirs", 200))
    )
    assert limits == {"ours": 80, "theirs": 200}
    assert can_prefill(None, 80, limits, ours)
    assert can_prefill("ours", 80, limits, ours)
    assert not can_prefill(None, 81, limits, ours)
    assert not can_prefill("theirs", 10, limits, ours)
    assert not can_prefill(None, 10, {"theirs": 200}, ours)
