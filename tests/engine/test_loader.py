import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BloomConfig, MambaConfig, PreTrainedConfig, ViTConfig

from shared.engine.kernels import plain
from shared.engine.kernels.plain import paged_decode
from shared.engine.loading import loader
from shared.engine.loading.loader import load_model
from shared.engine.native.library import native_library
from shared.errors import ModelRefused
from shared.kv.layout import LayerLayout

from .models import llama, save


@pytest.fixture
def copy(folders: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the Llama folder, to be spoiled."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


def refusal(model: str | Path) -> str:
    with pytest.raises(ModelRefused) as refused:
        load_model(str(model), dtype="float32")
    assert str(model) in str(refused.value)
    return str(refused.value)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_layout_and_sizes(folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load_model(folders["llama"], dtype="float32", block_size=8)
    assert loaded.layout.layers == (LayerLayout(num_kv_heads=2, key_dim=16, value_dim=16),) * 2
    assert (loaded.layout.dtype, loaded.layout.block_size) == ("float32", 8)
    assert loaded.max_position_embeddings == 4096
    assert loaded.weight_bytes == 4 * loaded.num_parameters
    assert "ready after" in caplog.text


def test_bfloat16(folders: dict[str, str]) -> None:
    loaded = load_model(folders["mistral"], dtype="bfloat16")
    assert loaded.layout.dtype == "bfloat16"
    assert loaded.weight_bytes == 2 * loaded.num_parameters


def test_fingerprint_tells_weights_layouts_and_configurations_apart(folders: dict[str, str], copy: Path) -> None:
    plain = load_model(folders["llama"], dtype="float32").fingerprint
    assert load_model(str(copy), dtype="float32").fingerprint == plain
    assert load_model(str(copy), dtype="bfloat16").fingerprint != plain
    assert load_model(str(copy), dtype="float32", block_size=32).fingerprint != plain
    change_config(copy, rms_norm_eps=1e-3)
    assert load_model(str(copy), dtype="float32").fingerprint != plain


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights" in refusal(copy)


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "llama",')
    assert "not JSON" in refusal(copy)


def test_broken_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "get the model's files anew" in refusal(copy)


def test_weights_of_a_smaller_model(copy: Path) -> None:
    change_config(copy, num_hidden_layers=3)
    assert "lack" in refusal(copy)


def test_unknown_architecture(copy: Path) -> None:
    change_config(copy, model_type="unheard_of", architectures=["UnheardOf"])
    said = refusal(copy)
    assert "unheard_of" in said
    assert "\n" not in said


def test_weights_of_another_size(copy: Path) -> None:
    change_config(copy, intermediate_size=64)
    assert "another size" in refusal(copy)


def test_8_bit_weights_need_the_native_kernels(folders: dict[str, str]) -> None:
    with pytest.raises(ModelRefused, match="PDSERVE_QUANTIZATION=none"):
        load_model(folders["llama"], dtype="float32", quantization="int8", native=False)


def test_8_bit_weights_that_change_the_model_are_refused(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_library() is None:
        pytest.skip("there is no C++ compiler here")
    load_model(folders["llama"], dtype="float32", quantization="int8")
    monkeypatch.setattr(loader, "MAX_INT8_DIFFERENCE", 1e-6)
    with pytest.raises(ModelRefused, match="its logits change"):
        load_model(folders["llama"], dtype="float32", quantization="int8")


SMALL: dict[str, int] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
VISION = {"num_attention_heads": 2, "intermediate_size": 48, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(**SMALL, state_size=4), "linear_attention"),
        (BloomConfig(**SMALL, n_head=2), "max_position_embeddings"),
        (BloomConfig(**SMALL, n_head=2, max_position_embeddings=128), "layers [0, 1] do not use"),
        (BertConfig(**SMALL, intermediate_size=48, num_attention_heads=2), "not causal"),
        (ViTConfig(hidden_size=32, num_hidden_layers=1, **VISION), "no causal model"),
    ],
    ids=["mamba", "unknown length", "own attention", "encoder", "vision"],
)
def test_what_the_engine_cannot_compute(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    message = refusal(save(config, tmp_path / "model"))
    assert reason in message
    assert config.model_type in message


def paged_decode_without_window(*places: torch.Tensor, window: int | None, **options: Any) -> torch.Tensor:
    return paged_decode(*places, window=None, **options)


@pytest.mark.parametrize(
    ("name", "function", "faulty"),
    [("llama", "put", lambda *_: None), ("mistral", "paged_decode", paged_decode_without_window)],
    ids=["nothing stored", "decode without window"],
)
def test_the_selftest_notices_wrong_logits(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, function: str, faulty: Callable[..., object]
) -> None:
    monkeypatch.setattr(plain, function, faulty)
    with pytest.raises(ModelRefused, match="other logits"):
        load_model(folders[name], dtype="float32", native=False)


def test_a_rope_that_changes_ends_the_context(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    loaded = load_model(save(llama(rope_parameters=rope), tmp_path), dtype="float32")
    assert loaded.max_position_embeddings == 64


@pytest.mark.skipif(native_library() is None, reason="there is no C++ compiler here")
def test_a_model_none_of_whose_linears_can_have_8_bits_says_what_they_would_need(tmp_path: Path) -> None:
    odd = llama(hidden_size=90, intermediate_size=101, num_attention_heads=3, num_key_value_heads=3, head_dim=30)
    with pytest.raises(ModelRefused, match="features are a multiple of 16; set PDSERVE_QUANTIZATION=none"):
        load_model(save(odd, tmp_path), dtype="float32", quantization="int8")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_log_says_how_much_memory_weights_take(
    folders: dict[str, str], caplog: pytest.LogCaptureFixture, quantization: Any
) -> None:
    if native_library() is None:
        pytest.skip("there is no C++ compiler here")
    with caplog.at_level(logging.INFO):
        loaded = load_model(folders["demo"], dtype="float32", quantization=quantization)
    said = float(caplog.text.split(" MB of weights")[0].rsplit(" ", 1)[1])
    packed = loaded.weight_bytes / (1 if quantization == "none" else 4)
    embedding = 4 * loaded.vocab_size * loaded.model.config.hidden_size
    assert packed <= said * 1e6 <= 1.2 * packed + embedding
