"""What the gateway reads of a model's configuration: its vocabulary, context, end tokens and sampling defaults."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.errors import ModelRefused
from shared.sampling import SamplingParams
from shared.text.files import JSONObject, JSONValue, read_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class SamplingDefaults(BaseModel):
    """The sampling parameters that generation_config.json recommends; None where it says nothing.

    `top_k` may be -1, which means the same as 0: keep all tokens.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @field_validator("top_k")
    @classmethod
    def _off_is_zero(cls, top_k: int | None) -> int | None:
        return 0 if top_k == -1 else top_k


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What config.json, generation_config.json and tokenizer_config.json say.

    Attributes:
        vocab_size: rows of the embedding, if config.json says; the tokenizer may know fewer tokens.
        max_model_len: the model's context in tokens, prompt and output together.
        eos_token_ids: tokens that end a generation, by generation_config.json and config.json; may be empty, and may
            have ids that the embedding lacks.
        special_tokens: name (`bos_token`) to content (`<s>`), as chat templates see them.
    """

    vocab_size: int | None
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    sampling_defaults: SamplingDefaults

    @classmethod
    def read(cls, folder: Path) -> "ModelConfig":
        """Read the files of a model's folder.

        Raises:
            ModelRefused: a file is malformed, or none says how long the context is.
        """
        config = _text_config(read_object(folder / "config.json"))
        generation = read_object(folder / "generation_config.json")
        tokenizer = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
        return cls(
            vocab_size=_integer(config.get("vocab_size")),
            max_model_len=_max_model_len(folder, config, tokenizer),
            eos_token_ids=(*_token_ids(generation.get("eos_token_id")), *_token_ids(config.get("eos_token_id"))),
            special_tokens=_special_tokens(tokenizer),
            sampling_defaults=_sampling_defaults(folder, generation),
        )


def _text_config(config: JSONObject) -> JSONObject:
    nested = config.get("text_config")
    return config | nested if isinstance(nested, dict) else config


def _integer(value: JSONValue) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _token_ids(value: JSONValue) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token_id for token_id in map(_integer, values) if token_id is not None)


def _max_model_len(folder: Path, config: JSONObject, tokenizer: JSONObject) -> int:
    # n_positions and n_ctx are what GPT-2 and its kin call it; model_max_length is 1e30 where nobody set it.
    for value in (
        config.get("max_position_embeddings"),
        config.get("n_positions"),
        config.get("n_ctx"),
        tokenizer.get("model_max_length"),
    ):
        length = _integer(value)
        if length is not None and 0 < length < 2**31:
            return length
    raise ModelRefused(f"{folder}: config.json does not say max_position_embeddings, the length of the context.")


def _special_tokens(tokenizer: JSONObject) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        content = special_token_content(tokenizer.get(name))
        if content is not None:
            tokens[name] = content
    return tokens


def special_token_content(value: JSONValue) -> str | None:
    """Returns the text of a special token, which tokenizer_config.json writes as a string or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _sampling_defaults(folder: Path, generation: JSONObject) -> SamplingDefaults:
    try:
        defaults = SamplingDefaults.model_validate(generation)
        SamplingParams(max_tokens=1, **defaults.model_dump(exclude_none=True))
    except ValidationError as error:
        first = error.errors()[0]
        name, value = first["loc"][0], first["input"]
        raise ModelRefused(
            f"{folder}/generation_config.json: {name} is {value!r}: {first['msg']}. Correct the file."
        ) from error
    return defaults
