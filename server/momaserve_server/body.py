"""Reads a request's body and turns it into a schema, or into one clear error."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from momaserve_server.errors import InvalidBodyError
from momaserve_server.schemas_common import UNSUPPORTED_FIELDS
from momaserve_server.workers import Workers

Body = TypeVar("Body", bound=BaseModel)

LARGE_BODY_BYTES = 1 << 18
"""Above this, parsing takes milliseconds and leaves the event loop."""

MAX_SHOWN_CHARS = 80


async def read_body(request: Request, schema: type[Body], workers: Workers) -> Body:
    """The body of `request` as `schema`.

    Raises:
        InvalidBodyError: not JSON, unknown field, wrong type or value; names the field.
        BodyTooLargeError: more bytes than the operator allows (from the middleware).
    """
    content_type = request.headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidBodyError(
            f"the body must be JSON: send 'Content-Type: application/json', got {media_type!r}",
            code="unsupported_media_type",
        )
    raw = await request.body()
    if len(raw) > LARGE_BODY_BYTES:
        return await workers.run(_parse, raw, schema)
    return _parse(raw, schema)


def _parse(raw: bytes, schema: type[Body]) -> Body:
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise body_error(error) from None


def body_error(error: ValidationError) -> InvalidBodyError:
    """The one of `error`'s findings that helps most: the deepest, since a union reports one
    per member and the member that was meant gets furthest."""
    details = error.errors(include_url=False, include_context=False)
    detail = max(details, key=lambda item: len(item["loc"]))  # max keeps the first of equals
    param = _param(detail)
    if detail["type"] == "json_invalid":
        return InvalidBodyError(
            f"the body is not valid JSON ({detail['msg'].removeprefix('Invalid JSON: ')})",
            code="invalid_json",
        )
    if detail["type"] == "extra_forbidden":
        reason = UNSUPPORTED_FIELDS.get(param or "")
        message = f"unknown field {param!r}" if reason is None else f"{param!r}: {reason}"
        return InvalidBodyError(message, param=param, code="unknown_field")
    if detail["type"] == "missing":
        return InvalidBodyError(f"{param!r} is required", param=param, code="missing_field")
    if detail["type"] == "model_type" and param is None:
        return InvalidBodyError("the body must be a JSON object", code="invalid_body")
    message = detail["msg"].removeprefix("Value error, ")
    where = f"{param}: " if param else ""
    if detail["type"] != "value_error":
        message = f"{message}, got {_shown(detail['input'])}"
    return InvalidBodyError(
        f"{where}{message[0].lower()}{message[1:]}", param=param, code="invalid_value"
    )


def _param(detail: ErrorDetails) -> str | None:
    """`messages.0.content` out of pydantic's location, without its names of union members."""
    last = len(detail["loc"]) - 1
    steps = [
        str(step)
        for at, step in enumerate(detail["loc"])
        if isinstance(step, int)
        or (detail["type"] == "extra_forbidden" and at == last)  # the client's own word
        or (step != "str" and "[" not in step)
    ]
    return ".".join(steps) or None


def _shown(value: Any) -> str:
    text = repr(value[:MAX_SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"
