"""`/v1/completions`: text and ids, echo, scoring, several prompts, streamed equals whole."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve.errors import PromptError
from momaserve.sampling import SamplingParams
from tests.server.asgi import data_of, http, joined
from tests.server.fake_engine import (
    BEGIN,
    BOS,
    END,
    SEP,
    TEXT,
    FakeAsyncEngine,
    FakeEngine,
    byte_ids,
    code_ids,
    logprob,
    processor,
)

pytestmark = pytest.mark.anyio
COMPLETIONS = "/v1/completions"


async def complete(fake: FakeAsyncEngine | None = None, **body: Any) -> Any:
    async with http(fake) as client:
        response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refuse(fake: FakeAsyncEngine | None = None, **body: Any) -> dict[str, Any]:
    async with http(fake) as client:
        response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_text_prompt_gets_bos_and_template() -> None:
    fake = FakeAsyncEngine()
    reply = await complete(fake, prompt="ab", seed=3)
    assert fake.submissions[0].prompt.token_ids == (BOS, *byte_ids("ab"), SEP)
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": f"{TEXT}3", "logprobs": None, "finish_reason": "stop"}
    ]


async def test_token_ids_are_used_as_they_stand() -> None:
    fake = FakeAsyncEngine()
    ids = [*byte_ids("a"), BEGIN, *code_ids(1, 2, 3, 4), END]
    reply = await complete(fake, prompt=ids)
    assert fake.submissions[0].prompt.token_ids == tuple(ids)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 4}


async def test_default_length_is_openais() -> None:
    fake = FakeAsyncEngine()
    await complete(fake, prompt="a")
    await complete(fake, prompt="a", max_tokens=99)
    assert [s.params.max_tokens for s in fake.submissions] == [16, 99]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([10_000], "from 0 to 277, got 10000"),
        ([-1], "got -1"),
        ([10**30], "more than 20 digits"),
        ([code_ids(1)[0]], "outside a picture"),
        ([BEGIN, 9], "inside a picture"),
        ([], "no tokens"),
        ([[]], "no tokens"),
    ],
)
async def test_bad_ids_are_named(prompt: Any, words: str) -> None:
    assert words in (await refuse(prompt=prompt))["message"]


async def test_several_prompts_and_choices_are_numbered() -> None:
    fake = FakeAsyncEngine()
    reply = await complete(fake, prompt=["a", "bc"], n=2, seed=1)
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in reply["choices"]] == [f"{TEXT}1", f"{TEXT}2"] * 2
    assert reply["usage"]["prompt_tokens"] == 3 + 4
    assert len({s.request_id for s in fake.submissions}) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_summed_over_prompts(stream: bool) -> None:
    fake = FakeAsyncEngine()
    fake.num_cached_tokens = 2
    body: dict[str, Any] = {"prompt": ["a", "bc"], "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with http(fake) as client:
        response = await client.post(COMPLETIONS, json=body)
    usage = (data_of(response.text)[-2] if stream else response.json())["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4, "image_tokens": 0}


async def test_sampling_fields_reach_the_engine() -> None:
    fake = FakeAsyncEngine()
    fields: dict[str, Any] = {"min_tokens": 2, "presence_penalty": 2, "timeout_s": 1, "priority": 1}
    fields |= {"repetition_penalty": 1.2, "frequency_penalty": -1, "cache_salt": "a"}
    fields |= {"guidance_scale": 0, "max_tokens": 5, "n": 2, "seed": 3}
    await complete(fake, prompt="ab", **fields)
    assert fake.submissions[0].params == SamplingParams(**fields)


async def test_one_bad_prompt_takes_all_back() -> None:
    fake = FakeAsyncEngine()
    fake.refusal, fake.refusal_after = PromptError("no"), 2
    await refuse(fake, prompt=["a", "b", "c"])
    assert len(fake.submissions) == 2
    assert fake.running == set()


async def test_number_of_prompts_is_limited() -> None:
    async with http(max_prompts_per_request=2) as client:
        response = await client.post(COMPLETIONS, json={"prompt": ["a"] * 3})
    assert response.status_code == 400
    assert "3 prompts; the limit is 2" in response.json()["error"]["message"]


async def test_scoring_a_prompt() -> None:
    ids = [BOS, *byte_ids("hé"), SEP]
    reply = await complete(prompt=ids, echo=True, logprobs=2, max_tokens=0)
    choice = reply["choices"][0]
    expected = [logprob(token_id, 2) for token_id in ids[1:]]
    assert choice["text"] == "hé"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["<|bos|>", "h", "bytes:\\xc3", "bytes:\\xa9", "<|sep|>"],
        "token_logprobs": [None, *(entry.logprob for entry in expected)],
        "top_logprobs": [
            None,
            {"!": -0.5, '"': -1.5, "h": expected[0].logprob},
            {"!": -0.5, '"': -1.5, "bytes:\\xc3": expected[1].logprob},
            {"!": -0.5, '"': -1.5, "bytes:\\xa9": expected[2].logprob},
            {"!": -0.5, '"': -1.5, "<|sep|>": expected[3].logprob},
        ],
        "text_offset": [0, 0, 1, 1, 2],
    }
    assert reply["usage"]["completion_tokens"] == 0


async def test_scoring_without_tokenizer() -> None:
    fake = FakeAsyncEngine(engine=FakeEngine(processor=processor(has_text=False)))
    reply = await complete(fake, prompt=[7, 8], echo=True, logprobs=0, max_tokens=0)
    choice = reply["choices"][0]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == ["token_id:7", "token_id:8"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    error = await refuse(fake, prompt="words")
    assert error["message"].endswith("send token ids")
    assert error["param"] == "prompt"
    assert (await refuse(fake, prompt=[7], stop="x"))["param"] == "stop"


async def test_echo_puts_the_prompt_first() -> None:
    reply = await complete(prompt="ab", echo=True, seed=3)
    assert reply["choices"][0]["text"] == f"ab{TEXT}3"
    assert reply["choices"][0]["logprobs"] is None
    assert (await complete(prompt=byte_ids("ab"), echo=True, max_tokens=0))["choices"][0][
        "text"
    ] == "ab"


async def test_offsets_find_each_token_in_the_text() -> None:
    reply = await complete(prompt="xy", echo=True, logprobs=1, max_tokens=8, seed=3)
    choice = reply["choices"][0]
    for token, offset in zip(
        choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True
    ):
        if len(token) == 1:
            assert choice["text"][offset] == token
    lengths = {len(values) for values in choice["logprobs"].values()}
    assert lengths == {4 + 8}  # bos x y sep, and what was generated


async def test_offsets_without_echo_begin_at_zero() -> None:
    reply = await complete(prompt="xy", logprobs=0, max_tokens=3)
    assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
async def test_streamed_equals_whole(echo: bool, logprobs: int | None) -> None:
    body: dict[str, Any] = {
        "prompt": ["a", "bé"],
        "n": 2,
        "seed": 3,
        "echo": echo,
        "logprobs": logprobs,
    }
    body |= {"return_token_ids": True, "stop": ["! 4"]}
    whole = await complete(**body)
    async with http() as client:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post(COMPLETIONS, json=body | options)
    *chunks, usage, done = data_of(response.text)
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert joined(c["token_ids"] for c in mine) == choice["token_ids"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            pieces = [c["logprobs"][name] for c in mine if c["logprobs"]]
            expected = choice["logprobs"][name] if logprobs is not None else []
            assert joined(pieces) == expected


async def test_prompt_that_ends_inside_a_picture_is_continued() -> None:
    fake = FakeAsyncEngine(lambda params, index: [*code_ids(3, 4), END, *byte_ids("ok")])
    reply = await complete(fake, prompt=[BEGIN, *code_ids(1, 2)], return_token_ids=True)
    assert reply["choices"][0]["text"] == "ok"
    assert reply["usage"]["completion_tokens_details"] == {"image_tokens": 2}
