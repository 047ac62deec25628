"""One step as tensors: all its tokens in one row, decodes first, and what attention reads.

Nothing here touches the pool. The layers of a model differ at most in their sliding window, so what prefill chunks read
is worked out once per window and step, not once per layer.
"""

from dataclasses import dataclass, field, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from shared.engine.kernels.plain import additive
from shared.engine.scheduler import StepPlan
from shared.engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class PrefillRead:
    """What a prefill chunk, rows `start:stop`, reads: slots `:last` of `blocks` under `mask` [rows, slots] (0 or -inf).

    `mask` is None where the chunk has no earlier context: it is causal then.
    """

    start: int
    stop: int
    blocks: torch.Tensor
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
        tables: int32 [B, max_blocks], the blocks of each of the B decodes in order, padded with others of its own.
        lengths: int32 [B], how many tokens each decode sees, itself included.
        sampled: the sequences that get a token, in the order of `logit_rows` [N]; all decodes are, and come first.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    logit_rows: torch.Tensor
    sampled: list[Sequence]
    spans: list[Span]
    num_decodes: int
    block_size: int
    dtype: torch.dtype
    _reads: dict[int | None, list[PrefillRead]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device, but for what `prefill_reads` gives."""
        if device == self.positions.device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            blocks=self.blocks.to(device),
            offsets=self.offsets.to(device),
            tables=self.tables.to(device),
            lengths=self.lengths.to(device),
            logit_rows=self.logit_rows.to(device),
        )

    def prefill_reads(self, window: int | None) -> list[PrefillRead]:
        """What the prefill chunks read in layers with this sliding window (None: no window).

        A token at position q sees the positions p with q - window < p <= q, as transformers' `sliding_window_overlay`.
        """
        if window not in self._reads:
            self._reads[window] = [prefill_read(self, span, window) for span in self.spans[self.num_decodes :]]
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
    decodes = spans[: len(plan.decodes)]
    sampled = [span for span in spans if span.last == len(span.sequence.token_ids)]
    return Batch(
        token_ids=rows[0],
        positions=rows[1],
        blocks=rows[2],
        offsets=rows[1] % block_size,
        tables=_tables(decodes, block_size),
        lengths=torch.tensor([span.last for span in decodes], dtype=torch.int32),
        logit_rows=torch.tensor([span.stop - 1 for span in sampled], dtype=torch.int64),
        sampled=[span.sequence for span in sampled],
        spans=spans,
        num_decodes=len(plan.decodes),
        block_size=block_size,
        dtype=dtype,
    )


def _tables(decodes: list[Span], block_size: int) -> torch.Tensor:
    """`Batch.tables`. Short rows may go on with blocks that are not written yet, and then with their first block."""
    if not decodes:
        return torch.empty(0, 0, dtype=torch.int32)
    max_blocks = max(-(-span.last // block_size) for span in decodes)
    tables = [span.sequence.block_table[:max_blocks] for span in decodes]
    if len(tables) == 1:
        return tables[0][None]
    padded = pad_sequence(tables, batch_first=True, padding_value=-1)
    return torch.where(padded < 0, padded[:, :1], padded)


def _block_range(batch: Batch, span: Span, window: int | None) -> range:
    """Indices into the sequence's blocks that hold all the positions its rows see."""
    first = 0 if window is None else max(0, span.first - window + 1)
    return range(first // batch.block_size, -(-span.last // batch.block_size))


def prefill_read(batch: Batch, span: Span, window: int | None) -> PrefillRead:
    """What one chunk reads."""
    blocks = _block_range(batch, span, window)
    table = span.sequence.block_table[blocks.start : blocks.stop]
    if span.first == 0 and (window is None or span.last <= window):
        return PrefillRead(span.start, span.stop, table, span.last, mask=None)
    origin = blocks.start * batch.block_size
    queries = torch.arange(span.first, span.last)[:, None]
    keys = torch.arange(origin, span.last)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return PrefillRead(span.start, span.stop, table, span.last - origin, additive(hidden, batch.dtype))
