"""Models for tests."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.settings import DEMO_MODEL

ENDLESS = 50_000
"""A number of tokens that takes minutes to generate: a request that goes on until somebody ends it."""


def endless_model(folder: Path) -> str:
    """The model in the repository, with a context for ENDLESS tokens. Its name stays."""
    model = folder / "demo"
    shutil.copytree(DEMO_MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**17}))
    return str(model)


def other_weights(folder: Path) -> str:
    """The model in the repository with a little noise in its weights: it answers otherwise, and just as fast."""
    model = folder / "other" / "demo"
    shutil.copytree(DEMO_MODEL, model)
    generator = torch.Generator().manual_seed(0)
    for path in model.glob("*.safetensors"):
        weights = load_file(path)
        for name, weight in weights.items():
            if weight.is_floating_point() and weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.5
                weights[name] = (weight.float() + noise).to(weight.dtype)
        save_file(weights, path, metadata={"format": "pt"})
    return str(model)
