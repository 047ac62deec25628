"""What 16-bit and 8-bit weights cost in quality: perplexity of a text under each, computed by the engine itself.

    python -m bench.quality [--model FOLDER] [--text FILE]...

By default the demonstration model reads this project's own documentation, which it was not trained on.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bench.running import machine
from shared.engine.batch import build_batch
from shared.engine.loading.loader import load_model
from shared.engine.loading.weights import DType
from shared.engine.model import LoadedModel
from shared.engine.modules.linears import Quantization
from shared.engine.pool import KVPool
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams
from shared.settings import DEMO_MODEL

WINDOW = 512
"""Tokens that are computed together; each sees those before it in its window."""
KINDS: list[tuple[DType, Quantization]] = [
    ("float32", "none"),
    ("bfloat16", "none"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
]


@torch.inference_mode()
def loss(loaded: LoadedModel, token_ids: list[int]) -> float:
    """Mean negative log likelihood, in nats per token."""
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, WINDOW):
        window = token_ids[start : start + WINDOW + 1]
        total -= float(logprobs(loaded, window).sum())
        count += len(window) - 1
    return total / count


def logprobs(loaded: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """Of each token but the first, given those before it: fp32 [len - 1]."""
    known = token_ids[:-1]
    num_blocks = loaded.layout.num_blocks(len(known))
    pool = KVPool(loaded.layout, num_blocks)
    sequence = Sequence("text", known, len(known), list(range(num_blocks)), SamplingParams(max_tokens=1), 1)
    plan = StepPlan([], [PrefillChunk(sequence, len(known))])
    batch = replace(build_batch(plan, loaded.layout.block_size, pool.data.dtype), logit_rows=torch.arange(len(known)))
    likely = loaded.logits(pool, batch).log_softmax(-1)
    return likely.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="a folder with a model and its tokenizer.json")
    parser.add_argument("--text", type=Path, action="append", help="a text file (default: docs/*.md)")
    arguments = parser.parse_args()
    texts = arguments.text or sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    tokenizer = Tokenizer.from_file(str(Path(arguments.model) / "tokenizer.json"))
    token_ids = [one for path in texts for one in tokenizer.encode(path.read_text(), add_special_tokens=False).ids]
    print(f"{machine()}\n{arguments.model}: {len(token_ids)} tokens of {len(texts)} texts\n")
    print("| weights | nats per token | perplexity | beside fp32 |\n|---|---|---|---|")
    first = 0.0
    for dtype, quantization in KINDS:
        nats = loss(load_model(arguments.model, dtype=dtype, quantization=quantization), token_ids)
        first = first or nats
        name = dtype if quantization == "none" else f"{quantization} in {dtype}"
        print(f"| {name} | {nats:.4f} | {math.exp(nats):.2f} | {math.exp(nats - first) - 1:+.2%} |", flush=True)


if __name__ == "__main__":
    main()
