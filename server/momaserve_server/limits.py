"""The operator's own limits of what a request may ask for, inside those of the engine."""

from __future__ import annotations

from collections.abc import Sized

from momaserve.errors import SamplingError
from momaserve_server.schemas_common import GenerationFields
from momaserve_server.settings import ServerSettings

COUNTED = (
    ("n", "max_n"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("logprobs", "max_logprobs"),
    ("top_logprobs", "max_logprobs"),
)
"""(field of a body, setting that bounds it); a body need not have all of the fields."""


def check_limits(body: GenerationFields, settings: ServerSettings) -> None:
    """Refuses what is above a limit.

    Raises:
        SamplingError: names field, value and limit.
    """
    for name, setting in COUNTED:
        value, limit = getattr(body, name, None), getattr(settings, setting)
        if isinstance(value, bool) or value is None or limit is None:
            continue  # the `logprobs` of a chat is a switch
        if value > limit:
            raise SamplingError(f"{name} must be at most {limit}, got {value}", param=name)
    stop = getattr(body, "stop", None)
    if isinstance(stop, Sized) and not isinstance(stop, str) and len(stop) > settings.max_stop:
        raise SamplingError(
            f"stop may have at most {settings.max_stop} strings, got {len(stop)}", param="stop"
        )


def longest_answer(wanted: int | None, settings: ServerSettings) -> int | None:
    """`wanted` tokens, or as many as an answer may have where that is fewer or nothing was said."""
    limit = settings.max_output_tokens
    if limit is None:
        return wanted
    return limit if wanted is None else min(wanted, limit)
