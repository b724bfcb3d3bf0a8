"""`/metrics` over the real engine: every count is what arithmetic says, request by request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from momaserve.async_engine import AsyncEngine
from momaserve_server.app import create_app
from momaserve_server.metrics import ServerMetrics
from momaserve_server.settings import ServerSettings
from tests.engine.driver import make_engine
from tests.engine.threaded import HANG_S, Gate
from tests.models.factory import write_checkpoint
from tests.server.asgi import TIMEOUT_S, Call, client_of
from tests.server.test_media import ask, data_url, png
from tests.server.test_metrics import samples
from tests.tokens import builders

pytestmark = pytest.mark.anyio

NUM_LAYERS, DEPTH_LAYER = 2, 1
BLOCK_SIZE = 4
NUM_CODES = builders.NUM_TOKENS
"""Tokens of a picture between its marks."""
COMPLETIONS, CHAT, IMAGES = "/v1/completions", "/v1/chat/completions", "/v1/images/generations"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four experts for words and four for pictures, one layer depth-routed."""
    directory = tmp_path_factory.mktemp("metrics") / "tiny"
    experts = {"num_experts": 4, "intermediate_size": 8}
    config = builders.model_config(
        num_hidden_layers=NUM_LAYERS,
        expert_groups=[
            {"name": "text", "modalities": ["text"]} | experts,
            {"name": "image", "modalities": ["image"]} | experts,
        ],
        depth_routing={"layers": [DEPTH_LAYER], "capacity": 0.5},
    )
    write_checkpoint(directory, config)
    builders.write_checkpoint(directory)
    return directory


