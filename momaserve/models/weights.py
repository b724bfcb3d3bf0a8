"""Checkpoint files <-> model: every tensor is used exactly once, or the load fails by name.

`tensor_specs` says, without building a model, which tensors a configuration has. Loading
streams one tensor at a time, so the peak is the model plus one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from momaserve.errors import CheckpointError
from momaserve.layers.routing import Router
from momaserve.models.config import ModelConfig, read_json_object
from momaserve.models.moma import MomaModel

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES_SHOWN = 10
_MAX_THRESHOLD = 1 - 2.0**-24
"""The largest float32 below 1."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint and where it belongs in `MomaModel`."""

    shape: tuple[int, ...]
    target: str
    """Parameter or buffer of the model, as `named_parameters` spells it."""
    is_optional: bool = False
    """Auxiliary routers and thresholds: made after the main model, so they may be absent."""


def _router_specs(
    prefix: str, aux_prefix: str, target: str, outputs: int, aux: int, hidden: int
) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{prefix}.weight", TensorSpec((outputs, hidden), f"{target}.weight")
    for name, shape in (("fc1", (aux, hidden)), ("fc2", (outputs, aux))):
        yield (
            f"{aux_prefix}.{name}.weight",
            TensorSpec(shape, f"{target}.aux.{name}.weight", is_optional=True),
        )
    yield (
        f"{prefix}.threshold",
        TensorSpec((outputs,), f"{target}.threshold_logits", is_optional=True),
    )


def _layer_specs(config: ModelConfig, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    name, target = f"model.layers.{layer}", f"blocks.{layer}"
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    attention = {
        "q_proj.weight": (queries * head, hidden),
        "k_proj.weight": (keys * head, hidden),
        "v_proj.weight": (keys * head, hidden),
        "o_proj.weight": (hidden, queries * head),
    }
    if config.qk_norm:
        for part in ("weight", "bias"):
            attention[f"q_norm.{part}"] = (queries, head)
            attention[f"k_norm.{part}"] = (keys, head)
    for part, shape in attention.items():
        yield f"{name}.self_attn.{part}", TensorSpec(shape, f"{target}.self_attn.{part}")
    for norm in ("attn_norm", "ffn_norm"):
        yield f"{name}.{norm}.weight", TensorSpec((hidden,), f"{target}.{norm}.weight")
    for index, group in enumerate(config.expert_groups):
        here, there = f"{name}.experts.{group.name}", f"{target}.experts.groups.{index}"
        experts, inner = group.num_experts, group.intermediate_size
        for part in ("gate_proj", "up_proj"):
            yield f"{here}.{part}", TensorSpec((experts, inner, hidden), f"{there}.{part}")
        yield f"{here}.down_proj", TensorSpec((experts, hidden, inner), f"{there}.down_proj")
        if group.has_router:
            yield from _router_specs(
                f"{here}.router",
                f"{here}.aux_router",
                f"{there}.router",
                experts,
                group.aux_hidden_size,
                hidden,
            )
    depth = config.depth_routing
    if depth is not None and layer in depth.layers:
        router = f"{name}.depth_router"
        yield from _router_specs(
            router,
            f"{router}.aux",
            f"{target}.depth_router.router",
            1,
            depth.aux_hidden_size,
            hidden,
        )


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of model.md's table for this configuration, by its name in the file."""
    embedding = (config.vocab_size, config.hidden_size)
    specs = {"model.embed_tokens.weight": TensorSpec(embedding, "embed_tokens")}
    for layer in range(config.num_hidden_layers):
        specs.update(_layer_specs(config, layer))
    specs["model.norm.weight"] = TensorSpec((config.hidden_size,), "norm.weight")
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = TensorSpec(embedding, "lm_head")
    return specs


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from the index where there is one.

    Raises:
        CheckpointError: no weights, a broken index, or an index naming files elsewhere.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        path = directory / WEIGHTS_NAME
        if not path.exists():
            raise CheckpointError(f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
        return [path]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} must name safetensors files beside itself, not {name!r}"
            )
    return [directory / name for name in names]


