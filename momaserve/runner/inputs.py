"""From a step plan to the batch that the model reads. Pure layout, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingObserver, RoutingPlan
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.request import Request, TokenSequence


def sequence_of(planned: PlannedSequence, requests: Mapping[str, Request]) -> TokenSequence:
    """The sequence that a part of a plan belongs to."""
    request = requests[planned.request_id]
    return request.sequence if planned.companion == OWN else request.companions[planned.companion]


def build_batch(
    plan: StepPlan,
    requests: Mapping[str, Request],
    config: ModelConfig,
    device: torch.device,
    observer: RoutingObserver | None,
    sampling: Mapping[str, Tensor] | None = None,
) -> ForwardBatch:
    """The forward batch of a step; row order is the plan's.

    Args:
        sampling: token ids, int64 [1], that the step in flight samples for requests whose next
            token the host does not know yet.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    policies: list[int] = []
    segments: list[int] = []
    unknown: list[tuple[int, Tensor]] = []
    present: set[RoutingPolicy] = set()
    num_segments = 0
    for planned in plan.sequences:
        sequence = sequence_of(planned, requests)
        start, count = planned.start, planned.num_new_tokens
        stop = start + count
        token_ids += sequence.token_ids[start:stop]
        positions += range(start, stop)
        if stop > sequence.num_tokens:
            assert sampling is not None and stop == sequence.num_tokens + 1
            unknown.append((len(token_ids), sampling[planned.request_id]))
            token_ids.append(config.pad_token_id)
        num_prompt = min(max(sequence.num_prompt_tokens - start, 0), count)
        num_generated = count - num_prompt
        policies += [POLICY_CODES[sequence.prompt_routing]] * num_prompt
        policies += [POLICY_CODES[sequence.routing]] * num_generated
        scope = -1
        if num_prompt:
            present.add(sequence.prompt_routing)
            if sequence.prompt_routing is RoutingPolicy.EXPERT_CHOICE:
                scope = num_segments
                num_segments += 1
        if num_generated:
            present.add(sequence.routing)
        segments += [scope] * num_prompt + [-1] * num_generated
    modality = _modalities(token_ids, config)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
    kinds = torch.tensor(modality, dtype=torch.int8, device=device)
    modalities = frozenset(Modality(m) for m in set(modality))
    if unknown:
        rows = torch.tensor([row for row, _ in unknown], device=device)
        ids[rows] = torch.cat([token for _, token in unknown])
        kinds = _device_modalities(ids, config)
        modalities = frozenset(Modality)
    return ForwardBatch(
        token_ids=ids,
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        modality=kinds,
        modalities=modalities,
        routing=RoutingPlan(
            policies=frozenset(present),
            policy=torch.tensor(policies, dtype=torch.int8, device=device),
            segments=torch.tensor(segments, dtype=torch.int64, device=device),
            num_segments=num_segments,
        ),
        observer=observer,
    )


def _modalities(token_ids: Sequence[int], config: ModelConfig) -> list[int]:
    image = config.image
    if image is None:
        return [int(Modality.TEXT)] * len(token_ids)
    first, stop = image.first_token_id, image.stop_token_id
    text, picture = int(Modality.TEXT), int(Modality.IMAGE)
    return [picture if first <= token < stop else text for token in token_ids]


def _device_modalities(token_ids: Tensor, config: ModelConfig) -> Tensor:
    """The same for ids that only the device knows."""
    image = config.image
    if image is None:
        return torch.full_like(token_ids, int(Modality.TEXT), dtype=torch.int8)
    is_image = (token_ids >= image.first_token_id) & (token_ids < image.stop_token_id)
    return torch.where(is_image, int(Modality.IMAGE), int(Modality.TEXT)).to(torch.int8)
