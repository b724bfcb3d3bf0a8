"""Streams on the wire: encoding, errors after the first byte, clients that hang up."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from momaserve.outputs import FinishReason
from momaserve_client.sse import ServerEvent, SSEDecoder
from momaserve_server.metrics import ServerMetrics
from momaserve_server.sse import encode_event, until_disconnect
from tests.server.asgi import Call, chat_body, data_of, http, make_app
from tests.server.fake_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat_body(modalities=["text", "image"])),
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/images/generations", {"prompt": "x"}),
]


async def test_events_are_one_line_of_data() -> None:
    data = {"text": "a\nb\r\n\u2028ü", "n": 1}
    raw = encode_event(data, "note")
    assert raw.startswith(b"event: note\ndata: {")
    assert raw.endswith(b"}\n\n")
    assert raw.count(b"\n") == 3
    events = [event for byte in raw for event in SSEDecoder().feed(bytes([byte]))]
    assert events == []  # a fresh decoder per byte sees nothing
    decoder = SSEDecoder()
    events = [event for byte in raw for event in decoder.feed(bytes([byte]))]
    assert [(e.event, json.loads(e.data)) for e in events] == [("note", data)]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_stream_fed_byte_by_byte_is_the_same(path: str, body: dict[str, Any]) -> None:
    async with http() as client:
        response = await client.post(path, json=body | {"stream": True})
    decoder = SSEDecoder()
    events: list[ServerEvent] = []
    for byte in response.content:
        events += decoder.feed(bytes([byte]))
    payloads = [e.data if e.data == "[DONE]" else json.loads(e.data) for e in events]
    assert payloads == data_of(response.text)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("reason", "code"),
    [(FinishReason.ERROR, "generation_failed"), (FinishReason.ABORT, "request_aborted")],
)
async def test_failure_in_a_stream_is_an_error_event_then_done(
    path: str, body: dict[str, Any], reason: FinishReason, code: str
) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, reason)
    async with http(fake) as client:
        response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    assert response.text.endswith("\n\ndata: [DONE]\n\n") or path.endswith("generations")
    *_, error, done = data_of(response.text)
    assert done == "[DONE]"
    assert error["error"]["code"] == code
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert "event: error\n" in response.text


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("reason", "status"), [(FinishReason.ERROR, 500), (FinishReason.ABORT, 503)]
)
async def test_failure_of_a_whole_reply_is_a_status(
    path: str, body: dict[str, Any], reason: FinishReason, status: int
) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, reason)
    async with http(fake) as client:
        response = await client.post(path, json=body)
        assert response.status_code == status
        fake.failure = None
        assert (await client.post(path, json=body)).status_code == 200  # the server goes on


async def test_failure_of_our_own_in_a_stream_keeps_its_text() -> None:
    class Broken(FakeAsyncEngine):
        async def outputs(self, submission: Any) -> Any:
            raise RuntimeError("secret")
            yield

    async with http(Broken()) as client:
        response = await client.post(CHAT, json=chat_body(stream=True))
    assert "secret" not in response.text
    *_, error, done = data_of(response.text)
    assert (error["error"]["code"], done) == ("internal_error", "[DONE]")


async def test_chunks_leave_as_soon_as_they_exist() -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    call = Call(make_app(fake), CHAT, chat_body(stream=True, max_tokens=2))
    assert await call.start() == 200
    assert b'"role"' in await call.body()
    for expected in (b'"G"', b'"r"', b'"length"', b"[DONE]"):
        fake.gate.release()
        assert expected in await call.body()
    await call.ended()


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_hangs_up_ends_its_request(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    fake, metrics = FakeAsyncEngine(), ServerMetrics()
    fake.gate = asyncio.Semaphore(2)
    app = make_app(fake, metrics)
    call = Call(app, path, body | {"stream": stream, "n": 2})
    if stream:
        assert await call.start() == 200
    while not fake.gate.locked():  # until the engine has used its two permits
        await asyncio.sleep(0)
    call.hang_up()
    await call.ended()
    name = fake.submissions[0].request_id
    assert fake.running == set()
    assert fake.aborted == [f"{name}-0", f"{name}-1"]
    shown = metrics.render(fake.as_engine()).decode()
    assert 'momaserve_requests_aborted_total{reason="disconnect"} 1.0' in shown


async def test_client_that_hung_up_before_the_answer_began() -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    call = Call(make_app(fake), CHAT, chat_body(stream=True))
    call.hang_up()
    await call.ended()
    assert fake.running == set()


async def test_finished_requests_are_not_aborted() -> None:
    fake, metrics = FakeAsyncEngine(), ServerMetrics()
    call = Call(make_app(fake, metrics), CHAT, chat_body(stream=True))
    await call.start()
    await call.rest()
    call.hang_up()
    await call.ended()
    assert fake.aborted == []
    shown = metrics.render(fake.as_engine()).decode()
    assert set(re.findall(r"requests_aborted_total{.*} (.*)", shown)) == {"0.0"}


async def test_broken_pipe_ends_the_request_quietly() -> None:
    fake = FakeAsyncEngine()
    app = make_app(fake)
    body = json.dumps(chat_body(stream=True)).encode()
    received = asyncio.Queue[dict[str, Any]]()
    received.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": ""}
    await app(scope, received.get, send)
    assert fake.running == set()


async def test_work_is_cancelled_when_the_client_goes() -> None:
    gone = asyncio.Event()
    cancelled = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        gone.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ClientDisconnect):
        await until_disconnect(receive, work())
    assert cancelled.is_set()


async def test_draining_refuses_new_requests_and_tells_of_ended_ones() -> None:
    fake, metrics = FakeAsyncEngine(), ServerMetrics()
    fake.gate = asyncio.Semaphore(1)
    app = make_app(fake, metrics)
    running = Call(app, CHAT, chat_body(stream=True))
    assert await running.start() == 200
    await running.body()
    await fake.drain(0.0)
    refused = Call(app, CHAT, chat_body())
    assert await refused.start() == 503
    assert json.loads(await refused.rest())["error"]["code"] == "draining"
    rest = await running.rest()
    assert b'"request_aborted"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")
    shown = metrics.render(fake.as_engine()).decode()
    assert 'momaserve_requests_aborted_total{reason="drain"} 1.0' in shown
    assert 'momaserve_requests_rejected_total{reason="draining"} 1.0' in shown
