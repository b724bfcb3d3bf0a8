"""Whole steps without a scheduler: a shallow model, requests of random tokens, plans by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve.models.random_weights import ordinary_token_ids
from momaserve.request import Request, TokenSequence
from momaserve.runner.backends import Backend, lay_out_step
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.routing_recorder import RoutingCounts, RoutingRecorder
from momaserve.sampling import SamplingParams
from momaserve_bench.gpu.inputs import Inputs

BLOCK_SIZE = 16
KINDS = ("text", "image", "mixed")
"""What the rows of a decoding step are."""


def shallow(preset: str, num_layers: int) -> ModelConfig:
    """A preset with fewer layers; of one with depth routing every other layer keeps it."""
    data = preset_config(preset).to_dict() | {"num_hidden_layers": num_layers}
    depth = data.get("depth_routing")
    if depth is not None:
        layers = list(range(0, num_layers, 2))
        cut = {"layers": layers, "capacity": depth["capacity"][: len(layers)]}
        data["depth_routing"] = depth | cut
    return ModelConfig.from_dict(data)


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of one sequence in a step."""

    request: int
    start: int
    count: int


class Sequences:
    """Requests of random tokens, each with blocks of its own for all of them.

    Blocks of tokens come first, blocks of what depth-routed layers keep behind them.
    """

    def __init__(self, config: ModelConfig, requests: Sequence[Request], num_tokens: int) -> None:
        """
        Args:
            num_tokens: most of one request.
        """
        self.config = config
        self.by_id = {request.request_id: request for request in requests}
        self._names = list(self.by_id)
        self._blocks = -(-num_tokens // BLOCK_SIZE)
        depth = config.depth_routing
        num_routed = 0 if depth is None else len(depth.layers)
        num_plain = max(1, config.num_hidden_layers - num_routed)
        self._num_routed = num_routed
        self._entry_blocks = -(-num_tokens * num_routed // (BLOCK_SIZE * num_plain))

    @property
    def num_blocks(self) -> int:
        """What a `KVStorage` must have."""
        return len(self._names) * (self._blocks + self._entry_blocks)

    def plan(self, parts: Sequence[Part], num_entries: Mapping[str, int]) -> StepPlan:
        """
        Args:
            num_entries: of each request so far, in depth-routed layers.
        """
        count, sequences = len(self._names), []
        for part in parts:
            name = self._names[part.request]
            first = count * self._blocks + part.request
            entries = num_entries.get(name, 0)
            sequences.append(
                PlannedSequence(
                    request_id=name,
                    companion=OWN,
                    start=part.start,
                    num_new_tokens=part.count,
                    blocks=range(part.request, count * self._blocks, count),
                    entry_blocks=range(first, self.num_blocks, count),
                    num_entries=entries,
                    max_num_entries=entries + self._num_routed * part.count,
                )
            )
        return StepPlan(sequences=tuple(sequences), num_tokens=sum(part.count for part in parts))

    def storage(self, dtype: torch.dtype, device: torch.device) -> KVStorage:
        return KVStorage(
            self.config,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=device,
        )


def make_request(
    name: str,
    token_ids: Sequence[int],
    num_prompt: int,
    routing: RoutingPolicy = RoutingPolicy.CAUSAL,
    prompt_routing: RoutingPolicy | None = None,
) -> Request:
    sequence = TokenSequence(
        token_ids=[*token_ids],
        num_prompt_tokens=num_prompt,
        routing=routing,
        prompt_routing=prompt_routing or routing,
    )
    return Request(
        request_id=name,
        sequence=sequence,
        params=SamplingParams(),
        seed=0,
        max_num_tokens=len(token_ids) + 1,
    )


def random_ids(inputs: Inputs, config: ModelConfig, modalities: Sequence[Modality]) -> list[int]:
    """An ordinary token of each of these modalities."""
    pools = [ordinary_token_ids(config, modality) for modality in Modality]
    drawn = inputs.uniform(len(modalities)).tolist()
    return [
        int(pools[modality][int(number * len(pools[modality]))])
        for modality, number in zip(modalities, drawn, strict=True)
    ]


def decoding(
    inputs: Inputs, config: ModelConfig, kind: str, lengths: Sequence[int]
) -> tuple[Sequences, StepPlan]:
    """A step in which each sequence computes the last of `lengths` tokens, of one of KINDS; in a
    mixed one every other is a code."""
    requests: list[Request] = []
    for row, length in enumerate(lengths):
        is_code = kind == "image" or (kind == "mixed" and row % 2 == 1)
        modality = Modality.IMAGE if is_code else Modality.TEXT
        ids = random_ids(inputs, config, [modality] * length)
        requests.append(make_request(f"r{row}", ids, length - 1))
    sequences = Sequences(config, requests, max(lengths) + 1)
    parts = [Part(row, length - 1, 1) for row, length in enumerate(lengths)]
    return sequences, sequences.plan(parts, {})


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a backend made of a step."""

    hidden: Tensor
    logits: Tensor
    """float32, of each sequence's last row."""
    counts: RoutingCounts
    """Groups of a layer that no token came to are left out: kernels do not tell of them."""


def run_steps(
    backend: Backend,
    sequences: Sequences,
    storage: KVStorage,
    steps: Sequence[Sequence[Part]],
) -> list[StepOutput]:
    """One step after another on the same KV memory."""
    config, num_entries = sequences.config, dict.fromkeys(sequences.by_id, 0)
    outputs: list[StepOutput] = []
    for parts in steps:
        plan = sequences.plan(parts, num_entries)
        recorder = RoutingRecorder()
        batch, entries = lay_out_step(
            backend, plan, sequences.by_id, config, storage, recorder, {}, {}
        )
        hidden = backend.forward(plan, batch, entries)
        if entries is not None:
            entries.finish()
            for (name, _), count in entries.by_name().items():
                num_entries[name] = int(count)
        last = torch.tensor([part.count for part in parts]).cumsum(0) - 1
        logits = backend.logits(hidden[last.to(hidden.device)], range(config.vocab_size))
        counts = _without_idle(recorder.counts())
        outputs.append(StepOutput(hidden.clone(), logits, counts))
    return outputs


def _without_idle(counts: RoutingCounts) -> RoutingCounts:
    seen = {(layer, group) for layer, group, tokens in counts.group_tokens if tokens}
    return replace(
        counts,
        expert_tokens=tuple(one for one in counts.expert_tokens if one[:2] in seen),
        group_tokens=tuple(one for one in counts.group_tokens if one[:2] in seen),
    )
