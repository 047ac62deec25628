import re
from pathlib import Path

import pytest
import torch

from shared.engine.memory import HUGE_PAGE, huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kb(address: int) -> int:
    """How much of the mapping that an address lies in is on huge pages."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(bound, 16) for bound in mapping.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            found = re.search(r"AnonHugePages:\s+(\d+) kB", mapping)
            return int(found.group(1)) if found else 0
    return 0


def test_memory_is_zero_and_begins_with_a_page() -> None:
    memory = huge_pages(3 * HUGE_PAGE + 17)
    assert (memory.dtype, memory.shape) == (torch.uint8, (3 * HUGE_PAGE + 17,))
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert not memory[::4096].any()
    memory[-1] = 1


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no huge pages to anybody"
)
def test_memory_is_on_huge_pages() -> None:
    memory = huge_pages(8 * HUGE_PAGE)
    assert huge_kb(memory.data_ptr()) == 0
    memory.fill_(1)
    assert huge_kb(memory.data_ptr()) > 0


def test_what_is_not_there_is_refused_with_its_size() -> None:
    with pytest.raises(MemoryError, match=r"does not have 1000000000\.0 GB"):
        huge_pages(10**18)
