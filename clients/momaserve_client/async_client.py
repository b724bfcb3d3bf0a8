"""The asynchronous client: the same methods as `Client`, over the same pure functions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx

from momaserve_client import replies, requests
from momaserve_client.client import (
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    connection_errors,
    http_options,
)
from momaserve_client.errors import ApiError, response_error
from momaserve_client.replies import EventReader, Json
from momaserve_client.requests import ApiRequest, ChatInput, ImageOptions, Options
from momaserve_client.types import (
    ChatEvent,
    ChatReply,
    CompletionEvent,
    CompletionReply,
    Health,
    ImageChunk,
    ImagesReply,
    Model,
)

Parsed = TypeVar("Parsed")


class AsyncClient:
    """A momaserve server. Owns its connections: use it as a context manager, or `aclose` it.

    All methods raise subclasses of `ClientError`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            timeout=timeout, transport=transport, **http_options(base_url, api_key)
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
        request = requests.chat_request(
            chat, options, modalities=modalities, top_logprobs=top_logprobs, stream=False
        )
        return await self._send(request, replies.chat_reply)

    def stream_chat(
        self,
        chat: ChatInput,
        *,
        modalities: Sequence[str] | None = None,
        partial_images: int | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[ChatEvent, None]:
        """The same, event by event. Closing it stops the server's work."""
        request = requests.chat_request(
            chat,
            options,
            modalities=modalities,
            top_logprobs=None,
            partial_images=partial_images,
            stream=True,
        )
        return self._stream(request, EventReader(replies.chat_events))

    async def complete(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> CompletionReply:
        """Continue text or token ids. `echo`, `logprobs` and `max_tokens=0` score a prompt."""
        request = requests.completion_request(
            prompt, options, echo=echo, logprobs=logprobs, stream=False
        )
        return await self._send(request, replies.completion_reply)

    def stream_complete(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[CompletionEvent, None]:
        """The same, event by event. Closing it stops the server's work."""
        request = requests.completion_request(
            prompt, options, echo=echo, logprobs=logprobs, stream=True
        )
        return self._stream(request, EventReader(replies.completion_events))

    async def generate_images(self, prompt: str, **options: Unpack[ImageOptions]) -> ImagesReply:
        """`n` pictures (1 by default) of `prompt`."""
        request = requests.images_request(prompt, options, partial_images=None, stream=False)
        return await self._send(request, replies.images_reply)

    def stream_images(
        self, prompt: str, *, partial_images: int = 3, **options: Unpack[ImageOptions]
    ) -> AsyncGenerator[ImageChunk, None]:
        """The same, with up to 3 unfinished states of each picture before the whole one."""
        request = requests.images_request(
            prompt, options, partial_images=partial_images, stream=True
        )
        return self._stream(
            request, EventReader(replies.image_events, num_images=options.get("n", 1))
        )

    async def models(self) -> list[Model]:
        return await self._send(requests.MODELS, replies.models)

    async def health(self) -> Health:
        """Raises ConnectionFailedError when nobody listens."""
        return Health(
            is_healthy=await self._is_ok(requests.HEALTH),
            is_ready=await self._is_ok(requests.READY),
        )

    async def _is_ok(self, request: ApiRequest) -> bool:
        try:
            await self._send(request, lambda payload: payload)
        except ApiError:
            return False
        return True

    async def _send(self, request: ApiRequest, parse: Callable[[Json], Parsed]) -> Parsed:
        with connection_errors():
            response = await self._http.request(request.method, request.path, json=request.body)
        if response.is_error:
            raise response_error(response.status_code, response.content, response.headers)
        return replies.parsed(response.content, parse)

    async def _stream(self, request: ApiRequest, reader: EventReader) -> AsyncGenerator[Any, None]:
        with connection_errors():
            async with self._http.stream(
                request.method, request.path, json=request.body
            ) as response:
                if response.is_error:
                    body = await response.aread()
                    raise response_error(response.status_code, body, response.headers)
                async for piece in response.aiter_bytes():
                    for event in reader.feed(piece):
                        yield event
                reader.finish()
