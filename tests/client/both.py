"""Both clients through one door, and transports that answer what a test says.

`AsyncClient` has the methods of `Client`; `Blocking` runs it on a loop of its own, so that a
test written for one checks the other too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import httpx

from momaserve_client import AsyncClient, AsyncStream, Client

KINDS = ("sync", "async")
Answer = httpx.Response | Exception
PNG = b"\x89PNG\r\n\x1a\n"
"""All that the client looks at."""


class Clock:
    """Moves when somebody sleeps, or when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


class BlockingStream:
    def __init__(self, runner: asyncio.Runner, stream: AsyncStream[Any]) -> None:
        self._runner = runner
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> BlockingStream:
        self._runner.run(_await(self._stream.__aenter__()))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._runner.run(_await(self._stream.__aexit__(*exc)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return self._runner.run(_await(anext(self._stream)))
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        self._runner.run(self._stream.aclose())


class Blocking:
    """An `AsyncClient` that can be called without await."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **options)
        self._is_closed = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if inspect.isawaitable(result):
                return self._runner.run(_await(result))
            return BlockingStream(self._runner, result)

        return call

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._runner.run(self._client.aclose())
            self._runner.close()


async def _await(awaitable: Any) -> Any:
    return await awaitable


def make_client(kind: str, *args: Any, clock: Clock | None = None, **options: Any) -> Client:
    """A client of either kind, on the test's clock if it has one."""
    is_sync = kind == "sync"
    if clock is not None:
        options["monotonic"] = clock.monotonic
        options["sleep"] = clock.sleep if is_sync else clock.sleep_async
        options.setdefault("random", lambda: 0.0)
    return Client(*args, **options) if is_sync else cast(Client, Blocking(*args, **options))


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in the pieces given; an exception among them breaks it off."""

    def __init__(self, pieces: Iterable[bytes | Exception | Callable[[], None]]) -> None:
        self._pieces = iter(pieces)
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, bytes):
                yield piece
            else:
                piece()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True


class Script:
    """A transport that gives one answer after another, the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.seen: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.seen.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer.stream, Pieces):
            return answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(request.content) for request in self.seen]


def answer(status: int = 200, payload: Any = None, **headers: str) -> httpx.Response:
    """A JSON reply, or bytes as they stand."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(payload, bytes):
        return httpx.Response(status, content=payload, headers=names)
    return httpx.Response(status, json=payload, headers=names)


def refusal(status: int, code: str | None, message: str = "no", **headers: str) -> httpx.Response:
    """The server's own error shape."""
    error = {"message": message, "type": "t", "param": None, "code": code}
    return answer(status, {"error": error}, **headers)


def events(*pieces: bytes | Exception | Callable[[], None], **headers: str) -> httpx.Response:
    """A stream of events in these pieces."""
    names = {"content-type": "text/event-stream; charset=utf-8"}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(200, stream=Pieces(pieces), headers=names)


def event(payload: Any, name: str | None = None) -> bytes:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


def text_chunk(text: str, **fields: Any) -> bytes:
    """One chunk of a chat stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None} | fields
    return event({"id": "chatcmpl-1", "choices": [choice]})


DONE = b"data: [DONE]\n\n"


def chat_payload(content: Any = "hi", **choice: Any) -> dict[str, Any]:
    """A chat completion with one choice."""
    first = {"index": 0, "message": {"content": content}, "finish_reason": "stop"} | choice
    return {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [first],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }


def join(pieces: Sequence[bytes], size: int) -> list[bytes]:
    """The same bytes in pieces of `size`."""
    whole = b"".join(pieces)
    return [whole[start : start + size] for start in range(0, len(whole), size)]
