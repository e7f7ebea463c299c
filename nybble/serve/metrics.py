"""What the server counts, in Prometheus' text format.

Histograms are filled by the routes. What the engine knows is read when somebody asks, by a
collector, so that the two can never disagree.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nybble.engine.engine import Engine

# Series are there from the beginning, so that a rate sees the first one counted, too.
_FINISHED = ("stop", "length", "abort", "error")
_REJECTED = ("invalid_request", "context_length_exceeded", "model_not_found", "rate_limit_exceeded")

_INF = float("inf")
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, _INF)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2.5, _INF)
_WHOLE_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, _INF)
_TOKENS = (*(float(4**power) for power in range(9)), _INF)


class Metrics:
    """The counts of one server, in a registry of their own.

    Call `arrived` for each request, then either `rejected` or, when its last token has gone,
    `finished`; in between `first_token` and `token`. All seconds are the client's: from its
    arrival, or from the token before. An engine is read from `watch` on.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._arrived = Counter(
            "nybble_requests_arrived", "Requests for an answer, good or bad.", registry=registry
        )
        self._in_progress = Gauge(
            "nybble_requests_in_progress",
            "Requests that have arrived and were neither finished nor rejected yet.",
            registry=registry,
        )
        self._finished = Counter(
            "nybble_requests_finished",
            "Requests that ran, by why they ended; abort: the client hung up.",
            ["reason"],
            registry=registry,
        )
        self._rejected = Counter(
            "nybble_requests_rejected",
            "Requests that never ran, by the code of the error they got.",
            ["reason"],
            registry=registry,
        )
        self._first_token = self._histogram(
            "nybble_time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN
        )
        self._between_tokens = self._histogram(
            "nybble_inter_token_latency_seconds", "From one token to the next.", _BETWEEN_TOKENS
        )
        self._latency = self._histogram(
            "nybble_request_latency_seconds", "Arrival to last token.", _WHOLE_REQUEST
        )
        self._prompts = self._histogram(
            "nybble_request_prompt_tokens", "Tokens of a finished request's prompt.", _TOKENS
        )
        self._answers = self._histogram(
            "nybble_request_generated_tokens", "Tokens of a finished request's answer.", _TOKENS
        )
        for reason in _FINISHED:
            self._finished.labels(reason)
        for reason in _REJECTED:
            self._rejected.labels(reason)
        ProcessCollector(registry=registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Show an engine's load and counters too; once, when it has been loaded."""
        self.registry.register(_EngineCollector(engine))

    def arrived(self) -> None:
        self._arrived.inc()
        self._in_progress.inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def token(self, seconds: float) -> None:
        self._between_tokens.observe(seconds)

    def finished(self, reason: str, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        """reason: "stop", "length", "abort" or "error"."""
        self._in_progress.dec()
        self._finished.labels(reason).inc()
        self._latency.observe(seconds)
        self._prompts.observe(prompt_tokens)
        self._answers.observe(new_tokens)

    def rejected(self, reason: str) -> None:
        """reason: a code of the API, such as "context_length_exceeded"; never a user's text."""
        self._in_progress.dec()
        self._rejected.labels(reason).inc()

    def render(self) -> bytes:
        """The page that Prometheus reads, of type `content_type`."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine at each scrape. Its thread goes on meanwhile: sizes are read, no more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load, done = self._engine.load, self._engine.counters
        yield GaugeMetricFamily(
            "nybble_requests_running", "Requests in the engine's steps.", load.running
        )
        yield GaugeMetricFamily(
            "nybble_requests_waiting", "Requests in the engine's queue.", load.waiting
        )
        pages = GaugeMetricFamily(
            "nybble_kv_pages",
            "Pages of the KV cache; cached: prefixes kept for later requests.",
            labels=["state"],
        )
        pages.add_metric(["used"], load.pages_used)
        pages.add_metric(["cached"], load.pages_cached)
        # A step may come between the two readings.
        pages.add_metric(["free"], max(load.num_pages - load.pages_used - load.pages_cached, 0))
        yield pages
        yield CounterMetricFamily(
            "nybble_prompt_tokens", "Tokens of prompts read.", done.prompt_tokens
        )
        yield CounterMetricFamily(
            "nybble_prefix_cache_hit_tokens",
            "Those of them that were found in the cache.",
            done.reused_tokens,
        )
        yield CounterMetricFamily("nybble_generated_tokens", "Tokens generated.", done.new_tokens)
        yield CounterMetricFamily("nybble_engine_steps", "Forward passes.", done.steps)
        yield CounterMetricFamily(
            "nybble_preemptions",
            "Requests put back into the queue because pages ran out.",
            self._engine.scheduler.preemptions,
        )
