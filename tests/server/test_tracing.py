"""OpenTelemetry spans: one per generating request, with counts and times, and no content."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from momaserve.outputs import FinishReason, RequestStats
from momaserve.sampling import SamplingParams
from momaserve_server import cli
from momaserve_server.generation import TokenCounts
from momaserve_server.request_record import RequestRecord
from momaserve_server.tracing import RequestTracer, attributes_of, otlp_tracer
from tests.server.asgi import TIMEOUT_S, Call, chat_body, client_of, make_app
from tests.server.fake_engine import MODEL_NAME, TEXT, FakeAsyncEngine, byte_ids

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """An app whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        tracer = RequestTracer(SimpleSpanProcessor(self._exporter), MODEL_NAME)
        self.fake = FakeAsyncEngine()
        self.app = make_app(self.fake, listeners=(tracer,))

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        async with client_of(self.app) as client:
            return await client.post(path, json=body, headers=headers)

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def span(self) -> ReadableSpan:
        (span,) = self.spans()
        return span


@pytest.fixture
def traced() -> Traced:
    return Traced()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span(traced: Traced, stream: bool) -> None:
    body = chat_body(seed=5, stream=stream, temperature=0.5, top_p=0.9, max_tokens=40)
    response = await traced.post(CHAT, body, **{"X-Request-Id": "mine"})
    assert response.status_code == 200
    span = traced.span()
    found = attributes(span)
    assert span.name == "llm_request"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None
    assert span.end_time is not None
    seen_s = found.pop("gen_ai.latency.e2e")
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seen_s, abs=1e-6)
    assert 0 < found.pop("gen_ai.latency.time_to_first_token") <= seen_s
    assert found == {
        "gen_ai.request.id": "chatcmpl-mine",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.model": MODEL_NAME,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.prompt_tokens": 4,
        "gen_ai.usage.completion_tokens": len(byte_ids(f"{TEXT}5")),
    }
    assert dict(span.resource.attributes)["service.name"] == "momaserve"


async def test_the_callers_trace_goes_on(traced: Traced) -> None:
    parent = f"00-{TRACE_ID}-{PARENT_ID}-01"
    await traced.post(CHAT, chat_body(), traceparent=parent, tracestate="vendor=1")
    await traced.post(CHAT, chat_body())
    await traced.post(CHAT, chat_body(), traceparent="00-nonsense-01")
    first, *others = traced.spans()
    assert first.parent is not None
    assert first.context is not None
    assert (first.context.trace_id, first.parent.span_id) == (int(TRACE_ID, 16), int(PARENT_ID, 16))
    assert first.context.trace_state.get("vendor") == "1"
    for span in others:
        assert span.parent is None
        assert span.context is not None
        assert span.context.trace_id != int(TRACE_ID, 16)


