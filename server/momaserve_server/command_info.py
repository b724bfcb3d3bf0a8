"""`momaserve info`: a table for people, then one line of JSON for machines."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import momaserve
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.presets import PRESET_NAMES, preset_config
from momaserve_server.cli_options import add_checkpoint, checkpoint_path

if TYPE_CHECKING:
    from momaserve.models.info import ModelInfo

_LIBRARIES = ("torch", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"a named shape instead of a checkpoint: {', '.join(PRESET_NAMES)}",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="accepted with --preset as in serve and bench; no weights are made here",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="stored dtype of a preset (default: bfloat16); a checkpoint has its own",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="context in tokens for the attention FLOPs (default: the model's longest)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints what a checkpoint or preset holds and costs.

    Raises:
        ConfigError: options that exclude each other, or an unknown preset.
        CheckpointError: a checkpoint that cannot be read.
    """
    # Imported here because it brings torch, which `momaserve info --help` must not need.
    info_module = import_module("momaserve.models.info")
    info: ModelInfo
    if args.preset is not None:
        if args.checkpoint is not None:
            raise ConfigError(f"give CHECKPOINT {args.checkpoint} or --preset, not both")
        name, config = args.preset, preset_config(args.preset)
        dtype = args.dtype or "bfloat16"
        info = info_module.describe(config, dtype=dtype, context=args.context)
    else:
        if args.random_weights or args.dtype:
            raise ConfigError("--random-weights and --dtype go with --preset")
        path = checkpoint_path(args)
        name, config = str(path), ModelConfig.load(path)
        info = info_module.describe_checkpoint(path, config, context=args.context)
    print(table(name, config, info))
    print(json.dumps(report(name, config, info)))
    return 0


def table(name: str, config: ModelConfig, info: ModelInfo) -> str:
    """The figures as aligned lines."""
    groups = ", ".join(
        f"{group.num_experts} x {group.name} ({' + '.join(m.label for m in group.modalities)})"
        for group in config.expert_groups
    )
    lines = [
        name,
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.norm_order}-norm, "
        f"vocabulary {config.vocab_size:,}",
        f"experts per layer: {groups}",
    ]
    if config.depth_routing is not None:
        shares = sorted(set(config.depth_routing.capacity))
        lines.append(
            f"depth routing: {len(config.depth_routing.layers)} layers, "
            f"capacity {', '.join(f'{share:g}' for share in shares)}"
        )
    lines += ["", f"{'':<22}{'parameters':>18}{'bytes':>20}"]
    lines += [
        f"{part.name:<22}{part.parameters:>18,}{part.stored_bytes:>20,}" for part in info.parts
    ]
    lines += [
        f"{'all':<22}{info.num_stored_parameters:>18,}{info.stored_bytes:>20,}",
        f"{'main model':<22}{info.num_parameters:>18,}",
        f"stored in {', '.join(info.stored_dtypes)}; "
        f"K/V {info.kv_bytes_per_token:,} bytes per token in {info.compute_dtype}",
        "",
        f"per token, context {info.context:,}" + "".join(f"{c.modality:>18}" for c in info.costs),
    ]
    width = len(f"per token, context {info.context:,}")
    for label, field in (
        ("active parameters", "active_parameters"),
        ("FLOPs, weights", "linear_flops"),
        ("FLOPs, attention", "attention_flops"),
        ("FLOPs", "flops"),
        ("K/V bytes, mean", "kv_bytes"),
    ):
        lines.append(
            f"{label:<{width}}" + "".join(f"{getattr(cost, field):>18,}" for cost in info.costs)
        )
    return "\n".join(lines)


def report(name: str, config: ModelConfig, info: ModelInfo) -> dict[str, Any]:
    """The same figures as one JSON object, with where they were made."""
    return {
        "command": "info",
        "model": name,
        **info.to_dict(),
        "config": config.to_dict(),
        "commit": _commit(),
        "machine": {
            "node": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
        },
        "versions": {
            "momaserve": momaserve.__version__,
            "python": platform.python_version(),
            **{library: metadata.version(library) for library in _LIBRARIES},
        },
    }


def _commit() -> str | None:
    """Commit of the source tree that runs; None for an installed package or without git."""
    root = Path(momaserve.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
