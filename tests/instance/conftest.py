"""A tiny model, loaded once, in small blocks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.loading.loader import load_model
from tests.engine.models import Served, llama, save


@pytest.fixture(scope="session")
def small_blocks(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = save(llama(), tmp_path_factory.mktemp("models") / "llama")
    loaded = load_model(folder, dtype="float32", block_size=8, num_threads=1)
    return Served(loaded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
