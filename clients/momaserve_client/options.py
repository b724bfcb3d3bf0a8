"""What can be asked for by keyword: fields of requests, and options of a call.

None is the same as leaving an option out: the server's default holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from momaserve_client.timeouts import Timeouts


class CallOptions(TypedDict, total=False):
    """About the call itself; not sent in the body."""

    request_id: str | None
    """1 to 128 of [A-Za-z0-9._:-] instead of a random id: for the server's log and `abort`."""
    timeouts: Timeouts | None
    """Instead of the client's."""


class ImageOptions(CallOptions, total=False):
    """Request fields that every route knows which generates; see the server's table."""

    model: str | None
    n: int | None
    seed: int | None
    image_temperature: float | None
    image_top_k: int | None
    image_top_p: float | None
    guidance_scale: float | None
    min_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    priority: int | None
    cache_salt: str | None
    timeout_s: float | None
    routing: str | None
    prompt_routing: str | None


class Options(ImageOptions, total=False):
    """Those of the routes that generate text."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    return_token_ids: bool | None
    include_routing: bool | None


def without_call_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the body."""
    own = CallOptions.__annotations__
    return {name: v for name, v in options.items() if name not in own and v is not None}
