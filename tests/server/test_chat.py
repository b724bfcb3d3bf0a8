"""`/v1/chat/completions`: shapes, pictures, choices, and that streamed equals whole."""

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
from momaserve_server.schemas_common import IgnoredFields, SamplingFields
from tests.server.asgi import chat_body, data_of, http, joined
from tests.server.fake_engine import (
    BEGIN,
    END,
    TEXT,
    FakeAsyncEngine,
    FakeCodec,
    FakeEngine,
    byte_ids,
    code_ids,
    default_answer,
)

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


def picture_url(*codes: int) -> str:
    return "data:image/png;base64," + png_of(*codes)


def png_of(*codes: int) -> str:
    buffer = io.BytesIO()
    FakeCodec().decode(tuple(code_ids(*codes))).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


async def ask(fake: FakeAsyncEngine | None = None, **fields: Any) -> Any:
    async with http(fake) as client:
        response = await client.post(CHAT, json=chat_body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


async def ask_stream(fake: FakeAsyncEngine | None = None, **fields: Any) -> list[Any]:
    async with http(fake) as client:
        response = await client.post(CHAT, json=chat_body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return data_of(response.text)


async def params_of(fake: FakeAsyncEngine | None = None, **fields: Any) -> SamplingParams:
    fake = fake or FakeAsyncEngine()
    await ask(fake, **fields)
    return fake.submissions[0].params


async def test_text_is_a_string() -> None:
    reply = await ask(seed=5)
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "fake"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": f"{TEXT}5"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 4,  # bos h i sep
        "completion_tokens": len(byte_ids(f"{TEXT}5")),
        "total_tokens": 4 + len(byte_ids(f"{TEXT}5")),
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0},
        "completion_tokens_details": {"image_tokens": 0},
    }


async def test_pictures_make_it_a_list_of_parts_in_order() -> None:
    reply = await ask(seed=5, modalities=["image", "text"])
    assert reply["choices"][0]["message"]["content"] == [
        {"type": "text", "text": f"{TEXT}5"},
        {"type": "image_url", "image_url": {"url": picture_url(5, 6, 7, 8)}},
        {"type": "text", "text": "!"},
    ]
    assert reply["usage"]["completion_tokens_details"] == {"image_tokens": 4}


async def test_picture_alone_is_a_list_too() -> None:
    reply = await ask(seed=1, modalities=["image"])
    content = reply["choices"][0]["message"]["content"]
    assert content == [{"type": "image_url", "image_url": {"url": picture_url(1, 2, 3, 4)}}]
    png = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(png)).size == (8, 8)


async def test_choices_differ_by_seed() -> None:
    reply = await ask(seed=5, n=3)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert texts == [f"{TEXT}5", f"{TEXT}6", f"{TEXT}7"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]


async def test_first_chunk_names_the_role_and_the_last_the_reason() -> None:
    *chunks, done = await ask_stream(seed=5)
    assert done == "[DONE]"
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    last = chunks[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


async def test_characters_are_never_torn() -> None:
    chunks = await ask_stream(seed=5)
    pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert [piece for piece in pieces if piece] == list(f"{TEXT}5")


async def test_usage_comes_last_when_asked_for() -> None:
    *chunks, usage, _done = await ask_stream(seed=5, stream_options={"include_usage": True})
    whole = await ask(seed=5)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_those_of_the_first_choice(stream: bool) -> None:
    fake = FakeAsyncEngine()
    fake.num_cached_tokens = 3  # the other choices share the prompt of the first
    if stream:
        *_, last, _done = await ask_stream(fake, n=2, stream_options={"include_usage": True})
    else:
        last = await ask(fake, n=2)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3, "image_tokens": 0}


