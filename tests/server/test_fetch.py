"""Pictures by URL: only from allowed hosts, and never more, longer or further than allowed."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from momaserve.errors import PromptError
from momaserve_server.fetch import MAX_REDIRECTS, allowed_hosts, checked_url
from tests.server.asgi import TIMEOUT_S, client_of, make_app
from tests.server.fake_engine import BEGIN, END, FakeAsyncEngine, code_ids
from tests.server.test_media import ask, data_url, png

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
PARAM = "messages.0.content.0.image_url"
PICTURE = png(grey=160)
CODES = (BEGIN, *code_ids(10, 10, 10, 10), END)
MAX_BYTES = 10_000


class Host(ThreadingHTTPServer):
    """A web server of pictures and of trouble."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = f"127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.headers_seen: list[dict[str, str]] = []
        self.elsewhere = ""
        """Where `/away` sends its visitors."""
        self.over = threading.Event()
        """Ends the answers that never end."""

    def url(self, path: str) -> str:
        return f"http://{self.name}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever asked has gone, as the tests want it


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Host

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.headers_seen.append({k.lower(): v for k, v in self.headers.items()})
        getattr(self, "answer_" + self.path.strip("/").partition("/")[0])()

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self, body: bytes, **headers: str) -> None:
        length = {"Content-Length": str(len(body)), "Content-Type": "image/png"}
        self.send(200, length | headers, body)

    def answer_good(self) -> None:
        self.picture(PICTURE, **{"Set-Cookie": "tenant=1; Path=/"})

    def answer_declared(self) -> None:
        self.picture(b"x" * (MAX_BYTES + 1))

    def answer_chunked(self) -> None:
        self.send(200, {"Content-Type": "image/png", "Transfer-Encoding": "chunked"})
        chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        while not self.server.over.is_set():
            self.wfile.write(chunk)  # until the other side has had enough

    def answer_drip(self) -> None:
        self.send(200, {"Content-Type": "image/png", "Content-Length": "100"}, b"x")
        self.server.over.wait(TIMEOUT_S)

    def answer_silent(self) -> None:
        self.server.over.wait(TIMEOUT_S)

    def answer_short(self) -> None:
        self.send(200, {"Content-Type": "image/png", "Content-Length": "100"}, b"x")
        self.close_connection = True

    def answer_gone(self) -> None:
        self.send(404, {"Content-Type": "image/png", "Content-Length": "0"})

    def answer_page(self) -> None:
        self.picture(b"<html>", **{"Content-Type": "text/html; charset=utf-8"})

    def answer_untyped(self) -> None:
        self.send(200, {"Content-Length": str(len(PICTURE))}, PICTURE)

    def answer_broken(self) -> None:
        self.picture(b"no picture at all")

    def answer_zipped(self) -> None:
        self.picture(gzip.compress(b"x" * 10_000_000), **{"Content-Encoding": "gzip"})

    def answer_away(self) -> None:
        self.send(302, {"Location": self.server.elsewhere, "Content-Length": "0"})

    def answer_nowhere(self) -> None:
        self.send(302, {"Content-Length": "0"})

    def answer_hops(self) -> None:
        """`/hops/3` is a picture three redirects away."""
        left = int(self.path.rpartition("/")[2])
        target = f"/hops/{left - 1}" if left > 1 else "../good"
        self.send(307, {"Location": target, "Content-Length": "0"})


