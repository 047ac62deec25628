"""transformers' continuous batching, what `generate_batch` runs: one manager kept for all runs, tokens streamed."""

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.peers.worker import Load, OnStep, serve

PAGE_SIZE = 256  # transformers' own default


class Continuous:
    def __init__(self, asked: Load) -> None:
        self.version = transformers.__version__
        torch.set_num_threads(asked.threads)
        dtype = getattr(torch, asked.precision)
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype, local_files_only=True).eval()
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=asked.kv_tokens // PAGE_SIZE + asked.max_requests,
                max_batch_tokens=asked.step_tokens,
                max_requests_per_batch=asked.max_requests,
                allow_block_sharing=False,
                safety_margin=0.0,  # the cache is as large as these requests need
            ),
        )
        self._manager.start()

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        ids = self._manager.add_requests(prompts, max_new_tokens=room, streaming=True)
        numbers = {request_id: number for number, request_id in enumerate(ids)}
        num_seen = [0] * len(prompts)
        enough = False
        while not enough:
            result = self._manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError(f"no token came: {result.error if result else 'time is up'}")
            number = numbers[result.request_id]
            new = result.generated_tokens[num_seen[number] :]
            num_seen[number] += len(new)
            enough = on_step([(number, token_id) for token_id in new])
        for request_id in ids:
            self._manager.cancel_request(request_id)
        self._drain()

    def _drain(self) -> None:
        """Wait until the cancelled requests are gone, and drop what they gave meanwhile."""
        processor = self._manager.batch_processor
        while processor.has_pending_requests() or not self._manager.cancel_queue.empty():
            self._manager.get_result(timeout=0.01)
        while self._manager.get_result(timeout=0.3) is not None:
            pass


if __name__ == "__main__":
    serve(Continuous)
