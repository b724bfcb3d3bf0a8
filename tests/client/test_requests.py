"""Requests are pure functions of their arguments."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from momaserve_client import Client, Png, message, picture
from momaserve_client.requests import chat_messages
from tests.client.both import PNG, Script, answer, chat_payload
from tests.client.conftest import Connect

USER = {"role": "user", "content": "hi"}


def test_text_is_one_user_message() -> None:
    assert chat_messages("hi") == [USER]


def test_parts_are_one_user_message() -> None:
    part = picture(PNG)
    expected = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    assert chat_messages([part, "what?"]) == expected
    assert chat_messages([PNG, "what?"]) == expected
    assert chat_messages(PNG) == [{"role": "user", "content": [part]}]
    url = part["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == PNG


def test_messages_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "a"}, USER]
    assert chat_messages(messages) == messages
    with pytest.raises(ValueError, match="not both"):
        chat_messages([messages[0], "b"])


def test_an_answer_goes_into_the_next_request() -> None:
    assert message("assistant", "yes") == {"role": "assistant", "content": "yes"}
    said: tuple[str | Png, ...] = ("here: ", Png(PNG))
    assert message("assistant", *said) == {
        "role": "assistant",
        "content": [{"type": "text", "text": "here: "}, picture(PNG)],
    }


def seen(connect: Connect, call: Any, payload: Any, *args: Any, **options: Any) -> httpx.Request:
    """The request that `call(client)` sends."""
    script = Script(answer(payload=payload))
    call(connect(*args, transport=script.transport, **options))
    (request,) = script.seen
    return request


def body_of(connect: Connect, call: Any) -> Any:
    script = Script(answer(payload=chat_payload()))
    client = connect(transport=script.transport)
    try:
        call(client)
    except Exception as error:  # only what was sent matters here
        assert script.seen, error
    return script.bodies[0]


def test_chat_body(connect: Connect) -> None:
    def call(client: Client) -> None:
        list(
            client.stream_chat(
                "hi", seed=3, modalities=["image"], top_logprobs=2, partial_images=5, n=None
            )
        )

    assert body_of(connect, call) == {
        "messages": [USER],
        "seed": 3,
        "modalities": ["image"],
        "logprobs": True,
        "top_logprobs": 2,
        "partial_images": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_nothing_is_sent_that_was_not_asked_for(connect: Connect) -> None:
    assert body_of(connect, lambda client: client.chat("hi")) == {"messages": [USER]}
    assert body_of(connect, lambda client: client.complete([1, 2], request_id="a")) == {
        "prompt": [1, 2],
        "echo": False,
    }
    assert body_of(connect, lambda client: client.generate_images("hi", seed=None)) == {
        "prompt": "hi",
        "response_format": "b64_json",
    }
    assert body_of(connect, lambda client: list(client.stream_images("hi", size="8x8"))) == {
        "prompt": "hi",
        "response_format": "b64_json",
        "size": "8x8",
        "stream": True,
        "partial_images": 3,
    }


def test_scoring(connect: Connect) -> None:
    def call(client: Client) -> None:
        client.complete("hi", echo=True, logprobs=0, max_tokens=0)

    assert body_of(connect, call) == {"prompt": "hi", "echo": True, "logprobs": 0, "max_tokens": 0}


def test_tokenize_and_detokenize(connect: Connect) -> None:
    flags = {"add_special_tokens": True, "return_token_strs": False}
    assert body_of(connect, lambda c: c.tokenize("hi")) == {"prompt": "hi", **flags}
    assert body_of(connect, lambda c: c.tokenize(messages="hi", model="m")) == {
        "messages": [USER],
        "model": "m",
        **flags,
    }
    assert body_of(connect, lambda c: c.detokenize((1, 2))) == {"tokens": [1, 2]}
    for prompt, messages in ((None, None), ("a", "b")):
        with pytest.raises(ValueError, match="either prompt or messages"):
            connect().tokenize(prompt, messages=messages)


def form_of(request: httpx.Request) -> dict[str, bytes]:
    """Fields of a multipart body."""
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in request.content.split(b"--" + boundary)[1:-1]:
        head, _, value = part.strip(b"\r\n").partition(b"\r\n\r\n")
        name = head.partition(b'name="')[2].partition(b'"')[0].decode()
        fields[name] = value
        if b"filename" in head:
            fields[f"{name}.type"] = head.partition(b"Content-Type: ")[2]
    return fields


USAGE = {"input_tokens": 1, "output_tokens": 4}


def test_edits_are_a_form(connect: Connect) -> None:
    image = base64.b64encode(PNG).decode()
    payload = {"data": [{"b64_json": image}], "usage": USAGE}
    request = seen(
        connect,
        lambda c: c.edit_images(
            PNG, "grün", mask=PNG + b"m", keep_rows=0, seed=7, image_top_p=0.5, n=2
        ),
        payload,
    )
    assert (request.method, request.url.path) == ("POST", "/v1/images/edits")
    assert form_of(request) == {
        "prompt": "grün".encode(),
        "response_format": b"b64_json",
        "seed": b"7",
        "image_top_p": b"0.5",
        "n": b"2",
        "keep_rows": b"0",
        "image": PNG.rstrip(b"\r\n"),  # the test's own parsing
        "image.type": b"image/png",
        "mask": PNG + b"m",
        "mask.type": b"image/png",
    }


def test_streamed_edits_say_so_as_openais_sdk_does(connect: Connect) -> None:
    script = Script(answer(500, {}))
    client = connect(transport=script.transport)
    with pytest.raises(Exception, match="500"):
        list(client.stream_edits(PNG, "a", partial_images=0))
    form = form_of(script.seen[0])
    assert (form["stream"], form["partial_images"]) == (b"true", b"0")
    assert "mask" not in form


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://h:1", "http://h:1/v1/models"),
        ("http://h:1/", "http://h:1/v1/models"),
        ("http://h/v1", "http://h/v1/models"),
        ("https://h/team/moma/", "https://h/team/moma/v1/models"),
        ("https://h/team/v1/", "https://h/team/v1/models"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/models"),
    ],
)
def test_base_urls(connect: Connect, base_url: str, expected: str) -> None:
    request = seen(connect, lambda c: c.models(), {"data": []}, base_url)
    assert str(request.url) == expected


@pytest.mark.parametrize("url", ["", "localhost:8000", "h", "ftp://h", "http://", "http://h:x"])
def test_base_urls_that_cannot_be(connect: Connect, url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        connect(url)


def test_key_is_sent_as_bearer(connect: Connect) -> None:
    request = seen(connect, lambda c: c.models(), {"data": []}, api_key="secret")
    assert request.headers["authorization"] == "Bearer secret"
    plain = seen(connect, lambda c: c.models(), {"data": []}, headers={"X-Team": "a"})
    assert "authorization" not in plain.headers
    assert plain.headers["x-team"] == "a"
    for key in ("", "a b", "a\n", "clé"):
        with pytest.raises(ValueError, match="API key"):
            connect(api_key=key)


def test_every_request_has_an_id(connect: Connect) -> None:
    script = Script(answer(payload={"data": []}))
    client = connect(transport=script.transport)
    client.models()
    client.models()
    client.models(request_id="mine:1")
    first, second, third = (request.headers["x-request-id"] for request in script.seen)
    assert len(first) == 32
    assert first != second
    assert third == "mine:1"
    for wrong in ("", "a b", "ä", "a/b", "x" * 129, "a\n"):
        with pytest.raises(ValueError, match="request id"):
            client.models(request_id=wrong)


def test_abort_names_the_request(connect: Connect) -> None:
    payload = {"id": "chatcmpl-1", "object": "request", "aborted": True}
    request = seen(connect, lambda c: c.abort("chatcmpl-1:2"), payload)
    assert (request.method, request.url.path) == ("DELETE", "/v1/requests/chatcmpl-1:2")
    for wrong in ("../models", "..", "", "?x"):
        with pytest.raises(ValueError, match="request id"):
            connect().abort(wrong)
