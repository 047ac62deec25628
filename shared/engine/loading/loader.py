"""From a hub id or a folder to a model that is known to compute right here, or a sentence that says why not."""

import logging
import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedModel

from shared.engine.attention import PagedAttention
from shared.engine.kernels.gpu import gpu_kernels
from shared.engine.kernels.native import native_kernels
from shared.engine.loading.fingerprint import fingerprint
from shared.engine.loading.probe import check_config, context_length, probe_layout
from shared.engine.loading.selftest import TOLERANCE, check_logits, logits_difference, own_logits
from shared.engine.loading.weights import DType, check_folder, load_weights
from shared.engine.model import LoadedModel
from shared.engine.modules.fast import put_in_fast_modules
from shared.engine.modules.layer_trial import replace_layers
from shared.engine.modules.linears import (
    INT8_FEATURES,
    KernelLinear,
    PackedLinear,
    Quantization,
    quantise_linears,
)
from shared.engine.native.library import Library, native_library
from shared.errors import ModelRefused
from shared.kv.layout import KVLayout

logger = logging.getLogger(__name__)

MAX_SAID_CHARS = 240
MAX_INT8_DIFFERENCE = 0.5
"""Of logits, as a part of their spread: beyond, 8-bit weights have made another model of it."""


@dataclass(slots=True, frozen=True)
class Choices:
    """What `load_model` was asked for besides the model."""

    dtype: DType
    device: str
    block_size: int
    quantization: Quantization
    native: bool


def load_model(
    model: str,
    *,
    dtype: DType,
    device: str = "cpu",
    num_threads: int | None = None,
    block_size: int = 16,
    quantization: Quantization = "none",
    native: bool = True,
) -> LoadedModel:
    """Load a causal language model, put our attention in, and test it.

    Args:
        model: a Hugging Face hub id, or a folder with config.json and safetensors; a folder never leads to the network.
        dtype: of weights, computation and KV.
        device: where to compute.
        num_threads: CPU threads of torch in this process; None leaves them as they are.
        block_size: tokens in a block of KV.
        quantization: of the weights of linears.
        native: whether to use the native kernels where they can be had.

    Raises:
        ModelRefused: it cannot be loaded, or cannot be served right; the message names the model and the reason.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    is_folder = check_folder(model)
    logger.info("loading model %s as %s", model, dtype)
    try:
        return _load(model, is_folder, Choices(dtype, device, block_size, quantization, native))
    except ModelRefused:
        raise
    except Exception as error:
        # Whatever model code may raise, the operator is told which model it was.
        raise ModelRefused(f"model {model!r} cannot be loaded: {type(error).__name__}: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    """What a library said, as part of one sentence of ours."""
    if type(error).__name__ == "SafetensorError":
        return f"{error} (a file is incomplete or damaged: get the model's files anew)"
    said = " ".join(str(error).split())
    return said if len(said) <= MAX_SAID_CHARS else said[:MAX_SAID_CHARS].rsplit(" ", 1)[0] + " …"


def _load(model: str, is_folder: bool, choices: Choices) -> LoadedModel:
    started = time.monotonic()
    config = AutoConfig.from_pretrained(model, local_files_only=is_folder)
    check_config(model, config)
    weights = load_weights(model, is_folder, choices.dtype)
    torch.nn.Module.to(weights, choices.device)
    logger.info("model %s: weights loaded after %.1f s, testing", model, time.monotonic() - started)
    own_attention = weights.config._attn_implementation
    layout = probe_layout(model, weights, choices.dtype, choices.block_size)
    name_of_weights = fingerprint(weights, layout, choices.quantization)
    parameters = list(weights.parameters())
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    library = native_library() if choices.native and weights.device.type == "cpu" else None
    text_config = weights.config.get_text_config(decoder=True)
    longest = context_length(text_config)
    window = getattr(text_config, "sliding_window", None)
    weights.set_attn_implementation(own_attention)
    expected = own_logits(weights, text_config.vocab_size, window, longest)
    if choices.quantization == "int8":
        before, num_quantised = expected, _quantise(model, weights, library)
        expected = own_logits(weights, text_config.vocab_size, window, longest)
        _check_quantised(model, num_quantised, logits_difference(before, expected))
    attention = _put_in_attention(weights, layout, library)
    replaced = put_in_fast_modules(weights, library, attention.sampled_rows)
    num_layers = 0 if library is None else replace_layers(weights, attention, layout, longest, library)
    allowed = TOLERANCE["int8" if choices.quantization == "int8" else choices.dtype]
    difference = check_logits(model, weights, attention, layout, expected, allowed)
    logger.info(
        "model %s: ready after %.1f s, %.1fM parameters, %.0f MB of weights, faster modules: %s, "
        "layers that are one call: %d, logits within %.1g of its own, fingerprint %s",
        *(model, time.monotonic() - started, num_parameters / 1e6, _bytes_in_memory(weights) / 1e6, replaced),
        *(num_layers, difference, name_of_weights),
    )
    return LoadedModel(
        name=model,
        model=weights,
        attention=attention,
        layout=layout,
        fingerprint=name_of_weights,
        vocab_size=text_config.vocab_size,
        max_position_embeddings=longest,
        weight_bytes=weight_bytes,
        num_parameters=num_parameters,
        library=library,
    )


def _bytes_in_memory(model: torch.nn.Module) -> int:
    """Of weights, as they are computed with."""
    packed = [part.packed for part in model.modules() if isinstance(part, KernelLinear | PackedLinear)]
    return sum(weights.numel() * weights.element_size() for weights in (*model.parameters(), *packed))


def _quantise(model: str, weights: PreTrainedModel, library: Library | None) -> int:
    if library is None:
        raise ModelRefused(
            f"model {model!r}: 8-bit weights need the native kernels, and those a CPU, g++ and "
            "PDSERVE_NATIVE_KERNELS=true; or set PDSERVE_QUANTIZATION=none"
        )
    return quantise_linears(weights, library)


def _check_quantised(model: str, num_quantised: int, difference: float) -> None:
    logger.info(
        "model %s: %d linears have 8-bit weights, logits within %.2g of those without", model, num_quantised, difference
    )
    if num_quantised == 0:
        raise ModelRefused(
            f"model {model!r} cannot have 8-bit weights: none of its linears is one that the kernel takes, whose input "
            f"features are a multiple of {INT8_FEATURES}; set PDSERVE_QUANTIZATION=none"
        )
    if not difference <= MAX_INT8_DIFFERENCE:
        raise ModelRefused(
            f"model {model!r} cannot have 8-bit weights: its logits change by {difference:.2g} of their spread, and "
            f"{MAX_INT8_DIFFERENCE} is allowed; set PDSERVE_QUANTIZATION=none"
        )


def _put_in_attention(weights: PreTrainedModel, layout: KVLayout, library: Library | None) -> PagedAttention:
    attention = PagedAttention()
    if weights.device.type == "cuda":
        attention.kernels = gpu_kernels()
    if library is not None:
        attention.kernels = native_kernels(layout, library) or attention.kernels
    weights.set_attn_implementation(attention.name)
    return attention
