"""What the HTTP API and the NATS API are given: the core that serves requests, and their surroundings."""

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.trace import Tracer

from services.gateway.request import Request
from shared.errors import ModelNotFound
from shared.telemetry import tracing
from shared.telemetry.gateway_metrics import GatewayMetrics
from shared.text.tokenizer import Tokenizer


class Core(Protocol):
    """Generates tokens somewhere."""

    def serving(self, requests: Sequence[Request]) -> AbstractAsyncContextManager[None]:
        """Serves requests while the block lasts: their tokens and their first error arrive in `request.output`.

        Leaving the block cancels the requests that have not finished, wherever they are.
        """

    def finish(self, request: Request) -> None:
        """Stops generating for a request of an open `serving` block, as after a stop string. It is not an error."""

    def max_model_len(self) -> int:
        """Returns the smallest context in tokens of the live instances, or the tokenizer's without any."""

    def not_ready(self) -> str | None:
        """Returns why requests cannot be served now; None if they can."""


@dataclass(frozen=True)
class ApiContext:
    """The surroundings of an API.

    Attributes:
        served_model_name: the one `model` that requests may name.
        api_keys: keys that clients may use; without any the API is open.
        max_body_bytes: larger request bodies are rejected.
        request_timeout_s: time from arrival to the last token.
        system_fingerprint: names the model's weights and numerics to clients; None omits it.
        created_at: Unix seconds, reported as the model's date.
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
    """Checks that a request names the served model.

    Raises:
        ModelNotFound: it names another; the message names the served one.
    """
    if model != api.served_model_name:
        message = f"The model `{model[:200]}` is not served here, but `{api.served_model_name}` is: name that one."
        raise ModelNotFound(message, param="model")
