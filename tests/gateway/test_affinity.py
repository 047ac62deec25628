"""Who has which beginnings of prompts, and in which order instances are asked; pure."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import policy
from services.gateway.prefix_affinity import AT_MOST, BLOCK, Affinity, prefix_keys, shares
from tests.registry.test_view import record

TOKENS = st.lists(st.integers(0, 2), max_size=12)
"""Few different ones, so that prompts begin alike."""


def common(left: list[int], right: list[int], block: int) -> int:
    """How many leading full blocks two prompts have in common."""
    count = 0
    for start in range(0, min(len(left), len(right)) - block + 1, block):
        if left[start : start + block] != right[start : start + block]:
            break
        count += 1
    return count


@given(left=TOKENS, right=TOKENS, block=st.integers(1, 4), at_most=st.integers(0, 4))
def test_prompts_have_as_many_keys_in_common_as_blocks(
    left: list[int], right: list[int], block: int, at_most: int
) -> None:
    ours, theirs = (prefix_keys(tokens, block, at_most) for tokens in (left, right))
    assert len(ours) == min(len(left) // block, at_most)
    alike = sum(one == other for one, other in zip(ours, theirs, strict=False))
    assert alike == min(common(left, right, block), at_most)
    assert ours[:alike] == theirs[:alike]


def test_keys_are_the_same_in_every_process() -> None:
    """Gateways call a scenario by them: they must not change from one version to the next without need."""
    assert prefix_keys(range(8), block=4) == (3351146345649969386, 16070428996067408666)


def test_only_full_blocks_at_the_beginning_count() -> None:
    assert prefix_keys([]) == ()
    assert prefix_keys([1] * (BLOCK - 1)) == ()
    assert len(prefix_keys([1] * (2 * BLOCK - 1))) == 1
    assert prefix_keys([1] * 8192) == prefix_keys([1] * 8192 + [2])
    assert len(prefix_keys([1] * 8192)) == AT_MOST


def test_each_instance_is_known_for_what_it_was_sent() -> None:
    affinity = Affinity()
    affinity.remember("a", prefix_keys([1, 2, 3, 4, 5, 6], block=2))
    affinity.remember("b", prefix_keys([1, 2, 9, 9], block=2))
    assert affinity.matched(prefix_keys([1, 2, 3, 4, 7, 7], block=2)) == {"a": 2, "b": 1}
    assert affinity.matched(prefix_keys([7, 7, 3, 4], block=2)) == {}
    assert affinity.matched(()) == {}


def test_who_has_lost_its_cache_is_forgotten() -> None:
    affinity = Affinity()
    for one in ("a", "b"):
        affinity.remember(one, (1, 2, 3))
    affinity.forget("a")
    affinity.forget("nobody")
    assert affinity.matched((1, 2, 3)) == {"b": 3}
    assert len(affinity) == 3


def test_what_is_not_used_is_forgotten_first_and_of_a_prompt_its_end() -> None:
    affinity = Affinity(at_most=5)
    affinity.remember("a", (1, 2, 3))
    affinity.remember("a", (7, 8))
    affinity.remember("a", (1, 2))
    affinity.remember("a", (9,))
    assert [affinity.matched(keys) for keys in ((1, 2, 3), (7, 8), (9,))] == [{"a": 2}, {"a": 2}, {"a": 1}]
    affinity.remember("a", (10, 11))
    assert [affinity.matched(keys) for keys in ((1, 2, 3), (7, 8), (9,))] == [{"a": 2}, {}, {"a": 1}]


@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), TOKENS, st.booleans()), max_size=30),
    asked=TOKENS,
    at_most=st.integers(1, 40),
)
def test_as_if_each_prompt_had_been_written_down(
    steps: list[tuple[str, list[int], bool]], asked: list[int], at_most: int
) -> None:
    """Never more than an instance was sent since it was last forgotten; and all of it, while there is room."""
    affinity = Affinity(at_most)
    sent: dict[str, list[list[int]]] = {}
    for instance, tokens, gone in steps:
        if gone:
            affinity.forget(instance)
            sent.pop(instance, None)
        else:
            affinity.remember(instance, prefix_keys(tokens, block=2))
            sent.setdefault(instance, []).append(tokens)
        assert len(affinity) <= at_most
    matched = affinity.matched(prefix_keys(asked, block=2))
    best = {one: max(common(asked, tokens, 2) for tokens in prompts) for one, prompts in sent.items()}
    assert all(0 < count <= best[one] for one, count in matched.items())
    pairs = {(one, key) for one, prompts in sent.items() for tokens in prompts for key in prefix_keys(tokens, block=2)}
    if len(affinity) == len(pairs):
        assert matched == {one: count for one, count in best.items() if count}


def test_shares_are_of_the_whole_prompt() -> None:
    assert shares({"a": 2, "b": 4}, 256) == {"a": 0.5, "b": 1.0}
    assert shares({"a": 2}, 130) == {"a": 128 / 130}
    assert shares({}, 0) == {}


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
