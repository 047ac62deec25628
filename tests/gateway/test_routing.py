"""In which order instances are asked; pure."""

import random
from collections import Counter

import pytest

from services.gateway import policy
from tests.registry.test_view import record


@pytest.mark.parametrize(
    ("open_at_holder", "matched", "first"),
    [(0, 1.0, "holder"), (1, 1.0, "holder"), (3, 1.0, "other"), (0, 0.1, "holder"), (1, 0.4, "other")],
)
def test_who_has_the_prompt_is_asked_first_unless_it_has_clearly_more_to_do(
    open_at_holder: int, matched: float, first: str
) -> None:
    candidates = [record("other"), record("holder")]
    found = policy.order(candidates, {"holder": open_at_holder}, random.Random(0), {"holder": matched})
    assert found[0].id == first


def test_ties_are_broken_at_random() -> None:
    tie = random.Random(0)
    candidates = [record(name) for name in "abc"]
    firsts = Counter(policy.order(candidates, {"a": 1, "b": 1, "c": 3}, tie, {"c": 1.0})[0].id for _ in range(300))
    assert set(firsts) == {"a", "b", "c"}
    assert min(firsts.values()) > 50


def test_without_prefixes_fewest_open_streams_come_first() -> None:
    found = policy.order([record(name) for name in "abc"], {"a": 2, "b": 0, "c": 1}, random.Random(0))
    assert [one.id for one in found] == ["b", "c", "a"]
