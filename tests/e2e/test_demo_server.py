"""The embedded demo through a real server and the official OpenAI client."""

from __future__ import annotations

import base64
import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import LiveServer


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def png(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert image.format == "PNG"
    return image


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_streams_in_and_gets_its_name_back(
    server: LiveServer, client: openai.OpenAI
) -> None:
    width, height = server.card()["image"]["size"]
    stream = client.images.generate(
        prompt="red apple", stream=True, partial_images=3, extra_body={"seed": 7}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    picture = png(events[-1].b64_json)
    assert picture.size == (width, height)
    assert len(picture.convert("RGB").getcolors(width * height) or []) > 100  # not blank
    answer = client.chat.completions.create(
        model="demo",
        seed=7,
        stop="\n",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": data_url(picture)}},
                ],
            }
        ],
    )
    assert answer.choices[0].message.content == "red apple"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > server.tokens_per_image


def test_a_gloss_streams_as_the_whole(client: openai.OpenAI) -> None:
    def ask(stream: bool) -> str:
        reply = client.chat.completions.create(
            model="demo",
            seed=3,
            temperature=0,
            stream=stream,
            messages=[{"role": "user", "content": "define violin"}],
        )
        if isinstance(reply, openai.Stream):
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)
        return reply.choices[0].message.content or ""

    whole = ask(stream=False)
    assert len(whole.split()) >= 3
    assert ask(stream=True) == whole


def test_sixteen_streams_equal_their_lone_runs(server: LiveServer) -> None:
    """Pictures and text at once, each as alone with the same seed (float32)."""
    num_codes = server.tokens_per_image
    names = ["whale", "umbrella", "banana", "crown", "anchor", "key", "snowman", "red heart"]
    bodies = [
        {
            "model": "demo",
            "messages": [{"role": "user", "content": name}],
            "modalities": [modality],
            "seed": seed,
            "stream": True,
            "max_tokens": num_codes + 16,
            "temperature": 1.0,
            "image_temperature": 1.0,
            "return_token_ids": True,
        }
        for seed, (name, modality) in enumerate(itertools.product(names, ["text", "image"]))
    ]

    def run(body: dict[str, object]) -> list[int]:
        ids: list[int] = []
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=120
        ) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunk = httpx.Response(200, text=line[6:]).json()
                    for choice in chunk["choices"]:
                        ids += choice.get("token_ids") or []
        return ids

    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(run, bodies))
    alone = [run(body) for body in bodies]
    assert together == alone
    assert all(len(ids) == num_codes + 2 for ids in together[1::2])  # begin_image, end_image


def test_wrong_requests_leave_the_server_well(server: LiveServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nosuch"):
        client.chat.completions.create(model="nosuch", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="wibble"):
        client.completions.create(model="demo", prompt="x", extra_body={"wibble": 1})
    longest = server.card()["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=str(longest)):
        client.completions.create(model="demo", prompt=[40] * (longest + 1))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="demo",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                    ],
                }
            ],
        )
    assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 400
    assert httpx.get(f"{server.url}/health").status_code == 200
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "momaserve_num_requests_running 0.0" in metrics
    assert "momaserve_kv_cache_usage_perc 0.0" in metrics
