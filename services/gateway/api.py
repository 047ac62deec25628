"""What the HTTP API is given: the core that generates, and what it needs to speak to clients."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.trace import Tracer

from services.gateway.metrics import GatewayMetrics
from shared.errors import ModelNotFound
from shared.messages.generate_api import Priority
from shared.messages.serving import OutputToken
from shared.sampling import SamplingParams
from shared.telemetry import tracing
from shared.text.tokenizer import Tokenizer


class FirstToken(OutputToken):
    """The first token of a request, how many tokens of its prompt were found in a prefix cache, and which scenario's
    group served it.
    """

    num_cached_tokens: int
    scenario: str = "default"


class Core(Protocol):
    """Generates tokens somewhere."""

    def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        deadline: float,
        scenario: str | None = None,
        priority: Priority = "interactive",
    ) -> AsyncGenerator[OutputToken, None]:
        """The request's tokens as they come: a FirstToken first; the last one, and only that, has a finish reason.

        Closing the generator cancels the request everywhere. It raises RequestError where the request fails.
        `deadline` is in Unix seconds.
        """

    def max_model_len(self) -> int:
        """The smallest context in tokens of the live instances; the tokenizer's where none lives."""

    def not_ready(self) -> str | None:
        """Why requests cannot be served now; None if they can."""


@dataclass(frozen=True)
class ApiContext:
    """The API's surroundings.

    Attributes:
        served_model_name: the one `model` that requests may name.
        api_keys: keys that clients may use; none at all leaves the API open.
        max_body_bytes: larger request bodies are refused.
        request_timeout_s: time from arrival to the last token.
        system_fingerprint: names the model's weights and numerics to clients; None says nothing.
        created_at: Unix seconds, told as the model's date.
    """

    core: Core
    tokenizer: Tokenizer
    served_model_name: str
    metrics: GatewayMetrics
    api_keys: frozenset[str] = frozenset()
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 600.0
    tracer: Tracer = tracing.tracer
    system_fingerprint: str | None = None
    created_at: int = field(default_factory=lambda: int(time.time()))


def check_model(api: ApiContext, model: str) -> None:
    """Refuse a model that is not the served one.

    Raises:
        ModelNotFound: names the one that is.
    """
    if model != api.served_model_name:
        message = f"The model `{model[:200]}` is not served here, but `{api.served_model_name}` is: name that one."
        raise ModelNotFound(message, param="model")
