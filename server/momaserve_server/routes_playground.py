"""`/`: the playground, static files that ask the same API as everybody else."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_FOLDER = files("momaserve_server") / "playground"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CONTENTS = {
    file.name: file.read_bytes()
    for file in sorted(_FOLDER.iterdir(), key=lambda file: file.name)
    if file.name.endswith(tuple(_TYPES))
}
_TAGS = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in _CONTENTS.items()}

MEDIA_TYPES = {name: _TYPES[name[name.rindex(".") :]] for name in _CONTENTS}
"""Every file of the playground; nothing else is served from its folder."""

HEADERS = {
    "Cache-Control": "no-cache",  # asks every time, and mostly hears that nothing has changed
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""The page loads nothing from elsewhere, makes no markup of text, and nobody may frame it."""


@router.get("/")
async def index(request: Request) -> Response:
    return _static("index.html", request)


@router.get("/playground/{name}")
async def asset(request: Request, name: str) -> Response:
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    return _static(name, request)


def _static(name: str, request: Request) -> Response:
    headers = {**HEADERS, "ETag": _TAGS[name], "Content-Type": MEDIA_TYPES[name]}
    if request.headers.get("if-none-match") == _TAGS[name]:
        return Response(status_code=304, headers=headers)
    return Response(_CONTENTS[name], headers=headers)
