"""OpenTelemetry: one span per generating request, without anything of what was asked or answered.

The names are those of the gen_ai conventions as vLLM uses them. Needs the extra `otel`: import it
only where spans are wanted.
"""

from __future__ import annotations

from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from momaserve import __version__
from momaserve_server.request_record import RequestRecord

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
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of the environment come before ours.
        ours = Resource({"service.name": SERVICE_NAME, "service.version": __version__})
        self._provider = TracerProvider(
            resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("momaserve_server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def __call__(self, record: RequestRecord) -> None:
        if record.usage is None:
            return
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(record.trace_headers),
            kind=SpanKind.SERVER,
            attributes=attributes_of(record) | {"gen_ai.response.model": self._model_name},
            start_time=record.started_ns,
        )
        if record.error_code is not None:
            span.set_status(Status(StatusCode.ERROR, record.error_code))
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
    """Spans go to `endpoint` in batches, from a thread of their own."""
    return RequestTracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), model_name)
