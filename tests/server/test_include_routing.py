"""`include_routing`: one entry per generated token, in order, whole or streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.asgi import chat_body, data_of, http, joined
from tests.server.fake_engine import BEGIN, END, FakeAsyncEngine, byte_ids, code_ids, group_of

pytestmark = pytest.mark.anyio

BOTH = ["text", "image"]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat_body(),
    "/v1/completions": {"prompt": "hi"},
}


def entry(token_id: int, *, is_computed: bool = True) -> dict[str, Any]:
    experts = [[token_id % 4], None] if is_computed else None
    return {"token_id": token_id, "group": group_of(token_id), "experts": experts}


async def reply_to(route: str, **body: Any) -> Any:
    async with http(FakeAsyncEngine()) as client:
        response = await client.post(route, json={**ROUTES[route], "include_routing": True, **body})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("route", ROUTES)
async def test_each_token_has_an_entry_and_the_last_was_never_computed(route: str) -> None:
    reply = await reply_to(route, max_tokens=64, seed=3, n=2, return_token_ids=True)
    for choice in reply.json()["choices"]:
        token_ids = choice["token_ids"]
        assert choice["routing"] == [
            *map(entry, token_ids[:-1]),
            entry(token_ids[-1], is_computed=False),
        ]


async def test_pictures_have_entries_of_their_own_group() -> None:
    reply = await reply_to("/v1/chat/completions", modalities=["image"], seed=3)
    ids = [BEGIN, *code_ids(3, 4, 5, 6), END]
    routing = reply.json()["choices"][0]["routing"]
    assert routing == [*map(entry, ids[:-1]), entry(END, is_computed=False)]
    assert [item["group"] for item in routing] == ["text", *["image"] * 4, "text"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fields", [{}, {"stop": "üß"}, {"max_tokens": 5}])
async def test_streamed_equals_whole(route: str, fields: dict[str, Any]) -> None:
    asked = {"max_tokens": 64, "seed": 3, "return_token_ids": True, **fields}
    whole = (await reply_to(route, **asked)).json()["choices"][0]
    chunks = data_of((await reply_to(route, stream=True, **asked)).text)[:-1]
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert joined(piece.get("routing", []) for piece in pieces) == whole["routing"]
    assert [item["token_id"] for item in whole["routing"]] == whole["token_ids"]
    assert joined(piece.get("token_ids", []) for piece in pieces) == whole["token_ids"]


async def test_a_picture_in_a_stream_between_two_partial_images_has_its_entries() -> None:
    reply = await reply_to("/v1/chat/completions", stream=True, modalities=BOTH, partial_images=0)
    pieces = [chunk["choices"][0] for chunk in data_of(reply.text)[:-1]]
    seen = [item["token_id"] for item in joined(piece.get("routing", []) for piece in pieces)]
    assert len(seen) == len(set(range(len(seen))))
    assert seen[-len(byte_ids("!")) :] == byte_ids("!")
    assert BEGIN in seen and END in seen


async def test_nothing_comes_unasked_and_pictures_routes_do_not_take_it() -> None:
    async with http(FakeAsyncEngine()) as client:
        plain = await client.post("/v1/chat/completions", json=chat_body())
        assert "routing" not in plain.json()["choices"][0]
        refused = await client.post(
            "/v1/images/generations", json={"prompt": "hi", "include_routing": True}
        )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "include_routing"
