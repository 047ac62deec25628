"""The vectorised sampler against the plainest way to write each rule, one row and one token at a time."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.engine.native.library import native_library
from shared.engine.sampling.adjust import adjust
from shared.engine.sampling.host_sampling import likeliest, sample_on_host
from shared.engine.sampling.sampler import draw, sample
from shared.engine.sampling.truncate import truncate
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams

VOCAB = 2200
PROMPT = [5, 6, 7, 5]


def sequence_with(sampling: SamplingParams, generated: list[int] | None = None) -> Sequence:
    generated = generated or []
    return Sequence("r", PROMPT + generated, len(PROMPT), [], sampling, 100)


def params(**fields: object) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": 100, **fields})


def random_logits(num_rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * scale


def kept_by_hand(row: list[float], sampling: SamplingParams) -> set[int]:
    probs = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    kept = {token for token, prob in enumerate(probs) if prob >= sampling.min_p * max(probs)}
    order = sorted(kept, key=lambda token: -row[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, mass, nucleus = sum(probs[token] for token in order), 0.0, set()
    for token in order:
        if mass / total >= sampling.top_p and sampling.top_p < 1.0:
            break
        nucleus.add(token)
        mass += probs[token]
    return nucleus


TRUNCATIONS = [
    params(),
    params(top_k=1),
    params(top_k=40),
    params(top_k=5000),
    params(top_p=0.5),
    params(top_p=0.999),
    params(top_p=1e-9),
    params(min_p=0.2),
    params(top_k=300, top_p=0.8),
    params(top_k=50, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_truncation_keeps_what_the_rules_say(scale: float) -> None:
    logits = random_logits(len(TRUNCATIONS), scale)
    together = logits.clone()
    truncate(together, TRUNCATIONS)
    for number, sampling in enumerate(TRUNCATIONS):
        kept = set(together[number].isfinite().nonzero().flatten().tolist())
        # fp32 here, fp64 by hand: the mass may cross top_p one token earlier or later
        assert len(kept ^ kept_by_hand(logits[number].tolist(), sampling)) <= (1 if sampling.top_p < 1.0 else 0)
        alone = logits[number : number + 1].clone()
        truncate(alone, [sampling])
        assert torch.equal(alone[0], together[number])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, float("-inf")]])
    drawn = Counter(int(draw(logits, [sequence_with(params(seed=seed))])) for seed in range(4000))
    for token, prob in enumerate(logits[0].softmax(0).tolist()):
        assert abs(drawn[token] / 4000 - prob) < 4 * math.sqrt(0.25 / 4000)


def test_a_masked_token_is_never_drawn() -> None:
    logits = random_logits(64)
    logits[:, :100] = float("-inf")
    logits[:, -100:] = float("-inf")
    sequences = [sequence_with(params(temperature=0.7, top_p=0.9, seed=seed)) for seed in range(64)]
    assert logits.gather(1, draw(logits, sequences)[:, None]).isfinite().all()


def test_the_last_digits_of_logits_do_not_change_a_draw() -> None:
    """Between a batch and one alone they differ so much, and a draw that changes changes all of the text behind it."""
    logits = random_logits(500)
    noisy = logits + 2e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    sequences = [sequence_with(params(seed=seed)) for seed in range(500)]
    assert torch.equal(draw(logits, sequences), draw(noisy, sequences))


def test_greedy_rows_and_drawn_rows_side_by_side() -> None:
    logits = random_logits(4)
    greedy, drawn = params(temperature=0.0), params(seed=9)
    choices = sample(logits.clone(), [sequence_with(one) for one in (greedy, drawn, greedy, drawn)])
    for row in (0, 2):
        assert choices[row].token_id == int(logits[row].argmax())
    for row in (1, 3):
        assert choices[row].token_id == int(draw(logits[row : row + 1], [sequence_with(drawn)]))


def adjusted_by_hand(row: list[float], sequence: Sequence) -> list[float]:
    sampling, row = sequence.sampling, list(row)
    generated = sequence.token_ids[sequence.num_prompt_tokens :]
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    if len(generated) < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            row[token] = -math.inf
    for token in set(sequence.token_ids):
        factor = sampling.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token, times in Counter(generated).items():
        row[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return row


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {3: 20.0, 9: -100.0}},
        {"min_tokens": 6, "stop_token_ids": (1, 2)},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {
            "logit_bias": {5: 4.0},
            "min_tokens": 9,
            "stop_token_ids": (7,),
            "repetition_penalty": 0.8,
            "presence_penalty": -1.0,
            "frequency_penalty": 0.3,
        },
    ],
)
def test_adjustments_are_those_of_the_rules(fields: dict[str, object]) -> None:
    logits = random_logits(2)
    sequences = [sequence_with(params(**fields), [8, 9, 8, 8, 5]), sequence_with(params())]
    wanted = torch.tensor([adjusted_by_hand(row.tolist(), one) for row, one in zip(logits, sequences, strict=True)])
    adjust(logits, sequences)
    torch.testing.assert_close(logits, wanted)


def test_min_tokens_ends_when_they_are_out() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 1] = 50.0
    sampling = params(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    assert sample(logits.clone(), [sequence_with(sampling, [3])])[0].token_id != 1
    assert sample(logits.clone(), [sequence_with(sampling, [3, 3])])[0].token_id == 1


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(3)
    wanted = logits.log_softmax(-1)
    sampling = [params(temperature=0.3, logprobs=2, logit_bias={17: 100.0}), params(), params(logprobs=0)]
    choices = sample(logits, [sequence_with(one) for one in sampling])
    assert choices[0].token_id == 17
    assert choices[0].logprob == pytest.approx(float(wanted[0, 17]))
    values, ids = wanted[0].topk(2)
    assert choices[0].top == [
        (int(token), pytest.approx(float(value))) for token, value in zip(ids, values, strict=True)
    ]
    assert choices[1].logprob is None
    assert choices[1].top == []
    assert choices[2].logprob == pytest.approx(float(wanted[2, choices[2].token_id]))
    assert choices[2].top == []


@given(
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    temperature=st.floats(0, 2),
    repetition_penalty=st.floats(0.01, 100),
    penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    bias=st.dictionaries(st.integers(0, 30), st.floats(-100, 100), max_size=31),
    stop=st.lists(st.integers(0, 30), max_size=31),
    logprobs=st.none() | st.integers(0, 20),
    seed=st.integers(0, 2**64 - 1),
    logits=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=31, max_size=31),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_accepted_draws_a_token_of_the_vocabulary(
    logits: list[float], penalties: tuple[float, float], bias: dict[int, float], stop: list[int], **fields: object
) -> None:
    """One request's extremes, and a model that overflows, must not take the engine down with them."""
    sampling = params(
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        logit_bias=bias,
        stop_token_ids=stop,
        min_tokens=50,
        **fields,
    )
    [choice] = sample(torch.tensor([logits]), [sequence_with(sampling, generated=[1, 2, 2])])
    if not any(map(math.isfinite, logits)):
        assert choice is None
        return
    assert 0 <= choice.token_id < 31
    assert choice.logprob is None or not math.isnan(choice.logprob)


