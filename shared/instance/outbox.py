"""What an instance tells gateways, and how it learns that a gateway is gone."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shared.bus import subjects
from shared.bus.connection import Bus
from shared.engine.sequence import NewToken
from shared.errors import InstanceFailed, RequestError
from shared.messages.serving import (
    Failed,
    Message,
    Moved,
    OutputToken,
    Prefilled,
    SlotFreed,
    StepTokens,
    TokenLogprobs,
    TopLogprob,
)
from shared.sampling import LEAST_LOGPROB

RECENT = 256
"""How many ended requests are remembered for `bus_came_back`."""
BUS_WAS_AWAY = "the connection to the bus was lost for a while"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an instance fails a request; `Failed` says what the fields mean."""

    error: RequestError
    counts: bool = True
    in_failed_step: bool = False
    kv_source_id: str | None = None


class Outbox:
    """Sends events to gateways. When a gateway has no subscription any more, NATS reports it as `gone.<gateway>`."""

    def __init__(self, bus: Bus, instance_id: str) -> None:
        self._bus = bus
        self.instance_id = instance_id
        self._ended: deque[tuple[str, str]] = deque(maxlen=RECENT)

    async def prefilled(self, gateway_id: str, event: Prefilled) -> None:
        await self._send(gateway_id, "prefilled", event)

    async def tokens(self, gateway_id: str, tokens: Iterable[OutputToken]) -> None:
        await self._send(gateway_id, "tokens", StepTokens(instance_id=self.instance_id, tokens=list(tokens)))

    async def moved(self, gateway_id: str, event: Moved) -> None:
        await self._send(gateway_id, "moved", event)

    async def slot_freed(self, gateway_id: str, event: SlotFreed) -> None:
        await self._send(gateway_id, "slot_freed", event)

    async def failed(self, gateway_id: str, request_id: str, failure: Failure) -> None:
        event = Failed(
            instance_id=self.instance_id,
            request_id=request_id,
            error=failure.error.body,
            counts=failure.counts,
            in_failed_step=failure.in_failed_step,
            kv_source_id=failure.kv_source_id,
        )
        await self._send(gateway_id, "failed", event)

    def ended(self, gateway_id: str, request_id: str) -> None:
        """Nothing is held of a request any more, and its last message is on its way."""
        self._ended.append((gateway_id, request_id))

    def gateway_of(self, request_id: str) -> str | None:
        """Returns the gateway of a request that has ended lately; None if it is not remembered."""
        return next((gateway_id for gateway_id, one in self._ended if one == request_id), None)

    async def bus_came_back(self) -> None:
        """Gives up what has just ended, in whichever role, since its last message may be lost."""
        ended = list(self._ended)
        self._ended.clear()
        for gateway_id, request_id in ended:
            await self.failed(gateway_id, request_id, Failure(InstanceFailed(BUS_WAS_AWAY), counts=False))

    async def _send(self, gateway_id: str, verb: str, event: Message) -> None:
        told = subjects.instance(self.instance_id, subjects.gone(gateway_id))
        await self._bus.publish(subjects.gateway(gateway_id, verb), event, no_responders_to=told)


def output_token(token: NewToken) -> OutputToken:
    """The engine's token as it travels."""
    logprobs = None
    if token.logprob is not None:
        top = [TopLogprob(token_id=token_id, logprob=max(value, LEAST_LOGPROB)) for token_id, value in token.top]
        logprobs = TokenLogprobs(logprob=max(token.logprob, LEAST_LOGPROB), top=top)
    return OutputToken(
        request_id=token.request_id,
        index=token.index,
        token_id=token.token_id,
        logprobs=logprobs,
        finish_reason=token.finish_reason,
    )
