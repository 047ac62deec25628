"""A short name for a model's weights, configuration and KV layout: only equals may hand KV to each other."""

import json

import torch
from transformers import PreTrainedModel
from xxhash import xxh3_128

from shared.kv.layout import KVLayout

SAMPLED_ELEMENTS = 256
"""How many elements of each tensor are looked at, so that large models cost no more than their number of tensors."""


def fingerprint(model: PreTrainedModel, layout: KVLayout, quantization: str) -> str:
    """32 hex digits over the layout, the configuration, and name, shape and evenly spaced elements of every tensor.

    Args:
        model: as it was loaded, before any of its modules is replaced.
        quantization: what becomes of its weights afterwards.
    """
    digest = xxh3_128()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_ELEMENTS)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(_configuration(model), sort_keys=True, default=str).encode())
    digest.update(f"{quantization} {layout.model_dump_json()}".encode())
    return digest.hexdigest()


def _configuration(model: PreTrainedModel) -> dict[str, object]:
    """What the configuration says about the computation: not where it was loaded from, nor by which version."""
    entries: dict[str, object] = model.config.to_dict()
    return {key: entry for key, entry in entries.items() if not key.startswith("_") and key != "transformers_version"}
