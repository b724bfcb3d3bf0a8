"""Engine configuration: frozen, composed, checked when built. Measured values live elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from momaserve.errors import ConfigError


class RoutingPolicy(StrEnum):
    """How an expert (or a depth-routed layer) and a token find each other (model.md, 4)."""

    CAUSAL = "causal"
    CALIBRATED = "calibrated"
    EXPERT_CHOICE = "expert_choice"
    THRESHOLD = "threshold"


SERVABLE_POLICIES = (RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED)
"""Policies that may route any token of a served request."""


class Scheduling(StrEnum):
    """Which waiting request starts first."""

    ROUTER_AWARE = "router-aware"
    """One that shares experts with those that run, unless it would pass another too often."""
    FCFS = "fcfs"
    """The oldest."""


PROMPT_POLICIES = (*SERVABLE_POLICIES, RoutingPolicy.EXPERT_CHOICE)
"""Policies that may route the prompt of a served request."""


_POSITIVE_COUNTS = (
    "max_num_requests",
    "max_num_step_tokens",
    "max_queued_requests",
    "max_queued_tokens",
)
_PASSES_PER_SLOT = 4
"""Fewer, and the running requests are mixed most of the time; more brings little."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How KV memory is cut into blocks. Says nothing about how many fit: that is measured."""

    block_size: int = 16
    """Tokens per block; a power of two."""
    kv_cache_bytes: int | None = None
    """Bytes for all blocks; None gives every running request room for a whole context, up to
    1 GiB or one whole context, whichever is more."""
    prefix_caching: bool = True
    """Whether requests that begin alike share what is computed."""

    def __post_init__(self) -> None:
        size = self.block_size
        _require(
            size >= 1 and size & (size - 1) == 0, f"block_size must be a power of two, got {size}"
        )
        _require(
            self.kv_cache_bytes is None or self.kv_cache_bytes > 0,
            f"kv_cache_bytes must be positive, got {self.kv_cache_bytes}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How many requests and tokens the engine takes on at once."""

    max_num_requests: int = 32
    """Requests that run at the same time, those with guidance counted twice; more wait."""
    max_num_step_tokens: int = 1024
    """New tokens computed in one step, all requests together."""
    max_queued_requests: int = 256
    """Requests that may wait; one more is refused."""
    max_queued_tokens: int = 1 << 20
    """Prompt tokens of all waiting requests together; a request beyond them is refused."""
    scheduling: Scheduling = Scheduling.ROUTER_AWARE
    """Which waiting request starts first."""
    max_num_passes: int | None = None
    """Younger requests of its priority that may start before a waiting one, under router-aware
    scheduling; None is four times `max_num_requests`."""
    step_time_target_ms: float | None = None
    """Predicted time, in milliseconds, that prompts fill a step up to, under router-aware
    scheduling; None is no limit but `max_num_step_tokens`."""

    def __post_init__(self) -> None:
        for name in _POSITIVE_COUNTS:
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        try:  # as for routing: policies are told apart by identity
            object.__setattr__(self, "scheduling", Scheduling(self.scheduling))
        except ValueError:
            known = [str(policy) for policy in Scheduling]
            raise ConfigError(
                f"scheduling must be one of {known}, got {self.scheduling!r}"
            ) from None
        passes, target = self.max_num_passes, self.step_time_target_ms
        _require(passes is None or passes >= 0, f"max_num_passes must be at least 0, got {passes}")
        _require(
            target is None or 0 < target < math.inf,
            f"step_time_target_ms must be a positive number of milliseconds, got {target}",
        )
        for name in ("max_num_passes", "step_time_target_ms"):
            _require(
                self.scheduling is Scheduling.ROUTER_AWARE or getattr(self, name) is None,
                f"{name} {getattr(self, name)} needs scheduling {Scheduling.ROUTER_AWARE}, got "
                f"{self.scheduling}",
            )

    @property
    def num_passes_allowed(self) -> int:
        """`max_num_passes`, or what it is by default."""
        default = _PASSES_PER_SLOT * self.max_num_requests
        return default if self.max_num_passes is None else self.max_num_passes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine besides the checkpoint itself."""

    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16."""
    device: str = "auto"
    """auto | cpu | cuda."""
    backend: str = "auto"
    """auto | cpu | triton | xformers | reference: compiled kernels for the CPU or the GPU, plain
    torch with the paged attention of xformers, or plain torch; auto takes the kernels of the device
    if they can run, and never xformers."""
    keep_weights: bool = False
    """Whether `Engine.model` stays usable by others when the backend has packed its weights."""
    threads: int | None = None
    """Torch threads; None leaves torch's own choice."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; None is the checkpoint's own limit."""
    routing: RoutingPolicy = RoutingPolicy.CAUSAL
    """Any policy but expert choice, which needs a whole prompt to choose from."""
    prompt_routing: RoutingPolicy | None = None
    """Policy of prompt tokens; None is the same as `routing`."""
    plan_ahead: bool | None = None
    """Whether a step is planned and started before the one in flight is known; None does so on
    devices that run beside the host."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, f"dtype must be one of {dtypes}, got {self.dtype!r}")
        devices = ("auto", "cpu", "cuda")
        _require(self.device in devices, f"device must be one of {devices}, got {self.device!r}")
        backends = ("auto", "cpu", "triton", "xformers", "reference")
        _require(
            self.backend in backends, f"backend must be one of {backends}, got {self.backend!r}"
        )
        _require(
            self.threads is None or self.threads >= 1,
            f"threads must be at least 1, got {self.threads}",
        )
        _require(
            self.max_model_len is None or self.max_model_len >= 1,
            f"max_model_len must be at least 1, got {self.max_model_len}",
        )
        # A plain string equals its policy but is not it; elsewhere policies are told apart by
        # identity.
        object.__setattr__(self, "routing", _policy("routing", self.routing))
        if self.prompt_routing is not None:
            prompt_routing = _policy("prompt_routing", self.prompt_routing)
            object.__setattr__(self, "prompt_routing", prompt_routing)
        _require(
            self.routing is not RoutingPolicy.EXPERT_CHOICE,
            f"routing must not be {RoutingPolicy.EXPERT_CHOICE}: generated tokens come one by "
            "one, and there is nothing to choose from; it may be the prompt_routing",
        )


def _policy(name: str, value: str) -> RoutingPolicy:
    try:
        return RoutingPolicy(value)
    except ValueError:
        policies = [str(policy) for policy in RoutingPolicy]
        raise ConfigError(f"{name} must be one of {policies}, got {value!r}") from None
