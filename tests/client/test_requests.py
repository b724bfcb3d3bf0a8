"""Requests are pure functions of their arguments."""

from __future__ import annotations

import base64

import pytest

from momaserve_client import picture
from momaserve_client.requests import (
    chat_messages,
    chat_request,
    completion_request,
    images_request,
)


def test_text_is_one_user_message() -> None:
    assert chat_messages("hi") == [{"role": "user", "content": "hi"}]


def test_parts_are_one_user_message() -> None:
    part = picture(b"\x89PNG")
    assert chat_messages([part, "what?"]) == [
        {"role": "user", "content": [part, {"type": "text", "text": "what?"}]}
    ]
    url = part["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == b"\x89PNG"


def test_messages_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert chat_messages(messages) == messages
    with pytest.raises(ValueError, match="not both"):
        chat_messages([messages[0], "b"])


def test_chat_body() -> None:
    request = chat_request(
        "hi", {"seed": 3}, modalities=["image"], top_logprobs=2, partial_images=5, stream=True
    )
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.body == {
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 3,
        "modalities": ["image"],
        "logprobs": True,
        "top_logprobs": 2,
        "partial_images": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_nothing_is_sent_that_was_not_asked_for() -> None:
    chat = chat_request("hi", {}, modalities=None, top_logprobs=None, stream=False)
    assert set(chat.body or {}) == {"messages"}
    completion = completion_request([1, 2], {}, echo=False, logprobs=None, stream=False)
    assert completion.body == {"prompt": [1, 2], "echo": False}
    images = images_request("hi", {}, partial_images=None, stream=False)
    assert images.body == {"prompt": "hi", "response_format": "b64_json"}
