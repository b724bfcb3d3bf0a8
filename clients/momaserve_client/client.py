"""The synchronous client: sends what `requests` builds, reads it with `replies`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx

from momaserve_client import replies, requests
from momaserve_client.errors import ApiError, ConnectionFailedError, response_error
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

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


def http_options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """Arguments that both httpx clients share."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": base_url, "headers": headers}


class Client:
    """A momaserve server. Owns its connections: use it as a context manager, or `close` it.

    All methods raise subclasses of `ClientError`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            timeout=timeout, transport=transport, **http_options(base_url, api_key)
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
        request = requests.chat_request(
            chat, options, modalities=modalities, top_logprobs=top_logprobs, stream=False
        )
        return self._send(request, replies.chat_reply)

    def stream_chat(
        self,
        chat: ChatInput,
        *,
        modalities: Sequence[str] | None = None,
        partial_images: int | None = None,
        **options: Unpack[Options],
    ) -> Generator[ChatEvent, None, None]:
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

    def complete(
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
        return self._send(request, replies.completion_reply)

    def stream_complete(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        echo: bool = False,
        logprobs: int | None = None,
        **options: Unpack[Options],
    ) -> Generator[CompletionEvent, None, None]:
        """The same, event by event. Closing it stops the server's work."""
        request = requests.completion_request(
            prompt, options, echo=echo, logprobs=logprobs, stream=True
        )
        return self._stream(request, EventReader(replies.completion_events))

    def generate_images(self, prompt: str, **options: Unpack[ImageOptions]) -> ImagesReply:
        """`n` pictures (1 by default) of `prompt`."""
        request = requests.images_request(prompt, options, partial_images=None, stream=False)
        return self._send(request, replies.images_reply)

    def stream_images(
        self, prompt: str, *, partial_images: int = 3, **options: Unpack[ImageOptions]
    ) -> Generator[ImageChunk, None, None]:
        """The same, with up to 3 unfinished states of each picture before the whole one."""
        request = requests.images_request(
            prompt, options, partial_images=partial_images, stream=True
        )
        return self._stream(
            request, EventReader(replies.image_events, num_images=options.get("n", 1))
        )

    def models(self) -> list[Model]:
        return self._send(requests.MODELS, replies.models)

    def health(self) -> Health:
        """Raises ConnectionFailedError when nobody listens."""
        return Health(is_healthy=self._is_ok(requests.HEALTH), is_ready=self._is_ok(requests.READY))

    def _is_ok(self, request: ApiRequest) -> bool:
        try:
            self._send(request, lambda payload: payload)
        except ApiError:
            return False
        return True

    def _send(self, request: ApiRequest, parse: Callable[[Json], Parsed]) -> Parsed:
        with connection_errors():
            response = self._http.request(request.method, request.path, json=request.body)
        if response.is_error:
            raise response_error(response.status_code, response.content, response.headers)
        return replies.parsed(response.content, parse)

    def _stream(self, request: ApiRequest, reader: EventReader) -> Generator[Any, None, None]:
        with (
            connection_errors(),
            self._http.stream(request.method, request.path, json=request.body) as response,
        ):
            if response.is_error:
                raise response_error(response.status_code, response.read(), response.headers)
            for piece in response.iter_bytes():
                yield from reader.feed(piece)
            reader.finish()


@contextmanager
def connection_errors() -> Iterator[None]:
    """httpx's transport errors as ours."""
    try:
        yield
    except httpx.TransportError as error:
        raise ConnectionFailedError(str(error) or type(error).__name__) from error
