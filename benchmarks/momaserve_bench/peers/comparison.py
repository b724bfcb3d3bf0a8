"""`momaserve bench peers`: pairs of shapes, one after the other, and what is said of them."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve_bench.peers.arguments import PAIRS
from momaserve_bench.peers.contest import Case, Contest, Measured, entrants_of
from momaserve_bench.peers.engine_process import EngineFailure, EngineProcess
from momaserve_bench.peers.engines import OURS, launch, why_not
from momaserve_bench.peers.rates import DEFINITION, best, ratios, summary
from momaserve_bench.peers.shapes import num_parameters, peer_config
from momaserve_bench.peers.weights import write_checkpoint
from momaserve_bench.report import print_result, print_table

_BLOCK = 128
"""The largest block of any engine's cache: sequences take whole ones."""


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if ours ran everywhere; what peers could not do is in the report.

    Raises:
        ConfigError: a value that cannot work.
    """
    for name in ("peers", "pairs", "batch_sizes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    cores = len(os.sched_getaffinity(0))
    args.threads = cores if args.threads is None else args.threads
    check(args, cores)
    pairs = [_compare(pair, args) for pair in args.pairs]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("bench", "save_result")}
    metrics = {"definition": DEFINITION, "pairs": pairs}
    print_result("peers", settings, metrics, save=args.save_result)
    return 0 if all(OURS not in pair["missing"] for pair in pairs) else 1


def check(args: argparse.Namespace, cores: int) -> None:
    """Raises ConfigError naming an option, its value and its limit."""
    check_work(args, cores)
    for pair in args.pairs:
        _check_lengths(args, preset_config(PAIRS[pair]), pair)


def check_work(args: argparse.Namespace, cores: int) -> None:
    """Batches, lengths, rounds, threads and times, whoever takes turns.

    Raises:
        ConfigError: names an option, its value and its limit.
    """
    limits = {"input_len": 1, "output_len": 2, "prefill_len": 0, "rounds": 1, "threads": 1}
    for name, least in limits.items():
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, got {getattr(args, name)}")
    for size in args.batch_sizes:
        if size < 1:
            raise ConfigError(f"--batch-sizes must be at least 1, got {size}")
    if args.threads > cores:
        raise ConfigError(f"--threads must be at most the {cores} cores here, got {args.threads}")
    if not 0 <= args.pause < float("inf"):
        raise ConfigError(f"--pause must be at least 0 seconds, got {args.pause}")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout must be more than 0 seconds, got {args.timeout}")
    if args.save_result is not None and not args.save_result.absolute().parent.is_dir():
        raise ConfigError(f"--save-result: there is no folder {args.save_result.parent}")


def _check_lengths(args: argparse.Namespace, config: ModelConfig, pair: str) -> None:
    limit = config.max_position_embeddings
    if args.input_len + args.output_len > limit:
        raise ConfigError(
            f"--input-len and --output-len together must be at most {limit}, got "
            f"{args.input_len} + {args.output_len}"
        )
    if args.prefill_len + 1 > limit:
        raise ConfigError(f"--prefill-len must be at most {limit - 1}, got {args.prefill_len}")
    if config.image is None or len(config.expert_groups) == 1:
        return
    codes = config.image.tokens_per_image
    if args.output_len > codes:
        raise ConfigError(
            f"--output-len must be at most {codes} for {pair}, whose pictures have that many "
            f"tokens, got {args.output_len}"
        )
    if args.input_len + codes + 2 > limit:
        raise ConfigError(
            f"--input-len must be at most {limit - codes - 2} for {pair}, which leaves room for a "
            f"picture, got {args.input_len}"
        )


def cases_of(args: argparse.Namespace) -> list[Case]:
    cases = [
        Case(kind="decode", batch_size=n, input_len=args.input_len, output_len=args.output_len)
        for n in args.batch_sizes
    ]
    if args.prefill_len:
        cases.append(Case(kind="prefill", batch_size=1, input_len=args.prefill_len, output_len=1))
    return cases


def kv_cache_bytes(config: ModelConfig, cases: list[Case], dtype: str) -> int:
    """Bytes of K/V with room for the largest case, and for one request of whole length."""
    num_tokens = max(
        case.batch_size * (-(-(case.input_len + case.output_len) // _BLOCK) + 1) * _BLOCK
        for case in cases
    )
    itemsize = 2 if dtype == "bfloat16" else 4
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (num_tokens + config.max_position_embeddings) * width * itemsize


def _compare(pair: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one pair; prints its tables."""
    config = preset_config(PAIRS[pair])
    root, cases = args.environments.absolute(), cases_of(args)
    missing: dict[str, str] = {}
    for peer in args.peers:
        reason = why_not(peer, config.num_experts > 1, root)
        if reason is not None:
            missing[peer] = reason
            print(f"peers: {pair}: {peer} is absent: {reason}", flush=True)
    present = [peer for peer in args.peers if peer not in missing]
    twin = peer_config(config)
    name = f"{twin['model_type']}-{num_parameters(twin)}-seed{args.seed}"
    checkpoint = root / "models" / name  # pairs of one shape share it
    if present:
        print(f"peers: {pair}: weights of the others in {checkpoint.name}", flush=True)
        try:
            write_checkpoint(checkpoint, twin, args.seed)
        except OSError as error:
            raise ConfigError(f"--environments: {checkpoint} cannot be written: {error}") from error
    job = {
        "dtype": args.dtype,
        "threads": args.threads,
        "max_model_len": max(case.input_len + case.output_len for case in cases),
        "max_batch_size": max(case.batch_size for case in cases),
        "kv_cache_bytes": kv_cache_bytes(config, cases, args.dtype),
    }
    jobs = {peer: {**job, "model": str(checkpoint)} for peer in present}
    jobs[OURS] = {**job, "model": PAIRS[pair]}
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        players: list[EngineProcess] = []
        for name in (OURS, *present):
            log = root / "logs" / f"{pair}-{name}.log"
            try:
                process = EngineProcess(launch(name, args.threads, root), log, args.timeout)
            except EngineFailure as failure:
                missing[name] = str(failure)
                print(f"peers: {pair}: {failure}", flush=True)
                continue
            players.append(stack.enter_context(process))
        contest = Contest(
            players,
            config,
            seed=args.seed,
            pause_s=args.pause,
            say=lambda line: print(f"peers: {pair}: {line}", flush=True),
        )
        contest.load(jobs)
        for case in cases:
            entrants = entrants_of(list(contest.players), config, case)
            results += _report_case(case, contest.run(case, entrants, args.rounds))
        engines = contest.engines
        for name, one in engines.items():
            idle = contest.idleness[name]
            one["idle_cpu_share"] = idle.cpu_s / idle.wall_s if idle.wall_s else None
        missing.update(contest.failures)
    _print_pair(pair, engines, results, missing)
    return {
        "pair": pair,
        "preset": PAIRS[pair],
        "peer_architecture": twin["model_type"],
        "peer_num_parameters": num_parameters(twin),
        "engines": engines,
        "missing": missing,
        "results": results,
    }


