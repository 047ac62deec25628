"""Each family is made, saved and loaded once, here and in two more processes; what is measured goes into the docs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from shared.engine.loading.loader import load_model
from shared.engine.sequence import NewToken
from tests.engine.models import Served, prompt_of
from tests.families.report import Measured, write_docs
from tests.families.table import FAMILIES, VOCAB_SIZE, Family
from tests.families.worker import Worker

NUM_TOKENS = 9
LENGTHS = (1, 2, 16, 23, 33, 70)
NUM_TOP = 20
LARGEST_DIFFERENCE = 2e-4
"""Of two log-probabilities that should be equal, in fp32; a wrong mask or position changes them by far more."""
CLEAR = 1e-3
"""How much likelier the likeliest token is than the next in answers that are compared: rounding does not swap them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/models.md anew, if all families pass")


@dataclass(slots=True, frozen=True)
class AskReply:
    """What `generate` says: tokens, and log-probabilities [NUM_TOKENS, V]."""

    token_ids: list[int]
    logprobs: torch.Tensor


@dataclass(slots=True)
class Case:
    """A family, loaded in our engine and as transformers has it."""

    family: Family
    folder: str
    served: Served
    measured: Measured
    answers: dict[tuple[int, ...], AskReply] = field(default_factory=dict)

    def prompt(self, length: int, start: Sequence[int] = ()) -> list[int]:
        """A prompt that begins with `start` and goes on with `length` tokens, whose answer is clear."""
        for seed in range(20):
            prompt = [*start, *prompt_of(length, seed)]
            top_two = self.answer(prompt).logprobs.topk(2).values
            if (top_two[:, 0] - top_two[:, 1]).min() >= CLEAR:
                return prompt
        raise AssertionError("no prompt has a clear answer")

    def answer(self, prompt: list[int]) -> AskReply:
        key = tuple(prompt)
        if key not in self.answers:
            self.answers[key] = generate(self.served.plain, prompt)
        return self.answers[key]

    def check(self, prompt: list[int], tokens: list[NewToken]) -> None:
        """Hold tokens and their likeliest alternatives against what `generate` says."""
        answer = self.answer(prompt)
        assert [token.token_id for token in tokens] == answer.token_ids, f"prompt of {len(prompt)}"
        for token, expected in zip(tokens, answer.logprobs, strict=True):
            ids, logprobs = zip(*token.top, strict=True)
            difference = (torch.tensor(logprobs) - expected[list(ids)]).abs().max().item()
            assert difference <= LARGEST_DIFFERENCE, f"prompt of {len(prompt)}, token {token.index}"
            self.measured.note(self.family, difference)


@torch.inference_mode()
def generate(plain: PreTrainedModel, prompt: list[int]) -> AskReply:
    """Greedy tokens and their log-probabilities, from transformers' own `generate`."""
    plain.generation_config.eos_token_id = None  # a model that ends by itself would end the comparison, too
    generation = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    token_ids = torch.tensor([prompt])
    output = plain.generate(token_ids, attention_mask=torch.ones_like(token_ids), generation_config=generation)
    logprobs = torch.cat(output.logits).float().log_softmax(-1)
    return AskReply(output.sequences[0, len(prompt) :].tolist(), logprobs)


@torch.no_grad()
def save(family: Family, folder: Path) -> None:
    """Make a model with random weights, always the same, in which every bias, norm and sink counts, and save it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(family.config())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    found = Measured()
    yield found
    if request.config.getoption("--write-docs") and not request.session.testsfailed:
        write_docs(found)


@pytest.fixture(scope="session")
def workers() -> Iterator[tuple[Worker, Worker]]:
    """Two processes besides this one: one that prefills, and one that decodes."""
    with Worker() as prefill, Worker() as decode:
        yield prefill, decode


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, measured: Measured) -> Case:
    family: Family = request.param
    folder = tmp_path_factory.mktemp("family")
    save(family, folder)
    loaded = load_model(str(folder), dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.vocab_size == VOCAB_SIZE
    return Case(family, str(folder), Served(loaded, plain), measured)
