"""vLLM's CPU build, compiled (its default), its engine in this process."""

import math
import os
from itertools import count

from bench.peers.worker import Load, OnStep, serve


class VLLM:
    def __init__(self, asked: Load) -> None:
        cores = sorted(os.sched_getaffinity(0))[: asked.threads]
        os.environ.update(
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_CPU_KVCACHE_SPACE=str(math.ceil(asked.kv_bytes * 1.1 / 2**30)),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="ERROR",
            HF_HUB_OFFLINE="1",
        )
        import vllm  # once its variables are set

        self._vllm = vllm
        self.version = vllm.__version__
        model = vllm.LLM(
            asked.model,
            dtype=asked.precision,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=asked.max_length,
            max_num_seqs=asked.max_requests,
            max_num_batched_tokens=asked.step_tokens,
        )
        self._engine = model.llm_engine
        self._names = count()

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        sampling = self._vllm.SamplingParams(
            max_tokens=room,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        numbers = {str(next(self._names)): number for number in range(len(prompts))}
        for name, prompt in zip(numbers, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        enough = False
        while not enough:
            outputs = self._engine.step()
            enough = on_step(
                (numbers[output.request_id], token_id) for output in outputs for token_id in output.outputs[0].token_ids
            )
        self._engine.abort_request(list(numbers))
        while self._engine.has_unfinished_requests():
            self._engine.step()


if __name__ == "__main__":
    serve(VLLM)
