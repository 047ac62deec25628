"""One request on its way from an API to its last token, and the output through which its tokens reach the client.

The APIs make a `Request` and read its `TokenOutput`; the dispatcher takes it from phase to phase; the event router
pushes what instances send. Only the methods here change a request. Times are `time.monotonic()` of this process.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.gateway.retries import AttemptFailed, Failures
from shared.errors import DeadlineExceeded, RequestError, SlowClient
from shared.messages.serving import Moved, OutputToken, Prefilled
from shared.sampling import SamplingParams

T = TypeVar("T")

MAX_UNREAD_TOKENS = 16_384
"""A client that leaves more tokens unread loses its request: unread tokens must not fill the gateway's memory."""


@dataclass(frozen=True, slots=True)
class DecodeStarted:
    """The first token of a decode instance has arrived, so it has fetched the KV.

    `num_cached_tokens` of the prompt were cached there, if that instance computed the prompt itself.
    """

    instance_id: str
    num_tokens_before: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last token has arrived."""

    instance_id: str


Event = Prefilled | DecodeStarted | Moved | Finished


class TokenOutput:
    """Tokens of one or several requests (the choices of one client request) that wait for their reader.

    The reader takes everything that has arrived at once, so that it can write it at once.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[Request, OutputToken]] = []
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, request: "Request", token: OutputToken) -> None:
        """Adds a token. Fails the output when its reader is too far behind."""
        if self._error is not None:
            return  # the reader must not get tokens behind a gap
        if len(self._unread) >= MAX_UNREAD_TOKENS:
            error = SlowClient(f"The client left {MAX_UNREAD_TOKENS} tokens unread: read the stream faster.")
            self.fail(error)
            request.push_event(error)
            return
        self._unread.append((request, token))
        self._wake()

    def fail(self, error: RequestError) -> None:
        """Ends the output with an error, which the reader gets after the tokens before it. The first error stays."""
        if self._error is None:
            self._error = error
        self._wake()

    async def read(self) -> "Sequence[tuple[Request, OutputToken]]":
        """Waits for tokens, and returns all that have arrived since the last call.

        Raises:
            RequestError: a request failed, and all tokens before that have been read.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        unread, self._unread = self._unread, []
        return unread

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the tokens generated for it, over all attempts.

    Attributes:
        id: unique in this deployment; instances see it with the number of the attempt (`attempt_id`).
        deadline: when the whole request must be done.
        arrived_at: when its first byte was read.
        choice: its number among the choices of one client request.
        scenario: the scenario that the client named or a label that was found; None is the default group's.
        served_by: the scenario of the group that serves it.
        fingerprint: the weights it started on. It never continues on others.
        token_ids: the prompt and what has been generated so far.
        participants: instances that may use resources for the current attempt: they are watched, and told to cancel.
        asked: those of them that have not accepted yet: the request does not depend on them.
        handed_off_by: the instance whose KV a decode instance has accepted to fetch: it may have released the request.
        failures: attempts that failed since it made progress, and where.
        is_complete: whether its last token has arrived.
        is_finished: whether it has all the tokens it needs, be they all or not.
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    output: TokenOutput
    arrived_at: float = field(default_factory=time.monotonic)
    choice: int = 0
    scenario: str | None = None
    is_batch: bool = False
    served_by: str = "default"
    prefix_keys: tuple[int, ...] = ()
    fingerprint: str | None = None
    attempt: int = -1
    token_ids: list[int] = field(init=False)
    participants: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    failures: Failures = field(default_factory=Failures)
    is_complete: bool = False
    is_finished: bool = False
    attempt_started_at: float = 0.0
    handed_off_by: str | None = None
    last_event_at: float = field(default_factory=time.monotonic)
    _events: deque[Event | Exception] = field(default_factory=deque)
    _waiter: asyncio.Future[None] | None = None
    _decode_is_new: bool = False
    _source_id: str | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def attempt_id(self) -> str:
        return f"{self.id}.{self.attempt}"

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def has_started(self) -> bool:
        """Returns whether the client has a token already."""
        return len(self.token_ids) > len(self.prompt_token_ids)

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    def start_attempt(self) -> None:
        """Begins the next attempt: what instances sent for the previous one is dropped."""
        self.attempt += 1
        self.attempt_started_at = time.monotonic()
        self.handed_off_by = None
        self._events.clear()
        self._decode_is_new = False
        self.last_event_at = time.monotonic()

    def expect_decode(self, source_id: str | None = None) -> None:
        """Lets `DecodeStarted` announce the next token that does not come from the source of the KV."""
        self._decode_is_new = True
        self.handed_off_by = None
        self._source_id = source_id

    def push_token(self, instance_id: str, token: OutputToken) -> None:
        """Takes a token of the current attempt. Duplicates are dropped; a gap fails the attempt."""
        expected = self.num_output_tokens
        self.last_event_at = time.monotonic()
        if self._decode_is_new and instance_id != self._source_id:
            self._decode_is_new = False
            self.push_event(DecodeStarted(instance_id, expected, token.num_cached_tokens or 0))
        if token.index != expected:
            if token.index > expected:
                message = f"expected token {expected} but received {token.index}: messages were lost"
                self.push_event(AttemptFailed(message, instance_id=instance_id))
            return
        self._append(token)
        if self.is_complete:
            self.push_event(Finished(instance_id))

    def push_prefilled(self, prefilled: Prefilled) -> None:
        """Takes the end of prefill: the first token of the current attempt, and the lease on the KV."""
        expected, token = self.num_output_tokens, prefilled.token
        if token.index != expected:
            message = f"expected token {expected} at the end of prefill but received {token.index}"
            # Two instances that were asked at the same time may both have accepted: nobody is to blame.
            self.push_event(AttemptFailed(message, counts=False))
            return
        self._append(token.model_copy(update={"num_cached_tokens": prefilled.num_cached_tokens}))
        self.push_event(prefilled)

    def _append(self, token: OutputToken) -> None:
        if self.has_started and token.num_cached_tokens is not None:
            token = token.model_copy(update={"num_cached_tokens": None})  # the client hears it once, at first
        self.token_ids.append(token.token_id)
        self.is_complete = token.finish_reason is not None
        self.output.push(self, token)

    def push_event(self, event: Event | Exception) -> None:
        """Takes an event that ends a phase of the current attempt, or the reason why the attempt failed."""
        self.last_event_at = time.monotonic()
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_event(self, max_silence_s: float) -> Event:
        """Waits for the next event.

        Raises:
            AttemptFailed: an instance failed the attempt, or sent nothing for `max_silence_s`.
            RequestError: the request failed for good, or its deadline passed.
        """
        while not self._events:
            silent_at = self.last_event_at + max_silence_s
            if time.monotonic() >= self.deadline:
                raise DeadlineExceeded("the request's deadline has passed")
            if time.monotonic() >= silent_at:
                names = sorted(self.participants)
                message = f"{' and '.join(names)} sent nothing for {max_silence_s:g} s"
                raise AttemptFailed(message, instance_id=names[0] if len(names) == 1 else None)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                # Tokens move `last_event_at` without a timer of their own: the timer is set again when it has run out.
                async with asyncio.timeout(max(0.0, min(self.deadline, silent_at) - time.monotonic())):
                    await self._waiter
            except TimeoutError:
                continue
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    async def unless_failed(self, work: asyncio.Future[T]) -> T:
        """Waits for `work`. If the attempt fails first, cancels it and raises the failure. Takes no event."""
        try:
            while not work.done():
                failure = next((event for event in self._events if isinstance(event, Exception)), None)
                if failure is not None:
                    raise failure
                self._waiter = asyncio.get_running_loop().create_future()
                either: list[asyncio.Future[Any]] = [work, self._waiter]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return work.result()
        finally:
            work.cancel()
            await asyncio.wait([work])
