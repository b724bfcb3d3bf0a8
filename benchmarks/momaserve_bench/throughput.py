"""`momaserve bench throughput`: words and pictures per second, without a server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from momaserve.errors import ConfigError
from momaserve.training.plot import new_figure, save_figure
from momaserve_bench.engine_setup import load_engine, settings_of
from momaserve_bench.offline import OfflineRun, run_offline
from momaserve_bench.report import print_result, print_table
from momaserve_bench.workload import ModelShape, WorkItem, WorkloadSpec


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for settings that cannot work, CheckpointError for a broken model."""
    spec = WorkloadSpec.from_args(args)
    for count in args.concurrency:
        if count < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {count}")
    if args.num_iters < 1:
        raise ConfigError(f"--num-iters must be at least 1, got {args.num_iters}")
    if args.plot is not None:
        new_figure()  # better to hear now that nothing can be drawn
    engine = load_engine(args, num_requests=max(args.concurrency), image_tokens=args.image_tokens)
    items = spec.make(ModelShape.from_engine(engine))
    run_offline(engine, one_of_each_kind(items), concurrency=1, salt="warm-up")
    results: list[dict[str, Any]] = []
    for concurrency in dict.fromkeys(args.concurrency):
        runs = [
            run_offline(
                engine, items, concurrency=concurrency, salt=f"concurrency-{concurrency}-run-{i}"
            )
            for i in range(args.num_iters)
        ]
        results.append({"concurrency": concurrency, **summary(runs)})
    print_table(
        f"{spec.num_prompts} requests, medians over {args.num_iters} runs",
        ("at a time", "elapsed s", "requests/s", "text tok/s", "code tok/s", "images/s"),
        [
            (
                r["concurrency"],
                r["elapsed_time"],
                r["requests_per_second"],
                r["text_output_throughput"],
                r["image_output_throughput"],
                r["images_per_s"],
            )
            for r in results
        ],
    )
    if args.plot is not None:
        draw(results, args.plot)
    settings = settings_of(args, engine.model_name)
    settings["dtype"] = str(engine.dtype).split(".")[-1]
    print_result("throughput", settings, {**results[0], "results": results})
    return 0


def one_of_each_kind(items: Sequence[WorkItem]) -> list[WorkItem]:
    """The first request of every kind."""
    first = {item.kind: item for item in reversed(items)}
    return sorted(first.values(), key=lambda item: item.index)


def summary(runs: Sequence[OfflineRun]) -> dict[str, Any]:
    """Medians over runs of the same requests, under vLLM's names where it has one."""
    elapsed = median(one.elapsed_s for one in runs)
    first = runs[0]
    num_output = first.text_tokens + first.image_tokens
    num_tokens = first.prompt_tokens + num_output
    return {
        "elapsed_time": elapsed,
        "elapsed_times": [one.elapsed_s for one in runs],
        "num_requests": first.num_requests,
        "total_num_tokens": num_tokens,
        "total_input_tokens": first.prompt_tokens,
        "total_output_tokens": num_output,
        "cached_tokens": first.cached_tokens,
        "images": first.images,
        "requests_per_second": first.num_requests / elapsed,
        "tokens_per_second": num_tokens / elapsed,
        "output_throughput": num_output / elapsed,
        "text_output_throughput": first.text_tokens / elapsed,
        "image_output_throughput": first.image_tokens / elapsed,
        "images_per_s": first.images / elapsed,
    }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens and pictures per second against concurrency.

    Raises:
        ConfigError: the file cannot be written, or there is no matplotlib.
    """
    figure = new_figure(2)
    tokens, images = figure.subplots(1, 2)
    counts = [r["concurrency"] for r in results]
    for name in ("text", "image"):
        rates = [r[f"{name}_output_throughput"] for r in results]
        tokens.plot(counts, rates, "o-", label=name)
    tokens.set_ylabel("output tokens per second")
    tokens.legend()
    images.plot(counts, [r["images_per_s"] for r in results], "o-", label="pictures")
    images.plot(counts, [r["requests_per_second"] for r in results], "o-", label="requests")
    images.set_ylabel("per second")
    images.legend()
    for axes in (tokens, images):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("requests at the same time")
        axes.set_ylim(bottom=0)
    try:
        save_figure(figure, path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None