async def test_growing_picture_has_at_least_four_events_the_whole_one_last() -> None:
    chunks = await ask_stream(seed=2, modalities=["image"])
    images = [c["choices"][0]["delta"]["image"] for c in chunks[1:-2]]
    assert len(images) >= 4
    assert [image["tokens_done"] for image in images] == [1, 2, 3, 4]
    assert {image["tokens_total"] for image in images} == {4}
    assert images[-1]["b64_json"] == png_of(2, 3, 4, 5)
    assert images[0]["b64_json"] == png_of(2, 15, 15, 15)  # what is missing is white


@pytest.mark.parametrize(("partial_images", "done"), [(0, [4]), (1, [2, 4]), (64, [1, 2, 3, 4])])
async def test_partial_images_sets_how_many(partial_images: int, done: list[int]) -> None:
    chunks = await ask_stream(seed=2, modalities=["image"], partial_images=partial_images)
    images = [c["choices"][0]["delta"].get("image") for c in chunks[:-1]]
    assert [image["tokens_done"] for image in images if image] == done


async def test_two_pictures_are_numbered() -> None:
    def answer(params: SamplingParams, index: int) -> list[int]:
        return [BEGIN, *code_ids(1, 2, 3, 4), END, BEGIN, *code_ids(5, 6, 7, 8), END]

    fake = FakeAsyncEngine(answer)
    chunks = await ask_stream(fake, modalities=["text", "image"], partial_images=0)
    images = [c["choices"][0]["delta"].get("image") for c in chunks[:-1]]
    assert [(i["index"], i["b64_json"]) for i in images if i] == [
        (0, png_of(1, 2, 3, 4)),
        (1, png_of(5, 6, 7, 8)),
    ]


async def test_streamed_equals_whole() -> None:
    fields: dict[str, Any] = {
        "seed": 3,
        "n": 2,
        "modalities": ["text", "image"],
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
    }
    whole = await ask(**fields)
    *chunks, _done = await ask_stream(**fields)
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        text = "".join(c["delta"].get("content") or "" for c in mine)
        parts = choice["message"]["content"]
        assert text == "".join(part.get("text", "") for part in parts)
        pictures = [c["delta"]["image"] for c in mine if "image" in c["delta"]]
        whole_pictures = [p["b64_json"] for p in pictures if p["tokens_done"] == p["tokens_total"]]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        assert ["data:image/png;base64," + png for png in whole_pictures] == urls
        assert joined(c.get("token_ids", []) for c in mine) == choice["token_ids"]
        entries = [c["logprobs"]["content"] for c in mine if c["logprobs"]]
        assert joined(entries) == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


async def test_token_ids_are_all_that_was_generated() -> None:
    reply = await ask(seed=3, modalities=["text", "image"], return_token_ids=True)
    assert reply["choices"][0]["token_ids"] == default_answer(
        SamplingParams(seed=3, mode=OutputMode.INTERLEAVED), 0
    )


async def test_logprobs_spell_their_tokens() -> None:
    fake = FakeAsyncEngine(lambda params, index: [*byte_ids("aü"), BEGIN, *code_ids(1, 2, 3, 4)])
    reply = await ask(fake, logprobs=True, top_logprobs=1, modalities=["text", "image"])
    entries = reply["choices"][0]["logprobs"]["content"]
    names = [(entry["token"], entry["bytes"]) for entry in entries]
    assert names[:5] == [
        ("a", [97]),
        ("bytes:\\xc3", [0xC3]),
        ("bytes:\\xbc", [0xBC]),
        ("<|begin_image|>", None),
        (f"token_id:{code_ids(1)[0]}", None),
    ]
    assert entries[0]["logprob"] == -byte_ids("a")[0] / 8
    assert entries[0]["top_logprobs"] == [{"token": "!", "logprob": -0.5, "bytes": [33]}]


async def test_logprobs_without_top_list_the_token_alone() -> None:
    reply = await ask(logprobs=True)
    assert all(e["top_logprobs"] == [] for e in reply["choices"][0]["logprobs"]["content"])


async def test_length_limit_is_a_reason() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        fields: dict[str, Any] = {name: 2}
        reply = await ask(**fields)
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["choices"][0]["message"]["content"] == TEXT[:2]
        assert reply["usage"]["completion_tokens"] == 2


