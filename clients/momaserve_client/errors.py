"""What can go wrong, as classes.

ClientError                         has `request_id`
├── ConnectionFailedError           no answer, or one that broke off
│   ├── NotConnectedError           nobody listens there: nothing was sent
│   └── ClientTimeoutError          one of the client's own `Timeouts` passed
├── BadReplyError                   an answer that is not what a momaserve server sends
└── ApiError                        the server said no: status, code, param
    ├── BadRequestError             400 and other 4xx: the request itself
    │   ├── InvalidPromptError      `invalid_prompt`: ids, pictures or length of the prompt
    │   └── UnknownFieldError       `unknown_field`: an option that this server does not have
    ├── AuthenticationError         401
    ├── NotFoundError               404: the server has no such route
    │   ├── ModelNotFoundError      `model_not_found`
    │   └── RequestNotFoundError    `request_not_found`: nothing by that id runs (any more)
    ├── DeadlineError               408: the request's own `timeout_s` passed
    ├── TooLargeError               413
    ├── RateLimitError              429: try again after `retry_after_s`
    │   └── QueueFullError          `queue_full`
    ├── UnavailableError            503
    │   ├── DrainingError           `draining`: the server is shutting down
    │   ├── NotReadyError           `not_ready`: the engine is still starting
    │   ├── EngineStuckError        `engine_stuck`
    │   ├── EngineDeadError         `engine_dead`
    │   └── RequestAbortedError     `request_aborted`: by the server's shutdown or an abort
    └── ServerError                 500 and other 5xx
        └── GenerationFailedError   `generation_failed`: the engine failed on this request
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

MAX_EXCERPT_CHARS = 100
FALSE = "false"


class ClientError(Exception):
    """Base of all errors that this package raises while it talks to a server."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id
        """The id by which the server's log knows the request; chosen before it was sent."""


class ConnectionFailedError(ClientError):
    """The server cannot be reached, or the connection broke before the answer was whole."""


class NotConnectedError(ConnectionFailedError):
    """No connection was made, so the server knows nothing of the request."""


class ClientTimeoutError(ConnectionFailedError):
    """A limit of the client's `Timeouts` passed. The server may have done the work."""


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
        type: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id)
        self.status = status
        """HTTP status; None when the error came in the middle of a stream."""
        self.code = code
        self.type = type
        self.param = param
        """The request field at fault, where there is one."""
        self.retry_after_s = retry_after_s
        """What `Retry-After` says."""
        self.should_retry = should_retry
        """What `X-Should-Retry` says; None if it is not there."""


class BadRequestError(ApiError):
    """The request can never be served as it stands."""


class InvalidPromptError(BadRequestError):
    """Token ids, pictures or length of the prompt."""


class UnknownFieldError(BadRequestError):
    """This server does not know an option; `param` names it."""


class AuthenticationError(ApiError):
    """The API key is missing or wrong."""


class NotFoundError(ApiError):
    """The server has nothing there; is it a momaserve server?"""


class ModelNotFoundError(NotFoundError):
    """Another model is served."""


class RequestNotFoundError(NotFoundError):
    """No request by that id is waiting or running: it is over, or never was."""


class DeadlineError(ApiError):
    """The request's own `timeout_s` passed before there was an answer."""


class TooLargeError(ApiError):
    """The request's body is too long."""


class RateLimitError(ApiError):
    """Too many requests; try again after `retry_after_s`."""


class QueueFullError(RateLimitError):
    """Too many requests are waiting at the server; try again after `retry_after_s`."""


class UnavailableError(ApiError):
    """The server cannot answer at present."""


class DrainingError(UnavailableError):
    """The server is shutting down."""


class NotReadyError(UnavailableError):
    """The engine is still starting."""


class EngineStuckError(UnavailableError):
    """The engine makes no progress."""


class EngineDeadError(UnavailableError):
    """The engine stopped; the server must be restarted."""


class RequestAbortedError(UnavailableError):
    """The request was ended by `abort`, or by the server's shutdown."""


