"""`momaserve bench latency`: one batch at a time, beside the roof that memory bandwidth sets."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.random_weights import ordinary_token_ids
from momaserve.request import Submission
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve_bench.batch_run import BatchTimes, LoadCounter, mean_step_bytes, run_batch
from momaserve_bench.engine_setup import load_engine, settings_of
from momaserve_bench.report import print_result, print_table
from momaserve_bench.roof import StepLoad, mean_distinct_experts, measure_read_bandwidth
from momaserve_bench.spread import linear_percentile

DEFAULT_OUTPUT_LEN = 128
PERCENTILES = (10, 25, 50, 75, 90, 99)
"""Those that vLLM reports."""
GIB = 1 << 30


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for settings that cannot work, CheckpointError for a broken model."""
    check_arguments(args)
    has_pictures = args.modality != ["text"]
    is_preset = args.preset is not None
    output_len: int | None = args.output_len
    if output_len is None and not (has_pictures and not is_preset):
        output_len = DEFAULT_OUTPUT_LEN
    engine = load_engine(
        args,
        num_requests=max(args.batch_size),
        image_tokens=output_len if has_pictures and is_preset else None,
    )
    batches = Batches(engine, args, checked_output_len(engine, output_len, has_pictures))
    bandwidth = measure_read_bandwidth(
        int(args.roof_gib * GIB), device=engine.model.embed_tokens.device
    )
    results = [
        batches.measure(modality, size, bandwidth)
        for modality in dict.fromkeys(args.modality)
        for size in dict.fromkeys(args.batch_size)
    ]
    show(results, bandwidth, args)
    settings = settings_of(args, engine.model_name)
    settings |= {"output_len": batches.output_len, "dtype": str(engine.dtype).split(".")[-1]}
    report = {"read_bandwidth_bytes_per_s": bandwidth, "results": results}
    print_result("latency", settings, {**results[0], **report})
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of their range."""
    lowest = {"input_len": 1, "num_iters": 1, "num_iters_warmup": 0, "seed": 0, "output_len": 2}
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and value < low:
            reason = ", for decoding begins after the first token" if name == "output_len" else ""
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least {low}{reason}, got {value}"
            )
    for size in args.batch_size:
        if size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {size}")
        if size % 2 and "mixed" in args.modality:
            raise ConfigError(
                f"--modality mixed draws in every other row: --batch-size must be even, got {size}"
            )
    if not 0 < args.roof_gib < float("inf"):
        raise ConfigError(f"--roof-gib must be above 0, got {args.roof_gib}")


def checked_output_len(engine: Engine, wanted: int | None, has_pictures: bool) -> int:
    """Tokens that each row decodes.

    Raises:
        ConfigError: the model's pictures have another number of codes, or it makes none.
    """
    if has_pictures:
        image = engine.model_config.image
        if image is None:
            raise ConfigError(f"{engine.model_name} makes no pictures: --modality must be text")
        if wanted is not None and wanted != image.tokens_per_image:
            raise ConfigError(
                f"--output-len {wanted} does not go with pictures of {engine.model_name}: they "
                f"have {image.tokens_per_image} codes, and only those of a preset have any length"
            )
        return image.tokens_per_image
    assert wanted is not None
    return wanted


class Batches:
    """Makes batches for an engine and measures them.

    No two requests have the same cache salt, so nothing is spared by what ran before.
    """

    def __init__(self, engine: Engine, args: argparse.Namespace, output_len: int) -> None:
        self._engine = engine
        self._args = args
        self.output_len = output_len
        self._ids: list[int] = ordinary_token_ids(engine.model_config, Modality.TEXT).tolist()
        self._num_batches = 0

    def measure(self, modality: str, size: int, bandwidth: float) -> dict[str, Any]:
        """What the report says of batches of `size` rows."""
        args = self._args
        for _ in range(args.num_iters_warmup):
            self._run(modality, size)
        times = [self._run(modality, size) for _ in range(args.num_iters)]
        counter = LoadCounter(self._engine.model_config)
        self._run(modality, size, counter)
        if args.profile is not None:
            self._trace(modality, size, args.profile)
        latencies = [one.latency_s for one in times]
        step_s = median(one.decode_s / one.num_decode_steps for one in times)
        prefill_s = median(one.prefill_s for one in times)
        return {
            "modality": modality,
            "batch_size": size,
            "avg_latency": mean(latencies),
            "latencies": latencies,
            "percentiles": {str(p): linear_percentile(latencies, p) for p in PERCENTILES},
            "median_latency": median(latencies),
            "prefill_s": prefill_s,
            "prefill_tokens_per_s": size * args.input_len / prefill_s,
            "decode_tokens_per_s": median(o.num_decode_tokens / o.decode_s for o in times),
            "ms_per_token": 1e3 * step_s,
            "num_decode_steps": times[0].num_decode_steps,
            "roof": self._roof(counter.loads, size, step_s, bandwidth),
        }

    def _roof(
        self, loads: Sequence[StepLoad], size: int, step_s: float, bandwidth: float
    ) -> dict[str, Any]:
        touched = mean_step_bytes(self._engine, loads)
        roof_s = touched.total / bandwidth
        return {
            "bytes_per_step": touched.total,
            "weight_bytes_per_step": touched.weights,
            "parts": asdict(touched),
            "distinct_experts": mean_distinct_experts(loads),
            "ms_per_token": 1e3 * roof_s,
            "tokens_per_s": size / roof_s,
            "share": roof_s / step_s,
        }

    def _run(self, modality: str, size: int, counter: LoadCounter | None = None) -> BatchTimes:
        return run_batch(self._engine, self._batch(modality, size), counter)

    def _batch(self, modality: str, size: int) -> list[Submission]:
        """A batch that no other is equal to; the same ones in every run with the same seed."""
        number = self._num_batches
        self._num_batches += 1
        rng = random.Random(f"{self._args.seed} {number}")
        bos = self._engine.model_config.bos_token_id
        submissions = []
        for row in range(size):
            ids = (bos, *rng.choices(self._ids, k=self._args.input_len - 1))
            is_picture = modality == "image" or (modality == "mixed" and row % 2 == 1)
            name = f"batch-{number}-row-{row}"
            params = self._params(is_picture, salt=name, seed=rng.getrandbits(32))
            submissions.append(self._engine.make_submission(Prompt(ids), params, name))
        return submissions

    def _params(self, is_picture: bool, *, salt: str, seed: int) -> SamplingParams:
        how = Distribution(temperature=self._args.temperature)
        return SamplingParams(
            mode=OutputMode.IMAGE if is_picture else OutputMode.TEXT,
            # begin_image and end_image come on top of a picture's codes: they are not decoded.
            max_tokens=self.output_len + 2 if is_picture else self.output_len,
            text=how,
            image=how,
            ignore_eos=True,
            seed=seed,
            cache_salt=salt,
        )

    def _trace(self, modality: str, size: int, directory: Path) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with profile(activities=activities) as trace:
                self._run(modality, size)
            trace.export_chrome_trace(str(directory / f"latency-{modality}-batch-{size}.json"))
        except OSError as error:
            raise ConfigError(f"--profile {directory} cannot be written: {error}") from None


def show(results: Sequence[dict[str, Any]], bandwidth: float, args: argparse.Namespace) -> None:
    """The table for people."""
    print_table(
        f"{args.num_iters} batches, prompts of {args.input_len} tokens; medians",
        ("rows decode", "batch", "latency s", "prefill tok/s", "decode tok/s", "ms per token"),
        [
            (
                r["modality"],
                r["batch_size"],
                r["median_latency"],
                r["prefill_tokens_per_s"],
                r["decode_tokens_per_s"],
                r["ms_per_token"],
            )
            for r in results
        ],
    )
    print_table(
        f"the roof: a step's bytes over {bandwidth / 1e9:.3g} GB/s, read from a buffer of "
        f"{args.roof_gib:g} GiB",
        ("rows decode", "batch", "MB per step", "of it K/V", "experts", "roof ms", "share"),
        [
            (
                r["modality"],
                r["batch_size"],
                r["roof"]["bytes_per_step"] / 1e6,
                r["roof"]["parts"]["kv"] / 1e6,
                " ".join(f"{g} {n:.2f}" for g, n in r["roof"]["distinct_experts"].items()) or "-",
                r["roof"]["ms_per_token"],
                f"{r['roof']['share']:.1%}",
            )
            for r in results
        ],
    )
    if args.roof_gib < 1:
        print("  a buffer below 1 GiB may lie in caches: this bandwidth may not be the memory's")
