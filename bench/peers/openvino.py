"""OpenVINO GenAI's continuous batching. `python -m bench.peers.openvino MODEL FOLDER PRECISION` converts a model."""

import os
import sys
from itertools import count
from pathlib import Path

from bench.peers.worker import Load, OnStep, Precision, serve

BLOCK_SIZE = 32  # tokens in a KV block of its CPU plugin
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}


class OpenVINO:
    def __init__(self, asked: Load) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._array, self._openvino, self._genai = numpy.array, openvino, openvino_genai
        self.version = openvino_genai.__version__
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = asked.step_tokens
        scheduler.max_num_seqs = asked.max_requests
        scheduler.num_kv_blocks = asked.kv_tokens // BLOCK_SIZE + asked.max_requests
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": HINTS[asked.precision],
            "KV_CACHE_PRECISION": HINTS[asked.precision],  # it would be 8 bits otherwise
            "INFERENCE_NUM_THREADS": asked.threads,
            "NUM_STREAMS": 1,
        }
        folder = str(converted_folder(asked.converted, asked.precision))
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._names = count()

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        config = self._genai.GenerationConfig(max_new_tokens=room, ignore_eos=True, do_sample=False)
        handles = []
        for prompt in prompts:
            ids = self._openvino.Tensor(self._array([prompt], dtype="int64"))
            handles.append(self._pipeline.add_request(next(self._names), ids, config))
        enough = False
        while not enough:
            self._pipeline.step()
            enough = on_step(
                (number, token_id)
                for number, handle in enumerate(handles)
                if handle.can_read()
                for output in handle.read().values()
                for token_id in output.generated_ids
            )
        for handle in handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def converted_folder(converted: str, precision: Precision) -> Path:
    """float32 and bfloat16 share one conversion: the weights are rounded when they are loaded."""
    return Path(converted) / f"openvino-{'int8' if precision == 'int8' else 'float32'}"


def convert(model: str, converted: str, precision: Precision) -> None:
    """Convert with optimum-intel, if that has not been done."""
    folder = converted_folder(converted, precision)
    if folder.exists():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(bits=8) if precision == "int8" else None
    plain = {} if quantization else {"load_in_8bit": False}
    exported = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, quantization_config=quantization, **plain
    )
    exported.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert(*sys.argv[1:])
    else:
        serve(OpenVINO)
