"""What comes over HTTP is, token for token, what `model.generate` says in fp32: alone and 32 at once."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from shared.settings import DEMO_MODEL
from tests.harness import System

PROMPT_LENGTHS = [1, 2, 15, 16, 17, 100, 511, 600, 2000]
NUM_TOKENS = 24
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
RANDOM: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=64),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(length * 1000 + seed)
    return torch.randint(10, 4000, (length,), generator=generator).tolist()


def expected(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Greedy tokens of `model.generate`, which never end early."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    assert isinstance(output, torch.Tensor)
    return output[0, len(prompt) :].tolist()


def wishes(model: str, prompt: list[int]) -> dict[str, object]:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": extra}


def check_alone(url: str, name: str, model: PreTrainedModel) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for length in PROMPT_LENGTHS:
            prompt = prompt_of(length)
            answer = client.completions.create(**wishes(name, prompt))  # type: ignore[call-overload]
            assert answer.choices[0].token_ids == expected(model, prompt), f"prompt of {length}"


async def check_together(url: str, name: str, model: PreTrainedModel) -> None:
    prompts = [prompt_of(PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)], seed=number) for number in range(32)]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(client.completions.create(**wishes(name, one)) for one in prompts))  # type: ignore[call-overload]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.choices[0].token_ids == expected(model, prompt), f"prompt of {len(prompt)}"


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread")
def test_the_model_in_the_repository(system: System) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    check_alone(system.url, "demo", model)
    asyncio.run(check_together(system.url, "demo", model))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", RANDOM)
def test_random_weights(kind: str, start_system: Callable[..., System], tmp_path: Path) -> None:
    folder = tmp_path / kind
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RANDOM[kind], dtype=torch.float32)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((Path(DEMO_MODEL) / file).read_bytes())
    running = start_system(model=str(folder))
    check_alone(running.url, kind, model)
    asyncio.run(check_together(running.url, kind, model))
    running.wait_until_nothing_is_held()
