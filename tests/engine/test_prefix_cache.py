"""Bookkeeping of shared blocks; no KV anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.prefix_cache import Allocation, PrefixCache, block_hashes

SIZE = 4
TEXT = list(range(100, 120))
"""Five blocks."""


def take(cache: PrefixCache, token_ids: list[int], *, pending: bool = False, extra: int = 0) -> Allocation:
    """Blocks for these tokens and `extra` more blocks."""
    num_blocks = -(-len(token_ids) // SIZE) + extra
    allocation = cache.take(cache.match(token_ids, pending=pending), num_blocks)
    assert allocation is not None
    assert len(allocation.blocks) == len(set(allocation.blocks)) == num_blocks
    return allocation


def cached(cache: PrefixCache, token_ids: list[int]) -> list[int]:
    """Puts the KV of these tokens into the cache; returns its blocks."""
    allocation = take(cache, token_ids)
    blocks = allocation.blocks
    cache.release(allocation, token_ids)
    return blocks


def test_a_name_says_all_tokens_from_the_start() -> None:
    names = block_hashes(TEXT, SIZE)
    assert len(names) == len(set(names)) == 5
    assert block_hashes([*TEXT, 1, 2, 3], SIZE) == names
    assert block_hashes([9, *TEXT[1:]], SIZE)[1:] != names[1:]
    assert block_hashes(TEXT, SIZE, known=names[:2]) == names
    assert block_hashes([7] * 8, SIZE)[0] != block_hashes([7] * 8, SIZE)[1]
    assert {len(name) for name in names} == {16}


def test_what_is_cached_is_found_and_only_the_rest_is_taken() -> None:
    cache = PrefixCache(10, SIZE)
    blocks = cached(cache, TEXT)
    assert (cache.num_free, cache.num_cached) == (10, 5)
    match = cache.match([*TEXT[:12], 1, 2, 3, 4, 5])
    assert match.blocks == blocks[:3]
    assert cache.cost(match, 5) == 5
    allocation = cache.take(match, 5)
    assert allocation is not None
    assert allocation.num_matched == 3
    assert allocation.blocks[:3] == blocks[:3]
    assert not set(allocation.blocks[3:]) & set(blocks)
    assert (cache.num_free, cache.num_cached) == (5, 2)
    assert (cache.num_query_tokens, cache.num_hit_tokens) == (20 + 17, 12)


def test_the_block_of_the_last_token_is_never_found() -> None:
    """Its last token has to be computed all the same, and would be written into somebody's block."""
    cache = PrefixCache(10, SIZE)
    blocks = cached(cache, TEXT)
    assert cache.match(TEXT).blocks == blocks[:4]
    assert cache.match([*TEXT, 1]).blocks == blocks
    assert cache.match(TEXT[:1]).blocks == cache.match(TEXT[:4]).blocks == []


def test_a_block_in_use_costs_nothing_and_a_cached_one_is_no_longer_free() -> None:
    cache = PrefixCache(6, SIZE)
    cached(cache, TEXT)
    first = take(cache, TEXT)
    assert (cache.num_free, cache.num_cached) == (1, 1)
    match = cache.match(TEXT)
    assert cache.cost(match, 5) == 1
    second = cache.take(match, 5)
    assert second is not None
    assert cache.num_free == 0
    cache.release(first, TEXT)
    assert cache.num_free == 1
    cache.release(second, TEXT)
    assert cache.num_free == 6


def test_when_short_nothing_is_taken_and_nothing_evicted() -> None:
    cache = PrefixCache(6, SIZE)
    cached(cache, TEXT[:8])
    held = take(cache, [1] * 12)
    assert cache.take(cache.match(TEXT), 6) is None
    assert (cache.num_free, cache.num_cached) == (3, 2)
    assert not cache.extend(held, 7)
    assert (len(held.blocks), cache.num_cached) == (3, 2)
    assert cache.extend(held, 6)
    assert (len(held.blocks), cache.num_free, cache.num_cached) == (6, 0, 0)
    assert cache.extend(held, 6)


def test_the_least_recently_used_goes_first_and_of_a_text_its_end() -> None:
    cache = PrefixCache(6, SIZE)
    cached(cache, [1] * 8)
    cached(cache, [2] * 8)
    cached(cache, [3] * 8)
    cache.release(take(cache, [1] * 9), [1] * 8)  # used once more
    take(cache, [4] * 4)
    assert [len(cache.match([token] * 9).blocks) for token in (1, 2, 3)] == [2, 1, 2]
    take(cache, [5] * 8)
    assert [len(cache.match([token] * 9).blocks) for token in (1, 2, 3)] == [2, 0, 1]


def test_a_match_is_not_evicted_for_what_is_taken_beside_it() -> None:
    cache = PrefixCache(5, SIZE)
    blocks = cached(cache, TEXT)
    allocation = cache.take(cache.match([*TEXT[:8], *[1] * 9]), 5)
    assert allocation is not None
    assert allocation.blocks[:2] == blocks[:2]
    assert len(set(allocation.blocks)) == 5


