"""What every route needs, in one immutable object on `app.state`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from momaserve.async_engine import AsyncEngine
from momaserve.errors import DrainingError
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from momaserve_server.errors import ModelNotFoundError, NotReadyError
from momaserve_server.fetch import ImageFetcher
from momaserve_server.metrics import ServerMetrics
from momaserve_server.running import RunningRequests
from momaserve_server.settings import ServerSettings
from momaserve_server.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    async_engine: AsyncEngine
    settings: ServerSettings
    metrics: ServerMetrics
    workers: Workers
    model_name: str
    fetcher: ImageFetcher | None = None
    """None where the operator allows no host."""
    shadow_eval: ShadowEval | None = None
    """None unless the operator asks for it."""
    running: RunningRequests = field(default_factory=RunningRequests)
    created_s: int
    """Unix time at which the server started; `created` of the model."""

    def check_accepting(self) -> None:
        """Refuse before any work is done.

        Raises:
            DrainingError: the server is shutting down.
            NotReadyError: the engine has not finished starting.
        """
        if self.async_engine.is_draining:
            self.metrics.on_rejected("draining")
            raise DrainingError("the server is shutting down and takes no new requests")
        if not self.async_engine.is_ready and self.async_engine.is_healthy:
            self.metrics.on_rejected("not_ready")
            raise NotReadyError("the engine is still starting")

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless `name` is the served model or left out."""
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist; this server serves {self.model_name!r}"
            )


def context_of(request: Request) -> ServerContext:
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


def request_id_of(request: Request) -> str:
    """The id that `RequestIdMiddleware` gave this request."""
    return str(request.scope["state"]["request_id"])