@contextmanager
def serving() -> Generator[Host, None, None]:
    with Host() as host:
        thread = threading.Thread(target=host.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield host
        finally:
            host.over.set()
            host.shutdown()
            thread.join(TIMEOUT_S)


@pytest.fixture
def host() -> Generator[Host, None, None]:
    with serving() as started:
        yield started


@pytest.fixture
def other() -> Generator[Host, None, None]:
    with serving() as started:
        yield started


class Asker:
    """An app that may fetch from some hosts, and its client."""

    def __init__(self, *hosts: Host, timeout_s: float = TIMEOUT_S) -> None:
        self.fake = FakeAsyncEngine()
        self._app = make_app(
            self.fake,
            allow_image_hosts=tuple(host.name for host in hosts),
            image_fetch_timeout_s=timeout_s,
            max_image_bytes=MAX_BYTES,
        )

    async def ask(self, *urls: str) -> httpx.Response:
        async with client_of(self._app) as client:
            return await client.post(CHAT, json=ask(*urls))

    async def refused(self, url: str, param: str = PARAM) -> str:
        """The message of the 400 that `url` gets."""
        before = len(self.fake.submissions)
        response = await self.ask(url)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_prompt", param)
        assert len(self.fake.submissions) == before
        message: str = error["message"]
        return message

    def be_patient(self) -> None:
        self._app.state.context.fetcher._timeout_s = TIMEOUT_S


async def test_a_picture_at_an_allowed_host(host: Host) -> None:
    asker = Asker(host)
    response = await asker.ask(host.url("/good"))
    assert response.status_code == 200, response.text
    assert asker.fake.submissions[0].prompt.token_ids[1:7] == CODES


async def test_several_pictures_each_fetched_once(host: Host, other: Host) -> None:
    asker = Asker(host, other)
    urls = [host.url("/good"), other.url("/good"), data_url(PICTURE), host.url("/good")]
    assert (await asker.ask(*urls)).status_code == 200
    ids = asker.fake.submissions[0].prompt.token_ids
    assert ids[1 : 1 + 4 * len(CODES)] == CODES * 4
    assert (host.asked, other.asked) == (["/good"], ["/good"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/declared", f"at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
        ("/chunked", f"at most {MAX_BYTES} bytes, got more"),
        ("/gone", "the answer was 404"),
        ("/page", "not of type image/"),
        ("/untyped", "not of type image/"),
        ("/zipped", "compressed"),
        ("/short", "broke off"),
        ("/broken", "broken or not a PNG"),
        ("/nowhere", "sends on to nowhere"),
        (f"/hops/{MAX_REDIRECTS + 1}", f"more than {MAX_REDIRECTS} redirects"),
    ],
)
async def test_trouble_is_refused_and_the_next_request_succeeds(
    host: Host, path: str, words: str
) -> None:
    asker = Asker(host)
    message = await asker.refused(host.url(path))
    assert words in message
    assert "<html>" not in message
    assert (await asker.ask(host.url("/good"))).status_code == 200


@pytest.mark.parametrize("path", ["/drip", "/silent"])
async def test_who_is_slow_is_not_waited_for(host: Host, path: str) -> None:
    asker = Asker(host, timeout_s=0.05)
    assert "was not there within 0.05 s" in await asker.refused(host.url(path))
    asker.be_patient()
    assert (await asker.ask(host.url("/good"))).status_code == 200


async def test_nobody_listens(host: Host) -> None:
    with serving() as closed:
        pass
    asker = Asker(host, closed)
    assert "cannot be reached" in await asker.refused(closed.url("/good"))
    assert (await asker.ask(host.url("/good"))).status_code == 200


async def test_one_bad_picture_among_good_ones_is_named(host: Host) -> None:
    asker = Asker(host)
    response = await asker.ask(host.url("/good"), host.url("/gone"), host.url("/silent"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content.1.image_url"


# --- where it goes -------------------------------------------------------------------------


async def test_redirects_stay_with_allowed_hosts(host: Host, other: Host) -> None:
    asker = Asker(host, other)
    assert (await asker.ask(host.url(f"/hops/{MAX_REDIRECTS}"))).status_code == 200
    host.elsewhere = other.url("/good")
    assert (await asker.ask(host.url("/away"))).status_code == 200
    assert other.asked == ["/good"]


@pytest.mark.parametrize("target", ["http://{other}/good", "//{other}/good", "file:///etc/passwd"])
async def test_a_redirect_elsewhere_is_not_followed(host: Host, other: Host, target: str) -> None:
    asker = Asker(host)
    host.elsewhere = target.format(other=other.name)
    message = await asker.refused(host.url("/away"))
    assert ("does not fetch pictures from" in message) == ("other" in target)
    assert other.asked == []
    assert (await asker.ask(host.url("/good"))).status_code == 200


async def test_other_hosts_are_refused_by_name_with_the_option(host: Host, other: Host) -> None:
    asker = Asker(host)
    for url, name in (
        (other.url("/good"), other.name),
        (f"HTTP://{other.name}/good", other.name),
        ("https://example.com/a.png", "example.com"),
        (f"http://localhost:{host.server_port}/good", f"localhost:{host.server_port}"),
        (f"https://{host.name}x/good", ""),
    ):
        message = await asker.refused(url)
        assert name in message
        assert ("--allow-image-host" in message) == bool(name)
    assert host.asked == other.asked == []


async def test_credentials_in_a_url_are_refused(host: Host) -> None:
    asker = Asker(host)
    message = await asker.refused(f"http://user:secret@{host.name}/good")
    assert "credentials" in message
    assert "secret" not in message
    assert host.asked == []


async def test_nothing_of_one_request_goes_with_the_next(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asker = Asker(host)
    for _ in range(2):
        assert (await asker.ask(host.url("/good"))).status_code == 200
    for headers in host.headers_seen:
        assert "cookie" not in headers
        assert "authorization" not in headers
        assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("allowed", "url", "is_allowed"),
    [
        ("example.com", "http://example.com/a", True),
        ("example.com", "https://example.com/a", True),
        ("example.com", "https://example.com:443/a", True),
        ("Example.COM", "https://EXAMPLE.com/a", True),
        ("example.com", "https://example.com:80/a", False),
        ("example.com", "http://example.com:8080/a", False),
        ("example.com", "http://example.com./a", False),
        ("example.com", "http://www.example.com/a", False),
        ("example.com", "http://example.com.evil.org/a", False),
        ("example.com", "http://evil.org/example.com", False),
        ("example.com", "http://evil.org#example.com", False),
        ("example.com", "http://evil.org\\@example.com/a", False),
        ("example.com", "http://example.com\\@evil.org/a", False),
        ("example.com:8080", "http://example.com:8080/a", True),
        ("example.com:8080", "http://example.com/a", False),
        ("example.com:80", "http://example.com/a", True),
        ("example.com:80", "https://example.com/a", False),
        ("example.com:443", "https://example.com/a", True),
        ("127.0.0.1", "http://127.1/a", False),
        ("127.0.0.1", "http://2130706433/a", False),
        ("[::1]:80", "http://[::1]/a", True),
        ("[::1]", "http://[::1]:81/a", False),
        ("xn--bcher-kva.example", "http://bücher.example/a", True),
    ],
)
def test_hosts_are_compared_exactly(allowed: str, url: str, is_allowed: bool) -> None:
    hosts = allowed_hosts([allowed])
    if is_allowed:
        assert checked_url(url, hosts, PARAM).path == "/a"
        return
    with pytest.raises(PromptError) as refused:
        checked_url(url, hosts, PARAM)
    assert refused.value.param == PARAM


@pytest.mark.parametrize("url", ["http://", "http:///a", "https://[::1", "http://a b/", "ftp://h/"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(PromptError):
        checked_url(url, allowed_hosts(["h"]), PARAM)


def test_a_long_host_is_not_repeated() -> None:
    with pytest.raises(PromptError) as refused:
        checked_url("http://" + "a" * 10_000 + "/", frozenset(), PARAM)
    assert len(str(refused.value)) < 400
