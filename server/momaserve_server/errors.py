"""Every way a request can fail, as one table: error class -> status, type and code.

Whatever goes wrong, the client gets OpenAI's shape `{"error": {message, type, param, code}}`.
The server's own error classes are here too; the engine's are in `momaserve.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from momaserve.errors import (
    DeadlineError,
    DrainingError,
    EngineDeadError,
    MomaserveError,
    PromptError,
    QueueFullError,
    RequestError,
    SamplingError,
)
from momaserve_server.request_record import CLIENT_CLOSED_REQUEST, current_record

DRAIN_RETRY_AFTER_S = 5


class InvalidBodyError(RequestError):
    """The body is not JSON, or not the JSON that this route takes."""

    def __init__(self, message: str, *, param: str | None = None, code: str) -> None:
        super().__init__(message, param=param)
        self.code = code


class ModelNotFoundError(MomaserveError):
    """The request names a model that is not served here."""

    param = "model"


class InvalidApiKeyError(MomaserveError):
    """The request has no API key, or a wrong one."""


class BodyTooLargeError(MomaserveError):
    """The body is longer than the operator allows."""


class NotReadyError(MomaserveError):
    """The engine has not finished starting."""


class EngineStuckError(MomaserveError):
    """The engine is alive but makes no progress."""


class RequestAbortedError(MomaserveError):
    """The request was ended before it finished, by the server's shutdown or through the API."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        """Whether it was meant to end: whoever sends it again would undo that."""


class RequestNotFoundError(MomaserveError):
    """No request of that id is waiting or running."""


class GenerationFailedError(MomaserveError):
    """The engine failed while it computed this request."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of error is told to the client."""

    status: int
    type: str
    code: str


INTERNAL = ErrorKind(500, "server_error", "internal_error")

ERROR_TABLE: tuple[tuple[type[MomaserveError], ErrorKind], ...] = (
    # The first class that matches counts: subclasses stand before their bases.
    (InvalidBodyError, ErrorKind(400, "invalid_request_error", "invalid_body")),
    (PromptError, ErrorKind(400, "invalid_request_error", "invalid_prompt")),
    (SamplingError, ErrorKind(400, "invalid_request_error", "invalid_value")),
    (RequestError, ErrorKind(400, "invalid_request_error", "invalid_request")),
    (InvalidApiKeyError, ErrorKind(401, "invalid_request_error", "invalid_api_key")),
    (ModelNotFoundError, ErrorKind(404, "invalid_request_error", "model_not_found")),
    (RequestNotFoundError, ErrorKind(404, "invalid_request_error", "request_not_found")),
    (DeadlineError, ErrorKind(408, "timeout_error", "timeout")),
    (BodyTooLargeError, ErrorKind(413, "invalid_request_error", "body_too_large")),
    (QueueFullError, ErrorKind(429, "rate_limit_error", "queue_full")),
    (DrainingError, ErrorKind(503, "server_error", "draining")),
    (NotReadyError, ErrorKind(503, "server_error", "not_ready")),
    (EngineStuckError, ErrorKind(503, "server_error", "engine_stuck")),
    (EngineDeadError, ErrorKind(503, "server_error", "engine_dead")),
    (RequestAbortedError, ErrorKind(503, "server_error", "request_aborted")),
    (GenerationFailedError, ErrorKind(500, "server_error", "generation_failed")),
    (MomaserveError, INTERNAL),
)

HTTP_CODES = {404: "route_not_found", 405: "method_not_allowed"}
"""Codes for what the web framework itself refuses."""


@dataclass(frozen=True, slots=True)
class WireError:
    """One error as the client sees it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        current_record().error_code = self.code  # for the access log: it is told now
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=dict(self.headers))


def wire_error(error: BaseException) -> WireError:
    """What the client is told about `error`. Unexpected errors keep their text to themselves."""
    if not isinstance(error, MomaserveError):
        return WireError(
            INTERNAL.status, "internal error: see the server's log", INTERNAL.type, INTERNAL.code
        )
    kind = next(kind for cls, kind in ERROR_TABLE if isinstance(error, cls))
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, DrainingError):
        headers["Retry-After"] = str(DRAIN_RETRY_AFTER_S)
    elif isinstance(error, DeadlineError) or (
        isinstance(error, RequestAbortedError) and error.is_final
    ):
        # OpenAI's clients send a request again after a 408 or a 503, unless they are told not to.
        headers["X-Should-Retry"] = "false"
    elif isinstance(error, InvalidApiKeyError):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, BodyTooLargeError):
        # The rest of the body is not read, so the connection cannot be used again.
        headers["Connection"] = "close"
    return WireError(
        status=kind.status,
        message=str(error),
        type=kind.type,
        code=error.code if isinstance(error, InvalidBodyError) else kind.code,
        param=getattr(error, "param", None),
        headers=headers,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    return wire_error(error).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    code = HTTP_CODES.get(status, "http_error")
    messages = {
        404: f"unknown route: {request.method} {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(status) or str(error.detail) or HTTPStatus(status).phrase
    return WireError(
        status, message, "invalid_request_error", code, headers=error.headers or {}
    ).response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody is there to read it


def install_error_handlers(app: FastAPI) -> None:
    """Makes every failure of `app`, the framework's own included, take OpenAI's error shape."""
    app.add_exception_handler(MomaserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)
