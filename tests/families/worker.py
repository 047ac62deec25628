"""A process with a model and an engine of its own, as an instance has them."""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from shared.engine.engine import Engine
from shared.engine.loading.loader import load_model
from shared.engine.pool import KVPool
from shared.engine.sequence import NewToken
from shared.sampling import SamplingParams
from tests.engine.models import run, sequence_of

NUM_BLOCKS = 64


@dataclass(slots=True, frozen=True)
class Prefilled:
    """What prefill hands to decode: the prompt, its first token, and the bytes of its KV."""

    prompt: list[int]
    first: NewToken
    kv: bytes


class Worker:
    """The process, as a context manager."""

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.send(None)
        self._process.join()

    def ask(self, method: str, *arguments: object) -> None:
        """Call a method of `Instance` over there."""
        self._pipe.send((method, arguments))

    def answer(self) -> Any:
        """What the method that was asked for returned."""
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(pipe: Connection) -> None:
    """What the process does: one call after another, until None comes."""
    torch.set_num_threads(1)
    instance = Instance()
    while (call := pipe.recv()) is not None:
        method, arguments = call
        try:
            pipe.send(getattr(instance, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            pipe.send(error)


class Instance:
    """The other end of a `Worker`."""

    def load(self, folder: str, native: bool) -> str:
        """Load a model in place of the one before; its fingerprint."""
        self._loaded = load_model(folder, dtype="float32", native=native)
        return self._loaded.fingerprint

    def prefill(self, prompts: list[list[int]], sampling: SamplingParams) -> list[Prefilled]:
        """Compute prompts together."""
        engine = self._engine()
        sequences = []
        first_block = 0
        for number, prompt in enumerate(prompts):
            sequences.append(
                sequence_of(
                    engine, prompt, sampling, request_id=str(number), num_to_generate=1, first_block=first_block
                )
            )
            first_block += len(sequences[-1].blocks)
            engine.add(sequences[-1])
        tokens = run(engine)
        layout = engine.pool.layout
        handed: list[Prefilled] = []
        for number, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            num_blocks = layout.num_blocks(len(prompt))
            kv = b"".join(engine.pool.byte_views(sequence.blocks[:num_blocks], num_blocks * layout.block_bytes))
            handed.append(Prefilled(prompt, tokens[str(number)][0], kv))
        return handed

    def decode(self, handed: list[Prefilled], sampling: SamplingParams) -> list[list[NewToken]]:
        """Go on with all of them together; the tokens of each, the first included."""
        engine = self._engine()
        first_block = 0
        for number, one in reversed(list(enumerate(handed))):
            num_computed_tokens = len(one.prompt)
            sequence = sequence_of(
                engine,
                one.prompt,
                sampling,
                request_id=str(number),
                generated=(one.first.token_id,),
                num_computed_tokens=num_computed_tokens,
                first_block=first_block,
            )
            first_block += len(sequence.blocks)
            kv = one.kv
            for view in engine.pool.byte_views(
                sequence.blocks[: engine.pool.layout.num_blocks(num_computed_tokens)], len(kv)
            ):
                view[:] = kv[: len(view)]
                kv = kv[len(view) :]
            engine.add(sequence)
        tokens = run(engine)
        return [[one.first, *tokens[str(number)]] for number, one in enumerate(handed)]

    def _engine(self) -> Engine:
        pool = KVPool(self._loaded.layout, NUM_BLOCKS)
        pool.data.fill_(float("nan"))  # what is read unwritten is noticed
        return Engine(self._loaded, pool, max_step_tokens=64)
