"""Fetches pictures from the hosts that the operator allows, and from no others.

A URL is parsed once, and what is checked is what is asked. No state goes from one request to
another: no cookies, no credentials, no proxy of the environment.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import certifi
import httpx

from momaserve import __version__
from momaserve.errors import PromptError

MAX_REDIRECTS = 3
CHUNK_BYTES = 1 << 16
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_SHOWN_CHARS = 80
"""Of a host in a message."""
Allowed = frozenset[tuple[str, int | None]]
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def is_http_url(url: str) -> bool:
    return url.partition(":")[0].lower() in DEFAULT_PORTS


class ImageFetcher:
    """A pool of connections to allowed hosts. Whoever made it closes it."""

    def __init__(self, hosts: Iterable[str], *, timeout_s: float, max_bytes: int) -> None:
        """
        Args:
            hosts: names, or name:port; without a port, the scheme's own port is allowed.
            timeout_s: for one picture, from the first look-up to its last byte.
            max_bytes: of one picture's file.
        """
        self._allowed = allowed_hosts(hosts)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        tls = ssl.create_default_context()  # the system's authorities, SSL_CERT_FILE among them
        tls.load_verify_locations(certifi.where())
        self._client = httpx.AsyncClient(
            verify=tls,
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # one for the whole picture is what counts
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            headers={
                "User-Agent": f"momaserve/{__version__}",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def fetch_all(self, wanted: Sequence[tuple[str, str]]) -> dict[str, bytes]:
        """Files by URL, fetched at the same time.

        Args:
            wanted: (URL, name of the request's field that has it).

        Raises:
            PromptError: one of them cannot be had; `param` says which.
        """
        params = dict(reversed(wanted))  # by URL, the first place of each
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {url: group.create_task(self.fetch(url, p)) for url, p in params.items()}
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {url: task.result() for url, task in tasks.items()}

    async def fetch(self, url: str, param: str) -> bytes:
        """The file at `url`.

        Raises:
            PromptError: a host that is not allowed, one that does not answer well or in time,
                something that is no picture, or too many bytes.
        """
        checked = checked_url(url, self._allowed, param)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(checked, param)
        except TimeoutError:
            reason = f"it was not there within {self._timeout_s:g} s"
        except httpx.HTTPError:
            reason = "the host cannot be reached, or broke off"
        raise _failed(checked.host, reason, param)

    async def _follow(self, url: httpx.URL, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._client.stream("GET", url) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response, param)
                target = response.headers.get("location", "")
                if not target:
                    raise _failed(url.host, "it sends on to nowhere", param)
            url = checked_url(target, self._allowed, param, base=url)
        raise _failed(url.host, f"more than {MAX_REDIRECTS} redirects", param)

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        host, headers = response.url.host, response.headers
        if response.status_code != 200:
            raise _failed(host, f"the answer was {response.status_code}", param)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not media_type.startswith("image/"):
            raise _failed(host, "it is not of type image/...", param)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise _failed(host, "it is compressed, though that was not asked for", param)
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large(declared[:20], param)
        data = bytearray()
        async for chunk in response.aiter_raw(CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large("more", param)
        return bytes(data)

    def _too_large(self, got: str, param: str) -> PromptError:
        return PromptError(
            f"a picture may have at most {self._max_bytes} bytes, got {got}", param=param
        )


def checked_url(
    text: str, allowed: Allowed, param: str, *, base: httpx.URL | None = None
) -> httpx.URL:
    """`text` as the URL that is asked, if its host is `allowed`; `base` is what it is relative to.

    Raises:
        PromptError: no http(s) URL, one with credentials, or a host that is not allowed.
    """
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        host = url.raw_host.decode("ascii").lower()
    except (httpx.InvalidURL, ValueError):
        raise PromptError("the picture's URL is not valid", param=param) from None
    if url.scheme not in DEFAULT_PORTS or not host:
        raise PromptError("the picture's URL is not valid", param=param)
    if url.userinfo:
        raise PromptError("the picture's URL must not hold credentials", param=param)
    port = url.port or DEFAULT_PORTS[url.scheme]
    if (host, port) in allowed or (url.port is None and (host, None) in allowed):
        return url
    shown = host if url.port is None else f"{host}:{port}"
    raise PromptError(
        f"this server does not fetch pictures from {shown[:MAX_SHOWN_CHARS]!r} (the operator may "
        "allow it with --allow-image-host): send the picture itself as a "
        "'data:image/png;base64,...' URL",
        param=param,
    )


def allowed_hosts(hosts: Iterable[str]) -> Allowed:
    """Names, or name:port, as pairs; without a port the scheme's own is meant."""
    urls = [httpx.URL(f"//{host}") for host in hosts]
    return frozenset((url.raw_host.decode("ascii").lower(), url.port) for url in urls)


def _failed(host: str, reason: str, param: str) -> PromptError:
    return PromptError(f"the picture at {host!r} could not be fetched: {reason}", param=param)