def test_what_was_not_computed_is_not_cached() -> None:
    cache = PrefixCache(10, SIZE)
    allocation = take(cache, TEXT)
    cache.name(allocation, TEXT)
    cache.release(allocation, TEXT[:11])
    assert (cache.num_free, cache.num_cached) == (10, 2)
    assert len(cache.match(TEXT).blocks) == 2


def test_pending_blocks_are_for_those_who_can_wait() -> None:
    cache = PrefixCache(20, SIZE)
    leader = take(cache, TEXT)
    cache.name(leader, TEXT)
    assert cache.match(TEXT).blocks == []
    follower = take(cache, TEXT, pending=True)
    assert follower.num_matched == 4
    assert follower.blocks[:4] == leader.blocks[:4]
    cache.fill(leader, TEXT[:9])
    assert cache.match(TEXT).blocks == leader.blocks[:2]


def test_who_follows_a_leader_that_goes_early_keeps_its_blocks() -> None:
    """The leader had filled two of five blocks; the follower fills the others, and leaves four (its own last is no
    other than that of the leader, which nobody has any more).
    """
    cache = PrefixCache(20, SIZE)
    leader = take(cache, TEXT)
    cache.name(leader, TEXT)
    follower = take(cache, TEXT, pending=True)
    cache.name(follower, TEXT)
    cache.release(leader, TEXT[:8])
    assert (cache.num_free, cache.num_cached) == (15, 0)
    assert cache.match(TEXT, pending=True).blocks == follower.blocks[:4]
    cache.release(follower, TEXT[:19])
    assert (cache.num_free, cache.num_cached) == (20, 4)


def test_a_follower_that_never_came_so_far_takes_nothing_from_what_the_leader_filled() -> None:
    cache = PrefixCache(20, SIZE)
    leader = take(cache, TEXT)
    cache.name(leader, TEXT)
    follower = take(cache, TEXT, pending=True)
    cache.release(leader, TEXT[:12])
    cache.release(follower, [])
    assert (cache.num_free, cache.num_cached) == (20, 3)


def test_the_first_of_a_name_keeps_it() -> None:
    cache = PrefixCache(20, SIZE)
    first, second = take(cache, TEXT), take(cache, TEXT)
    blocks = first.blocks[:4]
    cache.fill(first, TEXT)
    cache.fill(second, TEXT)
    assert cache.match(TEXT).blocks == blocks
    cache.release(second, TEXT)
    assert cache.num_cached == 0
    cache.release(first, TEXT)
    assert (cache.num_free, cache.num_cached) == (20, 5)


def test_disabled() -> None:
    cache = PrefixCache(10, SIZE, enabled=False)
    cached(cache, TEXT)
    allocation = take(cache, TEXT, pending=True)
    cache.name(allocation, TEXT)
    assert cache.match(TEXT, pending=True).blocks == []
    cache.release(allocation, TEXT)
    assert (cache.num_free, cache.num_cached) == (10, 0)


def test_letting_go_of_a_block_twice_is_a_bug() -> None:
    cache = PrefixCache(10, SIZE)
    allocation = take(cache, TEXT)
    again = Allocation(list(allocation.blocks), 0, [])
    cache.release(allocation, [])
    with pytest.raises(AssertionError):
        cache.release(again, [])


@given(st.data())
def test_no_block_is_lost_or_given_to_two_who_do_not_share_it(data: st.DataObject) -> None:
    """Against a model that knows which tokens each block holds."""
    cache = PrefixCache(12, SIZE)
    held: list[tuple[Allocation, list[int]]] = []
    content: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            allocation, token_ids = held.pop(data.draw(st.integers(0, len(held) - 1)))
            cache.release(allocation, token_ids[: data.draw(st.sampled_from([0, 5, len(token_ids) - 1, 99]))])
        else:
            token_ids = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 20)) + [data.draw(st.integers(0, 1))]
            match = cache.match(token_ids, pending=data.draw(st.booleans()))
            num_blocks = -(-len(token_ids) // SIZE) + data.draw(st.integers(0, 2))
            used = {block for allocation, _ in held for block in allocation.blocks}
            cost, free = cache.cost(match, num_blocks), cache.num_free
            taken = cache.take(match, num_blocks)
            assert (taken is None) == (cost > free)
            if taken is not None:
                assert free - cache.num_free == cost
                assert not used & set(taken.blocks[taken.num_matched :])
                for number, block in enumerate(taken.blocks):
                    tokens = token_ids[: (number + 1) * SIZE]
                    if number < taken.num_matched:
                        assert content[block] == tokens
                    content[block] = tokens
                cache.name(taken, token_ids)
                held.append((taken, token_ids))
        used = {block for allocation, _ in held for block in allocation.blocks}
        assert cache.num_free == 12 - len(used)
        assert cache.num_cached <= cache.num_free
    for allocation, _ in held:
        cache.release(allocation, [])
    assert cache.num_free == 12
    everything = cache.take(cache.match([9]), 12)
    assert everything is not None
    assert sorted(everything.blocks) == list(range(12))
    assert cache.num_cached == 0
