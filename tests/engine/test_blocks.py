import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.blocks import BlockAllocator, runs


def test_runs_are_coalesced_in_order() -> None:
    assert runs([4, 5, 6, 2, 8, 9]) == [(4, 3), (2, 1), (8, 2)]
    assert runs([]) == []


def test_the_smallest_run_that_fits_is_taken() -> None:
    allocator = BlockAllocator(10)
    assert allocator.allocate(10) == list(range(10))
    allocator.free([0, 1, 2, 3])
    allocator.free([6, 7])
    assert allocator.allocate(2) == [6, 7]


def test_several_runs_when_none_fits() -> None:
    allocator = BlockAllocator(6)
    allocator.allocate(6)
    allocator.free([0, 2, 3, 5])
    assert allocator.allocate(3) == [2, 3, 0]
    assert allocator.num_free == 1


def test_none_and_nothing_taken_when_short() -> None:
    allocator = BlockAllocator(3)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3


def test_freed_neighbours_merge() -> None:
    allocator = BlockAllocator(6)
    allocator.allocate(6)
    for block in (1, 3, 2, 0, 5, 4):
        allocator.free([block])
    assert allocator.allocate(6) == list(range(6))


@pytest.mark.parametrize("blocks", [[0], [1, 2], [3, 3], [9], [-1]])
def test_what_is_not_taken_cannot_be_freed(blocks: list[int]) -> None:
    allocator = BlockAllocator(8)
    taken = allocator.allocate(4)
    assert taken == [0, 1, 2, 3]
    allocator.free([0, 1])
    with pytest.raises(AssertionError):
        allocator.free(blocks)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_no_block_is_held_twice_or_lost(actions: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(24)
    held: list[list[int]] = []
    free = set(range(24))
    for takes, number in actions:
        if takes:
            blocks = allocator.allocate(number)
            assert (blocks is None) == (number > len(free))
            if blocks is not None:
                assert len(blocks) == len(set(blocks)) == number
                longest = max(length for _, length in runs(sorted(free)))
                assert (len(runs(blocks)) == 1) == (longest >= number)
                assert free.issuperset(blocks)
                free.difference_update(blocks)
                held.append(blocks)
        elif held:
            blocks = held.pop(number % len(held))
            allocator.free(blocks)
            free.update(blocks)
        assert allocator.num_free == len(free)
    for blocks in held:
        allocator.free(blocks)
    assert allocator.allocate(24) == list(range(24))
