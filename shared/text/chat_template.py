"""Chat messages to prompt text by the model's own Jinja template, as transformers' `apply_chat_template` renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest, ModelRefused
from shared.text.files import read_object, read_text

Message = Mapping[str, str]


class ChatTemplate:
    """A model's chat template, or the lack of one.

    Args:
        source: the Jinja template; None if the model has none.
        special_tokens: name to content, which the template sees as variables.

    Raises:
        ModelRefused: the template does not compile.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source) if source is not None else None
        except TemplateError as error:
            raise ModelRefused(f"The model's chat template does not compile: {error}.") from error

    @classmethod
    def read(cls, folder: Path, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """Returns the template of chat_template.jinja, or else of tokenizer_config.json, which may have several."""
        source = read_text(folder / "chat_template.jinja")
        if source is None:
            source = _default_of(read_object(folder / "tokenizer_config.json").get("chat_template"))
        return cls(source, special_tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt for the assistant's next message; it contains its own special tokens.

        Raises:
            InvalidRequest: the model has no template, or the template does not take these messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template: send the whole prompt to /v1/completions instead.", param="messages"
            )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        # Templates are code: a message they do not expect ends in their own error or in any of these.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"The model's chat template does not take these messages: {error}. Change their roles or order.",
                param="messages",
            ) from error


def _default_of(value: object) -> str | None:
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is text as any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(content, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model has seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
