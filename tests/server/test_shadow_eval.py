"""`--shadow-eval` over the real engine: which requests are taken, exact counts, the way it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from momaserve.async_engine import AsyncEngine
from momaserve.config import EngineConfig, RoutingPolicy
from momaserve.engine import Engine
from momaserve.errors import CheckpointError
from momaserve.router_lab.shadow.batch import BatchRule
from momaserve.router_lab.shadow.evaluation import evaluate
from momaserve.router_lab.shadow.sample import Sample, is_picked
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from momaserve_server import cli, examples
from momaserve_server.app import create_app
from momaserve_server.metrics import ServerMetrics
from momaserve_server.openapi import schema_of
from momaserve_server.settings import ServerSettings
from momaserve_server.shadow_report import shadow_report
from momaserve_server.shadow_tap import shadow_eval_of
from tests.engine.driver import make_engine
from tests.engine.threaded import Gate
from tests.models.factory import write_checkpoint
from tests.router_lab.shadow.factory import Watched
from tests.server.asgi import Call, client_of
from tests.server.test_metrics import samples
from tests.server.test_metrics_counts import COMPLETIONS, GREEDY, IMAGES, ids
from tests.tokens import builders

pytestmark = pytest.mark.anyio

NUM_LAYERS, NUM_EXPERTS, CAPACITY = 2, 4, 0.5
NUM_CODES = builders.NUM_TOKENS
PREFIX = "shadow_eval_"
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "metrics.md"
CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
WHOLE = RoutingPolicy.EXPERT_CHOICE


def checkpoint_of(directory: Path, **changes: Any) -> Path:
    experts = {"num_experts": NUM_EXPERTS, "intermediate_size": 8}
    groups = [{"name": name, "modalities": [name]} | experts for name in ("text", "image")]
    fields: dict[str, Any] = {
        "num_hidden_layers": NUM_LAYERS,
        "expert_groups": groups,
        "depth_routing": {"layers": [1], "capacity": CAPACITY},
    }
    write_checkpoint(directory, builders.model_config(**(fields | changes)))
    builders.write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four experts for words and four for pictures; one layer takes half."""
    return checkpoint_of(tmp_path_factory.mktemp("shadow") / "tiny")


class Served:
    """The app, its scoring thread among what it starts."""

    def __init__(self, checkpoint: Path, num_tokens: int, rate: float, **options: Any) -> None:
        """A batch is scored as soon as `num_tokens` were gathered."""
        engine = make_engine(checkpoint, threads=1, keep_weights=True, **options)
        self.gate = Gate(engine)
        self.metrics = ServerMetrics()
        self.engine = AsyncEngine(engine, listener=self.metrics)
        self.shadow_eval = ShadowEval(
            engine.model,
            rate=rate,
            policy=engine.config.routing,
            max_model_len=engine.max_model_len,
            is_busy=lambda: not self.engine.is_idle,
            is_stopping=lambda: self.engine.is_draining,
            rule=BatchRule(num_tokens=num_tokens, min_tokens=1, max_wait_s=1e6),
        )
        self.watched = Watched(self.shadow_eval)
        self.app = create_app(
            self.engine,
            ServerSettings(drain_timeout_s=0),
            metrics=self.metrics,
            shadow_eval=self.shadow_eval,
        )
        self.client = client_of(self.app)

    async def post(self, path: str, name: str = "", status: int = 200, **body: Any) -> Any:
        headers = {"x-request-id": name} if name else {}
        response = await self.client.post(path, json=body, headers=headers)
        assert response.status_code == status, response.text
        return response.json()

    async def scored(self) -> None:
        """Until the next batch is in the totals."""
        assert await asyncio.to_thread(self.watched.next_batch) is not None

    def found(self) -> dict[str, float]:
        """The metrics, without prefixes."""
        everything = samples(self.metrics, self.engine)
        return {k.removeprefix(PREFIX): v for k, v in everything.items() if k.startswith(PREFIX)}

    async def report(self) -> dict[str, Any]:
        reply: dict[str, Any] = (await self.client.get("/v1/router")).json()
        found: dict[str, Any] = reply["shadow_eval"]
        return found


