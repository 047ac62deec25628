"""pdserve's own engine, without services."""

from itertools import count

from bench.peers.worker import Load, OnStep, serve
from shared import __version__
from shared.engine.engine import Engine
from shared.engine.loading.loader import load_model
from shared.engine.pool import KVPool
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams


class Ours:
    def __init__(self, asked: Load) -> None:
        self.version = __version__
        self._loaded = load_model(
            asked.model,
            dtype="float32" if asked.precision == "float32" else "bfloat16",
            num_threads=asked.threads,
            quantization="int8" if asked.precision == "int8" else "none",
        )
        layout = self._loaded.layout
        self._pool = KVPool(layout, asked.kv_tokens // layout.block_size + asked.max_requests)
        self._step_tokens = asked.step_tokens

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        engine = Engine(self._loaded, self._pool, self._step_tokens)
        blocks = count()
        for number, prompt in enumerate(prompts):
            num_blocks = self._pool.layout.num_blocks(len(prompt) + room)
            own = [next(blocks) for _ in range(num_blocks)]
            sampling = SamplingParams(max_tokens=room, temperature=0.0)
            engine.add(Sequence(str(number), list(prompt), len(prompt), own, sampling, num_to_generate=room))
        enough = False
        while not enough:
            enough = on_step((int(token.request_id), token.token_id) for token in engine.step())


if __name__ == "__main__":
    serve(Ours)
