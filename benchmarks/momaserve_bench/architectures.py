"""`momaserve bench architectures`: what sparsity of equal FLOPs costs and saves at inference."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from momaserve.environment import machine
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.info import describe
from momaserve.models.presets import preset_config
from momaserve.sampling import Distribution, SamplingParams
from momaserve.training.plot import new_figure
from momaserve_bench.architectures_cost import (
    active_flops,
    available_bytes,
    expected_step_bytes,
    groups_that_fit,
    kv_cache_bytes,
    needed_bytes,
    weight_bytes,
)
from momaserve_bench.architectures_findings import Finding, add_ratios, rows_of
from momaserve_bench.architectures_options import DENSE, PRESETS
from momaserve_bench.architectures_plot import draw
from momaserve_bench.architectures_report import markdown, print_report
from momaserve_bench.engine_setup import with_image_tokens
from momaserve_bench.peers.comparison import cases_of, check_work
from momaserve_bench.peers.contest import Case, Contest, Entrant
from momaserve_bench.peers.engine_process import EngineFailure, EngineProcess
from momaserve_bench.peers.engines import launch_ours
from momaserve_bench.peers.rates import DEFINITION
from momaserve_bench.report import check_writable, print_result
from momaserve_bench.results_page import ResultsPage
from momaserve_bench.roof import SMALLEST_BUFFER_BYTES, measure_read_bandwidth

_GIB = 1 << 30
_STEP_TOKENS = 1024
"""Of one step, or more where a batch of prompts has more: all rows start together."""
_NO_SETTING = ("bench", "logs", "page", "plot", "save_result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What runs: `names` in the order of their turns."""

    names: tuple[str, ...]
    configs: Mapping[str, ModelConfig]
    """With pictures of `--output-len` codes."""
    cases: tuple[Case, ...]
    args: argparse.Namespace

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        names = tuple(name for name in PRESETS if name in args.architectures)
        configs = {
            name: with_image_tokens(preset_config(_preset(name, args)), args.output_len)
            for name in names
        }
        return cls(names=names, configs=configs, cases=tuple(cases_of(args)), args=args)

    def modalities(self, case: Case) -> list[str]:
        """What rows decode in a case; a prompt alone is words, and one row has no halves."""
        if case.kind == "prefill":
            return ["text"]
        return [one for one in self.args.modality if one != "mixed" or case.batch_size > 1]

    def job(self, name: str) -> dict[str, Any]:
        """What a process is asked to load."""
        args = self.args
        batch_size = max(case.batch_size for case in self.cases)
        return {
            "model": _preset(name, args),
            "dtype": args.dtype,
            "threads": args.threads,
            "max_batch_size": batch_size,
            "max_num_step_tokens": max(_STEP_TOKENS, batch_size * args.input_len),
            "kv_cache_bytes": kv_cache_bytes(self.configs[name], self.cases, args.dtype),
            "image_tokens": args.output_len,
            "temperature": args.temperature,
        }


