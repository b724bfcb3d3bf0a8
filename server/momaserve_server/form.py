"""Reads a multipart form: fields become a schema, files stay bytes."""

from __future__ import annotations

import sys
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from momaserve_server.body import body_error
from momaserve_server.errors import InvalidBodyError

Form = TypeVar("Form", bound=BaseModel)

MAX_FIELDS = 64
MAX_FILES = 16
MAX_FIELD_BYTES = 1 << 20


class _MemoryParser(MultiPartParser):
    """Keeps files in memory: their size is bounded by the body's, and a container's file system
    may be read-only."""

    spool_max_size = sys.maxsize


async def read_form(
    request: Request, schema: type[Form], files: tuple[str, ...]
) -> tuple[Form, dict[str, bytes]]:
    """The fields of a form as `schema`, and the files that it has of those called `files`.

    A file may also be called `name[]`, as OpenAI's SDKs do for lists.

    Raises:
        InvalidBodyError: no form, an unknown field, a wrong value, a field twice, a file too many.
        BodyTooLargeError: more bytes than the operator allows (from the middleware).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise InvalidBodyError(
            "the body must be a form: send 'Content-Type: multipart/form-data', "
            f"got {media_type!r}",
            code="unsupported_media_type",
        )
    parser = _MemoryParser(
        request.headers,
        request.stream(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: a header without boundary
        reason = error.message if isinstance(error, MultiPartException) else "no boundary"
        raise InvalidBodyError(f"the form is broken: {reason}", code="invalid_form") from None
    fields: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in contents or name in fields:
            raise InvalidBodyError(
                f"{name!r} may be given once only", param=name, code="invalid_value"
            )
        if isinstance(value, UploadFile):
            if name not in files:
                raise InvalidBodyError(f"unknown file {name!r}", param=name, code="unknown_field")
            contents[name] = await value.read()
        elif name in files:
            raise InvalidBodyError(f"{name!r} must be a file", param=name, code="invalid_value")
        else:
            fields[name] = value
    try:
        return schema.model_validate_strings(fields), contents
    except ValidationError as error:
        raise body_error(error) from None
