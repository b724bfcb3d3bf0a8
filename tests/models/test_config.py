"""`config.json`: what is read, what is written, and every refusal by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from momaserve.errors import CheckpointError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig, read_json_object
from tests.models.factory import IMAGE, config_dict, group, make_config, run_python

TEXT_AND_IMAGE = ["text", "image"]
DEPTH = {"layers": [0, 2], "capacity": 0.25, "aux_hidden_size": 5}


def refusal(data: Any) -> str:
    with pytest.raises(CheckpointError, match=r"^config\.json: ") as caught:
        ModelConfig.from_dict(data)
    return str(caught.value)


def test_fields_are_read() -> None:
    config = make_config(depth_routing=DEPTH | {"capacity": [0.5, 1]})

    assert config.image is not None
    assert config.image.grid == (2, 2)
    assert config.image.stop_token_id == 20
    words, codes = config.expert_groups
    assert (words.name, words.modalities, words.has_router) == ("words", (Modality.TEXT,), True)
    assert (codes.num_experts, codes.has_router) == (1, False)
    assert config.num_experts == 3
    assert config.depth_routing is not None
    assert config.depth_routing.modalities == (Modality.TEXT, Modality.IMAGE)
    assert [config.depth_routing.capacity_of(layer) for layer in range(3)] == [0.5, None, 1.0]
    assert [config.modality_of(i).label for i in (3, 4, 19, 20)] == [
        "text",
        "image",
        "image",
        "text",
    ]


def test_nullable_parts_may_be_left_out() -> None:
    data = config_dict(expert_groups=[group("all", TEXT_AND_IMAGE, 1)])
    del data["image"], data["depth_routing"]
    config = ModelConfig.from_dict(data)
    assert config.image is None
    assert config.depth_routing is None
    assert config.modality_of(4) is Modality.TEXT


def test_auxiliary_size_defaults_to_half_the_hidden_size() -> None:
    groups = [group("words", ["text"], 2), group("codes", ["image"], 2)]
    for item in groups:
        del item["aux_hidden_size"]
    config = make_config(expert_groups=groups, depth_routing={"layers": [1], "capacity": 0.5})
    assert [g.aux_hidden_size for g in config.expert_groups] == [8, 8]
    assert config.depth_routing is not None
    assert config.depth_routing.aux_hidden_size == 8


@pytest.mark.parametrize("size", [0, None])
def test_auxiliary_size_of_a_single_expert_is_ignored(size: int | None) -> None:
    groups = [group("all", TEXT_AND_IMAGE, 1, aux_hidden_size=size)]
    assert make_config(expert_groups=groups).expert_groups[0].num_experts == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image": None, "depth_routing": None, "rope_theta": 10000},
        {"depth_routing": DEPTH | {"capacity": [0.1, 0.2], "modalities": ["image"]}},
        {"expert_groups": [group("all", TEXT_AND_IMAGE, 8)], "norm_order": "pre"},
    ],
)
def test_what_is_written_is_read_again(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config


def test_unknown_keys_are_refused_at_every_level() -> None:
    assert "unknown keys in config: ['rope_scaling', 'z']" in refusal(
        config_dict(z=1, rope_scaling=2)
    )
    assert "unknown keys in image: ['size']" in refusal(config_dict(image=IMAGE | {"size": 1}))
    groups = [group("all", TEXT_AND_IMAGE, 1, bias=True)]
    assert "unknown keys in expert_groups: ['bias']" in refusal(config_dict(expert_groups=groups))
    depth = DEPTH | {"interval": 2}
    assert "unknown keys in depth_routing: ['interval']" in refusal(
        config_dict(depth_routing=depth)
    )


REQUIRED = sorted(set(config_dict()) - {"image", "depth_routing"})


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_named(key: str) -> None:
    data = config_dict()
    del data[key]
    assert f"missing keys in config: ['{key}']" in refusal(data)


@pytest.mark.parametrize("key", sorted(IMAGE))
def test_missing_image_keys_are_named(key: str) -> None:
    image = {name: value for name, value in IMAGE.items() if name != key}
    assert f"missing keys in image: ['{key}']" in refusal(config_dict(image=image))


@pytest.mark.parametrize("key", ["name", "modalities", "num_experts", "intermediate_size"])
def test_missing_group_keys_are_named(key: str) -> None:
    item = group("all", TEXT_AND_IMAGE, 1)
    del item[key]
    assert f"missing keys in expert_groups: ['{key}']" in refusal(config_dict(expert_groups=[item]))


@pytest.mark.parametrize("key", ["layers", "capacity"])
def test_missing_depth_keys_are_named(key: str) -> None:
    depth = {name: value for name, value in DEPTH.items() if name != key}
    assert f"missing keys in depth_routing: ['{key}']" in refusal(config_dict(depth_routing=depth))


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
MORE_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("name", SIZES + MORE_SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    assert f"{name} must be an integer of at least 1, got {value!r}" in refusal(
        config_dict(**{name: value})
    )


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, True, "1", None])
def test_real_numbers_are_positive_and_finite(name: str, value: object) -> None:
    assert f"{name} must be a positive number" in refusal(config_dict(**{name: value}))


@pytest.mark.parametrize("name", ["qk_norm", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flags_are_booleans(name: str, value: object) -> None:
    assert f"{name} must be a boolean, got {value!r}" in refusal(config_dict(**{name: value}))


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 40, True, 1.0, None])
def test_special_ids_lie_in_the_vocabulary(name: str, value: object) -> None:
    assert f"{name} must be below vocab_size 40" in refusal(config_dict(**{name: value}))


IMAGE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"num_codes": 0}, "image.num_codes must be an integer of at least 1, got 0"),
    ({"tokens_per_image": "4"}, "image.tokens_per_image must be an integer of at least 1"),
    ({"first_token_id": -1}, "image.first_token_id must be an integer of at least 0, got -1"),
    ({"begin_token_id": None}, "image.begin_token_id must be an integer of at least 0"),
    ({"grid": [2, 3]}, "product is tokens_per_image 4, got [2, 3]"),
    ({"grid": [-2, -2]}, "image.grid must be two positive integers"),
    ({"grid": [2.0, 2]}, "image.grid must be two positive integers"),
    ({"grid": [4]}, "image.grid must be two positive integers"),
    ({"grid": 4}, "image.grid must be two positive integers"),
    ({"num_codes": 37}, "image ids 4..40 do not fit into vocab_size 40"),
    ({"begin_token_id": 40}, "image.begin_token_id must be below vocab_size 40, got 40"),
    ({"begin_token_id": 4}, "image.begin_token_id 4 lies among the image ids"),
    ({"end_token_id": 19}, "image.end_token_id 19 lies among the image ids"),
    ({"first_token_id": 2}, "eos_token_id 2 lies among the image ids"),
    ({"end_token_id": 21}, "image.begin_token_id is also image.end_token_id: 21"),
    ({"begin_token_id": 2}, "image.begin_token_id is also eos_token_id: 2"),
    ({"end_token_id": 0}, "image.end_token_id is also bos_token_id: 0"),
]


@pytest.mark.parametrize(("changes", "message"), IMAGE_ERRORS)
def test_image_inconsistencies(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(config_dict(image=IMAGE | changes))


GROUP_ERRORS: list[tuple[object, str]] = [
    ([], "expert_groups must be a non-empty list"),
    ({}, "expert_groups must be a non-empty list"),
    ([3], "expert_groups must be an object, got int"),
    ([group("a.b", TEXT_AND_IMAGE, 1)], "expert group name must match"),
    ([group("", TEXT_AND_IMAGE, 1)], "expert group name must match"),
    ([group("x" * 65, TEXT_AND_IMAGE, 1)], "expert group name must match"),
    ([group(3, TEXT_AND_IMAGE, 1)], "expert group name must match"),  # type: ignore[arg-type]
    ([group("all", TEXT_AND_IMAGE, 0)], "expert_groups[all].num_experts must be an integer"),
    (
        [group("all", TEXT_AND_IMAGE, 2, intermediate_size=1.5)],
        "expert_groups[all].intermediate_size must be an integer of at least 1, got 1.5",
    ),
    (
        [group("all", TEXT_AND_IMAGE, 2, aux_hidden_size=0)],
        "expert_groups[all].aux_hidden_size must be an integer of at least 1, got 0",
    ),
    ([group("all", TEXT_AND_IMAGE, 2, aux_hidden_size=None)], "aux_hidden_size must be an integer"),
    ([group("all", [], 1)], "modalities of expert group all must be a list"),
    ([group("all", ["audio"], 1)], "must be a list out of ['text', 'image'], got ['audio']"),
    ([group("all", "text", 1)], "got 'text'"),  # type: ignore[arg-type]
    ([group("all", ["text", "text"], 1)], "modalities of expert group all repeat"),
    ([group("all", ["text"], 1)], "modality 'image' must be served by exactly one expert group"),
    (
        [group("a", TEXT_AND_IMAGE, 1), group("b", ["text"], 1)],
        "modality 'text' must be served by exactly one expert group, is served by 2",
    ),
    (
        [group("a", ["text"], 1), group("a", ["image"], 1)],
        "expert group names repeat: ['a', 'a']",
    ),
]


@pytest.mark.parametrize(("groups", "message"), GROUP_ERRORS)
def test_group_inconsistencies(groups: object, message: str) -> None:
    assert message in refusal(config_dict(expert_groups=groups))


DEPTH_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"layers": []}, "depth_routing.layers must be different layer numbers below 3, got []"),
    ({"layers": [0, 3]}, "depth_routing.layers must be different layer numbers below 3"),
    ({"layers": [0, 0]}, "depth_routing.layers must be different"),
    ({"layers": [False]}, "depth_routing.layers must be different"),
    ({"layers": 2}, "depth_routing.layers must be different"),
    ({"capacity": 0}, "depth_routing.capacity must be a share in (0, 1]"),
    ({"capacity": 1.01}, "depth_routing.capacity must be a share in (0, 1]"),
    ({"capacity": math.nan}, "depth_routing.capacity must be a share in (0, 1]"),
    ({"capacity": True}, "depth_routing.capacity must be a share in (0, 1]"),
    ({"capacity": [0.5]}, "or one per routed layer, got [0.5]"),
    ({"capacity": [0.5, "1"]}, "depth_routing.capacity must be a share in (0, 1]"),
    ({"aux_hidden_size": 0}, "depth_routing.aux_hidden_size must be an integer of at least 1"),
    ({"modalities": []}, "modalities of depth_routing must be a list"),
    ({"modalities": ["audio"]}, "modalities of depth_routing must be a list"),
]


@pytest.mark.parametrize(("changes", "message"), DEPTH_ERRORS)
def test_depth_inconsistencies(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(config_dict(depth_routing=DEPTH | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'moma', got 'llama'"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"format_version": True}, "format_version must be 1, got True"),
        ({"norm_order": "both"}, "norm_order must be 'pre' or 'post', got 'both'"),
        ({"norm_order": ["pre"]}, "norm_order must be 'pre' or 'post'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"head_dim": 7}, "head_dim must be even for RoPE, got 7"),
        ({"image": [1]}, "image must be an object, got list"),
        ({"depth_routing": 2}, "depth_routing must be an object, got int"),
    ],
)
def test_other_inconsistencies(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(config_dict(**changes))


def test_configuration_must_be_an_object() -> None:
    assert "config must be an object, got list" in refusal([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "must hold a JSON object, got list"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist"):
        ModelConfig.load(tmp_path / "nowhere")


def test_configuration_and_presets_import_no_torch() -> None:
    code = (
        "import sys, momaserve.models.config, momaserve.models.presets as presets\n"
        "presets.preset_config(presets.PRESET_NAMES[0])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run_python(code) == 0


def test_layers_and_capacities_may_come_in_any_order() -> None:
    depth = DEPTH | {"layers": [2, 0], "capacity": [0.5, 0.125]}
    routing = ModelConfig.from_dict(config_dict(depth_routing=depth)).depth_routing
    assert routing is not None
    assert [routing.capacity_of(layer) for layer in range(3)] == [0.125, None, 0.5]


def test_without_pictures_nobody_need_serve_them() -> None:
    groups = [{"name": "text", "modalities": ["text"], "num_experts": 1, "intermediate_size": 8}]
    assert ModelConfig.from_dict(config_dict(image=None, expert_groups=groups)).image is None
    assert "must be served by exactly one" in refusal(config_dict(expert_groups=groups))


def test_a_wrong_number_of_layers_is_refused_at_once() -> None:
    assert "num_hidden_layers must be at most 10000" in refusal(
        config_dict(num_hidden_layers=10**9)
    )
