"""What the engine cannot compute right is refused at load, by name and with the reason."""

from pathlib import Path

import pytest

from shared.engine.loading.loader import load_model
from shared.engine.runner import check
from shared.errors import ContextTooLong, ModelRefused
from shared.sampling import SamplingParams
from tests.engine.models import prompt_of, sequence_of
from tests.families.conftest import Case, save
from tests.families.table import FAMILIES, REFUSED, Family


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused(family: Family, tmp_path: Path) -> None:
    save(family, tmp_path)
    with pytest.raises(ModelRefused) as refused:
        load_model(str(tmp_path), dtype="float32")
    assert str(refused.value) == f"model {str(tmp_path)!r} ({family.model_type}) cannot be served: {family.reason}"


LONGROPE = next(family for family in FAMILIES if "longrope" in family.features)


@pytest.mark.parametrize("case", [LONGROPE], ids=lambda family: family.name, indirect=True)
def test_longrope_ends_where_its_factors_change(case: Case) -> None:
    loaded = case.served.loaded
    assert loaded.max_position_embeddings == 96
    sequence = sequence_of(case.served.engine(), prompt_of(90), SamplingParams(max_tokens=8))
    with pytest.raises(ContextTooLong):
        check(sequence, loaded.vocab_size, loaded.max_position_embeddings)
