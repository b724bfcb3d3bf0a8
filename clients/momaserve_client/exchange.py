"""What both clients do alike around httpx: settings, one call's state, errors as ours."""

from __future__ import annotations

import os
import socket
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from momaserve_client.errors import (
    ApiError,
    BadReplyError,
    ClientError,
    ClientTimeoutError,
    ConnectionFailedError,
    NotConnectedError,
)
from momaserve_client.images import media_type
from momaserve_client.requests import ApiRequest, checked_request_id
from momaserve_client.retries import Retries
from momaserve_client.timeouts import Deadline, PhaseLimits, Timeouts

DEFAULT_URL = "http://127.0.0.1:8000"
KEEPALIVE_S = 4.0
"""Less than the server's 5 s: a connection that it is about to close is not used again."""
MAX_ERROR_BYTES = 1 << 16
"""Read of the page that comes with a bad status."""


def checked_base_url(url: str) -> httpx.URL:
    """The address with its path prefix; a trailing `/v1`, as OpenAI's SDK wants it, is dropped.

    Raises:
        ValueError: no http(s) address.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"base_url must be like 'http://host:port', got {url!r}")
    return parsed.copy_with(path=parsed.path.rstrip("/").removesuffix("/v1"), query=None)


def http_options(
    base_url: str, api_key: str | None, headers: Mapping[str, str] | None
) -> dict[str, Any]:
    """Arguments that both httpx clients share. Raises ValueError for a bad address or key."""
    sent = dict(headers or {})
    if api_key is not None:
        if not (api_key and api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise ValueError("an API key is printable ASCII without spaces")
        sent["Authorization"] = f"Bearer {api_key}"
    limits = httpx.Limits(max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_S)
    return {"base_url": checked_base_url(base_url), "headers": sent, "limits": limits}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the calls of a client have in common."""

    timeouts: Timeouts
    retries: Retries
    monotonic: Callable[[], float]
    random: Callable[[], float]


class Exchange:
    """One call on its way: its clock, its id, how often it was sent. Does no input or output."""

    def __init__(self, request: ApiRequest, settings: Settings) -> None:
        """Raises ValueError for a request id that no server takes."""
        given = request.request_id
        self.request_id = uuid.uuid4().hex if given is None else checked_request_id(given)
        self.deadline = Deadline(request.timeouts or settings.timeouts, settings.monotonic)
        self._request = request
        self._settings = settings
        self._num_retries = 0

    def arguments(self) -> dict[str, Any]:
        """For `build_request` of httpx."""
        request = self._request
        files = {
            name: (name, data, media_type(data) or "application/octet-stream")
            for name, data in request.files.items()
        }
        return {
            "method": request.method,
            "url": request.path,
            "json": request.body,
            "data": request.form or None,
            "files": files or None,
            "headers": {"X-Request-Id": self.request_id},
            "extensions": {"timeout": PhaseLimits(self.deadline)},
        }

    def received(self, headers: Mapping[str, str]) -> None:
        """The server may have given the request another id."""
        self.request_id = headers.get("x-request-id") or self.request_id

    def delay_s(self, error: ClientError) -> float | None:
        """Seconds to wait before sending again; None when `error` is the answer."""
        settings = self._settings
        delay = settings.retries.delay_s(error, self._num_retries, settings.random())
        if delay is None or not self.deadline.has_room_for(delay):
            return None
        self._num_retries += 1
        return delay

    @contextmanager
    def errors(self) -> Iterator[None]:
        """httpx's errors as ours, and all of ours with the request's id."""
        try:
            yield
        except httpx.HTTPError as error:
            ours = self.deadline.error() or _transport_error(error, self.deadline.timeouts)
            ours.request_id = self.request_id
            raise ours from error
        except ClientError as error:
            late = None if isinstance(error, ApiError) else self.deadline.error()
            ours = late or error
            ours.request_id = ours.request_id or self.request_id
            if late is None:
                raise
            raise late from error


def _transport_error(error: httpx.HTTPError, limits: Timeouts) -> ClientError:
    reason = _reason(error)
    if isinstance(error, httpx.ConnectTimeout):
        return ClientTimeoutError(f"no connection within connect_s = {limits.connect_s} s")
    if isinstance(error, httpx.TimeoutException):
        return ClientTimeoutError(f"the server was silent for read_s = {limits.read_s} s")
    if isinstance(error, httpx.ConnectError):
        return NotConnectedError(reason)
    if isinstance(error, httpx.DecodingError):
        return BadReplyError(f"the answer cannot be decompressed: {reason}")
    return ConnectionFailedError(f"the connection broke before the answer was whole: {reason}")


def _reason(error: BaseException) -> str:
    """What the operating system said, if it is at the bottom of this."""
    reason = str(error) or type(error).__name__
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):  # one per address that was tried
            cause = cause.exceptions[0]
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror  # of name lookups and of TLS, which count in their own way
            if cause.errno and not isinstance(cause, socket.gaierror | ssl.SSLError):
                reason = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return reason
