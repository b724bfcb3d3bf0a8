"""Pictures in requests: data URLs only, inside the limits, never on the event loop."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.server.asgi import http
from tests.server.fake_engine import (
    BEGIN,
    END,
    FakeAsyncEngine,
    FakeEngine,
    code_ids,
    processor,
)

pytestmark = pytest.mark.anyio


def png(width: int = 8, height: int = 8, grey: int = 160) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), grey).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def ask(*urls: str, text: str = "what?") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


async def test_picture_becomes_its_codes() -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        response = await client.post("/v1/chat/completions", json=ask(data_url(png(grey=160))))
    assert response.status_code == 200
    ids = fake.submissions[0].prompt.token_ids
    assert ids[1:7] == (BEGIN, *code_ids(10, 10, 10, 10), END)
    usage = response.json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 4}


async def test_assistant_pictures_come_back_in_a_conversation() -> None:
    async with http() as client:
        first = await client.post(
            "/v1/chat/completions", json=ask(data_url(png())) | {"modalities": ["text", "image"]}
        )
        message = first.json()["choices"][0]["message"]
        again = ask(data_url(png()))["messages"]
        response = await client.post("/v1/chat/completions", json={"messages": [*again, message]})
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "image_tokens": 8,
    }


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/a.png", "does not fetch"),
        ("HTTPS://example.com/a.png", "does not fetch"),
        ("file:///etc/passwd", "must be a 'data:image"),
        ("/etc/passwd", "must be a 'data:image"),
        ("", "must be a 'data:image"),
        ("data:image/png,xyz", "must be a 'data:image"),
        ("data:text/html;base64,eA==", "'text/html'"),
        ("data:image/png;base64,????", "not valid base64"),
        ("data:image/png;base64,eA", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        (data_url(b"no picture"), "broken or not"),
        (data_url(b""), "broken or not"),
        (data_url(png()[:40]), "broken"),
        (data_url(png(1, 1)), "at least"),
    ],
)
async def test_bad_pictures_are_refused_by_place(url: str, words: str) -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        response = await client.post("/v1/chat/completions", json=ask(url))
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == "messages.0.content.0.image_url"
    assert fake.submissions == []


async def test_limits_are_in_the_message() -> None:
    async with http(max_image_bytes=60, max_image_pixels=100, max_images_per_request=1) as client:
        large = await client.post("/v1/chat/completions", json=ask(data_url(b"x" * 61)))
        huge = await client.post("/v1/chat/completions", json=ask(data_url(b"x" * 1000)))
        many = await client.post("/v1/chat/completions", json=ask(data_url(b"x"), data_url(b"x")))
    async with http(max_image_pixels=100) as client:
        wide = await client.post("/v1/chat/completions", json=ask(data_url(png(20, 6))))
    for response, words in (
        (large, ("61", "60")),
        (huge, ("1000", "60")),
        (many, ("2 pictures", "limit is 1")),
        (wide, ("100 pixels", "20 x 6")),
    ):
        assert response.status_code == 400
        assert all(word in response.json()["error"]["message"] for word in words)


async def test_developer_is_the_old_system_role() -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        for role in ("system", "developer"):
            body = {"messages": [{"role": role, "content": "a"}, {"role": "user", "content": "b"}]}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200
    assert fake.submissions[0].prompt == fake.submissions[1].prompt


async def test_pictures_need_an_image_tokenizer() -> None:
    blind = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_pixels=False)))
    mute = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_text=False)))
    async with http(blind) as client:
        seen = await client.post("/v1/chat/completions", json=ask(data_url(png())))
        drawn = await client.post(
            "/v1/chat/completions", json=ask() | {"modalities": ["image"], "stream": True}
        )
        images = await client.post("/v1/images/generations", json={"prompt": "x"})
    async with http(mute) as client:
        said = await client.post("/v1/chat/completions", json=ask())
    for response, words in (
        (seen, "image_tokenizer"),
        (drawn, "image_tokenizer"),
        (images, "image_tokenizer"),
        (said, "tokenizer.json"),
    ):
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
