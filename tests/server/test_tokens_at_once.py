"""How many tokens a reply is handed at a time: each where it shows each, else several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from momaserve_server.generation import TOKENS_AT_ONCE
from momaserve_server.routes_images import tokens_at_once
from momaserve_server.schemas_images import ImageRequest
from tests.server.asgi import http
from tests.server.fake_engine import FakeAsyncEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGES = "/v1/images/generations"
TALK = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, TALK, TOKENS_AT_ONCE),
        (CHAT, TALK | {"stream": True}, 1),
        (CHAT, TALK | {"stop": "x"}, 1),
        (COMPLETIONS, {"prompt": "hi"}, TOKENS_AT_ONCE),
        (COMPLETIONS, {"prompt": "hi", "stream": True}, 1),
        (COMPLETIONS, {"prompt": "hi", "stop": ["x"]}, 1),
        (IMAGES, {"prompt": "hi"}, TOKENS_AT_ONCE),
        (IMAGES, {"prompt": "hi", "stream": True}, TOKENS_AT_ONCE),
        (IMAGES, {"prompt": "hi", "stream": True, "partial_images": 1}, 1),  # pictures of 4 codes
    ],
)
async def test_routes(path: str, body: dict[str, Any], expected: int) -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        assert (await client.post(path, json=body)).status_code == 200
    assert fake.tokens_at_once == [expected]


@pytest.mark.parametrize(("total", "partial", "expected"), [(144, 1, 16), (144, 3, 9), (8, 3, 1)])
def test_pictures_that_are_shown_as_they_grow(total: int, partial: int, expected: int) -> None:
    """Four looks at least from one state that is shown to the next."""
    spec = SimpleNamespace(tokens_per_image=total)
    processor = SimpleNamespace(spec=spec)
    context: Any = SimpleNamespace(
        async_engine=SimpleNamespace(engine=SimpleNamespace(processor=processor))
    )
    body = ImageRequest(prompt="hi", stream=True, partial_images=partial)
    assert tokens_at_once(context, body) == expected
