"""`/health`, `/ready` and `/metrics`, for load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from momaserve.errors import DrainingError
from momaserve_server.context import context_of
from momaserve_server.errors import EngineStuckError, NotReadyError
from momaserve_server.openapi import no_body

router = APIRouter()


@router.get("/health", openapi_extra=no_body({"status": "ok"}))
async def health(request: Request) -> dict[str, str]:
    """200 while the engine makes progress, draining or not."""
    if not context_of(request).async_engine.is_healthy:
        raise EngineStuckError("the engine is dead or makes no progress")
    return {"status": "ok"}


@router.get("/ready", openapi_extra=no_body({"status": "ready"}))
async def ready(request: Request) -> dict[str, str]:
    """200 once the engine is warm and while it takes requests."""
    async_engine = context_of(request).async_engine
    if async_engine.is_draining:
        raise DrainingError("the server is shutting down")
    if not async_engine.is_healthy:
        raise EngineStuckError("the engine is dead or makes no progress")
    if not async_engine.is_ready:
        raise NotReadyError("the engine is still starting")
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    context = context_of(request)
    text = await context.workers.run(context.metrics.render, context.async_engine)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