@asynccontextmanager
async def served(
    checkpoint: Path, num_tokens: int, rate: float = 1.0, **options: Any
) -> AsyncGenerator[Served, None]:
    made = Served(checkpoint, num_tokens, rate, **options)
    async with made.app.router.lifespan_context(made.app), made.client:
        yield made
        made.gate.open()


async def test_every_count_is_what_arithmetic_says(checkpoint: Path) -> None:
    """Requests of every kind and every end; those that ended well are scored as one batch."""
    texts = [(20, 9, 3), (40, 6, 2), (60, 5, 7)]
    num_prompt = 3
    num_tokens = sum(prompt + answer for _, prompt, answer in texts)
    num_tokens += 2 * (6 + 2) + 2 * (num_prompt + NUM_CODES + 2)
    async with served(checkpoint, num_tokens) as on:
        for first, prompt, answer in texts:
            await on.post(COMPLETIONS, **GREEDY, prompt=ids(first, prompt), max_tokens=answer)
        body = GREEDY | {"prompt": ids(80, 6), "max_tokens": 2, "n": 2}
        await on.post(COMPLETIONS, **body, prompt_routing="expert_choice")

        # None of these is taken.
        await on.post(COMPLETIONS, **GREEDY, prompt=ids(20, 5), max_tokens=1)
        await on.post(COMPLETIONS, prompt=ids(20, 5), max_tokens=0, echo=True, logprobs=1)
        await on.post(COMPLETIONS, status=400, prompt=ids(20, 99), max_tokens=1)
        await on.post(COMPLETIONS, status=408, prompt=ids(100, 5), timeout_s=0.5)
        on.gate.shut()
        for first, reason in ((140, "disconnect"), (160, "api")):
            await left_after_two_tokens(on, first, reason)
        on.gate.open()
        assert on.found()["requests_total"] == 0

        usage = (await on.post(IMAGES, prompt="cat", n=2, seed=1))["usage"]
        assert usage["input_tokens"] == num_prompt
        await on.scored()
        found, report = on.found(), await on.report()

    num_images = 2 * NUM_CODES
    num_decided = num_tokens + int(num_tokens * CAPACITY)  # the second layer takes half
    assert found["requests_total"] == len(texts) + 2 + 2
    assert found["tokens_total{modality=image}"] == num_images
    assert found["tokens_total{modality=text}"] == num_tokens - num_images
    assert found["dropped_total"] == found["failures_total"] == 0
    decisions = {
        group: found[f"decisions_total{{group={group}}}"] for group in ("text", "image", "depth")
    }
    assert decisions["depth"] == num_tokens
    assert decisions["text"] + decisions["image"] == NUM_EXPERTS * num_decided
    for group, count in decisions.items():
        missed, added = (
            found[f"flips_total{{group={group},kind={kind}}}"] for kind in ("missed", "added")
        )
        accuracy = found[f"agreement{{group={group},measure=accuracy}}"]
        assert accuracy == pytest.approx(1 - (missed + added) / count)
        assert missed + added > 0  # random routers agree on something, but not on all
        assert 0 < found[f"agreement{{group={group},measure=f1}}"] < 1

    assert report["num_requests"] == len(texts) + 4
    assert report["tokens"] == {"text": num_tokens - num_images, "image": num_images}
    assert report["window"]["num_tokens"] == num_tokens
    assert [each["group"] for each in report["agreement"]] == ["text", "image", "depth"]
    for each in report["agreement"]:
        assert each["accuracy"] == found[f"agreement{{group={each['group']},measure=accuracy}}"]
        assert each["f1"] == found[f"agreement{{group={each['group']},measure=f1}}"]
        layers = [1] if each["group"] == "depth" else [0, 1]
        assert [layer["layer"] for layer in each["layers"]] == layers
        for layer in each["layers"]:
            num_experts = 1 if each["group"] == "depth" else NUM_EXPERTS
            assert [e["expert"] for e in layer["experts"]] == list(range(num_experts))
            mean = sum(expert["accuracy"] for expert in layer["experts"]) / num_experts
            assert mean == pytest.approx(layer["accuracy"])
    for policy, means in report["nll"].items():
        for modality, mean in means.items():
            assert found[f"nll{{modality={modality},policy={policy}}}"] == pytest.approx(mean)
    assert report["nll"].keys() == {"expert_choice", "served"}
    jsonschema.validate(report, schema_of(examples.ROUTER["shadow_eval"].value))


