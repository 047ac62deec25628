"""Complete SamplingParams from the fields of a client's request. Pure; for every API of the gateway."""

import secrets
from collections.abc import Iterable, Mapping
from typing import Protocol

from pydantic import ValidationError
from xxhash import xxh3_64_intdigest

from shared.errors import ContextTooLong, InvalidRequest, invalid_request
from shared.sampling import SamplingParams
from shared.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""Of a completion that does not say; OpenAI's."""


class SamplingFields(Protocol):
    """The fields of a request that say how to sample; None leaves a field to us."""

    @property
    def min_tokens(self) -> int | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def logit_bias(self) -> Mapping[int, float] | None: ...
    @property
    def stop_token_ids(self) -> list[int] | None: ...
    @property
    def ignore_eos(self) -> bool | None: ...


def check_prompt(prompt_token_ids: list[int], tokenizer: Tokenizer, max_model_len: int, param: str) -> None:
    """Checks that a prompt is not empty, leaves space for a token, and has only ids that the model knows.

    Raises:
        InvalidRequest: among them ContextTooLong.
    """
    if not prompt_token_ids:
        raise InvalidRequest(f"`{param}` is empty: give at least one token.", param=param)
    if len(prompt_token_ids) >= max_model_len:
        raise ContextTooLong(
            f"The model's context is {max_model_len} tokens, but the prompt has {len(prompt_token_ids)}, and one must "
            "be left to generate: shorten the prompt.",
            param=param,
        )
    _check_token_ids(prompt_token_ids, tokenizer, param)


def sampling_params(
    fields: SamplingFields,
    *,
    tokenizer: Tokenizer,
    num_prompt_tokens: int,
    max_model_len: int,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Completes sampling parameters for one prompt.

    A field that the request leaves out takes the value in the model's generation_config.json (temperature, top_p,
    top_k, min_p and repetition_penalty, as vLLM does), or else OpenAI's default: temperature 1, everything else off.

    Args:
        fields: the request's.
        num_prompt_tokens: at least 1 and less than `max_model_len`.
        max_tokens: the request's; without one, `default_max_tokens` or, if that is None, the rest of the context.
        logprobs: how many likeliest tokens to report.

    Raises:
        InvalidRequest: a value is out of its range; ContextTooLong if prompt and output do not fit together.
    """
    max_new_tokens = max_model_len - num_prompt_tokens
    if max_tokens is None:
        max_tokens = max_new_tokens if default_max_tokens is None else min(default_max_tokens, max_new_tokens)
    given = {name: value for name in _COPIED if (value := getattr(fields, name)) is not None}
    _check_token_ids(given.get("logit_bias", ()), tokenizer, "logit_bias")
    _check_token_ids(given.get("stop_token_ids", ()), tokenizer, "stop_token_ids")
    if given.get("top_k") == -1:
        given["top_k"] = 0
    ends = () if fields.ignore_eos else tokenizer.eos_token_ids
    given["stop_token_ids"] = tuple(dict.fromkeys((*given.get("stop_token_ids", ()), *ends)))
    seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64
    values = tokenizer.sampling_defaults.model_dump(exclude_none=True) | given
    try:
        params = SamplingParams(max_tokens=max_tokens, seed=seed, logprobs=logprobs, **values)
    except ValidationError as error:
        raise invalid_request(error) from error
    _check_lengths(params, num_prompt_tokens, max_model_len)
    return params


_COPIED = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop_token_ids",
)


def _check_lengths(params: SamplingParams, num_prompt_tokens: int, max_model_len: int) -> None:
    if num_prompt_tokens + params.max_tokens > max_model_len:
        raise ContextTooLong(
            f"The model's context is {max_model_len} tokens, but the prompt has {num_prompt_tokens} and max_tokens is "
            f"{params.max_tokens}, together {num_prompt_tokens + params.max_tokens}: lower one of them.",
            param="max_tokens",
        )
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {params.min_tokens}, but max_tokens is {params.max_tokens}: lower it.", param="min_tokens"
        )


def _check_token_ids(token_ids: Iterable[int], tokenizer: Tokenizer, param: str) -> None:
    bad = next((token_id for token_id in token_ids if not 0 <= token_id < tokenizer.vocab_size), None)
    if bad is not None:
        raise InvalidRequest(
            f"`{param}` has the token id {bad}, but the model's ids are 0 to {tokenizer.vocab_size - 1}.", param=param
        )


def choice_seed(seed: int, choice: int) -> int:
    """Returns the seed of a prompt's choice, counted from 0: the first choice has the request's own."""
    return seed if choice == 0 else xxh3_64_intdigest(choice.to_bytes(8, "little"), seed=seed)
