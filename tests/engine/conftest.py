"""Models are made and loaded once per session."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.loading.loader import load_model

from .models import CONFIGS, Served, save

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def serve(folder: str) -> Served:
    """Load a folder both ways."""
    return Served(
        load_model(folder, dtype="float32"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each tiny model by name, and of the demo model."""
    root = tmp_path_factory.mktemp("models")
    made = {name: save(config(), root / name) for name, config in CONFIGS.items()}
    return {**made, "demo": str(DEMO)}


@pytest.fixture(scope="session", params=[*CONFIGS, "demo"])
def served(request: pytest.FixtureRequest, folders: dict[str, str]) -> Served:
    return serve(folders[request.param])


@pytest.fixture(scope="session")
def llama_served(folders: dict[str, str]) -> Served:
    return serve(folders["llama"])
