"""What a stream's events make of a record, and requests as HTTP."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from momaserve_bench.bodies import CHAT, COMPLETIONS, IMAGES, http_request
from momaserve_bench.records import AnswerReader, FailedRequestError, RequestRecord
from momaserve_bench.workload import Kind, WorkItem


def item(kind: Kind = Kind.TEXT, max_tokens: int = 3, **changes: Any) -> WorkItem:
    return WorkItem(**{"index": 0, "kind": kind, "max_tokens": max_tokens, "seed": 9, **changes})


def reader(work: WorkItem) -> tuple[AnswerReader, RequestRecord]:
    record = RequestRecord(index=0, kind=work.kind, scheduled_s=0.0)
    return AnswerReader(record, work), record


def chunk(finish_reason: str | None = None, **fields: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, **fields}]})


def usage(prompt: int, completion: int, image: int = 0) -> str:
    details = {"image_tokens": image}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return json.dumps({"choices": [], "usage": {**counts, "completion_tokens_details": details}})


def test_a_completion_token_by_token() -> None:
    read, record = reader(item())
    read.take("message", chunk(text="a", token_ids=[30]), 1.0)
    read.take("message", chunk(text="", token_ids=[31]), 2.0)  # half a character
    read.take("message", chunk(text="bc", token_ids=[32]), 4.0)
    read.take("message", chunk("length", text="", token_ids=[]), 4.5)
    read.take("message", usage(7, 3), 4.5)
    read.take("message", "[DONE]", 4.6)
    read.finish()
    assert record.token_times_s == [1.0, 2.0, 4.0]
    assert (record.first_token_s, record.prompt_tokens, record.output_tokens) == (1.0, 7, 3)
    assert (record.images, record.image_tokens) == (0, 0)


def test_a_chat_begins_with_a_role() -> None:
    read, record = reader(item(Kind.IMAGE_INPUT, max_tokens=2))
    read.take("message", chunk(delta={"role": "assistant", "content": ""}), 1.0)
    read.take("message", chunk(delta={"content": "a"}, token_ids=[30]), 2.0)
    read.take("message", chunk(delta={}, token_ids=[31]), 3.0)
    read.take("message", chunk("length", delta={}), 3.0)
    read.take("message", "[DONE]", 3.0)
    read.finish()
    assert (record.token_times_s, record.output_tokens) == ([2.0, 3.0], 2)


def test_a_server_without_token_ids_counts_pieces() -> None:
    read, record = reader(item(max_tokens=2))
    read.take("message", chunk(text="a"), 1.0)
    read.take("message", chunk(text="b"), 2.0)
    assert record.output_tokens == 2
    read.take("message", usage(3, 5), 2.0)
    assert record.output_tokens == 5  # the server knows better


def test_a_picture_of_pixels() -> None:
    read, record = reader(item(Kind.IMAGE_OUTPUT, max_tokens=66, words="a tree"))
    event = "image_generation.partial_image"
    read.take(event, json.dumps({"type": event, "b64_json": ""}), 1.0)
    read.take(event, json.dumps({"type": event, "b64_json": ""}), 2.0)
    event = "image_generation.completed"
    counts = {"input_tokens": 12, "output_tokens": 64}
    read.take(event, json.dumps({"type": event, "usage": counts}), 3.0)
    read.finish()
    assert (record.first_partial_image_s, record.image_s, record.images) == (1.0, 3.0, 1)
    assert (record.prompt_tokens, record.output_tokens, record.image_tokens) == (12, 64, 64)
    assert record.token_times_s == []


def test_a_picture_of_ids() -> None:
    work = item(Kind.IMAGE_OUTPUT, max_tokens=3, token_ids=(30, 3))
    read, record = reader(work)
    for at, ids in enumerate(([40], [41, 4])):
        read.take("message", chunk(text="", token_ids=ids), float(at))
    read.take("message", usage(2, 3, image=2), 1.0)
    read.take("message", "[DONE]", 1.5)
    read.finish()
    assert (record.images, record.image_s, record.image_tokens) == (1, 1.0, 2)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "cut off"),
        ([chunk(text="a", token_ids=[1, 2, 3])], "cut off"),
        ([chunk(text="a", token_ids=[1, 2]), "[DONE]"], "short answer"),
        ([chunk("timeout", text="a", token_ids=[1]), "[DONE]"], "timeout"),
        (["{"], "bad event"),
        (["3"], "bad event"),
        (['{"x": 1}'], "bad event"),
        (['{"error": {"code": "engine_dead", "message": "m"}}'], "stream engine_dead"),
        (['{"error": {}}'], "bad event"),
    ],
)
def test_failures_have_a_reason(events: list[str], reason: str) -> None:
    read, _ = reader(item())
    with pytest.raises(FailedRequestError) as caught:
        for data in events:
            read.take("message", data, 1.0)
        read.finish()
    assert caught.value.reason == reason


def test_when_to_cancel() -> None:
    read, _ = reader(item(max_tokens=10, cancel_share=0.5))
    assert not read.is_due_to_cancel
    read.take("message", chunk(text="a", token_ids=[1, 2, 3, 4]), 1.0)
    assert not read.is_due_to_cancel
    read.take("message", chunk(text="a", token_ids=[5]), 1.0)
    assert read.is_due_to_cancel
    read, _ = reader(item(Kind.IMAGE_OUTPUT, words="a", max_tokens=66, cancel_share=0.5))
    read.take("x", json.dumps({"type": "image_generation.partial_image"}), 1.0)
    assert read.is_due_to_cancel
    read, _ = reader(item(max_tokens=1))
    read.take("message", chunk(text="a", token_ids=[5]), 1.0)
    assert not read.is_due_to_cancel


# --- requests ------------------------------------------------------------------------------


def body(work: WorkItem, partial_images: int = 2) -> tuple[str, dict[str, Any]]:
    path, data = http_request(work, model="m", salt="s", partial_images=partial_images)
    return path, json.loads(data)


def test_ids_go_to_completions() -> None:
    path, sent = body(item(token_ids=(5, 6)))
    assert path == COMPLETIONS
    assert (sent["prompt"], sent["max_tokens"], sent["ignore_eos"]) == ([5, 6], 3, True)
    assert (sent["seed"], sent["cache_salt"], sent["model"]) == (9, "s", "m")
    assert (sent["stream"], sent["temperature"], sent["return_token_ids"]) == (True, 0.0, True)


def test_words_that_ask_for_a_picture_go_to_images() -> None:
    path, sent = body(item(Kind.IMAGE_OUTPUT, words="a tree"))
    assert path == IMAGES
    assert (sent["prompt"], sent["partial_images"], sent["stream"]) == ("a tree", 2, True)
    assert "max_tokens" not in sent
    assert body(item(Kind.IMAGE_OUTPUT, token_ids=(5, 3)))[0] == COMPLETIONS


def test_a_picture_with_words_goes_to_chat() -> None:
    path, sent = body(item(Kind.IMAGE_INPUT, words="what", picture=b"png"))
    assert path == CHAT
    picture, words = sent["messages"][0]["content"]
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    assert picture == {"type": "image_url", "image_url": {"url": url}}
    assert words == {"type": "text", "text": "what"}
    assert sent["max_tokens"] == 3
