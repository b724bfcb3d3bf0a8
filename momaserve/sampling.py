"""What a request asks of the sampler. Values are checked once, when the object is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
MAX_LOGIT_BIAS_VALUE = 100.0
"""OpenAI's bound, in both directions."""
MAX_TEMPERATURE = 100.0
MAX_SEED = 2**63 - 1
MAX_GUIDANCE_SCALE = 20.0
MAX_REPETITION_PENALTY = 10.0
MAX_ADDITIVE_PENALTY = 2.0
"""OpenAI's bound of presence_penalty and frequency_penalty, in both directions."""
MAX_PRIORITY = 1_000_000
MAX_CACHE_SALT = 256
MAX_TIMEOUT_S = 86_400.0
MAX_SHOWN_CHARS = 80
"""Of a wrong value in a message."""


class OutputMode(StrEnum):
    """Which modalities an answer may have (model.md, 6)."""

    TEXT = "text"
    IMAGE = "image"
    INTERLEAVED = "interleaved"


def _require(condition: bool, message: str, param: str) -> None:
    if not condition:
        raise SamplingError(message, param=param)


def _shown(value: object) -> str:
    """`value` in a message: never long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of too many digits"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: float, low: float, high: float, *, is_open: bool = False) -> None:
    """In [low, high], or in (low, high] when open. NaN is in neither."""
    limits = f"above {low:g} and at most {high:g}" if is_open else f"between {low:g} and {high:g}"
    is_number = isinstance(value, float) or _is_integer(value)
    kind = "" if is_number else "a number "
    ok = is_number and low <= value <= high and not (is_open and value == low)
    _require(ok, f"{name} must be {kind}{limits}, got {_shown(value)}", name)


def _integer(name: str, value: int, low: int, high: int | None = None) -> None:
    limits = f"at least {low}" if high is None else f"between {low} and {high}"
    is_integer = _is_integer(value)
    kind = "" if is_integer else "an integer of " if high is None else "an integer "
    ok = is_integer and low <= value and (high is None or value <= high)
    _require(ok, f"{name} must be {kind}{limits}, got {_shown(value)}", name)


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
        _number(f"{prefix}temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer(f"{prefix}top_k", self.top_k, 0)
        _number(f"{prefix}top_p", self.top_p, 0.0, 1.0, is_open=True)
        _number(f"{prefix}min_p", self.min_p, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. Collections are copied; one `stop` string may be given as such.

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
    include_routing: bool = False
    """Report the experts of each generated token. Its answer is then computed even where the
    prefix cache holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    """Tokens to generate before eos or a stop token may end the answer."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of text ids in prompt or answer."""
    presence_penalty: float = 0.0
    """Is subtracted from the logits of text ids in the answer."""
    frequency_penalty: float = 0.0
    """The same, once per occurrence."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of pictures: u + scale * (c - u), with u the logits without a
    prompt (Ho & Salimans, 2207.12598). 1 is none; any other value costs a second sequence."""
    priority: int = 0
    """Smaller ones start earlier and are preempted later."""
    cache_salt: str | None = None
    """Computed prompts are shared only among requests with the same salt."""
    timeout_s: float | None = None
    """Seconds after which the request ends, finished or not."""
    routing: RoutingPolicy | None = None
    """None is the engine's own."""
    prompt_routing: RoutingPolicy | None = None
    """None is the engine's own, or `routing` where the engine has none of its own."""

    def __post_init__(self) -> None:
        for name, prefix in (("text", ""), ("image", "image_")):
            distribution = getattr(self, name)
            ok = isinstance(distribution, Distribution)
            _require(ok, f"{name} must be a Distribution, got {_shown(distribution)}", name)
            distribution.check(prefix)
        self._check_lengths()
        _integer("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        _number(
            "repetition_penalty", self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, is_open=True
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -MAX_ADDITIVE_PENALTY, MAX_ADDITIVE_PENALTY)
        _number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        _integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.timeout_s is not None:
            _number("timeout_s", self.timeout_s, 0.0, MAX_TIMEOUT_S, is_open=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_cache_salt()
        self._check_stops()
        self._check_switches()
        self._check_enums()
        self._check_logit_bias()

    def _check_lengths(self) -> None:
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is None:
            return
        _integer("max_tokens", self.max_tokens, 0)
        _require(
            self.min_tokens <= self.max_tokens,
            f"min_tokens must be at most max_tokens {_shown(self.max_tokens)}, "
            f"got {_shown(self.min_tokens)}",
            "min_tokens",
        )

    def _check_cache_salt(self) -> None:
        salt = self.cache_salt
        if salt is None:
            return
        ok = isinstance(salt, str) and not any("\ud800" <= char <= "\udfff" for char in salt)
        _require(ok, f"cache_salt must be Unicode text, got {_shown(salt)}", "cache_salt")
        _require(
            1 <= len(salt) <= MAX_CACHE_SALT,
            f"cache_salt must have 1 to {MAX_CACHE_SALT} characters, got {len(salt)}",
            "cache_salt",
        )

    def _check_logit_bias(self) -> None:
        ok = isinstance(self.logit_bias, Mapping) and all(map(_is_integer, self.logit_bias))
        message = f"logit_bias must map token ids to numbers, got {_shown(self.logit_bias)}"
        _require(ok, message, "logit_bias")
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}",
            "logit_bias",
        )
        for value in self.logit_bias.values():
            _number("logit_bias", value, -MAX_LOGIT_BIAS_VALUE, MAX_LOGIT_BIAS_VALUE)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

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
                f"{name} must be one of {[str(v) for v in allowed]}, "
                f"got {str(value)[:MAX_SHOWN_CHARS]}",
                name,
            )
            object.__setattr__(self, name, kind(value))

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):  # a string is a sequence of strings, but is meant as one
            object.__setattr__(self, "stop", (self.stop,))
        ok = isinstance(self.stop, Collection) and all(isinstance(stop, str) for stop in self.stop)
        _require(ok, f"stop must be strings, got {_shown(self.stop)}", "stop")
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
        ids = self.stop_token_ids
        ok = isinstance(ids, Collection) and all(map(_is_integer, ids))
        _require(ok, f"stop_token_ids must be token ids, got {_shown(ids)}", "stop_token_ids")
        _require(
            len(ids) <= MAX_STOP_TOKEN_IDS,
            f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} ids, got {len(ids)}",
            "stop_token_ids",
        )
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _check_switches(self) -> None:
        for name in ("ignore_eos", "include_routing"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} must be a bool, got {_shown(value)}", name)
