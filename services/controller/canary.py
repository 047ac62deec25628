"""A request of a few tokens through one prefill and one decode instance, as a gateway would send it, before either is
announced: admission, engine, lease, KV over TCP, and what the pair generates.
"""

import asyncio
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field

from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import PDServeError, PeerUnavailable, RequestError
from shared.messages.records import InstanceRecord
from shared.messages.serving import (
    Ask,
    AskReply,
    Cancel,
    Failed,
    KVLease,
    Ping,
    Pong,
    Prefilled,
    Start,
    StepTokens,
)
from shared.sampling import SamplingParams
from shared.telemetry import tracing

PROMPT = [1, 2, 3, 4, 5, 6]
"""Shorter than a block, so that it leaves nothing in prefix caches."""
NUM_TOKENS = 3
ANSWER_TIMEOUT_S = 2.0
ASK_AGAIN_S = 0.1

Event = Prefilled | StepTokens | Failed


class CanaryFailed(PDServeError):
    """The instances do not serve the canary request; the message says where it ended."""


@dataclass(slots=True)
class Canary:
    """Sends canary requests, and remembers what weights of one fingerprint have answered."""

    bus: Bus
    controller_id: str
    timeout_s: float
    _events: dict[str, "asyncio.Queue[Event]"] = field(default_factory=lambda: defaultdict(asyncio.Queue))
    _known: dict[str, list[int]] = field(default_factory=dict)

    async def on_message(self, incoming: Incoming) -> None:
        """What instances tell us, as they would tell a gateway."""
        verb, _ = subjects.verb_and_key(incoming.subject)
        try:
            if verb == "prefilled":
                prefilled = incoming.parse(Prefilled)
                self._put(prefilled.token.request_id, prefilled)
            elif verb == "tokens":
                step = incoming.parse(StepTokens)
                for token in step.tokens:
                    self._put(token.request_id, StepTokens(instance_id=step.instance_id, tokens=[token]))
            elif verb == "failed":
                failed = incoming.parse(Failed)
                self._put(failed.request_id, failed)
            elif verb == "ping":
                asked = incoming.parse(Ping).request_ids
                await incoming.respond(Pong(unknown=[one for one in asked if one not in self._events]))
        except RequestError:
            return  # another version's: the canary that waits for it fails by its deadline

    def _put(self, request_id: str, event: Event) -> None:
        if request_id in self._events:
            self._events[request_id].put_nowait(event)

    async def through(self, prefill: InstanceRecord, decode: InstanceRecord | None) -> None:
        """Sends one request through a pair, or through a prefill instance alone.

        Raises:
            CanaryFailed: it did not come back, or not as it should.
        """
        request_id = f"canary-{secrets.token_hex(6)}"
        events = self._events[request_id]
        holders = [one for one in (prefill, decode) if one is not None]
        try:
            async with asyncio.timeout(self.timeout_s):
                with tracing.untraced():
                    token_ids = await self._run(request_id, events, prefill, decode)
        except TimeoutError as error:
            names = " and ".join(one.id for one in holders)
            raise CanaryFailed(f"the canary request through {names} was not done in {self.timeout_s:g} s") from error
        except (PeerUnavailable, RequestError) as error:
            raise CanaryFailed(f"the canary request was not answered: {error}") from error
        finally:
            del self._events[request_id]
            for one in holders:
                await self.bus.publish(subjects.instance(one.id, "cancel"), Cancel(request_ids=[request_id]))
        known = self._known.setdefault(prefill.fingerprint, token_ids) if decode is not None else token_ids
        if known != token_ids:
            raise CanaryFailed(
                f"{prefill.id} and {decode.id if decode else ''} answer the canary request with {token_ids}, "
                f"and others with the same weights with {known}"
            )

    async def _run(
        self, request_id: str, events: "asyncio.Queue[Event]", prefill: InstanceRecord, decode: InstanceRecord | None
    ) -> list[int]:
        deadline = time.monotonic() + self.timeout_s
        num_outputs = NUM_TOKENS if decode else 1
        await self._ask(prefill, "prefill", self._question(request_id, prefill, PROMPT, num_outputs), deadline)
        prefilled = await _next(events)
        if not isinstance(prefilled, Prefilled):
            raise CanaryFailed(f"{prefill.id} generates before it has prefilled")
        token_ids = [prefilled.token.token_id]
        if decode is None or prefilled.lease is None:
            return token_ids
        question = self._question(request_id, decode, [*PROMPT, *token_ids], num_outputs, prefilled.lease)
        await self._ask(decode, "decode", question, deadline)
        while len(token_ids) < NUM_TOKENS:
            step = await _next(events)
            if not isinstance(step, StepTokens) or step.tokens[0].index != len(token_ids):
                raise CanaryFailed(f"{decode.id} loses tokens")
            token_ids.append(step.tokens[0].token_id)
            if step.tokens[0].finish_reason is not None:
                break
        return token_ids

    def _question(
        self,
        request_id: str,
        instance: InstanceRecord,
        token_ids: list[int],
        max_tokens: int,
        lease: KVLease | None = None,
    ) -> Ask:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return Ask(
            request_id=request_id,
            gateway_id=self.controller_id,
            epoch=instance.epoch,
            fingerprint=instance.fingerprint,
            num_tokens=len(token_ids),
            num_prompt_tokens=len(PROMPT),
            max_tokens=max_tokens,
            expires_in_s=self.timeout_s,
            lease=lease,
            is_canary=True,
            start=Start(request_id=request_id, token_ids=token_ids, sampling=sampling),
        )

    async def _ask(self, instance: InstanceRecord, verb: str, question: Ask, deadline: float) -> None:
        """Until it accepts: one that is full, as in a group that lacks the role of the newcomer, is soon less so."""
        subject = subjects.instance(instance.id, verb)
        while True:
            answer = await self.bus.request(subject, question, AskReply, timeout_s=ANSWER_TIMEOUT_S)
            if answer.accepted:
                return
            if answer.reason not in ("no_blocks", "busy") or time.monotonic() > deadline:
                raise CanaryFailed(f"{instance.id} refuses the canary request: {answer.reason}")
            await asyncio.sleep(ASK_AGAIN_S)


async def _next(events: "asyncio.Queue[Event]") -> Event:
    event = await events.get()
    if isinstance(event, Failed):
        raise CanaryFailed(f"{event.instance_id} fails the canary request: {event.error.message}")
    return event
