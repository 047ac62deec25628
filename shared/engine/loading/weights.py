"""A model's files: whether all are there, and what is in them."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from shared.errors import ModelRefused

DType = Literal["float32", "bfloat16"]

EXPERTS = "grouped_mm"
"""How mixtures of experts are computed, by transformers' name. `batched_mm`, its other one, copies the weights that
each token selects: with 8 tokens on a CPU it takes 10 times as long."""


def load_weights(model: str, is_folder: bool, dtype: DType) -> PreTrainedModel:
    """The model as transformers has it, in evaluation mode on the CPU.

    Raises:
        ModelRefused: its files lack parameters.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, dtype),
        local_files_only=is_folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    weights, report = loaded
    # transformers gives parameters that the files lack random values, and goes on.
    lacking = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if lacking:
        raise ModelRefused(
            f"model {model!r}: its files lack {len(lacking)} of its parameters, or have them in another size "
            f"({lacking[0]}, ...); get the weights that belong to its config.json"
        )
    weights.eval()
    assert isinstance(weights, PreTrainedModel)
    with suppress(ValueError):  # what raises has no experts, or computes them in a way of its own
        weights.set_experts_implementation(EXPERTS)
    return weights


def check_folder(model: str) -> bool:
    """Whether `model` is a folder, rather than an id on the hub.

    Raises:
        ModelRefused: it is a folder that lacks what a model needs, or there is no such folder.
    """
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
