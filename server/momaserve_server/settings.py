"""What the server itself needs to know: address, limits, names. The engine has its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from momaserve.errors import ConfigError
from momaserve.sampling import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS

MIB = 1 << 20
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", re.IGNORECASE)
_IMAGE_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_METRICS_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_API_KEY = re.compile(r"[!-~]+")
_HARD_LIMITS = {"max_n": MAX_N, "max_logprobs": MAX_LOGPROBS, "max_stop": MAX_STOP_STRINGS}
"""What the engine takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one server process.

    Each field is also a `momaserve serve` option and a `MOMASERVE_...` environment variable
    of the same name (`cli_options.py` reads them).

    Raises:
        ConfigError: a value that cannot work; names field and limit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port and prints it."""
    root_path: str = ""
    """Path under which a proxy shows this server, such as "/llm"."""
    served_model_name: str | None = None
    """Name that requests use; None is the checkpoint's own name."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens the API; none leaves it open to everybody."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the API, or "*"."""
    max_body_bytes: int = 32 * MIB
    """Largest request body, counted while it is read."""
    max_image_bytes: int = 8 * MIB
    """Largest picture file, after base64 decoding."""
    max_image_pixels: int = 16_000_000
    """Largest width times height of a picture, read from its header before decoding."""
    max_images_per_request: int = 8
    max_prompts_per_request: int = 64
    """Prompts in one `/v1/completions` request."""
    max_n: int = MAX_N
    """Answers to one prompt."""
    max_output_tokens: int | None = None
    """Longest answer in tokens; None is what the context has room for."""
    max_logprobs: int = MAX_LOGPROBS
    """Likeliest tokens reported per position; 0 still reports the sampled one."""
    max_stop: int = MAX_STOP_STRINGS
    """Stop strings of one request."""
    allow_image_hosts: tuple[str, ...] = ()
    """Hosts, or host:port, from which pictures are fetched; without a port the scheme's own."""
    image_fetch_timeout_s: float = 5.0
    """For fetching one picture, redirects included."""
    drain_timeout_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    warm_up: bool = True
    """Whether made-up requests run before the first real ones."""
    worker_threads: int = 2
    """Threads that tokenise, decode and render pictures beside the event loop."""
    metrics_prefix: str = "momaserve"
    """First word of every metric's name; "vllm" stands for vLLM's own names."""
    shadow_eval: float = 0.0
    """Share of finished requests whose routing is compared with expert choice; 0 is off."""
    otlp_traces_endpoint: str | None = None
    """URL that takes a span per request; None makes none."""
    log_format: str = "text"
    """"text" for people, "json" for machines: one object per line."""
    log_level: str = "info"
    access_log: bool = True
    """One line per request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ConfigError(f"drain_timeout_s must be at least 0, got {self.drain_timeout_s}")
        if not 0 < self.image_fetch_timeout_s < float("inf"):
            raise ConfigError(
                f"image_fetch_timeout_s must be above 0, got {self.image_fetch_timeout_s}"
            )
        if not 0 <= self.shadow_eval <= 1:
            raise ConfigError(f"shadow_eval must be between 0 and 1, got {self.shadow_eval}")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("served_model_name must not be empty")
        self._check_numbers()
        self._check_words()
        for number, key in enumerate(self.api_keys, 1):
            if not _API_KEY.fullmatch(key):  # never shown, not even in part
                raise ConfigError(f"API key {number} must be printable ASCII without spaces")

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not item.name.startswith("max_") and item.name != "worker_threads":
                continue
            low = 0 if item.name == "max_logprobs" else 1
            high = _HARD_LIMITS.get(item.name)
            if value is None or low <= value <= (value if high is None else high):
                continue
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{item.name} must be {limits}, got {value}")

    def _check_words(self) -> None:
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path must be a path such as '/llm', without / at its end, "
                f"got {self.root_path!r}"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "a cors_origin must be '*' or like 'https://example.com', without a path, "
                    f"got {origin!r}"
                )
        for host in self.allow_image_hosts:
            port = host.rpartition(":")[2]
            if not _IMAGE_HOST.fullmatch(host) or (port.isdigit() and int(port) > 65535):
                raise ConfigError(
                    "an allow_image_host must be a host name or host:port in ASCII, such as "
                    f"'example.com' or 'example.com:8443', got {host!r}"
                )
        if not _METRICS_PREFIX.fullmatch(self.metrics_prefix):
            raise ConfigError(
                "metrics_prefix must be letters, digits and _, and begin with no digit, "
                f"got {self.metrics_prefix!r}"
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not _is_http_url(endpoint):
            raise ConfigError(f"otlp_traces_endpoint must be an http(s) URL, got {endpoint!r}")
        _check_choice("log_format", self.log_format, LOG_FORMATS)
        _check_choice("log_level", self.log_level, LOG_LEVELS)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
