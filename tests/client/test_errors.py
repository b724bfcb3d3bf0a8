"""Every code and status becomes the class that a program can catch."""

from __future__ import annotations

import pickle
import socket
import ssl
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from momaserve_client import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    Client,
    ClientError,
    ClientTimeoutError,
    ConnectionFailedError,
    DeadlineError,
    DrainingError,
    EngineDeadError,
    EngineStuckError,
    GenerationFailedError,
    InvalidPromptError,
    ModelNotFoundError,
    NotConnectedError,
    NotFoundError,
    NotReadyError,
    QueueFullError,
    RateLimitError,
    RequestAbortedError,
    RequestNotFoundError,
    Retries,
    ServerError,
    TooLargeError,
    UnavailableError,
    UnknownFieldError,
)
from momaserve_client.errors import BY_CODE, BY_STATUS, response_error
from momaserve_server.errors import ERROR_TABLE
from tests.client.both import Pieces, answer, event, events, refusal

Answering = Callable[..., Client]
ONCE = Retries(max_retries=0)

CODES: list[tuple[int, str, type[ApiError]]] = [
    (400, "invalid_prompt", InvalidPromptError),
    (400, "unknown_field", UnknownFieldError),
    (400, "invalid_value", BadRequestError),
    (401, "invalid_api_key", AuthenticationError),
    (404, "model_not_found", ModelNotFoundError),
    (404, "request_not_found", RequestNotFoundError),
    (404, "route_not_found", NotFoundError),
    (405, "method_not_allowed", BadRequestError),
    (408, "timeout", DeadlineError),
    (413, "body_too_large", TooLargeError),
    (429, "queue_full", QueueFullError),
    (429, "too_fast", RateLimitError),
    (500, "internal_error", ServerError),
    (500, "generation_failed", GenerationFailedError),
    (503, "draining", DrainingError),
    (503, "not_ready", NotReadyError),
    (503, "engine_stuck", EngineStuckError),
    (503, "engine_dead", EngineDeadError),
    (503, "request_aborted", RequestAbortedError),
    (503, "newer_than_we_are", UnavailableError),
]


@pytest.mark.parametrize(("status", "code", "cls"), CODES)
def test_codes(answering: Answering, status: int, code: str, cls: type[ApiError]) -> None:
    client = answering(refusal(status, code, "said so", x_request_id="r1"), retries=ONCE)
    for call in (lambda: client.chat("hi"), lambda: list(client.stream_chat("hi"))):
        with pytest.raises(cls) as caught:
            call()
        error = caught.value
        assert type(error) is cls
        assert (str(error), error.status, error.code) == ("said so", status, code)
        assert error.request_id == "r1"


def test_every_code_of_the_server_is_known() -> None:
    """By a class of its own, or because the status says enough."""
    enough = {
        "invalid_body",
        "invalid_value",
        "invalid_request",
        "body_too_large",
        "internal_error",
    }
    table = {kind.code: kind.status for _, kind in ERROR_TABLE}
    for code, status in table.items():
        assert code in BY_CODE or code in enough, code
        assert code not in BY_CODE or BY_CODE[code][0] == status


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        *BY_STATUS.items(),
        (400, BadRequestError),
        (403, BadRequestError),
        (422, BadRequestError),
        (500, ServerError),
        (502, ServerError),
        (504, ServerError),
        (599, ServerError),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><h1>Bad\n\n  Gateway</h1></html>",
        b"{}",
        b"[]",
        b"\xff",
        b'{"error": "no"}',
        b'{"error": {"code": 7, "message": null}}',
        b'{"error": {"code": "timeout_of_a_proxy"}}',
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_pages_of_proxies(status: int, cls: type[ApiError], body: bytes) -> None:
    error = response_error(status, body, {})
    assert type(error) is cls
    assert isinstance(error, ApiError)
    assert error.status == status
    assert str(error).startswith(f"status {status}")
    assert len(str(error)) < 150


def test_html_is_shown_in_one_line() -> None:
    page = b"<html>\n<h1>502 Bad Gateway</h1>\n<hr>nginx" + b" " * 500 + b"</html>"
    assert str(response_error(502, page, {})) == (
        "status 502: <html> <h1>502 Bad Gateway</h1> <hr>nginx </html>"
    )
    assert str(response_error(502, b"", {})) == "status 502 with an empty body"


