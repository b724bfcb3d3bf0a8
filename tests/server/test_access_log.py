"""What the server says on stderr: a line per request, for people and for machines; request ids."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from momaserve.errors import QueueFullError
from momaserve.outputs import FinishReason
from momaserve_server import cli
from momaserve_server.logs import JsonFormatter, TextFormatter, configure_logging
from tests.server.asgi import Call, chat_body, client_of, http, make_app
from tests.server.fake_engine import TEXT, FakeAsyncEngine, byte_ids

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
NUM_PROMPT_TOKENS = 4  # bos h i sep
NUM_TOKENS = len(byte_ids(f"{TEXT}5"))
LOGGER = "momaserve_server.access_log"


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "momaserve_server")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[dict[str, Any]]:
    """Fields of the lines of the access log."""
    return [
        record.__dict__["fields"]
        for record in caplog.records
        if record.name == LOGGER and record.levelno >= level
    ]


async def one_line(
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: dict[str, Any],
    fake: FakeAsyncEngine | None = None,
) -> dict[str, Any]:
    async with http(fake) as client:
        response = await client.post(path, json=body)
    (line,) = lines(caplog)
    assert line.pop("request_id") == response.headers["x-request-id"]
    assert line.pop("duration_s") >= 0
    assert (line.pop("method"), line.pop("path")) == ("POST", path)
    assert line.pop("client") == "127.0.0.1"
    reply_id = line.pop("reply_id", None)
    assert (reply_id is not None) == ("prompt_tokens" in line)
    assert reply_id is None or reply_id.endswith(response.headers["x-request-id"])
    return line


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_says_what_a_request_came_to(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    assert await one_line(caplog, CHAT, chat_body(seed=5, stream=stream)) == {
        "status": 200,
        "prompt_tokens": NUM_PROMPT_TOKENS,
        "completion_tokens": NUM_TOKENS,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize(
    ("path", "body", "tokens", "reason"),
    [
        (CHAT, chat_body(seed=5, max_tokens=3), 3, "length"),
        (CHAT, chat_body(seed=5, stop="r"), 2, "stop"),
        (COMPLETIONS, {"prompt": "hi", "seed": 5, "max_tokens": 2, "n": 2}, 4, "length"),
        (IMAGES, {"prompt": "hi"}, 6, "stop"),
    ],
)
async def test_tokens_and_reasons_of_every_route(
    caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any], tokens: int, reason: str
) -> None:
    line = await one_line(caplog, path, body)
    assert (line["completion_tokens"], line["finish_reason"]) == (tokens, reason)


async def test_choices_that_end_differently(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAsyncEngine()
    fake.failure, fake.failing_choices = (1, FinishReason.TIMEOUT), {1}
    line = await one_line(caplog, CHAT, chat_body(n=3, timeout_s=1), fake)
    assert line["finish_reason"] == "stop,timeout"


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/nowhere", {}, 404, "route_not_found"),
        (CHAT, chat_body(model="gpt"), 404, "model_not_found"),
        (CHAT, {}, 400, "missing_field"),
        (CHAT, chat_body(n=99), 400, "invalid_value"),
    ],
)
async def test_refusals_say_why(
    caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any], status: int, error: str
) -> None:
    assert await one_line(caplog, path, body) == {"status": status, "error": error}


async def test_a_full_queue_has_no_tokens(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAsyncEngine()
    fake.refusal = QueueFullError("full", retry_after_s=1)
    line = await one_line(caplog, CHAT, chat_body(), fake)
    assert line == {"status": 429, "error": "queue_full"}


async def test_a_stream_that_fails_was_a_200(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.ERROR)
    assert await one_line(caplog, CHAT, chat_body(stream=True), fake) == {
        "status": 200,
        "error": "generation_failed",
        "prompt_tokens": NUM_PROMPT_TOKENS,
        "completion_tokens": 2,
        "finish_reason": "error",
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_a_499(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    call = Call(make_app(fake), CHAT, chat_body(stream=stream))
    if stream:
        assert await call.start() == 200
    await fake.started.wait()
    call.hang_up()
    await call.ended()
    (line,) = lines(caplog)
    assert line["status"] == 499
    assert (line["prompt_tokens"], line["completion_tokens"]) == (NUM_PROMPT_TOKENS, 0)
    assert "finish_reason" not in line


async def test_a_client_that_leaves_while_it_sends(caplog: pytest.LogCaptureFixture) -> None:
    call = Call(make_app(), CHAT, pieces=[])
    call.hang_up()
    await call.ended()
    (line,) = lines(caplog)
    assert line["status"] == 499


async def test_a_request_that_the_server_cuts_off(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    call = Call(make_app(fake), CHAT, chat_body())
    await fake.started.wait()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.ended()
    (line,) = lines(caplog)
    assert line["status"] == 499


async def test_probes_are_of_interest_to_whoever_debugs(caplog: pytest.LogCaptureFixture) -> None:
    async with http(root_path="/llm") as client:
        for path in ("/health", "/ready", "/metrics", "/llm/health", "/version"):
            await client.get(path)
    assert [line["path"] for line in lines(caplog)] == ["/llm/version"]
    assert len(lines(caplog, logging.DEBUG)) == 5


async def test_no_access_log(caplog: pytest.LogCaptureFixture) -> None:
    async with http(access_log=False) as client:
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
    assert lines(caplog, logging.DEBUG) == []


async def test_nothing_of_a_stranger_breaks_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async with http() as client:
        await client.get("/a%0Amomaserve:%20fake%22?key=secret&prompt=words")
        await client.get("/" + "b" * 1000)
        await client.post(CHAT, json=chat_body(user="secret", seed=5))
    first, long, chat = (r for r in caplog.records if r.name == LOGGER)
    for record in (first, long, chat):
        for text in (TextFormatter().format(record), JsonFormatter().format(record)):
            assert len(text.splitlines()) == 1
            assert len(text) < 700
            for word in ("secret", "words", TEXT.strip(), 'hi"', 'fake"'):
                assert word not in text


# --- what nobody caught --------------------------------------------------------------------


async def test_an_unexpected_error_is_logged_once_with_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = FakeAsyncEngine()
    fake.refusal = RuntimeError("broken inside")
    async with http(fake, cors_origins=("*",)) as client:
        headers = {"X-Request-Id": "mine", "Origin": "https://a.example"}
        response = await client.post(CHAT, json=chat_body(), headers=headers)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == "*"
    (told,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert told.exc_info is not None
    (line,) = lines(caplog)
    assert (line["status"], line["error"]) == (500, "internal_error")


async def test_an_answer_that_breaks_in_the_middle(caplog: pytest.LogCaptureFixture) -> None:
    async def breaks(request: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError("broken inside")

        return app

    app = make_app()
    app.add_route("/breaks", breaks)
    with pytest.raises(RuntimeError):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            await client.get("http://test/breaks")
    (line,) = lines(caplog)
    assert line["status"] == 500


# --- formats -------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """The lines on stderr, each as the JSON that it must be."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


