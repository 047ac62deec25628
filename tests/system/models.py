"""Models for tests."""

import json
import shutil
from pathlib import Path

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
