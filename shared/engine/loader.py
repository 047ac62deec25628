"""From a hub id or a folder to a model that is known to compute right here, or a sentence that says why not."""

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from shared.engine.attention import PagedAttention
from shared.engine.fingerprint import fingerprint
from shared.engine.linears import pack_linears
from shared.engine.model import LoadedModel
from shared.engine.probe import check_config, probe_layout
from shared.engine.selftest import check_logits, own_logits
from shared.errors import ModelRefused

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16"]


def load_model(
    model: str, *, dtype: DType, device: str = "cpu", num_threads: int | None = None, block_size: int = 16
) -> LoadedModel:
    """Load a causal language model, put our attention in, and test it.

    Args:
        model: a Hugging Face hub id, or a folder with config.json and safetensors; a folder never leads to the network.
        dtype: of weights, computation and KV.
        device: where to compute.
        num_threads: CPU threads of torch in this process; None leaves them as they are.
        block_size: tokens in a block of KV.

    Raises:
        ModelRefused: it cannot be loaded, or cannot be served right; the message names the model and the reason.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    is_folder = _check_folder(model)
    started = time.monotonic()
    logger.info("loading model %s as %s", model, dtype)
    try:
        return _load(model, is_folder, dtype, device, block_size, started)
    except ModelRefused:
        raise
    except Exception as error:
        # Whatever model code may raise, the operator is told which model it was.
        raise ModelRefused(f"model {model!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _load(model: str, is_folder: bool, dtype: DType, device: str, block_size: int, started: float) -> LoadedModel:
    config = AutoConfig.from_pretrained(model, local_files_only=is_folder)
    check_config(model, config)
    weights = _load_weights(model, is_folder, dtype)
    torch.nn.Module.to(weights, device)
    logger.info("model %s: weights loaded after %.1f s, testing", model, time.monotonic() - started)
    text_config = weights.config.get_text_config(decoder=True)
    expected = own_logits(weights, text_config.vocab_size, getattr(text_config, "sliding_window", None))
    layout = probe_layout(model, weights, dtype, block_size)
    attention = PagedAttention()
    weights.set_attn_implementation(attention.name)
    name_of_weights = fingerprint(weights, layout)
    parameters = list(weights.parameters())
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    num_packed = pack_linears(weights)
    difference = check_logits(model, weights, attention, layout, expected)
    loaded = LoadedModel(
        name=model,
        model=weights,
        attention=attention,
        layout=layout,
        fingerprint=name_of_weights,
        vocab_size=text_config.vocab_size,
        max_position_embeddings=text_config.max_position_embeddings,
        weight_bytes=weight_bytes,
        num_parameters=num_parameters,
    )
    logger.info(
        "model %s: ready after %.1f s, %.1fM parameters in %.0f MB, %d linears packed, "
        "logits within %.1g of its own, fingerprint %s",
        *(model, time.monotonic() - started, loaded.num_parameters / 1e6, loaded.weight_bytes / 1e6, num_packed),
        *(difference, loaded.fingerprint),
    )
    return loaded


def _load_weights(model: str, is_folder: bool, dtype: DType) -> PreTrainedModel:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), local_files_only=is_folder, output_loading_info=True
    )
    weights, report = loaded
    # transformers gives parameters that the files lack random values, and goes on.
    lacking = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if lacking:
        raise ModelRefused(
            f"model {model!r}: its files lack {len(lacking)} of its parameters ({lacking[0]}, ...); "
            "get the weights that belong to its config.json"
        )
    weights.eval()
    assert isinstance(weights, PreTrainedModel)
    return weights


def _check_folder(model: str) -> bool:
    """Whether `model` is a folder, and if it is, whether it has what a model needs."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(("/", "./", "../", "~")) or folder.exists():
            raise ModelRefused(f"model {model!r}: there is no such folder; give a folder with a model or a hub id")
        return False
    config = folder / "config.json"
    if not config.is_file():
        raise ModelRefused(f"model {model!r}: the folder has no config.json; give the folder that a model was saved to")
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise ModelRefused(f"model {model!r}: its config.json is not JSON ({error}); get the file anew") from error
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ModelRefused(f"model {model!r}: the folder has no weights; put the model's *.safetensors files there")
    return True
