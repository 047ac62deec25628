"""What is known of one HTTP request from its arrival on."""

import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope

STATE = "exchange"


def _new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        endpoint: the label of its metrics.
        request_id: told to the client in the header x-request-id, and part of the ids that instances see.
        arrived_s: on the clock of `time.perf_counter`.
    """

    endpoint: str
    request_id: str = field(default_factory=_new_id)
    arrived_s: float = field(default_factory=time.perf_counter)

    def put_into(self, scope: Scope) -> None:
        scope.setdefault("state", {})[STATE] = self

    @staticmethod
    def of(scope: Scope) -> "Exchange":
        exchange = scope["state"][STATE]
        assert isinstance(exchange, Exchange)
        return exchange