@pytest.mark.parametrize(
    "fields", [{"top_k": 2**31}, {"repetition_penalty": 1e-300}, {"temperature": float("nan")}, {"top_p": float("inf")}]
)
def test_what_arithmetic_cannot_take_is_not_accepted(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        params(**fields)


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 503, 2200])
def test_the_native_choice_of_the_likeliest_is_the_samplers(vocab_size: int) -> None:
    library = native_library()
    if library is None:
        pytest.skip("there is no C++ compiler here")
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(vocab_size)).round(decimals=1)  # ties
    logits[1] = float("nan")
    logits[2] = float("-inf")
    logits[3, vocab_size // 2] = float("inf")
    logits[4, 0] = float("nan")
    logits[5, -1] = 99.0
    logits[6] = logits[6].abs() * -1e30
    logits[7, -1] = 3e30  # beyond the bound of what is infinite
    logits[8] = -2e30
    logits[8, -1] = float("nan")
    unusable = [row for row in range(len(logits)) if not logits[row].isfinite().any()]
    expected = sample(logits.clone(), [sequence_with(params(temperature=0.0))] * len(logits))
    assert [row for row, choice in enumerate(expected) if choice is None] == unusable
    assert likeliest(logits.clone(), library) == expected
    assert likeliest(logits) == expected


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"seed": 3}, {"logprobs": 2}, {"top_p": 0.5, "min_p": 0.1}])
def test_a_row_without_finite_logits_gives_no_token_and_leaves_the_others_as_they_are(fields: dict[str, Any]) -> None:
    logits = random_logits(5)
    logits[0] = float("nan")
    logits[2] = float("-inf")
    logits[2, 7] = float("nan")
    logits[3, ::2] = float("nan")
    sequences = [sequence_with(params(**fields)) for _ in range(5)]
    for library in (None, native_library()):
        choices = sample(logits.clone(), sequences, library)
        assert [row for row, choice in enumerate(choices) if choice is None] == [0, 2]
        assert sample_on_host(logits.clone(), sequences, library) == choices
        for row in (1, 3, 4):
            assert choices[row] == sample(logits[row : row + 1].clone(), [sequences[row]], library)[0]
        assert choices[3].token_id % 2 == 1