@dataclass(slots=True)
class Found:
    """What all groups gave."""

    findings: list[Finding] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each architecture that loaded: versions, settings, load time, memory."""
    missing: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every architecture did all of its work; what could not is in the report.

    Raises:
        ConfigError: a value that cannot work, architectures that memory has no room for, or no
            matplotlib where something is to be drawn.
        DataError: a page without marks.
    """
    for name in ("architectures", "modality", "batch_sizes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    cores = len(os.sched_getaffinity(0))
    args.threads = cores if args.threads is None else args.threads
    check(args, cores)
    picture = None
    if args.page is not None:
        ResultsPage.open(args.page)
        picture = args.page.with_name("architectures.png")
    for flag, path in (("--save-result", args.save_result), ("--plot", args.plot)):
        check_writable(flag, path)
    if args.plot is not None or picture is not None:
        new_figure()  # better to hear now than after an hour that nothing can be drawn
    plan = Plan.of(args)
    needed = {n: needed_bytes(plan.configs[n], plan.cases, args.dtype) for n in plan.names}
    available = available_bytes()
    room = None if available is None else available - round(args.roof_gib * _GIB)
    found = Found()
    groups = groups_that_fit(needed, room)
    if len(groups) > 1:
        _say(f"too little memory for all: {DENSE} takes turns with one other at a time")
    for number, names in enumerate(groups):
        _measure(plan, number, names, found)
    report = _report(plan, groups, found)
    print_report(report)
    for path in (args.plot, picture):
        if path is not None:
            draw(report, path)
    if picture is not None:
        ResultsPage.open(args.page).write(markdown(report, picture.name))
    settings = report.pop("settings")
    report.pop("machine")
    print_result("architectures", settings, report, save=args.save_result)
    return 1 if found.missing else 0


def check(args: argparse.Namespace, cores: int) -> None:
    """Raises ConfigError, or SamplingError for the temperature, naming a value and its limit."""
    check_work(args, cores)
    SamplingParams(text=Distribution(temperature=args.temperature))
    if DENSE not in args.architectures:
        raise ConfigError(f"--architectures must have {DENSE}: all ratios are against it")
    if "mixed" in args.modality:
        for size in args.batch_sizes:
            if size > 1 and size % 2:
                raise ConfigError(
                    f"--batch-sizes must be 1 or even, for half of the rows of a mixed batch draw, "
                    f"got {size}"
                )
        if args.modality == ["mixed"] and 1 in args.batch_sizes:
            raise ConfigError("--batch-sizes must be at least 2 for mixed batches alone, got 1")
    if not args.roof_gib * _GIB >= SMALLEST_BUFFER_BYTES or args.roof_gib == float("inf"):
        least = SMALLEST_BUFFER_BYTES / _GIB
        raise ConfigError(f"--roof-gib must be at least {least:.4f}, got {args.roof_gib}")
    limit = preset_config(_preset(DENSE, args)).max_position_embeddings
    if args.input_len + args.output_len + 2 > limit:
        raise ConfigError(
            f"--input-len and --output-len together must be at most {limit - 2}, got "
            f"{args.input_len} + {args.output_len}"
        )
    if args.prefill_len + 1 > limit:
        raise ConfigError(f"--prefill-len must be at most {limit - 1}, got {args.prefill_len}")


def _preset(name: str, args: argparse.Namespace) -> str:
    return PRESETS[name].format(size=args.size)


def _say(line: str) -> None:
    print(f"architectures: {line}", flush=True)


def _measure(plan: Plan, number: int, names: Sequence[str], found: Found) -> None:
    """One group: everything about it goes into `found`."""
    args = plan.args
    with ExitStack() as stack:
        players: list[EngineProcess] = []
        for name in names:
            log = args.logs.absolute() / f"{args.size}-{name}.log"
            try:
                process = EngineProcess(launch_ours(name, args.threads), log, args.timeout)
            except EngineFailure as failure:
                found.missing[name] = str(failure)
                _say(str(failure))
                continue
            players.append(stack.enter_context(process))
        # Ids mean the same in all of them, so one configuration makes everybody's prompts.
        contest = Contest(
            players, plan.configs[DENSE], seed=args.seed, pause_s=args.pause, say=_say
        )
        contest.load({name: plan.job(name) for name in names})
        for case in plan.cases:
            _say(f"{case.kind}, {case.batch_size} row(s): {', '.join(contest.players)}")
            found.findings += _take_turns(plan, number, case, names, contest)
        for name in list(contest.players):
            memory = contest.ask(name, {"memory": {}})
            idle = contest.idleness[name]
            share = idle.cpu_s / idle.wall_s if idle.wall_s else None
            if memory is not None:
                one = {**contest.engines[name], **memory, "idle_cpu_share": share}
                found.engines.setdefault(name, one)
        found.missing.update(contest.failures)


def _take_turns(
    plan: Plan, number: int, case: Case, names: Sequence[str], contest: Contest
) -> list[Finding]:
    args = plan.args
    is_decode = case.kind == "decode"
    bandwidth = (
        measure_read_bandwidth(round(args.roof_gib * _GIB), threads=args.threads)
        if is_decode
        else None
    )
    # One kind of rows after the other; within it, everybody has a turn.
    entrants = [Entrant(name, rows) for rows in plan.modalities(case) for name in names]
    measured = contest.run(case, entrants, args.rounds)
    findings: list[Finding] = []
    for entrant in entrants:
        name, one = entrant.engine, measured.get(entrant.label)
        if one is None:
            continue
        touched = None
        if is_decode:  # the last round again, with the same tokens, watched
            touched = contest.ask(name, {"touched": contest.work(case, entrant.rows, args.rounds)})
            if touched is None:
                continue
            touched["expected_bytes_per_step"] = expected_step_bytes(
                plan.configs[name],
                entrant.rows,
                case.batch_size,
                context=case.input_len + case.output_len // 2,
                dtype=args.dtype,
            )
        findings.append(
            Finding(
                group=number,
                architecture=name,
                kind=case.kind,
                rows=entrant.rows,
                batch_size=case.batch_size,
                rates=tuple(one.rates),
                first_token_s=tuple(one.first_token_s),
                touched=touched,
                read_bandwidth=bandwidth,
            )
        )
    return findings


def _report(plan: Plan, groups: Sequence[tuple[str, ...]], found: Found) -> dict[str, Any]:
    args = plan.args
    architectures: list[dict[str, Any]] = []
    for name in plan.names:
        if name not in found.engines:
            continue
        config, flops = plan.configs[name], active_flops(plan.configs[name])
        architectures.append(
            {
                "architecture": name,
                "preset": _preset(name, args),
                "num_parameters": describe(config).num_parameters,
                **{f"{modality}_flops_per_token": count for modality, count in flops.items()},
                "weight_bytes": weight_bytes(config, args.dtype),
                "kv_cache_bytes": kv_cache_bytes(config, plan.cases, args.dtype),
                **found.engines[name],
            }
        )
    keys = ("text_flops_per_token", "image_flops_per_token", "weight_bytes", "resident_bytes")
    add_ratios(architectures, keys)
    settings = {name: value for name, value in vars(args).items() if name not in _NO_SETTING}
    return {
        "settings": settings,
        "machine": machine(),
        "definition": DEFINITION,
        "groups": [list(names) for names in groups],
        "architectures": architectures,
        "results": rows_of(found.findings),
        "missing": found.missing,
    }
