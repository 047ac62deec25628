import pytest
import torch

from shared.engine.sampling.host_sampling import likeliest, sample_on_host, takes_likeliest
from shared.engine.sampling.sampler import sample
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams


def sequence_with(**fields: object) -> Sequence:
    sampling = SamplingParams.model_validate({"max_tokens": 10, "temperature": 0.0, **fields})
    return Sequence("r", [1, 2, 3], 2, [0], sampling, num_to_generate=5)


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"top_k": 3}, {"seed": 5}, {"stop_token_ids": (3,)}])
def test_nothing_but_the_likeliest(fields: dict[str, object]) -> None:
    sequence = sequence_with(**fields)
    assert takes_likeliest(sequence)
    logits = torch.randn(3, 100)
    logits[0, 7] = float("nan")
    logits[1, 8] = float("inf")
    assert likeliest(logits.clone()) == sample(logits.clone(), [sequence] * 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"logprobs": 0},
        {"logit_bias": {5: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_tokens": 4, "stop_token_ids": (3,)},
    ],
)
def test_more_than_that(fields: dict[str, object]) -> None:
    assert not takes_likeliest(sequence_with(**fields))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_as_on_the_cpu(device: str, temperature: float) -> None:
    logits = torch.randn(2, 100)
    sequences = [sequence_with(), sequence_with(temperature=temperature, seed=3)]
    assert sample_on_host(logits.to(device, copy=True), sequences) == sample(logits, sequences)
