"""One step as tensors: all its tokens in one row, decodes first, and for each kind of layer what attention reads.

Nothing here touches the pool. The layers of a model differ at most in their sliding window, so what attention reads is
worked out once per window and step, not once per layer.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from shared.engine.scheduler import StepPlan
from shared.engine.sequence import Sequence

GROUP_COST_BLOCKS = 16
"""One more group of decodes costs a layer about as much as reading this many blocks (measured on a CPU in fp32)."""


@dataclass(slots=True, frozen=True)
class DecodeRead:
    """What decodes of like length read: rows `start:stop`, whose blocks are `blocks` [rows x blocks per row].

    Of a row's slots, `first:last` are read; `mask` [rows, 1, 1, slots] (0 or -inf) is there if they differ in which.
    """

    start: int
    stop: int
    blocks: torch.Tensor
    first: int
    last: int
    mask: torch.Tensor | None


@dataclass(slots=True, frozen=True)
class PrefillRead:
    """What a prefill chunk, rows `start:stop`, reads: slots `:last` of `blocks` under `mask` [rows, slots] (0 or -inf).

    `blocks` is None where the chunk has no earlier context: it reads its own keys and values, causally.
    """

    start: int
    stop: int
    blocks: torch.Tensor | None
    last: int
    mask: torch.Tensor | None


@dataclass(slots=True, frozen=True)
class Span:
    """Rows `start:stop` are the tokens at positions `first:last` of a sequence."""

    sequence: Sequence
    start: int
    stop: int
    first: int
    last: int


@dataclass(slots=True)
class Batch:
    """The input of one step. T tokens, N sequences that get a token.

    Args:
        token_ids, positions: [T].
        blocks, offsets: [T], where the KV of each token goes.
        entered_blocks: blocks that this step begins and does not fill; to be cleared before.
        sampled: the sequences that get a token, in the order of `logit_rows` [N].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    entered_blocks: torch.Tensor
    logit_rows: torch.Tensor
    sampled: list[Sequence]
    spans: list[Span]
    num_decodes: int
    block_size: int
    dtype: torch.dtype
    _reads: dict[int | None, tuple[list[DecodeRead], list[PrefillRead]]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    def reads(self, window: int | None) -> tuple[list[DecodeRead], list[PrefillRead]]:
        """What layers with this sliding window read (None: no window).

        A token at position q sees the positions p with q - window < p <= q, as transformers' `sliding_window_overlay`.
        """
        if window not in self._reads:
            decodes = [decode_read(self, group, window) for group in decode_groups(self, window)]
            prefills = [prefill_read(self, span, window) for span in self.spans[self.num_decodes :]]
            self._reads[window] = (decodes, prefills)
        return self._reads[window]


def build_batch(plan: StepPlan, block_size: int, dtype: torch.dtype) -> Batch:
    """Lay a plan out as tensors. Decodes are sorted by length, so that those of like length are neighbours."""
    spans: list[Span] = []
    row = 0
    for sequence in sorted(plan.decodes, key=lambda sequence: sequence.num_computed_tokens):
        first = sequence.num_computed_tokens
        spans.append(Span(sequence, row, row + 1, first, first + 1))
        row += 1
    for chunk in plan.prefills:
        first = chunk.sequence.num_computed_tokens
        spans.append(Span(chunk.sequence, row, row + chunk.num_tokens, first, first + chunk.num_tokens))
        row += chunk.num_tokens
    token_ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    for span in spans:
        token_ids += span.sequence.token_ids[span.first : span.last]
        positions += range(span.first, span.last)
        blocks += [span.sequence.blocks[position // block_size] for position in range(span.first, span.last)]
    rows = torch.tensor([token_ids, positions, blocks])
    sampled = [span for span in spans if span.last == len(span.sequence.token_ids)]
    return Batch(
        token_ids=rows[0],
        positions=rows[1],
        blocks=rows[2],
        offsets=rows[1] % block_size,
        entered_blocks=torch.tensor(_entered_blocks(spans, block_size), dtype=torch.int64),
        logit_rows=torch.tensor([span.stop - 1 for span in sampled], dtype=torch.int64),
        sampled=[span.sequence for span in sampled],
        spans=spans,
        num_decodes=len(plan.decodes),
        block_size=block_size,
        dtype=dtype,
    )


def _entered_blocks(spans: list[Span], block_size: int) -> list[int]:
    return [
        span.sequence.blocks[span.last // block_size]
        for span in spans
        if span.last % block_size and span.last // block_size * block_size >= span.first
    ]


def _block_range(batch: Batch, span: Span, window: int | None) -> range:
    """Indices into the sequence's blocks that hold all the positions its rows see."""
    first = 0 if window is None else max(0, span.first - window + 1)
    return range(first // batch.block_size, -(-span.last // batch.block_size))


def decode_groups(batch: Batch, window: int | None) -> list[list[Span]]:
    """Cut the decodes into groups of neighbours for which padding to one length costs less than one more group."""
    groups: list[list[Span]] = []
    longest = 0
    for span in batch.spans[: batch.num_decodes]:
        length = len(_block_range(batch, span, window))
        if groups and abs(length - longest) * len(groups[-1]) <= GROUP_COST_BLOCKS:
            groups[-1].append(span)
            longest = max(longest, length)
        else:
            groups.append([span])
            longest = length
    return groups


def decode_read(batch: Batch, group: list[Span], window: int | None) -> DecodeRead:
    """What one group of decodes reads. Short rows are padded with their own last block, never with somebody else's."""
    ranges = [_block_range(batch, span, window) for span in group]
    origins = [blocks.start * batch.block_size for blocks in ranges]
    firsts = [0 if window is None else max(0, span.last - window) for span in group]
    seen = [(first - origin, span.last - origin) for first, origin, span in zip(firsts, origins, group, strict=True)]
    tables = [span.sequence.block_table[blocks.start : blocks.stop] for span, blocks in zip(group, ranges, strict=True)]
    start, stop = group[0].start, group[-1].stop
    if all(pair == seen[0] for pair in seen):
        return DecodeRead(start, stop, torch.cat(tables), *seen[0], mask=None)
    table = pad_sequence(tables, batch_first=True)
    last_blocks = torch.tensor([[len(blocks) - 1] for blocks in ranges])
    columns = torch.arange(table.shape[1])
    table = table.gather(1, torch.minimum(columns, last_blocks))
    num_slots = table.shape[1] * batch.block_size
    slots = torch.arange(num_slots)
    bounds = torch.tensor(seen)  # [rows, 2]
    hidden = (slots < bounds[:, :1]) | (slots >= bounds[:, 1:])
    return DecodeRead(start, stop, table.flatten(), 0, num_slots, _additive(hidden, batch.dtype)[:, None, None, :])


def prefill_read(batch: Batch, span: Span, window: int | None) -> PrefillRead:
    """What one chunk reads."""
    if span.first == 0 and (window is None or span.last <= window):
        return PrefillRead(span.start, span.stop, blocks=None, last=span.last, mask=None)
    blocks = _block_range(batch, span, window)
    origin = blocks.start * batch.block_size
    queries = torch.arange(span.first, span.last)[:, None]
    keys = torch.arange(origin, span.last)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    table = span.sequence.block_table[blocks.start : blocks.stop]
    return PrefillRead(span.start, span.stop, table, span.last - origin, _additive(hidden, batch.dtype))


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
