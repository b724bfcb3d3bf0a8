"""What an architecture costs before anything runs: FLOPs, bytes of weights, bytes of a step, room.

Arithmetic on configurations; nothing here is measured but the memory that is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ExpertGroupConfig, ModelConfig
from momaserve.models.info import AUXILIARY_ROUTERS, DTYPE_NAMES, THRESHOLDS, describe
from momaserve.models.weights import STORED_DTYPES
from momaserve_bench.architectures_options import DENSE
from momaserve_bench.peers.contest import Case
from momaserve_bench.roof import ROUTER_BYTES, StepLoad, step_bytes

PROCESS_BYTES = 700_000_000
"""Of an engine's process without weights and K/V: Python, torch, compiled kernels, buffers."""
LOADING_FACTOR = 1.5
"""Peak bytes for weights while they are packed, over the weights; 1.4 was measured at most."""
_ROUTERS = ("routers", "depth routers", AUXILIARY_ROUTERS, THRESHOLDS)
_BLOCK = 16
_MARKS = 2
"""Of a picture: its begin and its end."""
_MEMORY = Path("/proc/meminfo")


def itemsize_of(dtype: str) -> int:
    return STORED_DTYPES[DTYPE_NAMES[dtype]].itemsize


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Of all weights in memory: routers in float32, the rest in `dtype`."""
    return sum(
        part.parameters * (ROUTER_BYTES if part.name in _ROUTERS else itemsize_of(dtype))
        for part in describe(config, dtype=dtype).parts
    )


def active_flops(config: ModelConfig) -> dict[str, int]:
    """Of one token by modality, attention to other tokens left out: it is the same for all.

    Auxiliary routers count, since a served token passes them.
    """
    return {cost.modality: cost.linear_flops for cost in describe(config).costs}


def kv_cache_bytes(config: ModelConfig, cases: Sequence[Case], dtype: str) -> int:
    """Of K/V with room for the largest case, a block to spare for each row."""
    tokens = max(
        case.batch_size * (-(-(case.input_len + case.output_len + _MARKS) // _BLOCK) + 1) * _BLOCK
        for case in cases
    )
    return tokens * describe(config, dtype=dtype).kv_bytes_per_token


def needed_bytes(config: ModelConfig, cases: Sequence[Case], dtype: str) -> int:
    """Memory that a process with this model needs at most, an estimate on the high side."""
    weights = round(LOADING_FACTOR * weight_bytes(config, dtype))
    return PROCESS_BYTES + weights + kv_cache_bytes(config, cases, dtype)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where nobody tells."""
    if not _MEMORY.exists():
        return None
    for line in _MEMORY.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def groups_that_fit(needed: Mapping[str, int], available: int | None) -> list[tuple[str, ...]]:
    """Architectures that are in memory together: all, or else dense beside each of the others.

    Args:
        needed: bytes of each; dense is one of them.
        available: bytes; None is enough.

    Raises:
        ConfigError: names those that do not fit even then.
    """
    others = [name for name in needed if name != DENSE]
    if available is None or sum(needed.values()) <= available:
        return [tuple(needed)]
    largest = {name: needed[DENSE] + needed[name] for name in others} or {DENSE: needed[DENSE]}
    refused = [f"{name} ({_gb(needed[name])})" for name in largest if largest[name] > available]
    if refused:
        beside = f" beside {DENSE} ({_gb(needed[DENSE])})" if others else ""
        raise ConfigError(
            f"no room for {', '.join(refused)}{beside}: {_gb(available)} of memory can be had; "
            "choose a smaller --size or leave it out with --architectures"
        )
    return [(DENSE, name) for name in others]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def expected_step_bytes(
    config: ModelConfig, rows: str, batch_size: int, *, context: int, dtype: str
) -> float:
    """Bytes of a decoding step if every token took each expert with probability 1 / E by itself.

    So n tokens of a group of E experts meet E (1 - (1 - 1/E)^n) of them on average. Real tokens
    need not choose independently; what a run touched is measured.

    Args:
        rows: `text`, `image` or `mixed`, which is half of either.
        context: tokens that each row sees.
    """
    images = {"text": 0, "image": batch_size, "mixed": batch_size // 2}[rows]
    num_tokens = {Modality.TEXT: batch_size - images, Modality.IMAGE: images}
    seen = {modality: count * context for modality, count in num_tokens.items()}
    layers = config.num_hidden_layers

    def total(full: ExpertGroupConfig | None) -> float:
        """With all experts of one group; with None, of none that has a router."""
        experts = (
            [(layer, full.name, (1,) * full.num_experts) for layer in range(layers)] if full else []
        )
        load = StepLoad(num_tokens=num_tokens, context_tokens=seen, expert_tokens=experts)
        return step_bytes(
            config, load, itemsize=itemsize_of(dtype), policy=RoutingPolicy.CAUSAL
        ).total

    base = expected = total(None)
    for group in config.expert_groups:
        count = sum(num_tokens[modality] for modality in group.modalities)
        if group.has_router:
            share = 1 - (1 - 1 / group.num_experts) ** count  # of its experts
            expected += share * (total(group) - base)
    return expected
