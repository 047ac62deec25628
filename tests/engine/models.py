"""Tiny models with random weights, and the plain ways to run them that the engine is compared with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from shared.engine.engine import Engine
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.sequence import NewToken, Sequence
from shared.sampling import SamplingParams
from tests.families.table import FAMILIES, VOCAB_SIZE, WINDOW

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # far apart logits, so that rounding does not change the likeliest token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama(**changes: object) -> PreTrainedConfig:
    return LlamaConfig(**{**_SMALL, **changes})


def qwen3(**changes: object) -> PreTrainedConfig:
    return Qwen3Config(**{**_SMALL, **changes})


def mistral(**changes: object) -> PreTrainedConfig:
    return MistralConfig(**{**_SMALL, "sliding_window": WINDOW, **changes})


UNLIKE_LLAMA = ("DeepSeek-V3", "Gemma 2", "GPT-2", "gpt-oss", "Phi-3")
CONFIGS = {
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    **{family.name: family.config for family in FAMILIES if family.name in UNLIKE_LLAMA},
}


def save(config: PreTrainedConfig, folder: Path) -> str:
    """Make a model with random weights, always the same, and save it. Returns the folder."""
    torch.manual_seed(1)
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    kind.from_config(config).save_pretrained(folder)
    return str(folder)


@dataclass
class Served:
    """A model in our engine, and beside it as transformers has it."""

    loaded: LoadedModel
    plain: PreTrainedModel

    def engine(self, num_blocks: int = 800, max_step_tokens: int = 512) -> Engine:
        pool = KVPool(self.loaded.layout, num_blocks)
        pool.data.fill_(float("nan"))  # what is read unwritten is noticed
        return Engine(self.loaded, pool, max_step_tokens)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What transformers' own `generate` says."""
        generation = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        # A model that ends by itself would end the comparison, too.
        self.plain.generation_config.eos_token_id = None
        token_ids = torch.tensor([prompt])
        output = self.plain.generate(token_ids, attention_mask=torch.ones_like(token_ids), generation_config=generation)
        return output[0, len(prompt) :].tolist()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 10_000 + length)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def sequence_of(
    engine: Engine,
    prompt: list[int],
    sampling: SamplingParams,
    *,
    request_id: str = "r",
    generated: tuple[int, ...] = (),
    num_to_generate: int | None = None,
    num_computed_tokens: int = 0,
    first_block: int = 0,
) -> Sequence:
    """A sequence in consecutive blocks from `first_block` on, as many as it needs."""
    sequence = Sequence(
        request_id=request_id,
        token_ids=[*prompt, *generated],
        num_prompt_tokens=len(prompt),
        blocks=[],
        sampling=sampling,
        num_to_generate=num_to_generate or sampling.max_tokens,
        num_computed_tokens=num_computed_tokens,
    )
    num_blocks = engine.pool.layout.num_blocks(sequence.num_kv_tokens)
    sequence.blocks = list(range(first_block, first_block + num_blocks))
    sequence.__post_init__()
    return sequence


def run(engine: Engine) -> dict[str, list[NewToken]]:
    """Step until no work is left; tokens by request."""
    tokens: dict[str, list[NewToken]] = {}
    while engine.has_work:
        for token in engine.step():
            tokens.setdefault(token.request_id, []).append(token)
    return tokens


def ids(tokens: list[NewToken]) -> list[int]:
    return [token.token_id for token in tokens]
