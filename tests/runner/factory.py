"""Small pieces of a step: requests, plans and K/V memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from momaserve.config import RoutingPolicy
from momaserve.core.plan import PlannedRequest
from momaserve.models.config import ModelConfig
from momaserve.request import Request
from momaserve.runner.kv_storage import KVStorage
from momaserve.sampling import SamplingParams
from tests.models.factory import make_config

CPU = torch.device("cpu")


def make_request(
    request_id: str,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    routing: RoutingPolicy = RoutingPolicy.CAUSAL,
    prompt_routing: RoutingPolicy | None = None,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(),
        seed=0,
        routing=routing,
        prompt_routing=prompt_routing or routing,
        max_num_tokens=64,
        output_token_ids=list(output),
    )


def make_planned(
    request_id: str, start: int, num_new_tokens: int, block_ids: Sequence[int], samples: bool = True
) -> PlannedRequest:
    return PlannedRequest(
        request_id=request_id,
        start=start,
        num_new_tokens=num_new_tokens,
        block_ids=tuple(block_ids),
        samples=samples,
    )


def make_storage(config: ModelConfig | None = None, **changes: Any) -> KVStorage:
    fields: dict[str, Any] = {"num_blocks": 8, "block_size": 4, "dtype": torch.float32}
    return KVStorage(config or make_config(), **fields | changes, device=CPU)
