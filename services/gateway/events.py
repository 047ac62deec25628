"""The event router: what instances send to this gateway, given to the requests it belongs to.

It owns which instances participate in which request. An instance that does not participate in a request (any more)
cannot affect it, and is told to cancel it. Per token there is one lookup, no lock and no timer.
"""

import logging
import time
from collections.abc import Collection, Iterable

from services.gateway.request import Request
from services.gateway.retries import AttemptFailed
from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import DeadlineExceeded
from shared.messages.serving import Cancel, Failed, Moved, Ping, Pong, Prefilled, StepTokens

log = logging.getLogger(__name__)


class EventRouter:
    """Routes the events of instances to this gateway's open requests."""

    def __init__(self, bus: Bus, gateway_id: str) -> None:
        self._bus = bus
        self.gateway_id = gateway_id
        self._requests: dict[str, Request] = {}
        """Open attempts by their id."""
        self._by_instance: dict[str, set[Request]] = {}
        """Requests by participant."""
        self._heard_at: dict[str, float] = {}
        """When (monotonic) a participant last sent anything."""

    def __len__(self) -> int:
        return len(self._requests)

    def open(self, request: Request) -> None:
        """Routes events of the request's current attempt to it."""
        self._requests[request.attempt_id] = request

    async def close(self, request: Request) -> None:
        """Ends the current attempt: tells every participant to cancel it, and drops what they still send."""
        self._requests.pop(request.attempt_id, None)
        await self.leave_and_cancel(request, *request.participants)

    def join(self, request: Request, instance_id: str) -> None:
        """Makes an instance that is asked a participant: it may use resources for the request from now on."""
        if instance_id not in request.participants:
            request.participants.add(instance_id)
            request.asked.add(instance_id)
        requests = self._by_instance.setdefault(instance_id, set())
        if not requests:
            self._heard_at[instance_id] = time.monotonic()
        requests.add(request)

    def leave(self, request: Request, instance_id: str) -> None:
        """Ends an instance's participation: it uses nothing for the request any more."""
        request.participants.discard(instance_id)
        request.asked.discard(instance_id)
        requests = self._by_instance.get(instance_id)
        if requests is not None:
            requests.discard(request)
            if not requests:
                del self._by_instance[instance_id]
                self._heard_at.pop(instance_id, None)

    async def leave_and_cancel(self, request: Request, *instance_ids: str) -> None:
        """Ends the participation of instances and tells them to release the request."""
        for instance_id in instance_ids:
            self.leave(request, instance_id)
        for instance_id in instance_ids:
            await self.cancel(instance_id, [request.attempt_id])

    async def cancel(self, instance_id: str, attempt_ids: list[str]) -> None:
        """Tells an instance to release attempts."""
        if attempt_ids:
            await self._bus.publish(subjects.instance(instance_id, "cancel"), Cancel(request_ids=attempt_ids))

    def num_open(self, instance_id: str) -> int:
        """Returns the number of this gateway's requests in which the instance participates."""
        requests = self._by_instance.get(instance_id)
        return len(requests) if requests is not None else 0

    def participants(self) -> Collection[str]:
        """Returns the ids of all instances that participate in open requests."""
        return self._by_instance.keys()

    def silent_s(self, instance_id: str) -> float:
        """Returns for how long a participant has sent nothing."""
        return time.monotonic() - self._heard_at.get(instance_id, 0.0)

    def heard(self, instance_id: str) -> None:
        """Notes that a participant has just sent something."""
        if instance_id in self._heard_at:
            self._heard_at[instance_id] = time.monotonic()

    def silent_attempts(self, instance_id: str, silent_s: float) -> list[str]:
        """Returns the attempts in which the instance participates and which had no event for `silent_s`."""
        before = time.monotonic() - silent_s
        requests = self._by_instance.get(instance_id, ())
        silent = (request for request in requests if request.last_event_at < before)
        return [request.attempt_id for request in silent if instance_id not in request.asked]

    def lose(self, instance_id: str, why: str) -> list[str]:
        """Fails every attempt that a lost instance has accepted; returns those in which it participates."""
        requests = list(self._by_instance.get(instance_id, ()))
        for request in requests:
            if instance_id not in request.asked:
                message = f"{instance_id} {why}"
                request.push_event(AttemptFailed(message, instance_id=instance_id, in_failed_step=True))
            self.leave(request, instance_id)
        return [request.attempt_id for request in requests]

    def drop(self, instance_id: str, attempt_ids: Iterable[str]) -> None:
        """Fails attempts that a participant has said it does not know."""
        for attempt_id in attempt_ids:
            request = self._requests.get(attempt_id)
            if request is not None and instance_id in request.participants:
                self.leave(request, instance_id)
                if instance_id == request.handed_off_by:
                    continue  # its KV was fetched
                message = f"{instance_id} does not know this request any more"
                request.push_event(AttemptFailed(message, instance_id=instance_id, counts=False))

    def bus_reconnected(self) -> None:
        """Fails every attempt: messages may be lost, and each request can continue from the tokens it has."""
        for request in self._requests.values():
            if request.participants - request.asked:
                request.push_event(AttemptFailed("the connection to NATS was lost for a while", counts=False))

    async def on_message(self, verb: str, incoming: Incoming) -> None:
        """Handles one event from an instance.

        Raises:
            InvalidRequest: the message cannot be parsed.
        """
        if verb == "tokens":
            await self._on_tokens(incoming.parse(StepTokens))
        elif verb == "prefilled":
            await self._on_prefilled(incoming.parse(Prefilled))
        elif verb == "moved":
            moved = incoming.parse(Moved)
            request = self._request(moved.instance_id, moved.request_id)
            if request is None:
                await self.cancel(moved.instance_id, [moved.request_id])
            else:
                request.push_event(moved)
        elif verb == "failed":
            self._on_failed(incoming.parse(Failed))
        elif verb == "ping" and incoming.reply_to:
            ping = incoming.parse(Ping)
            unknown = [one for one in ping.request_ids if self._request(ping.sender_id, one) is None]
            await incoming.respond(Pong(unknown=unknown))

    async def _on_tokens(self, step: StepTokens) -> None:
        self.heard(step.instance_id)
        unknown: list[str] = []
        for token in step.tokens:
            request = self._request(step.instance_id, token.request_id)
            if request is None:
                unknown.append(token.request_id)
            else:
                request.push_token(step.instance_id, token)
                if request.is_complete:
                    self.leave(request, step.instance_id)
        await self.cancel(step.instance_id, unknown)

    async def _on_prefilled(self, prefilled: Prefilled) -> None:
        self.heard(prefilled.instance_id)
        request = self._request(prefilled.instance_id, prefilled.token.request_id)
        if request is not None:
            request.push_prefilled(prefilled)
        elif prefilled.lease is not None:
            await self.cancel(prefilled.instance_id, [prefilled.token.request_id])

    def _on_failed(self, failed: Failed) -> None:
        self.heard(failed.instance_id)
        request = self._request(failed.instance_id, failed.request_id)
        if request is None:
            return
        self.leave(request, failed.instance_id)
        if failed.error.code == DeadlineExceeded.code:
            request.push_event(DeadlineExceeded(failed.error.message))
            return
        request.push_event(
            AttemptFailed(
                f"{failed.instance_id}: {failed.error.message}",
                instance_id=failed.instance_id,
                kv_source_id=failed.kv_source_id,
                counts=failed.counts,
                in_failed_step=failed.in_failed_step,
            )
        )

    def _request(self, instance_id: str, attempt_id: str) -> Request | None:
        """Returns the open request of an attempt if the instance participates in it."""
        request = self._requests.get(attempt_id)
        return request if request is not None and instance_id in request.participants else None
