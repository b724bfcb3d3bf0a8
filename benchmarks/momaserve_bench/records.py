"""What became of one request, in times of the client's clock. Knows no network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from momaserve_bench.workload import Kind, WorkItem


class Outcome(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """By the client, as planned."""


class FailedRequestError(Exception):
    """A request went wrong; never leaves the benchmark, which counts it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. Times are seconds since the run began; None is never."""

    index: int
    kind: Kind
    scheduled_s: float
    """When it was due."""
    sent_s: float | None = None
    """When it went out: later where the client held it back."""
    first_byte_s: float | None = None
    """Of the answer's body."""
    token_times_s: list[float] = field(default_factory=list)
    """When each piece came that brought tokens; the first is the first token's time."""
    first_partial_image_s: float | None = None
    image_s: float | None = None
    """When the picture was whole."""
    last_byte_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    image_tokens: int = 0
    """Those of `output_tokens` that are codes of pictures."""
    images: int = 0
    outcome: Outcome = Outcome.FAILED
    reason: str | None = None
    """Of a failure, from a small set."""
    message: str | None = None

    @property
    def first_token_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    def fail(self, reason: str, message: str) -> None:
        self.outcome, self.reason, self.message = Outcome.FAILED, reason, message


class AnswerReader:
    """Takes the events of one stream into a record."""

    def __init__(self, record: RequestRecord, item: WorkItem) -> None:
        self._record = record
        self._item = item
        self._is_done = False
        self._finish_reason: str | None = None

    @property
    def is_due_to_cancel(self) -> bool:
        """Whether enough has come for a request that is to be cancelled.

        A picture that is sent as pixels shows nothing of its tokens, so its first state counts.
        """
        share, record = self._item.cancel_share, self._record
        if share is None or self._is_done:
            return False
        has_part = record.output_tokens >= share * self._item.max_tokens
        return record.first_partial_image_s is not None or (record.output_tokens > 0 and has_part)

    def take(self, event: str, data: str, now: float) -> None:
        """One server-sent event.

        Raises:
            FailedRequestError: it tells of an error, or is none of this API's.
        """
        if data == "[DONE]":
            self._is_done = True
            return
        try:
            payload: dict[str, Any] = json.loads(data)
            if event == "error" or "error" in payload:
                error = payload["error"]
                raise FailedRequestError(f"stream {error['code']}", str(error["message"]))
            if "type" in payload:
                self._take_picture(payload, now)
            else:
                self._take_chunk(payload, now)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FailedRequestError("bad event", f"{error!r} in {data[:80]!r}") from None

    def _take_picture(self, payload: dict[str, Any], now: float) -> None:
        """An event of `/v1/images/generations`."""
        record = self._record
        if payload["type"].endswith(".partial_image"):
            if record.first_partial_image_s is None:
                record.first_partial_image_s = now
            return
        record.image_s = now
        record.images += 1
        record.prompt_tokens = payload["usage"]["input_tokens"]
        record.output_tokens = record.image_tokens = payload["usage"]["output_tokens"]
        self._is_done = True

    def _take_chunk(self, payload: dict[str, Any], now: float) -> None:
        """A chunk of `/v1/completions` or `/v1/chat/completions`."""
        record = self._record
        for choice in payload["choices"]:
            ids = choice.get("token_ids") or ()
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if ids or text:
                record.token_times_s.append(now)
                record.output_tokens += len(ids) or 1
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        usage = payload.get("usage")
        if usage:
            record.prompt_tokens = usage["prompt_tokens"]
            record.output_tokens = usage["completion_tokens"]
            details = usage.get("completion_tokens_details") or {}
            record.image_tokens = details.get("image_tokens") or 0

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            FailedRequestError: before its end, or with less than was asked for.
        """
        record, item = self._record, self._item
        if not self._is_done:
            raise FailedRequestError("cut off", "the stream ended before its last event")
        if record.images:
            return
        if self._finish_reason == "timeout":
            raise FailedRequestError("timeout", "the server's time limit passed")
        if record.output_tokens < item.max_tokens:
            raise FailedRequestError(
                "short answer", f"{record.output_tokens} tokens instead of {item.max_tokens}"
            )
        if item.kind is Kind.IMAGE_OUTPUT:
            record.images, record.image_s = 1, record.token_times_s[-1]
