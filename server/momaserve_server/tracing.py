"""OpenTelemetry: one span per generating request, without anything of what was asked or answered.

The names are those of the gen_ai conventions as vLLM uses them. The packages are optional: the
extra `otel`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from momaserve import __version__
from momaserve.errors import ConfigError
from momaserve_server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

SERVICE_NAME = "momaserve"
SPAN_NAME = "llm_request"
"""vLLM's name of it."""
FLUSH_TIMEOUT_MS = 5_000
"""For the last spans when the server ends."""


class RequestTracer:
    """A listener of `RecordMiddleware`. Owns its exporter: whoever made it closes it."""

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        """
        Args:
            processor: takes the spans; a batching one keeps the event loop free.
        """
        resources = import_module("opentelemetry.sdk.resources")
        sdk = import_module("opentelemetry.sdk.trace")
        self._trace = import_module("opentelemetry.trace")
        propagation = import_module("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME of the environment come before ours.
        ours = resources.Resource({"service.name": SERVICE_NAME, "service.version": __version__})
        found = resources.OTELResourceDetector().detect()
        self._provider = sdk.TracerProvider(
            resource=ours.merge(found), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("momaserve_server", __version__)
        self._model_name = model_name

    def __call__(self, record: RequestRecord) -> None:
        if record.usage is None:
            return
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(record.trace_headers),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes_of(record) | {"gen_ai.response.model": self._model_name},
            start_time=record.started_ns,
        )
        if record.error_code is not None:
            status = self._trace.Status(self._trace.StatusCode.ERROR, record.error_code)
            span.set_status(status)
        span.end(record.started_ns + int(record.duration_s * 1e9))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def attributes_of(record: RequestRecord) -> dict[str, Any]:
    """Attributes of a generating request's span; times are in seconds.

    Of several answers, the waiting and the first token are those of the quickest, decoding and
    the whole are those of the slowest. A stop string ends an answer without the engine's timings;
    then the first token and the whole are what the server saw.
    """
    params, usage = record.params, record.usage
    assert params is not None and usage is not None
    attributes: dict[str, Any] = {
        "gen_ai.request.id": record.reply_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.text.temperature),
        "gen_ai.request.top_p": float(params.text.top_p),
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": [
            str(reason) for _, reason in sorted(record.finish_reasons.items())
        ],
        "gen_ai.latency.time_to_first_token": record.first_token_s,
        "gen_ai.latency.e2e": record.duration_s,
    }
    if record.stats:
        first = min(record.stats, key=lambda stats: stats.queue_s + stats.prefill_s)
        decode_s = max(stats.decode_s for stats in record.stats)
        attributes |= {
            "gen_ai.latency.time_in_queue": first.queue_s,
            "gen_ai.latency.time_in_model_prefill": first.prefill_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": first.prefill_s + decode_s,
        }
        if len(record.stats) == len(record.finish_reasons):  # of all answers
            attributes["gen_ai.latency.e2e"] = max(stats.e2e_s for stats in record.stats)
            if usage.completion_tokens:
                ttft_s = first.queue_s + first.prefill_s
                attributes["gen_ai.latency.time_to_first_token"] = ttft_s
    return {name: value for name, value in attributes.items() if value is not None}


def otlp_tracer(endpoint: str, model_name: str) -> RequestTracer:
    """Spans go to `endpoint` in batches, from a thread of their own.

    Raises:
        ConfigError: the packages are not installed.
    """
    require_otel()
    exporter = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    export = import_module("opentelemetry.sdk.trace.export")
    processor = export.BatchSpanProcessor(exporter.OTLPSpanExporter(endpoint=endpoint))
    return RequestTracer(processor, model_name)


def require_otel() -> None:
    """Raises ConfigError, which names the extra, unless what tracing needs is installed."""
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs the package {error.name!r}: "
                "pip install 'momaserve[otel]'"
            ) from None
