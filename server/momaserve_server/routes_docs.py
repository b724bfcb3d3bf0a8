"""`/docs`: the OpenAPI document in Swagger UI, whose files come with the package `fastapi-offline`
so that nothing is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_FOLDER = files("fastapi_offline") / "static"
_SCRIPT = "swagger-ui-bundle.js"
_STYLE = "swagger-ui.css"
_START = "start.js"
_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>momaserve: HTTP API</title>
<link rel="icon" href="playground/icon.svg">
<link rel="stylesheet" href="docs/{_STYLE}">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/{_SCRIPT}"></script>
<script src="docs/{_START}"></script>
</body>
</html>
"""
_START_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Swagger UI sets styles on its elements, and has its pictures in its style sheet."""


@router.get("/docs")
async def page() -> Response:
    return _answer(_PAGE.encode(), "text/html; charset=utf-8")


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    if name == _START:
        return _answer(_START_SCRIPT.encode(), "text/javascript; charset=utf-8")
    if name == _SCRIPT:
        return _answer((_FOLDER / name).read_bytes(), "text/javascript; charset=utf-8")
    if name == _STYLE:
        return _answer((_FOLDER / name).read_bytes(), "text/css; charset=utf-8")
    raise HTTPException(404)


def _answer(content: bytes, media_type: str) -> Response:
    return Response(content, headers={**_HEADERS, "Content-Type": media_type})
