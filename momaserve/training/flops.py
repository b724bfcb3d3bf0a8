"""What a training step costs: forward and backward are three times the forward.

The formula is `momaserve.models.info`'s. All tokens of the rows count, padding too, as if an
expert took it (expert choice passes it over), so that architectures on equal rows compare; the
head counts for learnt tokens, the only ones it computes. Routers count, auxiliary ones do not
exist yet. Attention counts the visible pairs within documents.
"""

from __future__ import annotations

from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.info import forward_flops
from momaserve.training.forward import modalities_of
from momaserve.training.packing import PackedRows

TRAINING_FACTOR = 3
"""Backward costs two forwards: a product for the inputs' gradient and one for the weights'."""


def step_flops(config: ModelConfig, rows: PackedRows) -> int:
    """FLOPs of forward and backward over packed rows; the optimizer's are left out."""
    visible = rows.num_visible()
    modality = modalities_of(config, rows.token_ids)
    num_tokens: dict[Modality, int] = {}
    num_visible: dict[Modality, int] = {}
    for each in Modality:
        mine = modality == int(each)
        num_tokens[each] = int(mine.sum())
        num_visible[each] = int(visible[mine].sum())
    return TRAINING_FACTOR * forward_flops(
        config,
        num_tokens=num_tokens,
        num_visible=num_visible,
        num_logits=int((rows.targets >= 0).sum()),
    )
