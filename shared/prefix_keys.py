"""Keys of the blocks that a prompt begins with. Gateways send them, instances compare them instead of tokens. Pure."""

import struct
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from shared.messages.serving import MAX_PREFIX_KEYS

PREFIX_BLOCK_TOKENS = 64
"""Tokens in a block. It has nothing to do with the block size of any KV pool."""

_TOKEN_BYTES = 8


def prefix_keys(
    token_ids: Sequence[int], block_tokens: int = PREFIX_BLOCK_TOKENS, max_blocks: int = MAX_PREFIX_KEYS
) -> tuple[int, ...]:
    """Returns the key of each full block that the prompt begins with: a hash of the previous key and the tokens.

    Two prompts with the same n-th key have the first n blocks in common. The keys are the same in every process. They
    only say which instance to ask first: two that are equal by accident cost time, and never mix up texts.
    """
    num_blocks = min(len(token_ids) // block_tokens, max_blocks)
    num_tokens = num_blocks * block_tokens
    packed = memoryview(struct.pack(f"<{num_tokens}Q", *token_ids[:num_tokens]))
    keys = []
    key = 0
    num_bytes = block_tokens * _TOKEN_BYTES
    for start in range(0, len(packed), num_bytes):
        key = xxh3_64_intdigest(packed[start : start + num_bytes], key)
        keys.append(key)
    return tuple(keys)
