"""What a request asks of the sampler. Values are checked once, when the object is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from momaserve.config import PROMPT_POLICIES, SERVABLE_POLICIES, RoutingPolicy
from momaserve.errors import SamplingError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 8
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_TEMPERATURE = 100.0
MAX_SEED = 2**63 - 1


class OutputMode(StrEnum):
    """Which modalities an answer may have (model.md, 6)."""

    TEXT = "text"
    IMAGE = "image"
    INTERLEAVED = "interleaved"


def _require(condition: bool, message: str, param: str) -> None:
    if not condition:
        raise SamplingError(message, param=param)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    ok = math.isfinite(value) and low <= value <= high
    _require(ok, f"{name} must be between {low:g} and {high:g}, got {value}", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How one modality's tokens are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest, in [0, 1]."""

    def check(self, prefix: str = "") -> None:
        """Raises SamplingError; `prefix` is put before field names in the message."""
        _in_range(f"{prefix}temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _require(
            isinstance(self.top_k, int) and self.top_k >= 0,
            f"{prefix}top_k must be an integer of at least 0, got {self.top_k}",
            f"{prefix}top_k",
        )
        _require(
            math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0,
            f"{prefix}top_p must be above 0 and at most 1, got {self.top_p}",
            f"{prefix}top_p",
        )
        _in_range(f"{prefix}min_p", self.min_p, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request.

    Raises:
        SamplingError: a value out of its range; the message names value and limit.
    """

    mode: OutputMode = OutputMode.TEXT
    max_tokens: int | None = None
    """Most tokens to generate, forced ones included; None fills the context."""
    text: Distribution = field(default_factory=Distribution)
    image: Distribution = field(default_factory=Distribution)
    seed: int | None = None
    """None draws a fresh seed. Choice i of a request uses `seed + i`."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the log-probability of each generated token and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    routing: RoutingPolicy | None = None
    """None is the engine's own."""
    prompt_routing: RoutingPolicy | None = None
    """None is the engine's own, or `routing` where the engine has none of its own."""

    def __post_init__(self) -> None:
        self.text.check()
        self.image.check("image_")
        _require(1 <= self.n <= MAX_N, f"n must be between 1 and {MAX_N}, got {self.n}", "n")
        _require(
            self.max_tokens is None or self.max_tokens >= 0,
            f"max_tokens must be at least 0, got {self.max_tokens}",
            "max_tokens",
        )
        _require(
            self.seed is None or 0 <= self.seed <= MAX_SEED,
            f"seed must be between 0 and {MAX_SEED}, got {self.seed}",
            "seed",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                f"{name} must be between 0 and {MAX_LOGPROBS}, got {value}",
                name,
            )
        self._check_stops()
        self._check_enums()
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}",
            "logit_bias",
        )
        for value in self.logit_bias.values():
            _in_range("logit_bias", value, -100.0, 100.0)

    def _check_enums(self) -> None:
        """A plain string is taken for its enum: it equals it, but is told apart by identity."""
        kinds: tuple[tuple[str, type[StrEnum], tuple[StrEnum, ...]], ...] = (
            ("mode", OutputMode, tuple(OutputMode)),
            ("routing", RoutingPolicy, SERVABLE_POLICIES),
            ("prompt_routing", RoutingPolicy, PROMPT_POLICIES),
        )
        for name, kind, allowed in kinds:
            value = getattr(self, name)
            if value is None and name != "mode":
                continue
            _require(
                value in allowed,
                f"{name} must be one of {[str(v) for v in allowed]}, got {value}",
                name,
            )
            object.__setattr__(self, name, kind(value))

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):  # a string is a sequence of strings, but is meant as one
            object.__setattr__(self, "stop", (self.stop,))
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            f"stop must have at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}",
            "stop",
        )
        for stop in self.stop:
            _require(
                1 <= len(stop) <= MAX_STOP_LENGTH,
                f"each stop string must have 1 to {MAX_STOP_LENGTH} characters, got {len(stop)}",
                "stop",
            )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} ids, "
            f"got {len(self.stop_token_ids)}",
            "stop_token_ids",
        )
