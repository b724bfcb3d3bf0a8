"""Whole replies: what they become, and what is said of those that make no sense."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from momaserve_client import (
    BadReplyError,
    Client,
    DepthLayer,
    Health,
    ImageSpan,
    Router,
    RouterGroup,
    RouterLayer,
    TokenRouting,
    Usage,
)
from tests.client.both import PNG, Pieces, answer, chat_payload, refusal

Answering = Callable[..., Client]
B64 = base64.b64encode(PNG).decode()
IMAGE_PART = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}"}}
ROUTING = [
    {"token_id": 5, "group": "text", "experts": [[0, 2], [], None]},
    {"token_id": 6, "group": "text", "experts": None},
]
ROUTED = (
    TokenRouting(token_id=5, group="text", experts=((0, 2), (), None)),
    TokenRouting(token_id=6, group="text", experts=None),
)


def test_chat(answering: Answering) -> None:
    payload = chat_payload(
        [{"type": "text", "text": "a"}, IMAGE_PART], token_ids=[5, 6], routing=ROUTING
    )
    payload["usage"] = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"image_tokens": 1},
    }
    reply = answering(answer(payload=payload, x_request_id="r1")).chat("hi")
    assert reply.parts == ("a", PNG)
    assert (reply.text, reply.images, reply.id) == ("a", (PNG,), "chatcmpl-1")
    assert reply.choices[0].token_ids == (5, 6)
    assert reply.choices[0].routing == ROUTED
    assert reply.request_id == "r1"
    assert reply.usage == Usage(
        prompt_tokens=3, completion_tokens=4, image_tokens=1, cached_tokens=2
    )
    assert reply.usage.total_tokens == 7


def test_chat_without_content(answering: Answering) -> None:
    assert answering(answer(payload=chat_payload(None))).chat("hi").parts == ()


def test_request_id_is_ours_where_the_server_names_none(answering: Answering) -> None:
    client = answering(answer(payload=chat_payload()))
    assert client.chat("hi", request_id="mine").request_id == "mine"


def test_replies_compare_by_what_they_say(answering: Answering) -> None:
    client = answering(answer(payload=chat_payload()))
    assert client.chat("hi", request_id="a") == client.chat("hi", request_id="b")


def test_completion(answering: Answering) -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1],
        "top_logprobs": [None, {"b": -1.0}],
        "text_offset": [0, 1],
    }
    choice = {"index": 0, "text": "ab", "finish_reason": "length", "routing": ROUTING}
    payload = chat_payload() | {"choices": [choice | {"logprobs": logprobs}]}
    reply = answering(answer(payload=payload)).complete("ab", echo=True, logprobs=1)
    assert reply.text == "ab"
    scored = reply.choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs == (None, -1.0)
    assert reply.choices[0].routing == ROUTED


def test_images_and_edits(answering: Answering) -> None:
    usage = {"input_tokens": 3, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 1}}
    payload = {"data": [{"b64_json": B64}], "usage": usage}
    client = answering(answer(payload=payload, x_request_id="r1"))
    for reply in (client.generate_images("a"), client.edit_images(PNG, "a")):
        assert reply.images == (PNG,)
        assert reply.request_id == "r1"
        assert reply.usage == Usage(
            prompt_tokens=3, completion_tokens=4, image_tokens=4, cached_tokens=1
        )


def test_tokens(answering: Answering) -> None:
    payload = {
        "tokens": [0, 7, 9, 8],
        "count": 4,
        "max_model_len": 64,
        "modalities": ["text", "image", "image", "text"],
        "image_spans": [{"start": 1, "end": 4}],
        "token_strs": None,
    }
    reply = answering(answer(payload=payload)).tokenize("a")
    assert (reply.tokens, reply.count, reply.max_model_len) == ((0, 7, 9, 8), 4, 64)
    assert reply.image_spans == (ImageSpan(start=1, end=4),)
    assert reply.token_strs is None
    payload["token_strs"] = ["a", "b", "c", "d"]
    assert answering(answer(payload=payload)).tokenize("a").token_strs == ("a", "b", "c", "d")


def test_text_of_tokens(answering: Answering) -> None:
    payload = {"prompt": "ab", "parts": [{"type": "text", "text": "ab"}, IMAGE_PART]}
    reply = answering(answer(payload=payload)).detokenize([1, 2])
    assert (reply.text, reply.parts) == ("ab", ("ab", PNG))


def test_router(answering: Answering) -> None:
    layer = {"layer": 0, "expert_tokens": [3, 1], "load": [0.75, 0.25]}
    quiet = {"layer": 1, "expert_tokens": [0, 0], "load": None, "mean_experts_per_token": None}
    group = {
        "name": "text",
        "modalities": ["text"],
        "num_experts": 2,
        "num_tokens": 4,
        "mean_experts_per_token": 1,
        "experts_per_token": [0, 4],
        "layers": [layer | {"mean_experts_per_token": 1.0, "newer": True}, quiet],
    }
    payload = {
        "object": "router",
        "routing": "causal",
        "prompt_routing": "same",
        "num_steps": 9,
        "groups": [group],
        "depth": [{"layer": 1, "taken": 10, "skipped": 30}],
    }
    assert answering(answer(payload=payload)).router() == Router(
        routing="causal",
        prompt_routing="same",
        num_steps=9,
        groups=(
            RouterGroup(
                name="text",
                modalities=("text",),
                num_experts=2,
                num_tokens=4,
                mean_experts_per_token=1.0,
                experts_per_token=(0, 4),
                layers=(
                    RouterLayer(
                        layer=0,
                        expert_tokens=(3, 1),
                        load=(0.75, 0.25),
                        mean_experts_per_token=1.0,
                    ),
                    RouterLayer(
                        layer=1, expert_tokens=(0, 0), load=None, mean_experts_per_token=None
                    ),
                ),
            ),
        ),
        depth=(DepthLayer(layer=1, taken=10, skipped=30),),
    )


def test_abort_and_version(answering: Answering) -> None:
    payload = {"id": "img-1", "object": "request", "aborted": True}
    aborted = answering(answer(payload=payload, x_request_id="r2")).abort("img-1")
    assert (aborted.id, aborted.request_id) == ("img-1", "r2")
    version = answering(answer(payload={"version": "1.2", "model": "m"})).version()
    assert (version.version, version.model) == ("1.2", "m")


def test_health(answering: Answering) -> None:
    ok = answer(payload={"status": "ok"})
    stuck, draining = refusal(503, "engine_stuck"), refusal(503, "draining", retry_after="5")
    assert answering(ok).health() == Health(is_healthy=True, is_ready=True)
    assert answering(ok, draining).health() == Health(
        is_healthy=True, is_ready=False, reason="draining"
    )
    assert answering(stuck).health() == Health(
        is_healthy=False, is_ready=False, reason="engine_stuck"
    )
    page = answer(502, b"<html>")
    assert answering(page).health().reason == "status 502"


GARBAGE: list[Any] = [
    b"",
    b"<html><body>hello</body></html>",
    b"[]",
    b"{}",
    b"null",
    b'"\xff"',
    b"[" * 100_000,
    b'{"choices": 5}',
    chat_payload() | {"choices": []},
    chat_payload() | {"choices": [[]]},
    chat_payload() | {"id": None},
    chat_payload() | {"usage": None},
    chat_payload() | {"usage": {"prompt_tokens": "1", "completion_tokens": 2}},
    chat_payload(5),
    chat_payload(token_ids=[True]),
    chat_payload(finish_reason=3),
    chat_payload([{"type": "image_url", "image_url": {"url": "data:,@"}}]),
    chat_payload([{"type": "image_url", "image_url": {"url": "data:;base64,AAAA"}}]),
]


@pytest.mark.parametrize("payload", GARBAGE, ids=lambda payload: str(payload)[:40])
def test_replies_that_make_no_sense(answering: Answering, payload: Any) -> None:
    with pytest.raises(BadReplyError, match="unexpected reply") as caught:
        answering(answer(payload=payload, x_request_id="r1")).chat("hi")
    assert caught.value.request_id == "r1"
    assert len(str(caught.value)) < 400


def test_the_message_shows_what_came(answering: Answering) -> None:
    with pytest.raises(BadReplyError, match=r"no field 'id' \(it begins '\{\"a\":1\}'\)"):
        answering(answer(payload={"a": 1})).chat("hi")


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.complete("a"),
        lambda c: c.generate_images("a"),
        lambda c: c.edit_images(PNG, "a"),
        lambda c: c.tokenize("a"),
        lambda c: c.detokenize([1]),
        lambda c: c.models(),
        lambda c: c.version(),
        lambda c: c.router(),
        lambda c: c.abort("a"),
        lambda c: c.health(),
    ],
)
def test_no_route_lets_garbage_through(answering: Answering, call: Callable[[Client], Any]) -> None:
    with pytest.raises(BadReplyError):
        call(answering(answer(payload=b"<html>")))


def test_redirects_are_told_not_followed(answering: Answering) -> None:
    moved = answer(308, b"", location="https://other/v1/models")
    with pytest.raises(BadReplyError, match="308 to 'https://other/v1/models'"):
        answering(moved).models()


def test_broken_compression(answering: Answering) -> None:
    broken = httpx.Response(200, stream=Pieces([b"no gzip"]), headers={"content-encoding": "gzip"})
    with pytest.raises(BadReplyError, match="decompressed"):
        answering(broken).models()
