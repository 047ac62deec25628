"""Layers that are one call give, to the bit, what they give part by part; and only those are that can be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from shared.engine.engine import Engine
from shared.engine.loading import loader
from shared.engine.loading.loader import load_model
from shared.engine.model import LoadedModel
from shared.engine.modules.layers import NativeLayer
from shared.engine.native.library import native_library
from shared.engine.pool import KVPool
from shared.engine.sequence import NewToken
from shared.sampling import SamplingParams
from tests.families.table import FAMILIES

from .models import prompt_of, run, save, sequence_of

ONE_CALL = ["Llama", "Llama 3", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Granite", "SmolLM3", "Phi-3"]
ONE_CALL_IN_FP32 = ["OLMo 2"]  # in 16 bits it rotates by cos and sin of 32
OTHERS = ["Ministral 3", "GPT-2", "Qwen3-MoE"]
CHUNK = 24

pytestmark = pytest.mark.skipif(native_library() is None, reason="there is no C++ compiler here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("families")
    configs = {family.name: family.config for family in FAMILIES}

    def made(name: str) -> str:
        place: Path = root / name
        return str(place) if place.is_dir() else save(configs[name](), place)

    return made


def whole_layers(loaded: LoadedModel) -> list[bool]:
    layers: Any = loaded.model.get_decoder().layers
    return [isinstance(layer.forward, NativeLayer) for layer in layers]


def tokens_of(loaded: LoadedModel) -> dict[str, list[NewToken]]:
    """Of prompts that are cut into chunks, beside decodes; with log probabilities, which show the last bit."""
    pool = KVPool(loaded.layout, 40)
    pool.data.fill_(float("nan"))
    engine = Engine(loaded, pool, CHUNK)
    sampling = SamplingParams(max_tokens=9, temperature=0.0, logprobs=3)
    for number, length in enumerate((5, 70, 31)):
        sequence = sequence_of(engine, prompt_of(length), sampling, request_id=str(length), first_block=10 * number)
        engine.add(sequence)
    return run(engine)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ONE_CALL + ONE_CALL_IN_FP32),
        *((name, "bfloat16") for name in ONE_CALL),
    ],
)
def test_one_call_computes_the_same(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any, num_threads: int
) -> None:
    loaded = load_model(folder(name), dtype=dtype, num_threads=num_threads)
    assert all(whole_layers(loaded))
    got = tokens_of(loaded)
    monkeypatch.setattr(loader, "replace_layers", lambda *_: 0)
    by_parts = load_model(folder(name), dtype=dtype, num_threads=num_threads)
    assert not any(whole_layers(by_parts))
    assert got == tokens_of(by_parts)


def test_8_bit_weights_go_into_one_call(folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(folder("Qwen2"), dtype="bfloat16", quantization="int8")
    assert all(whole_layers(loaded))
    got = tokens_of(loaded)
    monkeypatch.setattr(loader, "replace_layers", lambda *_: 0)
    assert got == tokens_of(load_model(folder("Qwen2"), dtype="bfloat16", quantization="int8"))


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(folder: Callable[[str], str], name: str) -> None:
    """Ministral 3 scales queries by their position, which short prompts do not show: its code tells."""
    loaded = load_model(folder(name), dtype="float32")
    assert not any(isinstance(module.forward, NativeLayer) for module in loaded.model.modules())


def test_a_layer_that_does_more_with_the_same_parts_stays(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the trial shows that."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        added, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + 0.9 * added
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    loaded = load_model(folder("Llama"), dtype="float32")
    assert not any(whole_layers(loaded))
    assert tokens_of(loaded)


def test_what_only_late_positions_show_is_seen(folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with no more names than a layer may mention."""

    def forward(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any, position_ids: torch.Tensor, **kwargs: Any
    ) -> Any:
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query = query * (1 + position_ids[0][:, None] // 64)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    loaded = load_model(folder("Llama"), dtype="float32")
    assert not any(whole_layers(loaded))


def test_without_native_kernels_there_are_none(folder: Callable[[str], str]) -> None:
    assert not any(whole_layers(load_model(folder("Llama"), dtype="float32", native=False)))
