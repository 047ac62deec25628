"""The gateway's Prometheus metrics, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class GatewayMetrics:
    """What a gateway counts. `endpoint` is `chat`, `completions` or another API's name.

    TTFT and E2E are of each choice, from the arrival of its request at this gateway; ITL is between two tokens of a
    choice, and TPOT its mean. `code` is `ok` or the code of a RequestError (`shared/errors.py`).
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pdserve_requests", "Requests ended, by outcome.", ["endpoint", "code"], registry=self.registry
        )
        self.in_flight = Gauge(
            "pdserve_requests_in_flight", "Requests being answered.", ["endpoint"], registry=self.registry
        )
        self.ttft = Histogram(
            "pdserve_ttft_seconds", "Time to first token.", ["endpoint"], registry=self.registry, buckets=TTFT_BUCKETS_S
        )
        self.itl = Histogram(
            "pdserve_itl_seconds", "Inter-token latency.", ["endpoint"], registry=self.registry, buckets=ITL_BUCKETS_S
        )
        self.tpot = Histogram(
            "pdserve_tpot_seconds",
            "Time per output token after the first.",
            ["endpoint"],
            registry=self.registry,
            buckets=ITL_BUCKETS_S,
        )
        self.e2e = Histogram(
            "pdserve_e2e_seconds", "Time to last token.", ["endpoint"], registry=self.registry, buckets=E2E_BUCKETS_S
        )
        self.prompt_tokens = Counter("pdserve_prompt_tokens", "Prompt tokens of requests.", registry=self.registry)
        self.generated_tokens = Counter(
            "pdserve_generated_tokens", "Tokens generated for clients.", registry=self.registry
        )

        self._cache_queries = Counter(
            "pdserve_prefix_cache_query_tokens",
            "Prompt tokens looked for in prefix caches.",
            ["scenario"],
            registry=self.registry,
        )
        self._cache_hits = Counter(
            "pdserve_prefix_cache_hit_tokens",
            "Prompt tokens found in prefix caches.",
            ["scenario"],
            registry=self.registry,
        )

    def count_cached(self, scenario: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A prompt has been computed by a group of this scenario, except for what was cached."""
        self._cache_queries.labels(scenario).inc(num_prompt_tokens)
        self._cache_hits.labels(scenario).inc(num_cached_tokens)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ChoiceTimer:
    """Observes one choice: `token()` at each token, `end()` at the last.

    Args:
        metrics: where to.
        endpoint: the label.
        arrived_s: when the request arrived, on the clock that `token` is given.
    """

    def __init__(self, metrics: GatewayMetrics, endpoint: str, arrived_s: float) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrived_s = arrived_s
        self._itl = metrics.itl.labels(endpoint)
        self._first_s: float | None = None
        self._last_s = arrived_s
        self._num_tokens = 0

    def token(self, now_s: float) -> None:
        """A token has come."""
        if self._first_s is None:
            self._first_s = now_s
            self._metrics.ttft.labels(self._endpoint).observe(now_s - self._arrived_s)
        else:
            self._itl.observe(now_s - self._last_s)
        self._last_s = now_s
        self._num_tokens += 1
        self._metrics.generated_tokens.inc()

    def end(self) -> None:
        """The last token has come."""
        self._metrics.e2e.labels(self._endpoint).observe(self._last_s - self._arrived_s)
        if self._first_s is not None and self._num_tokens > 1:
            tpot_s = (self._last_s - self._first_s) / (self._num_tokens - 1)
            self._metrics.tpot.labels(self._endpoint).observe(tpot_s)
