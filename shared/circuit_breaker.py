"""A circuit breaker: something that has just failed is used less often, and then not at all. Pure."""

from dataclasses import dataclass, field

BREAKER_FIRST_S = 0.25
BREAKER_MAX_S = 30.0
MAX_DOUBLINGS = 16
PROBE_S = 2.0
"""After a failure one request at a time tries an instance or link, for so long at most, until one succeeds."""
FAILURE_WINDOW_S = 60.0
MAX_FAILURE_TIMES = 1000


@dataclass(slots=True)
class CircuitBreaker:
    """Whether to use an instance, or the path between two: after each failure less often, after a success again."""

    num_failures: int = 0
    """Incidents since the last success: failures of what was under way at the same time are one."""
    open_until: float = 0.0
    probe_until: float = 0.0
    failed_at: list[float] = field(default_factory=list)
    _incident_at: float = 0.0

    def allows(self, now: float) -> bool:
        return self.num_failures == 0 or now >= max(self.open_until, self.probe_until)

    def started(self, now: float) -> None:
        """Notes that a request goes there. After failures, no other follows until its result is known."""
        if self.num_failures:
            self.probe_until = now + PROBE_S

    def failed(self, now: float, started_at: float) -> None:
        """Notes the failure of something that started at `started_at`."""
        self.failed_at = [*self.failed_at[-MAX_FAILURE_TIMES:], now]
        if self.num_failures and started_at <= self._incident_at:
            return
        self._incident_at = now
        self.num_failures += 1
        self.probe_until = 0.0
        num_doublings = min(self.num_failures - 1, MAX_DOUBLINGS)
        self.open_until = now + min(BREAKER_FIRST_S * 2**num_doublings, BREAKER_MAX_S)

    def succeeded(self) -> None:
        self.num_failures = 0

    def num_recent_failures(self, now: float) -> int:
        """Returns the number of failures within the last minute."""
        return sum(at > now - FAILURE_WINDOW_S for at in self.failed_at)
