"""The engine: sequences in, tokens out, one step at a time. Synchronous; `EngineRunner` gives it a thread."""

import torch

from shared.engine.batch import Batch, build_batch
from shared.engine.decode_graphs import DecodeGraphs
from shared.engine.host_sampling import sample_on_host
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.sampler import Choice
from shared.engine.scheduler import schedule
from shared.engine.sequence import NewToken, Sequence
from shared.sampling import FinishReason


class Engine:
    """Computes prefill and decode of many sequences together.

    A sequence that finishes, or has generated all it should here, leaves by itself; its blocks stay the caller's.
    Blocks may be shared: of several sequences that wait for the same block, the earliest fills it, and the others go on
    from there. Only the engine knows which blocks are filled, so that none is ever read before.

    Args:
        loaded: the model.
        pool: where KV lives; its layout is the model's.
        max_step_tokens: tokens of a step that prefill may fill (`schedule`).
        graphs: computes the steps that it takes; None where there is no use for it.
    """

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, max_step_tokens: int, graphs: DecodeGraphs | None = None
    ) -> None:
        assert pool.layout == loaded.layout, "the pool is laid out for another model"
        self.loaded = loaded
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self._graphs = graphs
        self._sequences: dict[str, Sequence] = {}
        self._filled: set[int] = set()
        """Blocks that hold KV up to their end."""

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; it joins the next step."""
        layout = self.pool.layout
        assert sequence.request_id not in self._sequences, f"{sequence.request_id} is here already"
        assert len(sequence.blocks) >= layout.num_blocks(sequence.num_kv_tokens), "too few blocks"
        num_filled = sequence.num_computed_tokens // layout.block_size
        self._filled.update(sequence.blocks[:num_filled])
        self._filled.difference_update(sequence.blocks[max(num_filled, sequence.num_shared_blocks) :])
        self._sequences[sequence.request_id] = sequence

    def remove(self, request_id: str) -> bool:
        """Let go of a sequence; False if it is not here."""
        return self._sequences.pop(request_id, None) is not None

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Compute one step and return the tokens it generated: none while it only advances long prompts."""
        assert self._sequences, "a step needs work"
        block_size = self.pool.layout.block_size
        for sequence in self._sequences.values():
            self._follow(sequence, block_size)
        plan = schedule(self._sequences.values(), self.max_step_tokens, block_size)
        batch = build_batch(plan, block_size, self.pool.data.dtype)
        choices = sample_on_host(self._logits(batch), batch.sampled, self.loaded.library)
        return self._advance(batch, choices)

    def _logits(self, batch: Batch) -> torch.Tensor:
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.logits(batch)
        return self.loaded.logits(self.pool, batch)

    def _follow(self, sequence: Sequence, block_size: int) -> None:
        """Go on behind the shared blocks that are filled by now."""
        next_block = sequence.num_computed_tokens // block_size
        while next_block < sequence.num_shared_blocks and sequence.blocks[next_block] in self._filled:
            next_block += 1
            sequence.num_cached_tokens += next_block * block_size - sequence.num_computed_tokens
            sequence.num_computed_tokens = next_block * block_size

    def _advance(self, batch: Batch, choices: list[Choice]) -> list[NewToken]:
        block_size = self.pool.layout.block_size
        for span in batch.spans:
            self._filled.update(span.sequence.blocks[span.first // block_size : span.last // block_size])
            span.sequence.num_computed_tokens = span.last
        return [self._append(sequence, choice) for sequence, choice in zip(batch.sampled, choices, strict=True)]

    def _append(self, sequence: Sequence, choice: Choice) -> NewToken:
        index = sequence.output_index
        finish_reason = _finish_reason(sequence, index, choice.token_id)
        sequence.token_ids.append(choice.token_id)
        sequence.num_generated += 1
        last = finish_reason is not None or sequence.num_generated == sequence.num_to_generate
        if last:
            del self._sequences[sequence.request_id]
        return NewToken(sequence.request_id, index, choice.token_id, choice.logprob, choice.top, finish_reason, last)


def _finish_reason(sequence: Sequence, index: int, token_id: int) -> FinishReason | None:
    if token_id in sequence.sampling.stop_token_ids and index >= sequence.sampling.min_tokens:
        return "stop"
    return "length" if index + 1 == sequence.sampling.max_tokens else None
