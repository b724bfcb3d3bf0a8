"""When enough was gathered: expert choice is over a batch, and of a handful it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.router_lab.policies import DEPTH
from momaserve.router_lab.shadow.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRule:
    """When gathered samples are scored."""

    num_tokens: int = 2048
    """As soon as there are so many, with enough for every kind of router that meets any."""
    min_tokens: int = 256
    """Enough for a kind of router; with fewer it is left out of the batch's numbers."""
    max_wait_s: float = 30.0
    """Or so long after the first, if there is enough for every kind by then."""
    max_num_tokens: int = 8192
    """Or when so many were gathered, though some kind has too few."""
    max_scarce_wait_s: float = 300.0
    """Or so long after the first, if there is enough for one kind at least."""

    def ready_after_s(self, num_tokens: int, by_kind: Mapping[str, int]) -> float | None:
        """How long after the first sample such a batch is scored; None: never, it needs more."""
        met = [count for count in by_kind.values() if count]
        if not any(count >= self.min_tokens for count in met):
            return None
        if all(count >= self.min_tokens for count in met):
            return 0.0 if num_tokens >= self.num_tokens else self.max_wait_s
        return 0.0 if num_tokens >= self.max_num_tokens else self.max_scarce_wait_s


def scopes(config: ModelConfig) -> dict[str, tuple[Modality, ...]]:
    """Modalities among whose tokens each kind of router chooses: expert groups, and DEPTH.

    Groups of one expert have no router and are not here.
    """
    found = {
        group.name: group.modalities for group in config.expert_groups if group.num_experts > 1
    }
    if config.depth_routing is not None:
        found[DEPTH] = config.depth_routing.modalities
    return found


def modality_counts(config: ModelConfig, sample: Sample) -> dict[Modality, int]:
    """Tokens of a sample by modality, all of them named."""
    num_images = 0
    if config.image is not None:
        ids, image = sample.token_ids, config.image
        inside = (ids >= image.first_token_id) & (ids < image.stop_token_id)
        num_images = int(np.count_nonzero(inside))
    return {Modality.TEXT: sample.num_tokens - num_images, Modality.IMAGE: num_images}


class Gathered:
    """Samples of the batch to come."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._scopes = scopes(config)
        self.samples: list[Sample] = []
        self.by_modality: dict[Modality, int] = dict.fromkeys(Modality, 0)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        for modality, count in modality_counts(self._config, sample).items():
            self.by_modality[modality] += count

    @property
    def num_tokens(self) -> int:
        return sum(self.by_modality.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Tokens that the routers of each kind choose among."""
        return {
            kind: sum(self.by_modality[modality] for modality in modalities)
            for kind, modalities in self._scopes.items()
        }
