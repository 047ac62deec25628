"""Request fields of OpenAI's API that have no effect here, and those that would change the answer and are refused."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import InvalidRequest

HARMLESS = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Accepted without effect: they are about accounts, billing and speed, not about the answer."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A feature that is not there: the values that do not ask for it, and what to do instead."""

    idle: tuple[object, ...]
    instead: str


NO_TOOLS = "tools are not supported: describe them in the prompt, and read the calls from the text"
NO_AUDIO = "only text is generated: remove it"

UNSUPPORTED: Mapping[str, Unsupported] = {
    "tools": Unsupported(([],), NO_TOOLS),
    "tool_choice": Unsupported(("none", "auto"), NO_TOOLS),
    "functions": Unsupported(([],), NO_TOOLS),
    "function_call": Unsupported(("none", "auto"), NO_TOOLS),
    "response_format": Unsupported(
        ({"type": "text"},), 'only {"type": "text"} is supported: ask for the format in the prompt'
    ),
    "modalities": Unsupported((["text"],), 'only ["text"] is supported'),
    "audio": Unsupported((), NO_AUDIO),
    "web_search_options": Unsupported((), "there is no web search: remove it"),
    "reasoning_effort": Unsupported((), "it is not supported: remove it"),
    "verbosity": Unsupported(("medium",), "it is not supported: ask for it in the prompt"),
    "echo": Unsupported((False,), "the prompt is not repeated: put it before the text yourself"),
    "suffix": Unsupported(("",), "inserting before a suffix is not supported: remove it"),
}


def supported_fields(body: Mapping[str, object]) -> dict[str, object]:
    """The fields of a request that have an effect.

    Raises:
        InvalidRequest: one asks for a feature that is not there.
    """
    for name, feature in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value not in feature.idle:
            raise InvalidRequest(f"`{name}`: {feature.instead}.", param=name)
    return {name: value for name, value in body.items() if name not in HARMLESS and name not in UNSUPPORTED}
