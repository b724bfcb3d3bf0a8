"""Every error that momaserve raises on purpose.

    MomaserveError
    ├── ConfigError            a setting that cannot work (names the setting and its limit)
    ├── CheckpointError        a checkpoint directory that is missing, broken or inconsistent
    ├── DataError              training or evaluation data that cannot be read or made
    ├── RequestError           a request that can never be served as it stands
    │   ├── PromptError        the prompt itself: ids, image spans, pictures, length
    │   └── SamplingError      a sampling parameter out of its range
    ├── DeadlineError          a request's own time limit passed before there was an answer
    ├── QueueFullError         the engine has no room for one more waiting request
    └── EngineDeadError        the engine stopped; nothing more will be served
        └── DrainingError      it takes nothing new and finishes what it has

The server turns these classes into status codes in one table; `param` is the name of the
request field at fault, where there is one.
"""

from __future__ import annotations


class MomaserveError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(MomaserveError):
    """A setting that cannot work."""


class CheckpointError(MomaserveError):
    """A checkpoint directory that is missing, broken or inconsistent."""


class DataError(MomaserveError):
    """Training or evaluation data that cannot be read or made."""


class RequestError(MomaserveError):
    """A request that can never be served as it stands."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptError(RequestError):
    """The prompt is at fault: its ids, image spans, pictures or length."""


class SamplingError(RequestError):
    """A sampling parameter is out of its range."""


class DeadlineError(MomaserveError):
    """The request's own time limit passed before there was an answer."""

    param = "timeout_s"


class QueueFullError(MomaserveError):
    """The engine has no room for one more waiting request."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WarmUpError(MomaserveError):
    """The engine could not answer a made-up request, so it would answer no other."""


class EngineDeadError(MomaserveError):
    """The engine stopped; nothing more will be served."""


class DrainingError(EngineDeadError):
    """The engine takes no new requests and finishes those it has."""
