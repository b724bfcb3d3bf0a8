"""What all request bodies share: strictness, the fields we ignore, sampling fields.

A field that is not named in a schema is refused by name. Three lists say which those are:
the schemas themselves, `IgnoredFields` (OpenAI fields without meaning here, accepted so that
stock clients work) and `UNSUPPORTED_FIELDS` (refused like any other, with a reason).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler
from pydantic.functional_validators import WrapValidator
from pydantic_core import PydanticCustomError

from momaserve import sampling

UNSUPPORTED_FIELDS = {
    "tools": "tool calls are not supported",
    "tool_choice": "tool calls are not supported",
    "functions": "tool calls are not supported",
    "function_call": "tool calls are not supported",
    "response_format": "constrained output is not supported",
    "audio": "audio is not supported",
    "web_search_options": "web search is not supported",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "this model does not reason at length",
}
"""Known fields that cannot be honoured, and why; the message of their 400."""


class StrictBody(BaseModel):
    """No unknown fields, no conversions ("1" is not 1), no infinite or NaN numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class IgnoredFields(StrictBody):
    """OpenAI fields that are accepted, whatever their value, and have no effect here.

    They name the user's account, its storage or OpenAI's own infrastructure.
    """

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


IGNORED_FIELDS = frozenset(IgnoredFields.model_fields)


def described(expected: str) -> WrapValidator:
    """One readable error instead of one per member of a union."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "wrong_shape", "must be {expected}", {"expected": expected}
            ) from None

    return WrapValidator(validate)


OneOnly = Annotated[
    Annotated[int, Field(ge=1, le=1)] | None, described("1: ask for n choices instead")
]
"""Takes the value that changes nothing, which many clients send, and refuses the others."""
Stop = Annotated[str | list[str], described("a string or a list of strings")]
Modalities = Annotated[
    list[Literal["text", "image"]], described('["text"], ["text", "image"] or ["image"]')
]
ServablePolicy = Literal["causal", "calibrated"]
PromptPolicy = Literal["same", "causal", "calibrated", "expert_choice"]


def within(low: float, high: float | None = None, *, is_open: bool = False) -> Any:
    """An optional number whose bounds the OpenAPI document tells; `SamplingParams` checks them."""
    bounds: dict[str, Any] = {"exclusiveMinimum" if is_open else "minimum": low}
    if high is not None:
        bounds["maximum"] = high
    return Field(default=None, json_schema_extra=bounds)


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    include_obfuscation: Any = None
    """OpenAI's padding against traffic analysis; accepted, has no effect."""


class GenerationFields(IgnoredFields):
    """Fields of every route that generates. None means the checkpoint's own default.

    `docs/api.md` has the table of them all, with defaults and bounds; `SamplingParams` checks.
    """

    model: str | None = None
    n: int | None = within(1, sampling.MAX_N)
    seed: int | None = within(0, sampling.MAX_SEED)
    image_temperature: float | None = within(0, sampling.MAX_TEMPERATURE)
    image_top_k: int | None = within(0)
    image_top_p: float | None = within(0, 1, is_open=True)
    guidance_scale: float | None = within(0, sampling.MAX_GUIDANCE_SCALE)
    min_tokens: int | None = within(0)
    repetition_penalty: float | None = within(0, sampling.MAX_REPETITION_PENALTY, is_open=True)
    presence_penalty: float | None = within(
        -sampling.MAX_ADDITIVE_PENALTY, sampling.MAX_ADDITIVE_PENALTY
    )
    frequency_penalty: float | None = within(
        -sampling.MAX_ADDITIVE_PENALTY, sampling.MAX_ADDITIVE_PENALTY
    )
    priority: int | None = within(-sampling.MAX_PRIORITY, sampling.MAX_PRIORITY)
    cache_salt: str | None = Field(
        default=None,
        json_schema_extra={"minLength": 1, "maxLength": sampling.MAX_CACHE_SALT},
    )
    timeout_s: float | None = within(0, sampling.MAX_TIMEOUT_S, is_open=True)
    routing: ServablePolicy | None = None
    prompt_routing: PromptPolicy | None = None
    stream: bool | None = None


class SamplingFields(GenerationFields):
    """Fields of the routes that generate text, or text and pictures."""

    temperature: float | None = within(0, sampling.MAX_TEMPERATURE)
    top_p: float | None = within(0, 1, is_open=True)
    top_k: int | None = within(-1)
    min_p: float | None = within(0, 1)
    max_tokens: int | None = within(0)
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(
        default=None, json_schema_extra={"maxItems": sampling.MAX_STOP_TOKEN_IDS}
    )
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = Field(
        default=None, json_schema_extra={"maxProperties": sampling.MAX_LOGIT_BIAS}
    )
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    include_routing: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)
