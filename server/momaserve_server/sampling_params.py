"""Request fields -> `SamplingParams`, over the checkpoint's own defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve_server.limits import check_limits, longest_answer
from momaserve_server.schemas_chat import ChatRequest
from momaserve_server.schemas_common import GenerationFields, SamplingFields
from momaserve_server.schemas_completions import DEFAULT_MAX_TOKENS, CompletionRequest
from momaserve_server.schemas_images import ImageRequest
from momaserve_server.settings import ServerSettings

Value = TypeVar("Value")

SAME_NAME = (
    "n",
    "seed",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "priority",
    "cache_salt",
    "timeout_s",
)
"""Fields that `SamplingParams` has too, with the same meaning and default."""


def chat_params(body: ChatRequest, engine: Engine, settings: ServerSettings) -> SamplingParams:
    """Raises SamplingError for a value out of its range, or above the operator's limit."""
    modalities = set(body.modalities or ["text"])
    mode = OutputMode.INTERLEAVED if len(modalities) == 2 else OutputMode(modalities.pop())
    wanted = _first_given(body.max_completion_tokens, body.max_tokens)
    params = SamplingParams(
        mode=mode,
        max_tokens=longest_answer(wanted, settings),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **_text_fields(body, engine),
    )
    check_limits(body, settings)
    return params


def completion_params(
    body: CompletionRequest, engine: Engine, settings: ServerSettings
) -> SamplingParams:
    """Raises SamplingError for a value out of its range, or above the operator's limit."""
    wanted = _first_given(body.max_tokens, DEFAULT_MAX_TOKENS)
    params = SamplingParams(
        mode=OutputMode.TEXT,
        max_tokens=longest_answer(wanted, settings),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        **_text_fields(body, engine),
    )
    check_limits(body, settings)
    return params


def image_params(body: ImageRequest, engine: Engine, settings: ServerSettings) -> SamplingParams:
    """Raises SamplingError for a value out of its range, or above the operator's limit.

    A picture has a length of its own, so that of answers does not matter here.
    """
    params = SamplingParams(mode=OutputMode.IMAGE, **_common_fields(body, engine))
    check_limits(body, settings)
    return params


def _first_given(first: Value | None, second: Value) -> Value:
    return first if first is not None else second


def _with_given(defaults: Distribution, **given: float | int | None) -> Distribution:
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(defaults, **changes)


def _text_fields(body: SamplingFields, engine: Engine) -> dict[str, Any]:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return _common_fields(body, engine) | {
        "text": _with_given(
            engine.defaults.text,
            temperature=body.temperature,
            top_k=0 if body.top_k == -1 else body.top_k,  # vLLM's way to say "all"
            top_p=body.top_p,
            min_p=body.min_p,
        ),
        "stop": tuple(stop),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "logit_bias": dict(body.logit_bias or {}),
        "include_routing": bool(body.include_routing),
    }


def _common_fields(body: GenerationFields, engine: Engine) -> dict[str, Any]:
    routing = None if body.routing is None else RoutingPolicy(body.routing)
    prompt_routing: RoutingPolicy | None = None
    if body.prompt_routing == "same":
        prompt_routing = routing or engine.config.routing
    elif body.prompt_routing is not None:
        prompt_routing = RoutingPolicy(body.prompt_routing)
    given = {name: getattr(body, name) for name in SAME_NAME}
    return {name: value for name, value in given.items() if value is not None} | {
        "image": _with_given(
            engine.defaults.image,
            temperature=body.image_temperature,
            top_k=body.image_top_k,
            top_p=body.image_top_p,
        ),
        "guidance_scale": _first_given(body.guidance_scale, engine.defaults.guidance_scale),
        "routing": routing,
        "prompt_routing": prompt_routing,
    }
