"""The engine: sequences in, tokens out, one step at a time. Synchronous; `EngineRunner` gives it a thread.

What every engine does with sequences is in `AnyEngine`; how a step is computed is what they differ in.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from shared.engine.batch import Batch, build_batch
from shared.engine.graphs.decode_graphs import DecodeGraphs
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.sampling.host_sampling import sample_on_host
from shared.engine.sampling.sampler import Choice
from shared.engine.scheduler import StepPlan, schedule
from shared.engine.sequence import FailedSequence, NewToken, Sequence
from shared.engine.work import WorkDone
from shared.kv.layout import KVLayout
from shared.sampling import FinishReason


class ServedModel(Protocol):
    """What has to be known of a model to take requests for it; `LoadedModel` says what each of it is."""

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> KVLayout: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...


class AnyEngine(ABC):
    """Takes prefill and decode of many sequences forward together.

    A sequence that finishes, or has generated all it should here, leaves by itself; its blocks stay the caller's.
    Blocks may be shared: of several sequences that wait for the same block, the earliest fills it, and the others go on
    from there. Only the engine knows which blocks are filled, so that none is ever read before.

    Args:
        loaded: the model.
        pool: where KV lives; its layout is the model's.
        max_step_tokens: tokens of a step that prefill may fill (`schedule`).
    """

    def __init__(self, loaded: ServedModel, pool: KVPool, max_step_tokens: int) -> None:
        assert pool.layout == loaded.layout, "the pool is laid out for another model"
        self.loaded = loaded
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        self.work = WorkDone()
        self.share = 1.0
        """The share of the time in which to compute."""
        self.on_step: Callable[[StepPlan], None] = lambda plan: None
        """Called at the beginning of each step, in the engine's thread, with what the step computes."""
        self._step_began_at: float | None = None
        self._sequences: dict[str, Sequence] = {}
        self._filled: set[int] = set()
        """Blocks that hold KV up to their end."""
        self._failed: list[FailedSequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def in_step_s(self) -> float:
        """For how long the step under way has been; 0 if there is none. Any thread may ask."""
        began_at = self._step_began_at
        return 0.0 if began_at is None else time.perf_counter() - began_at

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

    def take_failed(self) -> list[FailedSequence]:
        """Return the sequences that have failed, and left, since the last call; ask after each step."""
        failed, self._failed = self._failed, []
        return failed

    def step(self) -> list[NewToken]:
        """Compute one step and return the tokens it generated: none while it only advances long prompts."""
        assert self._sequences, "a step needs work"
        started = self._step_began_at = time.perf_counter()
        block_size = self.pool.layout.block_size
        for sequence in self._sequences.values():
            self._follow(sequence, block_size)
        plan = schedule(self._sequences.values(), self.max_step_tokens, block_size)
        for chunk in plan.prefills:
            chunk.sequence.num_planned_tokens = chunk.sequence.num_computed_tokens + chunk.num_tokens
        self.on_step(plan)
        chosen = self._compute(plan)
        if self.share < 1.0:
            self._rest(time.perf_counter() - started)
        self._step_began_at = None
        self.work.add(plan, time.perf_counter() - started)
        return self._advance(plan, chosen)

    def _rest(self, computed_s: float) -> None:
        time.sleep(computed_s * (1.0 / self.share - 1.0))

    @abstractmethod
    def _compute(self, plan: StepPlan) -> Iterable[tuple[Sequence, Choice | None]]:
        """Write the KV of a step's tokens, and choose the next token of each sequence all of whose KV is there then.

        None is chosen where no logit of a sequence is finite. The sequences stay as they are.
        """

    def _follow(self, sequence: Sequence, block_size: int) -> None:
        """Go on behind the shared blocks that are filled by now."""
        next_block = sequence.num_computed_tokens // block_size
        while next_block < sequence.num_shared_blocks and sequence.blocks[next_block] in self._filled:
            next_block += 1
            sequence.num_cached_tokens += next_block * block_size - sequence.num_computed_tokens
            sequence.num_computed_tokens = next_block * block_size

    def _advance(self, plan: StepPlan, chosen: Iterable[tuple[Sequence, Choice | None]]) -> list[NewToken]:
        block_size = self.pool.layout.block_size
        for sequence, num_tokens in parts(plan):
            first = sequence.num_computed_tokens
            last = first + num_tokens
            self._filled.update(sequence.blocks[first // block_size : last // block_size])
            sequence.num_computed_tokens = last
        tokens = []
        for sequence, choice in chosen:
            if choice is None:
                self._fail(sequence)
            else:
                tokens.append(self._append(sequence, choice))
        return tokens

    def _fail(self, sequence: Sequence) -> None:
        """Drop a sequence without finite logits. None of its KV counts as computed, so that nobody else reads it."""
        self.remove(sequence.request_id)
        self._filled.difference_update(sequence.blocks[sequence.num_shared_blocks :])
        sequence.num_computed_tokens = 0
        message = (
            f"The model's logits for output token {sequence.output_index} are not finite: its weights or the request's "
            "KV are damaged, or it overflows in this precision."
        )
        self._failed.append(FailedSequence(sequence.request_id, message))

    def _append(self, sequence: Sequence, choice: Choice) -> NewToken:
        index = sequence.output_index
        finish_reason = _finish_reason(sequence, index, choice.token_id)
        sequence.token_ids.append(choice.token_id)
        sequence.num_generated += 1
        last = finish_reason is not None or sequence.num_generated == sequence.num_to_generate
        if last:
            self.remove(sequence.request_id)
        return NewToken(sequence.request_id, index, choice.token_id, choice.logprob, choice.top, finish_reason, last)


class Engine(AnyEngine):
    """The engine that computes with torch.

    Args:
        loaded, pool, max_step_tokens: as `AnyEngine`'s.
        graphs: computes the steps that it takes; None where there is no use for it.
    """

    loaded: LoadedModel

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, max_step_tokens: int, graphs: DecodeGraphs | None = None
    ) -> None:
        super().__init__(loaded, pool, max_step_tokens)
        self._graphs = graphs

    @property
    def has_graphs(self) -> bool:
        return self._graphs is not None

    def use_graphs(self, graphs: DecodeGraphs) -> None:
        """From the next step on; there is none under way."""
        self._graphs = graphs

    @torch.inference_mode()
    def _compute(self, plan: StepPlan) -> Iterable[tuple[Sequence, Choice | None]]:
        batch = build_batch(plan, self.pool.layout.block_size, self.pool.data.dtype)
        choices = sample_on_host(self._logits(batch), batch.sampled, self.loaded.library)
        return list(zip(batch.sampled, choices, strict=True))

    def _logits(self, batch: Batch) -> torch.Tensor:
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.logits(batch)
        return self.loaded.logits(self.pool, batch)


def parts(plan: StepPlan) -> list[tuple[Sequence, int]]:
    """What a step computes of each of its sequences: so many tokens behind those it has computed."""
    return [
        *((sequence, 1) for sequence in plan.decodes),
        *((chunk.sequence, chunk.num_tokens) for chunk in plan.prefills),
    ]


def _finish_reason(sequence: Sequence, index: int, token_id: int) -> FinishReason | None:
    if token_id in sequence.sampling.stop_token_ids and index >= sequence.sampling.min_tokens:
        return "stop"
    return "length" if index + 1 == sequence.sampling.max_tokens else None