async def left_after_two_tokens(on: Served, first: int, reason: str) -> None:
    """A stream whose request ends while the engine stands before its second step."""
    body = GREEDY | {"prompt": ids(first, 5), "max_tokens": 50, "stream": True}
    headers = ((b"content-type", b"application/json"), (b"x-request-id", b"mine"))
    call = Call(on.app, COMPLETIONS, body, headers=headers)
    assert await call.start() == 200
    for _ in range(2):
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


async def test_losses_are_those_of_the_answers(checkpoint: Path) -> None:
    """What was generated, scored again from the reply's ids under what served them."""
    bodies: list[dict[str, Any]] = [
        {"prompt": ids(20, 9), "max_tokens": 6},
        {"prompt": ids(40, 7), "max_tokens": 5, "prompt_routing": "expert_choice"},
        {"prompt": ids(60, 5), "max_tokens": 8, "routing": "calibrated"},
    ]
    routed = [(CAUSAL, CAUSAL), (CAUSAL, WHOLE), (CALIBRATED, CALIBRATED)]
    num_tokens = sum(len(body["prompt"]) + body["max_tokens"] for body in bodies)
    async with served(checkpoint, num_tokens) as on:
        replies = [await on.post(COMPLETIONS, **GREEDY, **b, return_token_ids=True) for b in bodies]
        await on.scored()
        report = await on.report()
        model = on.engine.engine.model
    answers = [reply["choices"][0]["token_ids"] for reply in replies]
    taken = [
        Sample.of(body["prompt"], answer, *policies)
        for body, answer, policies in zip(bodies, answers, routed, strict=True)
    ]
    wanted = evaluate(model, taken, CAUSAL, min_tokens=1)
    for policy, sums in wanted.losses.items():
        assert sums[2] == 6 + 5 + 8
        assert report["nll"][policy]["text"] == pytest.approx(sums[0] / sums[2])
        assert report["nll"][policy]["image"] is None
    (image,) = (each for each in report["agreement"] if each["group"] == "image")
    assert image == {
        "group": "image",
        **dict.fromkeys(("accuracy", "precision", "recall", "f1")),
        "layers": [],
    }


@pytest.mark.parametrize("rate", [0.5, 1.0])
async def test_requests_are_picked_by_their_ids(rate: float, checkpoint: Path) -> None:
    names = [f"request-{number}" for number in range(12)]
    picked = [name for name in names if is_picked(f"cmpl-{name}/0", rate)]
    assert len(picked) == 12 or 2 < len(picked) < 10
    async with served(checkpoint, len(picked) * 7, rate) as on:
        for name in names:
            body = GREEDY | {"prompt": ids(20, 5), "max_tokens": 2}
            await on.post(COMPLETIONS, name, **body)
        await on.scored()
        found = on.found()
    assert found["requests_total"] == len(picked)
    assert found["tokens_total{modality=text}"] == 7 * len(picked)


async def test_each_choice_has_its_own_prompt(checkpoint: Path) -> None:
    num_tokens = 2 * (5 + 3) + 2 * (9 + 3)
    async with served(checkpoint, num_tokens) as on:
        body = GREEDY | {"prompt": [ids(20, 5), ids(40, 9)], "max_tokens": 3, "n": 2}
        await on.post(COMPLETIONS, **body)
        await on.scored()
        found, report = on.found(), await on.report()
    assert found["requests_total"] == 4
    assert report["window"]["num_tokens"] == num_tokens


async def test_a_stop_string_ends_well_too(checkpoint: Path) -> None:
    letter = builders.tokenizer().encode("a")[0]
    async with served(checkpoint, 7) as on:
        await on.post(
            COMPLETIONS,
            prompt=ids(20, 5),
            logit_bias={str(letter): 100},
            stop="aa",
            max_tokens=50,
        )
        await on.scored()
        assert on.found()["requests_total"] == 1


