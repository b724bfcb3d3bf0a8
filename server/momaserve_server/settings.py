"""What the server itself needs to know: address, limits, names. The engine has its own."""

from __future__ import annotations

from dataclasses import dataclass, fields

from momaserve.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one server process.

    Each field is also a `momaserve serve` option and a `MOMASERVE_...` environment variable
    of the same name (`cli_options.py` reads them).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port and prints it."""
    served_model_name: str | None = None
    """Name that requests use; None is the checkpoint's own name."""
    max_body_bytes: int = 32 * MIB
    """Largest request body, counted while it is read."""
    max_image_bytes: int = 8 * MIB
    """Largest picture file, after base64 decoding."""
    max_image_pixels: int = 16_000_000
    """Largest width times height of a picture, read from its header before decoding."""
    max_images_per_request: int = 8
    max_prompts_per_request: int = 64
    """Prompts in one `/v1/completions` request."""
    drain_timeout_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    worker_threads: int = 2
    """Threads that tokenise, decode and render pictures beside the event loop."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ConfigError(f"drain_timeout_s must be at least 0, got {self.drain_timeout_s}")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("served_model_name must not be empty")
        for item in fields(self):
            value = getattr(self, item.name)
            if (item.name.startswith("max_") or item.name == "worker_threads") and value < 1:
                raise ConfigError(f"{item.name} must be at least 1, got {value}")
