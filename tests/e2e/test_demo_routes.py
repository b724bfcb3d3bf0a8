"""Edits, routing, tokens and aborts on the embedded demo, through a real server."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageChops

from tests.e2e.conftest import LiveServer

DRAW = {"modalities": ["image"], "messages": [{"role": "user", "content": "red apple"}]}


@pytest.fixture
def http(server: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


@pytest.fixture
def image(http: httpx.Client) -> dict[str, Any]:
    """What the model's card says of pictures."""
    found: dict[str, Any] = http.get("/v1/models").json()["data"][0]["image"]
    return found


def codes_of(http: httpx.Client, b64_json: str, image: dict[str, Any]) -> list[int]:
    """Image ids that the server reads in a picture."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64_json}"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    reply = http.post("/v1/tokenize", json=body).json()
    (span,) = reply["image_spans"]
    codes: list[int] = reply["tokens"][span["start"] + 1 : span["end"] - 1]
    assert len(codes) == image["tokens_per_image"]
    return codes


def metric(http: httpx.Client, name: str) -> float:
    match = re.search(rf"^momaserve_{re.escape(name)} (\S+)$", http.get("/metrics").text, re.M)
    return float(match[1]) if match else 0.0  # a label appears with its first count


def test_an_edit_keeps_the_first_rows(http: httpx.Client, image: dict[str, Any]) -> None:
    drawn = http.post("/v1/images/generations", json={"prompt": "red apple", "seed": 7}).json()
    picture = drawn["data"][0]["b64_json"]
    rows, columns = image["grid"]
    keep = rows - 2
    edited = http.post(
        "/v1/images/edits",
        data={"prompt": "grinning face", "keep_rows": str(keep), "seed": "7"},
        files={"image": base64.b64decode(picture)},
    )
    assert edited.status_code == 200, edited.text
    usage = edited.json()["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == keep * columns
    assert usage["output_tokens"] == 2 * columns
    # The upper half of both looks the same, however the lower rows went on.
    before, after = (
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        for data in (picture, edited.json()["data"][0]["b64_json"])
    )
    upper = (0, 0, before.width, before.height // 2)
    difference = ImageChops.difference(before.crop(upper), after.crop(upper)).convert("L")
    flat = difference.tobytes()
    assert sum(flat) / len(flat) < 12  # of 255: the tokenizer reads its own pictures nearly alike


def test_openais_sdk_edits(server: LiveServer, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    drawn = client.images.generate(prompt="red apple", extra_body={"seed": 7})
    assert drawn.data is not None and drawn.data[0].b64_json is not None
    png = base64.b64decode(drawn.data[0].b64_json)
    reply = client.images.edit(image=("apple.png", png), prompt="red apple", extra_body={"seed": 7})
    assert reply.data is not None and reply.data[0].b64_json is not None
    assert base64.b64decode(reply.data[0].b64_json).startswith(b"\x89PNG")
    events = list(
        client.images.edit(
            image=("apple.png", png), prompt="red apple", stream=True, partial_images=2
        )
    )
    assert [event.type for event in events] == [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]


def test_routing_of_a_picture(http: httpx.Client, image: dict[str, Any]) -> None:
    before = http.get("/v1/router").json()
    body = {**DRAW, "seed": 3, "include_routing": True, "return_token_ids": True}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    after = http.get("/v1/router").json()
    routing, token_ids = choice["routing"], choice["token_ids"]
    assert [entry["token_id"] for entry in routing] == token_ids
    assert len(token_ids) == image["tokens_per_image"] + 2
    groups = {group["name"]: group for group in after["groups"]}
    assert {entry["group"] for entry in routing[1:-1]} == {"image"}
    assert [entry["experts"] is None for entry in routing[-3:]] == [False, True, True]
    num_layers = len(groups["image"]["layers"])
    assert all(len(entry["experts"]) == num_layers for entry in routing[:-2])
    # Nothing else runs: the server's totals grew by exactly what this answer reports.
    old = {group["name"]: group for group in before["groups"]}["image"]
    for layer in range(num_layers):
        used = [entry["experts"][layer] for entry in routing if entry["experts"]]
        image_used = [
            experts
            for entry, experts in zip(routing[:-2], used, strict=True)
            if entry["group"] == "image"
        ]
        now = groups["image"]["layers"][layer]["expert_tokens"]
        then = old["layers"][layer]["expert_tokens"] if old["layers"] else [0] * len(now)
        assert [a - b for a, b in zip(now, then, strict=True)] == [
            sum(expert in experts for experts in image_used) for expert in range(len(now))
        ]


def test_tokens_come_back_as_words_and_pictures(http: httpx.Client) -> None:
    body = {**DRAW, "seed": 3, "return_token_ids": True}
    reply = http.post("/v1/chat/completions", json=body).json()
    choice = reply["choices"][0]
    back = http.post("/v1/detokenize", json={"tokens": choice["token_ids"]}).json()
    assert back["parts"] == choice["message"]["content"]


ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "tell me about violin"}],
    "modalities": ["text", "image"],
    "n": 16,
    "max_tokens": 1400,
    "ignore_eos": True,
    "stream": True,
    "partial_images": 8,
}
"""Words and pictures for seconds: one picture alone would be over before anybody looks."""


def test_a_client_that_vanishes_in_a_picture_frees_its_memory(http: httpx.Client) -> None:
    assert metric(http, "num_requests_running") == 0
    aborted = metric(http, 'requests_aborted_total{reason="disconnect"}')
    tokens = metric(http, 'generation_tokens_total{modality="image"}')
    body = ENDLESS
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        # Held by name: an iterator that is let go closes the stream.
        lines = response.iter_lines()
        assert any('"image"' in line for line in lines)
        assert metric(http, "num_requests_running") == 16
        assert metric(http, "kv_cache_usage_perc") > 0
    # Each reading is answered between two steps; the request is gone a few of them later.
    for _ in range(200):
        if metric(http, "num_requests_running") == 0:
            break
    assert metric(http, "num_requests_running") == 0
    assert metric(http, "kv_cache_usage_perc") == 0
    assert metric(http, 'requests_aborted_total{reason="disconnect"}') == aborted + 1
    made = metric(http, 'generation_tokens_total{modality="image"}') - tokens
    assert made < ENDLESS["n"] * ENDLESS["max_tokens"] / 2


def test_abort_by_the_id_that_the_client_chose(http: httpx.Client) -> None:
    headers = {"X-Request-Id": "mine-1"}
    body = ENDLESS
    with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.headers["x-request-id"] == "mine-1"
        lines = response.iter_lines()
        assert any('"image"' in line for line in lines)
        assert http.delete("/v1/requests/mine-1").json()["aborted"] is True
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
    assert any("request_aborted" in line for line in rest)
    assert http.delete("/v1/requests/mine-1").status_code == 404