def _list_names(title: str, names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{title}: {shown}{more}"


def _account(
    directory: Path, found: Mapping[str, tuple[tuple[int, ...], str]], specs: dict[str, TensorSpec]
) -> None:
    """Raises CheckpointError unless the files hold exactly what the configuration needs."""
    problems: list[str] = []
    missing = [n for n, spec in specs.items() if n not in found and not spec.is_optional]
    unknown = [name for name in found if name not in specs]
    if missing:
        problems.append(_list_names("missing tensors", missing))
    if unknown:
        problems.append(_list_names("unknown tensors", unknown))
    wrong = [
        f"{name} is {list(shape)}, config.json wants {list(specs[name].shape)}"
        for name, (shape, _) in found.items()
        if name in specs and shape != specs[name].shape
    ]
    if wrong:
        problems.append(_list_names("wrong shapes", wrong))
    dtypes = [f"{name} is {d}" for name, (_, d) in found.items() if d not in STORED_DTYPES]
    if dtypes:
        problems.append(_list_names(f"dtypes other than {sorted(STORED_DTYPES)}", dtypes))
    if problems:
        raise CheckpointError(f"{directory} does not match its config.json: " + "; ".join(problems))


def _check_pairs(found: Mapping[str, object], specs: dict[str, TensorSpec]) -> None:
    """Raises CheckpointError for half an auxiliary router: fc1 without fc2 or the reverse."""
    lost: list[str] = []
    for name, spec in specs.items():
        if spec.is_optional and name.endswith(".fc1.weight"):
            other = name.replace(".fc1.", ".fc2.")
            if (name in found) != (other in found):
                lost.append(other if name in found else name)
    if lost:
        raise CheckpointError(_list_names("missing tensors", lost))


def assign(model: nn.Module, target: str, value: Tensor) -> None:
    """Replace a parameter or buffer of `model` by `value`."""
    owner_name, _, leaf = target.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def read_headers(directory: Path, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored dtype (`F32`, `F16` or `BF16`) of every tensor; reads no weights.

    Raises:
        CheckpointError: a file that cannot be read, or tensors that are missing, unknown, of a
            wrong shape or of another type than float, each named.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    homes: dict[str, str] = {}
    for path in weight_files(directory):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in found:
                    raise CheckpointError(f"tensor {name} is in two files of {directory}")
                view = file.get_slice(name)
                found[name] = (tuple(view.get_shape()), view.get_dtype())
                homes[name] = path.name
    if (directory / INDEX_NAME).exists():
        weight_map = read_json_object(directory / INDEX_NAME)["weight_map"]
        differing = sorted(n for n in {*homes, *weight_map} if homes.get(n) != weight_map.get(n))
        if differing:
            raise CheckpointError(
                _list_names(f"{INDEX_NAME} and the shards disagree about tensors", differing)
            )
    specs = tensor_specs(config)
    _account(directory, found, specs)
    _check_pairs(found, specs)
    return found


def read_tensors(directory: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Some tensors of a checkpoint that `read_headers` accepted, as they are stored."""
    wanted = set(names)
    for path in weight_files(directory):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in wanted:
                    yield name, file.get_tensor(name)


def load_model(
    directory: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> MomaModel:
    """Build the model of a checkpoint directory.

    Args:
        dtype: of all weights but the routers', which are float32.

    Raises:
        CheckpointError: a file that cannot be read, or tensors that are missing, unknown, of a
            wrong shape or of another type than float, or that hold NaN or infinite values, each
            named.
    """
    specs = tensor_specs(config)
    found = read_headers(directory, config)
    present = {specs[name].target for name in found}
    with torch.device("meta"):
        model = MomaModel(config, dtype)
    wanted = {
        name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    for path in weight_files(directory):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                target = specs[name].target
                tensor = file.get_tensor(name).to(device=device, dtype=wanted[target])
                if not bool(tensor.isfinite().all()):
                    raise CheckpointError(
                        f"{path}: tensor {name} holds NaN or infinite values as {tensor.dtype}"
                    )
                if name.endswith(".threshold"):
                    tensor = tensor.double().clamp(0, 1).logit().float()
                assign(model, target, tensor)
    for name, module in model.named_modules():
        if isinstance(module, Router):
            if f"{name}.aux.fc1.weight" not in present:
                module.aux = None
            if f"{name}.threshold_logits" not in present:
                module.threshold_logits = None
    model.set_rope(config.max_position_embeddings)
    return model.eval()


def stored_tensors(model: MomaModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model under their names in a checkpoint, weights cast to `dtype`.

    Thresholds are stored as probabilities in float32: they sit where rounding decides. They stay
    below 1, which would mean "never".
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_specs(model.config).items():
        if spec.target not in state:
            continue
        tensor = state[spec.target].detach().cpu()
        is_threshold = name.endswith(".threshold")
        if is_threshold:
            tensors[name] = tensor.sigmoid().clamp_max(_MAX_THRESHOLD).contiguous()
        else:
            tensors[name] = tensor.to(dtype).contiguous()
    return tensors


def save_config(config: ModelConfig, directory: Path) -> None:
    """Write `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    temporary = directory / "config.json.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / "config.json")
