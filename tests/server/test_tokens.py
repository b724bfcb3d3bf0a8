"""`/v1/tokenize` and `/v1/detokenize`: what the model reads, and back."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.server.asgi import USER, http
from tests.server.fake_engine import (
    BEGIN,
    BOS,
    END,
    MAX_MODEL_LEN,
    SEP,
    VOCAB_SIZE,
    FakeAsyncEngine,
    FakeEngine,
    byte_ids,
    code_ids,
    processor,
)

pytestmark = pytest.mark.anyio


async def post(route: str, engine: FakeEngine | None = None, **body: Any) -> tuple[int, Any]:
    async with http(FakeAsyncEngine(engine=engine)) as client:
        response = await client.post(f"/v1/{route}", json=body)
    return response.status_code, response.json()


def picture(*greys: int) -> str:
    image = Image.frombytes("L", (2, 2), bytes(greys)).resize((8, 8), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def test_a_prompt_as_the_model_reads_it() -> None:
    status, reply = await post("tokenize", prompt="ab")
    assert status == 200
    assert reply == {
        "tokens": [BOS, *byte_ids("ab"), SEP],
        "count": 4,
        "max_model_len": MAX_MODEL_LEN,
        "modalities": ["text"] * 4,
        "image_spans": [],
        "token_strs": None,
    }


async def test_bare_text() -> None:
    _, reply = await post("tokenize", prompt="ab", add_special_tokens=False, return_token_strs=True)
    assert reply["tokens"] == byte_ids("ab")
    assert reply["token_strs"] == ["a", "b"]


async def test_special_tokens_in_a_users_text_are_text() -> None:
    _, reply = await post("tokenize", prompt="<|eos|>", add_special_tokens=False)
    assert reply["tokens"] == byte_ids("<|eos|>")


async def test_pictures_of_messages_are_spans() -> None:
    part = {"type": "image_url", "image_url": {"url": picture(40, 40, 40, 40)}}
    content = [{"type": "text", "text": "a"}, part, part]
    _, reply = await post("tokenize", messages=[{"role": "user", "content": content}])
    span = [BEGIN, *code_ids(2, 2, 2, 2), END]
    assert reply["tokens"] == [BOS, *byte_ids("a"), *span, *span, SEP]
    assert reply["image_spans"] == [{"start": 2, "end": 8}, {"start": 8, "end": 14}]
    assert reply["modalities"][2:8] == ["text", *["image"] * 4, "text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "a", "messages": [USER]}, None),
        ({"messages": [USER], "add_special_tokens": False}, None),
        ({"prompt": "a", "text": "b"}, "text"),
        ({"prompt": 1}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
async def test_bad_bodies(body: dict[str, Any], param: str | None) -> None:
    status, reply = await post("tokenize", **body)
    assert status == 400
    assert reply["error"]["param"] in (param, None)


@pytest.mark.parametrize("route", ["tokenize", "detokenize"])
async def test_another_model_is_not_found(route: str) -> None:
    body = {"prompt": "a"} if route == "tokenize" else {"tokens": [BOS]}
    status, reply = await post(route, model="other", **body)
    assert status == 404
    assert reply["error"]["code"] == "model_not_found"


async def test_without_a_tokenizer_there_are_no_words() -> None:
    engine = FakeEngine(processor=processor(has_text=False))
    for special in (True, False):
        status, reply = await post("tokenize", engine, prompt="a", add_special_tokens=special)
        assert status == 400
        assert "tokenizer.json" in reply["error"]["message"]


async def test_text_and_pictures_come_back() -> None:
    ids = [BOS, *byte_ids("Grüße"), BEGIN, *code_ids(1, 2, 3, 4), END, *byte_ids("!"), SEP]
    status, reply = await post("detokenize", tokens=ids)
    assert status == 200
    assert reply["prompt"] == "Grüße!"
    assert [part["type"] for part in reply["parts"]] == ["text", "image_url", "text"]
    url = reply["parts"][1]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L")
    assert image.resize((2, 2), Image.Resampling.NEAREST).tobytes() == bytes((16, 32, 48, 64))


async def test_a_picture_that_is_not_whole_is_shown_as_far_as_it_goes() -> None:
    _, reply = await post("detokenize", tokens=[BEGIN, *code_ids(1)])
    url = reply["parts"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L")
    assert image.resize((2, 2), Image.Resampling.NEAREST).tobytes() == bytes((16, 240, 240, 240))


async def test_what_was_tokenized_comes_back() -> None:
    _, tokenized = await post("tokenize", prompt="one, zwei")
    _, back = await post("detokenize", tokens=tokenized["tokens"])
    assert back == {"prompt": "one, zwei", "parts": [{"type": "text", "text": "one, zwei"}]}


@pytest.mark.parametrize("tokens", [[], [BOS]])
async def test_nothing_makes_nothing(tokens: list[int]) -> None:
    status, reply = await post("detokenize", tokens=tokens)
    assert (status, reply) == (200, {"prompt": "", "parts": []})


@pytest.mark.parametrize(
    "tokens",
    [
        [VOCAB_SIZE],
        [-1],
        [2**40],
        code_ids(1),
        [END],
        [BOS] * (MAX_MODEL_LEN + 1),
        ["a"],
        None,
    ],
)
async def test_ids_that_mean_nothing(tokens: Any) -> None:
    status, reply = await post("detokenize", tokens=tokens)
    assert status == 400
    assert (reply["error"]["param"] or "").startswith("tokens")


async def test_a_checkpoint_without_pixels_gives_its_words() -> None:
    engine = FakeEngine(processor=processor(has_pixels=False))
    ids = [BOS, *byte_ids("a"), BEGIN, *code_ids(1, 2, 3, 4), END]
    status, reply = await post("detokenize", engine, tokens=ids)
    assert (status, reply["parts"]) == (200, [{"type": "text", "text": "a"}])
