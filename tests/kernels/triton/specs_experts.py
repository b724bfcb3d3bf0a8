"""Routing and experts as an H200 runs moma-1.4b-4t4i in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from momaserve.kernels.triton import experts, experts_kernels, routing, routing_kernels
from tests.kernels.triton.compiled import KernelSpec

WIDTH, INNER, PADDED, AUX, E = 2048, 5461, 5504, 1024, 8
GROUP = 4
"""Experts of one group."""


def _scores() -> list[KernelSpec]:
    pointers = {
        "u": "*bf16",
        "modality": "*i8",
        "policy": "*i8",
        "groups": "*i32",
        "main": "*fp32",
        "fc2": "*fp32",
        "logits": "*fp32",
        "partials": "*fp32",
        "u_stride": "i32",
        "num_rows": "i32",
        "num_slices": "i32",
    }
    specs = []
    for most, tiles in routing.TILES:
        for fc1 in ("*bf16", "*fp32"):  # a float32 first layer is what most checkpoints have
            constexprs: dict[str, Any] = {
                "taken": None,
                "WIDTH": WIDTH,
                "INNER": AUX,
                "S": GROUP,
                "S_PAD": GROUP,
                "BLOCK_A": tiles.inner,
            }
            signature = {**pointers, "fc1": fc1}
            if tiles.rows == 1:
                constexprs |= {"BLOCK_D": routing.ROW_DEPTH}
            else:
                signature |= {"num_routers": "i32"}
                is_narrow = fc1 == "*bf16"
                constexprs |= {
                    "BLOCK_T": tiles.rows,
                    "BLOCK_D": routing.depth_of(tiles, WIDTH, is_narrow=is_narrow),
                    "ROW_D": routing.ROW_DEPTH,
                    "IS_NARROW": is_narrow,
                    "PRECISION": "tf32x3",
                }
            specs.append(
                KernelSpec(
                    name=f"router scores {fc1[1:]} T<={most}",
                    kernel=routing_kernels.score_rows
                    if tiles.rows == 1
                    else routing_kernels.score_tiles,
                    signature=signature,
                    constexprs=constexprs,
                    divisible=("u_stride",),
                    num_warps=tiles.num_warps,
                    num_stages=tiles.num_stages,
                    hot=True,
                )
            )
    return specs


def _pairs() -> list[KernelSpec]:
    specs = []
    for rows, num_slices, has_mask in ((1, 256, False), (64, 32, True)):
        for is_all in (True, False) if has_mask else (True,):
            signature = {
                "modality": "*i8",
                "policy": "*i8",
                "thresholds": "*fp32",
                "groups": "*i32",
                "logits": "*fp32",
                "partials": "*fp32",
                "tokens": "*i32",
                "weights": "*fp32",
                "offsets": "*i32",
                "places": "*i32",
                "num_rows": "i32",
                "num_slices": "i32",
            }
            constexprs: dict[str, Any] = {
                "S": GROUP,
                "E": E,
                "E_PAD": E,
                "BLOCK_T": rows,
                "BLOCK_A": routing.summed_slices(num_slices, E * rows),
                "IS_ALL": is_all,
            }
            masks = {"taken": "*i8", "chosen": "*i8"}
            lists = {"flags": "*fp32", "counts": "*i32"}
            signature |= (masks if has_mask else {}) | ({} if is_all else lists)
            for name in (*masks, *lists):
                if name not in signature:
                    constexprs[name] = None
            specs.append(
                KernelSpec(
                    name=f"list pairs rows={rows} is_all={is_all}",
                    kernel=routing_kernels.list_pairs,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=4 if rows == 1 else 8,
                    hot=True,
                )
            )
    specs.append(
        KernelSpec(
            name="write pairs T=8192",
            kernel=routing_kernels.write_pairs,
            signature={
                "flags": "*fp32",
                "counts": "*i32",
                "tokens": "*i32",
                "weights": "*fp32",
                "offsets": "*i32",
                "places": "*i32",
                "num_rows": "i32",
            },
            constexprs={"E": E, "E_PAD": E, "BLOCK_T": 64, "TILES_PAD": 128},
            hot=True,
        )
    )
    return specs


def _direct() -> list[KernelSpec]:
    specs = []
    for most, tiles in experts.DIRECT_TILES:
        specs.append(
            KernelSpec(
                name=f"direct gate+up T<={most}",
                kernel=experts_kernels.direct_gate_up,
                signature={
                    "u": "*bf16",
                    "gate": "*bf16",
                    "up": "*bf16",
                    "hidden": "*bf16",
                    "tokens": "*i32",
                    "offsets": "*i32",
                    "u_stride": "i32",
                },
                constexprs={
                    "WIDTH": WIDTH,
                    "INNER": INNER,
                    "STRIDE": PADDED,
                    "E": E,
                    "E_PAD": E,
                    "BLOCK_F": tiles.up_outputs,
                    "BLOCK_D": tiles.up_depth,
                },
                divisible=("u_stride",),
                num_warps=tiles.up_warps,
                hot=True,
            )
        )
        specs.append(
            KernelSpec(
                name=f"direct down T<={most}",
                kernel=experts_kernels.direct_down,
                signature={
                    "hidden": "*bf16",
                    "down": "*bf16",
                    "weights": "*fp32",
                    "places": "*i32",
                    "out": "*fp32",
                    "places_stride": "i32",
                },
                constexprs={
                    "WIDTH": WIDTH,
                    "STRIDE": PADDED,
                    "E": E,
                    "E_PAD": E,
                    "BLOCK_D": tiles.down_outputs,
                    "BLOCK_F": tiles.down_depth,
                    "ACCUMULATE": False,
                },
                num_warps=tiles.down_warps,
                hot=True,
            )
        )
    return specs


def _grouped() -> list[KernelSpec]:
    specs = []
    for most, tiles in experts.GROUPED_TILES:
        for stride in (PADDED, INNER) if most == 16 else (PADDED,):
            name = "" if stride == PADDED else " unpadded"
            specs.append(
                KernelSpec(
                    name=f"grouped gate+up T<={most}{name}",
                    kernel=experts_kernels.grouped_gate_up,
                    signature={
                        "u": "*bf16",
                        "gate": "*bf16",
                        "up": "*bf16",
                        "hidden": "*bf16",
                        "tokens": "*i32",
                        "offsets": "*i32",
                        "u_stride": "i32",
                    },
                    constexprs={
                        "WIDTH": WIDTH,
                        "INNER": INNER,
                        "STRIDE": stride,
                        "E": E,
                        "E_PAD": E,
                        "BLOCK_P": tiles.rows,
                        "BLOCK_F": tiles.up_outputs,
                        "BLOCK_D": tiles.up_depth,
                    },
                    divisible=("u_stride",),
                    num_warps=tiles.up_warps,
                    num_stages=tiles.up_stages,
                    hot=True,
                )
            )
            specs.append(
                KernelSpec(
                    name=f"grouped down T<={most}{name}",
                    kernel=experts_kernels.grouped_down,
                    signature={
                        "hidden": "*bf16",
                        "down": "*bf16",
                        "weights": "*fp32",
                        "sums": "*fp32",
                        "offsets": "*i32",
                        "num_pairs": "i32",
                    },
                    constexprs={
                        "WIDTH": WIDTH,
                        "STRIDE": stride,
                        "E": E,
                        "E_PAD": E,
                        "BLOCK_P": tiles.rows,
                        "BLOCK_D": tiles.down_outputs,
                        "BLOCK_F": tiles.down_depth,
                        "SHARES": tiles.shares,
                    },
                    divisible=("num_pairs",),
                    num_warps=tiles.down_warps,
                    num_stages=tiles.down_stages,
                    hot=True,
                )
            )
    specs.append(
        KernelSpec(
            name="add pairs",
            kernel=experts_kernels.add_pairs,
            signature={
                "sums": "*fp32",
                "places": "*i32",
                "out": "*fp32",
                "places_stride": "i32",
                "num_pairs": "i32",
            },
            constexprs={
                "WIDTH": WIDTH,
                "E": E,
                "E_PAD": E,
                "SHARES": 2,
                "BLOCK_D": 512,
                "ACCUMULATE": False,
            },
            hot=True,
        )
    )
    return specs


def _adding(spec: KernelSpec) -> KernelSpec:
    """For groups of other sizes, whose results come on top."""
    constexprs = {**spec.constexprs, "ACCUMULATE": True}
    return replace(spec, name=f"{spec.name}, adding", constexprs=constexprs)


SPECS = [*_scores(), *_pairs(), *_direct(), *_grouped()]
SPECS += [_adding(spec) for spec in SPECS if "ACCUMULATE" in spec.constexprs]