class ServerError(ApiError):
    """The server, or a proxy before it, failed."""


class GenerationFailedError(ServerError):
    """The engine failed on this request; others go on."""


BY_CODE: Mapping[str, tuple[int, type[ApiError]]] = {
    "invalid_prompt": (400, InvalidPromptError),
    "unknown_field": (400, UnknownFieldError),
    "invalid_api_key": (401, AuthenticationError),
    "model_not_found": (404, ModelNotFoundError),
    "request_not_found": (404, RequestNotFoundError),
    "timeout": (408, DeadlineError),
    "queue_full": (429, QueueFullError),
    "draining": (503, DrainingError),
    "not_ready": (503, NotReadyError),
    "engine_stuck": (503, EngineStuckError),
    "engine_dead": (503, EngineDeadError),
    "request_aborted": (503, RequestAbortedError),
    "generation_failed": (500, GenerationFailedError),
}
"""Codes that have a class of their own, with the status that must come with them."""

BY_STATUS: Mapping[int, type[ApiError]] = {
    401: AuthenticationError,
    404: NotFoundError,
    408: DeadlineError,
    413: TooLargeError,
    429: RateLimitError,
    503: UnavailableError,
}
"""For codes that are not in `BY_CODE`, and for proxies, which send none."""

BY_TYPE: Mapping[str, type[ApiError]] = {"invalid_request_error": BadRequestError}
"""The same for errors inside a stream, which have no status."""


def response_error(
    status: int, body: bytes, headers: Mapping[str, str], request_id: str | None = None
) -> ClientError:
    """The error that a reply with any status but 2xx stands for.

    Args:
        headers: with names in lower case, or that do not care.
    """
    if status < 400:
        where = headers.get("location")
        told = "" if where is None else f" to {where!r}: is that the right base_url?"
        return BadReplyError(f"unexpected status {status}{told}", request_id=request_id)
    fields = _error_fields(body)
    code = _text(fields, "code")
    coded_status, cls = BY_CODE.get(code or "", (None, ApiError))
    if coded_status != status:  # a proxy's word, or a code that is newer than this client
        cls = BY_STATUS.get(status, BadRequestError if status < 500 else ServerError)
    should_retry = headers.get("x-should-retry")
    return cls(
        _text(fields, "message") or f"status {status}{_excerpt(body)}",
        status=status,
        code=code,
        type=_text(fields, "type"),
        param=_text(fields, "param"),
        retry_after_s=_retry_after_s(headers),
        should_retry=None if should_retry is None else should_retry.lower() != FALSE,
        request_id=request_id,
    )


def stream_error(payload: Mapping[str, Any]) -> ApiError:
    """The error that an `error` event in a stream stands for."""
    error = payload.get("error")
    fields = error if isinstance(error, Mapping) else {}
    code, kind = _text(fields, "code"), _text(fields, "type")
    _, cls = BY_CODE.get(code or "", (None, BY_TYPE.get(kind or "", ServerError)))
    told = error if isinstance(error, str) else _text(fields, "message")
    return cls(
        told or "the server failed in the middle of the answer",
        code=code,
        type=kind,
        param=_text(fields, "param"),
    )


def _error_fields(body: bytes) -> Mapping[str, Any]:
    """OpenAI's error object, or what comes nearest to it."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = payload.get("error") if isinstance(payload, Mapping) else None
    return error if isinstance(error, Mapping) else {}


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) and value else None


def _excerpt(body: bytes) -> str:
    """The beginning of a page that is no error object, such as a proxy's HTML."""
    text = " ".join(body[: 8 * MAX_EXCERPT_CHARS].decode("utf-8", "replace").split())
    if not text:
        return " with an empty body"
    return f": {text}" if len(text) <= MAX_EXCERPT_CHARS else f": {text[:MAX_EXCERPT_CHARS]}…"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form of the header; a date counts from the reply's own `Date`."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            now = parsedate_to_datetime(headers.get("date", ""))
            seconds = (parsedate_to_datetime(text) - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
