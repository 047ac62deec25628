"""docs/models.md, from the table of families and what their tests measured."""

import math
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.table import FAMILIES, REFUSED, Family

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

INTRODUCTION = """\
# Models

The engine computes with transformers' own model definitions and puts its attention and its KV pool in. Which models
that serves is tried: `make test-families` makes a tiny model with random weights of every family below and, in fp32 and
greedily, has it answer prompts of 1 to 71 tokens

- in one packed batch,
- prefilled in chunks, beside other requests' decodes,
- beginning with blocks that another request filled, as the prefix cache has them,
- prefilled in one process and decoded in another.

Every token is the one that transformers' `model.generate` gives. The last column has the largest difference of the
log-probabilities of each token and its 20 likeliest alternatives, rounded up.

A family that is not listed is served, too, if it passes at load: there every model's packed, chunked and decoded logits
are compared with its own, and a model that fails is refused with the reason.

## Served

| family | transformers' class | what matters to the engine | difference |
|---|---|---|---|
"""

BETWEEN = """
Two kinds of rope go by the longest request of a batch in transformers, so requests end where that would begin:

- **LongRoPE** (Phi-3 and Phi-4 models with a context of 128K): requests have up to `original_max_position_embeddings`
  tokens, 4,096 with these models, and the short factors. Longer ones are refused as longer than the model's context.
- **Dynamic NTK**: requests have up to `max_position_embeddings` tokens, as with any other rope.

## Refused

At load, with "cannot be served" and the reason.

| family | what it has | reason |
|---|---|---|
"""


class Measured:
    """The largest difference of log-probabilities by family."""

    def __init__(self) -> None:
        self.differences: dict[str, float] = {}

    def note(self, family: Family, difference: float) -> None:
        self.differences[family.name] = max(difference, self.differences.get(family.name, 0.0))


def write_docs(measured: Measured) -> None:
    """Write docs/models.md.

    Raises:
        ValueError: a family was not measured.
    """
    missing = [family.name for family in FAMILIES if family.name not in measured.differences]
    if missing:
        raise ValueError(f"docs/models.md needs all families, and these were left out: {', '.join(missing)}")
    DOCS.write_text(page({name: rounded_up(difference) for name, difference in measured.differences.items()}))


def page(differences: dict[str, str]) -> str:
    """The page, given the last column by family."""
    served = [
        f"| {family.name} | `{class_name(family)}` | {family.features} | {differences.get(family.name)} |\n"
        for family in sorted(FAMILIES, key=_order)
    ]
    refused = [f"| {family.name} | {family.features} | {family.reason} |\n" for family in sorted(REFUSED, key=_order)]
    return "".join([INTRODUCTION, *served, BETWEEN, *refused])


def _order(family: Family) -> str:
    return family.name.lower()


def differences_of(page: str) -> dict[str, str]:
    """The last column by family, read back."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in rows}


def class_name(family: Family) -> str:
    names: object = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]
    assert isinstance(names, str)
    return names


def rounded_up(difference: float) -> str:
    """With one digit, and never to less."""
    power = 10.0 ** math.floor(math.log10(max(difference, 1e-9)))
    return f"{math.ceil(difference / power) * power:.0e}"
