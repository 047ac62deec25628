"""Which instances have which beginnings of prompts; pure."""

from hypothesis import given
from hypothesis import strategies as st

from shared.messages.serving import MAX_PREFIX_KEYS
from shared.prefix_affinity import MAX_MATCHES, PrefixAffinity, shares
from shared.prefix_keys import PREFIX_BLOCK_TOKENS, prefix_keys

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
    assert prefix_keys(range(8), block_tokens=4) == (3351146345649969386, 16070428996067408666)


def test_only_full_blocks_at_the_beginning_count() -> None:
    assert prefix_keys([]) == ()
    assert prefix_keys([1] * (PREFIX_BLOCK_TOKENS - 1)) == ()
    assert len(prefix_keys([1] * (2 * PREFIX_BLOCK_TOKENS - 1))) == 1
    assert prefix_keys([1] * 8192) == prefix_keys([1] * 8192 + [2])
    assert len(prefix_keys([1] * 8192)) == MAX_PREFIX_KEYS


def test_each_instance_is_known_for_what_it_was_sent() -> None:
    affinity = PrefixAffinity()
    affinity.remember("a", prefix_keys([1, 2, 3, 4, 5, 6], block_tokens=2))
    affinity.remember("b", prefix_keys([1, 2, 9, 9], block_tokens=2))
    assert affinity.matched(prefix_keys([1, 2, 3, 4, 7, 7], block_tokens=2)) == {"a": 2, "b": 1}
    assert affinity.matched(prefix_keys([7, 7, 3, 4], block_tokens=2)) == {}
    assert affinity.matched(()) == {}


def test_who_has_lost_its_cache_is_forgotten() -> None:
    affinity = PrefixAffinity()
    for one in ("a", "b"):
        affinity.remember(one, (1, 2, 3))
    affinity.forget("a")
    affinity.forget("nobody")
    assert affinity.matched((1, 2, 3)) == {"b": 3}
    assert len(affinity) == 3


def test_what_is_not_used_is_forgotten_first_and_of_a_prompt_its_end() -> None:
    affinity = PrefixAffinity(max_entries=5)
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
    affinity = PrefixAffinity(at_most)
    sent: dict[str, list[list[int]]] = {}
    for instance, tokens, gone in steps:
        if gone:
            affinity.forget(instance)
            sent.pop(instance, None)
            assert instance not in affinity
        else:
            affinity.remember(instance, prefix_keys(tokens, block_tokens=2))
            sent.setdefault(instance, []).append(tokens)
        assert len(affinity) <= at_most
    matched = affinity.matched(prefix_keys(asked, block_tokens=2))
    best = {one: max(common(asked, tokens, 2) for tokens in prompts) for one, prompts in sent.items()}
    assert all(0 < count <= best[one] for one, count in matched.items())
    pairs = {
        (one, key) for one, prompts in sent.items() for tokens in prompts for key in prefix_keys(tokens, block_tokens=2)
    }
    assert all(affinity.num_blocks(one, prefix_keys(asked, block_tokens=2)) == matched.get(one, 0) for one in "abc")
    if len(affinity) == len(pairs):
        assert matched == {one: count for one, count in best.items() if count}


def test_shares_are_of_the_whole_prompt() -> None:
    assert shares({"a": 2, "b": 4}, 256) == {"a": 0.5, "b": 1.0}
    assert shares({"a": 2}, 130) == {"a": 128 / 130}
    assert shares({}, 0) == {}


def test_of_many_instances_those_with_the_most_blocks_are_found() -> None:
    affinity = PrefixAffinity()
    for number in range(200):
        affinity.remember(f"short-{number}", (1, 2))
    for number in range(3):
        affinity.remember(f"long-{number}", (1, 2, 3, 4))
    matched = affinity.matched((1, 2, 3, 4, 5))
    assert len(matched) == MAX_MATCHES
    assert {one: count for one, count in matched.items() if count > 2} == {f"long-{number}": 4 for number in range(3)}
    assert set(matched.values()) == {2, 4}
    assert affinity.num_blocks("short-199", (1, 2, 3)) == 2
    assert affinity.num_blocks("nobody", (1, 2, 3)) == 0
