"""`DELETE /v1/requests/{id}`: whoever knows the id ends the request; its reader is told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from momaserve_server.metrics import ServerMetrics
from tests.server.asgi import chat_body, client_of, data_of, http, make_app
from tests.server.fake_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
BODIES = {CHAT: chat_body(), COMPLETIONS: {"prompt": "hi"}, IMAGES: {"prompt": "hi"}}
PREFIXES = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-", IMAGES: "img-"}


def gated() -> FakeAsyncEngine:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    return fake


async def running_id(fake: FakeAsyncEngine) -> str:
    await fake.started.wait()
    return fake.submissions[0].request_id


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("is_bare", [False, True])
async def test_a_waiting_reader_gets_an_error_that_is_not_to_be_retried(
    route: str, is_bare: bool
) -> None:
    fake, metrics = gated(), ServerMetrics()
    async with client_of(make_app(fake, metrics)) as client:
        answer = asyncio.create_task(client.post(route, json=BODIES[route]))
        request_id = await running_id(fake)
        assert request_id.startswith(PREFIXES[route])
        name = request_id.removeprefix(PREFIXES[route]) if is_bare else request_id
        aborted = await client.delete(f"/v1/requests/{name}")
        response = await answer
    assert aborted.json() == {"id": name, "object": "request", "aborted": True}
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "request_aborted"
    assert response.headers["x-should-retry"] == "false"
    assert not fake.running
    assert b'momaserve_requests_aborted_total{reason="api"} 1.0' in metrics.render(fake.as_engine())


async def test_a_stream_ends_with_an_error_event() -> None:
    fake = gated()
    async with http(fake) as client:
        reading = asyncio.create_task(client.post(CHAT, json=chat_body(stream=True)))
        await client.delete(f"/v1/requests/{await running_id(fake)}")
        data = data_of((await reading).text)
    assert data[-2]["error"]["code"] == "request_aborted"
    assert data[-1] == "[DONE]"


async def test_all_prompts_of_a_request_end() -> None:
    fake = gated()
    async with http(fake) as client:
        answer = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}))
        while len(fake.submissions) < 3:
            await asyncio.sleep(0)
        whole_id = fake.submissions[0].request_id.removesuffix("-0")
        assert (await client.delete(f"/v1/requests/{whole_id}")).status_code == 200
        assert (await answer).status_code == 503
    assert fake.ending == {f"{whole_id}-{number}" for number in range(3)}
    assert not fake.running


async def test_a_request_on_its_way_to_the_engine_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeAsyncEngine()
    is_known, may_go_on = asyncio.Event(), asyncio.Event()
    generate = fake.generate

    async def slow(*args: Any, **kwargs: Any) -> Any:
        is_known.set()
        await may_go_on.wait()
        return await generate(*args, **kwargs)

    monkeypatch.setattr(fake, "generate", slow)
    async with http(fake) as client:
        headers = {"X-Request-Id": "mine"}
        answer = asyncio.create_task(client.post(CHAT, json=chat_body(), headers=headers))
        await is_known.wait()
        assert (await client.delete("/v1/requests/mine")).json()["aborted"] is True
        may_go_on.set()
        response = await answer
    assert response.json()["error"]["code"] == "request_aborted"
    assert not fake.running


async def test_others_go_on() -> None:
    fake = gated()
    assert fake.gate is not None
    async with http(fake) as client:
        first = asyncio.create_task(client.post(CHAT, json=chat_body(seed=1)))
        first_id = await running_id(fake)
        second = asyncio.create_task(client.post(CHAT, json=chat_body(seed=2)))
        while len(fake.submissions) < 2:
            await asyncio.sleep(0)
        await client.delete(f"/v1/requests/{first_id}")
        assert (await first).status_code == 503
        for _ in range(50):
            fake.gate.release()
        assert (await second).status_code == 200


@pytest.mark.parametrize("name", ["nobody", "chatcmpl-nobody", "%F0%9F%8D%8E", "x" * 300])
async def test_unknown_ids_are_not_found(name: str) -> None:
    async with http() as client:
        response = await client.delete(f"/v1/requests/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"


@pytest.mark.parametrize("route", BODIES)
async def test_what_is_over_is_forgotten(route: str) -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        await client.post(route, json=BODIES[route])
        await client.post(route, json={**BODIES[route], "stream": True})
        for submission in fake.submissions:
            response: httpx.Response = await client.delete(f"/v1/requests/{submission.request_id}")
            assert response.status_code == 404


async def test_what_the_engine_refuses_is_forgotten_too() -> None:
    fake = FakeAsyncEngine()
    fake.refusal = RuntimeError("no")
    app = make_app(fake)
    async with client_of(app) as client:
        await client.post(CHAT, json=chat_body())
    assert not app.state.context.running._by_id
