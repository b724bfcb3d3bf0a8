"""The synchronous client: sends what `calls` describes, over httpx."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
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
from momaserve_client.streams import Stream
from momaserve_client.timeouts import Timeouts, Watchdog
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


class Client:
    """A momaserve server. Owns its connections: use it as a context manager, or `close` it.

    May be used by several threads. Every method takes the options of `CallOptions`, those that
    generate also the server's request fields by name, as `docs/api.md` lists them.

    Raises:
        ClientError: one of its subclasses, from every method; `errors` draws the tree.
        ValueError: arguments that cannot be sent.
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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
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
        self._http = httpx.Client(
            transport=transport, verify=verify, **http_options(base_url, api_key, headers)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def chat(
        self,
        chat: ChatInput,
        *,
        modalities: Sequence[str] | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> ChatReply:
        """Answer a conversation; `modalities` as in `["text", "image"]`."""
        return self._send(
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
    ) -> Stream[ChatEvent]:
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

    def complete(
        self,
        prompt: Prompt,
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> CompletionReply:
        """Continue text or token ids. `echo`, `logprobs` and `max_tokens=0` score a prompt."""
        return self._send(calls.complete(prompt, options, echo=echo, logprobs=logprobs))

    def stream_complete(
        self,
        prompt: Prompt,
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> Stream[CompletionEvent]:
        """The same, event by event."""
        return self._stream(calls.stream_complete(prompt, options, echo=echo, logprobs=logprobs))

    def generate_images(
        self, prompt: str, *, size: str | None = None, **options: Unpack[ImageOptions]
    ) -> ImagesReply:
        """`n` pictures (1 by default) of `prompt`."""
        return self._send(calls.generate_images(prompt, options, size=size))

    def stream_images(
        self,
        prompt: str,
        *,
        size: str | None = None,
        partial_images: int = 3,
        **options: Unpack[ImageOptions],
    ) -> Stream[ImageChunk]:
        """The same, with up to 3 unfinished states of each picture before the whole one."""
        return self._stream(
            calls.stream_images(prompt, options, size=size, partial_images=partial_images)
        )

    def edit_images(
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
        return self._send(
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
    ) -> Stream[ImageChunk]:
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

    def tokenize(
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
        return self._send(
            calls.tokenize(
                prompt,
                messages,
                options,
                model=model,
                add_special_tokens=add_special_tokens,
                return_token_strs=return_token_strs,
            )
        )

    def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> DetokenizeReply:
        """Text and pictures of token ids."""
        return self._send(calls.detokenize(tokens, options, model=model))

    def abort(self, target: str, **options: Unpack[CallOptions]) -> AbortReply:
        """End a request; `target` is its request id or the id of its reply.

        Raises:
            RequestNotFoundError: it is over, or never was.
        """
        return self._send(calls.abort(target, options))

    def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """What is served here, and its limits."""
        return self._send(calls.models(options))

    def version(self, **options: Unpack[CallOptions]) -> Version:
        return self._send(calls.version(options))

    def router(self, **options: Unpack[CallOptions]) -> Router:
        """What the experts have had to do since the server started."""
        return self._send(calls.router(options))

    def health(self, **options: Unpack[CallOptions]) -> Health:
        """How the server is now: never retried.

        Raises:
            ConnectionFailedError: nobody listens.
        """
        health, ready = calls.probes(options)
        return calls.health(self._refusal(health), self._refusal(ready))

    def _refusal(self, probe: Call[None]) -> str | None:
        try:
            self._send(probe)
        except ApiError as error:
            return calls.refusal(error)
        return None

    def _send(self, call: Call[Parsed]) -> Parsed:
        exchange = Exchange(call.request, self._settings)
        with self._answer(exchange, may_retry=not call.is_probe) as response:
            body = response.read()
            return replies.parsed(body, lambda payload: call.parse(payload, exchange.request_id))

    def _stream(self, call: StreamCall[Event]) -> Stream[Event]:
        exchange, reader = Exchange(call.request, self._settings), call.reader()
        return Stream(exchange, reader, self._events(exchange, reader))

    def _events(
        self, exchange: Exchange, reader: EventReader[Event]
    ) -> Generator[Event, None, None]:
        with self._answer(exchange) as response:
            reader.begin(response.headers.get("content-type", ""))
            try:
                for piece in response.iter_bytes():
                    exchange.deadline.check()
                    yield from reader.feed(piece)
            except (httpx.HTTPError, ClientTimeoutError):
                if not reader.is_done:  # all that was asked for is there
                    raise
            reader.finish()

    @contextmanager
    def _answer(self, exchange: Exchange, *, may_retry: bool = True) -> Iterator[httpx.Response]:
        """An answer with a good status, its body unread. Sends again what may be sent again."""
        with exchange.errors():
            while True:
                try:
                    response = self._attempt(exchange)
                    break
                except ClientError as error:
                    delay = exchange.delay_s(error) if may_retry else None
                    if delay is None:
                        raise
                self._sleep(delay)
            with closing(response), _watched(response, exchange):
                yield response

    def _attempt(self, exchange: Exchange) -> httpx.Response:
        with exchange.errors():
            request = self._http.build_request(**exchange.arguments())
            response = self._http.send(request, stream=True)
            exchange.received(response.headers)
            if response.is_success:
                return response
            with closing(response), _watched(response, exchange):
                start = _start_of(response)
            raise response_error(response.status_code, start, response.headers)


def _watched(response: httpx.Response, exchange: Exchange) -> Watchdog | nullcontext[None]:
    return Watchdog(exchange.deadline, response.extensions.get("network_stream"))


def _start_of(response: httpx.Response) -> bytes:
    """As much of an error page as has a use, or as could be read."""
    start = b""
    try:
        for piece in response.iter_bytes():
            start += piece
            if len(start) > MAX_ERROR_BYTES:
                break
    except httpx.HTTPError:
        pass  # its status says enough
    return start
