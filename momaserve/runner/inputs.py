"""From a step plan to the batch that the model reads. Pure layout, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class HostRows:
    """The rows of a step as the host knows them, in the plan's order."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    policies: list[int] = field(default_factory=list)
    """Codes of POLICY_CODES."""
    segments: list[int] = field(default_factory=list)
    """The expert-choice scope of each row, or -1."""
    num_segments: int = 0
    present: set[RoutingPolicy] = field(default_factory=set)
    unknown: list[tuple[int, str]] = field(default_factory=list)
    """Rows whose tokens only the device knows, with their requests."""


def host_rows(plan: StepPlan, requests: Mapping[str, Request], config: ModelConfig) -> HostRows:
    """Tokens, positions and routing of a step's rows; unknown tokens are padding so far."""
    rows = HostRows()
    for planned in plan.sequences:
        sequence = sequence_of(planned, requests)
        start, count = planned.start, planned.num_new_tokens
        stop = start + count
        rows.token_ids += sequence.token_ids[start:stop]
        rows.positions += range(start, stop)
        if stop > sequence.num_tokens:
            assert stop == sequence.num_tokens + 1
            rows.unknown.append((len(rows.token_ids), planned.request_id))
            rows.token_ids.append(config.pad_token_id)
        num_prompt = min(max(sequence.num_prompt_tokens - start, 0), count)
        num_generated = count - num_prompt
        rows.policies += [POLICY_CODES[sequence.prompt_routing]] * num_prompt
        rows.policies += [POLICY_CODES[sequence.routing]] * num_generated
        scope = -1
        if num_prompt:
            rows.present.add(sequence.prompt_routing)
            if sequence.prompt_routing is RoutingPolicy.EXPERT_CHOICE:
                scope = rows.num_segments
                rows.num_segments += 1
        if num_generated:
            rows.present.add(sequence.routing)
        rows.segments += [scope] * num_prompt + [-1] * num_generated
    return rows


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
    rows = host_rows(plan, requests, config)
    modality = modalities_of(rows.token_ids, config)
    ids = torch.tensor(rows.token_ids, dtype=torch.int64, device=device)
    kinds = torch.tensor(modality, dtype=torch.int8, device=device)
    modalities = frozenset(Modality(m) for m in set(modality))
    if rows.unknown:
        assert sampling is not None
        index = torch.tensor([row for row, _ in rows.unknown], device=device)
        ids[index] = torch.cat([sampling[name] for _, name in rows.unknown])
        kinds = device_modalities(ids, config)
        modalities = frozenset(Modality)
    return ForwardBatch(
        token_ids=ids,
        positions=torch.tensor(rows.positions, dtype=torch.int64, device=device),
        modality=kinds,
        modalities=modalities,
        routing=RoutingPlan(
            policies=frozenset(rows.present),
            policy=torch.tensor(rows.policies, dtype=torch.int8, device=device),
            segments=torch.tensor(rows.segments, dtype=torch.int64, device=device),
            num_segments=rows.num_segments,
        ),
        observer=observer,
    )


def modalities_of(token_ids: Sequence[int], config: ModelConfig) -> list[int]:
    """Values of Modality."""
    image = config.image
    if image is None:
        return [int(Modality.TEXT)] * len(token_ids)
    first, stop = image.first_token_id, image.stop_token_id
    text, picture = int(Modality.TEXT), int(Modality.IMAGE)
    return [picture if first <= token < stop else text for token in token_ids]


def device_modalities(token_ids: Tensor, config: ModelConfig) -> Tensor:
    """The same for ids that only the device knows."""
    image = config.image
    if image is None:
        return torch.full_like(token_ids, int(Modality.TEXT), dtype=torch.int8)
    is_image = (token_ids >= image.first_token_id) & (token_ids < image.stop_token_id)
    return torch.where(is_image, int(Modality.IMAGE), int(Modality.TEXT)).to(torch.int8)
