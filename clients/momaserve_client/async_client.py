"""The asynchronous client, for asyncio: the methods of `Client`, over the same pure functions."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from types import TracebackType
from typing import TypeVar, Unpack

import httpx

from momaserve_client import calls, replies
from momaserve_client.calls import Call, StreamCall
from momaserve_client.errors import ApiError, ClientError, ClientTimeoutError, response_error
from momaserve_client.events import EventReader
from momaserve_client.exchange import (
    DEFAULT_URL,
    MAX_ERROR_BYTES,
    Exchange,
    Settings,
    http_options,
)
from momaserve_client.options import CallOptions, ImageOptions, Options
from momaserve_client.requests import ChatInput, Prompt
from momaserve_client.retries import Retries
from momaserve_client.streams import AsyncStream
from momaserve_client.timeouts import Deadline, Timeouts
from momaserve_client.types import (
    AbortReply,
    ChatEvent,
    ChatReply,
    CompletionEvent,
    CompletionReply,
    DetokenizeReply,
    Health,
    ImageChunk,
    ImagesReply,
    Model,
    Router,
    TokenizeReply,
    Version,
)

Parsed = TypeVar("Parsed")
Event = TypeVar("Event")


class AsyncClient:
    """A momaserve server. Owns its connections: use it as a context manager, or `aclose` it.

    Like `Client` in everything else. Belongs to one event loop.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            base_url: may have a path prefix; a trailing "/v1" is dropped.
            headers: sent with every request.
            verify: as httpx takes it, for servers behind TLS.
            transport: httpx's seam for tests and for servers in this process.
            sleep, monotonic, random: clock and dice of retries and of `Timeouts.total_s`.
        """
        self._settings = Settings(
            timeouts=timeouts or Timeouts(),
            retries=retries or Retries(),
            monotonic=monotonic,
            random=random,
        )
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            transport=transport, verify=verify, **http_options(base_url, api_key, headers)
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def chat(
        self,
        chat: ChatInput,
        *,
        modalities: Sequence[str] | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> ChatReply:
        """Answer a conversation; `modalities` as in `["text", "image"]`."""
        return await self._send(
            calls.chat(chat, options, modalities=modalities, top_logprobs=top_logprobs)
        )

    def stream_chat(
        self,
        chat: ChatInput,
        *,
        modalities: Sequence[str] | None = None,
        top_logprobs: int | None = None,
        partial_images: int | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream[ChatEvent]:
        """The same, event by event; `partial_images` unfinished states of each picture."""
        return self._stream(
            calls.stream_chat(
                chat,
                options,
                modalities=modalities,
                top_logprobs=top_logprobs,
                partial_images=partial_images,
            )
        )

    async def complete(
        self,
        prompt: Prompt,
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> CompletionReply:
        """Continue text or token ids. `echo`, `logprobs` and `max_tokens=0` score a prompt."""
        return await self._send(calls.complete(prompt, options, echo=echo, logprobs=logprobs))

    def stream_complete(
        self,
        prompt: Prompt,
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream[CompletionEvent]:
        """The same, event by event."""
        return self._stream(calls.stream_complete(prompt, options, echo=echo, logprobs=logprobs))

    async def generate_images(
        self, prompt: str, *, size: str | None = None, **options: Unpack[ImageOptions]
    ) -> ImagesReply:
        """`n` pictures (1 by default) of `prompt`."""
        return await self._send(calls.generate_images(prompt, options, size=size))

    def stream_images(
        self,
        prompt: str,
        *,
        size: str | None = None,
        partial_images: int = 3,
        **options: Unpack[ImageOptions],
    ) -> AsyncStream[ImageChunk]:
        """The same, with up to 3 unfinished states of each picture before the whole one."""
        return self._stream(
            calls.stream_images(prompt, options, size=size, partial_images=partial_images)
        )

    async def edit_images(
        self,
        image: bytes,
        prompt: str,
        *,
        mask: bytes | None = None,
        keep_rows: int | None = None,
        size: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> ImagesReply:
        """`n` pictures that go on from the first rows of `image`, a picture file.

        Args:
            mask: PNG with alpha; all from the first row with a transparent pixel on is drawn anew.
            keep_rows: rows of codes that stay; half of them if neither is given.
        """
        return await self._send(
            calls.edit_images(image, prompt, options, mask=mask, keep_rows=keep_rows, size=size)
        )

    def stream_edits(
        self,
        image: bytes,
        prompt: str,
        *,
        mask: bytes | None = None,
        keep_rows: int | None = None,
        size: str | None = None,
        partial_images: int = 3,
        **options: Unpack[ImageOptions],
    ) -> AsyncStream[ImageChunk]:
        """The same, with up to 3 unfinished states of each picture before the whole one."""
        return self._stream(
            calls.stream_edits(
                image,
                prompt,
                options,
                mask=mask,
                keep_rows=keep_rows,
                size=size,
                partial_images=partial_images,
            )
        )

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: ChatInput | None = None,
        model: str | None = None,
        add_special_tokens: bool = True,
        return_token_strs: bool = False,
        **options: Unpack[CallOptions],
    ) -> TokenizeReply:
        """Token ids of a text, or of a conversation with its pictures."""
        return await self._send(
            calls.tokenize(
                prompt,
                messages,
                options,
                model=model,
                add_special_tokens=add_special_tokens,
                return_token_strs=return_token_strs,
            )
        )

    async def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> DetokenizeReply:
        """Text and pictures of token ids."""
        return await self._send(calls.detokenize(tokens, options, model=model))

    async def abort(self, target: str, **options: Unpack[CallOptions]) -> AbortReply:
        """End a request; `target` is its request id or the id of its reply.

        Raises:
            RequestNotFoundError: it is over, or never was.
        """
        return await self._send(calls.abort(target, options))

    async def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """What is served here, and its limits."""
        return await self._send(calls.models(options))

    async def version(self, **options: Unpack[CallOptions]) -> Version:
        return await self._send(calls.version(options))

    async def router(self, **options: Unpack[CallOptions]) -> Router:
        """What the experts have had to do since the server started."""
        return await self._send(calls.router(options))

    async def health(self, **options: Unpack[CallOptions]) -> Health:
        """How the server is now: never retried.

        Raises:
            ConnectionFailedError: nobody listens.
        """
        health, ready = calls.probes(options)
        return calls.health(await self._refusal(health), await self._refusal(ready))

    async def _refusal(self, probe: Call[None]) -> str | None:
        try:
            await self._send(probe)
        except ApiError as error:
            return calls.refusal(error)
        return None

    async def _send(self, call: Call[Parsed]) -> Parsed:
        exchange = Exchange(call.request, self._settings)
        async with self._answer(exchange, may_retry=not call.is_probe) as response:
            body = await _within(exchange.deadline, response.aread)
            return replies.parsed(body, lambda payload: call.parse(payload, exchange.request_id))

    def _stream(self, call: StreamCall[Event]) -> AsyncStream[Event]:
        exchange, reader = Exchange(call.request, self._settings), call.reader()
        return AsyncStream(exchange, reader, self._events(exchange, reader))

    async def _events(
        self, exchange: Exchange, reader: EventReader[Event]
    ) -> AsyncGenerator[Event, None]:
        async with self._answer(exchange) as response:
            reader.begin(response.headers.get("content-type", ""))
            pieces = response.aiter_bytes()
            try:
                while True:
                    piece = await _within(exchange.deadline, lambda: anext(pieces, None))
                    if piece is None:
                        break
                    exchange.deadline.check()
                    for event in reader.feed(piece):
                        yield event
            except (httpx.HTTPError, ClientTimeoutError):
                if not reader.is_done:  # all that was asked for is there
                    raise
            reader.finish()

    @asynccontextmanager
    async def _answer(
        self, exchange: Exchange, *, may_retry: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """An answer with a good status, its body unread. Sends again what may be sent again."""
        with exchange.errors():
            while True:
                try:
                    response = await self._attempt(exchange)
                    break
                except ClientError as error:
                    delay = exchange.delay_s(error) if may_retry else None
                    if delay is None:
                        raise
                await self._sleep(delay)
            async with aclosing(response):
                yield response

    async def _attempt(self, exchange: Exchange) -> httpx.Response:
        with exchange.errors():
            request = self._http.build_request(**exchange.arguments())
            response = await _within(
                exchange.deadline, lambda: self._http.send(request, stream=True)
            )
            exchange.received(response.headers)
            if response.is_success:
                return response
            start = b""
            async with aclosing(response):
                with suppress(ClientTimeoutError):  # its status says enough
                    start = await _within(exchange.deadline, lambda: _start_of(response))
            raise response_error(response.status_code, start, response.headers)


async def _within(deadline: Deadline, work: Callable[[], Awaitable[Parsed]]) -> Parsed:
    """Raises ClientTimeoutError when the time is over before `work` is."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await work()
    except TimeoutError:
        deadline.expire()
        deadline.check()
        raise


async def _start_of(response: httpx.Response) -> bytes:
    """As much of an error page as has a use, or as could be read."""
    start = b""
    try:
        async for piece in response.aiter_bytes():
            start += piece
            if len(start) > MAX_ERROR_BYTES:
                break
    except httpx.HTTPError:
        pass  # its status says enough
    return start
