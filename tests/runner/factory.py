"""Small pieces of a step: requests, plans and K/V memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from momaserve.config import RoutingPolicy
from momaserve.core.plan import OWN, PlannedSequence
from momaserve.models.config import ModelConfig
from momaserve.request import Request, TokenSequence
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
        sequence=TokenSequence(
            token_ids=[*prompt, *output],
            num_prompt_tokens=len(prompt),
            routing=routing,
            prompt_routing=prompt_routing or routing,
        ),
        params=SamplingParams(),
        seed=0,
        max_num_tokens=64,
    )


def make_planned(
    request_id: str, start: int, num_new_tokens: int, block_ids: Sequence[int], companion: int = OWN
) -> PlannedSequence:
    return PlannedSequence(request_id, companion, start, num_new_tokens, tuple(block_ids))


def make_storage(config: ModelConfig | None = None, **changes: Any) -> KVStorage:
    fields: dict[str, Any] = {"num_blocks": 8, "block_size": 4, "dtype": torch.float32}
    return KVStorage(config or make_config(), **fields | changes, device=CPU)