async def test_stop_string_cuts_the_text_and_ends_the_request() -> None:
    fake = FakeAsyncEngine()
    reply = await ask(fake, seed=5, stop=["ße"])
    assert reply["choices"][0]["message"]["content"] == "Grü"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert fake.aborted == [fake.submissions[0].request_id]
    assert reply["usage"]["completion_tokens"] == len(byte_ids("Grüße"))


async def test_stop_string_ends_one_choice_and_not_the_others() -> None:
    fake = FakeAsyncEngine()
    reply = await ask(fake, seed=5, n=2, stop="! 5")
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert texts == ["Grüße", f"{TEXT}6"]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop", "stop"]


async def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    chunks = await ask_stream(seed=5, stop=["5 and more"])
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == f"{TEXT}5"


async def test_defaults_are_the_checkpoints() -> None:
    defaults = GenerationDefaults(
        text=Distribution(temperature=0.7, top_k=9),
        image=Distribution(top_p=0.9),
        guidance_scale=2.5,
    )
    fake = FakeAsyncEngine(engine=replace(FakeEngine(), defaults=defaults))
    params = await params_of(fake)
    assert (params.text, params.image) == (defaults.text, defaults.image)
    assert params == SamplingParams(text=defaults.text, image=defaults.image, guidance_scale=2.5)
    assert (await params_of(modalities=["image"], guidance_scale=1)).guidance_scale == 1.0


async def test_every_field_reaches_the_engine() -> None:
    params = await params_of(
        modalities=["text", "image"],
        max_tokens=50,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        image_temperature=2,
        image_top_k=5,
        image_top_p=0.8,
        seed=7,
        n=2,
        stop="zzz",
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"12": -5},
        guidance_scale=3,
        min_tokens=2,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        priority=-3,
        cache_salt="mine",
        timeout_s=1.5,
        routing="calibrated",
        prompt_routing="expert_choice",
    )
    assert params == SamplingParams(
        mode=OutputMode.INTERLEAVED,
        max_tokens=50,
        text=Distribution(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1),
        image=Distribution(temperature=2.0, top_k=5, top_p=0.8),
        seed=7,
        n=2,
        stop=("zzz",),
        stop_token_ids=(9,),
        ignore_eos=True,
        logprobs=3,
        logit_bias={12: -5.0},
        guidance_scale=3.0,
        min_tokens=2,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        priority=-3,
        cache_salt="mine",
        timeout_s=1.5,
        routing=RoutingPolicy.CALIBRATED,
        prompt_routing=RoutingPolicy.EXPERT_CHOICE,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"prompt_routing": "same"}, RoutingPolicy.CAUSAL),
        ({"prompt_routing": "same", "routing": "calibrated"}, RoutingPolicy.CALIBRATED),
        ({"prompt_routing": "causal"}, RoutingPolicy.CAUSAL),
    ],
)
async def test_prompt_routing_same(fields: dict[str, Any], expected: RoutingPolicy | None) -> None:
    assert (await params_of(**fields)).prompt_routing is expected


@pytest.mark.parametrize(
    ("modalities", "mode"),
    [
        (None, OutputMode.TEXT),
        (["text"], OutputMode.TEXT),
        (["image"], OutputMode.IMAGE),
        (["text", "image"], OutputMode.INTERLEAVED),
        (["image", "text"], OutputMode.INTERLEAVED),
    ],
)
async def test_modalities(modalities: list[str] | None, mode: OutputMode) -> None:
    assert (await params_of(modalities=modalities)).mode is mode


async def test_null_means_left_out() -> None:
    names = {*SamplingFields.model_fields} - {*IgnoredFields.model_fields, "model"}
    fields = dict.fromkeys((*names, "logprobs", "top_logprobs", "max_completion_tokens"))
    assert await params_of(**fields) == SamplingParams()
