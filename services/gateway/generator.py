"""One request, over the failure of instances, to its last token.

    group of the scenario -> attempt: prefill, decode (`attempt.py`) -> tokens

An attempt that an instance fails is followed by another that prefills the prompt and all tokens so far, so the client
sees one unbroken stream. Draws depend on seed and position alone, so it is also the stream that it would have been.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial

from services.gateway import affinity
from services.gateway.api import FirstToken
from services.gateway.attempt import Attempt
from services.gateway.generation import Generation
from services.gateway.groups import Group
from services.gateway.scenarios import Scenarios
from services.gateway.streams import AttemptFailed, Streams
from shared.bus.connection import Bus
from shared.errors import InstanceFailed, NoInstance, Overloaded
from shared.messages.generate_api import Priority
from shared.messages.serving import OutputToken
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings

log = logging.getLogger(__name__)


class Generator:
    """Takes requests through the instances."""

    def __init__(
        self,
        settings: GatewaySettings,
        bus: Bus,
        streams: Streams,
        group_of: Callable[[str | None, str | None], Group],
        scenarios: Callable[[], Scenarios | None] = lambda: None,
    ) -> None:
        """`group_of` gives the group for a scenario and, for requests that have begun, the fingerprint of weights;
        `scenarios` labels requests that name none, if they are to be labelled.
        """
        self._settings = settings
        self._bus = bus
        self._streams = streams
        self._group_of = group_of
        self._scenarios = scenarios

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        deadline: float,
        scenario: str | None = None,
        priority: Priority = "interactive",
    ) -> AsyncGenerator[OutputToken, None]:
        """The tokens, one after another; the last has a finish reason. Closing the generator cancels the request
        everywhere.

        Args:
            request_id: unique among this gateway's open requests.
            deadline: of the whole request, in Unix seconds.
            scenario: which groups may serve it; the default one where none of them can.

        Raises:
            RequestError: the request ends without being served to its end.
        """
        generation = Generation(
            request_id,
            prompt_token_ids,
            sampling,
            deadline,
            scenario=scenario,
            is_batch=priority == "batch",
            prefix_keys=affinity.prefix_keys(prompt_token_ids),
        )
        scenarios = self._scenarios() if scenario is None else None
        if scenarios is not None:
            generation.scenario = scenarios.label(generation.prefix_keys, len(prompt_token_ids), sampling.max_tokens)
        group = self._group_of(generation.scenario, None)
        counts = group.counts
        counts.num_arrived += 1
        counts.open += 1
        try:
            async with aclosing(self._attempts(generation, group)) as tokens:
                async for token in tokens:
                    if isinstance(token, FirstToken):
                        counts.first_token(generation.arrived_at, group.map.ttft_s)
                    if token.finish_reason is not None:
                        num_output_tokens = len(generation.output_token_ids)
                        counts.done(generation.arrived_at, len(prompt_token_ids), num_output_tokens)
                        if scenarios is not None:
                            scenarios.done(generation.scenario, len(prompt_token_ids), num_output_tokens)
                    yield token
        except (Overloaded, NoInstance):
            counts.num_shed += 1
            raise
        finally:
            counts.open -= 1

    async def _attempts(self, generation: Generation, group: Group) -> AsyncGenerator[OutputToken, None]:
        """One attempt after another, until one comes to the last token."""
        num_failures = 0
        attempt = 0
        while True:
            try:
                async with aclosing(self._attempt(generation, group, attempt)) as tokens:
                    async for token in tokens:
                        generation.output_token_ids.append(token.token_id)
                        yield token
                        if token.finish_reason is not None:
                            return
            except AttemptFailed as failure:
                log.warning("attempt %d at request %s failed: %s", attempt, generation.request_id, failure)
                num_failures += failure.counts
                if num_failures >= self._settings.max_attempts:
                    raise InstanceFailed(
                        f"{num_failures} instances failed this request, at last: {failure}"
                    ) from failure
            attempt += 1
            if not generation.has_begun:
                generation.fingerprint = None
            group = self._group_of(generation.scenario, generation.fingerprint)

    async def _attempt(self, generation: Generation, group: Group, number: int) -> AsyncGenerator[OutputToken, None]:
        is_elsewhere = partial(self._is_elsewhere, generation, group)
        with self._streams.open(f"{generation.request_id}.{number}") as stream:
            attempt = Attempt(self._settings, self._bus, self._streams, group, generation, stream, is_elsewhere)
            async with aclosing(attempt.tokens()) as tokens:
                async for token in tokens:
                    yield token

    def _is_elsewhere(self, generation: Generation, group: Group) -> bool:
        """Whether another group can serve the request, and this one not any more."""
        if group.serves(generation.fingerprint):
            return False
        other = self._group_of(generation.scenario, generation.fingerprint)
        return other is not group and other.serves(generation.fingerprint)
