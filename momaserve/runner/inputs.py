"""From a step plan to the batch that the model reads. Pure layout, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from momaserve.config import RoutingPolicy
from momaserve.core.plan import StepPlan
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingObserver, RoutingPlan
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.request import Request
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.paged_attention import PagedAttention


def build_batch(
    plan: StepPlan,
    requests: Mapping[str, Request],
    config: ModelConfig,
    storage: KVStorage,
    observer: RoutingObserver | None,
) -> ForwardBatch:
    """The forward batch of a step; row order is the plan's."""
    token_ids: list[int] = []
    positions: list[int] = []
    policies: list[int] = []
    segments: list[int] = []
    present: set[RoutingPolicy] = set()
    num_segments = 0
    for planned in plan.requests:
        request = requests[planned.request_id]
        stop = planned.start + planned.num_new_tokens
        token_ids += request.tokens(planned.start, stop)
        positions += range(planned.start, stop)
        num_prompt = max(0, min(stop, request.num_prompt_tokens) - planned.start)
        num_generated = planned.num_new_tokens - num_prompt
        policies += [POLICY_CODES[request.prompt_routing]] * num_prompt
        policies += [POLICY_CODES[request.routing]] * num_generated
        scope = -1
        if num_prompt:
            present.add(request.prompt_routing)
            if request.prompt_routing is RoutingPolicy.EXPERT_CHOICE:
                scope = num_segments
                num_segments += 1
        if num_generated:
            present.add(request.routing)
        segments += [scope] * num_prompt + [-1] * num_generated
    modality = _modalities(token_ids, config)
    device = storage.k.device
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        modality=torch.tensor(modality, dtype=torch.int8, device=device),
        modalities=frozenset(Modality(m) for m in set(modality)),
        routing=RoutingPlan(
            policies=frozenset(present),
            policy=torch.tensor(policies, dtype=torch.int8, device=device),
            segments=torch.tensor(segments, dtype=torch.int64, device=device),
            num_segments=num_segments,
        ),
        attention=PagedAttention(plan, storage),
        observer=observer,
    )


def _modalities(token_ids: Sequence[int], config: ModelConfig) -> list[int]:
    image = config.image
    if image is None:
        return [int(Modality.TEXT)] * len(token_ids)
    first, stop = image.first_token_id, image.stop_token_id
    text, picture = int(Modality.TEXT), int(Modality.IMAGE)
    return [picture if first <= token < stop else text for token in token_ids]
