"""Random numbers that depend on a request's seed, a token's index and a token id, and on nothing else."""

import struct

import torch
from xxhash import xxh3_64_intdigest

from shared.engine.native.library import Library

GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def likeliest_with_noise(logits: torch.Tensor, draws: list[tuple[int, int]], library: Library | None) -> torch.Tensor:
    """The token [N] per row of fp32 logits [N, V] that is the likeliest after `gumbel(draws)` was added.

    The native kernel finds the same without computing all of the noise to the last digit.
    """
    if library is None:
        return (logits + gumbel(draws, logits.shape[1])).argmax(-1)
    logits = logits.contiguous()
    keys = [_key(draw) for draw in draws]
    return torch.tensor(
        [library.draw(row.data_ptr(), row.shape[0], key) for row, key in zip(logits, keys, strict=True)]
    )


def gumbel(draws: list[tuple[int, int]], vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, fp64 [N, V]: row i belongs to the seed and the index `draws[i]`.

    Each number is splitmix64 (Steele, Lea and Flood, OOPSLA 2014) at position `token id` of a stream keyed by both.
    """
    keys = torch.tensor([[_signed(_key(draw))] for draw in draws])
    bits = torch.arange(1, vocab_size + 1) * _signed(GOLDEN) + keys
    bits = (bits ^ _shifted(bits, 30)) * _signed(MIX[0])
    bits = (bits ^ _shifted(bits, 27)) * _signed(MIX[1])
    bits ^= _shifted(bits, 31)
    # The upper 53 bits and a half: never 0 and never 1, whose logarithms would be no numbers.
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _key(draw: tuple[int, int]) -> int:
    """A uint64 of its own for a seed and an index."""
    return xxh3_64_intdigest(struct.pack("<QQ", *draw))


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right of int64, whose own keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number