def _report_case(case: Case, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """One row for each entrant; ratios stand with ours."""
    medians = {label: summary(one.rates).median for label, one in measured.items()}
    peers = {label: rate for label, rate in medians.items() if not label.startswith(OURS)}
    champion = best(peers)
    rows: list[dict[str, Any]] = []
    for label, one in measured.items():
        rate, first = summary(one.rates), summary(one.first_token_s)
        row: dict[str, Any] = {
            "kind": case.kind,
            "batch_size": case.batch_size,
            "input_len": case.input_len,
            "output_len": case.output_len,
            "engine": label,
            "tokens_per_s": rate.median,
            "tokens_per_s_range": [rate.lowest, rate.highest],
            "tokens_per_s_rounds": one.rates,
            "median_ttft_ms": 1e3 * first.median,
            "num_distinct_tokens": one.num_distinct_tokens,
        }
        if label in peers:
            row["first_tokens_agree"] = _agreement(one, measured[next(iter(peers))])
        if label not in peers and champion is not None:
            row["ratios"] = ratios(rate.median, peers)
            row["best_peer"] = champion
            row["ratio_to_best"] = row["ratios"][champion]
        rows.append(row)
    return rows


def _agreement(one: Measured, other: Measured) -> float:
    """Share of rows with the same first token. Peers have the same weights, so near 1 is right;
    roundings differ, so exactly 1 is not promised."""
    pairs = list(zip(one.first_token_ids, other.first_token_ids, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def _print_pair(
    pair: str,
    engines: dict[str, dict[str, Any]],
    results: list[dict[str, Any]],
    missing: dict[str, str],
) -> None:
    print_table(
        f"{pair}: engines",
        ("engine", "versions", "load s", "CPU while idle"),
        [
            (
                name,
                ", ".join(f"{package} {number}" for package, number in one["versions"].items()),
                one["load_s"],
                "-" if one["idle_cpu_share"] is None else one["idle_cpu_share"],
            )
            for name, one in engines.items()
        ],
    )
    print_table(
        f"{pair}: tokens/s, and ours over theirs",
        (
            "what",
            "batch",
            "engine",
            "median",
            "lowest",
            "highest",
            "TTFT ms",
            "over best",
            "over each",
        ),
        [
            (
                row["kind"],
                row["batch_size"],
                row["engine"],
                row["tokens_per_s"],
                *row["tokens_per_s_range"],
                row["median_ttft_ms"],
                row.get("ratio_to_best", "-"),
                " ".join(f"{n} {ratio:.2f}" for n, ratio in row.get("ratios", {}).items()),
            )
            for row in results
        ],
    )
    for name, reason in missing.items():
        print(f"  not measured: {name}: {reason}")
