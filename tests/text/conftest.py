from pathlib import Path

import pytest

from shared.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO)
