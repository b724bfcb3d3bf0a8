"""`/v1/images/generations`: OpenAI's shapes and event names."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from momaserve.config import RoutingPolicy
from momaserve.models.generation import GenerationDefaults
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve_server.pictures import PartialSchedule, partial_marks
from tests.server.asgi import data_of, http
from tests.server.fake_engine import BOS, SEP, FakeAsyncEngine, FakeEngine, byte_ids

pytestmark = pytest.mark.anyio
IMAGES = "/v1/images/generations"


async def draw(fake: FakeAsyncEngine | None = None, **body: Any) -> Any:
    async with http(fake) as client:
        response = await client.post(IMAGES, json={"prompt": "ab", **body})
    assert response.status_code == 200, response.text
    return response


def corner(b64_json: str) -> int:
    """Grey of the first pixel: 16 times the first code."""
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    assert image.format == "PNG"
    return image.convert("L").tobytes()[0]


async def test_pictures_are_png_in_base64() -> None:
    fake = FakeAsyncEngine()
    reply = (await draw(fake, n=2, seed=3)).json()
    assert [corner(item["b64_json"]) for item in reply["data"]] == [48, 64]
    assert reply["size"] == "8x8"
    assert reply["output_format"] == "png"
    assert reply["usage"] == {
        "input_tokens": 4,
        "output_tokens": 8,
        "total_tokens": 12,
        "input_tokens_details": {"text_tokens": 4, "image_tokens": 0, "cached_tokens": 0},
    }
    submission = fake.submissions[0]
    assert submission.prompt.token_ids == (BOS, *byte_ids("ab"), SEP)
    assert submission.params.mode is OutputMode.IMAGE


async def test_every_field_reaches_the_engine() -> None:
    fake = FakeAsyncEngine()
    await draw(
        fake,
        n=2,
        seed=3,
        image_temperature=2,
        image_top_k=5,
        image_top_p=0.8,
        guidance_scale=3,
        min_tokens=2,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        priority=-3,
        cache_salt="mine",
        timeout_s=1.5,
        routing="calibrated",
        prompt_routing="causal",
    )
    assert fake.submissions[0].params == SamplingParams(
        mode=OutputMode.IMAGE,
        n=2,
        seed=3,
        image=Distribution(temperature=2.0, top_k=5, top_p=0.8),
        guidance_scale=3.0,
        min_tokens=2,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        priority=-3,
        cache_salt="mine",
        timeout_s=1.5,
        routing=RoutingPolicy.CALIBRATED,
        prompt_routing=RoutingPolicy.CAUSAL,
    )


async def test_guidance_is_the_checkpoints_unless_asked_for() -> None:
    defaults = GenerationDefaults(guidance_scale=2.5)
    fake = FakeAsyncEngine(engine=replace(FakeEngine(), defaults=defaults))
    await draw(fake)
    await draw(fake, guidance_scale=1)
    assert [s.params.guidance_scale for s in fake.submissions] == [2.5, 1.0]


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_in_the_usage(stream: bool) -> None:
    fake = FakeAsyncEngine()
    fake.num_cached_tokens = 3
    response = await draw(fake, n=2, stream=stream)
    replies = data_of(response.text) if stream else [response.json()]
    assert all(r["usage"]["input_tokens_details"]["cached_tokens"] == 3 for r in replies)


@pytest.mark.parametrize(("partial_images", "num_partial"), [(None, 0), (0, 0), (2, 2), (3, 3)])
async def test_stream_has_openais_events(partial_images: int | None, num_partial: int) -> None:
    response = await draw(stream=True, seed=3, partial_images=partial_images)
    events = data_of(response.text)
    names = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [f"event: {event['type']}" for event in events]
    *partial, completed = events
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * num_partial
    assert [event["partial_image_index"] for event in partial] == list(range(num_partial))
    assert completed["type"] == "image_generation.completed"
    assert completed["usage"]["output_tokens"] == 4
    for event in events:
        assert corner(event["b64_json"]) == 48
        assert {"created_at", "size", "quality", "background", "output_format"} <= set(event)


async def test_streamed_equals_whole() -> None:
    whole = (await draw(n=3, seed=3)).json()
    events = data_of((await draw(n=3, seed=3, stream=True, partial_images=1)).text)
    done = {e["index"]: e["b64_json"] for e in events if e["type"].endswith("completed")}
    assert [done[i] for i in range(3)] == [item["b64_json"] for item in whole["data"]]


@pytest.mark.parametrize("size", ["auto", "8x8", None])
async def test_the_models_own_size_is_accepted(size: str | None) -> None:
    await draw(size=size, quality="hd", style="vivid", moderation="low", user="me")


async def test_other_sizes_are_refused_with_the_right_one() -> None:
    async with http() as client:
        response = await client.post(IMAGES, json={"prompt": "ab", "size": "1024x1024"})
    assert response.status_code == 400
    assert "'8x8', got '1024x1024'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("total", "num_partial", "marks"),
    [
        (64, 3, (16, 32, 48)),
        (64, 4, (12, 25, 38, 51)),
        (4, 3, (1, 2, 3)),
        (4, 16, (1, 2, 3)),
        (4, 0, ()),
        (1, 3, ()),
    ],
)
def test_marks_are_spread_evenly(total: int, num_partial: int, marks: tuple[int, ...]) -> None:
    assert partial_marks(total, num_partial) == marks


def test_marks_that_one_step_jumps_over_are_shown_once() -> None:
    schedule = PartialSchedule(3)
    shown = [at for at in (10, 20, 50, 51, 63) if schedule.is_due(0, at, 64)]
    assert shown == [20, 50]
    assert schedule.is_due(1, 16, 64)
