"""`/`: the playground, static files that ask the same API as everybody else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "playground.css": "text/css; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "sse.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Every file of the playground; nothing else is served from its folder."""

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""The page loads nothing from elsewhere, and nobody may frame it."""

_FOLDER = files("momaserve_server") / "playground"
_CONTENTS = {name: (_FOLDER / name).read_bytes() for name in MEDIA_TYPES}


@router.get("/")
async def index() -> Response:
    return _static("index.html")


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    if name not in MEDIA_TYPES:
        raise HTTPException(404)
    return _static(name)


def _static(name: str) -> Response:
    return Response(_CONTENTS[name], headers={**HEADERS, "Content-Type": MEDIA_TYPES[name]})
