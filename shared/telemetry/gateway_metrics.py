"""The gateway's Prometheus metrics, in a registry of their own, and the traffic of groups that the controller reads."""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from shared.messages.records import Traffic

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
MAX_SCENARIO_LABELS = 64
MAX_REASON_LABELS = 16
OTHER = "other"


class BoundedLabels:
    """Label values for Prometheus: the first `max_values` names are kept, and all others are counted as `other`."""

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        """Returns the label value under which `name` is counted."""
        if name not in self._known:
            if len(self._known) >= self._max_values:
                return OTHER
            self._known.add(name)
        return name


class TokenCounts:
    """What one endpoint counts for each token: plain numbers, because the client library takes locks."""

    __slots__ = ("itl_buckets", "itl_sum_s", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.itl_buckets = [0] * (len(ITL_BUCKETS_S) + 1)
        self.itl_sum_s = 0.0

    def observe_itl(self, seconds: float) -> None:
        self.itl_buckets[bisect_left(ITL_BUCKETS_S, seconds)] += 1
        self.itl_sum_s += seconds


class EndpointMetrics:
    """One endpoint's metrics, looked up by their label once."""

    def __init__(self, metrics: "GatewayMetrics", endpoint: str) -> None:
        self.tokens = TokenCounts()
        self.in_flight = metrics.in_flight.labels(endpoint)
        self.ttft = metrics.ttft.labels(endpoint)
        self.tpot = metrics.tpot.labels(endpoint)
        self.e2e = metrics.e2e.labels(endpoint)


class GatewayMetrics(Collector):
    """What a gateway counts. `endpoint` is `chat`, `completions` or another API's name.

    TTFT and E2E are of each choice, from the first byte of its request; ITL is between two tokens of a choice, and TPOT
    its mean. `code` is `ok` or the code of a RequestError (`shared/errors.py`).
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by_endpoint = ["endpoint"]
        self.requests = Counter(
            "pdserve_requests", "Requests ended, by outcome.", ["endpoint", "code"], registry=registry
        )
        self.in_flight = Gauge("pdserve_requests_in_flight", "Open requests.", by_endpoint, registry=registry)
        self.ttft = Histogram(
            "pdserve_ttft_seconds", "Time to first token.", by_endpoint, registry=registry, buckets=TTFT_BUCKETS_S
        )
        self.tpot = Histogram(
            "pdserve_tpot_seconds",
            "Time per output token after the first.",
            by_endpoint,
            registry=registry,
            buckets=ITL_BUCKETS_S,
        )
        self.e2e = Histogram(
            "pdserve_e2e_seconds", "Time to last token.", by_endpoint, registry=registry, buckets=E2E_BUCKETS_S
        )
        self.prompt_tokens = _counter(registry, "prompt_tokens", "Prompt tokens of requests.")
        self._cache_queries = _counter(
            registry, "prefix_cache_query_tokens", "Prompt tokens looked up in prefix caches.", ["scenario"]
        )
        self._cache_hits = _counter(
            registry, "prefix_cache_hit_tokens", "Prompt tokens found in prefix caches.", ["scenario"]
        )
        self._retries = _counter(registry, "retries", "Attempts after the first of a request.")
        self._lost_instances = _counter(registry, "lost_instances", "Instances found dead while they were in use.")
        self._failed_attempts = _counter(registry, "failed_attempts", "Failed attempts, by reason.", ["reason"])
        self._hedged_asks = _counter(
            registry, "hedged_asks", "Second instances asked because the first was slow to answer."
        )
        self._pauses = _counter(registry, "instance_pauses", "Times that a failing instance was not asked for a while.")
        self._scenarios = BoundedLabels(MAX_SCENARIO_LABELS)
        self._reasons = BoundedLabels(MAX_REASON_LABELS)
        self._endpoints: dict[str, EndpointMetrics] = {}
        registry.register(self)

    def endpoint(self, name: str) -> EndpointMetrics:
        """Returns the metrics of an API's endpoint; names must be few."""
        found = self._endpoints.get(name)
        if found is None:
            found = self._endpoints[name] = EndpointMetrics(self, name)
        return found

    def count_cached(self, scenario: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Counts a prompt that a group of this scenario has computed, except for what was cached."""
        label = self._scenarios.label(scenario)
        self._cache_queries.labels(label).inc(num_prompt_tokens)
        self._cache_hits.labels(label).inc(num_cached_tokens)

    def count_retry(self) -> None:
        """Counts an attempt after the first of a request."""
        self._retries.inc()

    def count_lost_instance(self) -> None:
        """Counts an instance that died or became unreachable while requests used it."""
        self._lost_instances.inc()

    def count_failed_attempt(self, reason: str) -> None:
        """Counts a failed attempt. Reasons must be few; those beyond the first sixteen are counted as `other`."""
        self._failed_attempts.labels(self._reasons.label(reason)).inc()

    def count_hedged_ask(self) -> None:
        """Counts a second instance that was asked in parallel because the first was slow to answer."""
        self._hedged_asks.inc()

    def count_pause(self) -> None:
        """Counts an instance, or a pair of instances, that is not asked for a while after failures."""
        self._pauses.inc()

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics that are counted for each token."""
        itl = HistogramMetricFamily("pdserve_itl_seconds", "Inter-token latency.", labels=["endpoint"])
        for name, endpoint in self._endpoints.items():
            tokens = endpoint.tokens
            itl.add_metric([name], _cumulative(tokens.itl_buckets), tokens.itl_sum_s)
        yield itl
        num_tokens = sum(endpoint.tokens.num_tokens for endpoint in self._endpoints.values())
        yield CounterMetricFamily("pdserve_generated_tokens", "Tokens generated for clients.", num_tokens)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ChoiceTimer:
    """Observes one choice: `token()` at each token, `end()` at the last.

    Args:
        metrics: where to count.
        endpoint: the label.
        arrived_at: `time.monotonic()` when the first byte of the request was read.
    """

    __slots__ = ("_arrived_at", "_endpoint", "_first_at", "_last_at", "_num_tokens")

    def __init__(self, metrics: GatewayMetrics, endpoint: str, arrived_at: float) -> None:
        self._endpoint = metrics.endpoint(endpoint)
        self._arrived_at = arrived_at
        self._first_at = 0.0
        self._last_at = arrived_at
        self._num_tokens = 0

    def token(self, now: float) -> None:
        """Observes a token that arrived at `now` (`time.monotonic()`)."""
        counts = self._endpoint.tokens
        if self._num_tokens == 0:
            self._first_at = now
            self._endpoint.ttft.observe(now - self._arrived_at)
        else:
            counts.observe_itl(now - self._last_at)
        self._last_at = now
        self._num_tokens += 1
        counts.num_tokens += 1

    def end(self) -> None:
        """Observes that the latest token was the last."""
        self._endpoint.e2e.observe(self._last_at - self._arrived_at)
        if self._num_tokens > 1:
            self._endpoint.tpot.observe((self._last_at - self._first_at) / (self._num_tokens - 1))


@dataclass(slots=True)
class TrafficCounts:
    """A `Traffic` that grows. Times are `time.monotonic()`."""

    open: int = 0
    num_arrived: int = 0
    num_done: int = 0
    num_shed: int = 0
    num_first_tokens: int = 0
    num_in_time: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0

    def first_token(self, arrived_at: float, objective_s: float | None) -> None:
        """Counts the first token of a request. Without an objective, every first token is in time."""
        ttft_s = time.monotonic() - arrived_at
        self.num_first_tokens += 1
        self.ttft_s += ttft_s
        self.num_in_time += objective_s is None or ttft_s <= objective_s

    def done(self, arrived_at: float, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Counts a request that has all its tokens."""
        self.num_done += 1
        self.prompt_tokens += num_prompt_tokens
        self.output_tokens += num_output_tokens
        self.e2e_s += time.monotonic() - arrived_at

    def snapshot(self, waiting_prefill: int, waiting_decode: int) -> Traffic:
        """Returns the counts as a record."""
        return Traffic(**asdict(self), waiting_prefill=waiting_prefill, waiting_decode=waiting_decode)


def _counter(registry: CollectorRegistry, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"pdserve_{name}", help_text, labels, registry=registry)


def _cumulative(buckets: Sequence[int]) -> list[tuple[str, float]]:
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, ITL_BUCKETS_S), "+Inf"), buckets, strict=True):
        total += count
        found.append((bound, total))
    return found
