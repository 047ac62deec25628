"""Blocks by prefix keys; pure."""

import pytest

from shared.engine.prefix_cache import block_hashes
from shared.instance.prefix_index import PrefixIndex
from shared.prefix_keys import prefix_keys

PROMPT = list(range(300))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("num_common", [0, 63, 64, 200, 256, 300])
def test_it_finds_the_names_of_the_blocks_that_prompts_have_in_common(block_size: int, num_common: int) -> None:
    index = PrefixIndex(block_size)
    names = block_hashes(PROMPT, block_size)
    index.remember(prefix_keys(PROMPT), names)
    other = [*PROMPT[:num_common], *range(1000, 1100)]
    num_tokens = num_common // 64 * 64
    assert index.names(prefix_keys(other)) == names[: num_tokens // block_size]


def test_without_names_nothing_is_remembered() -> None:
    """As where the prefix cache is off, or fewer blocks were named than the prompt has keys."""
    index = PrefixIndex(16)
    index.remember(prefix_keys(PROMPT), [])
    assert len(index) == 0
    index.remember(prefix_keys(PROMPT), block_hashes(PROMPT[:100], 16))
    assert index.names(prefix_keys(PROMPT)) == block_hashes(PROMPT[:64], 16)


def test_it_remembers_a_bounded_number_of_keys_the_last_ones() -> None:
    index = PrefixIndex(16, max_keys=8)
    for number in range(10):
        prompt = [number, *PROMPT]
        index.remember(prefix_keys(prompt), block_hashes(prompt, 16))
    assert len(index) == 8
    assert index.names(prefix_keys([0, *PROMPT])) == []
    assert index.names(prefix_keys([9, *PROMPT])) == block_hashes([9, *PROMPT][:256], 16)
