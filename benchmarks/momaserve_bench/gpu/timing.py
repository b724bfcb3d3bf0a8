"""`time`: roofs, paged attention, start-up, decoding, prefill, and where a step's time goes."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momaserve.config import CacheConfig, EngineConfig, SchedulerConfig
from momaserve.engine import Engine
from momaserve.kernels.triton.attention import paged_attention
from momaserve.kernels.triton.attention_tiles import decode_tiles, num_splits, scratch_shape
from momaserve.loading import ModelParts
from momaserve.modality import Modality
from momaserve.models.info import forward_flops
from momaserve_bench.engine_setup import preset_parts
from momaserve_bench.gpu.breakdown import StepBench
from momaserve_bench.gpu.device import Budget, Device, time_on
from momaserve_bench.gpu.findings import line_of
from momaserve_bench.gpu.roofs import Roofs
from momaserve_bench.gpu.startup import command_for, start_up
from momaserve_bench.gpu.steps import BLOCK_SIZE
from momaserve_bench.latency import Batches
from momaserve_bench.report import print_table

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSizes:
    """Of what is timed."""

    preset: str
    buffer_bytes: int
    gemm_size: int
    dtype: str
    num_runs: int
    """That medians are of."""
    num_warmup: int
    attention_batch: int
    attention_context: int
    heads: tuple[int, int]
    head_dim: int
    decodes: tuple[tuple[str, int], ...]
    """(modality of `momaserve bench latency`, batch size)."""
    input_len: int
    output_len: int
    prefill_batch: int
    prefill_len: int
    kv_cache_bytes: int
    startup_timeout_s: float


FULL = TimingSizes(
    preset="moma-1.4b-4t4i",
    buffer_bytes=4 * GIB,
    gemm_size=8192,
    dtype="bfloat16",
    num_runs=5,
    num_warmup=2,
    attention_batch=32,
    attention_context=4096,
    heads=(16, 16),
    head_dim=128,
    decodes=(("text", 1), ("image", 1), ("mixed", 64)),
    input_len=128,
    output_len=128,
    prefill_batch=8,
    prefill_len=2048,
    kv_cache_bytes=16 * GIB,
    startup_timeout_s=150.0,
)


def time_all(
    device: Device,
    budget: Budget,
    *,
    seed: int,
    sizes: TimingSizes = FULL,
    make_parts: Callable[[str, int, EngineConfig], ModelParts] = preset_parts,
    startup_command: Sequence[str] | None = None,
    backend: str = "triton",
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures one section after another and prints each as it is there.

    Args:
        make_parts: (preset, codes of a picture, configuration) to a model.
        startup_command: None is that of `startup` for the preset.
        keep: is given what there is after each section.

    Returns:
        By section; `left_out` names those for which no time was left, `failures` those that
        failed, with the reason.
    """
    bench = _Bench(device, seed, sizes, make_parts, backend)
    command = command_for(sizes.preset) if startup_command is None else startup_command
    sections: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("roofs", bench.measure_roofs),
        ("attention", bench.attention),
        ("decoding", bench.decoding),
        ("prefill", bench.prefill),
        ("steps", bench.steps),
        ("startup", lambda: startup(command, sizes)),  # compiles everything anew: the longest
    )
    report: dict[str, Any] = {"left_out": [], "failures": {}}
    for name, measure in sections:
        if budget.is_spent:
            report["left_out"].append(name)
            print(f"left out: {name}, for the {budget.limit_s:g} s of this call were over")
            continue
        try:
            report[name] = measure()
        except Exception as error:  # a compiler's, a device's, an engine's: the others go on
            report["failures"][name] = line_of(error)
            print(f"FAILS: {name}: {report['failures'][name]}")
        keep(report)
    report["peak_bytes"] = device.peak_bytes()
    return report


def startup(command: Sequence[str], sizes: TimingSizes) -> dict[str, Any]:
    found = start_up(command, timeout_s=sizes.startup_timeout_s)
    print_table(
        f"start-up of {sizes.preset} in a fresh process, seconds; target {found['target_s']:g}",
        ("kernels", "imports", "+ engine", "+ first token", "whole process"),
        [
            (
                name,
                found[name]["imported_s"],
                found[name]["loaded_s"],
                found[name]["first_token_s"],
                found[name]["process_s"],
            )
            for name in ("compiling", "compiled")
        ],
    )
    return found


