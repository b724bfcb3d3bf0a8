"""The OpenAPI document. Routes read their bodies themselves, so it is told what they take.

Replies are described by examples: their schema is that of the example, with all of its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from momaserve_server.errors import ERROR_TABLE, HTTP_CODES

REF = "#/components/schemas/{model}"
ERROR_REF = {"$ref": REF.format(model="Error")}

READS = (500, 503)
"""Statuses, besides 200, of routes that only look."""
TAKES_BODY = (400, 404, 413, *READS)
GENERATES = (*TAKES_BODY, 408, 429)
EVERYWHERE = (401,)
"""Where the server wants a key."""


@dataclass(frozen=True, slots=True)
class Loose:
    """Part of an example whose shape another reply need not have."""

    value: Any


def json_body(
    schema: type[BaseModel],
    examples: Mapping[str, Any],
    reply: Any,
    *,
    statuses: Sequence[int],
    is_streamed: bool = False,
) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `schema`.

    Args:
        examples: bodies by a short description.
        reply: one reply; parts that may look otherwise are `Loose`.
        statuses: of its errors.
        is_streamed: whether it also answers with server-sent events.
    """
    shown = {
        f"example-{i}": {"summary": s, "value": v} for i, (s, v) in enumerate(examples.items())
    }
    reference = {"$ref": REF.format(model=schema.__name__)}
    content = {"application/json": {"schema": reference, "examples": shown}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": _responses(reply, statuses, is_streamed=is_streamed),
    }


def form_body(
    schema: type[BaseModel],
    files: Sequence[str],
    required: Sequence[str],
    reply: Any,
    *,
    statuses: Sequence[int],
) -> dict[str, Any]:
    """The same for a route that takes a form of `schema`'s fields and files."""
    form = schema.model_json_schema(ref_template=REF)
    assert "$defs" not in form, "fields of a form are plain values"
    file = {"type": "string", "format": "binary"}
    form["properties"] = {**form["properties"], **dict.fromkeys(files, file)}
    form["required"] = [*form["required"], *required]
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": _responses(reply, statuses, is_streamed=True),
    }


def no_body(reply: Any, *, statuses: Sequence[int] = READS) -> dict[str, Any]:
    """The same for a route that takes nothing."""
    return {"responses": _responses(reply, statuses, is_streamed=False)}


def _responses(reply: Any, statuses: Sequence[int], *, is_streamed: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": schema_of(reply), "example": plain(reply)}
    }
    if is_streamed:
        content["text/event-stream"] = {}
    return {
        "200": {"description": "OK", "content": content},
        **{str(status): _error(status) for status in sorted({*statuses, *EVERYWHERE})},
    }


def _error(status: int) -> dict[str, Any]:
    codes = {kind.code for _, kind in ERROR_TABLE if kind.status == status}
    codes |= {code for known, code in HTTP_CODES.items() if known == status}
    named = ", ".join(f"`{code}`" for code in sorted(codes))
    return {
        "description": f"{HTTPStatus(status).phrase}: {named}",
        "content": {"application/json": {"schema": ERROR_REF}},
    }


def plain(example: Any) -> Any:
    """`example` without its `Loose` marks."""
    if isinstance(example, Loose):
        return plain(example.value)
    if isinstance(example, Mapping):
        return {name: plain(value) for name, value in example.items()}
    return [plain(item) for item in example] if isinstance(example, list) else example


def schema_of(example: Any) -> dict[str, Any]:
    """JSON schema of everything that looks like `example`; None and `Loose` look like anything."""
    if isinstance(example, Mapping):
        fields = {name: schema_of(value) for name, value in example.items()}
        return {"type": "object", "properties": fields, "required": list(fields)}
    if isinstance(example, list):
        return {"type": "array", "items": schema_of(example[0]) if example else {}}
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "boolean"),  # before int, of which it is one
        (int, "integer"),
        (float, "number"),
        (str, "string"),
    )
    return next(({"type": name} for kind, name in kinds if isinstance(example, kind)), {})


ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def describe_bodies(app: FastAPI, schemas: Sequence[type[BaseModel]]) -> None:
    """Adds the components that routes refer to, to `/openapi.json`, and drops FastAPI's own 422s,
    which no route answers with."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        components = document.setdefault("components", {}).setdefault("schemas", {})
        _, definitions = models_json_schema(
            [(schema, "validation") for schema in schemas], ref_template=REF
        )
        components.update(definitions["$defs"])
        components["Error"] = ERROR_SCHEMA
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
