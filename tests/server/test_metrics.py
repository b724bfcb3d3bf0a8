"""`/metrics`: exact counts, names as documented."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from momaserve.async_engine import AsyncEngine
from momaserve.outputs import FinishReason, RequestStats
from momaserve.stats import StatsListener, StepStats
from momaserve_server.metrics import ServerMetrics
from tests.server.asgi import chat_body, client_of, make_app
from tests.server.fake_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio

NAMES = {
    "engine_healthy",
    "engine_ready",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "requests_rejected",
    "requests_aborted",
    "images_generated",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "image_latency_seconds",
    "iteration_tokens",
    "step_seconds",
    "step_seconds_predicted",
    "request_prompt_tokens",
    "request_generation_tokens",
    "expert_tokens",
    "experts_per_token",
    "tokens_without_expert",
    "depth_tokens",
}
"""As in the documentation; the format adds `_total` to the samples of counters."""

STEP = StepStats(
    num_running=2,
    num_waiting=1,
    kv_cache_usage=0.5,
    num_tokens=12,
    prompt_tokens=9,
    generated_text_tokens=1,
    generated_image_tokens=2,
    images=1,
    num_preemptions=3,
    prefix_cache_queries=9,
    prefix_cache_hits=4,
    step_s=0.02,
    predicted_s=0.03,
    first_token_latencies_s=(0.3,),
    inter_token_latencies_s=(0.004, 0.006),
    expert_tokens=((0, "text", (3, 4)), (1, "image", (0, 5))),
    experts_per_token={"text": (5, 3, 2), "image": (1, 1, 0)},
    depth_tokens=((0, 3, 9),),
)


def request_stats(reason: FinishReason, **changes: object) -> RequestStats:
    fields: dict[str, object] = {
        "finish_reason": reason,
        "num_prompt_tokens": 9,
        "num_generated_tokens": 70,
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 0.7,
        "e2e_s": 1.0,
        "time_per_output_token_s": 0.01,
        "image_latencies_s": (0.4, 0.6),
    }
    return RequestStats(**(fields | changes))  # type: ignore[arg-type]


def samples(metrics: ServerMetrics, engine: AsyncEngine | None = None) -> dict[str, float]:
    text = metrics.render(engine or FakeAsyncEngine().as_engine()).decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            name = sample.name.removeprefix("momaserve_")
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


async def test_names_are_the_documented_ones() -> None:
    text = ServerMetrics().render(FakeAsyncEngine().as_engine()).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families == {f"momaserve_{name}" for name in NAMES}


async def test_it_is_a_listener() -> None:
    listener: StatsListener = ServerMetrics()
    listener.on_step(STEP)


async def test_a_step_counts_exactly() -> None:
    metrics = ServerMetrics()
    metrics.on_step(STEP)
    metrics.on_step(STEP)
    found = samples(metrics)
    expected = {
        "prompt_tokens_total": 18,
        "generation_tokens_total{modality=text}": 2,
        "generation_tokens_total{modality=image}": 4,
        "images_generated_total": 2,
        "prefix_cache_queries_total": 18,
        "prefix_cache_hits_total": 8,
        "num_preemptions_total": 6,
        "step_seconds_count": 2,
        "step_seconds_sum": 0.04,
        "step_seconds_predicted_count": 2,
        "step_seconds_predicted_sum": 0.06,
        "iteration_tokens_sum": 24,
        "iteration_tokens_bucket{le=8.0}": 0,
        "iteration_tokens_bucket{le=16.0}": 2,
        "time_to_first_token_seconds_count": 2,
        "time_to_first_token_seconds_sum": 0.6,
        "inter_token_latency_seconds_count": 4,
        "inter_token_latency_seconds_bucket{le=0.001}": 0,
        "inter_token_latency_seconds_bucket{le=0.005}": 2,
        "inter_token_latency_seconds_bucket{le=0.01}": 4,
        "expert_tokens_total{expert=0,group=text,layer=0}": 6,
        "expert_tokens_total{expert=1,group=text,layer=0}": 8,
        "expert_tokens_total{expert=1,group=image,layer=1}": 10,
        "experts_per_token_bucket{group=text,le=0.0}": 10,
        "experts_per_token_bucket{group=text,le=1.0}": 16,
        "experts_per_token_bucket{group=text,le=2.0}": 20,
        "experts_per_token_bucket{group=text,le=+Inf}": 20,
        "experts_per_token_count{group=text}": 20,
        "experts_per_token_sum{group=text}": 14,
        "tokens_without_expert_total{group=text}": 10,
        "tokens_without_expert_total{group=image}": 2,
        "depth_tokens_total{layer=0,taken=true}": 6,
        "depth_tokens_total{layer=0,taken=false}": 18,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


async def test_finished_requests_count_exactly() -> None:
    metrics = ServerMetrics()
    metrics.on_finished(request_stats(FinishReason.STOP))
    metrics.on_finished(request_stats(FinishReason.LENGTH, time_per_output_token_s=None))
    metrics.on_finished(request_stats(FinishReason.ABORT))
    metrics.on_finished(request_stats(FinishReason.ERROR))
    found = samples(metrics)
    expected = {
        "request_success_total{finished_reason=stop}": 1,
        "request_success_total{finished_reason=length}": 1,
        "request_success_total{finished_reason=error}": 1,
        "e2e_request_latency_seconds_count": 2,
        "e2e_request_latency_seconds_sum": 2.0,
        "request_queue_time_seconds_sum": 0.2,
        "request_prefill_time_seconds_sum": 0.4,
        "request_decode_time_seconds_sum": 1.4,
        "request_time_per_output_token_seconds_count": 1,
        "request_prompt_tokens_sum": 18,
        "request_generation_tokens_sum": 140,
        "image_latency_seconds_count": 4,
        "image_latency_seconds_sum": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert not any(found[name] for name in found if "abort" in name)  # the server counts those


async def test_timeouts_count_as_finished_and_those_never_begun_have_no_prefill_time() -> None:
    metrics = ServerMetrics()
    metrics.on_finished(request_stats(FinishReason.TIMEOUT))
    metrics.on_finished(
        request_stats(
            FinishReason.TIMEOUT,
            num_generated_tokens=0,
            time_per_output_token_s=None,
            prefill_s=0.0,
            decode_s=0.0,
            image_latencies_s=(),
        )
    )
    found = samples(metrics)
    expected = {
        "request_success_total{finished_reason=timeout}": 2,
        "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 2,
        "request_prefill_time_seconds_count": 1,
        "request_decode_time_seconds_count": 1,
        "request_generation_tokens_sum": 70,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


async def test_rejections_are_counted_by_reason() -> None:
    metrics = ServerMetrics()
    for reason in ("queue_full", "queue_full", "invalid"):
        metrics.on_rejected(reason)
    found = samples(metrics)
    assert found["requests_rejected_total{reason=queue_full}"] == 2
    assert found["requests_rejected_total{reason=invalid}"] == 1


async def test_gauges_show_the_engine_as_it_is() -> None:
    fake = FakeAsyncEngine()
    fake.running = {"a", "b"}
    async with client_of(make_app(fake)) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "momaserve_num_requests_running 2.0" in response.text
    assert "momaserve_num_requests_waiting 0.0" in response.text
    assert "momaserve_kv_cache_usage_perc 0.25" in response.text


async def test_stop_strings_are_no_aborts() -> None:
    """The engine, which counts finished requests, is told why this one ended."""
    metrics, engine = ServerMetrics(), FakeAsyncEngine()
    async with client_of(make_app(engine, metrics=metrics)) as client:
        await client.post("/v1/chat/completions", json=chat_body(stop="e"))
    assert engine.abort_reasons[0] is FinishReason.STOP
    assert not any(value for name, value in samples(metrics).items() if "aborted" in name)


# --- names ---------------------------------------------------------------------------------


VLLM_COUNTERS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
}
VLLM_GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
}
VLLM_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:iteration_tokens_total",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}
"""Names in vLLM's own /metrics, with its suffixes."""