def test_code_and_status_must_agree() -> None:
    """A gateway's "timeout" is not the request's own."""
    body = b'{"error": {"message": "slow", "code": "timeout"}}'
    assert type(response_error(504, body, {})) is ServerError
    assert type(response_error(408, body, {})) is DeadlineError


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
        (
            {
                "date": "Wed, 21 Oct 2026 07:28:00 GMT",
                "retry-after": "Wed, 21 Oct 2026 07:28:30 GMT",
            },
            30.0,
        ),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    error = response_error(429, b"", headers)
    assert isinstance(error, ApiError)
    assert error.retry_after_s == seconds


def test_an_error_page_that_breaks_off(answering: Answering) -> None:
    body = Pieces([b'{"error": {"mess', httpx.ReadError("gone")])
    client = answering(httpx.Response(502, stream=body))
    with pytest.raises(ServerError, match="502"):
        client.models()
    assert body.is_closed


def test_an_error_page_without_end(answering: Answering) -> None:
    def pages() -> Any:
        while True:
            yield b"x" * 1000

    with pytest.raises(ServerError, match="502"):
        answering(httpx.Response(502, stream=Pieces(pages()))).models()


@pytest.mark.parametrize(
    ("code", "kind", "cls"),
    [
        ("request_aborted", "server_error", RequestAbortedError),
        ("timeout", "timeout_error", DeadlineError),
        ("engine_dead", "server_error", EngineDeadError),
        ("generation_failed", "server_error", GenerationFailedError),
        ("internal_error", "server_error", ServerError),
        ("newer", "invalid_request_error", BadRequestError),
        (None, None, ServerError),
    ],
)
def test_errors_inside_a_stream(
    answering: Answering, code: str | None, kind: str | None, cls: type[ApiError]
) -> None:
    error = {"message": "said so", "type": kind, "param": "p", "code": code}
    reply = events(event({"error": error}, "error"), b"data: [DONE]\n\n", x_request_id="r1")
    with pytest.raises(cls) as caught:
        list(answering(reply).stream_chat("hi"))
    assert type(caught.value) is cls
    assert (caught.value.status, caught.value.code) == (None, code)
    assert (str(caught.value), caught.value.param) == ("said so", "p")
    assert caught.value.request_id == "r1"


@pytest.mark.parametrize("payload", [{"error": "odd"}, {"error": None}, {"x": 1}])
def test_error_events_of_another_shape(answering: Answering, payload: Any) -> None:
    with pytest.raises(ServerError):
        list(answering(events(event(payload, "error"))).stream_chat("hi"))


@pytest.mark.parametrize(
    ("raised", "cls", "told"),
    [
        (httpx.ConnectError("refused"), NotConnectedError, "refused"),
        (httpx.ConnectTimeout("slow"), ClientTimeoutError, "connect_s = 10.0 s"),
        (httpx.ReadTimeout("slow"), ClientTimeoutError, "read_s = 600.0 s"),
        (httpx.ReadError(""), ConnectionFailedError, "ReadError"),
        (httpx.RemoteProtocolError("odd"), ConnectionFailedError, "odd"),
        (httpx.WriteError("odd"), ConnectionFailedError, "odd"),
    ],
)
def test_broken_connections(
    answering: Answering, raised: Exception, cls: type[ClientError], told: str
) -> None:
    client = answering(raised, retries=ONCE)
    for call in (client.models, client.health, lambda: list(client.stream_chat("hi"))):
        with pytest.raises(ConnectionFailedError, match=told) as caught:
            call()
        assert type(caught.value) is cls
        assert len(caught.value.request_id or "") == 32


def caused(*causes: BaseException) -> httpx.ConnectError:
    """An error with these below it."""
    error = httpx.ConnectError("All connection attempts failed")
    above: BaseException = error
    for cause in causes:
        above.__cause__ = cause
        above = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (caused(OSError("hm"), ConnectionRefusedError(111, "Connect call failed")), "refused"),
        (caused(ExceptionGroup("x", [OSError(101, "Connect call failed")])), "unreachable"),
        (caused(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (caused(ssl.SSLError(1, "CERTIFICATE_VERIFY_FAILED")), "CERTIFICATE_VERIFY_FAILED"),
        (caused(ValueError("odd")), "All connection attempts failed"),
    ],
)
def test_connection_errors_say_what_the_system_said(
    answering: Answering, error: httpx.ConnectError, told: str
) -> None:
    with pytest.raises(NotConnectedError, match=told):
        answering(error, retries=ONCE).models()


def test_health_of_something_else(answering: Answering) -> None:
    """A 404 is no statement about an engine."""
    with pytest.raises(NotFoundError):
        answering(answer(404, b"<html>")).health()


def test_errors_travel_between_processes() -> None:
    error = response_error(429, b"", {"retry-after": "3"}, "r1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RateLimitError
    assert (copy.retry_after_s, copy.request_id, str(copy)) == (3.0, "r1", str(error))
