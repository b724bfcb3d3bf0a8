"""Runs one planned step on the device: inputs, forward pass, head, log-probabilities, sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from momaserve.core.plan import PlannedRequest, StepPlan
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.outputs import TokenLogprob
from momaserve.request import Request
from momaserve.runner.inputs import build_batch
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Sampler, SampleRow

_HEAD_ROWS = 128
"""Rows of the head computed at once for prompt log-probabilities, which bounds their memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """How the experts and depth-routed layers of one step were used."""

    expert_tokens: tuple[tuple[int, str, tuple[int, ...]], ...]
    """(layer, group, tokens per expert)."""
    experts_per_token: dict[str, tuple[int, ...]]
    """By group: (token, layer) pairs with 0, 1, ... E experts."""
    depth_tokens: tuple[tuple[int, int, int], ...]
    """(layer, taken, skipped)."""


NO_COUNTS = RoutingCounts(expert_tokens=(), experts_per_token={}, depth_tokens=())


class RoutingCounter:
    """Remembers a step's selections and counts them once, after the step."""

    def __init__(self) -> None:
        self._experts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        self._depth: list[tuple[int, Tensor, Tensor]] = []

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._experts.setdefault(group, []).append((layer, eligible, selected))

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._depth.append((layer, eligible, taken))

    def counts(self) -> RoutingCounts:
        expert_tokens: list[tuple[int, str, tuple[int, ...]]] = []
        per_token: dict[str, tuple[int, ...]] = {}
        for group, entries in self._experts.items():
            selected = torch.stack([entry[2] for entry in entries])  # [L, T, E]
            eligible = torch.stack([entry[1] for entry in entries])  # [L, T]
            num_experts = selected.shape[2]
            loads = selected.sum(1).tolist()
            expert_tokens += [
                (entry[0], group, tuple(load)) for entry, load in zip(entries, loads, strict=True)
            ]
            fanout = selected.sum(2)[eligible]
            per_token[group] = tuple(torch.bincount(fanout, minlength=num_experts + 1).tolist())
        depth: list[tuple[int, int, int]] = []
        if self._depth:
            taken = torch.stack([entry[2] for entry in self._depth]).sum(1).tolist()
            routed = torch.stack([entry[1] for entry in self._depth]).sum(1).tolist()
            depth = [
                (entry[0], took, total - took)
                for entry, took, total in zip(self._depth, taken, routed, strict=True)
            ]
        return RoutingCounts(
            expert_tokens=tuple(expert_tokens),
            experts_per_token=per_token,
            depth_tokens=tuple(depth),
        )


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a step produced, by request id."""

    sampled: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    """Entries of the prompt tokens that follow the positions computed in this step."""
    broken: set[str] = field(default_factory=set)
    """Requests whose logits are not finite."""
    routing: RoutingCounts


class Runner:
    """Owns the model, the KV memory and the sampler."""

    def __init__(self, model: MomaModel, storage: KVStorage, sampler: Sampler) -> None:
        self.model = model
        self.storage = storage
        self._sampler = sampler

    @property
    def _config(self) -> ModelConfig:
        return self.model.config

    @torch.inference_mode()
    def execute(
        self,
        plan: StepPlan,
        requests: Mapping[str, Request],
        rows: Mapping[str, SampleRow],
        *,
        count_routing: bool = True,
    ) -> StepResult:
        """Compute a step.

        Args:
            rows: how each request that gets a token is sampled.
            count_routing: whether somebody reads the routing counts; without, they are empty.
        """
        counter = RoutingCounter() if count_routing else None
        batch = build_batch(plan, requests, self._config, self.storage, counter)
        hidden = self.model(batch)  # [T, D]
        result = StepResult(routing=NO_COUNTS if counter is None else counter.counts())
        last_rows: list[int] = []
        row = 0
        for planned in plan.requests:
            request = requests[planned.request_id]
            if request.params.prompt_logprobs is not None:
                chunk = hidden[row : row + planned.num_new_tokens]
                entries = self._prompt_logprobs(planned, request, chunk)
                result.prompt_logprobs[planned.request_id] = entries
                if not all(math.isfinite(entry.logprob) for entry in entries):
                    result.broken.add(planned.request_id)
            row += planned.num_new_tokens
            if planned.request_id in rows:
                last_rows.append(row - 1)
        if rows:
            self._sample(hidden[last_rows], requests, rows, result)
        return result

    def _sample(
        self,
        hidden: Tensor,
        requests: Mapping[str, Request],
        rows: Mapping[str, SampleRow],
        result: StepResult,
    ) -> None:
        logits = self.model.logits(hidden)
        is_finite = logits.isfinite().all(-1)
        if not bool(is_finite.all()):
            healthy = [name for name, ok in zip(rows, is_finite.tolist(), strict=True) if ok]
            result.broken |= rows.keys() - set(healthy)
            rows = {name: rows[name] for name in healthy}
            logits = logits[is_finite]
        sampled = self._sampler.sample(logits, list(rows.values())) if rows else []
        result.sampled = dict(zip(rows, sampled, strict=True))
        for index, (request_id, token) in enumerate(result.sampled.items()):
            num_top = requests[request_id].params.logprobs
            if num_top is not None:
                entry = _logprobs(logits[index : index + 1], [token], num_top)
                result.logprobs[request_id] = entry[0]

    def _prompt_logprobs(
        self, planned: PlannedRequest, request: Request, hidden: Tensor
    ) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens after positions [start, start + len(hidden))."""
        last = min(planned.start + len(hidden), request.num_prompt_tokens - 1)
        targets = request.tokens(planned.start + 1, last + 1)
        entries: list[TokenLogprob] = []
        for first in range(0, len(targets), _HEAD_ROWS):
            wanted = targets[first : first + _HEAD_ROWS]
            logits = self.model.logits(hidden[first : first + len(wanted)])
            entries += _logprobs(logits, wanted, request.params.prompt_logprobs or 0)
        return entries


def _logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token per row of float32 logits [S, V]."""
    table = logits.log_softmax(-1)
    index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = table.gather(1, index).squeeze(1).tolist()
    values, ids = table.topk(min(num_top, table.shape[1]), dim=-1)
    return [
        TokenLogprob(token, value, tuple(zip(top_ids, top_values, strict=True)))
        for token, value, top_ids, top_values in zip(
            token_ids, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]