async def test_a_caller_who_does_not_sample_is_heeded(traced: Traced) -> None:
    await traced.post(CHAT, chat_body(), traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00")
    assert traced.spans() == ()


async def test_what_generates_nothing_is_no_span(traced: Traced) -> None:
    async with client_of(traced.app) as client:
        await client.get("/v1/models")
        await client.get("/health")
    assert (await traced.post(CHAT, {})).status_code == 400
    assert (await traced.post(CHAT, chat_body(n=99))).status_code == 400
    assert traced.spans() == ()


@pytest.mark.parametrize(
    ("path", "body", "reasons", "tokens"),
    [
        (CHAT, chat_body(seed=5, stop="r"), ("stop",), 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}, ("length",) * 4, 4),
        (IMAGES, {"prompt": "hi", "n": 2}, ("stop", "stop"), 12),
    ],
)
async def test_every_route_and_every_choice(
    traced: Traced, path: str, body: dict[str, Any], reasons: tuple[str, ...], tokens: int
) -> None:
    assert (await traced.post(path, body)).status_code == 200
    found = attributes(traced.span())
    assert found["gen_ai.response.finish_reasons"] == reasons
    assert found["gen_ai.usage.completion_tokens"] == tokens
    assert found["gen_ai.request.n"] == body.get("n", 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_an_error(traced: Traced, stream: bool) -> None:
    traced.fake.failure = (2, FinishReason.ERROR)
    await traced.post(CHAT, chat_body(stream=stream))
    span = traced.span()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "generation_failed"
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_client_that_leaves_has_its_span(traced: Traced) -> None:
    traced.fake.gate = asyncio.Semaphore(1)
    call = Call(traced.app, CHAT, chat_body(stream=True))
    assert await call.start() == 200
    while b'"content":"G"' not in await call.body():
        pass
    call.hang_up()
    await call.ended()
    found = attributes(traced.span())
    assert found["gen_ai.usage.completion_tokens"] == 1
    assert found["gen_ai.response.finish_reasons"] == ()


async def test_nothing_of_the_content_is_in_a_span(traced: Traced) -> None:
    words = "a prompt in so many words"
    body = {"messages": [{"role": "user", "content": words}], "user": "me", "cache_salt": "salt"}
    await traced.post(CHAT, body | {"seed": 5, "stop": "never"}, baggage="secret=1")
    shown = traced.span().to_json()
    for text in (words, TEXT.strip(), "salt", "never", "secret"):
        assert text not in shown


# --- timings -------------------------------------------------------------------------------


def stats(queue_s: float, prefill_s: float, decode_s: float, e2e_s: float) -> RequestStats:
    return RequestStats(
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=4,
        num_generated_tokens=2,
        queue_s=queue_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        e2e_s=e2e_s,
        time_per_output_token_s=None,
    )


def record_of(*ended: RequestStats | None, num_tokens: int = 2) -> RequestRecord:
    """A request whose choices the engine ended with these timings, None for a stop string."""
    record = RequestRecord(duration_s=9.0, first_token_s=8.0)
    usage = TokenCounts(prompt_tokens=4, completion_tokens=num_tokens)
    record.begin("id", SamplingParams(n=len(ended)), usage)
    record.finish_reasons = dict.fromkeys(range(len(ended)), FinishReason.STOP)
    record.stats = [item for item in ended if item is not None]
    return record


LATENCIES = (
    "time_in_queue",
    "time_in_model_prefill",
    "time_in_model_decode",
    "time_in_model_inference",
    "time_to_first_token",
    "e2e",
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (record_of(stats(1, 2, 3, 6.5)), (1, 2, 3, 5, 3, 6.5)),
        (record_of(stats(2, 2, 1, 5), stats(1, 2, 3, 6.5)), (1, 2, 3, 5, 3, 6.5)),
        (record_of(None), (None, None, None, None, 8, 9)),
        (record_of(stats(1, 2, 3, 6.5), None), (1, 2, 3, 5, 8, 9)),
        (record_of(stats(1, 2, 0, 3), num_tokens=0), (1, 2, 0, 2, 8, 3)),
    ],
)
def test_times_are_the_engines_where_it_tells_them(
    record: RequestRecord, expected: tuple[float | None, ...]
) -> None:
    found = attributes_of(record)
    assert tuple(found.get(f"gen_ai.latency.{name}") for name in LATENCIES) == expected


# --- the way out ---------------------------------------------------------------------------


@contextmanager
def collector() -> Generator[tuple[str, list[tuple[str, bytes]]], None, None]:
    """A receiver of OTLP over HTTP: its URL, and (path, body) of what it got."""
    got: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join(TIMEOUT_S)


def test_spans_leave_by_otlp_before_the_server_ends() -> None:
    with collector() as (url, got):
        tracer = otlp_tracer(f"{url}/v1/traces", MODEL_NAME)
        tracer(record_of(stats(1, 2, 3, 6.5)))
        tracer(record_of(None))
        tracer.close()
    ((path, body),) = got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (scope,) = resource.scope_spans
    assert [span.name for span in scope.spans] == ["llm_request"] * 2


def test_without_the_packages_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "momaserve_server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    words = ["serve", "--port", "0", "--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "otlp_traces_endpoint needs the package 'opentelemetry.sdk.resources'" in line
    assert "pip install 'momaserve[otel]'" in line