async def test_json_is_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    fake = FakeAsyncEngine()
    async with client_of(make_app(fake)) as client:
        await client.post(CHAT, json=chat_body(seed=5), headers={"X-Request-Id": "one"})
        fake.refusal = RuntimeError("broken\ninside")
        await client.post(CHAT, json=chat_body(), headers={"X-Request-Id": "two"})
        await client.get("/health")
    logging.getLogger("momaserve.engine").warning("a word with %s", "an argument")
    logging.getLogger("elsewhere").info("nobody wants to know")
    warnings.warn("as a warning", stacklevel=1)
    served, error, failed, word, warned = printed(capsys)
    assert served.keys() == {
        *("time", "level", "logger", "message", "request_id", "method", "path", "status"),
        *("duration_s", "client", "reply_id", "prompt_tokens", "completion_tokens"),
        "finish_reason",
    }
    assert served["time"].endswith("Z")
    assert (served["level"], served["request_id"], served["status"]) == ("info", "one", 200)
    assert served["message"] == f"POST {CHAT} 200"
    assert (error["level"], error["message"], error["request_id"]) == (
        "error",
        "unexpected error",
        "two",
    )
    assert error["exception"].startswith("Traceback")
    assert error["exception"].endswith("broken\ninside")
    assert (failed["status"], failed["error"]) == (500, "internal_error")
    assert (word["message"], word["logger"]) == ("a word with an argument", "momaserve.engine")
    assert "request_id" not in word
    assert warned["level"] == "warning"
    assert "as a warning" in warned["message"]


