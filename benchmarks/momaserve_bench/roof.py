"""The roof of decoding: the bytes that a step cannot do without, over the bandwidth to read them.

Bytes are arithmetic on a configuration and on what a step was seen to do; bandwidth is measured
in the same run. Knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig

ROUTER_BYTES = 4
"""Routers are float32 whatever the weights' type."""
SMALLEST_BUFFER_BYTES = 1 << 20
_COLUMNS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What one step of decoding did."""

    num_tokens: Mapping[Modality, int]
    """Tokens that it computed."""
    context_tokens: Mapping[Modality, int]
    """Tokens that those see, themselves included, summed up over them."""
    expert_tokens: Sequence[tuple[int, str, Sequence[int]]]
    """(layer, group, tokens per expert), for groups with a router."""
    depth_tokens: Sequence[tuple[int, int, int]] = ()
    """(layer, taken, skipped) for layers with a depth router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """Bytes that a step must read, by what they are."""

    embedding: float = 0.0
    """The rows of its tokens."""
    attention: float = 0.0
    """Projections, and the norms of every layer and of the end."""
    experts: float = 0.0
    """Those that were given a token, each once."""
    routers: float = 0.0
    """What selection under the policy reads, depth routers included."""
    head: float = 0.0
    kv: float = 0.0

    @property
    def weights(self) -> float:
        return self.total - self.kv

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def mean(cls, steps: Sequence[StepBytes]) -> StepBytes:
        """Of at least one step, part by part."""
        names = [field.name for field in fields(cls)]
        return cls(**{n: sum(getattr(step, n) for step in steps) / len(steps) for n in names})


def step_bytes(
    config: ModelConfig, load: StepLoad, *, itemsize: int, policy: RoutingPolicy
) -> StepBytes:
    """What a step must read at least.

    Weights count once however many tokens need them, experts only if a token came, layers that
    depth routing let every token skip not at all, but for their router. Each token reads the K/V
    of what it sees; of that, a depth-routed layer has its capacity's share. In such a layer a
    group of one expert counts when the layer took any token, which is too much only where all
    that it took were of the other modality. Activations, RoPE angles and what is written are
    left out: they stay in caches, or are small.

    Args:
        itemsize: bytes of one weight and of one coordinate of K/V.
        policy: how all tokens of the step are routed.
    """
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = 2 * hidden + (2 * (width + keys) if config.qk_norm else 0)
    layer_weights = 2 * hidden * (width + keys) + norms
    num_tokens = sum(load.num_tokens.values())
    depth = {layer: (taken, skipped) for layer, taken, skipped in load.depth_tokens}
    distinct = {
        (layer, group): sum(count > 0 for count in counts)
        for layer, group, counts in load.expert_tokens
    }
    present = [
        group
        for group in config.expert_groups
        if any(load.num_tokens.get(modality, 0) for modality in group.modalities)
    ]
    attention, experts, routers, kv = float(hidden), 0.0, 0.0, 0.0
    for layer in range(config.num_hidden_layers):
        num_taken = num_tokens
        if config.depth_routing is not None and layer in config.depth_routing.layers:
            routers += _router_weights(hidden, 1, config.depth_routing.aux_hidden_size, policy)
            num_taken -= depth.get(layer, (0, 0))[1]
        if not num_taken:
            continue
        attention += layer_weights
        seen = _seen(config, layer, load.context_tokens)
        kv += 2 * keys * seen * num_taken / num_tokens
        for group in present:
            expert = 3 * hidden * group.intermediate_size
            if group.has_router:
                experts += expert * distinct.get((layer, group.name), 0)
                routers += _router_weights(hidden, group.num_experts, group.aux_hidden_size, policy)
            else:
                experts += expert
    return StepBytes(
        embedding=float(itemsize * num_tokens * hidden),
        attention=itemsize * attention,
        experts=itemsize * experts,
        routers=ROUTER_BYTES * routers,
        head=float(itemsize * _head_rows(config, load) * hidden),
        kv=itemsize * kv,
    )


def _head_rows(config: ModelConfig, load: StepLoad) -> int:
    """Ids that the step chooses from: after codes alone come codes, unless a picture ends."""
    if config.image is None or load.num_tokens.get(Modality.TEXT, 0):
        return config.vocab_size
    return config.image.num_codes


def _router_weights(hidden: int, outputs: int, aux: int, policy: RoutingPolicy) -> int:
    """The main router gives the weight under every policy; what else selects depends on it."""
    extra = {
        RoutingPolicy.CAUSAL: aux * (hidden + outputs),
        RoutingPolicy.CALIBRATED: outputs,
    }
    return outputs * hidden + extra.get(policy, 0)


def _seen(config: ModelConfig, layer: int, context: Mapping[Modality, int]) -> float:
    """Tokens of `context` whose K/V the layer has, on average."""
    depth = config.depth_routing
    capacity = None if depth is None else depth.capacity_of(layer)
    if depth is None or capacity is None:
        return float(sum(context.values()))
    return sum(n * (capacity if m in depth.modalities else 1.0) for m, n in context.items())


def mean_distinct_experts(loads: Sequence[StepLoad]) -> dict[str, float]:
    """By group with a router: experts of a layer that a step gave a token, on average."""
    counts: dict[str, list[int]] = {}
    for load in loads:
        for _, group, tokens in load.expert_tokens:
            counts.setdefault(group, []).append(sum(count > 0 for count in tokens))
    return {group: sum(found) / len(found) for group, found in counts.items()}


def measure_read_bandwidth(
    num_bytes: int,
    *,
    threads: int | None = None,
    device: torch.device | None = None,
    repeats: int = 5,
) -> float:
    """Bytes per second at which this machine reads memory, at best.

    A sum and a matrix-vector product, the shape of decoding, both over all of the buffer; the
    fastest of `repeats` passes of each.

    Args:
        num_bytes: size of the buffer. Only one well beyond all caches measures memory.
        threads: torch threads while measuring; None leaves them as they are.
        device: None is the CPU.

    Raises:
        ConfigError: a buffer too small to time, or more than there is memory for.
    """
    if num_bytes < SMALLEST_BUFFER_BYTES:
        raise ConfigError(
            f"the buffer for measuring bandwidth must have at least {SMALLEST_BUFFER_BYTES} bytes, "
            f"got {num_bytes}"
        )
    device = device or torch.device("cpu")
    rows = num_bytes // (4 * _COLUMNS)
    try:
        # Written, for pages that nobody wrote to may all be one.
        buffer = torch.ones(rows, _COLUMNS, dtype=torch.float32, device=device)
    except RuntimeError as error:  # what torch raises without memory
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no room for a buffer of {num_bytes} bytes: {reason}") from None
    vector = torch.ones(_COLUMNS, dtype=torch.float32, device=device)
    reads: tuple[Callable[[], Tensor], ...] = (
        partial(torch.sum, buffer),
        partial(torch.mv, buffer, vector),
    )
    best_s = float("inf")
    with torch_threads(threads):
        for _ in range(repeats):
            for read in reads:
                _wait_for(device)
                started = time.perf_counter()
                read()
                _wait_for(device)
                best_s = min(best_s, time.perf_counter() - started)
    return buffer.nbytes / best_s


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many torch threads meanwhile; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