class _Bench:
    """The sections that share roofs and an engine."""

    def __init__(
        self,
        device: Device,
        seed: int,
        sizes: TimingSizes,
        make_parts: Callable[[str, int, EngineConfig], ModelParts],
        backend: str,
    ) -> None:
        self._device, self._seed, self._sizes = device, seed, sizes
        self._make_parts, self._backend = make_parts, backend
        self._roofs: Roofs | None = None
        self._engine: Engine | None = None
        self._roof_ms: dict[tuple[str, int], float] = {}

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self._sizes.dtype)
        return found

    def measure_roofs(self) -> dict[str, float]:
        sizes = self._sizes
        self._roofs = Roofs.measure(
            self._device,
            buffer_bytes=sizes.buffer_bytes,
            gemm_size=sizes.gemm_size,
            num_runs=sizes.num_runs,
            dtype=self._dtype,
        )
        read, gemm = self._roofs.read_bytes_per_s, self._roofs.gemm_flops_per_s
        print_table(
            f"roofs; medians of {sizes.num_runs}",
            ("", "of", "rate"),
            [
                ("read", f"{sizes.buffer_bytes / GIB:g} GiB", f"{read / 1e12:.3g} TB/s"),
                ("product", f"{sizes.gemm_size} squared", f"{gemm / 1e12:.4g} TFLOP/s"),
            ],
        )
        return {"read_bytes_per_s": read, "gemm_flops_per_s": gemm}

    def _measured_roofs(self) -> Roofs:
        if self._roofs is None:
            raise RuntimeError("there are no roofs to compare with")
        return self._roofs

    @torch.inference_mode()
    def attention(self) -> dict[str, Any]:
        """Paged attention of a decoding step at full context; each call is another layer's."""
        sizes, roofs = self._sizes, self._measured_roofs()
        work, num_bytes = self._attention_work()
        times = time_on(
            self._device, work, num_runs=sizes.num_runs, num_warmup=sizes.num_warmup, inner=20
        )
        rate = num_bytes / times.median_s
        found = {
            "batch_size": sizes.attention_batch,
            "context": sizes.attention_context,
            "bytes": num_bytes,
            "us": 1e6 * times.median_s,
            "fastest_us": 1e6 * times.fastest_s,
            "bytes_per_s": rate,
            "share": rate / roofs.read_bytes_per_s,
        }
        print_table(
            "paged attention of one layer, decoding",
            ("batch", "context", "MB of K/V", "us", "TB/s", "of read"),
            [
                (
                    sizes.attention_batch,
                    sizes.attention_context,
                    num_bytes / 1e6,
                    found["us"],
                    rate / 1e12,
                    f"{found['share']:.1%}",
                )
            ],
        )
        return found

    def _attention_work(self) -> tuple[Callable[[], Tensor], int]:
        sizes, where = self._sizes, self._device.torch_device
        batch, context, head_dim = sizes.attention_batch, sizes.attention_context, sizes.head_dim
        num_heads, num_kv_heads = sizes.heads
        num_layers = 4  # so that no layer's K/V is in a cache when its turn comes again
        per_sequence = math.ceil(context / BLOCK_SIZE)
        stride = num_layers * BLOCK_SIZE
        generator = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(batch * per_sequence, generator=generator).int()
        shape = (batch * per_sequence * stride, num_kv_heads, head_dim)
        keys, values = (torch.randn(shape, device=where, dtype=self._dtype) for _ in range(2))
        q = torch.randn(batch, num_heads, head_dim, device=where, dtype=self._dtype)
        tiles = decode_tiles(num_heads // num_kv_heads, head_dim, q.element_size())
        processors = self._device.num_multiprocessors
        splits = num_splits(batch, num_kv_heads, context, processors, tiles)
        scratch = torch.empty(
            scratch_shape(splits, batch, num_heads, head_dim), device=where, dtype=torch.float32
        )
        tables = order.view(batch, per_sequence).to(where)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=where)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=where)
        turn = 0

        def work() -> Tensor:
            nonlocal turn
            turn += 1
            return paged_attention(
                q, keys, values, tables, lengths, starts,
                block_size=BLOCK_SIZE, block_stride=stride,
                layer_offset=turn % num_layers * BLOCK_SIZE, max_q=1, max_len=context,
                scratch=scratch,
            )  # fmt: skip

        return work, 2 * batch * context * num_kv_heads * head_dim * q.element_size()

    def _loaded(self) -> Engine:
        if self._engine is None:
            sizes = self._sizes
            config = self._engine_config()
            parts = self._make_parts(sizes.preset, sizes.output_len, config)
            self._engine = Engine(parts, config)
        return self._engine

    def _engine_config(self) -> EngineConfig:
        sizes = self._sizes
        num_requests = max(sizes.prefill_batch, *(size for _, size in sizes.decodes))
        num_tokens = max(sizes.prefill_batch * sizes.prefill_len, num_requests * sizes.input_len)
        return EngineConfig(
            dtype=sizes.dtype,
            device=self._device.torch_device.type,
            backend=self._backend,
            cache=CacheConfig(kv_cache_bytes=sizes.kv_cache_bytes),
            scheduler=SchedulerConfig(
                max_num_requests=num_requests, max_num_step_tokens=num_tokens
            ),
        )

    def _batches(self, input_len: int, output_len: int) -> Batches:
        arguments = argparse.Namespace(
            seed=self._seed,
            input_len=input_len,
            temperature=1.0,  # greedy rows of random weights loop over few ids, hence few experts
            num_iters=self._sizes.num_runs,
            num_iters_warmup=self._sizes.num_warmup,
            profile=None,
        )
        return Batches(self._loaded(), arguments, output_len)

    def decoding(self) -> list[dict[str, Any]]:
        """As `momaserve bench latency` has it, against the roof of this run."""
        sizes, roofs = self._sizes, self._measured_roofs()
        batches = self._batches(sizes.input_len, sizes.output_len)
        found = [
            batches.measure(modality, size, roofs.read_bytes_per_s)
            for modality, size in sizes.decodes
        ]
        for one in found:
            self._roof_ms[one["modality"], one["batch_size"]] = one["roof"]["ms_per_token"]
        print_table(
            f"{sizes.preset} decodes, {sizes.dtype}; prompts of {sizes.input_len}, medians of "
            f"{sizes.num_runs} batches after {sizes.num_warmup}",
            ("rows", "batch", "tok/s", "ms per step", "MB per step", "roof ms", "of read"),
            [
                (
                    one["modality"],
                    one["batch_size"],
                    one["decode_tokens_per_s"],
                    one["ms_per_token"],
                    one["roof"]["bytes_per_step"] / 1e6,
                    one["roof"]["ms_per_token"],
                    f"{one['roof']['share']:.1%}",
                )
                for one in found
            ],
        )
        return found

    def prefill(self) -> dict[str, Any]:
        """Until every prompt has its first token, over the time of its FLOPs at the GEMM's rate."""
        sizes, roofs = self._sizes, self._measured_roofs()
        batch, length = sizes.prefill_batch, sizes.prefill_len
        measured = self._batches(length, 4).measure("text", batch, roofs.read_bytes_per_s)
        flops = forward_flops(
            self._loaded().model_config,
            num_tokens={Modality.TEXT: batch * length},
            num_visible={Modality.TEXT: batch * length * (length + 1) // 2},
            num_logits=batch,
        )
        rate = flops / measured["prefill_s"]
        found = {
            "batch_size": batch,
            "input_len": length,
            "prefill_s": measured["prefill_s"],
            "tokens_per_s": measured["prefill_tokens_per_s"],
            "flops": flops,
            "flops_per_s": rate,
            "share": rate / roofs.gemm_flops_per_s,
        }
        print_table(
            f"{sizes.preset} reads prompts",
            ("prompts", "tokens", "ms", "tok/s", "TFLOP/s", "of product"),
            [
                (
                    batch,
                    length,
                    1e3 * measured["prefill_s"],
                    found["tokens_per_s"],
                    rate / 1e12,
                    f"{found['share']:.1%}",
                )
            ],
        )
        return found

    def steps(self) -> list[dict[str, Any]]:
        """Host and device time of the steps that were measured as decoding."""
        sizes = self._sizes
        self._engine = None  # its memory is needed
        gc.collect()
        parts = self._make_parts(sizes.preset, sizes.output_len, self._engine_config())
        bench = StepBench(
            self._device,
            parts,
            self._backend,
            num_rows=max(size for _, size in sizes.decodes),
            context=sizes.input_len + sizes.output_len // 2,
            seed=self._seed,
        )
        found = [
            bench.measure(kind, size, num_runs=sizes.num_runs, num_warmup=sizes.num_warmup)
            for kind, size in sizes.decodes
        ]
        print_table(
            "one step, ms: its start, its forward pass on the device, all on the device, whole",
            ("rows", "batch", "host", "forward", "device", "whole", "roof"),
            [
                (
                    one["kind"],
                    one["batch_size"],
                    one["host_ms"],
                    one["forward_ms"],
                    "-" if one["device_ms"] is None else one["device_ms"],
                    one["whole_ms"],
                    self._roof_ms.get((one["kind"], one["batch_size"]), "-"),
                )
                for one in found
            ],
        )
        for one in found:
            print_table(
                f"kernels of a step of {one['batch_size']} rows of {one['kind']}, ms",
                ("ms", "launches", "kernel"),
                [(k["ms"], k["count"], k["name"]) for k in one["kernels"]] or [("-", "-", "-")],
            )
        return found
