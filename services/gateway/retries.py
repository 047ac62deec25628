"""Failed attempts at a request: which count, and how long to pause before the next. Pure."""

from dataclasses import dataclass, field

from shared.errors import PDServeError

RETRY_PAUSE_S = 0.05
RETRY_PAUSE_MAX_S = 1.0


class AttemptFailed(PDServeError):
    """An instance failed a request, and another attempt may succeed.

    Args:
        instance_id: the instance that failed it, if one did.
        kv_source_id: the instance from which `instance_id` could not fetch KV, if that was the failure.
        counts: whether the failure counts against `max_attempts`.
        in_failed_step: whether the request may or may not have caused the failure: the first time is not counted.
    """

    def __init__(
        self,
        message: str,
        *,
        instance_id: str | None = None,
        kv_source_id: str | None = None,
        counts: bool = True,
        in_failed_step: bool = False,
    ) -> None:
        super().__init__(message)
        self.instance_id = instance_id
        self.kv_source_id = kv_source_id
        self.counts = counts
        self.in_failed_step = in_failed_step


@dataclass(slots=True)
class Failures:
    """The failed attempts of one request since it made progress.

    Progress is more than the one token that prefill generates at each attempt: a request that every decode instance
    fails would otherwise be attempted for ever.

    Attributes:
        instances: the instances that failed it: others are preferred.
        number: how many failures count.
    """

    instances: set[str] = field(default_factory=set)
    number: int = 0
    _num_tokens: int = -2
    _shared_a_step: bool = False

    def count(self, failure: AttemptFailed, num_tokens: int) -> int:
        """Counts a failed attempt at a request that has `num_tokens` tokens; returns how many count.

        A failure that another request of the same engine may have caused counts from the second time on.
        """
        if num_tokens > self._num_tokens + 1:
            self.number, self._shared_a_step = 0, False
            self.instances.clear()
        self._num_tokens = num_tokens
        if failure.instance_id is not None:
            self.instances.add(failure.instance_id)
        self.number += failure.counts and (self._shared_a_step or not failure.in_failed_step)
        self._shared_a_step = self._shared_a_step or failure.in_failed_step
        return self.number

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next attempt: none after the first failure, then longer and longer."""
        if self.number <= 1:
            return 0.0
        return min(RETRY_PAUSE_S * 2.0 ** min(self.number - 2, 16), RETRY_PAUSE_MAX_S)
