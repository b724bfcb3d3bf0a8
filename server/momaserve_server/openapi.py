"""The OpenAPI document. Routes read their bodies themselves, so it is told what they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `schema`."""
    reference = {"$ref": REF.format(model=schema.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def describe_bodies(app: FastAPI, schemas: Sequence[type[BaseModel]]) -> None:
    """Adds the components that `json_body` refers to, to `/openapi.json`."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        components = document.setdefault("components", {}).setdefault("schemas", {})
        _, definitions = models_json_schema(
            [(schema, "validation") for schema in schemas], ref_template=REF
        )
        components.update(definitions["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
