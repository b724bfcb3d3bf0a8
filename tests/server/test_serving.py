"""The real server process: readiness, draining on a signal, taken ports."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest

from momaserve.engine import Engine
from momaserve.errors import MomaserveError, WarmUpError
from momaserve.warm_up import WarmUp
from momaserve_server.cli import main
from momaserve_server.serving import bound_socket
from momaserve_server.settings import ServerSettings
from tests.server.asgi import TIMEOUT_S, chat_body
from tests.server.fake_engine import TEXT, FakeAsyncEngine
from tests.server.live import live


def gated() -> FakeAsyncEngine:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    return fake


def open_gate(fake: FakeAsyncEngine) -> None:
    assert fake.gate is not None
    for _ in range(100):
        fake.gate.release()


def test_signal_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with live(gated()) as running, httpx.Client(base_url=running.url, timeout=TIMEOUT_S) as client:
        assert client.get("/ready").status_code == 200
        with client.stream(
            "POST", "/v1/chat/completions", json=chat_body(stream=True, seed=5)
        ) as stream:
            assert stream.status_code == 200
            running.server.handle_exit(signal.SIGTERM, None)
            draining = threading.Event()
            running.call(lambda: running.call(draining.set))  # after the signal's own callback
            assert draining.wait(TIMEOUT_S)
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/chat/completions", json=chat_body())
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"]
            running.call(open_gate, running.fake)
            lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("content", "") for delta in deltas) == f"{TEXT}5"
        running.thread.join(TIMEOUT_S)
        assert running.fake.is_closed


def test_drain_timeout_ends_what_still_runs_with_an_error() -> None:
    with (
        live(gated(), drain_timeout_s=0.05) as running,
        httpx.Client(base_url=running.url, timeout=TIMEOUT_S) as client,
        client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as stream,
    ):
        running.server.handle_exit(signal.SIGTERM, None)
        text = stream.read().decode()
        assert '"request_aborted"' in text
        assert text.endswith("data: [DONE]\n\n")
        running.thread.join(TIMEOUT_S)
        assert not running.thread.is_alive()


def test_second_signal_ends_at_once() -> None:
    with live(gated()) as running, httpx.Client(base_url=running.url, timeout=TIMEOUT_S) as client:
        with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)):
            running.server.handle_exit(signal.SIGTERM, None)
            running.server.handle_exit(signal.SIGTERM, None)
            assert running.server.force_exit
        running.thread.join(TIMEOUT_S)
        assert not running.thread.is_alive()


def test_closing_the_connection_aborts() -> None:
    with live(gated()) as running, httpx.Client(base_url=running.url, timeout=TIMEOUT_S) as client:
        with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)):
            ended = threading.Event()

            async def wait_for_the_end() -> None:
                await running.fake.stopped.wait()
                ended.set()

            asyncio.run_coroutine_threadsafe(wait_for_the_end(), running.loop)
            assert running.fake.running
        assert ended.wait(TIMEOUT_S)
        assert not running.fake.running


def test_too_large_chunked_body_over_a_real_socket() -> None:
    with live(max_body_bytes=1000) as running:
        pieces = (b"x" * 600 for _ in range(3))
        response = httpx.post(running.url + "/v1/completions", content=pieces)
        assert response.status_code == 413
        assert httpx.get(running.url + "/health").status_code == 200


def test_a_plain_client_sees_the_answer_to_a_too_large_body() -> None:
    """One that sends all of its body before it reads must not meet a closed connection."""
    with live(max_body_bytes=1 << 20) as running:
        address = running.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", b"x" * ((1 << 20) + 9), headers)
        assert connection.getresponse().status == 413
        connection.close()


def test_taken_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MomaserveError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bound_socket(ServerSettings(port=port))


def test_unknown_host_is_one_clear_error() -> None:
    with pytest.raises(MomaserveError, match=r"cannot listen on 256\.1\.1\.1"):
        bound_socket(ServerSettings(host="256.1.1.1"))


def test_replies_do_not_wait_for_acknowledgements() -> None:
    """asyncio sets TCP_NODELAY on connections of a socket of this protocol alone."""
    with bound_socket(ServerSettings(port=0)) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_sigterm_while_a_checkpoint_loads_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Process 1 of a container has no default for signals: it would wait to be killed."""
    before = signal.getsignal(signal.SIGTERM)

    def loading(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("momaserve_server.serving.Engine.load", loading)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as for process 1
    try:
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--port", "0"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("flags", "wanted"), [((), True), (("--no-warm-up",), False)])
def test_made_up_requests_come_first(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], wanted: bool
) -> None:
    events: list[str] = []

    def warm(engine: Engine) -> WarmUp:
        assert engine.model_name == "loaded"
        events.append("warm-up")
        return WarmUp((1, 8), 0.5)

    def serving(*_: object, **__: object) -> None:
        events.append("serving")
        raise KeyboardInterrupt

    loaded = SimpleNamespace(model_name="loaded")
    monkeypatch.setattr("momaserve_server.serving.Engine.load", lambda *_: loaded)
    monkeypatch.setattr("momaserve_server.serving.warm_up", warm)
    monkeypatch.setattr("momaserve_server.serving.AsyncEngine", serving)
    main(["serve", "--port", "0", *flags])
    assert events == (["warm-up", "serving"] if wanted else ["serving"])


def test_an_engine_that_cannot_answer_is_not_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warm(engine: Engine) -> WarmUp:
        raise WarmUpError("a first step of 8 requests failed: OutOfMemoryError")

    monkeypatch.setattr("momaserve_server.serving.Engine.load", lambda *_: SimpleNamespace())
    monkeypatch.setattr("momaserve_server.serving.warm_up", warm)
    assert main(["serve", "--port", "0"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("a first step of 8 requests failed: OutOfMemoryError")
