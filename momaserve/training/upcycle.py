"""Sparse upcycling: one expert per modality becomes several (MoMa, 2407.21770, section 2.5).

Each expert of a modality starts as a copy of that modality's only one, under routers that are
new. What holds before any step: the output of a group is that of the seed's expert times the sum
of the affinities that selected it. In post-norm order the norm behind it takes the factor away,
so a token with at least one expert leaves the layer as it would leave the seed's (up to the
norm's epsilon), and one without passes unchanged; in pre-norm order the factor stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from momaserve.errors import DataError
from momaserve.layers.block import Block
from momaserve.layers.experts import ExpertGroup
from momaserve.models.config import ExpertGroupConfig, ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model
from momaserve.training.start import CPU, Start, check_same, drop_serving_routers, origin_of

MAY_DIFFER = ("expert_groups", "max_position_embeddings")


def check_upcyclable(seed: ModelConfig, config: ModelConfig, checkpoint: Path) -> None:
    """Raises DataError unless `seed` has one expert per modality and `config` only adds some."""
    if any(len(group.modalities) != 1 or group.num_experts != 1 for group in seed.expert_groups):
        shown = ", ".join(_in_words(group) for group in seed.expert_groups)
        raise DataError(
            f"{checkpoint} cannot be upcycled: the seed must have exactly one expert for each "
            f"modality (1t1i), it has {shown}"
        )
    check_same(seed, config, checkpoint, MAY_DIFFER)
    sizes = {group.modalities: group.intermediate_size for group in seed.expert_groups}
    for group in config.expert_groups:
        if sizes.get(group.modalities) != group.intermediate_size:
            raise DataError(
                f"{checkpoint} cannot be upcycled: the recipe wants {_in_words(group)} of "
                f"intermediate_size {group.intermediate_size}, the seed has "
                f"{sizes.get(group.modalities)} for that modality"
            )


def _in_words(group: ExpertGroupConfig) -> str:
    served = "+".join(modality.label for modality in group.modalities)
    return f"{group.num_experts} x {served}"


def upcycled(seed: MomaModel, config: ModelConfig, router_seed: int) -> MomaModel:
    """A float32 model of shape `config` made of a seed that `check_upcyclable` let through."""
    model = MomaModel(config, torch.float32)
    drop_serving_routers(model)
    shared = {
        name: tensor for name, tensor in seed.state_dict().items() if ".experts.groups." not in name
    }
    with torch.no_grad():
        missing = model.load_state_dict(shared, strict=False).missing_keys
        filled: list[str] = []
        generator = torch.Generator().manual_seed(router_seed)
        for layer, (block, old) in enumerate(zip(model.blocks, seed.blocks, strict=True)):
            singles = {group.modalities: group for group in _groups(old)}
            for index, group in enumerate(_groups(block)):
                single = singles[group.modalities]
                names = ["gate_proj", "up_proj", "down_proj"]
                for name in names:
                    copies = getattr(group, name)
                    copies.copy_(getattr(single, name).expand_as(copies))
                if group.router is not None:
                    std = config.hidden_size**-0.5
                    group.router.weight.normal_(0.0, std, generator=generator)
                    names.append("router.weight")
                filled += [f"blocks.{layer}.experts.groups.{index}.{name}" for name in names]
    assert sorted(missing) == sorted(filled), "every tensor is copied or drawn"
    model.set_rope(config.max_position_embeddings)
    return model


def _groups(block: Any) -> list[ExpertGroup]:
    assert isinstance(block, Block)
    return [group for group in block.experts.groups if isinstance(group, ExpertGroup)]


def start_upcycled(checkpoint: Path, config: ModelConfig, router_seed: int) -> Start:
    """Begin with an upcycled checkpoint.

    Raises:
        CheckpointError: it cannot be read.
        DataError: it is no seed for `config`.
    """
    seed_config = ModelConfig.load(checkpoint)
    check_upcyclable(seed_config, config, checkpoint)
    seed = load_model(checkpoint, seed_config, dtype=torch.float32, device=CPU)
    drop_serving_routers(seed)
    return Start(upcycled(seed, config, router_seed), {**origin_of(checkpoint), "upcycled": True})
