"""`/v1/models`, `/version`, `/health`, `/ready`, the static files, the OpenAPI document."""

from __future__ import annotations

import re

import pytest

from momaserve import __version__
from momaserve_server.routes_playground import MEDIA_TYPES
from tests.server.asgi import client_of, http, make_app
from tests.server.fake_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio


async def test_models_list_the_one_that_is_served() -> None:
    async with http() as client:
        listed = (await client.get("/v1/models")).json()
        single = (await client.get("/v1/models/fake")).json()
    assert listed == {"object": "list", "data": [single]}
    assert single["id"] == "fake"
    assert single["object"] == "model"
    assert single["max_model_len"] == 256
    assert single["modalities"] == ["text", "image"]
    assert single["image"]["size"] == [8, 8]
    assert single["routing"] == {"default": "causal", "prompt": "same"}
    assert single["expert_groups"][0] == {
        "name": "text",
        "modalities": ["text"],
        "num_experts": 4,
    }
    assert single["limits"]["n"] == 16


async def test_model_names_may_have_slashes() -> None:
    async with http(served_model_name="me/apple") as client:
        assert (await client.get("/v1/models/me/apple")).json()["id"] == "me/apple"


async def test_version() -> None:
    async with http() as client:
        assert (await client.get("/version")).json()["version"] == __version__


@pytest.mark.parametrize(
    ("is_healthy", "is_ready", "is_draining", "health", "ready"),
    [
        (True, True, False, 200, 200),
        (True, False, False, 200, 503),
        (True, False, True, 200, 503),
        (False, False, False, 503, 503),
        (False, True, False, 503, 503),
    ],
)
async def test_health_and_readiness(
    is_healthy: bool, is_ready: bool, is_draining: bool, health: int, ready: int
) -> None:
    fake = FakeAsyncEngine()
    fake.is_healthy, fake.is_ready, fake.is_draining = is_healthy, is_ready, is_draining
    async with http(fake) as client:
        answers = [await client.get("/health"), await client.get("/ready")]
    assert [answer.status_code for answer in answers] == [health, ready]
    for answer in answers:
        assert ("error" in answer.json()) == (answer.status_code != 200)


async def test_lifespan_starts_and_ends_the_engine() -> None:
    fake = FakeAsyncEngine()
    app = make_app(fake)
    async with app.router.lifespan_context(app):
        assert fake.is_started
        assert not fake.is_draining
    assert fake.is_draining
    assert fake.is_closed


async def test_playground_files_ask_nothing_from_elsewhere() -> None:
    async with client_of(make_app()) as client:
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name, media_type in MEDIA_TYPES.items():
            response = await client.get(f"/playground/{name}")
            assert response.headers["content-type"] == media_type
            text = response.text.replace("http://www.w3.org/2000/svg", "")
            assert re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text) is None, name
        assert (await client.get("/playground/../settings.py")).status_code == 404
        assert (await client.get("/playground/__init__.py")).status_code == 404


async def test_openapi_document_knows_the_bodies() -> None:
    async with http() as client:
        document = (await client.get("/openapi.json")).json()
    for path, name in (
        ("/v1/chat/completions", "ChatRequest"),
        ("/v1/completions", "CompletionRequest"),
        ("/v1/images/generations", "ImageRequest"),
    ):
        body = document["paths"][path]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"] == {
            "$ref": f"#/components/schemas/{name}"
        }
        assert document["components"]["schemas"][name]["additionalProperties"] is False
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references <= set(document["components"]["schemas"])
