"""Puts the web application together. Starts and stops the engine with it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI

from momaserve import __version__
from momaserve.async_engine import AsyncEngine
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from momaserve_server import (
    routes_chat,
    routes_completions,
    routes_docs,
    routes_edits,
    routes_health,
    routes_images,
    routes_models,
    routes_playground,
    routes_requests,
    routes_router,
    routes_tokens,
)
from momaserve_server.context import ServerContext
from momaserve_server.errors import install_error_handlers
from momaserve_server.fetch import ImageFetcher
from momaserve_server.metrics import ServerMetrics
from momaserve_server.middleware import add_middleware
from momaserve_server.openapi import describe_bodies
from momaserve_server.request_record import RequestRecord
from momaserve_server.schemas_chat import ChatRequest
from momaserve_server.schemas_completions import CompletionRequest
from momaserve_server.schemas_images import ImageRequest
from momaserve_server.schemas_tokens import DetokenizeRequest, TokenizeRequest
from momaserve_server.settings import ServerSettings
from momaserve_server.shadow_metrics import ShadowCollector
from momaserve_server.workers import Workers

ROUTES = (
    routes_chat,
    routes_completions,
    routes_images,
    routes_edits,
    routes_tokens,
    routes_models,
    routes_router,
    routes_requests,
    routes_health,
    routes_docs,
    routes_playground,
)

BODIES = (
    ChatRequest,
    CompletionRequest,
    ImageRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
"""Schemas that routes refer to in the OpenAPI document."""


def create_app(
    async_engine: AsyncEngine,
    settings: ServerSettings,
    *,
    metrics: ServerMetrics,
    listeners: Sequence[Callable[[RequestRecord], None]] = (),
    shadow_eval: ShadowEval | None = None,
) -> FastAPI:
    """The application over one engine.

    Its lifespan owns the engine's: it starts the engine thread, and at the end lets running
    requests finish for up to `settings.drain_timeout_s` before it closes the engine.

    Args:
        metrics: the listener that `async_engine` was built with.
        listeners: are told of each HTTP request at its end.
        shadow_eval: scores finished requests; starts and stops with the engine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        if shadow_eval is not None:
            shadow_eval.start()
        async_engine.start()
        yield
        if shadow_eval is not None:
            await anyio.to_thread.run_sync(shadow_eval.close)
        await async_engine.drain(settings.drain_timeout_s)
        await anyio.to_thread.run_sync(async_engine.close)
        if fetcher is not None:
            await fetcher.aclose()

    if shadow_eval is not None:
        metrics.registry.register(ShadowCollector(shadow_eval.totals))
    fetcher: ImageFetcher | None = None
    if settings.allow_image_hosts:
        fetcher = ImageFetcher(
            settings.allow_image_hosts,
            timeout_s=settings.image_fetch_timeout_s,
            max_bytes=settings.max_image_bytes,
        )
    app = FastAPI(
        title="momaserve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere; `routes_docs` has its own
        redoc_url=None,
    )
    app.state.context = ServerContext(
        async_engine=async_engine,
        settings=settings,
        metrics=metrics,
        workers=Workers(settings.worker_threads),
        model_name=settings.served_model_name or async_engine.engine.model_name,
        created_s=int(time.time()),
        fetcher=fetcher,
        shadow_eval=shadow_eval,
    )
    add_middleware(app, settings, listeners)
    install_error_handlers(app)
    for module in ROUTES:
        app.include_router(module.router)
    describe_bodies(app, BODIES)
    return app