def test_what_a_thread_does_not_catch_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")

    def fail() -> None:
        raise ValueError("lost")

    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    (line,) = printed(capsys)
    assert line["message"] == "unexpected error in thread worker"
    assert line["exception"].endswith("ValueError: lost")


async def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text", "info")
    logging.getLogger("momaserve_server.serving").info("loading %s", "here")
    async with http() as client:
        await client.get("/version", headers={"X-Request-Id": "one"})
    try:
        raise ValueError("lost")
    except ValueError:
        logging.getLogger("momaserve").exception("something failed")
    first, second, third, *stack = capsys.readouterr().err.splitlines()
    assert first == "momaserve: loading here"
    assert second.startswith("momaserve: 2")
    assert " GET /version 200 request_id=one duration_s=0." in second
    assert third.startswith("momaserve: 2")
    assert third.endswith("Z error: something failed")
    assert stack[0].startswith("Traceback")
    assert stack[-1] == "ValueError: lost"


async def test_the_level_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for level, expected in (("debug", 2), ("info", 1), ("warning", 0)):
        configure_logging("json", level)
        async with http() as client:
            await client.get("/version")
            await client.get("/health")
        assert len(printed(capsys)) == expected


def test_a_server_that_cannot_start_says_so_in_its_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none")
    assert cli.main(["serve", "--port", "0", "--log-format", "json", missing]) == 1
    loading, failed = printed(capsys)
    assert loading["message"] == f"loading {missing}"
    assert (failed["level"], missing in failed["message"]) == ("critical", True)
    words = ["serve", "--port", "0", "--log-format", "json", "--random-weights"]
    assert cli.main(words) == 2
    (refused,) = printed(capsys)
    assert "--preset and --random-weights go together" in refused["message"]


# --- request ids ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A.b_c:d-9", "x" * 128])
async def test_a_client_may_choose_the_id(name: str) -> None:
    async with http() as client:
        response = await client.post(CHAT, json=chat_body(), headers={"X-Request-Id": name})
    assert response.status_code == 200
    assert response.headers["x-request-id"] == name
    assert response.json()["id"] == f"chatcmpl-{name}"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([""], "got 0 characters"),
        (["x" * 129], "got 129 characters"),
        (["a b"], "got ' '"),
        (["a/b"], "got '/'"),
        (["a\tb"], r"got '\t'"),
        (["ä"], "got"),
        (["a", "b"], "got 2 of them"),
    ],
)
async def test_an_id_that_is_none_is_refused_with_the_limit(names: list[str], words: str) -> None:
    fake = FakeAsyncEngine()
    async with http(fake) as client:
        headers = [(b"X-Request-Id", name.encode("latin-1")) for name in names]
        for path in (CHAT, "/health"):
            response = await client.request(
                "POST" if path == CHAT else "GET", path, json=chat_body(), headers=headers
            )
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("request_id", "invalid_request")
            assert "1 to 128 characters of A-Z a-z 0-9 . _ : -" in error["message"]
            assert words in error["message"]
            assert response.headers["x-request-id"] not in names
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
    assert len(fake.submissions) == 1


async def test_an_id_in_use_is_refused_until_it_is_free() -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    app = make_app(fake)
    headers = ((b"content-type", b"application/json"), (b"x-request-id", b"mine"))
    first = Call(app, CHAT, chat_body(stream=True), headers=headers)
    assert await first.start() == 200
    async with client_of(app) as client:
        chosen = {"X-Request-Id": "mine"}
        refused = await client.post(CHAT, json=chat_body(), headers=chosen)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "request_id"
        assert "already in use" in error["message"]
        first.hang_up()
        await first.ended()
        fake.aborted.clear()  # it would take the next one of that name for the same
        fake.gate = None
        again = await client.post(CHAT, json=chat_body(), headers=chosen)
    assert again.status_code == 200
