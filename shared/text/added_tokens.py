"""Tokens that tokenizer_config.json adds to those of tokenizer.json, as transformers adds them."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from shared.errors import ModelRefused
from shared.text.files import JSONObject, read_object
from shared.text.model_config import SPECIAL_TOKENS, special_token_content


class _TokenEntry(BaseModel):
    """A token as tokenizer_config.json writes it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def added_token(self, *, is_special: bool) -> AddedToken:
        normalized = not is_special if self.normalized is None else self.normalized
        return AddedToken(
            self.content,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=normalized,
            special=is_special,
        )


_ENTRIES = TypeAdapter(dict[Annotated[int, Field(ge=0, lt=2**31)], _TokenEntry])


def add_configured_tokens(backend: Backend, folder: Path) -> None:
    """Add the tokens of `added_tokens_decoder`, and the named special tokens (`eos_token`, ...) of the vocabulary.

    Each of them is one token of a prompt from then on, whatever stands around it. Tokens that tokenizer.json has among
    its added tokens stay as they are.

    Raises:
        ModelRefused: `added_tokens_decoder` is malformed, or gives a token another id than tokenizer.json.
    """
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    named = _named_special_tokens(config)
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, entry in sorted(_entries(config, path).items()):
        _check_id(backend, entry.content, token_id, path)
        if entry.content not in present:
            backend.add_tokens([entry.added_token(is_special=entry.special or entry.content in named)])
            present.add(entry.content)
            _check_id(backend, entry.content, token_id, path, was_added=True)
    for content, entry in named.items():
        if content not in present and backend.token_to_id(content) is not None:
            backend.add_tokens([entry.added_token(is_special=True)])


def _entries(config: JSONObject, path: Path) -> dict[int, _TokenEntry]:
    try:
        entries = _ENTRIES.validate_python(config.get("added_tokens_decoder") or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelRefused(f"{path}: added_tokens_decoder.{place}: {first['msg']}.") from error
    return {token_id: entry for token_id, entry in entries.items() if entry.content}


def _named_special_tokens(config: JSONObject) -> dict[str, _TokenEntry]:
    """Returns the special tokens that have a name, and the further ones of `additional_special_tokens`; by content."""
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    values = [*map(config.get, SPECIAL_TOKENS), *(further if isinstance(further, list) else [])]
    named = {}
    for value in values:
        content = special_token_content(value)
        if not content:
            continue
        try:
            named[content] = _TokenEntry.model_validate(value if isinstance(value, dict) else {"content": content})
        except ValidationError:
            named[content] = _TokenEntry(content=content)
    return named


def _check_id(backend: Backend, content: str, token_id: int, path: Path, *, was_added: bool = False) -> None:
    known_id, known_token = backend.token_to_id(content), backend.id_to_token(token_id)
    if (known_id is None and known_token is None and not was_added) or known_id == token_id:
        return
    if was_added:
        found = f"the next free id of tokenizer.json is {known_id}"
    elif known_id is not None:
        found = f"tokenizer.json gives it the id {known_id}"
    else:
        found = f"tokenizer.json gives that id to {known_token!r}"
    raise ModelRefused(
        f"{path}: added_tokens_decoder gives {content!r} the id {token_id}, but {found}. Use files of one model."
    )
