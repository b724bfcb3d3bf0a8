"""The request fields that steer a generation, through a real server on the embedded demo."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import LiveServer, start_server, stop_server

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"


def post(server: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def chat(server: LiveServer, text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "seed": 3, "return_token_ids": True}
    response = post(server, CHAT, body | fields)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def ids_of(reply: dict[str, Any]) -> list[int]:
    ids: list[int] = reply["choices"][0]["token_ids"]
    return ids


def counter(server: LiveServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^momaserve_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


LONG = "define violin, and then define penguin, and then define a cat that is red"


def test_a_prompt_that_comes_again_is_cached(server: LiveServer) -> None:
    queries = counter(server, "prefix_cache_queries_total")
    hits = counter(server, "prefix_cache_hits_total")
    replies = [chat(server, LONG, max_tokens=8, cache_salt="cached") for _ in range(2)]
    usages = [reply["usage"] for reply in replies]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0
    assert 0 < cached[1] < usages[1]["prompt_tokens"]
    assert ids_of(replies[0]) == ids_of(replies[1])
    num_prompt = sum(usage["prompt_tokens"] for usage in usages)
    assert counter(server, "prefix_cache_queries_total") - queries == num_prompt
    assert counter(server, "prefix_cache_hits_total") - hits == cached[1]


def test_tenants_do_not_share_what_is_computed(server: LiveServer) -> None:
    for salt in ("one", "two"):
        usage = chat(server, LONG, max_tokens=1, cache_salt=salt)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_images_say_what_was_cached(server: LiveServer) -> None:
    body = {"prompt": f"a red apple, {LONG}", "seed": 3, "cache_salt": "images"}
    usages = [post(server, IMAGES, body).json()["usage"] for _ in range(2)]
    cached = [usage["input_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0 < cached[1]


def test_no_prefix_caching_computes_every_prompt() -> None:
    live = start_server("--no-prefix-caching")
    try:
        replies = [chat(live, LONG, max_tokens=8) for _ in range(2)]
    finally:
        assert stop_server(live) == 0
    assert [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies] == [0, 0]
    assert ids_of(replies[0]) == ids_of(replies[1])


def test_guidance_changes_pictures_and_not_text(server: LiveServer) -> None:
    drawn = [
        ids_of(chat(server, "red apple", modalities=["image"], guidance_scale=scale))
        for scale in (1, 1, 3)
    ]
    assert [len(ids) for ids in drawn] == [server.tokens_per_image + 2] * 3
    assert drawn[0] == drawn[1] != drawn[2]
    said = [
        ids_of(chat(server, "define violin", max_tokens=20, guidance_scale=scale))
        for scale in (1, 3)
    ]
    assert said[0] == said[1]


def test_guidance_of_scale_0_forgets_the_prompt(server: LiveServer) -> None:
    """With scale 0 only the logits without a prompt are left: any prompt gets the same picture."""
    fields: dict[str, Any] = {"modalities": ["image"], "guidance_scale": 0}
    drawn = [ids_of(chat(server, name, **fields)) for name in ("red apple", "violin")]
    assert drawn[0] == drawn[1]


def test_penalties_and_shortest_length(server: LiveServer) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    plain = ids_of(chat(server, "define violin", **greedy))
    strict = ids_of(
        chat(server, "define violin", presence_penalty=2, frequency_penalty=2, **greedy)
    )
    repeated = ids_of(chat(server, "define violin", repetition_penalty=10, **greedy))
    loose = ids_of(
        chat(server, "define violin", presence_penalty=-2, frequency_penalty=-2, **greedy)
    )
    assert len(set(loose)) <= len(set(plain)) < len(set(strict))
    assert len(set(plain)) < len(set(repeated))
    short = chat(server, "define violin", temperature=0, max_tokens=60)
    assert short["choices"][0]["finish_reason"] == "stop"
    num_tokens = len(ids_of(short)) + 5
    longer = chat(server, "define violin", temperature=0, max_tokens=60, min_tokens=num_tokens)
    assert len(ids_of(longer)) >= num_tokens
    assert ids_of(longer)[: len(ids_of(short))] == ids_of(short)


def test_a_deadline_that_has_passed_at_once(server: LiveServer) -> None:
    timeouts = counter(server, 'request_success_total{finished_reason="timeout"}')
    user = [{"role": "user", "content": "define violin"}]
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": user},
        COMPLETIONS: {"prompt": "define violin"},
        IMAGES: {"prompt": "red apple"},
    }
    for path, body in bodies.items():
        response = post(server, path, body | {"timeout_s": 1e-9})
        assert response.status_code == 408, response.text
        assert response.json()["error"]["code"] == "timeout"
    assert counter(server, 'request_success_total{finished_reason="timeout"}') == timeouts + 3
    assert counter(server, "num_requests_running") == 0
    assert counter(server, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize("priority", [-5, 5])
def test_priority_changes_no_answer(server: LiveServer, priority: int) -> None:
    first = ids_of(chat(server, "define violin", max_tokens=10))
    assert ids_of(chat(server, "define violin", max_tokens=10, priority=priority)) == first
