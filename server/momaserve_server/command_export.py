"""`momaserve export`: a checkpoint in another number format, in one file or in shards."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint directory")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory to write; must be empty"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="number format of the weights; thresholds stay float32 (default: bfloat16)",
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="BYTES",
        help="start a new file beyond so many bytes of tensors, with an index as on the Hub "
        "(default: one file)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the directory.

    Raises:
        ConfigError: `--out` is not empty, or a setting that cannot work.
        CheckpointError: a checkpoint that cannot be read or does not fit into the format.
    """
    # Imported here because it brings torch, which `momaserve export --help` must not need.
    module = import_module("momaserve.models.export")
    files = module.export(args.checkpoint, args.out, dtype=args.dtype, shard_size=args.shard_size)
    print(f"{args.checkpoint} written to {args.out} as {args.dtype}: {', '.join(files)}")
    return 0