class Served:
    """The app over a real engine whose steps a test may hold up."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        options = {"max_num_requests": 4, "max_queued_requests": 3, **options}
        engine = make_engine(checkpoint, block_size=BLOCK_SIZE, threads=1, **options)
        self.gate = Gate(engine)
        self.metrics = ServerMetrics()
        self.engine = AsyncEngine(engine, listener=self.metrics)
        self.app = create_app(self.engine, ServerSettings(), metrics=self.metrics)
        self.client = client_of(self.app)

    async def post(self, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status_code == status, response.text
        reply: dict[str, Any] = response.json()
        return reply

    async def until_listened_to(self, num_choices: int) -> None:
        """Until so many choices have been handed to the engine thread."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.engine._streams) < num_choices:
                await asyncio.sleep(0)

    async def until_idle(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.to_thread(self.engine._idle.wait, TIMEOUT_S)

    def found(self) -> dict[str, float]:
        return samples(self.metrics, self.engine)


@asynccontextmanager
async def served(checkpoint: Path, **options: Any) -> AsyncGenerator[Served, None]:
    made = Served(checkpoint, **options)
    made.engine.start()
    try:
        async with made.client:
            yield made
    finally:
        made.gate.open()
        made.engine.close()


class Ledger:
    """What the metrics must say, summed up request by request."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.num_computed = 0

    def prompt(self, tokens: int, *, hits: int = 0, is_looked_up: bool = True) -> None:
        """A prompt was computed, or found in the cache."""
        self.counts["prompt_tokens_total"] += tokens
        self.counts["prefix_cache_queries_total"] += tokens if is_looked_up else 0
        self.counts["prefix_cache_hits_total"] += hits
        self.num_computed += tokens - hits

    def tokens(self, text: int, codes: int = 0, *, events: int | None = None) -> None:
        """A choice got tokens, in so many steps; all but the last one's are computed then."""
        events = text if events is None else events
        self.counts["generation_tokens_total{modality=text}"] += text
        self.counts["generation_tokens_total{modality=image}"] += codes
        self.counts["time_to_first_token_seconds_count"] += min(events, 1)
        self.counts["inter_token_latency_seconds_count"] += max(events - 1, 0)
        self.num_computed += max(events - 1, 0)

    def picture(self) -> None:
        """A choice drew a picture: begin_image came with the prompt, end_image with the end."""
        self.tokens(2, NUM_CODES, events=NUM_CODES)
        self.counts["images_generated_total"] += 1
        self.counts["image_latency_seconds_count"] += 1

    def end(self, reason: str, prompt: int, generated: int, *, began: bool = True) -> None:
        """A choice ended by itself."""
        self.counts[f"request_success_total{{finished_reason={reason}}}"] += 1
        for name in ("e2e_request_latency_seconds", "request_queue_time_seconds"):
            self.counts[f"{name}_count"] += 1
        for name in ("request_prefill_time_seconds", "request_decode_time_seconds"):
            self.counts[f"{name}_count"] += began
        self.counts["request_time_per_output_token_seconds_count"] += generated > 1
        for name, value in (("prompt", prompt), ("generation", generated)):
            self.counts[f"request_{name}_tokens_count"] += 1
            self.counts[f"request_{name}_tokens_sum"] += value

    def text(self, reason: str, prompt: int, generated: int, *, hits: int = 0) -> None:
        self.prompt(prompt, hits=hits)
        self.tokens(generated)
        self.end(reason, prompt, generated)


def ids(first: int, count: int) -> list[int]:
    """A prompt of text ids; another `first` is another prompt from its first block on."""
    return [builders.BOS, *range(first, first + count - 1)]


async def test_every_count_is_what_arithmetic_says(checkpoint: Path) -> None:
    """One request after the other, of every kind and with every end."""
    ledger = Ledger()
    async with served(checkpoint) as on:
        for hits in (0, 8):  # the second one finds two full blocks of four
            body = GREEDY | {"prompt": ids(20, 9), "max_tokens": 3}
            assert (await on.post(COMPLETIONS, **body))["usage"]["completion_tokens"] == 3
            ledger.text("length", 9, 3, hits=hits)

        await on.post(COMPLETIONS, **GREEDY, prompt=ids(40, 6), max_tokens=2, n=3)
        ledger.prompt(6)  # once for all three
        for _ in range(3):
            ledger.tokens(2)
            ledger.end("length", 6, 2)

        body = {"prompt": ids(60, 5), "max_tokens": 0, "echo": True, "logprobs": 1}
        await on.post(COMPLETIONS, **body)
        ledger.prompt(5, is_looked_up=False)  # a prompt that is scored reads no cache
        ledger.end("length", 5, 0)

        bias = {str(builders.EOS): 100}
        await on.post(COMPLETIONS, prompt=ids(80, 5), max_tokens=9, logit_bias=bias)
        ledger.text("stop", 5, 0)

        usage = (await on.post(IMAGES, prompt="a cat", n=2, seed=1))["usage"]
        num_prompt = usage["input_tokens"]
        ledger.prompt(num_prompt)
        ledger.num_computed += 1  # begin_image, behind the prompt and shared as it is
        for _ in range(2):
            ledger.picture()
            ledger.end("stop", num_prompt, NUM_CODES + 2)

        message = ask(data_url(png(16, 16, 200)), text="dog?")
        usage = (await on.post(CHAT, **message, **GREEDY, max_tokens=2))["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": NUM_CODES}
        num_prompt_codes = NUM_CODES
        ledger.text("length", usage["prompt_tokens"], 2)

        await on.post(COMPLETIONS, 408, prompt=ids(100, 5), timeout_s=0.5)  # a tick is a second
        ledger.end("timeout", 5, 0, began=False)
        body = GREEDY | {"prompt": ids(120, 5), "max_tokens": 99, "timeout_s": 9.5}
        num_tokens = (await on.post(COMPLETIONS, **body))["usage"]["completion_tokens"]
        assert 1 < num_tokens < 50
        ledger.text("timeout", 5, num_tokens)

        await on.post(COMPLETIONS, 400, prompt=ids(20, 99), max_tokens=1)
        ledger.counts["requests_rejected_total{reason=invalid}"] += 1

        on.gate.shut()
        for first, reason in ((140, "disconnect"), (160, "api")):
            await left_after_two_tokens(on, first, reason)
            ledger.prompt(5)
            ledger.tokens(2)
            ledger.counts[f"requests_aborted_total{{reason={reason}}}"] += 1

        await ended_by_a_stop_string(on, ids(180, 5))
        ledger.text("stop", 5, 2)

        await one_of_two_is_refused(on)
        ledger.text("length", 5, 2)
        ledger.prompt(5)
        for _ in range(2):
            ledger.tokens(2)
            ledger.end("length", 5, 2)
        ledger.counts["requests_rejected_total{reason=queue_full}"] += 1

        await on.until_idle()
        await on.engine.drain(0)
        await on.post(COMPLETIONS, 503, prompt=ids(20, 5))
        ledger.counts["requests_rejected_total{reason=draining}"] += 1
        found = on.found()

    expected = +ledger.counts | Counter(iteration_tokens_sum=ledger.num_computed)
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        expected[gauge] = 0
    expected["num_preemptions_total"] = 0
    assert {name: found.get(name) for name in expected} == dict(expected)
    num_late = 2  # steps that only told of a passed deadline, and computed nothing
    num_steps = on.gate.num_steps - on.gate.num_empty_steps - num_late
    assert found["iteration_tokens_count"] == found["step_seconds_count"] == num_steps
    assert found["step_seconds_predicted_count"] == num_steps
    assert found["step_seconds_predicted_sum"] > 0
    labelled = {name for name in found if name.endswith("}") and "_bucket" not in name}
    ours = {n for n in labelled if n.startswith(("request", "generation"))}
    assert {n for n in ours if found[n]} <= expected.keys()  # nothing for another reason

    # The routers saw every token that was computed, in every layer that took it.
    num_codes = num_prompt_codes + 2 * (NUM_CODES - 1)
    seen = {"image": num_codes, "text": ledger.num_computed - num_codes}
    taken = found[f"depth_tokens_total{{layer={DEPTH_LAYER},taken=true}}"]
    skipped = found[f"depth_tokens_total{{layer={DEPTH_LAYER},taken=false}}"]
    assert taken + skipped == ledger.num_computed
    pairs = {group: found[f"experts_per_token_count{{group={group}}}"] for group in seen}
    assert sum(pairs.values()) == ledger.num_computed + taken
    for group, count in seen.items():
        assert count <= pairs[group] <= NUM_LAYERS * count
        lowest = found[f"experts_per_token_bucket{{group={group},le=0.0}}"]
        assert found[f"tokens_without_expert_total{{group={group}}}"] == lowest
        of_group = [n for n in found if n.startswith("expert_tokens_total") and f"={group}," in n]
        assert len(of_group) == 4 * NUM_LAYERS
        total = found[f"experts_per_token_sum{{group={group}}}"]
        assert sum(found[name] for name in of_group) == total


async def left_after_two_tokens(on: Served, first: int, reason: str) -> None:
    """A stream whose request is aborted while the engine stands before its second step."""
    body = GREEDY | {"prompt": ids(first, 5), "max_tokens": 99, "stream": True}
    headers = ((b"content-type", b"application/json"), (b"x-request-id", b"mine"))
    call = Call(on.app, COMPLETIONS, body, headers=headers)
    assert await call.start() == 200
    await on.gate.reached()
    on.gate.let_pass()
    await on.gate.reached()
    if reason == "api":
        assert (await on.client.delete("/v1/requests/mine")).status_code == 200
        on.gate.let_pass()
        assert b"request_aborted" in await call.rest()
    else:
        call.hang_up()
        await call.ended()
        on.gate.let_pass()
    await on.until_idle()


async def ended_by_a_stop_string(on: Served, prompt: list[int]) -> None:
    """The server finds it in the first token, and the engine hears of it after the second."""
    letter = builders.tokenizer().encode("a")[0]
    bias = {str(letter): 100}
    asked = asyncio.ensure_future(
        on.post(COMPLETIONS, prompt=prompt, logit_bias=bias, stop="a", max_tokens=99)
    )
    await on.gate.reached()
    on.gate.let_pass()
    on.gate._waiting.get(timeout=HANG_S)  # the loop stands still until the engine does again
    assert (await asked)["choices"][0]["finish_reason"] == "stop"
    on.gate.let_pass()
    await on.until_idle()


async def one_of_two_is_refused(on: Served) -> None:
    """Two requests of two choices each come while one runs; three may wait."""
    body = GREEDY | {"max_tokens": 2}
    running = asyncio.ensure_future(on.post(COMPLETIONS, **body, prompt=ids(200, 5)))
    await on.gate.reached()
    assert on.found()["num_requests_waiting"] == 1
    on.gate.let_pass()
    await on.gate.reached()
    now = on.found()
    assert (now["num_requests_running"], now["num_requests_waiting"]) == (1, 0)
    assert now["kv_cache_usage_perc"] == pytest.approx(
        2 / on.engine.engine.scheduler.kv_cache.num_blocks
    )
    others = [
        asyncio.ensure_future(on.client.post(COMPLETIONS, json=body | {"prompt": p, "n": 2}))
        for p in (ids(220, 5), ids(240, 5))
    ]
    await on.until_listened_to(1 + 2 + 2)
    on.gate.open()
    responses = [await other for other in others]
    assert sorted(response.status_code for response in responses) == [200, 429]
    (refused,) = (response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    await running


async def test_a_preemption_counts_once(checkpoint: Path) -> None:
    """Two requests of four blocks each, and room for six: the younger one gives way once."""
    block_bytes = 2 * NUM_LAYERS * 8 * BLOCK_SIZE * 4
    async with served(checkpoint, kv_cache_bytes=6 * block_bytes, max_model_len=16) as on:
        on.gate.shut()
        body = GREEDY | {"max_tokens": 11}
        asked = [
            asyncio.ensure_future(on.post(COMPLETIONS, **body, prompt=ids(first, 5)))
            for first in (20, 40)
        ]
        await on.until_listened_to(2)
        on.gate.open()
        for reply in asked:
            assert (await reply)["usage"]["completion_tokens"] == 11
        found = on.found()
    assert found["num_preemptions_total"] == 1
    assert found["prompt_tokens_total"] == 10
    assert found["generation_tokens_total{modality=text}"] == 22
    assert found["prefix_cache_queries_total"] == 10  # coming back is no question of its own
