"""Where a step of decodes finds its input, always at the same addresses, so that a CUDA graph of it can be replayed.

There is a batch for each of a few numbers of rows (buckets). A step's own batch is copied into the smallest that holds
it, out of pinned host memory; rows that are left over compute a token of no request: they see nothing, and what they
write goes to the pool's trash block.
"""

import torch

from shared.engine.batch import Batch
from shared.engine.pool import KVPool
from shared.engine.staging import host_tensor

NUM_NUMBERS = 4
"""Of each row: token id, position, block and offset."""


def buckets(num_slots: int) -> list[int]:
    """Numbers of rows, ascending: the powers of two below `num_slots`, and `num_slots`."""
    return [2**power for power in range((num_slots - 1).bit_length())] + [num_slots]


class DecodeInputs:
    """Batches of decodes in static memory.

    Args:
        pool: where KV lives; its device is where the input goes.
        num_slots: the most decodes of a step.
        max_blocks: the most blocks of a request.
    """

    def __init__(self, pool: KVPool, num_slots: int, max_blocks: int) -> None:
        device = pool.device
        self._trash_block = pool.trash_block
        self._tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._host_tables = host_tensor((num_slots * max_blocks,), torch.int32, device)
        self._host_lengths = host_tensor((num_slots,), torch.int32, device)
        self._host_numbers = host_tensor((NUM_NUMBERS * num_slots,), torch.int64, device)
        self._numbers = {
            rows: torch.zeros(NUM_NUMBERS, rows, dtype=torch.int64, device=device) for rows in buckets(num_slots)
        }
        self.batches = {rows: self._batch(rows, pool) for rows in self._numbers}
        for rows in self._numbers:
            self._fill_numbers(torch.empty(NUM_NUMBERS, 0, dtype=torch.int64), rows)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is of decodes alone, and there is room for it."""
        num_rows, num_blocks = batch.tables.shape
        return 0 < batch.num_tokens == num_rows <= self._tables.shape[0] and num_blocks <= self._tables.shape[1]

    def fill(self, batch: Batch) -> Batch:
        """The static batch with this one's rows in it. Those of the step before must have been computed.

        Its `sampled` and `spans` are empty: they are the ordinary batch's.
        """
        assert self.takes(batch), "a batch of decodes, and not too many"
        num_rows, num_blocks = batch.tables.shape
        rows = min(rows for rows in self._numbers if rows >= num_rows)
        self._fill_numbers(torch.stack([batch.token_ids, batch.positions, batch.blocks, batch.offsets]), rows)
        host_lengths = self._host_lengths[:rows].zero_()
        host_lengths[:num_rows] = batch.lengths
        self._lengths[:rows].copy_(host_lengths, non_blocking=True)
        host_tables = self._host_tables[: num_rows * num_blocks].view(num_rows, num_blocks).copy_(batch.tables)
        self._tables[:num_rows, :num_blocks].copy_(host_tables, non_blocking=True)
        return self.batches[rows]

    def _fill_numbers(self, numbers: torch.Tensor, rows: int) -> None:
        """Put numbers [NUM_NUMBERS, n] in front and padding behind."""
        host = self._host_numbers[: NUM_NUMBERS * rows].view(NUM_NUMBERS, rows)
        host.zero_()[2] = self._trash_block
        host[:, : numbers.shape[1]] = numbers
        self._numbers[rows].copy_(host, non_blocking=True)

    def _batch(self, rows: int, pool: KVPool) -> Batch:
        token_ids, positions, blocks, offsets = self._numbers[rows]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            blocks=blocks,
            offsets=offsets,
            tables=self._tables[:rows],
            lengths=self._lengths[:rows],
            logit_rows=torch.arange(rows, device=pool.device),
            sampled=[],
            spans=[],
            num_decodes=rows,
            block_size=pool.layout.block_size,
            dtype=pool.data.dtype,
        )
