"""Seeded random weights that route at a trained model's rates: models without a checkpoint.

Plain random routers select about half of all pairs, and random attention makes the hidden states
of a sequence drift together, so that cuts fitted on some sequences miss on others. Here the first
quarter of the residual stream is a routing code instead. The embedding writes it, no layer adds
to it (those rows of `o_proj` and `down_proj` are zero), and routers read nothing else. What a
router decides is thus a function of the token id alone, in any context, and its cut is a quantile
over the whole vocabulary: exact, with no forward pass. Coordinate 0 of the code is the same for
all ids and carries the cut, for routers have no bias; a cut made so survives the factor by which
an RMSNorm before the router scales each token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momaserve.errors import ConfigError
from momaserve.layers.attention import HeadNorm
from momaserve.layers.block import Block, RMSNorm
from momaserve.layers.experts import ExpertGroup
from momaserve.layers.routing import Router
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel

_CODE_SHARE = 4
"""The code has D / 4 coordinates."""
_LOGIT_STD = 2.0
_SHARED = 0.4
"""Correlation of the experts' logits: about 44 % of tokens get none of 4 experts, as measured."""


class RoutingRates:
    """Counts what a forward pass selects; a `RoutingObserver`. Waits for no device until read."""

    def __init__(self) -> None:
        self._experts: dict[str, Tensor] = {}
        self._depth: dict[int, Tensor] = {}

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        counts = torch.stack((selected.sum(), eligible.sum()))
        self._experts[group] = self._experts.get(group, torch.zeros_like(counts)) + counts

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        counts = torch.stack(((taken & eligible).sum(), eligible.sum()))
        self._depth[layer] = self._depth.get(layer, torch.zeros_like(counts)) + counts

    @property
    def experts_per_token(self) -> dict[str, float]:
        """Mean experts per token of each group that met a token, over all layers."""
        return {name: _ratio(counts) for name, counts in self._experts.items() if counts[1] > 0}

    @property
    def depth_rates(self) -> dict[int, float]:
        """Share of its tokens that each depth-routed layer took."""
        return {layer: _ratio(counts) for layer, counts in self._depth.items() if counts[1] > 0}


def _ratio(counts: Tensor) -> float:
    chosen, eligible = counts.tolist()
    return float(chosen / eligible)


def ordinary_token_ids(config: ModelConfig, modality: Modality) -> Tensor:
    """Ids of a modality without bos, pad, eos and image markers: int64, increasing.

    Random prompts are drawn from these, and the rates of `random_model` hold over them.
    """
    ids = torch.arange(config.vocab_size)
    is_image = torch.zeros_like(ids, dtype=torch.bool)
    special = [config.bos_token_id, config.pad_token_id, config.eos_token_id]
    if config.image is not None:
        is_image[config.image.first_token_id : config.image.stop_token_id] = True
        special += [config.image.begin_token_id, config.image.end_token_id]
    if modality is Modality.IMAGE:
        return ids[is_image]
    is_image[special] = True
    return ids[~is_image]


