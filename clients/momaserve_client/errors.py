"""What can go wrong, as classes.

ClientError
├── ConnectionFailedError   no answer, or one that broke off
├── BadReplyError           an answer that is not what a momaserve server sends
└── ApiError                the server said no: status, code, param
    ├── BadRequestError     400: the request itself
    ├── AuthenticationError 401
    ├── NotFoundError       404: unknown model or route
    ├── DeadlineError       408: the request's own `timeout_s` passed before there was an answer
    ├── TooLargeError       413
    ├── QueueFullError      429: try again after `retry_after_s`
    ├── UnavailableError    503: draining, starting, or the engine is dead
    └── ServerError         any other status
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base of all errors that this package raises."""


class ConnectionFailedError(ClientError):
    """The server cannot be reached, or the connection broke before the answer was whole."""


class BadReplyError(ClientError):
    """The answer is not what a momaserve server sends."""


class ApiError(ClientError):
    """The server refused or failed, and said so."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None when the error came in the middle of a stream."""
        self.code = code
        self.param = param
        """The request field at fault, where there is one."""
        self.retry_after_s = retry_after_s


class BadRequestError(ApiError):
    """The request can never be served as it stands."""


class AuthenticationError(ApiError):
    """The API key is missing or wrong."""


class NotFoundError(ApiError):
    """The server knows no such model or route."""


class DeadlineError(ApiError):
    """The request's own `timeout_s` passed before there was an answer."""


class TooLargeError(ApiError):
    """The request's body is too long."""


class QueueFullError(ApiError):
    """Too many requests are waiting; try again after `retry_after_s`."""


class UnavailableError(ApiError):
    """The server is starting, shutting down, or its engine is dead."""


class ServerError(ApiError):
    """The server failed."""


BY_STATUS: Mapping[int, type[ApiError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    404: NotFoundError,
    408: DeadlineError,
    413: TooLargeError,
    429: QueueFullError,
    503: UnavailableError,
}

STREAM_CODES = {"timeout": 408, "request_aborted": 503, "engine_dead": 503, "draining": 503}
"""Status that the codes of errors inside a stream stand for; others are 500."""


def response_error(status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    """The error that a reply with a status of 400 or more stands for."""
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    fields = _error_fields(payload)
    message = fields.get("message") or f"the server answered with status {status}"
    cls = BY_STATUS.get(status, ServerError)
    return cls(
        str(message),
        status=status,
        code=fields.get("code"),
        param=fields.get("param"),
        retry_after_s=_seconds(headers.get("retry-after")),
    )


def stream_error(payload: Mapping[str, Any]) -> ApiError:
    """The error that an `error` event in a stream stands for."""
    fields = _error_fields(payload)
    status = STREAM_CODES.get(str(fields.get("code")), 500)
    message = fields.get("message") or "the server failed in the middle of the answer"
    cls = BY_STATUS.get(status, ServerError)
    return cls(str(message), code=fields.get("code"), param=fields.get("param"))


def _error_fields(payload: Any) -> Mapping[str, Any]:
    fields = payload.get("error") if isinstance(payload, Mapping) else None
    return fields if isinstance(fields, Mapping) else {}


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