async def test_counters_begin_at_zero_and_gauges_with_the_first_batch(checkpoint: Path) -> None:
    async with served(checkpoint, 10**6) as on:
        found, report = on.found(), await on.report()
    groups = ("text", "image", "depth")
    assert found == {
        **{f"{name}_total": 0 for name in ("requests", "dropped", "failures")},
        **{f"tokens_total{{modality={m}}}": 0 for m in ("text", "image")},
        **{f"decisions_total{{group={group}}}": 0 for group in groups},
        **{f"flips_total{{group={g},kind={k}}}": 0 for g in groups for k in ("missed", "added")},
    }
    assert report["window"] == {"num_tokens": 0, "since": None}
    assert report["nll"] == {
        name: {"text": None, "image": None} for name in ("expert_choice", "served")
    }


async def test_every_metric_is_documented(checkpoint: Path) -> None:
    async with served(checkpoint, 10**6) as on:
        text = on.metrics.render(on.engine).decode()
    page = HOWTO.read_text(encoding="utf-8")
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    mine = {name for name in names if name.startswith(f"momaserve_{PREFIX}")}
    assert len(mine) == 8
    assert [name for name in mine if name not in page] == []


async def test_the_end_of_the_server_ends_it(checkpoint: Path) -> None:
    """What waits is forgotten, and no thread is left, with a batch half gathered."""
    async with served(checkpoint, 10**6) as on:
        await on.post(COMPLETIONS, **GREEDY, prompt=ids(20, 5), max_tokens=2)
        assert "momaserve-shadow" in {thread.name for thread in threading.enumerate()}
    assert "momaserve-shadow" not in {thread.name for thread in threading.enumerate()}
    assert on.shadow_eval.num_waiting_tokens == 0


async def test_a_failure_leaves_the_server_as_it_is(checkpoint: Path) -> None:
    async with served(checkpoint, 7) as on:
        on.shadow_eval._score = None  # type: ignore[method-assign, assignment]  # fails when called
        await on.post(COMPLETIONS, **GREEDY, prompt=ids(20, 5), max_tokens=2)
        assert await asyncio.to_thread(on.watched.next_batch) is None
        await on.post(COMPLETIONS, **GREEDY, prompt=ids(20, 5), max_tokens=2)
        assert await asyncio.to_thread(on.watched.next_batch) is None
        assert on.found()["failures_total"] == 2
        assert on.engine.is_ready
        assert (await on.client.get("/health")).status_code == 200


async def test_nothing_is_created_where_it_is_off(checkpoint: Path) -> None:
    metrics = ServerMetrics()
    async_engine = AsyncEngine(make_engine(checkpoint, threads=1), listener=metrics)
    settings = ServerSettings()
    assert shadow_eval_of(settings, async_engine) is None
    app = create_app(async_engine, settings, metrics=metrics)
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.get("/v1/router")).json()["shadow_eval"] is None
        assert "momaserve-shadow" not in {thread.name for thread in threading.enumerate()}
        assert PREFIX not in metrics.render(async_engine).decode()


async def test_the_setting_is_what_is_built(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, threads=1, keep_weights=True, routing="calibrated")
    async_engine = AsyncEngine(engine)
    found = shadow_eval_of(ServerSettings(shadow_eval=0.25), async_engine)
    assert found is not None
    assert (found.rate, found.policy) == (0.25, CALIBRATED)
    assert shadow_report(found)["policy"] == "calibrated"
    assert shadow_report(found)["rate"] == 0.25


@pytest.mark.parametrize(("words", "keeps"), [(["--shadow-eval", "0.5"], True), ([], False)])
def test_the_engine_keeps_the_weights_for_it(
    words: list[str], keeps: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def load(path: Path, config: EngineConfig) -> None:
        seen.append(config)
        raise CheckpointError("enough was seen")

    monkeypatch.setattr(Engine, "load", load)
    assert cli.main(["serve", str(checkpoint), "--port", "0", *words]) == 1
    assert [config.keep_weights for config in seen] == [keeps]


def test_a_model_without_routers_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"num_experts": 1, "intermediate_size": 8}
    groups = [{"name": name, "modalities": [name]} | one for name in ("text", "image")]
    directory = checkpoint_of(tmp_path / "dense", expert_groups=groups, depth_routing=None)
    assert cli.main(["serve", str(directory), "--port", "0", "--shadow-eval", "0.5"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("momaserve serve: error: shadow_eval 0.5: ")
    assert "one expert in every group ('text', 'image')" in last