def random_model(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, device: torch.device
) -> MomaModel:
    """A model of seeded random weights whose routers select at the rates of a trained one.

    Over uniformly drawn `ordinary_token_ids`, under `causal` and `calibrated` alike, a token has
    one expert on average in each group and a depth-routed layer takes its capacity. Text and
    image tokens count alike where a router serves both. Greedy loops repeat few ids, so they do
    not show these rates. The weights are a function of the arguments, the device's type included.

    Args:
        dtype: of all weights but the routers', which are float32.

    Raises:
        ConfigError: a hidden size too small for a code, or an auxiliary router with fewer hidden
            units than outputs.
    """
    code_size = max(2, config.hidden_size // _CODE_SHARE)
    if code_size > config.hidden_size // 2:
        raise ConfigError(
            f"random weights need a hidden_size of at least 4, got {config.hidden_size}"
        )
    with torch.device("meta"):
        model = MomaModel(config, dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        _fill(model, code_size, generator)
        code = _RoutingCode(model, code_size)
        for block in model.blocks:
            assert isinstance(block, Block)
            code.set_routers(block, generator)
    model.set_rope(config.max_position_embeddings)
    return model.requires_grad_(False).eval()


def _fill(model: MomaModel, code_size: int, generator: torch.Generator) -> None:
    """Normal weights with std 1 / sqrt(fan-in), norms at identity, nothing written to the code."""
    for module in model.modules():
        if isinstance(module, RMSNorm | HeadNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, HeadNorm):
            nn.init.zeros_(module.bias)
    head = model.config.hidden_size**-0.5
    std = 1.0 if model.lm_head is not None else head
    model.embed_tokens.normal_(0.0, std, generator=generator)
    model.embed_tokens[:, 0] = std
    if model.lm_head is not None:
        model.lm_head.normal_(0.0, head, generator=generator)
    for block in model.blocks:
        assert isinstance(block, Block)
        attention = block.self_attn
        weights: list[Tensor] = [
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
        ]
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            weights += [group.gate_proj, group.up_proj, group.down_proj]
        for weight in weights:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        attention.o_proj.weight[:code_size] = 0
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            group.down_proj[:, :code_size] = 0


class _RoutingCode:
    """The routing codes of all ordinary ids, and how routers are cut to size over them.

    `weight` is the frequency of each id: every modality has half of the tokens, spread evenly.
    """

    def __init__(self, model: MomaModel, size: int) -> None:
        ids = [ordinary_token_ids(model.config, modality) for modality in Modality]
        if not len(ids[Modality.TEXT]):  # a vocabulary of control tokens alone
            ids[Modality.TEXT] = torch.tensor([model.config.eos_token_id])
        device = model.embed_tokens.device
        counts = torch.tensor([len(part) for part in ids])
        modality = torch.arange(len(ids)).repeat_interleave(counts)
        self.size = size
        self.modality = modality.to(device)
        self.weight = (1.0 / counts.double())[modality].to(device)
        self.values = model.embed_tokens[torch.cat(ids).to(device), :size].float()  # [P, R]
        self.std = float(model.embed_tokens[0, 0])

    def _of(self, modalities: tuple[Modality, ...]) -> Tensor:
        mask = torch.zeros_like(self.modality, dtype=torch.bool)
        for modality in modalities:
            mask |= self.modality == int(modality)
        return mask

    def set_routers(self, block: Block, generator: torch.Generator) -> None:
        """Fill the routers of a block: depth first, for experts share only what it takes."""
        taken = torch.ones_like(self.modality, dtype=torch.bool)
        depth = block.depth_router
        if depth is not None:
            routed = self._of(depth.modalities)
            assert depth.router.capacity is not None
            selected = self._set(depth.router, routed, depth.router.capacity, generator)
            taken = ~routed | selected.squeeze(1)
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            if group.router is not None:
                mask = self._of(group.modalities)
                eligible = mask & taken if bool((mask & taken).any()) else mask
                self._set(group.router, eligible, 1 / len(group.router.weight), generator)

    def _set(
        self, router: Router, eligible: Tensor, rate: float, generator: torch.Generator
    ) -> Tensor:
        """Each output of `router` selects the share `rate` of the eligible ids.

        Returns:
            bool [P, E], what it selects.
        """
        num_outputs, hidden_size = router.weight.shape
        assert router.aux is not None
        assert router.threshold_logits is not None
        first, second = router.aux.fc1.weight, router.aux.fc2.weight
        if len(first) < num_outputs:
            raise ConfigError(
                f"random routers need an aux_hidden_size of at least their {num_outputs} outputs, "
                f"got {len(first)}"
            )
        device = router.weight.device
        drawn = torch.randn(num_outputs + 1, self.size - 1, generator=generator, device=device)
        directions = _SHARED**0.5 * drawn[:1] + (1 - _SHARED) ** 0.5 * drawn[1:]
        directions *= _LOGIT_STD / self.std / directions.norm(dim=1, keepdim=True)
        logits = self.values[:, 1:] @ directions.T  # [P, E]
        cuts = torch.tensor(_cuts(logits, eligible, self.weight, rate), device=device)
        router.weight.zero_()
        router.weight[:, 1 : self.size] = directions
        router.weight[:, 0] = -cuts / self.std
        router.threshold_logits.zero_()
        # silu keeps the sign, so the auxiliary router decides as the main one with a hidden unit
        # for each output; the others cost what they always do and change nothing.
        first.normal_(0.0, hidden_size**-0.5, generator=generator)
        first[:num_outputs] = router.weight
        second.zero_()
        second.fill_diagonal_(1.0)
        selected: Tensor = logits > cuts
        return selected


def _cuts(logits: Tensor, eligible: Tensor, weight: Tensor, rate: float) -> list[float]:
    """For each column the logit above which the share `rate` of the eligible ids lies.

    Few ids cannot be split at any share: what one column takes too much, the next takes less.

    Args:
        logits: [P, E].
        eligible: bool [P].
        weight: float64 [P], frequency of each id.
    """
    rows = eligible.nonzero().squeeze(1)
    if not len(rows):
        return [0.0] * logits.shape[1]
    share = weight[rows] / weight[rows].sum()
    cuts: list[float] = []
    surplus = 0.0
    for column in logits[rows].T:
        best, order = column.sort(descending=True)
        reached = share[order].cumsum(0)
        target = rate - surplus
        count = int((reached - target).abs().argmin()) + 1
        surplus = float(reached[count - 1]) - target
        below = best[count] if count < len(best) else best[-1] - 2.0
        cuts.append(float((best[count - 1] + below) / 2))
    return cuts
