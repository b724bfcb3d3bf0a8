"""`/openapi.json` tells the truth: its examples are answered, and answered as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.routing import APIRoute

from momaserve_server import examples
from momaserve_server.app import ROUTES
from momaserve_server.errors import ERROR_TABLE
from momaserve_server.openapi import Loose, plain, schema_of
from tests.server.asgi import client_of, http, make_app

pytestmark = pytest.mark.anyio
DOCUMENT: dict[str, Any] = make_app().openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def json_of(response: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = response["content"]["application/json"]
    return content


def shown_bodies() -> list[Any]:
    return [
        pytest.param(path, example["value"], id=f"{path} {example['summary']}")
        for path, _, operation in operations()
        for example in operation.get("requestBody", {})
        .get("content", {})
        .get("application/json", {})
        .get("examples", {})
        .values()
    ]


@pytest.mark.parametrize(("path", "body"), shown_bodies())
async def test_bodies_are_answered_as_described(path: str, body: dict[str, Any]) -> None:
    async with http() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.headers["content-type"].startswith("text/event-stream")
        return
    described = json_of(DOCUMENT["paths"][path]["post"]["responses"]["200"])
    jsonschema.validate(response.json(), described["schema"])


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fake", "/v1/router", "/version"])
async def test_replies_look_as_described(path: str) -> None:
    described = path.replace("fake", "{model_id}")
    async with http() as client:
        response = await client.get(path)
    reply = json_of(DOCUMENT["paths"][described]["get"]["responses"]["200"])
    jsonschema.validate(response.json(), reply["schema"])


def test_every_route_is_described() -> None:
    told = {(path, method.upper()) for path, method, _ in operations()}
    there = {
        (route.path.replace(":path}", "}"), method)
        for module in ROUTES
        for route in module.router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    }
    assert told == there
    assert "/v1/images/edits" in DOCUMENT["paths"]


def test_every_error_has_openais_shape_and_its_codes() -> None:
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            if status == "200":
                continue
            assert json_of(response)["schema"] == {"$ref": "#/components/schemas/Error"}, path
            codes = {kind.code for _, kind in ERROR_TABLE if kind.status == int(status)}
            assert all(f"`{code}`" in response["description"] for code in codes)
    assert "422" not in str(DOCUMENT["paths"])


def test_all_references_resolve() -> None:
    names = set(re.findall(r"#/components/schemas/(\w+)", str(DOCUMENT)))
    assert names <= set(DOCUMENT["components"]["schemas"])
    assert {"ChatRequest", "TokenizeRequest", "Error"} <= names


def test_examples_keep_to_their_own_schemas() -> None:
    for name in dir(examples):
        if name.endswith("_REPLY") or name in ("MODEL", "ROUTER", "ABORTED"):
            example = getattr(examples, name)
            jsonschema.validate(plain(example), schema_of(example))


def test_a_schema_says_what_its_example_has() -> None:
    schema = schema_of({"a": 1, "b": [0.5], "c": Loose("x"), "d": True, "e": None, "f": []})
    good = {"a": 2, "b": [1, 2.5], "c": 3, "d": False, "e": "x", "f": [1]}
    jsonschema.validate(good, schema)
    for bad in ({**good, "a": "2"}, {**good, "b": ["x"]}, {**good, "d": 1}, {"a": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


async def test_the_page_loads_nothing_from_elsewhere() -> None:
    async with client_of(make_app()) as client:
        page = await client.get("/docs")
        assert page.status_code == 200
        assert "//" not in page.text.replace("<!doctype", "")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert (await client.get(f"/{name}")).status_code == 200, name
        assert (await client.get("/docs/core.py")).status_code == 404
