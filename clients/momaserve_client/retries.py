"""What is sent again, and when: a pure function of the error and a random number."""

from __future__ import annotations

from dataclasses import dataclass

from momaserve_client.errors import (
    ApiError,
    ClientError,
    DrainingError,
    NotConnectedError,
    NotReadyError,
    RateLimitError,
)

SAFE = (NotConnectedError, RateLimitError, DrainingError, NotReadyError)
"""After these nothing has been computed: the server did not hear of the request, or refused it
before any work. Everything else is left to the caller, who knows whether twice is too often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often and after how long what is safe to send again is sent again."""

    max_retries: int = 2
    """After the first attempt; 0 never tries again."""
    first_delay_s: float = 0.5
    """Doubles with each retry; between half of it and all of it is waited."""
    max_delay_s: float = 8.0
    max_retry_after_s: float = 60.0
    """A server that asks for more patience than this is not tried again."""

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {self.max_retries}")

    def delay_s(self, error: ClientError, num_retries: int, random: float) -> float | None:
        """Seconds to wait before sending again; None says not to.

        Args:
            num_retries: how often it has been sent again by now.
            random: in [0, 1); spreads clients that were refused together.
        """
        if num_retries >= self.max_retries or not isinstance(error, SAFE):
            return None
        backoff = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(num_retries, 62))
        if not isinstance(error, ApiError):
            return backoff * (1 + random) / 2
        if error.should_retry is False:
            return None
        if error.retry_after_s is None:
            return backoff * (1 + random) / 2
        if error.retry_after_s > self.max_retry_after_s:
            return None
        return error.retry_after_s + self.first_delay_s * random