def filled(prefix: str) -> str:
    metrics = ServerMetrics(prefix, model_name="tiny")
    metrics.on_step(STEP)
    metrics.on_finished(request_stats(FinishReason.STOP))
    return metrics.render(FakeAsyncEngine().as_engine()).decode()


async def test_vllms_names_types_and_labels() -> None:
    text = filled("vllm")
    types = dict(
        line.removeprefix("# TYPE ").split() for line in text.splitlines() if "# TYPE" in line
    )
    assert {name for name in VLLM_COUNTERS if types.get(name) == "counter"} == VLLM_COUNTERS
    assert {name for name in VLLM_GAUGES if types.get(name) == "gauge"} == VLLM_GAUGES
    assert {name for name in VLLM_HISTOGRAMS if types.get(name) == "histogram"} == VLLM_HISTOGRAMS
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("vllm:") for line in lines)
    assert all('engine="0"' in line and 'model_name="tiny"' in line for line in lines)
    labels = 'engine="0",finished_reason="stop",model_name="tiny"'
    assert f"vllm:request_success_total{{{labels}}} 1.0" in lines
    assert 'vllm:iteration_tokens_total_count{engine="0",model_name="tiny"} 1.0' in lines


@pytest.mark.parametrize("prefix", ["momaserve", "house_7", "vllm_like"])
async def test_another_prefix_changes_nothing_else(prefix: str) -> None:
    text = filled(prefix)
    assert text.replace(prefix + "_", "momaserve_") == filled("momaserve")
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families == {f"{prefix}_{name}" for name in NAMES}
