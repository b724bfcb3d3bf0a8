"""Presets have the paper's shapes: their parameter counts are those of its Table 1."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.presets import PRESET_NAMES, preset_config
from momaserve.models.weights import tensor_specs


def main_parameters(config: ModelConfig) -> int:
    """Parameters without auxiliary routers and thresholds, which the paper leaves out."""
    specs = tensor_specs(config).values()
    return sum(prod(spec.shape) for spec in specs if not spec.is_optional)


def test_names() -> None:
    plain = [
        f"moma-{size}-{experts}"
        for size in ("90m", "435m", "1.4b")
        for experts in ("dense", "moe-8x", "1t1i", "4t4i")
    ]
    deep = [
        f"moma-mod-{size}-{experts}"
        for size in ("110m", "635m", "2.3b")
        for experts in ("1t1i", "4t4i")
    ]
    assert list(PRESET_NAMES) == plain + deep


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("moma-90m-dense", 92.3),
        ("moma-90m-moe-8x", 209.7),
        ("moma-90m-4t4i", 209.7),
        ("moma-435m-dense", 436.2),
        ("moma-435m-moe-8x", 1845),
        ("moma-435m-4t4i", 1845),
        ("moma-1.4b-dense", 1476),
        ("moma-1.4b-moe-8x", 7113),
        ("moma-1.4b-4t4i", 7113),
        ("moma-mod-110m-4t4i", 316.6),
        ("moma-mod-635m-4t4i", 2986),
        ("moma-mod-2.3b-4t4i", 11850),
    ],
)
def test_parameters_are_those_of_table_1(name: str, millions: float) -> None:
    assert main_parameters(preset_config(name)) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(("size", "millions"), [("110m", 111.1), ("635m", 637.5), ("2.3b", 2340)])
def test_depth_routed_models_without_modality_experts(size: str, millions: float) -> None:
    # The paper counts these with one expert for both modalities, which is no preset.
    config = preset_config(f"moma-mod-{size}-1t1i")
    shared = replace(config.expert_groups[0], name="all", modalities=tuple(Modality))
    config = replace(config, expert_groups=(shared,))
    assert main_parameters(config) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_shapes(name: str) -> None:
    config = preset_config(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert config.image is not None
    assert (config.image.tokens_per_image, config.image.num_codes) == (1024, 8192)
    inner = {group.intermediate_size for group in config.expert_groups}
    assert inner == {8 * config.hidden_size // 3}
    if name.startswith("moma-mod-"):
        assert config.depth_routing is not None
        assert config.depth_routing.layers == tuple(range(0, config.num_hidden_layers, 2))
        assert set(config.depth_routing.capacity) == {0.25}
    else:
        assert config.depth_routing is None


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'moma-7b'; there are moma-90m-dense, "):
        preset_config("moma-7b")
