"""Prometheus metrics of one server (design: api.md, Metrics). Own registry, no globals.

The engine thread writes through the `StatsListener` methods, the event loop through `on_...`
of its own; the clients of prometheus_client lock for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.registry import Collector

from momaserve.async_engine import AsyncEngine
from momaserve.outputs import FinishReason, RequestStats
from momaserve.stats import StepStats
from momaserve_server.routing_metrics import RoutingCollector, RoutingTotals

DEFAULT_PREFIX = "momaserve"
VLLM_PREFIX = "vllm"
VLLM_NAMES = {"iteration_tokens": "iteration_tokens_total"}
"""Where vLLM has another name for the same; the others differ by their prefix alone."""

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
SLOW_S = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

REJECTED = ("invalid", "queue_full", "draining", "not_ready")
ABORTED = ("disconnect", "api", "drain")
"""Reasons, shown from the start: a counter that appears with its first event hides it from
Prometheus' `rate`."""
FINISHED = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TIMEOUT)


class ServerMetrics:
    """A `momaserve.stats.StatsListener` that keeps what `/metrics` shows."""

    def __init__(self, prefix: str = DEFAULT_PREFIX, *, model_name: str = "") -> None:
        """
        Args:
            prefix: first word of all names. With "vllm" they are vLLM's own, and all samples
                have its labels, by which dashboards select.
            model_name: what these labels call the model.
        """
        self.registry = CollectorRegistry()  # under names without prefix
        if prefix == VLLM_PREFIX:
            labels = {"model_name": model_name, "engine": "0"}
            self._shown = _Shown(self.registry, f"{VLLM_PREFIX}:", VLLM_NAMES, labels)
        else:
            self._shown = _Shown(self.registry, f"{prefix}_", {}, {})
        self._routing = RoutingCollector("")
        self.registry.register(self._routing)

        self._running = self._gauge("num_requests_running", "Requests in execution.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting to be processed.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV blocks in use, 0 to 1.")
        self._healthy = self._gauge("engine_healthy", "1 while the engine makes progress.")
        self._ready = self._gauge("engine_ready", "1 while new requests are taken.")

        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generated = self._counter(
            "generation_tokens", "Tokens generated, by modality.", "modality"
        )
        self._success = self._counter(
            "request_success", "Requests that finished, by reason.", "finished_reason"
        )
        self._rejected = self._counter(
            "requests_rejected", "Requests refused before they started, by reason.", "reason"
        )
        self._aborted = self._counter(
            "requests_aborted", "HTTP requests ended before they finished, by reason.", "reason"
        )
        for modality in ("text", "image"):
            self._generated.labels(modality)
        for finished in (*FINISHED, "error"):
            self._success.labels(str(finished))
        for rejected in REJECTED:
            self._rejected.labels(rejected)
        for aborted in ABORTED:
            self._aborted.labels(aborted)
        self._images = self._counter("images_generated", "Pictures finished.")
        self._cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self._cache_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens that were found in the prefix cache."
        )
        self._preemptions = self._counter(
            "num_preemptions", "Running requests that gave up their memory for others."
        )

        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", (*FAST_S, *SLOW_S[9:])
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between tokens of a request.", (*FAST_S, 2.5, 5.0)
        )
        self._per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a request, after its first.",
            (*FAST_S, 2.5, 5.0),
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", SLOW_S)
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue.", SLOW_S)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Time computing the prompt.", SLOW_S
        )
        self._decode = self._histogram("request_decode_time_seconds", "Time generating.", SLOW_S)
        self._image_latency = self._histogram(
            "image_latency_seconds", "begin_image to the last token of a picture.", SLOW_S
        )
        self._step_tokens = self._histogram(
            "iteration_tokens", "Tokens computed in one step.", STEP_TOKENS
        )
        self._step = self._histogram("step_seconds", "Time of one step.", (*FAST_S, 2.5, 5.0))
        self._step_predicted = self._histogram(
            "step_seconds_predicted",
            "What the scheduler expected of a step; nothing unless it is router-aware.",
            (*FAST_S, 2.5, 5.0),
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self._request_generation = self._histogram(
            "request_generation_tokens", "Tokens that a request generated.", TOKENS
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def on_step(self, stats: StepStats) -> None:
        """One step of the engine. The gauges are read when `/metrics` is, not here."""
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated.labels("text").inc(stats.generated_text_tokens)
        self._generated.labels("image").inc(stats.generated_image_tokens)
        self._images.inc(stats.images)
        self._cache_queries.inc(stats.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits)
        self._preemptions.inc(stats.num_preemptions)
        self._step.observe(stats.step_s)
        if stats.predicted_s is not None:
            self._step_predicted.observe(stats.predicted_s)
        self._step_tokens.observe(stats.num_tokens)
        for latency_s in stats.first_token_latencies_s:
            self._first_token.observe(latency_s)
        for latency_s in stats.inter_token_latencies_s:
            self._inter_token.observe(latency_s)
        self._routing.add(stats)

    def on_finished(self, stats: RequestStats) -> None:
        """One choice ended. Aborted ones are counted by whoever ended them."""
        if stats.finish_reason not in FINISHED:
            if stats.finish_reason is FinishReason.ERROR:
                self._success.labels("error").inc()
            return
        self._success.labels(str(stats.finish_reason)).inc()
        self._e2e.observe(stats.e2e_s)
        self._queue.observe(stats.queue_s)
        if stats.finish_reason is not FinishReason.TIMEOUT or stats.num_generated_tokens:
            self._prefill.observe(stats.prefill_s)
            self._decode.observe(stats.decode_s)
        self._request_prompt.observe(stats.num_prompt_tokens)
        self._request_generation.observe(stats.num_generated_tokens)
        if stats.time_per_output_token_s is not None:
            self._per_output_token.observe(stats.time_per_output_token_s)
        for latency_s in stats.image_latencies_s:
            self._image_latency.observe(latency_s)

    def routing_totals(self) -> RoutingTotals:
        """How the experts were used since the start."""
        return self._routing.totals()

    def on_rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def on_aborted(self, reason: str) -> None:
        self._aborted.labels(reason).inc()

    def render(self, async_engine: AsyncEngine) -> bytes:
        """The text of `/metrics`, with the gauges as they are now."""
        snapshot = async_engine.snapshot()
        self._running.set(snapshot.num_running)
        self._waiting.set(snapshot.num_waiting)
        self._kv_usage.set(snapshot.kv_cache_usage)
        self._healthy.set(async_engine.is_healthy)
        self._ready.set(async_engine.is_ready)
        return generate_latest(self._shown)


class _Shown(Collector):
    """The metrics under the names that the operator wants.

    Leaves out the library's `_created` series: one more per counter, which nobody reads.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        prefix: str,
        names: Mapping[str, str],
        labels: Mapping[str, str],
    ) -> None:
        self._registry = registry
        self._prefix = prefix
        self._names = names
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            name = self._prefix + self._names.get(metric.name, metric.name)
            shown = Metric(name, metric.documentation, metric.type, metric.unit)
            for sample in metric.samples:
                suffix = sample.name.removeprefix(metric.name)
                if suffix != "_created":
                    labels = {**self._labels, **sample.labels}
                    shown.add_sample(name + suffix, labels, sample.value)
            yield shown
