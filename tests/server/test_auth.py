"""Who may use the API: keys on every route, browsers of other origins, a proxy's prefix."""

from __future__ import annotations

import hmac
import http.client
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from openai import AuthenticationError, OpenAI

from momaserve.errors import ConfigError
from momaserve_server.auth import AuthMiddleware
from momaserve_server.logs import JsonFormatter
from momaserve_server.settings import ServerSettings
from tests.server.asgi import TIMEOUT_S, Call, chat_body, client_of, make_app
from tests.server.asgi import http as client_with
from tests.server.fake_engine import FakeAsyncEngine
from tests.server.live import live

pytestmark = pytest.mark.anyio

KEYS = ("sk-first", "sk-second")
OPEN = {"/", "/health", "/ready"}
RIGHT = {"Authorization": "Bearer sk-second"}
CHAT = "/v1/chat/completions"


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that the app routes, as its own table has it."""
    found = []
    for context in iter_route_contexts(app.routes):
        path, methods = context.path, context.methods
        assert path is not None
        found += [(method, path) for method in sorted(methods or {"GET"})]
    return found


def filled(path: str) -> str:
    """A path that the route of this template takes."""
    for name in ("{model_id:path}", "{request_id}", "{name}"):
        path = path.replace(name, "x")
    assert "{" not in path, f"fill in {path}"
    return path


async def test_every_route_needs_a_key_but_the_open_ones() -> None:
    app = make_app(api_keys=KEYS)
    asked = routes_of(app)
    assert {path for _, path in asked} >= {
        CHAT,
        "/metrics",
        "/openapi.json",
        "/playground/{name}",
        *OPEN,
    }
    asked += [("GET", "/nothing"), ("POST", "/v1/nothing"), ("GET", "/v1"), ("POST", "/metrics")]
    asked += [("GET", "/health/"), ("GET", "//"), ("GET", "/playground"), ("GET", "/HEALTH")]
    asked += [("OPTIONS", CHAT), ("HEAD", "/v1/models"), ("TRACE", "/version")]
    async with client_of(app) as client:
        for method, path in asked:
            url = "http://test" + filled(path)
            for headers in ({}, {"Authorization": "Bearer sk-third"}):
                response = await client.request(method, url, headers=headers)
                is_open = path in OPEN or path.startswith("/playground/")
                assert (response.status_code == 401) == (not is_open), (method, path)
                if not is_open:
                    assert_is_refusal(response)
            response = await client.request(method, url, headers=RIGHT)
            assert response.status_code != 401, (method, path)


def assert_is_refusal(response: httpx.Response) -> None:
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    if response.request.method == "HEAD":
        return
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "Authorization: Bearer" in error["message"]


async def test_without_keys_nothing_is_asked_for() -> None:
    async with client_with() as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("Bearer sk-first", 200),
        ("bearer sk-first", 200),
        ("Bearer  sk-first ", 200),
        ("Bearer sk-firs", 401),
        ("Bearer sk-firstt", 401),
        ("Bearer SK-FIRST", 401),
        ("Bearer sk-first,sk-second", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("Basic sk-first", 401),
        ("sk-first", 401),
        ("", 401),
        ("Bearer sk-f\xefrst", 401),
    ],
)
async def test_what_counts_as_a_key(value: str, status: int) -> None:
    async with client_with(api_keys=KEYS) as client:
        headers = {b"Authorization": value.encode("latin-1")}
        assert (await client.get("/v1/models", headers=headers)).status_code == status


async def test_two_keys_at_once_are_none() -> None:
    async with client_with(api_keys=KEYS) as client:
        both = [("Authorization", f"Bearer {key}") for key in KEYS]
        assert (await client.get("/v1/models", headers=both)).status_code == 401


async def test_nothing_of_a_body_is_read_before_the_key() -> None:
    fake = FakeAsyncEngine()
    call = Call(make_app(fake, api_keys=KEYS), CHAT, chat_body())
    assert await call.start() == 401
    await call.rest()
    assert call.num_received == 0
    assert fake.submissions == []


async def test_every_key_is_compared_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return known == given

    monkeypatch.setattr(hmac, "compare_digest", compare)
    async with client_with(api_keys=KEYS) as client:
        for key in (*KEYS, "x"):
            await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert len(compared) == 3 * len(KEYS)
    assert len({len(value) for pair in compared for value in pair}) == 1  # nor does length tell


async def test_a_websocket_without_a_key_is_closed() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    guard = AuthMiddleware(inner, KEYS)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    path = {"type": "websocket", "path": "/health"}
    await guard({**path, "headers": []}, receive, send)
    await guard({**path, "headers": [(b"authorization", b"Bearer sk-first")]}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close", "websocket.accept"]


async def test_keys_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "httpx")  # the test's own client
    caplog.set_level(logging.DEBUG)
    settings = ServerSettings(api_keys=KEYS)
    with pytest.raises(ConfigError) as refused:
        ServerSettings(api_keys=(*KEYS, "sk third"))
    with pytest.raises(ConfigError):
        ServerSettings(api_keys=("",))  # as of a shell variable that is not set
    async with client_with(api_keys=KEYS) as client:
        answers = [await client.get("/v1/models", headers=RIGHT)]
        answers += [
            await client.get("/x?key=sk-first", headers={"Authorization": "Bearer sk-third"})
        ]
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert len(lines) >= 2
    shown = [repr(settings), str(refused.value), *lines, *(answer.text for answer in answers)]
    assert not any("sk-" in text or "sk third" in text for text in shown)


def test_a_plain_client_sees_the_refusal_of_a_large_body() -> None:
    """One that sends all of its body before it reads must not meet a closed connection."""
    with live(api_keys=KEYS) as running:
        address = running.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        connection.request("POST", CHAT, b"x" * (4 << 20), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 401
        response.read()
        connection.request("GET", "/v1/models", headers=RIGHT)
        assert connection.getresponse().status == 200
        connection.close()


def test_openais_client_says_what_is_wrong() -> None:
    with live(api_keys=KEYS) as running:
        with OpenAI(base_url=running.url + "/v1", api_key="sk-first") as client:
            assert [model.id for model in client.models.list()] == ["fake"]
        with (
            OpenAI(base_url=running.url + "/v1", api_key="sk-third") as client,
            pytest.raises(AuthenticationError) as refused,
        ):
            client.models.list()
    assert refused.value.code == "invalid_api_key"


# --- browsers ------------------------------------------------------------------------------


PREFLIGHT = {
    "Origin": "https://a.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [(("https://a.example",), "https://a.example"), (("https://b.example",), None), (("*",), "*")],
)
async def test_preflight_needs_no_key(origins: tuple[str, ...], allowed: str | None) -> None:
    async with client_with(api_keys=KEYS, cors_origins=origins) as client:
        asked = await client.options(CHAT, headers=PREFLIGHT)
        used = await client.post(CHAT, json=chat_body(), headers=RIGHT | PREFLIGHT)
        refused = await client.post(CHAT, json=chat_body(), headers=PREFLIGHT)
    assert asked.status_code == (400 if allowed is None else 200)
    assert asked.headers.get("access-control-allow-origin") == allowed
    if allowed is not None:
        assert "POST" in asked.headers["access-control-allow-methods"]
        headers = asked.headers["access-control-allow-headers"]
        assert headers == PREFLIGHT["Access-Control-Request-Headers"]
    assert (used.status_code, refused.status_code) == (200, 401)
    for response in (used, refused):  # a page may read why it was refused
        assert response.headers.get("access-control-allow-origin") == allowed
        assert "x-request-id" in response.headers["access-control-expose-headers"]


async def test_no_origin_is_allowed_by_default() -> None:
    async with client_with() as client:
        asked = await client.options(CHAT, headers=PREFLIGHT)
        used = await client.post(CHAT, json=chat_body(), headers=PREFLIGHT)
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in used.headers


# --- behind a proxy ------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["", "/llm"])
async def test_a_proxy_may_take_its_prefix_off_or_leave_it(shown: str) -> None:
    async with client_with(root_path="/llm", api_keys=KEYS) as client:
        assert (await client.get(f"{shown}/health")).status_code == 200
        assert (await client.get(f"{shown}/playground/sse.js")).status_code == 200
        assert (await client.get(f"{shown}/v1/models")).status_code == 401
        assert (await client.get(f"{shown}/v1/models", headers=RIGHT)).status_code == 200
        reply = await client.post(shown + CHAT, json=chat_body(), headers=RIGHT)
        assert reply.status_code == 200
        document = (await client.get(f"{shown}/openapi.json", headers=RIGHT)).json()
        assert document["servers"] == [{"url": "/llm"}]
        assert (await client.get(f"{shown}/nothing", headers=RIGHT)).status_code == 404


async def test_a_prefix_opens_no_route() -> None:
    """Whether a path is open is judged by the very path that routes are looked up by."""
    async with client_with(root_path="/playground", api_keys=KEYS) as client:
        for path in ("/playground/v1/models", "/v1/models", "/playground/playground/v1/models"):
            assert (await client.get(path)).status_code in (401, 404)
        assert (await client.get("/playground/health")).status_code == 200
    async with client_with(root_path="/llm", api_keys=KEYS) as client:
        assert (await client.get("/llmhealth")).status_code == 401
        assert (await client.get("/llm/llm/health")).status_code == 401
    async with client_with(root_path="/he", api_keys=KEYS) as client:  # begins like a path
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/he/health")).status_code == 200
