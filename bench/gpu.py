"""Decoding on a GPU, beside what its memory allows: tokens per second of a Llama with random weights.

    .venv/bin/python -m bench.gpu [--size 1b] [--context 1024] [--steps 64] [--dtype bfloat16]

A decode step reads all weights and all KV of its requests once, so it cannot take less than their bytes over the
memory's bandwidth (measured here by a large copy, in which every byte is read and written). That is the floor. Steps
are those of a decode instance with greedy requests: batch, static input, model, likeliest tokens read by the host; with
CUDA graphs and without. KV is random: which tokens come out is of no interest, how long they take is.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.running import machine
from shared.engine.attention import PagedAttention
from shared.engine.batch import build_batch
from shared.engine.graphs.decode_graphs import DecodeGraphs
from shared.engine.kernels import Kernels
from shared.engine.kernels.gpu import gpu_kernels
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.scheduler import StepPlan
from shared.engine.sequence import Sequence
from shared.kv.layout import KVLayout, LayerLayout
from shared.sampling import SamplingParams

NUM_REQUESTS = (1, 8, 32, 64)
BLOCK_SIZE = 16
WARM_UP_STEPS = 8
COPIED_BYTES = 1 << 30
SIZES = {  # layers, hidden, intermediate, heads, key heads, vocabulary
    "0.1b": (12, 768, 2048, 12, 4, 32_000),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "8b": (32, 4096, 14_336, 32, 8, 128_256),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Decoding of `num_requests` at once: what it took, and what the memory allows."""

    num_requests: int
    step_s: float
    floor_s: float

    def __str__(self) -> str:
        speeds = f"{self.num_requests / self.step_s:12,.0f} {self.num_requests / self.floor_s:12,.0f}"
        return f"{self.num_requests:>8} {self.step_s * 1000:10.2f} {speeds} {self.floor_s / self.step_s:8.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each request before the first step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs an NVIDIA GPU and torch's CUDA build, and torch finds none here")
    device = torch.device("cuda")
    print(f"{machine()}, {torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    bandwidth = copy_bandwidth(device)
    loaded = random_llama(SIZES[arguments.size], arguments.dtype, device, gpu_kernels())
    print(
        f"{loaded.num_parameters / 1e9:.2f}B parameters, {loaded.weight_bytes / 1e9:.2f} GB read per step, "
        f"{arguments.dtype}, context {arguments.context}, memory copies at {bandwidth / 1e9:,.0f} GB/s"
    )
    for record in (True, False):
        print(f"\n{'with' if record else 'without'} CUDA graphs")
        print(f"{'requests':>8} {'step ms':>10} {'tokens/s':>12} {'floor':>12} {'of floor':>8}")
        for num_requests in NUM_REQUESTS:
            print(measure(loaded, device, num_requests, arguments.context, arguments.steps, bandwidth, record=record))


def random_llama(size: tuple[int, ...], dtype: str, device: torch.device, kernels: Kernels) -> LoadedModel:
    """A model that never was on a disk; `weight_bytes` are those that a step reads."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = size
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
    attention = PagedAttention()
    attention.kernels = kernels
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.set_attn_implementation(attention.name)
    layer = LayerLayout(num_kv_heads=kv_heads, key_dim=hidden // heads, value_dim=hidden // heads)
    parameters = list(model.parameters())
    looked_up = model.get_input_embeddings().weight  # a row per token, next to nothing
    return LoadedModel(
        name="random",
        model=model,
        attention=attention,
        layout=KVLayout(dtype=dtype, block_size=BLOCK_SIZE, layers=(layer,) * layers),
        fingerprint="",
        vocab_size=vocabulary,
        max_position_embeddings=config.max_position_embeddings,
        weight_bytes=sum(one.numel() * one.element_size() for one in parameters if one is not looked_up),
        num_parameters=sum(one.numel() for one in parameters),
    )


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    device: torch.device,
    num_requests: int,
    context: int,
    num_steps: int,
    bandwidth: float,
    *,
    record: bool,
) -> Measured:
    """Decode `num_steps` tokens of as many requests."""
    layout = loaded.layout
    longest = context + WARM_UP_STEPS + num_steps
    blocks_each = layout.num_blocks(longest)
    pool = KVPool(layout, num_requests * blocks_each, str(device))
    pool.data.normal_(std=0.1)
    graphs = DecodeGraphs(loaded, pool, num_requests, longest, record=record)
    sequences = [
        Sequence(
            request_id=str(number),
            token_ids=[1] * (context + 1),
            num_prompt_tokens=context + 1,
            blocks=list(range(number * blocks_each, (number + 1) * blocks_each)),
            sampling=SamplingParams(max_tokens=longest, temperature=0.0),
            num_to_generate=longest,
            num_computed_tokens=context,
        )
        for number in range(num_requests)
    ]
    step_all(graphs, sequences, layout, WARM_UP_STEPS)
    started_at = time.perf_counter()
    step_all(graphs, sequences, layout, num_steps)
    step_s = (time.perf_counter() - started_at) / num_steps
    token_bytes = layout.block_bytes // layout.block_size
    read_bytes = loaded.weight_bytes + num_requests * (longest - num_steps / 2) * token_bytes
    return Measured(num_requests, step_s, read_bytes / bandwidth)


def step_all(graphs: DecodeGraphs, sequences: list[Sequence], layout: KVLayout, num_steps: int) -> None:
    """What the engine does in steps of decodes, all of them greedy. Reading the tokens waits for the device."""
    for _ in range(num_steps):
        batch = build_batch(StepPlan(sequences, []), layout.block_size, getattr(torch, layout.dtype))
        token_ids = graphs.logits(batch).argmax(-1).tolist()
        for sequence, token_id in zip(batch.sampled, token_ids, strict=True):
            sequence.token_ids.append(token_id)
            sequence.num_computed_tokens += 1


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device's memory moves, reading and writing, in its best of several copies."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize(device)
        started_at = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started_at)
    return 2 * COPIED_BYTES / best


if __name__ == "__main__":
    main()
