"""A tiny model, loaded once, in small blocks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.loading.loader import load_model
from shared.instance import accepting
from tests.engine.models import Served, llama, save


@pytest.fixture(scope="session")
def small_blocks(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = save(llama(), tmp_path_factory.mktemp("models") / "llama")
    loaded = load_model(folder, dtype="float32", block_size=8, num_threads=1)
    return Served(loaded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(autouse=True)
def one_gateway_for_each_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gateway is told by a timer: the worlds of these tests have no clock."""
    monkeypatch.setattr(accepting, "NOTIFY_NEXT_AFTER_S", 1000.0)
