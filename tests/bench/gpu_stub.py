"""What stands in for a GPU in tests of `momaserve_bench.gpu`: a clock, and tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tests.kernels.triton.conftest  # noqa: F401 (chooses the interpreter before Triton loads)
from momaserve.config import EngineConfig
from momaserve.loading import ModelParts
from momaserve.models.config import ModelConfig
from momaserve.models.random_weights import random_model
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.processor import Processor
from momaserve_bench.engine_setup import with_image_tokens
from momaserve_bench.gpu.device import KernelTime
from momaserve_bench.gpu.steps import shallow
from tests.kernels.triton.device import DEVICE


class StubDevice:
    """Each look at the clock takes a millisecond, and every place of work is such a look."""

    def __init__(self, kernels: list[KernelTime] | None = None) -> None:
        self.torch_device = torch.device(DEVICE)
        self.num_multiprocessors = 4
        self.num_waits = 0
        self.occupied_s = 0.0
        self._kernels = [KernelTime("a_kernel", 0.002, 3)] if kernels is None else kernels
        self._now = 0.0

    def describe(self) -> dict[str, Any]:
        return {"name": "a stub"}

    def synchronize(self) -> None:
        self.num_waits += 1

    def now(self) -> float:
        self._now += 1e-3
        return self._now

    def mark(self) -> Any:
        return self.now()

    def occupy(self, seconds: float) -> None:
        self.occupied_s += seconds

    def seconds_between(self, first: Any, last: Any) -> float:
        return float(last - first)

    def peak_bytes(self) -> int:
        return 7

    def kernel_times(self, work: Callable[[], object]) -> list[KernelTime]:
        work()
        return self._kernels


def tiny(preset: str) -> ModelConfig:
    """A layer of a preset's architecture, 32 wide, with 64 ids; with depth routing a plain one
    more."""
    data = shallow(preset, 2 if "-mod-" in preset else 1).to_dict()
    sizes = {"intermediate_size": 21, "aux_hidden_size": 16}
    data |= {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "expert_groups": [group | sizes for group in data["expert_groups"]],
        "image": {
            "first_token_id": 4,
            "num_codes": 16,
            "tokens_per_image": 4,
            "grid": [2, 2],
            "begin_token_id": 21,
            "end_token_id": 20,
        },
    }
    if data.get("depth_routing"):
        data["depth_routing"] = data["depth_routing"] | {"aux_hidden_size": 16}
    return ModelConfig.from_dict(data)


def tiny_parts(preset: str, image_tokens: int, config: EngineConfig) -> ModelParts:
    """As `engine_setup.preset_parts`, of a tiny model in float32."""
    model_config = with_image_tokens(tiny(preset), image_tokens)
    device = torch.device(DEVICE)
    return ModelParts(
        model=random_model(model_config, seed=0, dtype=torch.float32, device=device),
        processor=Processor(GrammarSpec.from_config(model_config)),
        name=preset,
        dtype=torch.float32,
        device=device,
    )
