"""`config.json` of a checkpoint: the shape of a MoMa model. Knows no torch.

Letters used in shapes across the repository: T tokens, D hidden size, H query heads, G kv heads,
K head dim, F expert hidden size, E experts in a group, V vocabulary, L layers, N tokens per image.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from momaserve.errors import CheckpointError
from momaserve.modality import Modality

FORMAT_VERSION = 1
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MAX_LAYERS = 10_000
"""Far above any model; a wrong number must not keep the loader counting for hours."""
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(f"config.json: {message}")


def _checked_keys(cls: type, data: object, where: str, optional: frozenset[str]) -> dict[str, Any]:
    """Raises CheckpointError unless `data` is an object with exactly the fields of `cls`."""
    _require(isinstance(data, Mapping), f"{where} must be an object, got {type(data).__name__}")
    assert isinstance(data, Mapping)
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    _require(not unknown, f"unknown keys in {where}: {unknown}")
    missing = sorted(known - set(data) - optional)
    _require(not missing, f"missing keys in {where}: {missing}")
    return dict(data)


def _check_ints(values: Mapping[str, object], minimum: int, where: str) -> None:
    for name, value in values.items():
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        _require(ok, f"{where}{name} must be an integer of at least {minimum}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Where pictures live in the vocabulary and how many tokens make one."""

    first_token_id: int
    num_codes: int
    tokens_per_image: int
    grid: tuple[int, int]
    """Rows and columns of codes; their product is `tokens_per_image`."""
    begin_token_id: int
    end_token_id: int

    @classmethod
    def from_dict(cls, data: object) -> ImageConfig:
        values = _checked_keys(cls, data, "image", frozenset())
        grid = values.pop("grid")
        _check_ints({k: v for k, v in values.items() if not k.endswith("_id")}, 1, "image.")
        _check_ints({k: v for k, v in values.items() if k.endswith("_id")}, 0, "image.")
        ok = (
            isinstance(grid, list)
            and len(grid) == 2
            and all(type(side) is int and side > 0 for side in grid)
        )
        _require(
            ok and math.prod(grid) == values["tokens_per_image"],
            "image.grid must be two positive integers whose product is tokens_per_image "
            f"{values['tokens_per_image']}, got {grid!r}",
        )
        return cls(grid=(grid[0], grid[1]), **values)

    @property
    def stop_token_id(self) -> int:
        """One past the last image id."""
        return self.first_token_id + self.num_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroupConfig:
    """`num_experts` experts that serve a set of modalities."""

    name: str
    modalities: tuple[Modality, ...]
    num_experts: int
    intermediate_size: int
    aux_hidden_size: int
    """Hidden size of the auxiliary router; unused when there is one expert."""

    @classmethod
    def from_dict(cls, data: object, hidden_size: int) -> ExpertGroupConfig:
        values = _checked_keys(cls, data, "expert_groups", frozenset({"aux_hidden_size"}))
        name, labels = values.pop("name"), values.pop("modalities")
        _require(
            isinstance(name, str) and _GROUP_NAME.fullmatch(name) is not None,
            f"expert group name must match {_GROUP_NAME.pattern}, got {name!r}",
        )
        if values["num_experts"] == 1 and not values.get("aux_hidden_size"):
            values.pop("aux_hidden_size", None)  # unused, so null and 0 mean the default too
        values.setdefault("aux_hidden_size", max(1, hidden_size // 2))
        _check_ints(values, 1, f"expert_groups[{name}].")
        return cls(name=name, modalities=_modalities(labels, f"expert group {name}"), **values)

    @property
    def has_router(self) -> bool:
        return self.num_experts > 1


def _modalities(labels: object, where: str) -> tuple[Modality, ...]:
    known = [m.label for m in Modality]
    ok = isinstance(labels, list) and labels and all(label in known for label in labels)
    _require(bool(ok), f"modalities of {where} must be a list out of {known}, got {labels!r}")
    assert isinstance(labels, list)
    _require(len(set(labels)) == len(labels), f"modalities of {where} repeat: {labels}")
    return tuple(Modality.from_label(label) for label in labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRoutingConfig:
    """Mixture of depths: which layers route, and what share of tokens they take."""

    layers: tuple[int, ...]
    capacity: tuple[float, ...]
    """One share per routed layer, in (0, 1]."""
    aux_hidden_size: int
    modalities: tuple[Modality, ...]
    """Tokens of other modalities are always taken, with weight 1."""

    @classmethod
    def from_dict(cls, data: object, num_layers: int, hidden_size: int) -> DepthRoutingConfig:
        optional = frozenset({"modalities", "aux_hidden_size"})
        values = _checked_keys(cls, data, "depth_routing", optional)
        layers, capacity = values["layers"], values["capacity"]
        ok = isinstance(layers, list) and all(
            type(i) is int and 0 <= i < num_layers for i in layers
        )
        _require(
            ok and bool(layers) and len(layers) == len(set(layers)),
            f"depth_routing.layers must be different layer numbers below {num_layers}, "
            f"got {layers!r}",
        )
        if not isinstance(capacity, list):
            capacity = [capacity] * len(layers)
        _require(
            len(capacity) == len(layers)
            and all(type(c) in (int, float) and 0 < c <= 1 for c in capacity),
            "depth_routing.capacity must be a share in (0, 1], or one per routed layer, "
            f"got {values['capacity']!r}",
        )
        aux = values.get("aux_hidden_size", max(1, hidden_size // 2))
        _check_ints({"aux_hidden_size": aux}, 1, "depth_routing.")
        labels = values.get("modalities")
        if labels is None:
            labels = [m.label for m in Modality]
        return cls(
            layers=tuple(layers),
            capacity=tuple(float(c) for c in capacity),
            aux_hidden_size=aux,
            modalities=_modalities(labels, "depth_routing"),
        )

    def capacity_of(self, layer: int) -> float | None:
        """Share of tokens that `layer` takes; None for a layer without depth router."""
        return self.capacity[self.layers.index(layer)] if layer in self.layers else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The whole of `config.json`. Build it with `from_dict` or `load`, which check it."""

    model_type: str
    format_version: int
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_order: str
    rms_norm_eps: float
    qk_norm: bool
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    pad_token_id: int
    eos_token_id: int
    image: ImageConfig | None
    expert_groups: tuple[ExpertGroupConfig, ...]
    depth_routing: DepthRoutingConfig | None

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `config.json`. Raises CheckpointError naming what is wrong with it."""
        return cls.from_dict(read_json_object(directory / "config.json"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Raises CheckpointError for unknown or missing keys and values that cannot work."""
        values = _checked_keys(cls, data, "config", frozenset({"image", "depth_routing"}))
        _require(
            values["model_type"] == "moma",
            f"model_type must be 'moma', got {values['model_type']!r}",
        )
        version = values["format_version"]
        _require(
            type(version) is int and version == FORMAT_VERSION,
            f"format_version must be {FORMAT_VERSION}, got {version!r}",
        )
        _check_ints({name: values[name] for name in _SIZES}, 1, "")
        _require(
            values["num_hidden_layers"] <= MAX_LAYERS,
            f"num_hidden_layers must be at most {MAX_LAYERS}, got {values['num_hidden_layers']}",
        )
        for name in ("rms_norm_eps", "rope_theta"):
            value = values[name]
            ok = type(value) in (int, float) and 0 < value <= sys.float_info.max
            _require(ok, f"{name} must be a positive number, got {value!r}")
        for name in ("qk_norm", "tie_word_embeddings"):
            _require(type(values[name]) is bool, f"{name} must be a boolean, got {values[name]!r}")
        image = values.get("image")
        values["image"] = None if image is None else ImageConfig.from_dict(image)
        groups = values["expert_groups"]
        _require(
            isinstance(groups, list) and bool(groups), "expert_groups must be a non-empty list"
        )
        values["expert_groups"] = tuple(
            ExpertGroupConfig.from_dict(group, values["hidden_size"]) for group in groups
        )
        depth = values.get("depth_routing")
        values["depth_routing"] = (
            None
            if depth is None
            else DepthRoutingConfig.from_dict(
                depth, values["num_hidden_layers"], values["hidden_size"]
            )
        )
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        _require(
            self.norm_order in ("pre", "post"),
            f"norm_order must be 'pre' or 'post', got {self.norm_order!r}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}")
        names = [group.name for group in self.expert_groups]
        _require(len(set(names)) == len(names), f"expert group names repeat: {names}")
        served = [m for group in self.expert_groups for m in group.modalities]
        for modality in Modality:
            # Without pictures no token has that modality, so nobody need serve it.
            is_absent = modality is Modality.IMAGE and self.image is None
            _require(
                served.count(modality) == 1 or (is_absent and modality not in served),
                f"modality '{modality.label}' must be served by exactly one expert group, "
                f"is served by {served.count(modality)}",
            )
        specials = {
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_id,
        }
        if self.image is not None:
            image = self.image
            _require(
                image.stop_token_id <= self.vocab_size,
                f"image ids {image.first_token_id}..{image.stop_token_id - 1} do not fit into "
                f"vocab_size {self.vocab_size}",
            )
            specials["image.begin_token_id"] = image.begin_token_id
            specials["image.end_token_id"] = image.end_token_id
        for name, value in specials.items():
            ok = type(value) is int and 0 <= value < self.vocab_size
            _require(ok, f"{name} must be below vocab_size {self.vocab_size}, got {value!r}")
            if self.image is not None:
                inside = self.image.first_token_id <= value < self.image.stop_token_id
                _require(not inside, f"{name} {value} lies among the image ids")
        for marker in ("image.begin_token_id", "image.end_token_id"):
            clashes = [n for n, v in specials.items() if n != marker and v == specials.get(marker)]
            _require(not clashes, f"{marker} is also {', '.join(clashes)}: {specials.get(marker)}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @property
    def num_experts(self) -> int:
        """Experts of a layer, all groups together."""
        return sum(group.num_experts for group in self.expert_groups)

    def modality_of(self, token_id: int) -> Modality:
        image = self.image
        if image is not None and image.first_token_id <= token_id < image.stop_token_id:
            return Modality.IMAGE
        return Modality.TEXT


def _plain(value: object) -> object:
    if isinstance(value, Modality):
        return value.label
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, ImageConfig | ExpertGroupConfig | DepthRoutingConfig):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError naming the file and what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8 or not JSON
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
